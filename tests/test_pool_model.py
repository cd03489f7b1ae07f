# SPDX-License-Identifier: Apache-2.0
"""The block pool beside a simple model, in random steps.

The model knows of each sequence only its tokens. A memory with a value for each slot stands for the
cache: what the pool says is written, copied and read there, and each sequence must read its own.
``PAGEDCACHE_POOL_STEPS=100000`` does more steps than by default.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pagedcache.pool import BlockPool, EventLog, hashes
from pagedcache.status import FreedError, PoolExhaustedError

STEPS = int(os.environ.get("PAGEDCACHE_POOL_STEPS") or 6_000)
STEPS_OF_ONE = 80
PUBLISH = st.sampled_from([True] * 3 + [False])

TOKENS = st.integers(0, 2)
KEYS = st.sampled_from([b"", b"a"])
PROMPTS = st.lists(TOKENS, max_size=9)
TAILS = st.lists(TOKENS, max_size=3)


class Live:
    """A sequence, and what the model knows of it."""

    def __init__(self, sequence, key, tokens, written, epoch):
        self.sequence = sequence
        self.key = key
        self.tokens = tokens
        self.epoch = epoch  # how often the pool was reset before it was made
        self.written = written  # how many tokens at its front
        self.hidden = None  # of what others may not find, where it begins

    def value(self, place):
        """What is written for a token: it depends on what the model computes it from."""
        return self.epoch, self.key, tuple(self.tokens[: place + 1])


class Machine(RuleBasedStateMachine):
    digest = None  # None for SHA-256

    @initialize(
        num_blocks=st.sampled_from([12, 9, 16, 7, 20, 5, 28, 3, 24, 1]),
        size=st.sampled_from([2, 3, 4, 2, 1, 3]),
        caching=st.sampled_from([True] * 4 + [False]),
        log=st.booleans(),
    )
    def begin(self, num_blocks, size, caching, log):
        self.pool = BlockPool(num_blocks, size, prefix_caching=caching)
        self.size, self.caching = size, caching
        self.log = EventLog(self.pool) if log else None
        self.late_log = None
        self.epoch = 0
        self.memory = [None] * (num_blocks * size)
        self.lives = []
        self.past = [(b"", [0] * 12)]
        self.counts = {"made": 0, "forks": 0, "prompt": 0, "found": 0, "peak": 0}

    # What a user does

    @rule(prompt=PROMPTS, key=KEYS, publish=PUBLISH)
    def make(self, prompt, key, publish):
        self.begin_with(prompt, key, publish)

    @rule(data=st.data(), tail=TAILS, publish=PUBLISH)
    def make_one_like_another(self, data, tail, publish):
        key, tokens = data.draw(st.sampled_from(self.past[-8:]), "like")
        front = data.draw(st.integers(max(len(tokens) - 4, 0), len(tokens)), "front")
        self.begin_with([*tokens[:front], *tail][:20], key, publish)

    @precondition(lambda self: any(live.hidden is not None for live in self.lives))
    @rule(data=st.data())
    def publish(self, data):
        hidden = [live for live in self.lives if live.hidden is not None]
        live = data.draw(st.sampled_from(hidden), "of")
        self.write()  # of what is not hidden, reads come after writes, as in a step
        relies = self.pool.find([*live.tokens[: live.hidden * self.size], 0], key=live.key)
        live.sequence.publish()
        full = len(live.tokens) // self.size
        trusted = self.caching and self.digest is None and live.epoch == self.epoch
        if trusted and relies == live.hidden * self.size:
            assert self.pool.find([*live.tokens, 0], key=live.key) >= full * self.size
        live.hidden = None
        before = self.looks()
        live.sequence.publish()
        assert self.looks() == before

    def begin_with(self, prompt, key, publish=True):
        before = self.looks()
        expected = self.pool.find(prompt, key=key)
        takes, free = self.pool.num_needed(prompt, key=key), self.pool.num_free
        assert self.looks() == before
        try:
            sequence = self.pool.sequence(prompt, key=key, publish=publish)
            assert takes == free - self.pool.num_free
        except PoolExhaustedError as error:
            assert error.needed == takes > free == error.free  # noqa: PT017
            self.is_exhausted(error, before)
            return
        found = sequence.num_cached_tokens
        assert found == expected
        assert found % self.size == 0
        assert found < max(len(prompt), 1)
        self.counts["made"] += 1
        self.counts["prompt"] += len(prompt)
        self.counts["found"] += found
        new = sequence.block_table[found // self.size :]
        assert set(new).isdisjoint(self.blocks_in_use())
        self.lives.append(Live(sequence, key, list(prompt), found, self.epoch))
        self.past.append((key, self.lives[-1].tokens))
        if not publish:
            self.lives[-1].hidden = found // self.size

    @rule(data=st.data())
    def resume(self, data):
        key, tokens = data.draw(st.sampled_from(self.past[-8:]), "again")
        tokens = tokens[:20]
        before = self.looks()
        expected = self.pool.find([*tokens, 0], key=key)  # none of these is left to compute
        try:
            sequence = self.pool.resume(tokens, key=key)
        except PoolExhaustedError as error:
            self.is_exhausted(error, before)
            return
        assert sequence.num_cached_tokens == expected
        new = sequence.block_table[expected // self.size :]
        assert set(new).isdisjoint(self.blocks_in_use())
        self.lives.append(Live(sequence, key, list(tokens), expected, self.epoch))

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), token=TOKENS)
    def append_one(self, data, token):
        self.append(data.draw(st.sampled_from(self.lives), "to"), token)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), tokens=st.one_of(TAILS, PROMPTS))
    def append_many(self, data, tokens):
        self.append(data.draw(st.sampled_from(self.lives), "to"), tokens)

    def append(self, live, tokens):
        series = tokens if isinstance(tokens, list) else [tokens]
        before, in_use = self.looks(), self.blocks_in_use()
        table, start = list(live.sequence.block_table), len(live.tokens)
        try:
            slots = live.sequence.append(tokens)
        except PoolExhaustedError as error:
            self.is_exhausted(error, before)
            return
        live.tokens += series
        now = live.sequence.block_table
        assert list(slots) == [
            now[t // self.size] * self.size + t % self.size for t in range(start, len(live.tokens))
        ]
        whole = start // self.size
        assert now[:whole] == table[:whole]
        new = [block for block in now if block not in table]
        assert set(new).isdisjoint(in_use)
        # No other sequence has a token in what is written.
        mine = set(slots)
        for other in self.lives:
            if other is not live:
                assert mine.isdisjoint(other.sequence.slots())

    @precondition(lambda self: 0 < len(self.lives) < 6)
    @rule(data=st.data(), then=st.sampled_from(["fork", "original", "nothing"]), token=TOKENS)
    def branch(self, data, then, token):
        live = data.draw(st.sampled_from(self.lives), "of")
        fork = self.fork(live)
        if then != "nothing":
            self.append(fork if then == "fork" else live, token)

    def fork(self, live):
        fork = live.sequence.fork()
        assert fork.block_table == live.sequence.block_table
        self.counts["forks"] += 1
        self.lives.append(Live(fork, live.key, list(live.tokens), live.written, live.epoch))
        self.lives[-1].hidden = live.hidden
        return self.lives[-1]

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), how=st.sampled_from(["done", "done", "given up", "distrusted"]))
    def free(self, data, how):
        live = data.draw(st.sampled_from(self.lives), "which")
        if how == "given up":
            self.give_up(live)
            return
        self.write()
        if how == "done":
            self.end(live)
        else:
            self.end(live, data.draw(st.integers(0, len(live.tokens)), "num_written"))

    def give_up(self, live):
        """Free a sequence some of whose tokens were never written, and those that rely on them."""
        lost = set()
        if self.is_behind(live):
            lost.update(live.sequence.block_table[live.written // self.size :])
        self.end(live, live.written)
        for other in list(self.lives):
            places = [p for p, b in enumerate(other.sequence.block_table) if b in lost]
            if places:
                self.end(other, min(other.written, places[0] * self.size))

    @rule()
    def write(self):
        """Copy and write all that is to be copied and written, as a step of a model does."""
        for source, target in self.pool.take_copies():
            assert source != target
            for place in range(self.size):
                self.memory[target * self.size + place] = self.memory[source * self.size + place]
        assert self.pool.take_copies() == []
        for live in self.lives:
            for place, slot in enumerate(live.sequence.slots(live.written), live.written):
                self.memory[slot] = live.value(place)
            live.written = len(live.tokens)
        for live in self.lives:  # reads come after all writes
            read = [self.memory[slot] for slot in live.sequence.slots()]
            assert read == [live.value(place) for place in range(len(live.tokens))]

    @rule(what=st.sampled_from([None] * 9 + ["reset", "log"]))
    def seldom(self, what):
        if what == "log" and self.log is not None:
            self.late_log = EventLog(self.pool)
        elif what == "reset":
            self.pool.reset_prefix_cache()
            self.epoch += 1
            assert self.pool.statistics.num_cached_free == 0
            for live in self.lives:
                # Also what it appends from now on belongs to the old K and V.
                assert self.pool.find([*live.tokens, 0], key=live.key) == 0

    # What the model knows

    def is_exhausted(self, error, before):
        assert self.looks() == before
        assert error.free <= self.pool.num_free
        assert error.free < error.needed
        if self.lives:  # make room, as an engine would
            self.write()
            self.end(self.lives[0])

    def is_behind(self, live):
        return live.written < len(live.tokens)

    def end(self, live, num_written=None):
        if num_written is None:
            live.sequence.free()
        else:
            live.sequence.free(num_written=num_written)
        self.lives.remove(live)
        with pytest.raises(FreedError):
            live.sequence.free()

    def blocks_in_use(self):
        tables = {block for live in self.lives for block in live.sequence.block_table}
        return tables.union(self.pool._copies.values())

    def looks(self):
        tables = [
            (list(live.sequence.block_table), list(live.sequence.token_ids)) for live in self.lives
        ]
        copies = list(self.pool._copies.items())
        return tables, self.pool.statistics, copies, list(self.pool._free), list(self.pool._idle)

    @invariant()
    def accounts(self):
        if not hasattr(self, "pool"):
            return
        pool, size = self.pool, self.size
        pool._check()
        holders, filled = {}, {}
        pending = {slot for live in self.lives for slot in live.sequence.slots(live.written)}
        for live in self.lives:
            sequence = live.sequence
            assert list(sequence.token_ids) == live.tokens
            assert sequence.num_tokens == len(live.tokens)
            table = sequence.block_table
            assert len(table) == -(-len(live.tokens) // size)
            for place, block in enumerate(table):
                holders.setdefault(block, []).append(live)
                filled[block] = min(size, len(live.tokens) - place * size)
                # Sharing a block means having the same tokens up to its end.
                first = holders[block][0]
                upto = (place + 1) * size
                assert first.key == live.key
                assert first.tokens[:upto] == live.tokens[:upto]
                assert first.sequence.block_table[place] == block
            # What was written is read back, but for what is still to be copied or written.
            if not pool._copies:
                for place, slot in enumerate(sequence.slots(0, live.written)):
                    if slot not in pending:
                        assert self.memory[slot] == live.value(place)
        shown = {
            block
            for live in self.lives
            for block in live.sequence.block_table[: live.hidden]  # all, if nothing is hidden
        }
        for live in self.lives:
            for block in live.sequence.block_table[live.hidden or 0 :]:
                if live.hidden is not None and block not in shown:
                    assert pool._prefixes is None or pool._prefixes.records[block] is None
        used = self.blocks_in_use()
        assert len(used) == pool.num_used
        self.counts["peak"] = max(self.counts["peak"], len(used))
        now = pool.statistics
        assert now.num_shared == sum(len(who) > 1 for who in holders.values())
        waiting = [pool._parked[block] for block in used - holders.keys()]
        empty = len(used) * size - sum(filled.values()) - sum(waiting)
        assert now.num_empty_slots == empty
        assert (now.sequences, now.forks) == (self.counts["made"], self.counts["forks"])
        assert (now.prompt_tokens, now.found_tokens) == (
            self.counts["prompt"],
            self.counts["found"],
        )
        assert now.num_sequences == len(self.lives)
        assert now.peak_used == self.counts["peak"]
        assert self.caching or now.found_tokens == now.num_cached_free == now.evictions == 0
        plain = pool.num_free - now.num_cached_free
        expected = (now.num_used, now.num_shared, now.num_cached_free, plain, empty)
        for log in (self.log, self.late_log):
            if log is not None:
                assert log.occupancy()[-1][1:] == expected

    @invariant()
    def free_blocks_that_are_found_hold_what_they_say(self):
        """Walk to each block that can be found, and read it."""
        if not hasattr(self, "pool") or not self.caching or self.digest is not None:
            return
        prefixes, size = self.pool._prefixes, self.size
        unwritten = {
            block
            for live in self.lives
            for block in live.sequence.block_table[live.written // size :]
            if self.is_behind(live)
        }
        for block, record in enumerate(prefixes.records):
            if record is None or block in unwritten:
                continue
            parts, link, reachable = [], record, True
            while isinstance(link, tuple):
                parts.append(memoryview(link[1]).cast("i").tolist())
                reachable = reachable and prefixes.is_found(link)
                link = link[2]
            if not reachable:
                continue
            tokens = [token for part in reversed(parts) for token in part]
            read = self.memory[block * size : (block + 1) * size]
            start = len(tokens) - size
            assert read == [(self.epoch, link, tuple(tokens[: start + i + 1])) for i in range(size)]


class OneHashForAll:
    def __init__(self, data):
        pass

    def digest(self):
        return bytes(32)


class FewHashes:
    def __init__(self, data):
        self.last = sum(data) % 3

    def digest(self):
        return bytes([self.last] * 32)


@pytest.mark.parametrize(("digest", "share"), [(None, 0.8), (OneHashForAll, 0.1), (FewHashes, 0.1)])
def test_the_pool_does_what_the_model_does(digest, share, monkeypatch):
    if digest is not None:
        monkeypatch.setattr(hashes, "sha256", digest)
    machine = type("Machine", (Machine,), {"digest": digest})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max(1, round(STEPS * share / STEPS_OF_ONE)),
            stateful_step_count=STEPS_OF_ONE,
            deadline=None,
            derandomize="PAGEDCACHE_POOL_STEPS" not in os.environ,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
