# SPDX-License-Identifier: Apache-2.0
"""From the text of an expression to its tree."""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from pagedcache.expressions.tree import (
    ELEMENT,
    FUNCTIONS,
    INDICES,
    OPERATIONS,
    Kind,
    Node,
    Parameter,
)
from pagedcache.status import BadParamError

MOST_CHARACTERS, MOST_DEPTH = 10_000, 100
MOST_REPEATED = 64  # for up to this whole exponent, a power is a product

_BINARY = {
    ast.Add: "add",
    ast.Sub: "subtract",
    ast.Mult: "multiply",
    ast.Div: "divide",
    ast.FloorDiv: "floor_divide",
    ast.Mod: "remainder",
}
# Of `a > b`, `b < a` is evaluated, so there are fewer operations.
_COMPARISONS: dict[type[ast.cmpop], tuple[str, bool]] = {
    ast.Lt: ("less", False),
    ast.LtE: ("less_equal", False),
    ast.Gt: ("less", True),
    ast.GtE: ("less_equal", True),
    ast.Eq: ("equal", False),
    ast.NotEq: ("not_equal", False),
}


# What is meant by an operator or a function that the language does not have.
_OTHER_OPERATORS: dict[type[ast.operator], str] = {
    ast.BitXor: "; a power is **",
    ast.BitAnd: "; of truth values, use and",
    ast.BitOr: "; of truth values, use or",
}
_OTHER_FUNCTIONS = {
    "clip": "min(max(x, low), high)",
    "clamp": "min(max(x, low), high)",
    "sign": "(x > 0) - (x < 0)",
    "pow": "a ** b",
}


class ExpressionError(BadParamError):
    """An expression is not in the language.

    The message is a sentence, and below it the expression with a mark under the place.
    """

    def __init__(self, subject: str, rule: str, text: str, start: int, stop: int) -> None:
        super().__init__(subject, rule)
        self.text, self.start, self.stop = text, start, stop

    def __reduce__(self) -> tuple[object, ...]:
        subject, rule, *_ = self.args
        return type(self), (subject, rule, self.text, self.start, self.stop)

    def __str__(self) -> str:
        mark = " " * self.start + "^" + "~" * (self.stop - self.start - 1)
        return f"{super().__str__()}\n    {self.text}\n    {mark}"


@dataclass(frozen=True, slots=True)
class Expression:
    """An expression that is in the language.

    Attributes
    ----------
    subject : str
        What errors call it, such as ``"k[0]"``.
    text : str
    body : ast.expr
    parameters : tuple of str
        Names that are neither ``x`` nor an index, in the order of their first use.
    """

    subject: str
    text: str
    body: ast.expr
    parameters: tuple[str, ...]

    @property
    def by_token(self) -> frozenset[str]:
        """Parameters whose first index is ``token``."""
        firsts = ((name, indices[0]) for name, indices in self._subscripts() if name != "at")
        return frozenset(
            name for name, first in firsts if isinstance(first, ast.Name) and first.id == "token"
        )

    @property
    def assumed(self) -> dict[str, Parameter]:
        """What parameters are if nothing else is known: numbers, or integers inside an index."""
        axes = {name: len(indices) for name, indices in self._subscripts()}
        whole = {
            node.id
            for name, indices in self._subscripts()
            for index in indices
            for node in _outside_calls(index)
        }
        truths = {node.id for test in _tests(self.body) for node in _outside_calls(test)}
        kinds = {**dict.fromkeys(truths, Kind.BOOL), **dict.fromkeys(whole, Kind.INT)}
        return {
            name: Parameter(kinds.get(name, Kind.FLOAT), axes.get(name, 0))
            for name in self.parameters
        }

    def _subscripts(self) -> list[tuple[str, list[ast.expr]]]:
        """Return each use of a parameter with indices, and each call of ``at``."""
        found: list[tuple[str, list[ast.expr]]] = []
        for node in ast.walk(self.body):
            match node:
                case ast.Subscript(ast.Name(name), index):
                    found.append((name, index.elts if isinstance(index, ast.Tuple) else [index]))
                case ast.Call(ast.Name("at"), arguments):
                    found.append(("at", arguments))
        return found

    def fail(self, rule: str) -> NoReturn:
        """Raise an `ExpressionError` about all of it."""
        raise ExpressionError(self.subject, rule, self.text, 0, len(self.text))

    def typed(
        self, parameters: Mapping[str, Parameter], lengths: Mapping[str, int] | None = None
    ) -> Node:
        """Return the tree for parameters of some kinds. Its kind is `Kind.FLOAT`.

        Parameters
        ----------
        parameters : mapping of str to Parameter
        lengths : mapping of str to int, optional
            How many there are of ``dim`` and ``head``. An axis that is indexed by one of these must
            have its length.

        Raises
        ------
        ExpressionError
            A parameter is missing, has another number of axes than indices, or is used as what it
            is not; an axis has another length; or the result is a truth value.
        """
        typer = _Typer(self, parameters, lengths or {})
        found = typer.node(self.body)
        if found.kind is Kind.BOOL:
            typer.fail(self.body, "must give a number for each element, not a truth value")
        return _converted(found, Kind.FLOAT)


