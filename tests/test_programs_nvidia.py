# SPDX-License-Identifier: Apache-2.0
"""Writes and reads with steps on a GPU against the cpu backend, whole buffers, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import program_cases
import pytest
from program_cases import owner
from test_nvidia import sanitized

import pagedcache as pc
from pagedcache.expressions.tree import FUNCTIONS

pytestmark = pytest.mark.gpu

# Each kernel has to be compiled; together 10,000 cases.
WRITES, READS, CALLS = 75, 25, 100
F32 = np.float32
Q_HEADS, HEADS, SIZE = 32, 8, 128


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


class OnGpu:
    """Arrays on a GPU, views of the same memory where those on the host are."""

    def __init__(self, torch, arrays):
        self._torch, self._owners = torch, {}
        self.arrays = {name: self._moved(array) for name, array in arrays.items()}

    def _moved(self, array):
        if not isinstance(array, np.ndarray):
            return array
        torch, whole = self._torch, owner(array)
        if id(whole) not in self._owners:
            flat = np.ascontiguousarray(whole).reshape(-1).view(np.uint8)
            self._owners[id(whole)] = torch.from_numpy(flat.copy()).cuda(), whole
        there, _ = self._owners[id(whole)]
        kind = getattr(torch, str(array.dtype))
        if not array.size:
            return torch.empty(array.shape, dtype=kind, device="cuda")
        start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
        size = array.dtype.itemsize
        flat = there[start : len(there) - (len(there) - start) % size].view(kind)
        return torch.as_strided(flat, array.shape, [step // size for step in array.strides])

    def memory(self):
        """Return the bytes of all arrays, by what owns them on the host."""
        return {id(whole): there.cpu().numpy().tobytes() for there, whole in self._owners.values()}


def run(case, arrays):
    """Call the kernel of a case."""
    names = ("k_cache", "v_cache", "k", "v", "slot_mapping")
    if case.reads:
        names = ("k_cache", "v_cache", "slot_mapping", "k_out", "v_out")
    named = {name: value for name, value in arrays.items() if name not in names}
    case.kernel(*(arrays[name] for name in names), **named)


def told(kernel):
    """Return how many rows a kernel reports, and the first token."""
    try:
        kernel.check()
    except (pc.InvalidSlotError, pc.InvalidIndexError) as error:
        return error.count, error.token
    return None


def check(torch, case, seed):
    (tokens, wanted), (_, given) = case.arrays(seed), case.arrays(seed)
    run(case, wanted)
    expected = told(case.kernel)
    there = OnGpu(torch, given)
    run(case, there.arrays)
    assert told(case.kernel) == (expected if tokens else None), (case, seed)
    found = there.memory()
    for name, array in given.items():
        if isinstance(array, np.ndarray):
            assert found[id(owner(array))] == owner(wanted[name]).tobytes(), (name, case, seed)


def as_if_large(monkeypatch):
    from pagedcache.operators.programs import nvidia

    for name in ("STEPS", "ROTATING_STEPS", "MEETING_STEPS"):
        monkeypatch.setattr(nvidia, name, getattr(nvidia, name)[-1:])


@pytest.mark.parametrize("part", range(5))
def test_writes_what_the_cpu_writes(torch, monkeypatch, part):
    for number in range(part, WRITES, 5):
        for large in (False, True):
            if large:
                as_if_large(monkeypatch)
            case = program_cases.random_case(number)
            for seed in range(large, CALLS, 2):
                check(torch, case, seed)
            monkeypatch.undo()


@pytest.mark.parametrize("part", range(2))
def test_reads_what_the_cpu_reads(torch, monkeypatch, part):
    for number in range(part, READS, 2):
        for large in (False, True):
            if large:
                as_if_large(monkeypatch)
            case = program_cases.random_case(1_000 + number, reads=True)
            for seed in range(large, CALLS, 2):
                check(torch, case, seed)
            monkeypatch.undo()


def fused(torch, tokens, *, num_slots=4096, dtype="bfloat16"):
    """Return a kernel as models use, and the arguments of a call."""
    kind, make = getattr(torch, dtype), torch.Generator(device="cuda").manual_seed(tokens)
    on_gpu = {"device": "cuda", "generator": make}
    steps = {
        letter: [pc.rms_norm(f"{letter}_weight", 1e-6), pc.rope("cos_sin", "positions")]
        for letter in "qk"
    }
    q, k, v = (
        torch.randn(tokens, heads, SIZE, dtype=kind, **on_gpu) for heads in (Q_HEADS, HEADS, HEADS)
    )
    caches = [
        torch.zeros(num_slots // 16, 16, HEADS, SIZE, dtype=kind, device="cuda") for _ in "kv"
    ]
    slots = torch.randperm(num_slots, **on_gpu)[:tokens]
    named = {
        "q": q, "q_out": torch.zeros_like(q),
        "q_weight": torch.randn(SIZE, dtype=kind, **on_gpu),
        "k_weight": torch.randn(SIZE, dtype=kind, **on_gpu),
        "cos_sin": torch.randn(512, SIZE, **on_gpu),
        "positions": torch.randint(512, (tokens,), **on_gpu),
    }  # fmt: skip
    return pc.WriteKernel(**steps), (*caches, k, v, slots), named


def in_numpy(torch, tensor):
    """Return a copy on the host."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.cpu().numpy().copy()


