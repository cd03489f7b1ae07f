# SPDX-License-Identifier: Apache-2.0
"""Which block goes where: lists of pairs, read, checked, and put into an order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagedcache.arrays.find import adopt
from pagedcache.dtypes import I32, I64
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    DuplicateBlockError,
    InvalidBlockError,
    shown,
)
from pagedcache.tensors import Array, Tensor, view

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Invalid

FOLLOWS = -(1 << 31)
"""Marks a pair that depends on the one before it in the list, in the sign of its source."""


SOURCE, TARGET, FILLED = range(3)
"""What a block that does not exist was to be."""


class OnDevice(NamedTuple):
    """A list in the memory of a device, which cannot be checked here."""

    tensor: Tensor


def read_blocks(name: str, blocks: Any, columns: int) -> Array | OnDevice:
    """Return a list of blocks or of pairs, ``[n]`` or ``[n, 2]``, int64 if it is on the host.

    Raises
    ------
    PagedCacheError
        It is not a list of ints of that shape.
    """
    what = "a list of (source, target) pairs of ints" if columns == 2 else "a list of ints"
    shape = "[n, 2]" if columns == 2 else "[n]"
    if isinstance(blocks, (list, tuple, range)):
        try:
            found = np.array(blocks)
        except (ValueError, TypeError, OverflowError):
            found = np.array(None)
        if not len(blocks):
            found = np.empty((0, columns) if columns == 2 else 0, np.int64)
        if found.dtype.kind not in "iu":
            raise BadParamTypeError(name, f"must be {what}, or an array {shape}", shown(blocks))
    else:
        tensor = adopt(name, blocks)
        if tensor.device != "cpu":
            return _on_device(name, tensor, columns, shape)
        if tensor.dtype.kind not in "iu":
            raise BadTensorDtypeError(name, "must be ints", tensor.dtype)
        if 0 in tensor.shape:
            found = np.empty(tensor.shape, tensor.dtype)
        else:
            found = view(tensor.address, tensor.dtype, tensor.shape, tensor.strides)
    if found.ndim != columns or (columns == 2 and found.shape[1] != 2):
        raise BadTensorShapeError(name, f"must have shape {shape}", f"shape {found.shape}")
    return found.astype(np.int64)


def _on_device(name: str, tensor: Tensor, columns: int, shape: str) -> OnDevice:
    if tensor.dtype not in (I32, I64):
        raise BadTensorDtypeError(name, "must be int64 or int32 on a GPU", tensor.dtype)
    if len(tensor.shape) != columns or (columns == 2 and tensor.shape[1] != 2):
        raise BadTensorShapeError(name, f"must have shape {shape}", f"shape {tensor.shape}")
    size = tensor.dtype.itemsize
    steps = (2 * size, size) if columns == 2 else (size,)
    axes = zip(tensor.shape, tensor.strides, steps, strict=True)
    if any(length > 1 and step != wanted for length, step, wanted in axes):
        raise BadTensorStridesError(name, "must be contiguous on a GPU", f"{tensor.strides} bytes")
    return OnDevice(tensor)


def check_pairs(pairs: Array, in_source: int, in_target: int) -> None:
    """Raise if pairs on the host name a block that does not exist, or a target twice.

    Raises
    ------
    InvalidBlockError, DuplicateBlockError
    """
    if not len(pairs):
        return
    for column, (side, count) in enumerate((("source", in_source), ("target", in_target))):
        _check_range("pairs", side, pairs[:, column], count)
    targets = pairs[:, 1]
    marks = np.zeros(in_target, np.bool_)
    marks[targets] = True
    if np.count_nonzero(marks) != len(pairs):
        found, times = np.unique(targets, return_counts=True)
        block = found[times > 1][0]
        first, second = np.flatnonzero(targets == block)[:2].tolist()
        raise DuplicateBlockError(
            "pairs",
            "must not have one target twice, since either could be what ends up there",
            f"block {int(block)} in pairs {first} and {second}",
        )


def check_blocks(blocks: Array, count: int) -> None:
    """Raise if a list on the host names a block that does not exist.

    Raises
    ------
    InvalidBlockError
    """
    if len(blocks):
        _check_range("blocks", "", blocks, count)


def _check_range(name: str, side: str, blocks: Array, count: int) -> None:
    if blocks.min() < 0 or blocks.max() >= count:
        [bad] = np.nonzero((blocks < 0) | (blocks >= count))
        raise InvalidBlockError(name, side, int(bad[0]), int(blocks[bad[0]]), count, bad.size)


def in_order(pairs: Array, num_blocks: int) -> tuple[Array, bool]:
    """Return pairs within one list of arrays in an order in which they can be done one by one.

    Parameters
    ----------
    pairs : numpy.ndarray
        ``[n, 2]``, no target twice.
    num_blocks : int
        Blocks are numbered below this.

    Returns
    -------
    numpy.ndarray
        ``[m, 2]``, int64. Those that depend on each other are neighbours, each but the first of
        them with `FOLLOWS` in its source, and a block is read before it is overwritten, if the
        source of the last of them is read before the first of them is done. Pairs of a block with
        itself are left out.
    bool
        Whether any depend on each other.
    """
    marks = np.zeros(num_blocks, np.bool_)
    marks[pairs[:, 1]] = True
    if not marks[pairs[:, 0]].any():
        return pairs, False
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    sources, targets = pairs[:, 0].tolist(), pairs[:, 1].tolist()
    writer = {target: i for i, target in enumerate(targets)}
    readers: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        if source in writer:
            readers.setdefault(writer[source], []).append(i)
    order: list[int] = []
    begins: set[int] = set()
    done = [False] * len(sources)

    def do_all_before(root: int) -> None:
        """Append what must be done before `root`, and then `root`."""
        found, waiting = [], [root]
        done[root] = True
        while waiting:
            i = waiting.pop()
            found.append(i)
            for reader in readers.get(i, ()):
                if not done[reader]:
                    done[reader] = True
                    waiting.append(reader)
        found.reverse()
        begins.add(found[0])
        order.extend(found)

    for i, source in enumerate(sources):
        if source not in writer:
            do_all_before(i)
    for i in range(len(sources)):  # what is left are cycles, with what depends on them
        if not done[i]:
            seen = set()
            while i not in seen:
                seen.add(i)
                i = writer[sources[i]]
            do_all_before(i)
    ordered = pairs[order]
    follows = np.array([i not in begins for i in order], np.bool_)
    ordered[follows, 0] += FOLLOWS
    return ordered, bool(follows.any())


def invalid_on_device(found: Invalid, in_source: int, in_target: int, where: str) -> BadParamError:
    """Return the error for what a kernel has told of lists on a device (``enum Told``)."""
    if found.value < 0:
        again = (
            f"block {-1 - found.value} again in pair {found.row} ({found.count} invalid {where})"
        )
        return DuplicateBlockError("pairs", "must not have one target twice", again)
    block, told = found.value >> 2, found.value & 3
    name = "blocks" if told == FILLED else "pairs"
    side = ("source", "target", "")[told]
    num_blocks = in_source if told == SOURCE else in_target
    return InvalidBlockError(name, side, found.row, block, num_blocks, found.count, where)
