# SPDX-License-Identifier: Apache-2.0
"""The nvidia backend on a GPU against the cpu backend, whole caches, byte for byte."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import cases, invalid_slots, same, simple_case

import pagedcache as pc
from pagedcache import infiniop
from pagedcache.operators.paged_caching.nvidia import LARGE, SCALES, STEPS, instance
from pagedcache.status import Status

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def cupy():
    import cupy

    return cupy


def on_cpu(case):
    """Return the buffers after the cpu backend wrote the case."""
    done = case.copy()
    pc.paged_caching(*done.arrays(), layout=case.layout)
    return done.buffers


@settings(max_examples=10_000, deadline=None)
@given(cases(), st.booleans())
def test_writes_what_the_cpu_backend_writes(cupy, case, as_if_large):
    there = case.on(cupy.asarray)
    with pc.Descriptor.create(*there.arrays(), layout=case.layout) as descriptor:
        if as_if_large:
            for kernel in descriptor._implementation._kernels.values():
                kernel._steps.clear()
        descriptor.calculate(*there.arrays())
        assert descriptor._report.take() == invalid_slots(case)
    same(there, on_cpu(case))


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("slots", ["int64", "int32"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("heads", "k_size", "v_size", "block_size"),
    [(8, 128, 128, 16), (1, 576, 512, 64), (40, 80, 96, 1), (3, 33, 17, 5), (2, 1, 1, 672)],
)
def test_shapes(cupy, layout, slots, dtype, heads, k_size, v_size, block_size):
    case = simple_case(
        700, heads, k_size, v_size, 2000 // block_size + 1, block_size, dtype, slots, layout
    )
    there = case.on(cupy.asarray)
    pc.paged_caching(*there.arrays(), layout=layout)
    same(there, on_cpu(case))


@pytest.mark.parametrize("tokens", [0, 1, 65_535, 65_536, 70_000, 300_000])
def test_any_number_of_tokens(cupy, tokens):
    small = simple_case(5, 2, 64, 64, 20_000, 16).on(cupy.asarray)
    case = simple_case(tokens, 2, 64, 64, 20_000, 16)
    there = case.on(cupy.asarray)
    with pc.Descriptor.create(*small.arrays()) as descriptor:
        descriptor.calculate(*there.arrays())
    same(there, on_cpu(case))


def test_misaligned_addresses_take_a_narrower_access(cupy):
    case = simple_case(100, 4, 64, 64, 10, 16)
    aligned = case.on(cupy.asarray)
    for shift in (2, 4, 8):
        there = case.on(cupy.asarray)
        raw = cupy.zeros(there.views["k"].nbytes + 16, np.uint8)
        moved = raw[shift : shift + there.views["k"].nbytes].view(there.views["k"].dtype)
        moved = moved.reshape(there.views["k"].shape)
        moved[...] = there.views["k"]
        with pc.Descriptor.create(*aligned.arrays()) as descriptor:
            arrays = there.arrays()
            arrays[2] = moved
            descriptor.calculate(*arrays)
        same(there, on_cpu(case))


def test_caches_past_4_gib(cupy):
    blocks = 2**32 // (16 * 8 * 128 * 2) + 3
    k_cache = cupy.full((blocks, 8, 16, 128), 1, np.float16)
    v_cache = cupy.full((blocks, 8, 16, 128), 2, np.float16)
    k = (cupy.arange(5 * 8 * 128) % 2039).reshape(5, 8, 128).astype(np.float16)
    last = blocks * 16 - 1
    slots = cupy.asarray([last, 0, last - 16, -1, last + 1])
    pc.paged_caching(k_cache, v_cache, k, k + 1, slots)
    for cache, rows, filled in ((k_cache, k, 1), (v_cache, k + 1, 2)):
        assert bool((cache[-1, :, 15] == rows[0]).all())
        assert bool((cache[0, :, 0] == rows[1]).all())
        assert bool((cache[-2, :, 15] == rows[2]).all())
        assert int((cache != filled).any(axis=(1, 3)).sum()) == 3


def test_on_the_stream_that_is_given(cupy):
    case = simple_case(500, 8, 128, 128, 40, 16)
    wanted = on_cpu(case)
    blocker = cupy.ones((4000, 4000), np.float32)
    for how in ("current", "given", "int", "protocol", "per-thread"):
        there = case.on(cupy.asarray)
        late = there.views["k"].copy()
        there.views["k"][...] = 0
        with pc.Descriptor.create(*there.arrays()) as descriptor:
            cupy.cuda.Device().synchronize()
            stream = cupy.cuda.Stream(non_blocking=True)
            if how == "per-thread":
                stream = cupy.cuda.Stream.ptds
            given = {
                "current": None,
                "given": stream,
                "int": int(stream.ptr),
                "protocol": type("S", (), {"__cuda_stream__": lambda _, s=stream: (0, s.ptr)})(),
                "per-thread": stream,
            }[how]
            with stream:
                for _ in range(20):
                    blocker = blocker * 1.0000001
                there.views["k"][...] = late
                if how == "current":
                    descriptor.calculate(*there.arrays())
            if how != "current":
                descriptor.calculate(*there.arrays(), stream=given)
            stream.synchronize()
        same(there, wanted)


def test_capture_and_replay(cupy):
    case = simple_case(100, 8, 128, 128, 40, 16)
    there = case.on(cupy.asarray)
    stream = cupy.cuda.Stream(non_blocking=True)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        with stream:
            stream.begin_capture()
            descriptor.calculate(*there.arrays())
            graph = stream.end_capture()
        cupy.cuda.Device().synchronize()
        for seed in range(20):
            slots = np.random.default_rng(seed).permutation(40 * 16)[:100]
            case.views["slot_mapping"][...] = slots
            there.views["slot_mapping"].set(slots)
            pc.paged_caching(*case.arrays())
            cupy.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
        same(there, case.buffers)


def test_allocates_nothing_on_the_device(cupy):
    there = simple_case(100, 8, 128, 128, 40, 16).on(cupy.asarray)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        descriptor.calculate(*there.arrays())
        pool = cupy.get_default_memory_pool()
        before = pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()
        for _ in range(1000):
            descriptor.calculate(*there.arrays())
        assert (pool.used_bytes(), pool.total_bytes(), cupy.cuda.runtime.memGetInfo()) == before


def test_threads_that_never_used_cuda(cupy):
    several = [simple_case(300, blocks=100, seed=seed) for seed in range(8)]
    theres = [case.on(cupy.asarray) for case in several]
    descriptor = pc.Descriptor.create(*theres[0].arrays())
    stream = cupy.cuda.Stream(non_blocking=True)
    addresses = [there.addresses() for there in theres]
    slots = [there.views["slot_mapping"] for there in theres]
    cupy.cuda.Device().synchronize()

    def write(index):
        for _ in range(50):
            descriptor.calculate(*addresses[index][:4], slots[index], stream=int(stream.ptr))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    stream.synchronize()
    for case, there in zip(several, theres, strict=True):
        same(there, on_cpu(case))


LATE = r"""
extern "C" __global__ void late(unsigned short *k, unsigned short *v, long long *slots, int tokens,
                                int row, int capacity, int round) {
#if __CUDA_ARCH__ >= 900
  // The next kernel may start now, long before what it reads is written.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const long long start = clock64();
  while (clock64() - start < 200000) {
  }
  const int first = threadIdx.x + blockIdx.x * blockDim.x, step = blockDim.x * gridDim.x;
  for (int i = first; i < tokens * row; i += step) {
    k[i] = i * 7 + round;
    v[i] = i * 5 + round * 3;
  }
  for (int i = first; i < tokens; i += step)
    slots[i] = ((i + round) * 17LL) % capacity;  // 17 and the capacity have no common factor
}
"""


@pytest.mark.parametrize("programmatic", [True, False])
def test_a_late_producer(cupy, monkeypatch, programmatic):
    device = pc.Handle("cuda:0").opened()
    pc.warmup()
    if programmatic and not device.programmatic:
        pytest.skip("this GPU or driver has no programmatic dependent launch")
    monkeypatch.setattr(device, "programmatic", programmatic)
    late = cupy.RawKernel(LATE, "late")
    tokens, heads, size, blocks, block_size = 50, 8, 128, 40, 16
    shape = (blocks, heads, block_size, size)
    k_cache, v_cache = cupy.zeros(shape, np.uint16), cupy.zeros(shape, np.uint16)
    k, v = (cupy.zeros((tokens, heads, size), np.uint16) for _ in "kv")
    slots = cupy.zeros(tokens, np.int64)
    halves = [array.view(np.float16) for array in (k_cache, v_cache, k, v)]
    second = cupy.zeros(shape, np.float16)
    wrong = cupy.zeros((), np.int64)
    index = cupy.arange(tokens * heads * size).reshape(tokens, heads, size)
    with pc.Descriptor.create(*halves, slots) as descriptor:
        for turn in range(3000):
            late((4,), (256,), (k, v, slots, np.int32(tokens), np.int32(heads * size),
                                np.int32(blocks * block_size), np.int32(turn)))  # fmt: skip
            descriptor.calculate(*halves, slots)
            # Right behind it, one that reads the same: late for it is the kernel before the last.
            descriptor.calculate(second, *halves[1:], slots)
            where = (cupy.arange(tokens) + turn) * 17 % (blocks * block_size)
            block, offset = where // block_size, where % block_size
            wrong += (second.view(np.uint16)[block, :, offset] != k_cache[block, :, offset]).sum()
            wrong += (k_cache[block, :, offset] != (index * 7 + turn).astype(np.uint16)).sum()
            wrong += (v_cache[block, :, offset] != (index * 5 + turn * 3).astype(np.uint16)).sum()
    assert int(wrong) == 0


def test_libraries_in_turn(cupy):
    case = simple_case()
    there = case.on(cupy.asarray)
    wanted = on_cpu(case)
    for _ in range(3):
        pc.paged_caching(*there.arrays())
        pc.paged_caching(*case.arrays())
    same(case, wanted)
    same(there, wanted)


def test_kernels_outlive_cupys_memory_of_them(cupy):
    case = simple_case()
    there = case.on(cupy.asarray)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        descriptor.calculate(*there.arrays())
        cupy.clear_memo()
        import gc

        gc.collect()
        descriptor.calculate(*there.arrays())
    same(there, on_cpu(case))


def test_infiniop_on_device_addresses(cupy):
    case = simple_case(dtype="bfloat16", slots="int64")
    there = case.on(cupy.asarray)
    ok, handle = infiniop.infiniopCreateHandle(infiniop.InfiniDevice.NVIDIA, 0)
    assert ok == Status.SUCCESS
    described = []
    for view in case.arrays():
        kind = infiniop.InfiniDtype.I64 if view.ndim == 1 else infiniop.InfiniDtype.BF16
        _, tensor = infiniop.infiniopCreateTensorDescriptor(view.ndim, view.shape, None, kind)
        described.append(tensor)
    ok, descriptor = infiniop.infiniopCreatePagedCachingDescriptor(handle, *described)
    assert ok == Status.SUCCESS
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    ok = infiniop.infiniopPagedCaching(descriptor, 0, 0, *there.addresses(), stream.ptr)
    assert ok == Status.SUCCESS
    stream.synchronize()
    same(there, on_cpu(case))
    assert infiniop.infiniopCreateHandle(infiniop.InfiniDevice.NVIDIA, 64) == (
        Status.DEVICE_NOT_FOUND, None,
    )  # fmt: skip


def test_strategy_follows_the_device(cupy):
    handle = pc.Handle("cuda:0")
    assert handle.device == "cuda:0"
    there = simple_case().on(cupy.asarray)
    with pc.Descriptor.create(*there.arrays(), handle=handle) as descriptor:
        limits = handle.opened().limits
        scale = SCALES[limits.thread_class]
        for threads_on_each, threads, _ in STEPS:
            tokens = int(threads_on_each * scale) * limits.multiprocessors // 3  # 3 threads for one
            config = descriptor.launch_config(tokens)
            assert config.block == (threads * scale, 1, 1)
            assert config.grid == (-(-tokens * 3 // (threads * scale)), 1, 1)
            assert config.shared_mem == 0
        config = descriptor.launch_config(tokens + 1)  # K and V have threads of their own
        assert config.block == (LARGE[0] * scale, 1, 1)
        assert config.grid == (-(-(tokens + 1) * 3 // (LARGE[0] * scale)), 2, 1)


def test_bad_input(cupy):
    case = simple_case()
    there = case.on(cupy.asarray)
    arrays = there.arrays()
    with pytest.raises(ValueError, match="k must be on cuda:0 like v_cache, got cpu"):
        pc.paged_caching(*arrays[:2], case.views["k"], *arrays[3:])
    with pytest.raises(ValueError, match="handle must be for the device of the arrays"):
        pc.Descriptor.create(*arrays, handle=pc.Handle("cpu"))
    count = cupy.cuda.runtime.getDeviceCount()
    with pytest.raises(RuntimeError, match="must be one of the") as caught:
        pc.Handle(f"cuda:{count}")
    assert caught.value.status == Status.DEVICE_NOT_FOUND
    with pc.Descriptor.create(*arrays) as descriptor:
        with pytest.raises(ValueError, match=r"k must have device cuda:0, as when .* got cpu"):
            descriptor.calculate(*arrays[:2], case.views["k"], *arrays[3:])
        with pytest.raises(TypeError, match="stream must be None"):
            descriptor.calculate(*arrays, stream="main")
    same(there, case.buffers)
    pc.paged_caching(*arrays)
    same(there, on_cpu(case))


def test_a_refused_launch_is_raised(cupy):
    there = simple_case().on(cupy.asarray)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        # More than any device runs in a block.
        grid = descriptor._implementation._widest.grid(9)
        prepare = grid.prepare

        def broken(report):
            launch = prepare(report)
            launch._config.block_x = 1 << 20
            return launch

        grid.prepare = broken
        with pytest.raises(RuntimeError, match=r"launch on cuda:0 failed: .*INVALID_VALUE") as got:
            descriptor.calculate(*there.arrays())
        assert got.value.status == Status.INTERNAL_ERROR
        addresses = there.addresses()
        assert infiniop.infiniopPagedCaching(descriptor, 0, 0, *addresses, 0) == (
            Status.INTERNAL_ERROR
        )


def test_a_kernel_that_does_not_compile_says_why(cupy):
    device = pc.Handle("cuda:0").opened()
    with pytest.raises(RuntimeError, match="a vector must hold whole elements"):
        device.compile("paged_caching.cuh", (instance("float32", "int32", 2, ahead=True),))


def test_second_device_while_the_first_is_current(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU here")
    case = simple_case(300, 8, 128, 128, 40, 16)
    with cupy.cuda.Device(1):
        there = case.on(cupy.asarray)
        cupy.cuda.Device(1).synchronize()
    assert cupy.cuda.runtime.getDevice() == 0
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        assert descriptor.device == "cuda:1"
        descriptor.calculate(*there.arrays())
        stream_of_0 = cupy.cuda.Stream(non_blocking=True)
        with pytest.raises(ValueError, match="stream must be a stream on cuda:1"):
            descriptor.calculate(*there.arrays(), stream=stream_of_0)
        here = case.on(cupy.asarray)
        with pytest.raises(ValueError, match="v_cache must be on cuda:1 like k_cache, got cuda"):
            pc.paged_caching(there.views["k_cache"], *here.arrays()[1:])
        descriptor.check()
        with cupy.cuda.Device(1):
            there.views["slot_mapping"][5] = 640
            cupy.cuda.Device(1).synchronize()
        descriptor.calculate(*there.arrays())
        with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[5\]"):
            descriptor.check()
    assert cupy.cuda.runtime.getDevice() == 0
    with cupy.cuda.Device(1):
        cupy.cuda.Device(1).synchronize()
        case.views["slot_mapping"][5] = -1
        for name in ("k_cache", "v_cache"):
            assert np.array_equal(there.buffers[name].get(), on_cpu(case)[name])


def test_invalid_slots_are_told_and_stop_nothing(cupy):
    for slots in ("int32", "int64"):
        case = simple_case(500, 8, 128, 128, 40, 16, slots=slots)
        capacity, most = 640, np.iinfo(slots).max
        case.views["slot_mapping"][[7, 100, 499]] = [capacity + 3, most, capacity]
        there, wanted = case.on(cupy.asarray), on_cpu(case)
        told = (7, capacity + 3, 3, capacity)
        with pc.Descriptor.create(*there.arrays(), on_invalid="raise") as descriptor:
            for _ in range(3):
                with pytest.raises(pc.InvalidSlotError) as caught:
                    descriptor.calculate(*there.arrays())
                error = caught.value
                assert (error.token, error.slot, error.count, error.capacity) == told
        same(there, wanted)
        with pc.Descriptor.create(*there.arrays()) as descriptor:
            descriptor.check()
            for _ in range(5):
                descriptor.calculate(*there.arrays())
            with pytest.raises(pc.InvalidSlotError) as caught:
                descriptor.check()
            error = caught.value
            assert (error.token, error.slot, error.count) == (7, capacity + 3, 15)
            descriptor.check()
            assert int(cupy.arange(10).sum()) == 45  # the context lives


def test_a_mapping_that_is_wrong_throughout(cupy):
    case = simple_case(300_000, 1, 8, 8, 10, 16)
    case.views["slot_mapping"][...] = 160 + np.arange(300_000)[::-1]
    there = case.on(cupy.asarray)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        descriptor.calculate(*there.arrays())
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
    assert (caught.value.token, caught.value.slot, caught.value.count) == (0, 300_159, 300_000)
    same(there, case.buffers)


def test_a_report_survives_a_thousand_replays(cupy):
    case = simple_case(100, 8, 128, 128, 40, 16)
    there = case.on(cupy.asarray)
    stream = cupy.cuda.Stream(non_blocking=True)
    rng = np.random.default_rng(3)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        with stream:
            stream.begin_capture()
            descriptor.calculate(*there.arrays())
            graph = stream.end_capture()
        cupy.cuda.Device().synchronize()
        bad = 0
        for turn in range(1000):
            slots = rng.permutation(640)[:100]
            if turn % 10 == 0:
                slots[turn % 100] = 640 + turn
                bad += 1
            case.views["slot_mapping"][...] = slots
            with stream:
                there.views["slot_mapping"].set(slots)
                graph.launch(stream)
            stream.synchronize()
            pc.paged_caching(*case.arrays())
        same(there, case.buffers)
        with pytest.raises(pc.InvalidSlotError) as caught:
            descriptor.check()
        assert (caught.value.count, caught.value.token, caught.value.slot) == (bad, 0, 640)
        descriptor.check()


@pytest.mark.parametrize("option", [{"on_invalid": "raise"}, {"debug": True}])
def test_what_waits_is_refused_in_a_capture(cupy, option):
    there = simple_case().on(cupy.asarray)
    stream = cupy.cuda.Stream(non_blocking=True)
    descriptor = pc.Descriptor.create(*there.arrays(), **option)
    with stream:
        stream.begin_capture()
        with pytest.raises(NotImplementedError, match="waits for the stream, which is being captu"):
            descriptor.calculate(*there.arrays())
        stream.end_capture()
    stream.synchronize()


def test_debug_on_the_gpu(cupy):
    case = simple_case(50, 8, 128, 128, 40, 16)
    for name in ("k", "v"):
        case.views[name][...] = 1
    case.views["slot_mapping"][...] = np.arange(50)
    there = case.on(cupy.asarray)
    arrays = there.arrays()
    with pc.Descriptor.create(*arrays, debug=True) as descriptor:
        descriptor.calculate(*arrays)
        same(there, on_cpu(case))
        arrays[3][7, 3, 9] = np.inf
        with pytest.raises(pc.NonFiniteError, match=r"v\[7, 3, 9\] must be finite, got inf"):
            descriptor.calculate(*arrays)
        arrays[4][9] = 3
        with pytest.raises(pc.DuplicateSlotError, match="tokens 3 and 9"):
            descriptor.calculate(*arrays)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("on_invalid", ["skip", "raise"])
def test_threads_on_streams_of_their_own(cupy, shared, on_invalid):
    several = [simple_case(300, 8, 128, 128, 40, 16, seed=seed) for seed in range(8)]
    for seed, case in enumerate(several):
        case.views["slot_mapping"][seed] = 640 + seed
    theres = [case.on(cupy.asarray) for case in several]
    descriptors = [pc.Descriptor.create(*there.arrays(), on_invalid=on_invalid) for there in theres]
    cupy.cuda.Device().synchronize()

    def write(seed):
        descriptor = descriptors[0 if shared else seed]
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(200):
                if on_invalid == "skip":
                    descriptor.calculate(*theres[seed].arrays())
                    continue
                with pytest.raises(pc.InvalidSlotError) as caught:
                    descriptor.calculate(*theres[seed].arrays())
                assert (caught.value.token, caught.value.slot) == (seed, 640 + seed)
                assert caught.value.count == 1
            stream.synchronize()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    for case, there in zip(several, theres, strict=True):
        same(there, on_cpu(case))
    if on_invalid == "skip":
        for descriptor in descriptors[: 1 if shared else 8]:
            with pytest.raises(pc.InvalidSlotError) as caught:
                descriptor.check()
            assert caught.value.count == (1600 if shared else 200)


def test_first_descriptors_at_once(cupy):
    from pagedcache.backend.nvidia.device import CudaDevice

    device = CudaDevice(0)  # of its own, so nothing is compiled yet
    case = simple_case(200, 8, 128, 128, 40, 16)
    created = pc.Descriptor.create(*case.arrays())
    theres = [case.on(cupy.asarray) for _ in range(8)]
    cupy.cuda.Device().synchronize()

    def write(there):
        descriptor = pc.Descriptor(created.info, created._arguments.expected, device)
        descriptor.calculate(*there.arrays())
        cupy.cuda.get_current_stream().synchronize()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, theres))
    assert len(device._compiled) == 1
    for there in theres:
        same(there, on_cpu(case))


def test_a_hundred_thousand_calls_leave_nothing(cupy):
    import resource

    there = simple_case(8, 8, 128, 128, 40, 16).on(cupy.asarray)
    arrays = there.arrays()

    def call(times):
        for _ in range(times):
            descriptor.calculate(*arrays)
            pc.paged_caching(*arrays)
        cupy.cuda.Device().synchronize()
        memory = cupy.cuda.runtime.memGetInfo()
        return memory, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with pc.Descriptor.create(*arrays) as descriptor:
        before = call(5_000)
        after = call(50_000)
    assert after[0] == before[0]
    assert after[1] - before[1] < 2048  # KiB, of pages that Python touches for the first time


def test_descriptors_come_and_go(cupy):
    there = simple_case(8, 8, 128, 128, 40, 16).on(cupy.asarray)
    there.views["slot_mapping"][0] = 640
    arrays = there.arrays()
    addresses = set()
    for _ in range(3000):
        with pc.Descriptor.create(*arrays) as descriptor:
            descriptor.check()
            descriptor.calculate(*arrays)
            addresses.add(descriptor._report.address)
    assert len(addresses) == 3000
    free = cupy.cuda.runtime.memGetInfo()[0]
    for size in range(1, 3000):  # of which 256 are kept, and none has a report of its own
        cache = cupy.zeros((2, 1, 1, 1, size), np.float16)
        pc.paged_caching(*cache, cache[0, 0], cache[0, 0], cupy.zeros(1, np.int64))
    assert cupy.cuda.runtime.memGetInfo()[0] >= free - (32 << 20)  # of CuPy's pool
    descriptor = pc.Descriptor.create(*arrays)
    assert descriptor._report.address not in addresses


@pytest.mark.parametrize(
    ("tool", "says"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors"),
        ("racecheck", "RACECHECK SUMMARY: 0 hazards"),
        ("initcheck", "ERROR SUMMARY: 0 errors"),
    ],
)
def test_under_compute_sanitizer(tool, says):
    done = sanitized(tool, SANITIZED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert says in done.stdout


@pytest.mark.parametrize(
    ("tool", "mistake", "says"),
    [
        ("memcheck", "del k", "Invalid __global__ read"),
        ("initcheck", "", "Uninitialized __global__ memory read"),
    ],
)
def test_compute_sanitizer_would_notice(tool, mistake, says):
    done = sanitized(tool, MISTAKEN.format(mistake=mistake))
    assert done.returncode == 9, done.stdout + done.stderr
    assert says in done.stdout


def sanitized(tool, program):
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(sanitizer).exists():
        pytest.skip("compute-sanitizer is not installed")
    return subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        capture_output=True, text=True, check=False, timeout=300,
        cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


# Reads K by an address, which is trusted, where nothing was ever written, or nothing is any more.
MISTAKEN = """
import cupy, pagedcache as pc
cupy.cuda.set_allocator(None)
a = [cupy.zeros((5, 4, 1, 128), 'f2') for _ in 'kv']
k, v, s = cupy.empty((5, 4, 128), 'f2'), cupy.ones((5, 4, 128), 'f2'), cupy.arange(5)
d = pc.Descriptor.create(*a, v, v, s)
address = k.data.ptr
{mistake}
d.calculate(*a, address, v, s)
cupy.cuda.Device().synchronize()
"""


# Each array in an allocation of its own, so that a write behind it is one that the tool sees.
SANITIZED = """
import cupy, numpy as np, pagedcache as pc
from layouts import same, simple_case
cupy.cuda.set_allocator(None)
for index, (dtype, slots, layout, k_size) in enumerate(
    (d, s, l, k) for d in ("float16", "bfloat16", "float32") for s in ("int32", "int64")
    for l in ("HND", "NHD") for k in (128, 100, 33)
):
    case = simple_case(70, 3, k_size, k_size + 4, 10, 8, dtype, slots, layout, index)
    case.views["slot_mapping"][1] = 80 + index
    there = case.on(cupy.asarray)
    pc.paged_caching(*case.arrays(), layout=layout)
    with pc.Descriptor.create(*there.arrays(), layout=layout) as descriptor:
        descriptor.calculate(*there.arrays())
        try:
            descriptor.check()
        except pc.InvalidSlotError as error:
            assert (error.token, error.slot, error.count) == (1, 80 + index, 1)
        else:
            raise SystemExit(7)
    same(there, case.buffers)
