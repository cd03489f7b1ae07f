# SPDX-License-Identifier: Apache-2.0
"""Where a slot is, and what is stored there, in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pagedcache.cache.formats import FORMATS
from pagedcache.display import as_html, as_text

if TYPE_CHECKING:
    from pagedcache.cache.sides import Side
    from pagedcache.tensors import Array, Tensor

_MOST_RANGES = 4  # in print


class CacheInfo(Protocol):
    """What is known about a paged cache."""

    @property
    def num_slots(self) -> int:
        """Its capacity in tokens."""

    @property
    def block_size(self) -> int:
        """Slots in a block."""

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""

    @property
    def sides(self) -> tuple[Side, ...]:
        """K, and V if there is V."""


@dataclass(frozen=True, slots=True)
class StoredElement:
    """One element of K or V in a cache.

    Attributes
    ----------
    letter : {"k", "v"}
    head, dim : int
    format : str
    code : int
        Its bits.
    scale : float or None
    value : float
        What it is read back as: the float32 of the code, times the scale.
    """

    letter: str
    head: int
    dim: int
    format: str
    code: int
    scale: float | None
    value: float

    def __str__(self) -> str:
        bits = FORMATS[self.format].bits
        scaled = "" if self.scale is None else f", scale {self.scale:.8g}"
        return f"{self.format} code 0x{self.code:0{bits // 4}x}{scaled}, value {self.value:.8g}"


@dataclass(frozen=True, slots=True)
class SlotExplanation:
    """Where one token goes, and what is there.

    Attributes
    ----------
    slot : int
    kind : {"valid", "padding", "invalid"}
        A negative slot is padding and is skipped; an invalid slot is outside the cache and is never
        written.
    capacity : int
        Number of slots in the cache.
    token : int or None
        Index in the slot mapping, if one was given.
    block, offset : int or None
        ``slot // block_size`` and ``slot % block_size`` of a valid slot.
    k_ranges, v_ranges : tuple of (int, int)
        The first byte and the one after the last, counted from the start of each cache, of the rows
        of the slot: one range for all KV heads if they are contiguous, else one for each. Empty
        unless the slot is valid; `v_ranges` also if there is no V.
    elements : tuple of StoredElement
        Of K and V, if their caches were given.
    """

    slot: int
    kind: str
    capacity: int
    token: int | None
    block: int | None
    offset: int | None
    k_ranges: tuple[tuple[int, int], ...]
    v_ranges: tuple[tuple[int, int], ...]
    elements: tuple[StoredElement, ...] = ()

    @classmethod
    def of(
        cls,
        info: CacheInfo,
        slot: int,
        token: int | None,
        read_elements: Callable[[int, int], Sequence[StoredElement]] = lambda *_: (),
    ) -> SlotExplanation:
        """Explain a slot of a cache. `read_elements` takes its block and offset."""
        if not 0 <= slot < info.num_slots:
            kind = "padding" if slot < 0 else "invalid"
            return cls(slot, kind, info.num_slots, token, None, None, (), ())
        block, offset = divmod(slot, info.block_size)
        ranges = [_ranges(side, info.num_kv_heads, block, offset) for side in info.sides]
        elements = tuple(read_elements(block, offset))
        k_ranges, v_ranges = (*ranges, ())[:2]
        return cls(
            slot, "valid", info.num_slots, token, block, offset, k_ranges, v_ranges, elements
        )

    def rows(self) -> list[tuple[str, str]]:
        """Return the explanation as the rows of a table."""
        table = [] if self.token is None else [("token", str(self.token))]
        meaning = {
            "valid": "",
            "padding": ": padding, which is skipped",
            "invalid": f": invalid, since the cache has {self.capacity} slots; never written",
        }
        table.append(("slot", f"{self.slot}{meaning[self.kind]}"))
        if self.kind == "valid":
            table += [("block", str(self.block)), ("offset in block", str(self.offset))]
            table += [("bytes in K cache", _spans(self.k_ranges))]
            table += [("bytes in V cache", _spans(self.v_ranges))] if self.v_ranges else []
            for each in self.elements:
                table.append(
                    (f"{each.letter.upper()}, head {each.head}, dim {each.dim}", str(each))
                )
        return table

    def __str__(self) -> str:
        return as_text(self.rows())

    def _repr_html_(self) -> str:
        return as_html(self.rows())


def read_element(
    side: Side,
    layout_axes: Sequence[str],
    cache: Tensor,
    scale: Tensor | None,
    place: tuple[int, int, int, int],
    read: Callable[[int, int], Array],
) -> StoredElement:
    """Return an element of a cache.

    Parameters
    ----------
    side : Side
    layout_axes : sequence of str
        Of the cache.
    cache, scale : Tensor
    place : tuple of int
        Block, offset, head and dimension.
    read : callable
        Returns bytes at an address.
    """
    block, offset, head, dim = place
    by_axis = {"num_blocks": block, "block_size": offset, "num_kv_heads": head}
    stored = side.format
    steps = zip(layout_axes[:3], cache.strides, strict=False)
    at = cache.address + sum(by_axis[axis] * step for axis, step in steps)
    width = stored.dtype.itemsize
    codes = read(at + dim // stored.packed * width, width).view(stored.code_dtype)
    part = dim % stored.packed
    value = float(stored.decode(codes)[part])
    code = int(codes[0]) >> part * stored.bits & (1 << stored.bits) - 1
    found = None
    if scale is not None and side.scale is not None:
        of = side.scale
        index = (
            block * of.block_stride + offset * of.slot_stride + head * of.head_stride
            + dim // of.group * of.group_stride
        )  # fmt: skip
        factor = read(scale.address + 4 * index, 4).view(np.float32)[0]
        found = float(factor)
        with np.errstate(all="ignore"):
            value = float(np.float32(value) * factor)
    return StoredElement(side.letter, head, dim, stored.name, code, found, value)


def _ranges(side: Side, num_kv_heads: int, block: int, offset: int) -> tuple[tuple[int, int], ...]:
    size = side.format.dtype.itemsize
    row = side.head_size // side.format.packed * size
    head_stride = side.cache_head_stride * size
    start = size * (block * side.block_stride + offset * side.slot_stride)
    if head_stride == row or num_kv_heads == 1:
        return ((start, start + row * num_kv_heads),)
    starts = (start + head * head_stride for head in range(num_kv_heads))
    return tuple((first, first + row) for first in starts)


def _spans(ranges: tuple[tuple[int, int], ...]) -> str:
    spans = [f"{start:,} to {end - 1:,}" for start, end in ranges[:_MOST_RANGES]]
    if len(ranges) > _MOST_RANGES:
        spans.append(f"... ({len(ranges)} KV heads)")
    return "; ".join(spans)
