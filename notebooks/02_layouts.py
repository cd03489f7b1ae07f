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
# Inference engines lay out a paged cache in many ways. The operator only needs the shape and the
# strides of each array, so the same call handles them all. In this notebook we write tokens in six
# ways, and check every byte of memory each time.

# %%
import numpy

import pagedcache as pc

if pc.Handle().device == "cpu":
    xp = numpy
else:
    import cupy as xp


def host(array):
    """Return the array as a NumPy array on the host."""
    return array if xp is numpy else array.get()


BLOCKS, HEADS, BLOCK_SIZE, SIZE = 6, 3, 4, 8
TOKENS = 5
SLOTS = [9, 10, 11, 20, -1]  # the last token is padding
slots = xp.asarray(SLOTS)
k = xp.arange(1, TOKENS * HEADS * SIZE + 1).astype(xp.float16).reshape(TOKENS, HEADS, SIZE)
v = -k

# %% [markdown]
# `explain(slot)` tells you which bytes of each cache hold the K and V of the token in that slot,
# counted from the start of the cache. This gives us a check that works for every layout: the bytes
# it names must hold the token, and all other bytes must still be zero.


# %%
def check(descriptor, memory, k=None, v=None, v_start=0):
    """Check that each token is in the bytes that `explain` names, and the rest is zero."""
    left = host(memory).ravel().view(numpy.uint8).copy()
    for rows, ranges, start in ((k, "k_ranges", 0), (v, "v_ranges", v_start)):
        if rows is None:
            continue
        for row, slot in zip(host(rows), SLOTS, strict=True):
            places = getattr(descriptor.explain(slot), ranges)
            found = b"".join(left[start + a : start + b].tobytes() for a, b in places)
            assert found == (row.tobytes() if slot >= 0 else b"")
            for a, b in places:
                left[start + a : start + b] = 0
    assert not left.any()


def write(k_cache, v_cache, layout, k=k, v=v):
    """Write the tokens; return the descriptor."""
    descriptor = pc.Descriptor.create(k_cache, v_cache, k, v, slots, layout=layout)
    descriptor.calculate(k_cache, v_cache, k, v, slots)
    return descriptor


# %% [markdown]
# ## HND: blocks, KV heads, slots, head size
#
# Within a block, the slots of one head are contiguous, which suits attention kernels that work head
# by head. The K of a token is therefore split into as many pieces as there are KV heads.

# %%
k_cache = xp.zeros((BLOCKS, HEADS, BLOCK_SIZE, SIZE), xp.float16)
v_cache = xp.zeros_like(k_cache)
hnd = write(k_cache, v_cache, "HND")

check(hnd, k_cache, k=k)
check(hnd, v_cache, v=v)
assert len(hnd.explain(9).k_ranges) == HEADS
print(hnd.explain(9))
hnd

# %% [markdown]
# Padding has no bytes in the cache, and neither does a slot past the end.

# %%
print(hnd.explain(-1))
print(hnd.explain(BLOCKS * BLOCK_SIZE))
assert hnd.explain(-1).kind == "padding"
assert hnd.explain(BLOCKS * BLOCK_SIZE).kind == "invalid"
assert hnd.explain(9).kind == "valid"
assert (hnd.explain(9).block, hnd.explain(9).offset) == (2, 1)

# %% [markdown]
# ## NHD: blocks, slots, KV heads, head size
#
# The KV heads of a token are contiguous, so its K is in one piece.

# %%
k_cache = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, SIZE), xp.float16)
v_cache = xp.zeros_like(k_cache)
nhd = write(k_cache, v_cache, "NHD")

check(nhd, k_cache, k=k)
check(nhd, v_cache, v=v)
assert len(nhd.explain(9).k_ranges) == 1
print(nhd.explain(9))
nhd

# %% [markdown]
# ## Stacked: one array with all of K, then all of V
#
# `pool[0]` and `pool[1]` are ordinary views, so this needs nothing special.

# %%
pool = xp.zeros((2, BLOCKS, HEADS, BLOCK_SIZE, SIZE), xp.float16)
stacked = write(pool[0], pool[1], "HND")

