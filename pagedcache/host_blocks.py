# SPDX-License-Identifier: Apache-2.0
"""Blocks in host memory, and the copies between them and those of a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pagedcache.operators.blocks.descriptor import BlockDescriptor
from pagedcache.status import PoolExhaustedError

if TYPE_CHECKING:
    from pagedcache.arrays.memory import Memory

SLAB = 1 << 26  # bytes that are allocated at a time


class HostBlock(NamedTuple):
    """The number of a slab, and that of a block in it."""

    slab: int
    block: int


class _Slab(NamedTuple):
    blocks: Any
    to_host: BlockDescriptor
    to_device: BlockDescriptor


class HostBlocks:
    """Blocks in pinned host memory, which is allocated a slab at a time, and kept.

    A block that is given back may still be read by a copy that is queued. Who gets it next writes
    to it later in the same order.

    Parameters
    ----------
    memory : Memory
    blocks : array
        ``[num_blocks, block_bytes]``, those of the device.
    limit : int or None
        How many there may be in use.

    Attributes
    ----------
    used : int
    """

    def __init__(self, memory: Memory, blocks: Any, limit: int | None) -> None:
        self._memory, self._blocks, self._limit = memory, blocks, limit
        in_slab = max(SLAB // int(blocks.shape[1]), 1)
        self._in_slab = in_slab if limit is None else min(in_slab, limit)
        self._slabs: list[_Slab] = []
        self._free: list[HostBlock] = []
        self.used = 0

    def take(self, count: int) -> list[HostBlock]:
        """Return free blocks.

        Raises
        ------
        PoolExhaustedError
            There would be more than the limit. Nothing was changed.
        """
        if self._limit is not None and self.used + count > self._limit:
            raise PoolExhaustedError(
                "the sequence",
                count,
                self._limit - self.used,
                self._limit,
                "in host memory",
                "make the cache with more host_blocks",
            )
        while len(self._free) < count:
            self._add_slab()
        first = len(self._free) - count
        taken = self._free[first:]
        del self._free[first:]
        self.used += count
        return taken

    def _add_slab(self) -> None:
        size, number = self._in_slab, len(self._slabs)
        blocks = self._memory.pinned((size, int(self._blocks.shape[1])))
        create = BlockDescriptor.create
        self._slabs.append(
            _Slab(blocks, create([self._blocks], [blocks]), create([blocks], [self._blocks]))
        )
        self._free += [HostBlock(number, block) for block in reversed(range(size))]

    def give_back(self, blocks: list[HostBlock]) -> None:
        """Free blocks."""
        self.used -= len(blocks)
        self._free += reversed(blocks)

    def copy(self, table: list[int], host: list[HostBlock], *, to_host: bool, stream: Any) -> None:
        """Queue copies between blocks of the device and of the host."""
        pairs: dict[int, list[tuple[int, int]]] = {}
        for block, (number, there) in zip(table, host, strict=True):
            pair = (block, there) if to_host else (there, block)
            pairs.setdefault(number, []).append(pair)
        for number, of_slab in pairs.items():
            slab = self._slabs[number]
            (slab.to_host if to_host else slab.to_device).copy(of_slab, stream=stream)
