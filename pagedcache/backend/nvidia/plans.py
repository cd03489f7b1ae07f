# SPDX-License-Identifier: Apache-2.0
"""Launches that are planned once for each number of rows, and used again."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pagedcache.backend.protocol import Implementation, LaunchConfig

if TYPE_CHECKING:
    import ctypes

    from pagedcache.backend.nvidia.launch import Launch
    from pagedcache.backend.nvidia.report import DeviceReport

MOST_PLANS = 4096

Plan = tuple[list["Launch"], Callable[[], "Launch"], int]
"""Launches that are ready, a function that prepares one more, and blocks per row of the grid."""


class Grid:
    """How a call is distributed to threads.

    Parameters
    ----------
    rows : int
        Rows of blocks in the grid.
    threads : int
        In a block.
    tile : int
        Rows of the tensors that threads take together.
    per_tile : int
        Threads of a tile.
    prepare : callable
        Returns a `Launch` with parameters.
    parameters : ctypes.Structure
        Without what changes from call to call. Has members ``report`` and ``first_token``.
    """

    def __init__(
        self,
        rows: int,
        threads: int,
        tile: int,
        per_tile: int,
        prepare: Callable[[ctypes.Structure], Launch],
        parameters: ctypes.Structure,
    ) -> None:
        self.rows, self.threads = rows, threads
        self._tile, self._per_tile = tile, per_tile
        self._prepare, self._parameters = prepare, parameters

    def prepare(self, report: int, first: int = 0) -> Launch:
        """Return a launch that reports to an address, and numbers rows from `first` on."""
        parameters: Any = type(self._parameters).from_buffer_copy(self._parameters)
        parameters.report, parameters.first_token = report, first
        return self._prepare(parameters)

    def blocks(self, rows: int) -> int:
        """Return how many blocks hold a thread for all that there is in all tiles."""
        return -(-(-(-rows // self._tile) * self._per_tile) // self.threads)


class Kernel(Protocol):
    """A compiled kernel, or several for different numbers of rows."""

    most_rows: int
    """How many one launch can have."""

    def grid(self, rows: int) -> Grid:
        """Return the grid for a call of this many rows."""


Self = TypeVar("Self", bound="Planned")


class Planned(Implementation):
    """An implementation whose launches are planned.

    Subclasses set `_widest`, the kernel that `launch_config` tells of, call `_report_to`, and bring
    `run`, `_kernel_for` and `_pack`.
    """

    checks_alignment = True
    _widest: Kernel

    def _kernel_for(self, addresses: tuple[int, ...]) -> Kernel:
        """Return the kernel with the widest access that these addresses allow."""
        raise NotImplementedError

    @staticmethod
    def _pack(launch: Launch, rows: int, addresses: tuple[int, ...]) -> None:
        """Write the addresses and the number of rows into a launch."""
        raise NotImplementedError

    def _report_to(self, report: DeviceReport) -> None:
        self._report, self._streams = report, report.streams
        self._launches: dict[Grid, list[Launch]] = {}  # that are ready

    def reporting_to(self: Self, report: DeviceReport) -> Self:
        """Return a copy that uses another report."""
        other = copy.copy(self)
        other._report_to(report)
        return other

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return the launch for this many rows if addresses allow the widest access."""
        rows = min(rows, self._widest.most_rows)
        grid = self._widest.grid(rows)
        return LaunchConfig((max(grid.blocks(rows), 1), grid.rows, 1), (grid.threads, 1, 1))

    def _plan(self, kernel: Kernel, rows: int, kept: dict[int, Plan] | None = None) -> Plan:
        """Return a plan, and keep it among others if they are given."""
        grid = kernel.grid(rows)
        launches = self._launches.setdefault(grid, [])
        prepare = functools.partial(grid.prepare, self._report.address)
        plan = launches, prepare, grid.blocks(rows)
        if kept is not None:
            if len(kept) >= MOST_PLANS:
                kept.clear()
            kept[rows] = plan
        return plan

    def prepared(self, rows: int, *addresses: int) -> Callable[[int], None]:
        """Return a function of a stream that queues the same call each time."""
        kernel = self._kernel_for(addresses)
        if rows > kernel.most_rows:
            return functools.partial(self.run, rows, *addresses)
        _, prepare, blocks = self._plan(kernel, rows)
        streams, note = self._streams, self._report.note

        def packed() -> Launch:
            launch = prepare()
            self._pack(launch, rows, addresses)
            return launch

        launches = [packed()]

        def queue(stream: int) -> None:
            # pop and append of a list are atomic, so no two threads get the same launch.
            try:
                launch = launches.pop()
            except IndexError:
                launch = packed()
            launch.run(blocks, stream)
            launches.append(launch)
            if stream not in streams:
                note(stream)

        return queue
