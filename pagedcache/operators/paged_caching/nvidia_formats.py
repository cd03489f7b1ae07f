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
