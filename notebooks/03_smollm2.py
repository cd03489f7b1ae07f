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
# # 3. A whole model on a paged cache
#
# SmolLM2-135M answers five questions with its K and V in a `pagedcache.KVCache`: in each of its 30
# layers, a kernel of this package rotates K and writes K and V into blocks, and attention reads
# them where they are, through block tables. The model and the engine are in `smollm2.py` next to
# this notebook, and the kernels that compute the model on a GPU in `smollm2.cu`. The weights (93
# MB) are downloaded once.

# %%
import ctypes
import os
import time

# Must be set before NumPy is imported. A single thread adds in the same order however many cores
# there are, and several threads would wait a long time for each other where cores are shared.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy
from matplotlib import pyplot
from smollm2 import Engine, Model, dense_tokens
from tqdm import tqdm

import pagedcache as pc
from pagedcache import plot
from pagedcache.demo.model import ModelFile, find_model

handle = pc.Handle()
on_gpu = handle.device != "cpu"
if on_gpu:
    import cupy as xp
else:
    xp = numpy

began = time.perf_counter()
source = ModelFile(find_model())
model = Model(source, xp, context=112)
print(f"{handle}: model loaded in {time.perf_counter() - began:.1f} s")
print(
    f"{len(model.layers)} layers, {model.heads} query heads and {model.kv_heads} KV heads of "
    f"{model.head_size}"
)
assert (len(model.layers), model.heads, model.kv_heads, model.head_size) == (30, 9, 3, 64)

# %% [markdown]
# ## Five prompts with a shared prefix
#
# All prompts start with the same system prompt. Where its tokens fill a whole block, the cache
# finds that block for each sequence that begins with them, so all sequences share it.

