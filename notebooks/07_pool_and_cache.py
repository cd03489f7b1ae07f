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
# # 7. Which block holds which tokens
#
# > **Colab or Kaggle**: run this cell first.

# %%
# In Colab or Kaggle, take the # away from the next line; elsewhere the
# package is installed already.
# # %pip install -q "pagedcache[notebook,cuda12]"

# %% [markdown]
# A language model keeps the keys and values (K and V) of all tokens so far, since each new token
# reads them. A server answers many people at once, and does not know how long an answer will be.
# So it keeps K and V in *blocks* of a few tokens each, and gives a sequence one block after another
# as it grows, as an operating system does with pages of memory.
#
# `BlockPool` is the bookkeeping, and `KVCache` is a pool with the arrays. In this notebook we look
# at what they do, and then run a small server on them. It needs no GPU; if there is one, it is
# used.

# %%
import sys
from collections import deque

import numpy
from matplotlib import pyplot
from tqdm import tqdm

import pagedcache as pc
from pagedcache import plot
from pagedcache.pool import BlockCopied, BlockRemoved, CopiesTaken

device = pc.Handle().device  # CUDA if it is usable here, otherwise the CPU
if device == "cpu":
    xp = numpy
else:
    import cupy as xp

pyplot.rcParams["font.size"] = 11
print(pc.Handle())

# %% [markdown]
# ## Blocks, slots and block tables
#
# Here is a cache of 16 blocks of 4 tokens, for a model of 2 layers:

# %%
cache = pc.KVCache(
    num_layers=2, num_blocks=16, block_size=4, num_kv_heads=1, head_size=8,
    dtype="float32", device=device,
)  # fmt: skip
cache

# %% [markdown]
# Each block has 4 *slots*, and a slot holds K and V of one token in all layers. So 16 blocks are 64
# slots, and slot 9 is slot 1 of block 2.
#
# Models see numbers instead of words, the *token ids*. Ours are given to words in the order in
# which we first use them.

# %%
vocabulary = {}


def tokens(text):
    """Return a token id for each word."""
    return [
        vocabulary.setdefault(word, len(vocabulary))
        for word in text.split()
    ]


SYSTEM = "You are a friendly guide . Answer in one short sentence . "
tokens(SYSTEM + "Why is the sky blue ?")

# %% [markdown]
# `sequence` finds room for a prompt. Its *block table* lists its blocks in the order of the tokens:
# token `t` is in block `block_table[t // 4]`, at offset `t % 4`.

# %%
sky = cache.sequence(tokens(SYSTEM + "Why is the sky blue ?"))
print(f"{sky.num_tokens} tokens in blocks {sky.block_table}")
_ = plot.slot_mapping(sky.slots(), cache.block_size, cache.num_blocks)

# %% [markdown]
# Until now, nothing was written. K and V come from a model; a function that we can call again will
# do here, so that we know later what must be in the cache. It takes token ids and their positions.

# %%
WEIGHTS = xp.asarray(
    numpy.random.default_rng(0).random((1000, 1, 8), dtype=numpy.float32)
)


def model(ids, positions):
    """Return K and V of tokens, each [tokens, KV heads, head size]."""
    positions = xp.asarray(numpy.asarray(positions, numpy.float32))
    k = WEIGHTS[xp.asarray(numpy.asarray(ids))] + positions[:, None, None]
    return k, -k


# %% [markdown]
# `slots` says where the tokens go that are not in the cache yet. For the first prompt, that is all
# of them.


# %%
def prefill(cache, sequence):
    """Compute and write what is not in the cache; return how many tokens."""
    start, stop = sequence.num_cached_tokens, sequence.num_tokens
    k, v = model(sequence.token_ids[start:], range(start, stop))
    slots = cache.slots(sequence)
    for layer in range(cache.num_layers):
        cache.write(layer, k, v, slots)
    return stop - start


def intact(cache, sequence):
    """Read a sequence; return whether it is what the model computes."""
    k, v = model(sequence.token_ids, range(sequence.num_tokens))
    read = [
        cache.read(layer, sequence) for layer in range(cache.num_layers)
    ]
    return all(bool((a == k).all() and (b == v).all()) for a, b in read)


print(
    f"{prefill(cache, sky)} tokens computed; "
    f"read back intact: {intact(cache, sky)}"
)

# %% [markdown]
# ## The same beginning is found
#
# The second prompt begins with the same words. K and V of a token depend on the token, its position
# and the tokens before it, and not on those after it. So blocks that are full of the same beginning
# can be shared: the pool looks them up. This is called *prefix caching*.

# %%
moon = cache.sequence(tokens(SYSTEM + "How old is the moon ?"))
print(f"{moon.num_cached_tokens} of {moon.num_tokens} tokens found")
print(
    f"{prefill(cache, moon)} tokens computed; "
    f"read back intact: {intact(cache, moon)}"
)