"""


def alone(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_after_a_fork():
    out = alone(
        "import os, sys, cupy, pagedcache as pc\n"
        "a = [cupy.zeros((2, 4, 1, 2, 8), 'f2')[i] for i in (0, 1)]\n"
        "k, s = cupy.zeros((3, 1, 8), 'f2'), cupy.arange(3)\n"
        "d = pc.Descriptor.create(*a, k, k, s)\n"
        "d.calculate(*a, k, k, s)\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "for call in (lambda: d.calculate(*a, k, k, s, stream=0), lambda: pc.Handle('cuda')):\n"
        "    try: call()\n"
        "    except pc.PagedCacheError as error: print(error)\n"
        "sys.stdout.flush(); os._exit(0)\n"
    )
    assert out.count("in a process that was forked after CUDA was initialized") == 2, out


def test_after_a_fork_of_a_process_in_which_pytorch_alone_used_cuda():
    pytest.importorskip("torch")
    out = alone(
        "import os, sys, torch\n"
        "torch.zeros(3, device='cuda')\n"
        "import pagedcache as pc\n"
        "if child := os.fork():\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "try: pc.Handle('cuda')\n"
        "except pc.PagedCacheError as error: print(error.status.name, error)\n"
        "sys.stdout.flush(); os._exit(0)\n"
    )
    assert "DEVICE_NOT_INITIALIZED" in out, out
    assert "in a process that was forked after CUDA was initialized" in out, out


def test_an_error_that_another_kernel_left():
    out = alone(
        "import cupy, pagedcache as pc\n"
        "a = [cupy.zeros((2, 4, 1, 2, 8), 'f2')[i] for i in (0, 1)]\n"
        "k, s = cupy.zeros((3, 1, 8), 'f2'), cupy.arange(3)\n"
        "d = pc.Descriptor.create(*a, k, k, s)\n"
        "wild = cupy.RawKernel('extern \"C\" __global__ void wild() { *(int*)8 = 1; }', 'wild')\n"
        "wild((1,), (1,), ())\n"
        "try: cupy.cuda.Device().synchronize()\n"
        "except Exception: pass\n"
        "for call in (lambda: d.calculate(*a, k, k, s), d.check):\n"
        "    try: call()\n"
        "    except pc.PagedCacheError as error: print(error)\n"
        "import os; os._exit(0)\n"
    )
    assert out.count("because work that was queued before it failed") == 2, out


def test_processes_that_compile_at_once(tmp_path):
    program = (
        "import cupy, numpy as np, pagedcache as pc\n"
        "a = [cupy.zeros((2, 4, 1, 2, 8), 'f2')[i] for i in (0, 1)]\n"
        "k, s = cupy.ones((3, 1, 8), 'f2'), cupy.arange(3)\n"
        "pc.paged_caching(*a, k, k, s)\n"
        "print(int(a[0].sum()))\n"
    )
    with ThreadPoolExecutor(4) as pool:
        outs = list(pool.map(lambda _: alone(program, CUPY_CACHE_DIR=str(tmp_path)), range(4)))
    assert outs == ["24\n"] * 4


# Arrays of other libraries


def from_library(library, cupy):
    """Return a function from a CuPy array to an array of a library over the same memory."""
    if library == "torch":
        torch = pytest.importorskip("torch")

        def to_torch(array):
            bits = torch.from_dlpack(array.view(f"i{array.dtype.itemsize}"))
            return bits.view(getattr(torch, array.dtype.name))

        return to_torch
    if library == "numba":
        cuda = pytest.importorskip("numba.cuda")
        return lambda array: cuda.as_cuda_array(array)
    if library == "DLPack":
        return lambda array: type(
            "Exporter",
            (),
            {
                "__dlpack__": lambda _, **options: array.__dlpack__(**options),
                "__dlpack_device__": lambda _: array.__dlpack_device__(),
            },
        )()
    assert library == "cuda array interface"
    return lambda array: type(
        "Exporter", (), {"__cuda_array_interface__": array.__cuda_array_interface__}
    )()


LIBRARIES = ["torch", "numba", "DLPack", "cuda array interface"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_arrays_of_other_libraries(cupy, library, dtype):
    if library == "numba" and dtype == "bfloat16":
        pytest.skip("Numba has no bfloat16")
    foreign = from_library(library, cupy)
    case = simple_case(300, 8, 128, 128, 40, 16, dtype)
    there = case.on(cupy.asarray)
    cupy.cuda.Device().synchronize()
    arrays = [foreign(array) for array in there.arrays()]
    with pc.Descriptor.create(*arrays) as descriptor:
        for _ in range(3):
            descriptor.calculate(*arrays)
    cupy.cuda.Device().synchronize()
    same(there, on_cpu(case))
    cleared = there.arrays()
    cleared[0][...] = cleared[1][...] = 0
    for name in ("k_cache", "v_cache"):
        case.views[name][...] = 0
    cupy.cuda.Device().synchronize()
    for _ in range(2):
        pc.paged_caching(*arrays)
    cupy.cuda.Device().synchronize()
    same(there, on_cpu(case))


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_functions_of_other_projects(cupy, library):
    from pagedcache.compat.flashinfer import append_paged_kv_cache
    from pagedcache.compat.sglang import store_cache
    from pagedcache.compat.vllm import reshape_and_cache_flash

    there, back = cupy.asarray, cupy.asnumpy
    if library == "torch":
        torch = pytest.importorskip("torch")
        there, back = (
            lambda array: torch.from_numpy(array).cuda(),
            lambda array: array.cpu().numpy(),
        )
    rng = np.random.default_rng(0)
    k, v = (rng.standard_normal((6, 2, 8)).astype(np.float32) for _ in "kv")
    slots = np.array([3, 19, -1, 0, 7, 20])
    batch, positions = np.array([0, 2, 1, 2, -1, 0]), np.array([4, 11, 0, 5, -1, 3])
    tables = np.array([5, 2, 7, 1, 0, 6]), np.array([0, 2, 3, 6]), np.array([1, 4, 4])
    paged, flat = np.zeros((9, 2, 4, 2, 8), np.float32), np.zeros((20, 2, 8), np.float32)
    for function, arguments in (
        (reshape_and_cache_flash, [k, v, paged[:5, 0].copy(), paged[:5, 1].copy(), slots]),
        (store_cache, [k, v, flat, flat.copy(), slots]),
        (append_paged_kv_cache, [k, v, batch, positions, paged, *tables]),
    ):
        given = [there(array) for array in arguments]
        function(*given)
        function(*arguments)  # against what it does on the CPU
        for one, other in zip(given, arguments, strict=True):
            assert np.array_equal(back(one), other)
        assert any(array.any() for array in arguments[2:])


def test_jax_arrays_as_sources(cupy):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    cupy.cuda.Device(0).use()  # of several GPUs, JAX leaves another one current
    for dtype in ("float16", "bfloat16", "float32"):
        case = simple_case(300, 8, 128, 128, 40, 16, dtype, "int32")
        there = case.on(cupy.asarray)
        cupy.cuda.Device().synchronize()
        # Computed by JAX, in a way that changes no NaN.
        halves = [jax.numpy.array(view) for view in case.arrays()[2:]]
        sources = [jax.numpy.concatenate([half[:100], half[100:]]) for half in halves]
        pc.paged_caching(*there.arrays()[:2], *sources)
        same(there, on_cpu(case))
        with pytest.raises(ValueError, match="k_cache must be writable"):
            pc.paged_caching(jax.numpy.array(case.views["k_cache"]), *there.arrays()[1:])


def test_jax_arrays_that_are_still_computed(cupy):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")

    @jax.jit
    def late(array, x):
        for _ in range(40):
            x = x @ x * 1e-4
        return jax.numpy.where(x[0, 0] == 12345, 0, array)

    case = simple_case(500, 8, 128, 128, 40, 16, "float16", "int32")
    there = case.on(cupy.asarray)
    cupy.cuda.Device().synchronize()
    x = jax.numpy.ones((6000, 6000))
    arrays = [jax.numpy.array(view) for view in case.arrays()[2:]]
    for array in arrays:
        late(array, x).block_until_ready()  # compiles
    pc.paged_caching(*there.arrays()[:2], *(late(array, x) for array in arrays))
    same(there, on_cpu(case))


def test_numba_arrays_on_a_stream_with_a_late_producer(cupy):
    cuda = pytest.importorskip("numba.cuda")
    stream = cuda.stream()
    case = simple_case(500, 8, 128, 128, 40, 16)
    there = case.on(cupy.asarray)
    late = there.views["k"].copy()
    there.views["k"][...] = 0
    cupy.cuda.Device().synchronize()
    # What Numba makes on a stream names it in its interface.
    k_cache = cuda.as_cuda_array(there.views["k_cache"], sync=False)
    k_cache.stream = stream
    assert k_cache.__cuda_array_interface__["stream"] == int(stream)
    outside = cupy.cuda.ExternalStream(int(stream))
    blocker = cupy.ones((4000, 4000), np.float32)
    cupy.cuda.Device().synchronize()
    with outside:
        for _ in range(20):
            blocker = blocker * 1.0000001
        there.views["k"][...] = late
    pc.paged_caching(k_cache, *there.arrays()[1:])
    stream.synchronize()
    same(there, on_cpu(case))


def test_torch_streams_with_a_late_producer(cupy):
    torch = pytest.importorskip("torch")
    case = simple_case(500, 8, 128, 128, 40, 16, "float16")
    wanted = on_cpu(case)
    blocker = torch.ones((6000, 6000), device="cuda")
    for how in ("current", "given", "protocol", "int"):
        there = case.on(cupy.asarray)
        tensors = [torch.from_dlpack(array) for array in there.arrays()]
        late = tensors[2].clone()
        tensors[2].zero_()
        with pc.Descriptor.create(*tensors) as descriptor:
            torch.cuda.synchronize()
            stream = torch.cuda.Stream()
            given = {
                "current": None,
                "given": stream,
                "protocol": type(
                    "S", (), {"__cuda_stream__": lambda _, s=stream: (0, s.cuda_stream)}
                )(),
                "int": stream.cuda_stream,
            }[how]
            with torch.cuda.stream(stream):
                for _ in range(20):
                    blocker.mul_(1.0000001)
                tensors[2].copy_(late)
                if how == "current":
                    descriptor.calculate(*tensors)
            if how != "current":
                descriptor.calculate(*tensors, stream=given)
            stream.synchronize()
        same(there, wanted)


def test_the_stream_that_an_interface_names(cupy):
    case = simple_case(500, 8, 128, 128, 40, 16)
    there = case.on(cupy.asarray)
    late = there.views["k"].copy()
    there.views["k"][...] = 0
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    named = type(
        "Exporter",
        (),
        {
            "__cuda_array_interface__": {
                **there.views["k_cache"].__cuda_array_interface__, "stream": stream.ptr,
            }
        },
    )()  # fmt: skip
    blocker = cupy.ones((4000, 4000), np.float32)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(20):
            blocker = blocker * 1.0000001
        there.views["k"][...] = late
    pc.paged_caching(named, *there.arrays()[1:])
    stream.synchronize()
    same(there, on_cpu(case))


def test_capture_by_torch(cupy):
    torch = pytest.importorskip("torch")
    case = simple_case(100, 8, 128, 128, 40, 16, "float16")
    there = case.on(cupy.asarray)
    tensors = [torch.from_dlpack(array) for array in there.arrays()]
    pc.paged_caching(*tensors)
    pc.paged_caching(*case.arrays())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pc.paged_caching(*tensors)
    for seed in range(20):
        slots = np.random.default_rng(seed).permutation(640)[:100]
        case.views["slot_mapping"][...] = slots
        tensors[4].copy_(torch.from_numpy(slots))
        pc.paged_caching(*case.arrays())
        graph.replay()
    torch.cuda.synchronize()
    pc.paged_caching(*case.arrays())
    same(there, case.buffers)


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_compiling_in_a_capture_is_refused_and_warming_up_helps(library):
    pytest.importorskip(library)
    out = alone(CAPTURED.format(library=library))
    assert out.splitlines() == ["refused True", "written True"]


CAPTURED = """
import cupy, numpy as np, pagedcache as pc
library = {library!r}
a = [cupy.zeros((4, 1, 2, 8), 'f2') for _ in 'kv']
k, s = cupy.ones((3, 1, 8), 'f2'), cupy.arange(3)
if library == 'torch':
    import torch
    a, k, s = [torch.from_dlpack(x) for x in a], torch.from_dlpack(k), torch.from_dlpack(s)
