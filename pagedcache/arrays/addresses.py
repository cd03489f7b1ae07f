# SPDX-License-Identifier: Apache-2.0
"""Raw addresses in place of arrays, as the C interface has them. They are trusted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pagedcache.arrays.library import Library
from pagedcache.status import BadParamError, NullPointerError

if TYPE_CHECKING:
    from pagedcache.tensors import Expected

BITS = 63  # of an address


class Addresses(Library):
    """Ints that are addresses of data which matches what is expected."""

    has_matchers = True

    def conditions(
        self,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        counted_by: str,
        constants: dict[str, Any],
    ) -> list[str]:
        """Return expressions that are true of addresses. How long the data is, is trusted."""
        names = [one.name for one in expected]
        types = " is ".join(f"type({name})" for name in names)
        return [f"{types} is int", f"not ({' | '.join(names)}) >> {BITS}"]

    def address(self, name: str) -> str:
        """Return an expression for the address."""
        return name

    def rows(self, expected: Expected, constants: dict[str, Any]) -> str:
        """Return the number of rows that there were when the descriptor was created."""
        constants["_rows"] = expected.shape[0]
        return "_rows"


ADDRESSES = Addresses()


def check_address(name: str, address: int, itemsize: int) -> None:
    """Raise if an address is not that of data with this item size."""
    if address <= 0:
        raise NullPointerError(name, "must not be a null pointer", hex(address))
    if address >> BITS:
        raise BadParamError(name, f"must be an address below 2**{BITS}", hex(address))
    if address % itemsize:
        rule = f"must start at a multiple of its item size, {itemsize} bytes"
        raise BadParamError(name, rule, hex(address))
