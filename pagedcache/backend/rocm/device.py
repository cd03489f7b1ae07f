# SPDX-License-Identifier: Apache-2.0
"""An AMD GPU: what differs from an NVIDIA GPU as CuPy shows both."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from typing import Any

import cupy
from cupy.cuda import driver, runtime

from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.context import failure
from pagedcache.backend.nvidia.device import CudaDevice
from pagedcache.backend.nvidia.parameters import packer
from pagedcache.backend.rocm import STATE

# Nothing is contracted, and subnormal numbers are kept, although CuPy asks for the opposite.
OPTIONS = ("-std=c++17", "-ffp-contract=off", "-Xclang", "-fdenormal-fp-math-f32=ieee")
PRELUDE = "hip.cuh"


class RocmDevice(CudaDevice):
    """GPU `index`, which is launched on by CuPy, without programmatic launch."""

    kind = "rocm"
    options = OPTIONS

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.prelude = source.read(PRELUDE)

    def describe(self) -> str:
        """Return the GPU's name, architecture and size, and that this has never run on one."""
        architecture = runtime.getDeviceProperties(self.index).get("gcnArchName", b"").decode()
        units = f"{self.limits.multiprocessors} compute units"
        return f"{self.limits.name}, {architecture.split(':')[0]}, {units}; {STATE}"

    @staticmethod
    def _outside_captures() -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def capturing(self, stream: int) -> bool:
        """Return whether a stream is being captured; ``False`` if CuPy cannot ask for it there."""
        try:
            with cupy.cuda.Device(self.index):
                return bool(runtime.streamIsCapturing(stream))
        except runtime.CUDARuntimeError:
            return True  # the default stream, while another is captured
        except RuntimeError as error:
            return "not supported" not in str(error)

    def _launch(
        self,
        function: int,
        rows: int,
        threads: int,
        arguments: ctypes.Structure,
        programmatic: bool = False,
    ) -> Any:
        return RocmLaunch(self, function, rows, threads, arguments)

    def _without_programmatic(self) -> str:
        return "no, AMD's GPUs have none"


class RocmLaunch:
    """A launch like `pagedcache.backend.nvidia.launch.Launch`, by CuPy."""

    def __init__(
        self,
        device: RocmDevice,
        function: int,
        rows: int,
        threads: int,
        parameters: ctypes.Structure,
    ) -> None:
        self._device, self._function = device, function
        self._rows, self._threads = rows, threads
        self._parameters = type(parameters).from_buffer_copy(parameters)
        self._arguments = (ctypes.c_void_p * 1)(ctypes.addressof(self._parameters))
        self.pack = functools.partial(packer(type(parameters)), self._parameters, 0)

    def run(self, blocks: int, stream: int) -> None:
        """Queue the launch.

        Raises
        ------
        LaunchError
            HIP refuses.
        """
        device, grid, block = self._device, (blocks, self._rows, 1), (self._threads, 1, 1)
        arguments = ctypes.addressof(self._arguments)
        try:
            with cupy.cuda.Device(device.index):
                driver.launchKernel(self._function, *grid, *block, 0, int(stream), arguments, 0)
        except (driver.CUDADriverError, runtime.CUDARuntimeError) as error:
            raise failure("launch", device.name, error) from error
