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
# # 2. One operator, any layout
#
# > **Colab or Kaggle**: run this cell first.

# %%
# In Colab or Kaggle, take the # away from the next line; elsewhere the
# package is installed already.
# # %pip install -q "pagedcache[notebook,cuda12]"

# %% [markdown]
# Inference engines lay out a paged cache in many ways. The operator only needs the shape and the
# strides of each array, so one call serves them all. In this notebook, we write the same tokens
# into caches of several layouts, and look at the memory each time.
#
# Our caches have 6 blocks of 4 slots, and a slot holds K and V of one token: 3 KV heads of size 8,
# in 16 bits each. We look at slot 9, which is slot 1 of block 2.

# %%
import numpy
from matplotlib import pyplot

import pagedcache as pc
from pagedcache import plot
from pagedcache.compat import vllm

if pc.Handle().device == "cpu":
    xp = numpy
else:
    import cupy as xp

BLOCKS, HEADS, BLOCK_SIZE, SIZE = 6, 3, 4, 8
TOKENS = 5
slots = xp.asarray([9, 10, 11, 20, -1])  # the last token is padding
k = xp.arange(1, TOKENS * HEADS * SIZE + 1).astype(xp.float16)
k = k.reshape(TOKENS, HEADS, SIZE)
v = -k


def axes(rows):
    """Return axes for a picture of some rows of bytes."""
    return pyplot.subplots(figsize=(7, 1.2 + 0.42 * rows))[1]


# %% [markdown]
# ## HND: blocks, KV heads, slots, head size
#
# In the picture, memory goes from left to right and then on in the next row, as in a book. A colour
# is a KV head, and it is darker from slot to slot. V is hatched. The thick lines are around the
# bytes of slot 9.

# %%
k_cache = xp.zeros((BLOCKS, HEADS, BLOCK_SIZE, SIZE), xp.float16)
v_cache = xp.zeros_like(k_cache)
pc.paged_caching(k_cache, v_cache, k, v, slots, layout="HND")

_ = plot.block({"K": k_cache, "V": v_cache}, 9, layout="HND", ax=axes(8))

# %% [markdown]
# All slots of a KV head are next to each other. That suits attention kernels, which read the K of
# one head after another. But K of a token is in as many pieces as there are KV heads.
#
# A descriptor can tell the same of a slot in words:

# %%
descriptor = pc.Descriptor.create(
    k_cache, v_cache, k, v, slots, layout="HND"
)
descriptor.explain(9)

# %% [markdown]
# ## NHD: blocks, slots, KV heads, head size
#
# All KV heads of a slot are next to each other, as in the K that comes out of a model, so K of a
# token is in one piece.

# %%
k_cache = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, SIZE), xp.float16)
v_cache = xp.zeros_like(k_cache)
pc.paged_caching(k_cache, v_cache, k, v, slots, layout="NHD")

_ = plot.block({"K": k_cache, "V": v_cache}, 9, layout="NHD", ax=axes(10))

# %% [markdown]
# ## Stacked: one array with all of K, then all of V
#
# `pool[0]` and `pool[1]` are views of one array, and views need nothing special. Between K and V of
# a block, there are the other blocks.

# %%
pool = xp.zeros((2, BLOCKS, HEADS, BLOCK_SIZE, SIZE), xp.float16)
pc.paged_caching(pool[0], pool[1], k, v, slots, layout="HND")

parts = {"K": pool[0], "V": pool[1]}
_ = plot.block(parts, 9, layout="HND", memory=pool, ax=axes(7))

# %% [markdown]
# ## Packed: K and V of a head side by side
#
# The last axis holds a row of K and then the row of V, so K and V of a token are in one piece. From
# one row of K to the next, there is a row of V: the two caches are interleaved.

# %%
pool = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), xp.float16)
k_cache, v_cache = pool[..., :SIZE], pool[..., SIZE:]
pc.paged_caching(k_cache, v_cache, k, v, slots, layout="NHD")

_ = plot.block({"K": k_cache, "V": v_cache}, 9, layout="NHD", ax=axes(4))

# %% [markdown]
# ## All layers inside a block
#
# A block that holds K and V of all layers can be moved to another device in one copy. For a layer,
# this is a cache with other strides: the stride from one block to the next is the size of all layers.
# Here are both of 2 layers:

# %%
# Blocks, layers, K and V, ...
pool = xp.zeros((BLOCKS, 2, 2, BLOCK_SIZE, HEADS, SIZE), xp.float16)
for layer in range(2):
    k_cache, v_cache = pool[:, layer, 0], pool[:, layer, 1]
    pc.paged_caching(k_cache, v_cache, k, v, slots, layout="NHD")

