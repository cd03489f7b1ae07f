# SPDX-License-Identifier: Apache-2.0
"""Slot mappings on a GPU. The kernels are ``cuda_src/slot_mapping.cuh``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.parameters import structure
from pagedcache.backend.nvidia.plans import Grid, Plan, Planned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.launch import Launch
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.dtypes import Dtype
    from pagedcache.operators.slot_mapping.info import PageSlotsInfo, SlotMappingInfo

FILE = "slot_mapping.cuh"
THREADS = 256
CTYPES = {"int32": "int", "int64": "long long"}


def instance(kernel: str, dtypes: Sequence[Dtype]) -> str:
    """Return the C++ name of a kernel for tensors of these dtypes."""
    return f"pagedcache::{kernel}<{', '.join(CTYPES[str(dtype)] for dtype in dtypes)}>"


class _Kernel:
    """A kernel with a thread for each entry of the output."""

    def __init__(
        self, kernel: str, parameters: str, dtypes: Sequence[Dtype], device: CudaDevice, **more: int
    ) -> None:
        [function] = device.compile(FILE, (instance(kernel, dtypes),))
        prepare = functools.partial(device.prepare, function, 1, THREADS)
        filled = structure(source.read(FILE), parameters)(**more)
        self._grid = Grid(1, THREADS, 1, 1, prepare, filled)
        self.most_rows = device.limits.max_grid_x * THREADS

    def grid(self, rows: int) -> Grid:
        """Return the grid, which is the same for any number of rows."""
        return self._grid


class _Mapping(Planned):
    """A kernel whose arguments are tensors and numbers."""

    checks_alignment = False
    _widest: _Kernel

    def _report_to(self, report: DeviceReport) -> None:
        super()._report_to(report)
        self._plans: dict[int, Plan] = {}  # by number of rows

    def _kernel_for(self, addresses: tuple[int, ...]) -> _Kernel:
        return self._widest

    @staticmethod
    def _pack(launch: Launch, rows: int, addresses: tuple[int, ...]) -> None:
        launch.pack(*addresses, rows)

    def run(self, rows: int, *values: int) -> None:
        """Queue a launch for this many entries. Takes addresses, numbers, and a stream."""
        *arguments, stream = values
        plan = self._plans.get(rows)
        if plan is None:
            plan = self._plan(self._widest, rows, self._plans)
        launches, prepare, blocks = plan
        # pop and append of a list are atomic, so no two threads get the same launch.
        try:
            launch = launches.pop()
        except IndexError:
            launch = prepare()
        launch.pack(*arguments, rows)
        launch.run(blocks, stream)
        launches.append(launch)
        if stream not in self._streams:
            self._report.note(stream)


class SlotMapping(_Mapping):
    """A compiled slot mapping."""

    def __init__(self, info: SlotMappingInfo, device: CudaDevice, report: DeviceReport) -> None:
        self._widest = _Kernel(
            "slotMapping",
            "SlotMappingParameters",
            info.dtypes,
            device,
            table_length=info.table_length,
            table_stride=info.table_stride,
        )
        self._report_to(report)


class PageSlots(_Mapping):
    """A compiled slot mapping for tables that follow one another."""

    def __init__(self, info: PageSlotsInfo, device: CudaDevice, report: DeviceReport) -> None:
        inputs = info.dtypes[:-1]
        self._widest = _Kernel("pageSlots", "PageSlotsParameters", inputs, device)
        self._report_to(report)
