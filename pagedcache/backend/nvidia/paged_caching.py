"""The paged caching write on a GPU: access width, geometry, and the kernel's parameters.

The kernel is ``cuda_src/paged_caching.cuh``. What is here touches no CUDA itself; all of it goes
through the device that it is given, so a test can give it one that runs the kernel on the host.
"""

from __future__ import annotations

import functools
import math
import struct
import threading
from typing import TYPE_CHECKING, Any

from pagedcache.backend.protocol import LaunchConfig
from pagedcache.info import InvalidSlots
from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice, Limits
    from pagedcache.backend.nvidia.launch import Launch
    from pagedcache.backend.protocol import Writer
    from pagedcache.info import PagedCachingInfo

FILE = "paged_caching.cuh"
WIDTHS = (16, 8, 4, 2)
TYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
SLOT_NAMES = {"int64": "long long", "int32": "int"}
# Threads in a block, for each class of device: of a write that does not fill the device, and of one
# that does. Class 1024 was measured, on an H200; every CUDA GPU so far is of that class, and the
# numbers of the others are guesses.
THREADS = {4096: (128, 512), 1024: (64, 256), 512: (32, 128)}
# A write of so many full blocks for each multiprocessor has threads for K and others for V, if it
# has at most so many heads, moves 16 bytes at a time, and none would be idle. Measured, on an H200.
MANY_BLOCKS, FEW_HEADS = 7, 24
# Tokens in a tile, and bytes of a row that a warp writes well by itself. Measured, on an H200.
TILE, WHOLE_ROW = 4, 256
MOST = 2**31  # what struct Divisor divides exactly

# struct PagedCachingParameters is a row of 8-byte words: first those of a launch ...
_LAUNCH_WORDS = 7  # k_cache, v_cache, k, v, slot_mapping, tokens, first_token
_pack_call = struct.Struct(f"={_LAUNCH_WORDS}Q").pack_into
# ... then those of the descriptor, in the order of `_Kernel.words`.

EMPTY = (0, 0, 2**63 - 1, 0)  # struct InvalidSlots of the kernel: count, lock, token, slot


def instance(dtype: str, slot_dtype: str, width: int) -> str:
    """Return the C++ name of the kernel that moves `width` bytes a thread."""
    return (
        f"pagedcache::pagedCaching<pagedcache::{TYPE_NAMES[dtype]}, {SLOT_NAMES[slot_dtype]}, "
        f"{width}>"
    )


class PagedCaching:
    """A compiled write. Threads may share it: each call has a launch to itself."""

    workspace_size = 0

    def __init__(self, info: PagedCachingInfo, device: CudaDevice) -> None:
        if info.num_slots > MOST:
            rule = f"must have at most {MOST} slots on a GPU"
            raise NotSupportedError("k_cache", rule, info.num_slots)
        self._device = device
        self._slot_size = info.slot_dtype.itemsize
        # All widths are one program: a new shape never compiles. Addresses are known only at each
        # call, so a narrower instance than the strides allow may be needed for some.
        possible = [width for width in WIDTHS if info.dtype.itemsize <= width]
        names = tuple(instance(str(info.dtype), str(info.slot_dtype), width) for width in possible)
        functions = dict(zip(possible, device.compile(FILE, names), strict=True))
        self._invalid = device.record(EMPTY)
        self._telling = threading.Lock()
        widest = _alignment(info)
        self._kernels = {
            width: _Kernel(info, width, function, device.limits, self._invalid.address)
            for width, function in functions.items()
            if width <= widest
        }
        self._widest = self._kernels[widest]

    def launch_config(self, num_tokens: int) -> LaunchConfig:
        """Return the launch for `num_tokens` tokens whose addresses allow the widest access."""
        tokens = min(num_tokens, self._widest.most_tokens)
        grid = self._widest.grid(tokens)
        blocks = grid.blocks(tokens)
        return LaunchConfig((max(blocks, 1), grid.rows, 1), (grid.threads, 1, 1))

    def writer(self, num_tokens: int) -> Writer:
        """Return a function that queues a write of `num_tokens` tokens."""
        return self._writer(self._widest, num_tokens, 0)

    def _writer(self, kernel: _Kernel, num_tokens: int, first_token: int) -> Writer:
        if num_tokens > kernel.most_tokens:
            return functools.partial(self._write_in_parts, kernel, num_tokens, first_token)
        device, current_stream = self._device, self._device.current_stream
        grid = kernel.grid(num_tokens)
        launches, blocks, mask = grid.launches, grid.blocks(num_tokens), kernel.width - 1

        def write(
            k_cache: int, v_cache: int, k: int, v: int, slots: int, workspace: int, stream: Any
        ) -> None:
            if stream is None:
                stream = current_stream()
            elif type(stream) is not int:
                stream = device.stream(stream)
            if misaligned := (k_cache | v_cache | k | v) & mask:
                # The lowest bit that is set is the alignment that all four addresses share.
                narrower = self._kernels[misaligned & -misaligned]
                again = self._writer(narrower, num_tokens, first_token)
                again(k_cache, v_cache, k, v, slots, workspace, stream)
                return
            # Taking from and giving to a list is atomic, so no two threads hold one launch.
            try:
                launch = launches.pop()
            except IndexError:
                launch = device.prepare(kernel.function, grid.rows, grid.threads, grid.words)
            _pack_call(launch.words, 0, k_cache, v_cache, k, v, slots, num_tokens, first_token)
            launch.run(blocks, stream)
            launches.append(launch)

        return write

    def _write_in_parts(
        self,
        kernel: _Kernel,
        num_tokens: int,
        first_token: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slots: int,
        workspace: int,
        stream: Any,
    ) -> None:
        """Make several launches, where there are more vectors than the kernel counts."""
        for done in range(0, num_tokens, kernel.most_tokens):
            tokens = min(num_tokens - done, kernel.most_tokens)
            k_at, v_at = k + done * kernel.k_token_stride, v + done * kernel.v_token_stride
            slots_at = slots + done * self._slot_size
            write = self._writer(kernel, tokens, first_token + done)
            write(k_cache, v_cache, k_at, v_at, slots_at, workspace, stream)

    def invalid_slots(self, stream: int | None) -> InvalidSlots | None:
        """Wait for a stream, or for the whole device, and return what is known of invalid slots.

        Of all writes that are done since this was last called; it is forgotten then.
        """
        self._device.wait(stream)
        with self._telling:
            count, _, token, slot = self._invalid.read()
            # One without the other is from a kernel that runs only now, and is told next time.
            if count == 0 or token == EMPTY[2]:
                return None
            self._invalid.clear()
        return InvalidSlots(count, token, slot)


