# SPDX-License-Identifier: Apache-2.0
"""The rocm backend without a GPU: kernels on the host, behind what CuPy for ROCm offers."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from host_device import Compiler, descriptor_on
from layouts import expected, same
from test_device import Current, CurrentStream, Error, Runtime, Stream, limits
from test_invalid_slots import BAD, CAPACITY, case_with

import pagedcache as pc
from pagedcache.backend import nvidia, rocm
from pagedcache.backend.nvidia import source
from pagedcache.backend.protocol import Invalid
from pagedcache.status import Status

CACHES = (nvidia.wheels, nvidia._check_driver, rocm._count_devices, rocm._open)


class Hip(Runtime):
    """Stands where cupy.cuda.runtime and driver stand in a CuPy for ROCm."""

    is_hip = True
    CUDADriverError = Error
    refuses = False

    def __init__(self, compiler, folder):
        super().__init__()
        self.mode = 2  # what CUDA asks for, and HIP does not need
        self.compiler, self.folder = compiler, folder
        self.functions, self.launched = [], []
        self.numbers = itertools.count()

    def RawModule(self, *, code, options, name_expressions):  # noqa: N802
        prelude = source.read("hip.cuh")
        assert code.startswith(prelude)
        assert "-ffp-contract=off" in options
        file = self.folder / f"kernel{next(self.numbers)}.cuh"
        file.write_text(code.removeprefix(prelude))

        def function(expression):
            assert expression in name_expressions
            self.functions.append(self.compiler.function(file, expression))
            return SimpleNamespace(kernel=SimpleNamespace(ptr=len(self.functions) - 1))

        return SimpleNamespace(get_function=function)

    def launchKernel(self, f, *sizes_stream_and_arguments):  # noqa: N802
        if self.refuses:
            raise Error("hipErrorLaunchFailure")
        *sizes, stream, arguments, extra = sizes_stream_and_arguments
        blocks, rows, _, threads, *rest = sizes
        assert rest == [1, 1, 0]
        assert extra == 0
        [parameters] = (ctypes.c_void_p * 1).from_address(arguments)
        self.launched.append((blocks, rows, threads, stream))
        self.functions[f](blocks, rows, threads, parameters)

    def getDeviceProperties(self, index):  # noqa: N802
        return {"name": b"AMD Test", "gcnArchName": b"gfx942:sramecc+:xnack-"}

    def streamIsCapturing(self, stream):  # noqa: N802
        raise RuntimeError("streamIsCapturing is not supported in ROCm")

    def getDevice(self):  # noqa: N802
        return 0


def no_cuda():
    raise OSError("there is no driver of CUDA")


@pytest.fixture
def hip(monkeypatch, compiler, tmp_path):
    """HIP over host memory, with waves of 64 lanes."""
    pytest.importorskip("cupy")
    from pagedcache.backend.nvidia import context, report
    from pagedcache.backend.nvidia import device as base
    from pagedcache.backend.rocm import device as room

    made = Hip(Compiler(tmp_path, 64), tmp_path)
    cuda = SimpleNamespace(
        Device=Current, Stream=Stream, get_current_stream=lambda index: CurrentStream(3),
        compiler=SimpleNamespace(CompileException=Error), runtime=made,
        nvrtc=SimpleNamespace(getVersion=lambda: (9, 0)),
    )  # fmt: skip
    fake = SimpleNamespace(cuda=cuda, RawModule=made.RawModule)
    for module in (context, base, report, room):
        monkeypatch.setattr(module, "cupy", fake, raising=False)
        monkeypatch.setattr(module, "runtime", made)
    monkeypatch.setattr(room, "driver", made)
    monkeypatch.setattr(base, "_query", lambda index: replace(limits((9, 4)), name="AMD Test"))
    monkeypatch.setattr(nvidia.driver, "library", no_cuda)
    monkeypatch.setattr(rocm, "_import_cupy", lambda: fake)
    yield made
    rocm._count_devices.cache_clear()
    rocm._open.cache_clear()


def test_a_write_and_its_report(hip):
    device = pc.Handle("rocm").opened()
    case = case_with(BAD)
    wanted = expected(case)
    with descriptor_on(device, case) as descriptor:
        assert descriptor.device == "rocm:0"
        descriptor.calculate(*case.addresses())
        descriptor.bind(*case.addresses(), stream=11)()
        assert descriptor._report.take() == Invalid(6, 1, CAPACITY)
        same(case, wanted)
        assert [stream for *_, stream in hip.launched] == [3, 11, 7]
        hip.refuses = True
        with pytest.raises(RuntimeError, match="launch on rocm:0 was refused because"):
            descriptor.calculate(*case.addresses())


def test_what_it_says_of_itself(hip):
    report = pc.backends()["rocm"]
    assert report.usable
    assert report.reason == "AMD Test, gfx942, 132 compute units; compiled, never run: help wanted"
    assert repr(pc.Handle("rocm:0")) == f"Handle('rocm:0': {report.reason})"
    assert ("programmatic launch", "no, AMD's GPUs have none") in (
        pc.Handle("rocm").opened().limits_table()
    )
    with pytest.raises(ValueError, match=r"must be one of the 1 GPUs here .rocm:0 to rocm:0."):
        pc.Handle("rocm:1")


@pytest.fixture
def installed(monkeypatch):
    """Return a function that pretends that these wheels of CuPy are installed."""
    for cache in CACHES:
        cache.cache_clear()

    def pretend(*names, cupy=None):
        def distribution(name):
            if name not in names:
                raise importlib.metadata.PackageNotFoundError(name)
            return SimpleNamespace(metadata={"Name": name})

        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        monkeypatch.setitem(sys.modules, "cupy", cupy)

    yield pretend
    monkeypatch.undo()
    for cache in CACHES:
        cache.cache_clear()


def test_why_it_is_not_usable(installed, monkeypatch):
    for names, words in (
        (
            ("cupy-cuda12x",),
            r"for ROCm .install ROCm 7, and .*rocm7; .*help wanted.: cupy-cuda12x is for CUDA",
        ),
        ((), "needs a CuPy for ROCm .*: import of cupy halted"),
        (("cupy-rocm-7-0", "cupy-cuda13x"), "needs exactly one CuPy"),
    ):
        nvidia.wheels.cache_clear()
        installed(*names)
        with pytest.raises(ImportError, match=words) as caught:
            pc.Handle("rocm")
        assert caught.value.status == Status.DEVICE_NOT_INITIALIZED
        assert not pc.backends()["rocm"].usable


@pytest.mark.parametrize("name", ["cupy-rocm-7-0", "cupy"])
def test_cuda_says_that_this_cupy_is_for_rocm(installed, name):
    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(is_hip=True)))
    installed(name, cupy=fake)
    with pytest.raises(RuntimeError, match=r"is for AMD's GPUs; use the device 'rocm'") as caught:
        pc.Handle("cuda")
    assert caught.value.status == Status.DEVICE_NOT_INITIALIZED


def test_arrays_of_a_cupy_for_rocm(hip):
    from pagedcache.arrays.cupy import Cupy

    memory = SimpleNamespace(device_id=1, ptr=64)
    array = SimpleNamespace(data=memory, dtype=None, shape=(), strides=())
    library = Cupy(SimpleNamespace(cuda=SimpleNamespace(runtime=hip)))
    assert library.read("k", array).device == "rocm:1"
