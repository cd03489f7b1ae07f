# SPDX-License-Identifier: Apache-2.0
"""Transfers between two processes: right to the byte, or an error in a bounded time."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import pagedcache as pc
from pagedcache import transfer
from pagedcache.status import MissingLibraryError
from pagedcache.transfer import card as cards
from pagedcache.transfer.errors import TransferError, TransferTimeoutError, wait_for

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="needs NIXL: pip install --no-deps nixl nixl-cu12",
)
LIMIT = 60  # seconds; far more than anything here takes
TRANSPORTS = {
    "default": {"UCX_NET_DEVICES": "lo"},  # what UCX chooses between processes of one host
    "tcp": {"UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp"},
}


class Side:
    """A process that runs functions of this file. Each gets a namespace that it keeps."""

    def __init__(self, transport):
        spawn = multiprocessing.get_context("spawn")
        self.pipe, there = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(there, TRANSPORTS[transport]), daemon=True)
        self.process.start()
        there.close()

    def __call__(self, function, *args):
        self.pipe.send((function, args))
        return self.answer()

    def answer(self):
        if not self.pipe.poll(LIMIT):
            self.kill()
            pytest.fail(f"a process did not answer within {LIMIT} s")
        error, text, result = self.pipe.recv()
        if error is not None:
            print(text)
            raise error
        return result

    def is_in_order(self):
        """Return whether another test can use it, which must not see this one's agent."""
        try:
            self(forget)
        except (OSError, EOFError, pytest.fail.Exception):  # it was killed
            return False
        return True

    def stop(self):
        os.kill(self.process.pid, signal.SIGSTOP)

    def kill(self):
        self.process.kill()
        self.process.join(LIMIT)


def serve(pipe, variables):
    os.environ.update(variables, NIXL_LOG_LEVEL="FATAL")
    sys.modules["torch"] = None  # or else NIXL imports it, which takes seconds
    here = SimpleNamespace()
    with contextlib.suppress(EOFError):
        while True:
            function, args = pipe.recv()
            try:
                pipe.send((None, "", function(here, *args)))
            except Exception as error:
                pipe.send((error, traceback.format_exc(), None))


@pytest.fixture(scope="module")
def idle():
    """Return processes for later tests, by transport: it takes seconds to start one."""
    waiting = {transport: [] for transport in TRANSPORTS}
    yield waiting
    for side in itertools.chain(*waiting.values()):
        side.kill()


@pytest.fixture
def sides(idle):
    """Return a function that gives a process to a test. Whatever happens, none outlives it all."""
    given = []

    def give(transport="default"):
        side = idle[transport].pop() if idle[transport] else Side(transport)
        given.append((transport, side))
        return side

    yield give
    for transport, side in given:
        if side.is_in_order():
            idle[transport].append(side)
        else:
            side.kill()


# What the processes do. Each function is told what it works on, `here`.


def forget(here):
    if hasattr(here, "agent"):
        here.agent.close()
    here.__dict__.clear()


def open_agent(here, caches, label=""):
    """Make an agent, in place of the one before."""
    if hasattr(here, "agent"):
        here.agent.close()
    here.agent = transfer.Agent("other", caches, label=label)
    return here.agent.card


def open_arrays(here, kind, num_blocks, seed, label=""):
    make = np.random.default_rng(seed)
    bf16 = ml_dtypes.bfloat16

    def fill(shape, dtype):
        size = np.dtype(dtype).itemsize
        return make.integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8).view(dtype)

    if kind == "HND":
        here.memory = [fill((num_blocks, 2, 16, 64), bf16) for _ in range(2)]
        arrays = here.memory
    elif kind == "NHD":  # in a pool that has K and V side by side, with scales beside them
        here.memory = [
            fill((num_blocks, 2, 16, 3, 64), bf16),
            fill((num_blocks, 16, 3), np.float32),
        ]
        both, scales = here.memory
        arrays = [both[:, 0], both[:, 1], scales]
    elif kind == "runs":  # two heads of four, and one of two layers in a block
        here.memory = [
            fill((num_blocks, 4, 16, 64), bf16),
            fill((num_blocks, 2, 2, 16, 64), bf16),
        ]
        arrays = [here.memory[0][:, 1:3], here.memory[1][:, :, 0]]
    else:
        here.memory = [fill((num_blocks, 5, 7), kind)]
        arrays = here.memory
    return open_agent(here, arrays, label), [each.tobytes() for each in here.memory]


