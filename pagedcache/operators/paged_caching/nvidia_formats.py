# SPDX-License-Identifier: Apache-2.0
"""The paged caching write into other formats than those of K and V, on a GPU.

The kernel is ``cuda_src/paged_storing.cuh``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pagedcache.cache.nvidia import Rows, RowsImplementation
from pagedcache.operators.paged_caching.info import NAMES

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.operators.paged_caching.info import PagedCachingInfo

FILE = "paged_storing.cuh"


class PagedStoring(RowsImplementation):
    """A compiled write that converts."""

    names: ClassVar[tuple[str, ...]] = NAMES

    def __init__(self, info: PagedCachingInfo, device: CudaDevice, report: DeviceReport) -> None:
        super().__init__(rows_of(info), device, report)
        self._slot_mask = info.slot_dtype.itemsize - 1

    def run(
        self,
        tokens: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slots: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        """Queue the write of this many tokens."""
        self.queue(
            tokens,
            (k_cache, v_cache, k, v, slots, k_scale, v_scale),
            k_cache | v_cache,
            k | v,
            (k_scale | v_scale) & 3 or slots & self._slot_mask,
            stream,
        )


def rows_of(info: PagedCachingInfo) -> Rows:
    """Return what the kernel does with which rows."""
    return Rows(
        kernel="pagedStoring",
        file=FILE,
        parameters="PagedStoringParameters",
        computes=True,
        dtype=info.dtype,
        slot_dtype=info.slot_dtype,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        num_kv_heads=info.num_kv_heads,
        sides=info.sides,
    )
