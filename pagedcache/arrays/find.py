# SPDX-License-Identifier: Apache-2.0
"""From an array to its library."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.arrays.dlpack import DLPack
from pagedcache.arrays.interfaces import ArrayInterface, CudaArrayInterface
from pagedcache.arrays.jax import Jax
from pagedcache.arrays.library import Library, copied, reading, type_name
from pagedcache.arrays.numpy import Numpy
from pagedcache.status import BadParamTypeError, NullPointerError, shown
from pagedcache.tensors import Tensor, row_major

if TYPE_CHECKING:
    from pagedcache.arrays.torch import Torch

libraries: dict[type, Library] = {np.ndarray: Numpy()}
"""By exact type of array; CuPy and PyTorch are added when their first array is seen."""

_JAX = Jax()
_EXPORTERS: dict[str, Library] = {
    "__dlpack__": DLPack(),
    "__cuda_array_interface__": CudaArrayInterface(),
    "__array_interface__": ArrayInterface(),
}


def adopt(subject: str, array: object) -> Tensor:
    """Read address, dtype, shape, strides and device of an array, without a copy.

    Parameters
    ----------
    subject : str
        The argument to name in an error.
    array : array
        Of NumPy, CuPy, PyTorch or JAX, or any object with DLPack, ``__cuda_array_interface__`` or
        ``__array_interface__``.

    Returns
    -------
    Tensor
        If the array has no elements and strides that cannot be used, they are row-major.

    Raises
    ------
    NullPointerError
        `array` is ``None``.
    BadParamTypeError
        `array` is not an array, or has no plain memory of its own.
    BadParamError
        Its library would have to copy it.
    BadTensorDtypeError
        Neither NumPy nor ml_dtypes has its dtype.
    """
    tensor = library_of(subject, array).read(subject, array)
    if 0 in tensor.shape and tensor.strides[-1] != tensor.dtype.itemsize:
        # These strides are never used. NumPy makes them 0 where it converts an empty array.
        steps = row_major(tensor.shape)
        return tensor._replace(strides=tuple(step * tensor.dtype.itemsize for step in steps))
    return tensor


def library_of(subject: str, array: object) -> Library:
    """Return the library of an array; raises as `adopt` does if it has none."""
    return libraries.get(type(array)) or _find(subject, array)


def part(subject: str, array: Any, index: Any) -> Any:
    """Return ``array[index]``, which must be a view of the same memory.

    Raises
    ------
    BadParamError
        It is a copy.
    BadParamTypeError
        `array` is not an array, or cannot be indexed.
    """
    with reading(subject, array):
        taken = array[index]
    if type(array) not in libraries:  # those return views
        whole, some = adopt(subject, array), adopt(subject, taken)
        step = index[1] * whole.strides[1] if index[1] is not None else 0
        if whole.writable and some.address != whole.address + step:
            raise copied(subject)
    return taken


def adopt_stream(stream: Any) -> tuple[int, int | None]:
    """Return the handle of a CUDA stream, and the index of its device if it is known.

    Parameters
    ----------
    stream : stream
        Of CuPy or PyTorch, or any object with ``__cuda_stream__``.

    Raises
    ------
    BadParamTypeError
        It is none of these.
    """
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(stream, (cupy.cuda.Stream, cupy.cuda.ExternalStream)):
        return int(stream.ptr), None if stream.device_id == -1 else int(stream.device_id)
    if hasattr(stream, "cuda_stream") and hasattr(stream, "device_index"):  # PyTorch's
        return int(stream.cuda_stream), int(stream.device_index)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1]), None
    rule = "must be None, a CuPy or PyTorch stream, an int, or have __cuda_stream__"
    raise BadParamTypeError("stream", rule, shown(stream))


def current_streams(device: int) -> list[int]:
    """Return the current stream of each library that has CUDA streams of its own."""
    torch = sys.modules.get("torch")
    return [] if torch is None else _torch(torch).streams_in_use(device)


def _find(subject: str, array: object) -> Library:
    if array is None:
        raise NullPointerError(subject, "must be an array", "None")
    if subject.endswith("_scale") and isinstance(array, (int, float, np.generic)):
        rule = "must be a float32 array of one element, where one scale is for a whole cache"
        raise BadParamTypeError(subject, rule, shown(array))
    cupy, torch, jax = (sys.modules.get(name) for name in ("cupy", "torch", "jax"))
    if isinstance(array, np.ndarray):
        library, exact = libraries[np.ndarray], np.ndarray
    elif cupy is not None and isinstance(array, cupy.ndarray):
        library, exact = _cupy(cupy), cupy.ndarray
    elif torch is not None and isinstance(array, torch.Tensor):
        library, exact = _torch(torch), torch.Tensor
    elif jax is not None and isinstance(array, jax.Array):
        return _JAX
    else:
        for attribute, exporter in _EXPORTERS.items():
            with contextlib.suppress(Exception):  # an attribute can fail in any way
                getattr(array, attribute)
                return exporter
        *most, last = _EXPORTERS
        rule = (
            f"must be an array of NumPy, CuPy, PyTorch or JAX, or have {', '.join(most)} or {last}"
        )
        raise BadParamTypeError(subject, rule, type_name(array))
    if type(array) is not exact:
        return library  # of a subclass, which has no matchers: its attributes may differ
    return libraries.setdefault(exact, library)


@functools.cache
def _cupy(module: Any) -> Library:
    from pagedcache.arrays.cupy import Cupy

    return Cupy(module)


@functools.cache
def _torch(module: Any) -> Torch:
    from pagedcache.arrays.torch import Torch

    return Torch(module)
