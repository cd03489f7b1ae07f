# SPDX-License-Identifier: Apache-2.0
"""Arrays that export ``__cuda_array_interface__`` or ``__array_interface__``."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from pagedcache.arrays.library import Library, copied, reading
from pagedcache.arrays.numpy import Numpy
from pagedcache.dtypes import BF16, Dtype, as_dtype
from pagedcache.tensors import Tensor, row_major


class CudaArrayInterface(Library):
    """Arrays with ``__cuda_array_interface__``, such as Numba's."""

    def read(self, subject: str, array: Any) -> Tensor:
        """Return address, dtype, shape, strides and device, without waiting for its stream."""
        with reading(subject, array):
            interface = array.__cuda_array_interface__
            address, read_only = interface["data"]
            shape = tuple(map(operator.index, interface["shape"]))
            dtype = _dtype(subject, interface["typestr"])
            strides = interface.get("strides")
            if strides is None:
                strides = [step * dtype.itemsize for step in row_major(shape)]
            strides = tuple(map(operator.index, strides))
            place = "cuda:0"
            if address:
                import cupy  # the array may be of a library that does without

                pointer = cupy.cuda.runtime.pointerGetAttributes(address)
                place = f"cuda:{pointer.device}"
        return Tensor(address, dtype, shape, strides, place, not read_only)

    def current_stream(self, subject: str, array: Any, device: int) -> Callable[[], int]:
        """Return a function that returns the stream that the exporter names, or the default one."""
        with reading(subject, array):
            stream = int(array.__cuda_array_interface__.get("stream") or 0)
        return lambda: stream


class ArrayInterface(Library):
    """Arrays with ``__array_interface__``."""

    def read(self, subject: str, array: Any) -> Tensor:
        """Return address, dtype, shape, strides and device of an array, without a copy."""
        with reading(subject, array):
            interface = array.__array_interface__
            if not isinstance(interface["data"], tuple):  # a buffer, perhaps made for this call
                raise copied(subject)
            seen = np.asarray(array, copy=False)
            if seen.ctypes.data != interface["data"][0]:
                raise copied(subject)
            dtype = _dtype(subject, interface["typestr"])
        return Numpy().read(subject, seen)._replace(dtype=dtype)


def _dtype(subject: str, name: str) -> Dtype:
    """Return the dtype of a typestr. There is none for bfloat16, which ml_dtypes writes as V2."""
    return BF16 if name[1:] == "V2" else as_dtype(subject, name)
