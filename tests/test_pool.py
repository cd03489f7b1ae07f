# SPDX-License-Identifier: Apache-2.0
"""The block pool, one sentence of its documentation after another; see also test_pool_model."""

from __future__ import annotations

import ast
import copy
import hashlib
import pickle
import subprocess
import sys
from array import array
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pagedcache import pool as pool_package
from pagedcache.pool import (
    AllBlocksCleared,
    BlockCopied,
    BlockMoved,
    BlockPool,
    BlockRemoved,
    BlocksReleased,
    BlocksShared,
    BlocksTaken,
    BlockStored,
    CopiesDropped,
    CopiesTaken,
    EventLog,
    PoolState,
    TokensAppended,
    hashes,
)
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    FreedError,
    NotSupportedError,
    PagedCacheError,
    PoolExhaustedError,
    Status,
)


def state(pool):
    """Return all that a call which fails must not change."""
    sequences = {
        one.number: (list(one.block_table), list(one.token_ids), one._room, one._slot, one._link)
        for one in pool.sequences
    }
    prefixes = pool._prefixes
    found = None if prefixes is None else (dict(prefixes.found), list(prefixes.records))
    return (
        list(pool._free),
        list(pool._idle),
        dict(pool._parked),
        dict(pool._more_holders),
        dict(pool._copies),
        sequences,
        found,
        pool.statistics,
    )


def use(pool, prompt, **given):
    """Make a sequence, free it, and return the blocks that it had."""
    with pool.sequence(prompt, **given) as sequence:
        return list(sequence.block_table)


# Tokens and slots


def test_a_sequence_has_blocks_for_all_its_tokens():
    pool = BlockPool(8, 4)
    sequence = pool.sequence(range(9))
    assert sequence.block_table == [0, 1, 2]
    assert sequence.num_tokens == 9
    assert sequence.num_cached_tokens == 0
    assert sequence.pool is pool
    assert (pool.num_blocks, pool.block_size, pool.num_free, pool.num_used) == (8, 4, 5, 3)


def test_a_sequence_may_begin_without_tokens():
    pool = BlockPool(8, 4)
    sequence = pool.sequence()
    assert sequence.block_table == []
    assert list(sequence.slots()) == []
    assert list(sequence.append(5)) == [0]
    assert list(sequence.append([6, 7, 8, 9])) == [1, 2, 3, 4]
    assert list(sequence.append([])) == []
    assert list(sequence.token_ids) == [5, 6, 7, 8, 9]


def test_block_table_is_the_list_that_the_pool_works_with():
    sequence = BlockPool(8, 2).sequence([1])
    table = sequence.block_table
    sequence.append([2, 3, 4])
    assert sequence.block_table is table
    assert table == [0, 1]


@pytest.mark.parametrize("size", [1, 3, 16])
def test_slots_are_what_the_definition_says(size):
    pool = BlockPool(100, size)
    pool.sequence(range(5))
    use(pool, range(100, 130))
    sequence = pool.sequence(range(40))
    for _ in range(3):
        sequence.append(7)
    table = sequence.block_table
    expected = [table[t // size] * size + t % size for t in range(43)]
    for start in range(44):
        for stop in range(start, 44):
            slots = sequence.slots(start, stop)
            assert slots.typecode == "q"
            assert list(slots) == expected[start:stop]
    assert list(sequence.slots()) == expected
    assert list(sequence.slots(40)) == expected[40:]
    assert list(sequence.slots(np.int64(40), np.int32(41))) == expected[40:41]


def test_numpy_takes_slots_without_a_copy():
    slots = BlockPool(8, 4).sequence(range(9)).slots()
    seen = np.asarray(slots)
    assert seen.dtype == np.int64
    slots[0] = 77
    assert seen[0] == 77


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        array("i", [1, 2, 3]),
        array("q", [1, 2, 3]),
        array("b", [1, 2, 3]),
        b"\1\2\3",
        bytearray(b"\1\2\3"),
        memoryview(b"\1\2\3"),
        np.array([1, 2, 3]),
        np.array([1, 2, 3], np.int32),
        np.array([1, 2, 3], np.uint16),
        np.array([1, 2, 3], ">i4"),
        np.array([1, 9, 2, 9, 3, 9], np.int32)[::2],
        [np.int64(1), np.uint8(2), 3],
        iter([1, 2, 3]),
        {1: "", 2: "", 3: ""},
    ],
    ids=[
        *("list", "tuple", "range", "array", "array of int64", "array of int8", "bytes"),
        *("bytearray", "memoryview", "int64", "int32", "uint16", "big-endian", "strided"),
        *("list of numpy", "iterator", "dict"),
    ],
)
@pytest.mark.parametrize("by", ["sequence", "append"])
def test_tokens_may_be_any_series_of_ints(tokens, by):
    pool = BlockPool(8, 2)
    if hasattr(tokens, "__next__"):
        tokens = iter([1, 2, 3])  # one for each
    sequence = pool.sequence(tokens) if by == "sequence" else pool.sequence()
    if by == "append":
        assert list(sequence.append(tokens)) == [0, 1, 2]
    assert sequence.token_ids == array("i", [1, 2, 3])
    assert sequence.token_ids.typecode == "i"


@pytest.mark.parametrize("token", [7, np.int64(7), np.int32(7), np.array(7), np.uint8(7)])
def test_append_takes_one_token(token):
    sequence = BlockPool(8, 4).sequence([1])
    assert list(sequence.append(token)) == [1]
    assert list(sequence.token_ids) == [1, 7]


