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
# > **Colab or Kaggle**: run this cell first, and upload smollm2.py and smollm2.cu from the folder of
# > this notebook.

# %%
# In Colab or Kaggle, take the # away from the next line; elsewhere the
# package is installed already.
# # %pip install -q "pagedcache[notebook,cuda12]"

# %% [markdown]
# SmolLM2-135M answers five questions with its K and V in a `pagedcache.KVCache`: in each of its 30
# layers, a kernel of this package rotates K and writes K and V into blocks, and attention reads
# them where they are, through the block table of each sequence. The model and the engine are in
# `smollm2.py` next to this notebook, and the kernels that compute the model on a GPU in
# `smollm2.cu`. The weights (93 MB) are downloaded once.

# %%
import ctypes
import os
import sys
import time
from collections import Counter

# Must be set before NumPy is imported. A single thread adds in the same order
# however many cores there are, and several threads would wait a long time for
# each other where cores are shared.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.patches import Patch
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
    f"{len(model.layers)} layers, {model.heads} query heads "
    f"and {model.kv_heads} KV heads of {model.head_size}"
)

# %% [markdown]
# There are fewer KV heads than query heads: three query heads read the K and V of one KV head. This
# is *grouped-query attention*, and makes the cache a third as large as one KV head for each query
# head would.
#
# ## Five prompts with a shared prefix
#
# All prompts start with the same system prompt. Where its tokens fill a whole block, the cache
# finds that block for each sequence that begins with them, so all sequences share it.

# %%
SYSTEM = (
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face. "
    "Answer in one short sentence, in plain words, and give no examples."
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
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    for name, question in QUESTIONS.items()
}
common = 0
while len({tuple(ids[: common + 1]) for ids in prompts.values()}) == 1:
    common += 1
lengths = {name: len(ids) for name, ids in prompts.items()}
print(lengths, "tokens;", common, "in common")

# %% [markdown]
# ## How long will it take?
#
# Each step computes 16 rows, and each row is one token of some sequence. A newly admitted prompt
# needs all of its tokens computed (*prefill*); after that, each step computes only the token that
# was generated last (*decode*). Nobody knows how long an answer will be, and this engine admits a
# sequence only if it could hold the longest one. A prompt of up to 54 tokens and an answer of 32 may
# come to fill 6 blocks, of which 2 are shared. So 14 blocks are enough for three sequences at a time,
# and the others wait until one of them has finished: *continuous batching*.

# %%
BLOCK_SIZE, NUM_BLOCKS, NEW_TOKENS = 16, 14, 32


def new_engine(**options):
    """Return an engine with all prompts queued, and the requests."""
    num_blocks = options.pop("num_blocks", NUM_BLOCKS)
    engine = Engine(model, num_blocks, BLOCK_SIZE, **options)
    requests = [
        engine.submit(name, ids, NEW_TOKENS)
        for name, ids in prompts.items()
    ]
    return engine, requests


