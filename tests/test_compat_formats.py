# SPDX-License-Identifier: Apache-2.0
"""8-bit caches of the functions named after other projects, byte for byte.

What is expected comes from the references below, which share nothing with the package but NumPy:
they look the nearest code up in a table. The grids are those of vLLM's tests, with fewer blocks.
"""

from __future__ import annotations

import enum
import math

import ml_dtypes
import numpy as np
import pytest

import pagedcache as pc
from pagedcache.compat.flashinfer import append_paged_kv_cache
from pagedcache.compat.sglang import store_cache
from pagedcache.compat.vllm import (
    concat_and_cache_mla,
    per_token_head_views,
    reshape_and_cache_flash,
    triton_reshape_and_cache_flash_per_token_head_quant,
)
from pagedcache.operators.one_call import Kept

BF16, E4M3, E5M2 = (
    np.dtype(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
)
F16, F32, U8, I8 = (np.dtype(name) for name in ("float16", "float32", "uint8", "int8"))
FLOAT8 = {"fp8": E4M3, "fp8_e4m3": E4M3, "fp8_e5m2": E5M2}
MOST = {E4M3: 448, E5M2: 57344, I8: 127}


def as_numpy(array):
    return array


def as_torch(array):
    torch = pytest.importorskip("torch")
    bits = torch.from_numpy(array.view(f"i{array.itemsize}"))
    return bits.view(getattr(torch, str(array.dtype)))


libraries = pytest.mark.parametrize("of", [as_numpy, as_torch])


def float8(values, dtype):
    """Return codes: nearest, ties to the even code, saturating; NaN is 0x7F."""
    codes = np.arange(128, dtype=np.uint8)
    table = codes.view(dtype).astype(np.float64)
    table = table[np.isfinite(table)]
    assert (np.diff(table) > 0).all()
    assert table[-1] == MOST[dtype]
    with np.errstate(invalid="ignore"):  # NaN that signals
        size = np.minimum(np.abs(values.astype(np.float64)), table[-1])
    above = np.searchsorted(table, np.nan_to_num(size)).clip(1)
    below = above - 1
    near, far = size - table[below], table[above] - size
    up = (near > far) | ((near == far) & (above % 2 == 0))
    found = np.where(up, above, below) + 128 * np.signbit(values)
    return np.where(np.isnan(values), 0x7F, found).astype(np.uint8)


def int8(values):
    """Return codes: nearest, halves away from zero, clamped."""
    wide = values.astype(np.float64)
    whole = np.copysign(np.floor(np.abs(wide) + 0.5), wide).clip(-128, 127)
    return whole.astype(np.int8).view(np.uint8)


def power_of_two(number):
    """Return the least power of two that is no less than a number."""
    fraction, exponent = math.frexp(number)
    return np.float32(2.0 ** (exponent - (fraction == 0.5)))


def numbers(rng, shape, dtype):
    """Return random numbers, and some that are special: NaN, infinities, ties, zeros, extremes."""
    values = rng.standard_normal(shape).astype(np.float32)
    flat = values.reshape(-1)
    special = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 6e4, -6e4, 1e-8, 17, 19, -2.125, 464]
    flat[rng.choice(flat.size, len(special), replace=False)] = special
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def some_slots(rng, tokens, num_slots, dtype=np.int64):
    """Return slots, if there are enough one that is padding and one past the end."""
    slots = rng.choice(num_slots, tokens, replace=False)
    if tokens > 2:
        slots[1], slots[-1] = -1, num_slots + 5
    return slots.astype(dtype)


def written(slots, num_slots):
    return [(token, slot) for token, slot in enumerate(slots) if 0 <= slot < num_slots]


def noise(rng, *shape):
    return rng.integers(0, 256, shape, np.uint8)


def ordered(array, memory):
    """Return ``[blocks, slots, heads, ...]`` of a cache that is in this order in memory."""
    return array.swapaxes(1, 2) if memory == "HND" else array


# vLLM, one scale, or one for each head


