# SPDX-License-Identifier: Apache-2.0
"""Writes and reads with steps on the CPU: what they say, what they refuse, what they share."""

from __future__ import annotations

import gc
import pickle
import re
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pagedcache as pc
from pagedcache.expressions.tree import FUNCTIONS
from pagedcache.operators.programs import kernels
from pagedcache.operators.programs.text import Held
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    NotSupportedError,
)

F32 = np.float32
TOKENS, HEADS, Q_HEADS, SIZE, BLOCKS, SLOTS = 4, 2, 4, 8, 3, 4
POSITIVE = pc.cuda("y = x > 0.0f ? x : 0.0f;", numpy=lambda x: np.maximum(x, 0))


class Call:
    """The arguments of a call, as far as they are not given."""

    def __init__(self, dtype=F32, cache=None, **given):
        rng = np.random.default_rng(0)
        make = rng.standard_normal
        self.k_cache, self.v_cache = np.full((2, BLOCKS, SLOTS, HEADS, SIZE), 3, cache or dtype)
        self.k, self.v = make((2, TOKENS, HEADS, SIZE)).astype(dtype)
        self.q = make((TOKENS, Q_HEADS, SIZE)).astype(dtype)
        self.slots = np.array([5, -1, 0, 11])
        self.table = make((9, SIZE)).astype(F32)
        self.positions = np.array([3, 0, 8, 1])
        self.given = given

    def __call__(self, kernel, **given):
        given = {**self.given, **given}
        options = {"layout"} & set(given)
        assert not options
        kernel(self.k_cache, self.v_cache, self.k, self.v, self.slots, **given)

    @property
    def untouched(self):
        return bool((self.k_cache == 3).all() and (self.v_cache == 3).all())


def test_no_steps_are_a_plain_write():
    call, plain = Call(), Call()
    kernel = pc.WriteKernel()
    call(kernel)
    pc.paged_caching(plain.k_cache, plain.v_cache, plain.k, plain.v, plain.slots)
    assert call.k_cache.tobytes() == plain.k_cache.tobytes()
    assert call.v_cache.tobytes() == plain.v_cache.tobytes()
    assert [type(each) for each in kernel._operations()] == [pc.Descriptor]
    call.slots = np.array([99, 0, 1, 2])
    call(kernel)
    with pytest.raises(pc.InvalidSlotError):
        kernel.check()


def test_no_steps_are_a_plain_read():
    call = Call()
    pc.paged_caching(call.k_cache, call.v_cache, call.k, call.v, call.slots)
    k_out, v_out = np.zeros_like(call.k), np.zeros_like(call.v)
    kernel = pc.ReadKernel()
    kernel(call.k_cache, call.v_cache, call.slots, k_out, v_out)
    assert [type(each) for each in kernel._operations()] == [pc.GatherDescriptor]
    written = call.slots >= 0
    assert np.array_equal(k_out[written], call.k[written])
    assert not k_out[~written].any()