pc.Handle('cuda')
cupy.cuda.Device().synchronize()
def capture():
    if library == 'torch':
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pc.paged_caching(*a, k, k, s)
        return graph.replay
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        try:
            pc.paged_caching(*a, k, k, s)
        finally:
            graph = stream.end_capture()
    return lambda: graph.launch(stream)
try:
    capture()
except NotImplementedError as error:
    print('refused', 'pagedcache.warmup()' in str(error))
cupy.cuda.Device().synchronize()
pc.warmup()
capture()()
cupy.cuda.Device().synchronize()
print('written', float(a[0].sum()) == 24)
"""


def test_torch_compile_on_the_gpu(cupy):
    torch = pytest.importorskip("torch")
    import pagedcache.torch

    case = simple_case(100, 8, 128, 128, 40, 16, "float16")
    for name in ("k", "v", "k_cache", "v_cache"):
        case.views[name][...] = 1
    there = case.on(cupy.asarray)
    tensors = [torch.from_dlpack(array) for array in there.arrays()]

    @torch.compile(fullgraph=True)
    def step(k_cache, v_cache, k, v, slots):
        pagedcache.torch.paged_caching(k_cache, v_cache, k + 1, v + 2, slots)

    step(*tensors)
    torch.cuda.synchronize()
    case.views["k"][...] += 1
    case.views["v"][...] += 2
    wanted = on_cpu(case)
    for name in ("k_cache", "v_cache"):
        assert np.array_equal(there.buffers[name].get(), wanted[name])
    passed = torch.library.opcheck(pagedcache.torch.paged_caching, tuple(tensors))
    assert set(passed.values()) == {"SUCCESS"}


def test_warmup_on_the_gpu(cupy):
    done = pc.warmup("cuda:0")
    assert len(done) == 6
    device = pc.Handle("cuda:0").opened()
    before = len(device._compiled)
    for dtype in ("float16", "bfloat16", "float32"):
        for slots in ("int32", "int64"):
            for size in (1, 3, 8, 100):
                there = simple_case(dtype=dtype, slots=slots, k_size=size).on(cupy.asarray)
                pc.paged_caching(*there.arrays())
    assert len(device._compiled) == before


def test_check_is_refused_in_a_capture(cupy):
    there = simple_case().on(cupy.asarray)
    stream = cupy.cuda.Stream(non_blocking=True)
    descriptor = pc.Descriptor.create(*there.arrays())
    descriptor.calculate(*there.arrays())
    with stream:
        stream.begin_capture()
        descriptor.calculate(*there.arrays())
        with pytest.raises(NotImplementedError, match="waiting for a stream of cuda:0 is not poss"):
            descriptor.check()
        graph = stream.end_capture()
        graph.launch(stream)
    descriptor.check()


@pytest.mark.parametrize("library", ["cupy", "torch"])
@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_other_threads_go_on_while_a_stream_is_captured(cupy, library, mode):
    """... and the capture goes on while they create, write, wait and check."""
    case = simple_case(100, 8, 128, 128, 40, 16)
    case.views["slot_mapping"][7] = 700
    wanted = on_cpu(case)
    captured, others = case.on(cupy.asarray), case.on(cupy.asarray)
    mine, theirs = captured.arrays(), others.arrays()
    if library == "torch":
        torch = pytest.importorskip("torch")
        to_torch = from_library("torch", cupy)
        mine, theirs = [[to_torch(array) for array in each] for each in (mine, theirs)]
    inside = pc.Descriptor.create(*mine)
    inside.calculate(*mine)
    with pytest.raises(pc.InvalidSlotError):
        inside.check()
    for name in ("k_cache", "v_cache"):
        captured.buffers[name][...] = cupy.asarray(case.buffers[name])
    cupy.cuda.Device().synchronize()
    gc.collect()  # a graph of an earlier test that is destroyed in a capture would end it

    def elsewhere():
        with cupy.cuda.Stream(non_blocking=True) as stream:
            for _ in range(3):
                for on_invalid in ("skip", "raise"):
                    # Also allocates, where this is the first of a thousand.
                    descriptor = pc.Descriptor.create(*theirs, on_invalid=on_invalid)
                    with pytest.raises(pc.InvalidSlotError) as caught:  # noqa: PT012 - either
                        descriptor.calculate(*theirs, stream=stream)
                        descriptor.check()
                    assert caught.value.count == 1
                descriptor = pc.Descriptor.create(*theirs)
                descriptor._device._reports._free.clear()
                descriptor = pc.Descriptor.create(*theirs)
                descriptor.calculate(*theirs, stream=stream)
                with pytest.raises(pc.InvalidSlotError):
                    descriptor.check()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(cupy.cuda.Device(0).use).result()
        if library == "torch":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode=mode):
                inside.calculate(*mine)
                pool.submit(elsewhere).result()
                inside.calculate(*mine)
            replay, wait = graph.replay, torch.cuda.synchronize
        else:
            modes = {"global": 0, "thread_local": 1, "relaxed": 2}
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture(modes[mode])
                try:
                    inside.calculate(*mine)
                    pool.submit(elsewhere).result()
                    inside.calculate(*mine)
                finally:
                    graph = stream.end_capture()
            replay, wait = (lambda: graph.launch(stream)), stream.synchronize
    replay()
    wait()
    with pytest.raises(pc.InvalidSlotError) as caught:
        inside.check()
    assert (caught.value.count, caught.value.slot) == (2, 700)
    same(captured, wanted)
    same(others, wanted)


def test_check_waits_for_its_own_streams_only(cupy):
    case = simple_case(100, 8, 128, 128, 40, 16)
    there = case.on(cupy.asarray)
    blocker = cupy.ones((6000, 6000), np.float32)
    busy = cupy.cuda.Stream(non_blocking=True)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        descriptor.calculate(*there.arrays())
        cupy.cuda.Device().synchronize()
        descriptor.check()
        with busy:
            for _ in range(300):
                blocker *= np.float32(1.0000001)
        descriptor.calculate(*there.arrays(), stream=cupy.cuda.Stream(non_blocking=True))
        descriptor.check()
        assert not busy.done
        # ... and for all of them, also for one that nobody else holds any more.
        late = there.views["slot_mapping"].copy()
        late[9] = 640
        cupy.cuda.Device().synchronize()
        with cupy.cuda.Stream(non_blocking=True):
            for _ in range(300):
                blocker *= np.float32(1.0000001)
            there.views["slot_mapping"][...] = late
            descriptor.calculate(*there.arrays())
        with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[9\] = 640"):
            descriptor.check()


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_a_number_of_tokens_that_changes_at_each_call(cupy, library):
    case = simple_case(64, 8, 128, 128, 40, 16)
    there = case.on(cupy.asarray)
    convert = from_library("torch", cupy) if library == "torch" else lambda array: array
    arrays = [convert(array) for array in there.arrays()]
    with pc.Descriptor.create(*arrays) as descriptor:
        for tokens in [*range(1, 65), 1, 64, 3]:
            slots = np.random.default_rng(tokens).permutation(640)[:tokens]
            case.views["slot_mapping"][:tokens] = slots
            there.views["slot_mapping"][:tokens] = cupy.asarray(slots)
            cupy.cuda.Device().synchronize()
            for write in (descriptor.calculate, pc.paged_caching):
                write(*arrays[:4], arrays[4][:tokens])
            pc.paged_caching(*case.arrays()[:4], case.views["slot_mapping"][:tokens])
            cupy.cuda.Device().synchronize()
    same(there, case.buffers)


@pytest.mark.parametrize("library", ["cupy", "torch"])
def test_bound_writes(cupy, library):
    case = simple_case(100, 8, 128, 128, 40, 16)
    there = case.on(cupy.asarray)
    convert = from_library("torch", cupy) if library == "torch" else lambda array: array
    arrays = [convert(array) for array in there.arrays()]
    descriptor = pc.Descriptor.create(*arrays)
    write = descriptor.bind(*arrays)
    stream = cupy.cuda.Stream(non_blocking=True)
    on_a_stream = descriptor.bind(*arrays, stream=stream)
    with stream:
        stream.begin_capture()
        write() if library == "cupy" else on_a_stream()
        graph = stream.end_capture()
    for turn in range(30):
        slots = np.random.default_rng(turn).permutation(641)[:100]
        case.views["slot_mapping"][...] = slots
        there.views["slot_mapping"].set(slots)
        pc.paged_caching(*case.arrays())
        cupy.cuda.Device().synchronize()
        (write, on_a_stream, lambda: graph.launch(stream))[turn % 3]()
        cupy.cuda.Device().synchronize()
    same(there, case.buffers)
    with pytest.raises(pc.InvalidSlotError):
        descriptor.check()

    def often(_):
        for _ in range(200):
            write()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(often, range(8)))
    cupy.cuda.Device().synchronize()
    same(there, case.buffers)
    descriptor.destroy()
    with pytest.raises(RuntimeError, match="has been destroyed"):
        write()


def test_autograd_on_the_gpu(cupy):
    torch = pytest.importorskip("torch")
    case = simple_case(50, 8, 128, 128, 40, 16, "float32")
    for name in ("k", "v", "k_cache", "v_cache"):
        case.views[name][...] = 1
    there = case.on(cupy.asarray)
    arrays = [torch.from_dlpack(array) for array in there.arrays()]
    descriptor = pc.Descriptor.create(*arrays)
    for write in (
        descriptor.calculate, descriptor.calculate, pc.paged_caching, pc.paged_caching,
        lambda *arrays: descriptor.bind(*arrays)(),
    ):  # fmt: skip
        x = torch.ones_like(arrays[0], requires_grad=True)
        product = (x * arrays[0]).sum()
        write(*arrays)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        leaf = [arrays[0].clone().requires_grad_(), *arrays[1:]]
        with pytest.raises(pc.RequiresGradError, match="k_cache must not require grad"):
            write(*leaf)
        with torch.no_grad():
            for _ in range(2):
                write(*leaf)
        with pytest.raises(pc.RequiresGradError, match="k_cache must not require grad"):
            write(*leaf)
