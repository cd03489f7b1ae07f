# SPDX-License-Identifier: Apache-2.0
"""Calls that inspect their data or wait for the result, for `debug` and ``on_invalid="raise"``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.backend.protocol import Implementation
from pagedcache.operators.arguments import byte_range
from pagedcache.status import NotSupportedError, SourceOverlapError
from pagedcache.tensors import Array, Expected, overlap

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Device, Invalid, LaunchConfig, Report

Inspect = Callable[[Mapping[str, Array]], None]
"""Raises if it finds a mistake in the data of a call, given by name as ints of the item size."""


class Careful(Implementation):
    """An implementation with its calls checked before and after.

    Parameters
    ----------
    implementation : Implementation
    device : Device
    expected : sequence of Expected or None
    inspect : callable or None
        Called before each run with all data on the host, once it is known that what is read shares
        no memory with what is written. ``None``: nothing is looked at before.
    refuse : callable or None
        Returns the error to raise for invalid indices. Then each run waits. ``None``: none is
        raised.
    numbers : int
        How many numbers follow the addresses of a call.
    """

    def __init__(
        self,
        implementation: Implementation,
        device: Device,
        expected: Sequence[Expected | None],
        inspect: Inspect | None,
        refuse: Callable[[Invalid], Exception] | None,
        numbers: int = 0,
    ) -> None:
        self._implementation, self._device = implementation, device
        self._expected, self._inspect, self._refuse = tuple(expected), inspect, refuse
        self._stream = len(self._expected) + numbers  # its place in a call
        self.workspace_size = implementation.workspace_size
        self.checks_alignment = implementation.checks_alignment
        # Each with a report of its own and taken by one call at a time, so that a call is told of
        # its own indices only.
        self._idle: list[tuple[Implementation, Report]] = []

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return the launch that a call with this many rows makes."""
        return self._implementation.launch_config(rows)

    def run(self, rows: int, *addresses_and_stream: Any) -> None:
        """Inspect, run, and wait, as far as was asked for."""
        stream: int = addresses_and_stream[self._stream]
        if self._device.capturing(stream):
            option = "debug" if self._inspect else "on_invalid='raise'"
            rule = "waits for the stream, which is being captured; use check() after a replay"
            raise NotSupportedError(option, rule)
        if self._inspect:
            self._inspect_data(rows, addresses_and_stream, stream)
        if self._refuse is None:
            self._implementation.run(rows, *addresses_and_stream)
            return
        try:
            implementation, report = self._idle.pop()
        except IndexError:
            report = self._device.report()
            implementation = self._implementation.reporting_to(report)
        implementation.run(rows, *addresses_and_stream)
        found = report.take()
        self._idle.append((implementation, report))
        if found:
            raise self._refuse(found)

    def _inspect_data(self, rows: int, addresses: Sequence[int], stream: int) -> None:
        views = {
            one.name: one.with_rows(rows).at(address)
            for one, address in zip(self._expected, addresses, strict=False)
            if one is not None
        }
        written = [one.name for one in self._expected if one is not None and one.written]
        read = [name for name in views if name not in written]
        in_place = {one.name: one.in_place for one in self._expected if one is not None}
        for name in read:
            for other in written:
                if in_place.get(other) == name and views[name].__array_interface__ == (
                    views[other].__array_interface__
                ):
                    continue
                if overlap(views[name], views[other]):
                    rule = f"must not share memory with {other}, which is written"
                    got = f"{byte_range(views[name])} and {byte_range(views[other])}"
                    raise SourceOverlapError(name, rule, got)
        assert self._inspect is not None
        self._inspect(_Fetched({name: views[name] for name in read}, self._device, stream))


class _Fetched(Mapping[str, Array]):
    """Data on the host, copied when it is asked for: most calls do not inspect a whole cache."""

    def __init__(self, views: Mapping[str, Array], device: Device, stream: int) -> None:
        self._views, self._device, self._stream = views, device, stream

    def __getitem__(self, name: str) -> Array:
        there = self._views[name]
        start, end = np.lib.array_utils.byte_bounds(there)
        data = self._device.read(start, end - start, self._stream)
        fetched: Array = np.ndarray(there.shape, there.dtype, data, strides=there.strides)
        return fetched

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)
