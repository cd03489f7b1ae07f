"""The parts of the nvidia backend around CUDA, with host memory where device memory would be."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import expected, same, simple_case

import pagedcache as pc
from pagedcache.backend.nvidia import paged_caching
from pagedcache.info import InvalidSlots
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


class Runtime:
    """Stands where cupy.cuda.runtime stands; keeps what it was asked."""

    CUDARuntimeError = Error
    memcpyHostToDevice, memcpyDeviceToHost = 1, 2  # noqa: N815
    broken = capturing = False

    def __init__(self):
        self.calls = []
        self.memory = []

    def malloc(self, size):
        self.calls.append("malloc")
        self.memory.append(ctypes.create_string_buffer(b"\xab" * size, size))
        return ctypes.addressof(self.memory[-1])

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

    def __init__(self, index):
        assert index == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def device(monkeypatch):
    """A CudaDevice over host memory."""
    from pagedcache.backend.nvidia import device as room
    from pagedcache.backend.nvidia import record

    runtime = Runtime()
    current = lambda index: SimpleNamespace(ptr=3)  # noqa: E731
    cuda = SimpleNamespace(Device=Current, Stream=Stream, get_current_stream=current)
    for module in (room, record):
        monkeypatch.setattr(module, "cupy", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(module, "runtime", runtime)
    limits = room.Limits("NVIDIA Test", (9, 0), 132, 1024, 2**31 - 1)
    monkeypatch.setattr(room, "_query", lambda index: limits)
    monkeypatch.setattr(room, "_can_be_programmatic", lambda: True)
    made = room.CudaDevice(0)
    made.runtime = runtime
    return made


def add(record, *words):
    (ctypes.c_int64 * 4).from_address(record.address)[:] = words


def test_a_record_is_of_one_owner(device):
    one, other = device.record(paged_caching.EMPTY), device.record(paged_caching.EMPTY)
    assert one.read() == other.read() == list(paged_caching.EMPTY)
    add(one, 3, 0, 5, 99)
    assert one.read() == [3, 0, 5, 99]
    assert other.read() == list(paged_caching.EMPTY)
    one.clear()
    assert one.read() == list(paged_caching.EMPTY)


def test_records_are_never_used_again(device):
    """A queued kernel, or a graph, may write to one whose owner is gone."""
    seen = {device.record(paged_caching.EMPTY).address for _ in range(2100)}
    assert len(seen) == 2100
    assert device.runtime.calls.count("malloc") == 3
    live = device.record(paged_caching.EMPTY)
    for address in seen:
        (ctypes.c_int64 * 4).from_address(address)[:] = (1, 0, 1, 1)
    assert live.read() == list(paged_caching.EMPTY)


def test_no_memory_is_allocated_in_a_capture(device):
    device.record(paged_caching.EMPTY)
    device.runtime.capturing = True
    for _ in range(1023):
        device.record(paged_caching.EMPTY)
    with pytest.raises(NotImplementedError, match="first memory cannot be done while a stream"):
        device.record(paged_caching.EMPTY)


def test_half_a_report_is_told_later(device, monkeypatch):
    """One that a kernel is writing while it is read."""
    monkeypatch.setattr(device, "compile", lambda file, names: [0] * len(names))
    info = pc.Descriptor.create(*simple_case().arrays()).info
    write = paged_caching.PagedCaching(info, device)
    most = 2**63 - 1
    for half in ((1, 0, most, 0), (0, 0, 7, 28), (0, 1, most, 0)):
        add(write._invalid, *half)
        assert write.invalid_slots(3) is None
        assert write._invalid.read() == list(half)
    add(write._invalid, 1, 0, 7, 28)
    assert write.invalid_slots(None) == InvalidSlots(1, 7, 28)
    assert write.invalid_slots(None) is None
    device.runtime.broken = True
    with pytest.raises(RuntimeError, match="work that was queued before it failed"):
        write.invalid_slots(3)


def test_a_broken_capture_is_a_capture(device, monkeypatch):
    def broken(stream):
        raise RuntimeError("stream is invalidated")

    def implicit(stream):
        error = Error("cudaErrorStreamCaptureImplicit")
        error.status = 906
        raise error

    for answer in (broken, implicit):
        monkeypatch.setattr(device.runtime, "streamIsCapturing", answer)
        assert device.capturing(0)


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
