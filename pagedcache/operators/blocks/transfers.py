# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks between a GPU and pinned host memory, or between two GPUs."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cupy
import numpy as np
from cupy.cuda import driver, runtime

from pagedcache.backend.nvidia.context import failure
from pagedcache.backend.nvidia.driver import library, relaxed_capture_mode
from pagedcache.locks import make_lock
from pagedcache.operators.blocks.arrays import make_arrays
from pagedcache.operators.blocks.nvidia import BlockCopy
from pagedcache.operators.blocks.pairs import OnDevice
from pagedcache.status import BadParamError, NotSupportedError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.operators.blocks.arrays import BlockArrays
    from pagedcache.tensors import Array

HOST_WARPS = 1024  # enough to keep the bus busy, and few enough to leave room for a model
MEASURED = 1 << 24  # bytes of each copy that is measured
SIZES = tuple(1 << power for power in range(11, 19))  # of a run, in bytes
_LEGACY = (0, 1)  # cudaStreamLegacy, under both of its names
_PEER_ACCESS_ALREADY_ENABLED = 704
_STREAM_ORDER = 1  # CU_MEMCPY_SRC_ACCESS_ORDER_STREAM


class Runs:
    """The contiguous pieces of memory that a copy of blocks consists of.

    Parameters
    ----------
    table : BlockArrays
        Without axes within a block.
    pairs : numpy.ndarray
        ``[n, 2]``, int64. Neighbours in both are joined where blocks are contiguous.
    """

    def __init__(self, table: BlockArrays, pairs: Array) -> None:
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        breaks = np.flatnonzero((np.diff(pairs, axis=0) != 1).any(1)) + 1
        first = pairs[np.concatenate([[0], breaks])]
        lengths = np.diff(np.concatenate([[0], breaks, [len(pairs)]]))
        parts = []
        for array in table.arrays:
            which, count = (first, lengths) if array.contiguous else (pairs, 1)
            sides = (array.source, array.target)
            at = [side.address + which[:, i] * side.strides[0] for i, side in enumerate(sides)]
            size = np.broadcast_to(np.int64(count) * array.block_bytes, len(which))
            parts.append((*at, size))
        self.sources, self.targets, self.sizes = (
            np.ascontiguousarray(np.concatenate(each)) for each in zip(*parts, strict=True)
        )

    @property
    def mean_bytes(self) -> float:
        """Bytes of one piece, on average."""
        return float(self.sizes.mean())


class HostCopy:
    """A copy between a GPU and pinned host memory: a kernel, or the copy engines."""

    def __init__(self, table: BlockArrays, device: CudaDevice, report: DeviceReport) -> None:
        self._table, self._device = table, device
        self._to_host = table.target_device == "cpu"
        self._kernel = BlockCopy(table, device, report, _mapped(table, device), HOST_WARPS)
        self._engines = Engines(device)

    def copy(self, pairs: Array | OnDevice, stream: int) -> None:
        """Queue the copy of pairs; those on the host have been checked."""
        if isinstance(pairs, OnDevice) or not len(pairs) or self._device.capturing(stream):
            self._kernel.copy(pairs, stream)
            return
        worth = worth_engines(self._device, to_host=self._to_host)
        if worth < math.inf and not any(array.axes for array in self._table.arrays):
            runs = Runs(self._table, pairs)
            if runs.mean_bytes >= worth:
                self._engines.copy(runs, stream)
                return
        self._kernel.copy(pairs, stream)

    def zero(self, blocks: Array | OnDevice, stream: int) -> None:
        """Queue filling blocks of the targets with zeros."""
        self._kernel.zero(blocks, stream)


class PeerCopy:
    """A copy between two GPUs: a kernel if one can reach the other's memory, else copies."""

    def __init__(self, table: BlockArrays, device: CudaDevice, report: DeviceReport) -> None:
        self._table, self._device = table, device
        indices = (
            int(each.partition(":")[2]) for each in (table.source_device, table.target_device)
        )
        [other] = (index for index in indices if index != device.index)
        self._kernel = None
        if _reaches(device, other):
            self._kernel = BlockCopy(table, device, report)
        elif any(array.axes for array in table.arrays):
            rule = (
                f"must be contiguous, because cuda:{device.index} cannot reach the memory of "
                f"cuda:{other}"
            )
            raise NotSupportedError("blocks", rule)
        self._engines = Engines(device)

    def copy(self, pairs: Array | OnDevice, stream: int) -> None:
        """Queue the copy of pairs; those on the host have been checked."""
        if self._kernel is not None:
            self._kernel.copy(pairs, stream)
        elif isinstance(pairs, OnDevice):
            rule = "must be on the host, because neither GPU can reach the memory of the other"
            raise NotSupportedError("pairs", rule)
        elif len(pairs):
            self._engines.copy(Runs(self._table, pairs), stream)

    def zero(self, blocks: Array | OnDevice, stream: int) -> None:
        """Raise: a fill names one list of arrays, which is on one GPU."""
        rule = "is not possible for a copy between two GPUs; create a descriptor for the targets"
        raise NotSupportedError("filling blocks", rule)


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes of cuda.h: an order of access, two hints of a location, and flags."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", ctypes.c_int * 2),
        ("target", ctypes.c_int * 2),
        ("flags", ctypes.c_uint),
    )