def test_what_is_written_is_read_back():
    """Rotated on the way in, and back on the way out."""
    call = Call(np.float16, F32)
    store = pc.WriteKernel(k=[pc.rope("table", "positions")], v=["x * 2"], k_format="float32",
                           v_format="float32")  # fmt: skip
    angle = np.random.default_rng(1).standard_normal((9, SIZE // 2)).astype(F32)
    table = np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
    back = np.concatenate([np.cos(angle), -np.sin(angle)], axis=1)
    call(store, table=table, positions=call.positions)
    load = pc.ReadKernel(k=[pc.rope("table", "positions")], v=["x / 2"], k_format="float32",
                         v_format="float32")  # fmt: skip
    k_out, v_out = np.zeros((2, TOKENS, HEADS, SIZE), np.float16)
    load(call.k_cache, call.v_cache, call.slots, k_out, v_out, table=back,
         positions=call.positions)  # fmt: skip
    written = call.slots >= 0
    np.testing.assert_allclose(k_out[written], call.k[written], atol=2e-3)
    assert np.array_equal(v_out[written], call.v[written])
    assert not k_out[~written].any()


def test_rows_of_padding_are_put_out_but_not_stored():
    call = Call()
    k_out, q_out = np.zeros_like(call.k), np.zeros_like(call.q)
    call(pc.WriteKernel(k=["x + 1"], q=["x - 1"]), k_out=k_out, q=call.q, q_out=q_out)
    assert np.array_equal(k_out, call.k + F32(1))
    assert np.array_equal(q_out, call.q - F32(1))
    rows = call.k_cache.reshape(-1, HEADS, SIZE)
    assert np.array_equal(rows[call.slots[[0, 2, 3]]], (call.k + F32(1))[[0, 2, 3]])
    assert (np.delete(rows, call.slots[[0, 2, 3]], axis=0) == 3).all()


def test_indices_of_padding():
    call = Call()
    k_out = np.zeros_like(call.k)
    call(pc.WriteKernel(k=["slot * 100 + block * 10 + offset"]), k_out=k_out)
    assert k_out[:, 0, 0].tolist() == [511, -100 - 10 + 3, 0, 1100 + 20 + 3]


@pytest.mark.parametrize("debug", [False, True])
def test_in_place(debug):
    call = Call()
    wanted = call.q * F32(2), call.k * F32(3), call.v.copy()
    kernel = pc.WriteKernel(q=["x * 2"], k=["x * 3"], debug=debug)
    call(kernel, q=call.q, q_out=call.q, k_out=call.k, v_out=call.v)
    for found, each in zip((call.q, call.k, call.v), wanted, strict=True):
        assert np.array_equal(found, each)


def test_debug_finds_what_overlaps():
    call = Call()
    kernel = pc.WriteKernel(q=["x * 2"], debug=True)
    memory = np.zeros((TOKENS + 1, Q_HEADS, SIZE), F32)
    with pytest.raises(pc.SourceOverlapError, match="q must not share memory with q_out"):
        call(kernel, q=memory[1:], q_out=memory[:-1])
    assert call.untouched


def test_outputs_that_share_memory_are_refused():
    call = Call()
    with pytest.raises(pc.CacheOverlapError):
        call(pc.WriteKernel(k=["x + 1"]), k_out=call.k, v_out=call.k)
    assert call.untouched


def test_numbers_do_not_compile_anew():
    call = Call()
    kernel = pc.WriteKernel(k=["x * factor"])
    for factor in (1.0, 2.5, float("inf"), np.float32(7), np.float64(3)):
        call(kernel, factor=factor)
    [variant] = kernel._variants.values()
    assert len(variant.kept.operations()) == 1
    assert call.k_cache.reshape(-1, HEADS, SIZE)[5].tolist() == (call.k[0] * F32(3)).tolist()
    call(kernel, factor=3)  # an int is another kind
    call(kernel, factor=True)
    assert len(kernel._variants) == 3
    array = np.array(0.5, F32)
    call(kernel, factor=array)
    assert call.k_cache.reshape(-1, HEADS, SIZE)[5].tolist() == (call.k[0] * F32(0.5)).tolist()


def test_any_number_of_tokens_uses_one_operation():
    kernel = pc.WriteKernel(k=["x + token"])
    cache = np.zeros((2, 8, 4, HEADS, SIZE), F32)
    for tokens in (1, 7, 3, 0, 30):
        rows = np.zeros((2, tokens, HEADS, SIZE), F32)
        kernel(*cache, *rows, np.arange(tokens))
    assert len(kernel._operations()) == 1
    assert cache[0].reshape(-1, HEADS, SIZE)[:31, 0, 0].tolist() == [*range(30), 0]


def test_arrays_are_not_kept():
    call = Call()
    kernel = pc.WriteKernel(k=["x + gain[head, dim]"])
    call(kernel, gain=np.ones((HEADS, SIZE), F32))
    alive = [each for each in gc.get_objects() if type(each) is Call]
    assert len(alive) == 1
    del call, alive
    assert not [each for each in gc.get_objects() if type(each) is Call]


def test_positions_outside_the_table():
    kernel = pc.WriteKernel(
        q=[pc.rope("table", "positions")], k=[pc.rope("table", "positions")], v=["x + 1"]
    )
    call = Call()
    q_out, k_out = np.full_like(call.q, 9), np.full_like(call.k, 9)
    positions = np.array([3, 99, 9, -1])  # the second is of padding
    call(kernel, q=call.q, q_out=q_out, k_out=k_out, table=call.table, positions=positions)
    assert (q_out[1:] == 9).all()
    assert (k_out[1:] == 9).all()
    assert not (q_out[0] == 9).any()
    rows = call.k_cache.reshape(-1, HEADS, SIZE)
    assert (rows[[0, 11]] == 3).all()
    assert not (rows[5] == 3).any()
    with pytest.raises(pc.InvalidIndexError) as error:
        kernel.check()
    assert str(error.value) == (
        "the steps of q have an index, such as a position, that is out of range at token 2, so its "
        "row was not written (12 invalid rows since the last check)"
    )
    assert (error.value.steps, error.value.token, error.value.count) == ("q", 2, 12)
    kernel.check()


def test_raising_for_invalid_indices():
    kernel = pc.WriteKernel(v=["gain[ids[token], dim] * x"], on_invalid="raise")
    call = Call()
    gain = np.ones((2, SIZE), F32)
    with pytest.raises(pc.InvalidIndexError, match="the steps of v have an index"):
        call(kernel, gain=gain, ids=np.array([0, 1, 2, 0]))
    call(kernel, gain=gain, ids=np.array([0, 7, 1, 0]))  # of padding
    call.slots[0] = 12
    with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[0\] = 12"):
        call(kernel, gain=gain, ids=np.array([0, 1, 1, 0]))


def test_q_in_other_formats():
    call = Call()
    for dtype, options in (
        (ml_dtypes.float8_e4m3fn, {}), (np.float16, {}),
        (np.uint8, {"q_format": "float8_e5m2"}),
    ):  # fmt: skip
        q_out = np.zeros(call.q.shape, dtype)
        call(pc.WriteKernel(q=["x * 3"], **options), q=call.q, q_out=q_out)
        bits = q_out if dtype is not np.uint8 else q_out.view(ml_dtypes.float8_e5m2)
        assert np.array_equal(bits, (call.q * F32(3)).astype(bits.dtype))


GAIN = np.ones((HEADS, SIZE), F32)
INT8 = np.full((2, BLOCKS, SLOTS, HEADS, SIZE), 3, np.int8)
BAD = [
    ({"k": ["x * gain[head, dim]"]}, {}, BadParamError,
     "gain must be given, because k[0] names it: x * gain[head, dim]"),
    ({"k": ["x * gain[head, dim]"]}, {"gain": GAIN, "bias": 1.0}, BadParamError,
     "bias must not be given, because no step names it"),
    ({"k": ["x * 2"]}, {"k_format": "int8"}, BadParamError,
     "k_format must not be given to a call; give it to WriteKernel(k_format=...)"),
    ({"k": ["x * gain[head, dim]"]}, {"gain": GAIN[:, :4]}, pc.ExpressionError,
     ("k[0] indexes axis 1 of gain by dim, so it must have a length of 8, got shape (2, 4)\n"
      "    x * gain[head, dim]\n        ^~~~~~~~~~~~~~~")),
    ({"k": ["x * gain[head, dim]"]}, {"gain": np.ones((HEADS, 16), F32)}, pc.ExpressionError,
     "k[0] indexes axis 1 of gain by dim, so it must have a length of 8, got shape (2, 16)"),
    ({"k": ["x * gain[head, dim]"]}, {"gain": 1.0}, pc.ExpressionError,
     "k[0] must index gain with as many indices as it has axes"),
    ({"k": ["x + bias[token]"]}, {"bias": np.ones(3, F32)}, BadTensorShapeError,
     "bias must have at least 4 rows, one for each entry of slot_mapping"),
    ({"k": ["x + bias"]}, {"bias": np.ones((), np.float64)}, BadTensorDtypeError,
     "bias must be float16, bfloat16, float32, int32, int64 or bool"),
    ({"k": ["x + n"]}, {"n": 1 << 63}, BadParamError, "n must fit in 64 bits"),
    ({"k": ["x + n"]}, {"n": "1"}, BadParamTypeError, "n must be an array"),
    ({"k": ["x > 0"]}, {}, pc.ExpressionError,
     "k[0] must give a number for each element, not a truth value"),
    ({"k": [pc.rms_norm("w", 1e-6)]}, {"w": np.ones(4, F32)}, BadParamError,
     "k[0] rms_norm('w', eps=1e-06) needs w of shape (8,), one for each dimension of a head"),
    ({"k": [pc.rms_norm("w", 1e-6)]}, {"w": 1.0}, BadParamError,
     "k[0] rms_norm('w', eps=1e-06) needs w with 1 axis [head_size], got a number"),
    ({"k": [pc.rope("t", "p", first=2)]},
     {"t": np.ones((9, 8), F32), "p": np.zeros(4, np.int64)}, BadParamError,
     "k[0] rope('t', 'p', first=2) must rotate dimensions inside the head, which has 8, got 2"),
    ({"k": [pc.rope("t", "p")]}, {"t": np.ones((9, 8), F32), "p": np.zeros(4, F32)},
     BadParamError, "k[0] rope('t', 'p') needs p of integers, got floats"),
    ({"k": [pc.rope("t", "p")]}, {"t": np.ones((9, 3), F32), "p": np.zeros(4, np.int64)},
     BadParamError, "k[0] rope('t', 'p') needs t with an even number of columns"),
    ({"v": [pc.hadamard(group=16)]}, {}, BadParamError,
     "v[0] hadamard(group=16) must have a group that divides the head size, 8, got 16"),
    ({"k": [pc.quantize("1", "x", "int8")]}, {"k_cache": INT8[0]}, BadParamError,
     "k_scale must be given, because k_cache stores int8, which needs one"),
    ({"k": [pc.quantize("1", "x", "int8")]},
     {"k_cache": INT8[0], "k_scale": np.ones(HEADS, F32)}, BadParamError,
     "k_scale must have the shape of scales of a token and head, because the steps of k quantise"),
    ({"k": [pc.quantize("row_max(x)", "x", "int8", group=4)]},
     {"k_cache": INT8[0], "k_scale": np.ones((BLOCKS, SLOTS, HEADS), F32)}, BadParamError,
     "k_scale must have the shape of scales of a token and head, and 2 groups"),
    ({"k": [pc.quantize("x", "x / s", "int8")]},
     {"k_cache": INT8[0], "k_scale": np.ones((BLOCKS, SLOTS, HEADS), F32)}, pc.ExpressionError,
     "the scale of quantize must give one number for a row; use x and dim inside row functions"),
    ({"q": ["x"]}, {}, BadParamError, "q must be given, because the kernel has steps for q"),
    ({"k": ["x"]}, {"q": np.ones((4, 2, 8), F32)}, BadParamError,
     "q_out must be given, because q is; it may be q itself"),
    ({"k": ["x"]}, {"q_out": np.ones((4, 2, 8), F32)}, BadParamError,
     "q must be given, because q_out is"),
    ({"q": ["x"]}, {"q": np.ones((4, 2, 8), F32), "q_out": np.ones((4, 2, 8), np.uint8)},
     BadParamError, "q_format must be given, because q_out is of bytes (uint8)"),
    ({"k": [pc.cuda("y = x;")]}, {}, NotSupportedError,
     "k[0] cuda('y = x;') has no numpy=, which is needed on the CPU"),
]  # fmt: skip


@pytest.mark.parametrize(("steps", "given", "kind", "message"), BAD)
def test_bad_calls(steps, given, kind, message):
    call = Call()
    kernel = pc.WriteKernel(**steps)
    given = dict(given)
    call.k_cache = given.pop("k_cache", call.k_cache)
    before = call.k_cache.copy()
    with pytest.raises(kind) as error:
        call(kernel, **given)
    assert str(error.value).startswith(message)
    assert "\n\n" not in str(error.value)
    assert call.k_cache.tobytes() == before.tobytes()
    assert (call.v_cache == 3).all()


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: pc.WriteKernel(k=3), BadParamTypeError, "k must be a list of steps, got 3"),
        (lambda: pc.WriteKernel(k=[3]), BadParamTypeError, "k[0] must be an expression, as"),
        (lambda: pc.WriteKernel(k=["os.remove(x)"]), pc.ExpressionError, "k[0] calls an attribute"),
        (lambda: pc.WriteKernel(k=["x.y"]), pc.ExpressionError, "k[0] has an attribute, which is"),
        (lambda: pc.WriteKernel(q=[pc.quantize("1", "x", "int8")]), BadParamError,
         "q[0] quantize can only be a step of k or v of a WriteKernel"),
        (lambda: pc.ReadKernel(k=[pc.quantize("1", "x", "int8")]), BadParamError,
         "k[0] quantize can only be a step of k or v of a WriteKernel"),
        (lambda: pc.WriteKernel(k=[pc.quantize("1", "x", "int8"), "x"]), BadParamError,
         "k[0] quantize must be the last step of a WriteKernel"),
        (lambda: pc.WriteKernel(k=["x + stream"]), BadParamError, "the name of a parameter must"),
        (lambda: pc.WriteKernel(layout="XYZ"), BadParamError, "layout must be one of HND, NHD"),
        (lambda: pc.WriteKernel(k_format="float7"), BadParamError, "k_format must be one of"),
        (lambda: pc.WriteKernel(on_invalid="no"), BadParamError, "on_invalid must be one of skip"),
        (lambda: pc.rms_norm(3, 1), BadParamTypeError, "weight must be the name of a parameter"),
        (lambda: pc.rms_norm("a b", 1), BadParamError, "weight must be an identifier that"),
        (lambda: pc.rms_norm("w", "1"), BadParamTypeError, "eps must be a number, got '1'"),
        (lambda: pc.rope("t", "p", style="gptj"), BadParamError, "style must be one of neox, in"),
        (lambda: pc.rope("t", "p", first=-1), BadParamError, "first must be at least 0, got -1"),
        (lambda: pc.hadamard(group=3), BadParamError, "group must be a power of two, got 3"),
        (lambda: pc.cast("int8"), BadParamError, "dtype must be one of float16"),
        (lambda: pc.quantize("s", "x", "int8"), BadParamError, "scale must not have s,"),
        (lambda: pc.quantize("1", "x", "float16"), BadParamError, "format must be one of"),
        (lambda: pc.quantize("1", "x / scale", "int8"), pc.ExpressionError,
         "the code of quantize must call the scale s"),
        (lambda: pc.quantize(1, "x", "int8"), BadParamTypeError, "scale must be an expression"),
        (lambda: pc.cuda(""), BadParamError, "text must not be empty"),
        (lambda: pc.cuda("y = x;", numpy=3), BadParamTypeError, "numpy must be a function of x"),
        (lambda: pc.cuda("y = a;", numpy=lambda x, b: x, parameters=("a",)), BadParamError,
         "parameters must have b, which numpy= names"),
    ],
)  # fmt: skip
def test_bad_kernels(make, kind, message):
    with pytest.raises(kind) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("name", ["_count", "_at_k", "_run", "_stream", "__debug__"])
