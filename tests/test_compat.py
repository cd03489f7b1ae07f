# SPDX-License-Identifier: Apache-2.0
"""The functions named after other projects, checked token by token against their documentation."""

from __future__ import annotations

import numpy as np
import pytest

import pagedcache as pc
from pagedcache.compat.flashinfer import append_paged_kv_cache
from pagedcache.compat.sglang import store_cache
from pagedcache.compat.vllm import reshape_and_cache_flash


def as_numpy(array):
    return array


def as_torch(array):
    torch = pytest.importorskip("torch")
    return torch.from_numpy(array)


libraries = pytest.mark.parametrize("of", [as_numpy, as_torch])


def rows(tokens=6, heads=2, size=8):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((tokens, heads, size)).astype(np.float32) for _ in "kv"]


@libraries
@pytest.mark.parametrize("memory", ["NHD", "HND"])
def test_vllm(of, memory):
    k, v = rows()
    caches = np.zeros((2, 5, 4, 2, 8), np.float32)
    if memory == "HND":  # the same axes in another memory order
        caches = np.zeros((2, 5, 2, 4, 8), np.float32).transpose(0, 1, 3, 2, 4)
    slots = np.array([3, 19, -1, 0, 7])  # padded: fewer than rows
    wanted = caches.copy()
    for token, slot in enumerate(slots):
        if slot >= 0:
            wanted[0][slot // 4, slot % 4], wanted[1][slot // 4, slot % 4] = k[token], v[token]
    arrays = (of(k), of(v), of(caches[0]), of(caches[1]), of(slots))
    reshape_and_cache_flash(*arrays, "auto", of(np.ones(1)), of(np.ones(1)))
    assert np.array_equal(caches, wanted)
    reshape_and_cache_flash(*arrays)
    for dtype in ("float16", "bfloat16"):  # copies, whatever is copied, as in vLLM
        caches[...] = 0
        reshape_and_cache_flash(*arrays, dtype, 1.0, 1.0)
        assert np.array_equal(caches, wanted)
    for dtype in ("int8", "nvfp4", "fp8_ds_mla", None, np.array(["auto"])):
        with pytest.raises(NotImplementedError, match="must be one of 'auto', 'float16'") as caught:
            reshape_and_cache_flash(*arrays, kv_cache_dtype=dtype)
        assert caught.value.status == pc.Status.NOT_IMPLEMENTED


@libraries
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("indices", [np.int32, np.int64])
def test_sglang(of, flat, indices):
    k, v = rows()
    caches = np.zeros((2, 30, 2, 8), np.float32)
    if flat:
        k, v, caches = k.reshape(6, 16), v.reshape(6, 16), caches.reshape(2, 30, 16)
    where = np.array([29, 0, 3, -1, 4, 30], indices)
    wanted = caches.copy()
    wanted[0][[29, 0, 3, 4]], wanted[1][[29, 0, 3, 4]] = k[[0, 1, 2, 4]], v[[0, 1, 2, 4]]
    store_cache(of(k), of(v), of(caches[0]), of(caches[1]), of(where))
    assert np.array_equal(caches, wanted)
    store_cache(of(k), of(v), of(caches[0]), of(caches[1]), of(where), row_bytes=64, num_split=2)
    assert np.array_equal(caches, wanted)
    for odd in (None, [[1.0]]):
        with pytest.raises(TypeError, match="k must be an array"):
            store_cache(odd, of(v), of(caches[0]), of(caches[1]), of(where))
    with pytest.raises(ValueError, match="k must have 2 or 3 axes") as caught:
        store_cache(of(k[None, None]), of(v), of(caches[0]), of(caches[1]), of(where))
    assert caught.value.status == pc.Status.BAD_TENSOR_SHAPE


@libraries
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("apart", [False, True])
def test_flashinfer(of, layout, apart):
    page_size = 4
    tables = [[5, 2], [7], [1, 0, 6]]
    kv_indices = np.concatenate(tables).astype(np.int32)
    kv_indptr = np.array([0, 2, 3, 6], np.int32)
    batch = np.array([0, 2, 1, 2, -1, 0], np.int32)
    positions = np.array([4, 11, 0, 5, -1, 3], np.int32)
    last = np.array([1, 4, 4], np.int32)
    k, v = rows()
    shape = (9, 2, page_size, 2, 8) if layout == "NHD" else (9, 2, 2, page_size, 8)
    pages = np.zeros(shape, np.float32)
    wanted = pages.copy()
    for token, (sequence, position) in enumerate(zip(batch, positions, strict=True)):
        if sequence >= 0:
            page, offset = tables[sequence][position // page_size], position % page_size
            for plane, source in enumerate((k, v)):
                target = wanted[page, plane]
                target = target[offset] if layout == "NHD" else target[:, offset]
                target[...] = source[token]
    given = (of(pages[:, 0]), of(pages[:, 1])) if apart else of(pages)
    sources = (of(k), of(v), of(batch), of(positions))
    append_paged_kv_cache(
        *sources, given, of(kv_indices), of(kv_indptr), of(last), kv_layout=layout
    )
    assert np.array_equal(pages, wanted)
    # Pages that do not exist; all padding, without pages and without sequences.
    for table in ([99, 2, 7, 1, 0, 6], [2**31 - 1] * 6, [-5] * 6):
        odd = of(np.array(table, np.int32))
        where = (of(np.zeros(6, np.int32)), of(np.zeros(6, np.int32)))
        append_paged_kv_cache(*sources[:2], *where, given, odd, of(kv_indptr), of(last), layout)
    nothing = of(np.full(6, -1, np.int32)), of(np.full(6, -1, np.int32))
    for ends in ([0], [0, 0]):
        rest = (given, of(kv_indices[:0]), of(np.array(ends, np.int32)), of(last), layout)
        append_paged_kv_cache(*sources[:2], *nothing, *rest)
    assert np.array_equal(pages, wanted)
    for odd in (None, [0, 1], "x"):
        with pytest.raises(pc.PagedCacheError, match="kv_indices must be an array"):
            append_paged_kv_cache(*sources, given, odd, of(kv_indptr), of(last), layout)
        with pytest.raises(pc.PagedCacheError, match="paged_kv_cache must have 5 axes"):
            append_paged_kv_cache(*sources, odd, of(kv_indices), of(kv_indptr), of(last), layout)
    # A token past the pages of its sequence, of a sequence that does not exist, without any pages.
    for where, position, table in ((1, 4, kv_indices), (3, 0, kv_indices), (0, 0, kv_indices[:0])):
        lost = of(np.full(6, where, np.int32)), of(np.full(6, position, np.int32))
        rest = (given, of(table), of(kv_indptr), of(last), layout)
        append_paged_kv_cache(*sources[:2], *lost, *rest)
        assert np.array_equal(pages, wanted)
    # Numbers that would name a page if they were read as signed or narrower ints.
    for position, ends in ((2**64 - 1, kv_indptr), (4, kv_indptr - 2), (2**63 - 4, kv_indptr)):
        lost = np.full(6, 1, np.int32), np.full(6, position, np.uint64)
        rest = (given, of(kv_indices), of(ends), of(last), layout)
        if of is as_numpy:
            append_paged_kv_cache(*sources[:2], *lost, *rest)
        elif position < 2**63:
            append_paged_kv_cache(*sources[:2], of(lost[0]), of(lost[1].astype(np.int64)), *rest)
        assert np.array_equal(pages, wanted)
    for odd, kind, words in (
        (
            of(positions.astype(np.float32)),
            TypeError,
            "positions must have an integer dtype, got float32",
        ),
        (of(positions[:, None]), ValueError, "positions must have one axis"),
        (
            of(positions[:1]),
            ValueError,
            r"positions must be as long as append_key",
        ),
    ):
        with pytest.raises(kind, match=words):
            append_paged_kv_cache(*sources[:3], odd, given, of(kv_indices), of(kv_indptr), of(last))
    for bad in (of(pages[0]), (of(pages[0, 0]), of(pages[0, 1]))):
        with pytest.raises(ValueError, match="paged_kv_cache must have"):
            append_paged_kv_cache(*sources, bad, of(kv_indices), of(kv_indptr), of(last))
    with pytest.raises(ValueError, match="kv_layout must be 'NHD' or 'HND'"):
        append_paged_kv_cache(*sources, given, of(kv_indices), of(kv_indptr), of(last), "DHN")


class Copying:
    """An array whose slices are copies, such as one on disk."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __getitem__(self, index):
        return self.array[index].copy()


class CopyingExporter(Copying):
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("kind", [Copying, CopyingExporter])
def test_a_pool_that_copies_is_refused(kind):
    pool, rows_ = np.zeros((4, 8), np.float32), np.ones((1, 8), np.float32)
    with pytest.raises(pc.PagedCacheError, match=r"k_cache must (be an array|be readable without)"):
        store_cache(rows_, rows_, kind(pool), pool.copy(), np.array([0]))
    pages, of_one = np.zeros((4, 2, 2, 1, 8), np.float32), np.ones((1, 1, 8), np.float32)
    zero = np.array([0])
    with pytest.raises(pc.PagedCacheError, match=r"paged_kv_cache must (be an array|be readable)"):
        append_paged_kv_cache(
            of_one, of_one, zero, zero, kind(pages), zero, np.array([0, 1]), np.array([1])
        )
    assert not pool.any()
    assert not pages.any()


def test_objects_without_a_shape_are_refused():
    row = np.ones((1, 8), np.float32)
    for odd in (np.ndarray, type("Odd", (), {"shape": None})(), type("Odd", (), {"shape": (1, 8)})):
        with pytest.raises(TypeError, match="k must"):
            store_cache(odd, row, row.copy(), row.copy(), np.array([0]))
