# SPDX-License-Identifier: Apache-2.0
"""Transfers between two processes: right to the byte, or an error in a bounded time."""

from __future__ import annotations

import contextlib
import gc
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
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import pagedcache as pc
from pagedcache import transfer
from pagedcache.status import MissingLibraryError
from pagedcache.transfer import card as cards
from pagedcache.transfer import packing
from pagedcache.transfer.board import PLACES, Board
from pagedcache.transfer.errors import TransferError, TransferTimeoutError, wait_for

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="needs NIXL: pip install --no-deps nixl nixl-cu12",
)
STAGING = packing.STAGING
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
        self.owed = 0
        there.close()

    def __call__(self, function, *args):
        self.pipe.send((function, args))
        while self.owed:
            self.owed -= 1
            self.answer()
        return self.answer()

    def serve_others(self):
        """Do what other sides ask, until this one is called for something else."""
        self.pipe.send((serve_others, ()))
        self.owed += 1

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
        os.waitpid(self.process.pid, os.WUNTRACED)

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
            here.pipe = pipe
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


def serve_others(here):
    while not here.pipe.poll(0):
        here.agent.progress()
        time.sleep(1e-4)


def forget(here):
    packing.STAGING = STAGING
    if hasattr(here, "agent"):
        here.agent.close()
    here.__dict__.clear()


def open_agent(here, caches, label="", pack=False):
    """Make an agent, in place of the one before."""
    if hasattr(here, "agent"):
        here.agent.close()
    here.agent = transfer.Agent("other", caches, label=label, pack=pack)
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


def open_cache(here, num_blocks=24, label="", layout="NHD", pack=False, **options):
    options = {**CACHE, **STORED, "num_blocks": num_blocks, "layout": layout, **options}
    here.cache = pc.KVCache(**options, device="cpu")
    here.memory = [here.cache.blocks]
    return open_agent(here, here.cache, label, pack)


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


def publish(here):
    here.sequence.publish()


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
    return here.arrival and (here.arrival.num_found, here.arrival.num_blocks)


def receive_all_but_the_word(here, message):
    """Take an offer until all is fetched but the word that tells whether it still stands."""
    waiting = []
    read_the_word = here.peer._is_granted

    def wait_first(*args):
        waiting.append(True)
        while waiting:
            yield
        return (yield from read_the_word(*args))

    here.peer._is_granted = wait_first
    receive(here, message)
    while not waiting:
        assert not here.arrival.done
    del here.peer._is_granted
    here.read_the_word = waiting.clear


def read_the_word(here):
    here.read_the_word()
    while here.arrival._job._steps is not None:
        here.arrival._job._step()


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
        (mine.replace(b"card 2", b"card 1"), ValueError, "must be of version 2; use the same"),
        (cards.to_bytes("offer", {}, b""), ValueError, "must be the bytes of Agent.card"),
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
    assert one(num_peers) == 0  # it is not kept, since it never comes back
    again = sides(transport)  # but one may come after it, with the same name
    card, theirs = again(open_arrays, "uint8", 40, 3)
    one(connect, card)
    assert one(num_peers) == 1
    one(fetch, [1, 2, 3], [5, 6, 7])
    ours, theirs = in_blocks(ours, 40)[0], in_blocks(theirs, 40)[0]
    ours[[5, 6, 7]] = theirs[[1, 2, 3]]
    assert one(memory) == [ours.tobytes()]


def num_peers(here):
    return len(here.agent._peers)


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


def stopped_in_a_transfer(sides, operation):
    """Return a side with a job that goes on, and the other one, which is suspended."""
    one, other = sides("tcp"), sides("tcp")
    one(open_big, 1)
    one(connect, other(open_big, 2))
    one(fetch, [5], [5])
    other.stop()
    assert one(start, operation) is False
    return one, other


@needs_nixl
@pytest.mark.parametrize("operation", ["send", "fetch"])
def test_a_peer_that_stops_and_dies_in_a_transfer(sides, operation):
    one, other = stopped_in_a_transfer(sides, operation)
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
    one, other = stopped_in_a_transfer(sides, "fetch")
    with pytest.raises(TransferTimeoutError):
        one(wait_for_job, 0.2)
    os.kill(other.process.pid, signal.SIGCONT)
    one(wait_for_job)
    assert one(values) == [2]


@needs_nixl
def test_nothing_arrives_once_an_agent_is_closed(sides):
    one, other = stopped_in_a_transfer(sides, "fetch")
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
    for mine, there in (([1], [2]), ([3, 4], [5, 6])):
        with pytest.raises(TransferError, match="is gone"):
            one(send, mine, there)
    with pytest.raises(TransferError, match="is gone"):
        one(fetch, [1], [2])
    assert other(memory) == theirs
    other(close)


@needs_nixl
def test_the_word_that_close_clears_first_is_enough(sides):
    one, other = sides(), sides()
    one(open_arrays, "uint8", 40, 1)
    card, theirs = other(open_arrays, "uint8", 40, 2)
    one(connect, card)
    one(fetch, [1], [2])
    other(begin_to_close)
    for function in (send, fetch):
        one(connect, card)
        with pytest.raises(TransferError, match="peer 'other' is gone") as caught:
            one(function, [3, 4], [5, 6])
        assert caught.value.side == "peer"
    assert other(memory) == theirs


