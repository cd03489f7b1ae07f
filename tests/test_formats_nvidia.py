# SPDX-License-Identifier: Apache-2.0
"""Storage formats on a GPU against the cpu backend, whole buffers, byte for byte."""

from __future__ import annotations

import format_cases
import numpy as np
import pytest
from format_cases import EIGHT_BITS
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import same
from test_formats import OPERATORS, inputs, on_cpu
from test_nvidia import sanitized

import pagedcache as pc
from pagedcache.backend.nvidia import source
from pagedcache.cache.formats import FORMATS

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


@pytest.mark.parametrize("operator", OPERATORS)
def test_does_what_the_cpu_does(cupy, operator):
    """On cases of a few kernels, since each new one has to be compiled."""

    @settings(max_examples=5_000, deadline=None)
    @given(st.sampled_from(LIKE).flatmap(lambda like: format_cases.format_cases(like=like)),
           st.booleans())  # fmt: skip
    def check(case, as_if_large):
        case = case.in_bytes()
        there = case.on(cupy.asarray)
        with on_cpu(operator, there) as descriptor:
            if as_if_large:
                del descriptor._implementation._widest._steps[:-1]
            descriptor.calculate(**there.arguments(operator))
            assert descriptor._report.take() == format_cases.invalid_slots(case)
        with on_cpu(operator, case) as descriptor:
            descriptor.calculate(**case.arguments(operator))
        same(there, case.buffers)

    check()


LIKE = [
    (source, slots, formats, kinds)
    for source, slots in (("bfloat16", "int64"), ("float16", "int32"), ("float32", "int64"))
    for formats, kinds in (
        (("float8_e4m3fn", "float8_e4m3fn"), ("tensor", "tensor")),
        (("float8_e4m3fn", "float8_e5m2"), ("head", None)),
        (("float8_e5m2", "int8"), ("channel", "token_head")),
        (("int8", "int8"), ("token_head", "token_head")),
        (("int4", "int4"), ("group", "group")),
        (("int4", "float8_e4m3fn"), ("token_head", "group")),
        (("float16", "bfloat16"), (None, None)),
        (("float32", "int8"), (None, "tensor")),
    )
]


