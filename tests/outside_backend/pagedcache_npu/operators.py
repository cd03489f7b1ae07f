# SPDX-License-Identifier: Apache-2.0
"""The operators: what is worked out once from the info, and what each call does.

`run` gets addresses, never arrays. All that the arrays have in common from call to call, such as
shapes, strides and dtypes, has been checked by then and is in the info; strides are in elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pagedcache.backend.protocol import Implementation, Invalid, LaunchConfig
from pagedcache.status import NotSupportedError
from pagedcache.tensors import view

BYTE = np.dtype(np.uint8)


class OnSlots(Implementation):
    """What the write and the gather share."""

    def __init__(self, info: Any, device: Any, report: Any) -> None:
        # FILL IN: compile or look up the kernel here, so that calls compile nothing.
        for side in info.sides:
            if not side.copies(info.dtype):
                rule = f"must have dtype {info.dtype} on NPUs, which do not convert"
                raise NotSupportedError(f"{side.letter}_cache", rule, side.format.name)
        self._info, self._device, self._report = info, device, report

    def launch_config(self, rows: int) -> LaunchConfig:
        return LaunchConfig((rows, 1, 1), (1, 1, 1))

    def _places(self, rows: int, slots_at: int) -> Iterator[tuple[int, int, int]]:
        """Yield each token with its block and its offset in that, and report slots past the end.

        This is the loop that a kernel has instead: a thread, a core or a tile for each token.
        """
        info = self._info
        size = info.slot_dtype.itemsize
        for token, slot in enumerate(view(slots_at, info.slot_dtype, (rows,), (size,)).tolist()):
            if 0 <= slot < info.num_slots:
                yield token, *divmod(slot, info.block_size)
            elif slot >= 0:  # negative ones are padding
                self._report.add(Invalid(1, token, slot))

    def _heads(self, rows: int, slots_at: int) -> Iterator[tuple[Any, int, int]]:
        """Yield K and V of each head of each token: in the cache, and by token, in elements."""
        for token, block, offset in self._places(rows, slots_at):
            for head in range(self._info.num_kv_heads):
                for side in self._info.sides:
                    by_slot = block * side.block_stride + offset * side.slot_stride
                    by_token = token * side.token_stride + head * side.head_stride
                    yield side, by_slot + head * side.cache_head_stride, by_token

    def _copy(self, side: Any, target: int, to: int, source: int, at: int) -> None:
        """Copy the row of one head between two addresses and so many elements."""
        size = self._info.dtype.itemsize
        row, there = view(target + to * size, BYTE, (side.head_size * size,), (1,)), at * size
        row[:] = view(source + there, BYTE, (side.head_size * size,), (1,))


class PagedCaching(OnSlots):
    """The write: one row of K and one of V for each token and head."""

    def run(
        self,
        rows: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slots: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        # FILL IN: queue all of this on the stream, and return before it is done.
        arrays = {"k": (k_cache, k), "v": (v_cache, v)}
        for side, by_slot, by_token in self._heads(rows, slots):
            cache, given = arrays[side.letter]
            self._copy(side, cache, by_slot, given, by_token)


class PagedGather(OnSlots):
    """The way back: the rows of slots, one after the other."""

    def run(
        self,
        rows: int,
        k_cache: int,
        v_cache: int,
        slots: int,
        k_out: int,
        v_out: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        arrays = {"k": (k_cache, k_out), "v": (v_cache, v_out)}
        for side, by_slot, by_token in self._heads(rows, slots):
            cache, out = arrays[side.letter]
            self._copy(side, out, by_token, cache, by_slot)
