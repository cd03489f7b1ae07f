# SPDX-License-Identifier: Apache-2.0
"""Reports: a few words of device memory that kernels add to and the host takes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from cupy.cuda import runtime

from pagedcache.backend.nvidia.context import NOT_CAPTURED, Context
from pagedcache.backend.protocol import Invalid
from pagedcache.locks import make_lock
from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.launch import Launch

NO_ROW = 2**63 - 1
EMPTY = (0, 0, NO_ROW, 0)  # struct Report of common.cuh: count, lock, row, value
_SIZE = len(EMPTY) * 8
_IN_SLAB = 1024
_MANY_STREAMS = 16
PER_THREAD = 2  # cudaStreamPerThread: another stream in each thread

TakeLaunch = Callable[[int, int], "Launch"]
"""From the addresses of a report and of room for its words to a launch of ``takeReport``."""


class Reports:
    """The reports of one device.

    The memory of a report is never used again, because a kernel that is still queued, or a graph
    that is replayed later, may add to it long after its owner is gone. It is 64 bytes.

    Parameters
    ----------
    context : Context
    take_launch : callable
    """

    def __init__(self, context: Context, take_launch: TakeLaunch) -> None:
        self._context = context
        self._take_launch = take_launch
        self._free: list[int] = []
        self._lock = make_lock()

    def new(self) -> DeviceReport:
        """Return an empty report. About once in a thousand calls, this allocates.

        Raises
        ------
        NotSupportedError
            It must allocate while a stream is being captured.
        LaunchError
            The device refuses.
        """
        with self._lock:
            if not self._free:
                self._free = self._slab()
            address = self._free.pop()
        return DeviceReport(self._context, self._take_launch, address)

    @functools.cached_property
    def unread(self) -> UnreadReport:
        """The report that nobody reads, which any number of owners can share."""
        return UnreadReport(self._context, self._take_launch, self.new().address)

    def _slab(self) -> list[int]:
        context = self._context
        if context.captures():
            rule = f"{NOT_CAPTURED}; call pagedcache.warmup() before the capture"
            raise NotSupportedError("allocating memory for a first descriptor", rule)
        words = np.tile(np.array([*EMPTY, *EMPTY], np.int64), _IN_SLAB)
        with context.current("allocating"):
            # Not from a memory pool, whose memory other streams may still write to.
            slab = runtime.malloc(words.nbytes)
            stream = context.side_stream()
            kind = runtime.memcpyHostToDevice
            runtime.memcpyAsync(slab, words.ctypes.data, words.nbytes, kind, stream)
            runtime.streamSynchronize(stream)
        return [slab + index * 2 * _SIZE for index in range(_IN_SLAB)]


class LastRow:
    """The row that was taken last, with its value."""

    def __init__(self) -> None:
        self._row = self._value = 0

    def read(self, count: int, row: int, value: int) -> Invalid | None:
        """Return what the words of a report mean; ``None`` if nothing was counted."""
        if row != NO_ROW and count:
            self._row, self._value = row, value
        # A kernel adds a row before it counts it, so this count may be of the row taken last.
        return Invalid(count, self._row, self._value) if count else None


class DeviceReport:
    """A report in the memory of a device, followed by room for its words when they are taken.

    Attributes
    ----------
    address : int
        On the device.
    streams : dict
        The handles of the streams that kernels were queued on since `take`, and what keeps each
        stream alive. A stream that was given as an int must live that long by itself.
    """

    def __init__(self, context: Context, take_launch: TakeLaunch, address: int) -> None:
        self._context = context
        self._take_launch = take_launch
        self._launch: Launch | None = None
        self._lock = make_lock()
        self._last = LastRow()
        self.address = address
        self.streams: dict[int, Any] = {}
        self._threads: set[int] = set()  # that have queued on their own default stream
        self._threads_lock = make_lock()

    # Other threads queue kernels while one takes the report. None is missed, since they note a
    # stream after they have queued on it, and it is forgotten before it is waited for.

    def note(self, stream: int) -> None:
        """Remember that a kernel has been queued on a stream."""
        if stream == PER_THREAD:
            with self._threads_lock:
                self._threads.add(threading.get_ident())
            return
        if len(self.streams) >= _MANY_STREAMS:
            self._forget_idle_streams()
        self.streams[int(stream)] = self._context.keeper(stream)

    def _forget_idle_streams(self) -> None:
        for stream, keeper in list(self.streams.items()):
            if keeper is None:  # it may be gone, and must not be asked
                continue
            self.streams.pop(stream, None)
            if self._context.capturing(stream) or not self._context.idle(stream):
                self.streams.setdefault(stream, keeper)

    def take(self) -> Invalid | None:
        """Wait for the streams that were noted; return what kernels added, and clear it.

        A kernel takes the words, under the same lock as kernels that add to them, so that nothing
        that is added meanwhile is lost.
        """
        with self._lock:
            self._wait()
            count, _, row, value = self._exchange()
            return self._last.read(count, row, value)

    def _wait(self) -> None:
        for stream in list(self.streams):
            keeper = self.streams.pop(stream, None)
            try:
                self._context.wait(stream)
            except BaseException:
                self.streams.setdefault(stream, keeper)
                raise
        with self._threads_lock:
            threads, self._threads = self._threads, set()
        try:
            if threads - {threading.get_ident()}:
                # The default stream of another thread cannot be named here.
                self._context.wait_for_all_streams()
            elif threads:
                self._context.wait(PER_THREAD)
        except BaseException:
            with self._threads_lock:
                self._threads |= threads
            raise

    def _exchange(self) -> list[int]:
        words = np.empty(len(EMPTY), np.int64)
        room = self.address + _SIZE
        with self._context.current("reading a report"):
            if self._launch is None:
                self._launch = self._take_launch(self.address, room)
            stream = self._context.side_stream()
            self._launch.run(1, stream)
            kind = runtime.memcpyDeviceToHost
            runtime.memcpyAsync(words.ctypes.data, room, words.nbytes, kind, stream)
            runtime.streamSynchronize(stream)
        return [int(word) for word in words]


class UnreadReport(DeviceReport):
    """A report that nobody reads, so no stream has to be remembered."""

    def note(self, stream: int) -> None:
        """Avoid being called for this stream each time; keep nothing alive."""
        if len(self.streams) >= _MANY_STREAMS:
            self.streams.clear()
        self.streams[int(stream)] = None
