# SPDX-License-Identifier: Apache-2.0
"""The real kernel source and the real nvidia backend, run on the CPU by a host compiler."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from host_device import HostDevice, HostReport, described_by, descriptor_on
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import cases, expected, invalid_slots, same, simple_case

import pagedcache as pc
from pagedcache.backend.nvidia import parameters, source
from pagedcache.backend.protocol import Invalid
from pagedcache.operators.paged_caching import nvidia
from pagedcache.operators.paged_caching.info import REQUIRED

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here")


@settings(max_examples=1000, deadline=None)
@given(
    cases(),
    st.sampled_from([512, 1024, 4096]),
    st.sampled_from([8, 20, 2**31 - 1]),
    st.sampled_from([0, 1, 4]),  # any write is a large one where there are none
)
def test_kernel_writes_what_the_definition_says(
    compiler, case, thread_class, max_grid_x, multiprocessors
):
    device = HostDevice(
        compiler,
        thread_class=thread_class,
        max_grid_x=max_grid_x,
        multiprocessors=multiprocessors,
    )
    wanted, invalid, by_cpu = expected(case), invalid_slots(case), case.copy()
    for descriptor, mine in (
        (descriptor_on(device, case), case),
        (pc.Descriptor.create(*by_cpu.arrays(), layout=case.layout), by_cpu),
    ):
        descriptor.calculate(*mine.arrays())
        same(mine, wanted)
        assert descriptor._report.take() == invalid
        assert descriptor._report.take() is None
    for _, (blocks, rows), _ in device.launches:
        assert 1 <= blocks <= max_grid_x
        assert rows in (1, 2)


DIVIDE = """
extern "C" unsigned int divide(unsigned int dividend, const pagedcache::Divisor* by) {
  return by->divide(dividend);
}
extern "C" int most_threads() { return pagedcache::kMostThreads; }
"""


@pytest.fixture(scope="session")
def library(compiler):
    return compiler.library(nvidia.FILE, (), DIVIDE)


@settings(max_examples=5000, deadline=None)
@given(st.data())
def test_division_is_exact(library, data):
    value = data.draw(st.one_of(st.integers(1, 2**31), st.integers(1, 4096)))
    # The largest dividends, and those around a multiple, are where an inexact one would show.
    multiple = data.draw(st.integers(0, (2**31 - 1) // value)) * value
    near = data.draw(st.sampled_from([-1, 0, 1, value - 1]))
    dividend = min(max(multiple + near, 0), 2**31 - 1)
    kind = parameters.structure(source.read("common.cuh"), "Divisor")
    by = parameters.divisor(kind, value)
    assert by.shift == 31 + (value - 1).bit_length()
    assert library.divide(dividend, ctypes.byref(by)) & 0xFFFFFFFF == dividend // value


def test_more_slots_than_the_kernel_counts_are_refused(compiler):
    tensor = pc.TensorDescriptor
    caches = [tensor("float16", (2**27 + 1, 1, 16, 1))] * 2
    rows = [tensor("float16", (3, 1, 1))] * 2
    info = pc.PagedCachingInfo.create(*caches, *rows, tensor("int64", (3,)))
    with pytest.raises(NotImplementedError, match="at most 2147483648 slots") as caught:
        nvidia.PagedCaching(info, HostDevice(compiler), HostReport(compiler))
    assert caught.value.status == pc.Status.NOT_IMPLEMENTED


def test_host_and_kernel_agree_on_threads(library):
    most = max(nvidia.LARGE[0], *(threads for _, threads, _ in nvidia.STEPS))
    assert most * max(nvidia.SCALES.values()) == library.most_threads()


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
def test_widest_access_that_alignment_allows(compiler, dtype, k_size, v_size, shift, width):
    case = simple_case(k_size=k_size, v_size=v_size, dtype=dtype)
    launched = []
    device = HostDevice(compiler, multiprocessors=132)
    device.prepare = lambda function, rows, threads, arguments: SimpleNamespace(
        pack=lambda *words: None, run=lambda blocks, stream: launched.append(function[0])
    )
    with descriptor_on(device, case) as descriptor:
        addresses = dict(zip(case.views, range(2**20, 6 * 2**20, 2**20), strict=True))
        addresses["k"] += shift
        descriptor.calculate(*addresses.values())
    assert launched == [nvidia.instance(dtype, "int64", width, width == 16)]  # a small write


def test_one_launch_without_idle_blocks(compiler):
    case = simple_case(tokens=1000, heads=8, k_size=128, v_size=128, blocks=70, block_size=16)
    device = HostDevice(compiler)
    with descriptor_on(device, case) as descriptor:
        config = descriptor.launch_config(1000)
        descriptor.calculate(*case.arrays())
    [(_, (blocks, rows), threads)] = device.launches
    assert (blocks, rows, threads) == (*config.grid[:2], config.block[0])
    assert rows == 2  # one for K, one for V
    assert config.shared_mem == 0
    assert blocks * threads == 1000 * 8 * 128 * 2 // 16  # 16 bytes a thread


@pytest.mark.parametrize(
    ("layout", "k_size", "v_size", "dtype", "tile"),
    [
        ("HND", 128, 128, "bfloat16", 1),
        ("HND", 128, 256, "float16", 1),
        ("HND", 64, 64, "float32", 1),
        ("HND", 64, 64, "bfloat16", 4),
        ("HND", 100, 100, "bfloat16", 4),
        ("HND", 128, 100, "bfloat16", 4),
        ("NHD", 128, 128, "bfloat16", 1),
        ("NHD", 100, 100, "bfloat16", 1),
    ],
)
@pytest.mark.parametrize("tokens", [1999, 2000, 2001])
def test_tiles(compiler, layout, k_size, v_size, dtype, tile, tokens):
    case = simple_case(tokens, 3, k_size, v_size, 160, 16, dtype, layout=layout)
    wanted = expected(case)
    device = HostDevice(compiler)
    with descriptor_on(device, case) as descriptor:
        assert nvidia.tile_of(descriptor.info) == tile
        descriptor.calculate(*case.arrays())
        [(expression, (blocks, _), threads)] = device.launches
    width = int(re.search(r", (\d+), \w+>$", expression)[1])
    vectors = max(k_size, v_size) * case.views["k"].itemsize // width * 3
    assert blocks == -(-(-(-tokens // tile) * tile * vectors) // threads)
    same(case, wanted)


def test_threads_share_a_descriptor(compiler):
    several = [simple_case(tokens=200, blocks=60, seed=seed) for seed in range(8)]
    wanted = [expected(case) for case in several]
    with descriptor_on(HostDevice(compiler), several[0]) as descriptor:

        def write(case):
            for _ in range(50):
                descriptor.calculate(*case.arrays())

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, several))
    for case, buffers in zip(several, wanted, strict=True):
        same(case, buffers)


def test_reports_are_taken_while_kernels_add(compiler):
    """Nothing is lost, whoever adds meanwhile, and the lowest row is told with its own value."""
    case = simple_case(tokens=64, heads=1, k_size=8, blocks=2, block_size=4)
    case.views["slot_mapping"][...] = 1000 + np.arange(64)[::-1]
    with descriptor_on(HostDevice(compiler), case) as descriptor:
        found, done = [], []

        def add(_):
            for _ in range(300):
                descriptor.calculate(*case.arrays())
            done.append(True)

        def take():
            while len(done) < 4:
                found.append(descriptor._report.take())

        with ThreadPoolExecutor(5) as pool:
            taker = pool.submit(take)
            list(pool.map(add, range(4)))
            taker.result()
        found.append(descriptor._report.take())
        assert descriptor._report.take() is None
    told = [each for each in found if each]
    assert sum(each.count for each in told) == 4 * 300 * 64
    assert all(each.value == 1063 - each.row for each in told)
    assert min(each.row for each in told) == 0


def test_a_row_that_is_not_counted_yet_stays(compiler):
    report = HostReport(compiler)
    report.words[0:4] = (0, 0, 7, 28)
    assert report.take() is None
    assert report.words[0:4] == [0, 0, 7, 28]
    report.words[0] = 2
    assert report.take() == Invalid(2, 7, 28)
    assert report.take() is None


def sanitized(*tests):
    """Run tests of this folder in a process of their own, the kernel built with sanitizers."""
    runtime = subprocess.run(
        [shutil.which("g++"), "-print-file-name=libasan.so"], capture_output=True, text=True,
        check=True,
    ).stdout.strip()  # fmt: skip
    if not Path(runtime).is_absolute():
        pytest.skip("this g++ has no AddressSanitizer")
    flags = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    # -s, since what pytest captured dies with the process.
    alone = ["-m", "pytest", "-q", "-s", "-p", "no:cacheprovider"]
    alone += [str(Path(__file__).with_name(test)) for test in tests]
    return subprocess.run(
        [sys.executable, *alone],
        env={
            **os.environ,
            "PAGEDCACHE_HOST_FLAGS": flags,
            "LD_PRELOAD": runtime,
            # Python itself leaks by design, and its small objects come from no heap of ours. Where
            # each was allocated takes long to record, and nobody reads it.
            "ASAN_OPTIONS": "detect_leaks=0:malloc_context_size=0",
            "PYTHONMALLOC": "malloc",
        },
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_kernel_under_sanitizers():
    done = sanitized("test_kernel_on_host.py::test_kernel_writes_what_the_definition_says")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_sanitizers_would_notice():
    done = sanitized("test_kernel_on_host.py::test_out_of_bounds_on_purpose")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stdout + done.stderr


def test_out_of_bounds_on_purpose(compiler):
    if "sanitize" not in os.environ.get("PAGEDCACHE_HOST_FLAGS", ""):
        pytest.skip("writes past the end of a cache; only the test above runs it")
    case = simple_case(tokens=3, heads=1, k_size=8, v_size=8, blocks=2, block_size=1)
    case.views["slot_mapping"][...] = 0
    info = pc.PagedCachingInfo.create(*described_by(case), layout=case.layout)
    larger = dataclasses.replace(info, num_blocks=10)
    case.views["slot_mapping"][...] = 6  # just behind the guard
    write = nvidia.PagedCaching(larger, HostDevice(compiler), HostReport(compiler))
    write.run(3, *case.addresses(), 0, 0, 0)


LAUNCH_ROW = """
template <typename Parameters>
void launch_row(void (*kernel)(Parameters), unsigned int blocks, unsigned int rows,
                unsigned int row, unsigned int threads, const void* parameters) {
  blockDim = {threads, 1};
  gridDim = {blocks, rows};
  blockIdx.y = row;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
      kernel(*static_cast<const Parameters*>(parameters));
}
"""


class OneRow(HostDevice):
    """A device that runs one row of the blocks of a grid, and forgets the other."""

    row = 0

    def compile(self, file, expressions):
        more = LAUNCH_ROW + "".join(
            f'extern "C" void row_{number}(unsigned int blocks, unsigned int rows, unsigned int '
            f"row, unsigned int threads, const void* parameters) {{\n"
            f"  launch_row({expression}, blocks, rows, row, threads, parameters);\n}}\n"
            for number, expression in enumerate(expressions)
        )
        library = self.compiler.library(file, expressions, more)

        def run(number, blocks, rows, threads, parameters):
            function = getattr(library, f"row_{number}")
            function(blocks, rows, self.row, threads, ctypes.c_void_p(parameters))

        return [(each, partial(run, number)) for number, each in enumerate(expressions)]


@pytest.mark.parametrize("row", [0, 1])
def test_one_row_of_blocks_copies_k_and_the_other_v(compiler, row):
    case = simple_case(tokens=40, heads=2, k_size=64, v_size=64, blocks=20)
    case.views["slot_mapping"][-2:] = 80, 81  # past the end
    name = ("k_cache", "v_cache")[row]
    wanted = {**case.copy().buffers, name: expected(case)[name]}
    device = OneRow(compiler, multiprocessors=0)
    device.row = row
    with descriptor_on(device, case) as descriptor:
        descriptor.calculate(*case.arrays())
        assert [rows for _, (_, rows), _ in device.launches] == [2]
        same(case, wanted)
        assert descriptor._report.take() == (None if row else Invalid(2, 38, 80))


def test_caches_past_4_gib(compiler, tmp_path):
    blocks = 2**31 // (16 * 64) + 8  # 8 GiB, of which a few pages are touched
    k_cache, v_cache = (
        np.memmap(tmp_path / name, np.float32, "w+", shape=(blocks, 1, 16, 64)) for name in "kv"
    )
    k = np.arange(1, 3 * 64 + 1, dtype=np.float32).reshape(3, 1, 64)
    arrays = (k_cache, v_cache, k, k + 1, np.array([0, blocks * 16 - 1, blocks * 16]))
    described = [pc.TensorDescriptor(array.dtype, array.shape) for array in arrays]
    info = pc.PagedCachingInfo.create(*described)
    named = dict(zip(REQUIRED, described, strict=True))
    with pc.Descriptor(info, info.rules.expected(named), HostDevice(compiler)) as descriptor:
        descriptor.calculate(*(array.ctypes.data for array in arrays))
    for cache, rows in ((k_cache, k), (v_cache, k + 1)):
        assert np.array_equal(cache[0, 0, 0], rows[0, 0])
        assert np.array_equal(cache[-1, 0, -1], rows[1, 0])
        assert not cache[0, 0, 1:].any()
        assert not cache[-1, 0, :-1].any()


@pytest.mark.parametrize("max_grid_x", [2**31 - 1, 2])
def test_bound_writes(compiler, max_grid_x):
    """Also those of several launches."""
    case = simple_case(tokens=100, blocks=40, k_size=8, v_size=16)
    device = HostDevice(compiler, max_grid_x=max_grid_x)
    with descriptor_on(device, case) as descriptor:
        write = descriptor.bind(*case.arrays())
        for turn in range(4):
            rng = np.random.default_rng(turn)
            for name in ("k", "v", "k_cache", "v_cache"):
                case.buffers[name][...] = rng.integers(0, 256, case.buffers[name].size)
            case.views["slot_mapping"][...] = rng.permutation(161)[:100]
            wanted, invalid = expected(case), invalid_slots(case)
            write()
            same(case, wanted)
            assert descriptor._report.take() == invalid
    assert (len(device.launches) > 4) is (max_grid_x == 2)


def widths_of(compiler, info, several):
    """Return the widths of the launches that writes at these addresses make."""
    launched = []
    device = HostDevice(compiler, multiprocessors=132)
    device.prepare = lambda function, rows, threads, arguments: SimpleNamespace(
        pack=lambda *words: None, run=lambda blocks, stream: launched.append(function[0])
    )
    write = nvidia.PagedCaching(info, device, HostReport(compiler))
    for addresses in several:
        write.run(9, *addresses, 0, 0, 0)
    return [int(re.search(r", (\d+), \w+>$", expression)[1]) for expression in launched]


ALIGNED = [at << 20 for at in range(1, 6)]


@pytest.mark.parametrize(
    "name",
    [
        *("k_token_stride", "k_head_stride", "v_token_stride", "v_head_stride"),
        *(f"{one}_cache_{axis}_stride" for one in "kv" for axis in ("block", "head", "slot")),
    ],
)
def test_widest_access_that_strides_allow(compiler, name):
    info = pc.PagedCachingInfo.create(*described_by(simple_case(heads=2, k_size=64, v_size=64)))
    found = [
        widths_of(
            compiler, dataclasses.replace(info, **{name: getattr(info, name) + more}), [ALIGNED]
        )
        for more in (8, 4, 2, 1)
    ]
    assert found == [[16], [8], [4], [2]]


@pytest.mark.parametrize("position", range(4))
def test_addresses_that_need_a_narrower_access_after_others(compiler, position):
    """A number of tokens that was seen does not decide the width."""
    info = pc.PagedCachingInfo.create(*described_by(simple_case(heads=2, k_size=64, v_size=64)))
    moved = {
        by: [at + by * (index == position) for index, at in enumerate(ALIGNED)] for by in (0, 2, 8)
    }
    for order in ((0, 2, 0, 8, 2), (2, 0, 8, 0)):
        widths = {0: 16, 2: 2, 8: 8}
        found = widths_of(compiler, info, [moved[by] for by in order])
        assert found == [widths[by] for by in order]


def test_misaligned_addresses_are_refused_after_others(compiler):
    info = pc.PagedCachingInfo.create(*described_by(simple_case(heads=2, k_size=64, v_size=64)))
    for position, name in enumerate(("k_cache", "v_cache", "k", "v", "slot_mapping")):
        odd = list(ALIGNED)
        odd[position] += 1
        with pytest.raises(ValueError, match=f"{name} must start at a multiple of its item size"):
            widths_of(compiler, info, [ALIGNED, odd])