trial, _ = new_engine(graph=on_gpu)
trial.step()
began = time.perf_counter()
trial.step()
seconds = time.perf_counter() - began
steps = sum(-(-len(ids) // 16) + NEW_TOKENS for ids in prompts.values())
print(f"One step takes {seconds * 1e3:.1f} ms.")
print(
    f"One by one, the sequences would take up to {steps} steps, "
    f"{steps * seconds:.1f} s; batched, they take less."
)

# %% [markdown]
# ## Generate
#
# On a GPU, the whole step has been captured in a CUDA graph. This works because its shapes are
# fixed: the inputs are refilled in place, `slot_mapping` computes the slots from the block tables
# inside the graph, and unused rows get slot -1.

# %%
engine, requests = new_engine(graph=on_gpu)
history = []  # the block tables after each step


def generate(engine, requests, history=None):
    """Step until all have finished; return how many steps and seconds."""
    steps, began = 0, time.perf_counter()
    bar = tqdm(
        total=len(requests) * NEW_TOKENS,
        unit="token",
        mininterval=1,
        file=sys.stdout,
    )
    with bar:
        while engine.waiting or engine.running:
            engine.step()
            steps += 1
            bar.update(sum(len(one.generated) for one in requests) - bar.n)
            if history is not None:
                history.append(
                    {
                        one.name: list(one.sequence.block_table)
                        for one in engine.running
                    }
                )
        bar.total = bar.n  # answers may be shorter
        bar.refresh()
    return steps, time.perf_counter() - began


steps, seconds = generate(engine, requests, history)
generated = sum(len(request.generated) for request in requests)
for request in requests:
    answer = source.text(request.generated).strip()
    print(f"{request.name}  {QUESTIONS[request.name]}\n   {answer}")
print(
    f"\n{generated} tokens in {steps} steps, {generated / steps:.1f} a step; "
    f"{seconds:.1f} s, {generated / seconds:.0f} tokens per second"
)

# %% [markdown]
# The first answer is wrong: there is no Scavardi, and the scattering is named after Rayleigh alone. A
# model of 135 million parameters makes such mistakes. It is not the cache's: with a dense cache,
# below, the answer is the same.
#
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
# A column of this picture is a step, and a row is a block of the pool. A letter marks the step in
# which a block is given to a sequence. The first two blocks hold the system prompt, which all sequences share. What
# finished sequences have left in white blocks can still be found until the room is needed.

# %% tags=["hide-input"] jupyter={"source_hidden": true}
COLOURS = dict(
    zip(
        prompts,
        ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9"),
        strict=True,
    )
)
holders = [""] * NUM_BLOCKS
names = ["", "shared", *prompts]  # a colour each
picture = numpy.zeros((NUM_BLOCKS, len(history)))

_, ax = pyplot.subplots(figsize=(11, 4.6), layout="constrained")
for step, tables in enumerate(history):
    times = Counter(block for table in tables.values() for block in table)
    owner = {
        block: name for name, table in tables.items() for block in table
    }
    for block in range(NUM_BLOCKS):
        holder = "shared" if times[block] > 1 else owner.get(block, "")
        picture[block, step] = names.index(holder)
        if holder in prompts and holder != holders[block]:
            ax.text(
                step + 1,
                block,
                holder,
                ha="center",
                va="center",
                fontsize=11,
                weight="bold",
            )
        holders[block] = holder
colours = [plot.FREE, plot.SHARED, *COLOURS.values()]
ax.imshow(
    picture, cmap=ListedColormap(colours), vmin=0, vmax=len(colours) - 1, aspect="auto",
    extent=(0.5, len(history) + 0.5, NUM_BLOCKS - 0.5, -0.5),
)  # fmt: skip
ax.set_xlabel("step", fontsize=11)
ax.set_ylabel("block", fontsize=11)
ax.set_yticks(range(NUM_BLOCKS))
ax.set_yticks(numpy.arange(NUM_BLOCKS - 1) + 0.5, minor=True)
ax.tick_params(axis="y", which="minor", length=0)
ax.grid(visible=True, axis="y", which="minor", color="black", linewidth=0.4)
handles = [
    Patch(facecolor=colour, edgecolor="black", label=name or "free")
    for colour, name in zip(colours, names, strict=True)
]
_ = ax.legend(
    handles=handles,
    loc="upper left",
    bbox_to_anchor=(1, 1),
    fontsize=11,
    frameon=False,
)

# %% [markdown]
# These are the block tables when most blocks were in use:

# %%
fullest = max(
    history, key=lambda tables: len(set().union(*tables.values()))
)
ax = plot.block_tables({name: fullest.get(name, []) for name in prompts})
_ = ax.set_title(f"after step {history.index(fullest) + 1}")

# %% [markdown]
# ## The same with a dense cache
#
# A dense cache has one array per sequence that is as long as the context, and shares nothing. Here
# two of the prompts are answered alone: K is rotated and written by indexing, without blocks, slots
# and the kernel. It is the same K and V, so the same tokens must follow.

# %%
for request in (requests[0], requests[3]):
    dense = dense_tokens(model, prompts[request.name], NEW_TOKENS)
    same = sum(map(int.__eq__, dense, request.generated))
    print(f"{request.name}: {same} of {len(dense)} tokens are equal.")

# %% [markdown]
# ## All five at once
#
# With 40 blocks no sequence has to wait, and they give the same tokens in fewer steps. It is only a
# few steps less, since the longest answer alone takes most of them. The time of one step is the same,
# since a step has 16 rows, whether or not all of them are used.

# %%
roomy_history = []
roomy, roomy_requests = new_engine(num_blocks=40, graph=on_gpu)
roomy_steps, seconds = generate(roomy, roomy_requests, roomy_history)
print(
    f"{generated} tokens in {roomy_steps} steps, "
    f"{generated / roomy_steps:.1f} a step, instead of {steps} steps"
)
together = max(map(len, roomy_history))
print(f"At most {together} sequences at a time, and {roomy.peak} blocks")
same = [one.ids for one in roomy_requests] == [one.ids for one in requests]
print("The same tokens:", same)

# %% [markdown]
# ## Memory
#
# All five were in the cache at the same time, so we can compare the most blocks that they took with
# dense caches for five sequences: caches that are as long as the longest of them, which nobody knows
# beforehand, and caches that are as long as a sequence may become.

# %%
# The last token is never fed back.
longest = max(len(request.ids) - 1 for request in requests)
token_bytes = roomy.cache.block_bytes // BLOCK_SIZE  # in all layers
paged_bytes = roomy.peak * roomy.cache.block_bytes
dense_bytes = together * longest * token_bytes
full_bytes = together * model.context * token_bytes

# %% tags=["hide-input"] jupyter={"source_hidden": true}
sizes = {
    f"paged: {roomy.peak} blocks of {BLOCK_SIZE} tokens": paged_bytes,
    f"dense: {together} x {longest} tokens, the longest here": dense_bytes,
    f"dense: {together} x {model.context} tokens, the longest allowed": full_bytes,
}
_, ax = pyplot.subplots(figsize=(9, 2), layout="constrained")
bars = ax.barh(
    list(sizes), [size / 1e6 for size in sizes.values()], color="#56b4e9"
)
ax.bar_label(bars, fmt="%.1f MB", padding=3, fontsize=11)
ax.tick_params(labelsize=11)
ax.margins(x=0.15)
ax.invert_yaxis()
_ = ax.set_xlabel("MB of K and V, in float32, in all layers", fontsize=11)

# %% [markdown]
# That the run with 14 blocks took 12 at its peak as well is chance: it had to keep room for answers
# that turned out shorter.

# %% [markdown]
# ## What a step costs on a GPU
#
# A layer is nine kernels: a norm, a product, the write, attention, a product; and again a norm, a
# product, the gate, a product. Each waits for the one before it, and a batch of 16 rows leaves them
# little to do, so their number counts, and the weights, which are read once in each step. An H200
# took 1.27 ms for a graph of 275 launches, 4.6 us each on average, and would read the weights in
# 0.13 ms at the rate of a copy ([performance notes](../notes/performance.md)).

# %%
if on_gpu:
    nodes = ctypes.c_size_t()
    graph = ctypes.c_void_p(roomy.graph.graph)
    assert not ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
        graph, None, ctypes.byref(nodes)
    )
    matrices = [
        array for layer in model.layers for array in vars(layer).values()
    ]
    weights = sum(array.nbytes for array in [model.embedding, *matrices])

    start, end = xp.cuda.Event(), xp.cuda.Event()
    copies = [xp.empty_like(model.embedding) for _ in range(2)]
    xp.copyto(*copies)
    start.record()
    for _ in range(20):
        xp.copyto(*copies)
    end.record()
    end.synchronize()
    rate = (
        20
        * 2
        * copies[0].nbytes
        / (xp.cuda.get_elapsed_time(start, end) / 1e3)
    )

    step_seconds = seconds / roomy_steps
    print(
        f"{nodes.value} launches in {step_seconds * 1e3:.2f} ms, "
        f"{step_seconds / nodes.value * 1e6:.1f} us each\n"
        f"{weights / 1e6:.0f} MB of weights, read in "
        f"{weights / rate * 1e3:.2f} ms at the rate of a copy, "
        f"{rate / 1e12:.1f} TB/s"
    )

# %% [markdown]
# ## What the CUDA graph changes
#
# Without the graph, each of these kernels is launched from Python. On the H200, five sequences that
# run together made 2,906 tokens per second with the graph, and 942 without. With 14 blocks, where
# sequences wait, it was 1,708. These were measured with random weights of the same shapes.

# %%
if on_gpu:
    eager, eager_requests = new_engine(num_blocks=40)
    _, eager_seconds = generate(eager, eager_requests)
    print(
        f"graph {generated / seconds:.0f}, "
        f"eager {generated / eager_seconds:.0f} tokens/s"
    )
