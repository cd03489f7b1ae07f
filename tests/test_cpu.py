# SPDX-License-Identifier: Apache-2.0
"""The cpu backend against the definition of the operator, written as a loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from layouts import cases, expected, forget, same, simple_case

import pagedcache as pc
from pagedcache import infiniop
from pagedcache.status import Status


@settings(max_examples=400, deadline=None)
@given(cases())
def test_writes_what_the_definition_says(case):
    wanted = expected(case)
    pc.paged_caching(*case.arrays(), layout=case.layout)
    same(case, wanted)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_raw_addresses_write_the_same(case):
    wanted = expected(case)
    with pc.Descriptor.create(*case.arrays(), layout=case.layout) as descriptor:
        if case.views["slot_mapping"].size:
            descriptor.calculate(*case.addresses())
        else:
            descriptor.calculate(*case.arrays())
    same(case, wanted)


@pytest.mark.parametrize("tokens", [0, 1, 65_535, 65_536, 70_001])
def test_any_number_of_tokens(tokens):
    case = simple_case(tokens, heads=1, k_size=3, v_size=2, blocks=4_400, block_size=16)
    descriptor = pc.Descriptor.create(*simple_case(heads=1, k_size=3, v_size=2, blocks=4_400,
                                                   block_size=16).arrays())  # fmt: skip
    wanted = expected(case)
    descriptor.calculate(*case.arrays())
    same(case, wanted)


def test_rows_past_the_slot_mapping_do_not_matter():
    case = simple_case(tokens=9)
    wanted = expected(case)
    k_cache, v_cache, k, v, slots = case.arrays()
    padded = np.concatenate([k, np.full_like(k, 7)])
    pc.paged_caching(k_cache, v_cache, padded, v, slots)
    same(case, {name: wanted[name] for name in ("k_cache", "v_cache")})


@pytest.mark.parametrize("fused", [False, True])
def test_a_descriptor_made_for_one_token_serves_many(fused):
    many = simple_case(tokens=9)
    k_cache, v_cache, k, v, slots = many.arrays()
    if fused:
        qkv = np.concatenate([k, k, v], -1)
        k, v = qkv[..., 8:16], qkv[..., 16:]
        first = k[:1], v[:1]
    else:
        first = k[0][None], v[0][None]
        assert first[0].strides[0] == 0  # a step that NumPy made up
    wanted = expected(many)
    with pc.Descriptor.create(k_cache, v_cache, *first, slots[:1]) as descriptor:
        descriptor.calculate(k_cache, v_cache, k, v, slots)
    same(many, {name: wanted[name] for name in ("k_cache", "v_cache")})


def test_every_bit_pattern_survives():
    for dtype, bits in (("float16", np.uint16), ("bfloat16", np.uint16)):
        patterns = np.arange(65_536, dtype=bits).reshape(256, 1, 256)
        k = patterns.view(dtype)
        k_cache, v_cache = np.zeros((2, 256, 1, 1, 256), dtype)
        pc.paged_caching(k_cache, v_cache, k, k, np.arange(256))
        assert np.array_equal(k_cache.view(bits).reshape(256, 1, 256), patterns)
        assert np.array_equal(v_cache.view(bits).reshape(256, 1, 256), patterns)


@pytest.mark.parametrize("build", ["stacked", "packed", "interleaved", "permuted"])
def test_views_of_one_pool(build):
    blocks, heads, block_size, size = 5, 3, 4, 8
    rng = np.random.default_rng(1)
    pool = {
        "stacked": (2, blocks, heads, block_size, size),
        "packed": (blocks, heads, block_size, 2 * size),
        "interleaved": (blocks, 2, heads, block_size, size),
        "permuted": (blocks, block_size, heads, 2 * size),
    }[build]
    pool = rng.integers(0, 1000, pool).astype(np.float32)
    k_cache, v_cache = {
        "stacked": lambda: (pool[0], pool[1]),
        "packed": lambda: (pool[..., :size], pool[..., size:]),
        "interleaved": lambda: (pool[:, 0], pool[:, 1]),
        "permuted": lambda: tuple(
            half.transpose(0, 2, 1, 3) for half in (pool[..., :size], pool[..., size:])
        ),
    }[build]()
    qkv = rng.integers(0, 1000, (6, (4 + 2) * heads * size)).astype(np.float32)
    k = qkv[:, 4 * heads * size : 5 * heads * size].reshape(6, heads, size)
    v = qkv[:, 5 * heads * size :].reshape(6, heads, size)
    assert k.base is not None
    slots = np.array([19, 3, -1, 0, 20, 8], np.int32)
    wanted = pool.copy()
    wanted_k, wanted_v = {
        "stacked": lambda: (wanted[0], wanted[1]),
        "packed": lambda: (wanted[..., :size], wanted[..., size:]),
        "interleaved": lambda: (wanted[:, 0], wanted[:, 1]),
        "permuted": lambda: tuple(
            half.transpose(0, 2, 1, 3) for half in (wanted[..., :size], wanted[..., size:])
        ),
    }[build]()
    for token, slot in enumerate(slots):
        if 0 <= slot < 20:
            wanted_k[slot // 4, :, slot % 4] = k[token]
            wanted_v[slot // 4, :, slot % 4] = v[token]
    pc.paged_caching(k_cache, v_cache, k, v, slots)
    assert np.array_equal(pool, wanted)


def test_caches_past_4_gib(tmp_path):
    rows = 2**31 // (16 * 64) + 8  # 8 GiB, of which a few pages are touched
    k_cache, v_cache = (
        np.memmap(tmp_path / name, np.float32, "w+", shape=(rows, 1, 16, 64)) for name in "kv"
    )
    k = np.arange(1, 3 * 64 + 1, dtype=np.float32).reshape(3, 1, 64)
    last = rows * 16 - 1
    pc.paged_caching(k_cache, v_cache, k, k + 1, np.array([0, last, last + 1]))
    assert np.array_equal(k_cache[0, 0, 0], k[0, 0])
    assert np.array_equal(k_cache[-1, 0, -1], k[1, 0])
    assert np.array_equal(v_cache[-1, 0, -1], k[1, 0] + 1)
    assert not k_cache[0, 0, 1:].any()
    assert not v_cache[-1, 0, :-1].any()


def test_infiniop_on_addresses():
    case = simple_case(dtype="float16", slots="int32")
    wanted = expected(case)
    ok, handle = infiniop.infiniopCreateHandle(infiniop.InfiniDevice.CPU, 0)
    assert ok == Status.SUCCESS
    described = []
    for view in case.arrays():
        kind = infiniop.InfiniDtype.I32 if view.ndim == 1 else infiniop.InfiniDtype.F16
        strides = [step // view.itemsize for step in view.strides]
        ok, tensor = infiniop.infiniopCreateTensorDescriptor(view.ndim, view.shape, strides, kind)
        assert ok == Status.SUCCESS
        described.append(tensor)
    ok, descriptor = infiniop.infiniopCreatePagedCachingDescriptor(handle, *described)
    assert ok == Status.SUCCESS
    ok, size = infiniop.infiniopGetPagedCachingWorkspaceSize(descriptor)
    assert (ok, size) == (Status.SUCCESS, 0)
    ok = infiniop.infiniopPagedCaching(descriptor, None, size, *case.addresses(), None)
    assert ok == Status.SUCCESS
    same(case, wanted)
    for tensor in described:
        assert infiniop.infiniopDestroyTensorDescriptor(tensor) == Status.SUCCESS
    assert infiniop.infiniopDestroyPagedCachingDescriptor(descriptor) == Status.SUCCESS
    assert infiniop.infiniopDestroyHandle(handle) == Status.SUCCESS
    again = infiniop.infiniopPagedCaching(descriptor, None, 0, *case.addresses(), None)
    assert again == Status.BAD_PARAM


def test_one_row_and_then_one_that_stands_for_many(monkeypatch):
    """Both look alike but for the number of rows; a descriptor for one does not serve the other."""
    forget(monkeypatch)
    k_cache, v_cache = np.zeros((2, 3, 1, 2, 4), np.float16)
    row = np.ones((1, 1, 4), np.float16)
    pc.paged_caching(k_cache, v_cache, np.broadcast_to(row, (1, 1, 4)), row, np.array([1]))
    many = np.lib.stride_tricks.as_strided(row, (3, 1, 4), (0, 8, 2))
    one = np.lib.stride_tricks.as_strided(row, (1, 1, 4), (0, 8, 2))
    for rows, slots in ((one, [0]), (many, [5, 2, 3]), (one, [4]), (row, [1])):
        pc.paged_caching(k_cache, v_cache, rows, rows, np.array(slots))
    assert (k_cache == 1).all()
    assert (v_cache == 1).all()


def test_strided_slots_after_one_slot_of_the_same_step():
    case = simple_case()
    k_cache, v_cache, k, v, _ = case.arrays()
    wide = np.array([3, 0, 5, 0, 7, 0])
    pc.paged_caching(k_cache, v_cache, k, v, wide[:1:2])
    with pytest.raises(ValueError, match="slot_mapping must have stride"):
        pc.paged_caching(k_cache, v_cache, k, v, wide[::2])
