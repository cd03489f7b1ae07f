# SPDX-License-Identifier: Apache-2.0
"""Storage formats: what is written, and what is read back, to the bit, on CPU and host kernel."""

from __future__ import annotations

import os
import shutil

import format_cases
import ml_dtypes
import numpy as np
import pytest
from format_cases import EIGHT_BITS, LOWEST, MOST, SOURCES, code_of, value_of
from format_cases import format_cases as drawn
from host_device import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import same
from test_kernel_on_host import sanitized

import pagedcache as pc
from pagedcache.cache.formats import FORMATS

EXAMPLES = 150 if "sanitize" in os.environ.get("PAGEDCACHE_HOST_FLAGS", "") else 250
OPERATORS = {
    "write": (pc.Descriptor, pc.PagedCachingInfo),
    "gather": (pc.GatherDescriptor, pc.PagedGatherInfo),
}


def on_cpu(operator, case):
    return OPERATORS[operator][0].create(**case.arguments(operator), **case.options())


def on_host(operator, case, device):
    kind, make_info = OPERATORS[operator]
    described = case.described(operator)
    info = make_info.create(**described, **case.options())
    return kind(info, info.rules.expected(described), device)


@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=EXAMPLES, deadline=None)
@given(case=drawn())
def test_cpu_does_what_the_definition_says(operator, case):
    done = format_cases.written(case) if operator == "write" else format_cases.gathered(case)
    with on_cpu(operator, case) as descriptor:
        descriptor.calculate(**case.arguments(operator))
        same(case, done)
        assert descriptor._report.take() == format_cases.invalid_slots(case)


