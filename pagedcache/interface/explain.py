"""Descriptors in words: where a slot is, and what a descriptor was made for."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pagedcache.info import PagedCachingInfo

_MOST_RANGES = 4  # in print


@dataclass(frozen=True, slots=True)
class SlotExplanation:
    """Where one token goes.

    Attributes
    ----------
    slot : int
    kind : {"valid", "padding", "invalid"}
        Padding is negative and skipped; an invalid slot is at or past the end and never written.
    capacity : int
        Number of slots of the cache.
    token : int or None
        Index in the slot mapping, where one was given.
    block, offset : int or None
        ``slot // block_size`` and ``slot % block_size`` of a valid slot.
    k_ranges, v_ranges : tuple of (int, int)
        First byte and the one behind the last, counted from the start of each cache, of the rows of
        the slot: one range for all KV heads where they lie side by side, else one for each. Empty
        if not valid.
    """

    slot: int
    kind: str
    capacity: int
    token: int | None
    block: int | None
    offset: int | None
    k_ranges: tuple[tuple[int, int], ...]
    v_ranges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, info: PagedCachingInfo, slot: int, token: int | None) -> SlotExplanation:
        """Explain a slot of a cache."""
        if not 0 <= slot < info.num_slots:
            kind = "padding" if slot < 0 else "invalid"
            return cls(slot, kind, info.num_slots, token, None, None, (), ())
        block, offset = divmod(slot, info.block_size)
        ranges = [_ranges(info, letter, block, offset) for letter in "kv"]
        return cls(slot, "valid", info.num_slots, token, block, offset, *ranges)

    def rows(self) -> list[tuple[str, str]]:
        """Return what there is to tell, as rows of a table."""
        table = [] if self.token is None else [("token", str(self.token))]
        meaning = {
            "valid": "",
            "padding": ": padding, skipped",
            "invalid": f": invalid, never written; the cache has {self.capacity} slots",
        }
        table.append(("slot", f"{self.slot}{meaning[self.kind]}"))
        if self.kind == "valid":
            table += [("block", str(self.block)), ("offset in block", str(self.offset))]
            table += [("bytes in K cache", _spans(self.k_ranges))]
            table += [("bytes in V cache", _spans(self.v_ranges))]
        return table

    def __str__(self) -> str:
        return as_text(self.rows())

    def _repr_html_(self) -> str:
        return as_html(self.rows())


def _ranges(
    info: PagedCachingInfo, letter: str, block: int, offset: int
) -> tuple[tuple[int, int], ...]:
    size = info.dtype.itemsize
    row = (info.head_size if letter == "k" else info.v_head_size) * size
    head_stride = getattr(info, f"{letter}_cache_head_stride") * size
    start = size * (
        block * getattr(info, f"{letter}_cache_block_stride")
        + offset * getattr(info, f"{letter}_cache_slot_stride")
    )
    if head_stride == row or info.num_kv_heads == 1:
        return ((start, start + row * info.num_kv_heads),)
    starts = (start + head * head_stride for head in range(info.num_kv_heads))
    return tuple((first, first + row) for first in starts)


def _spans(ranges: tuple[tuple[int, int], ...]) -> str:
    spans = [f"{start:,} to {end - 1:,}" for start, end in ranges[:_MOST_RANGES]]
    if len(ranges) > _MOST_RANGES:
        spans.append(f"... ({len(ranges)} KV heads)")
    return "; ".join(spans)


def as_text(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of two columns as plain text."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def as_html(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of two columns as static HTML."""
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"
