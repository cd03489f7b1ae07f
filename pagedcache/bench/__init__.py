# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedcache bench``: write and gather against a memcpy and the installed peers."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import platform
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import pagedcache as pc
from pagedcache.bench import peers
from pagedcache.bench.case import (
    COPY,
    DEFAULT_SCALES,
    GROUP,
    INPUTS,
    OPERATORS,
    SCALES,
    SLOT_ORDERS,
    SOURCES,
    Axes,
    Case,
)
from pagedcache.bench.host import host_times, print_host_times
from pagedcache.bench.measure import ROUNDS, Graph, first_call_seconds

TOKENS = (1, 64, 256, 1024, 4096, 16384, 65536)
CPU_TOKENS = (64, 1024, 4096, 16384)
MEMCPY = "memcpy"
GPU_SLOTS = 262_144
PICTURES = (".png", ".svg", ".pdf")
IN_A_ROW = 10  # consecutive writes of one hot set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options. Axes take several values; all combinations are measured."""
    axis = {field.name: field for field in dataclasses.fields(Axes)}

    def add(name: str, kind: Any, **more: Any) -> None:
        flag = "--" + name.replace("_", "-")
        default = [axis[name].default]
        more["help"] = f"{more.get('help', '')} (default: {default[0]})".strip()
        parser.add_argument(flag, type=kind, nargs="+", default=default, **more)

    sizes = (
        f"tokens per write (default: {TOKENS[0]} to {TOKENS[-1]}; on the CPU, {CPU_TOKENS[0]} to "
        f"{CPU_TOKENS[-1]})"
    )
    capacity = f"slots per cache (default: {GPU_SLOTS}; on the CPU, four times the tokens)"
    sources = "whether K and V are arrays of their own or slices of a fused QKV projection"
    parser.add_argument("--tokens", type=_positive, nargs="+", metavar="N", help=sizes)
    add("heads", _positive, metavar="N", help="number of KV heads")
    add("head_size", _positive, metavar="N", help="head size of K")
    add("block_size", _positive, metavar="N", help="slots per block")
    parser.add_argument(
        "--v-head-size", type=_positive, metavar="N", help="head size of V (default: that of K)"
    )
    add("dtype", str, choices=("float16", "bfloat16", "float32"), help="dtype of K, V and caches")
    add("layout", str, choices=("HND", "NHD"), help="layout of the caches")
    add("slots", str, choices=SLOT_ORDERS, help="how tokens are spread over the slots")
    add("source", str, choices=SOURCES, help=sources)
    add("inputs", str, choices=INPUTS, help="whether inputs are in the L2 cache (hot) or not")
    formats = f"how K and V are stored; {COPY}: in their own dtype"
    add("format", str, choices=tuple(DEFAULT_SCALES), help=formats)
    scales = (
        f"what shares a scale; a group is {GROUP} dimensions (default: tensor for 8-bit floats, "
        "token-head for int8, group for int4)"
    )
    parser.add_argument("--scale", nargs="+", choices=SCALES, help=scales)
    add("operator", str, choices=OPERATORS, help="write into the caches, or read back from them")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if usable)")
    parser.add_argument("--num-slots", type=_positive, metavar="N", help=capacity)
    parser.add_argument(
        "--only-gpu-time", action="store_true", help="skip host time and first call"
    )
    parser.add_argument(
        "--only-host-time", action="store_true", help="skip GPU time and first call"
    )
    parser.add_argument(
        "--fused",
        action="store_true",
        help="measure writes with steps, beside fused kernels of peers; of the other options only "
        "--tokens, --num-slots, --device, --no-peers, --only-gpu-time, --only-host-time and --json",
    )
    parser.add_argument(
        "--blocks",
        action="store_true",
        help="measure slot mappings, copies of blocks, host memory and the pool; of the other "
        "options only --device and --json",
    )
    parser.add_argument(
        "--transfer",
        action="store_true",
        help="measure blocks to another process with NIXL; of the other options only --json",
    )
    parser.add_argument("--no-peers", action="store_true", help="skip the peers")
    parser.add_argument("--json", type=_file, metavar="FILE", help="write all results to FILE")
    parser.add_argument(
        "--plot", type=_picture, metavar="FILE", help="plot the rate against tokens to FILE"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the bench.

    Returns
    -------
    int
        0, or 2 if the arguments cannot be used.
    """
    if arguments.transfer:
        from pagedcache.bench import transfer

        return transfer.run(arguments)
    try:
        handle = pc.Handle(arguments.device)
    except pc.PagedCacheError as error:
        print(f"pagedcache bench: {error}")
        return 2
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        print("--plot needs matplotlib: pip install matplotlib")
        return 2
    on_gpu = handle.device != "cpu"
    if arguments.only_host_time and not on_gpu:
        print("--only-host-time needs a GPU: on the CPU, a write is done when the call returns")
        return 2
    tokens = arguments.tokens or (TOKENS if on_gpu else CPU_TOKENS)
    if arguments.num_slots and arguments.num_slots < max(tokens):
        print(f"--num-slots must be at least the number of tokens, {max(tokens)}")
        return 2
    if arguments.fused:
        return _run_fused(arguments, handle)
    if arguments.blocks:
        from pagedcache.bench.blocks import run_blocks

        blocks = {"machine": _machine(handle), "blocks": run_blocks(arguments.device)}
        if arguments.json:
            arguments.json.write_text(json.dumps(blocks, indent=1) + "\n")
        return 0
    cases = [] if arguments.only_host_time else list(_axes(arguments, tokens[0]))
    problem = next(filter(None, (axes.problem() for axes in cases)), "")
    if arguments.scale and set(arguments.format) == {COPY}:
        problem = f"--scale needs a --format other than {COPY}, which has no scales"
    if problem:
        print(problem)
        return 2
    print(f"{handle!r}")
    if not on_gpu:
        print("No GPU is used: the CPU backend is compared with NumPy's copy of the same bytes.")
    results: dict[str, Any] = {"machine": _machine(handle), "gpu": [], "host": {}, "first_call": {}}
    for axes in cases:
        print(f"\n{axes.describe()}")
        measure = _on_gpu if on_gpu else _on_cpu
        rows = []
        with _progress(len(tokens)) as step:
            for count in tokens:
                rows.append(measure(dataclasses.replace(axes, tokens=count), arguments))
                step()
        missing = {name: why for row in rows for name, why in row.pop("missing", {}).items()}
        _print_table(rows, axes.operator)
        for name, why in missing.items():
            print(f"  {name} is not measured: {why}")
        results["gpu"].append({"axes": dataclasses.asdict(axes), "rows": rows})
    if on_gpu and not arguments.only_gpu_time:
        results["host"], missing = host_times(with_peers=not arguments.no_peers)
        print_host_times(results["host"], missing)
    if on_gpu and not arguments.only_gpu_time and not arguments.only_host_time:
        cold, warm = first_call_seconds()
        results["first_call"] = {"empty cache": cold, "from disk": warm}
        print("\nFirst completed write, timed from create on, with a CUDA context")
        print(f"  {cold:.3f} s with an empty compile cache, {warm:.3f} s from the cache on disk")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"Results: {arguments.json}")
    if arguments.plot and results["gpu"]:
        _plot(results, arguments.plot, on_gpu=on_gpu)
        print(f"Plot: {arguments.plot}")
    return 0


def _run_fused(arguments: argparse.Namespace, handle: pc.Handle) -> int:
    """Measure writes with steps."""
    if handle.device == "cpu":
        print("--fused needs a GPU")
        return 2
    if importlib.util.find_spec("torch") is None:
        print("--fused needs PyTorch: pip install torch")
        return 2
    from pagedcache.bench import fused

    tokens = tuple(arguments.tokens or TOKENS)
    slots = arguments.num_slots or GPU_SLOTS
    print(f"{handle!r}\n{fused.DESCRIPTION}")
    results: dict[str, Any] = {"machine": _machine(handle), "fused": {}, "host": {}}
    if not arguments.only_host_time:
        with _progress(len(tokens) * len(fused.PIPELINES)) as step:
            results["fused"] = fused.gpu_times(
                tokens, slots, with_peers=not arguments.no_peers, step=step
            )
        for name, rows in results["fused"].items():
            fused.print_rows(fused.PIPELINES[name], rows)
    if not arguments.only_gpu_time:
        results["host"] = fused.host_time(fused.PIPELINES["rope"], slots)
        print("\nHost time of a call with q, k and v rotated, 1 to 64 tokens, us")
        for name, microseconds in results["host"].items():
            print(f"  {name:28} {microseconds:8.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"Results: {arguments.json}")
    return 0


def _axes(arguments: argparse.Namespace, tokens: int) -> Iterator[Axes]:
    names = ("heads", "head_size", "block_size", "dtype", "layout", "slots", "source", "inputs")
    stored = [
        (name, scale)
        for name in arguments.format
        for scale in ([""] if name == COPY else arguments.scale or [DEFAULT_SCALES[name]])
    ]
    every = [getattr(arguments, name) for name in names]
    for *values, (form, scale), operator in itertools.product(*every, stored, arguments.operator):
        chosen = dict(zip(names, values, strict=True))
        chosen |= {"format": form, "scale": scale, "operator": operator}
        v_head_size = arguments.v_head_size or chosen["head_size"]
        yield Axes(tokens=tokens, v_head_size=v_head_size, **chosen)


def _on_gpu(axes: Axes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the time of every competitor for one case, in microseconds."""
    import cupy

    device = cupy.cuda.Device()
    rotate = 4 * device.attributes["L2CacheSize"]
    case = Case(axes, cupy, arguments.num_slots or GPU_SLOTS, rotate)
    stream = cupy.cuda.Stream(non_blocking=True)
    guess = 2 + axes.payload * 2 / 4e6
    in_a_row = IN_A_ROW if axes.inputs == "hot" else 1
    missing: dict[str, str] = {}
    graphs: dict[str, Graph] = {}

    def copy(i: int) -> None:
        for target, to, source, at, size in case.memcpys(i):
            places = target.data.ptr + to, source.data.ptr + at
            cupy.cuda.runtime.memcpyAsync(*places, size, 3, stream.ptr)

    device.synchronize()
    graphs[MEMCPY] = Graph(copy, len(case.sets), stream, guess, in_a_row)
    competitors = {peers.OURS: peers.PEERS[peers.OURS]} if arguments.no_peers else peers.PEERS
    for name, prepare in [*_copy(axes), *competitors.items()]:
        used = case.plain if name == peers.COPY else case
        try:
            used.clear()
            write = prepare(used)
            write(0)
            device.synchronize()
            if name not in peers.OWN_CACHE and not used.is_right(0):
                raise peers.UnavailableError("its result is wrong")
            graphs[name] = Graph(write, len(case.sets), stream, guess, in_a_row)
        except Exception as error:  # a peer may refuse a case with any error
            if name == peers.OURS:
                raise
            missing[name] = peers.why(error)
    for _ in range(ROUNDS):
        for graph in graphs.values():
            graph.time()
    times = {name: graph.median for name, graph in graphs.items()}
    return {"tokens": axes.tokens, "payload": axes.payload, "us": times, "missing": missing}


def _on_cpu(axes: Axes, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the time of the cpu backend and of NumPy's copy, in microseconds."""
    case = Case(axes, np, arguments.num_slots or 4 * axes.tokens, 1 << 26)
    copies = [
        [
            (_as_bytes(target)[to : to + size], _as_bytes(source)[at : at + size])
            for target, to, source, at, size in case.memcpys(i)
        ]
        for i in range(len(case.sets))
    ]

    def copy(i: int) -> None:
        for target, rows in copies[i]:
            np.copyto(target, rows)

    functions: dict[str, peers.Write] = {MEMCPY: copy}
    for name, _ in [*_copy(axes), (peers.OURS, None)]:
        used = case.plain if name == peers.COPY else case
        used.clear()
        functions[name] = peers.pagedcache(used)
        functions[name](0)
        if not used.is_right(0):
            raise AssertionError("the cpu backend wrote wrong bytes")
    best = {}
    for name, function in functions.items():
        times = []
        for turn in range(max(10, 2 * len(case.sets))):
            began = time.perf_counter()
            function(turn % len(case.sets))
            times.append((time.perf_counter() - began) * 1e6)
        best[name] = float(np.median(times))
    return {"tokens": axes.tokens, "payload": axes.payload, "us": best}


def _copy(axes: Axes) -> list[tuple[str, Any]]:
    """Return this package's plain copy as a competitor, if caches are in a format of their own."""
    return [] if axes.format == COPY else [(peers.COPY, peers.pagedcache)]


def _as_bytes(array: Any) -> Any:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _print_table(rows: list[dict[str, Any]], operator: str = "write") -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["us"]))
    rivals = [name for name in names if name not in (MEMCPY, peers.OURS, peers.COPY)]
    head = f"{'tokens':>8} " + " ".join(f"{name:>15}" for name in names)
    head += f" {'of memcpy rate':>15}" + (f" {'of copy time':>13}" if peers.COPY in names else "")
    head += f" {'of best peer':>13}" if rivals else ""
    print(f"Time of one {operator}, us\n{head}")
    ratios = []
    for row in rows:
        times = row["us"]
        line = f"{row['tokens']:>8} "
        line += " ".join(f"{times[name]:>15.2f}" if name in times else " " * 15 for name in names)
        line += f" {times[MEMCPY] / times[peers.OURS]:>15.3f}"
        if peers.COPY in names:
            copied = times.get(peers.COPY)
            line += f" {times[peers.OURS] / copied:>13.3f}" if copied else " " * 14
        best = min((times[name] for name in rivals if name in times), default=None)
        if best is not None:
            ratios.append(times[peers.OURS] / best)
            line += f" {ratios[-1]:>13.3f}"
        print(line)
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"  geometric mean, as a multiple of the best peer's time: {mean:.3f}")


