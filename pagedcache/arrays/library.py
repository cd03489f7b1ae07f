# SPDX-License-Identifier: Apache-2.0
"""What is asked of an array library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.status import BadParamError, BadParamTypeError, PagedCacheError

if TYPE_CHECKING:
    from pagedcache.dtypes import Dtype
    from pagedcache.tensors import Expected, Tensor


class Library:
    """How the arrays of one library are read, written safely, and matched.

    Attributes
    ----------
    has_matchers : bool
        Whether `conditions`, `address` and `rows` are implemented. Matching arrays takes a fraction
        of the time that `read` takes.
    """

    has_matchers = False

    def read(self, subject: str, array: Any) -> Tensor:
        """Return address, dtype, shape, strides and device of an array, without a copy."""
        raise NotImplementedError

    def current_stream(self, subject: str, array: Any, device: int) -> Callable[[], int] | None:
        """Return a function that returns the handle of the stream that this library uses now.

        ``None`` if it has no streams of its own. `device` is the index of the array's device.
        """
        return None

    def check_write(self, subject: str, array: Any) -> None:
        """Raise if the library would not let a caller write into this array in place."""

    def noting_writes(
        self, subjects: Sequence[str], arrays: Sequence[Any]
    ) -> Callable[[], None] | None:
        """Return a function to call before each write into these arrays, if the library wants one.

        It does what `check_write` does, and tells the library that they are written in place.
        """
        return None

    def empty(self, subject: str, like: Any, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return an array that can be written, of this library if it has such, where `like` is.

        Its elements may be anything.
        """
        _, colon, index = self.read(subject, like).device.partition(":")
        if not colon:
            return np.empty(shape, dtype)
        import cupy

        with cupy.cuda.Device(int(index)):
            return cupy.empty(shape, dtype)

    # What follows is Python source for `pagedcache.arrays.matching`. In all of it, `expected` says
    # what an array must be like, and its name is the variable that holds the array. `constants`
    # gets a value for each other name that is used, all of which begin with an underscore.

    def conditions(
        self,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        counted_by: str,
        constants: dict[str, Any],
    ) -> list[str]:
        """Return expressions that are true of arrays that match what is expected.

        `arrays` are some that do, for what a library would rather copy from them. The variable
        ``_count`` has the length of the array named `counted_by`; a free first axis of any other
        must be at least as long.
        """
        raise NotImplementedError

    def address(self, name: str) -> str:
        """Return an expression for the address of an array."""
        raise NotImplementedError

    def rows(self, expected: Expected, constants: dict[str, Any]) -> str:
        """Return an expression for the length of the first axis."""
        return f"len({expected.name})"

    def statements(
        self, expected: Sequence[Expected], arrays: Sequence[Any], constants: dict[str, Any]
    ) -> list[str]:
        """Return statements that tell the library which of the arrays are written in place."""
        return []


def long_enough(one: Expected, counted_by: str) -> list[str]:
    """Return conditions for the length of an array whose length its ``len`` gives."""
    at_least = one.free and not one.loose and one.name != counted_by
    return [f"len({one.name}) >= _count"] if at_least else []


@contextlib.contextmanager
def reading(subject: str, array: Any) -> Iterator[None]:
    """Turn whatever an array fails with into one error."""
    try:
        yield
    except PagedCacheError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]  # NumPy adds a guide to its own versions
        rule = f"must have memory that can be read without a copy ({reason})"
        raise BadParamTypeError(subject, rule, type_name(array)) from error


def copied(subject: str) -> BadParamError:
    """Return the error for an array that is copied when it is read."""
    rule = "must be readable without a copy"
    return BadParamError(subject, rule, "an array whose library copies it")


def type_name(array: object) -> str:
    """Return the name of a type with its module."""
    return f"{type(array).__module__}.{type(array).__name__}"
