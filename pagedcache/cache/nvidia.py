# SPDX-License-Identifier: Apache-2.0
"""Rows of a paged cache on a GPU: elements of a thread, and the structs of ``rows.cuh``.

For any operator that moves rows between tokens and slots and converts them on the way. Nothing here
calls CUDA: all of that is done by the device, so a test can bring one that runs the kernels on the
host.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pagedcache.arrays.addresses import check_address
from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.parameters import MOST, divisor, structure
from pagedcache.backend.nvidia.plans import Grid, Plan, Planned
from pagedcache.cache.formats import CUDA_NAMES
from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice, Limits
    from pagedcache.backend.nvidia.launch import Launch
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.cache.sides import Side
    from pagedcache.dtypes import Dtype

SLOT_NAMES = {"int64": "long long", "int32": "int"}
# As in rows.cuh.
COPIED, CONVERTED, SCALED, SCALED_ELEMENTS, COMPUTED, COMPUTED_POWER, QUANTIZED = range(7)
MOST_ROW = 2**31 - 1  # bytes of a row by token, which the kernels count in 32 bits
MOST_ELEMENTS = 32
MOST_BYTES = 64  # of a thread's elements by token
WIDEST = 16  # of one access
NARROWER = (4, 1)  # elements, for addresses that do not allow what strides do
MOST_LANES = 32
# Factor on the numbers of threads, by class of device. Every CUDA GPU so far is of class 1024; the
# others are guesses.
THREAD_FACTORS = {4096: 2, 1024: 1, 512: 0.5}
# Tokens in a tile, and bytes of a row that a warp accesses well by itself.
TILE, WHOLE_ROW = 4, 256

Elements = tuple[int, ...]
"""How many elements of K and of V a thread takes."""


class Step(NamedTuple):
    """How calls of some sizes are launched.

    Attributes
    ----------
    on_each : float
        The most threads for K or for V on each multiprocessor. The last step takes everything
        larger.
    threads : int
        In a block.
    ahead : bool
        Whether the kernel lets the next one start at once, and prefetches.
    elements : int
        The most that a thread takes.
    """

    on_each: float
    threads: int
    ahead: bool
    elements: int


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a call.

    Attributes
    ----------
    kernel : str
        C++ name of the template.
    file : str
        With its source.
    parameters : str
        Name of its parameter struct.
    computes : bool
        Whether scales that belong to a token are computed, not read.
    dtype, slot_dtype : numpy.dtype
        Of the rows by token, and of the slot mapping.
    num_blocks, block_size, num_kv_heads : int
    sides : tuple of Side
        K, and V if there is V.
    steps : tuple of Step
        By size; the last is for all larger calls.
    """

    kernel: str
    file: str
    parameters: str
    computes: bool
    dtype: Dtype
    slot_dtype: Dtype
    num_blocks: int
    block_size: int
    num_kv_heads: int
    sides: tuple[Side, ...]
    steps: tuple[Step, ...]

    @property
    def num_slots(self) -> int:
        """Capacity of the cache in tokens."""
        return self.num_blocks * self.block_size

    def mode(self, side: Side, elements: int) -> int:
        """Return what the kernel does with each row, if a thread takes so many elements."""
        if side.copies(self.dtype):
            return COPIED
        if side.scale is None:
            return CONVERTED
        if self.computes and side.scale.is_written:
            return COMPUTED_POWER if side.scale.powers else COMPUTED
        each = side.scale.granularity == "channel" or side.scale.group % elements
        return SCALED_ELEMENTS if each else SCALED

    def instance(self, elements: Elements, *, ahead: bool) -> str:
        """Return the C++ name of the kernel whose threads take so many elements."""
        kind = f"pagedcache::{CUDA_NAMES[str(self.dtype)]}, {SLOT_NAMES[str(self.slot_dtype)]}"
        each = [
            f"pagedcache::{CUDA_NAMES[side.format.name]}, {self.mode(side, count)}, {count}"
            for side, count in zip(self.sides, elements, strict=True)
        ]
        return f"pagedcache::{self.kernel}<{kind}, {each[0]}, {each[-1]}, {str(ahead).lower()}>"

    def elements(self, most: int = MOST_ELEMENTS) -> Elements:
        """Return how many elements of K and of V a thread takes, by all strides and row lengths.

        These must be whole rows, or whole groups if their scale is computed, and at addresses that
        a vector of this size may have.
        """
        return tuple(self._elements(side, most) for side in self.sides)

    def _elements(self, side: Side, most: int) -> int:
        most = min(most, MOST_BYTES // self.dtype.itemsize)
        counts = [n for n in (32, 16, 8, 4, 2, 1) if n <= most and self._allows(side, n)]
        # A scale for each vector, not for each element, unless vectors would be very short.
        whole = [n for n in counts if side.scale is None or side.scale.group % n == 0]
        if whole and whole[0] >= min(4, counts[0]):
            return whole[0]
        return counts[0] if counts else side.format.packed

    def _allows(self, side: Side, elements: int) -> bool:
        if elements % side.format.packed:
            return False
        size, width = self.dtype.itemsize, side.format.dtype.itemsize
        by_token, by_slot = self.alignment(side, elements), alignment(side.format.bits, elements)
        steps = [
            (side.token_stride * size, by_token),
            (side.head_stride * size, by_token),
            (side.block_stride * width, by_slot),
            (side.slot_stride * width, by_slot),
            (side.cache_head_stride * width, by_slot),
            (side.head_size, elements),
        ]
        if self.mode(side, elements) >= COMPUTED:
            assert side.scale is not None
            steps.append((side.scale.group, elements))
        return all(step % multiple == 0 for step, multiple in steps)

    def alignment(self, side: Side, elements: int) -> int:
        """Return what addresses of so many elements by token must be multiples of, in bytes."""
        if elements == side.format.packed > 1:  # each has an access of its own
            elements = 1
        return alignment(self.dtype.itemsize * 8, elements)


def alignment(bits: int, elements: int) -> int:
    """Return the bytes of the widest access to so many elements."""
    return min(bits * elements // 8, WIDEST)


class RowsImplementation(Planned):
    """A kernel on rows, compiled.

    Attributes
    ----------
    names : tuple of str
        Of the operator's arguments: the caches, the rows by token and the slot mapping in some
        order, and the scales.
    """

    names: ClassVar[tuple[str, ...]]

    def __init__(self, rows: Rows, device: CudaDevice, report: DeviceReport) -> None:
        if rows.num_slots > MOST:
            rule = f"must have at most {MOST} slots on a GPU"
            raise NotSupportedError("k_cache", rule, rows.num_slots)
        for side in rows.sides:
            row = side.head_size * rows.dtype.itemsize
            if row > MOST_ROW:
                rule = f"must have at most {MOST_ROW} bytes of K or V in a head on a GPU"
                raise NotSupportedError(f"{side.letter}_cache", rule, row)
        self._rows = rows
        # Addresses are known only at each call, and allow what the strides allow, four elements (as
        # in vLLM's pages, where 4 bytes of a scale are between K and V), or the least.
        wanted = [(rows.elements(step.elements), step.ahead) for step in rows.steps]
        wanted += [(rows.elements(most), False) for most in NARROWER]
        possible = list(dict.fromkeys(wanted))
        instances = tuple(rows.instance(elements, ahead=ahead) for elements, ahead in possible)
        functions = dict(zip(possible, device.compile(rows.file, instances), strict=True))
        self._kernels = [
            _Kernel(rows, most, functions, device) for most in (MOST_ELEMENTS, *NARROWER)
        ]
        self._widest = self._kernels[0]
        self._item_sizes = tuple(map(self._item_size, self.names))
        self._token_steps = tuple(map(self._token_step, self.names))
        self._report_to(report)

    def _side(self, name: str) -> Side | None:
        """Return K or V, by the name of an argument; ``None`` if there is no such side."""
        return next((side for side in self._rows.sides if side.letter == name[0]), None)

    def _item_size(self, name: str) -> int:
        """Return the item size of an argument, 0 if there is none."""
        if name == "slot_mapping":
            return self._rows.slot_dtype.itemsize
        side = self._side(name)
        if side is None:
            return 0
        if name.endswith("_cache"):
            return side.format.dtype.itemsize
        if name.endswith("_scale"):
            return 4 if side.scale is not None else 0
        return self._rows.dtype.itemsize

    def _token_step(self, name: str) -> int:
        """Return the bytes from token to token of an argument, 0 if it has no such axis."""
        if name == "slot_mapping":
            return self._rows.slot_dtype.itemsize
        side = self._side(name)
        if side is None or name.endswith(("_cache", "_scale")):
            return 0
        return side.token_stride * self._rows.dtype.itemsize

    def run(
        self,
        tokens: int,
        k_cache: int,
        v_cache: int,
        first: int,
        second: int,
        third: int,
        k_scale: int,
        v_scale: int,
        stream: int,
    ) -> None:
        """Queue a launch for this many tokens.

        `first`, `second` and `third` are the rows by token and the slots, in the order of `names`.
        """
        bits = 0
        if (k_cache | v_cache | first | second | third) & 15 or (k_scale | v_scale) & 3:
            bits = (
                k_cache & 15
                | (v_cache & 15) << 4
                | (first & 15) << 8
                | (second & 15) << 12
                | (third & 15) << 16
                | ((k_scale | v_scale) & 3) << 20
            )
        plans = self._plans.get(bits)
        plan = None if plans is None else plans.get(tokens)
        if plan is None:
            addresses = (k_cache, v_cache, first, second, third, k_scale, v_scale)
            kernel = self._kernel_for(addresses)
            if tokens > kernel.most_rows:
                self._queue_in_parts(kernel, tokens, addresses, stream)
                return
            plan = self._plan(kernel, tokens, self._plans.setdefault(bits, {}))
        launches, prepare, blocks = plan
        # pop and append of a list are atomic, so no two threads get the same launch.
        try:
            launch = launches.pop()
        except IndexError:
            launch = prepare()
        launch.pack(k_cache, v_cache, first, second, third, k_scale, v_scale, tokens)
        launch.run(blocks, stream)
        launches.append(launch)
        if stream not in self._streams:
            self._report.note(stream)

    def _report_to(self, report: DeviceReport) -> None:
        super()._report_to(report)
        # By the bits that decide which kernel can be used, then by number of tokens.
        self._plans: dict[int, dict[int, Plan]] = {}

    def _kernel_for(self, addresses: tuple[int, ...]) -> _Kernel:
        """Return the kernel with the widest access that these addresses allow."""
        for name, address, size in zip(self.names, addresses, self._item_sizes, strict=True):
            if size:
                check_address(name, address, size)
        named = dict(zip(self.names, addresses, strict=True))
        return next(each for each in self._kernels if each.allows(named))

    @staticmethod
    def _pack(launch: Launch, rows: int, addresses: tuple[int, ...]) -> None:
        launch.pack(*addresses, rows)

    def _queue_in_parts(
        self, kernel: _Kernel, tokens: int, addresses: tuple[int, ...], stream: int
    ) -> None:
        """Make several launches for more vectors than one kernel can count."""
        for done in range(0, tokens, kernel.most_rows):
            part = min(tokens - done, kernel.most_rows)
            grid = kernel.grid(part)
            launch = grid.prepare(self._report.address, done)
            pairs = zip(addresses, self._token_steps, strict=True)
            launch.pack(*(at + done * step for at, step in pairs), part)
            launch.run(grid.blocks(part), stream)
            self._report.note(stream)


class _Kernel:
    """The instances of up to so many elements a thread, with what stays from call to call."""

    def __init__(
        self,
        rows: Rows,
        most_elements: int,
        functions: Mapping[tuple[Elements, bool], int],
        device: CudaDevice,
    ) -> None:
        limits: Limits = device.limits
        scale = THREAD_FACTORS[limits.thread_class]
        fewest, *_, largest = sorted(int(step.threads * scale) for step in rows.steps)

        def elements_of(most: int) -> Elements:
            return rows.elements(min(most, most_elements))

        def in_token(step: Step) -> int:
            pairs = zip(rows.sides, elements_of(step.elements), strict=True)
            return rows.num_kv_heads * max(_threads(rows, *each)[0] for each in pairs)

        self._alignments = {
            side.letter: (alignment(side.format.bits, count), rows.alignment(side, count))
            for side, count in zip(rows.sides, elements_of(MOST_ELEMENTS), strict=True)
        }
        # Indices stay below `MOST`, even if the last tile and the last block are not full.
        most_in_token = max(map(in_token, rows.steps))
        most = min(MOST - largest, limits.max_grid_x * fewest) // most_in_token
        self.most_rows = most // TILE * TILE or most
        if not most:
            rule = f"must need at most {limits.max_grid_x * fewest} threads for a token on a GPU"
            raise NotSupportedError("k_cache", rule, most_in_token)

        def grid(step: Step) -> Grid:
            threads, elements = int(step.threads * scale), elements_of(step.elements)
            # A tile that is not full would cost the smallest calls more than it saves; all that get
            # ahead were measured without.
            tile = 1 if step.ahead or most < TILE else tile_of(rows)
            function = functions.get((elements, step.ahead)) or functions[elements, False]
            prepare = functools.partial(device.prepare, function, len(rows.sides), threads)
            parameters = _parameters(rows, elements, tile)
            in_tile = in_token(step) * tile
            return Grid(len(rows.sides), threads, tile, in_tile, prepare, parameters)

        *smaller, last = rows.steps
        on_all = limits.multiprocessors * scale
        self._steps = [(each.on_each * on_all / in_token(each), grid(each)) for each in smaller]
        self._steps.append((math.inf, grid(last)))

    def allows(self, addresses: Mapping[str, int]) -> bool:
        """Return whether addresses, by the names of their arguments, allow this access."""
        return all(
            address % self._alignments[name[0]][not name.endswith("_cache")] == 0
            for name, address in addresses.items()
            if name[0] in self._alignments and not name.endswith("_scale")
        )

    def grid(self, rows: int) -> Grid:
        """Return the grid for a call of this many tokens."""
        return next(grid for most, grid in self._steps if rows <= most)


def _threads(rows: Rows, side: Side, elements: int) -> tuple[int, int, int]:
    """Return the threads of a row, those that share a unit, and the vectors of a unit."""
    if rows.mode(side, elements) < COMPUTED:
        return side.head_size // elements, 1, 1
    assert side.scale is not None
    vectors = side.scale.group // elements
    lanes = min(1 << (vectors - 1).bit_length(), MOST_LANES)
    return side.head_size // side.scale.group * lanes, lanes, vectors


def _per_group(rows: Rows, side: Side, elements: int) -> int:
    """Return what `RowsSide.per_group` divides by; a gather takes elements in parts."""
    if side.scale is None:
        return 1
    if rows.mode(side, elements) == SCALED_ELEMENTS:
        return side.scale.group
    part = min(elements, WIDEST // rows.dtype.itemsize)
    return max(side.scale.group // part, 1)


def _parameters(rows: Rows, elements: Elements, tile: int) -> ctypes.Structure:
    """Return the parameter struct without what changes from call to call."""
    struct = functools.partial(structure, source.read(rows.file))
    by = functools.partial(divisor, struct("Divisor"))

    def by_slot(block: int, slot: int, head: int, width: int) -> Any:
        return struct("CacheRows")(
            slot * width, (block - rows.block_size * slot) * width, head * width
        )

    def side_of(side: Side, elements: int) -> Any:
        size, width, scale = rows.dtype.itemsize, side.format.dtype.itemsize, side.scale
        threads, lanes, vectors = _threads(rows, side, elements)
        made = struct("RowsSide")(
            rows=struct("TokenRows")(side.token_stride * size, side.head_stride * size),
            cache=by_slot(side.block_stride, side.slot_stride, side.cache_head_stride, width),
            threads_per_row=by(threads),
            per_group=by(_per_group(rows, side, elements)),
            threads=threads,
            lanes=lanes,
            lane_bits=lanes.bit_length() - 1,
            vectors_per_unit=vectors,
        )
        if scale is not None:
            made.scales = by_slot(scale.block_stride, scale.slot_stride, scale.head_stride, 4)
            made.group_stride = scale.group_stride * 4
        return made

    tile_rows = tile * rows.num_kv_heads
    return struct(rows.parameters)(
        grid=struct("RowsGrid")(by(tile_rows), tile_rows, tile.bit_length() - 1),
        k=side_of(rows.sides[0], elements[0]),
        v=side_of(rows.sides[-1], elements[-1]),
        slots=struct("Slots")(by(rows.block_size), rows.num_slots, rows.block_size),
    )


def tile_of(rows: Rows) -> int:
    """Return for how many tokens the rows of one head are taken before those of the next head.

    Where the rows of neighbouring slots are contiguous in the cache, neighbouring threads then
    access neighbouring bytes, as they do token by token where the rows of all heads are contiguous.
    """
    row = math.gcd(*(side.head_size * side.format.bits // 8 for side in rows.sides))
    beside = rows.sides[0].slot_stride < rows.sides[0].cache_head_stride
    return TILE if beside and row % WHOLE_ROW else 1
