"""One launch: the kernel's parameters in memory, and the call that hands them to the driver.

Two ways lead there. ``cuLaunchKernelEx``, called through ctypes, can ask for programmatic dependent
launch (PDL): the kernel may be set up while the one before it on the stream still runs, which saves
a quarter of a microsecond of GPU time, and the kernel itself waits for that one to be complete
(``griddepcontrol.wait``). CuPy's ``cuLaunchKernel`` cannot, and is the way that always works.

ctypes rather than cuda-bindings: the same call took 3.2 us instead of 3.8 (H200, driver 580), and
the driver is there whenever a GPU is, so nothing more has to be installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import cupy
from cupy.cuda import driver, runtime

from pagedcache.backend.nvidia import fork
from pagedcache.status import LaunchError

_NOT_INITIALIZED = 3  # CUDA_ERROR_NOT_INITIALIZED, cudaErrorInitializationError
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
# Errors of a kernel or of the hardware, after which a context refuses everything: ECC (214), NVLink
# (220), address, time-out, peer, assert (700 to 710), stack, instruction, alignment, address space,
# program counter, failure (714 to 719). The runtime's numbers are the same.
_CONTEXT_IS_LOST = {214, 220, 700, 702, 710, *range(714, 720)}
CAPTURE = range(900, 908)  # what a stream capture does not allow
NOT_CAPTURED = "cannot be done while a stream is captured"
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h: the value is a union of 64 bytes."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("padding", ctypes.c_char * 4),
        ("value", ctypes.c_int * 16),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_mem", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Launch:
    """A launch of one function with one argument, a struct of 8-byte words that is passed by value.

    The driver copies the words before `run` returns, so a `Launch` can be used again at once, but
    by one thread at a time.

    Parameters
    ----------
    device : int
        Index of the function's device.
    function : int
        CUfunction.
    rows, threads : int
        Rows of blocks in the grid, and threads in a block.
    words : sequence of int
        The argument, as it is before the caller writes into `words`.
    programmatic : bool
        Whether to ask for programmatic dependent launch.

    Attributes
    ----------
    words : ctypes array
    run : callable
        Queues the launch: takes the number of blocks in a row, and the handle of a stream. Raises
        `LaunchError` if the driver refuses it.
    """

    run: Callable[[int, int], None]

    def __init__(
        self,
        device: int,
        function: int,
        rows: int,
        threads: int,
        words: Sequence[int],
        *,
        programmatic: bool,
    ) -> None:
        self.words = (ctypes.c_uint64 * len(words))(*words)
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self.words))
        self._device = device
        way = self._programmatic if programmatic else self._plain
        self._queue = way(function, rows, threads)
        self.run = self._queue if runtime.getDeviceCount() == 1 else self._run_on_its_device

    def _run_on_its_device(self, blocks: int, stream: int) -> None:
        try:
            if runtime.getDevice() == self._device:
                self._queue(blocks, stream)
            else:
                with cupy.cuda.Device(self._device):
                    self._queue(blocks, stream)
        except runtime.CUDARuntimeError as error:
            raise failure("launch", self._device, error) from error

    def _plain(self, function: int, rows: int, threads: int) -> Callable[[int, int], None]:
        launch, arguments = driver.launchKernel, ctypes.addressof(self._arguments)

        def queue(blocks: int, stream: int) -> None:
            try:
                launch(function, blocks, rows, 1, threads, 1, 1, 0, stream, arguments, 0)
            except driver.CUDADriverError as error:
                self._refused(error, blocks, stream)

        return queue

    def _programmatic(self, function: int, rows: int, threads: int) -> Callable[[int, int], None]:
        launch = launch_extended()
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        attribute = ctypes.addressof(self._attribute)
        config = self._config = _Config(1, rows, 1, threads, 1, 1, 0, None, attribute, 1)
        # Converted once, to what ctypes makes at every call of ints and of c_void_p alike.
        addresses = (ctypes.addressof(config), function, ctypes.addressof(self._arguments))
        pointers = (*map(ctypes.c_void_p.from_param, addresses), None)

        def queue(blocks: int, stream: int) -> None:
            config.grid_x = blocks
            config.stream = stream
            if status := launch(*pointers):
                self._refused(driver.CUDADriverError(status), blocks, stream)

        return queue

    def _refused(self, error: Any, blocks: int, stream: int) -> None:
        """Launch again in a thread that never called CUDA, and so had no context; else raise."""
        try:
            if error.status == _NO_CONTEXT and not driver.ctxGetCurrent():
                runtime.setDevice(self._device)  # after which there is one
                self._queue(blocks, stream)
                return
        except runtime.CUDARuntimeError as again:
            error = again
        raise failure("launch", self._device, error) from error


def failure(what: str, device: int, error: Any) -> LaunchError:
    """Return the error to raise where CUDA refused `what`, with whose fault it is.

    Parameters
    ----------
    what : str
        The step that was refused.
    device : int
    error : CUDADriverError or CUDARuntimeError
    """
    if error.status == _NOT_INITIALIZED and fork.forked():
        return LaunchError(f"cuda:{device}", fork.RULE)
    if error.status in _CONTEXT_IS_LOST:
        rule = (
            f"on cuda:{device} was refused because work that was queued before it failed "
            f"({error}); this process cannot use the GPU any more, start a new one"
        )
        return LaunchError(what, rule)
    if error.status in CAPTURE:
        return LaunchError(f"{what} on cuda:{device}", f"{NOT_CAPTURED} ({error})")
    return LaunchError(what, f"on cuda:{device} failed: {error}")


def launch_extended() -> Callable[..., int]:
    """Return the driver's ``cuLaunchKernelEx``.

    Raises
    ------
    OSError, AttributeError
        There is no driver, or it is older than CUDA 11.8.
    """
    # CDLL, not PyDLL: a launch may wait for room in the queue, and must not hold the GIL then.
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx
