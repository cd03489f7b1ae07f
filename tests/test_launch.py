# SPDX-License-Identifier: Apache-2.0
"""What the driver is handed at a launch, read back by the layout of CUlaunchConfig in cuda.h."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import pytest

pytest.importorskip("cupy")

FUNCTION = 0xF00
DRIVER = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


class Call(ctypes.Structure):
    _fields_ = (("at", ctypes.c_void_p), ("rows", ctypes.c_longlong))


class Parameters(ctypes.Structure):
    _fields_ = (("call", Call), ("more", ctypes.c_longlong))


class Cuda:
    """Stands where the driver and cupy.cuda.runtime stand; keeps what it was handed."""

    CUDARuntimeError = RuntimeError

    def __init__(self, devices=1):
        self.devices, self.current, self.has_context = devices, 0, True
        self.queued = []  # of (device, grid, block, shared memory, stream, attributes, words)
        self.cuLaunchKernelEx = DRIVER(self.launch)

    def launch(self, config, function, arguments, extra):
        if not self.has_context:
            return 201
        assert (function, extra) == (FUNCTION, None)
        *sizes, stream, at, count = struct.unpack("7I4xQQI", ctypes.string_at(config, 52))
        attributes = [
            struct.unpack("I4xi", ctypes.string_at(at + 72 * index, 12)) for index in range(count)
        ]
        [parameters] = struct.unpack("Q", ctypes.string_at(arguments, 8))
        words = struct.unpack("3q", ctypes.string_at(parameters, 24))
        grid, block, [shared] = tuple(sizes[:3]), tuple(sizes[3:6]), sizes[6:]
        self.queued.append((self.current, grid, block, shared, stream, attributes, words))
        return 0

    def getDeviceCount(self):  # noqa: N802
        return self.devices

    def getDevice(self):  # noqa: N802
        return self.current

    def setDevice(self, index):  # noqa: N802
        self.current, self.has_context = index, True

    def ctxGetCurrent(self):  # noqa: N802
        return int(self.has_context)

    def CUDADriverError(self, status):  # noqa: N802
        return SimpleNamespace(status=status)


@pytest.fixture
def make(monkeypatch):
    """Return a function that makes a launch on device 0, and what stands for CUDA."""
    from pagedcache.backend.nvidia import launch as room

    def prepared(devices=1, programmatic=False, parameters=None):
        cuda = Cuda(devices)

        class Device:
            def __init__(self, index):
                self.index = index

            def __enter__(self):
                self.before, cuda.current = cuda.current, self.index

            def __exit__(self, *_):
                cuda.current = self.before

        monkeypatch.setattr(room, "runtime", cuda)
        monkeypatch.setattr(room, "driver", cuda)
        monkeypatch.setattr(room, "library", lambda: cuda)
        monkeypatch.setattr(room, "cupy", SimpleNamespace(cuda=SimpleNamespace(Device=Device)))
        given = parameters or Parameters(more=99)
        return cuda, room.Launch(0, FUNCTION, 2, 64, given, programmatic=programmatic)

    return prepared


@pytest.mark.parametrize(
    ("programmatic", "attributes"), [(False, []), (True, [(6, 1)])], ids=["plain", "programmatic"]
)
def test_grid_stream_attributes_and_parameters(make, programmatic, attributes):
    cuda, launch = make(programmatic=programmatic)
    wanted = []
    for blocks, stream, at in ((5, 33, 11), (5, 33, 12), (7, 33, 12), (7, 2**40, 12), (1, 0, 13)):
        launch.pack(at, -at)
        launch.run(blocks, stream)
        wanted.append((0, (blocks, 2, 1), (64, 1, 1), 0, stream, attributes, (at, -at, 99)))
    assert cuda.queued == wanted


def test_each_launch_has_parameters_of_its_own(make):
    shared = Parameters(more=99)
    (one_cuda, one), (other_cuda, other) = make(parameters=shared), make(parameters=shared)
    one.pack(1, 2)
    other.pack(3, 4)
    shared.more = 5
    for launch in (one, other):
        launch.run(1, 0)
    assert one_cuda.queued[0][-1] == (1, 2, 99)
    assert other_cuda.queued[0][-1] == (3, 4, 99)


def test_a_thread_without_a_context_gets_one(make):
    cuda, launch = make()
    cuda.has_context = False
    launch.pack(1, 2)
    launch.run(3, 4)
    assert [each[1] for each in cuda.queued] == [(3, 2, 1)]


def test_a_launch_goes_to_its_own_device(make):
    cuda, launch = make(devices=2)
    launch.pack(1, 2)
    for current in (0, 1):
        cuda.current = current
        launch.run(1, 0)
        assert cuda.current == current
    assert [each[0] for each in cuda.queued] == [0, 0]
