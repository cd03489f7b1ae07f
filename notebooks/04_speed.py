# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 4. How fast, and how to know
#
# > **Colab or Kaggle**: run this cell first, and upload h200.json from the folder notes, which is
# > beside that of this notebook.

# %%
# In Colab or Kaggle, take the # away from the next line; elsewhere the
# package is installed already.
# # %pip install -q "pagedcache[notebook,cuda12]"

# %% [markdown]
# A paged write reads K and V and writes them to the cache, so it can be no faster than memory
# allows. That is why we compare its time with that of a plain copy of the same bytes, a *memcpy*.
# This notebook runs the benchmark of the package on your machine, on the GPU if there is one, and
# draws numbers that were recorded on an H200.

# %%
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
from matplotlib import pyplot

import pagedcache as pc

on_gpu = pc.Handle().device != "cpu"
scratch = tempfile.TemporaryDirectory()
pyplot.rcParams["font.size"] = 11


def bench(*options, pdl=True):
    """Run the benchmark in a process of its own; return its numbers."""
    file = Path(scratch.name) / "numbers.json"
    file.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pagedcache",
        "bench",
        "--json",
        file.name,
    ]
    done = subprocess.run(
        [*command, *options], cwd=scratch.name, check=False,
        env=os.environ if pdl else {**os.environ, "PAGEDCACHE_PDL": "0"},
        capture_output=True, text=True,
    )  # fmt: skip
    print(done.stdout, done.stderr if done.returncode else "")
    return json.loads(file.read_text())


# %% [markdown]
# ## Your machine
#
# The picture shows bytes read and written in a second, so up is faster. The dashed line is a copy of
# the same bytes. With few tokens, nothing gets close to the bandwidth of the memory, since starting
# a write takes longer than moving its bytes. On a GPU, `memcpy` has to start two copies, one for K
# and one for V.
#
# The inputs are *cold* if K and V have to come from memory. On a GPU we also measure *hot* inputs:
# those are still in the L2 cache, if they fit, as if the kernel that computes them had just run.

# %%
TOKENS = [1, 64, 1024, 4096, *([16384, 65536] if on_gpu else [])]
INPUTS = ["cold", *(["hot"] if on_gpu else [])]
here = bench("--tokens", *map(str, TOKENS), "--inputs", *INPUTS)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
STYLES = {
    "memcpy": {"color": "black", "linestyle": "--"},
    "vLLM": {"color": "#009e73", "marker": "v"},
    "FlashInfer": {"color": "#e69f00", "marker": "^"},
    "SGLang": {"color": "#0072b2", "marker": "s"},
    "pagedcache": {"color": "#d55e00", "marker": "o", "linewidth": 3},
}


def rates(rows, name):
    """Return the bytes that are read and written in a second, by tokens."""
    return numpy.array(
        [2e6 * row["payload"] / row["us"][name] for row in rows]
    )


def draw_rates(ax, rows, unit="TB/s"):
    """Draw the rate of each competitor by the number of tokens."""
    tokens = [row["tokens"] for row in rows]
    for name, style in STYLES.items():
        if name in rows[0]["us"]:
            scale = {"TB/s": 1e12, "GB/s": 1e9}[unit]
            ax.plot(tokens, rates(rows, name) / scale, label=name, **style)
    ax.set(xscale="log", yscale="log", xlabel="tokens")
    ax.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=30)
    ax.set_xticks([], minor=True)
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.grid(visible=True, alpha=0.4)


_, axes = pyplot.subplots(
    1, len(INPUTS), figsize=(2 + 4.5 * len(INPUTS), 3.8), sharey=True, squeeze=False,
    layout="constrained",
)  # fmt: skip
unit = "TB/s" if on_gpu else "GB/s"
for ax, result in zip(axes[0], here["gpu"], strict=True):
    draw_rates(ax, result["rows"], unit)
    ax.set_title(f"Here, {result['axes']['inputs']} inputs")
axes[0, 0].set_ylabel(f"{unit}, read and written")
_ = axes[0, 0].legend()