@pytest.mark.parametrize("tokens", [1, 5, 64, 700, 3000])
def test_of_all_sizes(torch, tokens):
    kernel, arguments, named = fused(torch, tokens)
    host = [in_numpy(torch, each) for each in arguments]
    host_named = {name: in_numpy(torch, each) for name, each in named.items()}
    kernel(*arguments, **named)
    kernel(*host, **host_named)
    for found, wanted in zip((*arguments[:2], named["q_out"]),
                             (*host[:2], host_named["q_out"]), strict=True):  # fmt: skip
        assert in_numpy(torch, found).tobytes() == wanted.tobytes()


def test_a_call_can_be_captured(torch):
    kernel, arguments, named = fused(torch, 33)
    kernel.warmup(*arguments, **named)
    assert not arguments[0].any()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = torch.cuda.memory_allocated()
        kernel(*arguments, **named)
        assert torch.cuda.memory_allocated() == before
    assert not arguments[0].any()
    arguments[2].normal_()
    graph.replay()
    torch.cuda.synchronize()
    found = arguments[0].clone()
    arguments[0].zero_()
    kernel(*arguments, **named)
    assert torch.equal(arguments[0].view(torch.int16), found.view(torch.int16))
    assert found.any()


def test_kernels_follow_each_other(torch):
    """What one call writes, the next reads, also if it starts before the first is done."""
    store = pc.WriteKernel(k=["x * 1.5"], v=["x - 1"])
    load = pc.ReadKernel(k=["x + 1"], v=["x / 2"])
    _, (k_cache, v_cache, k, v, slots), _ = fused(torch, 40, dtype="float32")
    rows = [(k, v), (torch.zeros_like(k), torch.zeros_like(v))]
    host = [[each.cpu().numpy() for each in pair] for pair in rows]
    caches = [each.cpu().numpy() for each in (k_cache, v_cache)]
    there, here = (k_cache, v_cache, slots, rows), (*caches, slots.cpu().numpy(), host)
    for k_cache, v_cache, slots, pairs in (there, here):
        for turn in range(60):
            store(k_cache, v_cache, *pairs[turn % 2], slots)
            load(k_cache, v_cache, slots, *pairs[1 - turn % 2])
    for pair, wanted in zip(rows, host, strict=True):
        for found, each in zip(pair, wanted, strict=True):
            assert found.cpu().numpy().tobytes() == each.tobytes()


def test_an_address_that_is_less_aligned_later(torch):
    """Also of what is not read in vectors, and if the number of tokens has been seen."""
    kernel, arguments, named = fused(torch, 33)
    kernel(*arguments, **named)
    wanted, q_out = arguments[0].clone(), named["q_out"].clone()
    for name in ("q", "positions", "cos_sin", "k_weight"):
        value = named[name]
        memory = torch.zeros(value.numel() + 1, dtype=value.dtype, device="cuda")
        moved = memory[1:].view(value.shape).copy_(value)
        arguments[0].zero_()
        named["q_out"].zero_()
        kernel(*arguments, **{**named, name: moved})
        assert torch.equal(arguments[0].view(torch.int16), wanted.view(torch.int16))
        assert torch.equal(named["q_out"].view(torch.int16), q_out.view(torch.int16))


KEPT = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
import test_programs_nvidia as t
counts = []
for tokens, num_slots, heads in ((7, 4096, 8), (300, 8192, 8), (7, 4096, 4), (7, 4096, 8)):
    t.HEADS = heads
    kernel, arguments, named = t.fused(torch, tokens, num_slots=num_slots)
    kernel(*arguments, **named)
    counts.append(len(os.listdir(os.environ["CUPY_CACHE_DIR"])))
