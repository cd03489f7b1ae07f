# SPDX-License-Identifier: Apache-2.0
"""Tensors as plain numbers: what they look like, where they are, whether two share memory."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pagedcache.dtypes import Dtype, as_dtype
from pagedcache.status import (
    BadParamTypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    shown,
)

Array = np.ndarray[Any, Any]

_LIMIT = 2**48  # elements; below this, every offset in bytes fits in 64 bits
_MAX_WORK = 10_000_000  # steps of NumPy's exact search for a shared byte: less than a second


@dataclass(frozen=True, slots=True, init=False)
class TensorDescriptor:
    """What a tensor looks like, without its data.

    Parameters
    ----------
    dtype : dtype-like
        Element type, as a NumPy dtype or a name such as ``"bfloat16"``.
    shape : sequence of int
        Length of each axis.
    strides : sequence of int, optional
        Step of each axis in elements, not bytes. The default is row-major order.
    device : str, optional
        Where the data will be, such as ``"cpu"`` or ``"cuda:0"``. By default, the device of the
        handle.

    Raises
    ------
    BadTensorDtypeError
        `dtype` is not a dtype.
    BadTensorShapeError
        `shape` is not a sequence of non-negative ints.
    BadTensorStridesError
        `strides` does not have one int for each axis.
    """

    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: str | None

    def __init__(
        self,
        dtype: object,
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        device: str | None = None,
    ) -> None:
        lengths = _ints(shape)
        if (
            lengths is None
            or not all(0 <= length < _LIMIT for length in lengths)
            or math.prod(lengths) >= _LIMIT
        ):
            rule = f"must be a sequence of non-negative ints for fewer than {_LIMIT} elements"
            raise BadTensorShapeError("shape", rule, shown(shape))
        steps = row_major(lengths) if strides is None else _ints(strides)
        if steps is None or len(steps) != len(lengths):
            rule = f"must be {len(lengths)} ints, one for each axis of shape {lengths}"
            raise BadTensorStridesError("strides", rule, shown(strides))
        spans = (
            max(length - 1, 0) * abs(step) for length, step in zip(lengths, steps, strict=True)
        )
        if not all(-_LIMIT < step < _LIMIT for step in steps) or sum(spans) >= _LIMIT:
            rule = f"must span fewer than {_LIMIT} elements"
            raise BadTensorStridesError("strides", rule, shown(strides))
        if device is not None and not isinstance(device, str):
            rule = "must be a string such as 'cuda:0'"
            raise BadParamTypeError("device", rule, shown(device))
        object.__setattr__(self, "dtype", as_dtype("dtype", dtype))
        object.__setattr__(self, "shape", lengths)
        object.__setattr__(self, "strides", steps)
        object.__setattr__(self, "device", device)


class Tensor(NamedTuple):
    """An array of any library, as operators and backends see it."""

    address: int
    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, as array libraries have them
    device: str
    writable: bool

    def describe(self, subject: str) -> TensorDescriptor:
        """Return the descriptor of this tensor, with strides in elements."""
        size = self.dtype.itemsize
        axes = list(zip(self.shape, self.strides, strict=True))
        if any(length > 1 and (step % size or abs(step) >= _LIMIT * size) for length, step in axes):
            rule = f"must have strides that are multiples of its item size, {size} bytes"
            raise BadTensorStridesError(subject, rule, f"{self.strides} bytes")
        # The stride of an axis of length 1 is never used, so it may be anything.
        steps = [step // size if length > 1 or abs(step) < _LIMIT else 0 for length, step in axes]
        try:
            return TensorDescriptor(self.dtype, self.shape, steps, self.device)
        except (BadTensorShapeError, BadTensorStridesError) as error:
            raise type(error)(f"the {error.subject} of {subject}", *error.args[1:]) from None


class Expected(NamedTuple):
    """What one array of an operator must look like at each call."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes; of an axis of length 1, any
    free: bool  # whether the first axis may have any length
    written: bool
    apart: bool  # whether it may share no memory with what is written
    in_place: str | None = None  # the array that it may be itself
    loose: bool = False  # whether the free axis may be shorter than the call has rows

    def with_rows(self, count: int) -> Expected:
        """Return the same with a length of `count` for the first axis if that is free."""
        return self._replace(shape=(count, *self.shape[1:])) if self.free else self

    def strides_like(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """Return strides in bytes of an array that looks like this, for however many rows."""
        return (self.strides[0], *strides[1:]) if self.free else strides

    def at(self, address: int) -> Array:
        """Return the memory at an address as an array of ints as wide as the elements."""
        bits = np.dtype(f"i{self.dtype.itemsize}")
        return view(address, bits, self.shape, self.strides)


def view(address: int, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Return the memory at `address` as an array; strides are in bytes.

    Nothing is read, so the memory may also belong to another device.
    """
    return np.asarray(_Memory(address, dtype, shape, strides))


def span(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> int:
    """Return the bytes from the first element to the end of the last; strides are not negative."""
    steps = zip(shape, strides, strict=True)
    return itemsize + sum((length - 1) * step for length, step in steps)


def overlap(one: Array, other: Array) -> bool:
    """Return whether two views share a byte; ``True`` also if finding out takes too long."""
    try:
        return np.shares_memory(one, other, max_work=_MAX_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(array: Array) -> bool:
    """Return whether two elements of a view share a byte; ``True`` also if in doubt."""
    # Two different elements differ first on some axis: there, one is at 0, the other at 1 or more.
    for axis in range(array.ndim):
        rest = array[(0,) * axis]
        if overlap(rest[:1], rest[1:]):
            return True
    return False


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class _Memory:
    """Memory with another owner, in the form that NumPy reads without a copy."""

    def __init__(
        self, address: int, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "typestr": dtype.str,
            "shape": shape,
            "strides": strides,
        }


def _ints(values: Sequence[int]) -> tuple[int, ...] | None:
    try:
        return tuple(operator.index(value) for value in values)
    except Exception:  # raised by whatever was given
        return None