def _machine(handle: pc.Handle) -> dict[str, str]:
    machine = {
        "device": handle.opened().describe(),
        "python": platform.python_version(),
        "pagedcache": pc.__version__,
        "numpy": np.__version__,
    }
    if handle.device != "cpu":
        import cupy

        cupy.cuda.Device(int(handle.device.partition(":")[2])).use()
        machine["cupy"] = cupy.__version__
        machine["driver"] = str(cupy.cuda.runtime.driverGetVersion())
        machine["nvrtc"] = ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    return machine


def _plot(results: dict[str, Any], file: Path, *, on_gpu: bool) -> None:
    """Plot the rate against tokens, one line per competitor, with the memcpy as the ceiling."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    # Red is reserved for this package.
    colours = [f"tab:{name}" for name in ("blue", "orange", "green", "purple", "brown", "gray")]
    unit, scale = ("TB/s", 1e6) if on_gpu else ("GB/s", 1e3)
    columns = min(2, len(results["gpu"]))
    lines = -(-len(results["gpu"]) // columns)
    figure, panels = pyplot.subplots(
        lines, columns, figsize=(7 * columns, 4.6 * lines), squeeze=False, layout="constrained"
    )
    for panel in panels.flat[len(results["gpu"]) :]:
        panel.set_axis_off()
    for panel, result in zip(panels.flat, results["gpu"], strict=False):
        rows = result["rows"]
        axes = Axes(**result["axes"])
        panel.set_prop_cycle(color=colours)
        for name in dict.fromkeys(name for row in rows for name in row["us"]):
            moved = axes.plain if name == peers.COPY else axes
            points = [
                (count, 2 * dataclasses.replace(moved, tokens=count).payload / time_us / scale)
                for count, time_us in ((row["tokens"], row["us"].get(name)) for row in rows)
                if time_us is not None
            ]
            style: dict[str, Any] = {}
            if name == MEMCPY:
                style = {"color": "black", "linestyle": "--"}
            if name == peers.OURS:
                style = {"color": "tab:red", "linewidth": 2.5, "zorder": 3}
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        panel.set(xscale="log", yscale="log", xlabel="tokens", ylabel=f"{unit}, read and written")
        panel.set_xticks([row["tokens"] for row in rows], [f"{row['tokens']:,}" for row in rows])
        panel.set_xticks([], minor=True)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.set_yticks([], minor=True)
        panel.set_title(textwrap.fill(axes.describe(), 95, break_on_hyphens=False), fontsize=9)
        panel.grid(visible=True, which="both", alpha=0.25)
        panel.legend(fontsize=8)
    figure.suptitle(results["machine"]["device"], fontsize=10)
    figure.savefig(file, dpi=130)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=total, unit="size", leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def _file(text: str) -> Path:
    file = Path(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"must be in an existing folder, but {file.parent} is not a folder"
        )
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, but {file} is a folder")
    return file


def _picture(text: str) -> Path:
    file = _file(text)
    if file.suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"must end in one of {', '.join(PICTURES)}, got {text}")
    return file


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


_positive.__name__ = "int"  # the name in argparse's errors
