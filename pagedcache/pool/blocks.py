# SPDX-License-Identifier: Apache-2.0
"""The pool: which blocks are held, by whom, and which of the others are used next."""

from __future__ import annotations

import logging
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pagedcache.pool.events import (
    AllBlocksCleared,
    BlockCopied,
    BlockMoved,
    BlockRemoved,
    BlocksReleased,
    BlocksShared,
    BlocksTaken,
    BlockStored,
    CopiesDropped,
    CopiesTaken,
    Event,
    PoolState,
    TokensAppended,
)
from pagedcache.pool.hashes import content_of
from pagedcache.pool.picture import draw
from pagedcache.pool.prefixes import Prefixes, Record
from pagedcache.pool.sequence import Sequence
from pagedcache.pool.statistics import PoolStatistics
from pagedcache.pool.tokens import TOKEN_BYTES, as_tokens
from pagedcache.status import (
    BadParamTypeError,
    NotSupportedError,
    PoolExhaustedError,
    as_int,
    shown,
)

_MOST_BLOCKS = 2**31 - 1  # block tables of kernels are int32
_MOST_SLOTS = 2**63 - 1

_log = logging.getLogger(__name__)


class BlockPool:
    """The blocks of a paged cache: who holds which, and where prompts are found again.

    It touches no array. It says which slots the K and V of a token go to, which blocks to copy, and
    which tokens need not be computed, since another sequence with the same front has them in the
    cache. Full blocks are found by their tokens, all tokens before them and the key; at least one
    token of a prompt is left to compute.

    A block can be found from the moment it is full, before its K and V are written. So writes must
    come before reads: on one stream, queue the write of one sequence before whatever reads for the
    next; or, in a step of several sequences, do all writes of a layer before all reads of it. Where
    they cannot, make the sequence with ``publish=False``, and call `Sequence.publish` later.

    Freed blocks that can be found are kept until their room is needed, and the least recently used
    goes first; of one sequence, the last block goes first. Before them, blocks that cannot be found
    are used again, the last one freed first. Two blocks with the same content, of sequences that
    computed it side by side, stay two blocks, and the first of them is found.

    A pool and its sequences belong to one thread. Where several use them, hold a lock of your own
    around each call.

    Parameters
    ----------
    num_blocks : int
        How many blocks the cache has.
    block_size : int
        Slots in a block.
    prefix_caching : bool, default True
        Whether prompts are looked up. Without it, nothing is hashed.

    Examples
    --------
    >>> pool = BlockPool(num_blocks=8, block_size=4)
    >>> first = pool.sequence(range(10))
    >>> first.block_table, list(first.slots(8))
    ([0, 1, 2], [8, 9])
    >>> list(first.append(10))
    [10]
    >>> second = pool.sequence(range(12))
    >>> second.block_table, second.num_cached_tokens
    ([0, 1, 3], 8)
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self._num_blocks = as_int("num_blocks", num_blocks, 1, _MOST_BLOCKS)
        self._block_size = as_int("block_size", block_size, 1, _MOST_SLOTS // self._num_blocks)
        if not isinstance(prefix_caching, bool):
            raise BadParamTypeError("prefix_caching", "must be a bool", shown(prefix_caching))
        self._prefixes = (
            Prefixes(self._num_blocks, self._block_size * TOKEN_BYTES) if prefix_caching else None
        )
        # A block is in one of four states: in _free; in _idle, if nobody holds it and it can be
        # found; in _parked, if only a copy that nobody has taken holds it; or else in block tables.
        self._free = list(range(self._num_blocks - 1, -1, -1))  # the next one is at the end
        self._idle: OrderedDict[int, None] = OrderedDict()  # the next one is at the front
        self._parked: dict[int, int] = {}  # and how many tokens are in it
        self._more_holders: dict[int, int] = {}  # how many sequences hold it beyond the first
        self._copies: dict[int, int] = {}  # from target to source, in order
        self._sources: dict[int, int] = {}  # how many of these copies have this source
        self._sequences: dict[int, Sequence] = {}
        self._epoch = 0  # counts resets
        self._news: list[Event] | None = None  # to tell; None if nobody listens
        self._num_told = 0  # calls that had news
        self._numbered = 0  # sequences, however they were made
        self._subscribers: dict[object, Callable[[Event], object]] = {}
        self._num_made = self._num_forks = self._num_evicted = self._num_copied = 0
        self._prompt_tokens = self._found_tokens = self._peak = 0

    def __reduce__(self) -> str:
        # Two pools would give the same blocks to two sequences.
        raise NotSupportedError("a BlockPool", "cannot be copied or pickled")

    @property
    def num_blocks(self) -> int:
        """How many blocks the pool has."""
        return self._num_blocks

    @property
    def block_size(self) -> int:
        """Slots in a block."""
        return self._block_size

    @property
    def prefix_caching(self) -> bool:
        """Whether prompts are looked up."""
        return self._prefixes is not None

    @property
    def num_free(self) -> int:
        """How many blocks nobody holds, whether or not they can still be found."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """How many blocks are held by a sequence, or by a copy that nobody has taken."""
        return self._num_blocks - len(self._free) - len(self._idle)

    @property
    def cached_blocks(self) -> tuple[int, ...]:
        """The free blocks that can still be found, the next one to be used again first."""
        return tuple(self._idle)

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The sequences that are not freed, in the order they were made."""
        return tuple(self._sequences.values())

    def sequence(self, token_ids: Any = (), *, key: bytes = b"", publish: bool = True) -> Sequence:
        """Return a new sequence with these tokens, which has blocks for all of them.

        The first ``num_cached_tokens`` are in the cache already. Compute the K and V of the others,
        and write them to ``slots(num_cached_tokens)``.

        Parameters
        ----------
        token_ids : iterable of int
            Token ids that fit into int32: a list, a range, an array of any library.
        key : bytes
            What the K and V depend on beside the tokens, such as a LoRA, an image or a tenant. Only
            sequences with the same key share blocks.
        publish : bool
            Whether others find its full blocks from now on. If not, they do once
            `Sequence.publish` is called, for example when their K and V have been written.

        Raises
        ------
        PoolExhaustedError
            There are too few free blocks. Nothing was changed.
        """
        sequence = self._make("token_ids", token_ids, key, to_compute=1, publish=publish)
        self._num_made += 1
        self._prompt_tokens += sequence.num_tokens
        self._found_tokens += sequence.num_cached_tokens
        return sequence

    def resume(self, token_ids: Any, *, key: bytes = b"", publish: bool = True) -> Sequence:
        """Return a sequence for tokens whose K and V were computed before and are elsewhere.

        As `sequence`, but no token has to be left to compute, and it is not counted as a prompt.
        Copy the K and V of the tokens that were not found to ``slots(num_cached_tokens)``.

        Parameters
        ----------
        token_ids, key, publish
            See `sequence`. Without all K and V at hand, do not publish it yet.

        Raises
        ------
        PoolExhaustedError
            There are too few free blocks. Nothing was changed.
        """
        return self._make("the tokens to resume", token_ids, key, to_compute=0, publish=publish)

    def _make(
        self, subject: str, token_ids: Any, key: bytes, to_compute: int, *, publish: bool = True
    ) -> Sequence:
        _check_key(key)
        if not isinstance(publish, bool):
            raise BadParamTypeError("publish", "must be a bool", shown(publish))
        tokens = as_tokens(token_ids)
        num_tokens, size, prefixes = len(tokens), self._block_size, self._prefixes
        found: list[int] = []
        content, link, digest = b"", None, b""
        if prefixes is not None:
            content = content_of(tokens)
            most = max(num_tokens - to_compute, 0) // size
            found, link, digest = prefixes.search(content, most, key)
        needed = -(-num_tokens // size) - len(found)
        idle = self._idle
        revived: list[int] = []
        held: list[int] = []
        for block in found:
            (revived if block in idle else held).append(block)
        free = len(self._free) + len(idle) - len(revived)
        if needed > free:  # in terms of num_needed and num_free
            held_by_none = len(revived)
            raise PoolExhaustedError(
                subject, needed + held_by_none, free + held_by_none, self._num_blocks
            )
        records: list[Record] = []
        if publish and prefixes is not None and link is not None:
            records = prefixes.chain(content, len(found), num_tokens // size, link, digest)

        for block in revived:
            del idle[block]
        self._hold(held)
        taken = self._take(needed)
        sequence = Sequence(self, self._next_number(), tokens, found + taken, key)
        sequence.num_cached_tokens = len(found) * size
        sequence._epoch, sequence._digest = self._epoch, digest
        if publish:
            sequence._link = link
        elif link is not None:
            sequence._hidden = link, digest, len(found)
        self._sequences[sequence.number] = sequence
        if self._news is not None:
            number = sequence.number
            if found:  # before what _take evicted to make room
                num_found = sequence.num_cached_tokens
                self._news.insert(0, BlocksShared(number, tuple(found), num_found, "hit"))
            if taken:
                self._news.append(BlocksTaken(number, tuple(taken)))
            self._news.append(TokensAppended(number, num_tokens))
        self._publish(sequence, len(found), records)
        self._tell()
        return sequence

    def find(self, token_ids: Any, *, key: bytes = b"") -> int:
        """Return how many tokens at the front of a prompt would be found. Nothing is changed."""
        _check_key(key)
        tokens = as_tokens(token_ids)
        if self._prefixes is None:
            return 0
        most = max(len(tokens) - 1, 0) // self._block_size
        return len(self._prefixes.search(content_of(tokens), most, key)[0]) * self._block_size

    def num_needed(self, token_ids: Any, *, key: bytes = b"") -> int:
        """Return how many free blocks `sequence` would take. Nothing is changed.

        These are new ones for what is not found, and those that are found and nobody holds. The
        sequence can be made if they are at most `num_free`.
        """
        _check_key(key)
        tokens = as_tokens(token_ids)
        blocks = -(-len(tokens) // self._block_size)
        if self._prefixes is None:
            return blocks
        most = max(len(tokens) - 1, 0) // self._block_size
        found, *_ = self._prefixes.search(content_of(tokens), most, key)
        return blocks - sum(block not in self._idle for block in found)

    @property
    def copies(self) -> list[tuple[int, int]]:
        """The pairs that `take_copies` would return now."""
        return [(source, target) for target, source in self._copies.items()]

    def take_copies(self) -> list[tuple[int, int]]:
        """Return the blocks to copy, as pairs of source and target, and clear them.

        Appending to a sequence that shares its last block with a fork asks for them. Run
        ``copy_blocks`` with them on the stream of the writes: after the writes of all earlier
        tokens, and before that of the tokens that were appended. No block is the source of one pair
        and the target of another, so they may be copied in any order, or all at once.

        Until the copies are taken, their sources are not used again, even if all their sequences
        are freed. If the sequences of a target are freed first, its pair is dropped.
        """
        copies = self.copies
        if copies:
            if self._news is not None:
                self._news.append(CopiesTaken(tuple(copies)))
            self._copies.clear()
            self._sources.clear()
            parked = list(self._parked)
            self._parked.clear()
            self._give_back(parked)
            self._tell()
        return copies

    def subscribe(self, function: Callable[[Event], object]) -> Callable[[], None]:
        """Call a function with each event from now on, in order.

        It is called at the end of the call that caused the event, when the pool is consistent. It
        may read the pool, and must not change it. If it raises an `Exception`, that is logged by
        `logging`, the change stands, and it is told the next event as usual.

        Returns
        -------
        callable
            Ends the subscription.
        """
        if not callable(function):
            raise BadParamTypeError("function", "must be callable", shown(function))
        ticket = object()
        self._subscribers[ticket] = function
        if self._news is None:
            self._news = []

        def unsubscribe() -> None:
            self._subscribers.pop(ticket, None)
            if not self._subscribers:
                self._news = None

        return unsubscribe

    def reset_prefix_cache(self) -> None:
        """Forget all that could be found, for example since the weights have changed.

        Sequences keep their blocks, and go on; what they have and what they append is not found by
        others any more.
        """
        self._epoch += 1
        if self._prefixes is not None:
            self._prefixes.clear()
            self._free.extend(reversed(self._idle))
            self._idle.clear()
        if self._news is not None:
            self._news.append(AllBlocksCleared())
        self._tell()

    @property
    def statistics(self) -> PoolStatistics:
        """What the pool has counted until now."""
        return PoolStatistics(
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            num_used=self.num_used,
            num_shared=len(self._more_holders),
            num_cached_free=len(self._idle),
            num_free=self.num_free,
            num_empty_slots=self._num_empty_slots(),
            num_sequences=len(self._sequences),
            peak_used=self._peak,
            sequences=self._num_made,
            forks=self._num_forks,
            prompt_tokens=self._prompt_tokens,
            found_tokens=self._found_tokens,
            evictions=self._num_evicted,
            copies=self._num_copied,
        )

    def __repr__(self) -> str:
        return (
            f"BlockPool(num_blocks={self._num_blocks}, block_size={self._block_size}, "
            f"prefix_caching={self.prefix_caching}): {self.num_used} used by "
            f"{len(self._sequences)} sequences, {self.num_free} free, of which {len(self._idle)} "
            "can be found"
        )

    def _repr_html_(self) -> str:
        tables = {number: one.block_table for number, one in self._sequences.items()}
        return draw(
            self._num_blocks, self._block_size, tables, self._more_holders, self._idle, self._parked
        )

    # What sequences ask of their pool

    def _append(self, sequence: Sequence, tokens: array[int]) -> None:
        """Add tokens to a sequence, with the blocks that they need."""
        size, table = self._block_size, sequence.block_table
        start = len(sequence._tokens)
        stop = start + len(tokens)
        copies = start % size and table[-1] in self._more_holders
        needed = -(-stop // size) - len(table) + bool(copies)
        if needed:
            free = len(self._free) + len(self._idle)
            if needed > free:
                raise PoolExhaustedError("token_ids", needed, free, self._num_blocks)
            taken = self._take(needed)
            if copies:
                self._copy_last(sequence, taken.pop(0))
            table += taken
            if self._news is not None and taken:
                self._news.append(BlocksTaken(sequence.number, tuple(taken)))
        sequence._tokens += tokens
        sequence._find_room()
        if self._news is not None:
            self._news.append(TokensAppended(sequence.number, stop))
        first, last = start // size, stop // size
        if first < last and self._may_publish(sequence):
            assert self._prefixes is not None
            assert sequence._link is not None
            content = content_of(sequence._tokens[first * size : last * size])
            link, digest = sequence._link, sequence._digest
            records = self._prefixes.chain(content, 0, last - first, link, digest)
            self._publish(sequence, first, records)
        self._tell()

    def _show(self, sequence: Sequence) -> None:
        """Make the full blocks of a sequence that was not published findable."""
        if sequence._hidden is None or self._prefixes is None:
            return
        link, digest, first = sequence._hidden
        sequence._hidden, sequence._link, sequence._digest = None, link, digest
        if not self._may_publish(sequence):
            return
        size, last = self._block_size, len(sequence._tokens) // self._block_size
        content = content_of(sequence._tokens[first * size : last * size])
        records = self._prefixes.chain(content, 0, last - first, link, digest)
        self._publish(sequence, first, records)
        self._tell()

    def _copy_last(self, sequence: Sequence, target: int) -> None:
        """Replace the shared last block of a sequence with one of its own."""
        table = sequence.block_table
        last = table[-1]
        # A copy of a copy that nobody has taken is one of its source.
        source = self._copies.get(last, last)
        self._let_go([last])
        table[-1] = target
        self._copies[target] = source
        self._sources[source] = self._sources.get(source, 0) + 1
        self._num_copied += 1
        if self._news is not None:
            self._news.append(BlockCopied(sequence.number, last, source, target))

    def _fork(self, sequence: Sequence) -> Sequence:
        """Return a sequence that holds all blocks of another."""
        table = sequence.block_table
        self._hold(table)
        fork = Sequence(self, self._next_number(), sequence._tokens[:], table[:], sequence.key)
        fork.num_cached_tokens = fork.num_tokens
        fork._epoch, fork._link, fork._digest = sequence._epoch, sequence._link, sequence._digest
        fork._hidden = sequence._hidden
        self._sequences[fork.number] = fork
        self._num_forks += 1
        if self._news is not None:
            self._news.append(BlocksShared(fork.number, tuple(table), fork.num_tokens, "fork"))
        self._tell()
        return fork

    def _free_sequence(self, sequence: Sequence, num_written: int | None) -> None:
        """Release all blocks of a sequence."""
        table, num_tokens = sequence.block_table, len(sequence._tokens)
        if num_written is not None and num_written < num_tokens:
            self._forget(table[num_written // self._block_size :])
        blocks = self._let_go(table)
        if self._copies:
            blocks = self._settle_copies(sequence, blocks)
        self._give_back(blocks)
        del self._sequences[sequence.number]
        if self._news is not None:
            self._news.append(BlocksReleased(sequence.number, tuple(table)))
        self._tell()

    # Holding

    def _next_number(self) -> int:
        self._numbered += 1
        return self._numbered - 1

    def _hold(self, blocks: list[int]) -> None:
        """Add a holder to blocks, each of which is held or parked."""
        more = self._more_holders
        if self._parked and not self._parked.keys().isdisjoint(blocks):
            parked = {block for block in blocks if block in self._parked}
            for block in parked:
                del self._parked[block]
            blocks = [block for block in blocks if block not in parked]
        if more.keys().isdisjoint(blocks):
            more.update(dict.fromkeys(blocks, 1))
        else:
            for block in blocks:
                more[block] = more.get(block, 0) + 1

    def _let_go(self, blocks: list[int]) -> list[int]:
        """Remove a holder from blocks, and return those that no sequence holds now."""
        more = self._more_holders
        if not more or more.keys().isdisjoint(blocks):
            return blocks
        nobody = []
        for block in blocks:
            others = more.get(block)
            if others is None:
                nobody.append(block)
            elif others == 1:
                del more[block]
            else:
                more[block] = others - 1
        return nobody

    def _settle_copies(self, sequence: Sequence, blocks: list[int]) -> list[int]:
        """Drop copies into blocks that nobody holds now, and park the sources of others.

        Returns those of the blocks, and those that the dropped copies alone held, that are free.
        """
        copies, sources = self._copies, self._sources
        dropped = [(copies.pop(target), target) for target in blocks if target in copies]
        freed = []
        for source, _ in dropped:
            sources[source] -= 1
            if not sources[source]:
                del sources[source]
                if self._parked.pop(source, None) is not None:
                    freed.append(source)
        if dropped and self._news is not None:
            self._news.append(CopiesDropped(tuple(dropped)))
        if not sources.keys().isdisjoint(blocks):
            last, size = sequence.block_table[-1], self._block_size
            for block in blocks:
                if block in sources:
                    self._parked[block] = size - sequence._room if block == last else size
            blocks = [block for block in blocks if block not in sources]
        return blocks + freed

    # Blocks that nobody holds

    def _take(self, count: int) -> list[int]:
        """Return that many of the free blocks, which must be there."""
        free = self._free
        left = len(free) - count
        if left >= 0:
            taken = free[left:]
            del free[left:]
            taken.reverse()
        else:
            taken = free[::-1]
            free.clear()
            taken += self._evict(-left)
        used = self._num_blocks - len(free) - len(self._idle)
        if used > self._peak:
            self._peak = used
        return taken

    def _evict(self, count: int) -> list[int]:
        """Evict the least recently used free blocks, and return them."""
        assert self._prefixes is not None
        pop = self._idle.popitem
        evicted = [pop(last=False)[0] for _ in range(count)]
        news = self._news
        records = self._prefixes.records
        before = [records[block] for block in evicted] if news is not None else []
        moved = self._prefixes.evict(evicted)
        self._num_evicted += count
        if news is not None:
            digests = {
                block: record[0] for block, record in zip(evicted, before, strict=True) if record
            }
            news += [BlockMoved(digests.pop(block), block, twin) for block, twin in moved]
            if digests:
                news.append(BlockRemoved(tuple(digests.values()), tuple(digests), "evicted"))
        return evicted

    def _give_back(self, blocks: list[int]) -> None:
        """Add blocks to the free ones, the last of them to be used first."""
        free, idle, prefixes = self._free, self._idle, self._prefixes
        if prefixes is None:
            free.extend(reversed(blocks))
            return
        if prefixes.twin_of and not prefixes.twin_of.keys().isdisjoint(blocks):
            for block in reversed(blocks):
                if block in prefixes.twin_of:
                    first = prefixes.forget_twin(block)
                    if first in idle:
                        idle.move_to_end(first)  # its content was in use until now
        records = prefixes.records
        for block in reversed(blocks):
            if records[block] is None:
                free.append(block)
            else:
                idle[block] = None

    # What can be found

    def _may_publish(self, sequence: Sequence) -> bool:
        """Return whether full blocks of a sequence can be found; if not, it is not asked again."""
        link, prefixes = sequence._link, self._prefixes
        if link is None or prefixes is None:
            return False
        if sequence._epoch != self._epoch or not prefixes.is_found(link):
            sequence._link = None
            return False
        return True

    def _publish(self, sequence: Sequence, first: int, records: list[Record]) -> None:
        """Make blocks of a sequence, from `first` on, findable by their records."""
        if not records:
            return
        prefixes = self._prefixes
        assert prefixes is not None
        last = first + len(records)
        blocks = sequence.block_table[first:last]
        # A fork of a hidden sequence may have published them.
        known = set()
        if self._news is not None:
            known = {b for b, r in zip(blocks, records, strict=True) if prefixes.records[b] is r}
        replaced = prefixes.publish(blocks, records)
        for block, _ in replaced:
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)
        sequence._link, sequence._digest = records[-1], records[-1][0]
        if self._news is None:
            return
        gone = {block: digest for block, digest in replaced if block not in blocks}
        self._tell_removed(gone, "replaced")
        found = prefixes.records
        stored = {  # no twins
            b: r for b, r in zip(blocks, records, strict=True) if found[b] is r and b not in known
        }
        if stored:
            size = self._block_size
            start = first * size + blocks.index(next(iter(stored))) * size
            parent = next(iter(stored.values()))[2]
            self._news.append(
                BlockStored(
                    block_hashes=tuple(record[0] for record in stored.values()),
                    parent_block_hash=None if isinstance(parent, bytes) else parent[0],
                    token_ids=sequence._tokens[start : last * size],
                    block_size=size,
                    blocks=tuple(stored),
                    sequence=sequence.number,
                    key=sequence.key,
                )
            )

    def _forget(self, blocks: Iterable[int]) -> None:
        """Make blocks that were never written impossible to find."""
        prefixes = self._prefixes
        if prefixes is None:
            return
        gone: dict[int, bytes] = {}
        for block in blocks:
            record = prefixes.records[block]
            if record is not None:
                gone[block] = record[0]
                prefixes.forget(block)
            elif block in prefixes.twin_of:
                prefixes.forget_twin(block)
        self._tell_removed(gone, "unwritten")

    # What is told

    def _tell_removed(
        self, gone: dict[int, bytes], reason: Literal["evicted", "unwritten", "replaced"]
    ) -> None:
        if gone and self._news is not None:
            self._news.append(BlockRemoved(tuple(gone.values()), tuple(gone), reason))

    def _tell(self) -> None:
        """Tell subscribers what happened; the pool is consistent by now."""
        if not self._news:
            return
        news, self._news = self._news, []
        self._num_told += 1
        for event in news:
            for function in tuple(self._subscribers.values()):
                _tell_one(function, event)
        if not self._subscribers:
            self._news = None

    def _state(self) -> PoolState:
        """Return who holds what, which is what an event log begins with."""
        return PoolState(
            num_blocks=self._num_blocks,
            block_size=self._block_size,
            sequences={
                number: (tuple(one.block_table), one.num_tokens)
                for number, one in self._sequences.items()
            },
            found=tuple(self._prefixes.found.values()) if self._prefixes is not None else (),
            copies=tuple((source, target) for target, source in self._copies.items()),
            parked=tuple(self._parked.items()),
        )

    def _num_empty_slots(self) -> int:
        # Only the last block of a sequence can have empty slots; forks may share it.
        last = {one.block_table[-1]: one._room for one in self._sequences.values() if one._room}
        size = self._block_size
        return sum(last.values()) + sum(size - filled for filled in self._parked.values())

    def _check(self) -> None:
        """Raise AssertionError if the pool contradicts itself. It reads everything: for tests."""
        size = self._block_size
        holders: dict[int, int] = {}
        for number, sequence in self._sequences.items():
            table = sequence.block_table
            assert number == sequence.number
            assert not sequence.freed
            assert len(table) == -(-sequence.num_tokens // size)
            assert len(set(table)) == len(table)
            assert sequence._room == len(table) * size - sequence.num_tokens
            for block in table:
                holders[block] = holders.get(block, 0) + 1
        states = [*self._free, *self._idle, *self._parked, *holders]
        assert len(states) == self._num_blocks
        assert set(states) == set(range(self._num_blocks))
        assert self._more_holders == {b: count - 1 for b, count in holders.items() if count > 1}

        counts: dict[int, int] = {}
        for target, source in self._copies.items():
            counts[source] = counts.get(source, 0) + 1
            assert target in holders
            assert source in holders or source in self._parked
            assert source not in self._copies
        assert counts == self._sources
        assert self._parked.keys() <= self._sources.keys()
        assert all(0 < filled <= size for filled in self._parked.values())

        prefixes = self._prefixes
        if prefixes is None:
            assert not self._idle
            return
        findable = {block: r for block, r in enumerate(prefixes.records) if r is not None}
        assert {record[0]: block for block, record in findable.items()} == prefixes.found
        assert set(self._idle) == {
            b for b in findable if b not in holders and b not in self._parked
        }
        assert {t: d for d, twins in prefixes.twins.items() for t in twins} == prefixes.twin_of
        assert prefixes.twins.keys() <= prefixes.found.keys()
        assert all(prefixes.twins.values())
        assert prefixes.twin_of.keys().isdisjoint(findable)
        assert prefixes.twin_of.keys() <= holders.keys() | self._parked.keys()
        for sequence in self._sequences.values():
            for place, block in enumerate(sequence.block_table):
                record = prefixes.records[block]
                if record is not None:
                    tokens = sequence.token_ids[place * size : (place + 1) * size]
                    assert record[1] == content_of(tokens)


def _tell_one(function: Callable[[Event], object], event: Event) -> None:
    try:
        function(event)
    except Exception:
        # The change was made, and the caller needs what the call returns.
        _log.exception("a subscriber of a BlockPool failed at %s", type(event).__name__)


def _check_key(key: object) -> None:
    if not isinstance(key, bytes):
        raise BadParamTypeError("key", "must be bytes; use str.encode for text", shown(key))
