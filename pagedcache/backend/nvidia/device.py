"""A GPU: its limits, and how to compile and launch on it. Knows no operator."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass
from typing import Any

import cupy
from cupy.cuda import driver, runtime

from pagedcache.backend.nvidia import source
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    CompileError,
    DeviceArchitectureNotSupportedError,
    LaunchError,
    NotSupportedError,
)

OPERATORS = {"paged_caching": "paged_caching:PagedCaching"}
OPTIONS = ("--std=c++17",)
# InfiniCore's classes of devices, by threads in a block. Kernels here are fitted to a class.
THREAD_CLASSES = (4096, 1024, 512)

_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


@dataclass(frozen=True, slots=True)
class Limits:
    """What the device says of itself.

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
            Not even the smallest.
        """
        for threads in THREAD_CLASSES:
            if self.max_threads_per_block >= threads:
                return threads
        rule = f"must run at least {THREAD_CLASSES[-1]} threads in a block"
        raise DeviceArchitectureNotSupportedError(self.name, rule, self.max_threads_per_block)


class CudaDevice:
    """GPU `index`, with its primary context.

    Attributes
    ----------
    name : str
        ``"cuda:0"``.
    limits : Limits
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        self.limits = _query(index)
        _ = self.limits.thread_class  # refuses a device that is too small
        self._compiled: dict[tuple[str, tuple[str, ...]], list[Any]] = {}

    def describe(self) -> str:
        """Return the GPU's name, compute capability and size."""
        limits = self.limits
        major, minor = limits.compute_capability
        return f"{limits.name}, sm_{major}{minor}, {limits.multiprocessors} multiprocessors"

    def limits_table(self) -> list[tuple[str, str]]:
        """Return the limits that were queried, and the class of device that follows from them."""
        table = {**asdict(self.limits), "thread_class": self.limits.thread_class}
        return [(name.replace("_", " "), str(value)) for name, value in table.items()]

    def operator(self, name: str, info: Any) -> Any:
        """Return the implementation of an operator, compiled."""
        if name not in OPERATORS:
            raise NotSupportedError(f"operator {name!r}", "is not in the cuda backend")
        module, _, attribute = OPERATORS[name].partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), attribute)(info, self)

    def compile(self, file: str, expressions: tuple[str, ...]) -> list[Any]:
        """Compile template instances of a source file, or load them from CuPy's cache on disk.

        What this device was asked for once is found again at no cost.

        Parameters
        ----------
        file : str
            In ``cuda_src``.
        expressions : tuple of str
            C++ names of the instances.

        Returns
        -------
        list
            A function for each, to give to `launch`.

        Raises
        ------
        CompileError
            With the compiler's log.
        """
        key = (file, expressions)
        if key not in self._compiled:
            with cupy.cuda.Device(self.index):
                module = cupy.RawModule(
                    code=source.read(file), options=OPTIONS, name_expressions=expressions
                )
                try:
                    self._compiled[key] = [
                        module.get_function(expression).kernel for expression in expressions
                    ]
                except cupy.cuda.compiler.CompileException as error:
                    rule = f"does not compile for {self.describe()}:\n{error}"
                    raise CompileError(file, rule) from error
        return self._compiled[key]

    def stream(self, stream: Any) -> int:
        """Return the handle of a stream; ``None`` is CuPy's current one on this device."""
        if stream is None:
            handle: int = cupy.cuda.get_current_stream(self.index).ptr
            return handle
        if type(stream) is int:
            return stream
        if isinstance(stream, (cupy.cuda.Stream, cupy.cuda.ExternalStream)):
            if stream.device_id not in (-1, self.index):
                rule = f"must be a stream of {self.name}"
                raise BadParamError("stream", rule, f"one of cuda:{stream.device_id}")
            return int(stream.ptr)
        if hasattr(stream, "__cuda_stream__"):
            return int(stream.__cuda_stream__()[1])
        rule = "must be None, a cupy.cuda.Stream, an int or have __cuda_stream__"
        raise BadParamTypeError("stream", rule, repr(stream))

    def launch(self, function: Any, blocks: int, threads: int, arguments: int, stream: int) -> None:
        """Queue a launch of a one-dimensional grid.

        Parameters
        ----------
        function
            From `compile`.
        blocks, threads : int
        arguments : int
            Address of the array of addresses of the kernel's arguments.
        stream : int

        Raises
        ------
        LaunchError
            The driver refused it.
        """
        if runtime.getDevice() != self.index:
            with cupy.cuda.Device(self.index):
                self._launch(function, blocks, threads, arguments, stream)
        else:
            self._launch(function, blocks, threads, arguments, stream)

    def _launch(
        self, function: Any, blocks: int, threads: int, arguments: int, stream: int
    ) -> None:
        launch = (function.ptr, blocks, 1, 1, threads, 1, 1, 0, stream, arguments, 0)
        try:
            driver.launchKernel(*launch)
        except driver.CUDADriverError as error:
            if error.status != _NO_CONTEXT:
                raise LaunchError("launch", f"on {self.name} failed: {error}") from error
            # A thread that never called CUDA has no context yet.
            runtime.setDevice(self.index)
            try:
                driver.launchKernel(*launch)
            except driver.CUDADriverError as again:
                raise LaunchError("launch", f"on {self.name} failed: {again}") from again


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