@pytest.mark.parametrize("memory", ["NHD", "HND"])
@pytest.mark.parametrize("scales", ["tensor", "head"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("head_size", [64, 80, 256])
def test_vllm_float8(head_size, block_size, dtype, scales, memory):
    rng = np.random.default_rng(head_size + block_size)
    tokens, heads, blocks = 21, 8, 5
    num_slots = blocks * block_size
    qkv = numbers(rng, (tokens + 2, 3, heads, head_size), dtype)
    rows = qkv[:, 1], qkv[:, 2]
    axis = None if scales == "tensor" else (0, 2)
    finite = [np.where(np.isfinite(each), each, 1).astype(np.float32) for each in rows]
    k_scale, v_scale = (np.asarray(each.max(axis) / 64, np.float32) for each in finite)
    before = noise(rng, 2, blocks, *(heads, block_size)[:: 1 if memory == "HND" else -1], head_size)
    for of, name, as_float8, slot_dtype in (
        (as_numpy, "fp8", False, np.int64),
        (as_numpy, "fp8_e5m2", True, np.int32),
        (as_torch, "fp8_e4m3", True, np.int32),
        (as_torch, "fp8_e5m2", False, np.int64),
    ):
        stored = FLOAT8[name]
        slots = some_slots(rng, tokens, num_slots, slot_dtype)
        caches, wanted = before.copy(), before.copy()
        for cache, source, scale in zip(wanted, rows, (k_scale, v_scale), strict=True):
            by_slot = ordered(cache, memory)
            with np.errstate(invalid="ignore", over="ignore"):
                codes = float8(source.astype(np.float32) / scale.reshape(-1, 1), stored)
            for token, slot in written(slots, num_slots):
                by_slot[divmod(slot, block_size)] = codes[token]
        k_cache, v_cache = (
            of(ordered(cache.view(stored) if as_float8 else cache, memory)) for cache in caches
        )
        reshape_and_cache_flash(
            of(rows[0]), of(rows[1]), k_cache, v_cache, of(slots), name, of(k_scale), of(v_scale)
        )
        assert np.array_equal(caches, wanted)


@pytest.mark.parametrize("stored", ["fp8", "fp8_e5m2"])
def test_vllm_divides(stored):
    every = np.arange(65536, dtype=np.uint16).view(BF16).reshape(256, 1, 256)
    dtype = FLOAT8[stored]
    with np.errstate(all="ignore"):
        wide = every.astype(np.float32)
        for amax in range(129, 256):  # a scale for which the reciprocal gives other codes
            scale = np.full(1, amax / MOST[dtype], np.float32)
            codes = float8(wide / scale, dtype)
            if (codes != float8(wide * (1 / scale), dtype)).any():
                break
        else:
            pytest.fail("no scale shows how it is applied")
    caches = np.zeros((2, 16, 16, 1, 256), np.uint8)
    reshape_and_cache_flash(every, every, *caches, np.arange(256), stored, scale, None)
    assert np.array_equal(caches[0].reshape(codes.shape), codes)
    assert np.array_equal(caches[1].reshape(codes.shape), float8(wide, dtype))


@libraries
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1)])
def test_a_scale_of_one_element_is_never_written(of, shape):
    rows, slots = np.full((1, 1, 4), 6, np.float32), np.zeros(1, np.int64)
    caches, scale = np.zeros((2, 1, 1, 1, 4), np.uint8), np.full(shape, 2, np.float32)
    arrays = [of(array) for array in (rows, rows, *caches, slots)]
    reshape_and_cache_flash(*arrays, "fp8", of(scale), of(scale))
    assert np.array_equal(caches, np.full_like(caches, 0x44))  # 3.0
    assert np.array_equal(scale, np.full(shape, 2, np.float32))
    cache = np.zeros((1, 1, 6), np.uint8)
    pe = of(rows[:, 0, :2].copy())
    concat_and_cache_mla(of(rows[:, 0]), pe, of(cache), of(slots), "fp8", of(scale))
    assert np.array_equal(cache, np.full_like(cache, 0x44))
    assert np.array_equal(scale, np.full(shape, 2, np.float32))


# vLLM, a scale for each token and head


def per_token_head(rows, dtype):
    """Return codes and scales."""
    wide = rows.astype(np.float32)
    scales = np.maximum(np.abs(wide).max(-1) / np.float32(MOST[dtype]), np.float32(1e-6))
    products = wide * (np.float32(1) / scales)[..., None]
    return (int8(products) if dtype == I8 else float8(products, dtype)), scales


class KVQuantMode(enum.IntEnum):
    """As in vLLM."""

    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


