# SPDX-License-Identifier: Apache-2.0
"""The paged caching write in NumPy: short enough to be the specification of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.backend.protocol import Implementation, Invalid, LaunchConfig
from pagedcache.status import NotSupportedError
from pagedcache.tensors import Array, view

if TYPE_CHECKING:
    from pagedcache.backend.cpu import CpuDevice, CpuReport
    from pagedcache.operators.paged_caching.info import PagedCachingInfo

_MOST_ROW = 2**31 - 1  # bytes of a NumPy element


class PagedCaching(Implementation):
    """Writes on the calling thread, and is done when `run` returns."""

    def __init__(self, info: PagedCachingInfo, device: CpuDevice, report: CpuReport) -> None:
        self._info = info
        self._report = report
        self._k = _Plane(info, "k", info.head_size)
        self._v = _Plane(info, "v", info.v_head_size)

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def run(
        self, tokens: int, k_cache: int, v_cache: int, k: int, v: int, slots_at: int, stream: int
    ) -> None:
        """Write this many tokens."""
        info = self._info
        slot_size = info.slot_dtype.itemsize
        # A copy, since another thread may change them between two reads.
        slots = view(slots_at, info.slot_dtype, (tokens,), (slot_size,)).astype(np.int64)
        outside = slots >= info.num_slots
        valid = (slots >= 0) & ~outside
        blocks = _whole_blocks(slots, valid, info.block_size)
        self._k.write(k_cache, k, slots, valid, blocks)
        self._v.write(v_cache, v, slots, valid, blocks)
        if outside.any():
            token = int(outside.argmax())
            self._report.add(Invalid(int(outside.sum()), token, int(slots[token])))


class _Plane:
    """K or V: how its rows are laid out in the source and the cache. Strides are in bytes."""

    def __init__(self, info: PagedCachingInfo, letter: str, head_size: int) -> None:
        def stride(name: str) -> int:
            step: int = getattr(info, f"{letter}_{name}_stride")
            return step * info.dtype.itemsize

        # A row of bytes is one NumPy element, so it is copied as bits, and with one memcpy.
        row = head_size * info.dtype.itemsize
        if row > _MOST_ROW:
            rule = f"must have at most {_MOST_ROW} bytes of K or V in a head on the CPU"
            raise NotSupportedError("k_cache", rule, row)
        heads, block_size = info.num_kv_heads, info.block_size
        source: tuple[int, ...] = (stride("token"), stride("head"))
        cache: tuple[int, ...] = (stride("cache_block"), stride("cache_slot"), stride("cache_head"))
        self._heads: tuple[int, ...] = (heads,)
        side_by_side = source[1] == cache[2] == row
        if heads == 1 or (side_by_side and row * heads <= _MOST_ROW):
            # The heads of a token are contiguous on both sides: one row holds them all.
            row, self._heads, source, cache = row * heads, (), source[:1], cache[:2]
        self._row = np.dtype((np.void, row))
        self._source, self._cache = source, cache
        self._shape = (info.num_blocks, block_size, *self._heads)
        # Where the rows of a block are contiguous too, one element holds a whole block.
        contiguous = not self._heads and source[0] == row and cache[1] in (row, 0)
        whole = contiguous and block_size * row <= _MOST_ROW
        self._block = np.dtype((np.void, block_size * row)) if whole else None

    def write(self, cache: int, source: int, slots: Array, valid: Array, blocks: Array) -> None:
        """Write the rows of valid tokens, given those at which whole blocks begin."""
        block_size = self._shape[1]
        if self._block is not None and blocks.size:
            self._write_blocks(cache, source, slots, blocks)
            valid = valid.copy()
            valid[(blocks[:, None] + np.arange(block_size)).ravel()] = False
        tokens: Any = slice(None) if valid.all() else valid
        block, offset = np.divmod(slots[tokens], block_size)
        rows = view(source, self._row, (len(slots), *self._heads), self._source)
        view(cache, self._row, self._shape, self._cache)[block, offset] = rows[tokens]

    def _write_blocks(self, cache: int, source: int, slots: Array, blocks: Array) -> None:
        assert self._block is not None
        block_size = self._shape[1]
        starts = (len(slots) - block_size + 1,)
        rows = view(source, self._block, starts, self._source)  # that begin at each token
        cache_blocks = view(cache, self._block, self._shape[:1], self._cache[:1])
        # One after the other in the source, as in a prompt: a slice, which NumPy does not copy.
        for first, last in _evenly_spaced(blocks, block_size):
            taken = blocks[first:last]
            each = slice(int(taken[0]), int(taken[-1]) + 1, block_size)
            cache_blocks[slots[taken] // block_size] = rows[each]


def _whole_blocks(slots: Array, valid: Array, block_size: int) -> Array:
    """Return the tokens at which a run of tokens begins that fills a whole block in order."""
    if len(slots) < block_size or block_size == 1:
        return np.empty(0, np.intp)
    in_order = np.cumsum(np.concatenate(([0], np.diff(slots) == 1)))
    starts = in_order[block_size - 1 :] - in_order[: len(slots) - block_size + 1]
    first = slice(len(slots) - block_size + 1)
    whole = valid[first] & (slots[first] % block_size == 0) & (starts == block_size - 1)
    return np.flatnonzero(whole)


def _evenly_spaced(numbers: Array, step: int) -> list[tuple[int, int]]:
    """Return where runs of numbers that are `step` apart begin and end."""
    breaks = np.flatnonzero(np.diff(numbers) != step) + 1
    return list(zip([0, *breaks.tolist()], [*breaks.tolist(), len(numbers)], strict=True))
