# SPDX-License-Identifier: Apache-2.0
"""The cpu backend against the definition of the operator, written as a loop over tokens."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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


@st.composite
def runs_of_slots(draw):
    """Draw slots in runs, as prompts have them: whole blocks, parts of blocks, and gaps."""
    blocks, block_size = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    free = list(draw(st.permutations(range(blocks))))
    slots = []
    while free:
        taken = [free.pop()]
        while taken[-1] + 1 in free and draw(st.booleans()):  # one run of several blocks
            free.remove(taken[-1] + 1)
            taken.append(taken[-1] + 1)
        first, end = taken[0] * block_size, (taken[-1] + 1) * block_size
        run = list(range(first + draw(st.integers(0, 1)), end - draw(st.integers(0, 1))))
        if draw(st.integers(0, 3)) == 0:
            run.reverse()
        if run and draw(st.integers(0, 3)) == 0:
            run[draw(st.integers(0, len(run) - 1))] = draw(
                st.sampled_from([-1, blocks * block_size])
            )
        slots += run + [-1] * draw(st.integers(0, 2))
    return blocks, block_size, slots


@settings(max_examples=400, deadline=None)
@given(runs_of_slots(), st.sampled_from(["HND", "NHD"]), st.integers(1, 2), st.booleans())
def test_any_order_of_slots(drawn, layout, heads, apart):
    blocks, block_size, slots = drawn
    case = simple_case(len(slots), heads, 3, 4, blocks, block_size, layout=layout)
    case.views["slot_mapping"][...] = slots
    wanted = expected(case)
    arrays = case.arrays()
    if apart:  # rows of V that are not contiguous, while those of K are
        arrays[3] = np.concatenate([arrays[3]] * 2, -1)[..., :4]
    pc.paged_caching(*arrays, layout=layout)
    same(case, wanted)


def test_bound_writes():
    case = simple_case()
    slots = case.views["slot_mapping"]
    descriptor = pc.Descriptor.create(*case.arrays())
    write = descriptor.bind(*case.arrays())
    at_addresses = descriptor.bind(*case.addresses(), stream=3)
    for turn in range(6):
        for name in ("k", "v"):
            case.buffers[name][...] = turn + 1
        slots[...] = np.roll(np.arange(9) * 3, turn)
        wanted = expected(case)
        (write, at_addresses)[turn % 2]()
        same(case, wanted)
    k_cache, v_cache, k, v, _ = case.arrays()
    wanted = case.copy().buffers
    descriptor.bind(k_cache, v_cache, k[:0], v, slots[:0])()
    same(case, wanted)
    slots[4] = 28
    write()
    with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[4\] = 28"):
        descriptor.check()
    raising = pc.Descriptor.create(*case.arrays(), on_invalid="raise").bind(*case.arrays())
    for _ in range(2):
        with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[4\] = 28"):
            raising()
    for bad in (
        (k_cache, k_cache, k, v, slots),
        (k_cache, v_cache, k[:3], v, slots),
        (k_cache, v_cache, k, v, slots.astype(np.int32)),
        (k_cache[:3], v_cache, k, v, slots),
    ):
        with pytest.raises(pc.PagedCacheError):
            descriptor.bind(*bad)
    descriptor.destroy()
    before = case.copy().buffers
    for call in (write, at_addresses, lambda: descriptor.bind(*case.arrays())):
        with pytest.raises(RuntimeError, match="has been destroyed"):
            call()
    same(case, before)


def test_a_bound_write_keeps_its_arrays_and_nothing_else_does():
    arrays = [array.copy() for array in simple_case().arrays()]
    alive = [weakref.ref(array) for array in arrays]
    descriptor = pc.Descriptor.create(*arrays)
    descriptor.calculate(*arrays)
    write = descriptor.bind(*arrays)
    del arrays
    gc.collect()
    assert all(one() is not None for one in alive)
    write()
    del write
    gc.collect()
    assert not any(one() is not None for one in alive)


def test_arrays_that_are_known_are_refused_after_destroy():
    case = simple_case()
    descriptor = pc.Descriptor.create(*case.arrays())
    for _ in range(2):
        descriptor.calculate(*case.arrays())
        descriptor.calculate(*case.addresses())
    descriptor.destroy()
    for name in ("k", "v"):
        case.buffers[name][...] = 0
    before = case.copy().buffers
    for five in (case.arrays(), case.addresses()):
        with pytest.raises(RuntimeError, match="has been destroyed"):
            descriptor.calculate(*five)
    same(case, before)