@pytest.mark.parametrize("tokens", [[], (), range(0), np.zeros(0, np.int32), b""], ids=repr)
def test_no_tokens(tokens):
    sequence = BlockPool(8, 4).sequence(tokens)
    assert sequence.append(tokens) == array("q")
    assert (sequence.num_tokens, sequence.block_table) == (0, [])


def test_tokens_are_copies_of_what_was_given():
    tokens = array("i", [1, 2, 3])
    sequence = BlockPool(8, 4).sequence(tokens)
    tokens[0] = 9
    view = np.asarray(sequence.token_ids)  # exports its buffer, so it could not grow
    sequence.append(4)
    assert list(sequence.token_ids) == [1, 2, 3, 4]
    assert list(view) == [1, 2, 3]


def test_all_of_int32_is_a_token():
    sequence = BlockPool(8, 4).sequence([-(2**31), 2**31 - 1])
    sequence.append(-(2**31))
    assert list(sequence.token_ids) == [-(2**31), 2**31 - 1, -(2**31)]


BAD_TOKENS = [
    ([1, 2**31], BadParamError, "token_ids[1] must fit into int32, -2147483648 to 2147483647, got"),
    ([-(2**31) - 1], BadParamError, "token_ids[0] must fit into int32"),
    (np.array([5, 2**40]), BadParamError, "token_ids[1] must fit into int32"),
    ([1, 2.0], BadParamTypeError, "token_ids[1] must be an int that fits into int32, got 2.0"),
    ([1, None], BadParamTypeError, "token_ids[1] must be an int"),
    ("ab", BadParamTypeError, "token_ids[0] must be an int that fits into int32, got 'a'"),
    (np.array([1.0]), BadParamTypeError, "token_ids[0] must be an int"),
    (np.array([True]), BadParamTypeError, "token_ids must be ints, got an array of bools"),
    (np.ones((2, 2), np.int32), BadParamTypeError, "token_ids must have one axis"),
    ([[1]], BadParamTypeError, "token_ids must have one axis"),
    (None, BadParamTypeError, "token_ids must be a list, an array or another series of ints, got"),
    (1.5, BadParamTypeError, "token_ids must be a list, an array or another series of ints"),
]


@pytest.mark.parametrize(("tokens", "error", "message"), BAD_TOKENS)
@pytest.mark.parametrize("room", [1, 2, 4])
def test_bad_tokens_are_refused_and_change_nothing(tokens, error, message, room):
    pool = BlockPool(8, 4)
    sequence = pool.sequence(range(4 - room % 4))
    before = state(pool)
    for call in (pool.sequence, sequence.append, pool.find):
        with pytest.raises(error) as caught:
            call(tokens)
        assert str(caught.value).startswith(message)
        assert "\n" not in str(caught.value)
        assert caught.value.status is Status.BAD_PARAM
        assert state(pool) == before
    pool._check()


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 10**5000], ids=["high", "low", "huge"])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_one_bad_token_is_refused_and_changes_nothing(token, length):
    pool = BlockPool(8, 4)
    sequence = pool.sequence(range(length))
    before = state(pool)
    with pytest.raises(BadParamError, match="token_ids must fit into int32"):
        sequence.append(token)
    assert state(pool) == before


def test_one_int_is_not_a_prompt():
    with pytest.raises(BadParamTypeError, match=r"token_ids must be a list.*got 5"):
        BlockPool(8, 4).sequence(5)


def test_errors_of_a_generator_are_its_own():
    def broken():
        yield 1
        raise TypeError("mine")

    pool = BlockPool(8, 4)
    with pytest.raises(TypeError, match="mine") as caught:
        pool.sequence(broken())
    assert not isinstance(caught.value, PagedCacheError)
    assert pool.num_used == 0


# What is refused


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((0, 16), BadParamError, "num_blocks must be from 1 to 2147483647, got 0"),
        ((-1, 16), BadParamError, "num_blocks"),
        ((2**31, 16), BadParamError, "num_blocks"),
        ((1.0, 16), BadParamTypeError, "num_blocks must be an int, got 1.0"),
        (("8", 16), BadParamTypeError, "num_blocks"),
        ((8, 0), BadParamError, "block_size must be from 1"),
        ((8, -4), BadParamError, "block_size"),
        ((8, 2**62), BadParamError, "block_size"),
        ((8, None), BadParamTypeError, "block_size must be an int, got None"),
    ],
)
def test_bad_sizes(given, error, message):
    with pytest.raises(error) as caught:
        BlockPool(*given)
    assert str(caught.value).startswith(message)


def test_bad_switch():
    with pytest.raises(BadParamTypeError, match="prefix_caching must be a bool, got 'no'"):
        BlockPool(8, 4, prefix_caching="no")


@pytest.mark.parametrize("key", ["tenant", None, 5, bytearray(b"x")])
def test_bad_key(key):
    pool = BlockPool(8, 4)
    for call in (pool.sequence, pool.find):
        with pytest.raises(BadParamTypeError, match=r"key must be bytes; use str\.encode for text"):
            call([1], key=key)
    assert pool.num_used == 0


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((-1,), BadParamError, "start must be from 0 to the number of tokens, 9, got -1"),
        ((10,), BadParamError, "start must be from 0"),
        ((0, -1), BadParamError, "stop must be from 0 to the number of tokens, 9, got -1"),
        ((0, 10), BadParamError, "stop must be from 0 to the number of tokens, 9, got 10"),
        ((5, 4), BadParamError, "stop must be from 5 to the number of tokens, 9, got 4"),
        ((1.0,), BadParamTypeError, "start must be an int, got 1.0"),
        ((0, "2"), BadParamTypeError, "stop must be an int, got '2'"),
    ],
)
def test_bad_slots(given, error, message):
    sequence = BlockPool(8, 4).sequence(range(9))
    with pytest.raises(error) as caught:
        sequence.slots(*given)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("num_written", [-1, 10, 2.0, "3"])