# %% [markdown]
# ## An H200, recorded
#
# This notebook did not measure the following numbers. They come from one machine with an H200, in
# November 2026: 8 KV heads of size 128 in bfloat16, blocks of 16 slots, layout NHD. The
# [performance notes](../notes/performance.md) say how they were measured. The peers are the operators
# of vLLM 0.11.0, SGLang 0.5.10 and FlashInfer 0.6.7, in the same run.
#
# Up is faster in all four pictures. Above is the rate, below the rate relative to the two copies: at 1
# a write takes as long as they do.

# %%
files = [Path("..") / "notes" / "h200.json", Path("h200.json")]
file = next(file for file in files if file.exists())
h200 = json.loads(file.read_text())
recorded = {  # inputs -> rows, with the microseconds of each competitor
    result["axes"]["inputs"]: result["rows"]
    for result in h200["gpu"]
    if result["axes"]["layout"] == "NHD"
    and result["axes"]["format"] == "copy"
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, axes = pyplot.subplots(
    2, 2, figsize=(11, 8), sharex=True, sharey="row", layout="constrained"
)
for (above, below), (inputs, rows) in zip(
    axes.T, recorded.items(), strict=True
):
    draw_rates(above, rows)
    above.set(title=f"H200, {inputs} inputs", xlabel="")
    draw_rates(below, rows)
    for line in below.get_lines():
        line.set_ydata(
            rates(rows, line.get_label()) / rates(rows, "memcpy")
        )
    below.set(yscale="linear", ylim=(0, 3.3))
axes[0, 0].set_ylabel("TB/s, read and written")
axes[1, 0].set_ylabel("rate / rate of two copies")
_ = axes[0, 0].legend()

# %% [markdown]
# How can a write be faster than a copy of its bytes? With few tokens most of the time goes into
# starting: the two copies are two launches, the write is one kernel for K and V. For one token that
# is 0.7 us instead of 2.0. With many tokens the bytes count, and there the copies are a ceiling: the
# best writes take about 5 percent longer. A copy reads and writes memory in order, and a paged write
# stores to blocks in any order; blocks in order run at the rate of a copy.
#
# With 65,536 tokens and cold inputs, vLLM's operator takes 3.8 times as long as the copies. Why was
# not measured: its source was built alone and timed as it is.
#
# Caches of fewer bits take less time too, since a large write is bound by the bytes that it moves:
# K and V are read in 16 bits, and written in 8 or 4. Here is one memcpy of as many bytes as the
# write moves; with the copy, it is two. The copy is that of the run above, in layout HND, and the
# others are of another run on the same machine.

# %%
SCALES = {
    "tensor": "one scale",
    "token-head": "a scale per row",
    "group": "groups of 32",
}
stored = {}
for result in h200["gpu"]:
    shape = result["axes"]
    if shape["layout"] == "HND" and shape["inputs"] == "cold":
        names = shape["format"], SCALES.get(shape["scale"])
        label = ",\n".join(filter(None, names))
        stored[label] = result["rows"][-1]["us"]  # of 65,536 tokens

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, ax = pyplot.subplots(figsize=(9, 4.4), layout="constrained")
places = numpy.arange(len(stored))
for offset, name, colour in (
    (-0.2, "pagedcache", "#d55e00"),
    (0.2, "memcpy", "#bbbbbb"),
):
    times = [us[name] for us in stored.values()]
    bars = ax.barh(places + offset, times, 0.38, color=colour, label=name)
    ax.bar_label(bars, fmt="%.1f", padding=3)
ax.set_yticks(places, list(stored))
ax.invert_yaxis()
ax.margins(x=0.1)
ax.set(xlabel="GPU time of a write of 65,536 tokens, cold inputs, us")
_ = ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)

