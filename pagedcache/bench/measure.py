# SPDX-License-Identifier: Apache-2.0
"""How things are timed.

GPU time: all sets of inputs in turn, captured in one CUDA graph, which is replayed and timed with
events, so that nothing of the host is in it. The median over replays, in rounds in which every
competitor has its turn, so that a drifting clock affects all of them.

Host time: the mean of many calls that are queued back to back; the median over repeats, with the
queue drained between them.

First call: in a fresh process with a CUDA context, from ``Descriptor.create`` to the end of the
first write.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

Write = Callable[[int], Any]

GRAPH_MICROSECONDS = 400  # about what a graph should take, so that events measure it well
ROUNDS = 5
REPLAYS = 6


class Graph:
    """Writes of all sets in turn, captured; `time` replays them.

    Parameters
    ----------
    write : callable
        Writes set ``i``.
    sets : int
    stream : cupy.cuda.Stream
        Not the default one.
    guess : float
        About how many microseconds one write will take.
    in_a_row : int
        How often a set is written before the next.
    """

    def __init__(
        self, write: Write, sets: int, stream: Any, guess: float, in_a_row: int = 1
    ) -> None:
        self.stream = stream
        self._write = write  # what it holds must outlive the graph
        turns = max(1, round(GRAPH_MICROSECONDS / guess / sets / in_a_row))
        self.writes = turns * sets * in_a_row
        with _current(stream):
            for i in range(sets):
                write(i)
            stream.synchronize()
            with _capture(stream) as captured:
                for _ in range(turns):
                    for i in range(sets):
                        for _ in range(in_a_row):
                            write(i)
        self._launch = captured[0]
        self._launch()
        stream.synchronize()
        self.times: list[float] = []

    def time(self) -> None:
        """Replay a few times; keep the microseconds of one write."""
        import cupy

        pairs = [(cupy.cuda.Event(), cupy.cuda.Event()) for _ in range(REPLAYS)]
        with self.stream:
            self._launch()
            for start, stop in pairs:
                start.record(self.stream)
                self._launch()
                stop.record(self.stream)
        self.stream.synchronize()
        for start, stop in pairs:
            self.times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3 / self.writes)

    @property
    def median(self) -> float:
        """Microseconds of one write."""
        return statistics.median(self.times)


@contextlib.contextmanager
def _current(stream: Any) -> Iterator[None]:
    """Make a stream current for CuPy and, if it is loaded, for PyTorch."""
    torch = sys.modules.get("torch")
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        if torch is not None:
            stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)))
        yield


@contextlib.contextmanager
def _capture(stream: Any) -> Iterator[list[Callable[[], None]]]:
    """Capture what is queued; a list receives the function that replays it."""
    launch: list[Callable[[], None]] = []
    torch = sys.modules.get("torch")
    if torch is None:
        stream.begin_capture()
        yield launch
        graph = stream.end_capture()
        launch.append(lambda: graph.launch(stream))
    else:
        # PyTorch's own capture, since its operators may allocate.
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.ExternalStream(stream.ptr)):
            yield launch
        external = torch.cuda.ExternalStream(stream.ptr)

        def replay() -> None:
            with torch.cuda.stream(external):
                graph.replay()

        launch.append(replay)


def host_microseconds(
    call: Callable[[int], Any], sets: int, drain: Callable[[], Any], calls: int = 300
) -> float:
    """Return the microseconds that `call` keeps the host, with each of so many sets in turn."""
    turns = [i % sets for i in range(calls)]
    drain()
    began = time.perf_counter()
    for i in turns:
        call(i)
    took = time.perf_counter() - began
    drain()
    return took / calls * 1e6


FIRST_CALL = """
import time
import cupy
import pagedcache as pc
k_cache, v_cache = (cupy.zeros((64, 8, 16, 128), cupy.float16) for _ in "kv")
k, v = (cupy.zeros((64, 8, 128), cupy.float16) for _ in "kv")
slots = cupy.arange(64)
cupy.cuda.Device().synchronize()
began = time.perf_counter()
with pc.Descriptor.create(k_cache, v_cache, k, v, slots) as descriptor:
    descriptor.calculate(k_cache, v_cache, k, v, slots)
    cupy.cuda.Device().synchronize()
print(time.perf_counter() - began)
"""


def first_call_seconds(repeats: int = 3) -> tuple[float, float]:
    """Return the seconds to a first completed write, with an empty compile cache and from disk."""
    cold: list[float] = []
    warm: list[float] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for times in (cold, warm):
                done = subprocess.run(
                    [sys.executable, "-c", FIRST_CALL],
                    env={**os.environ, "CUPY_CACHE_DIR": cache},
                    capture_output=True,
                    text=True,
                    check=True,
                )
                times.append(float(done.stdout))
    return statistics.median(cold), statistics.median(warm)
