# SPDX-License-Identifier: Apache-2.0
"""The kernels that convert compile for every architecture, and do what they promise."""

from __future__ import annotations

import re

import pytest
from format_cases import EIGHT_BITS, FORMATS, SOURCES

pytest.importorskip("cupy")

from test_kernel_compiles import ARCHITECTURES, compile_for, nvrtc

from pagedcache.backend.nvidia import source
from pagedcache.cache import nvidia
from pagedcache.dtypes import as_dtype

SLOTS = ("int64", "int32")


def modes(stored, kind, operator):
    """Return what a kernel may do with rows of a dtype in a format."""
    if stored == kind:
        return [nvidia.COPIED]
    if stored in SOURCES:
        return [nvidia.CONVERTED]
    scaled = [nvidia.SCALED, nvidia.SCALED_ELEMENTS]
    if operator == "pagedStoring":
        scaled += [nvidia.COMPUTED]
        scaled += [nvidia.COMPUTED_POWER] if stored == "float8_e4m3fn" else []
    return scaled + ([nvidia.CONVERTED] if stored in EIGHT_BITS else [])


def instances(operator, turn):
    """Return C++ names in which each source meets each format and mode.

    How many elements a thread takes differs from turn to turn, K's from V's.
    """
    found = []
    for kind in SOURCES:
        sides = [
            (nvidia.CUDA_NAMES[stored], mode, 2 if stored == "int4" else 1)
            for stored in FORMATS
            for mode in modes(stored, kind, operator)
        ]
        for index, (name, mode, packed) in enumerate(sides):
            other, other_mode, other_packed = sides[(index + 1 + turn) % len(sides)]
            most = nvidia.MOST_BYTES // as_dtype("dtype", kind).itemsize
            counts = [min(1 << (index + add) % 6, most) for add in (turn, index + turn + turn // 6)]
            found.append(
                f"pagedcache::{operator}<pagedcache::{nvidia.CUDA_NAMES[kind]}, "
                f"{nvidia.SLOT_NAMES[SLOTS[index % 2]]}, pagedcache::{name}, {mode}, "
                f"{max(counts[0], packed)}, pagedcache::{other}, {other_mode}, "
                f"{max(counts[1], other_packed)}, {str(index % 3 == 0).lower()}>"
            )
    return found


@pytest.mark.parametrize("operator", ["pagedStoring", "pagedGather"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_conversion_compiles(architecture, operator):
    file = {"pagedStoring": "paged_storing.cuh", "pagedGather": "paged_gather.cuh"}[operator]
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not make code for sm_{architecture}")
    expressions = instances(operator, ARCHITECTURES.index(architecture))
    assert len(expressions) >= 39
    names, _, ptx, log = compile_for(architecture, source.read(file), expressions)
    for name, expression in zip(names, expressions, strict=True):
        body = re.search(rf"\.entry {name}\((.*?)^}}", ptx, re.DOTALL | re.MULTILINE)[1]
        # Each operation is rounded once, and none flushes subnormal numbers, but where many numbers
        # are divided by one (see Quotients): three for each element, and two before; and where a
        # scale is computed, three for it.
        each = [int(count) for count in re.findall(r"::\w+, 2, (\d+)", expression)]
        each = each if operator == "pagedStoring" else []
        computed = len(re.findall(r"::\w+, [45], \d", expression))
        quotients = sum(each) + computed
        assert body.count("fma.rn.ftz.f32") == 3 * quotients + 2 * len(each)
        assert len(re.findall(r"\bfma\.", body)) == body.count("fma.rn.ftz.f32"), expression
        assert len(re.findall(r"(?:mul|add|sub|div|cvt|max)[.\w]*\.ftz", body)) == quotients
        assert ".approx" not in body, expression
        assert ".local" not in body, expression
        assert ("shfl.sync.bfly" in body) is (computed > 0), expression
        hardware = "cvt.rn.satfinite" in body
        wants = operator == "pagedStoring" and re.search(r"E4M3|E5M2", expression) is not None
        assert hardware is (wants and architecture >= 89), expression
        # One wait in each of K and V, with nothing read or written ahead of the first of them.
        assert body.count("griddepcontrol.wait") == 2 * (architecture >= 90)
        if architecture >= 90:
            assert not re.search(
                r"(ld|st|red|atom)\.global", body.partition("griddepcontrol.wait")[0]
            )
        used = re.search(
            rf"Compiling entry function '{name}'.*?(\d+) bytes stack frame, \d+ bytes spill "
            r"stores, \d+ bytes spill loads\n[^\n]*Used (\d+) registers",
            log,
            re.DOTALL,
        )
        stack, registers = map(int, used.groups())
        few = 8 if re.search(r"E5M2, 4, 32\b", expression) else 0  # two registers are too many
        assert stack <= few, expression
        assert registers <= 64, expression


def test_all_that_a_side_can_be_is_compiled():
    """Over all architectures, every number of elements meets every format and mode."""
    seen = set()
    for turn in range(len(ARCHITECTURES)):
        for operator in ("pagedStoring", "pagedGather"):
            for expression in instances(operator, turn):
                found = re.findall(r"pagedcache::(\w+), (\d), (\d+)", expression)
                seen |= {(operator, *side) for side in found}
    for operator in ("pagedStoring", "pagedGather"):
        for stored in FORMATS:
            for mode in modes(stored, "float16", operator):
                for elements in (1, 2, 4, 8, 16, 32):
                    if elements > 1 or stored != "int4":
                        side = operator, nvidia.CUDA_NAMES[stored], str(mode), str(elements)
                        assert side in seen
