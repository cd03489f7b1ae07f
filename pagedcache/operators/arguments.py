# SPDX-License-Identifier: Apache-2.0
"""The arguments of one call, checked in full against what an operation was created for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.arrays.addresses import check_address
from pagedcache.arrays.find import adopt, library_of
from pagedcache.rules import check_rows
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    CacheOverlapError,
    InsufficientWorkspaceError,
    NullPointerError,
    PagedCacheError,
    shown,
)
from pagedcache.tensors import Array, Expected, Tensor, overlap, span

if TYPE_CHECKING:
    from pagedcache.arrays.matching import Apart

MOST_APART = 1024
MOST_ROWS = 1 << 62


class Arguments:
    """What the arguments of each call must look like.

    Parameters
    ----------
    names : sequence of str
        The names of all arguments.
    expected : sequence of Expected or None
        What each array must look like, in the same order. ``None``: it must be ``None``.
    counted_by : str
        The array whose first axis has the number of rows.
    device : str
        Where the arrays must be.
    numbers : tuple of (str, type)
        Names and types of numbers that follow the arrays.

    Attributes
    ----------
    present : list of (int, Expected)
        Those that are given, and their places among the arguments.
    apart_pairs : list of (int, Expected, int, Expected)
        Pairs of them that must share no memory.
    apart : Apart
        Distances between two such at which they are known to share none, for so many rows.
    """

    def __init__(
        self,
        names: Sequence[str],
        expected: Sequence[Expected | None],
        counted_by: str,
        device: str,
        numbers: tuple[tuple[str, type], ...] = (),
    ) -> None:
        self.names = tuple(names)
        self.numbers = numbers
        self.expected = tuple(expected)
        self.counted_by = counted_by
        self.present = [(i, one) for i, one in enumerate(self.expected) if one is not None]
        self.apart_pairs = [
            (i, one, j, other)
            for (i, one), (j, other) in itertools.combinations(self.present, 2)
            if one.apart and other.apart and (one.written or other.written)
        ]
        self.apart: Apart = {}
        self._device = device

    def read(self, arrays: Sequence[Any]) -> tuple[Any, ...]:
        """Return the number of rows, the addresses and the numbers.

        Raises for arguments that do not fit.
        """
        given: Sequence[Any] = arrays[len(self.names) :]
        for (name, kind), value in zip(self.numbers, given, strict=True):
            if type(value) is not kind:
                raise _changed(BadParamTypeError, name, f"type {kind.__name__}", type(value))
            if type(value) is int and not -(1 << 63) <= value < 1 << 63:
                raise BadParamError(name, "must fit in 64 bits", shown(value))
        for name, one, array in zip(self.names, self.expected, arrays, strict=False):
            if one is None and array is not None:
                rule = "must be None, as when the descriptor was created"
                raise BadParamTypeError(name, rule, shown(array))
        tensors = {
            i: None if type(arrays[i]) is int else adopt(one.name, arrays[i])
            for i, one in self.present
        }
        rows = 0
        for i, one in self.present:
            tensor = tensors[i]
            if tensor is not None:
                self.check(one, tensor)
            if one.name == self.counted_by:
                rows = one.shape[0] if tensor is None else tensor.shape[0]
        addresses = [0] * len(self.names)
        for i, one in self.present:
            tensor, array = tensors[i], arrays[i]
            if tensor is not None and one.free and not one.loose:
                check_rows(one.name, tensor.shape[0], self.counted_by, rows)
            address = array if tensor is None else tensor.address
            if tensor.shape[0] if one.loose and tensor is not None else rows or not one.free:
                check_address(one.name, address, one.dtype.itemsize)
            addresses[i] = address
            if tensor is not None and one.written:
                check_writable(one.name, array, tensor)
        if rows:
            lengths = {
                i: tensor.shape[0]
                for i, one in self.present
                if one.loose and (tensor := tensors[i]) is not None
            }
            self._check_overlap(rows, lengths, addresses)
        return rows, *addresses, *given

    def check(self, one: Expected, tensor: Tensor) -> None:
        """Raise if an array is not like the one that the operation was created for."""
        name, shape = one.name, tensor.shape
        if one.free and (len(shape) != len(one.shape) or shape[1:] != one.shape[1:]):
            wanted = ", ".join(map(str, ("rows", *one.shape[1:])))
            wanted = f"({wanted})" if len(one.shape) > 1 else "(rows,)"
            raise _changed(BadTensorShapeError, name, f"shape {wanted}", shape)
        if not one.free and shape != one.shape:
            raise _changed(BadTensorShapeError, name, f"shape {one.shape}", shape)
        if tensor.dtype != one.dtype:
            raise _changed(BadTensorDtypeError, name, f"dtype {one.dtype}", tensor.dtype)
        axes = zip(shape, tensor.strides, one.strides, strict=True)
        if 0 not in shape and any(length > 1 and step != wanted for length, step, wanted in axes):
            raise _changed(
                BadTensorStridesError, name, f"strides {one.strides} in bytes", tensor.strides
            )
        if tensor.device != self._device:
            raise _changed(BadParamError, name, f"device {self._device}", tensor.device)

    def _check_overlap(
        self, rows: int, lengths: Mapping[int, int], addresses: Sequence[int]
    ) -> None:
        """Raise if arrays share memory that must not; `lengths` are those of loose ones."""
        for i, one, j, other in self.apart_pairs:
            at, other_at = addresses[i], addresses[j]
            if one.loose or other.loose:
                one = one.with_rows(lengths.get(i, rows))
                other = other.with_rows(lengths.get(j, rows))
                if 0 not in (*one.shape, *other.shape):
                    check_overlap(one, at, other, other_at)
                continue
            known = self.apart.setdefault((i, j), {})
            if rows > known.get(other_at - at, 0):
                check_overlap(one.with_rows(rows), at, other.with_rows(rows), other_at)
                if len(known) >= MOST_APART:
                    known.clear()
                known[other_at - at] = rows if one.free or other.free else MOST_ROWS

    def workspace(self, workspace: Any, size: int, needed: int) -> int:
        """Return the address of a workspace of at least `needed` bytes, 0 if there is none."""
        if not isinstance(size, (int, np.integer)):
            raise BadParamTypeError("workspace_size", "must be an int", shown(size))
        if workspace is not None and type(workspace) is not int:
            tensor = adopt("workspace", workspace)
            if tensor.device != self._device:
                raise _changed(BadParamError, "workspace", f"device {self._device}", tensor.device)
            workspace = tensor.address
        if size < needed:
            rule = f"must be at least {needed} bytes"
            raise InsufficientWorkspaceError("workspace_size", rule, size)
        if not workspace and needed:
            raise NullPointerError("workspace", "must be memory on the device", shown(workspace))
        return workspace or 0


def check_writable(name: str, array: Any, tensor: Tensor) -> None:
    """Raise if an array that would be written cannot or must not be.

    Raises
    ------
    BadParamError
        It is read-only.
    RequiresGradError
        Its library would have to record the write.
    """
    library_of(name, array).check_write(name, array)
    if not tensor.writable:
        raise BadParamError(name, "must be writable", "a read-only array")


def check_overlap(one: Expected, at: int, other: Expected, other_at: int) -> None:
    """Raise if two arrays that are written, at two addresses, share memory.

    Raises
    ------
    CacheOverlapError
    """
    distance = other_at - at
    sizes = [span(each.shape, each.strides, each.dtype.itemsize) for each in (one, other)]
    if -sizes[1] < distance < sizes[0]:
        views = one.at(at), other.at(other_at)
        if overlap(*views):
            rule = f"must not share memory with {one.name}"
            got = " and ".join(map(byte_range, reversed(views)))
            first, step = (one, distance) if distance >= 0 else (other, -distance)
            shared = first.shape[-1] * first.dtype.itemsize - step
            if shared > 0 and one.strides[:-1] == other.strides[:-1]:
                got += f": each row reaches {shared} bytes into one of the other"
            raise CacheOverlapError(other.name, rule, got)


def byte_range(array: Array) -> str:
    """Return the addresses of an array in words."""
    start, end = np.lib.array_utils.byte_bounds(array)
    return f"{start:#x} to {end:#x}"


def as_address(name: str, value: object) -> int:
    """Return an address as C has it: ``None`` is 0."""
    if value is None:
        return 0
    if not isinstance(value, int):
        raise BadParamTypeError(name, "must be an address, as an int", shown(value))
    return int(value)


def _changed(kind: type[PagedCacheError], name: str, wanted: str, got: object) -> PagedCacheError:
    return kind(name, f"must have {wanted}, as when the descriptor was created", got)
