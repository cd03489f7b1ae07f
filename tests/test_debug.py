# SPDX-License-Identifier: Apache-2.0
"""Debug mode and shared memory: each mistake has an error of its own, and nothing is written."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from host_device import HostDevice, descriptor_on
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import cases, expected, same, simple_case
from numpy.lib.stride_tricks import as_strided

import pagedcache as pc
from pagedcache.status import Status
from pagedcache.tensors import overlap, overlaps_itself

NAMES = ("k_cache", "v_cache", "k", "v", "slot_mapping")


def finite(case):
    """Fill K and V with numbers that are finite; random bytes are not always."""
    for name in ("k", "v"):
        view = case.views[name]
        view[...] = np.arange(view.size).reshape(view.shape) % 100
    return case


@pytest.fixture(params=["cpu backend", "nvidia backend on the host"])
def make(request):
    if request.param == "cpu backend":
        return lambda case: pc.Descriptor.create(*case.arrays(), debug=True)
    device = HostDevice(request.getfixturevalue("compiler"))
    return lambda case: descriptor_on(device, case, debug=True)


def refused(case, make, kind, *words):
    untouched = case.copy().buffers
    with make(case) as descriptor:
        for _ in range(2):
            with pytest.raises(kind) as caught:
                descriptor.calculate(*case.arrays())
            assert caught.value.status == Status.BAD_PARAM
            for word in words:
                assert word in str(caught.value), str(caught.value)
            same(case, untouched)


def test_good_input_is_written(make):
    case = finite(simple_case())
    wanted = expected(case)
    with make(case) as descriptor:
        for _ in range(3):
            descriptor.calculate(*case.arrays())
    same(case, wanted)


def test_duplicate_slots(make):
    case = finite(simple_case(tokens=8))
    case.views["slot_mapping"][...] = [-1, 9, 3, -1, 4, 3, 9, 3]
    refused(case, make, pc.DuplicateSlotError, "tokens 2 and 5", "slot 3")


def test_padding_and_invalid_slots_are_no_duplicates(make):
    case = finite(simple_case(tokens=8))
    case.views["slot_mapping"][...] = [-1, 9, 99, -1, 4, 3, 99, -1]
    wanted = expected(case)
    with make(case) as descriptor:
        descriptor.calculate(*case.arrays())
        with pytest.raises(pc.InvalidSlotError, match="2 invalid slots since the last check"):
            descriptor.check()
    same(case, wanted)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k", "v"])
def test_values_that_are_not_finite(make, name, value, dtype):
    case = finite(simple_case(dtype=dtype))
    case.views["slot_mapping"][...] = np.arange(9)
    case.views[name][4, 2, 7] = case.views[name][6, 0, 0] = value
    refused(case, make, pc.NonFiniteError, f"{name}[4, 2, 7] must be finite, got {value}")


def test_rows_that_are_not_written_may_hold_anything(make):
    case = finite(simple_case())
    case.views["slot_mapping"][...] = np.arange(9)
    case.views["slot_mapping"][4] = -1
    case.views["k"][4] = np.nan
    wanted = expected(case)
    with make(case) as descriptor:
        descriptor.calculate(*case.arrays())
    same(case, wanted)


@pytest.mark.parametrize("name", ["k", "v", "slot_mapping"])
@pytest.mark.parametrize("cache", ["k_cache", "v_cache"])
def test_a_source_in_a_cache(name, cache):
    case = finite(simple_case(dtype="float32", slots="int64"))
    case.buffers[cache][...] = 0
    source = case.views[name]
    there = case.views[cache].reshape(-1)[16 : 16 + source.nbytes // 4]
    case.views[name] = there.view(source.dtype).reshape(source.shape)
    if name == "slot_mapping":
        case.views[name][...] = np.arange(9)
    before = {key: buffer.copy() for key, buffer in case.buffers.items()}
    with pc.Descriptor.create(*case.arrays(), debug=True) as descriptor:
        with pytest.raises(pc.SourceOverlapError, match=f"{name} must not share .* {cache}"):
            descriptor.calculate(*case.arrays())
        same(case, before)


def test_caches_that_share_memory_are_refused_at_create():
    case = simple_case()
    k_cache, _, k, v, slots = case.arrays()
    whole = np.zeros((8, 3, 4, 8), k_cache.dtype)
    shifted = (whole[:-1], whole[1:])
    pc.paged_caching(*case.arrays())  # whose descriptor would serve these too
    for one, other in ((k_cache, k_cache), shifted, shifted[::-1]):
        for call in (pc.paged_caching, pc.Descriptor.create):
            with pytest.raises(pc.CacheOverlapError, match="v_cache must not"):
                call(one, other, k, v, slots)


def test_caches_that_share_memory_are_refused_at_calculate():
    case = finite(simple_case())
    k_cache, v_cache, k, v, slots = case.arrays()
    for debug in (False, True):
        with pc.Descriptor.create(*case.arrays(), debug=debug) as descriptor:
            for _ in range(2):
                descriptor.calculate(*case.arrays())
                with pytest.raises(pc.CacheOverlapError):
                    descriptor.calculate(v_cache, v_cache, k, v, slots)
            addresses = case.addresses()
            addresses[0] = addresses[1]
            status = pc.infiniop.infiniopPagedCaching(descriptor, 0, 0, *addresses, 0)
            assert status == Status.BAD_PARAM
    whole = np.zeros((8, 3, 4, 8), k_cache.dtype)
    descriptor = pc.Descriptor.create(*case.arrays(), debug=True)
    with pytest.raises(pc.CacheOverlapError):
        descriptor.calculate(whole[:-1], whole[1:], k, v, slots)
    pc.paged_caching(*case.arrays())
    for _ in range(2):
        with pytest.raises(pc.CacheOverlapError):
            pc.paged_caching(v_cache, v_cache, k, v, slots)


def test_caches_side_by_side_are_none():
    """K and V packed in the last axis, stacked, and layers inside a block share no byte."""
    k = np.ones((3, 2, 8), np.float16)
    slots = np.array([0, 5, 2])
    packed = np.zeros((4, 2, 2, 16), np.float16)
    stacked = np.zeros((2, 4, 2, 2, 8), np.float16)
    inside = np.zeros((4, 2, 2, 2, 8), np.float16)
    for k_cache, v_cache in (
        (packed[..., :8], packed[..., 8:]),
        (stacked[0], stacked[1]),
        (inside[:, 0], inside[:, 1]),
        (inside[:, :, 0], inside[:, :, 1]),
    ):
        arrays = (k_cache, v_cache, k, k, slots)
        pc.Descriptor.create(*arrays, layout="HND", debug=True).calculate(*arrays)
        assert (k_cache == v_cache).all()
        assert k_cache.any()


def test_a_cache_that_overlaps_itself():
    case = simple_case()
    k_cache, v_cache, k, v, slots = case.arrays()
    block, head, slot, element = k_cache.strides
    for strides in (
        (block - slot, head, slot, element),
        (block, slot, slot, element),
        (block, head, slot - element, element),
        (block, head, 0, element),
    ):
        bad = as_strided(k_cache, k_cache.shape, strides)
        for caches in ((bad, v_cache), (v_cache, bad)):
            with pytest.raises(ValueError, match="must not overlap itself") as caught:
                pc.Descriptor.create(*caches, k, v, slots)
            assert caught.value.status == Status.BAD_TENSOR_STRIDES


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=4),
    st.integers(0, 40),
)
def test_overlap_is_exact(one, other, shift):
    raw = np.zeros(400, np.uint8)

    def bytes_of(axes, start):
        shape, strides = zip(*axes, strict=True)
        array = as_strided(raw[start:], shape, strides)
        places = as_strided(np.arange(400)[start:], shape, [8 * step for step in strides])
        return array, places.ravel().tolist()

    (first, touched), (second, touched_too) = bytes_of(one, 0), bytes_of(other, shift)
    assert overlap(first, second) == bool(set(touched) & set(touched_too))
    assert overlaps_itself(first) == (len(set(touched)) < len(touched))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_no_good_case_is_refused(case):
    for name in ("k", "v"):
        case.views[name][...] = 1
    wanted = expected(case)
    with pc.Descriptor.create(*case.arrays(), layout=case.layout, debug=True) as descriptor:
        descriptor.calculate(*case.arrays())
    same(case, wanted)


def test_switched_on_by_the_environment(monkeypatch):
    case = finite(simple_case())
    case.views["k"].view(np.uint16)[...] = 0x7FC0  # NaN
    case.views["slot_mapping"][...] = np.arange(9)
    assert case.views["k"].dtype == ml_dtypes.bfloat16
    monkeypatch.setenv("PAGEDCACHE_DEBUG", "1")
    with pytest.raises(pc.NonFiniteError):
        pc.Descriptor.create(*case.arrays()).calculate(*case.arrays())
    assert pc.infiniop.infiniopPagedCaching(
        pc.Descriptor.create(*case.arrays()), 0, 0, *case.addresses(), 0
    ) == Status.BAD_PARAM  # fmt: skip
    pc.Descriptor.create(*case.arrays(), debug=False).calculate(*case.arrays())
    for off in ("0", ""):
        monkeypatch.setenv("PAGEDCACHE_DEBUG", off)
        pc.Descriptor.create(*case.arrays()).calculate(*case.arrays())
    monkeypatch.setenv("PAGEDCACHE_DEBUG", "yes")
    with pytest.raises(ValueError, match="PAGEDCACHE_DEBUG must be 0 or 1, got 'yes'"):
        pc.Descriptor.create(*case.arrays())


@pytest.mark.parametrize(
    ("option", "kind", "words"),
    [
        ({"on_invalid": "ignore"}, ValueError, "must be one of skip, raise, got 'ignore'"),
        ({"on_invalid": None}, ValueError, "on_invalid must be one of skip, raise, got None"),
        ({"on_invalid": ["skip"]}, ValueError, "on_invalid must be one of skip, raise"),
        ({"debug": 1}, TypeError, "debug must be True, False or None, got 1"),
        ({"debug": "yes"}, TypeError, "debug must be True, False or None, got 'yes'"),
    ],
)  # fmt: skip
def test_options(option, kind, words):
    case = simple_case()
    for call in (pc.Descriptor.create, *([pc.paged_caching] if "on_invalid" in option else [])):
        with pytest.raises(kind, match=words.replace("[", r"\[")) as caught:
            call(*case.arrays(), **option)
        assert caught.value.status == Status.BAD_PARAM


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_all_that_is_finite_is_written(make, dtype):
    case = simple_case(dtype=dtype)
    case.views["slot_mapping"][...] = np.arange(9)
    limits = ml_dtypes.finfo(dtype)
    extremes = [limits.max, limits.min, limits.tiny, limits.smallest_subnormal, -0.0, 0.0, 1, -1]
    case.views["k"][...] = np.array(extremes, dtype)
    case.views["v"][...] = np.array(extremes[::-1], dtype)
    wanted = expected(case)
    with make(case) as descriptor:
        descriptor.calculate(*case.arrays())
    same(case, wanted)