def begin_to_close(here):
    here.agent._board.words[0, here.agent._open.place] = 0


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


# Blocks that are packed


def open_scattered(here, num_blocks, seed, room=STAGING):
    """Two of five heads in NHD, one of two layers in rows of 64 bytes, and scales."""
    packing.STAGING = room
    make = np.random.default_rng(seed)
    here.memory = [make.integers(0, 256, (num_blocks, *shape), np.uint8) for shape in SCATTERED]
    heads, layers, scales = here.memory
    arrays = [
        heads.view(ml_dtypes.bfloat16)[:, :, 1:3],
        layers[:, :, 1],
        scales.view(np.float32)[:, :, 1:3, 0],
    ]
    card = open_agent(here, arrays)
    assert here.agent.packs
    return card


SCATTERED = (16, 5, 128), (3, 2, 64), (16, 5, 4)
IN_BLOCK = 16 * 2 * 128 + 3 * 64 + 16 * 2 * 4


def copy_scattered(sources, targets, pairs):
    """Copy what is sent of some blocks."""
    pairs = list(pairs)
    for source, target, shape in zip(sources, targets, SCATTERED, strict=True):
        source, target = (each.reshape(-1, *shape) for each in (source, target))
        places = np.s_[:, 1] if shape == SCATTERED[1] else np.s_[:, 1:3]
        for one, other in pairs:
            target[other][places] = source[one][places]


def scattered_pair(sides, room=STAGING, transport="default"):
    one, other = sides(transport), sides(transport)
    card, theirs = one(open_scattered, 40, 1, room), other(open_scattered, 23, 2, room)
    one(connect, theirs)
    other(connect, card)
    return one, other, in_blocks(one(memory), 40), in_blocks(other(memory), 23)


@needs_nixl
@pytest.mark.parametrize(
    ("room", "transport"), [(1, "default"), (5 * IN_BLOCK, "tcp"), (STAGING, "default")]
)
def test_scattered_blocks_are_packed_on_both_sides(sides, room, transport):
    one, other, ours, theirs = scattered_pair(sides, room, transport)
    make = np.random.default_rng(3)
    here, there = make.permutation(40)[:17].tolist(), make.permutation(23)[:17].tolist()
    other.serve_others()
    assert one(send, here, there) == 17 * IN_BLOCK
    copy_scattered(ours, theirs, zip(here, there, strict=True))
    assert other(memory) == [each.tobytes() for each in theirs]
    assert one(memory) == [each.tobytes() for each in ours]
    there, here = [*make.permutation(23).tolist(), 7], make.permutation(40)[:24].tolist()
    other.serve_others()
    assert one(fetch, there, here) == 24 * IN_BLOCK  # one source twice
    copy_scattered(theirs, ours, zip(there, here, strict=True))
    assert one(memory) == [each.tobytes() for each in ours]
    assert other(memory) == [each.tobytes() for each in theirs]
    with pytest.raises(pc.InvalidBlockError, match=r"theirs\[0\] has block 23"):
        one(fetch, [23], [1])


@needs_nixl
def test_both_sides_may_send_at_once(sides):
    one, other, ours, theirs = scattered_pair(sides, 1)  # room for one block each way
    begun = time.monotonic()
    one.pipe.send((send, ([*range(20)], [*range(20)])))
    other(send, [20, 21, 22], [37, 38, 39])
    other.serve_others()
    assert one.answer() == 20 * IN_BLOCK
    copy_scattered(ours, theirs, [(i, i) for i in range(20)])
    copy_scattered(theirs, ours, [(20, 37), (21, 38), (22, 39)])
    assert one(memory) == [each.tobytes() for each in ours]
    assert other(memory) == [each.tobytes() for each in theirs]
    assert time.monotonic() - begun < LIMIT


@needs_nixl
@pytest.mark.parametrize("function", [send, fetch])
def test_a_side_that_does_not_work_is_waited_for(sides, function):
    one, other, ours, theirs = scattered_pair(sides)
    with pytest.raises(TransferTimeoutError, match="Job with peer 'other'"):
        one(function, [3], [4], 1.5 * packing.PROBE)  # it is there, says the board
    assert one(memory) == [each.tobytes() for each in ours]
    other.serve_others()
    one(wait_for_job)
    sources, targets = (ours, theirs) if function is send else (theirs, ours)
    copy_scattered(sources, targets, [(3, 4)])
    assert one(memory) == [each.tobytes() for each in ours]
    assert other(memory) == [each.tobytes() for each in theirs]


@needs_nixl
@pytest.mark.parametrize("function", [send, fetch])
@pytest.mark.parametrize("how", ["dies", "closes"])
def test_a_side_that_is_gone_before_it_packs_or_unpacks(sides, function, how):
    one, other, ours, _ = scattered_pair(sides)
    with pytest.raises(TransferTimeoutError):
        one(function, [3], [4], 0.1)
    if how == "dies":
        other.kill()
    else:
        other(close)
    for again in (wait_for_job, wait_for_job):
        with pytest.raises(TransferError, match="peer 'other' is gone") as caught:
            one(again)
        assert caught.value.side == "peer"
    assert one(memory) == [each.tobytes() for each in ours]


