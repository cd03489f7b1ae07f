"""The parts of the nvidia backend around CUDA, with host memory where device memory would be."""

from __future__ import annotations

import ctypes
import gc
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import expected, same, simple_case

import pagedcache as pc
from pagedcache.backend.nvidia import paged_caching
from pagedcache.status import Status

pytest.importorskip("cupy")


class Error(RuntimeError):
    status = 719


class Stream:
    ptr = 7

    def __init__(self, non_blocking=False):
        assert non_blocking

    def synchronize(self):
        pass


class Memory:
    def __init__(self, size):
        self.buffer = ctypes.create_string_buffer(size)
        self.ptr = ctypes.addressof(self.buffer)


class Runtime:
    """Stands where cupy.cuda.runtime stands; keeps what it was asked."""

    CUDARuntimeError = Error
    memcpyDeviceToHost = memcpyHostToDevice = 0  # noqa: N815
    broken = capturing = False

    def __init__(self):
        self.calls = []

    def memcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        ctypes.memmove(target, source, size)

    def streamSynchronize(self, stream):  # noqa: N802
        self.calls.append(("stream", stream))
        if self.broken:
            raise Error("cudaErrorLaunchFailure")

    def deviceSynchronize(self):  # noqa: N802
        self.calls.append(("device",))

    def streamIsCapturing(self, stream):  # noqa: N802
        return self.capturing


class Current:
    """Stands where a cupy.cuda.Device stands."""

    waits = 0

    def __init__(self, index):
        assert index == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def synchronize(self):
        Current.waits += 1


@pytest.fixture
def device(monkeypatch):
    """A CudaDevice over host memory."""
    from pagedcache.backend.nvidia import device as room
    from pagedcache.backend.nvidia import record

    runtime = Runtime()
    cuda = SimpleNamespace(Device=Current, Stream=Stream, alloc=Memory)
    for module in (room, record):
        monkeypatch.setattr(module, "cupy", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(module, "runtime", runtime)
    limits = room.Limits("NVIDIA Test", (9, 0), 132, 1024, 2**31 - 1)
    monkeypatch.setattr(room, "_query", lambda index: limits)
    monkeypatch.setattr(room, "_can_be_programmatic", lambda: True)
    made = room.CudaDevice(0)
    made.runtime = runtime
    monkeypatch.setattr(made, "current_stream", lambda: 3)
    return made


def add(record, *words):
    (ctypes.c_int64 * 4).from_address(record.address)[:] = words


def test_a_record_is_told_once(device):
    one, other = device.record(paged_caching.EMPTY), device.record(paged_caching.EMPTY)
    assert one.take() is None
    add(one, 3, 0, 5, 99)
    assert other.take() is None
    assert one.take().tolist() == [3, 0, 5, 99]
    assert one.take() is None


def test_records_come_back_only_when_no_kernel_can_write_to_them(device, monkeypatch):
    monkeypatch.setattr(Current, "waits", 0)
    seen = []
    for _ in range(1024):
        record = device.record(paged_caching.EMPTY)
        seen.append(record.address)
        late = record.address
        del record
        gc.collect(0)
    assert len(set(seen)) == 1024
    assert Current.waits == 0
    (ctypes.c_int64 * 4).from_address(late)[:] = (1, 0, 1, 1)  # a kernel that was still queued
    live = [device.record(paged_caching.EMPTY) for _ in range(1024)]
    assert Current.waits == 1
    assert {record.address for record in live} == set(seen)
    assert all(record.take() is None for record in live)
    more = device.record(paged_caching.EMPTY)  # another slab, since all are in use
    assert more.address not in seen
    assert Current.waits == 1


def test_reading_and_waiting(device):
    data = np.arange(16, dtype=np.uint8)
    assert device.read(data.ctypes.data + 3, 4, 5).tolist() == [3, 4, 5, 6]
    device.wait(9)
    device.wait(None)
    assert device.runtime.calls == [("stream", 5), ("stream", 9), ("device",)]
    assert not device.capturing(5)
    device.runtime.capturing = True
    assert device.capturing(5)
    with pytest.raises(NotImplementedError, match="waiting for cuda:0 cannot be done while"):
        device.wait(None)
    device.runtime.capturing = False
    device.runtime.broken = True
    with pytest.raises(RuntimeError, match="work that was queued before it failed") as caught:
        device.wait(5)
    assert caught.value.status == Status.INTERNAL_ERROR


def test_waiting_is_refused_in_a_capture(device, monkeypatch):
    """Checked before anything is launched."""
    from pagedcache.interface.checks import Checked

    case = simple_case()
    info = pc.Descriptor.create(*case.arrays()).info
    launched = []
    implementation = SimpleNamespace(
        workspace_size=0, launch_config=None, invalid_slots=None,
        calculate=lambda *a: launched.append(a),
    )  # fmt: skip
    device.runtime.capturing = True
    for options, words in (
        ({"raising": True, "debug": False}, "on_invalid='raise' waits for the stream"),
        ({"raising": False, "debug": True}, "debug waits for the stream"),
    ):
        checked = Checked(lambda: implementation, device, info, **options)
        descriptor = pc.Descriptor(info, "cpu", checked)
        with pytest.raises(NotImplementedError, match=words) as caught:
            descriptor.calculate(*case.arrays(), stream=3)
        assert caught.value.status == Status.NOT_IMPLEMENTED
    assert launched == []
    wanted = expected(case)
    pc.paged_caching(*case.arrays())
    same(case, wanted)
