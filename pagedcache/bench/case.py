# SPDX-License-Identifier: Apache-2.0
"""One measured write: its axes, its arrays, and the check of what it wrote."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedcache.dtypes import as_dtype

SLOT_ORDERS = ("blocks", "random", "sequential")
SOURCES = ("plain", "qkv")
INPUTS = ("cold", "hot")
HOT_SETS, MOST_SETS = 4, 1024


@dataclass(frozen=True)
class Axes:
    """What is measured.

    Attributes
    ----------
    tokens, heads, head_size, v_head_size, block_size : int
    dtype : {"float16", "bfloat16", "float32"}
    layout : {"HND", "NHD"}
    slots : {"blocks", "random", "sequential"}
        ``blocks``: random blocks, each filled in order, as in a prefill. ``random``: a random slot
        for each token, as in a decode step of many sequences. ``sequential``: slots in order.
    source : {"plain", "qkv"}
        ``qkv``: K and V are slices of one fused projection with four query heads for each KV head.
    inputs : {"cold", "hot"}
        ``cold``: so many sets in turn that none is still in a hardware cache. ``hot``: a few sets,
        each several times in a row, as if the kernel that computed K and V had just run.
    """

    tokens: int
    heads: int = 8
    head_size: int = 128
    v_head_size: int = 128
    block_size: int = 16
    dtype: str = "bfloat16"
    layout: str = "HND"
    slots: str = "blocks"
    source: str = "plain"
    inputs: str = "cold"

    @property
    def payload(self) -> int:
        """Bytes of K and V that a write copies."""
        size = as_dtype("dtype", self.dtype).itemsize
        return self.tokens * self.heads * (self.head_size + self.v_head_size) * size

    def describe(self) -> str:
        """Return all axes except the tokens, in words."""
        v = "" if self.v_head_size == self.head_size else f" (V {self.v_head_size})"
        source = "" if self.source == "plain" else ", sliced from fused QKV"
        return (
            f"{self.heads} KV heads x {self.head_size}{v}, {self.dtype}, {self.layout}, "
            f"block size {self.block_size}, slots: {self.slots}{source}, inputs: {self.inputs}"
        )


class Case:
    """The arrays for some `Axes`: two caches, and sets of inputs.

    Parameters
    ----------
    axes : Axes
    xp : module
        NumPy or CuPy.
    num_slots : int
        Capacity of each cache, rounded up to whole blocks.
    rotate_bytes : int
        Least total size of cold sets of inputs, so that none is still in a hardware cache.
    """

    def __init__(self, axes: Axes, xp: Any, num_slots: int, rotate_bytes: int) -> None:
        self.axes = axes
        self.xp = xp
        self.dtype = as_dtype("dtype", axes.dtype)
        blocks = -(-num_slots // axes.block_size)
        self.num_slots = blocks * axes.block_size
        middle = (axes.heads, axes.block_size)
        if axes.layout == "NHD":
            middle = (axes.block_size, axes.heads)
        # Not zeros, for which a host allocates no memory until they are written.
        self.k_cache, self.v_cache = (
            xp.ones((blocks, *middle, size), f"u{self.dtype.itemsize}").view(self.dtype)
            for size in (axes.head_size, axes.v_head_size)
        )
        rng = np.random.default_rng(0)
        count = min(max(2, -(-rotate_bytes // max(axes.payload, 1))), MOST_SETS)
        if axes.inputs == "hot":
            count = HOT_SETS
        self.sets = [self._inputs(rng) for _ in range(count)]

    def shortened(self, counts: Sequence[int]) -> Case:
        """Return the same case with shorter sets, one for each number of tokens in `counts`."""
        other = copy.copy(self)
        taken = (self.sets[i % len(self.sets)] for i in range(len(counts)))
        other.sets = [
            (k[:count], v[:count], slots[:count])
            for count, (k, v, slots) in zip(counts, taken, strict=True)
        ]
        return other

    def _inputs(self, rng: np.random.Generator) -> tuple[Any, Any, Any]:
        axes, xp = self.axes, self.xp
        size = self.dtype.itemsize
        bits = f"u{size}"
        if axes.source == "qkv":
            width = axes.heads * (5 * axes.head_size + axes.v_head_size)
            fused = self._random((axes.tokens, width), bits, rng)
            after_q = fused[:, 4 * axes.heads * axes.head_size :]
            k = after_q[:, : axes.heads * axes.head_size]
            v = after_q[:, axes.heads * axes.head_size :]
            k = k.reshape(axes.tokens, axes.heads, axes.head_size)
            v = v.reshape(axes.tokens, axes.heads, axes.v_head_size)
        else:
            k = self._random((axes.tokens, axes.heads, axes.head_size), bits, rng)
            v = self._random((axes.tokens, axes.heads, axes.v_head_size), bits, rng)
        return k.view(self.dtype), v.view(self.dtype), xp.asarray(self._slots(rng))

    def _random(self, shape: tuple[int, ...], bits: str, rng: np.random.Generator) -> Any:
        # Data without a pattern, since zeros are copied faster than real data. A hash makes it
        # where the arrays are: CuPy's generators need cuRAND, which nothing else here does.
        first = int(rng.integers(2**32))
        index = self.xp.arange(first, first + math.prod(shape), dtype=np.uint64)
        return (index * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(16)).astype(bits).reshape(shape)

    def _slots(self, rng: np.random.Generator) -> Any:
        tokens, block_size = self.axes.tokens, self.axes.block_size
        if self.axes.slots == "sequential":
            return np.arange(tokens)
        if self.axes.slots == "random":
            return rng.permutation(self.num_slots)[:tokens]
        blocks = rng.permutation(self.num_slots // block_size)[: -(-tokens // block_size)]
        return (blocks[:, None] * block_size + np.arange(block_size)).ravel()[:tokens]

    def clear(self) -> None:
        """Set both caches to zero, so that what is found there was written afterwards."""
        for cache in (self.k_cache, self.v_cache):
            cache.view(f"u{self.dtype.itemsize}")[...] = 0

    def is_written(self, index: int) -> bool:
        """Return whether set `index` is in the caches, bit for bit."""
        k, v, slots = self.sets[index]
        block, offset = slots // self.axes.block_size, slots % self.axes.block_size
        bits = f"u{self.dtype.itemsize}"
        for cache, rows in ((self.k_cache, k), (self.v_cache, v)):
            view = cache.view(bits)
            found = view[block, :, offset] if self.axes.layout == "HND" else view[block, offset]
            if not bool((found == rows.view(bits)).all()):
                return False
        return True