@needs_nixl
def test_what_was_given_up_while_it_was_taken_changes_nothing(sides):
    one, other, _, theirs = scattered_pair(sides)
    with pytest.raises(TransferTimeoutError):
        one(send, [3], [4], 0.1)
    one(close)
    other.serve_others()
    time.sleep(0.3)
    assert other(memory) == [each.tobytes() for each in theirs]
    other(connect, one(open_scattered, 40, 5))
    other.serve_others()


# Sequences


def pair(sides, transport="default", pack=False):
    """Return a side that fills prompts, and one that takes them."""
    one, other = sides(transport), sides(transport)
    for side in (one, other):
        side(open_cache, 24, "", "NHD", pack)
    one(connect, other(card_of))
    other(connect, one(card_of))
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
    message = one(offer, 10, False)
    assert other(receive, message) == (0, 3)
    assert other(arrive) == 10
    assert other(used) == 5
    assert other(found, tokens) == 0  # not before the rest is computed
    assert other(read, 10).tobytes() == one(read_alone, tokens[:10]).tobytes()
    one(hand_over, 7)
    assert other(accept, None) == 7
    assert other(read, 7).tobytes() == one(read_alone, tokens[:7]).tobytes()
    other(publish)
    assert other(found, [*tokens, 5]) == 16
    one(prompt, tokens, b"nearly", 17)
    one(hand_over, 17)
    assert other(accept, None) == 17
    assert other(found, [*tokens, 5], b"nearly") == 16  # all full blocks
    one(prompt, tokens, b"", 7)
    one(hand_over, 7)
    assert other(accept, None) == 16
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
    other(receive_all_but_the_word, message)
    one(withdraw)
    one(scramble, 1)
    other(read_the_word)
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


@needs_nixl
def test_an_offer_that_is_withdrawn_once_all_is_there_has_come(sides):
    one, other = pair(sides)
    tokens = [*range(18)]
    one(prompt, tokens)
    other(receive_all_but_the_word, one(offer))
    other(read_the_word)
    one(withdraw)
    one(scramble, 1)
    assert other(arrive) == 18
    assert other(read).tobytes() == one(read_alone, tokens).tobytes()
    with pytest.raises(TransferError, match="the offer was withdrawn before it was taken"):
        one(wait_for_offer)


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
    other(free)
    other(reset)
    other(receive, one(offer_again, tokens))
    assert other(arrive) == 18
    assert other(found, [*tokens, 5]) == 16


def reset(here):
    here.cache.pool.reset_prefix_cache()


def offer_again(here, tokens):
    prompt(here, tokens)
    return offer(here)


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


@needs_nixl
@pytest.mark.parametrize(("transport", "pack"), [("default", False), ("tcp", False), ("tcp", True)])
def test_a_cache_hands_a_sequence_over(sides, transport, pack):
    one, other = pair(sides, transport, pack)
    tokens = [*range(18)]
    other(prompt, tokens[:9])
    for again in (tokens, [*tokens[:13], *range(100_000)][:90]):
        one(prompt, again)
        one(hand_over)
        one.serve_others()
        assert other(accept, None) == len(again)
        assert one(wait_for_offer)
        assert one(used) == 0
        assert other(read).tobytes() == one(read_alone, again).tobytes()
        assert other(found, [*again, 5]) >= len(again) // 4 * 4
        other(free)
    one(prompt, tokens)
    one(hand_over)
    one.serve_others()
    other(receive_next)
    assert other(arrive) == 18
    assert other(receive, None) is None
    with pytest.raises(TransferTimeoutError, match=r"peer 'other' has handed over no .* 0\.1 s"):
        other(accept, None, 0.1)


def receive_next(here):
    wait_for(lambda: receive(here, None) is not None, LIMIT, "a sequence")


def card_of(here):
    return here.agent.card


def hand_over(here, num_written=None):
    here.offer = here.cache.send(here.sequence, here.peer, num_written=num_written)
    here.sequence.free(num_written=num_written)


@needs_nixl
def test_what_was_handed_over_and_cannot_be_taken(sides):
    one, other = pair(sides)
    tokens = [*range(18)]
    one(prompt, tokens)
    one(hand_over)
    one(withdraw)
    with pytest.raises(TransferError, match=r"no sequence|has withdrawn its offer"):
        other(accept, None, 0.5)  # it was told, or finds out
    assert other(used) == 0
    one(prompt, tokens)
    one(hand_over)
    other(fill)
    for _ in range(2):
        with pytest.raises(pc.PoolExhaustedError):
            other(accept, None)
    other(free)
    assert other(accept, None) == 18  # it still stood
    one(prompt, tokens)
    with pytest.raises(TypeError, match=r"peer must be a Peer, which .*Agent\.connect returns"):
        one(send_to, "other")
    one.kill()
    for _ in range(2):
        with pytest.raises(TransferError, match="peer 'other' is gone"):
            other(accept, None)
    with pytest.raises(TransferError, match="peer 'other' is gone"):
        other(poll_until_gone)
    third = sides()
    third(open_cache)
    third(connect, other(card_of))
    other.kill()
    third(prompt, tokens)
    with pytest.raises(TransferError, match="peer 'other' is gone"):
        third(hand_over_and_wait)
    third(give_up_handing_over)
    assert third(used) == 0


def hand_over_and_wait(here):
    hand_over(here)
    wait_for_offer(here)  # if it takes a while to notice


