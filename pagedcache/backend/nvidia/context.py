# SPDX-License-Identifier: Apache-2.0
"""A GPU as the current device: waiting, copying, streams, and what caused an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
from cupy.cuda import driver, runtime

from pagedcache.arrays.find import adopt_stream, current_streams
from pagedcache.arrays.memory import StreamHandle
from pagedcache.backend.nvidia import fork
from pagedcache.backend.nvidia.driver import relaxed_capture_mode
from pagedcache.locks import make_lock
from pagedcache.status import (
    BadParamError,
    LaunchError,
    NotSupportedError,
)

if TYPE_CHECKING:
    from pagedcache.tensors import Array

NOT_CAPTURED = "is not possible while a stream is being captured"

_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED, cudaErrorInitializationError
# Errors of a kernel or of the hardware, after which a context refuses everything: ECC (214), NVLink
# (220), address, time-out, peer, assert (700 to 710), stack, instruction, alignment, address space,
# program counter, failure (714 to 719). The runtime's numbers are the same.
_CONTEXT_IS_LOST = {214, 220, 700, 702, 710, *range(714, 720)}
_CAPTURE = range(900, 908)  # what a stream capture does not allow


class KeptStream(int):
    """The handle of a stream, which keeps the stream alive."""

    stream: Any

    @classmethod
    def of(cls, handle: int, stream: Any) -> KeptStream:
        """Return the handle of `stream`."""
        kept = cls(handle)
        kept.stream = stream
        return kept


class Context:
    """GPU `index`, with its primary context.

    Attributes
    ----------
    kind, name : str
        ``"cuda"``, ``"cuda:0"``.
    current_stream : callable
        Returns the handle of CuPy's current stream on this device.
    """

    kind = "cuda"

    def __init__(self, index: int) -> None:
        get_stream = cupy.cuda.get_current_stream
        self.index = index
        self.name = f"{self.kind}:{index}"
        # Not a method, which would have to look all of this up at each call.
        self.current_stream: Callable[[], int] = lambda: get_stream(index).ptr
        self._side_stream: Any = None
        self._resident: dict[bytes, int] = {}
        self._resident_lock = make_lock()

    @staticmethod
    def _outside_captures() -> contextlib.AbstractContextManager[None]:
        return relaxed_capture_mode()

    @contextlib.contextmanager
    def current(self, step: str) -> Iterator[None]:
        """Make this the current device, and raise CUDA's errors as `LaunchError`.

        What is done here is never captured, and never ends a capture that another thread has begun.
        """
        try:
            with cupy.cuda.Device(self.index), self._outside_captures():
                yield
        except (driver.CUDADriverError, runtime.CUDARuntimeError) as error:
            raise failure(step, self.name, error) from error

    def stream(self, stream: Any) -> int:
        """Return the handle of a stream of CuPy, PyTorch, or any with ``__cuda_stream__``."""
        if stream is None:
            return self.current_stream()
        if isinstance(stream, int):
            return stream
        handle, device = adopt_stream(stream)
        if device not in (None, self.index):
            raise BadParamError(
                "stream", f"must be a stream on {self.name}", f"one on {self.kind}:{device}"
            )
        return KeptStream.of(handle, stream)

    def side_stream(self) -> int:
        """Return the handle of a stream of our own, which waits for no other."""
        if self._side_stream is None:
            self._side_stream = cupy.cuda.Stream(non_blocking=True)
        return int(self._side_stream.ptr)

    def keeper(self, handle: int) -> Any:
        """Return what keeps the stream with this handle alive, if that is known."""
        if isinstance(handle, KeptStream):
            return handle.stream
        current = cupy.cuda.get_current_stream(self.index)
        return current if current.ptr == handle else None

    def capturing(self, stream: int) -> bool:
        """Return whether a stream is being captured into a graph."""
        try:
            with cupy.cuda.Device(self.index):
                return bool(runtime.streamIsCapturing(stream))
        except runtime.CUDARuntimeError as error:
            if error.status in _CAPTURE:
                return True  # the default stream cannot be queried while another is captured
            raise failure("asking whether a stream is captured", self.name, error) from error
        except RuntimeError:  # what CuPy raises for a capture that is already broken
            return True

    def captures(self) -> bool:
        """Return whether a stream that is current in this thread is being captured."""
        streams = (self.current_stream(), *current_streams(self.index))
        return any(self.capturing(stream) for stream in streams)

    def wait(self, stream: int) -> None:
        """Wait for everything that is queued on a stream.

        Raises
        ------
        NotSupportedError
            The stream is being captured.
        LaunchError
            Something failed.
        """
        if self.capturing(stream):
            raise NotSupportedError(f"waiting for a stream of {self.name}", NOT_CAPTURED)
        with self.current("waiting"):
            runtime.streamSynchronize(stream)

    def wait_for_all_streams(self) -> None:
        """Wait for everything that is queued on this device.

        Raises
        ------
        LaunchError
            Something failed.
        """
        with self.current("waiting"):
            runtime.deviceSynchronize()

    def mark(self, stream: int) -> Callable[[], bool]:
        """Return a function that tells whether all that is queued on a stream now is done."""
        with self.current("marking a stream"):
            event = cupy.cuda.Event(disable_timing=True)
            runtime.eventRecord(event.ptr, stream)

        def done() -> bool:
            with self.current("asking whether a copy is done"):
                return bool(event.done)

        return done

    def idle(self, stream: int) -> bool:
        """Return whether everything that was queued on a stream is done."""
        with self.current("asking a stream"):
            return bool(runtime.streamQuery(stream) == 0)

    def resident(self, data: bytes) -> int:
        """Return the address of device memory with this data, which must never be written.

        It stays there until the process ends, because a kernel that is still queued, or a graph
        that is replayed later, may read it long after its owner is gone. The same data is there
        once.

        Raises
        ------
        NotSupportedError
            It must allocate while a stream is being captured.
        LaunchError
            The device refuses.
        """
        with self._resident_lock:
            if data not in self._resident:
                if self.captures():
                    rule = f"{NOT_CAPTURED}; make this call once before the capture"
                    raise NotSupportedError("allocating memory", rule)
                with self.current("allocating"):
                    address = runtime.malloc(len(data))
                    stream = self.side_stream()
                    kind = runtime.memcpyHostToDevice
                    held = np.frombuffer(data, np.uint8)
                    runtime.memcpyAsync(address, held.ctypes.data, len(data), kind, stream)
                    runtime.streamSynchronize(stream)
                self._resident[data] = address
            return self._resident[data]

    @contextlib.contextmanager
    def uploaded(self, data: Array, stream: int) -> Iterator[int]:
        """Copy data to the device for what is queued on a stream in this context.

        Yields its address. The host waits for nothing.
        """
        # CuPy gives this memory to what is queued later on the same stream, and to nothing else.
        queued_on = cupy.cuda.Stream.from_external(StreamHandle(stream))
        with self.current("copying a list to the device"), queued_on:
            held = cupy.cuda.alloc(data.nbytes)
            # The driver has copied pageable memory when this returns.
            kind = runtime.memcpyHostToDevice
            runtime.memcpyAsync(held.ptr, data.ctypes.data, data.nbytes, kind, stream)
            yield held.ptr
            del held  # while its stream is current

    def read(self, address: int, size: int, stream: int) -> Array:
        """Return a copy of device memory, as bytes, once all that is queued on a stream is done."""
        data = np.empty(size, np.uint8)
        with self.current("reading"):
            kind = runtime.memcpyDeviceToHost
            runtime.memcpyAsync(data.ctypes.data, address, size, kind, stream)
            runtime.streamSynchronize(stream)
        return data


def failure(step: str, device: str, error: Any) -> LaunchError:
    """Return the error to raise if CUDA refused a step, with its cause.

    Parameters
    ----------
    step, device : str
    error : CUDADriverError or CUDARuntimeError
    """
    if error.status == _NOT_INITIALIZED and fork.forked():
        return LaunchError(device, fork.RULE)
    if error.status in _CONTEXT_IS_LOST:
        rule = (
            f"on {device} was refused because work that was queued before it failed "
            f"({error}); this process can no longer use the GPU, so start a new one"
        )
        return LaunchError(step, rule)
    if error.status in _CAPTURE:
        return LaunchError(f"{step} on {device}", f"{NOT_CAPTURED} ({error})")
    return LaunchError(step, f"on {device} failed: {error}")