print(counts)
"""


def test_compiled_once_and_kept_on_disk(torch, tmp_path):
    """Other sizes compile nothing, nor does another process."""
    environment = {**os.environ, "CUPY_CACHE_DIR": str(tmp_path)}
    program = KEPT.format(tests=str(Path(__file__).parent))
    counts = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], env=environment, check=False,
                              capture_output=True, text=True, cwd=Path.cwd())  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        counts.append(done.stdout.strip())
    assert counts[0] == counts[1]
    first, *others = map(int, counts[0].strip("[]").split(","))
    assert first > 0
    assert set(others) == {first}


def test_numbers_and_arrays_of_cupy(cupy):
    kernel = pc.WriteKernel(k=["x * factor + bias[dim]"], v=["x * gain[head, dim]"])
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 5, HEADS, SIZE)).astype(F32)
    bias, gain = (
        rng.standard_normal(SIZE).astype(F32),
        rng.standard_normal((HEADS, SIZE)).astype(F32),
    )
    slots = np.array([3, 30, -1, 8, 0])
    for factor in (1.5, -2.0):
        caches = [np.zeros((2, 4, 16, HEADS, SIZE), F32) for _ in range(2)]
        there = cupy.asarray(caches[0])
        kernel(*there, *map(cupy.asarray, (k, v, slots)), factor=factor, bias=cupy.asarray(bias),
               gain=cupy.asarray(gain))  # fmt: skip
        kernel(*caches[1], k, v, slots, factor=factor, bias=bias, gain=gain)
        assert there.get().tobytes() == caches[1].tobytes()


def test_roots_of_many_numbers(cupy):
    """Each row has a root of its own, and float32 shows all of its bits."""
    kernel = pc.WriteKernel(k=[pc.rms_norm("weight", 1e-6)], v=[pc.rms_norm("weight", 0.0)])
    rng, tokens = np.random.default_rng(0), 40_000
    k, v = rng.standard_normal((2, tokens, HEADS, 8)).astype(F32)
    v *= np.exp2(rng.uniform(-50, 50, (tokens, HEADS, 1))).astype(F32)
    k_out, v_out = np.zeros_like(k), np.zeros_like(v)
    cache, weight = np.zeros((2, tokens // 16, 16, HEADS, 8), F32), np.ones(8, F32)
    slots = rng.permutation(tokens)
    there = {name: cupy.asarray(a) for name, a in (("k_out", k_out), ("v_out", v_out))}
    kernel(*cache, k, v, slots, k_out=k_out, v_out=v_out, weight=weight)
    kernel(*cupy.asarray(cache), *map(cupy.asarray, (k, v, slots)), **there,
           weight=cupy.asarray(weight))  # fmt: skip
    assert there["k_out"].get().tobytes() == k_out.tobytes()
    assert there["v_out"].get().tobytes() == v_out.tobytes()


def test_the_other_functions_are_near(cupy):
    """Within 2 units in the last place of what NumPy finds in float64, over their ranges."""
    rng = np.random.default_rng(0)
    count = 1 << 14
    ranges = {
        "exp": (-80, 80), "exp2": (-120, 120), "log": (1e-30, 1e30), "log2": (1e-30, 1e30),
        "sin": (-1e5, 1e5), "cos": (-1e5, 1e5), "tanh": (-10, 10),
    }  # fmt: skip
    assert set(ranges) == {name for name, each in FUNCTIONS.items() if not each.exact}
    worst = {}
    for name, (low, high) in {**ranges, "power": (1e-3, 1e3)}.items():
        text = f"{name}(x)" if name != "power" else "x ** 1.7"
        x = rng.uniform(low, high, (count // SIZE, 1, SIZE)).astype(F32)
        if name.startswith("log"):
            x = np.exp(rng.uniform(np.log(low), np.log(high), x.shape)).astype(F32)
        kernel = pc.WriteKernel(k=[text])
        found, wanted = np.zeros_like(x), np.zeros_like(x)
        slots = np.arange(len(x))
        cache = np.zeros((2, 1, len(x), 1, SIZE), F32)
        kernel(*cache, x, x, slots, k_out=wanted)
        there = cupy.asarray(found)
        kernel(*cupy.asarray(cache), *[cupy.asarray(x)] * 2, cupy.asarray(slots), k_out=there)
        found = there.get()
        distance = np.abs(found.view(np.int32).astype(np.int64) - wanted.view(np.int32))
        worst[name] = int(distance.max())
    print(worst)
    assert max(worst.values()) <= 2


SANITIZED = """
import os, sys
os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each array in an allocation of its own
sys.path.insert(0, {tests!r})
import torch
import program_cases
import test_programs_nvidia as t
from pagedcache.operators.programs import nvidia
for number in (0, 2, 5, 9, 12):
    for steps in (None, -1):
        if steps:
            for name in ("STEPS", "ROTATING_STEPS", "MEETING_STEPS"):
                setattr(nvidia, name, getattr(nvidia, name)[-1:])
        case = program_cases.random_case(number)
        for seed in range(4):
            t.check(torch, case, seed)
case = program_cases.random_case(1003, reads=True)
for seed in range(4):
    t.check(torch, case, seed)
print("done")
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_sanitizer(tool, torch):
    done = sanitized(tool, SANITIZED.format(tests=str(Path(__file__).parent)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "done" in done.stdout