# %% [markdown]
# ## What a call costs the host
#
# The GPU is only half of the story: each call also keeps the host busy, checking its arguments and
# queueing the launch. A point is the time until the call returns, in one of four ways of calling:
#
# - *fixed*: the same number of tokens each time, 64;
# - *two in turn*: two numbers of tokens in turn, 64 and 63;
# - *1 to 64*: another number each time, as in a server whose batches grow and shrink;
# - *4 caches*: four caches of two different shapes in turn, as in a model with several kinds of
#   layers.
#
# `calculate` is the method of a descriptor, and `paged_caching` is the single call that needs none.
# If your arrays stay where they are and are only refilled, `descriptor.bind(...)` checks them once
# and returns a function that repeats the same call. `infiniopPagedCaching` takes raw addresses.
# *CuPy* and *torch* are the libraries that the arrays belong to. What took more than 20 us on the
# H200 is left out: a kernel in Triton, `index_put` of PyTorch, and indexing with CuPy.
#
# The points of one row differ by noise: the machine is shared, and in this run the same call took 7.3
# to 9.6 us. So `calculate` with tensors of PyTorch is slowest for a fixed number of tokens here; in a
# quieter run it took 8.0 us for these, and 8.0 to 8.7 us for the others.

# %% tags=["hide-input"] jupyter={"source_hidden": true}
SLOW = ("Triton rows", "torch index_put", "CuPy fancy")
MARKERS = {
    "fixed": "o",
    "two in turn": "s",
    "1 to 64": "^",
    "4 caches": "D",
}


def draw_host_times(times, title):
    """Draw the microseconds of one call: name -> way of calling -> us."""
    times = {name: row for name, row in times.items() if name not in SLOW}
    _, ax = pyplot.subplots(
        figsize=(9, 0.6 + 0.4 * len(times)), layout="constrained"
    )
    for way, marker in MARKERS.items():
        found = [
            (row[way], name) for name, row in times.items() if way in row
        ]
        ax.plot(
            *zip(*found, strict=True),
            marker,
            markersize=8,
            alpha=0.75,
            label=way,
        )
    ax.invert_yaxis()
    ax.grid(visible=True, alpha=0.4)
    ax.set(xlim=(0, None), xlabel="host time of one call, us", title=title)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


# %%
draw_host_times(h200["host"], "H200, recorded")
if on_gpu:
    draw_host_times(here["host"], "Here")

# %% [markdown]
# ## What CUDA graphs change
#
# A launch from Python takes the host several microseconds, and a small write takes the GPU about
# one. Launched one by one, small writes wait for Python. Captured in a graph, they follow each
# other as fast as the GPU can run them. A write with a descriptor allocates no device memory,
# synchronizes nothing and compiles nothing, so it can be captured. The picture is drawn from two
# measured times: that of a call on the host, and that of a write in a graph.


# %% tags=["hide-input"] jupyter={"source_hidden": true}
def draw_timeline(on_host, on_gpu, title, writes=5):
    """Draw writes that are called one by one, and the same in a graph."""
    _, ax = pyplot.subplots(figsize=(11, 2.6), layout="constrained")
    calls = [(i * on_host, on_host) for i in range(writes)]
    ax.broken_barh(calls, (0, 0.8), color="#56b4e9", edgecolor="black")
    ax.broken_barh(
        [(start + on_host, on_gpu) for start, _ in calls],
        (1, 0.8),
        color="#d55e00",
    )
    ax.broken_barh([(i * on_gpu, on_gpu) for i in range(writes)], (2.4, 0.8), color="#d55e00",
                   edgecolor="black")  # fmt: skip
    ax.set_yticks(
        [0.4, 1.4, 2.8],
        ["host, call by call", "GPU, call by call", "GPU, in a graph"],
    )
    ax.set(
        xlim=(0, None),
        xlabel="us",
        title=f"{title}: {writes} writes of 64 tokens",
    )
    ax.invert_yaxis()


# %%
def times_of(numbers, cold):
    """Return the host's and the GPU's microseconds of a write of 64 tokens."""
    row = next(row for row in cold if row["tokens"] == 64)
    return numbers["host"]["calculate, CuPy"]["fixed"], row["us"][
        "pagedcache"
    ]


draw_timeline(*times_of(h200, recorded["cold"]), "H200, recorded")
if on_gpu:
    draw_timeline(*times_of(here, here["gpu"][0]["rows"]), "Here")