def test_bad_num_written(num_written):
    pool = BlockPool(8, 4)
    sequence = pool.sequence(range(9))
    before = state(pool)
    with pytest.raises(BadParamError, match="num_written must be"):
        sequence.free(num_written=num_written)
    assert state(pool) == before
    assert not sequence.freed


def test_a_full_pool_says_what_is_needed_and_changes_nothing():
    pool = BlockPool(4, 4)
    sequence = pool.sequence(range(9))
    before = state(pool)
    with pytest.raises(PoolExhaustedError) as caught:
        pool.sequence(range(100, 108))
    assert str(caught.value) == (
        "token_ids must fit into the free blocks of the pool, but 2 blocks must be free and 1 of 4 "
        "are; free sequences and try again, or make a pool with more blocks"
    )
    assert (caught.value.needed, caught.value.free) == (2, 1)
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, BadParamError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.needed == 2
    with pytest.raises(PoolExhaustedError):
        sequence.append(range(8))
    assert state(pool) == before
    sequence.append(range(7))
    with pytest.raises(PoolExhaustedError, match="1 block must be free and 0 of 4 are"):
        sequence.append(1)
    pool._check()


def test_blocks_that_are_found_are_not_room():
    pool = BlockPool(4, 2)
    use(pool, range(6))  # three blocks can be found
    before = state(pool)
    with pytest.raises(PoolExhaustedError) as caught:
        pool.sequence([*range(6), 6, 7, 8, 9])
    assert (caught.value.needed, caught.value.free) == (5, 4)  # as num_needed and num_free
    assert state(pool) == before
    sequence = pool.sequence([*range(6), 6, 7])
    assert sequence.num_cached_tokens == 6


def test_a_full_pool_refuses_the_copy_of_a_fork():
    pool = BlockPool(1, 4)
    sequence = pool.sequence([1])
    fork = sequence.fork()
    before = state(pool)
    with pytest.raises(PoolExhaustedError, match="1 block must be free and 0 of 1 are"):
        fork.append(2)
    assert state(pool) == before
    assert pool.take_copies() == []


def test_what_was_freed_cannot_be_used():
    pool = BlockPool(8, 4)
    sequence = pool.sequence([1, 2], key=b"k")
    sequence.free()
    before = state(pool)
    for use_it in (
        sequence.free,
        lambda: sequence.free(num_written=0),
        lambda: sequence.append(1),
        lambda: sequence.append([1]),
        lambda: sequence.append([]),
        sequence.slots,
        sequence.fork,
        lambda: sequence.block_table,
        lambda: sequence.pool,
        lambda: sequence.num_tokens,
        lambda: sequence.token_ids,
        lambda: sequence.block_hashes,
    ):
        with pytest.raises(FreedError, match="sequence 0 was freed and cannot be used any more"):
            use_it()
    assert state(pool) == before
    assert sequence.freed
    assert repr(sequence) == "<Sequence 0, freed>"
    assert (sequence.number, sequence.key, sequence.num_cached_tokens) == (0, b"k", 0)
    assert issubclass(FreedError, RuntimeError)


def test_a_sequence_has_no_other_attributes():
    sequence = BlockPool(8, 4).sequence([1])
    with pytest.raises(AttributeError, match="'Sequence' object has no attribute 'blocks'"):
        sequence.blocks  # noqa: B018
    sequence.free()
    assert not hasattr(sequence, "blocks")


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_sequence_cannot_be_copied(how):
    with pytest.raises(NotSupportedError, match="a Sequence cannot be copied or pickled; use fork"):
        how(BlockPool(8, 4).sequence([1]))


def test_with_frees():
    pool = BlockPool(8, 4)
    with pool.sequence(range(9)) as sequence:
        assert pool.num_used == 3
    assert sequence.freed
    assert pool.num_used == 0
    assert pool.find(range(9)) == 8
    with pool.sequence([1]) as sequence:
        sequence.free()


def test_with_keeps_only_what_was_found_if_an_exception_ends_it():
    pool = BlockPool(8, 4)
    use(pool, range(5))
    with pytest.raises(KeyError), pool.sequence(range(13)):
        raise KeyError(pool.find(range(13)))
    assert pool.find(range(13)) == 4


# What is found


