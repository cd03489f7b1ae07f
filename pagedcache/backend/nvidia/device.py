# SPDX-License-Identifier: Apache-2.0
"""A GPU: its limits, and how to compile and launch on it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cupy
from cupy.cuda import driver, runtime

from pagedcache.backend.nvidia import parameters, source
from pagedcache.backend.nvidia.context import NOT_CAPTURED, Context
from pagedcache.backend.nvidia.driver import relaxed_capture_mode
from pagedcache.backend.nvidia.launch import Launch
from pagedcache.backend.nvidia.report import DeviceReport, Reports
from pagedcache.environment import switched_on
from pagedcache.locks import make_lock
from pagedcache.status import (
    CompileError,
    DeviceArchitectureNotSupportedError,
    LaunchError,
    NotSupportedError,
)

OPTIONS = ("--std=c++17", "--fmad=false")  # what users write is not contracted either
COMMON = "common.cuh"
TAKE_REPORT = "pagedcache::takeReport"
# InfiniCore's classes of devices, by threads in a block. Kernels are tuned for a class.
THREAD_CLASSES = (4096, 1024, 512)
LOWEST_CAPABILITY = (7, 0)  # the first with __grid_constant__
PROGRAMMATIC_CAPABILITY = (9, 0)
PROGRAMMATIC_DRIVER = 12030  # CUDA 12.3, the first that captures programmatic launches


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits that the device reports.

    Attributes
    ----------
    name : str
    compute_capability : tuple of int
    multiprocessors : int
    max_threads_per_block : int
    max_grid_x : int
        Blocks in a launch, along x.
    """

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    max_threads_per_block: int
    max_grid_x: int

    @property
    def thread_class(self) -> int:
        """The largest of `THREAD_CLASSES` that the device can run.

        Raises
        ------
        DeviceArchitectureNotSupportedError
            It cannot run even the smallest.
        """
        for threads in THREAD_CLASSES:
            if self.max_threads_per_block >= threads:
                return threads
        rule = f"must run at least {THREAD_CLASSES[-1]} threads in a block"
        raise DeviceArchitectureNotSupportedError(self.name, rule, self.max_threads_per_block)

    def check(self) -> None:
        """Raise if the kernels cannot run on such a device.

        Raises
        ------
        DeviceArchitectureNotSupportedError
        """
        if self.compute_capability < LOWEST_CAPABILITY:
            lowest, found = (f"{x}.{y}" for x, y in (LOWEST_CAPABILITY, self.compute_capability))
            rule = f"must have compute capability {lowest} (Volta) or higher"
            raise DeviceArchitectureNotSupportedError(self.name, rule, found)
        _ = self.thread_class


