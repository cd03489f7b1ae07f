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
# A paged write reads K and V and writes them: it can be no faster than memory allows. So its time
# is measured beside a plain copy of the same bytes. This notebook runs the package's bench on this
# machine, on the GPU if there is one, and shows what was recorded earlier on an H200.

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
    """Run the bench in a process of its own, print what it says, and return its numbers."""
    file = scratch / "numbers.json"
    command = [sys.executable, "-m", "pagedcache", "bench", "--json", str(file), *options]
    environment = os.environ if pdl else {**os.environ, "PAGEDCACHE_PDL": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


# %% [markdown]
# ## This machine
#
# The dashed line is a copy of the same bytes, the ceiling. With few tokens nobody reaches the rate
# of memory, because starting a write takes longer than the bytes do. With `memcpy` on a GPU there
# are two copies to start, one of K and one of V.

# %%
TOKENS = ["1", "64", "1024", "4096", *(["16384", "65536"] if on_gpu else [])]
picture = scratch / "rate.png"
here = bench("--tokens", *TOKENS, "--plot", str(picture))

rows = here["gpu"][0]["rows"]
assert [row["tokens"] for row in rows] == [int(count) for count in TOKENS]
rates = [2 * row["payload"] / row["us"]["pagedcache"] for row in rows]  # bytes per microsecond
assert rates[-1] > 2 * rates[0]  # what was just said: few tokens never reach the rate of many
Image(picture.read_bytes())

# %% [markdown]
# ## An H200, recorded earlier
#
# These numbers were recorded in November 2026 in one run on an H200, not by this notebook. They are
# in `notes/h200.json`; how they came about is in `notes/performance.md`.

# %%
Image((NOTES / "h200.png").read_bytes())

# %%
h200 = json.loads((NOTES / "h200.json").read_text())
recorded = h200["gpu"][0]["rows"]
print(h200["machine"]["device"], "- GPU time of one write, us")
names = ("memcpy", "pagedcache", "SGLang", "FlashInfer", "vLLM")
print(f"{'tokens':>8}" + "".join(f"{name:>12}" for name in names))
for row in recorded:
    print(f"{row['tokens']:>8}" + "".join(f"{row['us'][name]:>12.2f}" for name in names))

by_tokens = {row["tokens"]: row["us"] for row in recorded}
large = by_tokens[65536]
print(f"\n65536 tokens: {large['memcpy'] / large['pagedcache']:.3f} of the rate of a copy")
assert large["memcpy"] / large["pagedcache"] > 0.95
assert large["vLLM"] / large["pagedcache"] > 3.5
for us in by_tokens.values():  # no peer is ahead by more than two runs differ
    assert us["pagedcache"] < 1.01 * min(us[name] for name in names[2:])

# %% [markdown]
# ## What CUDA graphs change
#
# A launch from Python keeps the host for microseconds, and a small write takes the GPU less than
# one. Launched one by one, small writes wait for Python. Captured in a graph, they follow each
# other as fast as the GPU can run them. A descriptor allocates, synchronises and compiles nothing
# when it writes, so it can be captured.

# %%
print(
    f"H200, recorded: one call of calculate {h200['host']['calculate']:.2f} us on the host, the "
    f"write of 64 tokens in a graph {by_tokens[64]['pagedcache']:.2f} us"
)
assert h200["host"]["calculate"] / by_tokens[64]["pagedcache"] > 7
if on_gpu:
    each = {row["tokens"]: row["us"]["pagedcache"] for row in rows}
    print(f"Here: {here['host']['calculate']:.2f} us on the host, {each[64]:.2f} us in a graph")

# %% [markdown]
# ## What programmatic dependent launch changes
#
# From compute capability 9.0 on, a kernel can be set up while the one ahead of it still runs, and
# wait only before it reads. That helps where latency is all there is: small writes. The first
# version of it took a write of one token from 1.20 to 1.04 us and one of 1,024 from 3.90 to 3.61
# (H200, recorded earlier). Since then the kernel also has its inputs brought to the L2 cache while
# it waits. `PAGEDCACHE_PDL=0` turns programmatic launch off.

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
    print("There is no GPU here to turn it off on.")

# %% [markdown]
# ## How to time GPU code honestly
#
# **Wait for the GPU.** A call returns when the work is queued. A clock that is read then has
# measured the queue.

# %%
if on_gpu:
    import cupy

    big = cupy.zeros(1 << 28, cupy.uint8)
    other = cupy.empty_like(big)
    cupy.copyto(other, big)  # compiles, if it must
    cupy.cuda.Device().synchronize()
    began = time.perf_counter()
    cupy.copyto(other, big)
    queued = time.perf_counter() - began
    cupy.cuda.Device().synchronize()
    finished = time.perf_counter() - began
    print(f"queued after {queued * 1e6:.0f} us, finished after {finished * 1e6:.0f} us")
    assert queued < finished
else:
    print("On the CPU a write is done when the call returns.")

# %% [markdown]
# **Use new data each time.** If the same small array is copied again and again, it stays in a cache
# near the processor. A real write finds its K and V elsewhere. The bench goes through so many
# inputs in turn that none is still cached. How different does a copy look here?


# %%
def microseconds(sources, target, repeats=40):
    """Return the median time of a copy, from all sources in turn."""
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
assert (target == sources[39]).all()  # what was timed did happen

# %% [markdown]
# Also:
#
# - Time many writes with one pair of events, and take the host out with a graph.
# - Let all competitors take turns in one run and compare them there. Clocks drift, and machines
#   differ.
# - Report the median, and say what differs by less than two runs do.
# - Check that what was timed was right. The bench first compares what each competitor wrote.
# - Say which sizes were measured, and show those that went badly too.
#
# The bench does all this: `python -m pagedcache bench --help`.

# %%
for file in scratch.iterdir():
    file.unlink()
scratch.rmdir()
