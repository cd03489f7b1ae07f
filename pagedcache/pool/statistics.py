# SPDX-License-Identifier: Apache-2.0
"""What a pool counts."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcache.display import as_html, as_text


@dataclass(frozen=True, slots=True)
class PoolStatistics:
    """The state of a pool, and what has happened in it since it was made.

    Attributes
    ----------
    num_blocks, block_size : int
    num_used : int
        Blocks that a sequence holds, or a copy that nobody has taken.
    num_shared : int
        Blocks that several sequences hold.
    num_cached_free : int
        Blocks that nobody holds, but that can be found.
    num_free : int
        Blocks that nobody holds, those that can be found among them.
    num_empty_slots : int
        Slots of used blocks that have no token yet: internal fragmentation.
    num_sequences : int
        Sequences that are not freed.
    peak_used : int
        The most blocks that were ever used.
    sequences, forks : int
        How many sequences were made of tokens, and how many of other sequences.
    prompt_tokens : int
        Tokens of sequences when they were made, forks aside.
    found_tokens : int
        How many of these were found.
    evictions : int
        Blocks whose content could be found until their room was needed.
    copies : int
        Copies of blocks that were asked for.
    """

    num_blocks: int
    block_size: int
    num_used: int
    num_shared: int
    num_cached_free: int
    num_free: int
    num_empty_slots: int
    num_sequences: int
    peak_used: int
    sequences: int
    forks: int
    prompt_tokens: int
    found_tokens: int
    evictions: int
    copies: int

    @property
    def usage(self) -> float:
        """The share of blocks that are used, 0 to 1."""
        return self.num_used / self.num_blocks

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were found, 0 to 1; 0 without prompts."""
        return self.found_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def _rows(self) -> list[tuple[str, str]]:
        used = f"{self.num_used:,} of {self.num_blocks:,} ({self.usage:.1%})"
        return [
            ("used blocks", f"{used}, {self.num_shared:,} shared"),
            ("most so far", f"{self.peak_used:,}"),
            ("free blocks", f"{self.num_free:,}, of which {self.num_cached_free:,} can be found"),
            ("empty slots", f"{self.num_empty_slots:,} in used blocks of {self.block_size:,}"),
            ("sequences", f"{self.num_sequences:,}"),
            ("so far", f"{self.sequences:,} and {self.forks:,} forks"),
            ("prompt tokens", f"{self.prompt_tokens:,}"),
            ("found", f"{self.found_tokens:,} ({self.hit_rate:.1%})"),
            ("evictions", f"{self.evictions:,}"),
            ("copies", f"{self.copies:,}"),
        ]

    def __str__(self) -> str:
        return as_text(self._rows())

    def _repr_html_(self) -> str:
        return as_html(self._rows())
