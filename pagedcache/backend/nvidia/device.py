"""A GPU: its limits, and how to compile and launch on it. Of operators it knows the names."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
from cupy.cuda import driver, runtime

from pagedcache.arrays import current_streams
from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.launch import CAPTURE, NOT_CAPTURED, Launch, failure, launch_extended
from pagedcache.backend.nvidia.record import Record, Records
from pagedcache.backend.protocol import load_operator
from pagedcache.environment import switched_on
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    CompileError,
    DeviceArchitectureNotSupportedError,
    NotSupportedError,
    shown,
)

if TYPE_CHECKING:
    from pagedcache.tensors import Array

OPERATORS = {"paged_caching": "paged_caching:PagedCaching"}
OPTIONS = ("--std=c++17",)
# InfiniCore's classes of devices, by threads in a block. Kernels here are fitted to a class.
THREAD_CLASSES = (4096, 1024, 512)


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
    current_stream : callable
        Returns the handle of CuPy's current stream on this device.
    programmatic : bool
        Whether launches ask for programmatic dependent launch: on compute capability 9.0 and up,
        unless the environment variable ``PAGEDCACHE_PDL`` is 0.
    """

    def __init__(self, index: int) -> None:
        get_stream = cupy.cuda.get_current_stream
        self.index = index
        # No method, which would have to look up all of that at each call.
        self.current_stream: Callable[[], int] = lambda: get_stream(index).ptr
        self.name = f"cuda:{index}"
        self.limits = _query(index)
        _ = self.limits.thread_class  # refuses a device that is too small
        self.programmatic = self.limits.compute_capability >= (9, 0) and _can_be_programmatic()
        # CuPy's functions, kept because what they point to is unloaded with the last of them.
        self._compiled: dict[tuple[str, tuple[str, ...]], list[Any]] = {}
        self._compiling = threading.Lock()
        self._records: dict[tuple[int, ...], Records] = {}

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
        return load_operator(__package__, OPERATORS, name)(info, self)

    def compile(self, file: str, expressions: tuple[str, ...]) -> list[int]:
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
        list of int
            The CUfunction of each.

        Raises
        ------
        CompileError
            With the compiler's log, or with why the result cannot be kept.
        NotSupportedError
            A stream is captured; compiling then is refused, since most captures forbid loading.
        """
        key = (file, expressions)
        with self._compiling:
            if key not in self._compiled:
                if self.captures():
                    rule = f"{NOT_CAPTURED}; call pagedcache.warmup() before the capture"
                    raise NotSupportedError(f"compilation of {file}", rule)
                with self.current("load"):
                    module = cupy.RawModule(
                        code=source.read(file), options=OPTIONS, name_expressions=expressions
                    )
                    try:
                        kernels = [module.get_function(name).kernel for name in expressions]
                    except OSError as error:
                        rule = (
                            "was compiled, but CuPy cannot keep it; set CUPY_CACHE_DIR to a folder "
                            f"that can be written and has room, or CUPY_CACHE_IN_MEMORY=1: {error}"
                        )
                        raise CompileError(file, rule) from error
                    except cupy.cuda.compiler.CompileException as error:
                        rule = f"does not compile for {self.describe()}:\n{error}"
                        raise CompileError(file, rule) from error
                self._compiled[key] = kernels
        return [kernel.ptr for kernel in self._compiled[key]]

    def stream(self, stream: Any) -> int:
        """Return the handle of a stream; ``None`` is CuPy's current one on this device."""
        if stream is None:
            return self.current_stream()
        if isinstance(stream, int):
            return stream
        if isinstance(stream, (cupy.cuda.Stream, cupy.cuda.ExternalStream)):
            if stream.device_id not in (-1, self.index):
                rule = f"must be a stream of {self.name}"
                raise BadParamError("stream", rule, f"one of cuda:{stream.device_id}")
            return int(stream.ptr)
        if hasattr(stream, "cuda_stream") and hasattr(stream, "device_index"):  # torch's
            if stream.device_index != self.index:
                rule = f"must be a stream of {self.name}"
                raise BadParamError("stream", rule, f"one of cuda:{stream.device_index}")
            return int(stream.cuda_stream)
        if hasattr(stream, "__cuda_stream__"):
            return int(stream.__cuda_stream__()[1])
        rule = "must be None, a cupy or torch stream, an int or have __cuda_stream__"
        raise BadParamTypeError("stream", rule, shown(stream))

    def captures(self) -> bool:
        """Tell whether a current stream is being captured."""
        streams = (self.current_stream(), *current_streams(self.index))
        return any(self.capturing(stream) for stream in streams)

    def capturing(self, stream: int) -> bool:
        """Tell whether a stream is being captured into a graph."""
        try:
            with cupy.cuda.Device(self.index):
                return bool(runtime.streamIsCapturing(stream))
        except runtime.CUDARuntimeError as error:
            if error.status in CAPTURE:
                return True  # the default stream cannot be asked while another is captured
            raise failure("call", self.index, error) from error
        except RuntimeError:  # what CuPy makes of a capture that is broken already
            return True

    def read(self, address: int, size: int, stream: int) -> Array:
        """Return a copy of device memory, as bytes, once all that is queued on `stream` is done.

        Raises
        ------
        LaunchError
            Something that was queued before failed.
        """
        data = np.empty(size, np.uint8)
        with self.current("read"):
            kind = runtime.memcpyDeviceToHost
            runtime.memcpyAsync(data.ctypes.data, address, size, kind, stream)
            runtime.streamSynchronize(stream)
        return data

    def wait(self, stream: int | None) -> None:
        """Wait for all that is queued on a stream; ``None``: on the whole device.

        Raises
        ------
        LaunchError
            Some of it failed.
        NotSupportedError
            The whole device is waited for while a stream is captured, which would end the capture.
        """
        if stream is None and self.captures():
            raise NotSupportedError(f"waiting for {self.name}", NOT_CAPTURED)
        with self.current("wait"):
            if stream is None:
                runtime.deviceSynchronize()
            else:
                runtime.streamSynchronize(stream)

    def record(self, empty: tuple[int, ...]) -> Record:
        """Return a new record that reads `empty` until something is added; see `Records.new`."""
        return self._records.setdefault(empty, Records(self, empty)).new()

    @contextlib.contextmanager
    def current(self, step: str) -> Iterator[None]:
        """Make this the current device, and name whose fault an error is."""
        try:
            with cupy.cuda.Device(self.index):
                yield
        except (driver.CUDADriverError, runtime.CUDARuntimeError) as error:
            raise failure(step, self.index, error) from error

    def prepare(self, function: int, rows: int, threads: int, words: Sequence[int]) -> Launch:
        """Return a `Launch` on this device of a function that `compile` returned."""
        return Launch(self.index, function, rows, threads, words, programmatic=self.programmatic)


def _can_be_programmatic() -> bool:
    if not switched_on("PAGEDCACHE_PDL", default=True):
        return False
    try:
        launch_extended()
    except (OSError, AttributeError):
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
