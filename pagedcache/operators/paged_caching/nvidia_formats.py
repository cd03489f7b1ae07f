# SPDX-License-Identifier: Apache-2.0
"""The paged caching write into other formats than those of K and V, on a GPU.

The kernel is ``cuda_src/paged_storing.cuh``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pagedcache.cache.nvidia import Rows, RowsImplementation, Step
from pagedcache.operators.paged_caching.info import NAMES

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.operators.paged_caching.info import PagedCachingInfo

FILE = "paged_storing.cuh"
# Measured on an H200 (notes/formats.md); 206, 412 and 2,268 tokens of
# 8 x 128 there.
STEPS = (
    Step(100, 64, True, 16),
    Step(200, 128, False, 16),
    Step(1100, 128, True, 16),
    Step(math.inf, 128, False, 32),
)
# Where scales are computed, fewer threads share a row in small calls, so there are fewer shuffles.
COMPUTING_STEPS = (
    Step(50, 64, True, 32),
    Step(200, 128, False, 16),
    Step(550, 64, True, 32),
    Step(math.inf, 128, False, 32),
)


class PagedStoring(RowsImplementation):
    """A compiled write that converts."""

    names: ClassVar[tuple[str, ...]] = NAMES

    def __init__(self, info: PagedCachingInfo, device: CudaDevice, report: DeviceReport) -> None:
        super().__init__(rows_of(info), device, report)


def rows_of(info: PagedCachingInfo) -> Rows:
    """Return what the kernel does with which rows."""
    computes = any(side.scale is not None and side.scale.is_written for side in info.sides)
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
        steps=COMPUTING_STEPS if computes else STEPS,
    )
