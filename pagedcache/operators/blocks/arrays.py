# SPDX-License-Identifier: Apache-2.0
"""Arrays with blocks on their first axis, checked once, as a table of what a block is made of."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedcache.arrays.find import adopt
from pagedcache.operators.arguments import byte_range, check_writable
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    CacheOverlapError,
    NullPointerError,
    SourceOverlapError,
    shown,
)
from pagedcache.tensors import Array, Tensor, overlap, overlaps_itself, view

WIDTHS = (16, 8, 4, 2, 1)


@dataclass(frozen=True, slots=True)
class BlockArray:
    """One array, and the one that its blocks are copied to. All sizes are in bytes.

    Attributes
    ----------
    source, target : Tensor
    row : int
        Length of what is contiguous in a block of both.
    axes : tuple of (int, int, int)
        Along which there are such rows in a block: length, step in the source, step in the target;
        the innermost last.
    """

    source: Tensor
    target: Tensor
    row: int
    axes: tuple[tuple[int, int, int], ...]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, without gaps."""
        return self.row * math.prod(length for length, _, _ in self.axes)

    @property
    def contiguous(self) -> bool:
        """Whether neighbouring blocks are one contiguous run, in both."""
        steps = {self.source.strides[0], self.target.strides[0]}
        return not self.axes and steps == {self.row}

    @property
    def width(self) -> int:
        """Bytes of the widest access that all addresses allow."""
        sizes = [self.row, self.source.address, self.target.address]
        sizes += [self.source.strides[0], self.target.strides[0]]
        sizes += [step for _, *steps in self.axes for step in steps]
        return next(width for width in WIDTHS if not any(size % width for size in sizes))


