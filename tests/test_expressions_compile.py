# SPDX-License-Identifier: Apache-2.0
"""Expressions as they are printed, compiled by NVRTC: operations round once, and none flushes."""

from __future__ import annotations

import random
import re

import pytest

pytest.importorskip("cupy")

from test_expressions_on_host import DIMS, HARNESS, PARAMETERS, random_tree
from test_kernel_compiles import ARCHITECTURES, compile_for, nvrtc

from pagedcache.backend.nvidia import source
from pagedcache.expressions.cuda import printed

KERNEL = """
namespace pagedcache {{ namespace language {{
{text}
__global__ void {name}_all(const Place* places, Parameters p, const RowValue* rows, float* out) {{
  bool inside = true;
  const float value = {name}(places[threadIdx.x], p, rows, inside);
  if (inside) out[threadIdx.x] = value;
}}
}}}}
"""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expressions_compile(architecture):
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not make code for sm_{architecture}")
    rng = random.Random(architecture)
    members = {name: f"parameters.p{i}" for i, name in enumerate(PARAMETERS)}
    harness = HARNESS % {"dims": DIMS}
    harness = (
        harness[: harness.index("inline float combined")].replace(
            "float at(", "__device__ float at("
        )
        + "}}"
    )
    parts = [source.read("expressions.cuh"), harness]
    names = []
    for i in range(40):
        _, tree = random_tree(rng, 1 + i % 3)
        parts.append(KERNEL.format(text=printed(f"step{i}", tree, members).text, name=f"step{i}"))
        names.append(f"pagedcache::language::step{i}_all")
    _, _, ptx, _ = compile_for(architecture, "".join(parts), names)
    assert "fma." not in ptx
    assert ".approx" not in ptx
    # Only what is compared with 0.5, 2^23 or 2^63, and is converted to an integer, may be flushed.
    for line in re.findall(r"[^;]*\.ftz[^;]*;", ptx):
        compared = re.search(r"setp\.\w+\.ftz\.f32[^;]*0f(4B000000|3F000000|5F000000)", line)
        assert compared or re.search(r"cvt\.rzi\.ftz\.s(32|64)\.f32", line), line