# %%
tables = {"sky": sky.block_table, "moon": moon.block_table}
_ = plot.pool(tables, cache.num_blocks)

# %%
_ = plot.block_tables(tables)

# %% [markdown]
# ## Fork, and copy on write
#
# We want two answers to one question. `fork` makes a second sequence with the same tokens, and
# takes no block at all. But the last block has room for two more tokens, and the answers differ.
# So the first of the two that appends is given a block of its own, and what the old one holds must
# be copied to it.

# %%
fork = sky.fork()
at_first = {"sky": list(sky.block_table), "fork": list(fork.block_table)}

with pc.EventLog(cache.pool) as log:
    slots = fork.append(tokens("Air scatters blue light ."))
    cache.apply_copies()  # cache.write would do it, too
for _, event in log.entries:
    if isinstance(event, BlockCopied | CopiesTaken):
        print(event)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, (left, right) = pyplot.subplots(
    1, 2, figsize=(10, 2.2), layout="constrained"
)
plot.block_tables(at_first, ax=left).set(
    xlim=(0, 6), title="after the fork"
)
after = {"sky": sky.block_table, "fork": fork.block_table}
_ = plot.block_tables(after, ax=right).set(
    xlim=(0, 6), title="after it appended 5 tokens"
)

# %% [markdown]
# `BlockCopied` says which block is to be copied, and where. The pool touches no array: it keeps a
# list of such pairs, which `pool.take_copies()` returns. `cache.apply_copies()` takes them and
# copies the blocks, in all layers; that was `CopiesTaken`. Now each of the two goes on in its own
# last block.

# %%
answers = {
    fork: slots,
    sky: sky.append(
        tokens("Small particles scatter it .")
    ),  # nobody shares its last block now
}
for sequence, slots in answers.items():
    start, stop = sequence.num_tokens - len(slots), sequence.num_tokens
    k, v = model(sequence.token_ids[start:], range(start, stop))
    for layer in range(cache.num_layers):
        cache.write(layer, k, v, slots)

[intact(cache, sequence) for sequence in (sky, fork, moon)]

# %% [markdown]
# ## Freed blocks can still be found
#
# When an answer is done, its sequence is freed. What its full blocks hold stays, and a later prompt
# with the same beginning finds it, until the room is needed. A pool draws itself:

# %%
for sequence in (sky, fork, moon):
    sequence.free()
cache.pool

# %%
cache.pool.find(
    tokens(SYSTEM + "Why is the sea salty ?")
)  # tokens that would be found

# %% [markdown]
# Which blocks go first, if room is needed? First those that hold nothing that could be found, and
# then those that were used least recently; of one sequence, the last block goes first, since a
# beginning is of more use than an end. We watch a pool of 12 blocks. `A` and `B` are freed, then a
# prompt that begins like `A` comes and goes, and then `C` grows and grows.

# %%
pool = pc.BlockPool(num_blocks=12, block_size=4)
film = []


def take_picture(title, **sequences):
    tables = {
        name: list(one.block_table) for name, one in sequences.items()
    }
    film.append((title, tables, pool.cached_blocks))


a, b = pool.sequence(range(12)), pool.sequence(range(100, 108))
take_picture("A has 12 tokens, B has 8", A=a, B=b)
a.free()
b.free()
again = pool.sequence([*range(12), 99])
print(again.num_cached_tokens, "tokens of A found")
again.free()
take_picture("both are freed; a prompt found A's blocks, and is freed")

# %%
with pc.EventLog(pool) as log:
    c = pool.sequence(range(200, 228))
    take_picture("C has 28 tokens", C=c)
    for stop in (36, 48):
        c.append(range(200 + c.num_tokens, 200 + stop))
        take_picture(f"C has {stop} tokens", C=c)

evicted = [
    event.blocks
    for _, event in log.entries
    if isinstance(event, BlockRemoved)
]
print("evicted, in this order:", *evicted)

# %% tags=["hide-input"] jupyter={"source_hidden": true}
COLOURS = {"A": [], "B": [], "C": []}  # a name keeps its colour
_, axes = pyplot.subplots(
    len(film), 1, figsize=(10, 6.2), layout="constrained"
)
for ax, (title, tables, found) in zip(axes, film, strict=True):
    plot.pool(
        {**COLOURS, **tables},
        pool.num_blocks,
        cached=found,
        columns=12,
        ax=ax,
    )
    ax.set_title(title)

# %% [markdown]
# `B` went before `A`, since `A` was used again. In a pool that is full there is nothing to evict.
# Then an error says so, and nothing is changed, so that a server can try again later.

# %%
before = pool.statistics
try:
    c.append(range(300, 310))
except pc.PoolExhaustedError as error:
    print(error)
print(
    "nothing has changed:", pool.statistics == before and c.num_tokens == 48
)