def test_full_blocks_are_found_and_one_token_is_left_to_compute():
    pool = BlockPool(16, 4)
    first = pool.sequence(range(8))
    for length, found in [(8, 4), (9, 8), (12, 8), (5, 4), (4, 0), (1, 0)]:
        assert pool.find(range(length)) == found
        with pool.sequence(range(length)) as second:
            assert second.num_cached_tokens == found
            assert second.block_table[: found // 4] == first.block_table[: found // 4]
            assert first.block_table[found // 4 :] not in second.block_table
    assert pool.find([]) == 0


def test_blocks_are_found_as_soon_as_they_are_full():
    pool = BlockPool(16, 4)
    first = pool.sequence([1, 2, 3])
    assert pool.find([1, 2, 3, 4, 5]) == 0
    first.append(4)
    assert pool.find([1, 2, 3, 4, 5]) == 4
    first.append([5, 6, 7, 8, 9, 10, 11, 12, 13])
    assert pool.find([*range(1, 14)]) == 12
    second = pool.sequence(range(1, 14))
    assert second.block_table[:3] == first.block_table[:3]
    assert second.block_hashes == first.block_hashes


def test_a_block_is_found_after_the_same_tokens_only():
    pool = BlockPool(16, 2)
    pool.sequence([1, 2, 3, 4, 5])
    assert pool.find([3, 4, 5]) == 0
    assert pool.find([9, 2, 3, 4, 5]) == 0
    assert pool.find([1, 2, 9, 4, 5]) == 2
    pool.sequence([8, 8, 3, 4])
    assert pool.find([8, 8, 3, 4, 0]) == 4


def test_only_equal_keys_share():
    pool = BlockPool(16, 2)
    first = pool.sequence([1, 2, 3], key=b"a")
    assert pool.find([1, 2, 3]) == 0
    assert pool.find([1, 2, 3], key=b"b") == 0
    assert pool.find([1, 2, 3], key=bytes(bytearray(b"a"))) == 2
    fork = first.fork()
    fork.append([4, 5])
    assert pool.find([1, 2, 3, 4, 5], key=b"a") == 4
    assert fork.key == b"a"


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(4, 2, prefix_caching=False)
    assert not pool.prefix_caching
    first = pool.sequence([1, 2, 3, 4, 5])
    first.append([6, 7])
    assert pool.find([1, 2, 3]) == 0
    assert first.block_hashes == ()
    first.free(num_written=1)
    assert pool.sequence([1, 2, 3]).num_cached_tokens == 0
    pool.reset_prefix_cache()
    assert pool.statistics.num_cached_free == 0
    pool._check()


def test_hashes_are_what_the_definition_says():
    sequence = BlockPool(8, 2).sequence([1, -2, 3, 70000, 5], key=b"tenant")
    root = hashes.root_digest(b"tenant")
    first = hashlib.sha256(root + np.array([1, -2], "<i4").tobytes()).digest()
    second = hashlib.sha256(first + np.array([3, 70000], "<i4").tobytes()).digest()
    assert sequence.block_hashes == (first, second)
    assert (
        first.hex() == "9bc9268102841f4605ae00c4150030dead09db880cb7f86ff0e405315265dbad"
    )  # the same on all machines


def test_hashes_are_the_same_where_the_last_byte_comes_first(monkeypatch):
    tokens = array("i", [1, -2, 70000])
    there = tokens[:]
    there.byteswap()
    expected = np.array([1, -2, 70000], "<i4").tobytes()
    assert hashes.content_of(tokens if sys.byteorder == "little" else there) == expected
    monkeypatch.setattr(sys, "byteorder", "big" if sys.byteorder == "little" else "little")
    assert hashes.content_of(there) == expected
    assert there[0] != 1  # and is not changed by that


def test_a_key_cannot_pretend_to_be_a_block():
    pool = BlockPool(8, 2)
    first = pool.sequence([1, 2, 3])
    content = np.array([1, 2], "<i4").tobytes()
    key = hashes.root_digest(b"") + content  # whose plain SHA-256 is the digest of the block
    assert hashlib.sha256(key).digest() == first.block_hashes[0]
    assert hashes.root_digest(key) != first.block_hashes[0]


class AlwaysTheSame:
    def __init__(self, data):
        pass

    def digest(self):
        return bytes(32)


def test_colliding_hashes_share_nothing_that_differs(monkeypatch):
    monkeypatch.setattr(hashes, "sha256", AlwaysTheSame)
    pool = BlockPool(32, 2)
    kept = [
        pool.sequence(tokens, key=key)
        for tokens in ([1, 2, 3], [4, 5, 6], [1, 2, 1, 2, 1, 2, 9], [5, 6])
        for key in (b"", b"k")
    ]
    blocks = [block for one in kept for block in one.block_table]
    assert len(set(blocks)) == len(blocks)
    pool._check()
    pool.sequence([7, 7, 8])
    assert pool.find([7, 7, 8]) == 2  # the last one that was stored
    assert pool.find([7, 7, 7, 7, 8]) == 2  # the same tokens, but another parent
    assert pool.find([7, 7, 8], key=b"k") == 0
    assert pool.find([5, 6, 0]) == 0
    for one in kept:
        one.append([1, 1, 1])
        one.free()
        pool._check()
    assert pool.num_used == 2


def test_a_collision_with_a_free_block_leaves_it_free(monkeypatch):
    monkeypatch.setattr(hashes, "sha256", AlwaysTheSame)
    pool = BlockPool(4, 2)
    with EventLog(pool) as log:
        (block, _) = use(pool, [1, 2, 3])
        pool.sequence([4, 5])
    assert BlockRemoved((bytes(32),), (block,), "replaced") in [event for _, event in log.entries]
    assert block in pool._free
    assert pool.num_free == 3
    pool._check()


def test_of_blocks_with_one_content_the_first_is_found():
    pool = BlockPool(8, 2)
    first, second = pool.sequence([1]), pool.sequence([1])
    first.append([2, 3])
    second.append([2, 3])
    assert first.block_table[0] != second.block_table[0]
    third = pool.sequence([1, 2, 3])
    assert third.block_table[0] == first.block_table[0]
    second.append(4)  # found after the first of them, though in another table
    assert pool.find([1, 2, 3, 4, 5]) == 4
    pool._check()


def test_the_next_of_them_is_found_when_the_first_is_evicted():
    pool = BlockPool(4, 2)
    first, second = pool.sequence([1]), pool.sequence([1])
    first.append(2)
    second.append([2, 3, 4])
    old = first.block_table[0]
    first.free()
    assert pool.sequence([1, 2, 9]).block_table[0] == old
    pool.sequences[-1].free()
    with EventLog(pool) as log:
        pool.sequence([7, 7, 7, 7])  # has the block of 9, then the oldest one that can be found
    assert [type(event) for _, event in log.entries][1] is BlockMoved
    assert pool.find([1, 2, 3, 4, 5]) == 4
    second.free()
    assert pool.sequence([1, 2, 3]).num_cached_tokens == 2
    pool._check()


def test_freeing_a_second_block_counts_as_use_of_the_first():
    pool = BlockPool(4, 2)
    first, second = pool.sequence([1]), pool.sequence([1])
    first.append(2)
    second.append(2)
    first.free()
    use(pool, [5, 6])
    second.free()
    pool.sequence([8])
    pool.sequence([9])
    pool.sequence([10])
    assert pool.find([1, 2, 0]) == 2
    assert pool.find([5, 6, 0]) == 0


def test_append_does_not_look_up():
    pool = BlockPool(8, 2)
    pool.sequence([1, 2, 3])
    sequence = pool.sequence()
    sequence.append([1, 2, 3])
    assert sequence.num_cached_tokens == 0
    assert sequence.block_table == [2, 3]


def test_reset_forgets_all_and_sequences_go_on():
    pool = BlockPool(16, 2)
    use(pool, [9, 9, 9])
    held, empty = pool.sequence([1, 2, 3]), pool.sequence()
    fork = held.fork()
    pool.reset_prefix_cache()
    assert pool.find([9, 9, 9]) == pool.find([1, 2, 3]) == 0
    assert pool.statistics.num_cached_free == 0
    # What they append now stands beside the K and V of before.
    held.append([4, 5])
    fork.append([4, 5])
    empty.append([6, 7, 8])
    assert pool.find([1, 2, 3, 4, 5]) == pool.find([6, 7, 8]) == 0
    pool._check()
    again = pool.sequence([1, 2, 3, 4, 5])
    assert again.num_cached_tokens == 0
    assert pool.find([1, 2, 3, 4, 5]) == 4
    held.free()
    fork.free()
    empty.free()
    assert pool.statistics.num_cached_free == 0
    pool._check()


# Free blocks, and which are used next


def test_blocks_that_cannot_be_found_are_used_first_the_last_freed_first():
    pool = BlockPool(6, 2)
    early, late = pool.sequence([1]), pool.sequence([2])
    use(pool, [5, 6])  # block 2, which can be found
    early.free()
    late.free()
    assert pool.sequence([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).block_table == [1, 0, 3, 4, 5]
    assert pool.find([5, 6, 7]) == 2
    assert pool.sequence([3]).block_table == [2]
    assert pool.find([5, 6, 7]) == 0


def test_the_least_recently_used_is_evicted_first_and_tails_before_heads():
    pool = BlockPool(6, 2)
    old, new = [1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]
    use(pool, old)
    use(pool, new)
    found = []
    for token in range(6):
        pool.sequence([100 + token])
        found.append((pool.find([*old, 0]), pool.find([*new, 0])))
    assert found == [(4, 6), (2, 6), (0, 6), (0, 4), (0, 2), (0, 0)]
    assert pool.statistics.evictions == 6


def test_a_hit_makes_a_block_recent():
    pool = BlockPool(4, 2)
    use(pool, [1, 2])
    use(pool, [3, 4])
    use(pool, [1, 2, 9])  # found, and freed again
    pool.sequence([5])
    pool.sequence([5])
    assert pool.find([1, 2, 0]) == 2
    pool.sequence([5])
    assert (pool.find([1, 2, 0]), pool.find([3, 4, 0])) == (2, 0)


def test_a_head_that_others_use_outlives_a_tail():
    pool = BlockPool(5, 2)
    first = pool.sequence([1, 2, 3, 4, 0])
    second = pool.sequence([1, 2, 5, 6])
    second.free()
    first.free()
    pool.sequence([9] * 5)
    assert pool.find([1, 2, 3, 4, 0]) == 4
    assert pool.find([1, 2, 5, 6, 0]) == 2


def test_what_was_never_written_is_forgotten():
    for num_written, found in [(0, 0), (1, 0), (3, 0), (4, 4), (7, 4), (8, 8), (9, 8), (None, 8)]:
        pool = BlockPool(8, 4)
        pool.sequence(range(9)).free(num_written=num_written)
        assert pool.find(range(9)) == found
        assert pool.num_free == 8
        pool._check()


def test_what_follows_the_forgotten_is_never_found():
    pool = BlockPool(8, 2)
    first = pool.sequence([1, 2, 3])
    second = pool.sequence([1, 2, 3, 4, 5])  # beside what is never written
    first.free(num_written=0)
    assert pool.find([1, 2, 3, 4, 5]) == 0
    third = pool.sequence([1, 2, 3])  # writes it
    assert pool.find([1, 2, 3, 4, 5]) == 2
    second.append(6)
    second.free()
    assert pool.find([1, 2, 3, 4, 5, 6, 7]) == 2
    third.append([4, 5, 6])
    assert pool.find([1, 2, 3, 4, 5, 6, 7]) == 6
    pool._check()


def test_a_sequence_whose_last_block_was_forgotten_is_hashed_no_more():
    pool = BlockPool(8, 2)
    first = pool.sequence([1, 2, 3])
    second = pool.sequence([1, 2, 3])
    first.free(num_written=0)
    second.append(4)
    assert second.block_hashes == ()
    second.free()
    assert pool.statistics.num_cached_free == 0


def test_the_second_of_two_may_be_unwritten():
    pool = BlockPool(8, 2)
    first, second = pool.sequence([1]), pool.sequence([1])
    first.append(2)
    second.append(2)
    second.free(num_written=1)
    assert pool.find([1, 2, 3]) == 2
    pool._check()
    second = pool.sequence([1])
    second.append(2)
    first.free(num_written=1)
    assert pool.find([1, 2, 3]) == 0  # what was found may have been read
    pool._check()


# Forks


def test_a_fork_shares_all_blocks_until_one_of_them_appends():
    pool = BlockPool(8, 4)
    first = pool.sequence(range(6))
    fork = first.fork()
    assert fork.block_table == first.block_table == [0, 1]
    assert fork.block_table is not first.block_table
    assert pool.num_used == 2
    assert pool.statistics.num_shared == 2
    assert list(fork.append(6)) == [10]
    assert fork.block_table == [0, 2]
    assert first.block_table == [0, 1]
    assert list(first.append(7)) == [6]  # nobody else holds it now
    assert first.block_table == [0, 1]
    assert pool.take_copies() == [(1, 2)]
    assert pool.take_copies() == []
    assert list(fork.token_ids) == [*range(6), 6]
    assert list(first.token_ids) == [*range(6), 7]
    pool._check()


def test_a_fork_of_full_blocks_copies_nothing():
    pool = BlockPool(8, 2)
    first = pool.sequence([1, 2])
    fork = first.fork()
    first.append(3)
    fork.append([3, 4])
    assert pool.take_copies() == []
    assert first.block_table == [0, 1]
    assert fork.block_table == [0, 2]
    assert pool.find([1, 2, 3, 4, 5]) == 4


def test_each_fork_but_the_last_copies():
    pool = BlockPool(8, 4)
    first = pool.sequence([1, 2])
    forks = [first.fork() for _ in range(3)]
    for one in (*forks, first):
        one.append([one.number, 5, 6])
    copies = pool.take_copies()
    assert copies == [(0, forks[i].block_table[0]) for i in range(3)]
    assert first.block_table[0] == 0
    pool._check()


def test_the_source_of_a_copy_is_held_until_it_is_taken():
    pool = BlockPool(3, 4)
    first = pool.sequence([1, 2])
    fork = first.fork()
    fork.append(3)
    first.free()
    assert pool.num_used == 2
    pool._check()
    with pytest.raises(PoolExhaustedError):
        pool.sequence(range(8))
    assert pool.statistics.num_empty_slots == 2 + 1
    assert pool.take_copies() == [(0, 1)]
    assert pool.num_used == 1
    pool._check()
    pool.sequence(range(8))


def test_a_source_that_became_full_can_be_found_while_it_waits():
    pool = BlockPool(4, 2)
    first = pool.sequence([1])
    fork = first.fork()
    fork.append(9)
    first.append([2])
    first.free()
    assert pool.find([1, 2, 3]) == 2
    assert pool.statistics.num_cached_free == 0  # it is held
    again = pool.sequence([1, 2, 3])
    assert again.block_table[0] == 0
    pool._check()
    assert pool.take_copies() == [(0, 1)]
    again.free()
    assert pool.find([1, 2, 3]) == 2
    pool._check()


def test_a_copy_is_dropped_with_its_target():
    pool = BlockPool(3, 4)
    first = pool.sequence([1, 2])
    fork = first.fork()
    fork.append(3)
    fork.free()
    assert pool.num_used == 1
    other = pool.sequence([7])
    assert other.block_table == [1]
    assert pool.take_copies() == []
    assert list(first.append(3)) == [2]
    pool._check()


def test_a_source_is_free_when_its_last_copy_is_dropped():
    pool = BlockPool(4, 4)
    first = pool.sequence([1, 2])
    one, two = first.fork(), first.fork()
    one.append(3)
    two.append(4)
    first.free()
    assert pool.num_used == 3
    one.free()
    assert pool.num_used == 2
    pool._check()
    two.free()
    assert pool.num_used == 0
    pool._check()


def test_a_copy_of_a_copy_is_one_of_its_source():
    pool = BlockPool(8, 4)
    first = pool.sequence([1])
    second = first.fork()
    second.append(2)
    third = second.fork()
    third.append(3)
    assert [one.block_table for one in (first, second, third)] == [[0], [1], [2]]
    assert pool.take_copies() == [(0, 1), (0, 2)]
    fourth = third.fork()
    fourth.append(4)
    assert pool.take_copies() == [(2, 3)]
    pool._check()


def test_a_fork_remembers_what_was_found():
    pool = BlockPool(8, 2)
    use(pool, [1, 2, 3])
    assert pool.sequence([1, 2, 3]).fork().num_cached_tokens == 3


# What is told


def test_numbers_of_sequences_increase():
    pool = BlockPool(8, 2)
    first = pool.sequence([1])
    assert [first.number, first.fork().number, pool.sequence().number] == [0, 1, 2]
    first.free()
    assert pool.sequence().number == 3
    assert [one.number for one in pool.sequences] == [1, 2, 3]


def test_events():
    pool = BlockPool(4, 2)
    told = []
    unsubscribe = pool.subscribe(told.append)

    def news():
        events = told[:]
        told.clear()
        return events

    first = pool.sequence([1, 2, 3, 4, 5], key=b"k")
    one, two = first.block_hashes
    stored = BlockStored((one, two), None, array("i", [1, 2, 3, 4]), 2, (0, 1), 0, b"k")
    assert news() == [BlocksTaken(0, (0, 1, 2)), TokensAppended(0, 5), stored]
    first.append(6)
    three = first.block_hashes[2]
    assert news() == [
        TokensAppended(0, 6),
        BlockStored((three,), two, array("i", [5, 6]), 2, (2,), 0, b"k"),
    ]
    first.free(num_written=5)
    assert news() == [BlockRemoved((three,), (2,), "unwritten"), BlocksReleased(0, (0, 1, 2))]
    second = pool.sequence([1, 2, 9], key=b"k")
    assert news() == [
        BlocksShared(1, (0,), 2, "hit"),
        BlocksTaken(1, (2,)),
        TokensAppended(1, 3),
    ]
    third = second.fork()
    assert news() == [BlocksShared(2, (0, 2), 3, "fork")]
    third.append([7, 8])
    four = third.block_hashes[1]
    assert news() == [
        BlockRemoved((two,), (1,), "evicted"),
        BlockCopied(2, 2, 2, 3),
        BlocksTaken(2, (1,)),
        TokensAppended(2, 5),
        BlockStored((four,), one, array("i", [9, 7]), 2, (3,), 2, b"k"),
    ]
    assert pool.take_copies() == [(2, 3)]
    assert news() == [CopiesTaken(((2, 3),))]
    third.free()
    fork = second.fork()
    fork.append(1)
    news()
    fork.free()
    assert news()[0] == CopiesDropped(((2, 1),))
    pool.reset_prefix_cache()
    assert news() == [AllBlocksCleared()]
    pool.sequence().free()
    assert news() == [TokensAppended(4, 0), BlocksReleased(4, ())]
    unsubscribe()
    unsubscribe()
    pool.sequence([1])
    assert news() == []
    assert pool._news is None


def test_a_hit_is_told_before_what_it_evicts():
    pool = BlockPool(2, 2)
    use(pool, [1, 2, 3, 4])
    with EventLog(pool) as log:
        pool.sequence([1, 2, 5])
    kinds = [type(event) for _, event in log.entries]
    assert kinds == [PoolState, BlocksShared, BlockRemoved, BlocksTaken, TokensAppended]


def test_a_subscriber_that_raises_is_logged_and_changes_nothing(caplog):
    pool = BlockPool(8, 2)
    told = []

    def broken(event):
        pool._check()
        told.append(event)
        raise RuntimeError("mine")

    pool.subscribe(broken)
    pool.subscribe(told.append)
    sequence = pool.sequence([1, 2])
    assert len(told) == 2 * 3
    assert caplog.text.count("RuntimeError: mine") == 3
    assert "a subscriber of a BlockPool failed at BlocksTaken" in caplog.text
    sequence.append([3])
    sequence.free()
    pool._check()


def test_a_subscriber_must_be_callable():
    with pytest.raises(BadParamTypeError, match="function must be callable, got 5"):
        BlockPool(8, 2).subscribe(5)


def test_a_log_describes_the_pool_over_time():
    pool = BlockPool(8, 4)
    use(pool, range(9))
    first = pool.sequence(range(100, 106))
    first.fork()
    step = [0]
    log = EventLog(pool, clock=lambda: step[0])
    step[0] = 1
    first.append(1)
    assert isinstance(log.entries[0][1], PoolState)
    now = log.occupancy()
    assert now[0] == (0, 2, 2, 2, 4, 2)
    assert now[-1] == (1, 3, 1, 2, 3, 2 + 1)
    assert (now[-1].used, now[-1].shared, now[-1].cached_free, now[-1].free) == (3, 1, 2, 3)
    log.close()
    first.append(1)
    assert len(log) == len(log.entries) == len(now)


@pytest.mark.parametrize("wrong", [{"pool": 5}, {"clock": 5}])
def test_bad_logs(wrong):
    given = {"pool": BlockPool(8, 2), **wrong}
    with pytest.raises(BadParamTypeError, match=f"{next(iter(wrong))} must be"):
        EventLog(**given)


# What is shown


def test_statistics():
    pool = BlockPool(10, 4)
    first = pool.sequence(range(9))
    second = pool.sequence(range(9))
    fork = second.fork()
    fork.append(7)
    now = pool.statistics
    assert (now.num_blocks, now.block_size, now.num_used, now.num_free) == (10, 4, 5, 5)
    assert now.num_shared == 2
    assert now.num_empty_slots == 3 + 3 + 2
    assert (now.prompt_tokens, now.found_tokens, now.hit_rate) == (18, 8, 8 / 18)
    assert (now.sequences, now.forks, now.num_sequences, now.copies) == (2, 1, 3, 1)
    assert now.usage == 0.5
    for one in (first, second, fork):
        one.free()
    pool.take_copies()
    now = pool.statistics
    assert (now.num_used, now.num_cached_free, now.peak_used, now.evictions) == (0, 2, 5, 0)
    pool.sequence(range(1000, 1036))
    now = pool.statistics
    assert (now.evictions, now.peak_used) == (1, 9)
    assert BlockPool(1, 1).statistics.hit_rate == 0.0
    assert "evictions" in str(now)
    assert "<table>" in now._repr_html_()


def test_repr():
    pool = BlockPool(8, 4)
    use(pool, range(9))
    sequence = pool.sequence(range(6))
    assert repr(pool) == (
        "BlockPool(num_blocks=8, block_size=4, prefix_caching=True): 2 used by 1 sequences, 6 "
        "free, of which 1 can be found"
    )
    assert (
        repr(sequence)
        == f"<Sequence 1: 6 tokens, 4 found, in blocks [0, {sequence.block_table[1]}]>"
    )


def test_the_picture_shows_each_kind_of_block():
    pool = BlockPool(40, 2)
    use(pool, [1, 2, 3])
    first = pool.sequence([5])
    fork, other = first.fork(), first.fork()
    fork.append(6)
    fork.fork()
    first.free()
    other.free()
    html = pool._repr_html_()
    ElementTree.fromstring(html.replace("<br>", "<br/>"))
    for words in (
        "40 blocks of 2 slots",
        "held by several sequences: 1<",
        "free, but can be found: 1<",
        "held until a copy is taken: 1<",
        "free: 37<",
    ):
        assert words in html
    assert html.count("M") - html.count("M1 1h10v10h-10z") == 40 - 1  # one of them is at 1 1


@pytest.mark.parametrize("num_blocks", [1, 7, 2048, 2049, 300_000])
def test_the_picture_of_a_large_pool_is_small(num_blocks):
    pool = BlockPool(num_blocks, 16)
    for _ in range(30):
        if pool.num_free > num_blocks // 60:
            pool.sequence(range(16 * (num_blocks // 60)), key=bytes([_]))
    html = pool._repr_html_()
    ElementTree.fromstring(html.replace("<br>", "<br/>"))
    assert len(html) < 100_000
    assert f"{num_blocks:,} blocks" in html
    assert ("each cell stands for" in html) == (num_blocks > 2048)


# The package


def test_the_package_needs_only_the_standard_library():
    allowed = sys.stdlib_module_names | {"pagedcache"}
    files = list(Path(pool_package.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
                if node.module.startswith("pagedcache"):
                    assert node.module.split(".")[1] in {"pool", "status", "display"}, path
            assert {name.split(".")[0] for name in names} <= allowed, path


def test_a_pool_does_not_depend_on_the_hash_seed():
    program = (
        "from pagedcache.pool import BlockPool; p = BlockPool(8, 2); "
        "print(p.sequence([1, 2, 3], key=b'k').block_hashes[0].hex())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(pool_package.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(printed) == 1


def test_resume_finds_all_and_counts_nothing():
    pool = BlockPool(8, 2)
    pool.sequence([1, 2, 3, 4]).free()
    before = pool.statistics
    again = pool.resume([1, 2, 3, 4])
    assert again.num_cached_tokens == 4
    now = pool.statistics
    assert (now.sequences, now.prompt_tokens) == (before.sequences, before.prompt_tokens)
    assert len({again.number, again.fork().number, pool.sequence([9]).number, 0}) == 4
    with pytest.raises(PoolExhaustedError, match="the tokens to resume must fit into the free"):
        pool.resume(range(100, 120))
    pool._check()


def test_cached_blocks_are_in_the_order_they_go():
    pool = BlockPool(8, 2)
    first, second = pool.sequence([1, 2, 3, 4]), pool.sequence([5, 6])
    [a, b], [c] = first.block_table, second.block_table
    second.free()
    first.free()
    assert pool.cached_blocks == (c, b, a)
    pool.sequence(range(10, 22))
    assert pool.cached_blocks == (b, a)


def test_events_of_one_call_have_one_time():
    pool = BlockPool(8, 2)
    ticks = iter(range(100))
    with EventLog(pool, clock=lambda: next(ticks)) as log:
        pool.sequence([1, 2, 3]).free()
    times = [when for when, _ in log.entries]
    assert sorted(set(times)) == [0, 1, 2]
    assert len(times) > 4


def test_an_interrupt_while_it_frees_does_not_free_twice():
    pool = BlockPool(8, 2)
    sequence = pool.sequence([1, 2, 3])

    def interrupt(event):
        if type(event).__name__ == "BlocksReleased":
            raise KeyboardInterrupt

    unsubscribe = pool.subscribe(interrupt)
    with pytest.raises(KeyboardInterrupt):
        sequence.free()
    unsubscribe()
    with pytest.raises(FreedError):
        sequence.free()
    assert pool.num_free == 8
    pool._check()
    with pytest.raises(NotSupportedError, match="a BlockPool cannot be copied"):
        copy.copy(pool)


def test_a_hidden_sequence_is_found_once_it_is_published():
    pool = BlockPool(16, 4)
    pool.sequence(range(6))
    hidden = pool.sequence(range(10), publish=False)
    assert hidden.num_cached_tokens == 4
    hidden.append([10, 11, 12])
    assert pool.find(range(20)) == 4
    assert hidden.block_hashes == ()
    fork = hidden.fork()
    hidden.publish()
    assert pool.find(range(20)) == 12
    assert pool.sequence(range(20)).block_table[:3] == hidden.block_table[:3]
    hidden.append([13, 14, 15])
    assert pool.find(range(20)) == 16
    hidden.publish()
    fork.publish()
    fork.append([0, 0, 0])
    assert pool.find([*range(13), 0, 0, 0, 0]) == 16
    pool._check()


def test_a_hidden_sequence_is_never_found_if_it_cannot_be_trusted():
    pool = BlockPool(16, 4)
    first = pool.sequence(range(6))
    behind = pool.sequence(range(10), publish=False)
    first.free(num_written=2)  # so what `behind` has found was never written
    behind.publish()
    assert pool.find(range(20)) == 0
    old = pool.sequence(range(20, 30), publish=False)
    pool.reset_prefix_cache()
    old.publish()
    old.append(range(8))
    assert pool.find(range(20, 40)) == 0
    unwritten = pool.sequence(range(40, 50), publish=False)
    unwritten.free(num_written=0)
    assert pool.find(range(40, 60)) == 0
    pool._check()
    pool = BlockPool(16, 4, prefix_caching=False)
    pool.sequence(range(8), publish=False).publish()
    assert pool.find(range(9)) == 0


def test_a_block_is_stored_once_whoever_publishes_it():
    pool = BlockPool(16, 4)
    told = []
    pool.subscribe(told.append)
    hidden = pool.sequence(range(9), publish=False)
    fork = hidden.fork()
    assert not [event for event in told if isinstance(event, BlockStored)]
    assert not hidden.published
    for sequence in (hidden, fork, fork):
        sequence.publish()
        assert sequence.published
    (stored,) = (event for event in told if isinstance(event, BlockStored))
    assert list(stored.blocks) == hidden.block_table[:2]
    assert stored.block_hashes == hidden.block_hashes == fork.block_hashes