# %%
SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face. Answer in one short "
    "sentence, in plain words, and give no examples."
)
QUESTIONS = {
    "A": "Why is the sky blue?",
    "B": "What is a page table?",
    "C": "How many legs does a spider have?",
    "D": "What do bees make?",
    "E": "What is the capital of Italy?",
}
prompts = {
    name: source.tokens(
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    for name, question in QUESTIONS.items()
}
common = 0
while len({tuple(ids[: common + 1]) for ids in prompts.values()}) == 1:
    common += 1
print({name: len(ids) for name, ids in prompts.items()}, "tokens;", common, "in common")
assert common >= 2 * 16

# %% [markdown]
# ## How long will it take?
#
# Each step computes 16 rows, and each row is one token of some sequence. A newly admitted prompt
# needs all of its tokens computed (*prefill*); after that, each step computes only the token that
# was generated last (*decode*). The pool has too few blocks for all five sequences at once, so some
# wait until others finish: *continuous batching*.

# %%
BLOCK_SIZE, NUM_BLOCKS, NEW_TOKENS = 16, 14, 32


def new_engine(**options):
    """Return an engine with all prompts queued, and the requests."""
    engine = Engine(model, options.pop("num_blocks", NUM_BLOCKS), BLOCK_SIZE, **options)
    requests = [engine.submit(name, ids, NEW_TOKENS) for name, ids in prompts.items()]
    return engine, requests


trial, _ = new_engine(graph=on_gpu)
trial.step()
began = time.perf_counter()
trial.step()
seconds = time.perf_counter() - began
steps = sum(-(-len(ids) // 16) + NEW_TOKENS for ids in prompts.values())
print(f"One step takes {seconds * 1e3:.1f} ms.")
print(
    f"One by one, the sequences would take up to {steps} steps, {steps * seconds:.1f} s; "
    "batched, they take less."
)
assert seconds > 0

# %% [markdown]
# ## Generate
#
# On a GPU, the whole step has been captured in a CUDA graph. This works because its shapes are
# fixed: the inputs are refilled in place, `slot_mapping` computes the slots from the block tables
# inside the graph, and unused rows get slot -1.

# %%
engine, requests = new_engine(graph=on_gpu)
snapshots = {}  # step number -> the block tables after that step


def generate(engine, requests, snapshots=None):
    """Step until all requests have finished; return the number of steps and the seconds."""
    steps, began = 0, time.perf_counter()
    most = len(requests) * NEW_TOKENS  # some answers are shorter
    with tqdm(total=most, unit="token", mininterval=1) as bar:
        while engine.waiting or engine.running:
            running = [request.name for request in engine.running]
            engine.step()
            steps += 1
            bar.update(sum(len(one.generated) for one in requests) - bar.n)
            names = [request.name for request in engine.running]
            if snapshots is not None and names != running:
                tables = {request.name: [] for request in requests}
                tables |= {one.name: list(one.sequence.block_table) for one in engine.running}
                snapshots[steps] = tables
    return steps, time.perf_counter() - began


steps, seconds = generate(engine, requests, snapshots)
generated = sum(len(request.generated) for request in requests)
for request in requests:
    print(f"{request.name}  {QUESTIONS[request.name]}\n   {source.text(request.generated).strip()}")
print(
    f"\n{generated} tokens in {steps} steps, {seconds:.1f} s: {generated / seconds:.0f} per second"
)
assert all(0 < len(request.generated) <= NEW_TOKENS for request in requests)
assert all(request.found == common // BLOCK_SIZE * BLOCK_SIZE for request in requests[1:])
assert engine.cache.pool.num_free == NUM_BLOCKS  # all blocks have been released

# %% [markdown]
# ## One kernel rotates and writes
#
# The rotary embedding turns Q and K by angles that depend on the position of the token. The model
# does not do this itself: it is a step of a `WriteKernel`, which takes the table of cosines and
# sines and the positions as parameters. In each layer, a single call rotates Q in place, rotates K
# on its way into the cache, and writes V as it is.

# %%
kernel = engine.kernel
kernel.check()  # raises if a slot or a position was outside
kernel

# %% [markdown]
# The steps are compiled into that kernel. `source` is their CUDA text, and this is the part for K;
# `rope` is one of the operations that come with this package.

# %%
_, comment, text = kernel.source.partition("// k[0]")
print(comment + text.partition("\n\nstruct VSteps")[0])

# %% [markdown]
# ## The pool as sequences come and go
#
# White blocks are free. Those with the K and V of finished sequences can still be found until their
# room is needed, so even a prompt that comes last shares what the first one has written.

# %%
_, axes = pyplot.subplots(len(snapshots), 1, figsize=(8, 1.25 * len(snapshots)))
for ax, (step, tables) in zip(axes, snapshots.items(), strict=True):
    plot.pool(tables, NUM_BLOCKS, columns=NUM_BLOCKS, ax=ax)
    ax.set_title(f"after step {step}: {ax.get_title()}", fontsize=9)
pyplot.tight_layout()

together = [sum(map(bool, tables.values())) for tables in snapshots.values()]
assert 1 < max(together) < len(prompts)  # several at a time, but never all
assert together[-1] == 0

# %% [markdown]
# ## The same with a dense cache
#
# A dense cache has one array per sequence that is as long as the context, and shares nothing. Here
# each prompt is answered alone: K is rotated and written by indexing, without blocks, slots and the
# kernel. It is the same K and V, so every generated token must be the same.

# %%
for name, request in zip(prompts, requests, strict=True):
    assert dense_tokens(model, prompts[name], NEW_TOKENS) == request.generated
print(f"{generated} of {generated} tokens are equal.")

# %% [markdown]
# ## Memory
#
# How much memory does the paged cache use at its peak? We compare it with a dense cache for these
# five sequences that is only as long as the longest of them.

# %%
longest = max(len(request.ids) - 1 for request in requests)  # the last token is never fed back
paged_bytes = engine.peak * engine.cache.block_bytes
dense_bytes = len(requests) * longest * engine.cache.block_bytes // BLOCK_SIZE
print(f"paged  {paged_bytes / 1e6:5.1f} MB, {engine.peak} blocks")
print(f"dense  {dense_bytes / 1e6:5.1f} MB, {len(requests)} x {longest} tokens")
assert engine.cache.block_bytes == 2 * 30 * BLOCK_SIZE * 3 * 64 * 4  # K and V, layers, ..., float32
assert engine.peak <= NUM_BLOCKS
assert paged_bytes < 0.6 * dense_bytes

# %% [markdown]
# With enough blocks for all five, the sequences run together: the same tokens in fewer steps.

# %%
roomy, roomy_requests = new_engine(num_blocks=40, graph=on_gpu)
roomy_steps, seconds = generate(roomy, roomy_requests)
assert [one.ids for one in roomy_requests] == [one.ids for one in requests]
assert roomy_steps < steps
print(f"{generated} tokens in {roomy_steps} steps: {generated / seconds:.0f} per second")
print(f"paged  {roomy.peak * roomy.cache.block_bytes / 1e6:5.1f} MB, {roomy.peak} blocks")
assert roomy.peak * roomy.cache.block_bytes < 0.6 * dense_bytes

# %% [markdown]
# ## What a step costs on a GPU
#
# A layer is nine kernels: a norm, a product, the write, attention, a product; and again a norm, a
# product, the gate, a product. Each waits for the one before it, and a batch of 16 rows leaves them
# little to do, so their number counts, and the weights, which are read once in each step.

# %%
if on_gpu:
    nodes = ctypes.c_size_t()
    graph = ctypes.c_void_p(roomy.graph.graph)
    assert not ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(graph, None, ctypes.byref(nodes))
    matrices = [array for layer in model.layers for array in vars(layer).values()]
    weights = sum(array.nbytes for array in [model.embedding, *matrices])

    start, end = xp.cuda.Event(), xp.cuda.Event()
    copies = [xp.empty_like(model.embedding) for _ in range(2)]
    xp.copyto(*copies)
    start.record()
    for _ in range(20):
        xp.copyto(*copies)
    end.record()
    end.synchronize()
    rate = 20 * 2 * copies[0].nbytes / (xp.cuda.get_elapsed_time(start, end) / 1e3)

    step_seconds = seconds / roomy_steps
    print(
        f"{nodes.value} launches in {step_seconds * 1e3:.2f} ms, "
        f"{step_seconds / nodes.value * 1e6:.1f} us each\n"
        f"{weights / 1e6:.0f} MB of weights, read in {weights / rate * 1e3:.2f} ms at the rate of "
        f"a copy, {rate / 1e12:.1f} TB/s"
    )
else:
    print("There is no GPU here.")

# %% [markdown]
# ## What the CUDA graph changes
#
# Without the graph, each of these kernels is launched from Python.

# %%
if on_gpu:
    eager, eager_requests = new_engine(num_blocks=40)
    _, eager_seconds = generate(eager, eager_requests)
    assert [one.ids for one in eager_requests] == [one.ids for one in requests]
    print(f"graph {generated / seconds:.0f}, eager {generated / eager_seconds:.0f} tokens/s")
else:
    print("There is no GPU here, so there is no graph.")