# Dtype of the source, of the slots, formats and granularities of K and V. Each has kernels of its
# own, which take half a second to compile.
KERNELS = [
    ("bfloat16", "int64", ("float8_e4m3fn", "float8_e4m3fn"), ("tensor", "head")),
    ("float16", "int32", ("float8_e5m2", "int8"), ("channel", "token_head")),
    ("float32", "int64", ("int8", "int4"), ("group", "group")),
    ("bfloat16", "int64", ("int4", "bfloat16"), ("token_head", None)),
    ("float32", "int32", ("float16", "bfloat16"), (None, None)),
    ("float16", "int64", ("float8_e4m3fn", "float32"), (None, None)),
    ("bfloat16", "int64", ("int4", "float8_e5m2"), ("channel", "group")),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("like", KERNELS, ids=lambda like: "-".join(map(str, (*like[2], *like[3]))))
def test_the_kernel_does_what_the_cpu_does(compiler, operator, like):
    """On the same generated cases; the CPU is compared with the definition above."""

    @settings(max_examples=EXAMPLES // 5, deadline=None)
    @given(
        drawn(max_tokens=20, like=like), st.sampled_from([0, 1, 4]),
        st.sampled_from([40, 2**31 - 1]), st.sampled_from([512, 1024]),
    )  # fmt: skip
    def check(case, multiprocessors, max_grid_x, thread_class):
        device = HostDevice(
            compiler, multiprocessors=multiprocessors, max_grid_x=max_grid_x,
            thread_class=thread_class,
        )  # fmt: skip
        by_cpu = case.copy()
        for descriptor, mine in (
            (on_cpu(operator, by_cpu), by_cpu), (on_host(operator, case, device), case),
        ):  # fmt: skip
            descriptor.calculate(**mine.arguments(operator))
            assert descriptor._report.take() == format_cases.invalid_slots(case)
        same(case, by_cpu.buffers)
        assert all(1 <= blocks <= max_grid_x for _, (blocks, _), _ in device.launches)

    check()


def test_threads_that_do_not_come_to_a_shuffle_are_noticed(compiler):
    library = compiler.library("paged_storing.cuh", (), """
__global__ void early(int) { if (threadIdx.x % 8 < 7) pagedcache::largestOf(1.0f, 8); }
__global__ void odd(int) { pagedcache::largestOf(1.0f, threadIdx.x < 16 ? 8 : 4); }
static unsigned int run(void (*kernel)(int)) {
  int parameters = 0;
  launch(kernel, 1, 1, 64, &parameters);
  return take_deadlocks();
}
extern "C" unsigned int run_early() { return run(early); }
extern "C" unsigned int run_odd() { return run(odd); }
""")  # fmt: skip
    assert library.run_early() > 0
    assert library.run_odd() == 0


def codes_of(name, values):
    """Return the codes of many float32, by the contract: nearest in float64, and so on."""
    values = np.asarray(values, np.float32)
    with np.errstate(invalid="ignore"):  # a NaN that signals
        wide = values.astype(np.float64)
    nan = np.isnan(wide)
    if name in LOWEST:
        limited = np.clip(np.where(nan, 0, wide), LOWEST[name], MOST[name])
        whole = (np.sign(limited) * np.floor(np.abs(limited) + 0.5)).astype(np.int64)
        return whole & (15 if name == "int4" else 255)
    if name not in EIGHT_BITS:
        return np.array([code_of(name, value) for value in values])
    known = format_cases.magnitudes(name)
    size = np.where(nan, 0, np.minimum(np.abs(wide), MOST[name]))
    below = np.searchsorted(known, size, side="right") - 1
    above = np.minimum(below + 1, len(known) - 1)
    down, up = size - known[below], known[above] - size
    code = np.where((up < down) | ((up == down) & (below % 2 == 1)), above, below)
    return np.where(nan, 0x7F, code | np.where(np.signbit(wide), 0x80, 0))


def boundaries(name):
    """Return all float32 at which rounding changes, and their neighbours, of both signs."""
    if name in LOWEST:
        middle = np.arange(LOWEST[name] - 3, MOST[name] + 4) + 0.5
    elif name in EIGHT_BITS:
        known = format_cases.magnitudes(name)
        middle = np.concatenate([known, (known[1:] + known[:-1]) / 2, [MOST[name] * 1.03, 1e30]])
    else:
        # Of 16-bit floats, the middle between each two neighbours is a float32.
        last = 0x7C00 if name == "float16" else 0x7F80
        exact = np.array([value_of(name, code) for code in range(last)], np.float64)
        middle = np.concatenate([(exact[1:] + exact[:-1]) / 2, exact[-1:] * (1 + 2.0**-12)])
    with np.errstate(over="ignore"):
        middle = middle.astype(np.float32)
    near = [middle, *(np.nextafter(middle, np.float32(to)) for to in (np.inf, -np.inf))]
    odd = np.array([0, np.inf, np.nan, 1e-45, 0.49999997, 3.4e38, 1.17549435e-38], np.float32)
    values = np.concatenate([*near, odd])
    return np.concatenate([values, -values])


def of_16_bits(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)


def inputs(name):
    """Return every bfloat16, every float16, and every boundary."""
    with np.errstate(invalid="ignore"):
        sixteen = [of_16_bits(np.dtype(kind)) for kind in ("float16", "bfloat16")]
    if name in ("float16", "bfloat16"):
        sixteen = [each[::7] for each in sixteen]  # the definition takes its time for each
    return np.concatenate([*sixteen, boundaries(name)])


ENCODE = """
template <typename Format>
void encodeAll(const float* values, unsigned int* codes, long count) {
  const unsigned int mask = (2u << (Format::kBits - 1)) - 1;
  for (long i = 0; i < count; ++i) {
    const unsigned int both = pagedcache::pushed<Format>(0, values[i], values[count - 1 - i]);
    codes[i] = both & mask;
    if (Format::kBits < 32) codes[count + i] = both >> Format::kBits % 32 & mask;
  }
}
"""
NAMES = {
    "float8_e4m3fn": "E4M3", "float8_e5m2": "E5M2", "int8": "I8", "int4": "I4",
    "float16": "FormatOf<pagedcache::F16>", "bfloat16": "FormatOf<pagedcache::BF16>",
}  # fmt: skip


@pytest.fixture(scope="session")
def conversions(compiler):
    text = ENCODE + "".join(
        f'extern "C" void encode_{name}(const float* values, unsigned int* codes, long count) {{\n'
        f"  encodeAll<pagedcache::{kind}>(values, codes, count);\n}}\n"
        f'extern "C" void decode_{name}(const unsigned int* codes, float* values, long count) {{\n'
        f"  for (long i = 0; i < count; ++i) values[i] = pagedcache::{kind}::value(codes[i]);\n}}\n"
        for name, kind in NAMES.items()
    )
    return compiler.library("formats.cuh", (), text)


def pointer(array):
    import ctypes

    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("name", NAMES)
def test_every_conversion_to_a_format(conversions, name):
    values = inputs(name)
    wanted = codes_of(name, values)
    by_numpy = FORMATS[name].encode(values)
    if name == "int4":
        by_numpy = np.stack([by_numpy & 15, by_numpy >> 4], axis=-1).ravel()
    assert np.array_equal(by_numpy, wanted)
    import ctypes

    codes = np.zeros((2, len(values)), np.uint32)
    getattr(conversions, f"encode_{name}")(
        pointer(values), pointer(codes), ctypes.c_long(len(values))
    )
    assert np.array_equal(codes[0], wanted)
    assert np.array_equal(codes[1], wanted[::-1])


@pytest.mark.parametrize("name", NAMES)
def test_every_code_of_a_format(conversions, name):
    import ctypes

    bits = FORMATS[name].bits
    codes = np.arange(1 << bits, dtype=np.uint32)
    wanted = np.array([value_of(name, int(code)) for code in codes], np.float32)
    stored = codes.astype(FORMATS[name].code_dtype)
    if name == "int4":
        stored = stored[::2] | stored[1::2] << 4
    by_numpy = FORMATS[name].decode(stored)
    values = np.zeros(len(codes), np.float32)
    getattr(conversions, f"decode_{name}")(
        pointer(codes), pointer(values), ctypes.c_long(len(codes))
    )
    for found in (by_numpy, values):
        nan = np.isnan(wanted)
        assert np.array_equal(np.isnan(found), nan)
        assert np.array_equal(found[~nan].view(np.uint32), wanted[~nan].view(np.uint32))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_pytorch_converts_alike(name):
    torch = pytest.importorskip("torch")
    values = inputs(name)
    values = values[~np.isnan(values) & (np.abs(values) <= MOST[name])]
    theirs = torch.from_numpy(values).to(getattr(torch, name)).view(torch.uint8).numpy()
    assert np.array_equal(FORMATS[name].encode(values), theirs)
    kind = np.dtype(getattr(ml_dtypes, name))
    assert np.array_equal(FORMATS[name].encode(values), values.astype(kind).view(np.uint8))


@pytest.mark.parametrize("name", SOURCES)
def test_bits_are_copied_as_they_are(compiler, name):
    """Also those of a NaN that signals, beside a cache that converts."""
    itemsize = np.dtype(name).itemsize
    rng = np.random.default_rng(0)
    k = rng.integers(0, 256, (64, 2, 8 * itemsize), dtype=np.uint8).view(name)
    k.view(f"u{itemsize}")[:, :, ::2] |= {2: 0x7F81, 4: 0x7F800001}[itemsize]
    k_cache, slots = np.zeros((8, 2, 8, 8), name), np.arange(64)
    v_cache = np.zeros((8, 2, 8, 8), np.int8)
    scale = np.ones(1, np.float32)
    arrays = {"k_cache": k_cache, "v_cache": v_cache, "k": k, "v": k, "slot_mapping": slots,
              "v_scale": scale}  # fmt: skip
    described = {each: pc.TensorDescriptor(a.dtype, a.shape) for each, a in arrays.items()}
    info = pc.PagedCachingInfo.create(**described, layout="HND")
    for descriptor in (
        pc.Descriptor.create(**arrays, layout="HND"),
        pc.Descriptor(info, info.rules.expected(described), HostDevice(compiler)),
    ):
        k_cache[...] = 0
        descriptor.calculate(**arrays)
        rows = k_cache.transpose(0, 2, 1, 3).reshape(64, 2, 8)
        assert np.array_equal(rows.view(np.uint8), k.view(np.uint8))
        out = np.zeros_like(k)
        pc.paged_gather(k_cache, None, slots, out, None, layout="HND")
        assert np.array_equal(out.view(np.uint8), k.view(np.uint8))


def five(layout="NHD", k_kind="int8", v_kind=None, size=8, source="bfloat16"):
    """Return arrays of a write: 5 blocks of 4 slots, 3 heads."""
    middle = (3, 4) if layout == "HND" else (4, 3)
    rows = np.ones((6, 3, size), source)
    caches = [np.zeros((5, *middle, size), kind) for kind in (k_kind, v_kind or k_kind)]
    return {"k_cache": caches[0], "v_cache": caches[1], "k": rows, "v": rows.copy(),
            "slot_mapping": np.arange(6)}  # fmt: skip


def ones(*shape):
    return np.ones(shape, np.float32)


BOTH = {"k_scale": ones(1), "v_scale": ones(1)}
WIDE = np.zeros((5, 4, 3, 16), "int8")
BAD = {
    "int8 without a scale": (
        {}, {}, ValueError, "k_scale must be given, because k_cache stores int8, which needs one"
    ),
    "V's scale is missing": (
        {"k_scale": ones(1)}, {}, ValueError,
        "v_scale must be given, because v_cache stores int8, which needs one",
    ),
    "a scale where none is taken": (
        {"k_cache": np.zeros((5, 4, 3, 8), "bfloat16"), **BOTH}, {}, ValueError,
        (r"k_scale must be None, because k_cache stores bfloat16, which takes no scale, "
        r"got an array of shape \(1,\)"),
    ),
    "a scale of another dtype": (
        {**BOTH, "v_scale": np.ones(1)}, {}, TypeError, "v_scale must be float32, got float64"
    ),
    "a scale of another shape": (
        {**BOTH, "k_scale": ones(2)}, {}, ValueError,
        (r"k_scale must have one element, the shape \[num_kv_heads\] or \[num_kv_heads, head_size\]"
            r", or, for scales that a write computes, \[num_blocks, block_size, num_kv_heads\] or"
        ),
    ),
    "a scale of the other layout": (
        {**BOTH, "k_scale": ones(5, 3, 4)}, {}, ValueError, r"k_scale must .* got shape \(5, 3, 4\)"
    ),
    "groups that do not divide": (
        {**BOTH, "v_scale": ones(5, 4, 3, 3)}, {}, ValueError,
        (r"v_scale must have a number of groups that divides the v_head_size, 8, on its last axis, "
        r"got shape \(5, 4, 3, 3\)"),
    ),
    "no groups": (
        {**BOTH, "k_scale": ones(5, 4, 3, 0)}, {}, ValueError, "k_scale must have a number of gro"
    ),
    "groups of half a byte": (
        {**BOTH, "k_cache": np.zeros((5, 4, 3, 4), "uint8"), "k_scale": ones(5, 4, 3, 8)},
        {"k_format": "int4"}, ValueError, "into groups of a multiple of 2",
    ),
    "bytes without a format": (
        {**BOTH, "k_cache": np.zeros((5, 4, 3, 8), "uint8")}, {}, ValueError,
        (r"k_format must be given, because k_cache is of bytes \(uint8\); use one of "
        r"'float8_e4m3fn', 'float8_e5m2', 'int8', 'int4'"),
    ),
    "an unknown format": (
        BOTH, {"v_format": "fp8"}, ValueError, "v_format must be one of float16, .* got 'fp8'"
    ),
    "a format that is no string": (
        BOTH, {"k_format": np.int8}, ValueError, "k_format must be one of float16, .* got <class"
    ),
    "another format than the dtype": (
        BOTH, {"k_format": "float8_e4m3fn"}, ValueError,
        "k_format must match the dtype of k_cache, int8, got 'float8_e4m3fn'",
    ),
    "int4 in signed bytes": (
        BOTH, {"k_format": "int4"}, ValueError, "k_format must match the dtype of k_cache, int8"
    ),
    "an odd head size in int4": (
        {**BOTH, "k": np.ones((6, 3, 7), "bfloat16"), "k_cache": np.zeros((5, 4, 3, 4), "uint8")},
        {"k_format": "int4"}, ValueError,
        r"k must have the head_size of k_cache, 8, .* 2 .* so it must be a multiple of 2, got",
    ),
    "a number for a scale": (
        {**BOTH, "k_scale": 0.1}, {}, TypeError,
        "k_scale must be a float32 array of one element, where one scale is for .*, got 0.1",
    ),
    "K and V that overlap in each row": (
        {**BOTH, "k_cache": WIDE[..., :8], "v_cache": WIDE[..., 5:13]}, {}, ValueError,
        "share memory with k_cache, got .*: each row reaches 3 bytes into one of the other",
    ),
    "another float type without a name": (
        {**BOTH, "k_cache": np.zeros((5, 4, 3, 8), "float32")}, {}, TypeError,
        "k must be float32 like k_cache, unless k_format='float32' asks to convert, got bfloat16",
    ),
    "a dtype that is no format": (
        {**BOTH, "k_cache": np.zeros((5, 4, 3, 8), "int16")}, {}, TypeError,
        "k_cache must be float16, bfloat16, float32, float8_e4m3fn, float8_e5m2, int8 or uint8",
    ),
    "a source of 8 bits": (
        {**BOTH, "k": np.ones((6, 3, 8), "int8")}, {}, TypeError, "k must be float16, bfloat16 or"
    ),
    "sources of two dtypes": (
        {**BOTH, "v": np.ones((6, 3, 8), "float16")}, {}, TypeError, "v must be bfloat16 like k"
    ),
    "a scale that runs backwards": (
        {**BOTH, "k_scale": ones(3)[::-1]}, {}, ValueError, "k_scale must not have negative strides"
    ),
    "a scale that is computed, with two in one place": (
        {**BOTH, "k_scale": np.broadcast_to(ones(1, 1, 1), (5, 4, 3))}, {}, ValueError,
        "k_scale must not overlap itself",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what):
    changes, options, kind, words = BAD[what]
    arrays = {**five(), **changes}
    kept = {name: a.copy() for name, a in arrays.items() if isinstance(a, np.ndarray)}
    for call in (pc.paged_caching, pc.Descriptor.create):
        with pytest.raises(pc.PagedCacheError, match=words) as caught:
            call(**arrays, **options, layout="NHD")
        assert isinstance(caught.value, kind)
        assert "\n" not in str(caught.value)
    assert all(np.array_equal(arrays[name], a) for name, a in kept.items())


def test_scales_at_each_call():
    arrays = {**five(), "k_scale": ones(3), "v_scale": ones(5, 4, 3)}
    with pc.Descriptor.create(**arrays, layout="NHD") as descriptor:
        for _ in range(2):
            descriptor.calculate(**arrays)
            for name, other, words in (
                ("k_scale", None, "k_scale must be an array, got None"),
                ("k_scale", ones(1), r"k_scale must have shape \(3,\), as when"),
                ("k_scale", np.ones(3), "k_scale must have dtype float32, as when"),
                ("k_scale", ones(6)[::2], r"k_scale must have strides \(4,\) in bytes, as when"),
                ("v_scale", ones(5, 4, 3)[::-1], "v_scale must have strides"),
            ):
                with pytest.raises(pc.PagedCacheError, match=words):
                    descriptor.calculate(**{**arrays, name: other})
            read_only = ones(5, 4, 3)
            read_only.flags.writeable = False
            with pytest.raises(ValueError, match="v_scale must be writable"):
                descriptor.calculate(**{**arrays, "v_scale": read_only})
        assert repr(descriptor) == (
            "<pagedcache.Descriptor NHD bfloat16 to int8 on cpu: 3 x 8 heads, 5 blocks of 4, "
            "int64 slots>"
        )
        page = descriptor._repr_html_()
        assert "int8, scales: head<" in page
        assert "int8, scales: token_head, computed by a write<" in page
    plain = five(k_kind="bfloat16")
    with pc.Descriptor.create(**plain, layout="NHD") as descriptor:
        with pytest.raises(TypeError, match="k_scale must be None, as when"):
            descriptor.calculate(**plain, k_scale=ones(1))
        descriptor.calculate(**plain)
        with pytest.raises(TypeError, match="k_scale must be None, as when"):
            descriptor.calculate(**plain, k_scale=ones(1))


@pytest.mark.parametrize("computed", [False, True])
def test_scales_that_share_memory(computed):
    """With a cache, whether they are read or written; between rows they are fine."""
    buffer = np.zeros((5, 4, 3, 8 + 4 + 8 + 4), np.int8)
    arrays = {**five(), "k_cache": buffer[..., :8], "v_cache": buffer[..., 12:20]}
    inside = [buffer[..., at : at + 4].view(np.float32)[..., 0] for at in (8, 20)]
    scales = {"k_scale": inside[0], "v_scale": inside[1]}
    pc.paged_caching(**arrays, **scales, layout="NHD")
    rows = buffer.reshape(20, 3, 24)
    wanted = np.float32(1) / np.float32(127)
    assert (rows[:6, :, 8:12].copy().view(np.float32) == wanted).all()
    assert (rows[:6, :, :8] == 127).all()
    assert (rows[:6, :, 12:20] == 127).all()
    assert not rows[6:].any()
    within = (
        buffer[..., 4:8].view(np.float32)[..., 0] if computed else buffer[0, 0, 0, 4:8].view("f4")
    )
    descriptor = None
    for _ in range(2):
        with pytest.raises(
            pc.CacheOverlapError, match="k_scale must not share memory with k_cache"
        ):
            pc.paged_caching(**arrays, **{**scales, "k_scale": within}, layout="NHD")
    outside = {"k_scale": ones(5, 4, 3) if computed else ones(1), "v_scale": inside[1]}
    descriptor = pc.Descriptor.create(**arrays, **outside, layout="NHD")
    descriptor.calculate(**arrays, **outside)
    if not computed:
        with pytest.raises(
            pc.CacheOverlapError, match="k_scale must not share memory with k_cache"
        ):
            descriptor.calculate(**arrays, **{**outside, "k_scale": within})


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_scales_in_debug_mode(value):
    scale = ones(3)
    scale[1] = value
    arrays = {**five(), "k_scale": scale, "v_scale": ones(5, 4, 3) * value}
    with pc.Descriptor.create(**arrays, layout="NHD", debug=True) as descriptor:
        with pytest.raises(ValueError, match=r"k_scale\[1\] must be positive and finite, got"):
            descriptor.calculate(**arrays)
        assert not arrays["k_cache"].any()
        scale[1] = 1
        descriptor.calculate(**arrays)  # those of V are computed
        assert (arrays["k_cache"].reshape(20, 3, 8)[:6] == 1).all()
    outputs = {"k_out": arrays["k"], "v_out": arrays["v"]}
    reading = {name: arrays[name] for name in ("k_cache", "v_cache", "slot_mapping")}
    scale[1] = value
    reading |= {"k_scale": scale, "v_scale": arrays["v_scale"], **outputs}
    descriptor = pc.GatherDescriptor.create(**reading, layout="NHD", debug=True)
    with pytest.raises(ValueError, match=r"k_scale\[1\] must be positive and finite, got"):
        descriptor.calculate(**reading)


GATHER_BAD = {
    "V without an output": ({"v_out": None}, {}, ValueError, "v_cache must be None, because v_out"),
    "V without a cache": ({"v_cache": None}, {}, ValueError, "v_out must be None, because v_cache"),
    "a scale of V that is not there": (
        {"v_cache": None, "v_out": None}, {}, ValueError, "v_scale must be None, because v_cache"
    ),
    "a format of V that is not there": (
        {"v_cache": None, "v_out": None, "v_scale": None}, {"v_format": "int8"}, ValueError,
        "v_format must be None, because v_cache is None, got 'int8'",
    ),
    "no output": ({"k_out": None}, {}, TypeError, "k_out must be an array, got None"),
    "an output of 8 bits": (
        {"k_out": np.zeros((6, 3, 8), np.int8)}, {}, TypeError, "k_out must be float16, bfloat16 or"
    ),
    "too few rows": (
        {"k_out": np.zeros((5, 3, 8), "bfloat16")}, {}, ValueError, "k_out must have at least 6 row"
    ),
    "outputs of two dtypes": (
        {"v_out": np.zeros((6, 3, 8), "float32")}, {}, TypeError, "v_out must be bfloat16 like k_o"
    ),
    "a scale is missing": ({"k_scale": None}, {}, ValueError, "k_scale must be given, because"),
}  # fmt: skip


@pytest.mark.parametrize("what", GATHER_BAD)
def test_bad_input_of_a_gather(what):
    changes, options, kind, words = GATHER_BAD[what]
    given = five()
    arrays = {"k_cache": given["k_cache"], "v_cache": given["v_cache"], "k_out": given["k"],
              "v_out": given["v"], "slot_mapping": given["slot_mapping"], **BOTH}  # fmt: skip
    arrays |= changes
    for call in (pc.paged_gather, pc.GatherDescriptor.create):
        with pytest.raises(pc.PagedCacheError, match=words) as caught:
            call(**arrays, **options, layout="NHD")
        assert isinstance(caught.value, kind)


def test_outputs_that_share_memory():
    cache = np.zeros((5, 4, 3, 8), np.float32)
    out = np.zeros((12, 3, 8), np.float32)
    slots = np.arange(6)
    for k_out, v_out, words in (
        (out[:6], out[3:9], "v_out must not share memory with k_out"),
        (cache[0, :, :, :], out[:6], "k_out must have at least 6 rows"),
        (cache[:2].reshape(8, 3, 8), out[:6], "k_out must not share memory with k_cache"),
    ):
        with pytest.raises(ValueError, match=words):
            pc.paged_gather(cache, cache.copy(), slots, k_out, v_out, layout="NHD")
    pc.paged_gather(cache, cache, slots, out[:6], out[6:], layout="NHD")  # one cache, read twice


def test_gather_again_and_again():
    """With any number of tokens, bound, in one call, and after the end."""
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((5, 4, 3, 8)).astype(np.float32)
    flat = cache.reshape(20, 3, 8)
    out = np.zeros((30, 3, 8), np.float32)
    with pc.GatherDescriptor.create(cache, None, np.arange(4), out, None, layout="NHD") as gather:
        assert gather.launch_config(3).grid == (1, 1, 1)
        bound_slots = np.array([3, 3, 19])
        again = gather.bind(cache, None, bound_slots, out, None)
        for count in (4, 30, 1, 0, 7):
            slots = rng.integers(-2, 20, count)
            for run in (
                lambda: gather.calculate(cache, None, slots, out, None),  # noqa: B023
                lambda: pc.paged_gather(cache, None, slots, out, None, layout="NHD"),  # noqa: B023
            ):
                out[...] = 7
                run()
                wanted = np.full_like(out, 7)
                wanted[:count][slots >= 0] = flat[slots[slots >= 0]]
                assert np.array_equal(out, wanted)
        again()
        assert np.array_equal(out[:3], flat[bound_slots])
        bad = np.array([3, 20, 21])
        gather.calculate(cache, None, bad, out, None)
        with pytest.raises(
            pc.InvalidSlotError, match=r"slot_mapping\[1\] = 20 is outside .*\(2 inv"
        ):
            gather.check()
        assert "GatherDescriptor NHD float32 to float32 on cpu: 3 x 8 heads" in repr(gather)
        assert "head size" in gather._repr_html_()
    with pytest.raises(RuntimeError, match="destroyed"):
        again()
    with pytest.raises(pc.InvalidSlotError):
        pc.paged_gather(cache, None, bad, out, None, layout="NHD", on_invalid="raise")


def test_explain_an_element():
    arrays = {**five(size=6), "k_cache": np.zeros((5, 4, 3, 3), np.uint8),
              "k_scale": ones(5, 4, 3, 3), "v_scale": ones(3) * 2}  # fmt: skip
    arrays["k"][2, 1] = [7, -7, 3.5, 2, 1, 0]
    descriptor = pc.Descriptor.create(**arrays, k_format="int4", layout="NHD")
    descriptor.calculate(**arrays)
    caches = {name: arrays[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale")}
    shown = descriptor.explain(2, arrays["slot_mapping"], **caches, head=1, dim=3)
    k, v = shown.elements
    assert (k.format, k.code, k.scale, k.value) == ("int4", 4, 0.5, 2.0)
    assert (v.format, v.code, v.scale, v.value) == ("int8", 1, 2.0, 2.0)
    assert "K, head 1, dim 3" in str(shown)
    assert "int4 code 0x4, scale 0.5, value 2" in str(shown)
    [lower] = descriptor.explain(2, k_cache=caches["k_cache"], k_scale=caches["k_scale"],
                                 head=1, dim=1).elements  # fmt: skip
    assert (lower.code, lower.scale, lower.value) == (9, 1.0, -7.0)
    assert shown.k_ranges == ((2 * 9, 3 * 9),)
    reader = pc.GatherDescriptor.create(
        caches["k_cache"], None, arrays["slot_mapping"], arrays["k"], None,
        k_scale=caches["k_scale"], k_format="int4", layout="NHD",
    )  # fmt: skip
    [same_one] = reader.explain(2, k_cache=caches["k_cache"], k_scale=caches["k_scale"],
                                head=1, dim=3).elements  # fmt: skip
    assert same_one == k
    assert reader.explain(2).v_ranges == ()
    for wrong, words in (
        ({"head": 3}, "head must be an int from 0 to 2, got 3"),
        ({"dim": 6}, "dim must be an int from 0 to 5, got 6"),
        ({"k_scale": None}, "k_scale must be an array, got None"),
        ({"k_cache": np.zeros(3)}, r"k_cache must have shape \(5, 4, 3, 3\), as when"),
    ):
        with pytest.raises(pc.PagedCacheError, match=words):
            descriptor.explain(2, **{**caches, **wrong})
    assert descriptor.explain(-1, **caches).elements == ()


def test_dtypes_of_other_libraries():
    """Caches of 8-bit floats are known by their dtype, at any number of tokens."""
    torch = pytest.importorskip("torch")
    shape = (5, 4, 3, 8)
    k = torch.randn(20, 3, 8).to(torch.bfloat16)
    cache = torch.zeros(shape, dtype=torch.float8_e4m3fn)
    scale = torch.tensor([0.5])
    out = torch.zeros(20, 3, 8, dtype=torch.bfloat16)
    for count in (5, 20, 1):
        slots = torch.randperm(20)[:count]
        pc.paged_caching(cache, cache.clone(), k[:count], k[:count], slots, layout="NHD",
                         k_scale=scale, v_scale=scale)  # fmt: skip
        pc.paged_gather(cache, None, slots, out, None, k_scale=scale, layout="NHD")
        wanted = (k[:count].float() / 0.5).to(torch.float8_e4m3fn).float() * 0.5
        assert torch.equal(out[:count], wanted.to(torch.bfloat16))
    mine = cache.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    again = torch.zeros(20, 3, 8).numpy()
    pc.paged_gather(mine, None, slots.numpy(), again, None, layout="NHD",
                    k_scale=scale.numpy())  # fmt: skip
    assert np.array_equal(again[:1], wanted.numpy())


def test_autograd_sees_scales_that_are_computed():
    torch = pytest.importorskip("torch")
    cache = torch.zeros(5, 4, 3, 8, dtype=torch.int8)
    rows = torch.ones(2, 3, 8)
    scales = [torch.zeros(5, 4, 3), torch.zeros(5, 4, 3)]
    versions = [each._version for each in scales]
    for turn in (1, 2):
        pc.paged_caching(cache, cache.clone(), rows, rows, torch.arange(2), layout="NHD",
                         k_scale=scales[0], v_scale=scales[1])  # fmt: skip
        assert [each._version for each in scales] == [version + turn for version in versions]
    scales[0].requires_grad_()
    with pytest.raises(RuntimeError, match="k_scale must not require grad"):
        pc.paged_caching(cache, cache.clone(), rows, rows, torch.arange(2), layout="NHD",
                         k_scale=scales[0], v_scale=scales[1])  # fmt: skip


QUOTIENTS = """
extern "C" int quotients(float* values, float by) {
  float three[3] = {values[0], values[1], values[2]};
  const int right = pagedcache::Quotients(by).of(three);
  for (int i = 0; i < 3; ++i) values[i] = three[i];
  return right;
}
extern "C" long differing(const float* values, const float* by, long count, long* accepted) {
  long found = 0;
  for (long i = 0; i < count; ++i) {
    float one[1] = {values[i]};
    const bool right = pagedcache::Quotients(by[i]).of(one);
    *accepted += right;
    // Those that become 0 in any format may differ in what is too small to matter.
    const unsigned int mine = pagedcache::asBits(one[0]);
    const unsigned int wanted = pagedcache::asBits(values[i] / by[i]);
    const unsigned int sign = 0x80000000u, tiny = 0x21800000u;  // of 2^-60
    const bool both = (mine & ~sign) < tiny && (wanted & ~sign) < tiny;
    found += right && (both ? (mine ^ wanted) & sign : mine ^ wanted) != 0;
  }
  return found;
}
template <typename Format>
long differingByMost(unsigned int step) {
  long found = pagedcache::divideByMost<Format>(__builtin_inff()) != __builtin_inff();
  for (unsigned int bits = 0; bits < 0x7f800000u; bits += step) {
    const float value = pagedcache::asFloat(bits), wanted = value / Format::kMost;
    const float quotient = pagedcache::divideByMost<Format>(value);
    found += wanted > 1e-30f && pagedcache::asBits(quotient) != pagedcache::asBits(wanted);
  }
  return found;
}
extern "C" long differing_by_most(unsigned int step) {
  using namespace pagedcache;
  return differingByMost<E4M3>(step) + differingByMost<E5M2>(step) + differingByMost<I8>(step) +
         differingByMost<I4>(step);
}
"""


def test_quotients_by_the_most_are_those_of_a_division(compiler):
    """Of every 101st number, and of infinity; all of them were compared once."""
    assert compiler.library("formats.cuh", (), QUOTIENTS).differing_by_most(101) == 0


def test_quotients_are_those_of_a_division(compiler):
    """For many mantissas, among them those that rounding is hardest for."""
    import ctypes

    library = compiler.library("formats.cuh", (), QUOTIENTS)
    library.differing.restype = ctypes.c_long
    rng = np.random.default_rng(0)
    count = 2_000_000

    def numbers(exponents):
        mantissas = rng.integers(0, 1 << 23, count, dtype=np.uint32)
        small = rng.integers(0, 64, count, dtype=np.uint32)
        which = rng.integers(0, 4, count)
        odd = [mantissas, small, (1 << 23) - 1 - small, mantissas & 0x7F0000]
        mantissas = np.choose(which, odd)
        exponents = rng.integers(*exponents, count).astype(np.uint32) + 127
        return (mantissas.astype(np.uint32) | exponents << 23).view(np.float32)

    by = numbers((-40, 40))
    values = numbers((-70, 80)) * rng.choice(np.float32([-1, 1]), count)
    # Products of a scale and a value at which a format rounds up or down, and their neighbours.
    near = (by * rng.choice(boundaries("float8_e4m3fn"), count)).astype(np.float32)
    for some in (values, near, np.nextafter(near, np.float32(np.inf))):
        some = np.where(np.isfinite(some), some, 1).astype(np.float32)
        accepted = np.zeros(1, np.int64)
        assert library.differing(pointer(some), pointer(by), ctypes.c_long(count),
                                 pointer(accepted)) == 0  # fmt: skip
        assert accepted[0] > 0.9 * count


@pytest.mark.parametrize("by", [0.0, -0.0, -1.0, np.inf, np.nan, 1e-45, 2.0**-41, 2.0**41, 3e38])
def test_unusual_scales_are_left_to_a_division(compiler, by):
    import ctypes

    library = compiler.library("formats.cuh", (), QUOTIENTS)
    three = np.ones(3, np.float32)
    assert library.quotients(pointer(three), ctypes.c_float(by)) == 0


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38])
def test_unusual_values_are_left_to_a_division(compiler, value):
    import ctypes

    library = compiler.library("formats.cuh", (), QUOTIENTS)
    for at in range(3):
        three = np.ones(3, np.float32)
        three[at] = value
        assert library.quotients(pointer(three), ctypes.c_float(2.0**-30)) == 0
    zeros = np.float32([0.0, -0.0, -1e-45])
    assert library.quotients(pointer(zeros), ctypes.c_float(3.0)) == 1
    assert np.signbit(zeros).tolist() == [False, True, True]
    assert not zeros.any()


def test_formats_of_one_dtype_in_turn(monkeypatch):
    """The one-call form tells them apart, although all of their arrays are alike."""
    from pagedcache.operators.one_call import Kept
    from pagedcache.operators.paged_caching import one_call

    monkeypatch.setattr(one_call, "_kept", Kept(pc.Descriptor, one_call._create))
    arrays = five(k_kind="uint8") | {"k_scale": ones(1), "v_scale": ones(1)}
    arrays["k"][...] = arrays["v"][...] = 3
    for _ in range(2):
        for k_format in ("int8", "float8_e4m3fn", "float8_e5m2"):
            for v_format in ("float8_e4m3fn", "int8"):
                pc.paged_caching(**arrays, k_format=k_format, v_format=v_format, layout="NHD")
                for name, stored in (("k_cache", k_format), ("v_cache", v_format)):
                    assert arrays[name][0, 0, 0, 0] == code_of(stored, 3)


def rows_for(*, size=128, v_size=128, token=1024, head=128, slot=1024, cache_head=128, kind="int8",
             group=None, source="bfloat16"):  # fmt: skip
    """Return what the kernel does with rows of such strides, in elements."""
    from pagedcache.operators.paged_caching.nvidia_formats import rows_of

    packed = 2 if kind == "int4" else 1
    cache = pc.TensorDescriptor(
        "uint8", (5, 16, 8, size // packed), (16 * slot, slot, cache_head, 1)
    )
    v_cache = pc.TensorDescriptor("int8", (5, 16, 8, v_size))
    rows = pc.TensorDescriptor(source, (9, 8, size), (token, head, 1))
    v = pc.TensorDescriptor(source, (9, 8, v_size))
    scale = pc.TensorDescriptor("float32", (5, 16, 8, size // group) if group else (1,))
    info = pc.PagedCachingInfo.create(
        cache, v_cache, rows, v, pc.TensorDescriptor("int64", (9,)), scale,
        pc.TensorDescriptor("float32", (1,)), k_format=kind, layout="NHD",
    )  # fmt: skip
    return rows_of(info)


@pytest.mark.parametrize(
    ("changes", "elements"),
    [
        ({}, 16), ({"token": 1028}, 4), ({"head": 132, "token": 1056}, 4), ({"slot": 1032}, 8),
        ({"cache_head": 130, "slot": 1040}, 2), ({"size": 120, "slot": 1024}, 8),
        ({"token": 1025}, 1), ({"size": 100}, 4), ({"group": 32}, 16), ({"group": 4}, 4),
        ({"kind": "int4", "slot": 512, "cache_head": 64}, 16),
        ({"kind": "int4", "slot": 513, "cache_head": 64}, 2),
        ({"kind": "int4", "token": 1025, "slot": 512, "cache_head": 64}, 2),
        ({"source": "float32", "token": 1026}, 2), ({"kind": "float8_e5m2", "slot": 1025}, 1),
    ],
)  # fmt: skip
def test_elements_of_a_thread(changes, elements):
    """As many as every stride allows, of K; V is whole."""
    assert rows_for(**changes).elements(16) == (elements, 16)
    assert rows_for(**changes).elements(8) == (min(elements, 8), 8)


def test_most_elements_of_a_thread():
    """32, but no more than 64 bytes."""
    assert rows_for().elements() == (32, 32)
    assert rows_for(source="float32").elements() == (16, 16)
    assert rows_for(v_size=112).elements() == (32, 16)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
@pytest.mark.parametrize("shared_by", ["tensor", "token_head", "group"])
@pytest.mark.parametrize(
    "kinds", [("float8_e4m3fn", "int8"), ("int4", "float16"), ("int8", "int4")]
)
def test_a_thread_with_several_parts(compiler, kinds, shared_by):
    """As in large calls; with values in one part alone whose quotients are not the quick ones.

    Where rows share a computed scale, a row has more vectors than a warp has threads.
    """
    rng = np.random.default_rng(0)
    device = HostDevice(compiler, multiprocessors=0)
    k = rng.standard_normal((7, 2, 1280 if shared_by == "token_head" else 128))
    k = k.astype(ml_dtypes.bfloat16)
    v = rng.standard_normal((7, 2, 64)).astype(k.dtype)
    k[1, 0, 3] = v[2, 1, 1] = np.inf  # in the first part of the first thread
    k[3, 1, 68] = v[4, 0, 33] = -np.inf  # in its second part
    k[4, 0, 5] = v[6, 1, 40] = np.nan
    arrays = {"slot_mapping": np.array([9, 3, 11, 0, 5, -1, 12])}
    options = {"layout": "NHD"}
    for letter, rows, kind in zip("kv", (k, v), kinds, strict=True):
        stored = FORMATS[kind]
        shape = (3, 4, 2, rows.shape[-1] // stored.packed)
        arrays[f"{letter}_cache"] = np.zeros(shape, stored.dtype)
        if stored.most < np.inf:
            shapes = {"tensor": (1,), "token_head": (3, 4, 2)}
            shape = shapes.get(shared_by, (3, 4, 2, rows.shape[-1] // 32))
            arrays[f"{letter}_scale"] = np.full(shape, 0.03, np.float32)
        options[f"{letter}_format"] = kind
    written = {name: array.copy() for name, array in arrays.items()}
    tokens = {"k": k, "v": v}
    info = pc.PagedCachingInfo.create(**described_of(written | tokens), **options)
    write = pc.Descriptor(info, info.rules.expected(described_of(written | tokens)), device)
    write.calculate(**addresses_of(written | tokens))
    pc.paged_caching(**arrays, **tokens, **options)
    assert all(written[name].tobytes() == array.tobytes() for name, array in arrays.items())
    assert ", 32, " in device.launches[0][0]
    outs = {"k_out": np.zeros_like(k), "v_out": np.zeros_like(v)}
    read = {name: array.copy() for name, array in outs.items()}
    info = pc.PagedGatherInfo.create(**described_of(written | read), **options)
    gather = pc.GatherDescriptor(info, info.rules.expected(described_of(written | read)), device)
    gather.calculate(**addresses_of(written | read))
    pc.paged_gather(**arrays, **outs, **options)
    assert all(read[name].tobytes() == array.tobytes() for name, array in outs.items())


def described_of(arrays):
    return {name: pc.TensorDescriptor(array.dtype, array.shape) for name, array in arrays.items()}


def addresses_of(arrays):
    return {name: array.ctypes.data for name, array in arrays.items()}


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "k", "v", "k_scale", "slot_mapping"])
def test_misaligned_addresses(compiler, name):
    """They take the narrowest access, or are refused if an item itself is misaligned."""
    from pagedcache.operators.paged_caching import info

    device = HostDevice(compiler)
    shape = (5, 4, 3, 32)
    described = {
        "k_cache": pc.TensorDescriptor("int8", shape),
        "v_cache": pc.TensorDescriptor("int8", shape),
        "k": pc.TensorDescriptor("float16", (9, 3, 32)),
        "v": pc.TensorDescriptor("float16", (9, 3, 32)),
        "slot_mapping": pc.TensorDescriptor("int64", (9,)),
        "k_scale": pc.TensorDescriptor("float32", (1,)),
        "v_scale": pc.TensorDescriptor("float32", (5, 4, 3)),
    }  # fmt: skip
    made = pc.PagedCachingInfo.create(**described, layout="NHD")
    descriptor = pc.Descriptor(made, made.rules.expected(described), device)
    memory = {each: np.zeros(8192, np.uint8) for each in info.NAMES}
    starts = {each: -array.ctypes.data % 64 for each, array in memory.items()}
    memory["slot_mapping"][:] = 255  # -1: all of it is padding
    addresses = [memory[each].ctypes.data + starts[each] for each in info.NAMES]
    at = info.NAMES.index(name)
    # Bytes that the address is moved by, and elements that a thread then takes.
    for moved, count in ((0, 32), (8, 4), (4, 4), (2, 1), (1, 1), (0, 32), (2, 1)):
        device.launches.clear()
        these = [address + moved * (i == at) for i, address in enumerate(addresses)]
        arguments = dict(zip(info.NAMES, these, strict=True))
        if moved % described[name].dtype.itemsize:
            with pytest.raises(ValueError, match=f"{name} must start at a multiple of its item"):
                descriptor.calculate(**arguments)
            continue
        if name in ("k_scale", "slot_mapping"):
            count = 32
        elif name in ("k", "v") and moved == 4:
            count = 1
        descriptor.calculate(**arguments)
        [(expression, _, _)] = device.launches
        assert f"I8, 2, {count}," in expression, (moved, expression)


def hardest_divisions(count):
    """Return numbers whose quotients are as near as possible to the middle of two float32.

    The quotient of two odd integers of 24 bits, x times 2**24 over s, is half a unit off by
    1 / (2 s) units at least; a modular inverse finds x for s.
    """
    rng = np.random.default_rng(1)
    found = []
    while len(found) < count:
        by = int(rng.integers(1 << 22, 1 << 23)) * 2 + 1
        for half in ((by - 1) // 2, (by + 1) // 2):
            value = half * pow(1 << 24, -1, by) % by
            if value >= 1 << 23:
                found.append((value, by))
    return np.array(found, np.float32).T.copy()


def test_quotients_that_are_hard_to_round(compiler):
    import ctypes

    library = compiler.library("formats.cuh", (), QUOTIENTS)
    library.differing.restype = ctypes.c_long
    values, by = hardest_divisions(20_000)
    exact = values.astype(np.float64) * 2**24 / by.astype(np.float64)
    assert (np.abs(exact - np.floor(exact) - 0.5) < 1e-7).all()
    for scale in (1.0, 2.0**-30, 2.0**20):
        some = (values * np.float32(scale)).astype(np.float32)
        smaller = (by * np.float32(2.0**-20)).astype(np.float32)
        accepted = np.zeros(1, np.int64)
        assert library.differing(pointer(some), pointer(smaller), ctypes.c_long(len(by)),
                                 pointer(accepted)) == 0  # fmt: skip
        assert accepted[0] == len(by)


def test_a_scale_that_is_computed_is_multiplied_by_its_reciprocal(compiler):
    """As vLLM does, where a division would round otherwise."""
    rng = np.random.default_rng(0)
    rows = np.zeros((400, 1, 128), np.float32)
    rows[:, 0, 127] = rng.uniform(1, 1000, 400)
    scale = (rows[:, :, 127:] / np.float32(127)).astype(np.float32)
    rows[:, :, :126] = (np.arange(126, dtype=np.float32) + np.float32(0.5)) * scale
    cache = np.zeros((400, 1, 1, 128), np.int8)
    scales = np.zeros((400, 1, 1), np.float32)
    arrays = {
        "k_cache": cache,
        "v_cache": cache.copy(),
        "k": rows,
        "v": rows,
        "slot_mapping": np.arange(400),
        "k_scale": scales,
        "v_scale": scales.copy(),
    }
    products = rows * (np.float32(1) / scale)
    both = (products, rows / scale)
    wanted, divided = (np.floor(each.astype(np.float64) + 0.5) for each in both)
    assert (wanted != divided).any()  # so the two can be told apart
    described = {name: pc.TensorDescriptor(a.dtype, a.shape) for name, a in arrays.items()}
    info = pc.PagedCachingInfo.create(**described, layout="NHD")
    for descriptor in (
        pc.Descriptor.create(**arrays, layout="NHD"),
        pc.Descriptor(info, info.rules.expected(described), HostDevice(compiler)),
    ):
        cache[...] = 0
        descriptor.calculate(**arrays)
        assert np.array_equal(scales, scale[..., 0, None])
        assert np.array_equal(cache[:, 0], wanted)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")
def test_the_kernels_under_sanitizers():
    """Those whose threads meet in shuffles, and those that read scales."""
    name = "test_formats.py::test_the_kernel_does_what_the_cpu_does[{}-{}]"
    kernels = ("int8-int4-group-group", "float8_e5m2-int8-channel-token_head")
    tests = [name.format(kernels[0], operator) for operator in OPERATORS]
    tests.append(name.format(kernels[1], "write"))
    done = sanitized(*tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_one_tensor_for_two_arguments_is_matched():
    """PyTorch's guards refuse one that they are given twice."""
    torch = pytest.importorskip("torch")
    cache, other = torch.zeros(5, 4, 3, 8, dtype=torch.int8), torch.zeros(5, 4, 3, 8)
    other = other.to(torch.int8)
    rows, scale, slots = torch.ones(6, 3, 8), torch.ones(1), torch.arange(6)
    more = {"k_scale": scale, "v_scale": scale}
    with pc.Descriptor.create(cache, other, rows, rows, slots, **more, layout="NHD") as descriptor:
        descriptor.calculate(cache, other, rows, rows, slots, **more)
        matcher = descriptor.latest
        for _ in range(3):
            descriptor.calculate(cache, other, rows, rows, slots, **more)
            assert descriptor.latest is matcher
        arrays = (cache, other, rows, rows, slots)
        assert matcher(*arrays, scale, scale, None)
        assert not matcher(*arrays, scale, scale.clone(), None)
        assert not matcher(cache, other, rows, rows.clone(), slots, scale, scale, None)


def test_outputs_that_are_interleaved_are_matched():
    both = np.zeros((20, 2, 3, 8), np.float32)
    cache = np.ones((5, 4, 3, 8), np.float32)
    arrays = (cache, cache, np.arange(6), both[:, 0], both[:, 1])
    with pc.GatherDescriptor.create(*arrays, layout="NHD") as gather:
        gather.calculate(*arrays)
        assert gather.latest(*arrays, None, None, None)
        more = (cache, cache, np.arange(9), both[:, 0], both[:, 1])
        assert not gather.latest(*more, None, None, None)  # more rows than were compared
        gather.calculate(*more)
        assert gather.latest(*more, None, None, None)
        assert gather.latest(*arrays, None, None, None)
    assert (both[:9] == 1).all()
    assert not both[9:].any()
    out = np.zeros((12, 3, 8), np.float32)
    apart = (cache, cache, np.arange(6), out[:10], out[6:])
    pc.GatherDescriptor.create(*apart, layout="NHD").calculate(*apart)


def test_debug_of_a_gather_from_a_cache_that_is_not_full():
    arrays = {**five(), "k_scale": np.full((5, 4, 3), np.nan, np.float32), "v_scale": ones(1)}
    pc.paged_caching(**arrays, layout="NHD")
    given = {name: arrays[name] for name in ("k_cache", "v_cache", "k_scale", "v_scale")}
    given |= {"slot_mapping": arrays["slot_mapping"], "k_out": arrays["k"], "v_out": arrays["v"]}
    with pc.GatherDescriptor.create(**given, layout="NHD", debug=True) as gather:
        gather.calculate(**given)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_8_bit_floats_by_dlpack(name):
    torch = pytest.importorskip("torch")

    class Exporter:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    tensor = torch.zeros(5, 4, 3, 8, dtype=getattr(torch, name))
    try:
        Exporter(tensor).__dlpack__()
    except Exception as error:
        pytest.skip(f"this PyTorch does not export it: {error}")
    arrays = five(k_kind="bfloat16")
    arrays |= {"k_cache": Exporter(tensor), "v_cache": tensor.clone()}
    pc.paged_caching(**arrays, layout="NHD")
    assert (tensor.float().reshape(20, 3, 8)[:6] == 1).all()


def test_explain_checks_addresses():
    torch = pytest.importorskip("torch")
    arrays = five(source="float32")
    arrays = {name: torch.from_numpy(array).clone() for name, array in arrays.items()}
    scale = torch.ones(1)
    descriptor = pc.Descriptor.create(**arrays, k_scale=scale, v_scale=scale, layout="NHD")
    arrays["k_cache"].untyped_storage().resize_(0)
    with pytest.raises(pc.PagedCacheError, match="k_cache must not be a null pointer"):
        descriptor.explain(1, k_cache=arrays["k_cache"], k_scale=scale)


def test_c_has_no_formats():
    from pagedcache import infiniop

    handle = pc.Handle("cpu")
    for kind in ("float8_e4m3fn", "int8", "uint8", "float32"):
        cache, rows = pc.TensorDescriptor(kind, (5, 3, 4, 8)), pc.TensorDescriptor("f2", (6, 3, 8))
        status, descriptor = infiniop.infiniopCreatePagedCachingDescriptor(
            handle, cache, cache, rows, rows, pc.TensorDescriptor("i8", (6,))
        )
        assert (status, descriptor) == (pc.Status.BAD_TENSOR_DTYPE, None)


@pytest.mark.parametrize("source", SOURCES)
def test_powers_of_two(compiler, source):
    """Scales of vLLM's 656-byte cell: the least power of two that is large enough, and exact."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 1, 256)) * np.exp2(rng.integers(-30, 30, (300, 1, 1)))
    rows[:9] = 0
    rows[9:40, 0, 128] = 448 * np.exp2(rng.integers(-13, 8, 31))  # powers of two already
    rows[9:40, 0, 129:] = 0
    with np.errstate(over="ignore"):
        rows = rows.astype(source)
    cache = np.zeros((300, 1, 1, 256), ml_dtypes.float8_e4m3fn)
    scale = np.zeros((300, 1, 1, 2), np.float32)
    arrays = {
        "k_cache": cache, "v_cache": cache.copy(), "k": rows, "v": rows,
        "slot_mapping": np.arange(300), "k_scale": scale, "v_scale": scale.copy(),
    }  # fmt: skip
    described = {name: pc.TensorDescriptor(a.dtype, a.shape) for name, a in arrays.items()}
    info = pc.PagedCachingInfo.create(**described, layout="NHD", powers=True)
    wide = rows.astype(np.float64).reshape(300, 2, 128)
    wide = np.where(np.isfinite(wide), wide, np.inf)
    least = np.maximum(np.abs(wide).max(-1) / 448, np.float64(np.float32(1e-4)))
    with np.errstate(all="ignore"):
        wanted = np.exp2(np.ceil(np.log2(least)))
        codes = codes_of("float8_e4m3fn", (wide / wanted[..., None]).astype(np.float32))
    for device in (pc.Handle("cpu").opened(), HostDevice(compiler)):
        scale[...] = 0
        pc.Descriptor(info, info.rules.expected(described), device).calculate(**arrays)
        assert np.array_equal(scale[:, 0, 0], wanted.astype(np.float32))
        assert np.array_equal(cache.view(np.uint8).reshape(300, 2, 128), codes)


@pytest.mark.parametrize("letter", "kv")
def test_rows_that_kernels_cannot_count(compiler, letter):
    """A descriptor for such a head is refused; nothing of that size is there."""
    size = {"k": 8, "v": 8, letter: 2**29}
    described = {"slot_mapping": pc.TensorDescriptor("int64", (2,))}
    for each in "kv":
        described |= {
            f"{each}_cache": pc.TensorDescriptor("int8", (2, 2, 1, size[each])),
            each: pc.TensorDescriptor("float32", (2, 1, size[each])),
            f"{each}_scale": pc.TensorDescriptor("float32", (2, 2, 1)),
        }
    info = pc.PagedCachingInfo.create(**described, layout="NHD")
    with pytest.raises(NotImplementedError, match=f"{letter}_cache must have at most 2147483647 b"):
        pc.Descriptor(info, info.rules.expected(described), HostDevice(compiler))