def give_up_handing_over(here):
    if hasattr(here, "offer"):
        here.offer.withdraw()
    if not here.sequence.freed:
        here.sequence.free()


def poll_until_gone(here):
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        assert transfer.receive(here.peer) is None


def fill(here, but=0):
    here.sequence = here.cache.sequence(range(1000, 1000 + 4 * (here.cache.pool.num_free - but)))


def send_to(here, peer):
    here.cache.send(here.sequence, peer)


# Where work on a device takes time


class Late:
    """A device on which what is queued takes a while: it is done when looked at once more."""

    def __init__(self, device):
        self._device = device

    def __getattr__(self, name):
        return getattr(self._device, name)

    def mark(self, stream):
        looks = iter([False, False])
        return lambda: next(looks, True)


def make_late(here):
    here.agent._device = Late(here.agent._device)


def begin_many(here, function, pairs):
    run = here.peer.send if function == "send" else here.peer.fetch
    here.jobs = [run([one], [other]) for one, other in pairs]


def wait_backwards(here):
    for job in reversed(here.jobs):
        job.wait(LIMIT)


@needs_nixl
@pytest.mark.parametrize("function", ["send", "fetch"])
def test_jobs_may_be_waited_for_in_any_order(sides, function):
    one, other, ours, theirs = scattered_pair(sides, 4 * IN_BLOCK)  # four regions of a block
    one(make_late)
    other(make_late)
    pairs = [(i, i + 3) for i in range(9)]
    one(begin_many, function, pairs)
    other.serve_others()
    one(wait_backwards)
    sources, targets = (ours, theirs) if function == "send" else (theirs, ours)
    copy_scattered(sources, targets, pairs)
    assert one(memory) == [each.tobytes() for each in ours]
    assert other(memory) == [each.tobytes() for each in theirs]


@needs_nixl
def test_a_third_side_is_served_after_one_has_died(sides):
    one, other, ours, _ = scattered_pair(sides, 4 * IN_BLOCK)
    one(begin_many, "send", [(i, i) for i in range(9)])  # takes all regions
    other.kill()
    with pytest.raises(TransferError, match="is gone"):
        one(wait_backwards)
    third = sides()
    card = third(open_scattered, 23, 5, 4 * IN_BLOCK)
    theirs = in_blocks(third(memory), 23)
    third(connect, one(card_of))
    one(connect, card)
    third.serve_others()
    assert one(send, [*range(9)], [*range(9)]) == 9 * IN_BLOCK
    copy_scattered(ours, theirs, [(i, i) for i in range(9)])
    assert third(memory) == [each.tobytes() for each in theirs]


@needs_nixl
@pytest.mark.parametrize("function", [send, fetch])
def test_blocks_that_cannot_be_taken(sides, function):
    """What packs or unpacks may fail; both sides are told, and go on."""
    one, other, ours, theirs = scattered_pair(sides)
    breaks, message, side = {
        send: (other, "peer 'other' could not take the blocks", "peer"),
        fetch: (one, "agent 'other' could not take the blocks: ZeroDivisionError", "agent"),
    }[function]
    for _ in range(6):  # more often than there are regions
        breaks(break_staging, "unpack")
        other.serve_others()
        with pytest.raises(TransferError, match=message) as caught:
            one(function, [1], [2])
        assert caught.value.side == side
        breaks(mend_staging)
    for _ in range(6):
        one(break_staging, "pack")
        with pytest.raises(ZeroDivisionError):
            one(send, [1], [2])
        one(mend_staging)
    assert one(memory) == [each.tobytes() for each in ours]
    assert other(memory) == [each.tobytes() for each in theirs]
    other.serve_others()
    one(function, [3], [4])
    sources, targets = (ours, theirs) if function is send else (theirs, ours)
    copy_scattered(sources, targets, [(3, 4)])
    assert one(memory) == [each.tobytes() for each in ours]
    assert other(memory) == [each.tobytes() for each in theirs]
    assert one(goes_on) == other(goes_on) == (0, 0, 0, 4, 4)


def break_staging(here, name):
    here.broken = name, getattr(here.agent._staging, name)
    setattr(here.agent._staging, name, lambda *args, **options: 1 / 0)


def mend_staging(here):
    setattr(here.agent._staging, *here.broken)


def goes_on(here):
    """Return how much is left of transfers, and how many regions are free."""
    agent, staging = here.agent, here.agent._staging
    agent.progress()
    going, coming = staging.free_going, staging.free_coming
    assert sorted(going) == sorted(coming) == [*range(0, staging.count, staging.room)]
    return len(agent._jobs), len(agent._serving), len(agent._numbered), len(going), len(coming)


@needs_nixl
def test_a_side_serves_others_while_it_waits_for_a_sequence(sides):
    one, other = pair(sides, "default", True)
    one(prompt, [*range(18)])
    other.pipe.send((accept, (None,)))
    one(scramble_block, 23)
    one(send, [23], [22])  # which the other side takes while it waits
    one(hand_over)
    one(wait_for_offer)
    assert other.answer() == 18
    assert other(block, 22) == one(block, 23)


def scramble_block(here, block):
    here.cache.blocks[block] = np.arange(here.cache.block_bytes) % 251


def block(here, number):
    return here.cache.blocks[number].tobytes()


