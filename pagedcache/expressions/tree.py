# SPDX-License-Identifier: Apache-2.0
"""The tree of an expression, and the operations that it is made of."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


class Kind(enum.Enum):
    """What a value is."""

    BOOL = "a truth value"
    INT = "an integer"  # of 64 bits; sums and products that leave them wrap around
    FLOAT = "a number"  # float32


@dataclass(frozen=True, slots=True)
class Parameter:
    """What is known of a parameter when an expression is compiled.

    Attributes
    ----------
    kind : Kind
    ndim : int
        0 for a number.
    shape : tuple or None
        ``None`` for the length of an axis that is as long as there are tokens; ``None`` if nothing
        is known.
    """

    kind: Kind
    ndim: int = 0
    shape: tuple[int | None, ...] | None = None

    @property
    def shown_shape(self) -> str:
        """The shape in words."""
        lengths = ["tokens" if length is None else str(length) for length in self.shape or ()]
        return f"({', '.join(lengths)}{',' * (len(lengths) == 1)})"


@dataclass(frozen=True, slots=True)
class Node:
    """An operation with its operands.

    Attributes
    ----------
    operation : str
        ``constant``, ``element`` (``x``), ``index``, ``parameter`` (whose operands are indices),
        ``convert``, or one of `OPERATIONS`.
    kind : Kind
        Of the result.
    operands : tuple of Node
    value : bool, int, float, str or None
        Of a constant; the name of an index or a parameter.
    """

    operation: str
    kind: Kind
    operands: tuple[Node, ...] = ()
    value: bool | int | float | str | None = None


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of the language.

    Attributes
    ----------
    fewest, most : int
        Number of operands; `most` is 0 if there may be any number.
    takes : Kind or None
        What operands are converted to; ``None`` if they must only be of the same kind.
    gives : Kind or None
        ``None`` if the result is of the kind of the operands.
    exact : bool
        Whether backends agree to the bit; the others agree within 2 units in the last place.
    of_row : bool
        Whether it takes all elements of a row.
    """

    fewest: int = 1
    most: int = 1
    takes: Kind | None = Kind.FLOAT
    gives: Kind | None = Kind.FLOAT
    exact: bool = True
    of_row: bool = False


_SAME = Operation(2, 2, None, None)
_COMPARED = Operation(2, 2, None, Kind.BOOL)
_NEAR = Operation(exact=False)
_OF_ROW = Operation(of_row=True)

FUNCTIONS = {
    "abs": Operation(1, 1, None, None),
    "min": Operation(2, 0, None, None),
    "max": Operation(2, 0, None, None),
    "sqrt": Operation(),
    "exp": _NEAR,
    "exp2": _NEAR,
    "log": _NEAR,
    "log2": _NEAR,
    "sin": _NEAR,
    "cos": _NEAR,
    "tanh": _NEAR,
    "floor": Operation(),
    "ceil": Operation(),
    "rint": Operation(),
    "round": Operation(),
    "pow2_ceil": Operation(),
    "where": Operation(3, 3, None, None),
    "isnan": Operation(1, 1, Kind.FLOAT, Kind.BOOL),
    "int": Operation(gives=Kind.INT),
    "float16": Operation(),
    "bfloat16": Operation(),
    "row_sum": _OF_ROW,
    "row_mean": _OF_ROW,
    "row_max": _OF_ROW,
    "row_min": _OF_ROW,
    "at": Operation(1, 1, Kind.INT, Kind.FLOAT),
}
"""Functions, by the names that users call them by."""

OPERATIONS = FUNCTIONS | {
    "add": _SAME,
    "subtract": _SAME,
    "multiply": _SAME,
    "divide": Operation(2, 2),
    "floor_divide": _SAME,
    "remainder": _SAME,
    "power": Operation(2, 2, exact=False),
    "negative": Operation(1, 1, None, None),
    "less": _COMPARED,
    "less_equal": _COMPARED,
    "equal": _COMPARED,
    "not_equal": _COMPARED,
    "and": Operation(2, 2, Kind.BOOL, Kind.BOOL),
    "or": Operation(2, 2, Kind.BOOL, Kind.BOOL),
    "not": Operation(1, 1, Kind.BOOL, Kind.BOOL),
}

CONDITIONS = ("where", "and", "or")
"""Operations whose first operand decides which of the others matter."""


def decided(operation: str, others: Sequence[T], always: T) -> tuple[T, T]:
    """Return what of the others matters if the first operand of a condition is true, and if not.

    Where none of them does, `always` is returned.
    """
    if operation == "where":
        return others[0], others[1]
    return (others[0], always) if operation == "and" else (always, others[0])


INDICES = ("dim", "head", "token", "slot", "block", "offset")
"""Where an element is: its dimension, KV head and token, and its slot, split into two."""

ELEMENT = "x"

WHOLE_AXES = ("dim", "head", "token")
"""Indices that have a length of their own, which that of an axis can be compared with."""


def is_checked(operand: Node, axis: int) -> bool:
    """Return whether an index of a parameter has to be compared with the length of its axis.

    Not if it is one of `WHOLE_AXES`, whose lengths agree. That of tokens can only be the first.
    """
    whole = operand.operation == "index" and operand.value in WHOLE_AXES
    return not whole or (operand.value == "token" and axis > 0)
