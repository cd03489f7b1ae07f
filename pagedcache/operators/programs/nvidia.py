# SPDX-License-Identifier: Apache-2.0
"""Writes and reads with steps on a GPU. The kernels are in ``cuda_src/programmed.cuh``."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from pagedcache.arrays.addresses import check_address
from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.parameters import MOST, divisor, structure
from pagedcache.backend.nvidia.plans import Grid, Plan, Planned
from pagedcache.locks import make_lock
from pagedcache.operators.programs.text import (
    MOST_HEADS,
    MOST_SIZE,
    Access,
    Held,
    expression,
    held_rows,
    needed,
    program_text,
    rotates,
)
from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from pagedcache.backend.nvidia.device import CudaDevice
    from pagedcache.backend.nvidia.launch import Launch
    from pagedcache.backend.nvidia.report import DeviceReport
    from pagedcache.operators.programs.info import ProgramInfo, RowsByToken

FILE = "programmed.cuh"
MOST_PARAMETERS = 4000  # bytes, of the 4096 that a kernel takes


class Step(NamedTuple):
    """How calls of some sizes are launched.

    Attributes
    ----------
    on_each : float
        The most threads on each multiprocessor, if each held one head. The last step takes
        everything larger.
    threads : int
        In a block: a power of two.
    heads : int
        That a thread holds, at most.
    ahead : bool
        Whether the kernel lets the next one start at once, and prefetches.
    """

    on_each: float
    threads: int
    heads: int
    ahead: bool


# Measured on an H200 (notes/steps.md): with 8 KV heads of 128, 1,134
# tokens; with 32 query heads too, 20 tokens, and 687 where threads wait for each other, which more
# of them hide.
STEPS = (Step(2200, 256, 1, True), Step(math.inf, 128, MOST_HEADS, False))
ROTATING_STEPS = (Step(60, 128, 1, True), Step(math.inf, 64, MOST_HEADS, False))
MEETING_STEPS = (Step(2000, 128, 1, False), Step(math.inf, 64, MOST_HEADS, False))


def steps_of(info: ProgramInfo) -> tuple[Step, ...]:
    """Return how calls are launched, by size."""
    if not rotates(info):
        return STEPS
    meets = any(pipeline.meets for pipeline in info.pipelines.values())
    return MEETING_STEPS if meets else ROTATING_STEPS


class ProgramKernel(Planned):
    """A compiled program."""

    def __init__(self, info: ProgramInfo, device: CudaDevice, report: DeviceReport) -> None:
        if info.num_slots > MOST:
            rule = f"must have at most {MOST} slots on a GPU"
            raise NotSupportedError("k_cache", rule, info.num_slots)
        self._info, self._device = info, device
        self._names = info.parameters
        for letter in info.letters:
            rows = by_token(info, letter)
            if rows.size > MOST_SIZE:
                rule = f"must have a head size of at most {MOST_SIZE} for steps on a GPU"
                raise NotSupportedError(rows.name, rule, rows.size)
        self._held = held_rows(info)
        arrays = info.rules.names
        self._addresses = len(arrays)
        alignments, sizes = self._alignments(wide=True), self._item_sizes()
        checks = []
        for multiple in (2, 4, 8, 16):
            same = [
                f"v[{i}]"
                for i, name in enumerate(arrays)
                if max(alignments[name], sizes.get(name, 1)) == multiple
            ]
            if same:
                checks.append(f"({' | '.join(same)}) & {multiple - 1}")
        # Generated, since it is faster than a loop.
        self._low_bits: Callable[[tuple[Any, ...]], int] = eval(f"lambda v: {' | '.join(checks)}")
        self._compiling = make_lock()
        self._narrow: _Kernel | None = None
        self._wide = self._widest = _Kernel(info, self._names, self._held, device, wide=True)
        self._report_to(report)

    def _alignments(self, *, wide: bool) -> dict[str, int]:
        """Return what the address of each array must be a multiple of, in bytes."""
        info = self._info
        access = Access.of(info, self._held, wide=wide)
        found = dict.fromkeys(info.rules.names, 1)
        for letter in info.letters:
            count = access.sides[letter]
            for each in (info.sources.get(letter), info.outs.get(letter)):
                if each is not None:
                    found[each.name] = needed(each.format.bits, count)
            if (side := info.side(letter)) is not None:
                found[f"{letter}_cache"] = needed(side.format.bits, count)
        for array in info.arrays:
            count = access.arrays[array.name]
            found[array.name] = needed(array.dtype.itemsize * 8, count) if count else 1
        return found

    def run(self, tokens: int, *values: Any) -> None:
        """Queue a launch for this many tokens. Takes addresses, numbers, and a stream."""
        stream = values[-1]
        key = values[: self._addresses] if self._low_bits(values) else None
        if key is not None:
            key = tuple(address & 15 for address in key)
        plans = self._plans.get(key)
        plan = None if plans is None else plans.get(tokens)
        if plan is None:
            kernel = self._kernel_for(values[: self._addresses])
            if tokens > kernel.most_rows:
                self._queue_in_parts(kernel, tokens, values[:-1], stream)
                return
            if key not in self._plans and len(self._plans) >= 1024:
                self._plans.clear()
            plan = self._plan(kernel, tokens, self._plans.setdefault(key, {}))
        launches, prepare, blocks = plan
        # pop and append of a list are atomic, so no two threads get the same launch.
        try:
            launch = launches.pop()
        except IndexError:
            launch = prepare()
        launch.pack(*values[:-1], tokens, tokens)
        launch.run(blocks, stream)
        launches.append(launch)
        if stream not in self._streams:
            self._report.note(stream)

    def _report_to(self, report: DeviceReport) -> None:
        super()._report_to(report)
        # By the low bits of all addresses, if they decide which kernel can be used.
        self._plans: dict[tuple[int, ...] | None, dict[int, Plan]] = {}

    def _kernel_for(self, addresses: tuple[int, ...]) -> _Kernel:
        """Return the kernel with the widest access that these addresses allow."""
        info = self._info
        given = self._item_sizes()
        for name, address in zip(info.rules.names, addresses, strict=True):
            if given.get(name):
                check_address(name, address, given[name])
        wanted = self._alignments(wide=True)
        if all(
            address % wanted[name] == 0
            for name, address in zip(info.rules.names, addresses, strict=True)
        ):
            return self._wide
        with self._compiling:
            if self._narrow is None:
                self._narrow = _Kernel(info, self._names, self._held, self._device, wide=False)
            return self._narrow

    def _item_sizes(self) -> dict[str, int]:
        info = self._info
        found = {"slot_mapping": info.slot_dtype.itemsize}
        for each in (*info.sources.values(), *info.outs.values()):
            found[each.name] = each.format.dtype.itemsize
        for side in info.sides:
            found[f"{side.letter}_cache"] = side.format.dtype.itemsize
            if side.scale is not None:
                found[f"{side.letter}_scale"] = 4
        return found | {each.name: each.dtype.itemsize for each in info.arrays}

    @staticmethod
    def _pack(launch: Launch, rows: int, addresses: tuple[int, ...]) -> None:
        launch.pack(*addresses, rows, rows)

    def _queue_in_parts(
        self, kernel: _Kernel, tokens: int, values: tuple[Any, ...], stream: int
    ) -> None:
        """Make several launches for more threads than one kernel can count."""
        info = self._info
        steps = {"slot_mapping": info.slot_dtype.itemsize}
        for each in (*info.sources.values(), *info.outs.values()):
            steps[each.name] = each.token_stride * each.format.dtype.itemsize
        for done in range(0, tokens, kernel.most_rows):
            part = min(tokens - done, kernel.most_rows)
            grid = kernel.grid(part)
            launch = grid.prepare(self._report.address, done)
            # Parameters are indexed by the number of a token in the call, and stay where they are.
            moved = [
                value + done * steps[name] if name in steps else value
                for name, value in zip(info.names, values, strict=True)
            ]
            launch.pack(*moved, part, tokens)
            launch.run(grid.blocks(part), stream)
            self._report.note(stream)


def by_token(info: ProgramInfo, letter: str) -> RowsByToken:
    """Return the rows of a side in the order of tokens."""
    return (info.sources or info.outs)[letter]


class _Grid(Grid):
    """Blocks for each side, one side after the other."""

    def __init__(
        self,
        threads: int,
        threads_of_token: list[int],
        prepare: Callable[[ctypes.Structure], Launch],
        parameters: ctypes.Structure,
    ) -> None:
        super().__init__(1, threads, 1, sum(threads_of_token), prepare, parameters)
        self._threads_of_token = threads_of_token

    def blocks(self, rows: int) -> int:
        """Return how many blocks hold a thread for all that there is."""
        return sum(-(-rows * each // self.threads) for each in self._threads_of_token)


class _Kernel:
    """The instances for one access, with what stays from call to call."""

    def __init__(
        self,
        info: ProgramInfo,
        names: tuple[str, ...],
        held: dict[str, Held],
        device: CudaDevice,
        *,
        wide: bool,
    ) -> None:
        of_size = steps_of(info)
        steps = list(of_size) if wide else [of_size[-1]]
        access = Access.of(info, held, wide=wide)
        text = program_text(info, names, held, access, max(step.threads for step in of_size))
        instances = {
            (step.heads, step.ahead): expression(info, step.heads, ahead=step.ahead)
            for step in steps
        }
        compiled = device.compile(FILE, tuple(instances.values()), text)
        functions = dict(zip(instances, compiled, strict=True))
        in_token = {
            letter: by_token(info, letter).heads * held[letter].lanes for letter in info.letters
        }
        self.most_rows = min(
            (MOST - max(step.threads for step in steps)) // max(in_token.values()),
            (min(MOST, device.limits.max_grid_x) - 4)
            * min(step.threads for step in steps)
            // sum(in_token.values()),
        )
        if not self.most_rows:
            raise NotSupportedError("k", "must have fewer heads", by_token(info, "k").heads)
        grids = []
        for step in steps:
            groups = {
                letter: by_token(info, letter).heads
                // math.gcd(step.heads, held[letter].heads(by_token(info, letter).heads))
                for letter in info.letters
            }
            parameters = _parameters(info, names, text, groups)
            parameters.thread_bits = step.threads.bit_length() - 1
            size = ctypes.sizeof(parameters)
            if size > MOST_PARAMETERS:
                rule = f"must have parameters of at most {MOST_PARAMETERS} bytes with their shapes"
                raise NotSupportedError("the kernel", rule, size)
            threads = [groups[letter] * held[letter].lanes for letter in info.letters]
            function = functions[step.heads, step.ahead]
            prepare = functools.partial(device.prepare, function, 1, step.threads)
            most = step.on_each * device.limits.multiprocessors / sum(in_token.values())
            grids.append((most, _Grid(step.threads, threads, prepare, parameters)))
        self._grids = grids

    def grid(self, rows: int) -> Grid:
        """Return the grid for a call of this many tokens."""
        return next(grid for most, grid in self._grids if rows <= most)


def _parameters(
    info: ProgramInfo, names: tuple[str, ...], text: str, groups: dict[str, int]
) -> Any:
    """Return the parameter struct without what changes from call to call."""
    struct = functools.partial(structure, source.read(FILE) + text)
    by = functools.partial(divisor, struct("Divisor"))

    def by_slot(block: int, slot: int, head: int, width: int) -> Any:
        return struct("CacheRows")(
            slot * width, (block - info.block_size * slot) * width, head * width
        )

    def rows_of(rows: RowsByToken | None) -> Any:
        if rows is None:
            return struct("TokenRows")(0, 0)
        width = rows.format.dtype.itemsize
        return struct("TokenRows")(rows.token_stride * width, rows.head_stride * width)

    made: Any = struct("ProgramParameters")(
        slots=struct("Slots")(by(info.block_size), info.num_slots, info.block_size)
    )
    for letter, count in groups.items():
        side = info.side(letter)
        one = struct("ProgramSide")(
            rows=rows_of(info.sources.get(letter)),
            out=rows_of(info.outs.get(letter)),
            per_token=by(count),
            groups=count,
        )
        if side is not None:
            width = side.format.dtype.itemsize
            one.cache = by_slot(side.block_stride, side.slot_stride, side.cache_head_stride, width)
            if (scale := side.scale) is not None:
                one.scales = by_slot(scale.block_stride, scale.slot_stride, scale.head_stride, 4)
                one.group_stride = scale.group_stride * 4
        setattr(made, letter, one)
    for array in info.arrays:
        member = f"p{names.index(array.name)}"
        for axis, (length, stride) in enumerate(zip(array.shape, array.strides, strict=True)):
            setattr(made, f"{member}_length{axis}", length or 0)
            setattr(made, f"{member}_stride{axis}", stride)
    return made