def memory(here):
    return [each.tobytes() for each in here.memory]


STORED = {"dtype": "float32", "format": "int8", "scale": "token"}
CACHE = {"num_layers": 2, "num_blocks": 24, "block_size": 4, "num_kv_heads": 2, "head_size": 16}


def open_cache(here, num_blocks=24, label="", layout="NHD", **options):
    options = {**CACHE, **STORED, "num_blocks": num_blocks, "layout": layout, **options}
    here.cache = pc.KVCache(**options, device="cpu")
    here.memory = [here.cache.blocks]
    return open_agent(here, here.cache, label)


def scramble(here, seed):
    here.cache.blocks[:] = np.random.default_rng(seed).integers(0, 256, here.cache.blocks.shape)
    return memory(here)


def connect(here, card):
    here.peer = here.agent.connect(card)
    return repr(here.peer)


def send(here, mine, theirs, timeout=LIMIT):
    here.job = here.peer.send(mine, theirs)
    here.job.wait(timeout)
    return here.job.nbytes


def fetch(here, theirs, mine, timeout=LIMIT):
    here.job = here.peer.fetch(theirs, mine)
    here.job.wait(timeout)
    assert here.job.done
    return here.job.nbytes


def wait_for_job(here, timeout=LIMIT):
    here.job.wait(timeout)


def close(here):
    here.agent.close()


def rows(tokens, layer, head_size=16):
    """Return K of some tokens, which depends on nothing but these, as in a model."""
    tokens = np.asarray(tokens)[:, None, None]
    return np.sin(tokens * 1.7 + layer + np.arange(2)[:, None] + np.arange(head_size)).astype("f4")


def prompt(here, tokens, key=b"", num_written=None):
    here.sequence = here.cache.sequence(tokens, key=key)
    start = here.sequence.num_cached_tokens
    stop = len(tokens) if num_written is None else num_written
    for layer in range(2):
        k = rows(tokens[start:stop], layer)
        here.cache.write(layer, k, -k, here.cache.slots(here.sequence, start, stop))
    return here.sequence.num_cached_tokens


def read(here, stop=None):
    found = [here.cache.read(layer, here.sequence, stop=stop) for layer in range(2)]
    return np.array(found)


def offer(here, num_written=None, free=True):
    here.offer = transfer.offer(here.agent, here.sequence, num_written=num_written)
    if free:
        here.sequence.free(num_written=num_written)
    return here.offer.message


def withdraw(here):
    here.offer.withdraw()


def wait_for_offer(here, timeout=LIMIT):
    here.offer.wait(timeout)
    return here.offer.done


def accept(here, message, timeout=LIMIT):
    here.sequence = transfer.accept(here.peer, message, timeout=timeout)
    return here.sequence.num_cached_tokens


def receive(here, message):
    here.arrival = transfer.receive(here.peer, message)
    return here.arrival.num_found, here.arrival.num_blocks


def arrive(here, timeout=LIMIT):
    here.sequence = here.arrival.wait(timeout)
    return here.sequence.num_cached_tokens


def give_up(here):
    here.arrival.give_up()


def found(here, tokens, key=b""):
    return here.cache.pool.find(tokens, key=key)


def used(here):
    return here.cache.pool.num_used


def free(here):
    here.sequence.free()


def read_alone(here, tokens):
    """Return what a cache that is asked alone has for these tokens."""
    alone = SimpleNamespace(cache=pc.KVCache(**CACHE, **STORED, device="cpu"))
    prompt(alone, tokens)
    return read(alone)


# Blocks


def in_blocks(parts, num_blocks):
    return [np.frombuffer(part, np.uint8).reshape(num_blocks, -1).copy() for part in parts]


def bytes_of(kind, sizes):
    """Return which bytes of a block of each array are sent."""
    if kind == "runs":
        return [np.r_[2048:6144], np.r_[0:2048, 4096:6144]]
    return [np.arange(size) for size in sizes]