@dataclass(frozen=True, slots=True)
class BlockArrays:
    """All arrays of a copy.

    Attributes
    ----------
    arrays : tuple of BlockArray
    source_device, target_device : str
    in_source, in_target : int
        Blocks.
    within : bool
        Whether sources and targets are the same memory.
    """

    arrays: tuple[BlockArray, ...]
    source_device: str
    target_device: str
    in_source: int
    in_target: int
    within: bool

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all arrays."""
        return sum(array.block_bytes for array in self.arrays)


def read_arrays(name: str, arrays: Any) -> list[Tensor]:
    """Return a list of arrays as tensors, all on one device and with as many blocks.

    Raises
    ------
    PagedCacheError
        The message names the array.
    """
    if not isinstance(arrays, (list, tuple)):
        rule = "must be a list of arrays with blocks on their first axis"
        raise BadParamTypeError(name, rule, shown(type(arrays).__name__, str))
    if not arrays:
        raise BadParamError(name, "must have at least one array", "none")
    tensors = [adopt(f"{name}[{i}]", array) for i, array in enumerate(arrays)]
    first = tensors[0]
    for i, tensor in enumerate(tensors):
        subject = f"{name}[{i}]"
        if len(tensor.shape) < 2 or 0 in tensor.shape[1:]:
            rule = "must have an axis of blocks, and at least one element in a block"
            raise BadTensorShapeError(subject, rule, f"shape {tensor.shape}")
        if tensor.dtype.hasobject:
            rule = "must have elements that are bytes, and not Python objects"
            raise BadTensorDtypeError(subject, rule, tensor.dtype)
        if tensor.shape[0] != first.shape[0]:
            rule = f"must have as many blocks as {name}[0], {first.shape[0]}"
            raise BadTensorShapeError(subject, rule, f"shape {tensor.shape}")
        if tensor.device != first.device:
            raise BadParamError(subject, f"must be on {first.device} like {name}[0]", tensor.device)
        if tensor.shape[0] and not tensor.address:
            raise NullPointerError(subject, "must have data", "address 0")
    if not 0 < first.shape[0] < 1 << 31:
        rule = f"must have from 1 to {(1 << 31) - 1} blocks"
        raise BadTensorShapeError(f"{name}[0]", rule, f"shape {first.shape}")
    return tensors


def make_arrays(
    sources: Any, targets: Any, names: tuple[str, str] = ("sources", "targets")
) -> BlockArrays:
    """Check two lists of arrays, which errors call by these names, against each other.

    Raises
    ------
    PagedCacheError
        The message names the array, what it must be and what it was.
    """
    from_tensors, to_tensors = (
        read_arrays(name, arrays) for name, arrays in zip(names, (sources, targets), strict=True)
    )
    one, other = names
    if len(from_tensors) != len(to_tensors):
        rule = f"must have as many arrays as {one}, {len(from_tensors)}"
        raise BadParamError(other, rule, f"{len(to_tensors)} arrays")
    made = []
    for i, (source, target) in enumerate(zip(from_tensors, to_tensors, strict=True)):
        if source.shape[1:] != target.shape[1:]:
            rule = f"must have blocks of the shape of {one}[{i}], {source.shape[1:]}"
            raise BadTensorShapeError(f"{other}[{i}]", rule, f"shape {target.shape}")
        if source.dtype != target.dtype:
            rule = f"must have the dtype of {one}[{i}], {source.dtype}"
            raise BadTensorDtypeError(f"{other}[{i}]", rule, target.dtype)
        made.append(_block_array(source, target))
    same = [
        source.address == target.address and source.strides == target.strides
        for source, target in zip(from_tensors, to_tensors, strict=True)
    ]
    within = all(same) and from_tensors[0].shape[0] == to_tensors[0].shape[0]
    for i, (array, tensor) in enumerate(zip(targets, to_tensors, strict=True)):
        check_writable(f"{other}[{i}]", array, tensor)
    _check_memory(from_tensors, to_tensors, names, within=within)
    return BlockArrays(
        tuple(made),
        from_tensors[0].device,
        to_tensors[0].device,
        from_tensors[0].shape[0],
        to_tensors[0].shape[0],
        within,
    )


def _block_array(source: Tensor, target: Tensor) -> BlockArray:
    """Merge the axes of a block as far as both arrays allow."""
    size = source.dtype.itemsize
    axes = [
        axis
        for axis in zip(source.shape[1:], source.strides[1:], target.strides[1:], strict=True)
        if axis[0] > 1
    ]
    axes.sort(key=lambda axis: (abs(axis[2]), abs(axis[1])), reverse=True)
    merged: list[tuple[int, int, int]] = []
    for length, step, to_step in axes:
        if merged and merged[-1][1:] == (length * step, length * to_step):
            merged[-1] = merged[-1][0] * length, step, to_step
        else:
            merged.append((length, step, to_step))
    row = size
    if merged and merged[-1][1:] == (size, size):
        row *= merged.pop()[0]
    return BlockArray(source, target, row, tuple(merged))


def _check_memory(
    sources: Sequence[Tensor], targets: Sequence[Tensor], names: tuple[str, str], *, within: bool
) -> None:
    """Raise if blocks that are written share memory with others, or with what is read."""
    views = [(f"{names[1]}[{i}]", _memory(tensor)) for i, tensor in enumerate(targets)]
    for subject, there in views:
        if overlaps_itself(there):
            rule = "must not overlap itself, but two of its elements share memory"
            raise BadTensorStridesError(subject, rule, f"strides {there.strides} in bytes")
    for (one, there), (other, beside) in _near(views, views):
        if overlap(there, beside):
            rule = f"must not share memory with {one}"
            got = f"{byte_range(beside)} and {byte_range(there)}"
            raise CacheOverlapError(other, rule, got)
    if within or sources[0].device != targets[0].device:
        return
    read = [(f"{names[0]}[{i}]", _memory(tensor)) for i, tensor in enumerate(sources)]
    for (one, there), (other, beside) in _near(read, views):
        if overlap(there, beside):
            rule = (
                f"must not share memory with {other}, unless all targets are the sources themselves"
            )
            raise SourceOverlapError(one, rule, f"{byte_range(there)} and {byte_range(beside)}")


def _near(
    ones: list[tuple[str, Array]], others: list[tuple[str, Array]]
) -> list[tuple[tuple[str, Array], tuple[str, Array]]]:
    """Return the pairs whose ranges of addresses meet. Whole caches rarely do."""
    bounds = np.lib.array_utils.byte_bounds
    ranges = [bounds(there) for _, there in ones], [bounds(there) for _, there in others]
    return [
        (ones[i], others[j])
        for (i, (start, end)), (j, (low, high)) in itertools.product(
            enumerate(ranges[0]), enumerate(ranges[1])
        )
        if start < high and low < end and not (ones is others and i >= j)
    ]


def _memory(tensor: Tensor) -> Array:
    bits = np.dtype(f"V{tensor.dtype.itemsize}")
    return view(tensor.address, bits, tensor.shape, tensor.strides)