@needs_nixl
def test_an_interrupted_job_is_not_done(sides):
    one, other = pair(sides)
    other(interrupt_next)
    one(prompt, [*range(18)])
    message = one(offer)
    assert other(accept_or_be_interrupted, message) == "interrupted"
    assert other(found, [*range(19)]) == 0
    assert settled(other, 0)
    assert other(accept, message) == 18  # the offer still stands
    assert other(read).tobytes() == one(read_alone, [*range(18)]).tobytes()


@needs_nixl
def test_an_interrupted_fetch_is_not_done(sides):
    one, other = stopped_in_a_transfer(sides, "fetch")
    one(interrupt_next)
    assert one(wait_or_be_interrupted) == "interrupted"
    for _ in range(2):
        with pytest.raises(
            TransferError, match="was interrupted, so what arrived may be"
        ) as caught:
            one(wait_for_job)
        assert caught.value.side == "agent"
    os.kill(other.process.pid, signal.SIGCONT)


def wait_or_be_interrupted(here):
    try:
        wait_for_job(here)
    except KeyboardInterrupt:
        return "interrupted"


def accept_or_be_interrupted(here, message):
    try:
        accept(here, message)
    except KeyboardInterrupt:
        return "interrupted"


def interrupt_next(here):
    def interrupted(flight):
        del here.agent._link.look
        raise KeyboardInterrupt

    here.agent._link.look = interrupted


@needs_nixl
def test_an_interruption_leaves_other_jobs_alone(sides):
    one, other = pair(sides, "tcp")
    one(scramble_block, 20)
    one(prompt, [*range(18)])
    message = one(offer)
    other(fetch, [23], [23])
    one.stop()
    other(receive, message)
    other(begin_many, "fetch", [(20, 21)])
    other(interrupt_next)
    assert other(arrive_or_be_interrupted) == "interrupted"
    os.kill(one.process.pid, signal.SIGCONT)
    assert settled(other, 0)
    other(wait_backwards)
    assert other(block, 21) == one(block, 20)


def arrive_or_be_interrupted(here):
    try:
        arrive(here)
    except KeyboardInterrupt:
        return "interrupted"


@needs_nixl
def test_an_interruption_while_blocks_are_taken(sides):
    one, other, ours, theirs = scattered_pair(sides, 4 * IN_BLOCK)
    for _ in range(5):  # more often than there are regions
        other(flights)  # it does not serve until it is told to
        one(begin_many, "fetch", [(3, 4)])
        one(interrupt_next)
        other.serve_others()
        assert one(wait_backwards_or_be_interrupted) == "interrupted"
        assert one(free_regions) == 3  # the other one may still be read to
        with pytest.raises(TransferError, match="could not take the blocks: Keyboard") as caught:
            one(wait_backwards)
        assert caught.value.side == "agent"
        one(wait_for_regions)
    other.serve_others()
    one(fetch, [*range(9)], [*range(9)])
    copy_scattered(theirs, ours, [(i, i) for i in range(9)])
    assert one(memory) == [each.tobytes() for each in ours]
    assert one(goes_on) == (0, 0, 0, 4, 4)


def free_regions(here):
    return len(here.agent._staging.free_coming)


def wait_for_regions(here):
    def free():
        here.agent.progress()
        return len(here.agent._staging.free_coming) == 4

    wait_for(free, LIMIT, "regions")


def wait_backwards_or_be_interrupted(here):
    try:
        wait_backwards(here)
    except KeyboardInterrupt:
        return "interrupted"


class Interrupting:
    """Steps after the next of which there is an interruption."""

    def __init__(self, steps):
        self._steps, self._interrupts = steps, True

    def __next__(self):
        next(self._steps)
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt


def interrupt_what_is_taken(here):
    """Return how many regions are free once an interruption has hit what takes blocks."""
    agent = here.agent
    wait_for(lambda: agent.progress() or agent._serving, LIMIT, "blocks")
    agent._serving[:] = map(Interrupting, agent._serving)
    try:
        agent.progress()
    except KeyboardInterrupt:
        return len(agent._staging.free_coming)


@needs_nixl
def test_an_interruption_between_steps_ends_nothing(sides):
    one, other, ours, theirs = scattered_pair(sides, 4 * IN_BLOCK)
    one(make_later)
    one(begin_many, "fetch", [(3, 4)])
    other.serve_others()
    assert one(interrupt_what_is_taken) == 3  # one is written to
    one(wait_backwards)
    copy_scattered(theirs, ours, [(3, 4)])
    assert one(memory) == [each.tobytes() for each in ours]
    assert one(goes_on) == (0, 0, 0, 4, 4)


def make_later(here):
    """As `make_late`, for so long that something can happen in between."""
    make_late(here)

    def mark(stream):
        looks = itertools.count()
        return lambda: next(looks) > 20

    here.agent._device.mark = mark


@needs_nixl
def test_messages_that_an_interruption_left_unread_are_read(sides):
    one, other = pair(sides)
    for tokens in ([*range(6)], [*range(10, 16)]):
        one(prompt, tokens)
        one(hand_over)
        assert other(accept, None) == 6
        other(free)
    one(interrupt_reading)
    for _ in range(100):
        if one(used) == 0:
            break
        one(flights_after_progress)
    assert one(used) == 0