@pytest.mark.parametrize("memory", ["HND", "NHD"])
@pytest.mark.parametrize("dtype", [I8, E4M3], ids=str)
@pytest.mark.parametrize(("head_size", "v_head_size"), [(64, 64), (128, 128), (64, 80)])
@pytest.mark.parametrize("heads", [1, 4, 8])
@pytest.mark.parametrize("tokens", [1, 7, 42])
def test_vllm_per_token_head(tokens, heads, head_size, v_head_size, dtype, memory):
    rng = np.random.default_rng(tokens * heads)
    block_size, blocks = 16, (tokens + 15) // 16 + 2
    num_slots = blocks * block_size
    sizes = head_size, v_head_size
    rows = [rng.standard_normal((tokens, heads, size)).astype(BF16) for size in sizes]
    rows[0][0, 0] = 0  # gets the smallest scale
    rows[1][-1, -1, :4] = 3e38, 1, -1, 0
    slots = some_slots(rng, tokens, num_slots, np.int32 if memory == "HND" else np.int64)
    content = sum(sizes) + 8
    order = (heads, block_size) if memory == "HND" else (block_size, heads)
    before = noise(rng, blocks, *order, content)
    wanted = before.copy()
    by_slot, start = ordered(wanted, memory), 0
    for source, size in zip(rows, sizes, strict=True):
        codes, scales = per_token_head(source, dtype)
        for token, slot in written(slots, num_slots):
            cells = by_slot[divmod(slot, block_size)]
            cells[:, start : start + size] = codes[token]
            cells[:, start + size : start + size + 4] = scales[token][:, None].view(np.uint8)
        start += size + 4
    mode = "int8_per_token_head" if dtype == I8 else "fp8_per_token_head"
    for of in (as_numpy, as_torch):
        pages = before.copy()
        # vLLM's logical axes are those of HND, whatever the order in memory.
        logical = pages if memory == "HND" else pages.swapaxes(1, 2)
        views = per_token_head_views(
            of(logical), mode, head_size if head_size != v_head_size else None
        )
        assert [str(view.dtype).removeprefix("torch.") for view in views] == [
            str(dtype), str(dtype), "float32", "float32",
        ]  # fmt: skip
        given = of(rows[0]), of(rows[1])
        triton_reshape_and_cache_flash_per_token_head_quant(*given, *views, of(slots))
        assert np.array_equal(pages, wanted)
        # Caches of bytes, which do not say what they store.
        pages[...] = before
        views = [view.view(of(pages).dtype) for view in views[:2]] + list(views[2:])
        for quant_mode in (mode, KVQuantMode[mode.upper()]):
            pages[...] = before
            triton_reshape_and_cache_flash_per_token_head_quant(
                *given, *views, of(slots), quant_mode
            )
            assert np.array_equal(pages, wanted)


@libraries
def test_vllm_per_token_head_with_scales_beside(of):
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal((5, 2, 8)).astype(np.float32) for _ in "kv"]
    caches, scales = np.zeros((2, 3, 4, 2, 8), np.int8), np.ones((2, 3, 4, 2), np.float32)
    slots = np.array([11, 2, -1, 0, 12])
    wanted, wanted_scales = caches.copy(), scales.copy()
    for side in (0, 1):
        codes, found = per_token_head(rows[side], I8)
        for token, slot in written(slots, 12):
            wanted[side][divmod(slot, 4)] = codes[token].view(np.int8)
            wanted_scales[side][divmod(slot, 4)] = found[token]
    triton_reshape_and_cache_flash_per_token_head_quant(
        *(of(array) for array in (*rows, *caches, *scales, slots))
    )
    assert np.array_equal(caches, wanted)
    assert np.array_equal(scales, wanted_scales)


# vLLM, latent rows of MLA


