# SPDX-License-Identifier: Apache-2.0
"""Kernels whose threads meet or report, on the host as in AMD's waves of 32 and of 64 lanes."""

from __future__ import annotations

import shutil

import numpy as np
import program_cases
import pytest
import test_blocks
import test_formats
import test_programs_on_host
import test_slot_mapping
from format_cases import format_cases as drawn
from host_device import Compiler, HostDevice, descriptor_on
from hypothesis import given, settings
from layouts import same
from test_invalid_slots import BAD, CAPACITY, case_with

import pagedcache as pc
from pagedcache.arrays.find import adopt
from pagedcache.backend.nvidia import source
from pagedcache.backend.protocol import Invalid
from pagedcache.operators.blocks.pairs import OnDevice

# Cases with one combination of dtypes, since each is a kernel of its own.
SLOT_SEEDS = [
    seed
    for seed in range(300)
    if np.random.default_rng(seed).integers(0, 2, 4).tolist() == [0, 0, 1, 1]
]


@pytest.fixture(scope="module", params=[32, 64])
def wave(request):
    return request.param


@pytest.fixture(scope="module")
def waves(compiler, tmp_path_factory, wave):
    """Return a compiler for waves."""
    return Compiler(tmp_path_factory.mktemp("waves"), wave)


@pytest.fixture(scope="module")
def wide(compiler, tmp_path_factory):
    """Return a compiler for the wider waves, for what takes long and halves may break."""
    return Compiler(tmp_path_factory.mktemp("wide"), 64)


def check_slots(compiler):
    """Compare slot mappings with the definition, and what they report."""
    reported = 0
    for seed in SLOT_SEEDS:
        case = test_slot_mapping.Case(seed)
        descriptor = pc.SlotMappingDescriptor.create(*case.inputs, case.out())
        reported += test_slot_mapping.check(test_slot_mapping.on_host(compiler, descriptor), case)
    assert reported > 2


def check_blocks(compiler):
    """Compare copies with the definition. Lanes look for pairs, and warps have other arrays."""
    for seed in range(40):
        case = test_blocks.Case(seed)
        wanted = case.expect()
        kernel, report = test_blocks.on_host(compiler, case)
        kernel.copy(OnDevice(adopt("pairs", np.ascontiguousarray(case.pairs, np.int32))), 0)
        assert case.bytes() == wanted, seed
        assert report.take() is None


def test_slot_mappings(waves):
    check_slots(waves)


def test_block_copies(waves):
    check_blocks(waves)


def test_scales_that_threads_agree_on(wide):
    device = HostDevice(wide, multiprocessors=0)

    @settings(max_examples=15, deadline=None)
    @given(drawn(max_tokens=20, like=test_formats.KERNELS[1]))
    def check(case):
        by_cpu = case.copy()
        for descriptor, mine in (
            (test_formats.on_cpu("write", by_cpu), by_cpu),
            (test_formats.on_host("write", case, device), case),
        ):
            descriptor.calculate(**mine.arguments("write"))
        same(case, by_cpu.buffers)

    check()


@pytest.mark.parametrize("number", [3, 5])
def test_steps(wide, number):
    case = program_cases.random_case(number)
    for seed in range(8):
        test_programs_on_host.check(wide, case, seed)


@pytest.mark.parametrize("first", [1, 40, 63])
def test_reports(waves, first):
    """Also where only lanes from 32 on have something to report."""
    slots = [-1] * first + [CAPACITY + 3, -1, CAPACITY] + [-1] * 61 + BAD
    with descriptor_on(HostDevice(waves), case_with(slots, heads=1)) as descriptor:
        descriptor.calculate(*case_with(slots, heads=1).arrays())
        assert descriptor._report.take() == Invalid(5, first, CAPACITY + 3)


LOWEST = "  volatile long long* const lowest = &to->row;\n"
# This package once reported in this way.
BY_ONE = """\
  const unsigned long long active = __ballot(1);
  if (static_cast<int>(threadIdx.x % 32) != __builtin_ffsll(active) - 1) return;
  atomicAdd(&to->count, __builtin_popcountll(active) - 1ULL);
"""
HALF = " >> (__lane_id() & 32)"
# Each is an edit of a file, and whether it is right where waves have 32 lanes.
FAULTS = {
    "the first active lane reports for all": ("common.cuh", LOWEST, BY_ONE + LOWEST, True),
    "each group takes the lower half": ("hip.cuh", HALF, "", True),
    "each group takes the upper half": ("hip.cuh", HALF, " >> 32", False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(compiler, tmp_path, fault, wave):
    file, text, instead, right_on_32 = FAULTS[fault]
    sources = tmp_path / "cuda_src"
    shutil.copytree(source.folder(), sources)
    whole = (sources / file).read_text()
    assert whole.count(text) == 1
    (sources / file).write_text(whole.replace(text, instead))
    planted = Compiler(tmp_path, wave, sources)
    if wave == 32 and right_on_32:
        check_slots(planted)
    else:
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            check_slots(planted)