@needs_nixl
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", ["HND", "NHD", "runs", "uint8", "float32"])
def test_blocks_arrive_and_nothing_else_changes(sides, kind, transport):
    one, other = sides(transport), sides(transport)
    _, ours = one(open_arrays, kind, 40, 1)
    card, theirs = other(open_arrays, kind, 23, 2)
    ours, theirs = in_blocks(ours, 40), in_blocks(theirs, 23)
    parts = bytes_of(kind, [each.shape[1] for each in ours])
    in_block = sum(map(len, parts))
    one(connect, card)
    make = np.random.default_rng(3)
    here, there = make.permutation(40)[:17].tolist(), make.permutation(23)[:17].tolist()
    assert one(send, here, there) == 17 * in_block
    for mine, their, part in zip(ours, theirs, parts, strict=True):
        their[np.ix_(there, part)] = mine[np.ix_(here, part)]
    assert other(memory) == [each.tobytes() for each in theirs]
    assert one(memory) == [each.tobytes() for each in ours]
    there, here = make.permutation(23).astype(np.int32), make.permutation(40)[:23]
    assert one(fetch, there, here) == 23 * in_block
    for mine, their, part in zip(ours, theirs, parts, strict=True):
        mine[np.ix_(here, part)] = their[np.ix_(there, part)]
    assert one(memory) == [each.tobytes() for each in ours]
    assert other(memory) == [each.tobytes() for each in theirs]
    assert one(send, [], []) == 0


@needs_nixl
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_a_cache_sends_scales_with_its_blocks(sides, layout):
    one, other = sides(), sides()
    one(open_cache, 24, "", layout)
    one(connect, other(open_cache, 30, "", layout))
    ours, theirs = (
        in_blocks(side(scramble, i), n)[0] for i, (side, n) in enumerate([(one, 24), (other, 30)])
    )
    one(send, [3, 23, 0], [29, 4, 7])
    theirs[[29, 4, 7]] = ours[[3, 23, 0]]
    one(fetch, [29, 5], [23, 22])
    ours[[23, 22]] = theirs[[29, 5]]
    assert one(memory) == [ours.tobytes()]
    assert other(memory) == [theirs.tobytes()]


@needs_nixl
def test_copies_of_forks_are_made_before_blocks_are_sent(sides):
    one, other = sides(), sides()
    one(open_cache)
    one(connect, other(open_cache))
    source, target = one(fork_and_append)
    one(send, [target], [9])
    blocks = in_blocks(one(memory), 24)[0]
    assert blocks[source].any()
    assert (blocks[target] == blocks[source]).all()
    assert (in_blocks(other(memory), 24)[0][9] == blocks[source]).all()


def fork_and_append(here):
    prompt(here, range(6))
    fork = here.sequence.fork()
    fork.append(7)
    return here.sequence.block_table[-1], fork.block_table[-1]


@needs_nixl
def test_tensors_of_pytorch():
    pytest.importorskip("torch")
    code = """
import torch
from pagedcache.transfer import Agent
here, there = (torch.randn(8, 4, 2, 64).to(torch.bfloat16) for _ in range(2))
before = there.clone()
with Agent("one", [here]) as one, Agent("other", [there]) as other:
    one.connect(other.card).send([1, 2], [7, 0]).wait(30)
assert torch.equal(there[[7, 0]], here[[1, 2]])
assert torch.equal(there[1:7], before[1:7])
print("equal")
"""
    command, env = [sys.executable, "-c", code], {**os.environ, **TRANSPORTS["default"]}
    done = subprocess.run(command, env=env, timeout=LIMIT, check=True, stdout=subprocess.PIPE)
    assert done.stdout == b"equal\n"


@needs_nixl
def test_a_process_that_does_not_close_its_agent_ends(sides):
    one, other = sides(), sides()
    one(open_arrays, "uint8", 40, 1)
    one(connect, other(open_arrays, "uint8", 40, 2)[0])
    one(send, [1], [2])
    one.pipe.close()
    one.process.join(LIMIT)
    assert one.process.exitcode == 0


# What is refused


