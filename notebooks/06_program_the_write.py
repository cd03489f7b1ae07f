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
# # 6. Program the write
#
# > **Colab or Kaggle**: run this cell first.

# %%
# In Colab or Kaggle, take the # away from the next line; elsewhere the
# package is installed already.
# # %pip install -q "pagedcache[notebook,cuda12]"

# %% [markdown]
# A paper proposes another norm for K, another rotation, or another way to round. To try it in an
# engine, somebody writes a CUDA kernel: for the idea, but mostly for what is around it, such as
# pages, layouts, strides, scales and padding. That is a lot of work to try an idea.
#
# Here you write the idea alone, as an expression for what one element becomes, and get a kernel
# that does the rest. In this notebook we try four ideas from papers: a rotation before rounding, a
# norm, a rotation for images and a quantiser. Then we put them into one kernel, look at its
# errors, and at its speed.

# %%
import sys
import time
from statistics import NormalDist

import numpy
from matplotlib import pyplot
from tqdm import tqdm

import pagedcache as pc

on_gpu = pc.Handle().device != "cpu"
if on_gpu:
    import cupy as xp
else:
    xp = numpy


def host(array):
    """Return the array as a NumPy array on the host."""
    return array.get() if on_gpu else array


print(pc.Handle())

# %% [markdown]
# Our tokens are the patches of an image, 32 rows of 32. Q, K and V have 4 heads of 64. They are
# random, but K has what K of real models has ([notebook 5](05_formats.ipynb)): a few dimensions
# that are much larger than the others.

# %%
SIDE, HEADS, SIZE, BLOCK_SIZE = 32, 4, 64, 16
TOKENS = SIDE * SIDE
rng = numpy.random.default_rng(0)
q, k, v = (
    xp.asarray(rng.standard_normal((TOKENS, HEADS, SIZE), numpy.float32))
    for _ in "qkv"
)
k[:, :, 5::20] *= 10
slots = xp.asarray(rng.permutation(TOKENS))
BLOCKS = TOKENS // BLOCK_SIZE


def int4_pages():
    """Return empty pages and scales, a scale for each 32 dimensions."""
    # Two elements are in a byte.
    pages = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, SIZE // 2), xp.uint8)
    scales = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, SIZE // 32), xp.float32)
    return pages, scales


def error(found, wanted):
    """Return the root mean square of the difference, % of what is wanted."""
    found, wanted = host(found).astype(float), host(wanted).astype(float)
    return 100 * numpy.sqrt(
        ((found - wanted) ** 2).mean() / (wanted**2).mean()
    )


# %% [markdown]
# ## An idea in one cell
#
# QuaRot ([Ashkboos et al. 2024](https://arxiv.org/abs/2404.00456)) says: before you round a row to
# 4 bits, rotate it by a Hadamard transform, so that no dimension is large. A list of *steps* says
# what happens to a row on its way into the cache, and another what happens on its way back. The
# transform undoes itself.

# %%
plain = {"k_format": "int4", "v_format": "int4"}
turn = {"k": [pc.hadamard()], "v": [pc.hadamard()]}
store = pc.WriteKernel(**turn, **plain)
load = pc.ReadKernel(**turn, **plain)

# %% [markdown]
# That is all of it. Is it any good? We write our K and V, read them back, and do the same without
# the transform. Parameters of a kernel, which come later, are for the write.


# %%
def round_trip(store, load, k, v, **parameters):
    """Write K and V into pages of int4, and return what is read back."""
    (k_pages, k_scales), (v_pages, v_scales) = int4_pages(), int4_pages()
    scales = {"k_scale": k_scales, "v_scale": v_scales}
    store(k_pages, v_pages, k, v, slots, **scales, **parameters)
    k_read, v_read = xp.empty_like(k), xp.empty_like(v)
    load(k_pages, v_pages, slots, k_read, v_read, **scales)
    return k_read, v_read


as_it_is = round_trip(pc.WriteKernel(**plain), pc.ReadKernel(**plain), k, v)
turned = round_trip(store, load, k, v)
both = {"int4": as_it_is, "Hadamard": turned}
for name, (k_read, v_read) in both.items():
    of_k, of_v = error(k_read, k), error(v_read, v)
    print(f"{name:<9} error of K {of_k:5.1f} %, of V {of_v:5.1f} %")