def interrupt_reading(here):
    read = here.agent._read
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        read(*args)

    here.agent._read = interrupted
    try:
        wait_for(lambda: here.agent.progress() or calls, LIMIT, "a message")
    except KeyboardInterrupt:
        return
    raise AssertionError("nothing was read")


def flights_after_progress(here):
    here.agent.progress()
    time.sleep(0.01)
    return flights(here)


@needs_nixl
def test_an_arrival_that_is_interrupted_as_it_begins_holds_no_blocks(sides):
    one, other = pair(sides)
    one(prompt, [*range(18)])
    message = one(offer)
    other(interrupt_next_job)
    assert other(accept_or_be_interrupted, message) == "interrupted"
    assert other(used) == 0
    assert other(accept, message) == 18


def interrupt_next_job(here):
    def interrupted(*args):
        del here.peer._job
        raise KeyboardInterrupt

    here.peer._job = interrupted


@needs_nixl
def test_a_side_that_cannot_pack_says_so(sides):
    one, other, ours, theirs = scattered_pair(sides)
    other(break_staging, "pack")
    other.serve_others()
    with pytest.raises(TransferError, match="peer 'other' could not send the blocks") as caught:
        one(fetch, [1], [2])
    assert caught.value.side == "peer"
    other(mend_staging)
    other.serve_others()
    one(fetch, [1], [2])
    copy_scattered(theirs, ours, [(1, 2)])
    assert one(memory) == [each.tobytes() for each in ours]
    assert one(goes_on) == other(goes_on) == (0, 0, 0, 4, 4)


@needs_nixl
def test_a_network_that_failed(sides):
    one, other = sides("tcp"), sides("tcp")
    _, ours = one(open_arrays, "uint8", 40, 1)
    card, theirs = other(open_arrays, "uint8", 40, 2)
    one(connect, card)
    one(fetch, [1], [2])
    assert one(cut_connections) > 0
    with pytest.raises(TransferError, match=r"is gone.* or again to this one if it is still"):
        one(fetch, [3], [4])
    one(connect, card)
    one(fetch, [3], [4])
    with pytest.raises(TransferError, match="is gone"):
        one(use_the_first_peer)
    assert one(num_peers) == 1  # the old one does not take the new one with it
    one(fetch, [5], [6])
    ours, theirs = in_blocks(ours, 40)[0], in_blocks(theirs, 40)[0]
    ours[[2, 4, 6]] = theirs[[1, 3, 5]]
    assert one(memory) == [ours.tobytes()]


def cut_connections(here):
    """Shut all TCP connections of this process down, and return how many there were."""
    here.first, cut = here.peer, 0
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if not str(path.readlink()).startswith("socket"):
                continue
            with socket.socket(fileno=os.dup(int(path.name))) as found:
                if (found.family, found.type) == (socket.AF_INET, socket.SOCK_STREAM):
                    found.getpeername()
                    found.shutdown(socket.SHUT_RDWR)
                    cut += 1
    return cut


def use_the_first_peer(here):
    here.first.send([1], [2]).wait(LIMIT)


@needs_nixl
def test_a_side_that_dies_while_somebody_asks_whether_it_is_there(sides):
    one, other = pair(sides, "tcp")
    other(fetch, [1], [1])
    one.stop()
    other(poll_until_it_asks)
    one.kill()
    with pytest.raises(TransferError, match="is gone"):
        other(fetch, [1], [1])
    for _ in range(100):
        if other(flights_after_progress) == other(in_use) == 0:
            break
    assert other(flights) == other(in_use) == 0


def poll_until_it_asks(here):
    wait_for(lambda: transfer.receive(here.peer) or in_use(here), LIMIT, "a question")


@needs_nixl
def test_an_offer_that_is_taken_by_its_message_was_handed_over_too(sides):
    one, other = pair(sides)
    one(prompt, [*range(6)])
    one(hand_over)
    other(wait_for_inbox, 1)
    assert other(accept, one(message_of_offer)) == 6
    assert other(receive, None) is None
    other(free)
    other(reset)
    one(prompt, [*range(6)])
    other(accept, one(offer_and_hand_over_later))
    one(wait_for_offer)
    one(prompt, [*range(10, 20)])
    one(hand_over)
    assert other(accept, None) == 10  # not what has been taken


def wait_for_inbox(here, count):
    def there():
        here.agent.progress()
        return len(here.agent._inbox.get(here.peer._id, ())) == count

    wait_for(there, LIMIT, "an inbox")


def offer_and_hand_over_later(here):
    """Hand a sequence over, and return its message before the other side gets it."""
    send, later = here.peer._send_message, []
    here.peer._send_message = later.append
    hand_over(here)
    here.peer._send_message = send
    taken = here.offer._take

    def send_and_take():
        send(*later)
        taken()

    here.offer._take = send_and_take
    return here.offer.message


def message_of_offer(here):
    return here.offer.message


@needs_nixl
def test_sequences_need_a_cache(sides):
    one, other = sides(), sides()
    one(open_arrays, "uint8", 40, 1)
    one(connect, other(open_arrays, "uint8", 40, 2)[0])
    for function in (accept, receive):
        with pytest.raises(ValueError, match="agent must be of a KVCache"):
            one(function, None)


