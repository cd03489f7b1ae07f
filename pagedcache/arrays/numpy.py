# SPDX-License-Identifier: Apache-2.0
"""NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pagedcache.arrays.library import Library, long_enough, reading
from pagedcache.tensors import Array, Expected, Tensor


class Numpy(Library):
    """Arrays of NumPy."""

    has_matchers = True

    def read(self, subject: str, array: Array) -> Tensor:
        """Return address, dtype, shape, strides and device of an array, without a copy."""
        with reading(subject, array):  # a subclass may fail in any way
            dtype, shape, strides = array.dtype, array.shape, array.strides
            return Tensor(array.ctypes.data, dtype, shape, strides, "cpu", array.flags.writeable)

    def conditions(
        self,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        counted_by: str,
        constants: dict[str, Any],
    ) -> list[str]:
        """Return expressions that are true of arrays that match what is expected."""
        constants["_ndarray"] = np.ndarray
        found = []
        for one, array in zip(expected, arrays, strict=True):
            found += [f"type({one.name}) is _ndarray", *signature_is(one, array, constants)]
            found += long_enough(one, counted_by)
            if one.written:
                found.append(f"{one.name}.flags.writeable")
        return found

    def address(self, name: str) -> str:
        """Return an expression for the address of an array."""
        return f"{name}.ctypes.data"


def signature_is(one: Expected, array: Any, constants: dict[str, Any]) -> list[str]:
    """Return conditions on dtype, shape and strides, by the attributes that NumPy and CuPy have."""
    name = one.name
    constants[f"_{name}_dtype"] = one.dtype
    constants[f"_{name}_strides"] = one.strides_like(array.strides)
    return [
        f"{name}.dtype == _{name}_dtype",
        shape_is(one, constants),
        f"{name}.strides == _{name}_strides",
    ]


def shape_is(one: Expected, constants: dict[str, Any]) -> str:
    """Return a condition on the shape, whose first axis may be free."""
    name = one.name
    constants[f"_{name}_shape"] = one.shape[1:] if one.free else one.shape
    if not one.free:
        return f"{name}.shape == _{name}_shape"
    if len(one.shape) == 1:
        return f"{name}.ndim == 1"
    return f"{name}.shape[1:] == _{name}_shape"
