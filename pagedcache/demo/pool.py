# SPDX-License-Identifier: Apache-2.0
"""A pool of KV-cache blocks: who holds each block, and which slot each token gets. Plain NumPy.

The terms are vLLM's: a *block* holds ``block_size`` tokens; a sequence's *block table* lists its
blocks in the order of its tokens; the *slot* of token ``t`` is
``block_table[t // block_size] * block_size + t % block_size``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]

PADDING = -1


@dataclass
class Sequence:
    """One sequence in the cache.

    Attributes
    ----------
    name : str
    length : int
        Tokens that have a slot.
    block_table : list of int
    shared : int
        Number of blocks at the front of the table that another sequence wrote.
    """

    name: str
    length: int = 0
    block_table: list[int] = field(default_factory=list)
    shared: int = 0


class Pool:
    """Hands out blocks in random order, like a server that has been running for a while.

    Parameters
    ----------
    num_blocks, block_size : int
    taken : int
        Number of blocks that others hold.
    rng : numpy.random.Generator
        Shuffles the free blocks.
    """

    def __init__(
        self, num_blocks: int, block_size: int, taken: int, rng: np.random.Generator
    ) -> None:
        order = rng.permutation(num_blocks).tolist()
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.taken = frozenset(order[:taken])
        self.sequences: list[Sequence] = []
        self._free = order[taken:]
        self._holders = dict.fromkeys(order, 0)

    @property
    def free(self) -> frozenset[int]:
        """The blocks that nobody holds."""
        return frozenset(self._free)

    def add(self, name: str, prefix_of: Sequence | None = None, prefix: int = 0) -> Sequence:
        """Add a sequence that shares the full blocks in the first `prefix` tokens of another.

        A partly filled block cannot be shared, because the sequences continue differently in it.
        """
        sequence = Sequence(name)
        if prefix_of is not None:
            sequence.shared = min(prefix, prefix_of.length) // self.block_size
            sequence.block_table = prefix_of.block_table[: sequence.shared]
            sequence.length = sequence.shared * self.block_size
            for block in sequence.block_table:
                self._holders[block] += 1
        self.sequences.append(sequence)
        return sequence

    def extend(self, sequence: Sequence, tokens: int) -> Slots:
        """Return the slots of the next `tokens` tokens of a sequence, taking free blocks as needed.

        Raises
        ------
        MemoryError
            The pool is exhausted; nothing was taken.
        """
        positions = np.arange(sequence.length, sequence.length + tokens)
        missing = -(-(sequence.length + tokens) // self.block_size) - len(sequence.block_table)
        if missing > len(self._free):
            raise MemoryError(f"{missing} blocks are needed, but only {len(self._free)} are free")
        for _ in range(missing):
            block = self._free.pop()
            self._holders[block] = 1
            sequence.block_table.append(block)
        sequence.length += tokens
        return self.slots(sequence, positions)

    def slots(self, sequence: Sequence, positions: NDArray[Any]) -> Slots:
        """Return the slots of the tokens at these positions of a sequence."""
        table = np.asarray(sequence.block_table, np.int64)
        slots: Slots = table[positions // self.block_size] * self.block_size
        slots += positions % self.block_size
        return slots

    def release(self, sequence: Sequence) -> None:
        """Free the blocks of a sequence, except those that other sequences still hold."""
        self.sequences.remove(sequence)
        for block in sequence.block_table:
            self._holders[block] -= 1
            if not self._holders[block]:
                self._free.append(block)

    def marks(self) -> list[str]:
        """Return a mark for each block that says who holds it.

        The name of a sequence; ``*`` if several sequences share the block; ``#`` if others hold it;
        ``.`` if it is free.
        """
        marks = ["."] * self.num_blocks
        for block in self.taken:
            marks[block] = "#"
        for sequence in self.sequences:
            for block in sequence.block_table:
                marks[block] = sequence.name if self._holders[block] == 1 else "*"
        return marks

    def picture(self) -> str:
        """Return `marks` in rows, each preceded by the number of its first block."""
        columns, gap = (32, " ") if self.num_blocks <= 256 else (80, "")
        marks = self.marks()
        rows = range(0, self.num_blocks, columns)
        return "\n".join(f"  {row:>4}  {gap.join(marks[row : row + columns])}" for row in rows)
