# SPDX-License-Identifier: Apache-2.0
"""What goes wrong around a write: no driver, no room, no NVRTC, forks, other people's errors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import pagedcache as pc
from pagedcache import infiniop
from pagedcache.backend.nvidia import driver, fork
from pagedcache.operators.paged_caching import nvidia as nvidia_paged_caching
from pagedcache.status import Status


def python(program, timeout=None, **environment):
    """Run a program in a process of its own; ``None`` takes a variable out of its environment."""
    variables = {**os.environ, **environment}
    # From Python 3.12 on, a fork warns if there are threads, which NumPy's BLAS may have started.
    quiet = ["-W", "ignore:This process:DeprecationWarning"]
    return subprocess.run(
        [sys.executable, *quiet, "-c", program], capture_output=True, text=True, check=False,
        env={name: value for name, value in variables.items() if value is not None},
        cwd=Path(__file__).parents[1], timeout=timeout,
    )  # fmt: skip


def test_import_takes_neither_cupy_nor_cuda():
    done = python(
        "import sys, pagedcache, pagedcache.infiniop\n"
        "pagedcache.Handle('cpu')\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('cupy', 'cuda', 'cupy_backends')])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_no_cupy():
    done = python(
        "import sys; sys.modules['cupy'] = None\n"
        "import pagedcache as pc\n"
        "from pagedcache.backend import nvidia\n"
        "print(pc.Handle().device)\n"
        "nvidia._check_driver = lambda: None\n"
        "try: pc.Handle('cuda')\n"
        "except pc.PagedCacheError as e: print(e.status.name, isinstance(e, ImportError), e)\n"
        "print(pc.infiniop.infiniopCreateHandle(1, 0)[0].name)"
    )
    assert done.stderr == ""
    cpu, error, status = done.stdout.splitlines()
    assert cpu == "cpu"
    assert error.startswith(
        "DEVICE_NOT_INITIALIZED True backend cuda needs CuPy (install pagedcache"
    )
    assert status == "DEVICE_NOT_INITIALIZED"


@pytest.fixture
def nvidia():
    from pagedcache.backend import nvidia

    functions = (nvidia._check_driver, nvidia._count_devices, nvidia._check_nvrtc, nvidia._open)
    for function in functions:
        function.cache_clear()
    yield nvidia
    for function in functions:
        function.cache_clear()


def test_no_driver(monkeypatch, nvidia):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    monkeypatch.setattr(driver, "library", driver.library.__wrapped__)
    with pytest.raises(RuntimeError, match=r"needs the NVIDIA driver.*libcuda") as caught:
        pc.Handle("cuda")
    assert caught.value.status == Status.DEVICE_NOT_INITIALIZED
    assert infiniop.infiniopCreateHandle(infiniop.InfiniDevice.NVIDIA, 0) == (
        Status.DEVICE_NOT_INITIALIZED, None,
    )  # fmt: skip
    assert not pc.backends()["cuda"].usable
    assert pc.Handle().device == "cpu"


@pytest.mark.parametrize(
    ("code", "status", "words"),
    [
        (3, Status.DEVICE_NOT_INITIALIZED, "was forked after CUDA was initialized.*'spawn'"),
        (35, Status.DEVICE_NOT_INITIALIZED, "needs a newer NVIDIA driver"),
        (100, Status.DEVICE_NOT_FOUND, "found no usable GPU"),
    ],
)
def test_no_usable_gpu(monkeypatch, nvidia, code, status, words):
    class Error(RuntimeError):
        status = code

    class Runtime:
        CUDARuntimeError = Error

        def getDeviceCount(self):  # noqa: N802
            raise Error("cudaErrorWhatever")

    fake = SimpleNamespace(cuda=SimpleNamespace(runtime=Runtime()))
    monkeypatch.setattr(nvidia, "_check_driver", lambda: None)
    monkeypatch.setattr(nvidia, "import_cupy", lambda: fake)
    with pytest.raises(RuntimeError, match=words) as caught:
        pc.Handle("cuda")
    assert caught.value.status == status
    # pytest undoes this after the fixture looked for the caches
    monkeypatch.undo()


def test_no_nvrtc(monkeypatch, nvidia):
    cupy = pytest.importorskip("cupy")

    class Missing:
        def getVersion(self):  # noqa: N802
            raise RuntimeError("libnvrtc was not found")

    monkeypatch.setattr(nvidia, "_check_driver", lambda: None)
    monkeypatch.setattr(nvidia, "_count_devices", lambda: 1)
    monkeypatch.setattr(cupy.cuda, "nvrtc", Missing())
    with pytest.raises(ImportError, match=r"needs NVRTC .*libnvrtc was not found") as caught:
        pc.Handle("cuda")
    assert caught.value.status == Status.DEVICE_NOT_INITIALIZED
    monkeypatch.undo()


def test_a_cache_folder_that_cannot_be_written():
    pytest.importorskip("cupy")
    done = python(
        "import pagedcache as pc\n"
        "from pagedcache.backend import nvidia\n"
        "nvidia._check_driver = lambda: None\n"
        "try: pc.Handle('cuda')\n"
        "except pc.PagedCacheError as e: print(e.status.name, e)\n"
        "print(pc.Handle('cpu').device)",
        CUPY_CACHE_DIR="/proc/nowhere",
    )
    assert done.stderr == ""
    error, cpu = done.stdout.splitlines()
    assert error.startswith("DEVICE_NOT_INITIALIZED backend cuda needs a cache folder for CuPy")
    assert cpu == "cpu"


# CuPy's own compiler and cache, on a machine without a GPU: only loading is left out.
COMPILE = """
import sys
from cupy.cuda import compiler
from pagedcache.backend.nvidia import source
from pagedcache.operators.paged_caching import nvidia as paged_caching
class Module:
    def load(self, cubin):
        assert cubin.startswith(b"\\x7fELF"), cubin[:4]
    def _set_mapping(self, mapping):
        self.mapping = mapping
