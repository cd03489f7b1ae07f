# SPDX-License-Identifier: Apache-2.0
"""The paged caching write in NumPy, the specification of the operator with `cache.cpu`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedcache.backend.protocol import Implementation, LaunchConfig
from pagedcache.cache.cpu import read_slots, rows_of, whole_blocks

if TYPE_CHECKING:
    from pagedcache.backend.cpu import CpuDevice, CpuReport
    from pagedcache.operators.paged_caching.info import PagedCachingInfo


class PagedCaching(Implementation):
    """Writes on the calling thread, and is done when `run` returns."""

    def __init__(self, info: PagedCachingInfo, device: CpuDevice, report: CpuReport) -> None:
        self._info, self._report = info, report
        sizes = info.num_blocks, info.block_size, info.num_kv_heads
        self._k, self._v = (rows_of(side, info.dtype, *sizes) for side in info.sides)

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def run(
        self,
        tokens: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slots_at: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        """Write this many tokens."""
        info = self._info
        slots, valid, invalid = read_slots(slots_at, info.slot_dtype, tokens, info.num_slots)
        blocks = whole_blocks(slots, valid, info.block_size)
        self._k.write(k_cache, k, k_scale, slots, valid, blocks)
        self._v.write(v_cache, v, v_scale, slots, valid, blocks)
        if invalid is not None:
            self._report.add(invalid)
