# SPDX-License-Identifier: Apache-2.0
"""The paged gather on a GPU. The kernel is ``cuda_src/paged_gather.cuh``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from pagedcache.cache.nvidia import Rows, RowsImplementation, Step
from pagedcache.operators.paged_gather.info import NAMES

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.operators.paged_gather.info import PagedGatherInfo

FILE = "paged_gather.cuh"
# Measured on an H200 (notes/formats.md): 206 tokens of 8 x 128.
STEPS = (Step(100, 64, True, 16), Step(math.inf, 128, False, 16))


class PagedGather(RowsImplementation):
    """A compiled gather."""

    names: ClassVar[tuple[str, ...]] = NAMES

    def __init__(self, info: PagedGatherInfo, device: CudaDevice, report: DeviceReport) -> None:
        super().__init__(
            Rows(
                kernel="pagedGather",
                file=FILE,
                parameters="PagedGatherParameters",
                computes=False,
                dtype=info.dtype,
                slot_dtype=info.slot_dtype,
                num_blocks=info.num_blocks,
                block_size=info.block_size,
                num_kv_heads=info.num_kv_heads,
                sides=info.sides,
                steps=STEPS,
            ),
            device,
            report,
        )
