# SPDX-License-Identifier: Apache-2.0
"""Recipes and ideas of docs/howto, against what the kernels that they replace do.

The kernels are those of the pages themselves. The references are loops over tokens and heads in
plain NumPy that use nothing of this package. Whole arrays are compared, byte by byte, with random
bytes in all slots that stay as they are. Where another project approximates (``rsqrtf``, divisions
of Triton and of ``-use_fast_math``, fused multiply-adds), the reference uses exact arithmetic.
Where it adds up a row in an order of its own, elements are eighths, whose sums are exact in any
order.
"""

from __future__ import annotations

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pagedcache as pc

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
F32 = np.float32

HOWTO = Path(__file__).parents[1] / "docs" / "howto"
PAGES = [(HOWTO / name).read_text("utf-8") for name in ("recipes.md", "ideas_from_papers.md")]
SECTIONS = [part for page in PAGES for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]]
SETUPS = [page.partition("\n## ")[0] for page in PAGES]
TITLES = [section.partition("\n")[0] for section in SECTIONS]

BLOCKS, BLOCK_SIZE = 4, 16
SLOTS = np.array([37, -1, 38, 5, 63, -1, 0])
POSITIONS = np.array([21, 0, 22, 0, 63, 63, 1])
TOKENS = len(SLOTS)


def run(title):
    """Run the code of a recipe, after that at the top of its page, and return its names."""
    (section,) = (each for each in SECTIONS if each.startswith(title))
    names = {}
    for text in (SETUPS[0], section):
        for code in code_of(text):
            exec(compile(code, f"recipes: {title}", "exec"), names)
    return names


def code_of(text):
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_all_pages_begin_with_the_same_arrays():
    assert code_of(SETUPS[0]) == code_of(SETUPS[1])
    assert len(code_of(SETUPS[0])) == 1


@pytest.fixture
def make():
    return np.random.default_rng(1)


def normal(make, *shape, dtype=BF16):
    return make.standard_normal(shape).astype(dtype)


def eighths(make, *shape, dtype=BF16):
    return (make.integers(-24, 25, shape) / 8).astype(dtype)


def noise(make, *shape, dtype=np.uint8):
    """Return an array of random bytes."""
    dtype = np.dtype(dtype)
    return make.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8).view(dtype)


def table(make, rotated, dtype=F32):
    return normal(make, 64, rotated, dtype=dtype)


