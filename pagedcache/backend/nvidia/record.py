"""Records: a few words of device memory that kernels add to and the host reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cupy
import numpy as np
from cupy.cuda import runtime

if TYPE_CHECKING:
    from pagedcache.tensors import Array


WORDS = 4
_COUNT = 1024  # records in a slab
_SIZE = WORDS * 8


class Records:
    """The records of one device, all of which read `empty` when nothing was added to them.

    Their memory is never given back. A kernel that is still queued, or a graph that is replayed,
    may write to a record whose owner is gone: it must not hit somebody else's memory then.

    Parameters
    ----------
    device : int
    empty : sequence of int
        `WORDS` words of 64 bits.
    """

    def __init__(self, device: int, empty: Sequence[int]) -> None:
        self._device = device
        self._empty = np.array(empty, np.int64)
        self._slabs: list[cupy.cuda.MemoryPointer] = []
        self._free: list[int] = []
        self._retired: list[int] = []
        self._lock = threading.Lock()

    def new(self) -> Record:
        """Return an empty record of which nobody else knows.

        Allocates, or waits for the device, once in about a thousand calls, and else touches no
        device, so it may be called while a stream is captured.
        """
        with self._lock, cupy.cuda.Device(self._device):
            if not self._free and len(self._retired) >= _COUNT:
                # What is queued now may still write to them; what comes later knows them not.
                cupy.cuda.Device(self._device).synchronize()
                self._free, self._retired = self._retired, []
                for address in self._free:
                    self._clear(address, 1)
            if not self._free:
                slab = cupy.cuda.alloc(_COUNT * _SIZE)
                self._slabs.append(slab)
                self._clear(slab.ptr, _COUNT)
                self._free = [slab.ptr + index * _SIZE for index in range(_COUNT)]
            return Record(self, self._free.pop())

    def take(self, address: int) -> Array | None:
        """Return the words of a record and clear it; ``None`` if it was empty.

        The caller has waited for the kernels whose additions it wants. Those of kernels that run
        meanwhile may be lost.
        """
        words = np.empty(WORDS, np.int64)
        with cupy.cuda.Device(self._device):
            _copy(words.ctypes.data, address, _SIZE, runtime.memcpyDeviceToHost)
            if np.array_equal(words, self._empty):
                return None
            self._clear(address, 1)
        return words

    def retire(self, address: int) -> None:
        """Take back a record; it is used again when no kernel can write to it any more."""
        self._retired.append(address)

    def _clear(self, address: int, count: int) -> None:
        words = np.tile(self._empty, count)
        _copy(address, words.ctypes.data, words.nbytes, runtime.memcpyHostToDevice)


class Record:
    """One record; lives as long as this object.

    Attributes
    ----------
    address : int
        On the device.
    """

    def __init__(self, records: Records, address: int) -> None:
        self._records = records
        self.address = address

    def take(self) -> Array | None:
        """See `Records.take`."""
        return self._records.take(self.address)

    def __del__(self) -> None:
        self._records.retire(self.address)


def _copy(target: int, source: int, size: int, kind: int) -> None:
    """Copy and wait for it, on a stream that waits for no other."""
    stream = cupy.cuda.Stream(non_blocking=True)
    runtime.memcpyAsync(target, source, size, kind, stream.ptr)
    stream.synchronize()
