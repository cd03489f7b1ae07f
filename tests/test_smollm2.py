# SPDX-License-Identifier: Apache-2.0
"""A whole model on the paged cache: equal to the dense one, near llama.cpp, and smaller."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import pagedcache as pc
from pagedcache.demo import model as files

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
import smollm2

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "smollm2.json").read_text())["cases"]
CONTEXT = 72
BLOCK_SIZE = 8
# Logits of the same step differ by up to 1e-4 between processors, since BLAS adds in other orders.
MARGIN = 1e-3
PREFIX = 24  # tokens that the last two prompts begin with in common: three blocks


@pytest.fixture(scope="session")
def source():
    try:
        files.require_readers()
        return files.ModelFile(files.find_model())
    except files.NoModelError as error:
        pytest.skip(f"no model: {error}")


@pytest.fixture(scope="session")
def model(source):
    return smollm2.Model(source, np, CONTEXT)


def run(engine):
    """Step to the end; return the block tables after each step."""
    tables = []
    while engine.waiting or engine.running:
        ended = engine.step()
        for request in [*engine.running, *ended]:
            if request.row >= 0:  # it chose a token in this step
                *_, second, first = np.sort(engine.logits[request.row])
                assert first - second > MARGIN, "rounding could have chosen the other token"
                request.row = -1
        tables.append({one.name: list(one.sequence.block_table) for one in engine.running})
        held = {block for table in tables[-1].values() for block in table}
        assert len(held) == engine.cache.pool.num_used, "a block is held by nobody"
    return tables


def submit(engine, new_tokens):
    return [engine.submit(str(i), case["prompt_ids"], new_tokens) for i, case in enumerate(CASES)]


@pytest.fixture(scope="session")
def dense(model):
    return [smollm2.dense_tokens(model, case["prompt_ids"], 20) for case in CASES]


def test_next_token_as_llama_cpp(source, model):
    reference = np.load(DATA / "smollm2_logits.npz")
    engine = smollm2.Engine(model, 40, BLOCK_SIZE)
    requests = submit(engine, 1)
    found = {}
    while len(found) < len(CASES):
        found |= {request.name: engine.logits[request.row].copy() for request in engine.step()}
    for i, (case, request) in enumerate(zip(CASES, requests, strict=True)):
        assert source.tokens(case["prompt"]) == case["prompt_ids"]
        logits, expected = found[str(i)], reference[f"logits{i}"]
        assert request.generated == [expected.argmax()] == case["greedy_ids"][:1]
        assert np.corrcoef(logits, expected)[0, 1] >= 0.999
        assert abs(logits - expected).max() <= 1.08  # data/README.md says what it comes from


def test_paged_is_dense(model, dense, monkeypatch):
    writes = []
    write = pc.WriteKernel.__call__

    def counted(self, k_cache, v_cache, k, v, slot_mapping, **others):
        writes.append(slot_mapping.copy())
        write(self, k_cache, v_cache, k, v, slot_mapping, **others)

    monkeypatch.setattr(pc.WriteKernel, "__call__", counted)
    engine = smollm2.Engine(model, 40, BLOCK_SIZE)
    requests = submit(engine, 20)
    tables = run(engine)
    assert [request.generated for request in requests] == dense
    assert [request.found for request in requests] == [0, 0, 0, 0, 0, PREFIX]
    together = next(step for step in tables if "5" in step)
    assert together["5"][: PREFIX // BLOCK_SIZE] == together["4"][: PREFIX // BLOCK_SIZE]
    # All K and V came through the kernel: in each layer of each step one write.
    assert len(writes) == 30 * len(tables)
    written = sum(int((slots >= 0).sum()) for slots in writes)
    lengths = [len(request.ids) - 1 for request in requests]  # the last token is not fed
    assert written == 30 * (sum(lengths) - PREFIX)
    assert engine.cache.pool.num_used == 0
    engine.kernel.check()  # no slot and no position was outside

    # A block has K and V of 30 layers, 8 tokens, 3 heads of 64, in float32.
    assert engine.cache.block_bytes == 2 * 30 * BLOCK_SIZE * 3 * 64 * 4 == 368_640
    assert lengths == [24, 30, 26, 25, 55, 54]
    # Dense, six sequences as long as the longest; paged, what was held at most.
    assert len(CASES) * max(lengths) * engine.cache.block_bytes // BLOCK_SIZE == 15_206_400
    assert (engine.peak, engine.peak * engine.cache.block_bytes) == (25, 9_216_000)


def test_the_kernel_rotates_and_writes_as_numpy(model):
    rows, rng = 16, np.random.default_rng(0)
    engine = smollm2.Engine(model, CONTEXT // BLOCK_SIZE, BLOCK_SIZE)
    heads = model.heads + 2 * model.kv_heads
    qkv = rng.standard_normal((rows, heads * model.head_size)).astype(np.float32)
    slots = rng.permutation(CONTEXT)[:rows]
    slots[5] = -1
    positions = rng.integers(CONTEXT, size=rows)
    cos, sin = np.split(model.cos_sin[positions][:, None], 2, axis=-1)

    def rotated(x):
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)

    expected_q, k, v = model.split(qkv.copy())
    expected_q, used = rotated(expected_q), slots >= 0
    pages = engine.cache.layers[3]
    shape = (CONTEXT, model.kv_heads, model.head_size)
    expected_k, expected_v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    expected_k[slots[used]], expected_v[slots[used]] = rotated(k)[used], v[used]

    q, k, v = model.split(qkv)
    turn = {"cos_sin": model.cos_sin, "positions": positions}
    engine.kernel(pages.k, pages.v, k, v, slots, q=q, q_out=q, **turn)
    assert q[used].tobytes() == expected_q[used].tobytes()
    assert pages.k.tobytes() == expected_k.tobytes()
    assert pages.v.tobytes() == expected_v.tobytes()


def test_continuous_batching_in_a_small_pool(model, dense):
    engine = smollm2.Engine(model, 11, BLOCK_SIZE)  # the longest alone needs 7
    requests = submit(engine, 20)
    tables = run(engine)
    assert [request.generated for request in requests] == dense
    assert 1 < max(map(len, tables)) < len(CASES)
    holders = [{name for step in tables for name in step if b in step[name]} for b in range(11)]
    assert max(map(len, holders)) > 2, "no block went from a sequence that ended to a new one"
    assert engine.peak <= 11


def test_rows_do_not_see_each_other(model, dense):
    engine = smollm2.Engine(model, 10, BLOCK_SIZE, rows=16)
    alone = engine.submit("alone", CASES[1]["prompt_ids"], 4)
    run(engine)
    assert alone.generated == dense[1][:4]


def test_a_prompt_is_found_after_it_has_ended(model, dense):
    engine = smollm2.Engine(model, 10, BLOCK_SIZE)
    prompt = CASES[4]["prompt_ids"]
    for found in (0, (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE):
        request = engine.submit("again", prompt, 4)
        run(engine)
        assert request.found == found
        assert request.generated == dense[4][:4]
    assert found >= PREFIX


@pytest.mark.gpu
def test_a_graph_is_the_same_step(source, dense):
    import cupy

    model = smollm2.Model(source, cupy, CONTEXT)
    found = []
    for graph in (False, True):
        engine = smollm2.Engine(model, 40, BLOCK_SIZE, graph=graph)
        requests = submit(engine, 20)
        run(engine)
        found.append([request.generated for request in requests])
    assert found[0] == found[1]
    alone = [smollm2.dense_tokens(model, case["prompt_ids"], 20) for case in CASES]
    assert found[0] == alone
    assert [one[:4] for one in found[0]] == [one[:4] for one in dense]  # sums in another order


def test_what_cannot_be_served_is_said(model):
    engine = smollm2.Engine(model, 2, BLOCK_SIZE)
    with pytest.raises(ValueError, match="too long: 18 tokens in 3 blocks"):
        engine.submit("long", [1] * 10, 8)
    with pytest.raises(ValueError, match="too long: 73 tokens"):
        engine.submit("long", [1] * 10, CONTEXT - 9)


def test_windows_attend_as_rows_do():
    model, rng = smollm2.Model(smollm2.MadeUp(), np, 200), np.random.default_rng(0)
    for windows, length in [(3, 7), (2, 64), (1, 130)]:
        rows = windows * length
        q = rng.standard_normal((rows, 15, 64)).astype(np.float32)[:, :9]
        k, v = rng.standard_normal((2, rows, 3, 64)).astype(np.float32)
        tables = np.arange(windows).repeat(length)[:, None]
        positions = np.tile(np.arange(length), windows)
        pages = (x.reshape(windows, length, 3, 64) for x in (k, v))
        expected = model.ops.attention(q, *pages, tables, positions)
        found = smollm2.attend_windows(model, q, k, v, length)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_made_up_model_reads_bytes():
    source = smollm2.MadeUp()
    model = smollm2.Model(source, np, CONTEXT)
    engine = smollm2.Engine(model, 8, BLOCK_SIZE)
    request = engine.submit("bytes", source.tokens("Bytes"), 4)
    run(engine)
    assert request.generated == smollm2.dense_tokens(model, list(b"Bytes"), 4)


# The operations of both kinds on the same numbers


def compare(cuda, to_device, to_host):
    """Compare CUDA operations with those of NumPy, which runs them first."""
    rng = np.random.default_rng(0)
    expected = smollm2.numpy_operations(1e-5)

    def same(name, *arrays):
        found = to_host(getattr(cuda, name)(*map(to_device, arrays)))
        wanted = getattr(expected, name)(*arrays)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4)

    def random(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    same("rms_norm", 10 * random(3, 576), random(576))
    same("rms_norm", np.zeros((1, 20), np.float32), random(20))
    for rows, outputs, length in [(16, 8, 576), (1, 4, 1536), (18, 12, 20)]:
        x, matrix = random(rows, length), random(outputs, length)
        same("product", x, matrix)
        same("product", x, matrix, random(rows, outputs))
    same("gated", 100 * random(3, 2 * 300))
    # Three rows in pages of 3 KV heads, whose blocks are apart; Q is part of a wider array.
    pages = random(9, 2, 5, 4, 3, 64)
    k, v = (to_device(pages)[:, i, 2] for i in range(2))
    q = to_device(random(4, 15, 64))[:, :9]
    tables = np.array([[8, 3, 5, 0, 1, 7], [2, 0, 0, 0, 0, 0], [8, 6, 0, 0, 0, 0], [0] * 6])
    positions = np.array([22, 0, 5, 0])
    tables, positions = (to_device(x.astype(np.int32)) for x in (tables, positions))
    found = to_host(cuda.attention(q, k, v, tables, positions))
    wanted = expected.attention(*map(to_host, (q, k, v, tables, positions)))
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_cuda_operations_are_those_of_numpy():
    import cupy

    compare(smollm2.cuda_operations(1e-5), cupy.asarray, cupy.asnumpy)


HOST = r"""
#include <algorithm>
#include <barrier>
#include <cmath>
#include <thread>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
using std::min;
struct alignas(16) float4 { float x, y, z, w; };
struct Dimension { unsigned int x, y; };
static thread_local Dimension threadIdx, blockIdx;
static Dimension blockDim, gridDim;
static std::barrier<>* block;
struct Warp {
  std::barrier<> all{32}, lower{16}, upper{16};
  float values[32];
};
static Warp* warps;
static void __syncthreads() { block->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned int mask, float value, int step) {
  Warp& warp = warps[threadIdx.x / 32];
  auto& barrier = mask == ~0u ? warp.all : mask & 1 ? warp.lower : warp.upper;
  warp.values[threadIdx.x % 32] = value;
  barrier.arrive_and_wait();
  value = warp.values[threadIdx.x % 32 ^ step];
  barrier.arrive_and_wait();
  return value;
}
#include "smollm2.cu"

