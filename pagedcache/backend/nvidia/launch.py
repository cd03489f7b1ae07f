# SPDX-License-Identifier: Apache-2.0
"""One launch: the kernel's parameters in memory, and the call that hands them to the driver.

The call is ``cuLaunchKernelEx``, because only it can ask for programmatic dependent launch (PDL):
the kernel may be set up while the one before it on the stream still runs, which saves a quarter of
a microsecond of GPU time, and the kernel itself waits for that one (``griddepcontrol.wait``).

It is called through ctypes rather than cuda-bindings, which took 3.8 us instead of 3.2 (H200,
driver 580) and would have to be installed.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import cupy
from cupy.cuda import driver, runtime

from pagedcache.backend.nvidia.context import failure
from pagedcache.backend.nvidia.driver import library
from pagedcache.backend.nvidia.parameters import packer

_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h; the value is a union of 64 bytes."""

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
    """A launch of a function with one argument, a struct that is passed by value.

    The driver copies the struct before `run` returns, so a launch can be used again at once, but by
    one thread at a time.

    Parameters
    ----------
    device : int
        Index of the function's device.
    function : int
        CUfunction.
    rows, threads : int
        Rows of blocks in the grid, and threads in a block.
    parameters : ctypes.Structure
        Copied. Its first member is a struct of what changes from launch to launch.
    programmatic : bool
        Whether to ask for programmatic dependent launch.

    Attributes
    ----------
    pack : callable
        Takes the members of that struct, all of them, and writes them into the parameters.
    run : callable
        Queues the launch. Takes the number of blocks in a row and the handle of a stream, and
        raises `LaunchError` if the driver refuses.
    """

    pack: Callable[..., None]
    run: Callable[[int, int], None]

    def __init__(
        self,
        device: int,
        function: int,
        rows: int,
        threads: int,
        parameters: ctypes.Structure,
        *,
        programmatic: bool,
    ) -> None:
        self._parameters = type(parameters).from_buffer_copy(parameters)
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._parameters))
        self._device = device
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION)
        self._attribute.value[0] = 1
        self._config = _Config(
            1, rows, 1, threads, 1, 1, 0, None, ctypes.addressof(self._attribute), int(programmatic)
        )
        self._queue = self._make_queue(function)
        self.pack = functools.partial(packer(type(parameters)), self._parameters, 0)
        self.run = self._queue if runtime.getDeviceCount() == 1 else self._queue_on_its_device

    def _make_queue(self, function: int) -> Callable[[int, int], None]:
        # A closure, since each attribute that need not be looked up saves 20 ns.
        launch, config, refused = library().cuLaunchKernelEx, self._config, self._refused
        addresses = (ctypes.addressof(config), function, ctypes.addressof(self._arguments))
        # Converted once; ctypes would convert ints and c_void_p objects at each call.
        pointers = (*map(ctypes.c_void_p.from_param, addresses), None)

        latest_blocks, latest_stream = 1, 0

        def queue(blocks: int, stream: int) -> None:
            nonlocal latest_blocks, latest_stream
            if blocks != latest_blocks:
                config.grid_x = latest_blocks = blocks
            if stream != latest_stream:
                config.stream = latest_stream = int(stream)  # keeps no stream alive
            if status := launch(*pointers):
                refused(driver.CUDADriverError(status), blocks, stream)

        return queue

    def _queue_on_its_device(self, blocks: int, stream: int) -> None:
        try:
            if runtime.getDevice() == self._device:
                self._queue(blocks, stream)
            else:
                with cupy.cuda.Device(self._device):
                    self._queue(blocks, stream)
        except runtime.CUDARuntimeError as error:
            raise failure("launch", f"cuda:{self._device}", error) from error

    def _refused(self, error: Any, blocks: int, stream: int) -> None:
        """Launch again if this thread had no context because it never called CUDA; else raise."""
        try:
            if error.status == _NO_CONTEXT and not driver.ctxGetCurrent():
                runtime.setDevice(self._device)  # which makes one current
                self._queue(blocks, stream)
                return
        except runtime.CUDARuntimeError as again:
            error = again
        raise failure("launch", f"cuda:{self._device}", error) from error