def test_names_of_parameters_that_begin_with_an_underscore(name):
    for make in (lambda: pc.WriteKernel(k=[f"x * {name}"]), lambda: pc.rms_norm(name, 1e-6)):
        with pytest.raises(BadParamError, match="underscore"):
            make()


@pytest.mark.parametrize("name", ["len", "type", "float", "tokens", "d", "match", "Exception"])
def test_other_names_of_parameters(name):
    kernel, call = pc.WriteKernel(k=[f"x * 0 + {name}"]), Call()
    for value in (2.0, 5.0, 7.0):
        call(kernel, **{name: value})
        assert call.k_cache.reshape(-1, HEADS, SIZE)[5, 0, 0] == value


def test_parameters_by_token_with_any_stride():
    call = Call()
    kernel = pc.WriteKernel(k=[pc.rope("table", "positions"), "x * w[token]"])
    results = []
    for step in (1, 3):
        positions, w = (
            np.repeat(call.positions, step)[::step],
            np.repeat(call.k[:, 0, 0], step)[::step],
        )
        call(kernel, table=call.table, positions=positions, w=w)
        call(kernel, table=call.table, positions=positions, w=w)
        results.append(call.k_cache.tobytes())
    assert results[0] == results[1]


def test_integers_stay_integers():
    call = Call()
    call(pc.WriteKernel(k=["int(n) - n + int(x * 0 + 2.9)"]), n=(1 << 24) + 1)
    assert call.k_cache.reshape(-1, HEADS, SIZE)[5, 0, 0] == 2


