# SPDX-License-Identifier: Apache-2.0
"""Arrays in the memory of the device, and how pagedcache reads them.

A library that exports DLPack for CPUs or CUDA devices needs nothing of this. For any other, say how
its arrays are read, once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedcache.arrays.library import Library
from pagedcache.tensors import Tensor


class Array:
    """An array in the memory of device 0. FILL IN: the array library of your device."""

    def __init__(self, host: Any) -> None:
        self._memory = np.array(host, copy=True)

    def get(self) -> Any:
        """Return a copy on the host."""
        return self._memory.copy()


class NpuLibrary(Library):
    """How arrays are read: never copied, and never converted."""

    def read(self, subject: str, array: Array) -> Tensor:
        memory = array._memory
        address = memory.ctypes.data  # FILL IN: the address on the device
        return Tensor(address, memory.dtype, memory.shape, memory.strides, "npu:0", writable=True)
