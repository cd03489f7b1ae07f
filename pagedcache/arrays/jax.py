# SPDX-License-Identifier: Apache-2.0
"""JAX arrays, which can be read and not written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pagedcache.arrays.dlpack import parse
from pagedcache.arrays.library import Library, reading
from pagedcache.status import BadParamError

if TYPE_CHECKING:
    from pagedcache.tensors import Tensor


class Jax(Library):
    """Arrays of JAX."""

    def read(self, subject: str, array: Any) -> Tensor:
        """Wait until an array has been computed, and read it without a copy."""
        with reading(subject, array):
            array.block_until_ready()
            tensor = parse(subject, array.__dlpack__())
        return tensor._replace(writable=False)

    def check_write(self, subject: str, array: Any) -> None:
        """Raise: JAX has no operations in place."""
        raise BadParamError(subject, "must be writable", "a JAX array, which is not")