@needs_nixl
def test_a_wrong_list_of_blocks_changes_nothing(sides):
    one, other = sides(), sides()
    one(open_arrays, "uint8", 40, 1)
    card, theirs = other(open_arrays, "uint8", 23, 2)
    one(connect, card)
    for mine, there, error, words in (
        ([1, 40], [1, 2], pc.InvalidBlockError, r"mine\[1\] has block 40, but there are 40 blocks"),
        (
            [1, 2],
            [-1, 2],
            pc.InvalidBlockError,
            r"theirs\[0\] has block -1, but there are 23 blocks",
        ),
        (
            [1, 2],
            [1, 23],
            pc.InvalidBlockError,
            r"theirs\[1\] has block 23, but there are 23 blocks",
        ),
        ([1, 2], [1], ValueError, "theirs must have as many blocks as mine, 2, got 1"),
        ([1, 2], [3, 3], pc.DuplicateBlockError, "theirs must not have one block twice"),
        ([1.5], [3], TypeError, "mine must be a list of ints"),
        ([[1]], [3], ValueError, "mine must have shape"),
    ):
        with pytest.raises(error, match=words):
            one(send, mine, there)
    with pytest.raises(pc.DuplicateBlockError, match="mine must not have one block twice"):
        one(fetch, [1, 2], [5, 5])
    assert one(fetch, [2, 2], [5, 6])  # a source may be read twice
    assert other(memory) == theirs


@needs_nixl
def test_wrong_cards(sides):
    one, other = sides(), sides()
    mine = one(open_cache)
    with pytest.raises(ValueError, match="card of agent 'other' itself"):
        one(connect, mine)
    for card, error, words in (
        (b"", ValueError, "card must be the bytes of Agent.card, got b''"),
        (b"hello" * 50, ValueError, "must be the bytes of Agent.card"),
        ("card", TypeError, "must be the bytes of Agent.card, got 'card'"),
        (None, TypeError, "got None"),
        (mine[:-1], ValueError, "must be all of the bytes of Agent.card, unchanged"),
        (mine[:30], ValueError, "unchanged"),
        (mine[:100] + b"!" + mine[101:], ValueError, "unchanged"),
        (mine.replace(b"card 1", b"card 2"), ValueError, "must be of version 1; use the same"),
        (cards.pack("offer", {}, b""), ValueError, "must be the bytes of Agent.card"),
    ):
        with pytest.raises(error, match=words):
            one(connect, card)
    for options, words in (
        ({"layout": "HND"}, "where layout is 'NHD', got 'HND'"),
        ({"block_size": 8}, "where block_size is 4, got 8"),
        ({"num_layers": 3}, "where num_layers is 2, got 3"),
        ({"num_kv_heads": 4}, "where num_kv_heads is 2, got 4"),
        ({"head_size": 32}, "length of a stored row of K and V is"),
        ({"format": "int4"}, "where format is 'int8', got 'int4'"),
        ({"dtype": "bfloat16"}, "where dtype is 'float32', got 'bfloat16'"),
        ({"scale": 8}, "where scale is"),
        ({"scale": np.array([1, 2], np.float32)}, "where scale is"),
        ({"label": "Llama"}, "where label is '', got 'Llama'"),
    ):
        with pytest.raises(ValueError, match=words):
            one(connect, other(open_another, options))
    with pytest.raises(ValueError, match="what it is made of is 'a KVCache', got 'a list of"):
        one(connect, other(open_arrays, "uint8", 24, 0)[0])
    one(connect, other(open_another, {"num_blocks": 5}))


def open_another(here, options):
    return open_cache(here, **options)


@needs_nixl
def test_given_scales_must_be_the_same(sides):
    one, other = sides(), sides()
    mine = one(open_another, {"scale": np.array([0.5, 2], np.float32)})
    other(open_another, {"scale": np.array([0.5, 3], np.float32)})
    with pytest.raises(ValueError, match="digest of the given scales"):
        other(connect, mine)
    other(open_another, {"scale": np.array([0.5, 2], np.float32)})
    other(connect, mine)


@needs_nixl
def test_arrays_that_are_laid_out_otherwise(sides):
    one, other = sides(), sides()
    one(open_shape, (8, 4, 2, 64), "float32")
    for shape, dtype, turned, words in (
        ((8, 2, 4, 64), "float32", False, r"shape of a block of caches\[0\] is \[4, 2, 64\]"),
        ((8, 4, 2, 64), "int32", False, r"dtype of caches\[0\] is 'float32', got 'int32'"),
        ((8, 2, 4, 64), "float32", True, r"strides in a block of caches\[0\], in bytes, is"),
    ):
        with pytest.raises(ValueError, match=words):
            one(connect, other(open_shape, shape, dtype, turned))


def open_shape(here, shape, dtype, turned=False):
    array = np.zeros(shape, dtype)
    return open_agent(here, [array.transpose(0, 2, 1, 3) if turned else array])


