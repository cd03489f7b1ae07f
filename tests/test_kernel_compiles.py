# SPDX-License-Identifier: Apache-2.0
"""Every instance of the kernel, compiled by NVRTC to machine code for every architecture."""

from __future__ import annotations

import re

import pytest

from pagedcache.backend.nvidia import source
from pagedcache.operators.paged_caching import nvidia
from pagedcache.status import Status

cupy = pytest.importorskip("cupy", reason="CuPy, which brings NVRTC's interface, is not installed")
nvrtc = cupy.cuda.nvrtc

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
INSTANCES = [
    (dtype, slots, width, ahead)
    for dtype in nvidia.TYPE_NAMES
    for slots in nvidia.SLOT_NAMES
    for width, ahead in nvidia.INSTANCES
    if width >= (4 if dtype == "float32" else 2)
]
# What CuPy adds to every compilation; neither an include path nor a header is given.
CUPYS_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
REPORT = "--ptxas-options=-v"


def compile_for(architecture, text, expressions):
    from pagedcache.backend.nvidia.device import OPTIONS

    program = nvrtc.createProgram(text, "kernel.cu", (), ())
    try:
        for expression in expressions:
            nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(
                program, (*OPTIONS, *CUPYS_OPTIONS, REPORT, f"-arch=sm_{architecture}")
            )
        except nvrtc.NVRTCError:
            raise AssertionError(nvrtc.getProgramLog(program)) from None
        names = [nvrtc.getLoweredName(program, expression) for expression in expressions]
        log = nvrtc.getProgramLog(program)
        return names, nvrtc.getCUBIN(program), nvrtc.getPTX(program).decode(), log
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_instance_compiles(architecture):
    if architecture not in nvrtc.getSupportedArchs():
        pytest.skip(f"NVRTC {nvrtc.getVersion()} does not make code for sm_{architecture}")
    expressions = [nvidia.instance(*instance) for instance in INSTANCES]
    assert len(expressions) == 28
    names, cubin, ptx, log = compile_for(architecture, source.read(nvidia.FILE), expressions)
    assert cubin.startswith(b"\x7fELF")
    for (_, slots, width, gets_ahead), name in zip(INSTANCES, names, strict=True):
        assert name.encode() in cubin
        body = re.search(rf"\.entry {name}\((.*?)^}}", ptx, re.DOTALL | re.MULTILINE)[1]
        vector = {16: "v4.u32", 8: "v2.u32", 4: "u32", 2: "u16"}[width]
        # K and V by loads and stores of the promised width; the slots are the only other loads.
        assert len(re.findall(r"ld\.global", body)) == 3
        wide = len(re.findall(rf"ld\.global\.{re.escape(vector)}", body))
        # For some architectures the load of an int32 slot reads as one of 4 bytes, unsigned.
        assert wide == 2 or (wide == 3 and (slots, width) == ("int32", 4))
        assert len(re.findall(r"st\.global", body)) == 2
        assert len(re.findall(rf"st\.global\.{re.escape(vector)}", body)) == 2
        # Programmatic launch: one wait for the kernel ahead, before anything is read or written.
        programmatic = architecture >= 90
        assert body.count("griddepcontrol.wait") == programmatic
        assert body.count("griddepcontrol.launch_dependents") == programmatic
        if programmatic:
            ahead, _, after = body.partition("griddepcontrol.wait")
            assert not re.search(r"(ld|st|red|atom)\.global|\batom\.", ahead)
            assert ("griddepcontrol.launch_dependents" in ahead) is gets_ahead
            assert ahead.count("prefetch.global.L2") == (3 if gets_ahead else 0)
            assert len(re.findall(r"(?:ld|st)\.global", after)) == 5
        # A report is locked, unlocked and counted atomically.
        assert re.findall(r"\b(?:atom|red)\.global\.(\w+)", body) == ["cas", "exch", "add"]
        assert ".local" not in body
        assert ".shared" not in body
        used = re.search(
            rf"Compiling entry function '{name}'.*?(\d+) bytes stack frame, (\d+) bytes spill "
            r"stores, (\d+) bytes spill loads\n[^\n]*Used (\d+) registers, used 0 barriers",
            log,
            re.DOTALL,
        )
        stack, stores, loads, registers = map(int, used.groups())
        assert (stack, stores, loads) == (0, 0, 0)
        # 32 let 2048 threads stand on a multiprocessor; these hold 1536 (1024 of 7.5), and 42 do.
        assert registers <= (42 if architecture in (75, 86, 89, 120) else 32)


def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(AssertionError, match="a vector must hold whole elements"):
        compile_for(90, source.read(nvidia.FILE), [nvidia.instance("float32", "int64", 2, False)])


def test_a_device_below_512_threads_is_refused():
    from pagedcache.backend.nvidia.device import Limits

    limits = Limits("old", (1, 0), 1, 511, 65535)
    with pytest.raises(RuntimeError, match="at least 512 threads in a block, got 511") as caught:
        _ = limits.thread_class
    assert caught.value.status == Status.DEVICE_ARCHITECTURE_NOT_SUPPORTED
    classes = [Limits("", (9, 0), 1, most, 1).thread_class for most in (512, 1024, 4096, 2048)]
    assert classes == [512, 1024, 4096, 1024]