def test_twins_that_fail():
    for twin in (lambda x: 1 / 0, lambda x: np.ones(3), lambda x: None, lambda x: "a",
                 lambda x: x.fill(0)):  # fmt: skip
        call = Call()
        with pytest.raises(BadParamError, match=r"the numpy= of k\[0\] cuda\(.*\) must"):
            call(pc.WriteKernel(k=[pc.cuda("y = x;", numpy=twin)]))
        assert call.untouched


def test_expressions_that_are_wide_or_shared():
    chained = "x"
    for _ in range(40):
        chained = f"(0 < {chained} < 2)"
    call = Call()
    call(pc.WriteKernel(k=[f"{chained} + x"]))
    power = "(head + 1)"
    for _ in range(6):
        power = f"({power}) ** 64"
    pc.WriteKernel(k=[pc.quantize(f"{power} + 1.0", "x / s", "int8")]).source  # noqa: B018
    with pytest.raises(pc.ExpressionError, match="must have at most 100 operands here, got 101"):
        pc.WriteKernel(k=[f"max({', '.join('x' * 101)})"])


def test_errors_can_be_copied():
    with pytest.raises(pc.ExpressionError) as error:
        pc.WriteKernel(k=["x + y.z"])
    again = pickle.loads(pickle.dumps(error.value))
    assert str(again) == str(error.value)


