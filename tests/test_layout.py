# SPDX-License-Identifier: Apache-2.0
"""The layout: found from the shapes, asked for where they allow both, and refused if wrong."""

from __future__ import annotations

import dataclasses

import pytest
from layouts import expected, forget, same, simple_case
from test_arrays import torch_view

import pagedcache as pc
from pagedcache.status import Status


def with_create(arrays, **options):
    with pc.Descriptor.create(*arrays, **options) as descriptor:
        descriptor.calculate(*arrays)


def with_one_call(arrays, **options):
    pc.paged_caching(*arrays, **options)


def with_torch(arrays, **options):
    pytest.importorskip("torch")
    import pagedcache.torch

    pagedcache.torch.paged_caching(*map(torch_view, arrays), **options)


ways = pytest.mark.parametrize("write", [with_create, with_one_call, with_torch])


@ways
@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(("heads", "block_size"), [(3, 4), (4, 3), (1, 4), (4, 1), (1, 1)])
def test_is_found_from_the_shapes(write, layout, heads, block_size, monkeypatch):
    forget(monkeypatch)
    case = simple_case(heads=heads, block_size=block_size, layout=layout)
    wanted = expected(case)
    for _ in range(2):
        write(case.arrays())
    same(case, wanted)
    found = pc.Descriptor.create(*case.arrays()).info.layout
    # One slot with one head lies in the same place in both.
    assert found == ("HND" if heads == block_size else layout)
    write(case.arrays(), layout=layout)
    same(case, wanted)


@ways
@pytest.mark.parametrize("warm", [False, True])
def test_is_asked_for_where_shapes_allow_both(write, warm, monkeypatch):
    forget(monkeypatch)
    case = simple_case(heads=4, block_size=4)
    if warm:  # a descriptor that was asked for does not serve those who ask for none
        write(case.arrays(), layout="NHD")
        write(case.arrays(), layout="HND")
    before = case.copy().buffers
    words = r"layout must be given, .* has 4 KV heads and blocks of 4 slots; use layout='HND' or"
    with pytest.raises(ValueError, match=words) as caught:
        write(case.arrays())
    assert caught.value.status == Status.BAD_PARAM
    same(case, before)


@ways
def test_the_one_that_is_given_is_taken(write, monkeypatch):
    """In turn, of the same arrays, so that what is kept of one call must not serve another."""
    forget(monkeypatch)
    case = simple_case(heads=4, block_size=4)
    for layout in ("HND", "NHD", "NHD", "HND", "NHD", "HND", "HND"):
        for name in ("k_cache", "v_cache"):
            case.buffers[name][...] = 0x5A
        wanted = expected(dataclasses.replace(case, layout=layout))
        write(case.arrays(), layout=layout)
        same(case, wanted)


@ways
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_wrong_one_is_refused(write, layout, monkeypatch):
    forget(monkeypatch)
    case = simple_case(layout="NHD" if layout == "HND" else "HND")
    before = case.copy().buffers
    words = rf"k must have the num_kv_heads of k_cache, 4, .*layout {layout}"
    with pytest.raises(ValueError, match=words) as caught:
        write(case.arrays(), layout=layout)
    assert caught.value.status == Status.BAD_TENSOR_SHAPE
    same(case, before)


@ways
def test_shapes_that_allow_neither_are_refused(write, monkeypatch):
    forget(monkeypatch)
    case, other = simple_case(heads=3, block_size=4), simple_case(heads=5)
    before = case.copy().buffers
    words = "k must have the num_kv_heads of k_cache, 3 in layout HND or 4 in layout NHD, got shape"
    with pytest.raises(ValueError, match=words) as caught:
        write([*case.arrays()[:2], *other.arrays()[2:]])
    assert caught.value.status == Status.BAD_TENSOR_SHAPE
    same(case, before)


def test_the_one_that_is_given_is_taken_whatever_the_library(monkeypatch):
    pytest.importorskip("torch")
    forget(monkeypatch)
    case = simple_case(heads=4, block_size=4)
    of_torch = [torch_view(array) for array in case.arrays()]
    for layout in ("HND", "NHD", "HND"):
        for arrays in (case.arrays(), of_torch, case.arrays()):
            for name in ("k_cache", "v_cache"):
                case.buffers[name][...] = 0x5A
            wanted = expected(dataclasses.replace(case, layout=layout))
            pc.paged_caching(*arrays, layout=layout)
            same(case, wanted)