check(stacked, pool, k, v, v_start=pool.nbytes // 2)
assert stacked.explain(9).k_ranges == hnd.explain(9).k_ranges  # the same strides as above
stacked

# %% [markdown]
# ## Packed: K and V of a head side by side in the last axis
#
# The two caches are interleaved slices of one array: each row of K is followed by the matching row
# of V.

# %%
pool = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), xp.float16)
packed = write(pool[..., :SIZE], pool[..., SIZE:], "NHD")

row_bytes = SIZE * pool.itemsize
check(packed, pool, k, v, v_start=row_bytes)
assert packed.explain(9).k_ranges[1][0] - packed.explain(9).k_ranges[0][0] == 2 * row_bytes
print(packed.explain(9))
packed

# %% [markdown]
# ## Multi-head latent attention: one KV head, head size 576 for K and 512 for V
#
# K and V may have different head sizes.

# %%
k_latent = xp.arange(TOKENS * 576).astype(xp.float16).reshape(TOKENS, 1, 576)
v_latent = -xp.arange(1, TOKENS * 512 + 1).astype(xp.float16).reshape(TOKENS, 1, 512)
k_cache = xp.zeros((BLOCKS, 1, BLOCK_SIZE, 576), xp.float16)
v_cache = xp.zeros((BLOCKS, 1, BLOCK_SIZE, 512), xp.float16)
latent = write(k_cache, v_cache, "HND", k_latent, v_latent)

check(latent, k_cache, k=k_latent)
check(latent, v_cache, v=v_latent)
((start, stop),) = latent.explain(9).k_ranges
assert stop - start == 576 * 2
latent

# %% [markdown]
# ## Slices of a fused QKV projection
#
# Models often compute Q, K and V with a single matrix product. K and V are then slices of its
# result, and you don't have to copy them out first: the inputs may be strided, too.

# %%
QUERY_HEADS = 6
fused = xp.zeros((TOKENS, (QUERY_HEADS + 2 * HEADS) * SIZE), xp.float16)
q_end, k_end = QUERY_HEADS * SIZE, (QUERY_HEADS + HEADS) * SIZE
fused[:, q_end:k_end] = k.reshape(TOKENS, -1)
fused[:, k_end:] = v.reshape(TOKENS, -1)
k_slice = fused[:, q_end:k_end].reshape(TOKENS, HEADS, SIZE)
v_slice = fused[:, k_end:].reshape(TOKENS, HEADS, SIZE)
assert k_slice.strides[0] == fused.strides[0]  # a view: from token to token, one row of `fused`

k_cache = xp.zeros((BLOCKS, HEADS, BLOCK_SIZE, SIZE), xp.float16)
v_cache = xp.zeros_like(k_cache)
from_slices = write(k_cache, v_cache, "HND", k_slice, v_slice)

check(from_slices, k_cache, k=k)
check(from_slices, v_cache, v=v)
from_slices

# %% [markdown]
# ## Leaving out the layout
#
# You can leave out `layout`: it is then the one in which the caches have as many KV heads as `k`.
# Only if there are as many KV heads as slots in a block do the shapes allow both, and you are asked
# to say which one you mean.

# %%
inferred = pc.Descriptor.create(k_cache, v_cache, k, v, slots)
assert inferred.info.layout == "HND"

square = xp.zeros((BLOCKS, HEADS, HEADS, SIZE), xp.float16)  # blocks of as many slots as KV heads
try:
    pc.Descriptor.create(square, xp.zeros_like(square), k, v, slots)
except pc.PagedCacheError as error:
    print(error)
    assert "layout must be given" in str(error)
else:
    raise AssertionError("an ambiguous layout was accepted")

# %% [markdown]
# ## The same tokens in every layout
#
# Transposed to blocks, slots, KV heads, head size, all layouts hold the same values.

# %%
held = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, SIZE), xp.float16)
write(held, xp.zeros_like(held), "NHD")
stack = xp.zeros((2, BLOCKS, HEADS, BLOCK_SIZE, SIZE), xp.float16)
write(stack[0], stack[1], "HND")
pack = xp.zeros((BLOCKS, BLOCK_SIZE, HEADS, 2 * SIZE), xp.float16)
write(pack[..., :SIZE], pack[..., SIZE:], "NHD")

expected = host(held)
assert (host(stack)[0].transpose(0, 2, 1, 3) == expected).all()
assert (host(pack)[..., :SIZE] == expected).all()
assert (host(k_cache).transpose(0, 2, 1, 3) == expected).all()
assert numpy.count_nonzero(expected) == 4 * HEADS * SIZE
