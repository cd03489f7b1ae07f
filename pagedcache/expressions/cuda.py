# SPDX-License-Identifier: Apache-2.0
"""Prints the tree of an expression as CUDA, with the operations of ``expressions.cuh``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pagedcache.expressions.tree import CONDITIONS, OPERATIONS, Kind, Node, decided, is_checked

_TYPES = {Kind.BOOL: "bool", Kind.INT: "Whole", Kind.FLOAT: "float"}
_TRUE = "true"
_DIM = Node("index", Kind.INT, value="dim")


@dataclass(frozen=True, slots=True)
class Function:
    """What is known of a function.

    Attributes
    ----------
    name : str
    operation : str
        The row function that it is what each element brings to; empty if it is for the element.
    checks : bool
        Whether an index may leave what it is an index of.
    shares : bool
        Whether it has elements of other dimensions.
    """

    name: str
    operation: str
    checks: bool
    shares: bool


@dataclass(frozen=True, slots=True)
class Printed:
    """Functions in CUDA, in the namespace ``pagedcache::language``.

    Attributes
    ----------
    text : str
        A function for the value of an element, and before it one for each row function: what each
        element brings to it. All are templates, and take a place, whose members are ``x``, the
        indices, and ``at(bool& inside, Whole dim)``; the parameters, as members of one object; the
        values of the row functions so far (`RowValue`); and a bool that they make false if an index
        has left what it is an index of.
    rows : tuple of Function
        The row functions, in the order in which they have to be evaluated.
    element : Function
        For the value of an element.
    """

    text: str
    rows: tuple[Function, ...]
    element: Function

    @property
    def checks(self) -> bool:
        """Whether an index may leave what it is an index of."""
        return any(each.checks for each in (*self.rows, self.element))


def printed(name: str, node: Node, members: Mapping[str, str]) -> Printed:
    """Return the functions for a tree.

    Parameters
    ----------
    name : str
        Of the function for an element.
    node : Node
    members : dict
        For the name of each parameter, which may be a keyword of C++, what it is called there, such
        as ``"parameters.p0"``.
    """
    rows: dict[int, tuple[int, bool]] = {}
    texts: list[str] = []
    functions: list[Function] = []

    def add(of: str, operation: str, part: Node) -> None:
        made = _Function(rows, members)
        texts.append(made.text(of, part))
        functions.append(Function(of, operation, made.checks, made.shares))

    def find(part: Node, seen: set[int]) -> None:
        if id(part) in seen:
            return
        seen.add(id(part))
        for operand in part.operands:
            find(operand, seen)
        if OPERATIONS.get(part.operation) and OPERATIONS[part.operation].of_row:
            add(f"{name}_row{len(rows)}", part.operation, part.operands[0])
            rows[id(part)] = len(rows), functions[-1].checks

    find(node, set())
    add(name, "", node)
    return Printed("\n".join(texts), tuple(functions[:-1]), functions[-1])


class _Function:
    """One function: a statement for each operation, since a value may be used several times."""

    def __init__(self, rows: Mapping[int, tuple[int, bool]], members: Mapping[str, str]) -> None:
        self._rows, self._members = rows, members
        self._known: dict[int, tuple[str, str]] = {}
        self._lines: list[str] = []
        self.checks = self.shares = False

    def text(self, name: str, node: Node) -> str:
        value, inside = self._value(node)
        body = "\n".join(f"  {line}" for line in self._lines)
        return f"""template <typename Place, typename Parameters>
__device__ __forceinline__ float {name}([[maybe_unused]] const Place& place,
                                        [[maybe_unused]] const Parameters& parameters,
                                        [[maybe_unused]] const RowValue* rows, bool& inside) {{
{body}
  inside = inside && {inside};
  return {value};
}}
"""

    def _value(self, node: Node) -> tuple[str, str]:
        """Return how a value is named, and whether its indices are inside."""
        found = self._known.get(id(node))
        if found is None:
            found = self._known[id(node)] = self._made(node)
        return found

    def _made(self, node: Node) -> tuple[str, str]:
        if id(node) in self._rows:
            number, checks = self._rows[id(node)]
            self.checks = self.checks or checks
            return f"rows[{number}].value", f"rows[{number}].inside" if checks else _TRUE
        operands = [self._value(each) for each in node.operands]
        values = [value for value, _ in operands]
        inside = self._inside(node.operation, operands)
        match node.operation:
            case "constant":
                return _constant(node), _TRUE
            case "element":
                return "place.x", _TRUE
            case "index":
                return f"place.{node.value}", _TRUE
            case "parameter":
                return self._parameter(node, values, inside)
            case "at":
                self.checks = self.shares = True
                return self._read(node.kind, "place.at", values, inside)
            case "convert":
                made = f"static_cast<{_TYPES[node.kind]}>({values[0]})"
            case "int":  # a keyword
                made = f"truncated({values[0]})"
            case "and":
                made = f"{values[0]} && {values[1]}"
            case "or":
                made = f"{values[0]} || {values[1]}"
            case "not":
                made = f"!{values[0]}"
            case _:
                made = f"{node.operation}({', '.join(values)})"
        return self._named(_TYPES[node.kind], made), inside

    def _parameter(self, node: Node, indices: list[str], inside: str) -> tuple[str, str]:
        member = self._members[str(node.value)]
        if not indices:
            return member, _TRUE
        checked = [i for i, each in enumerate(node.operands) if is_checked(each, i)]
        self.checks = self.checks or bool(checked)
        mask = f"<{sum(1 << i for i in checked)}u>"
        if node.operands[-1] == _DIM:
            function, arguments = f"{member}.template along{mask}", indices[:-1]
            return self._read(node.kind, function, arguments, inside, "place")
        return self._read(node.kind, f"{member}.template at{mask}", indices, inside)

    def _read(
        self, kind: Kind, function: str, indices: list[str], inside: str, *first: str
    ) -> tuple[str, str]:
        within = f"in{len(self._lines)}"
        self._lines.append(f"bool {within} = {inside};")
        arguments = ", ".join([*first, within, *indices])
        return self._named(_TYPES[kind], f"{function}({arguments})"), within

    def _inside(self, operation: str, operands: list[tuple[str, str]]) -> str:
        """Return whether the indices of the operands that matter are inside."""
        if all(inside == _TRUE for _, inside in operands):
            return _TRUE
        if operation in CONDITIONS:
            (test, inside), *others = operands
            yes, no = decided(operation, [each for _, each in others], _TRUE)
            return self._named("bool", f"{inside} && ({test} ? {yes} : {no})")
        parts = dict.fromkeys(inside for _, inside in operands if inside != _TRUE)
        return next(iter(parts)) if len(parts) == 1 else self._named("bool", " && ".join(parts))

    def _named(self, kind: str, made: str) -> str:
        name = f"v{len(self._lines)}"
        self._lines.append(f"const {kind} {name} = {made};")
        return name


def _constant(node: Node) -> str:
    if node.kind is Kind.BOOL:
        return str(node.value).lower()
    if node.kind is Kind.INT:
        return f"static_cast<Whole>({node.value})"
    assert isinstance(node.value, float)
    if not np.isfinite(node.value):
        return "asFloat(0x7f800000u)"
    return f"{node.value.hex()}f"  # exact, and no compiler rounds it
