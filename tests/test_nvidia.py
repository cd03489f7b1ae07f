"""The nvidia backend on a GPU against the cpu backend, whole caches, byte for byte."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from layouts import cases, same, simple_case

import pagedcache as pc
from pagedcache import infiniop
from pagedcache.backend.nvidia.paged_caching import THREADS
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


@settings(max_examples=1000, deadline=None)
@given(cases())
def test_writes_what_the_cpu_backend_writes(cupy, case):
    there = case.on(cupy.asarray)
    pc.paged_caching(*there.arrays(), layout=case.layout)
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


@pytest.mark.parametrize("tokens", [0, 1, 65_535, 65_536, 300_000])
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
        config = descriptor.launch_config(65_536)
        assert config.shared_mem == 0
        small, large = THREADS[handle.opened().limits.thread_class]
        assert config.block == (large, 1, 1)
        assert descriptor.launch_config(1).block == (small, 1, 1)
        assert config.grid[0] * large == 65_536 * 3 * 8 * 2 // 16


def test_bad_input(cupy):
    case = simple_case()
    there = case.on(cupy.asarray)
    arrays = there.arrays()
    with pytest.raises(ValueError, match="k must be on cuda:0 as v_cache is, got cpu"):
        pc.paged_caching(*arrays[:2], case.views["k"], *arrays[3:])
    with pytest.raises(ValueError, match="handle must be the device of the arrays"):
        pc.Descriptor.create(*arrays, handle=pc.Handle("cpu"))
    count = cupy.cuda.runtime.getDeviceCount()
    with pytest.raises(RuntimeError, match="must be one of the") as caught:
        pc.Handle(f"cuda:{count}")
    assert caught.value.status == Status.DEVICE_NOT_FOUND
    with pc.Descriptor.create(*arrays) as descriptor:
        with pytest.raises(ValueError, match="k must have device cuda:0 as at create, got cpu"):
            descriptor.calculate(*arrays[:2], case.views["k"], *arrays[3:])
        with pytest.raises(TypeError, match="stream must be None"):
            descriptor.calculate(*arrays, stream="main")
    same(there, case.buffers)
    pc.paged_caching(*arrays)
    same(there, on_cpu(case))


def test_a_refused_launch_is_raised(cupy):
    there = simple_case().on(cupy.asarray)
    with pc.Descriptor.create(*there.arrays()) as descriptor:
        opaque = descriptor._opaque
        opaque._threads = (1 << 20, 1 << 20)  # more than any device runs in a block
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
        device.compile("paged_caching.cuh", ("pagedcache::pagedCaching<pagedcache::F32, int, 2>",))


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
        with pytest.raises(ValueError, match="stream must be a stream of cuda:1"):
            descriptor.calculate(*there.arrays(), stream=stream_of_0)
        here = case.on(cupy.asarray)
        with pytest.raises(ValueError, match="v_cache must be on cuda:1 as k_cache is, got cuda"):
            pc.paged_caching(there.views["k_cache"], *here.arrays()[1:])
    assert cupy.cuda.runtime.getDevice() == 0
    with cupy.cuda.Device(1):
        cupy.cuda.Device(1).synchronize()
        same(there, on_cpu(case))
