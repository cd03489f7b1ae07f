"""The paged caching write in NumPy: short enough to be the specification of the operator."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.backend.protocol import LaunchConfig
from pagedcache.info import InvalidSlots
from pagedcache.status import NotSupportedError
from pagedcache.tensors import Array, view

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Writer
    from pagedcache.info import PagedCachingInfo

_MOST_ROW = 2**31 - 1  # bytes of a NumPy element


class PagedCaching:
    """Writes on the calling thread; done when a writer returns. Needs no workspace."""

    workspace_size = 0

    def __init__(self, info: PagedCachingInfo) -> None:
        self._info = info
        self._invalid: InvalidSlots | None = None
        self._reporting = threading.Lock()
        size = info.dtype.itemsize
        # A row of bytes is one NumPy element, so it is copied as bits, and with one memcpy.
        self._planes = [
            _Plane(
                info,
                info.head_size * size,
                (info.k_token_stride * size, info.k_head_stride * size),
                (
                    info.k_cache_block_stride * size,
                    info.k_cache_slot_stride * size,
                    info.k_cache_head_stride * size,
                ),
            ),
            _Plane(
                info,
                info.v_head_size * size,
                (info.v_token_stride * size, info.v_head_stride * size),
                (
                    info.v_cache_block_stride * size,
                    info.v_cache_slot_stride * size,
                    info.v_cache_head_stride * size,
                ),
            ),
        ]

    def launch_config(self, num_tokens: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def writer(self, num_tokens: int) -> Writer:
        """Return a function that writes `num_tokens` rows of K and V."""
        return functools.partial(self._write, num_tokens)

    def _write(
        self,
        num_tokens: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slot_mapping: int,
        workspace: int,
        stream: object,
    ) -> None:
        info = self._info
        slot_size = info.slot_dtype.itemsize
        # A copy, since another thread may change them between two looks.
        slots = view(slot_mapping, info.slot_dtype, (num_tokens,), (slot_size,)).astype(np.int64)
        past_end = slots >= info.num_slots
        written = (slots >= 0) & ~past_end
        tokens: Any = slice(None) if written.all() else written
        block, offset = np.divmod(slots[tokens], info.block_size)
        for plane, cache, rows in zip(self._planes, (k_cache, v_cache), (k, v), strict=True):
            plane.cache(cache)[block, offset] = plane.rows(rows, num_tokens)[tokens]
        if past_end.any():
            self._report(past_end, slots)

    def _report(self, past_end: Array, slots: Array) -> None:
        token = int(past_end.argmax())
        found = InvalidSlots(int(past_end.sum()), token, int(slots[token]))
        with self._reporting:
            self._invalid = found if self._invalid is None else self._invalid.joined(found)

    def invalid_slots(self, stream: object) -> InvalidSlots | None:
        """Return what is known of invalid slots since this was last called, and forget it."""
        with self._reporting:
            found, self._invalid = self._invalid, None
        return found


class _Plane:
    """K or V: how its rows lie in the source and in the cache. Strides are in bytes."""

    def __init__(
        self,
        info: PagedCachingInfo,
        row_bytes: int,
        row_strides: tuple[int, ...],
        cache_strides: tuple[int, ...],
    ) -> None:
        self._heads: tuple[int, ...] = (info.num_kv_heads,)
        if row_bytes > _MOST_ROW:
            rule = f"must have at most {_MOST_ROW} bytes of K or V in a head on the CPU"
            raise NotSupportedError("k_cache", rule, row_bytes)
        side_by_side = row_strides[-1] == cache_strides[-1] == row_bytes
        if (side_by_side and row_bytes * info.num_kv_heads <= _MOST_ROW) or info.num_kv_heads == 1:
            # The heads of a token lie side by side on both sides: one row holds them all.
            row_bytes *= info.num_kv_heads
            self._heads, row_strides, cache_strides = (), row_strides[:1], cache_strides[:2]
        self._row = np.dtype((np.void, row_bytes))
        self._row_strides, self._cache_strides = row_strides, cache_strides
        self._blocks = (info.num_blocks, info.block_size)

    def rows(self, address: int, num_tokens: int) -> Array:
        """Return the source at `address` as ``[tokens, heads]`` of rows."""
        return view(address, self._row, (num_tokens, *self._heads), self._row_strides)

    def cache(self, address: int) -> Array:
        """Return the cache at `address` as ``[blocks, slots, heads]`` of rows."""
        return view(address, self._row, (*self._blocks, *self._heads), self._cache_strides)
