# SPDX-License-Identifier: Apache-2.0
"""The parts of the nvidia backend around CUDA, with host memory where device memory would be."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from host_device import TAKE
from layouts import expected, same, simple_case

import pagedcache as pc
from pagedcache.backend.protocol import Implementation, Invalid
from pagedcache.status import Status

pytest.importorskip("cupy")

NO_ROW = 2**63 - 1
GLOBAL, RELAXED = 0, 2  # CUstreamCaptureMode


class Error(RuntimeError):
    status = 719


class Stream:
    """Stands where a cupy.cuda.Stream stands."""

    def __init__(self, non_blocking=False):
        assert non_blocking
        self.ptr = 7

    def begin_capture(self):
        assert RUNTIME.mode == RELAXED
        RUNTIME.calls.append("begin_capture")

    def end_capture(self):
        RUNTIME.calls.append("end_capture")
        if RUNTIME.refuses_capture:
            raise RuntimeError("cudaErrorNotSupported")


class Runtime:
    """Stands where cupy.cuda.runtime and the driver stand; records what it was asked."""

    CUDARuntimeError = Error
    memcpyHostToDevice, memcpyDeviceToHost = 1, 2  # noqa: N815
    broken = capturing = refuses_capture = False
    busy = ()
    version = 13000

    def __init__(self):
        self.calls, self.memory, self.mode = [], [], GLOBAL

    def malloc(self, size):
        assert self.mode == RELAXED, "would end the capture of another thread"
        self.calls.append("malloc")
        self.memory.append(ctypes.create_string_buffer(b"\xab" * size, size))
        return ctypes.addressof(self.memory[-1])

    def memcpyAsync(self, target, source, size, kind, stream):  # noqa: N802
        assert self.mode == RELAXED
        ctypes.memmove(target, source, size)

    def streamSynchronize(self, stream):  # noqa: N802
        assert self.mode == RELAXED
        self.calls.append(("wait", stream))
        if self.broken:
            raise Error("cudaErrorLaunchFailure")

    def deviceSynchronize(self):  # noqa: N802
        self.streamSynchronize("all")

    def streamQuery(self, stream):  # noqa: N802
        return 600 if stream in self.busy else 0

    def streamIsCapturing(self, stream):  # noqa: N802
        return self.capturing

    def driverGetVersion(self):  # noqa: N802
        return self.version

    def getDeviceCount(self):  # noqa: N802
        return 1

    def cuThreadExchangeStreamCaptureMode(self, mode):  # noqa: N802
        self.mode, mode._obj.value = mode._obj.value, self.mode
        return 0


class CurrentStream:
    def __init__(self, ptr):
        self.ptr = ptr


class Current:
    """Stands where a cupy.cuda.Device stands."""

    def __init__(self, index):
        assert index == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
def runtime(monkeypatch):
    """CUDA over host memory."""
    global RUNTIME
    from pagedcache.backend.nvidia import context, driver, launch, report
    from pagedcache.backend.nvidia import device as room

    RUNTIME = made = Runtime()
    made.current = CurrentStream(3)
    cuda = SimpleNamespace(
        Device=Current, Stream=Stream, get_current_stream=lambda index: made.current
    )
    for module in (context, room, report, launch):
        monkeypatch.setattr(module, "cupy", SimpleNamespace(cuda=cuda), raising=False)
        monkeypatch.setattr(module, "runtime", made)
    monkeypatch.setattr(driver, "library", lambda: made)
    return made


def limits(capability=(9, 0), threads=1024):
    from pagedcache.backend.nvidia.device import Limits

    return Limits("NVIDIA Test", capability, 132, threads, 2**31 - 1)


@pytest.fixture
def device(monkeypatch, runtime, compiler):
    """A CudaDevice whose reports are taken by the real kernel, on the host."""
    from pagedcache.backend.nvidia import device as room

    monkeypatch.setattr(room, "_query", lambda index: limits())
    made = room.CudaDevice(0)
    take = compiler.function("common.cuh", TAKE)

    def launch_to_take(report, taken):
        words = (ctypes.c_uint64 * 2)(report, taken)
        return SimpleNamespace(run=lambda blocks, stream: take(1, 1, 1, ctypes.addressof(words)))

    made._reports._take_launch = launch_to_take
    return made


def add(report, count, row, value):
    (ctypes.c_int64 * 4).from_address(report.address)[:] = (count, 0, row, value)


def test_a_report_has_one_owner(device):
    one, other = device.report(), device.report()
    assert one.take() is other.take() is None
    add(one, 3, 5, 99)
    assert other.take() is None
    assert one.take() == Invalid(3, 5, 99)
    assert one.take() is None


def test_what_is_counted_after_its_row_was_taken_is_told(device):
    report = device.report()
    add(report, 2, 5, 99)
    assert report.take() == Invalid(2, 5, 99)
    add(report, 1, NO_ROW, 0)  # of a kernel whose row, 5 or higher, was taken before it counted
    assert report.take() == Invalid(1, 5, 99)
    add(report, 0, 7, 28)  # of one that has not counted yet
    assert report.take() is None
    add(report, 1, 7, 28)
    assert report.take() == Invalid(1, 7, 28)


def test_the_memory_of_reports_is_never_used_again(device, runtime):
    """A queued kernel, or a graph, may add to one whose owner is gone."""
    seen = {device.report().address for _ in range(2100)}
    assert len(seen) == 2100
    assert (
        min(abs(one - other) for one, other in zip(sorted(seen), sorted(seen)[1:], strict=False))
        >= 64
    )
    assert runtime.calls.count("malloc") == 3
    live = device.report()
    for address in seen:
        (ctypes.c_int64 * 4).from_address(address)[:] = (1, 0, 1, 1)
    assert live.take() is None


def test_those_that_nobody_reads_share_one(device, runtime):
    assert len({device.report(read=False).address for _ in range(3000)}) == 1
    assert runtime.calls.count("malloc") == 1
    assert device.report().address != device.report(read=False).address


def test_no_memory_is_allocated_in_a_capture(device, runtime):
    device.report()
    runtime.capturing = True
    for _ in range(1023):
        device.report()
    with pytest.raises(
        NotImplementedError, match="allocating memory for a first descriptor is not"
    ):
        device.report()


def test_a_report_waits_for_the_streams_that_wrote_to_it(device, runtime):
    report = device.report()
    del runtime.calls[:]
    for stream in (3, 11, 12, 11):
        report.note(stream)
    assert report.take() is None
    side = 7
    assert runtime.calls == [("wait", 3), ("wait", 11), ("wait", 12), ("wait", side)]
    del runtime.calls[:]
    report.take()
    assert runtime.calls == [("wait", side)]


def test_a_stream_lives_until_it_was_waited_for(device, runtime):
    report = device.report()
    report.note(runtime.current.ptr)
    given = type("", (), {"__cuda_stream__": lambda self: (0, 9)})()
    report.note(device.stream(given))
    alive = weakref.ref(runtime.current), weakref.ref(given)
    runtime.current, given = CurrentStream(4), None
    gc.collect()
    assert all(one() is not None for one in alive)
    report.take()
    gc.collect()
    assert all(one() is None for one in alive)


def test_idle_streams_are_forgotten(device, runtime):
    from pagedcache.backend.nvidia.context import KeptStream

    report = device.report()
    runtime.busy = (102, 105)
    for stream in range(100, 200):
        report.note(KeptStream.of(stream, object()))
        assert len(report.streams) <= 16
    assert {102, 105, 199} <= set(report.streams)


def test_streams_that_may_be_gone_are_not_asked(device, runtime, monkeypatch):
    report = device.report()
    monkeypatch.setattr(runtime, "streamQuery", lambda stream: pytest.fail("asked"))
    for stream in range(100, 200):
        report.note(stream)
    assert list(report.streams) == list(range(100, 200))


def test_a_report_that_nobody_reads_keeps_no_stream(device, runtime):
    from pagedcache.backend.nvidia.context import KeptStream

    report = device.report(read=False)
    streams = [CurrentStream(handle) for handle in range(100, 200)]
    gone = [weakref.ref(stream) for stream in streams]
    for stream in streams:
        report.note(KeptStream.of(stream.ptr, stream))
        assert stream.ptr in report.streams
        assert len(report.streams) <= 16
    del stream, streams
    gc.collect()
    assert not any(one() for one in gone)


def test_what_is_queued_during_a_check_is_waited_for_by_the_next(device, runtime, monkeypatch):
    report = device.report()
    report.note(11)
    report.note(12)
    wait = runtime.streamSynchronize

    def another_thread_writes(stream):
        if stream == 12 and 11 not in report.streams:  # as a write does once it has queued
            report.note(11)
        wait(stream)

    monkeypatch.setattr(runtime, "streamSynchronize", another_thread_writes)
    report.take()
    del runtime.calls[:]
    report.take()
    assert runtime.calls[0] == ("wait", 11)


def test_the_default_stream_of_another_thread(device, runtime):
    from pagedcache.backend.nvidia.report import PER_THREAD

    report = device.report()
    report.note(PER_THREAD)
    assert PER_THREAD not in report.streams  # so each thread notes it
    del runtime.calls[:]
    report.take()
    assert runtime.calls[:-1] == [("wait", PER_THREAD)]
    thread = threading.Thread(target=report.note, args=(PER_THREAD,))
    thread.start()
    thread.join()
    runtime.broken = True
    with pytest.raises(RuntimeError, match="work that was queued before it failed"):
        report.take()
    runtime.broken = False
    del runtime.calls[:]
    report.take()
    report.take()
    assert runtime.calls == [("wait", "all"), ("wait", 7), ("wait", 7)]


def test_a_report_that_cannot_wait_loses_nothing(device, runtime):
    report = device.report()
    report.note(3)
    add(report, 3, 5, 99)
    runtime.capturing = True
    with pytest.raises(NotImplementedError, match="waiting for a stream of cuda:0 is not possible"):
        report.take()
    runtime.capturing, runtime.broken = False, True
    with pytest.raises(RuntimeError, match="work that was queued before it failed"):
        report.take()
    runtime.broken = False
    assert list(report.streams) == [3]
    assert report.take() == Invalid(3, 5, 99)


def test_a_broken_capture_is_a_capture(device, runtime, monkeypatch):
    def broken(stream):
        raise RuntimeError("stream is invalidated")

    def implicit(stream):
        error = Error("cudaErrorStreamCaptureImplicit")
        error.status = 906
        raise error

    for answer in (broken, implicit):
        monkeypatch.setattr(runtime, "streamIsCapturing", answer)
        assert device.capturing(0)


def test_reading_and_waiting(device, runtime):
    data = np.arange(16, dtype=np.uint8)
    assert device.read(data.ctypes.data + 3, 4, 5).tolist() == [3, 4, 5, 6]
    device.wait(9)
    assert runtime.calls == [("wait", 5), ("wait", 9)]
    assert not device.capturing(5)
    runtime.capturing = True
    assert device.capturing(5)
    with pytest.raises(NotImplementedError, match="is not possible while a stream is being captur"):
        device.wait(9)
    runtime.capturing = False
    runtime.broken = True
    with pytest.raises(RuntimeError, match="work that was queued before it failed") as caught:
        device.wait(5)
    assert caught.value.status == Status.INTERNAL_ERROR
    assert runtime.mode == GLOBAL  # as it was before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"on_invalid": "raise"}, "on_invalid='raise' waits for the stream"),
        ({"debug": True}, "debug waits for the stream"),
    ],
)
def test_waiting_is_refused_in_a_capture(device, runtime, options, words):
    """Before anything is launched."""
    case = simple_case()
    launched = []

    class Write(Implementation):
        def __init__(self, info, device, report):
            pass

        def run(self, *arguments):
            launched.append(arguments)

    device.name = "cpu"  # where the arrays are
    device.operator = lambda name: Write
    kind = type("Somewhere", (pc.Descriptor,), {"implementations": {}})
    created = pc.Descriptor.create(*case.arrays())
    descriptor = kind(created.info, created._arguments.expected, device, **options)
    runtime.capturing = True
    for call in (descriptor.calculate, lambda *arrays, stream: descriptor.bind(*arrays)()):
        with pytest.raises(NotImplementedError, match=words) as caught:
            call(*case.arrays(), stream=3)
        assert caught.value.status == Status.NOT_IMPLEMENTED
    assert launched == []
    wanted = expected(case)
    pc.paged_caching(*case.arrays())
    same(case, wanted)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (limits(capability=(6, 1)), "compute capability 7.0 .Volta. or higher, got 6.1"),
        (limits(threads=511), "at least 512 threads in a block, got 511"),
    ],
    ids=["old", "small"],
)
def test_devices_that_cannot_run_the_kernels_are_refused(runtime, monkeypatch, found, words):
    from pagedcache.backend.nvidia import device as room

    monkeypatch.setattr(room, "_query", lambda index: found)
    with pytest.raises(RuntimeError, match=words) as caught:
        room.CudaDevice(0)
    assert caught.value.status == Status.DEVICE_ARCHITECTURE_NOT_SUPPORTED
    limits(capability=(7, 0)).check()


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, True),
        ({"capability": (8, 9)}, False),
        ({"version": 12020}, False),
        ({"version": 12030}, True),
        ({"switch": "0"}, False),
        ({"refuses_capture": True}, False),
        ({"refuses_launch": True}, False),
    ],
    ids=str,
)
def test_programmatic_launch_is_tried_before_it_is_used(
    device, runtime, monkeypatch, changes, wanted
):
    from pagedcache.backend.nvidia import device as room
    from pagedcache.status import LaunchError

    launched = []

    class Launch:
        def __init__(self, index, function, rows, threads, arguments, *, programmatic):
            assert programmatic

        def run(self, blocks, stream):
            assert runtime.calls[-1] == "begin_capture"
            if changes.get("refuses_launch"):
                raise LaunchError("launch", "refused")
            launched.append(stream)

    monkeypatch.setattr(room, "Launch", Launch)
    monkeypatch.setenv("PAGEDCACHE_PDL", changes.get("switch", ""))
    runtime.version = changes.get("version", 13000)
    runtime.refuses_capture = changes.get("refuses_capture", False)
    device.limits = limits(capability=changes.get("capability", (9, 0)))
    assert device._try_programmatic() is wanted
    assert runtime.mode == GLOBAL
    if wanted:
        assert launched == [7, 7]
        assert runtime.calls == ["begin_capture", "end_capture"]


def test_compiles_once_and_keeps_what_it_compiled(device, monkeypatch):
    from pagedcache.backend.nvidia import device as room

    asked, kernels = [], {}

    class Kernel:
        def __init__(self, ptr):
            self.ptr = ptr

    class Module:
        def __init__(self, *, code, options, name_expressions):
            asked.append((code, options, name_expressions))
            self.known = name_expressions

        def get_function(self, expression):
            assert expression in self.known
            kernel = Kernel(1000 * len(asked) + self.known.index(expression))
            kernels[kernel.ptr] = weakref.ref(kernel)
            return SimpleNamespace(kernel=kernel)

    monkeypatch.setattr(room.cupy, "RawModule", Module, raising=False)
    monkeypatch.setattr(device, "_try_programmatic", lambda: True)
    assert device.programmatic is None
    for _ in range(2):
        assert device.compile("common.cuh", ("one", "two")) == [1000, 1001]
    assert device._take_report == 1002
    assert device.programmatic is True
    for _ in range(2):
        assert device.compile("common.cuh", ("three",)) == [2000]
        assert device.compile("paged_caching.cuh", ("one", "two")) == [3000, 3001]
    assert [names for _, _, names in asked] == [("one", "two", TAKE), ("three", TAKE),
                                                ("one", "two", TAKE)]  # fmt: skip
    assert {options for _, options, _ in asked} == {("--std=c++17", "--fmad=false")}
    assert "#include" not in asked[2][0]
    assert device._take_report == 1002
    gc.collect()
    assert all(kernel() is not None for kernel in kernels.values())


@pytest.mark.parametrize(("text", "capability"), [("70", (7, 0)), ("90", (9, 0)), ("120", (12, 0))])
def test_what_a_device_says_about_itself(runtime, monkeypatch, text, capability):
    from pagedcache.backend.nvidia import device as room

    attributes = {
        "MultiProcessorCount": 132, "MaxThreadsPerBlock": 1024, "MaxGridDimX": 2**31 - 1,
        "MaxGridDimY": 65535, "MaxGridDimZ": 65535, "MaxBlockDimX": 512,
        "MaxThreadsPerMultiProcessor": 2048,
    }  # fmt: skip
    fake = SimpleNamespace(compute_capability=text, attributes=attributes)
    monkeypatch.setattr(room.cupy.cuda, "Device", lambda index: fake)
    monkeypatch.setattr(
        runtime, "getDeviceProperties", lambda index: {"name": b"NVIDIA Test"}, raising=False
    )
    assert room._query(0) == limits(capability)


def test_streams_of_other_libraries(device):
    of_torch = [SimpleNamespace(cuda_stream=2**40, device_index=index) for index in (0, 1)]
    assert device.stream(of_torch[0]) == 2**40
    with pytest.raises(ValueError, match="must be a stream on cuda:0, got one on cuda:1"):
        device.stream(of_torch[1])
    assert device.stream(type("", (), {"__cuda_stream__": lambda self: (0, 9)})()) == 9
    assert [device.stream(handle) for handle in (0, 1, 77)] == [0, 1, 77]
    assert device.stream(None) == 3
    for odd in (1.5, "x", object()):
        with pytest.raises(TypeError, match="stream must be None, a CuPy or PyTorch stream"):
            device.stream(odd)