class CudaDevice(Context):
    """GPU `index`.

    Attributes
    ----------
    limits : Limits
    programmatic : bool or None
        Whether launches ask for programmatic dependent launch. ``None`` until something has been
        compiled; then whether the device and the driver support it, found in a trial, or ``False``
        if the environment variable ``PAGEDCACHE_PDL`` is 0.
    """

    options: tuple[str, ...] = OPTIONS
    prelude = ""  # source that comes before all other

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.limits = _query(index)
        self.limits.check()
        self.programmatic: bool | None = None
        # CuPy's functions, kept because their module is unloaded with the last of them.
        self._compiled: dict[tuple[str | Path, tuple[str, ...], str], list[Any]] = {}
        self._compiling = make_lock()
        self._take_report = 0  # CUfunction
        self._reports = Reports(self, self._launch_to_take)

    def describe(self) -> str:
        """Return the GPU's name, compute capability and size."""
        limits = self.limits
        major, minor = limits.compute_capability
        return f"{limits.name}, sm_{major}{minor}, {limits.multiprocessors} multiprocessors"

    def limits_table(self) -> list[tuple[str, str]]:
        """Return the limits that were queried, and the class of device that follows from them."""
        table = {
            **asdict(self.limits),
            "thread_class": self.limits.thread_class,
            "programmatic_launch": self._without_programmatic() or "if a trial launch succeeds",
        }
        return [(name.replace("_", " "), str(value)) for name, value in table.items()]

    def operator(self, name: str) -> Callable[..., Any]:
        """Raise: for NVIDIA GPUs, operators bring their own implementations."""
        raise NotSupportedError(f"operator {name!r}", "is not implemented on NVIDIA GPUs")

    def report(self, *, read: bool = True) -> DeviceReport:
        """Return an empty report, or with ``read=False`` one that nobody reads."""
        return self._reports.new() if read else self._reports.unread

    def compile(self, file: str | Path, expressions: tuple[str, ...], text: str = "") -> list[int]:
        """Compile template instances of a source file, or load them from CuPy's cache on disk.

        Instances that this device has compiled before are returned at once.

        Parameters
        ----------
        file : str or Path
            See `pagedcache.backend.nvidia.source.read`. It must include ``common.cuh``.
        expressions : tuple of str
            C++ names of the instances.
        text : str
            What follows the file.

        Returns
        -------
        list of int
            The CUfunction of each.

        Raises
        ------
        CompileError
            With the compiler's log, or with the reason why the result cannot be kept.
        NotSupportedError
            A stream is being captured; most captures do not allow loading a kernel.
        """
        key = (file, expressions, text)
        with self._compiling:
            if key not in self._compiled:
                if self.captures():
                    rule = (
                        f"{NOT_CAPTURED}; create the descriptor, or make this call once, before "
                        "the capture; pagedcache.warmup() does so for all plain copies"
                    )
                    raise NotSupportedError(f"compiling {Path(file).name}", rule)
                kernels = self._load(
                    Path(file).name, self.prelude + source.read(file) + text, expressions
                )
                if not self._take_report:
                    self._take_report = kernels[-1].ptr
                    self.programmatic = self._try_programmatic()
                self._compiled[key] = kernels
        return [kernel.ptr for kernel in self._compiled[key][: len(expressions)]]

    def prepare(
        self, function: int, rows: int, threads: int, arguments: ctypes.Structure
    ) -> Launch:
        """Return a `Launch` on this device of a function that `compile` returned."""
        return self._launch(function, rows, threads, arguments, bool(self.programmatic))

    def _launch(
        self,
        function: int,
        rows: int,
        threads: int,
        arguments: ctypes.Structure,
        programmatic: bool = False,
    ) -> Launch:
        return Launch(self.index, function, rows, threads, arguments, programmatic=programmatic)

    def _load(self, name: str, text: str, expressions: tuple[str, ...]) -> list[Any]:
        """Return CuPy's functions of the expressions, and that of ``takeReport``."""
        expressions = (*expressions, TAKE_REPORT)
        with self.current("loading a kernel"):
            module = cupy.RawModule(code=text, options=self.options, name_expressions=expressions)
            try:
                return [module.get_function(expression).kernel for expression in expressions]
            except OSError as error:
                rule = (
                    "was compiled, but CuPy cannot keep it; set CUPY_CACHE_DIR to a folder that "
                    f"can be written and has room, or CUPY_CACHE_IN_MEMORY=1: {error}"
                )
                raise CompileError(name, rule) from error
            except cupy.cuda.compiler.CompileException as error:
                rule = f"does not compile for {self.describe()}:\n{error}"
                raise CompileError(name, rule) from error

    def _launch_to_take(self, report: int, room: int) -> Launch:
        kind = parameters.structure(source.read(COMMON), "TakeReportParameters")
        launch = self._launch(self._take_report, 1, 1, kind())
        launch.pack(report, room)
        return launch

    def _without_programmatic(self) -> str:
        """Return why programmatic launch is not tried; empty if it is."""
        if not switched_on("PAGEDCACHE_PDL", default=True):
            return "no, PAGEDCACHE_PDL is off"
        if self.limits.compute_capability < PROGRAMMATIC_CAPABILITY:
            return "no, needs compute capability {}.{}".format(*PROGRAMMATIC_CAPABILITY)
        if runtime.driverGetVersion() < PROGRAMMATIC_DRIVER:
            return "no, needs a driver for CUDA 12.3"
        return ""

    def _try_programmatic(self) -> bool:
        """Return whether two programmatic launches can be captured here. Nothing is run."""
        if self._without_programmatic():
            return False
        kind = parameters.structure(source.read(COMMON), "TakeReportParameters")
        launch = Launch(self.index, self._take_report, 1, 1, kind(), programmatic=True)
        try:
            with cupy.cuda.Device(self.index), relaxed_capture_mode():
                stream = cupy.cuda.Stream(non_blocking=True)
                stream.begin_capture()  # in relaxed mode
                try:
                    for _ in range(2):
                        launch.run(1, stream.ptr)
                finally:
                    stream.end_capture()  # also instantiates the graph
        except (LaunchError, RuntimeError, driver.CUDADriverError, runtime.CUDARuntimeError):
            return False
        return True


def _query(index: int) -> Limits:
    device = cupy.cuda.Device(index)
    capability, attributes = device.compute_capability, device.attributes
    return Limits(
        name=runtime.getDeviceProperties(index)["name"].decode(),
        compute_capability=(int(capability[:-1]), int(capability[-1])),
        multiprocessors=attributes["MultiProcessorCount"],
        max_threads_per_block=attributes["MaxThreadsPerBlock"],
        max_grid_x=attributes["MaxGridDimX"],
    )