@needs_nixl
def test_an_arrival_that_was_given_up_stays_so(sides):
    one, other = pair(sides, "tcp")
    one(prompt, [*range(18)])
    message = one(offer)
    other(fetch, [23], [23])
    one.stop()
    other(receive, message)
    other(give_up)
    os.kill(one.process.pid, signal.SIGCONT)
    with pytest.raises(TransferError, match="the arrival was given up"):
        other(arrive)
    assert settled(other, 0)


@needs_nixl
def test_waiting_for_a_sequence_leaves_nothing_behind(sides):
    one, other = pair(sides)
    assert one(used) == 0
    for _ in range(4):
        with pytest.raises(TransferTimeoutError):
            other(accept, None, 1.1 * packing.PROBE)
    assert other(in_use) <= 1  # of a probe


def in_use(here):
    return PLACES - len(here.agent._board._free[1])


@needs_nixl
@pytest.mark.parametrize("how", ["dropped", "closed"])
def test_a_forked_process_that_ends_disturbs_nobody(sides, how):
    one, other = sides("tcp"), sides("tcp")
    one(open_arrays, "uint8", 40, 1)
    one(connect, other(open_arrays, "uint8", 40, 2)[0])
    one(send, [1], [2])
    assert one(end_a_fork, how) == 0
    one(send, [3], [4])
    one(close)


def end_a_fork(here, how):
    """Return how a child ends that lets go of the agent."""
    child = os.fork()
    if not child:
        if how == "closed":
            here.agent.close()
        here.__dict__.clear()
        gc.collect()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@needs_nixl
def test_an_arrival_that_is_given_up_while_nobody_packs(sides):
    one, other = pair(sides, "tcp", True)
    one(prompt, [*range(18)])
    message = one(offer)
    for _ in range(2):
        with pytest.raises(TransferTimeoutError, match="Arrival from peer 'other'"):
            other(accept, message, 0.1)
    assert other(check_pool) == 10  # they may still be written to
    one.serve_others()
    assert settled(other, 0)
    one.serve_others()
    assert other(accept, message) == 18
    assert other(read).tobytes() == one(read_alone, [*range(18)]).tobytes()


def check_pool(here):
    here.cache.pool._check()
    return here.cache.pool.num_used


@needs_nixl
def test_failed_transfers_leave_nothing_behind(sides):
    one, other = sides(), sides()
    one(open_arrays, "uint8", 40, 1)
    one(connect, other(open_arrays, "uint8", 40, 2)[0])
    other.kill()
    for _ in range(5):
        with pytest.raises(TransferError, match="is gone"):
            one(send, [1], [2])
    assert one(in_use) == 0
    assert one(flights) == 0


def flights(here):
    return len(here.agent._link.flights)


@needs_nixl
def test_parts_that_are_taken_after_one_has_failed(sides):
    one, other, ours, theirs = scattered_pair(sides, 4 * IN_BLOCK)
    one(make_late)
    one(fail_at_second_unpack)
    other.serve_others()
    with pytest.raises(
        TransferError, match="agent 'other' could not take the blocks: Zero"
    ) as error:
        one(fetch, [*range(9)], [*range(9)])
    assert error.value.side == "agent"
    assert one(serving) == 0  # nothing is written to any more
    before = one(memory)
    time.sleep(0.3)
    assert one(goes_on) == (0, 0, 0, 4, 4)
    assert one(memory) == before
    one(mend_staging)
    other.serve_others()
    one(fetch, [*range(9)], [*range(9)])
    copy_scattered(theirs, ours, [(i, i) for i in range(9)])
    assert one(memory) == [each.tobytes() for each in ours]


def serving(here):
    return len(here.agent._serving)


def fail_at_second_unpack(here):
    """Let all unpacking but the first fail, and that one end after the second has failed."""
    unpack, mark = here.agent._staging.unpack, here.agent._device.mark
    here.broken, calls = ("unpack", unpack), []

    def fail(*args, **options):
        calls.append(args)
        unpack(*args, **options) if len(calls) == 1 else 1 / 0

    def end_late(stream):
        if len(calls) != 1:
            return mark(stream)
        looks = iter([False] * 5)
        return lambda: len(calls) > 1 and next(looks, True)

    here.agent._staging.unpack, here.agent._device.mark = fail, end_late


@needs_nixl
def test_an_offer_that_never_fits_does_not_stop_others(sides):
    one, other = pair(sides)
    other(open_cache, 4)
    other(connect, one(card_of))
    one(connect, other(card_of))
    one(prompt, [*range(18)])
    one(hand_over)  # five blocks
    with pytest.raises(pc.PoolExhaustedError):
        other(accept, None)
    one(prompt, [*range(100, 118)])
    one(hand_over)
    one(withdraw)
    one(prompt, [*range(6)])
    one(hand_over)
    assert other(accept_what_fits) == 6
    assert other(receive, None) is None


@needs_nixl
def test_an_offer_that_was_withdrawn_does_not_stop_others(sides):
    one, other = pair(sides)
    other(fill, 2)  # all but two blocks
    one(prompt, [*range(18)])
    one(hand_over)  # five blocks
    with pytest.raises(pc.PoolExhaustedError):
        other(accept, None)
    one(withdraw)
    one(prompt, [*range(6)])
    one(hand_over)  # two
    assert other(accept_what_fits) == 6


