# SPDX-License-Identifier: Apache-2.0
"""Events with their times, and the pool that they describe."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

from pagedcache.pool.blocks import BlockPool
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
from pagedcache.status import BadParamTypeError, shown


class Occupancy(NamedTuple):
    """How a pool was filled after an event.

    Attributes
    ----------
    time : float
        What the clock of the log said.
    used : int
        Blocks that a sequence holds, or a copy that nobody had taken.
    shared : int
        Those of them that several sequences hold.
    cached_free : int
        Blocks that nobody holds, but that can be found.
    free : int
        The other blocks that nobody holds: ``used + cached_free + free`` is the pool.
    empty_slots : int
        Slots of used blocks without a token: internal fragmentation.
    """

    time: float
    used: int
    shared: int
    cached_free: int
    free: int
    empty_slots: int


class EventLog:
    """The events of a pool from now on, with the time of each.

    Its first entry is a `PoolState`, so it describes the pool without the pool. It grows until it
    is closed; in a ``with`` block, it is closed at the end.

    Parameters
    ----------
    pool : BlockPool
    clock : callable, optional
        Returns the time, or the number of the step. Left out, seconds of `time.perf_counter`.

    Attributes
    ----------
    entries : list of (float, event)

    Examples
    --------
    >>> pool = BlockPool(num_blocks=8, block_size=4)
    >>> with EventLog(pool) as log:
    ...     pool.sequence(range(10)).free()
    >>> [(now.used, now.cached_free, now.free) for now in log.occupancy()]
    [(0, 0, 8), (3, 0, 5), (3, 0, 5), (3, 0, 5), (0, 2, 6)]
    """

    def __init__(self, pool: BlockPool, *, clock: Callable[[], float] = time.perf_counter) -> None:
        if not isinstance(pool, BlockPool):
            raise BadParamTypeError("pool", "must be a BlockPool", shown(pool))
        if not callable(clock):
            raise BadParamTypeError("clock", "must be callable", shown(clock))
        self._clock = clock
        self._pool, self._told, self._now = pool, pool._num_told, clock()
        self.entries: list[tuple[float, Event]] = [(self._now, pool._state())]
        self._unsubscribe = pool.subscribe(self._note)

    def _note(self, event: Event) -> None:
        # A call of the pool may have several events. It takes no time between them.
        if self._told != self._pool._num_told:
            self._told, self._now = self._pool._num_told, self._clock()
        self.entries.append((self._now, event))

    def __len__(self) -> int:
        return len(self.entries)

    def close(self) -> None:
        """Take no more notes; what was noted stays."""
        self._unsubscribe()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def occupancy(self) -> list[Occupancy]:
        """Return how the pool was filled after each entry.

        All events of one call carry the same time; entries before the last show the pool part-way
        through it.
        For the columns, as plots need them, use ``zip(*log.occupancy())``.
        """
        replay = _Replay()
        filled = []
        for when, event in self.entries:
            replay.apply(event)
            filled.append(replay.occupancy(when))
        return filled


class _Replay:
    """A pool as its events describe it; each event costs what it changes."""

    def __init__(self) -> None:
        self.num_blocks = self.block_size = 0
        self.tables: dict[int, list[int]] = {}
        self.num_tokens: dict[int, int] = {}
        self.holders: dict[int, int] = {}  # sequences, and copies that nobody has taken
        self.sources: dict[int, int] = {}  # these copies alone
        self.filled: dict[int, int] = {}  # of blocks with holders: slots with a token
        self.found: set[int] = set()
        self.shared = self.cached_free = self.tokens = 0

    def occupancy(self, when: float) -> Occupancy:
        used = len(self.holders)
        free = self.num_blocks - used - self.cached_free
        empty = used * self.block_size - self.tokens
        return Occupancy(when, used, self.shared, self.cached_free, free, empty)

    def apply(self, event: Event) -> None:
        if isinstance(event, TokensAppended):
            self.append(event.sequence, event.num_tokens)
        elif isinstance(event, BlocksTaken):
            self.hold(event.sequence, event.blocks)
        elif isinstance(event, BlocksShared):
            self.hold(event.sequence, event.blocks)
            self.num_tokens[event.sequence] = event.num_tokens
        elif isinstance(event, BlocksReleased):
            del self.tables[event.sequence], self.num_tokens[event.sequence]
            for block in event.blocks:
                self.count(block, -1)
        elif isinstance(event, BlockStored):
            self.find(event.blocks)
        elif isinstance(event, BlockRemoved):
            self.lose(event.blocks)
        elif isinstance(event, BlockMoved):
            self.lose((event.source,))
            self.find((event.target,))
        elif isinstance(event, AllBlocksCleared):
            self.found.clear()
            self.cached_free = 0
        elif isinstance(event, BlockCopied):
            self.copy(event)
        elif isinstance(event, CopiesTaken | CopiesDropped):
            for source, _ in event.copies:
                self.count(source, -1, copies=-1)
        else:
            self.begin(event)

    def begin(self, state: PoolState) -> None:
        self.__init__()  # type: ignore[misc]
        self.num_blocks, self.block_size = state.num_blocks, state.block_size
        for source, _ in state.copies:
            self.count(source, 1, copies=1)
        for block, filled in state.parked:
            self.fill(block, filled)
        for number, (table, num_tokens) in state.sequences.items():
            self.hold(number, table)
            self.append(number, num_tokens)
        self.find(state.found)

    def hold(self, sequence: int, blocks: tuple[int, ...]) -> None:
        self.tables.setdefault(sequence, []).extend(blocks)
        for block in blocks:
            self.count(block, 1)
            if block in self.found:
                self.fill(block, self.block_size)

    def append(self, sequence: int, num_tokens: int) -> None:
        table, size = self.tables.setdefault(sequence, []), self.block_size
        for place in range(self.num_tokens.get(sequence, 0) // size, len(table)):
            self.fill(table[place], min(size, num_tokens - place * size))
        self.num_tokens[sequence] = num_tokens

    def copy(self, event: BlockCopied) -> None:
        table, size = self.tables[event.sequence], self.block_size
        self.count(event.source, 1, copies=1)
        self.count(event.last, -1)
        table[-1] = event.target
        self.count(event.target, 1)
        self.fill(event.target, self.num_tokens[event.sequence] - (len(table) - 1) * size)

    def fill(self, block: int, filled: int) -> None:
        self.tokens += filled - self.filled.get(block, 0)
        self.filled[block] = filled

    def count(self, block: int, change: int, copies: int = 0) -> None:
        """Let a block have more or fewer holders."""
        before = self.holders.get(block, 0)
        sequences = before - self.sources.get(block, 0)
        now = before + change
        self.shared += (sequences + change - copies > 1) - (sequences > 1)
        if copies:
            self.sources[block] = self.sources.get(block, 0) + copies
        if block in self.found:
            self.cached_free += (not now) - (not before)
        if now:
            self.holders[block] = now
            return
        del self.holders[block]
        self.tokens -= self.filled.pop(block, 0)
        self.sources.pop(block, None)

    def find(self, blocks: tuple[int, ...]) -> None:
        self.found.update(blocks)
        self.cached_free += sum(block not in self.holders for block in blocks)

    def lose(self, blocks: tuple[int, ...]) -> None:
        self.found.difference_update(blocks)
        self.cached_free -= sum(block not in self.holders for block in blocks)