template <typename... Types, std::size_t... I>
void launch(void (*kernel)(Types...), const unsigned int* sizes, void** arguments,
            std::index_sequence<I...>) {
  gridDim = {sizes[0], sizes[1]};
  blockDim = {sizes[2], 1};
  for (unsigned int y = 0; y < gridDim.y; ++y) {
    for (unsigned int x = 0; x < gridDim.x; ++x) {
      std::barrier<> all(sizes[2]);
      std::vector<Warp> of_block(sizes[2] / 32);
      block = &all;
      warps = of_block.data();
      std::vector<std::thread> threads;
      for (unsigned int i = 0; i < sizes[2]; ++i) {
        threads.emplace_back([=] {
          threadIdx = {i, 0};
          blockIdx = {x, y};
          kernel(*static_cast<Types*>(arguments[I])...);
          block->arrive_and_drop();
        });
      }
      for (auto& thread : threads) thread.join();
    }
  }
}
template <typename... Types>
void run(void (*kernel)(Types...), const unsigned int* sizes, void** arguments) {
  launch(kernel, sizes, arguments, std::index_sequence_for<Types...>());
}
#define HOST(name) \
  extern "C" void on_host_##name(const unsigned int* s, void** a) { run(name, s, a); }
HOST(rms_norm) HOST(product) HOST(gated) HOST(attention)
"""


@pytest.fixture
def cupy_on_host(tmp_path):
    """What `cuda_operations` needs of CuPy, for arrays of NumPy and kernels built by g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++")
    (tmp_path / "host.cpp").write_text(HOST)
    options = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", f"-I{NOTEBOOKS}"]
    options += ["-x", "c++", "host.cpp", "-o", "host.so"]
    built = subprocess.run(
        [compiler, *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    if "std=c++20" in built.stderr or "barrier: No such" in built.stderr:
        pytest.skip("this g++ has no C++20")
    assert built.returncode == 0, built.stderr
    library = ctypes.CDLL(str(tmp_path / "host.so"))

    class RawModule:
        def __init__(self, code, options):
            assert code == (NOTEBOOKS / "smollm2.cu").read_text("utf-8")

        def get_function(self, name):
            def kernel(grid, threads, arguments):
                assert all(isinstance(x, KINDS) for x in arguments)
                sizes = (ctypes.c_uint * 3)(*(*grid, 1)[:2], *threads)
                values = [np.array(x.ctypes.data if x.ndim else x) for x in arguments]
                pointers = (ctypes.c_void_p * len(values))(*(x.ctypes.data for x in values))
                getattr(library, f"on_host_{name}")(sizes, pointers)

            return kernel

    return types.SimpleNamespace(RawModule=RawModule, empty=np.empty)


KINDS = (np.ndarray, np.int32, np.float32, np.uintp)


def test_cuda_operations_on_the_host(cupy_on_host, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy_on_host)
    compare(smollm2.cuda_operations(1e-5), np.asarray, np.asarray)


@pytest.mark.parametrize("architecture", [70, 80, 90, 100])
def test_cuda_operations_compile(architecture):
    cupy = pytest.importorskip("cupy", reason="CuPy, which has NVRTC, is not installed")
    nvrtc = cupy.cuda.nvrtc
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not make code for sm_{architecture}")
    text = (NOTEBOOKS / "smollm2.cu").read_text("utf-8")
    program = nvrtc.createProgram(text, "smollm2.cu", (), ())
    nvrtc.compileProgram(program, ("--std=c++17", "-ftz=true", f"-arch=sm_{architecture}"))
    ptx = nvrtc.getPTX(program).decode()
    nvrtc.destroyProgram(program)
    assert all(f".entry {name}(" in ptx for name in smollm2.Operations._fields)
    assert ".local" not in ptx  # the sums of a product are in registers
    assert "ld.global.v4.f32" in ptx or "ld.global.nc.v4.f32" in ptx
