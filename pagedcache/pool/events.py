# SPDX-License-Identifier: Apache-2.0
"""What happened to the blocks of a pool.

`BlockStored`, `BlockRemoved` and `AllBlocksCleared` have the names and the first fields of vLLM's
events, and say what can be found; routers need no others. The rest says who holds which block.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Literal, TypeAlias


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Full blocks can be found from now on.

    Attributes
    ----------
    block_hashes : tuple of bytes
        Their digests, each after the one before it.
    parent_block_hash : bytes or None
        The digest of the block before them.
    token_ids : array of int32
        Their tokens.
    block_size : int
    blocks : tuple of int
    sequence : int
        The number of the sequence that filled them.
    key : bytes
        The key of that sequence.
    """

    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None
    token_ids: array[int]
    block_size: int
    blocks: tuple[int, ...]
    sequence: int
    key: bytes


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Blocks cannot be found any more.

    Attributes
    ----------
    block_hashes : tuple of bytes
    blocks : tuple of int
    reason : {"evicted", "unwritten", "replaced"}
        Their room was needed; they were never written (``free(num_written=...)``); or newer blocks
        have their digests.
    """

    block_hashes: tuple[bytes, ...]
    blocks: tuple[int, ...]
    reason: Literal["evicted", "unwritten", "replaced"]


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """No block can be found any more (``reset_prefix_cache``)."""


@dataclass(frozen=True, slots=True)
class BlockMoved:
    """A content whose block was evicted is found in another block that had it too.

    Attributes
    ----------
    block_hash : bytes
    source, target : int
        The block that it was found in, and the one that it is found in now.
    """

    block_hash: bytes
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class BlocksTaken:
    """A sequence was given blocks that nobody held.

    Attributes
    ----------
    sequence : int
    blocks : tuple of int
        In the order of its block table.
    """

    sequence: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlocksShared:
    """A sequence begins with blocks that were there before it.

    Attributes
    ----------
    sequence : int
    blocks : tuple of int
    num_tokens : int
        Its tokens in them.
    reason : {"hit", "fork"}
    """

    sequence: int
    blocks: tuple[int, ...]
    num_tokens: int
    reason: Literal["hit", "fork"]


@dataclass(frozen=True, slots=True)
class TokensAppended:
    """A sequence has more tokens than before.

    Attributes
    ----------
    sequence : int
    num_tokens : int
        All of its tokens.
    """

    sequence: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class BlocksReleased:
    """A sequence was freed, and no longer holds its blocks.

    Attributes
    ----------
    sequence : int
    blocks : tuple of int
        Its block table.
    """

    sequence: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockCopied:
    """The last block of a sequence was shared, so it was given one of its own, to be a copy.

    Attributes
    ----------
    sequence : int
    last : int
        The block that it held, and releases.
    source : int
        The block to copy, which is held until the copy is taken. It is another one than `last` only
        if that one was still to be copied to.
    target : int
        The block that it holds now.
    """

    sequence: int
    last: int
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class CopiesTaken:
    """The caller took the copies, so their sources are no longer held for them.

    Attributes
    ----------
    copies : tuple of (int, int)
        Pairs of source and target.
    """

    copies: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class CopiesDropped:
    """Copies are not needed any more: their targets are free.

    Attributes
    ----------
    copies : tuple of (int, int)
        Pairs of source and target.
    """

    copies: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PoolState:
    """What a pool held when an `EventLog` began.

    Attributes
    ----------
    num_blocks, block_size : int
    sequences : dict
        For the number of each sequence, its blocks and its number of tokens.
    found : tuple of int
        The blocks that can be found.
    copies : tuple of (int, int)
        Pairs of source and target that nobody had taken.
    parked : tuple of (int, int)
        Blocks that are held for these copies alone, and how many tokens are in each.
    """

    num_blocks: int
    block_size: int
    sequences: dict[int, tuple[tuple[int, ...], int]]
    found: tuple[int, ...]
    copies: tuple[tuple[int, int], ...]
    parked: tuple[tuple[int, int], ...]


Event: TypeAlias = (
    BlockStored
    | BlockRemoved
    | AllBlocksCleared
    | BlockMoved
    | BlocksTaken
    | BlocksShared
    | TokensAppended
    | BlocksReleased
    | BlockCopied
    | CopiesTaken
    | CopiesDropped
    | PoolState
)
