# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA backend: kernels compiled by NVRTC through CuPy. CuPy is imported by `check`.

- `driver`: calls to the driver that CuPy does not offer
- `context`: a GPU as the current device: streams, waiting, copying, errors
- `source`, `parameters`: CUDA source, and the structs that it declares
- `launch`: one launch
- `plans`: launches that are planned once for each number of rows
- `report`: what kernels report, and how the host takes it
- `device`: limits, compiling, and all of the above as one object
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
from typing import TYPE_CHECKING, Any

from pagedcache.backend.nvidia import driver, fork
from pagedcache.status import DeviceNotFoundError, DeviceNotInitializedError, MissingLibraryError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice

_INITIALIZATION_ERROR = 3  # cudaErrorInitializationError
_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver
ROCM_WHEEL = "cupy-rocm-7-0"
_CUPY_WHEELS = ("cupy", *(f"cupy-cuda{major}x" for major in range(11, 20)), ROCM_WHEEL)
INSTALL = "install pagedcache with the extra cuda13 or, for a CUDA 12 driver, cuda12"


class NvidiaBackend:
    """Serves ``"cuda"``."""

    def check(self) -> None:
        """Check that exactly one CuPy, the driver, a GPU and NVRTC can be used.

        Raises
        ------
        MissingLibraryError
            CuPy or NVRTC cannot be loaded, or two CuPys are installed.
        DeviceNotInitializedError
            There is no usable driver, or this process was forked from one that had used CUDA.
        DeviceNotFoundError
            The driver finds no GPU.
        """
        if fork.forked():
            raise DeviceNotInitializedError("backend cuda", fork.RULE)
        check_one_cupy("backend cuda")
        _check_not_rocm()
        _check_driver()
        _count_devices()
        _check_nvrtc()

    def open(self, index: int | None) -> CudaDevice:
        """Return GPU `index`, or CuPy's current one.

        Raises
        ------
        DeviceNotFoundError
            There is no such GPU.
        DeviceArchitectureNotSupportedError
            Its compute capability is below 7.0, or it cannot run 512 threads in a block.
        """
        count = _count_devices()
        current: int = import_cupy().cuda.runtime.getDevice()
        if index is not None and index >= count:
            rule = f"must be one of the {count} GPUs here (cuda:0 to cuda:{count - 1})"
            raise DeviceNotFoundError("device", rule, f"cuda:{index}")
        return _open(current if index is None else index)


@functools.cache
def _check_driver() -> None:
    try:
        driver.library()
    except OSError as error:
        rule = f"needs the NVIDIA driver, which is not installed on this machine ({error})"
        raise DeviceNotInitializedError("backend cuda", rule) from error


@functools.cache
def wheels() -> tuple[str, ...]:
    """Return the names of the wheels of CuPy that are installed."""
    found = []
    for name in _CUPY_WHEELS:  # by name, since listing all installed packages takes 0.1 s
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(importlib.metadata.distribution(name).metadata["Name"])
    return tuple(found)


def check_one_cupy(backend: str) -> None:
    """Raise if two wheels of CuPy are installed, which overwrite each other's files.

    Raises
    ------
    MissingLibraryError
    """
    if len(wheels()) > 1:
        rule = "needs exactly one CuPy; uninstall all of them, then install one"
        raise MissingLibraryError(backend, rule, " and ".join(wheels()))


def _check_not_rocm() -> None:
    cupy = sys.modules.get("cupy")  # importing it would take time that only GPUs are worth
    if ROCM_WHEEL in wheels() or (cupy is not None and getattr(cupy.cuda.runtime, "is_hip", False)):
        rule = "needs a CuPy for CUDA, and this one is for AMD's GPUs; use the device 'rocm'"
        raise DeviceNotInitializedError("backend cuda", rule)


def import_cupy() -> Any:
    """Import CuPy.

    Raises
    ------
    MissingLibraryError
        It is not installed, or importing it fails. The message says what to do.
    """
    try:
        import cupy
    except ImportError as error:
        rule = f"needs CuPy ({INSTALL}): {error}"
        raise MissingLibraryError("backend cuda", rule) from error
    except OSError as error:
        rule = f"needs a cache folder for CuPy that can be written; set CUPY_CACHE_DIR: {error}"
        raise DeviceNotInitializedError("backend cuda", rule) from error
    return cupy


@functools.cache
def _count_devices() -> int:
    runtime = import_cupy().cuda.runtime
    fork.note_use()
    try:
        count: int = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status == _INITIALIZATION_ERROR:  # another library used CUDA before the fork
            raise DeviceNotInitializedError("backend cuda", fork.RULE) from error
        if error.status == _INSUFFICIENT_DRIVER:
            rule = f"needs a newer NVIDIA driver, or a CuPy for an older CUDA ({error})"
            raise DeviceNotInitializedError("backend cuda", rule) from error
        raise DeviceNotFoundError("backend cuda", f"found no usable GPU ({error})") from error
    return count


@functools.cache
def _check_nvrtc() -> None:
    cupy = import_cupy()
    try:
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        rule = f"needs NVRTC ({INSTALL}): {error}"
        raise MissingLibraryError("backend cuda", rule) from error


@functools.cache
def _open(index: int) -> CudaDevice:
    from pagedcache.backend.nvidia.device import CudaDevice

    return CudaDevice(index)