@pytest.mark.parametrize(
    "steps",
    [
        ["x if flag else 0"], ["where(flag and other, x, 0)"], ["x if not flags[token] else 1"],
        [pc.rope("t", "p"), "x * p[token]"], ["x * i", "at(i)"], ["x * g[where(dim > 1, i, 0)]"],
    ],
)  # fmt: skip
def test_source_of_all_kinds(steps):
    assert "struct KSteps" in pc.WriteKernel(k=steps).source


def test_warming_up_without_steps():
    for kernel in (pc.WriteKernel(), pc.ReadKernel()):
        call = Call()
        arguments = (call.k_cache, call.v_cache, call.k, call.v, call.slots)
        if isinstance(kernel, pc.ReadKernel):
            arguments = (*arguments[:2], call.slots, call.k, call.v)
        kernel.warmup(*arguments)
        [operation] = kernel._operations()
        assert call.untouched
        kernel(*arguments)
        assert kernel._operations() == [operation]


def test_source_needs_no_device():
    kernel = pc.WriteKernel(
        k=[pc.rms_norm("w", 1e-6), pc.rope("t", "p"), "x * gain[head, dim] + table[ids[token]]"],
        v=[POSITIVE, pc.quantize("row_max(abs(x))", "x / s", "int8")],
    )
    source = kernel.source
    for text in (
        "rmsNorm<false>(rows, parameters.p0",
        "rope<true, 0>(rows, loaded)",
        "// p3 is gain",
        "y = x > 0.0f ? x : 0.0f;",
        "struct KSteps",
        "struct VSteps",
    ):
        assert text in source
    assert kernel.parameters == ("w", "t", "p", "gain", "table", "ids")


