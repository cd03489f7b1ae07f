# SPDX-License-Identifier: Apache-2.0
"""Generated paged caching writes: every axis of the contract, each tensor inside a guarded buffer.

A `Case` owns one byte buffer for each tensor. The tensors are strided views into them, so comparing
the buffers compares everything: written slots, untouched slots, gaps between rows, and guards.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

import pagedcache as pc
from pagedcache.backend.protocol import Invalid
from pagedcache.operators.one_call import Kept
from pagedcache.operators.paged_caching import one_call

GUARD = 64  # bytes before and after each tensor


@dataclass
class Case:
    """Five tensors in five buffers, and their layout."""

    layout: str
    buffers: dict[str, np.ndarray]
    views: dict[str, np.ndarray]
    recipe: dict[str, tuple] = field(repr=False)

    def on(self, to_device):
        """Return this case with its buffers moved, and new views of them."""
        buffers = {name: to_device(buffer) for name, buffer in self.buffers.items()}
        views = {name: view_of(buffers[name], *self.recipe[name]) for name in self.views}
        return Case(self.layout, buffers, views, self.recipe)

    def copy(self):
        return self.on(np.copy)

    def arrays(self):
        return [self.views[name] for name in ("k_cache", "v_cache", "k", "v", "slot_mapping")]

    def addresses(self):
        return [
            view.ctypes.data if isinstance(view, np.ndarray) else view.data.ptr
            for view in self.arrays()
        ]


def view_of(buffer, dtype, start, shape, strides):
    """Return a view of a NumPy or CuPy byte buffer; strides are in elements."""
    dtype = np.dtype(dtype)
    steps = tuple(step * dtype.itemsize for step in strides)
    span = dtype.itemsize + sum(
        (length - 1) * step for length, step in zip(shape, steps, strict=True)
    )
    if 0 in shape:
        span = 0
    if isinstance(buffer, np.ndarray):
        # As ints, since NumPy does not know all dtypes of ml_dtypes here.
        flat = buffer[start : start + span].view(f"i{dtype.itemsize}")
        return np.lib.stride_tricks.as_strided(flat, shape, steps).view(dtype)
    import cupy

    flat = buffer[start : start + span].view(dtype)

    return cupy.lib.stride_tricks.as_strided(flat, shape, steps)


def strided(draw, shape, order, alignment, gaps):
    """Draw strides, in elements, for axes nested in `order` (outermost first)."""
    strides = [1] * len(shape)
    step = 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(shape[axis], 1)
        if gaps:
            step += draw(st.integers(0, 3)) * alignment
            if draw(st.booleans()):
                step = -(-step // alignment) * alignment
    return tuple(strides)


@st.composite
def cases(draw, max_tokens=40):
    """Draw a valid case."""
    dtype = np.dtype(draw(st.sampled_from(["float16", "bfloat16", "float32"])))
    slot_dtype = np.dtype(draw(st.sampled_from(["int64", "int32"])))
    layout = draw(st.sampled_from(["HND", "NHD"]))
    size = dtype.itemsize
    heads = draw(st.integers(1, 5))
    # Multiples of 16, 8, 4 and 2 bytes, and odd sizes too.
    unit = draw(st.sampled_from([16 // size, 8 // size, max(4 // size, 1), 1]))
    k_size = draw(st.integers(1, 6)) * unit
    v_size = draw(st.one_of(st.just(k_size), st.integers(1, 6).map(lambda n: n * unit)))
    blocks, block_size = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    tokens = draw(st.integers(0, max_tokens))
    extra = [draw(st.integers(0, 3)) for _ in "kv"]
    gaps = draw(st.booleans())
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)

    middle = (heads, block_size) if layout == "HND" else (block_size, heads)
    recipe, buffers, views = {}, {}, {}

    def add(name, dtype, shape, order):
        alignment = 1 if name == "slot_mapping" else unit
        strides = strided(draw, shape, order, alignment, gaps and name != "slot_mapping")
        if name in ("k", "v") and gaps and draw(st.booleans()):
            # A source may be broadcast: an axis with stride 0.
            zero = draw(st.integers(0, 1))
            strides = tuple(0 if axis == zero else step for axis, step in enumerate(strides))
        itemsize = np.dtype(dtype).itemsize
        start = GUARD + draw(st.sampled_from([0, 0, 0, 8, 4, itemsize])) // itemsize * itemsize
        span = itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True) if n))
        buffers[name] = rng.integers(0, 256, start + max(span, 0) + GUARD, dtype=np.uint8)
        recipe[name] = (dtype, start, shape, strides)
        views[name] = view_of(buffers[name], *recipe[name])

    for name, head_size in (("k_cache", k_size), ("v_cache", v_size)):
        # Layers inside a block, heads outside of blocks, K beside V: any nesting of the axes.
        order = draw(st.sampled_from(list(itertools.permutations(range(3)))))
        add(name, dtype, (blocks, *middle, head_size), (*order, 3))
    for name, head_size, more in (("k", k_size, extra[0]), ("v", v_size, extra[1])):
        order = draw(st.sampled_from([(0, 1), (1, 0)]))
        add(name, dtype, (tokens + more, heads, head_size), (*order, 2))

    capacity = blocks * block_size
    # No slot twice, since either of two tokens may end up there.
    chosen = rng.permutation(capacity)[:tokens].astype(np.int64)
    slots = np.full(tokens, -1, np.int64)
    slots[: len(chosen)] = chosen
    rng.shuffle(slots)
    limits = np.iinfo(slot_dtype)
    bad = [-1, -2, limits.min, capacity, capacity + 1, limits.max]
    for index in range(tokens):
        if draw(st.integers(0, 5)) == 0:
            slots[index] = bad[draw(st.integers(0, len(bad) - 1))]
    add("slot_mapping", slot_dtype, (tokens,), (0,))
    views["slot_mapping"][...] = slots.astype(slot_dtype)
    return Case(layout, buffers, views, recipe)


def expected(case):
    """Return what the buffers must hold after the write, by its definition: token by token."""
    done = case.copy()
    k_cache, v_cache, k, v, slots = done.arrays()
    bits = f"u{k.dtype.itemsize}"
    block_size = k_cache.shape[2 if case.layout == "HND" else 1]
    for token, slot in enumerate(slots.tolist()):
        if 0 <= slot < k_cache.shape[0] * block_size:
            block, offset = slot // block_size, slot % block_size
            for cache, rows in ((k_cache, k), (v_cache, v)):
                target = cache[block, :, offset] if case.layout == "HND" else cache[block, offset]
                target.view(bits)[...] = rows[token].view(bits)
    return done.buffers


def invalid_slots(case):
    """Return what must be reported about slots past the end; ``None`` if there are none."""
    k_cache, *_, slots = case.arrays()
    capacity = k_cache.shape[0] * k_cache.shape[2 if case.layout == "HND" else 1]
    bad = [(token, slot) for token, slot in enumerate(slots.tolist()) if slot >= capacity]
    return Invalid(len(bad), *bad[0]) if bad else None


def forget(monkeypatch):
    """Let `paged_caching` start a test without descriptors; return where it keeps them."""
    kept = Kept(pc.Descriptor, one_call._create)
    monkeypatch.setattr(one_call, "_kept", kept)
    return kept


def same(case, buffers):
    """Compare all buffers of a case byte for byte, wherever they are."""
    for name, buffer in buffers.items():
        mine = case.buffers[name]
        mine = mine if isinstance(mine, np.ndarray) else mine.get()
        differing = np.flatnonzero(mine != buffer)
        assert differing.size == 0, f"{name}: {differing.size} bytes differ, first {differing[0]}"


def simple_case(
    tokens=9, heads=3, k_size=8, v_size=8, blocks=7, block_size=4, dtype="bfloat16", slots="int64",
    layout="HND", seed=0,
):  # fmt: skip
    """Return a contiguous case with random bytes and a few padding slots."""
    rng = np.random.default_rng(seed)
    middle = (heads, block_size) if layout == "HND" else (block_size, heads)
    shapes = {
        "k_cache": (dtype, (blocks, *middle, k_size)),
        "v_cache": (dtype, (blocks, *middle, v_size)),
        "k": (dtype, (tokens, heads, k_size)),
        "v": (dtype, (tokens, heads, v_size)),
        "slot_mapping": (slots, (tokens,)),
    }
    recipe, buffers = {}, {}
    for name, (kind, shape) in shapes.items():
        described = pc.TensorDescriptor(kind, shape)
        recipe[name] = (kind, GUARD, shape, described.strides)
        length = described.dtype.itemsize * int(np.prod(shape))
        buffers[name] = rng.integers(0, 256, length + 2 * GUARD, dtype=np.uint8)
    case = Case(layout, buffers, {}, recipe)
    case.views = {name: view_of(buffers[name], *recipe[name]) for name in recipe}
    capacity = blocks * block_size
    chosen = rng.permutation(max(capacity, tokens))[:tokens]
    case.views["slot_mapping"][...] = np.where(chosen < capacity, chosen, -1)
    case.views["slot_mapping"][::5] = -1
    return case
