# SPDX-License-Identifier: Apache-2.0
"""The language of expressions: what is in it, what is not, and what it says."""

from __future__ import annotations

import ast
import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedcache.expressions import ExpressionError, Kind, Parameter, parse
from pagedcache.expressions.evaluate import Scope, evaluate
from pagedcache.expressions.tree import FUNCTIONS, INDICES, OPERATIONS
from pagedcache.status import BadParamError

F32 = np.float32
KINDS = {np.dtype(bool): Kind.BOOL, np.dtype(np.int64): Kind.INT, np.dtype(F32): Kind.FLOAT}


def evaluated(text, x=None, **parameters):
    """Return values and whether indices are inside, for x of shape [tokens, heads, dims]."""
    if x is None:
        x = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(F32)
    tokens, heads, dims = x.shape
    slot = np.arange(tokens).reshape(-1, 1, 1) * 5
    indices = {
        "dim": np.arange(dims), "head": np.arange(heads)[:, None],
        "token": np.arange(tokens).reshape(-1, 1, 1), "slot": slot, "block": slot // 4,
        "offset": slot % 4,
    }  # fmt: skip
    parameters = {name: np.asarray(value) for name, value in parameters.items()}
    known = {name: Parameter(KINDS[each.dtype], each.ndim) for name, each in parameters.items()}
    return evaluate(parse(text).typed(known), Scope(x, indices, parameters))


def value(text, x=1.5, **parameters):
    found, inside = evaluated(text, np.full((1, 1, 1), x, F32), **parameters)
    assert inside.all()
    return found[0, 0, 0]


@pytest.mark.parametrize(
    ("text", "x", "wanted"),
    [
        ("x", 1.5, 1.5), ("2", 0, 2), ("1 if x > 1 else 2", 1.5, 1), ("-x", 2, -2), ("+x", 2, 2),
        ("7 // 2", 0, 3), ("-7 // 2", 0, -4), ("-7 % 3", 0, 2), ("7 % -3", 0, -2),
        ("7 / 2", 0, 3.5),
        ("7 // 0", 0, 0), ("7 % 0", 0, 7), ("x // 2", -3, -2), ("x % 2", -3, 1),
        ("x / 0", 1, np.inf),
        ("x ** 2", 3, 9), ("2 ** 10", 0, 1024), ("x ** 0.5", 9, 3), ("x ** -1", 4, 0.25),
        ("(-9223372036854775807 - 1) // -1 < 0", 0, None),
        ("9223372036854775807 + 1 < 0", 0, None),
        ("True + True", 0, 2), ("(x > 0) * 3", 1, 3), ("1 < x <= 2", 2, None),
        ("1 < x < 2", 2, None),
        ("not x > 1 or x != x", 0.5, None),
        ("round(x)", 2.5, 3), ("round(x)", -2.5, -3), ("round(x)", 0.49999997, 0),
        ("rint(x)", 2.5, 2),
        ("round(x)", 8388609, 8388609), ("floor(x)", -0.5, -1), ("ceil(x)", 0.5, 1),
        ("abs(x)", -3, 3), ("abs(-3)", 0, 3), ("sqrt(x)", 2, F32(2) ** F32(0.5)),
        ("min(x, 1, 2)", 3, 1), ("max(1, x)", np.nan, 1), ("max(x, 1)", np.nan, 1),
        ("where(isnan(x), 0, x)", np.nan, 0), ("pow2_ceil(x)", 3, 4), ("pow2_ceil(x)", 4, 4),
        ("pow2_ceil(x)", 0, 0), ("pow2_ceil(x)", 1e-40, 2.0**-126), ("pow2_ceil(x)", 3e38, np.inf),
        ("exp(x)", 1, math.e), ("exp2(x)", 3, 8), ("log(x)", 1, 0), ("log2(x)", 8, 3),
        ("sin(x)", 0, 0), ("cos(x)", 0, 1), ("tanh(x)", 0, 0), ("16777217 + 0.0", 0, 16777216),
        ("0.1", 0, F32(0.1)), ("1e400", 0, np.inf),
    ],
)  # fmt: skip
def test_values(text, x, wanted):
    if wanted is None:  # true or false, as Python says of the same text
        wanted = 1.0 if text.startswith(("(-9", "9")) else float(eval(text, {"x": x}))
        text = f"1 if {text} else 0"
    found = value(text, x)
    assert found.dtype == F32
    assert found == F32(wanted), found


