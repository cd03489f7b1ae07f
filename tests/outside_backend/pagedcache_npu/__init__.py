# SPDX-License-Identifier: Apache-2.0
"""A backend of pagedcache from outside: a template for a real one.

The device is made up. It has memory of its own, which is NumPy's underneath, and runs at once what
is queued. FILL IN marks what the runtime of a real device does instead; docs/howto/new_backend.md
walks through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from pagedcache.arrays.find import libraries
from pagedcache.backend.protocol import Implementation, Invalid
from pagedcache.status import DeviceNotFoundError, NotSupportedError
from pagedcache.tensors import view
from pagedcache_npu.arrays import Array, NpuLibrary
from pagedcache_npu.operators import PagedCaching, PagedGather

__all__ = ["Array", "NpuBackend", "NpuDevice"]

COUNT = 1  # FILL IN: ask the driver
libraries[Array] = NpuLibrary()  # so that calls take arrays of this type


class NpuBackend:
    """Serves ``"npu"``. Made once, when such a device is first asked for."""

    def check(self) -> None:
        """Raise what says why no device can be used here, if none can.

        FILL IN: `MissingLibraryError` or `DeviceNotInitializedError` with one sentence that says
        what to install. `pagedcache.backends()` shows it to users.
        """

    def open(self, index: int | None) -> NpuDevice:
        """Return device `index`; ``None`` is the one that the array library would use now."""
        if index is not None and index >= COUNT:
            rule = f"must be one of the {COUNT} NPUs here"
            raise DeviceNotFoundError("device", rule, f"npu:{index}")
        return NpuDevice(index or 0)


class NpuDevice:
    """One open device. Implementations of operators are made on it."""

    kind = "npu"

    def __init__(self, index: int) -> None:
        self.name = f"npu:{index}"

    def describe(self) -> str:
        return "a made-up NPU"  # FILL IN: its name, for people

    def limits_table(self) -> list[tuple[str, str]]:
        return [("memory", "that of the host")]

    def current_stream(self) -> int:
        return 0  # FILL IN: the handle of the stream that the array library uses now

    def side_stream(self) -> int:
        return 0  # FILL IN: the handle of a stream that only this package uses

    def stream(self, stream: Any) -> int:
        return int(stream or 0)  # FILL IN: the handle of the stream that a caller gives

    def mark(self, stream: int) -> Callable[[], bool]:
        return lambda: True  # FILL IN: record an event on the stream; return whether it is done

    def capturing(self, stream: int) -> bool:
        return False  # FILL IN, if work can be captured into graphs

    def read(self, address: int, size: int, stream: int) -> Any:
        # FILL IN: wait for the stream, and copy to the host.
        return view(address, np.dtype(np.uint8), (size,), (1,)).copy()

    def report(self, *, read: bool = True) -> NpuReport:
        return NpuReport()

    def operator(self, name: str) -> Callable[[Any, Any, Any], Implementation]:
        """Return the implementation of an operator, by its name."""
        found = {"paged_caching": PagedCaching, "paged_gather": PagedGather}.get(name)
        if found is None:
            raise NotSupportedError(f"operator {name!r}", "is not implemented on NPUs")
        return found


class NpuReport:
    """What implementations tell of invalid slots.

    FILL IN: kernels run later, so they add to words in the memory of the device (a count, the
    lowest row, its value), and `take` waits for `streams` before it reads and clears them.
    """

    def __init__(self) -> None:
        self.streams: dict[int, Any] = {}
        self._found: Invalid | None = None
        self._lock = threading.Lock()  # several threads may use one descriptor

    def add(self, found: Invalid) -> None:
        with self._lock:
            self._found = found if self._found is None else self._found.joined(found)

    def take(self) -> Invalid | None:
        with self._lock:
            found, self._found = self._found, None
        return found
