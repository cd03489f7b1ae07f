# SPDX-License-Identifier: Apache-2.0
"""CuPy arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pagedcache.arrays.library import Library, long_enough
from pagedcache.arrays.numpy import shape_is, signature_is
from pagedcache.tensors import Expected, Tensor

CONTIGUOUS = "_c_contiguous"
"""Of an array. Not documented; CuPy keeps it, and builds a tuple of strides at each request."""


class Cupy(Library):
    """Arrays of CuPy. Their stream is the backend's own.

    Parameters
    ----------
    cupy : module
    """

    has_matchers = True

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._kind = "rocm" if getattr(cupy.cuda.runtime, "is_hip", False) else "cuda"

    def read(self, subject: str, array: Any) -> Tensor:
        """Return address, dtype, shape, strides and device of an array, without a copy."""
        memory = array.data
        device = f"{self._kind}:{memory.device_id}"
        return Tensor(memory.ptr, array.dtype, array.shape, array.strides, device, writable=True)

    def conditions(
        self,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        counted_by: str,
        constants: dict[str, Any],
    ) -> list[str]:
        """Return expressions that are true of arrays that match what is expected."""
        several = self._cupy.cuda.runtime.getDeviceCount() > 1
        found = []
        for one, array in zip(expected, arrays, strict=True):
            name = one.name
            row = math.prod(one.shape[1:]) * one.dtype.itemsize
            # Where contiguous arrays are expected, their strides follow from their shape.
            if getattr(array, CONTIGUOUS, False) and (not one.free or one.strides[0] == row):
                constants[f"_{name}_dtype"] = one.dtype
                found += [
                    f"{name}.{CONTIGUOUS}",
                    f"{name}.dtype == _{name}_dtype",
                    shape_is(one, constants),
                ]
            else:
                found += signature_is(one, array, constants)
            found += long_enough(one, counted_by)
            if several:
                found.append(f"{name}.data.device_id == {array.data.device_id}")
        return found

    def address(self, name: str) -> str:
        """Return an expression for the address of an array."""
        return f"{name}.data.ptr"