def accept_what_fits(here):
    for _ in range(200):
        with contextlib.suppress(pc.PoolExhaustedError):
            return accept(here, None)
        time.sleep(0.01)
    return None


# On GPUs


def open_on_gpu(here, index, seed, kind):
    import cupy

    cupy.cuda.Device(index).use()
    make = np.random.default_rng(seed)
    here.memory = [cupy.asarray(make.integers(0, 256, (24, 2, 16, 8, 256), np.uint8))]
    values = here.memory[0].view("bfloat16")
    heads = slice(2, 4) if kind == "heads" else slice(None)
    return open_agent(here, [values[:, 0, :, heads], values[:, 1, :, heads]], "", kind == "packed")


def open_cache_on_gpu(here, index, tokens):
    """Return the card of a cache on a GPU, and what is in it of some tokens."""
    import cupy

    cupy.cuda.Device(index).use()
    here.cache = pc.KVCache(**CACHE, **STORED, device=f"cuda:{index}")
    here.sequence = here.cache.sequence(tokens)
    for layer in range(2) if tokens else ():
        k = cupy.asarray(rows(tokens, layer))
        here.cache.write(layer, k, -k, here.cache.slots(here.sequence))
    return open_agent(here, here.cache), read_on_gpu(here)


def read_on_gpu(here):
    return b"".join(
        each.get().tobytes() for layer in range(2) for each in here.cache.read(layer, here.sequence)
    )


@needs_nixl
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["contiguous", "packed", "heads"])
def test_blocks_between_gpus(sides, kind):
    """Or between two processes on one GPU, if there is only that."""
    import cupy

    one, other = sides(), sides()
    last = min(cupy.cuda.runtime.getDeviceCount() - 1, 1)
    card, theirs = one(open_on_gpu, 0, 1, kind), other(open_on_gpu, last, 2, kind)
    one(connect, theirs)
    other(connect, card)
    ours, theirs = (
        in_blocks(side(memory), 24)[0].reshape(24, 2, 16, 8, 256) for side in (one, other)
    )
    heads = slice(2, 4) if kind == "heads" else slice(None)
    other.serve_others()
    one(send, [3, 1, 20], [15, 0, 7])
    theirs[[15, 0, 7], :, :, heads] = ours[[3, 1, 20], :, :, heads]
    assert other(memory) == [theirs.tobytes()]
    other.serve_others()
    one(fetch, [*range(24)], [*range(23, -1, -1)])
    ours[::-1, :, :, heads] = theirs[:, :, :, heads]
    assert one(memory) == [ours.tobytes()]
    assert other(memory) == [theirs.tobytes()]


@needs_nixl
@pytest.mark.gpu
def test_a_sequence_between_gpus(sides):
    import cupy

    one, other = sides(), sides()
    last = min(cupy.cuda.runtime.getDeviceCount() - 1, 1)
    tokens = [*range(18)]
    card, stored = one(open_cache_on_gpu, 0, tokens)
    one(connect, other(open_cache_on_gpu, last, [])[0])
    other(connect, card)
    one(hand_over)
    assert other(accept, None) == 18
    assert one(wait_for_offer)
    assert other(read_on_gpu) == stored


# The guide and the bench


def without_torch(folder):
    """Return an environment as the guide makes it: without PyTorch, which NIXL is slow to load."""
    (folder / "torch.py").write_text("raise ImportError('it is not installed')\n")
    return {**os.environ, **TRANSPORTS["default"], "PYTHONPATH": str(folder)}


@needs_nixl
def test_the_guide(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "howto" / "two_hosts.md").read_text("utf-8")
    decode, prefill, alone = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free_port:
        port = free_port.getsockname()[1]
    for name, code in (("decode.py", decode), ("prefill.py", prefill)):
        assert code.count("6000") == 1
        (tmp_path / name).write_text(code.replace("6000", str(port)), encoding="utf-8")
    run = {
        "cwd": tmp_path,
        "env": without_torch(tmp_path),
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
    printed = subprocess.run([sys.executable, "-c", alone], check=True, timeout=LIMIT, **run).stdout
    assert f"```\n\n```\n{printed}```" in text


@needs_nixl
def test_the_bench(tmp_path):
    code = """
from pagedcache.__main__ import main
from pagedcache.bench import transfer
transfer.TOTAL, transfer.TURNS = 1 << 20, 2  # it checks what it moves
raise SystemExit(main(["bench", "--transfer", "--json", "numbers.json"]))
"""
    command = [sys.executable, "-c", code]
    run = {"cwd": tmp_path, "env": without_torch(tmp_path), "check": True, "timeout": LIMIT}
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


def test_a_grant_that_is_revoked_twice_frees_one_place():
    board = Board()
    grant = board.grant()
    board.revoke(grant)
    board.revoke(grant)
    assert board.grant().place != board.grant().place


def test_timeouts():
    with pytest.raises(TransferTimeoutError, match=r"not done after 0\.1 s"):
        wait_for(lambda: False, Fraction(1, 10), "it")
    wait_for(lambda: True, 10**400, "it")
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
    data = cards.to_bytes("card", {"a": [1, "x"]}, b"body")
    assert cards.from_bytes("card", "card", data, "Agent.card") == ({"a": [1, "x"]}, b"body")
    assert json.dumps({"a": [1, "x"]}).encode() in data  # and no code, as in a pickle
