# SPDX-License-Identifier: Apache-2.0
"""How times are measured.

GPU time: writes of all sets of inputs in turn are captured in one CUDA graph, which is replayed and
timed with events, so that it includes no host time. The result is the median over replays, in
rounds in which every competitor takes its turn, so that clock drift affects all of them alike.

Host time: the mean over many calls that are queued back to back; the result is the median over
rounds, with the queue drained in between.

First call: in a new process with a CUDA context, from ``Descriptor.create`` to the end of the first
write.
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

GRAPH_MICROSECONDS = 400  # target time of a graph, long enough for events
ROUNDS = 5
REPLAYS = 6


class Graph:
    """A captured graph of writes of all sets in turn; `time` replays it.

    Parameters
    ----------
    write : callable
        Called with ``i``, writes set ``i``.
    sets : int
        The number of sets.
    stream : cupy.cuda.Stream
        Not the default one.
    guess : float
        About how many microseconds one write takes.
    in_a_row : int
        How many times each set is written before the next.
    """

    def __init__(
        self, write: Write, sets: int, stream: Any, guess: float, in_a_row: int = 1
    ) -> None:
        self.stream = stream
        self._write = write  # its arrays must outlive the graph
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
        """Replay a few times, and record the microseconds per write."""
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
        """The median of the microseconds per write."""
        return statistics.median(self.times)


@contextlib.contextmanager
def _current(stream: Any) -> Iterator[None]:
    """Make a stream current in CuPy and, if it is imported, in PyTorch."""
    torch = sys.modules.get("torch")
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        if torch is not None:
            stack.enter_context(torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)))
        yield


@contextlib.contextmanager
def _capture(stream: Any) -> Iterator[list[Callable[[], None]]]:
    """Capture what is queued; the list then has the function that replays it."""
    launch: list[Callable[[], None]] = []
    torch = sys.modules.get("torch")
    if torch is None:
        stream.begin_capture()
        yield launch
        graph = stream.end_capture()
        launch.append(lambda: graph.launch(stream))
    else:
        # With PyTorch's own capture, since its operators may allocate.
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
    """Return the host time of one call in microseconds, over `sets` sets in turn."""
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
    """Return the seconds to the first completed write, compiled and from the cache on disk."""
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
