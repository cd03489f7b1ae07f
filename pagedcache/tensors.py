"""Tensors without an array library: what one looks like, where it is, whether two share memory."""

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

_FAR = 2**48  # elements; with less than this no offset in bytes leaves 64 bits
_MOST_WORK = 10_000  # of NumPy's exact search for a shared byte: some milliseconds


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
        Step of each axis in elements, not bytes. Row-major if not given.
    device : str, optional
        Where the data will be: ``"cpu"``, ``"cuda:0"``. Not given: wherever the handle is.

    Raises
    ------
    BadTensorDtypeError
        `dtype` names no dtype.
    BadTensorShapeError
        `shape` is not a sequence of ints that are 0 or more.
    BadTensorStridesError
        `strides` is not one int for each axis.
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
            or not all(0 <= length < _FAR for length in lengths)
            or math.prod(lengths) >= _FAR
        ):
            rule = f"must be ints of 0 or more, for fewer than {_FAR} elements"
            raise BadTensorShapeError("shape", rule, shown(shape))
        steps = row_major(lengths) if strides is None else _ints(strides)
        if steps is None or len(steps) != len(lengths):
            rule = f"must be {len(lengths)} ints, one for each axis of shape {lengths}"
            raise BadTensorStridesError("strides", rule, shown(strides))
        spans = (
            max(length - 1, 0) * abs(step) for length, step in zip(lengths, steps, strict=True)
        )
        if not all(-_FAR < step < _FAR for step in steps) or sum(spans) >= _FAR:
            rule = f"must be below {_FAR} and span less than that"
            raise BadTensorStridesError("strides", rule, shown(strides))
        if device is not None and not isinstance(device, str):
            raise BadParamTypeError("device", "must be a str such as 'cuda:0'", shown(device))
        object.__setattr__(self, "dtype", as_dtype("dtype", dtype))
        object.__setattr__(self, "shape", lengths)
        object.__setattr__(self, "strides", steps)
        object.__setattr__(self, "device", device)


class Tensor(NamedTuple):
    """An array of any library, as the backends see it."""

    address: int
    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, as every array library has them
    device: str
    writable: bool

    def describe(self, subject: str) -> TensorDescriptor:
        """Return the descriptor of this tensor; its strides become elements."""
        size = self.dtype.itemsize
        axes = list(zip(self.shape, self.strides, strict=True))
        if any(length > 1 and (step % size or abs(step) >= _FAR * size) for length, step in axes):
            rule = f"must have strides that are multiples of its item size ({size} bytes), below "
            rule += f"{_FAR} items"
            raise BadTensorStridesError(subject, rule, f"{self.strides} bytes")
        # That of an axis of one element may be anything: it is never taken.
        steps = [step // size if length > 1 or abs(step) < _FAR else 0 for length, step in axes]
        try:
            return TensorDescriptor(self.dtype, self.shape, steps, self.device)
        except (BadTensorShapeError, BadTensorStridesError) as error:
            raise type(error)(f"{error.subject} of {subject}", *error.args[1:]) from None


def view(address: int, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Return the memory at `address` as an array; strides are in bytes.

    Nothing is read, so the memory may also be one that only another device can.
    """
    return np.asarray(_Memory(address, dtype, shape, strides))


def overlap(one: Array, other: Array) -> bool:
    """Tell whether two views share a byte. Views too intricate to tell count as if they did."""
    try:
        return np.shares_memory(one, other, max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def overlaps_itself(array: Array) -> bool:
    """Tell whether two elements of a view share a byte, with the same caution."""
    # Two elements differ first on some axis: there, one is at 0 and the other at 1 or more.
    for axis in range(array.ndim):
        rest = array[(0,) * axis]
        if overlap(rest[:1], rest[1:]):
            return True
    return False


class _Memory:
    """Memory that somebody else owns, in the form that NumPy reads without a copy."""

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


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides, in elements, of a contiguous tensor of this shape."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _ints(values: Sequence[int]) -> tuple[int, ...] | None:
    try:
        return tuple(operator.index(value) for value in values)
    except Exception:  # of whatever it is that was given
        return None
