# SPDX-License-Identifier: Apache-2.0
"""Kernels with steps, compiled by NVRTC to machine code for every architecture."""

from __future__ import annotations

import pytest

pytest.importorskip("cupy")

import program_cases
from program_cases import operation_of
from test_kernel_compiles import ARCHITECTURES, compile_for, nvrtc

from pagedcache.backend.nvidia import source
from pagedcache.operators.programs import nvidia, text

WRITES, READS = (0, 5, 11), (1_000,)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("number", [*WRITES, *READS])
def test_random_kernels_compile(architecture, number):
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not make code for sm_{architecture}")
    case = program_cases.random_case(number, reads=number in READS)
    operation, _ = operation_of(case, case.arrays(number)[1])
    info = operation.info
    held = text.held_rows(info)
    access = text.Access.of(info, held, wide=True)
    steps = nvidia.steps_of(info)
    most = max(step.threads for step in steps)
    made = text.program_text(info, info.parameters, held, access, most)
    kinds = dict.fromkeys((step.heads, step.ahead) for step in steps)
    instances = [text.expression(info, heads, ahead=ahead) for heads, ahead in kinds]
    names, cubin, _, _ = compile_for(architecture, source.read(nvidia.FILE) + made, instances)
    assert cubin.startswith(b"\x7fELF")
    for name in names:
        assert name.encode() in cubin
