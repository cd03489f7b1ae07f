# SPDX-License-Identifier: Apache-2.0
"""Tokens, and the blocks that hold their K and V."""

from __future__ import annotations

from array import array
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagedcache.pool.tokens import as_token, as_tokens
from pagedcache.status import FreedError, NotSupportedError, as_int

if TYPE_CHECKING:
    from pagedcache.pool.blocks import BlockPool
    from pagedcache.pool.prefixes import Link


_TOKENS = "the number of tokens, "  # for messages


class Sequence:
    """Tokens, and the blocks of a pool that hold their K and V.

    `BlockPool.sequence` and `fork` make them. In a ``with`` block, a sequence is freed at the end;
    if an exception ends it, nobody knows what was written, so only what was found is kept.

    Attributes
    ----------
    block_table : list of int
        Its blocks in the order of its tokens. It is the list that the pool works with: read it, and
        never change it. It grows, and its last entry changes where `append` takes a copy.
    pool : BlockPool
        The pool whose blocks it holds.
    number : int
        Counts the sequences of a pool, from 0.
    key : bytes
        What it was made with.
    num_cached_tokens : int
        How many tokens at its front were found: their K and V are in the cache already, and need
        not be computed. Of a fork, all that its original had.
    freed : bool
        Whether `free` was called.
    """

    __slots__ = (
        "_digest",
        "_epoch",
        "_hidden",
        "_link",
        "_room",
        "_shared",
        "_slot",
        "_tokens",
        "block_table",
        "freed",
        "key",
        "num_cached_tokens",
        "number",
        "pool",
    )

    def __init__(
        self, pool: BlockPool, number: int, tokens: array[int], block_table: list[int], key: bytes
    ) -> None:
        self.block_table = block_table
        self.number = number
        self.key = key
        self.num_cached_tokens = 0
        self.freed = False
        self.pool = pool
        self._tokens = tokens
        self._shared = pool._more_holders
        self._epoch = 0
        self._link: Link | None = None  # of its last full block, if blocks after it can be found
        self._digest = b""
        # Until it is published: the link, the digest, and how many blocks were found.
        self._hidden: tuple[Link, bytes, int] | None = None
        self._find_room()

    def _find_room(self) -> None:
        """Note how many slots of the last block are empty, and the first of them."""
        size, table = self.pool.block_size, self.block_table
        self._room = len(table) * size - len(self._tokens)
        self._slot = (table[-1] + 1) * size - self._room if table else 0

    @property
    def num_tokens(self) -> int:
        """How many tokens it has."""
        return len(self._tokens)

    @property
    def published(self) -> bool:
        """Whether others may find its full blocks: see `publish`."""
        return self._hidden is None

    @property
    def token_ids(self) -> array[int]:
        """A copy of its tokens, as int32."""
        return self._tokens[:]

    @property
    def block_hashes(self) -> tuple[bytes, ...]:
        """The digests of its full blocks; empty if its blocks cannot be found."""
        hashes, link = [], self._link
        while isinstance(link, tuple):
            hashes.append(link[0])
            link = link[2]
        return tuple(reversed(hashes))

    def append(self, token_ids: Any) -> array[int]:
        """Add tokens, and return the slots to write their K and V to.

        Where the last block is shared with a fork and would be written to, the sequence is given a
        block of its own first, and `BlockPool.take_copies` says what to copy into it.

        Parameters
        ----------
        token_ids : int or iterable of int
            One token, or several.

        Returns
        -------
        array of int64
            A slot for each of them. It has the buffer protocol, so NumPy takes it without a copy.

        Raises
        ------
        PoolExhaustedError
            There are too few free blocks. Nothing was changed.
        """
        if (
            self._room > 1
            and type(token_ids) is int
            and self.block_table[-1] not in self._shared
            and self.pool._news is None
        ):
            try:
                self._tokens.append(token_ids)
            except OverflowError:
                as_token(token_ids)  # says what is wrong
                raise
            slot = self._slot
            self._slot = slot + 1
            self._room -= 1
            return array("q", (slot,))
        pool = self.pool
        token = as_token(token_ids)
        tokens = as_tokens(token_ids) if token is None else array("i", (token,))
        start = len(self._tokens)
        if tokens:
            pool._append(self, tokens)
        return self.slots(start)

    def slots(self, start: int = 0, stop: int | None = None) -> array[int]:
        """Return the slots of tokens `start` to `stop`, or to the last one.

        Token ``t`` is in slot ``block_table[t // block_size] * block_size + t % block_size``.

        Returns
        -------
        array of int64
            It has the buffer protocol, so NumPy takes it without a copy.
        """
        size, num_tokens = self.pool.block_size, len(self._tokens)
        start = as_int("start", start, 0, num_tokens, _TOKENS)
        stop = num_tokens if stop is None else as_int("stop", stop, start, num_tokens, _TOKENS)
        first = start // size
        if stop <= (first + 1) * size:  # in one block
            if start == stop:
                return array("q")
            base = (self.block_table[first] - first) * size
            return array("q", range(base + start, base + stop))
        blocks = self.block_table[first : (stop - 1) // size + 1]
        slots = array(
            "q", [*chain.from_iterable([range(b * size, b * size + size) for b in blocks])]
        )
        return slots[start - first * size : stop - first * size]

    def fork(self) -> Sequence:
        """Return a sequence with the same tokens, which shares all blocks.

        Both may append: see `append`. What is written after a copy is not in the copy, so a token
        that was not written by then must be written by both sequences.
        """
        return self.pool._fork(self)

    def publish(self) -> None:
        """Let others find the full blocks, also those that `append` will fill.

        For a sequence that was made with ``publish=False``; to others it does nothing. Nor does it
        after a reset of the pool, or if what it has found was forgotten: nobody finds it then.
        """
        self.pool._show(self)

    def free(self, *, num_written: int | None = None) -> None:
        """Give the blocks back. The sequence cannot be used afterwards.

        Full blocks are kept for sequences that begin with the same tokens, until their room is
        needed.

        Parameters
        ----------
        num_written : int, optional
            How many tokens, from the front and including those that were found, have their K and V
            in the cache. Say so if not all have, because a computation was given up: blocks with
            tokens at or past it are forgotten. Sequences that found such a block meanwhile read
            what was never written, so give them up too.
        """
        pool = self.pool
        if num_written is not None:
            num_written = as_int("num_written", num_written, 0, len(self._tokens), _TOKENS)
        try:
            pool._free_sequence(self, num_written)
        finally:  # a subscriber may be interrupted
            self.freed = True
            self._room = 0
            del self.block_table, self._tokens, self.pool, self._shared, self._link, self._hidden
            self.__class__ = _FreedSequence

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.freed:
            self.free(num_written=None if error_type is None else self.num_cached_tokens)

    def __reduce__(self) -> str:
        # Two objects that free the same blocks would corrupt the pool.
        raise NotSupportedError("a Sequence", "cannot be copied or pickled; use fork to share it")

    def __repr__(self) -> str:
        tokens = "token" if self.num_tokens == 1 else "tokens"
        blocks = ", ".join(map(str, self.block_table[:8]))
        more = ", ..." if len(self.block_table) > 8 else ""
        return (
            f"<Sequence {self.number}: {self.num_tokens} {tokens}, {self.num_cached_tokens} found, "
            f"in blocks [{blocks}{more}]>"
        )


class _FreedSequence(Sequence):
    """What a sequence becomes when it is freed.

    A class of its own, so that a live sequence need not check at each step: attributes of a class
    that has ``__getattr__`` are slow to read, even those that are there.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<Sequence {self.number}, freed>"

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in Sequence.__slots__:
                raise FreedError(
                    f"sequence {self.number}",
                    "was freed and cannot be used any more; make a new one with BlockPool.sequence",
                )
            raise AttributeError(f"'Sequence' object has no attribute {name!r}")