def same(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    different = found.view(np.uint8) != expected.view(np.uint8)
    assert not different.any(), f"{different.sum()} bytes, first at {np.argwhere(different)[0]}"


def at(cache, slot, layout="NHD"):
    """Return the rows of a slot, ``[heads, size]``, as a view."""
    block, offset = divmod(slot, BLOCK_SIZE)
    return cache[block, offset] if layout == "NHD" else cache[block, :, offset]


def valid():
    return [(token, slot) for token, slot in enumerate(SLOTS.tolist()) if slot >= 0]


def f32(x):
    return np.asarray(x).astype(F32)


def e4m3(x):
    return np.clip(x, F32(-448), F32(448)).astype(E4M3)


def whole(x, low, high):
    """Round float32 to integers, halves away from zero."""
    exact = x.astype(np.float64)
    return np.clip(np.copysign(np.floor(np.abs(exact) + 0.5), exact), low, high).astype(np.int8)


def packed(codes):
    """Put two integers into a byte, the even one into the low half."""
    return (codes[..., ::2].view(np.uint8) & 15) | (codes[..., 1::2].view(np.uint8) << 4)


def normed(row, weight, bias, eps):
    mean = F32(sum(float(x) ** 2 for x in row)) / F32(len(row))
    return f32(row) / np.sqrt(mean + F32(eps)) * (f32(weight) + F32(bias))


def turned(row, angles, style="neox", through=F32):
    """Rotate the first dimensions of a row, each operation rounded to `through`."""

    def rounded(x):
        return x.astype(through).astype(F32)

    x, half = f32(row).copy(), len(angles) // 2
    for i in range(half):
        a, b = (i, i + half) if style == "neox" else (2 * i, 2 * i + 1)
        c, s = f32(angles[i]), f32(angles[half + i])
        x[a], x[b] = (
            rounded(rounded(x[a] * c) - rounded(x[b] * s)),
            rounded(rounded(x[b] * c) + rounded(x[a] * s)),
        )
    return x


def spread(row):
    """Multiply a row by a Hadamard matrix, whose sums must be exact."""
    n = len(row)
    signs = [[(-1.0) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    sums = np.array(signs) @ row.astype(np.float64)
    assert (sums == f32(sums)).all()
    return f32(sums) * F32(n**-0.5)


@pytest.mark.parametrize("title", TITLES)
def test_page_runs(title):
    run(title)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("rotated", [64, 128])
def test_vllm_norm_rope_float8(make, layout, rotated):
    store = run("vLLM: `fused_qknorm_rope_cache`")["store"]
    qkv = eighths(make, TOKENS, 8 + 2 + 2, 128)
    q, k, v = qkv[:, :8], qkv[:, 8:10], qkv[:, 10:]
    shape = (BLOCKS, BLOCK_SIZE, 2, 128) if layout == "NHD" else (BLOCKS, 2, BLOCK_SIZE, 128)
    k_cache, v_cache = noise(make, *shape, dtype=E4M3), noise(make, *shape, dtype=E4M3)
    q_out, k_out, v_out = (noise(make, *each.shape, dtype=BF16) for each in (q, k, v))
    weights = {name: normal(make, 128) for name in ("q_weight", "k_weight")}
    cos, sin = normal(make, 64, rotated // 2, dtype=F32), normal(make, 64, rotated // 2, dtype=F32)
    scales = {"k_scale": np.array([0.0123], F32), "v_scale": np.array([0.0456], F32)}

    k_pages, v_pages, outs = k_cache.copy(), v_cache.copy(), {}
    for letter, rows in (("q", q), ("k", k)):
        out = np.empty(rows.shape, BF16)
        for token, head in np.ndindex(out.shape[:2]):
            row = normed(rows[token, head], weights[f"{letter}_weight"], 1.0, 1e-6).astype(BF16)
            position = POSITIONS[token]
            out[token, head] = turned(row, [*cos[position], *sin[position]]).astype(BF16)
        outs[letter] = out
    for token, slot in valid():
        at(k_pages, slot, layout)[...] = e4m3(f32(outs["k"][token]) / scales["k_scale"])
        at(v_pages, slot, layout)[...] = e4m3(f32(v[token]) / scales["v_scale"])

    store(
        k_cache, v_cache, k, v, SLOTS, q=q, q_out=q_out, k_out=k_out, v_out=v_out,
        cos_sin=np.concatenate([cos, sin], axis=1), positions=POSITIONS, **weights, **scales,
    )  # fmt: skip
    same(k_cache, k_pages)
    same(v_cache, v_pages)
    same(q_out, outs["q"])
    same(k_out, outs["k"])
    same(v_out, np.ascontiguousarray(v))


def test_sglang_rope_in_place(make):
    store = run("SGLang")["store"]
    q, k, v = (normal(make, TOKENS, heads, 64) for heads in (8, 2, 2))
    k_buffer, v_buffer = noise(make, 64, 128, dtype=BF16), noise(make, 64, 128, dtype=BF16)
    cos_sin = table(make, 64)

    k_rows, v_rows, q_done, k_done = k_buffer.copy(), v_buffer.copy(), q.copy(), k.copy()
    for rows in (q_done, k_done):
        for token, head in np.ndindex(rows.shape[:2]):
            rows[token, head] = turned(rows[token, head], cos_sin[POSITIONS[token]]).astype(BF16)
    for token, slot in valid():
        k_rows[slot], v_rows[slot] = k_done[token].reshape(-1), v[token].reshape(-1)

    flat = (64, 1, 2, 64)
    store(
        k_buffer.reshape(flat), v_buffer.reshape(flat), k, v, SLOTS.astype(np.int32),
        q=q, q_out=q, k_out=k, cos_sin=cos_sin, positions=POSITIONS.astype(np.int32),
    )  # fmt: skip
    same(k_buffer, k_rows)
    same(v_buffer, v_rows)
    same(q, q_done)
    same(k, k_done)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_flashinfer_grouped_queries(make, layout):
    store = run("FlashInfer")["store"]
    q, k, v = (normal(make, TOKENS, heads, 128) for heads in (8, 2, 2))
    shape = (BLOCKS, BLOCK_SIZE, 2, 128) if layout == "NHD" else (BLOCKS, 2, BLOCK_SIZE, 128)
    k_cache, v_cache = noise(make, *shape, dtype=E4M3), noise(make, *shape, dtype=E4M3)
    q_out, cos_sin = noise(make, *q.shape, dtype=E4M3), table(make, 64)
    of_q, of_kv = 37.3, 91.7  # some elements saturate

    k_pages, v_pages, q_done = k_cache.copy(), v_cache.copy(), np.empty_like(q_out)
    for token, head in np.ndindex(q.shape[:2]):
        q_done[token, head] = e4m3(turned(q[token, head], cos_sin[POSITIONS[token]]) * F32(of_q))
    for token, slot in valid():
        for head in range(2):
            row = turned(k[token, head], cos_sin[POSITIONS[token]])
            at(k_pages, slot, layout)[head] = e4m3(row * F32(of_kv))
            at(v_pages, slot, layout)[head] = e4m3(f32(v[token, head]) * F32(of_kv))

    store(
        k_cache, v_cache, k, v, SLOTS, q=q, q_out=q_out, cos_sin=cos_sin, positions=POSITIONS,
        quant_scale_q=of_q, quant_scale_kv=of_kv,
    )  # fmt: skip
    same(k_cache, k_pages)
    same(v_cache, v_pages)
    same(q_out, q_done)
    assert (np.abs(f32(k_cache)) == 448).any()


def test_flashinfer_latent_attention(make):
    store = run("FlashInfer")["store_mla"]
    q, ckv, kpe = normal(make, TOKENS, 8, 576), normal(make, TOKENS, 512), normal(make, TOKENS, 64)
    ckv_cache = noise(make, BLOCKS, BLOCK_SIZE, 512, dtype=E4M3)
    kpe_cache = noise(make, BLOCKS, BLOCK_SIZE, 64, dtype=E4M3)
    q_out, cos_sin = noise(make, *q.shape, dtype=E4M3), table(make, 64)

    ckv_pages, kpe_pages, q_done = ckv_cache.copy(), kpe_cache.copy(), np.empty_like(q_out)
    for token, head in np.ndindex(q.shape[:2]):
        q_done[token, head] = e4m3(turned(q[token, head], cos_sin[POSITIONS[token]]) * F32(0.7))
    for token, slot in valid():
        at(ckv_pages, slot)[...] = e4m3(f32(ckv[token]) * F32(1.3))
        row = turned(kpe[token], cos_sin[POSITIONS[token]])
        at(kpe_pages, slot)[...] = e4m3(row * F32(1.3))

    store(
        ckv_cache[:, :, None], kpe_cache[:, :, None], ckv[:, None], kpe[:, None], SLOTS,
        q=q, q_out=q_out, cos_sin=cos_sin, positions=POSITIONS,
        quant_scale_q=0.7, quant_scale_kv=1.3,
    )  # fmt: skip
    same(ckv_cache, ckv_pages)
    same(kpe_cache, kpe_pages)
    same(q_out, q_done)


def test_flashinfer_slots_of_a_page_table():
    names = run("FlashInfer")
    expected = []
    for sequence, position in zip(names["batch_indices"], names["kv_positions"], strict=True):
        pages = names["kv_indices"][names["kv_indptr"][sequence] :]
        slot = -1 if sequence < 0 else int(pages[position // 16]) * 16 + position % 16
        expected.append(int(slot))
    assert names["slots"].tolist() == expected == [37, 0, 51, -1]


@pytest.mark.parametrize("stored", ["auto", "fp8"])
@pytest.mark.parametrize("style", ["interleaved", "neox"])
def test_vllm_latent_attention_in_bfloat16(make, style, stored):
    name = "vLLM: `concat_and_cache_mla_rope_fused`"
    store = run(name)["store" if style == "interleaved" else "store_neox"]
    q_pe, k_pe, kv_c = (
        normal(make, TOKENS, 8, 64), normal(make, TOKENS, 64), normal(make, TOKENS, 512),
    )  # fmt: skip
    cos_sin, scale = table(make, 64, BF16), np.array([0.0123], F32)
    kv_cache = noise(make, BLOCKS, BLOCK_SIZE, 576, dtype=BF16 if stored == "auto" else E4M3)

    pages, q_done, k_done = kv_cache.copy(), q_pe.copy(), k_pe.copy()
    for token in range(TOKENS):
        angles = cos_sin[POSITIONS[token]]
        for row in (*q_done[token], k_done[token]):
            row[...] = turned(row, angles, style, BF16)
    for token, slot in valid():
        row = np.concatenate([kv_c[token], k_done[token]])
        at(pages, slot)[...] = row if stored == "auto" else e4m3(f32(row) / scale)

    cells = kv_cache[:, :, None]
    scales = {} if stored == "auto" else {"k_scale": scale, "v_scale": scale}
    store(
        cells[..., :512], cells[..., 512:], kv_c[:, None], k_pe[:, None], SLOTS,
        q=q_pe, q_out=q_pe, v_out=k_pe[:, None], cos_sin=cos_sin, positions=POSITIONS, **scales,
    )  # fmt: skip
    same(kv_cache, pages)
    same(q_pe, q_done)
    same(k_pe, k_done)
    rounded_once = turned(kv_c[0, :64], cos_sin[21], style).astype(BF16)
    assert (rounded_once != turned(kv_c[0, :64], cos_sin[21], style, BF16)).any()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_vllm_int8_by_token_and_head(make, layout):
    kernels = run("vLLM: `int8_per_token_head`")["store"], pc.WriteKernel()
    k, v = normal(make, TOKENS, 2, 128), normal(make, TOKENS, 2, 128)
    k[0, 0] = 0  # the least scale
    k[2, 1, :4] = [127, 0.5, -1.5, 2.5]  # of scale 1, with halves
    k[2, 1, 4:] = 0
    k[4, 0] = 0
    k[4, 0, :2] = [1.125, 0.5625]  # 63.5 by a product with 1 / s, and less by a division
    shape = (BLOCKS, BLOCK_SIZE, 2, 128) if layout == "NHD" else (BLOCKS, 2, BLOCK_SIZE, 128)
    old = [noise(make, *shape, dtype=np.int8) for _ in "kv"]
    old += [noise(make, *shape[:3], dtype=F32) for _ in "kv"]

    expected = [each.copy() for each in old]
    for rows, cache, scales in ((k, *expected[::2]), (v, *expected[1::2])):
        for token, slot in valid():
            for head in range(2):
                row = f32(rows[token, head])
                scale = max(np.abs(row).max() / F32(127), F32(1e-6))
                at(scales, slot, layout)[head] = scale
                at(cache, slot, layout)[head] = whole(row * (F32(1) / scale), -128, 127)
    assert at(expected[0], 38, layout)[1, :4].tolist() == [127, 1, -2, 3]
    assert at(expected[0], 63, layout)[0, :2].tolist() == [127, 64]

    for store in kernels:  # the second without a quantiser of its own
        arrays = [each.copy() for each in old]
        store(arrays[0], arrays[1], k, v, SLOTS, k_scale=arrays[2], v_scale=arrays[3])
        for found, wanted in zip(arrays, expected, strict=True):
            same(found, wanted)


def test_vllm_float8_cells_of_656_bytes(make):
    store = run("vLLM: `fp8_ds_mla`")["store"]
    kv_c, k_pe = normal(make, TOKENS, 1, 512), normal(make, TOKENS, 1, 64)
    kv_c[0, 0, :128] = 0
    kv_c[2, 0, 0] = 448  # of scale 1, a power of two as it is
    cells = noise(make, BLOCKS, BLOCK_SIZE, 656)

    pages = cells.copy()
    for token, slot in valid():
        cell = at(pages, slot)
        for tile in range(4):
            row = f32(kv_c[token, 0, tile * 128 : tile * 128 + 128])
            amax = max(np.abs(row).max() / F32(448), F32(1e-4))
            fraction, exponent = np.frexp(amax)
            scale = F32(np.ldexp(1.0, exponent - (fraction == 0.5)))
            cell[512:528].view(F32)[tile] = scale
            cell[tile * 128 : tile * 128 + 128] = e4m3(row / scale).view(np.uint8)
        cell[528:] = k_pe[token, 0].view(np.uint8)

    one_head = cells[:, :, None]
    store(
        one_head[..., :512], one_head[..., 528:].view(BF16), kv_c, k_pe, SLOTS,
        k_scale=one_head[..., 512:528].view(F32),
    )  # fmt: skip
    same(cells, pages)
    assert at(cells, 38)[512:516].view(F32) == 1


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("bits", [8, 4])
def test_kivi(make, bits, layout):
    store = run("KIVI")["store" if bits == 8 else "store4"]
    k, v = normal(make, TOKENS, 2, 128), normal(make, TOKENS, 2, 128)
    k_scale = (make.random((2, 128)) * (0.02 if bits == 8 else 0.3) + 0.001).astype(F32)
    shape = (BLOCKS, BLOCK_SIZE, 2) if layout == "NHD" else (BLOCKS, 2, BLOCK_SIZE)
    k_cache = noise(make, *shape, 128 * bits // 8, dtype=np.int8 if bits == 8 else np.uint8)
    v_cache, v_scale = noise(make, *shape, 64), noise(make, *shape, dtype=F32)

    k_pages, v_pages, v_scales = k_cache.copy(), v_cache.copy(), v_scale.copy()
    most = 2 ** (bits - 1) - 1
    for token, slot in valid():
        codes = whole(f32(k[token]) / k_scale, -most - 1, most)
        at(k_pages, slot, layout)[...] = codes if bits == 8 else packed(codes)
        for head in range(2):
            row = f32(v[token, head])
            scale = max(np.abs(row).max() / F32(7), F32(1e-6))
            at(v_scales, slot, layout)[head] = scale
            at(v_pages, slot, layout)[head] = packed(whole(row * (F32(1) / scale), -8, 7))

    store(k_cache, v_cache, k, v, SLOTS, k_scale=k_scale, v_scale=v_scale)
    same(k_cache, k_pages)
    same(v_cache, v_pages)
    same(v_scale, v_scales)


def test_kivi_reads_back(make):
    names = run("KIVI")
    for letter, most in (("k", 0.5 / 127), ("v", 0.5 / 7)):
        given, found = f32(names[letter])[:3], f32(names[f"{letter}_out"])
        axis = 0 if letter == "k" else -1  # the scale is that of a channel, or of a row
        bound = np.abs(f32(names[letter])).max(axis=axis, keepdims=True)[:3] * most + 0.01
        assert (np.abs(given - found[:3]) <= bound).all()
        assert (found[3] == 0).all()  # padding


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_quarot(make, layout):
    names = run("QuaRot")
    q, k, v = (eighths(make, TOKENS, heads, 128) for heads in (8, 2, 2))
    # Turns by quarters, so that sums stay exact.
    quarter = make.integers(0, 4, (64, 32))
    cos, sin = np.array([1, 0, -1, 0], F32)[quarter], np.array([0, 1, 0, -1], F32)[quarter]
    cos_sin = np.concatenate([cos, sin], axis=1)
    shape = (BLOCKS, BLOCK_SIZE, 2) if layout == "NHD" else (BLOCKS, 2, BLOCK_SIZE)
    arrays = {
        "k_cache": noise(make, *shape, 64), "v_cache": noise(make, *shape, 64),
        "k_scale": noise(make, *shape, 4, dtype=F32), "v_scale": noise(make, *shape, 4, dtype=F32),
    }  # fmt: skip
    q_out = noise(make, *q.shape, dtype=BF16)

    expected, q_done = {name: each.copy() for name, each in arrays.items()}, np.empty_like(q)
    for token, head in np.ndindex(q.shape[:2]):
        row = turned(q[token, head], cos_sin[POSITIONS[token]])
        q_done[token, head] = spread(row).astype(BF16)
    for token, slot in valid():
        for head in range(2):
            row = turned(k[token, head], cos_sin[POSITIONS[token]])
            for letter, each in (("k", row), ("v", f32(v[token, head]))):
                groups = spread(each).reshape(4, 32)
                scale = np.maximum(np.abs(groups).max(axis=1) / F32(7), F32(1e-6))
                codes = whole(groups * (F32(1) / scale)[:, None], -8, 7).reshape(-1)
                at(expected[f"{letter}_scale"], slot, layout)[head] = scale
                at(expected[f"{letter}_cache"], slot, layout)[head] = packed(codes)

    scales = {name: arrays[name] for name in ("k_scale", "v_scale")}
    pages = arrays["k_cache"], arrays["v_cache"]
    names["store"](
        *pages, k, v, SLOTS, q=q, q_out=q_out, cos_sin=cos_sin, positions=POSITIONS, **scales
    )
    for name, each in arrays.items():
        same(each, expected[name])
    same(q_out, q_done)

    k_out, v_out = noise(make, *k.shape, dtype=BF16), noise(make, *v.shape, dtype=BF16)
    before = k_out.copy()
    names["load"](*pages, SLOTS, k_out, v_out, **scales)
    same(k_out[SLOTS < 0], before[SLOTS < 0])
    k_turned = np.array(
        [
            [turned(k[token, head], cos_sin[POSITIONS[token]]) for head in range(2)]
            for token in range(TOKENS)
        ]
    )
    for found, rows in ((k_out, k_turned), (v_out, f32(v))):
        error = f32(found[SLOTS >= 0]) - rows[SLOTS >= 0]
        assert np.sqrt((error**2).mean() / (rows**2).mean()) < 0.12


def test_turboquant(make):
    names = run("TurboQuant")
    # A head size whose root is exact, so that squares and their sums are.
    k, v = eighths(make, TOKENS, 2, 64), eighths(make, TOKENS, 2, 64)
    k[0, 0] = 0
    shape = BLOCKS, BLOCK_SIZE, 2
    caches = [noise(make, *shape, 32) for _ in "kv"]
    norms = [noise(make, *shape, dtype=F32) for _ in "kv"]
    level, edge = names["level"], names["edge"]

    pages, scales = [each.copy() for each in caches], [each.copy() for each in norms]
    back = [np.zeros((TOKENS, 2, 64), F32) for _ in "kv"]
    for rows, page, scale, read in zip((k, v), pages, scales, back, strict=True):
        for token, slot in valid():
            for head in range(2):
                row = spread(f32(rows[token, head]))
                norm = np.sqrt(F32((row.astype(np.float64) ** 2).sum()) / F32(64))
                index = np.array([sum(x >= norm * each for each in edge) for x in row])
                at(scale, slot)[head] = norm
                at(page, slot)[head] = packed((index - 8).astype(np.int8))
                read[token, head] = level[index] * norm
                if norm:  # the nearest level, but for ties
                    far = np.abs(row[:, None] / norm - level)
                    assert (far[np.arange(64), index] <= far.min(axis=1) + 1e-6).all()

    names["store"](
        *caches, k, v, SLOTS, k_scale=norms[0], v_scale=norms[1], edge=edge,
    )  # fmt: skip
    for found, wanted in zip(caches + norms, pages + scales, strict=True):
        same(found, wanted)

    k_out, v_out = noise(make, *k.shape, dtype=F32), noise(make, *v.shape, dtype=F32)
    one = np.ones(1, F32)
    names["load"](
        *caches, SLOTS, k_out, v_out, k_scale=one, v_scale=one, level=level,
        k_norm=norms[0], v_norm=norms[1],
    )  # fmt: skip
    matrix = np.array([[(-1.0) ** (i & j).bit_count() / 8 for j in range(64)] for i in range(64)])
    for found, read in zip((k_out, v_out), back, strict=True):
        np.testing.assert_allclose(
            found[SLOTS >= 0], (read @ matrix)[SLOTS >= 0], rtol=0, atol=1e-5
        )
    assert (k_out[0, 0] == 0).all()
    error = names["k_out"][:3].astype(F32) - f32(names["k"])[:3]
    assert np.sqrt((error**2).mean()) < 0.12  # 0.097 is that of the levels


def test_guards(make):
    store = run("NaN")["store"]
    k, v = normal(make, TOKENS, 2, 128), normal(make, TOKENS, 2, 128)
    for rows in (k, v):
        rows[make.random(rows.shape) < 0.1] = np.nan
    k[make.random(k.shape) < 0.1] = np.inf
    k[make.random(k.shape) < 0.1] = -np.inf
    v[0, 0, 0], v[6, 0, 0] = np.inf, np.inf  # at positions 21 and 1
    k_cache = noise(make, BLOCKS, BLOCK_SIZE, 2, 128, dtype=BF16)
    v_cache = noise(make, BLOCKS, BLOCK_SIZE, 2, 128, dtype=BF16)

    k_pages, v_pages = k_cache.copy(), v_cache.copy()
    for token, slot in valid():
        row = f32(k[token])
        row[np.isnan(row)] = 0
        at(k_pages, slot)[...] = np.clip(row, -100, 100).astype(BF16)
        row = v[token].copy()
        row[np.isnan(f32(row))] = 0
        at(v_pages, slot)[...] = 0 if POSITIONS[token] < 21 else row

    store(k_cache, v_cache, k, v, SLOTS, most=100.0, positions=POSITIONS, sinks=21)
    same(k_cache, k_pages)
    same(v_cache, v_pages)