class Engines:
    """Copies of many pieces of memory by the copy engines of a GPU.

    One call of ``cuMemcpyBatchAsync`` where the driver has it, else one for each piece. Under that
    name, drivers of CUDA 13 too have the function of CUDA 12.8.
    """

    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._batch: Any = getattr(library(), "cuMemcpyBatchAsync", None)
        self._attributes = _Attributes(_STREAM_ORDER)
        self._beside: Any = None

    def copy(self, runs: Runs, stream: int) -> None:
        """Queue the copies on a stream."""
        with self._device.current("copying blocks"):
            if self._batch is None:
                for target, source, size in zip(
                    runs.targets.tolist(), runs.sources.tolist(), runs.sizes.tolist(), strict=True
                ):
                    runtime.memcpyAsync(target, source, size, runtime.memcpyDefault, stream)
            elif stream in _LEGACY:
                self._queue_beside(runs, stream)
            else:
                self._queue(runs, stream)

    def _queue_beside(self, runs: Runs, stream: int) -> None:
        """Queue on a stream that waits for this one, and is waited for: no batch may go on it."""
        if self._beside is None:
            self._beside = cupy.cuda.Stream(non_blocking=True)
        before, after = (cupy.cuda.Event(disable_timing=True) for _ in range(2))
        runtime.eventRecord(before.ptr, stream)
        runtime.streamWaitEvent(self._beside.ptr, before.ptr)
        self._queue(runs, self._beside.ptr)
        runtime.eventRecord(after.ptr, self._beside.ptr)
        runtime.streamWaitEvent(stream, after.ptr)

    def _queue(self, runs: Runs, stream: int) -> None:
        zero, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
        pointers = (
            ctypes.c_void_p(each.ctypes.data) for each in (runs.targets, runs.sources, runs.sizes)
        )
        status = self._batch(
            *pointers,
            ctypes.c_size_t(len(runs.sizes)),
            ctypes.byref(self._attributes),
            ctypes.byref(zero),
            ctypes.c_size_t(1),
            ctypes.byref(failed),
            ctypes.c_void_p(stream),
        )
        if status:
            error = driver.CUDADriverError(status)
            raise failure("copying blocks", self._device.name, error) from error


def _mapped(table: BlockArrays, device: CudaDevice) -> list[tuple[int, int]]:
    """Return where a GPU sees each source and target.

    Raises
    ------
    BadParamError
        An array on the host is not pinned.
    """
    found = []
    for i, array in enumerate(table.arrays):
        sides = []
        for name, tensor in (("sources", array.source), ("targets", array.target)):
            address = tensor.address
            if tensor.device == "cpu":
                with device.current("asking for the address of host memory"):
                    address = int(runtime.pointerGetAttributes(address).devicePointer)
                if not address:
                    rule = (
                        "must be pinned memory (cupyx.empty_pinned, or pin_memory in PyTorch), or "
                        "on the CPU on both sides"
                    )
                    raise BadParamError(f"{name}[{i}]", rule, "an array in pageable memory")
            sides.append(address)
        found.append((sides[0], sides[1]))
    return found


def _reaches(device: CudaDevice, other: int) -> bool:
    """Return whether kernels on a GPU can reach the memory of another, and let them."""
    with device.current("asking whether a GPU can reach another"):
        if not runtime.deviceCanAccessPeer(device.index, other):
            return False
        try:
            runtime.deviceEnablePeerAccess(other)
        except runtime.CUDARuntimeError as error:
            if error.status != _PEER_ACCESS_ALREADY_ENABLED:
                raise
        return True


_worth: dict[tuple[int, bool], float] = {}
_measuring = make_lock()


def worth_engines(device: CudaDevice, *, to_host: bool) -> float:
    """Return the length of runs, in bytes, from which the copy engines are faster than a kernel.

    It is measured when it is first asked for, which took 0.01 s where the bus is fast.
    """
    key = device.index, to_host
    if key not in _worth:
        with _measuring:
            if key not in _worth:
                _worth[key] = _measure(device, to_host=to_host)
    return _worth[key]


def _measure(device: CudaDevice, *, to_host: bool) -> float:
    with device.current("measuring copies"), relaxed_capture_mode():
        held = cupy.cuda.alloc_pinned_memory(MEASURED)
        on_host: Any = np.frombuffer(held, np.uint8, MEASURED)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            on_device = cupy.empty(MEASURED, np.uint8)
        engines = Engines(device)
        worth = math.inf
        for size in reversed(SIZES):
            shape = (MEASURED // size, size)
            source, target = on_device.reshape(shape), on_host.reshape(shape)
            if not to_host:
                source, target = target, source
            table = make_arrays([source], [target])
            kernel = BlockCopy(
                table, device, device.report(read=False), _mapped(table, device), HOST_WARPS
            )
            count = shape[0]
            # No two are neighbours, so none are joined.
            pairs = np.stack([np.arange(count), np.arange(count)[::-1]], 1)
            by_kernel = _seconds(functools.partial(kernel.copy, pairs), stream)
            by_engines = _seconds(functools.partial(engines.copy, Runs(table, pairs)), stream)
            if by_engines > by_kernel:
                break
            worth = size
    return worth


def _seconds(run: Callable[[int], None], stream: Any) -> float:
    """Return the least of three times that a copy took, with what it takes to queue it."""
    times = []
    for _ in range(3):
        before, after = cupy.cuda.Event(), cupy.cuda.Event()
        before.record(stream)
        run(stream.ptr)
        after.record(stream)
        after.synchronize()
        times.append(float(cupy.cuda.get_elapsed_time(before, after)))
    return min(times)
