# SPDX-License-Identifier: Apache-2.0
"""The paged gather in NumPy: the specification of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedcache.backend.protocol import Implementation, LaunchConfig
from pagedcache.cache.cpu import read_slots, rows_of

if TYPE_CHECKING:
    from pagedcache.backend.cpu import CpuDevice, CpuReport
    from pagedcache.operators.paged_gather.info import PagedGatherInfo


class PagedGather(Implementation):
    """Reads on the calling thread, and is done when `run` returns."""

    def __init__(self, info: PagedGatherInfo, device: CpuDevice, report: CpuReport) -> None:
        self._info, self._report = info, report
        sizes = info.num_blocks, info.block_size, info.num_kv_heads
        self._sides = [rows_of(side, info.dtype, *sizes) for side in info.sides]

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def run(
        self,
        tokens: int,
        k_cache: int,
        v_cache: int,
        slots_at: int,
        k_out: int,
        v_out: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        """Read this many tokens."""
        info = self._info
        slots, valid, invalid = read_slots(slots_at, info.slot_dtype, tokens, info.num_slots)
        arrays = ((k_cache, k_out, k_scale), (v_cache, v_out, v_scale))
        for side, addresses in zip(self._sides, arrays, strict=False):
            side.read(*addresses, slots, valid)
        if invalid is not None:
            self._report.add(invalid)
