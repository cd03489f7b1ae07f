# SPDX-License-Identifier: Apache-2.0
"""The kernels, compiled by clang to code objects for AMD's GPUs. None of this has run on one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import program_cases
import pytest
from format_cases import FORMATS, SOURCES
from program_cases import operation_of

from pagedcache.backend.nvidia import source
from pagedcache.backend.rocm.device import OPTIONS, PRELUDE
from pagedcache.cache import nvidia as cache
from pagedcache.operators.blocks import nvidia as blocks
from pagedcache.operators.paged_caching import nvidia as caching
from pagedcache.operators.programs import nvidia as programs
from pagedcache.operators.programs import text
from pagedcache.operators.slot_mapping import nvidia as slots

BUILTINS = Path(__file__).with_name("hip_builtins.h")
VERSIONS = ("", *(f"-{version}" for version in range(30, 17, -1)))
CUPYS_OPTIONS = ("-fcuda-flush-denormals-to-zero",)  # which ours must outdo
DEVICE = "-x hip --cuda-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -fdeclspec -O3"
WARNINGS = "-Wall -Wextra -Werror -Wno-unused-const-variable -Wno-pragma-once-outside-header"
WAVES = {"gfx90a": 64, "gfx942": 64, "gfx1100": 32, "gfx1201": 32}
I32, I64 = np.dtype(np.int32), np.dtype(np.int64)


@pytest.fixture(scope="session")
def clang():
    """Return a clang with the linker that goes with it."""
    for version in VERSIONS:
        if (found := shutil.which(f"clang{version}")) and shutil.which(f"ld.lld{version}"):
            return found
    pytest.skip("needs clang and lld, version 18 or newer (on Debian: apt install clang-19 lld-19)")


def formats(operator):
    """Return instances in which each format is stored once from each of two types."""
    modes = {
        "pagedStoring": (cache.SCALED_ELEMENTS, cache.COMPUTED),
        "pagedGather": (cache.SCALED,),
    }
    found = []
    for index, stored in enumerate(FORMATS):
        mode = modes[operator][index % len(modes[operator])]
        mode = cache.CONVERTED if stored in SOURCES else mode
        side = f"pagedcache::{cache.CUDA_NAMES[stored]}, {mode}, {(2, 8, 16)[index % 3]}"
        kind, slot = SOURCES[index % len(SOURCES)], ("int", "long long")[index % 2]
        found.append(
            f"pagedcache::{operator}<pagedcache::{cache.CUDA_NAMES[kind]}, {slot}, {side}, {side}, "
            f"{str(index % 2 == 0).lower()}>"
        )
    return found


def program(number, reads=False):
    """Return the text of a random program, and its instances."""
    case = program_cases.random_case(number, reads=reads)
    operation, _ = operation_of(case, case.arrays(number)[1])
    info = operation.info
    held = text.held_rows(info)
    steps = programs.steps_of(info)
    access, most = text.Access.of(info, held, wide=True), max(step.threads for step in steps)
    made = text.program_text(info, info.parameters, held, access, most)
    return made, [text.expression(info, steps[-1].heads, ahead=steps[-1].ahead)]


FUNCTIONS = """
namespace pagedcache::language {
template <int kPower>
__global__ void functions(float* at) {
  *at = sqrt(power(sin(cos(exp(exp2(log(log2(tanh(*at))))))), kPower));
}
}
"""
PROGRAMS = {
    "functions": lambda: ("expressions.cuh", FUNCTIONS, ["pagedcache::language::functions<2>"]),
    "report": lambda: ("common.cuh", "", ["pagedcache::takeReport"]),
    "copy": lambda: (
        caching.FILE,
        "",
        [
            caching.instance(dtype, dtypes, *each)
            for each in caching.INSTANCES
            for dtype, dtypes in (("bfloat16", "int64"), ("float32", "int32"))
            if each[0] > 2 or dtype != "float32"
        ],
    ),
    "store": lambda: ("paged_storing.cuh", "", formats("pagedStoring")),
    "gather": lambda: ("paged_gather.cuh", "", formats("pagedGather")),
    "steps of a write": lambda: (programs.FILE, *program(5)),
    "steps of a read": lambda: (programs.FILE, *program(1_000, reads=True)),
    "slots": lambda: (
        slots.FILE,
        "",
        [slots.instance(kernel, (I32, I32, I64, I64)) for kernel in ("slotMapping", "pageSlots")],
    ),
    "blocks": lambda: (
        blocks.FILE,
        "",
        [
            blocks.instance(*kind)
            for kind in (("kOrdered", "int"), ("kZeroed", "int"), ("kWithin", "long long"))
        ],
    ),
}


def compiled(clang, architecture, folder, text, *more):
    """Compile to assembly and to a code object; return both."""
    file = folder / "kernel.hip"
    file.write_text(f'#include "{BUILTINS}"\n{text}\n')
    command = [clang, *DEVICE.split(), *WARNINGS.split(), f"--offload-arch={architecture}"]
    command += [*OPTIONS, *CUPYS_OPTIONS, *more, "--save-temps=obj", "-c"]
    done = subprocess.run(
        [*command, "-o", folder / "kernel.o", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [assembly] = folder.glob("*.s")
    return assembly.read_text(), (folder / "kernel.o").read_bytes()


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("architecture", WAVES)
def test_every_kernel_compiles(clang, tmp_path, architecture, name):
    file, more, expressions = PROGRAMS[name]()
    made = [f"template __global__ decltype({each}) {each};" for each in expressions if "<" in each]
    assembly, code = compiled(
        clang,
        architecture,
        tmp_path,
        "\n".join([source.read(PRELUDE), source.read(file) + more, *made]),
    )
    assert code.startswith(b"\x7fELF")
    kernels = re.findall(r"\.amdhsa_kernel (\w+)", assembly)
    assert len(kernels) == len(made) + 1  # takeReport
    assert all(f"{kernel}.kd".encode() in code for kernel in kernels)
    # Each operation is rounded once, and subnormal numbers are kept.
    assert re.findall(r"denorm_mode_32 (\d)", assembly) == ["3"] * len(kernels)
    assert set(re.findall(r"wavefront_size: +(\d+)", assembly)) == {str(WAVES[architecture])}
    assert set(re.findall(r"\.vgpr_spill_count: +(\d+)", assembly)) == {"0"}
