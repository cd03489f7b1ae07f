# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks in NumPy, the specification of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pagedcache.operators.blocks.pairs import FOLLOWS, OnDevice, in_order
from pagedcache.tensors import Array, Tensor, view

if TYPE_CHECKING:
    from pagedcache.backend.cpu import CpuDevice, CpuReport
    from pagedcache.operators.blocks.arrays import BlockArrays

AT_ONCE = 1 << 20
"""Bytes of a temporary, which NumPy needs to copy by index, so that it stays in a cache."""


class BlockCopy:
    """Copies on the calling thread, and is done when `copy` returns."""

    def __init__(self, table: BlockArrays, device: CpuDevice, report: CpuReport) -> None:
        self._within, self._num_blocks = table.within, table.in_target
        self._arrays = [(_bits(each.source), _bits(each.target)) for each in table.arrays]
        self._at_once = [max(AT_ONCE // each.block_bytes, 1) for each in table.arrays]

    def copy(self, pairs: Array | OnDevice, stream: int) -> None:
        """Copy the blocks of pairs that have been checked."""
        assert not isinstance(pairs, OnDevice)
        chained = False
        if self._within:
            pairs, chained = in_order(pairs, self._num_blocks)
        for (source, target), at_once in zip(self._arrays, self._at_once, strict=True):
            if chained:
                _copy_in_order(source, target, pairs)
                continue
            for first in range(0, len(pairs), at_once):
                part = pairs[first : first + at_once]
                target[part[:, 1]] = source[part[:, 0]]

    def zero(self, blocks: Array | OnDevice, stream: int) -> None:
        """Fill blocks that have been checked with zeros."""
        assert not isinstance(blocks, OnDevice)
        for _, target in self._arrays:
            target[blocks] = np.zeros((), target.dtype)


def _copy_in_order(source: Array, target: Array, pairs: Array) -> None:
    follows = pairs[:, 0] < 0
    begins = np.flatnonzero(~follows).tolist()
    blocks = np.where(follows, pairs[:, 0] - FOLLOWS, pairs[:, 0]).tolist()
    targets = pairs[:, 1].tolist()
    for begin, end in zip(begins, [*begins[1:], len(pairs)], strict=True):
        held = source[blocks[end - 1]].copy()
        for i in range(begin, end - 1):
            target[targets[i]] = source[blocks[i]]
        target[targets[end - 1]] = held


def _bits(tensor: Tensor) -> Array:
    """Return memory as an array of ints, or of bytes that NumPy does not interpret."""
    size = tensor.dtype.itemsize
    bits = np.dtype(f"u{size}" if size in (1, 2, 4, 8) else f"V{size}")
    return view(tensor.address, bits, tensor.shape, tensor.strides)
