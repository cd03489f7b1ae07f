# SPDX-License-Identifier: Apache-2.0
"""Expressions as they are printed for a GPU, compiled for the host, against NumPy, to the bit."""

from __future__ import annotations

import contextlib
import ctypes
import random
import shutil

import numpy as np
import pytest
from test_expressions import F32, KINDS

from pagedcache.expressions import ExpressionError, Parameter, parse
from pagedcache.expressions.cuda import printed
from pagedcache.expressions.evaluate import _ROW_FUNCTIONS, Scope, evaluate
from pagedcache.expressions.tree import OPERATIONS

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")

TOKENS, HEADS, DIMS = 3, 2, 8
# Parameters; "class" is a name in the language, and a keyword of C++.
PARAMETERS = {
    "gain": np.random.default_rng(0).standard_normal((HEADS, DIMS)).astype(F32),
    "class_": np.array([3, 0, -1, 7, 2]), "n": np.int64(5), "f": F32(0.75), "keep": np.True_,
    "mask": np.arange(DIMS) % 3 == 0,
}  # fmt: skip

HARNESS = """
namespace pagedcache { namespace language {
struct Place {
  static constexpr int kWidth = 1;
  float x;
  Whole dim, head, token, slot, block, offset;
  const float* row;
  float at(bool& inside, Whole d) const {
    inside = inside && d >= 0 && d < %(dims)d;
    return inside ? row[d] : 0.0f;
  }
};
struct Parameters {
  Array<float, 2> p0;
  Array<long long, 1> p1;
  Whole p2;
  float p3;
  bool p4;
  Array<bool, 1> p5;
};
inline float combined(int kind, float a, float b) {
  return kind < 2 ? add(a, b) : kind == 2 ? max(a, b) : min(a, b);
}
template <typename Function>
RowValue ofRow(int kind, const Place* places, const Parameters& p, const RowValue* rows,
               Function function) {
  float values[%(dims)d];
  bool inside = true;
  for (int d = 0; d < %(dims)d; ++d) values[d] = function(places[d], p, rows, inside);
  for (int step = 1; step < %(dims)d; step *= 2) {
    for (int d = 0; d + step < %(dims)d; d += 2 * step) {
      values[d] = combined(kind, values[d], values[d + step]);
    }
  }
  return {kind == 1 ? divide(values[0], %(dims)d.0f) : values[0], inside};
}
}}
"""
RUN = """
extern "C" void run_{name}(const pagedcache::language::Parameters* p, const float* x, float* out,
                           bool* inside) {{
  using namespace pagedcache::language;
  for (int token = 0; token < {tokens}; ++token) for (int head = 0; head < {heads}; ++head) {{
    const float* const row = x + (token * {heads} + head) * {dims};
    Place places[{dims}];
    for (int d = 0; d < {dims}; ++d) {{
      places[d] = {{row[d], d, head, token, token * 5, token * 5 / 4, token * 5 % 4, row}};
    }}
    [[maybe_unused]] RowValue rows[{most}] = {{}};
    {stages}
    for (int d = 0; d < {dims}; ++d) {{
      bool in = true;
      *out++ = {name}(places[d], *p, rows, in);
      *inside++ = in;
    }}
  }}
}}
"""


def text_of(rng, kind, depth):
    """Return a random expression of a kind."""

    def some(kind):
        return text_of(rng, kind, depth - 1)

    if depth == 0 or rng.random() < 0.1:
        leaves = {
            "float": ["x", "x", "x", "f", "gain[head, dim]", "0.1", "2.5", "1e30", "1e-41",
                      "at(7 - dim)"],
            "int": ["dim", "head", "token", "slot", "block", "offset", "n", "3", "class_[token]"],
            "bool": ["keep", "mask[dim]", "True", "dim < 4"],
        }  # fmt: skip
        return rng.choice(leaves[kind])
    if kind == "bool":
        made = rng.choice([
            lambda: f"({some('float')} {rng.choice(COMPARISONS)} {some('float')})",
            lambda: f"({some('int')} {rng.choice(COMPARISONS)} {some('float')})",
            lambda: f"({some('bool')} and {some('bool')})",
            lambda: f"({some('bool')} or {some('bool')})",
            lambda: f"(not {some('bool')})", lambda: f"isnan({some('float')})",
            lambda: f"({some('int')} < {some('int')} <= {some('int')})",
        ])  # fmt: skip
        return made()
    if kind == "int":
        made = rng.choice([
            lambda: f"({some('int')} {rng.choice(('+', '-', '*', '//', '%'))} {some('int')})",
            lambda: f"abs({some('int')})", lambda: f"-{some('int')}",
            lambda: f"min({some('int')}, {some('int')})",
            lambda: f"max({some('int')}, {some('int')})",
            lambda: f"({some('int')} if {some('bool')} else {some('int')})",
            lambda: f"class_[{some('int')}]", lambda: f"int({some('float')})",
            lambda: f"({some('int')}) ** 3",
        ])  # fmt: skip
        return made()
    made = rng.choice([
        lambda: f"({some('float')} {rng.choice(('+', '-', '*', '/', '//', '%'))} {some('float')})",
        lambda: f"({some('float')} {rng.choice('+-*/')} {some('int')})",
        lambda: f"({some('int')} / {some('int')})", lambda: f"-{some('float')}",
        lambda: f"({some('float')}) ** {rng.choice((2, 5))}",
        lambda: f"{rng.choice(EXACT)}({some('float')})",
        lambda: f"{rng.choice(('min', 'max'))}({some('float')}, {some('float')}, {some('int')})",
        lambda: f"where({some('bool')}, {some('float')}, {some('float')})",
        lambda: f"({some('float')} if {some('bool')} else {some('int')})",
        lambda: f"at({some('int')})", lambda: f"gain[{some('int')}, {some('int')}]",
        lambda: f"row_{rng.choice(('sum', 'mean', 'max', 'min'))}({some('float')})",
    ])  # fmt: skip
    return made()


COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
EXACT = ("abs", "sqrt", "floor", "ceil", "rint", "round", "pow2_ceil", "float16", "bfloat16")


def random_tree(rng, depth):
    """Return the text and the tree of a random expression whose axes have the right lengths."""
    known = {
        name: Parameter(KINDS[v.dtype], np.ndim(v), np.shape(v)) for name, v in PARAMETERS.items()
    }
    while True:
        text = text_of(rng, "float", depth)
        with contextlib.suppress(ExpressionError):
            tree = parse(text).typed(known, {"dim": DIMS, "head": HEADS})
            if parse(text).by_token <= {"class_"}:  # others have no entry for each token
                return text, tree


def exact(node):
    operation = OPERATIONS.get(node.operation)
    return (operation is None or operation.exact) and all(map(exact, node.operands))


def parameters_struct():
    """Return the bytes of `Parameters`, as C lays them out."""
    words = []
    for value in PARAMETERS.values():
        if np.ndim(value):
            steps = [step // value.itemsize for step in value.strides]
            words += [value.ctypes.data, *value.shape, *steps]
        elif value.dtype == np.int64:
            words.append(int(value))
        elif value.dtype == F32:  # in one word with the bool that follows
            words.append(int(value.view(np.uint32)) | int(PARAMETERS["keep"]) << 32)
    return np.array(words, np.int64)


def by_numpy(tree, x):
    token, slot = np.arange(TOKENS).reshape(-1, 1, 1), np.arange(TOKENS).reshape(-1, 1, 1) * 5
    indices = {"dim": np.arange(DIMS), "head": np.arange(HEADS)[:, None], "token": token,
               "slot": slot, "block": slot // 4, "offset": slot % 4}  # fmt: skip
    return evaluate(tree, Scope(x, indices, {k: np.asarray(v) for k, v in PARAMETERS.items()}))


def values():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((TOKENS, HEADS, DIMS)) * 3).astype(F32)
    x[0, 0, :6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42]
    x[1, 1, :6] = [0.5, -0.5, 2.5, -2.5, 8388609, 0.49999997]
    return x


def compiled(compiler, trees):
    members = {name: f"parameters.p{i}" for i, name in enumerate(PARAMETERS)}
    kinds = list(_ROW_FUNCTIONS)
    parts = [HARNESS % {"dims": DIMS}]
    for i, tree in enumerate(trees):
        name = f"step{i}"
        made = printed(name, tree, members)
        stages = "\n    ".join(
            f"rows[{j}] = ofRow({kinds.index(row.operation)}, places, *p, rows, "
            f"[](auto&... a) {{ return {name}_row{j}(a...); }});"
            for j, row in enumerate(made.rows)
        )
        parts.append(f"namespace pagedcache {{ namespace language {{\n{made.text}}}}}")
        parts.append(RUN.format(name=name, tokens=TOKENS, heads=HEADS, dims=DIMS, stages=stages,
                                most=max(1, len(made.rows))))  # fmt: skip
    return compiler.library("expressions.cuh", (), "\n".join(parts))


def test_what_is_printed_is_what_numpy_evaluates(compiler):
    rng, x = random.Random(0), values()
    texts, trees = zip(*(random_tree(rng, 1 + i % 4) for i in range(300)), strict=True)
    library, struct = compiled(compiler, trees), parameters_struct()
    different = 0
    for i, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        assert exact(tree)
        wanted, wanted_inside = by_numpy(tree, x)
        out, inside = np.zeros(x.shape, F32), np.zeros(x.shape, bool)
        arrays = (struct, x, out, inside)
        getattr(library, f"run_step{i}")(*(ctypes.c_void_p(each.ctypes.data) for each in arrays))
        assert np.array_equal(inside, wanted_inside), text
        nan = np.isnan(wanted)
        assert np.array_equal(np.isnan(out)[inside], nan[inside]), text
        of_numbers = inside & ~nan
        assert np.array_equal(
            out.view(np.uint32)[of_numbers],
            np.ascontiguousarray(wanted).view(np.uint32)[of_numbers],
        ), text
        different += len(np.unique(out[of_numbers])) > 3
    assert different > 100


def test_the_other_functions_are_near(compiler):
    names = [name for name, each in OPERATIONS.items() if not each.exact and name != "power"]
    texts = [f"{name}(x)" for name in names] + ["abs(x) ** x", "x ** 0.5", "x ** -2"]
    trees = [parse(text).typed({}) for text in texts]
    library, struct, x = compiled(compiler, trees), parameters_struct(), values()
    for i, (text, tree) in enumerate(zip(texts, trees, strict=True)):
        wanted, _ = by_numpy(tree, x)
        out, inside = np.zeros(x.shape, F32), np.zeros(x.shape, bool)
        arrays = (struct, x, out, inside)
        getattr(library, f"run_step{i}")(*(ctypes.c_void_p(each.ctypes.data) for each in arrays))
        np.testing.assert_array_max_ulp(
            np.where(np.isnan(wanted), 0, out), np.where(np.isnan(wanted), 0, wanted), 2
        )
        assert np.array_equal(np.isnan(out), np.isnan(wanted)), text


def test_a_value_that_is_used_twice_is_printed_once():
    tree = parse("(x + 1) ** 64").typed({})
    assert printed("step", tree, {}).text.count("multiply(") == 6