def test_what_is_no_power_of_two_above():
    assert np.isnan(value("pow2_ceil(x)", -1))
    assert np.isnan(value("pow2_ceil(x)", np.nan))
    assert np.signbit(value("round(x)", -0.25))


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 100])
def test_row_functions(length):
    x = (np.random.default_rng(1).standard_normal((2, 3, length)) * 1000).astype(F32)

    def halves(row):
        """Sum by halves of a row that is padded with zeros: neighbours come first."""
        if len(row) == 1:
            return row[0]
        return F32(halves(row[: len(row) // 2]) + halves(row[len(row) // 2 :]))

    padded = np.zeros((2, 3, 1 << (length - 1).bit_length()), F32)
    padded[..., :length] = x
    sums = np.array([[halves(row) for row in token] for token in padded])
    for text, wanted in (
        ("row_sum(x)", sums), ("row_mean(x)", sums / F32(length)), ("row_max(x)", x.max(-1)),
        ("row_min(x)", x.min(-1)), ("row_max(dim)", np.full((2, 3), length - 1)),
    ):  # fmt: skip
        found, inside = evaluated(text, x)
        assert inside.all()
        assert np.array_equal(found, np.broadcast_to(wanted[..., None].astype(F32), x.shape))
    assert np.array_equal(evaluated("x / row_max(abs(x))", x)[0], x / abs(x).max(-1)[..., None])
    apart = x - evaluated("row_mean(x)", x)[0]
    found, _ = evaluated("row_mean((x - row_mean(x)) ** 2)", x)
    assert np.array_equal(found, evaluated("row_mean(x)", apart * apart)[0])


def test_indices_and_parameters():
    x = np.random.default_rng(2).standard_normal((3, 2, 8)).astype(F32)
    gain = np.random.default_rng(3).standard_normal((2, 8)).astype(F32)
    positions, table = np.array([4, 0, 2]), np.arange(40).reshape(5, 8).astype(F32)
    assert np.array_equal(evaluated("x * gain[head, dim]", x, gain=gain)[0], x * gain)
    found, inside = evaluated(
        "x + table[positions[token], dim]", x, positions=positions, table=table
    )
    assert np.array_equal(found, x + table[positions][:, None])
    assert inside.all()
    found, _ = evaluated("block * 4 + offset - slot + x", x)
    assert np.array_equal(found, x)
    found, _ = evaluated("-at(dim + 4) if dim < 4 else at(dim - 4)", x)
    assert np.array_equal(found, np.concatenate([-x[..., 4:], x[..., :4]], -1))
    assert np.array_equal(evaluated("x if keep else 0", x, keep=np.True_)[0], x)
    assert np.array_equal(evaluated("x * f", x, f=F32(3))[0], x * 3)


def test_an_index_never_leaves_a_parameter():
    x = np.ones((4, 2, 8), F32)
    positions, table = np.array([0, 5, -1, 4]), np.arange(5).astype(F32)
    names = {"positions": positions, "table": table}
    _, inside = evaluated("x * table[positions[token]]", x, **names)
    assert inside[:, 0, 0].tolist() == [True, False, False, True]
    # What a condition rules out is not an index.
    for text in (
        "table[positions[token]] if 0 <= positions[token] < 5 else x",
        "where(0 <= positions[token] and positions[token] < 5, table[positions[token]], x)",
        "1 if positions[token] < 0 or positions[token] > 4 or table[positions[token]] > 0 else 0",
        "1 if 0 <= positions[token] < 5 and table[positions[token]] > 0 else 0",
    ):
        assert evaluated(text, x, **names)[1].all(), text
    assert not evaluated("at(dim + 1)", x)[1][..., 7].any()
    assert not evaluated("row_sum(at(dim + 1))", x)[1].any()
    assert evaluated("at(min(dim + 1, 7))", x)[1].all()


def numbers(depth):
    """Return texts of numbers, none of which divides integers, which Python does in float64."""
    leaves = st.sampled_from(["x", "dim", "2", "0.5", "3.25", "f", "n"])
    if not depth:
        return leaves
    part = numbers(depth - 1)
    test = st.tuples(part, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), part).map(" ".join)
    return st.one_of(
        leaves,
        st.tuples(part, st.sampled_from("+-*"), part).map(lambda t: f"({' '.join(t)})"),
        st.tuples(part, part).map(lambda t: f"((x * {t[0]}) / {t[1]})"),
        part.map(lambda t: f"-({t})"),
        part.map(lambda t: f"abs({t})"),
        part.map(lambda t: f"({t}) ** 3"),
        st.tuples(part, test, part).map(lambda t: f"({t[0]} if {t[1]} else {t[2]})"),
        st.tuples(part, test, test, part).map(
            lambda t: f"({t[0]} if {t[1]} and not {t[2]} else {t[3]})"
        ),
    )


@settings(max_examples=500, deadline=None)
@given(text=numbers(3), x=st.floats(-4, 4, width=32), f=st.floats(-4, 4, width=32))
def test_numbers_are_those_of_python(text, x, f):
    """With float32 of NumPy for numbers, whose operations with an int of Python are of float32."""
    found, _ = evaluated(text, np.full((1, 1, 3), x, F32), f=F32(f), n=np.int64(-3))
    with np.errstate(all="ignore"):
        names = {"x": F32(x), "f": F32(f), "n": -3, "abs": abs}
        code = ast.parse(text, mode="eval")
        for node in ast.walk(code):  # a literal is of float32
            if isinstance(node, ast.Constant) and isinstance(node.value, float):
                node.value = float(F32(node.value))
        wanted = [
            eval(compile(_cubes(code), "", "eval"), {**names, "dim": dim, "cube": cube, "f32": F32})
            for dim in range(3)
        ]
    assert np.array_equal(found[0, 0], np.array([F32(each) for each in wanted]), equal_nan=True), (
        text
    )


def cube(base):
    return base * base * base


class _Cubes(ast.NodeTransformer):
    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.Pow):
            return ast.Call(ast.Name("cube", ast.Load()), [node.left], [])
        return node

    def visit_Constant(self, node):
        if isinstance(node.value, float):
            return ast.Call(ast.Name("f32", ast.Load()), [node], [])
        return node


def _cubes(code):
    return ast.fix_missing_locations(_Cubes().visit(code))


def test_a_large_power_takes_few_operations():
    """Its factors are shared, so this is 18 products and not 2 ** 18."""
    assert value("((x ** 64) ** 64) ** 64", 1.0) == 1


@pytest.mark.parametrize(
    ("text", "message", "marked"),
    [
        ("", "must not be empty", None),
        ("x +", "is not a Python expression", None),
        ("x * gian[head]", "needs the parameter gian, which is not given; did you mean gain?",
         "gian[head]"),
        ("x * gain", "must index gain with as many indices as it has axes: it has 1 axis, got 0",
         "gain"),
        ("gain[head, dim]", "it has 1 axis, got 2", "gain[head, dim]"),
        ("gain[x]", "needs an integer for an index, got a number with a fraction; use int(", "x"),
        ("gain[-1]", "has a negative index, which is outside", "-1"),
        ("at(-1)", "has a negative index, which is outside", "-1"),
        ("x.real", "has an attribute, which is not in the language", "x.real"),
        ("'a'", "has a string, which is not in the language", "'a'"),
        ("1j", "has a complex number", "1j"),
        ("None", "has None, which is not in the language", "None"),
        ("[x]", "has a list", "[x]"), ("lambda: x", "has a lambda", "lambda: x"),
        ("(y := x)", "has an assignment", "y := x"), ("f'{x}'", "has a string", "f'{x}'"),
        ("[i for i in x]", "has a comprehension", "[i for i in x]"),
        ("__import__('os')", "calls __import__, which is not in the language", "__import__"),
        ("sqr(x)", "calls sqr, which is not in the language; did you mean sqrt?", "sqr"),
        ("(x)(x)", "calls x, which", "x"), ("(x + 1)(x)", "calls a BinOp", "x + 1"),
        ("sqrt", "must call sqrt: sqrt(...)", "sqrt"),
        ("sqrt(x, x)", "must call sqrt with 1 argument, got 2", "sqrt(x, x)"),
        ("max(x)", "must call max with 2 or more arguments, got 1", "max(x)"),
        ("sqrt(x=x)", "must call sqrt with positional arguments only", "sqrt(x=x)"),
        ("max(*x, x)", "has a starred argument", "*x"),
        ("clip(x, 0, 1)", "in the language; write min(max(x, low), high)", "clip"),
        ("sign(x)", "in the language; write (x > 0) - (x < 0)", "sign"),
        ("x @ x", "has an operator that is not one of", "x @ x"),
        ("x ^ 2", "+ - * / // % **; a power is **", "x ^ 2"),
        ("isnan(x) | (x > 0)", "; of truth values, use or", "isnan(x) | (x > 0)"),
        ("isnan(x) & (x > 0)", "; of truth values, use and", "isnan(x) & (x > 0)"),
        ("~x", "has the operator ~", "~x"),
        ("x in x", "has a comparison that is not one of", "x in x"),
        ("x is x", "has a comparison that is not one of", "x is x"),
        ("x[0]", "has an index for x, which takes none; use at(d)", "x[0]"),
        ("gain[0:1]", "has a slice", "0:1"),
        ("(x + x)[0]", "has an index of something", "(x + x)[0]"),
        ("x and x", "needs a truth value here, got a number; compare it with 0", "x"),
        ("1 if dim else 2", "needs a truth value here, got an integer; compare it with 0", "dim"),
        ("x > 1", "must give a number for each element, not a truth value", "x > 1"),
        ("at(x)", "needs an integer for an index", "x"),
        ("9223372036854775808", "has an integer of more than 64 bits", "9223372036854775808"),
        ("größe + x[0]", "has an index for x", "x[0]"),
        ("gäin * größe", "needs the parameter gäin", "gäin"),
        ("x + größe", "needs the parameter größe", "größe"),
    ],
)  # fmt: skip
def test_what_is_refused(text, message, marked):
    with pytest.raises(ValueError, match=r"^k") as caught:
        parse(text, "k[0]").typed({"gain": Parameter(Kind.FLOAT, 1)})
    said, *place = str(caught.value).splitlines()
    assert message in said
    assert said.startswith("k[0] ")
    if marked is not None:
        assert isinstance(caught.value, ExpressionError)
        line, mark = place
        assert line == f"    {text}"
        assert line[mark.index("^") : len(mark)] == marked


@pytest.mark.parametrize(
    "text",
    ["(" * 300 + "x" + ")" * 300, "-" * 5000 + "x", "x" + "+x" * 4000, "x\ny", "x\0", "x\t+ 1",
     "9" * 5000, "a." * 2000 + "b", "x" * 20_000, "gain" + "[0]" * 3000, "not " * 2400 + "True"],
)  # fmt: skip
def test_hostile_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"^expression "):
        parse(text)


@given(st.text(max_size=40))
def test_any_text_is_refused_or_read(text):
    with contextlib.suppress(ExpressionError, BadParamError):
        parse(text)


def test_names_of_parameters():
    assert parse("b * a[c[dim]] + b + x + dim").parameters == ("b", "a", "c")


def test_every_operation_is_known():
    from pagedcache.expressions import evaluate

    known = set(evaluate._FUNCTIONS) | set(evaluate._ROW_FUNCTIONS) | {"at"}
    assert known == set(OPERATIONS)
    assert set(evaluate._WHOLE) < known
    assert not set(FUNCTIONS) & set(INDICES)
