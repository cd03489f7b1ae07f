# SPDX-License-Identifier: Apache-2.0
"""What backends, devices, reports and implementations are.

A backend serves one type of device and opens devices. On a device, an implementation of an operator
runs what the operator's info describes. It gets addresses and a number of rows, never arrays.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from pagedcache.tensors import Array


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """The geometry of one launch, as CUDA counts it.

    Attributes
    ----------
    grid, block : tuple of int
        Blocks in the grid and threads in a block, ``(x, y, z)``.
    shared_mem : int
        Dynamic shared memory of a block, in bytes.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_mem: int = 0


@dataclass(frozen=True, slots=True)
class Invalid:
    """What is known about invalid indices, such as slots outside a cache.

    Attributes
    ----------
    count : int
        How many there were.
    row, value : int
        The lowest row that had one, and the earliest value that it had.
    """

    count: int
    row: int
    value: int

    def joined(self, later: Invalid) -> Invalid:
        """Return what both say together."""
        first = self if self.row <= later.row else later
        return Invalid(self.count + later.count, first.row, first.value)


class Report(Protocol):
    """Where an implementation records invalid indices. Threads may share one.

    Attributes
    ----------
    streams : dict
        The handles of the streams that were used since `take`, and what keeps each alive.
    """

    streams: dict[int, Any]

    def take(self) -> Invalid | None:
        """Wait for these streams; return what was recorded, and clear it.

        Raises
        ------
        NotSupportedError
            One of the streams is being captured.
        LaunchError
            Something that was queued on them failed.
        """


class Device(Protocol):
    """An open device of a backend.

    Attributes
    ----------
    kind : str
        The device type, as it is registered: ``"cpu"``, ``"cuda"``.
    name : str
        The device of arrays on it: ``"cpu"``, ``"cuda:0"``.
    """

    kind: str
    name: str

    def describe(self) -> str:
        """Return a one-line description of the device, for people."""

    def limits_table(self) -> list[tuple[str, str]]:
        """Return the limits that the device reports, as the rows of a table."""

    def current_stream(self) -> int:
        """Return the handle of the stream to use if the caller gives none."""

    def side_stream(self) -> int:
        """Return the handle of a stream of our own, which waits for no other."""

    def stream(self, stream: Any) -> int:
        """Return the handle of a stream.

        Raises
        ------
        BadParamError
            It is not a stream, or belongs to another device.
        """

    def mark(self, stream: int) -> Callable[[], bool]:
        """Return a function that tells whether all that is queued on a stream now is done."""

    def capturing(self, stream: int) -> bool:
        """Return whether work that is queued on a stream is captured into a graph, not run."""

    def read(self, address: int, size: int, stream: int) -> Array:
        """Return a copy of `size` bytes, once everything that is queued on `stream` is done.

        Raises
        ------
        LaunchError
            Something that was queued before failed.
        """

    def report(self, *, read: bool = True) -> Report:
        """Return an empty report; with ``read=False`` one that nobody will read."""

    def operator(self, name: str) -> Callable[[Any, Device, Report], Implementation]:
        """Return the device's own implementation of an operator.

        Called only if the operator itself has none for this type of device.

        Raises
        ------
        NotSupportedError
            There is none.
        """


class Backend(Protocol):
    """Serves one type of device. Created without arguments when it is first needed."""

    def check(self) -> None:
        """Raise the `PagedCacheError` that says why no device can be used here, if none can."""

    def open(self, index: int | None) -> Device:
        """Return device `index`; ``None`` is the one that the array library would use now."""


Self = TypeVar("Self", bound="Implementation")


class Implementation:
    """An operator on a device, for one info. Any number of threads may share one.

    Parameters
    ----------
    info : object
        What the operator's create function found out about its tensors.
    device : Device
    report : Report

    Attributes
    ----------
    workspace_size : int
        Bytes of scratch memory on the device that a call needs.
    checks_alignment : bool
        Whether `run` itself raises for addresses that are not multiples of the item size.
    run : callable
        Queues a call with one or more rows on a stream. Takes the number of rows, the address of
        each tensor in the order of the operator's rules, the handle of the stream and, if
        `workspace_size` is not 0, the address of the workspace. The data at the addresses is as the
        info describes it.
    """

    workspace_size = 0
    checks_alignment = False
    run: Callable[..., None]

    def __init__(self, info: Any, device: Any, report: Any) -> None:
        raise NotImplementedError

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return the launch that a call with this many rows makes."""
        raise NotImplementedError

    def prepared(self, rows: int, *addresses: int) -> Callable[[int], None]:
        """Return a function of a stream that runs on these rows of these tensors each time."""
        return functools.partial(self.run, rows, *addresses)

    def reporting_to(self: Self, report: Any) -> Self:
        """Return a copy that uses another report."""
        other = copy.copy(self)
        other._report = report  # type: ignore[attr-defined]
        return other
