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
from pagedcache.backend.nvidia import fork
from pagedcache.backend.nvidia.driver import relaxed_capture_mode
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
        self.name = f"cuda:{index}"
        # Not a method, which would have to look all of this up at each call.
        self.current_stream: Callable[[], int] = lambda: get_stream(index).ptr
        self._side_stream: Any = None

    @contextlib.contextmanager
    def current(self, step: str) -> Iterator[None]:
        """Make this the current device, and raise CUDA's errors as `LaunchError`.

        What is done here is never captured, and never ends a capture that another thread has begun.
        """
        try:
            with cupy.cuda.Device(self.index), relaxed_capture_mode():
                yield
        except (driver.CUDADriverError, runtime.CUDARuntimeError) as error:
            raise failure(step, self.index, error) from error

    def stream(self, stream: Any) -> int:
        """Return the handle of a stream of CuPy, PyTorch, or any with ``__cuda_stream__``."""
        if stream is None:
            return self.current_stream()
        if isinstance(stream, int):
            return stream
        handle, device = adopt_stream(stream)
        if device not in (None, self.index):
            raise BadParamError(
                "stream", f"must be a stream on {self.name}", f"one on cuda:{device}"
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
            raise failure("asking whether a stream is captured", self.index, error) from error
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

    def idle(self, stream: int) -> bool:
        """Return whether everything that was queued on a stream is done."""
        with self.current("asking a stream"):
            return bool(runtime.streamQuery(stream) == 0)

    def read(self, address: int, size: int, stream: int) -> Array:
        """Return a copy of device memory, as bytes, once all that is queued on a stream is done."""
        data = np.empty(size, np.uint8)
        with self.current("reading"):
            kind = runtime.memcpyDeviceToHost
            runtime.memcpyAsync(data.ctypes.data, address, size, kind, stream)
            runtime.streamSynchronize(stream)
        return data


def failure(step: str, device: int, error: Any) -> LaunchError:
    """Return the error to raise if CUDA refused a step, with its cause.

    Parameters
    ----------
    step : str
    device : int
    error : CUDADriverError or CUDARuntimeError
    """
    if error.status == _NOT_INITIALIZED and fork.forked():
        return LaunchError(f"cuda:{device}", fork.RULE)
    if error.status in _CONTEXT_IS_LOST:
        rule = (
            f"on cuda:{device} was refused because work that was queued before it failed "
            f"({error}); this process can no longer use the GPU, so start a new one"
        )
        return LaunchError(step, rule)
    if error.status in _CAPTURE:
        return LaunchError(f"{step} on cuda:{device}", f"{NOT_CAPTURED} ({error})")
    return LaunchError(step, f"on cuda:{device} failed: {error}")