def parse(text: str, subject: str = "expression") -> Expression:
    """Return an expression, if its text is in the language.

    Parameters
    ----------
    text : str
        A Python expression of one line. Numbers, ``x`` (the element), the indices ``dim``,
        ``head``, ``token``, ``slot``, ``block`` and ``offset``, parameters (``gain``,
        ``gain[head, dim]``), ``+ - * / // % **``, comparisons, ``and or not``, ``a if c else b``,
        and the functions of `pagedcache.expressions.tree.FUNCTIONS`.
    subject : str
        What errors call it.

    Raises
    ------
    ExpressionError
        It is not in the language.
    """
    text = text.strip()

    def fail(rule: str, start: int = 0, stop: int | None = None) -> NoReturn:
        shown = " ".join(text.splitlines())
        raise ExpressionError(subject, rule, shown, start, max(stop or len(text), start + 1))

    if len(text) > MOST_CHARACTERS:
        rule = f"must have at most {MOST_CHARACTERS} characters, got {len(text)}"
        raise BadParamError(subject, rule)
    if not text:
        raise BadParamError(subject, "must not be empty")
    if "\n" in text or "\r" in text or not text.isprintable():
        fail("must be one line of printable characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's, on style
            body = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        start = min(max((error.offset or 1) - 1, 0), len(text) - 1)
        fail(f"is not a Python expression: {error.msg}", start, start + 1)
    except (ValueError, RecursionError, MemoryError):
        fail("cannot be read as a Python expression")
    former = _Former(subject, text)
    former.visit(body, 1)
    return Expression(subject, text, body, tuple(former.parameters))


def _outside_calls(at: ast.expr) -> list[ast.Name]:
    """Return the names in an index that decide whether it is an integer."""
    match at:
        case ast.Name():
            return [at]
        case ast.Subscript(ast.Name() as name):
            return [name]
        case ast.BinOp(left, _, right):
            return _outside_calls(left) + _outside_calls(right)
        case ast.UnaryOp(_, operand):
            return _outside_calls(operand)
        case ast.IfExp(_, body, other):
            return _outside_calls(body) + _outside_calls(other)
        case ast.Call(ast.Name("min" | "max" | "abs"), arguments):
            return [name for each in arguments for name in _outside_calls(each)]
        case ast.Call(ast.Name("where"), [_, *arguments]):
            return [name for each in arguments for name in _outside_calls(each)]
    return []


def _tests(body: ast.expr) -> list[ast.expr]:
    """Return the parameters that are used as truth values, with their indices if they have any."""
    found: list[ast.expr] = []
    for node in ast.walk(body):
        match node:
            case ast.BoolOp(_, values):
                found += values
            case ast.UnaryOp(ast.Not(), operand):
                found.append(operand)
            case ast.IfExp(test, _, _) | ast.Call(ast.Name("where"), [test, *_]):
                found.append(test)
    return [each for each in found if isinstance(each, (ast.Name, ast.Subscript))]


class _Marking:
    """What reads an expression, and can mark a place in it."""

    subject: str
    text: str

    def fail(self, at: ast.expr, rule: str) -> NoReturn:
        """Raise with a mark under a part of the expression."""
        # The columns of `ast` count bytes of UTF-8.
        encoded = self.text.encode()
        start = len(encoded[: at.col_offset].decode())
        stop = len(encoded[: at.end_col_offset].decode())
        raise ExpressionError(self.subject, rule, self.text, start, stop)


class _Former(_Marking):
    """Refuses what is not in the language, before any parameter is known."""

    def __init__(self, subject: str, text: str) -> None:
        self.subject, self.text = subject, text
        self.parameters: dict[str, None] = {}

    def visit(self, at: ast.expr, depth: int) -> None:
        if depth > MOST_DEPTH:
            rule = (
                f"must be nested at most {MOST_DEPTH} deep, where a + b + c counts as (a + b) + c"
            )
            self.fail(at, rule)
        parts = self._checked(at)
        if len(parts) > MOST_DEPTH:
            self.fail(at, f"must have at most {MOST_DEPTH} operands here, got {len(parts)}")
        for part in parts:
            self.visit(part, depth + 1)

    def _checked(self, at: ast.expr) -> Sequence[ast.expr]:
        """Return the parts of what is in the language."""
        match at:
            case ast.Constant(value):
                self._constant(at, value)
                return ()
            case ast.Name(name):
                if name in FUNCTIONS:
                    self.fail(at, f"must call {name}: {name}(...)")
                if name.startswith("_"):
                    self.fail(at, "has a name that begins with an underscore")
                if name != ELEMENT and name not in INDICES:
                    self.parameters[name] = None
                return ()
            case ast.BinOp(left, operation, right):
                if type(operation) not in _BINARY and not isinstance(operation, ast.Pow):
                    hint = _OTHER_OPERATORS.get(type(operation), "")
                    self.fail(at, f"has an operator that is not one of + - * / // % **{hint}")
                return (left, right)
            case ast.UnaryOp(operation, operand):
                if isinstance(operation, ast.Invert):
                    self.fail(at, "has the operator ~; use not")
                return (operand,)
            case ast.BoolOp(_, values):
                return values
            case ast.Compare(left, operations, others):
                if any(type(operation) not in _COMPARISONS for operation in operations):
                    self.fail(at, "has a comparison that is not one of < <= > >= == !=")
                return (left, *others)
            case ast.IfExp(test, body, other):
                return (test, body, other)
            case ast.Call(function, arguments, keywords):
                self._call(at, function, arguments, keywords)
                return arguments
            case ast.Subscript(ast.Name(name), index):
                if name.startswith("_"):
                    self.fail(at, "has a name that begins with an underscore")
                if name == ELEMENT or name in INDICES or name in FUNCTIONS:
                    rule = f"has an index for {name}, which takes none"
                    self.fail(at, rule + "; use at(d)" * (name == ELEMENT))
                self.parameters[name] = None
                return index.elts if isinstance(index, ast.Tuple) else (index,)
            case _:
                pass
        return self.fail(at, f"has {_name_of(at)}, which is not in the language")

    def _constant(self, at: ast.expr, value: object) -> None:
        if type(value) not in (bool, int, float):
            self.fail(at, f"has {_name_of(at)}, which is not in the language")
        if type(value) is int and value >= 1 << 63:
            self.fail(at, "has an integer of more than 64 bits; write it as a float")

    def _call(
        self,
        at: ast.expr,
        function: ast.expr,
        arguments: Sequence[ast.expr],
        keywords: Sequence[ast.keyword],
    ) -> None:
        if not isinstance(function, ast.Name):
            self.fail(function, f"calls {_name_of(function)}, which is not in the language")
        name = function.id
        if name not in FUNCTIONS:
            other = _OTHER_FUNCTIONS.get(name)
            hint = f"; write {other}" if other else _near(name, FUNCTIONS)
            self.fail(function, f"calls {name}, which is not in the language{hint}")
        if keywords:
            self.fail(at, f"must call {name} with positional arguments only")
        operation = FUNCTIONS[name]
        least, most = operation.fewest, operation.most
        if len(arguments) < least or len(arguments) > (most or len(arguments)):
            wanted = f"{least} or more" if not most else str(least)
            noun = "argument" if wanted == "1" else "arguments"
            self.fail(at, f"must call {name} with {wanted} {noun}, got {len(arguments)}")


class _Typer(_Marking):
    """Turns the form of an expression into a tree whose operands have the kinds they need."""

    def __init__(
        self,
        expression: Expression,
        parameters: Mapping[str, Parameter],
        lengths: Mapping[str, int],
    ) -> None:
        self.subject, self.text = expression.subject, expression.text
        self._parameters, self._lengths = parameters, lengths
        self._known: dict[int, Node] = {}  # the middle of a comparison is asked for twice

    def node(self, at: ast.expr) -> Node:
        found = self._known.get(id(at))
        if found is None:
            found = self._known[id(at)] = self._made(at)
        return found

    def _made(self, at: ast.expr) -> Node:
        match at:
            case ast.Constant(value):
                return _constant(value)  # type: ignore[arg-type]
            case ast.Name(name):
                return self._name(at, name, ())
            case ast.Subscript(ast.Name(name), index):
                parts = index.elts if isinstance(index, ast.Tuple) else (index,)
                return self._name(at, name, tuple(self._whole(part) for part in parts))
            case ast.BinOp(base, ast.Pow(), exponent):
                return self._power(base, exponent)
            case ast.BinOp(left, operation, right):
                return self._apply(at, _BINARY[type(operation)], (left, right))
            case ast.UnaryOp(ast.UAdd(), operand):
                return self._number(operand)
            case ast.UnaryOp(operation, operand):
                name = "not" if isinstance(operation, ast.Not) else "negative"
                return self._apply(at, name, (operand,))
            case ast.BoolOp(operation, values):
                name = "and" if isinstance(operation, ast.And) else "or"
                return self._all(name, [self._truth(value) for value in values])
            case ast.Compare(left, operations, others):
                pairs = zip((left, *others), operations, others, strict=False)
                return self._all("and", [self._compared(at, *each) for each in pairs])
            case ast.IfExp(test, body, other):
                return self._apply(at, "where", (test, body, other))
            case ast.Call(ast.Name(name), arguments):
                return self._call(at, name, arguments)
            case _:
                raise AssertionError(ast.dump(at))

    def _name(self, at: ast.expr, name: str, indices: tuple[Node, ...]) -> Node:
        if name == ELEMENT:
            return Node("element", Kind.FLOAT)
        if name in INDICES:
            return Node("index", Kind.INT, value=name)
        if name not in self._parameters:
            known = (*self._parameters, *INDICES, ELEMENT)
            self.fail(at, f"needs the parameter {name}, which is not given{_near(name, known)}")
        parameter = self._parameters[name]
        if len(indices) != parameter.ndim:
            axes = f"{parameter.ndim} axes" if parameter.ndim != 1 else "1 axis"
            rule = f"must index {name} with as many indices as it has axes: it has {axes}"
            self.fail(at, f"{rule}, got {len(indices)}")
        for axis, (index, length) in enumerate(zip(indices, parameter.shape or (), strict=False)):
            wanted = self._lengths.get(str(index.value)) if index.operation == "index" else None
            if wanted is not None and length != wanted:
                rule = f"indexes axis {axis} of {name} by {index.value}, so it must have a length"
                self.fail(at, f"{rule} of {wanted}, got shape {parameter.shown_shape}")
        return Node("parameter", parameter.kind, indices, name)

    def _call(self, at: ast.expr, name: str, arguments: Sequence[ast.expr]) -> Node:
        if name == "at":
            return Node("at", Kind.FLOAT, (self._whole(arguments[0]),))
        if name == "int" and (whole := self._number(arguments[0])).kind is Kind.INT:
            return whole
        return self._apply(at, name, arguments)

    def _apply(self, at: ast.expr, name: str, arguments: Sequence[ast.expr]) -> Node:
        operation = OPERATIONS[name]
        if operation.takes is Kind.BOOL:
            return Node(name, Kind.BOOL, tuple(self._truth(each) for each in arguments))
        if name == "where":
            test, *rest = arguments
            values = self._alike([self.node(each) for each in rest])
            return Node(name, values[0].kind, (self._truth(test), *values))
        operands = [self._number(each) for each in arguments]
        if operation.takes is not None:
            operands = [_converted(each, operation.takes) for each in operands]
        operands = self._alike(operands)
        made = Node(name, operation.gives or operands[0].kind, tuple(operands))
        if name in ("min", "max"):  # of two at a time, from the left
            return self._all(name, operands)
        return made

    def _compared(
        self, at: ast.expr, left: ast.expr, operation: ast.cmpop, right: ast.expr
    ) -> Node:
        name, swapped = _COMPARISONS[type(operation)]
        return self._apply(at, name, (right, left) if swapped else (left, right))

    def _power(self, base: ast.expr, exponent: ast.expr) -> Node:
        """Return a product, if the exponent is a small whole number, which is exact; or a power."""
        value = self._number(base)
        match exponent:
            case ast.Constant(int(count)) if type(count) is int and 1 <= count <= MOST_REPEATED:
                return _repeated(value, count)
        other = _converted(self._number(exponent), Kind.FLOAT)
        return Node("power", Kind.FLOAT, (_converted(value, Kind.FLOAT), other))

    def _truth(self, at: ast.expr) -> Node:
        found = self.node(at)
        if found.kind is not Kind.BOOL:
            self.fail(at, f"needs a truth value here, got {found.kind.value}; compare it with 0")
        return found

    def _number(self, at: ast.expr) -> Node:
        """Return a number; a truth value counts as 1 or 0, as in Python."""
        found = self.node(at)
        return _converted(found, Kind.INT) if found.kind is Kind.BOOL else found

    def _whole(self, at: ast.expr) -> Node:
        match at:
            case ast.UnaryOp(ast.USub(), ast.Constant(int(count))) if count > 0:
                self.fail(at, "has a negative index, which is outside: indices count from 0 only")
        found = self._number(at)
        if found.kind is not Kind.INT:
            self.fail(
                at, "needs an integer for an index, got a number with a fraction; use int(...)"
            )
        return found

    @staticmethod
    def _alike(operands: list[Node]) -> list[Node]:
        """Return operands that are all of the widest kind among them."""
        kinds = {each.kind for each in operands}
        for kind in (Kind.FLOAT, Kind.INT):
            if kind in kinds:
                return [_converted(each, kind) for each in operands]
        return operands

    @staticmethod
    def _all(name: str, operands: Sequence[Node]) -> Node:
        first, *rest = operands
        for each in rest:
            first = Node(name, first.kind, (first, each))
        return first


def _constant(value: bool | int | float) -> Node:
    if isinstance(value, bool):
        return Node("constant", Kind.BOOL, value=value)
    if isinstance(value, int):
        return Node("constant", Kind.INT, value=value)
    with np.errstate(over="ignore"):
        return Node("constant", Kind.FLOAT, value=float(np.float32(value)))


def _converted(node: Node, kind: Kind) -> Node:
    if node.kind is kind:
        return node
    if node.operation == "constant" and kind is Kind.FLOAT:
        assert isinstance(node.value, (bool, int, float))
        return Node("constant", kind, value=float(np.float32(node.value)))
    return Node("convert", kind, (node,))


def _repeated(value: Node, count: int) -> Node:
    """Return a product of so many factors: the square of that of half as many, times one if odd."""
    if count == 1:
        return value
    half = _repeated(value, count // 2)
    square = Node("multiply", value.kind, (half, half))
    return Node("multiply", value.kind, (square, value)) if count % 2 else square


def _near(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _name_of(at: ast.expr) -> str:
    if isinstance(at, ast.Constant):
        value = at.value
        if isinstance(value, complex):
            return "a complex number"
        return "a string" if isinstance(value, (str, bytes)) else repr(value)
    known: dict[type[ast.expr], str] = {
        ast.Attribute: "an attribute",
        ast.Lambda: "a lambda",
        ast.List: "a list",
        ast.Tuple: "a tuple",
        ast.Set: "a set",
        ast.Dict: "a dictionary",
        ast.ListComp: "a comprehension",
        ast.SetComp: "a comprehension",
        ast.DictComp: "a comprehension",
        ast.GeneratorExp: "a comprehension",
        ast.JoinedStr: "a string",
        ast.NamedExpr: "an assignment",
        ast.Slice: "a slice",
        ast.Starred: "a starred argument",
        ast.Subscript: "an index of something that is not a parameter",
        ast.Call: "a call",
    }
    return known.get(type(at), f"a {type(at).__name__}")
