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
# # 1. A first write
#
# In a clone of the repository, `pip install '.[notebook]'` installs all that these notebooks need
# on the CPU; `pip install '.[notebook,cuda13]'` (or `cuda12`) brings CuPy for a GPU. Nothing is
# compiled at install time.
#
# Which versions are these, and which backend will be used?

# %%
import numpy

import pagedcache as pc
from pagedcache import plot
from pagedcache.demo.pool import Pool

handle = pc.Handle()  # CUDA if it is usable here, else the CPU
if handle.device == "cpu":
    xp = numpy
else:
    import cupy as xp


def host(array):
    """Return an array on the host."""
    return array if xp is numpy else array.get()


print(f"pagedcache {pc.__version__}, {xp.__name__} {xp.__version__}")
print(handle)
for report in pc.backends().values():
    print(f"{report.device_type}: {'usable' if report.usable else 'not usable'}, {report.reason}")
assert any(report.usable for report in pc.backends().values())

# %% [markdown]
# The cache is a pool of blocks. Here are 8 blocks of 4 tokens each; a token has 2 KV heads of 16
# numbers. K and V have a cache each. Three tokens come in, and `slots` says where each one goes.

# %%
k_cache = xp.zeros((8, 2, 4, 16), xp.float16)  # blocks, KV heads, slots, head size: layout HND
v_cache = xp.zeros_like(k_cache)
k = xp.arange(1, 3 * 2 * 16 + 1).astype(xp.float16).reshape(3, 2, 16)  # tokens, KV heads, head size
v = -k
slots = xp.asarray([9, 10, 20])

pc.paged_caching(k_cache, v_cache, k, v, slots)

assert (host(k_cache)[2, :, 1] == host(k)[0]).all()  # slot 9 is block 2, offset 1
assert (host(v_cache)[5, :, 0] == host(v)[2]).all()  # slot 20 is block 5, offset 0
assert numpy.count_nonzero(host(k_cache)) == k.size  # and nothing else was written

# %% [markdown]
# ## What a slot is
#
# A *slot* is a place for one token: slot `s` is offset `s % block_size` of block
# `s // block_size`. The blocks of a sequence lie anywhere in the pool. Its *block table* lists them
# in the order of its tokens, so token `t` has slot
# `table[t // block_size] * block_size + t % block_size`.

# %%
block_size = 4
block_table = [5, 0, 3]
tokens = numpy.arange(10)
slots = numpy.array(block_table)[tokens // block_size] * block_size + tokens % block_size

assert slots.tolist() == [20, 21, 22, 23, 0, 1, 2, 3, 12, 13]
_ = plot.slot_mapping(slots, block_size, num_blocks=8)

# %% [markdown]
# ## What padding is
#
# Engines pad a batch to a fixed size. A token with a negative slot is *padding*: it is skipped. A
# slot past the end of the cache is *invalid*: it is never written either, and `check` tells.
#
# A *descriptor* checks shapes once and then serves any number of writes.

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
    raise AssertionError("the invalid slot was not told")

# %% [markdown]
# ## What a mistake looks like
#
# Arguments are checked before anything is written, and an error is one sentence: which argument,
# which rule, and what it was instead.

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
# ## The pool, before and after
#
# An engine hands out blocks. Two prompts of 10 and 7 tokens come in; the second begins with the
# same 4 tokens as the first. They fill a block, so both sequences use the same one, and it is
# written once.

# %%
from matplotlib import pyplot

pool = Pool(num_blocks=16, block_size=4, taken=0, rng=numpy.random.default_rng(0))
_, (above, below) = pyplot.subplots(2, 1, figsize=(8, 2.4))
plot.pool({}, pool.num_blocks, ax=above)

a = pool.add("A")
slots_of_a = pool.extend(a, 10)
b = pool.add("B", prefix_of=a, prefix=4)
slots_of_b = pool.extend(b, 3)  # its first 4 tokens are there already
tables = {"A": a.block_table, "B": b.block_table}
plot.pool(tables, pool.num_blocks, ax=below)
pyplot.tight_layout()

assert a.block_table[0] == b.block_table[0]
assert len(pool.free) == 16 - 4

# %%
_ = plot.block_tables(tables)

# %% [markdown]
# One call writes the tokens of both sequences, and what is read back through the block tables is
# what went in.

# %%
slots = xp.asarray(numpy.concatenate([slots_of_a, slots_of_b]))
k = xp.arange(13 * 2 * 16).astype(xp.float16).reshape(13, 2, 16)
v = -k
k_cache = xp.zeros((16, 2, 4, 16), xp.float16)
v_cache = xp.zeros_like(k_cache)
pc.paged_caching(k_cache, v_cache, k, v, slots)

pages = host(k_cache)[a.block_table]  # blocks of A, KV heads, slots, head size
k_of_a = pages.transpose(0, 2, 1, 3).reshape(-1, 2, 16)[: a.length]
assert (k_of_a == host(k)[:10]).all()
prefix_of_b = host(k_cache)[b.block_table[0]].transpose(1, 0, 2)
assert (prefix_of_b == host(k)[:4]).all()  # the tokens that A wrote
descriptor.destroy()