compiler.function.Module = Module
compiler._get_arch_for_options_for_nvrtc = lambda arch: ("-arch=sm_" + arch, "cubin")
names = (paged_caching.instance("bfloat16", "int64", 16, True),)
def compile():
    return compiler._compile_with_cache_cuda(
        source.read(paged_caching.FILE), ("--std=c++17",), "90", name_expressions=names)
"""


def cached(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".cubin")


def test_a_truncated_file_in_the_cache_is_compiled_again(tmp_path):
    pytest.importorskip("cupy")
    program = COMPILE + "compile(); print('compiled')"
    done = python(program, CUPY_CACHE_DIR=str(tmp_path))
    assert (done.stdout.strip(), done.stderr) == ("compiled", "")
    [file] = cached(tmp_path)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:-1] + b"\0" + whole[-1:]):
        file.write_bytes(damaged)
        done = python(program, CUPY_CACHE_DIR=str(tmp_path))
        assert (done.stdout.strip(), done.stderr) == ("compiled", "")
        assert cached(tmp_path) == [file]
        again = file.read_bytes()
        assert again != damaged
        assert hashlib.sha1(again[40:]).hexdigest().encode() == again[:40]


def test_two_processes_compile_at_once(tmp_path):
    pytest.importorskip("cupy")
    program = COMPILE + "compile(); compile(); print('compiled')"
    several = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "CUPY_CACHE_DIR": str(tmp_path)},
        )
        for _ in range(3)
    ]  # fmt: skip
    for process in several:
        assert process.communicate() == ("compiled\n", "")
    assert len(cached(tmp_path)) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def device(monkeypatch):
    """A CudaDevice that was never opened: all of CUDA behind it is replaced by tests."""
    cupy = pytest.importorskip("cupy")
    from pagedcache.backend.nvidia import device as room

    monkeypatch.setattr(cupy.cuda, "Device", Anything)
    monkeypatch.setattr(driver, "library", lambda: Anything())
    limits = room.Limits("NVIDIA Test", (9, 0), 132, 1024, 2**31 - 1)
    monkeypatch.setattr(room, "_query", lambda index: limits)
    made = room.CudaDevice(0)
    monkeypatch.setattr(made, "current_stream", lambda: 0)
    monkeypatch.setattr(made, "capturing", lambda stream: False)
    return made


class Anything:
    """Stands where a cupy.cuda.Device or the driver stands."""

    def __init__(self, *_):
        pass

    def cuThreadExchangeStreamCaptureMode(self, mode):  # noqa: N802
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_a_cache_that_is_full(device, monkeypatch):
    """CuPy compiles, and then cannot write the result."""
    import cupy

    class Module:
        def __init__(self, **_):
            pass

        def get_function(self, name):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(cupy, "RawModule", Module)
    with pytest.raises(RuntimeError, match=r"CuPy cannot keep it; set CUPY_CACHE_DIR .*No space"):
        device.compile(nvidia_paged_caching.FILE, ("x",))


def test_a_full_cache_is_what_cupy_says_it_is(tmp_path):
    """The error that the test above makes up is the one that CuPy lets through."""
    pytest.importorskip("cupy")
    program = COMPILE + (
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: compile()\n"
        "except OSError as error: print('OSError', error)"
    )
    done = python(program, CUPY_CACHE_DIR=str(tmp_path))
    assert done.stdout.startswith("OSError"), done.stderr


def test_a_kernel_that_does_not_compile(device, monkeypatch):
    import cupy
    from cupy.cuda.compiler import CompileException

    class Module:
        def __init__(self, **_):
            pass

        def get_function(self, name):
            raise CompileException("kernel.cu(3): error: it is wrong", "", "kernel.cu", ())

    monkeypatch.setattr(cupy, "RawModule", Module)
    with pytest.raises(RuntimeError, match="does not compile for NVIDIA Test, sm_90") as caught:
        device.compile(nvidia_paged_caching.FILE, ("x",))
    assert "kernel.cu(3): error: it is wrong" in str(caught.value)
    assert caught.value.status == Status.INTERNAL_ERROR


def test_nothing_is_compiled_while_a_stream_is_captured(device, monkeypatch):
    monkeypatch.setattr(device, "capturing", lambda stream: True)
    with pytest.raises(NotImplementedError, match=r"paged_caching.cuh .* pagedcache.warmup\(\)"):
        device.compile(nvidia_paged_caching.FILE, ("x",))
    device._compiled[nvidia_paged_caching.FILE, ("x",), ""] = [SimpleNamespace(ptr=5)] * 2
    assert device.compile(nvidia_paged_caching.FILE, ("x",)) == [5]


class DriverError(RuntimeError):
    def __init__(self, status, name):
        super().__init__(f"{name}: it failed")
        self.status = status


@pytest.fixture
def launch(monkeypatch):
    """Return a function that makes a launch which the driver refuses with a status."""
    pytest.importorskip("cupy")
    from pagedcache.backend.nvidia import launch as room

    def refused(status, name):
        fake = SimpleNamespace(
            CUDADriverError=lambda status: DriverError(status, name), ctxGetCurrent=lambda: 1
        )
        monkeypatch.setattr(room, "driver", fake)
        monkeypatch.setattr(
            room,
            "runtime",
            SimpleNamespace(
                getDevice=lambda: 0, getDeviceCount=lambda: 1, CUDARuntimeError=DriverError
            ),
        )
        refusing = SimpleNamespace(cuLaunchKernelEx=lambda *_: status)
        monkeypatch.setattr(room, "library", lambda: refusing)
        words = type("Words", (ctypes.Structure,), {"_fields_": [("at", ctypes.c_void_p)]})
        whole = type("Whole", (ctypes.Structure,), {"_fields_": [("call", words)]})
        return room.Launch(0, 1, 1, 64, whole(), programmatic=True)

    return refused


def test_an_error_that_another_kernel_left(launch):
    with pytest.raises(RuntimeError) as caught:
        launch(700, "CUDA_ERROR_ILLEGAL_ADDRESS").run(1, 0)
    words = str(caught.value)
    assert "refused because work that was queued before it failed" in words
    assert "CUDA_ERROR_ILLEGAL_ADDRESS" in words
    assert "so start a new one" in words
    with pytest.raises(RuntimeError, match="launch on cuda:0 failed: CUDA_ERROR_INVALID_VALUE"):
        launch(1, "CUDA_ERROR_INVALID_VALUE").run(1, 0)


def test_a_launch_in_a_forked_process(launch, monkeypatch):
    ready = launch(3, "CUDA_ERROR_NOT_INITIALIZED")
    with pytest.raises(RuntimeError, match="launch on cuda:0 failed"):
        ready.run(1, 0)
    monkeypatch.setattr(fork, "_user", os.getpid() + 1)
    with pytest.raises(RuntimeError, match=r"that was forked after CUDA.*'spawn'"):
        ready.run(1, 0)


def test_a_forked_process_is_told_so():
    program = (
        "import os, pagedcache as pc\n"
        "from pagedcache.backend.nvidia import fork\n"
        "fork.note_use()\n"
        "if child := os.fork():\n"
        "    os.waitpid(child, 0)\n"
        "else:\n"
        "    try: pc.Handle('cuda')\n"
        "    except pc.PagedCacheError as e: print(e.status.name, e)\n"
        "    print(pc.infiniop.infiniopCreateHandle(1, 0)[0].name, pc.Handle().device)\n"
    )
    done = python(program)
    assert done.stderr == ""
    error, status = done.stdout.splitlines()
    assert error.startswith("DEVICE_NOT_INITIALIZED backend cuda cannot be used in a process that")
    assert "'spawn'" in error
    assert status == "DEVICE_NOT_INITIALIZED cpu"


def test_the_cpu_backend_survives_a_fork():
    done = python(
        "import os, sys; sys.path.insert(0, 'tests')\n"
        "import pagedcache as pc\n"
        "from layouts import expected, same, simple_case\n"
        "case = simple_case()\n"
        "wanted = expected(case)\n"
        "descriptor = pc.Descriptor.create(*case.arrays())\n"
        "descriptor.calculate(*case.arrays())\n"
        "child = os.fork()\n"
        "case.buffers['k_cache'][...] = wanted['k_cache'][...] = 0\n"
        "wanted = expected(case)\n"
        "descriptor.calculate(*case.arrays())\n"
        "pc.paged_caching(*case.arrays())\n"
        "same(case, wanted)\n"
        "if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n",
    )
    assert (done.returncode, done.stderr) == (0, "")


LOCKS_IN_A_FORK = """
import os, sys, threading
sys.path.insert(0, "tests")
import pagedcache as pc
from layouts import expected, same, simple_case
from pagedcache import locks
from pagedcache.operators.paged_caching import one_call
case = simple_case()
case.views["slot_mapping"][0] = 99
descriptor = pc.Descriptor.create(*case.arrays())
pc.paged_caching(*case.arrays())
held = list(locks._locks)
assert any(lock is one_call._kept._lock for lock in held), "the lock of the one-call form"
assert any(lock is descriptor._report._lock for lock in held), "the lock of a report"
ready, done = threading.Event(), threading.Event()
def hold():
    for lock in held:
        lock.__enter__()
    ready.set()
    done.wait()