def test_for_people():
    kernel = pc.WriteKernel(k=[pc.rms_norm("w", 1e-6), "x * 2 if x > 0 else x"])
    assert repr(kernel) == ("WriteKernel(k=[rms_norm('w', eps=1e-06), 'x * 2 if x > 0 else x'])")
    html = kernel._repr_html_()
    assert "rms_norm(&#x27;w&#x27;, eps=1e-06) → x * 2 if x &gt; 0 else x" in html
    assert "as it is" in html
    Call()(kernel, w=np.ones(SIZE, F32))
    assert "float32 to float32, float32, 2 KV heads, 8 of K, 8 of V, NHD, on cpu" in (
        kernel._repr_html_()
    )


def test_warming_up():
    call = Call()
    kernel = pc.WriteKernel(k=["x * gain[head, dim]"])
    kernel.warmup(call.k_cache, call.v_cache, call.k, call.v, call.slots, gain=GAIN)
    assert call.untouched
    assert len(kernel._operations()) == 1
    call(kernel, gain=GAIN)
    assert len(kernel._operations()) == 1
    described = [
        pc.TensorDescriptor(a.dtype, a.shape, device="cpu")
        for a in (call.k_cache, call.v_cache, call.k, call.v, call.slots)
    ]
    kernel.warmup(*described, gain=pc.TensorDescriptor(F32, GAIN.shape, device="cpu"))
    with pytest.raises(BadTensorShapeError):
        kernel.warmup(*described[:3], described[2].__class__(F32, (4, 2, 9)), described[4],
                      gain=GAIN)  # fmt: skip


