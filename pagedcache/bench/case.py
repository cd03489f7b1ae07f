# SPDX-License-Identifier: Apache-2.0
"""One measured write or gather: its axes, its arrays, and the check of its result."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import pagedcache as pc
from pagedcache.cache.formats import FORMATS
from pagedcache.dtypes import as_dtype

SLOT_ORDERS = ("blocks", "random", "sequential")
SOURCES = ("plain", "qkv")
INPUTS = ("cold", "hot")
COPY = "copy"
# Formats, and the scales that each has by default.
DEFAULT_SCALES = {
    COPY: "",
    "float8_e4m3fn": "tensor",
    "float8_e5m2": "tensor",
    "int8": "token-head",
    "int4": "group",
}
SCALES = ("tensor", "head", "token-head", "group")
COMPUTED = ("token-head", "group")  # by the write; the others are read
OPERATORS = ("write", "gather")
GROUP = 32
HOT_SETS, MOST_SETS = 4, 1024
MOST_CHECKED = 256  # tokens


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
    format : {"copy", "float8_e4m3fn", "float8_e5m2", "int8", "int4"}
        How the caches store K and V. ``copy``: in their own dtype.
    scale : {"", "tensor", "head", "token-head", "group"}
        What shares a scale; a group is 32 dimensions. Empty for ``copy``.
    operator : {"write", "gather"}
        ``gather``: K and V are read back from the caches.
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
    format: str = COPY
    scale: str = ""
    operator: str = "write"

    @property
    def payload(self) -> int:
        """Bytes that two memcpys in its place copy: half of those that it reads and writes."""
        return sum(self.copied)

    @property
    def copied(self) -> tuple[int, int]:
        """The payload of K and that of V, rounded down."""
        rows = self.tokens * self.heads
        width = as_dtype("dtype", self.dtype).itemsize

        def half(size: int) -> int:
            stored = size * width
            if self.format != COPY:
                scales = {"token-head": 1, "group": size // GROUP}.get(self.scale, 0)
                stored = size * FORMATS[self.format].bits // 8 + 4 * scales
            return rows * (size * width + stored) // 2

        return half(self.head_size), half(self.v_head_size)

    @property
    def plain(self) -> Axes:
        """The same with caches in the dtype of K and V."""
        return dataclasses.replace(self, format=COPY, scale="")

    def problem(self) -> str:
        """Return in one sentence why this cannot be measured; empty if it can."""
        sizes = (self.head_size, self.v_head_size)
        if self.operator == "gather" and self.source != "plain":
            return f"--operator gather needs --source plain, got {self.source}"
        if self.format == "int4" and any(size % 2 for size in sizes):
            return "--format int4 needs even head sizes"
        if self.scale == "group" and any(size % GROUP for size in sizes):
            return f"--scale group needs head sizes that are multiples of {GROUP}"
        if any(half > whole for half, whole in zip(self.copied, self.plain.copied, strict=True)):
            return (
                f"{self.format} with --scale {self.scale} takes more memory than {self.dtype} at "
                f"head size {min(sizes)}"
            )
        return ""

    def describe(self) -> str:
        """Return all axes except the tokens, in words."""
        v = "" if self.v_head_size == self.head_size else f" (V {self.v_head_size})"
        source = "" if self.source == "plain" else ", sliced from fused QKV"
        stored = "" if self.format == COPY else f", format: {self.format}, scale: {self.scale}"
        operator = "" if self.operator == "write" else f", operator: {self.operator}"
        return (
            f"{self.heads} KV heads x {self.head_size}{v}, {self.dtype}, {self.layout}, "
            f"block size {self.block_size}, slots: {self.slots}{source}, inputs: {self.inputs}"
            f"{stored}{operator}"
        )


class Case:
    """The arrays for some `Axes`: two caches, and sets of inputs and outputs.

    Attributes
    ----------
    k_cache, v_cache : array
        Bytes (uint8) if they are in a format of their own.
    scales : dict
        ``k_scale`` and ``v_scale``, if there are any.
    options : dict
        What else an operator has to be told: the layout and the formats.
    sets : list of tuple
        K, V and slots of each write. Before a gather, all of them have been written, the first
        last, so that its slots hold its own rows.
    outputs : list of tuple
        K and V of each gather.
    plain : Case
        The same with caches in the dtype of K and V.

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
        self._allocate(blocks)
        rng = np.random.default_rng(0)
        count = min(max(2, -(-rotate_bytes // max(axes.plain.payload, 1))), MOST_SETS)
        if axes.inputs == "hot":
            count = HOT_SETS
        self.sets = [self._inputs(rng, i) for i in range(count)]
        self.outputs: list[tuple[Any, Any]] = []
        if axes.operator == "gather":
            self.outputs = [(self._empty(k), self._empty(v)) for k, v, _ in self.sets]
            self._write_all()
        self.plain: Case = self
        if axes.format != COPY:
            self.plain = copy.copy(self)
            self.plain.axes = axes.plain
            self.plain.plain = self.plain
            self.plain._allocate(blocks)
            if axes.operator == "gather":
                self.plain._write_all()

    def _allocate(self, blocks: int) -> None:
        axes, xp = self.axes, self.xp
        middle = (axes.heads, axes.block_size)
        if axes.layout == "NHD":
            middle = (axes.block_size, axes.heads)
        sizes = (axes.head_size, axes.v_head_size)
        self.scales: dict[str, Any] = {}
        self.options: dict[str, Any] = {"layout": axes.layout}
        # Not zeros, for which a host allocates no memory until they are written.
        if axes.format == COPY:
            self.k_cache, self.v_cache = (
                xp.ones((blocks, *middle, size), f"u{self.dtype.itemsize}").view(self.dtype)
                for size in sizes
            )
            return
        stored = FORMATS[axes.format]
        self.k_cache, self.v_cache = (
            xp.ones((blocks, *middle, size // stored.packed), np.uint8) for size in sizes
        )
        for letter, size in zip("kv", sizes, strict=True):
            shapes: dict[str, tuple[int, ...]] = {
                "tensor": (1,),
                "head": (axes.heads,),
                "token-head": (blocks, *middle),
                "group": (blocks, *middle, size // GROUP),
            }
            most = np.float32(2 / stored.most)  # K and V are below 2
            self.scales[f"{letter}_scale"] = xp.full(shapes[axes.scale], most, np.float32)
            self.options[f"{letter}_format"] = axes.format

    def _empty(self, rows: Any) -> Any:
        return self.xp.ones(rows.shape, f"u{self.dtype.itemsize}").view(self.dtype)

    def _write_all(self) -> None:
        more = self.scales | self.options
        for k, v, slots in reversed(self.sets):
            pc.paged_caching(self.k_cache, self.v_cache, k, v, slots, **more)

    def shortened(self, counts: Sequence[int]) -> Case:
        """Return the same case with shorter sets, one for each number of tokens in `counts`."""
        other = copy.copy(self)
        taken = (self.sets[i % len(self.sets)] for i in range(len(counts)))
        other.sets = [
            (k[:count], v[:count], slots[:count])
            for count, (k, v, slots) in zip(counts, taken, strict=True)
        ]
        return other

    def _inputs(self, rng: np.random.Generator, index: int) -> tuple[Any, Any, Any]:
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
        return k.view(self.dtype), v.view(self.dtype), xp.asarray(self._slots(rng, index))

    def _random(self, shape: tuple[int, ...], bits: str, rng: np.random.Generator) -> Any:
        # Data without a pattern, since zeros are copied faster than real data. A hash makes it
        # where the arrays are: CuPy's generators need cuRAND, which nothing else here does.
        first = int(rng.integers(2**32))
        index = self.xp.arange(first, first + math.prod(shape), dtype=np.uint64)
        made = (index * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(16)).astype(bits).reshape(shape)
        if self.axes.format == COPY:
            return made
        # Between 1/8 and 2, of either sign: the sign, the fraction and two bits of the exponent.
        fraction: int = ml_dtypes.finfo(self.dtype).nmant  # type: ignore[no-untyped-call]
        unsigned = np.dtype(bits).type
        free = 1 << (8 * self.dtype.itemsize - 1) | (4 << fraction) - 1
        fixed = int(np.ones((), self.dtype).view(bits)) & ~(3 << fraction)
        return made & unsigned(free) | unsigned(fixed)

    def _slots(self, rng: np.random.Generator, index: int) -> Any:
        tokens, block_size = self.axes.tokens, self.axes.block_size
        if self.axes.slots == "sequential":
            first = 0
            if self.axes.operator == "gather":  # whose inputs are in the cache
                first = index * tokens % (self.num_slots - tokens + 1)
            return np.arange(first, first + tokens)
        if self.axes.slots == "random":
            return rng.permutation(self.num_slots)[:tokens]
        blocks = rng.permutation(self.num_slots // block_size)[: -(-tokens // block_size)]
        return (blocks[:, None] * block_size + np.arange(block_size)).ravel()[:tokens]

    def clear(self) -> None:
        """Zero what the operator writes, so that what is found there was written afterwards."""
        arrays = self._in_slots()
        if self.axes.operator == "gather":
            arrays = [array for each in self.outputs for array in each]
        for array in arrays:
            array.view(f"u{array.dtype.itemsize}")[...] = 0

    def memcpys(self, index: int) -> Iterator[tuple[Any, int, Any, int, int]]:
        """Yield what memcpys of `Axes.copied` in the place of set `index` copy.

        Yields
        ------
        target : array
        to : int
            The byte of the target to begin at.
        source : array
        at : int
            The byte of the source to begin at.
        size : int
            In bytes.
        """
        caches = (self.plain.k_cache, self.plain.v_cache)
        gathers = self.axes.operator == "gather"
        outside = (self.outputs if gathers else self.sets)[index]
        for cache, rows, size in zip(caches, outside, self.axes.copied, strict=False):
            # Over the whole cache in turn, as the operator does, not at a place that stays in L2.
            place = index * size % (cache.nbytes - size + 1) // 256 * 256
            yield (rows, 0, cache, place, size) if gathers else (cache, place, rows, 0, size)

    def is_right(self, index: int) -> bool:
        """Return whether the operator did set `index`, bit for bit."""
        return self._is_read(index) if self.axes.operator == "gather" else self.is_written(index)

    def is_written(self, index: int) -> bool:
        """Return whether set `index` is in the caches, bit for bit.

        In a format of their own, they are compared for some tokens with what the cpu backend
        writes.
        """
        k, v, slots = self.sets[index]
        if self.axes.format != COPY:
            some = self._some()
            spec = self._specified(index)
            return _same(self._rows(slots[some]), spec._rows(spec.sets[0][2]))
        block, offset = slots // self.axes.block_size, slots % self.axes.block_size
        bits = f"u{self.dtype.itemsize}"
        for cache, rows in ((self.k_cache, k), (self.v_cache, v)):
            view = cache.view(bits)
            found = view[block, :, offset] if self.axes.layout == "HND" else view[block, offset]
            if not bool((found == rows.view(bits)).all()):
                return False
        return True

    def _is_read(self, index: int) -> bool:
        if self.axes.format == COPY:
            bits = f"u{self.dtype.itemsize}"
            pairs = zip(self.outputs[index], self.sets[index], strict=False)
            return all(bool((out.view(bits) == rows.view(bits)).all()) for out, rows in pairs)
        some = self._some()
        spec = self._specified(index)
        k, v = spec.outputs[0]
        more = spec.scales | spec.options
        pc.paged_gather(spec.k_cache, spec.v_cache, spec.sets[0][2], k, v, **more)
        return _same([self._bits(out[some]) for out in self.outputs[index]], (k, v))

    def _some(self) -> slice:
        """Return which tokens are compared with the cpu backend: all, or every so many."""
        return slice(None, None, -(-self.axes.tokens // MOST_CHECKED))

    def _specified(self, index: int) -> Case:
        """Return what the cpu backend makes of some tokens, in the first slots of its caches."""
        k, v, _ = (self._bits(array[self._some()]) for array in self.sets[index])
        other = copy.copy(self)
        other.xp = np
        other._allocate(-(-len(k) // self.axes.block_size))
        other.sets = [(k.view(self.dtype), v.view(self.dtype), np.arange(len(k)))]
        other.outputs = [(other._empty(k), other._empty(v))]
        other._write_all()
        return other

    def _in_slots(self) -> list[Any]:
        """Return the arrays that a write changes."""
        computed = self.scales.values() if self.axes.scale in COMPUTED else ()
        return [self.k_cache, self.v_cache, *computed]

    def _rows(self, slots: Any) -> list[Any]:
        """Return what is stored in some slots, on the host."""
        block, offset = slots // self.axes.block_size, slots % self.axes.block_size
        return [
            self._bits(
                array[block, :, offset] if self.axes.layout == "HND" else array[block, offset]
            )
            for array in self._in_slots()
        ]

    @staticmethod
    def _bits(array: Any) -> Any:
        """Return an array as unsigned ints on the host."""
        bits = array.view(f"u{array.dtype.itemsize}")
        return bits.get() if hasattr(bits, "get") else bits


def _same(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Return whether arrays have the same bytes."""
    return all(one.tobytes() == other.tobytes() for one, other in zip(found, wanted, strict=True))
