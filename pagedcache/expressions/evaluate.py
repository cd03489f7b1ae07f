# SPDX-License-Identifier: Apache-2.0
"""Evaluates the tree of an expression with NumPy, which is the specification.

Each operation on numbers is one of IEEE float32, rounded to nearest. Integers have 64 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from pagedcache.expressions.tree import CONDITIONS, Kind, Node, decided

Array = np.ndarray[Any, Any]

_TRUE: Array = np.asarray(True)
_DTYPES = {Kind.BOOL: np.bool_, Kind.INT: np.int64, Kind.FLOAT: np.float32}


@dataclass(frozen=True, slots=True)
class Scope:
    """What an expression is about.

    Attributes
    ----------
    element : array
        float32 ``[tokens, heads, head size]``: ``x``. Or ``[tokens, heads, groups, group size]``,
        if row functions are about groups.
    indices : dict
        Arrays of int64 by name, of shapes that broadcast to that of `element`.
    parameters : dict
        Arrays of bool, int64 or float32 by name.
    """

    element: Array
    indices: Mapping[str, Array]
    parameters: Mapping[str, Array]


def evaluate(node: Node, scope: Scope) -> tuple[Array, Array]:
    """Evaluate an expression for each element.

    Returns
    -------
    values : array
        float32, of the shape of ``scope.element``.
    inside : array of bool
        Whether no index has left what it is an index of. Where one has, the value is meaningless.
        What a condition rules out does not count.
    """
    with np.errstate(all="ignore"):
        found = _Evaluation(scope).value(node)
    values, inside = (np.broadcast_to(each, scope.element.shape) for each in found)
    return values, inside


class _Evaluation:
    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        # By identity: parts of a tree may stand in several places, and are evaluated once.
        self._known: dict[int, tuple[Array, Array]] = {}

    def value(self, node: Node) -> tuple[Array, Array]:
        found = self._known.get(id(node))
        if found is None:
            operands = [self.value(each) for each in node.operands]
            values = [each for each, _ in operands]
            inside = self._inside(node.operation, operands)
            found = self._known[id(node)] = self._evaluated(node, values, inside)
        return found

    @staticmethod
    def _inside(operation: str, operands: list[tuple[Array, Array]]) -> Array:
        """Return whether all indices in the operands that matter are inside."""
        if operation in CONDITIONS:
            (test, inside), *others = operands
            yes, no = decided(operation, [each for _, each in others], _TRUE)
            return inside & np.where(test, yes, no)
        return functools.reduce(np.logical_and, (inside for _, inside in operands), _TRUE)

    def _evaluated(self, node: Node, values: list[Array], inside: Array) -> tuple[Array, Array]:
        dtype = _DTYPES[node.kind]
        shape = self._scope.element.shape
        match node.operation:
            case "constant":
                return np.asarray(node.value, dtype), inside
            case "element":
                return self._scope.element, inside
            case "index":
                return self._scope.indices[str(node.value)], inside
            case "parameter":
                array = self._scope.parameters[str(node.value)]
                if not values:
                    return array, inside  # of one number, or of one for each row
                within, inside = _within(values, array.shape, inside)
                return np.asarray(array[within]), inside
            case "at":
                rows = self._scope.element.reshape(*shape[:2], -1)
                within, inside = _within(values, rows.shape[-1:], inside)
                index = np.broadcast_to(within[0], shape).reshape(rows.shape)
                return np.take_along_axis(rows, index, -1).reshape(shape), inside
            case "convert":
                return values[0].astype(dtype), inside
        if node.operation in _ROW_FUNCTIONS:
            row = np.broadcast_to(values[0], shape)
            inside = np.asarray(np.broadcast_to(inside, shape).all(-1, keepdims=True))
            return _ROW_FUNCTIONS[node.operation](row)[..., None], inside
        whole = node.kind is Kind.INT and node.operation in _WHOLE
        function = (_WHOLE if whole else _FUNCTIONS)[node.operation]
        return np.asarray(function(*values)).astype(dtype, copy=False), inside


def _within(
    indices: list[Array], shape: tuple[int, ...], inside: Array
) -> tuple[tuple[Array, ...], Array]:
    """Return indices that are 0 where they leave their axes, and whether none does."""
    found = []
    for index, length in zip(indices, shape, strict=True):
        good = (index >= 0) & (index < length)
        inside = inside & good
        found.append(np.where(good, index, 0))
    return tuple(found), inside


def _in_double(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return a function that rounds what it finds in float64, so that no processor matters."""
    return lambda x: function(x.astype(np.float64)).astype(np.float32)


