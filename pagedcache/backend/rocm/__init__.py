# SPDX-License-Identifier: Apache-2.0
"""The ROCm backend: the kernels of the nvidia backend on AMD's GPUs, through a CuPy for ROCm.

It compiles, and all of it but the GPU is tested. It has never run on a GPU, so whoever has one is
asked to try it. CuPy is imported by `check`, and only if it may be for ROCm.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pagedcache.backend.nvidia import ROCM_WHEEL, check_one_cupy, fork, wheels
from pagedcache.status import DeviceNotFoundError, DeviceNotInitializedError, MissingLibraryError

if TYPE_CHECKING:
    from pagedcache.backend.rocm.device import RocmDevice

STATE = "compiled, never run: help wanted"
INSTALL = f"install ROCm 7, and pagedcache with the extra rocm7; {STATE}"


class RocmBackend:
    """Serves ``"rocm"``."""

    def check(self) -> None:
        """Check that a CuPy for ROCm, a GPU and hipRTC can be used.

        Raises
        ------
        MissingLibraryError
            There is no CuPy for ROCm, it cannot be loaded, or two CuPys are installed.
        DeviceNotInitializedError
            This process was forked from one that had used a GPU.
        DeviceNotFoundError
            ROCm finds no GPU.
        """
        if fork.forked():
            raise DeviceNotInitializedError("backend rocm", fork.RULE)
        check_one_cupy("backend rocm")
        _count_devices()

    def open(self, index: int | None) -> RocmDevice:
        """Return GPU `index`, or CuPy's current one.

        Raises
        ------
        DeviceNotFoundError
            There is no such GPU.
        DeviceArchitectureNotSupportedError
            It cannot run 512 threads in a block.
        """
        count = _count_devices()
        if index is not None and index >= count:
            rule = f"must be one of the {count} GPUs here (rocm:0 to rocm:{count - 1})"
            raise DeviceNotFoundError("device", rule, f"rocm:{index}")
        current: int = _import_cupy().cuda.runtime.getDevice()
        return _open(current if index is None else index)


def _import_cupy() -> Any:
    """Import CuPy if it is one for ROCm.

    Raises
    ------
    MissingLibraryError
        It is not, or importing it fails.
    """
    found = wheels()
    other = found and found != ("cupy",) and ROCM_WHEEL not in found  # "cupy" was built for either
    try:
        if other:
            raise ImportError(f"{found[0]} is for CUDA")
        import cupy

        if not cupy.cuda.runtime.is_hip:
            raise ImportError("the one here is for CUDA")
    except (ImportError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MissingLibraryError(
            "backend rocm", f"needs a CuPy for ROCm ({INSTALL}): {reason}"
        ) from error
    return cupy


@functools.cache
def _count_devices() -> int:
    cupy = _import_cupy()
    runtime = cupy.cuda.runtime
    fork.note_use()
    try:
        count: int = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        raise DeviceNotFoundError("backend rocm", f"found no usable GPU ({error})") from error
    try:
        cupy.cuda.nvrtc.getVersion()  # of hipRTC, by the same name
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingLibraryError("backend rocm", f"needs hipRTC ({INSTALL}): {error}") from error
    return count


@functools.cache
def _open(index: int) -> RocmDevice:
    from pagedcache.backend.rocm.device import RocmDevice

    return RocmDevice(index)
