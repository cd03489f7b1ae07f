"""The real kernel source and the real nvidia backend, run on the CPU by a host compiler."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import cases, expected, same, simple_case

import pagedcache as pc
from pagedcache.backend.nvidia import paged_caching as nvidia
from pagedcache.backend.nvidia import source

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@dataclasses.dataclass
class FakeLimits:
    thread_class: int = 1024
    max_grid_x: int = 2**31 - 1
    multiprocessors: int = 4


class HostDevice:
    """Stands where a CudaDevice stands, and runs each launch on the calling thread."""

    name = "cpu"

    def __init__(self, library, **limits):
        self.shim = library
        self.limits = FakeLimits(**limits)
        self.launches = []

    def compile(self, file, expressions):
        assert file == "paged_caching.cuh"
        return [self.parse(expression) for expression in expressions]

    @staticmethod
    def parse(expression):
        match = re.fullmatch(
            r"pagedcache::pagedCaching<pagedcache::(B?F\d\d), (int|long long), (\d+)>", expression
        )
        dtype = ("F16", "BF16", "F32").index(match[1])
        return dtype, 4 if match[2] == "int" else 8, int(match[3])

    def stream(self, stream):
        return 0

    def prepare(self, function, threads, words):
        words = (ctypes.c_uint64 * len(words))(*words)
        assert ctypes.sizeof(words) == self.shim.parameters_size()

        def run(blocks, stream):
            self.launches.append((function, blocks, threads))
            assert self.shim.run(*function, blocks, threads, words) == 0

        return SimpleNamespace(words=words, run=run)

    def current_stream(self):
        return 0


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    built = tmp_path_factory.mktemp("host_kernel") / "kernel.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas"]  # unroll
    flags += os.environ.get("PAGEDCACHE_HOST_FLAGS", "").split()
    program = [shutil.which("g++"), *flags, "-I", source.folder(), HERE / "host_kernel.cpp"]
    subprocess.run([*program, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    library.run.argtypes = [ctypes.c_int] * 3 + [ctypes.c_uint] * 2 + [ctypes.c_void_p]
    library.parameters_size.restype = ctypes.c_size_t
    library.divide.restype = ctypes.c_uint32
    library.divide.argtypes = [ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64]
    return library


def descriptor_on(device, case):
    arrays = [tensor_descriptor(case, name) for name in
              ("k_cache", "v_cache", "k", "v", "slot_mapping")]  # fmt: skip
    info = pc.PagedCachingInfo.create(*arrays, layout=case.layout)
    return pc.Descriptor(info, "cpu", nvidia.PagedCaching(info, device))


def tensor_descriptor(case, name):
    dtype, _, shape, strides = case.recipe[name]
    return pc.TensorDescriptor(dtype, shape, strides)


@settings(max_examples=1000, deadline=None)
@given(cases(), st.sampled_from([512, 1024, 4096]), st.sampled_from([8, 20, 2**31 - 1]))
def test_kernel_writes_what_the_definition_says(library, case, thread_class, max_grid_x):
    device = HostDevice(library, thread_class=thread_class, max_grid_x=max_grid_x)
    wanted = expected(case)
    with descriptor_on(device, case) as descriptor:
        descriptor.calculate(*case.arrays())
    same(case, wanted)
    for _, blocks, _ in device.launches:
        assert 1 <= blocks <= max_grid_x


@settings(max_examples=5000, deadline=None)
@given(st.data())
def test_division_is_exact(library, data):
    value = data.draw(st.one_of(st.integers(1, 2**31), st.integers(1, 4096)))
    # The largest dividends, and those around a multiple, are where an inexact one would show.
    multiple = data.draw(st.integers(0, (2**31 - 1) // value)) * value
    near = data.draw(st.sampled_from([-1, 0, 1, value - 1]))
    dividend = min(max(multiple + near, 0), 2**31 - 1)
    words = nvidia._divisor(value)
    assert all(0 <= word < 2**64 for word in words)
    assert library.divide(dividend, *words) == dividend // value


def test_more_slots_than_the_kernel_counts_are_refused(library):
    tensor = pc.TensorDescriptor
    caches = [tensor("float16", (2**27 + 1, 1, 16, 1))] * 2
    rows = [tensor("float16", (3, 1, 1))] * 2
    info = pc.PagedCachingInfo.create(*caches, *rows, tensor("int64", (3,)))
    with pytest.raises(NotImplementedError, match="at most 2147483648 slots") as caught:
        nvidia.PagedCaching(info, HostDevice(library))
    assert caught.value.status == pc.Status.NOT_IMPLEMENTED


def test_host_and_kernel_agree_on_vectors_per_thread(library):
    for width, vectors in nvidia.PER_THREAD.items():
        assert library.per_thread(width) == vectors


@pytest.mark.parametrize(
    ("dtype", "k_size", "v_size", "shift", "width"),
    [
        ("bfloat16", 128, 128, 0, 16),
        ("bfloat16", 576, 512, 0, 16),
        ("bfloat16", 100, 100, 0, 8),
        ("bfloat16", 128, 4, 0, 8),
        ("bfloat16", 18, 18, 0, 4),
        ("bfloat16", 15, 16, 0, 2),
        ("float32", 3, 4, 0, 4),
        ("float32", 4, 4, 0, 16),
        ("bfloat16", 128, 128, 8, 8),
        ("bfloat16", 128, 128, 2, 2),
        ("float32", 64, 64, 4, 4),
    ],
)
def test_widest_access_that_alignment_allows(library, dtype, k_size, v_size, shift, width):
    case = simple_case(k_size=k_size, v_size=v_size, dtype=dtype)
    device = HostDevice(library)
    with descriptor_on(device, case) as descriptor:
        addresses = dict(zip(case.views, (2**20,) * 5, strict=True))
        addresses["k"] += shift
        device.shim = SimpleNamespace(run=lambda *_: 0, parameters_size=library.parameters_size)
        descriptor.calculate(*addresses.values())
    assert [function[2] for function, _, _ in device.launches] == [width]


def test_one_launch_without_idle_blocks(library):
    case = simple_case(tokens=1000, heads=8, k_size=128, v_size=128, blocks=70, block_size=16)
    device = HostDevice(library)
    with descriptor_on(device, case) as descriptor:
        config = descriptor.launch_config(1000)
        descriptor.calculate(*case.arrays())
    [(_, blocks, threads)] = device.launches
    assert (blocks, threads) == (config.grid[0], config.block[0])
    assert config.shared_mem == 0
    assert blocks * threads == 1000 * 8 * 128 * 2 // 16  # 16 bytes of K and of V a thread


def test_threads_share_a_descriptor(library):
    from concurrent.futures import ThreadPoolExecutor

    several = [simple_case(tokens=200, blocks=60, seed=seed) for seed in range(8)]
    wanted = [expected(case) for case in several]
    with descriptor_on(HostDevice(library), several[0]) as descriptor:

        def write(case):
            for _ in range(50):
                descriptor.calculate(*case.arrays())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, several))
    for case, buffers in zip(several, wanted, strict=True):
        same(case, buffers)


def sanitized(test):
    """Run a test of this file in a process of its own, the kernel built with sanitizers."""
    runtime = subprocess.run(
        [shutil.which("g++"), "-print-file-name=libasan.so"], capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    if not Path(runtime).is_absolute():
        pytest.skip("this g++ has no AddressSanitizer")
    flags = "-g -fsanitize=address,undefined -fno-sanitize-recover=all"
    # -s, since what pytest captured dies with the process.
    alone = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", f"{__file__}::{test}"]
    return subprocess.run(
        [sys.executable, *alone],
        env={
            **os.environ,
            "PAGEDCACHE_HOST_FLAGS": flags,
            "LD_PRELOAD": runtime,
            # Python itself leaks by design, and its small objects come from no heap of ours.
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
        },
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_kernel_under_sanitizers():
    done = sanitized("test_kernel_writes_what_the_definition_says")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_sanitizers_would_notice():
    done = sanitized("test_out_of_bounds_on_purpose")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout + done.stderr


def test_out_of_bounds_on_purpose(library):
    if "sanitize" not in os.environ.get("PAGEDCACHE_HOST_FLAGS", ""):
        pytest.skip("writes past the end of a cache; only the test above runs it")
    case = simple_case(tokens=3, heads=1, k_size=8, v_size=8, blocks=2, block_size=1)
    case.views["slot_mapping"][...] = 0
    info = pc.PagedCachingInfo.create(
        *(tensor_descriptor(case, name) for name in
          ("k_cache", "v_cache", "k", "v", "slot_mapping"))
    )  # fmt: skip
    larger = dataclasses.replace(info, num_blocks=10)
    case.views["slot_mapping"][...] = 6  # just behind the guard
    write = nvidia.PagedCaching(larger, HostDevice(library))
    write.calculate(*case.addresses(), 3, 0, None)