def _whole(x: Array) -> Array:
    """Return integers, toward zero; 0 for a NaN, and the nearest there is for what is too large."""
    most = np.float32(2**63)
    usual = np.where(np.abs(x) < most, x, np.float32(0)).astype(np.int64)
    limits = np.where(x > 0, np.iinfo(np.int64).max, np.iinfo(np.int64).min)
    return np.asarray(np.where(np.abs(x) >= most, limits, usual))


def _through(dtype: np.dtype[Any]) -> Callable[[Array], Array]:
    """Return a function that rounds to a float type and back."""
    return lambda x: x.astype(dtype).astype(np.float32)


def _larger(a: Array, b: Array) -> Array:
    """Return the larger one; if one is a NaN, the other; the first of two zeros."""
    return np.asarray(np.where((b > a) | (a != a), b, a))


def _smaller(a: Array, b: Array) -> Array:
    return np.asarray(np.where((b < a) | (a != a), b, a))


def _power(a: Array, b: Array) -> Array:
    # Of a scalar exponent such as 0.5, NumPy makes a root, whose special values are others.
    shape = np.broadcast_shapes((1,), a.shape, b.shape)
    exponents = np.broadcast_to(b, shape).astype(np.float64, order="C")
    return np.asarray(np.power(a.astype(np.float64), exponents).astype(np.float32))


def _round(x: Array) -> Array:
    """Round to the nearest whole number, halves away from zero."""
    whole = np.trunc(x)
    away = whole + np.copysign(np.float32(1), x)
    return np.asarray(np.where(np.abs(x - whole) >= 0.5, away, whole))


def _pow2_ceil(x: Array) -> Array:
    """Return the least power of two at or above; 0 for 0, and a NaN for what is below."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    up = ((bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
    below = np.where(x == 0, np.float32(0), np.float32(np.nan))
    return np.asarray(np.where(x > 0, up, below))


def _floor_quotient(a: Array, b: Array) -> Array:
    return np.floor(a / b)


def _remainder(a: Array, b: Array) -> Array:
    return np.subtract(a, np.multiply(b, np.floor(a / b)))


def _whole_quotient(a: Array, b: Array) -> Array:
    """Return the quotient of integers, rounded down; 0 by 0, and wrapped around by -1."""
    usual = np.where((b == 0) | (b == -1), 1, b)
    quotient = np.where(b == -1, np.negative(a), np.floor_divide(a, usual))
    return np.asarray(np.where(b == 0, 0, quotient))


def _whole_remainder(a: Array, b: Array) -> Array:
    return np.subtract(a, np.multiply(b, _whole_quotient(a, b)))


def pairs(row: Array, combined: Callable[[Array, Array], Array], padding: float) -> Array:
    """Combine neighbours first, whatever the length: ``(x0 + x1) + (x2 + x3)`` and so on."""
    length = 1 << (row.shape[-1] - 1).bit_length()
    padded = np.full((*row.shape[:-1], length), padding, np.float32)
    padded[..., : row.shape[-1]] = row
    while padded.shape[-1] > 1:
        padded = combined(padded[..., ::2], padded[..., 1::2])
    return np.asarray(padded[..., 0])


def _row_mean(row: Array) -> Array:
    return np.asarray(pairs(row, np.add, 0.0) / np.float32(row.shape[-1]))


_ROW_FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "row_sum": lambda row: pairs(row, np.add, 0.0),
    "row_mean": _row_mean,
    "row_max": lambda row: pairs(row, _larger, np.nan),
    "row_min": lambda row: pairs(row, _smaller, np.nan),
}

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "min": _smaller,
    "max": _larger,
    "sqrt": np.sqrt,
    "exp": _in_double(np.exp),
    "exp2": _in_double(np.exp2),
    "log": _in_double(np.log),
    "log2": _in_double(np.log2),
    "sin": _in_double(np.sin),
    "cos": _in_double(np.cos),
    "tanh": _in_double(np.tanh),
    "floor": np.floor,
    "ceil": np.ceil,
    "rint": np.rint,
    "round": _round,
    "pow2_ceil": _pow2_ceil,
    "where": np.where,
    "isnan": np.isnan,
    "int": _whole,
    "float16": _through(np.dtype(np.float16)),
    "bfloat16": _through(np.dtype(ml_dtypes.bfloat16)),
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "floor_divide": _floor_quotient,
    "remainder": _remainder,
    "power": _power,
    "negative": np.negative,
    "less": np.less,
    "less_equal": np.less_equal,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
}
# Where integers are not divided as numbers are.
_WHOLE: dict[str, Callable[..., Any]] = {
    "floor_divide": _whole_quotient,
    "remainder": _whole_remainder,
}
