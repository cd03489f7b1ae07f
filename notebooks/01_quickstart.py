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
# # 1. Your first write
#
# > **Colab or Kaggle**: run this cell first.

# %%
# In Colab or Kaggle, take the # away from the next line; elsewhere the
# package is installed already.
# # %pip install -q "pagedcache[notebook,cuda12]"

# %% [markdown]
# A language model reads the keys and values (K and V) of all earlier tokens for each new one, so
# they are kept: in the *KV cache*. An engine that serves many sequences at once keeps it in a pool
# of *blocks* of a few tokens each: in a *paged* cache. This package writes K and V to their places
# in it.
#
# First, let's see which versions are installed and which backend will be used. Everything here runs
# on the CPU, and on a GPU if there is one.

# %%
import numpy
from matplotlib import pyplot

import pagedcache as pc
from pagedcache import plot

handle = pc.Handle()  # CUDA if it is usable here, otherwise the CPU
if handle.device == "cpu":
    xp = numpy
else:
    import cupy as xp

print(f"pagedcache {pc.__version__}, {xp.__name__} {xp.__version__}")
print(handle)
for report in pc.backends().values():
    usable = "usable" if report.usable else "not usable"
    print(f"{report.device_type}: {usable}, {report.reason}")

# %% [markdown]
# ## Three tokens
#
# Our cache has 8 blocks of 4 tokens. Each token has K and V in 2 *KV heads* of size 16: small
# vectors, which attention reads head by head. Three tokens come in, and `slots` says where each of
# them goes: *slot* `s` is place `s % 4` in block `s // 4`.

# %%
# Blocks, KV heads, slots, head size.
k_cache = xp.zeros((8, 2, 4, 16), xp.float16)
v_cache = xp.zeros_like(k_cache)
k = xp.arange(1, 3 * 2 * 16 + 1).astype(xp.float16)
k = k.reshape(3, 2, 16)  # tokens, KV heads, head size
v = -k
slots = xp.asarray([9, 10, 20])  # one slot per token

pc.paged_caching(k_cache, v_cache, k, v, slots)

_ = plot.slot_mapping(slots.tolist(), block_size=4, num_blocks=8)

# %% [markdown]
# Token `t0` is in block 2 at offset 1. This is its K in KV head 0, in the cache and as it came:

# %%
print(k_cache[2, 0, 1], k[0, 0], sep="\n")

# %% [markdown]
# The order of the axes is inferred from the shapes. Others are possible, and the
# [next notebook](02_layouts.ipynb) draws them.
#
# ## Block tables
#
# The blocks of a sequence can be anywhere in the pool. Its *block table* lists them in token order,
# so token `t` goes to slot `block_table[t // block_size] * block_size + t % block_size`. Here are
# the places of 10 tokens:

# %%
block_size = 4
block_table = [5, 0, 3]
tokens = numpy.arange(10)
blocks = numpy.array(block_table)[tokens // block_size]
slots = blocks * block_size + tokens % block_size

print(slots)
_ = plot.slot_mapping(slots, block_size, num_blocks=8)

# %% [markdown]
# ## Padding and invalid slots
#
# Engines often pad a batch to a fixed size. A token with a negative slot is *padding* and is
# skipped. A slot past the end of the cache is *invalid*: it is never written either, but `check`
# reports it.
#
# This time we use a *descriptor*: it checks the shapes once and can then be used for any number of
# writes.

# %%
slots = xp.asarray([-1, -7, 8 * block_size])
descriptor = pc.Descriptor.create(k_cache, v_cache, k, v, slots)
descriptor.calculate(k_cache, v_cache, k, v, slots)

_ = plot.slot_mapping(slots.tolist(), block_size, num_blocks=8)

# %%
try:
    descriptor.check()
except pc.InvalidSlotError as error:
    print(error)

# %% [markdown]
# Checking waits for the GPU, so a descriptor does it only when you ask. A single call of
# `paged_caching` can do it for you: with `on_invalid="raise"` it checks at once.

# %%
try:
    pc.paged_caching(k_cache, v_cache, k, v, slots, on_invalid="raise")
except pc.InvalidSlotError as error:
    print(error)

# %% [markdown]
# ## What an error looks like
#
# Arguments are checked before anything is written. An error message is a single sentence that names
# the argument, the rule it breaks, and what was passed instead.

# %%
narrow = k[:, :, :8]
try:
    pc.paged_caching(k_cache, v_cache, narrow, v, slots)
except pc.PagedCacheError as error:
    print(f"{type(error).__name__}: {error}")

# %% [markdown]
# ## Two sequences in a pool
#
# A `BlockPool` says which block holds which tokens. Two prompts of 10 and 7 tokens come in, and
# both start with the same 4 tokens. These fill a whole block, so the two sequences share it, and it
# is written only once.

# %%
pool = pc.BlockPool(num_blocks=16, block_size=4)
a = pool.sequence([7, 8, 9, 10, 11, 12, 13, 14, 15, 16])  # token ids
b = pool.sequence([7, 8, 9, 10, 21, 22, 23])
print(b.num_cached_tokens, "tokens of B are already there")

tables = {"A": a.block_table, "B": b.block_table}
_ = plot.pool(tables, pool.num_blocks)

# %%
_ = plot.block_tables(tables)

# %% [markdown]
# One call writes the tokens of both sequences. `paged_gather` is the way back: it reads the tokens
# of `b` from the block that `a` has written, and from its own.

# %%
slots = xp.asarray(a.slots() + b.slots(b.num_cached_tokens))
k = xp.arange(13 * 2 * 16).astype(xp.float16)
k = k.reshape(13, 2, 16)  # 10 tokens of A, 3 of B
v = -k
k_cache = xp.zeros((16, 2, 4, 16), xp.float16)
v_cache = xp.zeros_like(k_cache)
pc.paged_caching(k_cache, v_cache, k, v, slots)

k_of_b, v_of_b = xp.zeros((2, 7, 2, 16), xp.float16)
pc.paged_gather(k_cache, v_cache, xp.asarray(b.slots()), k_of_b, v_of_b)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
of_a = [f"A{i}" for i in range(10)]
of_b = [f"B{i}" for i in range(4, 7)]
written = ("K of A and B, written", k, of_a + of_b)
read = ("K of B, read", k_of_b, of_a[:4] + of_b)

_, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for ax, (title, rows, names) in zip(axes, (written, read), strict=True):
    rows = rows if xp is numpy else rows.get()
    picture = ax.imshow(
        rows.reshape(len(rows), -1), vmin=0, vmax=k.size, aspect="auto"
    )
    ax.set(title=title, xlabel="KV head and dimension")
    ax.set_xticks([0, 16], ["head 0", "head 1"], ha="left")
    ax.set_yticks(range(len(rows)), names)
axes[0].set_ylabel("token")
_ = pyplot.colorbar(picture, ax=axes, label="element of K")

# %% [markdown]
# A row is a token, and its colours are the elements of its K. The first four rows of B are those of A,
# A0 to A3, which it shares. The other three, B4 to B6, were written after the ten of A.
#
# [Notebook 7](07_pool_and_cache.ipynb) goes on from here: a cache of all layers, with a pool that
# shares, evicts and moves to host memory.
