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

# %% [markdown]
# ## Other formats: error against bytes
#
# A cache need not hold the bits of K and V. It can be of 8-bit floats, of int8 or of int4, two to a
# byte, each with scales: of the whole cache, of a head, of each token's row in a head, or of a few
# neighbouring dimensions. The write converts, and computes the scales of the last two kinds;
# `paged_gather` reads everything back. We store rows that look like those of a model, in which a
# few dimensions of K are much larger than the others, and compare the error with the bytes that an
# element takes, its share of the scale included.

# %%
from matplotlib import pyplot

rng = numpy.random.default_rng(0)
SIZE, HEADS, TOKENS = 64, 4, 256
rows = {name: rng.standard_normal((TOKENS, HEADS, SIZE), numpy.float32) for name in ("K", "V")}
rows["K"][:, :, ::16] *= 12
order = rng.permutation(TOKENS)
blocks = (TOKENS // 16, 16, HEADS)  # NHD
SCALES = {"cache": (1,), "head": (HEADS,), "token and head": blocks, "group of 32": (*blocks, 2)}
CHOICES = [("bfloat16", None), ("float8_e4m3fn", "cache"), ("float8_e5m2", "cache"),
           ("int8", "cache"), ("int8", "head"), ("int8", "token and head"),
           ("int4", "token and head"), ("int4", "group of 32")]  # fmt: skip
MOST = {"float8_e4m3fn": 448, "float8_e5m2": 57344, "int8": 127, "int4": 7}


def store_and_read(values, name, shared):
    """Return the error of what is read back, relative to the values, and bytes per element."""
    dense, slots = xp.asarray(values), xp.asarray(order)
    packed = 2 if name == "int4" else 1
    dtype = "bfloat16" if name == "bfloat16" else xp.uint8
    k_cache, v_cache = (xp.zeros((*blocks, SIZE // packed), dtype) for _ in "kv")
    scales, size = {}, k_cache.nbytes
    if shared is not None:
        scale = xp.zeros(SCALES[shared], xp.float32)  # the write computes it,
        if shared in ("cache", "head"):  # or is given what makes the largest value the largest code
            axes = None if shared == "cache" else (0, 2)
            scale[...] = abs(dense).max(axis=axes) / MOST[name]
        scales = {"k_scale": scale, "v_scale": scale.copy()}
        size += scale.nbytes
    formats = {"k_format": name, "v_format": name}
    pc.paged_caching(k_cache, v_cache, dense, dense, slots, layout="NHD", **scales, **formats)
    back, again = xp.zeros_like(dense), xp.zeros_like(dense)
    pc.paged_gather(k_cache, v_cache, slots, back, again, layout="NHD", **scales, **formats)
    difference = host(back) - values
    error = float(numpy.sqrt((difference**2).mean() / (values**2).mean()))
    return error, size / values.size


figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
for panel, (name, values) in zip(panels, rows.items(), strict=True):
    for stored, shared in CHOICES:
        error, size = store_and_read(values, stored, shared)
        label = stored if shared is None else f"{stored}, a scale for each {shared}"
        panel.plot(size, 100 * error, "o", markersize=9, label=label)
        print(f"{name}  {label:45} {size:5.3f} bytes an element, error {100 * error:6.2f} %")
    panel.set(yscale="log", xlabel="bytes an element", title=name, xlim=(0.4, 2.1))
    panel.grid(visible=True, which="both", alpha=0.3)
panels[0].set_ylabel("root mean square error, %")
panels[1].legend(fontsize=8, loc="upper right")
figure.tight_layout()

# %% [markdown]
# A scale for each token and head makes int8 the most precise of the 8-bit formats here. 8-bit
# floats lose nothing where a few dimensions are large, as in K, since their precision is relative.
# The copy in `bfloat16` takes more than three times the bytes of int4.

# %%
by_group = store_and_read(rows["K"], "int4", "group of 32")[0]
assert store_and_read(rows["K"], "int8", "token and head")[0] < by_group
assert store_and_read(rows["V"], "bfloat16", None)[0] < 0.01
