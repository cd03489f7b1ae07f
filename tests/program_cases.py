# SPDX-License-Identifier: Apache-2.0
"""Random kernels with steps, and random arrays for them."""

from __future__ import annotations

import dataclasses
import random

import ml_dtypes
import numpy as np

import pagedcache as pc

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
F16, F32 = np.dtype(np.float16), np.dtype(np.float32)
SOURCES = (F16, BF16, F32)
FORMATS = {
    "float16": F16, "bfloat16": BF16, "float32": F32, "float8_e4m3fn": E4M3,
    "float8_e5m2": E5M2, "int8": np.dtype(np.int8), "int4": np.dtype(np.uint8),
}  # fmt: skip
SIZES = (128, 64, 128, 64, 1, 2, 5, 8, 12, 16, 24, 40, 48, 72, 80, 96, 100, 112, 160, 192, 256,
         320, 576, 1000, 1024)  # fmt: skip
EXPRESSIONS = (
    "x * gain[head, dim]", "x + bias[dim]", "x * factor", "min(max(x, -most), most)",
    "0 if isnan(x) else x", "x - row_mean(x)", "x / (row_max(abs(x)) + 1)",
    "x * table[ids[token], dim % 3]", "at(size - 1 - dim)", "x if dim % 2 == 1 else -x",
    "x * sqrt(abs(x)) if keep[token] else 0", "rint(x * 8) / 8", "row_sum(x * at(0))",
    "x * (slot + 1) / (block + offset + 3)", "x + row_min(at((dim + count) % size))",
    "bfloat16(x) - float16(x) * flag", "floor(x) if head % 2 == 1 else ceil(x)",
    "x * pow2_ceil(row_max(abs(x))) + zero", "x * x // 3 + x % 2 + round(x)",
    "bias[min(dim, ids[token] + dim)] * x", "x if ids[token] < 3 else table[ids[token] + 3, 0]",
)  # fmt: skip
SCALES = (
    "max(row_max(abs(x)) / 127, 1e-6)", "pow2_ceil(max(row_max(abs(x)) / 7, 1e-4))",
    "row_sum(x * x) / 3 + 1", "floats[token] + 1", "sqrt(row_mean(abs(x))) + factor",
)  # fmt: skip
CODES = ("x / s", "x * (1 / s)", "rint(x / s)", "x / s + row_mean(x) * bias[dim]", "(x - s) / s")


@dataclasses.dataclass
class Case:
    """A kernel, and how its arrays are made."""

    kernel: object
    reads: bool
    dtype: np.dtype
    k_size: int
    v_size: int
    heads: int
    q_heads: int
    formats: dict
    scales: dict
    outs: dict
    slot_dtype: type
    layout: str
    by_letter: dict
    floats: np.dtype
    integers: type

    def arrays(self, seed):
        """Return the arguments of a call by name, all in memory of their own."""
        return _arrays(self, random.Random(seed), np.random.default_rng(seed))