@pytest.mark.parametrize("dtype", format_cases.SOURCES)
@pytest.mark.parametrize("name", [*EIGHT_BITS, "int8", "int4", "float16", "bfloat16"])
def test_every_conversion(cupy, name, dtype):
    """Of all float16, all bfloat16, and all float32 at which rounding changes."""
    if name == dtype:
        pytest.skip("it is a copy")
    with np.errstate(all="ignore"):
        values = inputs(name).astype(dtype)
    values = np.resize(values, (-(-len(values) // 256), 2, 128))
    slots = np.arange(len(values))
    wide = FORMATS[name]
    cache = np.zeros((len(values), 1, 2, 128 // wide.packed), wide.code_dtype)
    cache = cache if wide.dtype.itemsize == 1 else cache.view(wide.dtype)
    scale = np.ones(1, np.float32) if wide.most < np.inf else None
    options = {"k_format": name, "v_format": name, "layout": "NHD"}
    by_cpu = cache.copy()
    pc.paged_caching(by_cpu, by_cpu.copy(), values, values, slots, k_scale=scale, v_scale=scale,
                     **options)  # fmt: skip
    there = cupy.asarray(cache)
    arrays = [cupy.asarray(each) for each in (values, slots)]
    scale = None if scale is None else cupy.asarray(scale)
    pc.paged_caching(there, there.copy(), arrays[0], *arrays, k_scale=scale, v_scale=scale,
                     **options)  # fmt: skip
    bits = wide.code_dtype
    assert np.array_equal(there.view(bits).get(), by_cpu.view(bits))
    for out in format_cases.SOURCES:
        if out == name:
            continue
        read = np.zeros(values.shape, out)
        pc.paged_gather(by_cpu, None, slots, read, None, k_format=name, layout="NHD",
                        k_scale=None if scale is None else scale.get())  # fmt: skip
        back = cupy.zeros(values.shape, out)
        pc.paged_gather(there, None, arrays[1], back, None, k_format=name, layout="NHD",
                        k_scale=scale)  # fmt: skip
        bits = f"u{read.itemsize}"
        assert np.array_equal(back.view(bits).get(), read.view(bits))


CONVERT = """
using namespace pagedcache;
template <typename Format>
__device__ void all(const float* values, unsigned int* codes, float* back, long count) {
  const long i = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
  if (i >= count) return;
  codes[i] = pushed<Format>(0, values[i], values[count - 1 - i]);
  Packed<2> both = {{codes[i] & 0xffffu}};
  float two[2];
  decode<Format>(both, two);
  back[i] = two[0] != two[0] ? -1.0f : two[0];
}
extern "C" __global__ void E4M3_all(const float* v, unsigned int* c, float* b, long n) {
  all<E4M3>(v, c, b, n);
}
extern "C" __global__ void E5M2_all(const float* v, unsigned int* c, float* b, long n) {
  all<E5M2>(v, c, b, n);
}
extern "C" __global__ void quotients(const float* values, const float* by, long n,
                                     unsigned long long* differing,
                                     unsigned long long* accepted) {
  const long i = blockIdx.x * static_cast<long>(blockDim.x) + threadIdx.x;
  if (i >= n) return;
  float one[1] = {values[i]};
  if (!Quotients(by[i]).of(one)) return;
  atomicAdd(accepted, 1ULL);
  const unsigned int mine = asBits(one[0]), wanted = asBits(divide(values[i], by[i]));
  const unsigned int sign = 0x80000000u, tiny = 0x21800000u;
  const bool both = (mine & ~sign) < tiny && (wanted & ~sign) < tiny;
  if ((both ? (mine ^ wanted) & sign : mine ^ wanted) != 0) atomicAdd(differing, 1ULL);
}
"""


def compiled(cupy, *defines):
    text = "".join(f"#define {name}\n" for name in defines) + source.read("formats.cuh") + CONVERT
    return cupy.RawModule(code=text, options=("--std=c++17",))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_hardware_and_software_convert_alike(cupy, name):
    """Every 127th float32, and all that matter; without hardware, software is compared twice."""
    kind = {"float8_e4m3fn": "E4M3", "float8_e5m2": "E5M2"}[name]
    every = np.arange(0, 1 << 32, 127, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = cupy.asarray(np.concatenate([every, inputs(name)]))
    results = []
    for defines in ((), ("PAGEDCACHE_SOFTWARE",)):
        codes, back = cupy.zeros(len(values), np.uint32), cupy.zeros(len(values), np.float32)
        function = compiled(cupy, *defines).get_function(f"{kind}_all")
        function((len(values) // 256 + 1,), (256,), (values, codes, back, len(values)))
        results.append((codes, back.view(np.uint32)))
    for one, other in zip(*results, strict=True):
        assert (one == other).all()
    first = (results[0][0] & 0xFF).astype(np.uint8).get()
    assert np.array_equal(first, FORMATS[name].encode(values.get()))


def test_quotients(cupy):
    """A hundred million random pairs, and those at which a format rounds up or down."""
    function = compiled(cupy).get_function("quotients")
    differing, accepted = cupy.zeros(1, np.uint64), cupy.zeros(1, np.uint64)
    rng = cupy.random.default_rng(0)
    count = 10_000_000
    edges = cupy.asarray(inputs("float8_e4m3fn")[-2000:])
    for turn in range(10):
        exponents = rng.integers(87, 167, count).astype(np.uint32)
        by = (rng.integers(0, 1 << 23, count).astype(np.uint32) | exponents << 23).view(np.float32)
        if turn % 2:
            values = by * edges[rng.integers(0, len(edges), count)]
        else:
            # Also subnormal numbers, which a compiler may flush.
            exponents = rng.integers(0, 207, count).astype(np.uint32)
            mantissas = rng.integers(0, 1 << 23, count).astype(np.uint32)
            values = (mantissas | exponents << 23).view(np.float32)
        function((count // 256 + 1,), (256,), (values, by, count, differing, accepted))
    assert int(differing[0]) == 0
    assert int(accepted[0]) > 9 * count


def test_capture_and_allocations(cupy):
    rng = np.random.default_rng(0)
    k = cupy.asarray(rng.standard_normal((64, 8, 128)).astype(np.float16))
    slots = cupy.asarray(rng.permutation(160)[:64])
    cache = cupy.zeros((10, 16, 8, 128), np.int8)
    other = cupy.zeros_like(cache)
    scales = [cupy.zeros((10, 16, 8), np.float32) for _ in "kv"]
    out = cupy.zeros_like(k)
    arrays = {"k_cache": cache, "v_cache": other, "slot_mapping": slots,
              "k_scale": scales[0], "v_scale": scales[1]}  # fmt: skip
    write = pc.Descriptor.create(k=k, v=k, **arrays, layout="NHD")
    read = pc.GatherDescriptor.create(k_out=out, v_out=out.copy(), **arrays, layout="NHD")
    v_out = cupy.zeros_like(k)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    pool = cupy.get_default_memory_pool()  # cudaMalloc itself would end the capture
    used = pool.used_bytes(), pool.total_bytes()
    with stream:
        stream.begin_capture()
        write.calculate(k=k, v=k, **arrays)
        read.calculate(k_out=out, v_out=v_out, **arrays)
        graph = stream.end_capture()
    assert (pool.used_bytes(), pool.total_bytes()) == used
    assert not cache.any()
    for turn in range(3):
        k[...] = cupy.asarray(rng.standard_normal(k.shape).astype(np.float16)) * (turn + 1)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        wanted = k.get().astype(np.float32)
        scale = np.maximum(np.abs(wanted).max(-1) / np.float32(127), np.float32(1e-6))
        error = np.abs(out.get().astype(np.float32) - wanted).max(-1)
        assert (error <= scale * 0.51 + np.abs(wanted).max(-1) * 2**-10).all()
        assert (out.get() == v_out.get()).all()


def test_torch_tensors_of_8_bit_floats(cupy):
    torch = pytest.importorskip("torch")
    k = torch.randn(300, 8, 128, device="cuda", dtype=torch.bfloat16)
    slots = torch.randperm(320, device="cuda")[:300]
    cache = torch.zeros(20, 16, 8, 128, device="cuda", dtype=torch.float8_e4m3fn)
    other, scale = torch.zeros_like(cache), torch.tensor([0.02], device="cuda")
    out = torch.zeros_like(k)
    for count in (300, 1, 64, 65, 300):
        pc.paged_caching(cache, other, k[:count], k[:count], slots[:count], layout="NHD",
                         k_scale=scale, v_scale=scale)  # fmt: skip
        pc.paged_gather(cache, other, slots[:count], out, torch.empty_like(k), layout="NHD",
                        k_scale=scale, v_scale=scale)  # fmt: skip
        limit = (k[:count].float() / scale).clamp(-448, 448)
        wanted = (limit.to(torch.float8_e4m3fn).float() * scale).to(torch.bfloat16)
        assert torch.equal(out[:count], wanted)


SANITIZED = """
import cupy, numpy as np, pagedcache as pc
cupy.cuda.set_allocator(None)
rng = np.random.default_rng(0)
for size, group in ((128, 32), (100, 20), (36, 4), (6, 2)):
    for layout, shape in (("HND", (9, 3, 5)), ("NHD", (9, 5, 3))):
        k = cupy.asarray(rng.standard_normal((40, 3, size)).astype("f2"))
        slots = cupy.asarray(np.r_[rng.permutation(45)[:36], -1, 45, -5, 99])
        int4 = cupy.zeros((*shape, size // 2), "u1"), cupy.zeros((*shape, size // group), "f4")
        int8 = cupy.zeros((*shape, size), "i1"), cupy.zeros(shape, "f4")
        fp8 = cupy.zeros((*shape, size), "u1"), cupy.ones(1, "f4")
        for (one, its), (other, theirs), names in (
            (int4, int8, ("int4", "int8")), (fp8, int4, ("float8_e4m3fn", "int4")),
        ):
            more = dict(k_scale=its, v_scale=theirs, k_format=names[0], v_format=names[1],
                        layout=layout)
            pc.paged_caching(one, other, k, k, slots, **more)
            pc.paged_gather(one, other, slots, cupy.zeros_like(k), cupy.zeros_like(k), **more)
cupy.cuda.Device().synchronize()
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_under_compute_sanitizer(tool):
    done = sanitized(tool, SANITIZED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done" in done.stdout


def test_explain_reads_what_torch_has_queued(cupy):
    torch = pytest.importorskip("torch")
    cache = torch.zeros(20, 16, 8, 128, device="cuda", dtype=torch.int8)
    other, scale = torch.zeros_like(cache), torch.ones(1, device="cuda")
    k, slots = torch.full((4, 8, 128), 5.0, device="cuda"), torch.arange(4, device="cuda")
    scales = {"k_scale": scale, "v_scale": scale}
    write = pc.Descriptor.create(cache, other, k, k, slots, **scales, layout="NHD")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # a tenth of a second
        write.calculate(cache, other, k, k, slots, **scales)
        [found] = write.explain(2, k_cache=cache, k_scale=scale, head=7, dim=127).elements
    assert (found.code, found.scale, found.value) == (5, 1.0, 5.0)
