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
# In a clone of the repository, `pip install '.[notebook]'` installs everything these notebooks need
# on the CPU. For a GPU, `pip install '.[notebook,cuda13]'` (or `cuda12`) adds CuPy. Nothing is
# compiled at install time.
#
# First, let's see which versions are installed and which backend will be used.

# %%
import numpy

import pagedcache as pc
from pagedcache import plot

handle = pc.Handle()  # CUDA if it is usable here, otherwise the CPU
if handle.device == "cpu":
    xp = numpy
else:
    import cupy as xp


def host(array):
    """Return the array as a NumPy array on the host."""
    return array if xp is numpy else array.get()


print(f"pagedcache {pc.__version__}, {xp.__name__} {xp.__version__}")
print(handle)
for report in pc.backends().values():
    print(f"{report.device_type}: {'usable' if report.usable else 'not usable'}, {report.reason}")
assert any(report.usable for report in pc.backends().values())

# %% [markdown]
# A paged cache is a pool of fixed-size blocks. Ours has 8 blocks of 4 tokens each, and each token
# has 2 KV heads of size 16. K and V each have a cache of their own. Three tokens come in, and
# `slots` says where each of them goes. The layout of the caches is inferred from the shapes; the
# [next notebook](02_layouts.ipynb) is about layouts.

# %%
k_cache = xp.zeros((8, 2, 4, 16), xp.float16)  # blocks, KV heads, slots, head size: layout HND
v_cache = xp.zeros_like(k_cache)
k = xp.arange(1, 3 * 2 * 16 + 1).astype(xp.float16).reshape(3, 2, 16)  # tokens, KV heads, head size
v = -k
slots = xp.asarray([9, 10, 20])  # one slot per token

pc.paged_caching(k_cache, v_cache, k, v, slots)

assert (host(k_cache)[2, :, 1] == host(k)[0]).all()  # slot 9 is block 2, offset 1
assert (host(v_cache)[5, :, 0] == host(v)[2]).all()  # slot 20 is block 5, offset 0
assert numpy.count_nonzero(host(k_cache)) == k.size  # nothing else was written

# %% [markdown]
# ## Slots and block tables
#
# A *slot* holds one token: slot `s` is at offset `s % block_size` in block `s // block_size`.
#
# The blocks of a sequence can be anywhere in the pool. Its *block table* lists them in token order,
# so token `t` goes to slot `block_table[t // block_size] * block_size + t % block_size`.

# %%
block_size = 4
block_table = [5, 0, 3]
tokens = numpy.arange(10)
slots = numpy.array(block_table)[tokens // block_size] * block_size + tokens % block_size

assert slots.tolist() == [20, 21, 22, 23, 0, 1, 2, 3, 12, 13]
_ = plot.slot_mapping(slots, block_size, num_blocks=8)

# %% [markdown]
# ## Padding and invalid slots
#
# Inference engines often pad a batch to a fixed size. A token with a negative slot is *padding* and
# is skipped. A slot past the end of the cache is *invalid*: it is never written either, but `check`
# reports it.
#
# This time we use a *descriptor*: it checks the shapes once and can then be used for any number of
# writes.

# %%
before = host(k_cache).copy(), host(v_cache).copy()
outside = xp.asarray([-1, -7, 8 * block_size])
descriptor = pc.Descriptor.create(k_cache, v_cache, k, v, outside)
descriptor.calculate(k_cache, v_cache, k, v, outside)

assert (host(k_cache) == before[0]).all()
assert (host(v_cache) == before[1]).all()
_ = plot.slot_mapping(host(outside), block_size, num_blocks=8)

# %%
try:
    descriptor.check()
except pc.PagedCacheError as error:
    print(error)
    assert "slot" in str(error)
else:
    raise AssertionError("the invalid slot was not reported")

# %% [markdown]
# ## What an error looks like
#
# Arguments are checked before anything is written. An error message is a single sentence that names
# the argument, the rule it breaks, and what was passed instead.

# %%
narrow = k[:, :, :8].copy()
try:
    pc.paged_caching(k_cache, v_cache, narrow, v, xp.asarray([9, 10, 20]))
except pc.PagedCacheError as error:
    print(type(error).__name__, "-", error)
    assert "k must have the head_size of k_cache, 16" in str(error)
else:
    raise AssertionError("a wrong head size was accepted")

# %% [markdown]
# ## The pool before and after
#
# A `BlockPool` says which block holds which tokens. Two prompts of 10 and 7 tokens come in, and
# both start with the same 4 tokens. These fill a whole block, so the two sequences share it, and it
# is written only once.

# %%
from matplotlib import pyplot

pool = pc.BlockPool(num_blocks=16, block_size=4)
_, (above, below) = pyplot.subplots(2, 1, figsize=(8, 2.4))
plot.pool({}, pool.num_blocks, ax=above)

a = pool.sequence([7, 8, 9, 10, 11, 12, 13, 14, 15, 16])
b = pool.sequence([7, 8, 9, 10, 21, 22, 23])
tables = {"A": a.block_table, "B": b.block_table}
plot.pool(tables, pool.num_blocks, ax=below)
pyplot.tight_layout()

print(b.num_cached_tokens, "tokens of B are already there")
assert a.block_table[0] == b.block_table[0]
assert pool.num_free == 16 - 4

# %%
_ = plot.block_tables(tables)

# %% [markdown]
# One call writes the tokens of both sequences. Reading them back through the block tables returns
# exactly what went in.

# %%
slots = xp.asarray(numpy.concatenate([a.slots(), b.slots(b.num_cached_tokens)]))
k = xp.arange(13 * 2 * 16).astype(xp.float16).reshape(13, 2, 16)
v = -k
k_cache = xp.zeros((16, 2, 4, 16), xp.float16)
v_cache = xp.zeros_like(k_cache)
pc.paged_caching(k_cache, v_cache, k, v, slots)

pages = host(k_cache)[a.block_table]  # blocks of A, KV heads, slots, head size
k_of_a = pages.transpose(0, 2, 1, 3).reshape(-1, 2, 16)[: a.num_tokens]
assert (k_of_a == host(k)[:10]).all()
prefix_of_b = host(k_cache)[b.block_table[0]].transpose(1, 0, 2)
assert (prefix_of_b == host(k)[:4]).all()  # the tokens that A wrote
descriptor.destroy()

# %% [markdown]
# [Notebook 7](07_pool_and_cache.ipynb) goes on from here: a cache of all layers, with a pool that
# shares, evicts and moves to host memory.