def owner(array):
    """Return the array that owns the memory of another."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def split(case, arrays):
    """Return the tensors of a call in order, and the parameters."""
    names = case.kernel._program.names
    parameters = {name: value for name, value in arrays.items() if name not in names}
    return [arrays.get(name) for name in names], parameters


def operation_of(case, arrays):
    """Return the operation for some arrays, and the arguments that it is run on."""
    tensors, parameters = split(case, arrays)
    variant, parameters = case.kernel._variant(parameters)
    arguments = (*tensors, *variant.values(parameters))
    return variant.create(*arguments), arguments


def reported(operation):
    """Return how many rows an operation reported, and the first token."""
    found = operation._report.take()
    return found and (found.count, found.row)


def different(found, wanted):
    """Return the names of arrays whose memory, all that they are views of, differs."""
    return [
        name
        for name, array in wanted.items()
        if isinstance(array, np.ndarray) and owner(found[name]).tobytes() != owner(array).tobytes()
    ]


def random_case(seed, *, reads=False):
    """Return a random kernel."""
    rng = random.Random(seed)
    size = rng.choice(SIZES)
    v_size = size if rng.random() < 0.7 else rng.choice(SIZES)
    heads, q_heads = rng.choice(((1, 1), (2, 4), (2, 6), (3, 3), (8, 32), (1, 5)))
    dtype = rng.choice(SOURCES)
    sizes = {"q": size, "k": size, "v": v_size}
    by_letter, formats, scales = {}, {}, {}
    for letter in "kv" if reads else "qkv":
        by_letter[letter] = [
            step for _ in range(rng.choice((0, 1, 1, 2, 3)))
            for step in _random_step(rng, sizes[letter], rng.choice(SIZES))
        ]  # fmt: skip
    for letter in "kv":
        choices = [name for name in FORMATS if name != "int4" or sizes[letter] % 2 == 0]
        name = rng.choice((str(dtype), *choices))
        if FORMATS[name] in SOURCES:
            formats[letter], scales[letter] = name, None
            continue
        kinds = ["tensor", "head", "channel", "row", "group"]
        scale = rng.choice(kinds if name.startswith("int") else [*kinds, None])
        groups = [g for g in (1, 2, 3, 4, 8, 16, 32, 64, 160) if sizes[letter] % g == 0]
        groups = [g for g in groups if name != "int4" or g % 2 == 0] or [sizes[letter]]
        group = rng.choice(groups) if scale == "group" else sizes[letter]
        if not reads and scale in ("row", "group") and rng.random() < 0.5:
            by_letter[letter].append(
                pc.quantize(
                    rng.choice(SCALES), rng.choice(CODES), name,
                    group=group if group != sizes[letter] else None,
                )
            )  # fmt: skip
        formats[letter], scales[letter] = name, scale and (scale, group)
    has_q = not reads and (bool(by_letter["q"]) or rng.random() < 0.3)
    outs = {"q": rng.choice((*SOURCES, E4M3, dtype, dtype))} if has_q else {}
    for letter in "kv":
        if reads or rng.random() < 0.3:
            outs[letter] = rng.choice(SOURCES) if not reads else dtype
    if reads:
        outs["v"] = outs["k"]
    layout = rng.choice(("HND", "NHD"))
    make = pc.ReadKernel if reads else pc.WriteKernel
    kernel = make(
        **by_letter, layout=layout, k_format=formats["k"], v_format=formats["v"],
    )  # fmt: skip
    slot_dtype = rng.choice((np.int64, np.int32))
    return Case(kernel, reads, dtype, size, v_size, heads, q_heads, formats, scales, outs,
                slot_dtype, layout, by_letter, rng.choice(SOURCES),
                rng.choice((np.int32, np.int64)))  # fmt: skip


def _random_step(rng, size, other):
    kind = rng.random()
    if kind < 0.2:
        return [pc.rms_norm(f"weight{size}", rng.choice((1e-6, 0, 1)),
                            weight_offset=rng.choice((0.0, 1.0)))]  # fmt: skip
    if kind < 0.5 and size > 1:
        rotated = size if rng.random() < 0.4 else rng.randrange(2, size + 1, 2)
        if rng.random() < 0.5:
            rotated = 1 << rotated.bit_length() - 1
        rotated -= rotated % 2
        first = rng.choice((0, size - rotated, rng.randrange(size - rotated + 1)))
        style = rng.choice(("neox", "interleaved"))
        return [pc.rope(f"cos_sin{rotated}", "positions", style=style, first=first)]
    if kind < 0.6:
        groups = [g for g in (1, 2, 4, 8, 16, 32, 64, 128) if size % g == 0]
        group = rng.choice(groups)
        return [pc.hadamard(group=None if not size & (size - 1) else group)]
    if kind < 0.7:
        return [pc.cast(rng.choice(("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")))]
    if kind < 0.75:  # data is moved, since what users write in CUDA may flush
        return [pc.cuda("y = bias(dim) > factor ? x : at(0);",
                        numpy=lambda x, dim, factor, bias: np.where(
                            bias[dim] > np.float32(factor), x, x[..., :1]))]  # fmt: skip
    return [rng.choice(EXPRESSIONS)]


def _arrays(case, rng, data):
    tokens = rng.choice((0, 1, 1, 3, 7, 20))
    rows = tokens + rng.choice((0, 0, 2))
    blocks, slots_in = rng.choice(((1, 1), (2, 16), (5, 4), (7, 3)))
    num_slots = blocks * slots_in
    # Each valid slot once, since of two rows in one slot either may stay.
    slots = [rng.choice((-1, -7, num_slots, num_slots + 5)) for _ in range(tokens)]
    some = min(tokens, num_slots)
    chosen = rng.sample(range(tokens), some), rng.sample(range(num_slots), some)
    for token, slot in zip(*chosen, strict=True):
        if rng.random() < 0.85:
            slots[token] = slot
    sizes = {"q": case.k_size, "k": case.k_size, "v": case.v_size}
    heads = {"q": case.q_heads, "k": case.heads, "v": case.heads}
    special = rng.random() < 0.3
    magnitude = rng.choice((1.0, 1.0, 1.0, 1e-3, 1e3, 1e-30))

    def values(shape, dtype):
        made = data.standard_normal(shape).astype(F32) * np.float32(magnitude)
        if special:
            some = data.random(shape) < 0.05
            odd = data.choice([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, 3e38, -1e-20], shape)
            made = np.where(some, odd, made).astype(F32)
        with np.errstate(all="ignore"):
            return made.astype(dtype)

    padding = rng.choice((0, 16, 3))  # elements; kernels differ by what alignment strides allow

    def placed(array):
        """Return the same in a larger array, so that strides are not those of the shape."""
        if not padding or not array.ndim:
            return array.copy()
        pads = [rng.choice((0, padding)) for _ in range(array.ndim - 1)] + [padding]
        larger = np.zeros([n + p for n, p in zip(array.shape, pads, strict=True)], array.dtype)
        larger.view(np.uint8)[...] = 0x5A
        starts = [rng.choice((0, p)) for p in pads]
        there = larger[tuple(slice(s, s + n) for s, n in zip(starts, array.shape, strict=True))]
        there[...] = array
        return there

    arrays = {"slot_mapping": placed(np.array(slots, case.slot_dtype))}
    for letter in "kv":
        dtype = FORMATS[case.formats[letter]]
        size = sizes[letter] // (2 if case.formats[letter] == "int4" else 1)
        shape = (blocks, case.heads, slots_in, size)
        scale_shape = shape[:3]
        if case.layout == "NHD":
            shape, scale_shape = ((n[0], n[2], n[1], *n[3:]) for n in (shape, scale_shape))
        stored = data.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
        arrays[f"{letter}_cache"] = placed(stored.view(dtype))
        if not case.reads:
            arrays[letter] = placed(values((rows, heads[letter], sizes[letter]), case.dtype))
        if case.scales[letter]:
            kind, group = case.scales[letter]
            shape = {
                "tensor": (1,), "head": (case.heads,), "channel": (case.heads, sizes[letter]),
                "row": scale_shape, "group": (*scale_shape, sizes[letter] // group),
            }[kind]  # fmt: skip
            scale = (data.random(shape) * 4 + 0.25).astype(F32) * np.float32(min(magnitude, 1e10))
            arrays[f"{letter}_scale"] = placed(scale)
    for letter, dtype in case.outs.items():
        shape = (rows, heads[letter], sizes[letter])
        if letter == "q":
            arrays["q"] = placed(values(shape, case.dtype))
        bits = data.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
        arrays[f"{letter}_out"] = placed(bits.view(dtype))
        if not case.reads and dtype == case.dtype and rng.random() < 0.4:
            arrays[f"{letter}_out"] = arrays[letter]  # in place
    needed = case.kernel._program.parameters
    for name in needed:
        arrays[name] = _parameter(name, case, rng, data, rows, placed)
    return tokens, arrays


def _parameter(name, case, rng, data, rows, placed):
    floats, integers = case.floats, case.integers
    letters = [
        letter for letter, pipeline in case.kernel._program.pipelines.items()
        if name in pipeline.assumed
    ]  # fmt: skip
    size = {"q": case.k_size, "k": case.k_size, "v": case.v_size}[letters[0]]
    heads = {"q": case.q_heads, "k": case.heads, "v": case.heads}[letters[0]]
    if name.startswith("weight"):
        return placed(data.standard_normal(int(name[6:])).astype(floats))
    if name.startswith("cos_sin"):
        return placed(data.standard_normal((8, int(name[7:]))).astype(floats))
    if name in ("positions", "ids"):
        high = rng.choice((5, 5, 9))
        return placed(data.integers(-1 if high == 9 else 0, high, rows).astype(integers))
    made = {
        "gain": lambda: placed(data.standard_normal((heads, size)).astype(floats)),
        "bias": lambda: placed(data.standard_normal(size).astype(floats)),
        "table": lambda: placed(data.standard_normal((6, 3)).astype(floats)),
        "keep": lambda: placed(data.random(rows) < 0.5),
        "floats": lambda: placed(np.abs(data.standard_normal(rows)).astype(floats)),
        "factor": lambda: rng.choice((0.5, 1e-3, 3.0)), "most": lambda: 1.5,
        "size": lambda: size, "count": lambda: rng.randrange(5),
        "flag": lambda: rng.random() < 0.5,
        "zero": lambda: np.array(0.25, floats),
    }  # fmt: skip
    return made[name]()