views = {
    f"{name}, layer {layer}": pool[:, layer, index]
    for layer in range(2)
    for index, name in enumerate("KV")
}
_ = plot.block(views, 9, layout="NHD", ax=axes(16))

# %% [markdown]
# ## 8 bits, with scales inside the page
#
# A quantised cache stores small integers, or 8-bit floats, and a *scale* by which they are
# multiplied when they are read. vLLM keeps the scale of a row right behind it, in a page of bytes.
# For the operator, the scales are two more arrays with strides.

# %%
# A scale has 4 bytes.
page = xp.zeros((BLOCKS, HEADS, BLOCK_SIZE, 2 * (SIZE + 4)), xp.uint8)
views = vllm.per_token_head_views(page, "int8_per_token_head")
vllm.triton_reshape_and_cache_flash_per_token_head_quant(
    k, v, *views, slots, "int8_per_token_head"
)

names = ("K", "V", "scale of K", "scale of V")
parts = dict(zip(names, views, strict=True))
_ = plot.block(parts, 9, layout="NHD", ax=axes(3))

# %% [markdown]
# From left to right, a slot of a KV head is 8 bytes of K and its scale, then 8 of V and its scale; the
# hatches tell them apart. The views have axes in the order of NHD, and the page is in the order of HND:
# what counts is the memory. A slot has 72 bytes here and 96 above. At head size 128, the scales weigh less: 264 bytes
# for K and V of a KV head, instead of 512.
#
# ## Multi-head latent attention
#
# Models with latent attention have one KV head. A slot holds a latent vector, from which K and V
# are computed, and beside it the part of K that depends on the position. The operator takes them
# for K and V of different head sizes.

# %%
LATENT, ROTARY = 512, 64
cells = xp.zeros((BLOCKS, BLOCK_SIZE, 1, LATENT + ROTARY), xp.float16)
latent, rotary = cells[..., :LATENT], cells[..., LATENT:]
rows = xp.ones((TOKENS, 1, LATENT + ROTARY), xp.float16)
k_rows, v_rows = rows[..., :LATENT], rows[..., LATENT:]
pc.paged_caching(latent, rotary, k_rows, v_rows, slots, layout="NHD")

parts = {"latent": latent, "rotary": rotary}
_ = plot.block(parts, 9, layout="NHD", ax=axes(4))

# %% [markdown]
# ## Sources have strides, too
#
# Models often compute Q, K and V with one matrix product. K and V are then columns of its result,
# and need not be copied out first. `paged_gather` reads the rows of slots back.

# %%
QUERY_HEADS = 6
q = xp.zeros((TOKENS, QUERY_HEADS, SIZE), xp.float16)
# Tokens, heads of Q, K and V, head size.
fused = xp.concatenate([q, k, v], axis=1)
k_part, v_part = fused[:, QUERY_HEADS:-HEADS], fused[:, -HEADS:]
print("bytes from token to token:", k.strides[0], "and", k_part.strides[0])

k_cache = xp.zeros((BLOCKS, HEADS, BLOCK_SIZE, SIZE), xp.float16)
v_cache = xp.zeros_like(k_cache)
pc.paged_caching(k_cache, v_cache, k_part, v_part, slots)

k_back, v_back = xp.zeros_like(k), xp.zeros_like(v)
pc.paged_gather(k_cache, v_cache, slots, k_back, v_back)
# The fifth is padding.
bool((k_back[:4] == k[:4]).all() and (v_back[:4] == v[:4]).all())

# %% [markdown]
# ## Leaving out the layout
#
# We gave no layout in the last cell. It is then the one in which the caches have as many KV heads
# as `k`. Only if there are as many KV heads as slots in a block do the shapes allow both, and you
# are asked:

# %%
# As many slots as KV heads.
square = xp.zeros((BLOCKS, HEADS, HEADS, SIZE), xp.float16)
try:
    pc.paged_caching(square, xp.zeros_like(square), k, v, slots)
except pc.PagedCacheError as error:
    print(error)

# %% [markdown]
# ## Other formats: error against bytes
#
# How much does it cost to store K and V in fewer bits? In `float8_e4m3fn` and `float8_e5m2` (8-bit
# floats with 4 and 5 bits of exponent), `int8` and `int4`, an element is a code times a scale, and
# the fewer elements share a scale, the better it fits them. Scales of the whole cache and of a head
# are given to the write; those of a row (one token of one head) or of a group of its dimensions are
# computed by it.
#
# We store rows that look like those of a model: in K, a few dimensions are much larger than the
# others. Then we read them back and compare. A format is a name for K and one for V, and scales are
# arrays: `paged_caching` and `paged_gather` are given the same.

