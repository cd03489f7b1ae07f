# SPDX-License-Identifier: Apache-2.0
"""The kernels of slot mappings and of block copies, compiled by NVRTC for every architecture."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from test_kernel_compiles import ARCHITECTURES, compile_for, nvrtc

from pagedcache.backend.nvidia import source
from pagedcache.operators.blocks import nvidia as blocks
from pagedcache.operators.slot_mapping import nvidia as slots

I32, I64 = np.dtype(np.int32), np.dtype(np.int64)
KINDS = [("kOrdered", "int"), ("kZeroed", "int"), ("kApart", "long long"), ("kWithin", "int")]
DTYPES = [(I32, I32, I64, I64), (I64, I64, I32, I32)]


def supported(architecture):
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not make code for sm_{architecture}")


def used_by(log, name):
    """Return bytes of stack and spills, and registers."""
    found = re.search(
        rf"Compiling entry function '{name}'.*?(\d+) bytes stack frame, (\d+) bytes spill "
        r"stores, (\d+) bytes spill loads\n[^\n]*Used (\d+) registers",
        log,
        re.DOTALL,
    )
    return [*map(int, found.groups())]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_copies(architecture):
    supported(architecture)
    expressions = [blocks.instance(*kind) for kind in KINDS]
    names, _, ptx, log = compile_for(architecture, source.read(blocks.FILE), expressions)
    for (kind, _), name in zip(KINDS, names, strict=True):
        body = re.search(rf"\.entry {name}\((.*?)^}}", ptx, re.DOTALL | re.MULTILINE)[1]
        *memory, registers = used_by(log, name)
        assert registers <= 64  # so that 1,024 threads fit
        assert memory == [0, 0, 0] or (kind == "kWithin" and memory[0] < 200)
        loads = len(re.findall(r"ld\.(?:global\.)?v4\.u32", body))
        assert loads == 0 if kind == "kZeroed" else loads >= 4
        assert len(re.findall(r"st\.(?:global\.)?v4\.u32", body)) >= 4
        if architecture >= 90:
            ahead, _, _ = body.partition("griddepcontrol.wait")
            assert not re.search(r"(ld|st|red|atom)\.global", ahead)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slot_mappings(architecture):
    supported(architecture)
    kernels = itertools.product(("slotMapping", "pageSlots"), DTYPES)
    expressions = [slots.instance(*kernel) for kernel in kernels]
    names, _, ptx, log = compile_for(architecture, source.read(slots.FILE), expressions)
    for name in names:
        body = re.search(rf"\.entry {name}\((.*?)^}}", ptx, re.DOTALL | re.MULTILINE)[1]
        *memory, registers = used_by(log, name)
        assert memory == [0, 0, 0]
        assert registers <= 56
        if architecture >= 90:
            ahead, _, _ = body.partition("griddepcontrol.wait")
            assert not re.search(r"(ld|st|red|atom)\.global", ahead)
