"""The CPU backend: NumPy. The default without a GPU, and the specification for the others."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np

from pagedcache.backend.protocol import load_operator
from pagedcache.status import DeviceNotFoundError
from pagedcache.tensors import Array, view

OPERATORS = {"paged_caching": "paged_caching:PagedCaching"}


class CpuBackend:
    """Serves ``"cpu"``, which is always there."""

    def check(self) -> None:
        """Return: NumPy is a dependency of the package."""

    def open(self, index: int | None) -> CpuDevice:
        """Return the one CPU device.

        Raises
        ------
        DeviceNotFoundError
            `index` is neither ``None`` nor 0.
        """
        if index not in (None, 0):
            raise DeviceNotFoundError("device", "must be 'cpu', there is only one", f"cpu:{index}")
        return CpuDevice()


class CpuDevice:
    """The host and its memory."""

    name = "cpu"

    def describe(self) -> str:
        """Return the processor and the version of NumPy."""
        return f"{platform.machine()} host, NumPy {np.__version__}"

    def limits_table(self) -> list[tuple[str, str]]:
        """Return nothing: the CPU sets no limits."""
        return []

    def stream(self, stream: object) -> int:
        """Return 0: the CPU has no streams."""
        return 0

    def capturing(self, stream: int) -> bool:
        """Return ``False``: on the CPU nothing is captured."""
        return False

    def read(self, address: int, size: int, stream: int) -> Array:
        """Return a copy of memory, as bytes."""
        data: Array = view(address, np.dtype(np.uint8), (size,), (1,)).copy()
        return data

    def operator(self, name: str, info: Any) -> Any:
        """Return the implementation of an operator."""
        return load_operator(__name__, OPERATORS, name)(info)