# %% [markdown]
# ## What programmatic dependent launch changes
#
# On GPUs of compute capability 9.0 and later, a kernel can be set up while the one ahead of it is
# still running, and wait only before it reads. This helps where latency is everything: in small
# writes. `PAGEDCACHE_PDL=0` turns it off. When it was added to the kernel of that time, a write took on
# the H200, in microseconds:
#
# | tokens | 1 | 64 | 1,024 |
# |---|---|---|---|
# | without | 1.20 | 1.33 | 3.90 |
# | with | 1.04 | 1.17 | 3.61 |
#
# Both are faster in this version, since other things were changed as well
# ([notes on writes](../notes/writes.md)). On a GPU, the next cell measures it here.

# %%
if on_gpu:
    options = [
        "--tokens",
        "1",
        "64",
        "1024",
        "--no-peers",
        "--only-gpu-time",
    ]
    for name, pdl in (("without", False), ("with", True)):
        rows = bench(*options, pdl=pdl)["gpu"][0]["rows"]
        print(name, [f"{row['us']['pagedcache']:.2f} us" for row in rows])

# %% [markdown]
# ## How to time GPU code honestly
#
# **Wait for the GPU.** A call returns as soon as its work is queued. If you read the clock at that
# point, you have only timed the queueing.

# %%
if on_gpu:
    import cupy

    big = cupy.zeros(1 << 28, cupy.uint8)
    other = cupy.empty_like(big)
    cupy.copyto(other, big)  # compiles if needed
    cupy.cuda.Device().synchronize()
    began = time.perf_counter()
    cupy.copyto(other, big)
    queued = time.perf_counter() - began
    cupy.cuda.Device().synchronize()
    finished = time.perf_counter() - began
    print(f"queued after {queued * 1e6:.0f} us")
    print(f"finished after {finished * 1e6:.0f} us")
else:
    call = h200["host"]["calculate, CuPy"]["fixed"]
    write = recorded["cold"][-1]["us"]["pagedcache"]
    print(f"H200, recorded: a call returned after {call:.0f} us.")
    print(f"A write of 65,536 tokens took the GPU {write:.0f} us.")

# %% [markdown]
# **Know whether your data is cached.** If you copy the same small array again and again, it stays
# in a cache near the processor. A real write gets new K and V each time, which may or may not still
# be cached. So the benchmark can measure both: for cold inputs, it cycles through so many that none
# of them is still cached; for hot inputs, through only a few. How much does this matter to a copy
# on this machine?


# %%
def microseconds(sources, target, repeats=200):
    """Return the time of each copy, cycling through the sources."""
    times = []
    for turn in range(repeats):
        began = time.perf_counter()
        numpy.copyto(target, sources[turn % len(sources)])
        times.append((time.perf_counter() - began) * 1e6)
    return times


# A megabyte each.
sources = [numpy.full(1 << 20, i, numpy.uint8) for i in range(200)]
target = numpy.zeros_like(sources[0])
times = {
    "the same megabyte again": microseconds(sources[:1], target),
    "another one each time": microseconds(sources, target),
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, ax = pyplot.subplots(figsize=(9, 2.2), layout="constrained")
ax.eventplot(
    list(times.values()),
    lineoffsets=[0, 1],
    linelengths=0.7,
    color="#0072b2",
    alpha=0.3,
)
medians = [numpy.median(each) for each in times.values()]
ax.plot(medians, [0, 1], "D", color="black", markersize=9, label="median")
ax.set_yticks([0, 1], list(times))
ax.invert_yaxis()
ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
_ = ax.set(xlabel="us per copy", xlim=(0, 3 * max(medians)))

# %% [markdown]
# A few more rules:
#
# - Time many writes with one pair of events, and use a graph to keep the host out of it.
# - Compare competitors within one run, and let them take turns. Clocks drift, and machines differ.
# - Report the median, and point out differences that are no larger than those between two runs.
# - Check that what you time is correct. The benchmark first checks what each competitor writes.
# - Say which sizes you measured, and show the ones that went badly, too.
#
# The benchmark does all this: see `python -m pagedcache bench --help`.

# %%
scratch.cleanup()