thread = threading.Thread(target=hold, daemon=True)
thread.start()
ready.wait()
if child := os.fork():
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done.set()
    sys.exit(status)
wanted = expected(case)
descriptor.calculate(*case.arrays())
try: descriptor.check()
except pc.InvalidSlotError as error: print(error.count)
larger = simple_case(heads=5)
pc.paged_caching(*larger.arrays())  # needs a new descriptor
same(case, wanted)
sys.stdout.flush()
os._exit(0)
"""


def test_locks_that_are_held_in_a_fork_are_free_in_the_child():
    done = python(LOCKS_IN_A_FORK, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_an_interrupt_leaves_no_lock_held():
    """Ctrl-C may come at any point of a block that holds a lock."""
    done = python(
        "import signal\n"
        "from pagedcache.locks import make_lock\n"
        "lock, interrupts = make_lock(), 0\n"
        "def interrupt(*_): raise KeyboardInterrupt\n"
        "signal.signal(signal.SIGALRM, interrupt)\n"
        "while interrupts < 2000:\n"
        "    try:\n"
        "        signal.setitimer(signal.ITIMER_REAL, 2e-5)\n"
        "        while True:\n"
        "            with lock: pass\n"
        "    except KeyboardInterrupt: interrupts += 1\n"
        "    if lock.locked(): break\n"
        "print(interrupts, lock.locked())",
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("2000 False\n", "")


def test_a_home_that_cannot_be_written():
    pytest.importorskip("cupy")
    done = python(
        "import pagedcache as pc\n"
        "from pagedcache.backend import nvidia\n"
        "nvidia._check_driver = lambda: None\n"
        "try: pc.Handle('cuda')\n"
        "except pc.PagedCacheError as e: print(e.status.name, e)\n"
        "print(pc.Handle('cpu').device)",
        HOME="/proc/nowhere",
        CUPY_CACHE_DIR=None,
    )
    assert done.stderr == ""
    error, cpu = done.stdout.splitlines()
    assert error.startswith("DEVICE_NOT_INITIALIZED backend cuda needs a cache folder for CuPy")
    assert "CUPY_CACHE_DIR" in error
    assert cpu == "cpu"
