"""The one place that decides how a caller's object becomes an address with a shape.

Everything behind it sees a `Tensor` or a `TensorDescriptor` and never an array library.
"""

from __future__ import annotations

import functools
import math
import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from pagedcache.dtypes import Dtype, as_dtype
from pagedcache.status import (
    BadParamTypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    NullPointerError,
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
        if lengths is None or not all(0 <= length < _FAR for length in lengths):
            rule = f"must be ints of 0 or more and below {_FAR}"
            raise BadTensorShapeError("shape", rule, repr(shape))
        steps = row_major(lengths) if strides is None else _ints(strides)
        if steps is None or len(steps) != len(lengths):
            rule = f"must be {len(lengths)} ints, one for each axis of shape {lengths}"
            raise BadTensorStridesError("strides", rule, repr(strides))
        if not all(-_FAR < step < _FAR for step in steps):
            raise BadTensorStridesError("strides", f"must be below {_FAR}", repr(strides))
        if device is not None and not isinstance(device, str):
            raise BadParamTypeError("device", "must be a str such as 'cuda:0'", repr(device))
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
        if any(step % size for step in self.strides):
            rule = f"must have strides that are multiples of its item size ({size} bytes)"
            raise BadTensorStridesError(subject, rule, f"{self.strides} bytes")
        steps = tuple(step // size for step in self.strides)
        return TensorDescriptor(self.dtype, self.shape, steps, self.device)


class Reader(NamedTuple):
    """How the arrays of one library are read.

    Attributes
    ----------
    look : callable
        From an array to a tuple of all that a `Tensor` holds but the address, the shape first.
        Arrays of this library that look the same are the same to every check. Meant to be cheap,
        since it is called for each array at each call: about 0.3 us.
    address : callable
        From an array to its address. Fails on the arrays of other libraries.
    read : callable
        From an array to a `Tensor`.
    """

    look: Callable[[Any], tuple[Any, ...]]
    address: Callable[[Any], int]
    read: Callable[[Any], Tensor]


def adopt(subject: str, array: object) -> Tensor:
    """Read address, dtype, shape, strides and device of an array, without a copy.

    Parameters
    ----------
    subject : str
        The argument to name in an error.
    array : numpy.ndarray or cupy.ndarray

    Returns
    -------
    Tensor

    Raises
    ------
    NullPointerError
        `array` is ``None``.
    BadParamTypeError
        `array` is not an array.
    """
    reader = readers.get(type(array)) or _find_reader(subject, array)
    return reader.read(array)


def view(address: int, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Return the memory at `address` as an array; strides are in bytes.

    Nothing is read, so the memory may also be one that only another device can.
    """
    return np.asarray(_Memory(address, dtype, shape, strides))


def overlap(one: Array, other: Array) -> bool:
    """Tell whether two views share a byte. Views too intricate to tell share none."""
    try:
        return np.shares_memory(one, other, max_work=_MOST_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return False


def overlaps_itself(array: Array) -> bool:
    """Tell whether two elements of a view share a byte. One too intricate to tell has none."""
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
    except TypeError:
        return None


@functools.cache
def _cupy_reader(cupy: Any) -> Reader:
    look = ["shape", "strides", "dtype"]
    if cupy.cuda.runtime.getDeviceCount() > 1:
        look.append("data.device_id")
    return Reader(operator.attrgetter(*look), operator.attrgetter("data.ptr"), _read_cupy)


def _read_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    return Tensor(
        array.ctypes.data, array.dtype, array.shape, array.strides, "cpu", array.flags.writeable
    )


def _read_cupy(array: Any) -> Tensor:
    memory = array.data
    device = f"cuda:{memory.device_id}"
    return Tensor(memory.ptr, array.dtype, array.shape, array.strides, device, writable=True)


# attrgetter takes all of them in one call, which is what makes a look cheap.
_NUMPY = Reader(
    operator.attrgetter("shape", "strides", "dtype", "device", "flags.writeable"),
    operator.attrgetter("ctypes.data"),
    _read_numpy,
)

readers: dict[type, Reader] = {np.ndarray: _NUMPY}
"""By type of array; a type is entered when the first array of it is seen."""


def _find_reader(subject: str, array: object) -> Reader:
    if array is None:
        raise NullPointerError(subject, "must be an array", "None")
    if isinstance(array, np.ndarray):
        reader = _NUMPY
    # An array of a library can only exist once that library is imported.
    elif (cupy := sys.modules.get("cupy")) is not None and isinstance(array, cupy.ndarray):
        reader = _cupy_reader(cupy)
    else:
        rule = "must be a NumPy or CuPy array"
        raise BadParamTypeError(subject, rule, f"{type(array).__module__}.{type(array).__name__}")
    return readers.setdefault(type(array), reader)