# %% [markdown]
# ## To host memory and back
#
# A server that is short of blocks can move a sequence to host memory, and bring it back later.
# Meanwhile, others use its blocks. Here, another sequence writes to every block of the cache.

# %%
sky = cache.sequence(tokens(SYSTEM + "Why is the sky blue ?"))
prefill(cache, sky)
was = sky.block_table
offloaded = cache.offload(sky)

other = cache.sequence(range(500, 564))
prefill(cache, other)
print(offloaded, cache.pool, sep="\n")
other_blocks = other.block_table
print("the other is in blocks", other_blocks)

# %%
other.free()
sky = cache.restore(offloaded)
print(
    f"was in {was}, is in {sky.block_table}; intact: {intact(cache, sky)}"
)

# %% [markdown]
# The blocks may be any. That four of them are the same as before is chance: they are the last ones of
# the other sequence, and of a freed sequence, the last blocks go first. Nothing of `sky` was left in
# them; `restore` copied all five from host memory.

# %% [markdown]
# ## A small server
#
# Now to a server. Of 60 requests, each begins with one of three system prompts, and goes on with a
# question of its own. They come in at random, one in 3 steps on average. Since there is no model,
# the answers are made up as well.

# %%
BLOCK_SIZE, NUM_BLOCKS = 8, 64


class Request:
    def __init__(self, arrival, prompt, answer):
        self.arrival, self.prompt, self.answer = arrival, prompt, answer
        self.sequence = self.offloaded = None

    def done(self):
        return self.sequence.num_tokens == len(self.prompt) + len(
            self.answer
        )


def make_requests(count=60, seed=3):
    rng = numpy.random.default_rng(seed)
    systems = [
        rng.integers(1000, size=size).tolist() for size in (48, 64, 80)
    ]
    arrivals = rng.exponential(3, count).cumsum()
    return [
        Request(
            arrival,
            prompt=systems[rng.integers(3)]
            + rng.integers(1000, size=rng.integers(6, 24)).tolist(),
            answer=rng.integers(1000, size=rng.integers(16, 64)).tolist(),
        )
        for arrival in arrivals
    ]


longest = max(
    len(each.prompt) + len(each.answer) for each in make_requests()
)
room = NUM_BLOCKS * BLOCK_SIZE
print(f"Up to {longest} tokens a request; the cache has room for {room}.")


# %% [markdown]
# The server keeps its requests in lists. Its event log notes the number of the step with each
# event.


# %%
class Server:
    def __init__(self, *, prefix_caching):
        self.cache = pc.KVCache(
            2, NUM_BLOCKS, BLOCK_SIZE, 1, 8, dtype="float32", device=device,
            prefix_caching=prefix_caching,
        )  # fmt: skip
        self.step = self.num_computed = self.num_intact = 0
        self.waiting, self.offloaded = deque(), deque()
        self.running, self.offloaded_at, self.tokens_held = [], [], []
        self.log = pc.EventLog(self.cache.pool, clock=lambda: self.step)


# %% [markdown]
# While there is room, and a block to spare for each running request, it brings back what was
# offloaded, and then lets new requests in. If there is too little room after all, it tries again in
# the next step.


# %%
def admit(server):
    cache, running = server.cache, server.running
    while cache.pool.num_free > len(running) and (
        queue := server.offloaded or server.waiting
    ):
        request = queue[0]
        try:
            if request.offloaded:
                request.sequence = cache.restore(request.offloaded)
            else:
                request.sequence = cache.sequence(request.prompt)
                server.num_computed += prefill(cache, request.sequence)
        except pc.PoolExhaustedError:
            return
        request.offloaded = None
        running.append(queue.popleft())


# %% [markdown]
# Before each step, it offloads those that came last, until every other one can have one more token.


# %%
def make_room(server):
    cache, running = server.cache, server.running
    while cache.pool.num_free < sum(
        each.sequence.num_tokens % BLOCK_SIZE == 0 for each in running
    ):
        request = running.pop()
        request.offloaded = cache.offload(request.sequence)
        server.offloaded.append(request)
        server.offloaded_at.append(server.step)


# %% [markdown]
# A step appends one token to each running request, and writes them all in one call per layer. Those
# that are done are read back and checked, and freed.


# %%
def decode(server):
    cache, sequences = (
        server.cache,
        [each.sequence for each in server.running],
    )
    positions = [each.num_tokens for each in sequences]
    ids = [
        each.answer[each.sequence.num_tokens - len(each.prompt)]
        for each in server.running
    ]
    slots = [
        each.append(token)[0]
        for each, token in zip(sequences, ids, strict=True)
    ]
    # To the device once, for all layers.
    slots = xp.asarray(numpy.asarray(slots))
    k, v = model(ids, positions)
    for layer in range(cache.num_layers):
        cache.write(layer, k, v, slots)
    server.tokens_held.append([each.num_tokens for each in sequences])


