# SPDX-License-Identifier: Apache-2.0
"""Host time of one call, in the cases that an engine meets outside of a CUDA graph.

The number of tokens is fixed, alternates between two, or goes from 1 to 64; or it is fixed and the
calls go through four caches of two shapes, as in a model with several kinds of layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np

import pagedcache as pc
from pagedcache.bench import peers
from pagedcache.bench.case import Axes, Case
from pagedcache.bench.measure import host_microseconds

TOKENS = 64
NUM_SLOTS = 262_144
FORMAT = "float8_e4m3fn"  # of the caches in the last row, with one scale for each
ROUNDS = 15
FIXED, TWO, MANY, CACHES = "fixed", "two in turn", "1 to 64", "4 caches"
COUNTS = {FIXED: [TOKENS], TWO: [TOKENS, TOKENS - 1], MANY: list(range(1, TOKENS + 1))}

Call = Callable[[int], Any]
Prepare = Callable[[Case], Call]
Times = dict[str, dict[str, float]]


def host_times(*, with_peers: bool) -> tuple[Times, dict[str, str]]:
    """Return the microseconds of each call in each case, and why a peer is not measured."""
    import cupy

    drain = cupy.cuda.Device().synchronize
    case = Case(Axes(TOKENS), cupy, NUM_SLOTS, 1)
    several = [
        case,
        Case(Axes(TOKENS, heads=4), cupy, NUM_SLOTS // 2, 1),
        Case(Axes(TOKENS), cupy, NUM_SLOTS, 1),
        Case(Axes(TOKENS, heads=4), cupy, NUM_SLOTS // 2, 1),
    ]
    calls: dict[tuple[str, str], tuple[Call, int]] = {}
    missing: dict[str, str] = {}
    competitors = {**_ours(), **({} if not with_peers else _peers())}
    for name, prepare in competitors.items():
        prepared, reason = _prepared(name, prepare, case, several, drain)
        calls |= prepared
        if reason:
            missing[name] = reason
    rounds = [
        # Short rounds, so that clock drift affects all calls alike.
        {key: host_microseconds(call, sets, drain) for key, (call, sets) in calls.items()}
        for _ in range(ROUNDS)
    ]
    times: Times = {}
    for name, column in calls:
        found = float(np.median([row[name, column] for row in rounds]))
        times.setdefault(name, {})[column] = found
    return times, missing


def print_host_times(times: Times, missing: dict[str, str]) -> None:
    """Print microseconds, and multiples of the best peer's time with a fixed number of tokens."""
    columns = (*COUNTS, CACHES)
    rivals = [row[FIXED] for name, row in times.items() if name in peers.PEERS]
    best = min(rivals, default=math.nan)
    print(f"\nHost time of one call, us ({TOKENS} tokens unless the column says otherwise)")
    width = max(23, *map(len, times))
    print(f"  {'':<{width}}" + "".join(f"{column:>14}" for column in columns))
    for name, row in times.items():
        print(f"  {name:<{width}}" + "".join(f"{row[column]:>14.2f}" for column in columns))
    if rivals:
        print(f"  as multiples of the best peer's {best:.2f} us with a fixed number of tokens")
        for name, row in times.items():
            multiples = "".join(f"{row[column] / best:>14.2f}" for column in columns)
            print(f"  {name:<{width}}" + multiples)
    for name, reason in missing.items():
        print(f"  {name} is not measured: {reason}")


def _prepared(
    name: str,
    prepare: Prepare,
    case: Case,
    several: list[Case],
    drain: Callable[[], Any],
) -> tuple[dict[tuple[str, str], tuple[Call, int]], str]:
    """Return a competitor's calls, each made once already, or why it has none."""
    calls: dict[tuple[str, str], tuple[Call, int]] = {}
    try:
        for column, counts in COUNTS.items():
            calls[name, column] = prepare(case.shortened(counts)), len(counts)
        writes = [prepare(one.shortened([TOKENS])) for one in several]
        calls[name, CACHES] = _in_turn(writes), len(writes)
        for call, sets in calls.values():
            for i in range(sets):
                call(i)
        drain()
    except Exception as error:
        if name not in peers.PEERS and not isinstance(error, peers.UnavailableError):
            raise
        return {}, peers.why(error)
    return calls, ""


def _in_turn(writes: list[Call]) -> Call:
    return lambda i: writes[i](0)


def _ours() -> dict[str, Prepare]:
    def with_torch(prepare: Callable[[Any, Any], Call]) -> Prepare:
        return lambda case: prepare(*peers.in_torch(case, heads_first=True))

    def with_cupy(prepare: Callable[[Any, Any], Call]) -> Prepare:
        return lambda case: prepare((case.k_cache, case.v_cache), case.sets)

    def calculate(caches: Any, sets: Any) -> Call:
        descriptor = pc.Descriptor.create(*caches, *sets[0], layout="HND")
        k_cache, v_cache = caches
        return lambda i: descriptor.calculate(k_cache, v_cache, *sets[i])

    def paged_caching(caches: Any, sets: Any) -> Call:
        k_cache, v_cache = caches
        return lambda i: pc.paged_caching(k_cache, v_cache, *sets[i])

    def bound(caches: Any, sets: Any) -> Call:
        descriptor = pc.Descriptor.create(*caches, *sets[0], layout="HND")
        writes = [descriptor.bind(*caches, *each) for each in sets]
        return lambda i: writes[i]()

    def infiniop(caches: Any, sets: Any) -> Call:
        import cupy

        made = [pc.Descriptor.create(*caches, *each, layout="HND") for each in sets]
        k_cache, v_cache = (cache.data.ptr for cache in caches)
        stream = cupy.cuda.get_current_stream().ptr
        arguments: list[Any] = [
            (k_cache, v_cache, *(array.data.ptr for array in each), stream) for each in sets
        ]
        write = pc.infiniop.infiniopPagedCaching
        return lambda i: write(made[i], 0, 0, *arguments[i])

    def stored(case: Case) -> Call:
        # In the memory of the caches of the case, which are large.
        caches = [
            cache.view(np.uint8).reshape(-1)[: cache.size].reshape(cache.shape)
            for cache in (case.k_cache, case.v_cache)
        ]
        k_cache, v_cache = caches
        sets = case.sets
        k, v, slots = sets[0]
        one = case.xp.ones(1, np.float32)
        descriptor = pc.Descriptor.create(
            k_cache, v_cache, k, v, slots,
            k_scale=one, v_scale=one, k_format=FORMAT, v_format=FORMAT, layout="HND",
        )  # fmt: skip
        return lambda i: descriptor.calculate(k_cache, v_cache, *sets[i], k_scale=one, v_scale=one)

    return {
        "calculate, CuPy": with_cupy(calculate),
        "calculate, torch": with_torch(calculate),
        "paged_caching, CuPy": with_cupy(paged_caching),
        "paged_caching, torch": with_torch(paged_caching),
        "bind, CuPy": with_cupy(bound),
        "bind, torch": with_torch(bound),
        "infiniopPagedCaching": with_cupy(infiniop),
        f"calculate, CuPy, {FORMAT}": stored,
    }


def _peers() -> dict[str, Prepare]:
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401 - before any peer imports it, so that the first is not slower
    return {name: prepare for name, prepare in peers.PEERS.items() if name != peers.OURS}
