"""Records: a few words of device memory that kernels add to and the host reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cupy
import numpy as np
from cupy.cuda import runtime

from pagedcache.backend.nvidia.launch import NOT_CAPTURED
from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.tensors import Array

WORDS = 4
_SIZE = WORDS * 8
_COUNT = 1024  # records in a slab


class Records:
    """The records of one device, all of which read `empty` until something is added to them.

    A record is never used again and its memory never given back: a kernel that is still queued, or
    a graph that is replayed, may write to one whose owner is long gone. That is 32 bytes for each
    owner, for the life of the process.

    Parameters
    ----------
    device : CudaDevice
    empty : sequence of int
        `WORDS` words of 64 bits.
    """

    def __init__(self, device: CudaDevice, empty: Sequence[int]) -> None:
        self._device = device
        self._empty = np.array(empty, np.int64)
        self._free: list[int] = []
        self._lock = threading.Lock()

    def new(self) -> Record:
        """Return an empty record of which nobody else knows.

        Touches the device once in about a thousand calls, when it allocates.

        Raises
        ------
        NotSupportedError
            It must allocate, and a stream is captured.
        LaunchError
            The device refuses.
        """
        with self._lock:
            if not self._free:
                self._free = self._slab()
            return Record(self, self._free.pop())

    def _slab(self) -> list[int]:
        if self._device.captures():
            raise NotSupportedError("a descriptor's first memory", NOT_CAPTURED)
        with self._device.current("allocation"):
            # Not from a pool, whose memory other streams may still write to.
            slab = runtime.malloc(_COUNT * _SIZE)
        self.copy(slab, np.tile(self._empty, _COUNT), runtime.memcpyHostToDevice)
        return [slab + index * _SIZE for index in range(_COUNT)]

    def copy(self, address: int, words: Array, kind: int) -> None:
        """Copy words to or from the device, on a stream that waits for no other."""
        ends = [address, words.ctypes.data]
        if kind == runtime.memcpyDeviceToHost:
            ends.reverse()
        with self._device.current("copy"):
            stream = cupy.cuda.Stream(non_blocking=True)
            runtime.memcpyAsync(*ends, words.nbytes, kind, stream.ptr)
            stream.synchronize()

    def clear(self, address: int) -> None:
        """Make a record read empty."""
        self.copy(address, self._empty, runtime.memcpyHostToDevice)


class Record:
    """One record.

    Attributes
    ----------
    address : int
        On the device.
    """

    def __init__(self, records: Records, address: int) -> None:
        self._records = records
        self.address = address

    def read(self) -> list[int]:
        """Return the words, with what has been added by kernels that are done."""
        words = np.empty(WORDS, np.int64)
        self._records.copy(self.address, words, runtime.memcpyDeviceToHost)
        return [int(word) for word in words]

    def clear(self) -> None:
        """Make the record read empty; what kernels that still run add may be lost."""
        self._records.clear(self.address)