def finish(server):
    done = [each for each in server.running if each.done()]
    for request in done:
        server.num_intact += intact(server.cache, request.sequence)
        request.sequence.free()
        server.running.remove(request)
    return len(done)


# %%
def serve(requests, **options):
    server, arriving = Server(**options), deque(requests)
    with tqdm(total=len(requests), desc="answered", file=sys.stdout) as bar:
        while bar.n < len(requests):
            server.step += 1
            while arriving and arriving[0].arrival <= server.step:
                server.waiting.append(arriving.popleft())
            admit(server)
            make_room(server)
            if server.running:
                decode(server)
                bar.update(finish(server))
    server.log.close()
    return server


server = serve(make_requests(), prefix_caching=True)
print(
    f"{server.step} steps, "
    f"{len(server.offloaded_at)} times offloaded and restored"
)
print(f"{server.num_intact} of 60 requests were intact when they were done")

# %% [markdown]
# ## What happened in the pool
#
# The log tells how many blocks were used for what. The black triangles above the picture, which are
# not in its legend, mark the steps in which a request was offloaded, since the pool was full.

# %%
ax = plot.occupancy(server.log, unit="step")
steps = server.offloaded_at
_ = ax.plot(
    steps, [NUM_BLOCKS + 2] * len(steps), "v", color="black", clip_on=False
)

# %% [markdown]
# The gray blocks are those of the system prompts, which several requests share at a time. If each
# had copies of its own, the pool would be too small:

# %%
_ = plot.sharing(server.log, unit="step")

# %%
server.cache.pool.statistics

# %% [markdown]
# *Found* is the hit rate: these tokens were in the cache already, and need not be computed.
# Compared with a pool without prefix caching, an eviction loses nothing: there, what a block holds
# is lost as soon as it is freed.
#
# Only the last block of a sequence has slots without a token, so few slots are empty:

# %%
_ = plot.fragmentation(server.log, unit="step")

# %% [markdown]
# Without blocks, a server must reserve slots for the longest possible sequence for each request.
# How many of them would have been empty, with the same running requests in each step? Here, what
# several requests share counts for each of them.

# %%
tokens_held = sum(sum(lengths) for lengths in server.tokens_held)
reserved = sum(longest * len(lengths) for lengths in server.tokens_held)
in_blocks = sum(
    -(-length // BLOCK_SIZE) * BLOCK_SIZE
    for lengths in server.tokens_held
    for length in lengths
)
shares = {
    "blocks": tokens_held / in_blocks,
    "reserved": tokens_held / reserved,
}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, ax = pyplot.subplots(figsize=(9, 1.9), layout="constrained")
full, rest = (
    [100 * share for share in shares.values()],
    [100 - 100 * x for x in shares.values()],
)
for left, widths, colour, label in (
    (0, full, plot.HELD, "with a token"),
    (full, rest, plot.EMPTY, "without a token"),
):
    bars = ax.barh(
        list(shares),
        widths,
        left=left,
        color=colour,
        edgecolor="black",
        label=label,
    )
    if left == 0:
        ax.bar_label(bars, fmt="%.0f %%", label_type="center")
ax.invert_yaxis()
ax.set(xlim=(0, 100), xlabel="slots of the running requests, %")
_ = ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)

# %% [markdown]
# ## The same requests without prefix caching
#
# Last, the same requests again, with a pool that looks up nothing. The thick lines are where the
# last request was done.

# %%
without = serve(make_requests(), prefix_caching=False)
servers = {"With prefix caching": server, "Without": without}

# %% tags=["hide-input"] jupyter={"source_hidden": true}
_, axes = pyplot.subplots(
    2, 1, figsize=(9, 6.4), layout="constrained", sharex=True
)
for ax, (name, one) in zip(axes, servers.items(), strict=True):
    plot.occupancy(one.log, unit="step", ax=ax)
    running = numpy.mean([len(lengths) for lengths in one.tokens_held])
    computed = f"{one.num_computed:,} prompt tokens computed"
    title = f"{name}: {one.step} steps, {computed}, {running:.1f} requests at a time"
    ax.set_title(title, fontsize=11, loc="left")
    ax.axvline(one.step, color="black", linewidth=2)  # all are answered
axes[0].set_xlabel("")
axes[1].get_legend().remove()
_ = axes[0].set_xlim(0, 1.02 * max(one.step for one in servers.values()))

# %% [markdown]
# Without prefix caching, each request holds a system prompt of its own, so fewer of them are
# answered at a time, and the last has to wait longer. And each system prompt is computed again for
# each request.

# %%
print(f"{without.step / server.step:.2f} times as many steps")
more = without.num_computed / server.num_computed
print(f"{more:.1f} times as many prompt tokens computed")
