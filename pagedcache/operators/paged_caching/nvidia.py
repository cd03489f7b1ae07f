# SPDX-License-Identifier: Apache-2.0
"""The paged caching write on a GPU: access width, geometry, and the kernel's parameters.

The kernel is ``cuda_src/paged_caching.cuh``. Nothing here calls CUDA: all of that is done by the
device, so a test can bring one that runs the kernel on the host.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pagedcache.arrays.addresses import check_address
from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.parameters import MOST, divisor, structure
from pagedcache.backend.nvidia.plans import Grid, Plan, Planned
from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice, Limits
    from pagedcache.backend.nvidia.launch import Launch
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.backend.protocol import Implementation
    from pagedcache.operators.paged_caching.info import PagedCachingInfo

FILE = "paged_caching.cuh"
# Bytes that a thread moves at a time, and whether the kernel gets ahead.
INSTANCES = ((16, True), (16, False), (8, False), (4, False), (2, False))
TYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
SLOT_NAMES = {"int64": "long long", "int32": "int"}
# For a write with up to this many threads per multiprocessor: threads per block, and whether it
# gets ahead (see the kernel). A block that does may occupy a multiprocessor before those ahead of
# it are done, so blocks of large writes would not be distributed evenly. Measured on an H200.
STEPS = ((200, 64, True), (2048, 128, False))
LARGE = (256, True)  # the same two for any larger write
# Factor on the numbers of threads, by class of device. Every CUDA GPU so far is of class 1024; the
# others are guesses.
SCALES = {4096: 2, 1024: 1, 512: 0.5}
# A large write gives K and V separate threads if it has at most this many heads, moves 16 bytes at
# a time, and leaves no thread idle. Measured on an H200.
FEW_HEADS = 24
# Tokens in a tile, and bytes of a row that a warp writes well by itself. Measured on an H200.
TILE, WHOLE_ROW = 4, 256


def instance(dtype: str, slot_dtype: str, width: int, ahead: bool) -> str:
    """Return the C++ name of the kernel that moves `width` bytes a thread."""
    return (
        f"pagedcache::pagedCaching<pagedcache::{TYPE_NAMES[dtype]}, {SLOT_NAMES[slot_dtype]}, "
        f"{width}, {str(ahead).lower()}>"
    )


def implementation(
    info: PagedCachingInfo, device: CudaDevice, report: DeviceReport
) -> Implementation:
    """Return the copy, or the write that converts."""
    if info.copies:
        return PagedCaching(info, device, report)
    from pagedcache.operators.paged_caching.nvidia_formats import PagedStoring

    return PagedStoring(info, device, report)


class PagedCaching(Planned):
    """A compiled copy."""

    def __init__(self, info: PagedCachingInfo, device: CudaDevice, report: DeviceReport) -> None:
        if info.num_slots > MOST:
            rule = f"must have at most {MOST} slots on a GPU"
            raise NotSupportedError("k_cache", rule, info.num_slots)
        self._slot_size = info.slot_dtype.itemsize
        # All widths are one program, so a new shape never compiles. Addresses are known only at
        # each call, and some may need a narrower instance than the strides allow.
        possible = [each for each in INSTANCES if info.dtype.itemsize <= each[0]]
        names = tuple(instance(str(info.dtype), str(info.slot_dtype), *each) for each in possible)
        functions = dict(zip(possible, device.compile(FILE, names), strict=True))
        widest = _alignment(info)
        self._kernels = {
            width: _Kernel(info, width, functions, device)
            for width, ahead in possible
            if width <= widest and not ahead
        }
        self._widest = self._kernels[widest]
        self._mask, self._slot_mask = widest - 1, self._slot_size - 1
        self._report_to(report)

    def _report_to(self, report: DeviceReport) -> None:
        super()._report_to(report)
        self._plans: dict[int, Plan] = {}  # of the widest kernel, by number of tokens

    def run(
        self,
        tokens: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slots: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        """Queue the write of this many tokens. There are no scales."""
        plan = self._plans.get(tokens)
        misaligned = (k_cache | v_cache | k | v) & self._mask or slots & self._slot_mask
        if plan is None or misaligned:
            kernel = self._kernel_for((k_cache, v_cache, k, v, slots))
            if tokens > kernel.most_rows:
                self._run_in_parts(kernel, tokens, k_cache, v_cache, k, v, slots, stream)
                return
            plan = self._plan(kernel, tokens, self._plans if kernel is self._widest else None)
        launches, prepare, blocks = plan
        # pop and append of a list are atomic, so no two threads get the same launch.
        try:
            launch = launches.pop()
        except IndexError:
            launch = prepare()
        launch.pack(k, v, slots, tokens, k_cache, v_cache)
        launch.run(blocks, stream)
        launches.append(launch)
        if stream not in self._streams:
            self._report.note(stream)

    @staticmethod
    def _pack(launch: Launch, rows: int, addresses: tuple[int, ...]) -> None:
        k_cache, v_cache, k, v, slots, *_ = addresses
        launch.pack(k, v, slots, rows, k_cache, v_cache)

    def _kernel_for(self, addresses: tuple[int, ...]) -> _Kernel:
        """Return the kernel with the widest access that these addresses allow."""
        *rows, slots = addresses[:5]
        for name, address in zip(("k_cache", "v_cache", "k", "v"), rows, strict=True):
            check_address(name, address, min(self._kernels))
        check_address("slot_mapping", slots, self._slot_size)
        shared = functools.reduce(operator.or_, rows, self._mask + 1)
        # The lowest bit that is set is the alignment that all four addresses share.
        return self._kernels[shared & -shared]

    def _run_in_parts(
        self,
        kernel: _Kernel,
        tokens: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slots: int,
        stream: int,
    ) -> None:
        """Make several launches for a write of more vectors than one kernel can count."""
        for done in range(0, tokens, kernel.most_rows):
            part = min(tokens - done, kernel.most_rows)
            grid = kernel.grid(part)
            k_at, v_at = k + done * kernel.k_token_stride, v + done * kernel.v_token_stride
            launch = grid.prepare(self._report.address, done)
            slots_at = slots + done * self._slot_size
            launch.pack(k_at, v_at, slots_at, part, k_cache, v_cache)
            launch.run(grid.blocks(part), stream)
            self._report.note(stream)


class _Kernel:
    """One compiled instance, with what stays the same from call to call."""

    def __init__(
        self,
        info: PagedCachingInfo,
        width: int,
        functions: Mapping[tuple[int, bool], int],
        device: CudaDevice,
    ) -> None:
        limits: Limits = device.limits
        size = info.dtype.itemsize
        k_per_row, v_per_row = info.head_size * size // width, info.v_head_size * size // width
        per_row = max(k_per_row, v_per_row)
        per_token = info.num_kv_heads * per_row
        scale = SCALES[limits.thread_class]
        fewest, largest = int(STEPS[0][1] * scale), int(LARGE[0] * scale)
        # Indices stay below `MOST`, even if the last tile and the last block are not full.
        most = min(MOST - largest, limits.max_grid_x * fewest) // per_token
        self.most_rows = most // TILE * TILE or most
        if not most:
            rule = f"must have at most {MOST * width} bytes of K or V in a token"
            raise NotSupportedError("k_cache", rule, per_token * width)
        self.k_token_stride = info.k_token_stride * size
        self.v_token_stride = info.v_token_stride * size

        def grid(threads: int, ahead: bool, tile: int, rows: int = 1) -> Grid:
            threads = int(threads * scale)
            function = functions.get((width, ahead), functions[width, False])
            prepare = functools.partial(device.prepare, function, rows, threads)
            parameters = _parameters(info, width, tile)
            return Grid(rows, threads, tile, per_token * tile, prepare, parameters)

        tile = tile_of(info) if most >= TILE else 1
        on_each = limits.multiprocessors * scale / per_token
        # A tile that is not full would cost the smallest writes more than it saves.
        self._steps = [
            (threads_on_each * on_each, grid(threads, ahead, tile if i else 1))
            for i, (threads_on_each, threads, ahead) in enumerate(STEPS)
        ]
        apart = width == 16 and k_per_row == v_per_row and info.num_kv_heads <= FEW_HEADS
        self._large = grid(*LARGE, tile, rows=2 if apart else 1)

    def grid(self, rows: int) -> Grid:
        """Return the grid for a write of this many tokens."""
        for most, grid in self._steps:
            if rows <= most:
                return grid
        return self._large


def _parameters(info: PagedCachingInfo, width: int, tile: int) -> ctypes.Structure:
    """Return ``struct PagedCachingParameters`` without what changes from call to call."""
    struct = functools.partial(structure, source.read(FILE))
    by = functools.partial(divisor, struct("Divisor"))
    size = info.dtype.itemsize

    def bytes_of(letter: str, *names: str) -> list[int]:
        return [getattr(info, f"{letter}_{name}_stride") * size for name in names]

    def source_rows(letter: str) -> Any:
        return struct("TokenRows")(*bytes_of(letter, "token", "head"))

    def cache_rows(letter: str) -> Any:
        block, slot, head = bytes_of(letter, "cache_block", "cache_slot", "cache_head")
        return struct("CacheRows")(slot, block - info.block_size * slot, head)

    k_vectors, v_vectors = (row * size // width for row in (info.head_size, info.v_head_size))
    tile_rows = tile * info.num_kv_heads
    return struct("PagedCachingParameters")(
        vectors_per_row=by(max(k_vectors, v_vectors)),
        rows_per_tile=by(tile_rows),
        tile_rows=tile_rows,
        tile_shift=tile.bit_length() - 1,
        k_vectors=k_vectors,
        v_vectors=v_vectors,
        k_source=source_rows("k"),
        v_source=source_rows("v"),
        block_size=by(info.block_size),
        num_slots=info.num_slots,
        k_to=cache_rows("k"),
        v_to=cache_rows("v"),
    )


def tile_of(info: PagedCachingInfo) -> int:
    """Return for how many tokens the rows of one head are written before those of the next head.

    Where the rows of neighbouring slots are contiguous in the cache, neighbouring threads then
    write neighbouring bytes, as they do token by token where the rows of all heads are contiguous.
    """
    row = math.gcd(info.head_size, info.v_head_size) * info.dtype.itemsize
    beside = info.k_cache_slot_stride < info.k_cache_head_stride
    return TILE if beside and row % WHOLE_ROW else 1


def _alignment(info: PagedCachingInfo) -> int:
    """Return the widest access that every stride and row length allows."""
    elements = 16 // info.dtype.itemsize
    for length in (
        info.head_size,
        info.v_head_size,
        info.k_token_stride,
        info.k_head_stride,
        info.v_token_stride,
        info.v_head_stride,
        info.k_cache_block_stride,
        info.k_cache_head_stride,
        info.k_cache_slot_stride,
        info.v_cache_block_stride,
        info.v_cache_head_stride,
        info.v_cache_slot_stride,
    ):
        while length % elements:
            elements //= 2
    return elements * info.dtype.itemsize
