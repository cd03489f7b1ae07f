# SPDX-License-Identifier: Apache-2.0
"""Slot mappings in NumPy, the specification of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedcache.backend.protocol import Implementation, Invalid, LaunchConfig
from pagedcache.tensors import Array, view

if TYPE_CHECKING:
    from pagedcache.backend.cpu import CpuDevice, CpuReport
    from pagedcache.dtypes import Dtype
    from pagedcache.operators.slot_mapping.info import PageSlotsInfo, SlotMappingInfo

PADDING = -1


class SlotMapping(Implementation):
    """Computed on the calling thread, and done when `run` returns."""

    def __init__(self, info: SlotMappingInfo, device: CpuDevice, report: CpuReport) -> None:
        self._info, self._report = info, report

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def run(
        self,
        length: int,
        block_tables: int,
        query_start_loc: int,
        positions: int,
        out: int,
        num_requests: int,
        num_positions: int,
        block_size: int,
        cp_size: int,
        cp_rank: int,
        cp_interleave: int,
        stream: int,
    ) -> None:
        """Fill this many entries of `out`."""
        info = self._info
        of_table, of_starts, of_positions, of_slots = info.dtypes
        slots = _vector(out, of_slots, length)
        slots[:] = PADDING
        starts = _vector(query_start_loc, of_starts, num_requests + 1)
        tokens = max(min(length, int(starts[-1]), num_positions), 0)
        if not tokens or not num_requests:
            return
        found = _vector(positions, of_positions, tokens).astype(np.int64)
        [token] = np.nonzero((found >= 0) & (np.arange(tokens) >= starts[0]))
        position = found[token]
        # The last request that starts at or before the token, found as the kernel finds it.
        request, end = np.zeros_like(position), np.full_like(position, num_requests)
        for _ in range(num_requests.bit_length()):
            middle = (request + end) // 2
            before = (starts[middle] <= token) & (end - request > 1)
            request = np.where(before, middle, request)
            end = np.where(before | (end - request <= 1), end, middle)
        entry, offset = np.divmod(position, block_size * cp_size)
        turn = offset // cp_interleave
        here = turn % cp_size == cp_rank
        offset = turn // cp_size * cp_interleave + offset % cp_interleave
        steps = info.table_stride * of_table.itemsize, of_table.itemsize
        tables = view(block_tables, of_table, (num_requests, info.table_length), steps)
        inside = here & (entry < info.table_length)
        block = np.full_like(position, -1)
        block[inside] = tables[request[inside], entry[inside]]
        valid = inside & (block >= 0) & (block >> 32 == 0)  # more would not fit into 64 bits
        valid[valid] = block[valid] * block_size + offset[valid] <= np.iinfo(of_slots).max
        slots[token[valid]] = block[valid] * block_size + offset[valid]
        [invalid] = np.nonzero(here & ~valid)
        if invalid.size:
            first = invalid[0]
            self._report.add(Invalid(invalid.size, int(token[first]), int(position[first])))


class PageSlots(Implementation):
    """Computed on the calling thread, and done when `run` returns."""

    def __init__(self, info: PageSlotsInfo, device: CpuDevice, report: CpuReport) -> None:
        self._info, self._report = info, report

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def run(
        self,
        tokens: int,
        batch_indices: int,
        positions: int,
        kv_indices: int,
        kv_indptr: int,
        out: int,
        num_sequences: int,
        num_indices: int,
        page_size: int,
        num_pages: int,
        stream: int,
    ) -> None:
        """Fill this many entries of `out`."""
        of_batch, of_positions, of_pages, of_starts, of_slots = self._info.dtypes
        slots = _vector(out, of_slots, tokens)
        batch = _vector(batch_indices, of_batch, tokens).astype(np.int64)
        position = _vector(positions, of_positions, tokens).astype(np.int64)
        pages = _vector(kv_indices, of_pages, num_indices)
        starts = _vector(kv_indptr, of_starts, num_sequences + 1)
        slots[:] = np.where(batch < 0, PADDING, num_pages * page_size)
        [token] = np.nonzero((batch >= 0) & (batch < num_sequences) & (position >= 0))
        first = starts[batch[token]].astype(np.int64)
        in_table = position[token] // page_size
        end = np.minimum(starts[batch[token] + 1], num_indices)
        inside = (first >= 0) & (first < end)
        inside[inside] = in_table[inside] < end[inside] - first[inside]
        entry = first[inside] + in_table[inside]
        token, page = token[inside], pages[entry].astype(np.int64)
        known = (page >= 0) & (page < num_pages)
        token, page = token[known], page[known]
        slots[token] = page * page_size + position[token] % page_size


def _vector(address: int, dtype: Dtype, length: int) -> Array:
    """Return contiguous memory as an array; there may be none if it has no elements."""
    if not length:
        return np.empty(0, dtype)
    return view(address, dtype, (length,), (dtype.itemsize,))
