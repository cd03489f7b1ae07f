# SPDX-License-Identifier: Apache-2.0
"""Where a slot is, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedcache.display import as_html, as_text

if TYPE_CHECKING:
    from pagedcache.operators.paged_caching.info import PagedCachingInfo

_MOST_RANGES = 4  # in print


@dataclass(frozen=True, slots=True)
class SlotExplanation:
    """Where one token goes.

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
        unless the slot is valid.
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