def test_threads_share_a_kernel():
    kernel = pc.WriteKernel(k=["x * factor + bias[dim]"])
    failures = []

    def work(number):
        rng = np.random.default_rng(number)
        for _ in range(30):
            tokens = int(rng.integers(1, 9))
            cache = np.zeros((2, 4, 4, HEADS, SIZE), F32)
            k, v = rng.standard_normal((2, tokens, HEADS, SIZE)).astype(F32)
            bias = rng.standard_normal(SIZE).astype(F32)
            slots = rng.permutation(16)[:tokens]
            kernel(*cache, k, v, slots, factor=float(number), bias=bias)
            wanted = k * F32(number) + bias
            if not np.array_equal(cache[0].reshape(16, HEADS, SIZE)[slots], wanted):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_recent_operations_are_few():
    kernel = pc.WriteKernel(k=["x + 1"])
    for tokens in range(1, 12):
        cache = np.zeros((2, tokens, 4, HEADS, SIZE), F32)
        kernel(*cache, *np.zeros((2, 3, HEADS, SIZE), F32), np.arange(3))
    assert len(kernel._recent) == kernels.MOST_RECENT
    assert len(kernel._operations()) == 11


@pytest.mark.parametrize(
    ("size", "halves", "usual", "lanes", "width"),
    [
        (128, [(0, 64)], 16, 8, 8), (64, [(0, 32)], 16, 4, 8), (256, [(0, 128)], 16, 16, 8),
        (192, [(128, 32)], 16, 8, 4), (128, [(0, 32)], 16, 4, 8), (128, [], 8, 16, 8),
        (128, [(0, 3)], 16, 8, 8), (1, [], 8, 1, 1), (1024, [], 8, 32, 8), (5, [], 8, 1, 1),
    ],
)  # fmt: skip
def test_how_threads_hold_rows(size, halves, usual, lanes, width):
    """Both of a rotated pair are in one thread where that takes no more than 32 elements."""
    held = Held.of(size, halves, usual)
    assert (held.lanes, held.width) == (lanes, width)
    assert held.lanes * held.elements >= size
    assert held.elements <= 32


def test_the_guide_lists_every_function_with_its_exactness():
    guide = Path(pc.__file__).parents[1] / "docs" / "howto" / "program_the_write.md"
    if not guide.exists():
        pytest.skip("there is no checkout here")
    told = {}
    for line in guide.read_text("utf-8").splitlines():
        if line.startswith("|") and line.endswith(("| yes |", "| 2 ulp |")):
            names = re.findall(r"`(\w+)\(", line.split("|")[1])
            told |= dict.fromkeys(names, line.endswith("| yes |"))
    wanted = {name: each.exact for name, each in FUNCTIONS.items()}
    assert told == wanted