@libraries
@pytest.mark.parametrize("slot_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("name", ["auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("rank", [256, 512])
def test_vllm_mla(rank, dtype, name, slot_dtype, of):
    rng = np.random.default_rng(rank)
    tokens, pe, block_size, blocks = 42, 64, 16, 8
    num_slots = blocks * block_size
    fused = numbers(rng, (tokens + 3, rank + pe + 8), dtype)
    kv_c, k_pe = fused[:, :rank], fused[:, rank : rank + pe]
    slots = some_slots(rng, tokens, num_slots, slot_dtype)
    scale = np.array(0.1, np.float32)
    stored = FLOAT8.get(name, dtype)
    before = noise(rng, blocks, block_size, (rank + pe) * stored.itemsize)
    both = fused[:, : rank + pe]
    if name in FLOAT8:
        with np.errstate(all="ignore"):
            both = float8(both.astype(np.float32) / scale, stored)
    wanted = before.copy()
    for token, slot in written(slots, num_slots):
        wanted[divmod(slot, block_size)] = both[token].view(np.uint8)
    for as_bytes in (False, True) if name in FLOAT8 else (False,):
        cache = before.copy()
        kv_cache = of(cache if as_bytes else cache.view(stored))
        version = getattr(kv_cache, "_version", 0)
        # Copies use no scale, so any will do.
        given = of(scale) if name in FLOAT8 else "unused"
        concat_and_cache_mla(of(kv_c), of(k_pe), kv_cache, of(slots), name, given)
        assert np.array_equal(cache, wanted)
        assert of is as_numpy or kv_cache._version > version  # as autograd wants to know


@libraries
@pytest.mark.parametrize("width", [656, 704])
@pytest.mark.parametrize("stored", [U8, I8, E4M3], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_vllm_cells_of_656_bytes(dtype, stored, width, of):
    rng = np.random.default_rng(width)
    tokens, block_size, blocks = 42, 16, 8
    num_slots = blocks * block_size
    kv_c = rng.standard_normal((tokens, 512)).astype(np.float32)
    kv_c *= np.exp2(rng.integers(-14, 9, (tokens, 4, 1))).repeat(128, 2).reshape(tokens, 512)
    kv_c[2, :128] = 0  # the smallest scale
    kv_c[3, :128] = np.linspace(0, 448 * 2.0**-3, 128)  # a power of two as it is
    kv_c[4, :128] = np.linspace(0, 464 * 2.0**-3, 128)  # the next one
    kv_c[5, :3] = np.nan, 1, -0.0
    kv_c[6, 1] = np.nextafter(np.float32(448e-4), np.float32(1))
    kv_c = kv_c.astype(dtype)
    k_pe = noise(rng, tokens, 128).view(dtype)  # any bits
    slots = some_slots(rng, tokens, num_slots)
    before = noise(rng, blocks, block_size, width)
    wanted = before.copy()
    seen = set()
    for token, slot in written(slots, num_slots):
        cell = wanted[divmod(slot, block_size)]
        cell[528:656] = k_pe[token].view(np.uint8)
        for tile in range(4):
            values = kv_c[token, 128 * tile : 128 * tile + 128].astype(np.float32)
            amax = np.nanmax(np.abs(values)) / np.float32(448)
            scale = power_of_two(max(amax, np.float32(1e-4)))
            seen.add(scale == amax or scale > 2e-4)
            cell[128 * tile : 128 * tile + 128] = float8(values / scale, E4M3)
            cell[512 + 4 * tile : 516 + 4 * tile] = np.array([scale]).view(np.uint8)
    assert seen == {False, True}
    cache = before.copy()
    kv_cache = of(cache.view(stored))[..., :656]
    concat_and_cache_mla(of(kv_c), of(k_pe), kv_cache, of(slots), "fp8_ds_mla", None)
    assert np.array_equal(cache, wanted)


# SGLang


@libraries
@pytest.mark.parametrize("indices", [np.int32, np.int64])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("name", ["auto", "fp8_e4m3", "fp8_e5m2"])
def test_sglang_float8(name, flat, indices, of):
    rng = np.random.default_rng(3)
    rows = [numbers(rng, (6, 2, 32), BF16) for _ in "kv"]
    per_head = np.array([0.5, 3], np.float32), np.array([0.3, 0.07], np.float32)
    one = np.array([0.7], np.float32), None
    before = noise(rng, 2, 30, 2, 32)
    if flat:
        rows, before = [each.reshape(6, 64) for each in rows], before.reshape(2, 30, 64)
    where = np.array([29, 0, 3, -1, 4, 30], indices)
    stored = FLOAT8.get(name, E4M3)
    kept = [each.copy() for each in rows]
    for scales in [one] if flat else [one, per_head]:
        wanted, caches = before.copy(), before.copy()
        for cache, source, scale in zip(wanted, rows, scales, strict=True):
            divisor = np.float32(1) if scale is None else scale[:, None]
            with np.errstate(all="ignore"):
                codes = float8(source.astype(np.float32) / divisor, stored)
            cache[[29, 0, 3, 4]] = codes[[0, 1, 2, 4]]
        pools = [of(cache if name != "auto" else cache.view(stored)) for cache in caches]
        k_scale, v_scale = (None if scale is None else of(scale) for scale in scales)
        store_cache(
            of(rows[0]), of(rows[1]), *pools, of(where),
            k_scale=k_scale, v_scale=v_scale, kv_cache_dtype=name,
        )  # fmt: skip
        assert np.array_equal(caches, wanted)
    for source, copy in zip(rows, kept, strict=True):
        assert np.array_equal(source.view(np.uint16), copy.view(np.uint16))


@libraries
@pytest.mark.parametrize("dtype", [U8, I8, E4M3, E5M2], ids=str)
def test_sglang_copies_bytes(dtype, of, monkeypatch):
    monkeypatch.setenv("PAGEDCACHE_DEBUG", "1")  # pairs of bytes may look like NaN
    rng = np.random.default_rng(4)
    rows, before = noise(rng, 2, 6, 2, 30), noise(rng, 2, 30, 2, 30)
    rows[:, :, :, 1::2] |= 0x7C
    where = np.array([29, 0, 3, -1, 4, 30])
    for shape in ((-1, 2, 30), (-1, 60)):
        caches, wanted = before.copy(), before.copy()
        wanted[:, [29, 0, 3, 4]] = rows[:, [0, 1, 2, 4]]
        arrays = [of(each.view(dtype).reshape(shape)) for each in (*rows, *caches)]
        store_cache(*arrays, of(where))
        assert np.array_equal(caches, wanted)


# FlashInfer


@libraries
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [U8, I8, E4M3, E5M2], ids=str)
def test_flashinfer_copies_bytes(dtype, layout, of, monkeypatch):
    monkeypatch.setenv("PAGEDCACHE_DEBUG", "1")
    rng = np.random.default_rng(5)
    tables, page_size = [[5, 2], [7], [1, 0, 6]], 4
    batch, positions = np.array([0, 2, 1, 2, -1, 0], np.int32), np.array([4, 11, 0, 5, -1, 3])
    kv_indices, kv_indptr = np.concatenate(tables).astype(np.int32), np.array([0, 2, 3, 6])
    # A part of a wider projection, as of QKV.
    k, v = noise(rng, 6, 3, 2, 14).swapaxes(0, 1)[1:]
    k[..., 1::2] |= 0x7C
    before = noise(rng, 9, 2, *((page_size, 2) if layout == "NHD" else (2, page_size)), 14)
    wanted = before.copy()
    for token, (sequence, position) in enumerate(zip(batch, positions, strict=True)):
        if sequence >= 0:
            page, offset = tables[sequence][position // page_size], position % page_size
            for plane, source in enumerate((k, v)):
                target = wanted[page, plane]
                (target[offset] if layout == "NHD" else target[:, offset])[...] = source[token]
    pages = before.copy()
    tail = of(kv_indices), of(kv_indptr), of(np.array([1, 4, 4])), layout
    sources = [of(each) for each in (k.view(dtype), v.view(dtype), batch, positions)]
    append_paged_kv_cache(*sources, of(pages.view(dtype)), *tail)
    assert np.array_equal(pages, wanted)
    pair = of(before[:, 0].view(dtype)), of(before[:, 1].view(dtype))
    append_paged_kv_cache(*sources, pair, *tail)
    assert np.array_equal(before, wanted)


# All


@libraries
def test_the_second_call_is_matched(of, monkeypatch):
    slots = of(np.arange(2))
    rows, cells = of(np.ones((2, 512), BF16)), of(np.zeros((2, 1, 656), np.uint8))
    pe, bytes_, pool = of(np.ones((2, 64), BF16)), of(np.ones((2, 6), I8)), np.zeros((2, 2, 6), I8)
    calls = (
        lambda: concat_and_cache_mla(rows, pe, cells, slots, "fp8_ds_mla"),
        lambda: store_cache(bytes_, bytes_, of(pool[0]), of(pool[1]), slots),
    )
    for call in calls:
        call()

    def run(*_):
        raise AssertionError("everything was checked again")

    monkeypatch.setattr(Kept, "run", run)
    pool[...] = 0
    for call in calls:
        call()
    assert pool.all()


def test_views_of_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    memory = cupy.cuda.UnownedMemory(1 << 20, 4 * 2 * 16 * 24, None, 0)  # that nothing reads
    kv_cache = cupy.ndarray((4, 2, 16, 24), np.uint8, cupy.cuda.MemoryPointer(memory, 0))
    for mode, dtype in (("int8_per_token_head", I8), ("fp8_per_token_head", U8)):
        views = per_token_head_views(kv_cache, mode)
        assert [view.dtype for view in views] == [dtype, dtype, F32, F32]
        assert [view.data.ptr - (1 << 20) for view in views] == [0, 12, 8, 20]
        assert {view.shape[:3] for view in views} == {(4, 16, 2)}
        assert {view.strides[:3] for view in views} == {(768, 24, 384)}


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_on_a_gpu(library):
    def there(array):
        if library == "torch":
            return as_torch(array).cuda()
        return pytest.importorskip("cupy").asarray(array)

    def back(array):
        if library == "torch":
            return array.cpu().view(pytest.importorskip("torch").uint8).numpy()
        return array.get().view(np.uint8)

    def latent(kind):
        return lambda *arrays: concat_and_cache_mla(*arrays[:4], kind, *arrays[4:])

    def per_token_head(mode):
        def write(key, value, kv_cache, slots):
            views = per_token_head_views(kv_cache, mode)
            triton_reshape_and_cache_flash_per_token_head_quant(key, value, *views, slots, mode)

        return write

    def flash(key, value, key_cache, value_cache, slots, *scales):
        reshape_and_cache_flash(key, value, key_cache, value_cache, slots, "fp8_e5m2", *scales)

    def sglang(k, v, k_cache, v_cache, slots, scale):
        store_cache(k, v, k_cache, v_cache, slots, k_scale=scale, kv_cache_dtype="fp8_e4m3")

    rng = np.random.default_rng(8)
    slots = np.array([3, 19, -1, 0, 7, 64])
    k, v = (numbers(rng, (6, 2, 64), BF16) for _ in "kv")
    kv_c, k_pe = (rng.standard_normal((6, size)).astype(BF16) for size in (512, 64))
    scales = [np.array(each, np.float32) for each in ([0.3, 7], [0.7])]
    caches, flat = noise(rng, 2, 4, 16, 2, 64), noise(rng, 2, 64, 2, 64)
    plain = [rng.standard_normal((6, 2, 64)).astype(BF16) for _ in "kv"]
    tables = np.array([5, 2, 7, 1, 0, 6]), np.array([0, 2, 3, 6]), np.array([1, 4, 4])
    where = np.array([0, 2, 1, 2, -1, 0]), np.array([4, 11, 0, 5, -1, 3])
    rows = [noise(rng, 6, 2, 64) for _ in "kv"]
    for function, arguments in (
        (flash, [k, v, *caches, slots, *scales]),
        (per_token_head("int8_per_token_head"), [*plain, noise(rng, 4, 2, 16, 136), slots]),
        (per_token_head("fp8_per_token_head"), [*plain, noise(rng, 4, 2, 16, 136), slots]),
        (latent("fp8"), [kv_c, k_pe, noise(rng, 4, 16, 576), slots, scales[1]]),
        (latent("fp8_ds_mla"), [kv_c, k_pe, noise(rng, 4, 16, 656), slots]),
        (latent("auto"), [kv_c, k_pe, np.zeros((4, 16, 576), BF16), slots]),
        (sglang, [k, v, *flat.copy(), slots, scales[0]]),
        (store_cache, [*rows, *flat, slots]),
        (append_paged_kv_cache, [*rows, *where, noise(rng, 9, 2, 4, 2, 64), *tables]),
    ):
        given = [there(array) for array in arguments]
        function(*given)
        function(*arguments)  # against what it does on the CPU
        for one, other in zip(given, arguments, strict=True):
            assert np.array_equal(back(one), other.view(np.uint8))


ONE = np.ones(1, np.float32)
ROWS = np.ones((3, 2, 8), BF16)
CACHE = np.zeros((4, 4, 2, 8), np.uint8)
SLOTS = np.arange(3)


class Exporter:
    """An array of another library."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __getitem__(self, index):
        return Exporter(self.array[index])

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def flash(**changes):
    arguments = {
        "key": ROWS,
        "value": ROWS,
        "key_cache": CACHE.copy(),
        "value_cache": CACHE.copy(),
        "slot_mapping": SLOTS,
        "kv_cache_dtype": "fp8",
        "k_scale": ONE,
        "v_scale": ONE,
    }
    reshape_and_cache_flash(**{**arguments, **changes})


def quant(**changes):
    scales = np.zeros((2, 4, 4, 2), np.float32)
    arguments = {
        "key": ROWS,
        "value": ROWS,
        "key_cache": CACHE.view(np.int8),
        "value_cache": CACHE.copy().view(np.int8),
        "k_scale_cache": scales[0],
        "v_scale_cache": scales[1],
        "slot_mapping": SLOTS,
    }
    triton_reshape_and_cache_flash_per_token_head_quant(**{**arguments, **changes})


def mla(**changes):
    arguments = {
        "kv_c": np.ones((3, 8), BF16),
        "k_pe": np.ones((3, 4), BF16),
        "kv_cache": np.zeros((4, 4, 12), np.uint8),
        "slot_mapping": SLOTS,
        "kv_cache_dtype": "fp8",
        "scale": ONE,
    }
    concat_and_cache_mla(**{**arguments, **changes})


def cells(**changes):
    arguments = {
        "kv_c": np.ones((3, 512), BF16),
        "k_pe": np.ones((3, 64), BF16),
        "kv_cache": np.zeros((4, 4, 656), np.uint8),
        "kv_cache_dtype": "fp8_ds_mla",
    }
    mla(**{**arguments, **changes})


def sglang(**changes):
    arguments = {
        "k": ROWS,
        "v": ROWS,
        "k_cache": np.zeros((9, 2, 8), E4M3),
        "v_cache": np.zeros((9, 2, 8), E4M3),
        "indices": SLOTS,
    }
    store_cache(**{**arguments, **changes})


def flashinfer(rows, pages, value=None):
    zeros = np.zeros(3, np.int32)
    append_paged_kv_cache(
        rows,
        rows if value is None else value,
        zeros,
        zeros,
        pages,
        zeros[:1],
        np.array([0, 1]),
        ONE,
    )


def pages(*shape, dtype=np.uint8):
    return np.zeros(shape, dtype)


def test_what_the_calls_below_change_is_right_without():
    for call in (flash, quant, mla, cells, sglang):
        call()
    flashinfer(ROWS.astype(np.uint8), pages(4, 2, 4, 2, 8))
    assert len(per_token_head_views(pages(4, 2, 16, 24), "fp8_per_token_head")) == 4


WRONG = [
    (
        lambda: flash(k_scale=0.5),
        TypeError,
        "k_scale must be a float32 .* make one, once, and pass it, got the number 0.5",
    ),
    (lambda: flash(v_scale=np.float32(2)), TypeError, "v_scale must be a float32 array on the"),
    (lambda: flash(k_scale=1), TypeError, "k_scale must be a float32 array on the device"),
    (lambda: flash(k_scale=np.ones(1)), TypeError, "k_scale must be float32, got float64"),
    (lambda: flash(k_scale=np.ones(3, np.float32)), ValueError, "k_scale must have one elem"),
    (
        lambda: flash(v_scale=np.ones((2, 8), np.float32)),
        ValueError,
        r"v_scale must have one element or the shape \[num_kv_heads\], got shape \(2, 8\)",
    ),
    (lambda: flash(k_scale=np.ones((4, 4, 2), np.float32)), ValueError, "k_scale must have one"),
    (lambda: flash(k_scale="1"), TypeError, "k_scale must be an array"),
    (
        lambda: flash(kv_cache_dtype="fp8_e5m2", key_cache=CACHE.view(E4M3)),
        ValueError,
        "k_format must match the dtype of k_cache, float8_e4m3fn",
    ),
    (
        lambda: flash(kv_cache_dtype="int8_per_token_head"),
        NotImplementedError,
        "this one is triton_reshape_and_cache_flash_per_token_head_quant's, got 'int8",
    ),
    (
        lambda: flash(kv_cache_dtype="nvfp4"),
        NotImplementedError,
        "kv_cache_dtype must be one of 'auto', 'float16', 'bfloat16', 'fp8', .*, got 'nvfp4'",
    ),
    (
        lambda: flash(kv_cache_dtype="auto"),
        ValueError,
        "kv_cache_dtype must be one of 'fp8', .*bytes",
    ),
    (
        lambda: quant(k_scale_cache=ONE),
        ValueError,
        r"k_scale_cache must have the shape \(4, 4, 2\), the first three axes of key_cache, got",
    ),
    (lambda: quant(v_scale_cache=np.ones(2, np.float32)), ValueError, "v_scale_cache must hav"),
    (lambda: quant(v_scale_cache=None), TypeError, "v_scale_cache must be an array, got None"),
    (lambda: quant(k_scale_cache=np.ones((4, 4, 2))), TypeError, "k_scale must be float32, got"),
    (lambda: quant(key_cache=CACHE), ValueError, "kv_quant_mode must be given, because key_ca"),
    (
        lambda: quant(key_cache=np.zeros((4, 4, 2, 8), np.float16)),
        TypeError,
        "key_cache must be int8, float8_e4m3fn or uint8, got float16",
    ),
    (
        lambda: quant(kv_quant_mode="fp8_per_token_head"),
        ValueError,
        "k_format must match the dtype of",
    ),
    (
        lambda: quant(kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD),
        NotImplementedError,
        "kv_quant_mode must be one of 'int8_per_token_head', 'fp8_per_token_head', got 'INT4",
    ),
    (lambda: quant(kv_quant_mode=3), NotImplementedError, "kv_quant_mode must be one of"),
    (
        lambda: per_token_head_views(pages(4, 2, 16, 24), "int4_per_token_head"),
        NotImplementedError,
        "kv_cache_dtype must be one of 'int8_per_token_head', ",
    ),
    (
        lambda: per_token_head_views(pages(4, 2, 16, 24, dtype=np.int16), "int8_per_token_head"),
        TypeError,
        "kv_cache must be of elements of one byte, got int16",
    ),
    (
        lambda: per_token_head_views(pages(4, 2, 24), "int8_per_token_head"),
        ValueError,
        r"kv_cache must have 4 axes \[num_blocks, num_kv_heads, block_size, content\]",
    ),
    (
        lambda: per_token_head_views(pages(4, 2, 16, 8), "int8_per_token_head"),
        ValueError,
        "kv_cache must hold K, V and two scales of 4 bytes on its last axis",
    ),
    (
        lambda: per_token_head_views(pages(4, 2, 16, 25), "int8_per_token_head"),
        ValueError,
        "kv_cache must hold K, V and two scales",
    ),
    (
        lambda: per_token_head_views(pages(4, 2, 16, 24), "int8_per_token_head", 16),
        ValueError,
        "kv_cache must hold K, V and two scales",
    ),
    (
        lambda: per_token_head_views(pages(4, 2, 16, 24), "int8_per_token_head", 8.0),
        TypeError,
        "head_size must be an int or None, got 8.0",
    ),
    (
        lambda: per_token_head_views(pages(4, 2, 16, 22), "int8_per_token_head"),
        ValueError,
        "kv_cache must have an address and strides of whole float32, to be read as such",
    ),
    (
        lambda: per_token_head_views(Exporter(pages(4, 2, 16, 24)), "int8_per_token_head"),
        TypeError,
        "kv_cache must be an array of NumPy, CuPy or PyTorch, because views of it are",
    ),
    (lambda: mla(scale=0.1), TypeError, "scale must be a float32 array on the device of the"),
    (lambda: mla(scale=np.ones(12, np.float32)), ValueError, "k_scale must have one element"),
    (lambda: mla(kv_c=ROWS), ValueError, r"kv_c must have 2 axes \[num_tokens, kv_lora_rank\]"),
    (lambda: mla(k_pe=ROWS), ValueError, "k_pe must have 2 axes"),
    (lambda: mla(k_pe=None), TypeError, "k_pe must be an array, got None"),
    (
        lambda: mla(kv_cache=pages(4, 4, 13)),
        ValueError,
        "kv_cache must have 8 [+] 4 elements on its last axis, for kv_c and k_pe, got shape",
    ),
    (lambda: mla(kv_cache=CACHE), ValueError, "kv_cache must have 3 axes"),
    (lambda: mla(kv_cache=Exporter(pages(4, 4, 12))), TypeError, "kv_cache must be an array of"),
    (
        lambda: mla(kv_cache_dtype="nvfp4_ds_mla"),
        NotImplementedError,
        "kv_cache_dtype must be one of .*, 'fp8_ds_mla', got 'nvfp4_ds_mla'",
    ),
    (lambda: mla(kv_cache_dtype=None), NotImplementedError, "kv_cache_dtype must be one of"),
    (
        lambda: cells(kv_c=np.ones((3, 256), BF16)),
        ValueError,
        "kv_c must have 512 elements in a row for 'fp8_ds_mla', got 256",
    ),
    (lambda: cells(k_pe=np.ones((3, 32), BF16)), ValueError, "k_pe must have 64 elements in a"),
    (
        lambda: cells(kv_c=np.ones((3, 512), np.float32)),
        TypeError,
        "kv_c must be bfloat16 or float16 for 'fp8_ds_mla', got float32",
    ),
    (lambda: cells(k_pe=np.ones((3, 64), np.float16)), TypeError, "v must be bfloat16 like k"),
    (
        lambda: cells(kv_cache=pages(4, 4, 640)),
        ValueError,
        "kv_cache must have 656 bytes on its last axis for 'fp8_ds_mla', got shape",
    ),
    (
        lambda: cells(kv_cache=pages(4, 4, 328, dtype=np.float16)),
        TypeError,
        "kv_cache must be of elements of one byte for 'fp8_ds_mla', got float16",
    ),
    (
        lambda: cells(kv_cache=pages(4, 4, 658)[..., :656]),
        ValueError,
        "kv_cache must have an address and strides of whole",
    ),
    (lambda: sglang(k_scale=0.5), TypeError, "k_scale must be a float32 array on the device of"),
    (lambda: sglang(v_scale=np.ones((9, 1, 2), np.float32)), ValueError, "v_scale must have on"),
    (
        lambda: sglang(k_cache=pages(9, 2, 8)),
        ValueError,
        "kv_cache_dtype must be 'fp8_e4m3' or 'fp8_e5m2', because k_cache is of bytes",
    ),
    (lambda: sglang(v_cache=pages(9, 2, 8)), ValueError, "because v_cache is of bytes"),
    (lambda: sglang(kv_cache_dtype="fp4"), ValueError, "kv_cache_dtype must be 'auto', 'fp8_e4m"),
    (
        lambda: sglang(kv_cache_dtype="fp8_e5m2"),
        ValueError,
        "k_format must match the dtype of k_cache",
    ),
    (
        lambda: sglang(k=ROWS.astype(E4M3), v=ROWS.astype(E4M3), k_scale=ONE),
        ValueError,
        "k_scale must be None, because rows whose elements are of one byte are copied",
    ),
    (
        lambda: sglang(k=ROWS.astype(E5M2)),
        TypeError,
        "k must be float8_e4m3fn like k_cache, because its bytes are copied, got float8_e5m2",
    ),
    (lambda: sglang(k=ROWS.astype(E4M3)), TypeError, "v must be float8_e4m3fn like v_cache, be"),
    (
        lambda: flashinfer(ROWS, pages(4, 2, 4, 2, 8, dtype=E4M3)),
        TypeError,
        "append_key must be float8_e4m3fn like paged_kv_cache, because its bytes are copied, got",
    ),
    (
        lambda: flashinfer(ROWS.astype(E4M3), pages(4, 2, 4, 2, 8)),
        TypeError,
        "append_key must be uint8 like paged_kv_cache",
    ),
    (
        lambda: flashinfer(ROWS.astype(np.int8), pages(4, 2, 4, 2, 8, dtype=BF16)),
        TypeError,
        "append_key must be bfloat16 like paged_kv_cache",
    ),
    (
        lambda: flashinfer(ROWS.astype(np.uint8), pages(4, 2, 4, 2, 8), ROWS),
        TypeError,
        "append_value must be uint8 like paged_kv_cache",
    ),
    (
        lambda: flashinfer(ROWS[..., :7].astype(np.uint8), pages(4, 2, 4, 2, 7)),
        ValueError,
        "paged_kv_cache must have an even head size, because its bytes are copied in pairs",
    ),
    (
        lambda: flashinfer(pages(49)[1:].reshape(3, 2, 8), pages(4, 2, 4, 2, 8)),
        ValueError,
        "append_key must have an address and strides of whole float16, to be read as such",
    ),
]


@pytest.mark.parametrize(("call", "kind", "words"), WRONG, ids=map(str, range(len(WRONG))))
def test_what_is_wrong_is_said_in_one_sentence(call, kind, words):
    with pytest.raises(kind, match=words) as caught:
        call()
    assert isinstance(caught.value, pc.PagedCacheError)
    assert "\n" not in str(caught.value)
