# SPDX-License-Identifier: Apache-2.0
"""The paged gather on a GPU. The kernel is ``cuda_src/paged_gather.cuh``."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pagedcache.cache.nvidia import Rows, RowsImplementation
from pagedcache.operators.paged_gather.info import NAMES

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.operators.paged_gather.info import PagedGatherInfo

FILE = "paged_gather.cuh"


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
            ),
            device,
            report,
        )
        self._slot_mask = info.slot_dtype.itemsize - 1

    def run(
        self,
        tokens: int,
        k_cache: int,
        v_cache: int,
        slots: int,
        k_out: int,
        v_out: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        """Queue the gather of this many tokens."""
        self.queue(
            tokens,
            (k_cache, v_cache, slots, k_out, v_out, k_scale, v_scale),
            k_cache | v_cache,
            k_out | v_out,
            (k_scale | v_scale) & 3 or slots & self._slot_mask,
            stream,
        )
