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
# A paged write reads K and V and writes them to the cache, so it can be no faster than memory
# allows. That is why we compare its time with that of a plain copy of the same bytes. This notebook
# runs the package's benchmark on your machine, on the GPU if there is one, and shows numbers
# recorded earlier on an H200.

# %%
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
from IPython.display import Image

import pagedcache as pc

handle = pc.Handle()
on_gpu = handle.device != "cpu"
NOTES = Path("..") / "notes"
scratch = Path(tempfile.mkdtemp())


def bench(*options, pdl=True):
    """Run the benchmark in a separate process, print its report, and return its numbers."""
    file = scratch / "numbers.json"
    command = [sys.executable, "-m", "pagedcache", "bench", "--json", str(file), *options]
    environment = os.environ if pdl else {**os.environ, "PAGEDCACHE_PDL": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


# %% [markdown]
# ## Your machine
#
# In the plot, the dashed line is the ceiling: a copy of the same bytes. With few tokens, nothing
# gets close to the memory bandwidth, because starting a write takes longer than moving its bytes.
# On a GPU, `memcpy` has to start two copies, one for K and one for V.
#
# The inputs are *cold* if K and V have to come from memory. On a GPU we also measure *hot* inputs:
# those are still in the L2 cache, if they fit, as if the kernel that computes them had just run.

# %%
TOKENS = ["1", "64", "1024", "4096", *(["16384", "65536"] if on_gpu else [])]
INPUTS = ["cold", *(["hot"] if on_gpu else [])]
picture = scratch / "rate.png"
here = bench("--tokens", *TOKENS, "--inputs", *INPUTS, "--plot", str(picture))

rows = here["gpu"][0]["rows"]  # cold
assert [row["tokens"] for row in rows] == [int(count) for count in TOKENS]
rates = [2 * row["payload"] / row["us"]["pagedcache"] for row in rows]  # bytes per microsecond
assert rates[-1] > 2 * rates[0]  # as we said: few tokens never reach the rate of many
Image(picture.read_bytes())

# %% [markdown]
# ## An H200, recorded earlier
#
# This notebook did not measure the following numbers: they come from one machine with an H200, in
# November 2026, and are stored in `notes/h200.json`. How they were obtained is described in
# `notes/performance.md`.

# %%
Image((NOTES / "h200.png").read_bytes())

# %%
h200 = json.loads((NOTES / "h200.json").read_text())
names = ("memcpy", "pagedcache", "SGLang", "FlashInfer", "vLLM")
recorded = {  # inputs -> number of tokens -> name -> microseconds
    result["axes"]["inputs"]: {row["tokens"]: row["us"] for row in result["rows"]}
    for result in h200["gpu"]
    if result["axes"]["layout"] == "HND" and result["axes"]["format"] == "copy"
}
print(f"{h200['machine']['device']}, pagedcache {h200['machine']['pagedcache']}")
for inputs, by_tokens in recorded.items():
    print(f"\nGPU time of one write, {inputs} inputs, us")
    print(f"{'tokens':>8}" + "".join(f"{name:>12}" for name in names))
    for tokens, us in by_tokens.items():
        print(f"{tokens:>8}" + "".join(f"{us[name]:>12.2f}" for name in names))

cold = recorded["cold"]
large = cold[65536]
print(f"\n65536 tokens, cold: {large['memcpy'] / large['pagedcache']:.3f} of the rate of a copy")
assert large["memcpy"] / large["pagedcache"] > 0.95
assert large["vLLM"] / large["pagedcache"] > 3.5
for us in cold.values():  # no peer is ahead by more than two runs differ
    assert us["pagedcache"] < 1.01 * min(us[name] for name in names[2:])

# %% [markdown]
# Caches of fewer bits take less time too, since a large write is bound by the bytes it moves. In
# this table, `copy` is the write of the same tokens as they are:

# %%
print("GPU time of one write of 65536 tokens, cold inputs, us")
print(f"{'format':<14} {'scale':<11}" + "".join(f"{name:>12}" for name in ("copy", *names[:2])))
for result in h200["gpu"]:
    axes, us = result["axes"], result["rows"][-1]["us"]
    if axes["format"] != "copy":
        times = (us["pagedcache copy"], us["memcpy"], us["pagedcache"])
        cells = "".join(f"{time:>12.2f}" for time in times)
        print(f"{axes['format']:<14} {axes['scale']:<11}{cells}")
        assert us["pagedcache"] < 0.75 * us["pagedcache copy"]

# %% [markdown]
# ## What a call costs the host
#
# The GPU is only half of the story: each call also keeps the host busy, checking its arguments and
# queueing the launch. This is the time until the call returns, for 64 tokens unless the column says
# otherwise:
#
# - `fixed`: the same number of tokens in each call;
# - `two in turn`: alternating between two numbers of tokens, 64 and 63;
# - `1 to 64`: a different number each time, as in a server whose batches grow and shrink;
# - `4 caches`: four caches of two different shapes in turn, as in a model with several kinds of
#   layers.
#
# `calculate` is the method of a descriptor, and `paged_caching` is the single call that needs none.
# If your arrays stay where they are and are only refilled, `descriptor.bind(...)` checks them once
# and returns a function that repeats the same call. `infiniopPagedCaching` takes raw addresses.

# %%
columns = ("fixed", "two in turn", "1 to 64", "4 caches")


def print_host_times(times):
    """Print the microseconds of one call: name -> column -> us."""
    print(f"{'':<32}" + "".join(f"{column:>13}" for column in columns))
    for name, row in times.items():
        cells = (f"{row[column]:.2f}" if column in row else "-" for column in columns)
        print(f"{name:<32}" + "".join(f"{cell:>13}" for cell in cells))


print("H200, recorded: host time of one call, us")
print_host_times(h200["host"])
assert all(us > 0 for row in h200["host"].values() for us in row.values())
if on_gpu:
    print("\nHere: host time of one call, us")
    print_host_times(here["host"])

# %% [markdown]
# ## What CUDA graphs change
#
# A launch from Python takes the host several microseconds, while a small write takes the GPU less
# than one. Launched one by one, small writes wait for Python. Captured in a graph, they follow each
# other as fast as the GPU can run them. Writing with a descriptor allocates no device memory,
# synchronizes nothing and compiles nothing, so it can be captured.

# %%
in_graph, on_host = cold[64]["pagedcache"], h200["host"]["calculate, CuPy"]["fixed"]
print(
    f"H200, recorded: one call of calculate {on_host:.2f} us on the host, the "
    f"write of 64 tokens in a graph {in_graph:.2f} us"
)
assert on_host > 3 * in_graph
if on_gpu:
    in_graph = {row["tokens"]: row["us"]["pagedcache"] for row in rows}[64]
    on_host = here["host"]["calculate, CuPy"]["fixed"]
    print(f"Here: {on_host:.2f} us on the host, {in_graph:.2f} us in a graph")

# %% [markdown]
# ## What programmatic dependent launch changes
#
# On GPUs of compute capability 9.0 and later, a kernel can be set up while the one ahead of it is
# still running, and wait only before it reads. This helps where latency is everything: in small
# writes. The first version of this brought a write of one token from 1.20 down to 1.04 us, and one
# of 1,024 tokens from 3.90 down to 3.61 us (H200, recorded earlier). Since then, small writes have
# also learned to prefetch their inputs into the L2 cache while they wait. `PAGEDCACHE_PDL=0` turns
# programmatic launch off.

# %%
text = (NOTES / "performance.md").read_text()
assert "| 1.20 / 1.33 / 3.90 | 1.04 / 1.17 / 3.61 |" in text
if on_gpu:
    options = ("--tokens", "1", "64", "1024", "--no-peers", "--only-gpu-time")
    with_pdl, without = bench(*options), bench(*options, pdl=False)
    for one, other in zip(with_pdl["gpu"][0]["rows"], without["gpu"][0]["rows"], strict=True):
        print(
            f"{one['tokens']:>6} tokens: {other['us']['pagedcache']:.2f} us without, "
            f"{one['us']['pagedcache']:.2f} us with"
        )
else:
    print("No GPU here, so there is nothing to turn it off for.")

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
    print(f"queued after {queued * 1e6:.0f} us, finished after {finished * 1e6:.0f} us")
    assert queued < finished
else:
    print("On the CPU, a write is done when the call returns.")

# %% [markdown]
# **Know whether your data is cached.** If you copy the same small array again and again, it stays
# in a cache near the processor. A real write gets new K and V each time, which may or may not still
# be cached. So the benchmark can measure both: for cold inputs, it cycles through so many that none
# of them is still cached; for hot inputs, through only a few. How much does this matter to a copy
# on this machine?


# %%
def microseconds(sources, target, repeats=40):
    """Return the median time of a copy, cycling through the sources."""
    times = []
    for turn in range(repeats):
        began = time.perf_counter()
        numpy.copyto(target, sources[turn % len(sources)])
        times.append((time.perf_counter() - began) * 1e6)
    return numpy.median(times)


sources = [numpy.full(1 << 20, i, numpy.uint8) for i in range(200)]  # a megabyte each
target = numpy.zeros_like(sources[0])
same = microseconds(sources[:1], target)
fresh = microseconds(sources, target)
print(f"the same megabyte again {same:.0f} us, another one each time {fresh:.0f} us")
assert (target == sources[39]).all()  # what we timed really happened

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
for file in scratch.iterdir():
    file.unlink()
scratch.rmdir()