# %% [markdown]
# On K, which has large dimensions, the transform more than halves the error. On V, which has none,
# it changes nothing.
#
# ## A norm of your own
#
# Where no named step says what you mean, write an *expression*: what an element `x` becomes.
# `row_mean` and its relatives combine a whole row, which is one token in one head. `dim` and `head`
# say where the element is. Any other name is a *parameter*, a number or an array that you pass by
# its name in the call.
#
# A vision transformer of 22 billion parameters
# ([Dehghani et al. 2023](https://arxiv.org/abs/2302.05442)) has a layer norm for Q and K:

# %%
CENTRED = "(x - row_mean(x))"
DEVIATION = f"sqrt(row_mean({CENTRED} ** 2) + eps)"
LAYER_NORM = f"{CENTRED} / {DEVIATION} * gain[head, dim]"
normalise = pc.WriteKernel(q=[LAYER_NORM], k=[LAYER_NORM])
normalise

# %% [markdown]
# An expression looks like Python, but it is data, and is never run as code. What is not in the
# language is refused when you make the kernel:

# %%
try:
    pc.WriteKernel(k=["x / sqrt(row_men(x * x) + eps)"])
except pc.PagedCacheError as mistake:
    print(mistake)

# %% [markdown]
# On the CPU, NumPy evaluates the expression. For a GPU, it is printed as CUDA and compiled. You
# never need to look at that, but you can, and need no GPU for it. This is what becomes of an
# element; `rows` holds the means, which other functions computed before:

# %%
source = normalise.source
begin = source.index("__device__ __forceinline__ float k0_element(")
print(source[begin : source.index("\n}\n", begin) + 2])

# %% [markdown]
# `add`, `divide` and the others round once, as IEEE 754 says, and the compiler may not contract
# them, so the CPU and all GPUs give the same bits. (A table in the guide to
# [expressions](../docs/howto/program_the_write.md) says for which functions this holds; `cos` and
# `sin`, of which we need both below, may differ in the last bits.) Around this comes the rest of
# the kernel, which is the same for all ideas. How much is made of your line, for Q and for K?

# %%
print(f"{len(LAYER_NORM)} characters of yours, {len(source):,} of CUDA")

# %% [markdown]
# ## A rotation of your own
#
# RoPE turns pairs of dimensions by an angle that grows with the position of the token, so that the
# product of Q and K depends on how far apart two tokens are, and not on where. In an image, a
# position has a row and a column. RoPE-Mixed
# ([Heo et al. 2024](https://arxiv.org/abs/2403.13298)) gives each pair of each head two
# frequencies, one for each, and lets the model learn them.
#
# `at(d)` is the element of the same row at another dimension: here the other of the pair.

# %%
DOWN = "of_row[head, dim // 2] * row[token]"
ACROSS = "of_column[head, dim // 2] * column[token]"
ANGLE = f"({DOWN} + {ACROSS})"
OTHER = "at(dim + 1 - 2 * (dim % 2))"
SIGN = "where(dim % 2 == 0, -1, 1)"
ROTATE = f"x * cos({ANGLE}) + {SIGN} * {OTHER} * sin({ANGLE})"
rotate = pc.WriteKernel(q=[ROTATE], k=[ROTATE])

# %% [markdown]
# We make up frequencies: those of a pair are a speed and a direction, from along the rows to across
# them. All patches get the same Q and K, so that only the rotation makes a difference, and we draw
# the products of Q of one patch with K of all of them.

