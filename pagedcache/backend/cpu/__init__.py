# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: NumPy. The default without a GPU, and the specification of the others."""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.locks import make_lock
from pagedcache.status import DeviceNotFoundError, NotSupportedError
from pagedcache.tensors import Array, view

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Invalid


class CpuBackend:
    """Serves ``"cpu"``, which is always available."""

    def check(self) -> None:
        """Return at once, since NumPy is a dependency of the package."""

    def open(self, index: int | None) -> CpuDevice:
        """Return the CPU.

        Raises
        ------
        DeviceNotFoundError
            `index` is neither ``None`` nor 0.
        """
        if index not in (None, 0):
            rule = "must be 'cpu' or 'cpu:0', because there is only one"
            raise DeviceNotFoundError("device", rule, f"cpu:{index}")
        return CpuDevice()


class CpuDevice:
    """The host and its memory."""

    kind = "cpu"
    name = "cpu"

    def describe(self) -> str:
        """Return the processor and the version of NumPy."""
        return f"{platform.machine()} host, NumPy {np.__version__}"

    def limits_table(self) -> list[tuple[str, str]]:
        """Return nothing: the CPU sets no limits."""
        return []

    def current_stream(self) -> int:
        """Return 0: the CPU has no streams."""
        return 0

    def side_stream(self) -> int:
        """Return 0: the CPU has no streams."""
        return 0

    def stream(self, stream: object) -> int:
        """Return 0: the CPU has no streams."""
        return 0

    def mark(self, stream: int) -> Callable[[], bool]:
        """Return a function that returns ``True``: nothing is queued on the CPU."""
        return lambda: True

    def capturing(self, stream: int) -> bool:
        """Return ``False``: nothing is captured on the CPU."""
        return False

    def read(self, address: int, size: int, stream: int) -> Array:
        """Return a copy of memory, as bytes."""
        data: Array = view(address, np.dtype(np.uint8), (size,), (1,)).copy()
        return data

    def report(self, *, read: bool = True) -> CpuReport:
        """Return an empty report."""
        return CpuReport()

    def operator(self, name: str) -> Callable[..., Any]:
        """Raise: for the CPU, operators bring their own implementations."""
        raise NotSupportedError(f"operator {name!r}", "is not implemented on the CPU")


class CpuReport:
    """Invalid indices that calls have found."""

    def __init__(self) -> None:
        self.streams: dict[int, Any] = {}
        self._found: Invalid | None = None
        self._lock = make_lock()

    def add(self, found: Invalid) -> None:
        """Add what one call found."""
        with self._lock:
            self._found = found if self._found is None else self._found.joined(found)

    def take(self) -> Invalid | None:
        """Return what was added, and clear it."""
        with self._lock:
            found, self._found = self._found, None
        return found