# %%
rng = numpy.random.default_rng(0)
SIZE, HEADS, TOKENS = 64, 4, 256
k, v = rng.standard_normal((2, TOKENS, HEADS, SIZE), numpy.float32)
k[:, :, ::16] *= 12
k, v = xp.asarray(k), xp.asarray(v)
slots = xp.asarray(rng.permutation(TOKENS))

ROWS = (TOKENS // 16, 16, HEADS)  # blocks, slots, KV heads: NHD
SCALES = {
    "cache": (1,),
    "head": (HEADS,),
    "row": ROWS,
    "group of 32": (*ROWS, SIZE // 32),
}
LARGEST = {  # codes
    "float8_e4m3fn": 448,
    "float8_e5m2": 57344,
    "int8": 127,
    "int4": 7,
}


def scales(x, name, shared):
    """Return scales: computed ones, or room for those of the write."""
    scale = xp.zeros(SCALES[shared], xp.float32)
    if shared in ("cache", "head"):
        scale[...] = (
            abs(x).max(axis=None if shared == "cache" else (0, 2))
            / LARGEST[name]
        )
    return scale


def error(back, x):
    """Return the root mean square error, in percent of that of x."""
    return 100 * float(((back - x) ** 2).mean() / (x**2).mean()) ** 0.5


def store_and_read(name, shared):
    """Return the errors of K and V, and the bytes of an element."""
    dtype = name if name == "bfloat16" else xp.uint8
    size = SIZE // 2 if name == "int4" else SIZE  # two elements in a byte
    k_cache = xp.zeros((*ROWS, size), dtype)
    v_cache = xp.zeros_like(k_cache)
    options = {"layout": "NHD", "k_format": name, "v_format": name}
    num_bytes = k_cache.nbytes
    if shared:
        options["k_scale"] = scales(k, name, shared)
        options["v_scale"] = scales(v, name, shared)
        num_bytes += options["k_scale"].nbytes

    pc.paged_caching(k_cache, v_cache, k, v, slots, **options)
    k_back, v_back = xp.zeros_like(k), xp.zeros_like(v)
    pc.paged_gather(k_cache, v_cache, slots, k_back, v_back, **options)
    return (error(k_back, k), error(v_back, v)), num_bytes / k.size


CHOICES = [
    ("bfloat16", None),
    ("float8_e5m2", "cache"),
    ("float8_e4m3fn", "cache"),
    ("int8", "cache"),
    ("int8", "head"),
    ("int8", "row"),
    ("int4", "row"),
    ("int4", "group of 32"),
]
results = [store_and_read(*choice) for choice in CHOICES]

# %% tags=["hide-input"] jupyter={"source_hidden": true}
pyplot.rcParams["font.size"] = 11
_, (left, right) = pyplot.subplots(
    1, 2, figsize=(9, 4.2), sharey=True, layout="constrained"
)
labels = [
    name if shared is None else f"{name}, a scale per {shared}"
    for name, shared in CHOICES
]
bars = left.barh(labels, [size for _, size in results], color="#56b4e9")
left.bar_label(bars, fmt="%.2f", padding=3)
left.set(xlabel="bytes per element", xlim=(0, 2.4))
left.invert_yaxis()
for index, (name, colour, marker) in enumerate(
    (("K", "#0072b2", "o"), ("V", "#d55e00", "+"))
):
    errors = [both[index] for both, _ in results]
    style = {
        "color": colour,
        "markersize": 12 + 3 * index,
        "markeredgewidth": 3 * index,
    }
    right.plot(errors, labels, marker, label=name, **style)
right.set(xscale="log", xlabel="root mean square error, %")
right.set_xticks(
    [0.2, 0.5, 1, 2, 5, 10, 20], ["0.2", "0.5", "1", "2", "5", "10", "20"]
)
right.grid(visible=True, alpha=0.4)
_ = right.legend(fontsize=11)

# %% [markdown]
# Errors are in percent of the root mean square of K or V. The precision of floats is relative, so in `float8`, the large dimensions of K take nothing from
# the small ones, and K and V are equally precise. In `int8`, one scale must serve large and small.
# With a scale per row it is nevertheless the most precise of 8 bits. `int4` takes less than a third
# of the bytes of `bfloat16`, and smaller groups make it better. What such errors mean to the
# answers of a model is the subject of [notebook 5](05_formats.ipynb).