class _Kernel:
    """One compiled instance with what stays the same from call to call."""

    def __init__(
        self, info: PagedCachingInfo, width: int, function: int, limits: Limits, invalid: int
    ) -> None:
        size = info.dtype.itemsize
        k_per_row, v_per_row = info.head_size * size // width, info.v_head_size * size // width
        per_row = max(k_per_row, v_per_row)
        per_token = info.num_kv_heads * per_row
        few_threads, many_threads = THREADS[limits.thread_class]
        # Indices are below `MOST` also where the last tile and the last block are not full.
        most = min(MOST - many_threads, limits.max_grid_x * few_threads) // per_token
        self.most_tokens = most // TILE * TILE or most
        if not most:
            rule = f"must have at most {MOST * width} bytes of K or V in a token"
            raise NotSupportedError("k_cache", rule, per_token * width)
        self.function = function
        self.width = width
        threads = limits.multiprocessors * many_threads
        apart = width == 16 and k_per_row == v_per_row and info.num_kv_heads <= FEW_HEADS
        self._few_tokens = threads // per_token
        self._many_tokens = MANY_BLOCKS * threads // per_token if apart else self.most_tokens
        self.k_token_stride = info.k_token_stride * size
        self.v_token_stride = info.v_token_stride * size

        def words(tile: int) -> list[int]:
            return [
                *(0,) * _LAUNCH_WORDS,
                invalid,
                info.num_slots,
                *_divisor(info.block_size),
                *_divisor(per_row),
                *_divisor(tile * info.num_kv_heads),
                tile.bit_length() - 1,
                self.k_token_stride,
                info.k_head_stride * size,
                info.k_cache_slot_stride * size,
                (info.k_cache_block_stride - info.block_size * info.k_cache_slot_stride) * size,
                info.k_cache_head_stride * size,
                k_per_row,
                self.v_token_stride,
                info.v_head_stride * size,
                info.v_cache_slot_stride * size,
                (info.v_cache_block_stride - info.block_size * info.v_cache_slot_stride) * size,
                info.v_cache_head_stride * size,
                v_per_row,
            ]

        tile = tile_of(info) if most >= TILE else 1
        self._small = _Grid(1, few_threads, 1, per_token, words(1))
        self._large = _Grid(1, many_threads, tile, per_token, words(tile))
        self._apart = _Grid(2, many_threads, tile, per_token, words(tile))

    def grid(self, tokens: int) -> _Grid:
        """Return the one for a write of so many tokens."""
        if tokens <= self._few_tokens:
            return self._small
        return self._apart if tokens > self._many_tokens else self._large


class _Grid:
    """How the vectors of a write are dealt to threads, and launches that are ready to do so."""

    def __init__(
        self, rows: int, threads: int, tile: int, per_token: int, words: list[int]
    ) -> None:
        self.rows = rows  # of blocks: one for K and V, or one for each
        self.threads = threads
        self._tile = tile
        self._per_tile = per_token * tile
        self.words = words
        self.launches: list[Launch] = []

    def blocks(self, tokens: int) -> int:
        """Return how many blocks of a row hold a thread for each vector of all tiles."""
        return -(-(-(-tokens // self._tile) * self._per_tile) // self.threads)


def tile_of(info: PagedCachingInfo) -> int:
    """Return the tokens whose rows of one head are written before those of the next head.

    Where the cache has the rows of neighbouring slots side by side, neighbouring threads then write
    neighbouring bytes, as they do token by token where it has those of all heads side by side.
    """
    row = math.gcd(info.head_size, info.v_head_size) * info.dtype.itemsize
    beside = info.k_cache_slot_stride < info.k_cache_head_stride
    return TILE if beside and row % WHOLE_ROW else 1


def _divisor(value: int) -> tuple[int, int]:
    """Return struct Divisor of the kernel as words; it divides what is below 2^31 exactly."""
    shift = 31 + (value - 1).bit_length()
    return value | ((1 << shift) // value + 1) << 32, shift


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
