# SPDX-License-Identifier: Apache-2.0
"""Generated writes and gathers in storage formats, and what they do by their definition.

The definition is written down a second time here, element by element, and shares nothing with the
package: codes are found by comparing exact values in float64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from layouts import GUARD, Case, strided, view_of

import pagedcache as pc
from pagedcache.backend.protocol import Invalid

FORMATS = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "int8", "int4")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")
SOURCES = ("float16", "bfloat16", "float32")
MOST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0, "int4": 7.0}
LOWEST = {"int8": -128, "int4": -8}


@functools.cache
def magnitudes(name):
    """Return the finite magnitudes of an 8-bit float, in the order of their codes."""
    bits, bias = (3, 7) if name == "float8_e4m3fn" else (2, 15)
    found = []
    for code in range(0x7F if bits == 3 else 0x7C):
        exponent, mantissa = code >> bits, code & (1 << bits) - 1
        whole = mantissa / 2**bits + (exponent > 0)
        found.append(whole * 2.0 ** (max(exponent, 1) - bias))
    return np.array(found)


def code_of(name, value):
    """Return the code of one float32, as the contract says it."""
    value = np.float64(value)
    if name in LOWEST:
        if np.isnan(value):
            return 0
        limited = min(max(value, LOWEST[name]), MOST[name])
        return int(np.sign(limited) * np.floor(np.abs(limited) + 0.5)) & (
            15 if name == "int4" else 255
        )
    if name in EIGHT_BITS:
        if np.isnan(value):
            return 0x7F
        known = magnitudes(name)
        size = min(abs(value), MOST[name])
        below = int(np.searchsorted(known, size, side="right")) - 1
        if below + 1 < len(known):
            nearer = size - known[below], known[below + 1] - size
            if nearer[1] < nearer[0] or (nearer[1] == nearer[0] and below % 2):
                below += 1
        return below | (0x80 if np.signbit(value) else 0)
    single = np.float32(value)
    if np.isnan(single):
        return {"float16": 0x7FFF, "bfloat16": 0x7FFF, "float32": 0x7FFFFFFF}[name]
    bits = int(single.view(np.uint32))
    if name == "float32":
        return bits
    if name == "bfloat16":
        # Half of the dropped part decides, and the last bit that stays breaks the tie.
        return bits + 0x7FFF + (bits >> 16 & 1) >> 16
    with np.errstate(over="ignore"):
        return int(np.float16(single).view(np.uint16))


def value_of(name, code):
    """Return the float32 of one code."""
    if name in LOWEST:
        wide = 4 if name == "int4" else 8
        return np.float32(code - (1 << wide) if code >> wide - 1 else code)
    if name in EIGHT_BITS:
        rest = code & 0x7F
        known = magnitudes(name)
        if rest < len(known):
            return np.float32(-known[rest] if code & 0x80 else known[rest])
        infinite = name == "float8_e5m2" and rest == 0x7C
        return np.float32((-np.inf if code & 0x80 else np.inf) if infinite else np.nan)
    if name == "bfloat16":
        return np.uint32(code << 16).view(np.float32)
    if name == "float16":
        with np.errstate(invalid="ignore"):
            return np.float32(np.uint16(code).view(np.float16))
    return np.uint32(code).view(np.float32)


@dataclass(repr=False)
class FormatCase(Case):
    """A write or a gather in formats: up to seven tensors, some perhaps in one buffer."""

    formats: dict[str, str]
    granularity: dict[str, str | None]
    named: dict[str, str | None]

    def on(self, to_device):
        buffers = {name: to_device(buffer) for name, buffer in self.buffers.items()}
        views = {name: view_of(buffers[self.home(name)], *self.recipe[name]) for name in self.views}
        more = self.formats, self.granularity, self.named
        return FormatCase(self.layout, buffers, views, self.recipe, *more)

    def __repr__(self):
        slots = self.views["slot_mapping"].tolist()
        about = self.formats, self.granularity, self.named, slots
        return f"FormatCase({self.layout}, {self.recipe}, {about})"

    def home(self, name):
        """Return the name of the buffer that a tensor is in."""
        homes = [name, f"{name[0]}_cache", "k_cache"]
        return next(each for each in homes if each in self.buffers)

    def in_bytes(self):
        """Return this case with 8-bit floats as bytes, for libraries that lack their dtypes."""
        recipe, named = dict(self.recipe), dict(self.named)
        for letter, stored in self.formats.items():
            if stored in EIGHT_BITS:
                _, *rest = recipe[f"{letter}_cache"]
                recipe[f"{letter}_cache"] = ("uint8", *rest)
                named[letter] = stored
        case = FormatCase(
            self.layout, self.buffers, self.views, recipe, self.formats, self.granularity, named
        )
        return case.on(np.copy)

    def arguments(self, operator="write"):
        """Return the arrays by the names that the operator has for them."""
        renamed = {"k": "k_out", "v": "v_out"} if operator == "gather" else {}
        return {renamed.get(name, name): view for name, view in self.views.items()}

    def options(self):
        return {
            "layout": self.layout,
            "k_format": self.named["k"],
            "v_format": self.named["v"],
        }

    def described(self, operator="write"):
        renamed = {"k": "k_out", "v": "v_out"} if operator == "gather" else {}
        return {
            renamed.get(name, name): pc.TensorDescriptor(dtype, shape, strides)
            for name, (dtype, _, shape, strides) in self.recipe.items()
        }


@st.composite
def format_cases(draw, max_tokens=30, like=None):
    """Draw a case. The same one serves for a write and for a gather.

    `like` is what it must have: the source's dtype, that of the slots, formats and granularities of
    K and V. Sizes are then multiples of a few numbers, so that few kernels are compiled.
    """
    source = like[0] if like else draw(st.sampled_from(SOURCES))
    slot_dtype = like[1] if like else draw(st.sampled_from(["int64", "int32"]))
    layout = draw(st.sampled_from(["HND", "NHD"]))
    heads, blocks, block_size = (draw(st.integers(1, most)) for most in (4, 5, 6))
    tokens = draw(st.integers(0, max_tokens))
    gaps = draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    middle = (heads, block_size) if layout == "HND" else (block_size, heads)
    buffers, views, recipe = {}, {}, {}
    chosen, granularities, named = {}, {}, {}

    def add(name, dtype, shape, strides, start=GUARD):
        itemsize = np.dtype(dtype).itemsize
        span = itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n))
        buffers[name] = rng.integers(0, 256, start + max(span, 0) + GUARD, dtype=np.uint8)
        recipe[name] = (dtype, start, shape, strides)

    pages = draw(st.booleans())  # K, V and their scales in one buffer, as vLLM has them
    width = 0
    places = {}
    for letter in "kv":
        stored = chosen[letter] = (
            like[2]["kv".index(letter)] if like else draw(st.sampled_from(FORMATS))
        )
        is_copy = stored == source
        kinds = [None]
        if stored in EIGHT_BITS:
            kinds = [None, "tensor", "head", "channel", "token_head", "group"]
        elif stored in LOWEST and not is_copy:
            kinds = ["tensor", "head", "channel", "token_head", "group"]
        if like:
            kinds = [like[3]["kv".index(letter)]]
        kind = granularities[letter] = draw(st.sampled_from(kinds))
        packed = 2 if stored == "int4" else 1
        units = [16, 4] if like else [16, 8, 4, 2, 1]
        unit = max(draw(st.sampled_from(units)), packed)
        size = unit * draw(st.integers(1, 5))
        group = draw(st.sampled_from([n for n in range(packed, size + 1, packed) if size % n == 0]))
        in_bytes = stored == "int4" or (MOST.get(stored) and draw(st.booleans()))
        dtype = "uint8" if in_bytes else stored
        must = in_bytes or (stored in SOURCES and not is_copy)
        named[letter] = stored if must or draw(st.booleans()) else None
        codes = size // packed * np.dtype(dtype).itemsize
        groups = size // group if kind == "group" else 1
        places[letter] = (dtype, size // packed, width, groups)
        row = -(-codes // 4) * 4 + (4 * groups if kind in ("token_head", "group") else 0)
        width = -(-(width + row) // 4) * 4

    for letter in "kv":
        dtype, length, at, groups = places[letter]
        kind, itemsize = granularities[letter], np.dtype(dtype).itemsize
        size = length * (2 if chosen[letter] == "int4" else 1)
        name = f"{letter}_cache"
        inside = pages and kind in ("token_head", "group")
        if pages:
            steps = [1] * 3
            step = width
            for axis in (2, 1, 0):
                steps[axis] = step
                step *= (*middle,)[axis - 1] if axis else 1
            strides = (*(each // itemsize for each in steps), 1)
            if letter == "k":
                total = width * blocks * heads * block_size
                buffers["k_cache"] = rng.integers(0, 256, total + 2 * GUARD, dtype=np.uint8)
            recipe[name] = (dtype, GUARD + at, (blocks, *middle, length), strides)
        else:
            order = draw(st.permutations(range(3)))
            unit = draw(st.sampled_from([16, 4, 1])) // min(itemsize, 4) or 1
            strides = strided(draw, (blocks, *middle, length), (*order, 3), unit, gaps)
            start = GUARD + draw(st.sampled_from([0, 0, 8, itemsize])) // itemsize * itemsize
            add(name, dtype, (blocks, *middle, length), strides, start)
        if kind is not None:
            by_slot = (blocks, *middle)
            shape = {
                "tensor": draw(st.sampled_from([(), (1,)])),
                "head": (heads,),
                "channel": (heads, size),
                "token_head": by_slot,
                "group": (*by_slot, groups),
            }[kind]
            if inside:
                codes = -(-length * itemsize // 4) * 4
                in_floats = tuple(each // 4 for each in steps)
                strides = in_floats if kind == "token_head" else (*in_floats, 1)
                recipe[f"{letter}_scale"] = ("float32", GUARD + at + codes, shape, strides)
            else:
                order = draw(st.permutations(range(len(shape))))
                strides = strided(draw, shape, order, 1, gaps)
                add(f"{letter}_scale", "float32", shape, strides)

    for letter in "kv":
        _, length, *_ = places[letter]
        size = length * (2 if chosen[letter] == "int4" else 1)
        shape = (tokens + draw(st.integers(0, 2)), heads, size)
        order = draw(st.sampled_from([(0, 1), (1, 0)]))
        itemsize = np.dtype(source).itemsize
        unit = draw(st.sampled_from([16 // itemsize, 1]))
        strides = strided(draw, shape, (*order, 2), unit, gaps)
        start = GUARD + draw(st.sampled_from([0, 0, 8, itemsize]))
        add(letter, source, shape, strides, start)
    add("slot_mapping", slot_dtype, (tokens,), (1,))

    case = FormatCase(layout, buffers, views, recipe, chosen, granularities, named)
    order = ("k_cache", "v_cache", "k", "v", "slot_mapping", "k_scale", "v_scale")
    for name in order:
        if name in recipe:
            views[name] = view_of(buffers[case.home(name)], *recipe[name])
    for letter in "kv":
        rows = views[letter]
        spread = draw(st.sampled_from([0.01, 1.0, 30.0, 1e4]))
        with np.errstate(over="ignore"):
            rows[...] = (rng.standard_normal(rows.shape) * spread).astype(np.float32).astype(source)
        if draw(st.booleans()):  # any bits at all
            bits = rng.integers(0, 256, rows.size * rows.itemsize, dtype=np.uint8)
            rows[...] = bits.view(source).reshape(rows.shape)
        if draw(st.booleans()):
            for value in (np.nan, np.inf, -np.inf, 0.0, -0.0):
                rows[rng.random(rows.shape) < 0.05] = value
        if draw(st.booleans()) and rows.size:
            rows[rng.integers(len(rows))] = 0
        if (scale := views.get(f"{letter}_scale")) is not None:
            scale[...] = np.exp(rng.standard_normal(scale.shape) * 3).astype(np.float32)
            if draw(st.booleans()):
                odd = np.array([0.0, -1.5, np.inf, np.nan, 1e-42, 3e38, 0.5], np.float32)
                scale[...] = odd[rng.integers(0, len(odd), scale.shape)]
    capacity = blocks * block_size
    slots = np.full(tokens, -1, np.int64)
    free = rng.permutation(capacity)[:tokens]
    slots[: len(free)] = free
    rng.shuffle(slots)
    limits = np.iinfo(slot_dtype)
    bad = [-1, limits.min, capacity, capacity + 1, limits.max]
    for index in range(tokens):
        if draw(st.integers(0, 5)) == 0:
            slots[index] = bad[draw(st.integers(0, len(bad) - 1))]
    views["slot_mapping"][...] = slots.astype(slot_dtype)
    return case


def invalid_slots(case):
    """Return what must be reported; ``None`` if all slots are fine."""
    k_cache, slots = case.views["k_cache"], case.views["slot_mapping"]
    capacity = k_cache.shape[0] * k_cache.shape[2 if case.layout == "HND" else 1]
    bad = [(token, slot) for token, slot in enumerate(slots.tolist()) if slot >= capacity]
    return Invalid(len(bad), *bad[0]) if bad else None


def _rows(case):
    """Yield token, head, and the index of the row in a cache, of all valid slots."""
    k_cache = case.views["k_cache"]
    heads = k_cache.shape[1 if case.layout == "HND" else 2]
    block_size = k_cache.shape[2 if case.layout == "HND" else 1]
    for token, slot in enumerate(case.views["slot_mapping"].tolist()):
        if 0 <= slot < k_cache.shape[0] * block_size:
            block, offset = divmod(slot, block_size)
            for head in range(heads):
                at = (block, head, offset) if case.layout == "HND" else (block, offset, head)
                yield token, head, at


def _scale_of(case, letter, head, at, dim, size):
    kind, scale = case.granularity[letter], case.views.get(f"{letter}_scale")
    if kind is None:
        return None
    index = {
        "tensor": (0,) * scale.ndim,
        "head": (head,),
        "channel": (head, dim),
        "token_head": at,
        "group": (*at, dim // (size // scale.shape[-1])) if kind == "group" else (),
    }[kind]
    return scale, index


def written(case):
    """Return what the buffers hold after the write."""
    done = case.copy()
    with np.errstate(all="ignore"):
        for letter in "kv":
            for token, head, at in _rows(done):
                _write_row(done, letter, token, head, at)
    return done.buffers


def _write_row(done, letter, token, head, at):
    name, kind = done.formats[letter], done.granularity[letter]
    rows, cache = done.views[letter], done.views[f"{letter}_cache"]
    row = rows[token, head]
    if name == str(rows.dtype):
        cache[at].view(f"u{rows.itemsize}")[...] = row.view(f"u{rows.itemsize}")
        return
    values = [np.float32(value) for value in row]
    size = len(values)
    if kind in ("token_head", "group"):
        scale = done.views[f"{letter}_scale"]
        count = scale.shape[-1] if kind == "group" else 1
        for group in range(count):
            some = values[group * size // count : (group + 1) * size // count]
            most = max([np.float32(0), *(abs(each) for each in some if not np.isnan(each))])
            found = max(np.float32(most / np.float32(MOST[name])), np.float32(1e-6))
            scale[(*at, group) if kind == "group" else at] = found
            by = np.float32(1) / found
            for index in range(group * size // count, (group + 1) * size // count):
                values[index] = values[index] * by
    elif kind is not None:
        for index in range(size):
            scale, place = _scale_of(done, letter, head, at, index, size)
            values[index] = values[index] / scale[place]
    codes = [code_of(name, each) for each in values]
    if name == "int4":
        codes = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    bits = cache[at].view(f"u{cache.itemsize}")
    bits[...] = np.array(codes, np.uint64).astype(bits.dtype)


def gathered(case):
    """Return what the buffers hold after the gather into k and v."""
    done = case.copy()
    with np.errstate(all="ignore"):
        for letter in "kv":
            rows, cache = done.views[letter], done.views[f"{letter}_cache"]
            name, out = done.formats[letter], rows.view(f"u{rows.itemsize}")
            for token, head, at in _rows(done):
                bits = cache[at].view(f"u{cache.itemsize}")
                if name == str(rows.dtype):
                    out[token, head] = bits
                    continue
                codes = [int(code) for code in bits]
                if name == "int4":
                    codes = [each for code in codes for each in (code & 15, code >> 4)]
                for dim, code in enumerate(codes):
                    value = value_of(name, code)
                    found = _scale_of(done, letter, head, at, dim, len(codes))
                    if found is not None:
                        value = value * found[0][found[1]]
                    out[token, head, dim] = code_of(str(rows.dtype), value)
    return done.buffers
