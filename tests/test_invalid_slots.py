# SPDX-License-Identifier: Apache-2.0
"""Slots past the end: never written, told of exactly, and nobody is stopped by them."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
from host_device import HostDevice, descriptor_on
from layouts import expected, same, simple_case

import pagedcache as pc
from pagedcache.display import as_html
from pagedcache.status import Status

CAPACITY = 7 * 4


@pytest.fixture(params=["cpu backend", "nvidia backend on the host"])
def make(request):
    """Return a function from a case to a descriptor of the backend under test."""
    if request.param == "cpu backend":

        def on_cpu(case, *, raising=False, debug=False):
            on_invalid = "raise" if raising else "skip"
            return pc.Descriptor.create(*case.arrays(), on_invalid=on_invalid, debug=debug)

        return on_cpu
    device = HostDevice(request.getfixturevalue("compiler"))

    def on_host(case, *, raising=False, debug=False):
        on_invalid = "raise" if raising else "skip"
        return descriptor_on(device, case, on_invalid=on_invalid, debug=debug)

    return on_host


def case_with(mapping, **sizes):
    case = simple_case(tokens=len(mapping), **sizes)
    case.views["slot_mapping"][...] = mapping
    return case


BAD = [3, CAPACITY, -1, CAPACITY + 5, 0, 2**62, 1]


def told(error, token=1, slot=CAPACITY, count=3):
    assert (error.token, error.slot, error.count, error.capacity) == (token, slot, count, CAPACITY)
    assert error.status == Status.BAD_PARAM
    assert isinstance(error, (ValueError, IndexError))
    slots = "slot" if count == 1 else "slots"
    words = f"slot_mapping[{token}] = {slot} is outside the cache, which has {CAPACITY} slots"
    assert str(error).startswith(f"{words} ({count} invalid {slots} ")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_raise_tells_and_the_valid_ones_are_written(make):
    case = case_with(BAD)
    wanted = expected(case)
    with make(case, raising=True) as descriptor:
        for _ in range(2):
            with pytest.raises(pc.InvalidSlotError) as caught:
                descriptor.calculate(*case.arrays())
            told(caught.value)
            same(case, wanted)
        case.views["slot_mapping"][...] = range(7)
        descriptor.calculate(*case.arrays())
        descriptor.check()


def test_skip_tells_on_demand_and_once(make):
    case = case_with(BAD)
    wanted = expected(case)
    with make(case) as descriptor:
        descriptor.check()
        descriptor.calculate(*case.arrays())
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
        told(caught.value)
        descriptor.check()
        same(case, wanted)


def test_several_calls_add_up(make):
    case = case_with(BAD)
    slots = case.views["slot_mapping"]
    with make(case) as descriptor:
        descriptor.calculate(*case.arrays())
        slots[...] = [0, 1, 2, 3, 4, 5, CAPACITY + 9]  # a higher token
        descriptor.calculate(*case.arrays())
        slots[...] = [0, CAPACITY + 9, 2, 3, 4, 5, 6]  # the same token, later
        descriptor.calculate(*case.arrays())
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
        told(caught.value, count=5)
        slots[...] = [CAPACITY + 1, 0, 2, 3, 4, 5, 6]
        descriptor.calculate(*case.arrays())
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
        told(caught.value, token=0, slot=CAPACITY + 1, count=1)


@pytest.mark.parametrize("slots", ["int32", "int64"])
@pytest.mark.parametrize("bad", [CAPACITY, CAPACITY + 1, 2**31 - 1, 2**32 + 3, 2**63 - 1])
def test_any_value(make, slots, bad):
    if bad > np.iinfo(slots).max:
        pytest.skip("does not fit")
    case = case_with([-1, -(2**31), 2, bad], slots=slots)
    with make(case) as descriptor:
        descriptor.calculate(*case.arrays())
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
        told(caught.value, token=3, slot=bad, count=1)


def test_all_of_many_tokens(make):
    case = case_with(np.arange(5000)[::-1] + CAPACITY, k_size=24)
    wanted = case.copy().buffers
    with make(case) as descriptor:
        descriptor.calculate(*case.arrays())
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
        told(caught.value, token=0, slot=CAPACITY + 4999, count=5000)
    same(case, wanted)


def test_a_call_that_takes_several_launches(compiler):
    case = case_with([*range(20), CAPACITY, CAPACITY + 1])
    device = HostDevice(compiler, max_grid_x=1)
    with descriptor_on(device, case, on_invalid="raise") as descriptor:
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.calculate(*case.arrays())
        told(caught.value, token=20, count=2)
    assert len(device.launches) > 1


@pytest.mark.parametrize("raising", [False, True])
def test_threads_share_a_descriptor(make, raising):
    several = [case_with([*range(seed, seed + 5), CAPACITY + seed]) for seed in range(8)]
    with make(several[0], raising=raising) as descriptor:

        def write(seed):
            for _ in range(100):
                refusal = pytest.raises(pc.InvalidSlotError) if raising else nullcontext()
                with refusal as caught:
                    descriptor.calculate(*several[seed].arrays())
                if raising:
                    told(caught.value, token=5, slot=CAPACITY + seed, count=1)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(8)))
        if not raising:
            with pytest.raises(pc.InvalidSlotError) as caught:
                descriptor.check()
            assert (caught.value.count, caught.value.token) == (800, 5)


def test_one_call_form():
    case = case_with(BAD)
    wanted = expected(case)
    for _ in range(3):
        pc.paged_caching(*case.arrays())
        with pytest.raises(pc.InvalidSlotError) as caught:
            pc.paged_caching(*case.arrays(), on_invalid="raise")
        told(caught.value)
    same(case, wanted)
    case.views["slot_mapping"][...] = range(7)
    for _ in range(3):
        pc.paged_caching(*case.arrays(), on_invalid="raise")
        pc.paged_caching(*case.arrays(), on_invalid="skip")


def test_through_addresses():
    case = case_with(BAD)
    with pc.Descriptor.create(*case.arrays()) as descriptor:
        assert pc.infiniop.infiniopPagedCaching(descriptor, 0, 0, *case.addresses(), 0) == 0
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
        told(caught.value)
    with pc.Descriptor.create(*case.arrays(), on_invalid="raise") as descriptor:
        status = pc.infiniop.infiniopPagedCaching(descriptor, 0, 0, *case.addresses(), 0)
        assert status == Status.BAD_PARAM


def test_explain():
    case = case_with(BAD)
    with pc.Descriptor.create(*case.arrays()) as descriptor:
        for token, slot in enumerate(BAD):
            explained = descriptor.explain(token, case.views["slot_mapping"])
            assert (explained.token, explained.slot) == (token, slot)
            again = descriptor.explain(slot)
            assert (again.token, again.kind, again.k_ranges) == (
                None, explained.kind, explained.k_ranges,
            )  # fmt: skip
            assert explained.kind == (
                "padding" if slot < 0 else "valid" if slot < CAPACITY else "invalid"
            )
        assert "padding" in str(descriptor.explain(-1))
        assert "invalid" in str(descriptor.explain(CAPACITY))
        text, page = str(descriptor.explain(5)), descriptor.explain(5)._repr_html_()
        for words in ("slot", "block", "offset", "bytes in K cache"):
            assert words in text
            assert words in page
        assert "<script" not in page
        for wrong in (1.5, "1", None):
            with pytest.raises(TypeError, match="slot_or_token must be an int"):
                descriptor.explain(wrong)
        for wrong in (-1, 7):
            with pytest.raises(ValueError, match="one of the 7 tokens"):
                descriptor.explain(wrong, case.views["slot_mapping"])


def test_explain_of_slots_whose_elements_are_no_index():
    class Element:  # as CuPy's, which are arrays
        def __init__(self, slot):
            self.item = lambda: slot

    case = case_with(BAD)
    with pc.Descriptor.create(*case.arrays()) as descriptor:
        slots = [Element(slot) for slot in BAD]
        assert [descriptor.explain(token, slots).slot for token in range(len(BAD))] == [*BAD]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_explained_bytes_are_those_that_are_written(layout):
    case = simple_case(layout=layout, k_size=8, v_size=6)
    with pc.Descriptor.create(*case.arrays(), layout=layout) as descriptor:
        for slot in range(CAPACITY):
            case.views["slot_mapping"][...] = -1
            case.views["slot_mapping"][3] = slot
            for name in ("k_cache", "v_cache"):
                case.buffers[name][...] = 0
            case.views["k"].view("u2")[...] = case.views["v"].view("u2")[...] = 0xFFFF
            descriptor.calculate(*case.arrays())
            explained = descriptor.explain(slot)
            assert (explained.block, explained.offset) == divmod(slot, 4)
            for name, ranges in (("k_cache", explained.k_ranges), ("v_cache", explained.v_ranges)):
                touched = np.flatnonzero(case.buffers[name]) - case.recipe[name][1]
                spans = [np.arange(start, end) for start, end in ranges]
                assert np.array_equal(touched, np.concatenate(spans))
                assert len(ranges) == (1 if layout == "NHD" else 3)


def test_html_of_a_descriptor():
    case = simple_case()
    descriptor = pc.Descriptor.create(*case.arrays())
    page = descriptor._repr_html_()
    for words in ("HND, bfloat16", "7 blocks of 4 = 28 slots", "strides of v_cache", "grid"):
        assert words in page
    descriptor.destroy()
    assert "destroyed" in descriptor._repr_html_()


def test_html_is_escaped():
    page = as_html([("a < b", "<script>x && y</script>")])
    assert "<script" not in page
    assert "a &lt; b" in page
    assert "x &amp;&amp; y" in page
