# SPDX-License-Identifier: Apache-2.0
"""``bench --blocks``: slot mappings, copies of blocks, host memory and the pool."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import pagedcache as pc
from pagedcache.bench.measure import ROUNDS, Graph

LAYERS, BLOCK = 30, 32 << 10  # arrays are K and V of each layer; bytes of a block in one of them
PAIRS = (1, 16, 256, 1024)
BATCHES = ((64, 64), (256, 16_384), (64, 65_536))  # requests and tokens
RUNS = ((8 << 10, 1), (32 << 10, 1), (32 << 10, 2), (32 << 10, 8))  # bytes of a block, in a run
ON_HOST = 1 << 27  # bytes of each copy to or from host memory
POOL_BLOCKS, BLOCK_SIZE, TAKEN = 100_000, 16, 1_000
PROMPT = 50_000  # tokens


class Row(NamedTuple):
    """One line of the table.

    Attributes
    ----------
    what : str
    microseconds : float
    beside : float or None
        Of what it is compared with: a memcpy of the same bytes.
    """

    what: str
    microseconds: float
    beside: float | None = None

    def __str__(self) -> str:
        ratio = "" if self.beside is None else f"{self.beside / self.microseconds:12.2f}"
        return f"  {self.what:<58}{self.microseconds:12.2f}{ratio}"


def run_blocks(device: str | None) -> dict[str, list[float | None]]:
    """Measure, print as it goes, and return microseconds by what was measured."""
    handle = pc.Handle(device)
    on_gpu = handle.device != "cpu"
    print(f"{handle!r}, Python {platform.python_version()}, NumPy {np.__version__}")
    print(f"  {'':<58}{'us':>12}{'of memcpy':>12}")
    results: dict[str, list[float | None]] = {}
    for row in _rows(on_gpu, handle.device):
        print(row, flush=True)
        results[row.what] = [row.microseconds, row.beside]
    print(
        "  A memcpy is one contiguous copy of as many bytes, in the same direction, in this run.\n"
        + ("  GPU time, replayed in a graph where that is possible." if on_gpu else "")
    )
    return results


def _rows(on_gpu: bool, device: str) -> Iterator[Row]:
    if on_gpu:
        import cupy

        with cupy.cuda.Device(int(device.partition(":")[2])):
            yield from _slots(cupy, _graph_time)
            yield from _copies(cupy, _graph_time)
            yield from _host_copies(cupy)
    else:
        yield from _slots(np, _wall_time)
        yield from _copies(np, _wall_time)
    yield from _pool()


def _graph_time(run: Callable[[], Any], guess: float) -> float:
    import cupy

    graph = Graph(lambda _: run(), 1, cupy.cuda.Stream(non_blocking=True), guess)
    for _ in range(ROUNDS):
        graph.time()
    return graph.median


def _wall_time(run: Callable[[], Any], guess: float) -> float:
    times = []
    run()
    for _ in range(max(5, min(50, int(2e5 / guess)))):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def _memcpy(xp: Any, size: int, timed: Callable[..., float]) -> float:
    source, target = xp.zeros(size, np.uint8), xp.zeros(size, np.uint8)
    if xp is np:
        return timed(lambda: np.copyto(target, source), size / 1e4)
    runtime = xp.cuda.runtime

    def copy() -> None:
        stream = xp.cuda.get_current_stream().ptr
        runtime.memcpyAsync(
            target.data.ptr, source.data.ptr, size, runtime.memcpyDeviceToDevice, stream
        )

    return timed(copy, size / 1e6 + 1)


def _slots(xp: Any, timed: Callable[..., float]) -> Iterator[Row]:
    rng = np.random.default_rng(0)
    for requests, tokens in BATCHES:
        each = tokens // requests
        tables = rng.integers(0, 1 << 20, (requests, each // BLOCK_SIZE + 1)).astype(np.int32)
        arrays = [
            xp.asarray(tables),
            xp.arange(requests + 1, dtype=np.int32) * each,
            xp.tile(xp.arange(each), requests),
        ]
        out = xp.zeros(tokens, np.int64)

        def run(arrays: list[Any] = arrays, out: Any = out) -> None:
            pc.slot_mapping(*arrays, block_size=BLOCK_SIZE, out=out)

        beside = _memcpy(xp, out.nbytes, timed)
        yield Row(f"slot_mapping, {requests} requests, {tokens} tokens", timed(run, 3), beside)


def _copies(xp: Any, timed: Callable[..., float]) -> Iterator[Row]:
    most = PAIRS[-1] if xp is not np else PAIRS[-2]
    arrays = list(xp.zeros((2 * LAYERS, 2 * most, BLOCK), np.uint8))
    order = np.random.default_rng(0).permutation(2 * most)
    descriptor = pc.BlockDescriptor.create(arrays)
    for count in PAIRS:
        if count > most:
            continue
        pairs = np.stack([order[:count], order[most : most + count]], 1)
        if xp is not np:  # so that any number of them can be captured
            pairs = xp.asarray(pairs)
        size = 2 * LAYERS * count * BLOCK
        beside = _memcpy(xp, size, timed)

        def run(pairs: Any = pairs) -> None:
            descriptor.copy(pairs)

        name = f"copy {count} blocks of {2 * LAYERS} arrays x {BLOCK >> 10} KiB"
        yield Row(name, timed(run, beside), beside)
    blocks = xp.asarray(order[:most])
    took = timed(lambda: descriptor.zero(blocks), beside)
    yield Row(f"fill {most} blocks of {2 * LAYERS} arrays x {BLOCK >> 10} KiB", took, beside)


def _host_copies(cupy: Any) -> Iterator[Row]:
    import cupyx

    rng = np.random.default_rng(0)
    stream = cupy.cuda.Stream(non_blocking=True)

    def timed(run: Callable[[Any], Any]) -> float:
        times = []
        for _ in range(7):
            before, after = cupy.cuda.Event(), cupy.cuda.Event()
            before.record(stream)
            run(stream)
            after.record(stream)
            after.synchronize()
            times.append(float(cupy.cuda.get_elapsed_time(before, after)) * 1e3)
        return statistics.median(times)

    for block, together in RUNS:
        count = ON_HOST // block
        on_gpu = cupy.zeros((2 * count, block), np.uint8)
        on_host = cupyx.empty_pinned((2 * count, block), np.uint8)
        starts = [rng.permutation(2 * count // together)[: count // together] for _ in "st"]
        pairs = np.stack(
            [(start[:, None] * together + np.arange(together)).ravel() for start in starts], 1
        )
        kind = f"runs of {block * together >> 10} KiB" if together > 1 else f"{block >> 10} KiB"
        for name, arrays in (("to", (on_gpu, on_host)), ("from", (on_host, on_gpu))):
            descriptor = pc.BlockDescriptor.create(*([each] for each in arrays))
            source, target = (
                each.data.ptr if each is on_gpu else each.ctypes.data for each in arrays
            )

            def memcpy(stream: Any, source: int = source, target: int = target) -> None:
                kind = cupy.cuda.runtime.memcpyDefault
                cupy.cuda.runtime.memcpyAsync(target, source, ON_HOST, kind, stream.ptr)

            def run(stream: Any, descriptor: Any = descriptor, pairs: Any = pairs) -> None:
                descriptor.copy(pairs, stream=stream)

            what = f"copy {ON_HOST >> 20} MiB {name} pinned host memory, {kind}"
            yield Row(what, timed(run), timed(memcpy))


def _pool() -> Iterator[Row]:
    tokens = iter(range(1 << 30))

    def timed(name: str, prepare: Callable[[], Any], run: Callable[[Any], Any], per: int) -> Row:
        times = []
        for _ in range(21):
            given = prepare()
            began = time.perf_counter()
            run(given)
            times.append((time.perf_counter() - began) / per)
        return Row(name, statistics.median(times) * 1e6)

    def prompt(length: int) -> list[int]:
        return [next(tokens), *range(length - 1)]

    made: list[Any] = []
    for caching in (False, True):
        pool = pc.BlockPool(POOL_BLOCKS, BLOCK_SIZE, prefix_caching=caching)
        kind = "hashed" if caching else "without prefixes"
        yield timed(
            f"pool: a prompt of {TAKEN} blocks, {kind}, a block",
            lambda: prompt(TAKEN * BLOCK_SIZE),
            lambda ids, pool=pool: made.append(pool.sequence(ids)),  # type: ignore[misc]
            TAKEN,
        )
        yield timed(
            f"pool: free it, {kind}, a block", made.pop, lambda sequence: sequence.free(), TAKEN
        )
    ids = prompt(PROMPT)

    def freed() -> Any:
        pool.sequence(ids).free()
        return ids

    yield timed(
        f"pool: a freed prompt of {PROMPT} tokens is found again",
        freed,
        lambda ids: made.append(pool.sequence(ids)),
        1,
    )
    sequence = pool.sequence(prompt(8))
    yield timed(
        "pool: append a token",
        lambda: None,
        lambda _: [sequence.append(1) for _ in range(1000)],
        1000,
    )
