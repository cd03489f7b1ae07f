# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks on a GPU. The kernel is ``cuda_src/block_copy.cuh``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.context import NOT_CAPTURED
from pagedcache.backend.nvidia.parameters import structure
from pagedcache.operators.blocks.pairs import OnDevice, in_order
from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.launch import Launch
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.operators.blocks.arrays import BlockArray, BlockArrays
    from pagedcache.operators.blocks.transfers import HostCopy, PeerCopy
    from pagedcache.tensors import Array

FILE = "block_copy.cuh"
THREADS = 256
LANES, VECTORS = 32, 4  # of a warp, and of a lane of it in one tile
MOST_AXES, MOST_VECTORS = 3, 1 << 31  # in struct BlockArray
INLINE = 3588  # bytes of pairs that fit in a kernel's parameters
WARPS = 256  # on each multiprocessor; measured on an H200 (notes/blocks.md)
MOST_WARPS = 1 << 30
INDEX = {4: "int", 8: "long long"}
KINDS = ("kOrdered", "kApart", "kWithin", "kZeroed")  # enum Pairs of the kernel


Kernel = tuple[list["Launch"], Callable[[], "Launch"]]
"""Launches that are ready, and a function that prepares one more."""


def instance(kind: str, index: str) -> str:
    """Return the C++ name of the kernel for a list of some kind, of ints of some kind."""
    # By number, since hipRTC 5.2 does not find a kernel by the name of an enumerator.
    return f"pagedcache::blockCopy<{KINDS.index(kind)}, {index}>"