# %%
row, column = (
    xp.asarray(each.ravel()) for each in numpy.mgrid[:SIDE, :SIDE]
)
directions = rng.uniform(-0.3, 0.3, (HEADS, SIZE // 2))
directions[1] += numpy.pi / 2  # heads 0 and 1: all much the same
directions[2:] *= numpy.pi / 0.3  # heads 2 and 3: all around
speeds = 10.0 ** -numpy.linspace(0, 1.5, SIZE // 2)
place = {
    "row": row,
    "column": column,
    "of_row": xp.asarray(
        (numpy.cos(directions) * speeds).astype(numpy.float32)
    ),
    "of_column": xp.asarray(
        (numpy.sin(directions) * speeds).astype(numpy.float32)
    ),
}
zeros = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, SIZE), xp.float32)
alike = xp.ones((TOKENS, HEADS, SIZE), xp.float32)
q_turned, k_turned = xp.empty_like(alike), xp.empty_like(alike)
rotate(
    zeros.copy(), zeros.copy(), alike, v, slots,
    q=alike, q_out=q_turned, k_out=k_turned, **place,
)  # fmt: skip

middle = SIDE // 2 * SIDE + SIDE // 2
products = (host(k_turned) * host(q_turned)[middle]).sum(-1) / SIZE

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, axes = pyplot.subplots(
    1, HEADS, figsize=(12, 3.6), sharey=True, layout="constrained"
)
for head, ax in enumerate(axes):
    picture = ax.imshow(
        products[:, head].reshape(SIDE, SIDE),
        cmap="cividis",
        vmin=products.min(),
    )
    ax.plot(
        SIDE // 2, SIDE // 2, "o", color="white", markeredgecolor="black"
    )
    ax.set(title=f"head {head}", xlabel="column of the patch")
axes[0].set_ylabel("row of the patch")
_ = pyplot.colorbar(picture, ax=axes, label="product of Q and K")

# %% [markdown]
# Heads 0 and 1 attend to their own row and their own column of the image, heads 2 and 3 to what is
# near in all directions. No named step does this, and no kernel had to be written.
#
# ## A quantiser of your own
#
# An int4 is one of 16 *codes*, -8 to 7, and stands for the code times the scale: its *level*. These
# levels are evenly spaced, but elements are not: most are small. QLoRA
# ([Dettmers et al. 2023](https://arxiv.org/abs/2305.14314)) places levels close together where a
# normal distribution has many elements, and calls that NF4. Here are its levels, and our elements
# relative to the largest in their group of 32 dimensions:

# %%
END = 0.9677083  # the outermost quantile
quantile = numpy.vectorize(NormalDist().inv_cdf)
above = quantile(numpy.linspace(END, 0.5, 9)[:-1])
below = quantile(numpy.linspace(END, 0.5, 8)[:-1])
level = numpy.sort([*above, 0, *-below]) / above.max()
edge = (level[1:] + level[:-1]) / 2  # of elements with the nearest level

groups = host(v).reshape(-1, 32)
relative = groups / abs(groups).max(-1, keepdims=True)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, ax = pyplot.subplots(figsize=(10, 3.6), layout="constrained")
ax.hist(
    relative.ravel(),
    121,
    color="lightgray",
    density=True,
    label="elements of V",
)
for heights, places, name, colour in (
    ((-0.12, -0.02), level, "NF4", "#0072b2"),
    ((-0.26, -0.16), numpy.arange(-7, 8) / 7, "int4", "#e69f00"),
):
    ax.vlines(places, *heights, color=colour, linewidth=3, label=name)
ax.set(
    xlabel="element, relative to the largest of its group",
    ylabel="density",
    xlim=(-1.05, 1.05),
)
ax.set_yticks([0, 0.5, 1])
_ = ax.legend(
    loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False
)

# %% [markdown]
# `quantize` takes two expressions: the scale of a group, and the code of an element, in which `s`
# is that scale. A code is the number of edges below the element, less 8, as int4 goes from -8 to
# 7. An expression is a string, so Python can write it for us, with the edges in it as numbers.
#
# For reading, `ReadKernel` gives us the code as `x`, if we say that the scale is 1, and we look up
# the level. `load` is then given the scales by names of our own, and `round_trip_codes` does that. An
# index such as `int(x) + 8` is checked as the kernel runs: one outside of its array
# is never read, and `check()` tells you.

# %%
CODE = " + ".join(f"(x >= s * {each:.6f})" for each in edge) + " - 8"
NF4 = pc.quantize("max(row_max(abs(x)), 1e-6)", CODE, "int4", group=32)


def decoded(scale):
    return f"level[int(x) + 8] * {scale}[block, offset, head, dim // 32]"


store_nf4 = pc.WriteKernel(k=[NF4], v=[NF4])
load_nf4 = pc.ReadKernel(
    k=[decoded("k_scales")], v=[decoded("v_scales")], **plain
)
levels = xp.asarray(level, xp.float32)
print(CODE[:66], "...")


def round_trip_codes(store, load, k, v, **parameters):
    """Do the same, with a `load` that makes elements of codes and scales."""
    (k_pages, k_scales), (v_pages, v_scales) = int4_pages(), int4_pages()
    scales = {"k_scale": k_scales, "v_scale": v_scales}
    store(k_pages, v_pages, k, v, slots, **scales, **parameters)
    one = xp.ones(1, xp.float32)
    known = {"level": levels, "k_scales": k_scales, "v_scales": v_scales}
    named = {name: known[name] for name in load.parameters}
    k_read, v_read = xp.empty_like(k), xp.empty_like(v)
    load(
        k_pages, v_pages, slots, k_read, v_read,
        k_scale=one, v_scale=one, **named,
    )  # fmt: skip
    return k_read, v_read


# %% [markdown]
# With the transform from above it is one step more in each list. All four take the same memory.

# %%
turn_nf4 = pc.WriteKernel(k=[pc.hadamard(), NF4], v=[pc.hadamard(), NF4])
back_nf4 = pc.ReadKernel(
    k=[decoded("k_scales"), pc.hadamard()],
    v=[decoded("v_scales"), pc.hadamard()],
    **plain,
)
trips = {
    "int4": as_it_is,
    "NF4": round_trip_codes(store_nf4, load_nf4, k, v),
    "int4, Hadamard": turned,
    "NF4, Hadamard": round_trip_codes(turn_nf4, back_nf4, k, v),
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
STYLES = {"K": ("o", "#0072b2", -0.16), "V": ("s", "#e69f00", 0.16)}
_, ax = pyplot.subplots(figsize=(9, 3.8), layout="constrained")
for i, (side, wanted) in enumerate({"K": k, "V": v}.items()):
    marker, colour, shift = STYLES[side]
    errors = [error(trip[i], wanted) for trip in trips.values()]
    heights = numpy.arange(len(trips)) + shift
    ax.plot(errors, heights, marker, color=colour, markersize=9, label=side)
    for point in zip(errors, heights, strict=True):
        text = f"{point[0]:.1f} %"
        ax.annotate(
            text, point, (9, 0), textcoords="offset points", va="center"
        )
ax.set(
    xlim=(0, 22),
    ylim=(len(trips) - 0.5, -0.5),
    xlabel="root mean square error, %",
)
ax.set_yticks(range(len(trips)), list(trips), fontsize=11)
ax.grid(axis="x", alpha=0.3)
_ = ax.legend(
    loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False
)

# %% [markdown]
# V is normal, as NF4 wants it, and gains by it. K gains more by the transform than by NF4. Both
# together are worse for K than the transform alone, 8.8 percent instead of 8.1: its transformed rows,
# which mix a few large elements in many ways, are not normal.
#
# ## All of it, and is it right?
#
# Now everything at once: one kernel normalises and rotates Q and K, and stores K and V as NF4.

# %%
store_all = pc.WriteKernel(
    q=[LAYER_NORM, ROTATE], k=[LAYER_NORM, ROTATE, NF4], v=[NF4]
)  # fmt: skip
gain = xp.asarray(
    rng.uniform(0.5, 1.5, (HEADS, SIZE)).astype(numpy.float32)
)
norm = {"gain": gain, "eps": 1e-6}
k_out, q_out = xp.empty_like(k), xp.empty_like(q)
k_read, _ = round_trip_codes(
    store_all, load_nf4, k, v,
    q=q, q_out=q_out, k_out=k_out, **norm, **place,
)  # fmt: skip

# %% [markdown]
# `k_out` is K as it was before it was rounded. We compare it with plain NumPy in float64, and look
# at the errors beside those that formats make. Each bar holds 90 percent of the elements.


# %%
def normalised(x):
    x = host(x).astype(float)
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / numpy.sqrt(variance + 1e-6) * host(gain)


def rotated(x):
    angle = sum(  # [tokens, heads, pairs]
        host(place[f"of_{name}"]).astype(float)
        * host(place[name])[:, None, None]
        for name in ("row", "column")
    )
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * numpy.exp(1j * angle)
    return numpy.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


wanted = rotated(normalised(k))

bits16 = {"k_format": "bfloat16", "v_format": "bfloat16"}
store_bits16 = pc.WriteKernel(k=[LAYER_NORM, ROTATE], **bits16)
pages = [xp.zeros(zeros.shape, "bfloat16") for _ in "kv"]
store_bits16(*pages, k, v, slots, **norm, **place)
k_bits16 = xp.empty_like(k)
pc.ReadKernel(k_format="bfloat16")(pages[0], None, slots, k_bits16, None)

found = {
    "normalised and rotated,\nas it is": k_out,
    "... stored as bfloat16": k_bits16,
    "... stored as NF4": k_read,
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, ax = pyplot.subplots(figsize=(10, 3), layout="constrained")
for height, each in enumerate(found.values()):
    errors = abs(host(each) - wanted) / numpy.sqrt((wanted**2).mean())
    low, median, high = numpy.quantile(errors, (0.05, 0.5, 0.95))
    ax.barh(
        height, high - low, left=low, height=0.5, color="#0072b2", alpha=0.4
    )
    ax.plot(median, height, "o", color="#0072b2", markersize=9)
    ax.annotate(
        f"{median:.0e}",
        (high, height),
        (8, 0),
        textcoords="offset points",
        va="center",
    )
ax.set(xscale="log", xlim=(1e-9, 2), ylim=(len(found) - 0.4, -0.6))
ax.set_xlabel(
    "difference from float64, relative to the root mean square; numbers are medians"
)
ax.set_yticks(range(len(found)), list(found), fontsize=11)
ax.grid(axis="x", alpha=0.3)

# %% [markdown]
# The arithmetic is right up to the last bits of a float32, and what it leaves is far below what any
# format costs.
#
# ## How fast?
#
# We time each idea on its own, on K and V alike, beside a plain copy. On a GPU, some calls of each are
# captured in a CUDA graph and timed with events, in turns. [Notebook 4](04_speed.ipynb) says why.

# %%
REPEATS = 16 if on_gpu else 1  # a GPU wants more tokens
many_k, many_v = (xp.tile(each, (REPEATS, 1, 1)) for each in (k, v))
many_slots = xp.asarray(rng.permutation(TOKENS * REPEATS))
shape = (BLOCKS * REPEATS, BLOCK_SIZE, HEADS)
given = {name: xp.tile(place[name], REPEATS) for name in ("row", "column")}
given = {**place, **given, **norm}
IDEAS = {
    "copy": [],
    "Hadamard": [pc.hadamard()],
    "layer norm": [LAYER_NORM],
    "rotation": [ROTATE],
    "NF4": [NF4],
    "norm, rotation, NF4": [LAYER_NORM, ROTATE, NF4],
}


def prepared(steps):
    """Return a function that writes all tokens."""
    kernel = pc.WriteKernel(k=steps, v=steps)
    scales, size, dtype = {}, SIZE, xp.float32
    if NF4 in steps:
        scales = {
            name: xp.zeros((*shape, 2), xp.float32)
            for name in ("k_scale", "v_scale")
        }
        size, dtype = SIZE // 2, xp.uint8
    pages = [xp.zeros((*shape, size), dtype) for _ in "kv"]
    named = {name: given[name] for name in kernel.parameters}
    arrays = (*pages, many_k, many_v, many_slots)
    return lambda: kernel(*arrays, **scales, **named)


def in_a_graph(call, count, stream):
    """Capture some calls in a CUDA graph; return a function that times it."""
    with stream:
        call()  # compiles
        stream.synchronize()
        stream.begin_capture()
        for _ in range(count):
            call()
        graph = stream.end_capture()
    began, ended = xp.cuda.Event(), xp.cuda.Event()

    def microseconds():
        began.record(stream)
        graph.launch(stream)
        ended.record(stream)
        ended.synchronize()
        return 1e3 * xp.cuda.get_elapsed_time(began, ended) / count

    return microseconds


def on_the_cpu(call):
    """Return a function that times a call."""
    call()  # the first time is not like the others

    def microseconds():
        began = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - began)

    return microseconds


calls = {name: prepared(steps) for name, steps in IDEAS.items()}
if on_gpu:
    xp.cuda.Device().synchronize()  # the arrays are ready
    stream = xp.cuda.Stream(non_blocking=True)
    timers = {name: in_a_graph(calls[name], 20, stream) for name in calls}
else:
    timers = {name: on_the_cpu(calls[name]) for name in calls}
rounds = [
    {name: timer() for name, timer in timers.items()}
    for _ in tqdm(range(5), desc="turns", file=sys.stdout)
]
times = {
    name: numpy.median([one[name] for one in rounds]) for name in calls
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
unit, per_us = ("us", 1) if on_gpu else ("ms", 1000)

_, ax = pyplot.subplots(figsize=(10, 3.8), layout="constrained")
bars = ax.barh(
    list(times),
    [each / per_us for each in times.values()],
    color="#d55e00",
    height=0.6,
)
texts = [
    f"{each / per_us:.1f} {unit}, {each / times['copy']:.1f} x"
    for each in times.values()
]
ax.bar_label(bars, texts, padding=5)
ax.invert_yaxis()
ax.margins(x=0.2)
where = pc.Handle().device
_ = ax.set_xlabel(
    f"time of a write of {TOKENS * REPEATS:,} tokens on {where}, {unit}, and x the copy"
)

# %% [markdown]
# On the CPU, NumPy evaluates one operation after the other on whole arrays. That is the
# specification, and was never meant to be fast. On a GPU, a row is read once, stays in registers
# through all steps, and is stored once: on an H200, a kernel that rotates Q and K and stores 65,536
# tokens takes 399 us, and a memcpy of as many bytes 376 ([Speed](../docs/speed.md)). What your idea
# adds to that, this cell will tell you on your GPU.
#
# ## Over to you
#
# **1. Another norm.** Divide by the mean magnitude, `row_mean(abs(x))`, or by the p-norm of a row,
# with p as a parameter. Does NF4 mind? A norm changes K on purpose, so ask for `k_out`, which is K
# before it is rounded, and compare what is read with that.
#
# <details>
# <summary>Solution</summary>
#
# ```python
# NORMS = {
#     "mean magnitude": "x / (row_mean(abs(x)) + eps)",
#     "p-norm": "x / (row_sum(abs(x) ** p) ** (1 / p) + eps)",
# }
# for name, norm in NORMS.items():
#     store_norm = pc.WriteKernel(k=[norm, NF4], v=[NF4])
#     named = {"p": 4.0, "eps": 1e-6}
#     named = {each: named[each] for each in store_norm.parameters}
#     k_norm = xp.empty_like(k)
#     k_read, _ = round_trip_codes(
#         store_norm, load_nf4, k, v, k_out=k_norm, **named
#     )
#     print(f"{name}: error of K {error(k_read, k_norm):.1f} %")
# ```
#
# It prints 12.0 % and 11.4 %, where NF4 without a norm has 12.2 %. NF4 does not mind: a row and its
# scales are divided by the same number. What changes a little is how much each row counts in the
# mean over all of them.
#
# </details>
#
# **2. Powers of two.** Codes that are powers of two need no multiplication. Write a quantiser for
# int4 whose scale is `row_max(abs(x))`, in groups of 32. The magnitude of an element, relative to
# the scale, is at most 1, so `m = round(-log2(abs(x) / s))` is 0 or more, and 7 is the most that a
# code has room for. A code needs the sign as well, and `-m` does not give it if m is 0. So let the
# code be m for elements that are not negative, and -1 - m for the others: these are just 0 to 7 and
# -1 to -8. Write a `ReadKernel` that makes elements of them again, with `exp2`, as `decoded` does for
# NF4. Mind what the logarithm of 0 is. How do the errors compare with those of int4 and NF4 in the
# picture above?
#
# <details>
# <summary>Solution</summary>
#
# ```python
# M = "min(max(round(-log2(max(abs(x) / s, 1e-9))), 0), 7)"
# POWERS = pc.quantize(
#     "max(row_max(abs(x)), 1e-6)", f"where(x < 0, -1 - {M}, {M})",
#     "int4", group=32,
# )
#
#
# def powers(scale):
#     element = "where(x < 0, -exp2(x + 1), exp2(-x))"
#     return f"{element} * {scale}[block, offset, head, dim // 32]"
#
#
# store_powers = pc.WriteKernel(k=[POWERS], v=[POWERS])
# load_powers = pc.ReadKernel(
#     k=[powers("k_scales")], v=[powers("v_scales")], **plain
# )
# k_read, v_read = round_trip_codes(store_powers, load_powers, k, v)
# print(f"error of K {error(k_read, k):.1f} %, of V {error(v_read, v):.1f} %")
# ```
#
# It prints 10.5 % for K and 18.8 % for V. For K, whose elements are of very different magnitudes,
# that is better than int4 and NF4 without a transform. For V it is twice as bad, since most of the
# levels are close to 0.
#
# </details>
#
# **3. Spare the first tokens.** Models attend to the first tokens of a sequence far more than to
# others. Write a step for K that leaves the first four as they are, and rounds the rest to
# `float16`: a condition on `position[token]`, where `position` is an array that you pass, with the
# position of each token in its sequence. Our tokens are one sequence, in order. To see that it
# worked, use pages of float32, such as copies of `zeros`, and look at which rows of `k_out` are those of `k`.
#
# <details>
# <summary>Solution</summary>
#
# ```python
# spare = pc.WriteKernel(k=["where(position[token] < 4, x, float16(x))"])
# pages = zeros.copy(), zeros.copy()
# k_spared = xp.empty_like(k)
# position = xp.arange(TOKENS)
# spare(*pages, k, v, slots, k_out=k_spared, position=position)
# same = host((k_spared == k).all(axis=(1, 2)))
# print("not rounded:", numpy.flatnonzero(same).tolist())
# print(f"error of the others {error(k_spared[4:], k[4:]):.2f} %")
# ```
#
# It prints that 0, 1, 2 and 3 are not rounded, and an error of 0.02 %.
#
# </details>