def test_arrays_that_cannot_be_sent():
    pairs = np.zeros((8, 4, 2, 64), np.float32)
    frozen = np.zeros((8, 2048), np.uint8)
    frozen.flags.writeable = False
    for caches, error, words in (
        (
            [pairs[..., :8]],
            ValueError,
            r"caches\[0\] must have blocks that are contiguous.*32 bytes",
        ),
        ([pairs, pairs], ValueError, r"caches\[1\] must not share memory with caches\[0\]"),
        ([frozen], ValueError, r"caches\[0\] must be writable"),
        ([pairs[:, ::-1]], ValueError, r"caches\[0\] must not have strides that run backwards"),
        ([pairs, pairs[:4]], ValueError, r"caches\[1\] must have as many blocks as caches\[0\], 8"),
        ([], ValueError, "caches must have at least one array"),
        (pairs, TypeError, "caches must be a list of arrays"),
        ([None], TypeError, r"caches\[0\] must be an array"),
    ):
        with pytest.raises(error, match=words):
            transfer.Agent("one", caches)
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        transfer.Agent(3, [pairs])


def test_without_nixl(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    with pytest.raises(MissingLibraryError, match="pip install --no-deps nixl nixl-cu12") as caught:
        transfer.Agent("one", [np.zeros((8, 64), np.uint8)])
    assert isinstance(caught.value, ImportError)


# Sides that fail


@needs_nixl
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("warm", [False, True])
def test_a_peer_that_has_died(sides, transport, warm):
    one, other = sides(transport), sides(transport)
    _, ours = one(open_arrays, "uint8", 40, 1)
    card, _ = other(open_arrays, "uint8", 40, 2)
    one(connect, card)
    if warm:
        one(send, [1], [2])
    other.kill()
    for _ in range(2):
        with pytest.raises(TransferError, match="peer 'other' is gone") as caught:
            one(fetch, [1, 2, 3], [5, 6, 7])
        assert caught.value.side == "peer"
    assert one(memory) == ours
    again = sides(transport)  # and one that comes after it, with the same name
    card, theirs = again(open_arrays, "uint8", 40, 3)
    one(connect, card)
    one(fetch, [1, 2, 3], [5, 6, 7])
    ours, theirs = in_blocks(ours, 40)[0], in_blocks(theirs, 40)[0]
    ours[[5, 6, 7]] = theirs[[1, 2, 3]]
    assert one(memory) == [ours.tobytes()]


BIG = 4096  # blocks of 8,192 bytes: more than sockets hold


def open_big(here, value):
    here.memory = [np.full((BIG, 8192), value, np.uint8)]
    return open_agent(here, here.memory)


def values(here):
    return np.unique(here.memory[0]).tolist()


def start(here, operation):
    blocks = range(BIG)
    here.job = (
        here.peer.fetch(blocks, blocks) if operation == "fetch" else here.peer.send(blocks, blocks)
    )
    return here.job.done


@needs_nixl
@pytest.mark.parametrize("operation", ["send", "fetch"])
def test_a_peer_that_stops_and_dies_in_a_transfer(sides, operation):
    one, other = sides("tcp"), sides("tcp")
    one(open_big, 1)
    one(connect, other(open_big, 2))
    one(fetch, [5], [5])
    other.stop()
    assert one(start, operation) is False
    with pytest.raises(
        TimeoutError, match=r"Job with peer 'other'.*after 0.2 s; it goes on"
    ) as caught:
        one(wait_for_job, 0.2)
    assert isinstance(caught.value, TransferTimeoutError)
    other.kill()
    for _ in range(2):
        with pytest.raises(TransferError, match="peer 'other' is gone") as caught:
            one(wait_for_job)
        assert caught.value.side == "peer"


@needs_nixl
def test_a_job_outlives_a_wait_that_was_too_short(sides):
    one, other = sides("tcp"), sides("tcp")
    one(open_big, 1)
    one(connect, other(open_big, 2))
    one(fetch, [5], [5])
    other.stop()
    assert one(start, "fetch") is False
    with pytest.raises(TransferTimeoutError):
        one(wait_for_job, 0.2)
    os.kill(other.process.pid, signal.SIGCONT)
    one(wait_for_job)
    assert one(values) == [2]


@needs_nixl
def test_nothing_arrives_once_an_agent_is_closed(sides):
    one, other = sides("tcp"), sides("tcp")
    one(open_big, 1)
    one(connect, other(open_big, 2))
    one(fetch, [5], [5])
    other.stop()
    assert one(start, "fetch") is False
    one(close)
    before = one(values)
    with pytest.raises(TransferError, match="agent 'other' was closed before") as caught:
        one(wait_for_job)
    assert caught.value.side == "agent"
    os.kill(other.process.pid, signal.SIGCONT)
    time.sleep(0.5)
    assert one(values) == before
    with pytest.raises(RuntimeError, match="agent 'other' was closed and cannot be used"):
        one(fetch, [1], [1])


@needs_nixl
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("warm", [False, True])
def test_memory_of_an_agent_that_was_closed_is_not_touched(sides, transport, warm):
    one, other = sides(transport), sides(transport)
    one(open_arrays, "uint8", 40, 1)
    card, theirs = other(open_arrays, "uint8", 40, 2)
    one(connect, card)
    if warm:
        one(fetch, [1], [2])
    other(keep_an_error)
    other(close)
    if transport == "default":  # UCX copies by itself until it has noticed: see Agent.close
        assert one(send_until_it_fails, [3], [4])
        theirs = other(memory)
    for mine, there in (([1], [2]), ([3, 4], [5, 6])):
        with pytest.raises(TransferError, match="is gone"):
            one(send, mine, there)
    with pytest.raises(TransferError, match="is gone"):
        one(fetch, [1], [2])
    assert other(memory) == theirs
    other(close)


def send_until_it_fails(here, mine, theirs):
    """Return whether it did, within a bounded time."""
    end = time.monotonic() + LIMIT / 2
    with contextlib.suppress(TransferError):
        while time.monotonic() < end:
            send(here, mine, theirs)
        return False
    return True


def keep_an_error(here):
    """Keep what refers to frames of calls that failed, as a debugger does."""
    beside = np.zeros((8, 5, 7), np.uint8)
    with transfer.Agent("beside", [beside]) as gone:
        peer = here.agent.connect(gone.card)
    try:
        peer.send([1], [2]).wait(LIMIT)
    except TransferError as error:
        here.error = error
    assert here.error.side == "peer"


@needs_nixl
def test_a_forked_process_is_refused(sides):
    one, other = sides(), sides()
    one(open_arrays, "uint8", 40, 1)
    one(connect, other(open_arrays, "uint8", 40, 2)[0])
    assert "made in another process" in one(send_from_a_fork)
    one(send, [1], [2])


def send_from_a_fork(here):
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        try:
            here.peer.send([1], [2])
            os.write(writes, b"sent")
        except RuntimeError as error:
            os.write(writes, str(error).encode())
        here.agent.close()
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as told:
        text = told.read()
    os.waitpid(child, 0)
    return text


# Sequences


def pair(sides, transport="default"):
    """Return a side that fills prompts, and one that takes them."""
    one, other = sides(transport), sides(transport)
    other(open_cache)
    other(connect, one(open_cache))
    return one, other


@needs_nixl
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_sequence_is_handed_over_without_what_the_other_side_has(sides, transport):
    one, other = pair(sides, transport)
    tokens = [*range(100, 118)]  # 5 blocks, the last with 2 tokens
    other(scramble, 5)
    other(prompt, tokens[:9], b"tenant")  # 2 full blocks of the same
    held = other(used)
    one(prompt, tokens, b"tenant")
    message = one(offer)
    assert one(used) == 5  # by the offer
    before = in_blocks(other(memory), 24)[0]
    assert other(receive, message) == (8, 3)
    assert other(arrive) == 18
    assert one(wait_for_offer)
    assert one(used) == 0
    assert other(used) == held + 3
    table = other(table_of)
    kept = np.setdiff1d(np.arange(24), table[2:])
    assert (in_blocks(other(memory), 24)[0][kept] == before[kept]).all()
    assert other(read).tobytes() == one(read_alone, tokens).tobytes()
    assert other(read).any()


def table_of(here):
    return list(here.sequence.block_table)


@needs_nixl
def test_what_was_accepted_is_found_by_others(sides):
    one, other = pair(sides)
    tokens = [*range(18)]
    one(prompt, tokens)
    assert other(accept, one(offer)) == 18
    assert other(found, [*tokens, 5]) == 16
    assert other(found, tokens, b"other") == 0
    assert other(prompt, [*tokens, 5]) == 16
    assert other(read).tobytes() == other(read_alone, [*tokens, 5]).tobytes()
    assert other(used) == 6


@needs_nixl
def test_part_of_a_sequence(sides):
    one, other = pair(sides)
    tokens = [*range(18)]
    one(prompt, tokens, b"", 10)
    message = one(offer, 10)
    assert other(receive, message) == (0, 3)
    assert other(arrive) == 10
    assert other(used) == 5
    assert other(read, 10).tobytes() == one(read_alone, tokens[:10]).tobytes()
    one(prompt, tokens)
    with pytest.raises(ValueError, match="num_written must be from 0 to the number of tokens, 18"):
        one(offer, 19)


@needs_nixl
def test_the_sender_may_go_on_with_a_sequence_that_it_offers(sides):
    one, other = pair(sides)
    tokens = [*range(6)]
    one(prompt, tokens)
    message = one(offer, None, False)
    one(decode, [7, 8, 9])
    assert other(accept, message) == 6
    assert other(read).tobytes() == one(read_alone, tokens).tobytes()
    assert one(read).tobytes() == one(read_alone, [*tokens, 7, 8, 9]).tobytes()


def decode(here, tokens):
    slots = here.sequence.append(tokens)
    for layer in range(2):
        here.cache.write(layer, rows(tokens, layer), -rows(tokens, layer), slots)


@needs_nixl
def test_a_withdrawn_offer_never_gives_wrong_bytes(sides):
    one, other = pair(sides)
    tokens = [*range(18)]
    one(prompt, tokens)
    message = one(offer)
    other(receive, message)  # all is fetched, but nothing has been looked at
    one(withdraw)
    one(scramble, 1)
    with pytest.raises(TransferError, match="peer 'other' has withdrawn its offer") as caught:
        other(arrive)
    assert caught.value.side == "peer"
    assert other(used) == 0
    assert other(found, [*tokens, 5]) == 0
    with pytest.raises(TransferError, match="withdrawn"):
        other(accept, message)  # too late
    with pytest.raises(TransferError, match="the offer was withdrawn before it was taken"):
        one(wait_for_offer)
    assert other(used) == one(used) == 0
    one(prompt, tokens)  # and its place is used again
    one(offer)
    with pytest.raises(TransferError, match="withdrawn"):
        other(accept, message)
    assert other(found, [*tokens, 5]) == 0


def settled(side, count):
    """Return whether so many blocks are in use once transfers that were given up have ended."""
    for _ in range(500):
        side(fetch, [], [])  # any call notices
        if side(used) == count:
            return True
        time.sleep(0.01)
    return False


@needs_nixl
def test_a_sequence_that_does_not_come_in_time(sides):
    one, other = pair(sides, "tcp")
    tokens = [*range(18)]
    one(prompt, tokens)
    message = one(offer)
    other(fetch, [23], [23])
    one.stop()
    with pytest.raises(TransferTimeoutError):
        other(accept, message, 0.2)
    assert other(used) == 5  # they may still be written to
    assert other(found, [*tokens, 5]) == 0
    os.kill(one.process.pid, signal.SIGCONT)
    one(used)
    assert settled(other, 0)
    assert other(accept, message) == 18  # the offer still stands
    assert other(read).tobytes() == one(read_alone, tokens).tobytes()


@needs_nixl
def test_a_sequence_that_is_on_its_way_is_not_found(sides):
    one, other = pair(sides)
    tokens = [*range(18)]
    one(prompt, tokens)
    other(receive, one(offer))
    assert other(found, [*tokens, 5]) == 0
    assert other(prompt, tokens) == 0
    other(give_up)
    assert settled(other, 5)


@needs_nixl
def test_a_sender_that_dies(sides):
    one, other = pair(sides)
    one(prompt, [*range(18)])
    message = one(offer)
    one.kill()
    with pytest.raises(TransferError, match="is gone"):
        other(accept, message)
    assert other(used) == 0
    assert other(found, [*range(18)]) == 0


@needs_nixl
def test_too_few_blocks_and_wrong_offers(sides):
    one, other, third = sides(), sides(), sides()
    other(open_cache, 4)
    other(connect, one(open_cache))
    one(prompt, [*range(18)])
    message = one(offer)
    with pytest.raises(pc.PoolExhaustedError):
        other(accept, message)
    assert other(used) == 0
    with pytest.raises(TransferTimeoutError, match="Offer of 5 blocks, open"):
        one(wait_for_offer, 0.1)
    one(close)
    assert one(used) == 0
    with pytest.raises(TransferError, match="withdrawn"):
        one(wait_for_offer)
    other(open_cache)
    other(connect, third(open_cache))
    with pytest.raises(ValueError, match="message must be an offer of peer 'other'"):
        other(accept, message)
    with pytest.raises(ValueError, match=r"all of the bytes of Offer\.message"):
        other(accept, message[:-2])
    with pytest.raises(TypeError, match=r"message must be the bytes of Offer\.message"):
        other(accept, 3)
    third(open_arrays, "uint8", 8, 1)
    with pytest.raises(ValueError, match="agent must be of a KVCache"):
        third(offer_anything)


def offer_anything(here):
    transfer.offer(here.agent, None)


# The guide and the bench


@needs_nixl
def test_the_guide(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "two_hosts.md").read_text("utf-8")
    decode, prefill = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    with socket.create_server(("127.0.0.1", 0)) as free_port:
        port = free_port.getsockname()[1]
    for name, code in (("decode.py", decode), ("prefill.py", prefill)):
        assert code.count("6000") == 1
        (tmp_path / name).write_text(code.replace("6000", str(port)), encoding="utf-8")
    run = {
        "cwd": tmp_path,
        "env": {**os.environ, **TRANSPORTS["default"]},
        "stdout": subprocess.PIPE,
        "text": True,
    }
    with subprocess.Popen([sys.executable, "-u", "decode.py"], **run) as there:
        try:
            assert there.stdout.readline() == "waiting for a prompt\n"
            command = [sys.executable, "prefill.py", "127.0.0.1"]
            here = subprocess.run(command, check=True, timeout=LIMIT, **run).stdout
            told, _ = there.communicate(timeout=LIMIT)
        finally:
            there.kill()
    assert f"\n{here}```" in text
    assert f"waiting for a prompt\n{told}```" in text
    row, taken = here.splitlines()
    assert told.splitlines()[-1] == row
    assert taken == "taken; 0 blocks are in use here"


@needs_nixl
def test_the_bench(tmp_path):
    code = """
from pagedcache.__main__ import main
from pagedcache.bench import transfer
transfer.TOTAL, transfer.TURNS = 1 << 20, 2  # it checks what it moves
raise SystemExit(main(["bench", "--transfer", "--json", "numbers.json"]))
"""
    env = {**os.environ, **TRANSPORTS["default"]}
    command = [sys.executable, "-c", code]
    run = {"cwd": tmp_path, "env": env, "check": True, "timeout": LIMIT}
    told = subprocess.run(command, capture_output=True, text=True, **run).stdout
    results = json.loads((tmp_path / "numbers.json").read_text())
    assert results["about"]["UCX_NET_DEVICES"] == "lo"
    assert [*results["seconds"]] == ["4096", "32768", "262144"]
    for name, seconds in results["seconds"]["32768"].items():
        assert seconds > 0
        assert name in told


# Without NIXL


def test_errors_can_be_pickled():
    for error in (TransferError("a", "b", "peer"), TransferTimeoutError("a", "b", "agent")):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.side, type(again)) == ("a b", error.side, type(error))
    assert isinstance(error, TimeoutError)


def test_timeouts():
    answers = iter([False, False, True])
    wait_for(lambda: next(answers), None, "it")
    wait_for(lambda: True, 0, "it")
    with pytest.raises(TransferTimeoutError, match="it is not done after 0 s; it goes on"):
        wait_for(lambda: False, 0, "it")
    with pytest.raises(ValueError, match="timeout must be at least 0 seconds, got -1"):
        wait_for(lambda: True, -1, "it")
    with pytest.raises(TypeError, match="timeout must be a number of seconds or None, got 'x'"):
        wait_for(lambda: True, "x", "it")


def test_messages_are_plain():
    data = cards.pack("card", {"a": [1, "x"]}, b"body")
    assert cards.unpack("card", "card", data, "Agent.card") == ({"a": [1, "x"]}, b"body")
    assert json.dumps({"a": [1, "x"]}).encode() in data  # and no code, as in a pickle