class BlockCopy:
    """A compiled copy between arrays that one GPU can reach.

    Parameters
    ----------
    table : BlockArrays
    device : CudaDevice
    report : DeviceReport
    addresses : sequence of (int, int), optional
        Where the device sees each source and target. By default, where they are.
    warps : int, optional
        How many should share a call.
    """

    def __init__(
        self,
        table: BlockArrays,
        device: CudaDevice,
        report: DeviceReport,
        addresses: Sequence[tuple[int, int]] | None = None,
        warps: int | None = None,
    ) -> None:
        self._table, self._device, self._report = table, device, report
        self._warps = warps or WARPS * device.limits.multiprocessors
        if addresses is None:
            addresses = [(each.source.address, each.target.address) for each in table.arrays]
        entries, self._tiles = _entries(table.arrays, addresses)
        self._arrays = device.resident(entries)
        self._parameters = structure(source.read(FILE), "BlockCopyParameters")
        self._kernels: dict[tuple[str, int], Kernel] = {}
        for kind in ("kOrdered", "kZeroed"):  # the others are compiled when they are used
            self._kernel(kind, 4)

    def _kernel(self, kind: str, size: int) -> Kernel:
        """Return the kernel for a list of some kind, with ints of this size."""
        found = self._kernels.get((kind, size))
        if found is None:
            [function] = self._device.compile(FILE, (instance(kind, INDEX[size]),))
            prepare = functools.partial(
                self._device.prepare, function, 1, THREADS, self._parameters()
            )
            found = self._kernels.setdefault((kind, size), ([], prepare))
        return found

    def copy(self, pairs: Array | OnDevice, stream: int) -> None:
        """Queue the copy of pairs; those on the host have been checked."""
        if isinstance(pairs, OnDevice):
            tensor = pairs.tensor
            kind = "kWithin" if self._table.within else "kApart"
            kernel = self._kernel(kind, tensor.dtype.itemsize)
            self._queue(kernel, tensor.address, b"", tensor.shape[0], stream)
            return
        chained = False
        if self._table.within:
            pairs, chained = in_order(pairs, self._table.in_target)
        self._queue_list(self._kernel("kOrdered", 4), pairs, stream, chained=chained)

    def zero(self, blocks: Array | OnDevice, stream: int) -> None:
        """Queue filling blocks with zeros; those on the host have been checked."""
        if isinstance(blocks, OnDevice):
            tensor = blocks.tensor
            kernel = self._kernel("kZeroed", tensor.dtype.itemsize)
            self._queue(kernel, tensor.address, b"", tensor.shape[0], stream)
        else:
            self._queue_list(self._kernel("kZeroed", 4), blocks, stream)

    def _queue_list(
        self, kernel: Kernel, numbers: Array, stream: int, *, chained: bool = False
    ) -> None:
        listed = numbers.astype(np.int32)
        count = len(listed)
        if listed.nbytes <= INLINE:
            self._queue(kernel, 0, listed.tobytes(), count, stream, chained=chained)
            return
        device = self._device
        if device.capturing(stream):
            most = INLINE // listed[0].nbytes
            rule = (
                f"{NOT_CAPTURED} if more than {most} of them are on the host; put them on the GPU"
            )
            raise NotSupportedError("copying or filling blocks", rule)
        with device.uploaded(listed, stream) as address:
            self._queue(kernel, address, b"", count, stream, chained=chained)

    def _queue(
        self,
        kernel: Kernel,
        pairs: int,
        inline: bytes,
        count: int,
        stream: int,
        *,
        chained: bool = False,
    ) -> None:
        if not count:
            return
        table, tiles = self._table, self._tiles
        # Each part of a chain is copied by one block of threads from its beginning to its end.
        wanted = MOST_WARPS if chained else self._warps
        per_part = max(count * tiles // wanted, 1) * (THREADS // LANES)
        ready, prepare = kernel
        # pop and append of a list are atomic, so no two threads get the same launch.
        try:
            launch = ready.pop()
        except IndexError:
            launch = prepare()
        launch.pack(
            pairs,
            count,
            table.in_target,
            table.in_source,
            self._arrays,
            self._report.address,
            len(table.arrays),
            tiles,
            per_part,
            inline,
        )
        launch.run(count * -(-tiles // per_part), stream)  # blocks of threads share a pair
        ready.append(launch)
        if stream not in self._report.streams:
            self._report.note(stream)


def _entries(
    arrays: Sequence[BlockArray], addresses: Sequence[tuple[int, int]]
) -> tuple[bytes, int]:
    """Return ``struct BlockArray`` of each array, and the number of tiles in a block of all."""
    kind: Any = structure(source.read(FILE), "BlockArray")
    axis = functools.partial(structure(source.read(FILE), "BlockAxis"))
    made, tiles = [], 0
    for i, (array, (from_address, to_address)) in enumerate(zip(arrays, addresses, strict=True)):
        if len(array.axes) > MOST_AXES:
            rule = f"must have at most {MOST_AXES} axes in a block that cannot be merged, on a GPU"
            strides = f"{array.source.strides} and {array.target.strides} bytes"
            raise NotSupportedError(f"sources[{i}] and targets[{i}]", rule, strides)
        width = array.width
        while (from_address | to_address) % width:
            width //= 2
        axes = [axis(step, to_step, length) for length, step, to_step in array.axes]
        axes = [axis(0, 0, 1)] * (MOST_AXES - len(axes)) + axes
        vectors = array.block_bytes // width
        if vectors >= MOST_VECTORS:
            rule = f"must have fewer than {MOST_VECTORS * width} bytes in a block on a GPU"
            raise NotSupportedError(f"sources[{i}]", rule, array.block_bytes)
        made.append(
            bytes(
                kind(
                    from_address,
                    to_address,
                    array.source.strides[0],
                    array.target.strides[0],
                    tiles,
                    vectors,
                    array.row // width,
                    width,
                    *axes,
                )
            )
        )
        tiles += -(-vectors // (LANES * VECTORS))
    return b"".join(made), tiles


def make_copy(
    table: BlockArrays, device: CudaDevice, report: DeviceReport
) -> BlockCopy | HostCopy | PeerCopy:
    """Return the kernel, or what chooses between it and the copy engines."""
    if table.source_device == table.target_device:
        return BlockCopy(table, device, report)
    if device.kind != "cuda":
        rule = "are not implemented on AMD's GPUs"
        raise NotSupportedError("copies of blocks to other memory", rule)
    from pagedcache.operators.blocks.transfers import HostCopy, PeerCopy

    on_host = "cpu" in (table.source_device, table.target_device)
    return (HostCopy if on_host else PeerCopy)(table, device, report)
