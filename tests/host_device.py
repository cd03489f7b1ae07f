"""A device that runs the real kernel source, compiled by g++, on the calling thread."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import pagedcache as pc
from pagedcache.backend.nvidia import paged_caching as nvidia
from pagedcache.backend.nvidia import source
from pagedcache.interface.checks import Checked


def build(folder):
    """Compile the kernel for the host, with PAGEDCACHE_HOST_FLAGS, into a library."""
    built = folder / "kernel.so"
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas"]  # unroll
    flags += os.environ.get("PAGEDCACHE_HOST_FLAGS", "").split()
    here = Path(__file__).parent / "host_kernel.cpp"
    program = [shutil.which("g++"), *flags, "-I", source.folder(), here, "-o", built]
    subprocess.run(program, check=True)
    library = ctypes.CDLL(str(built))
    library.run.argtypes = [ctypes.c_int] * 3 + [ctypes.c_uint] * 3 + [ctypes.c_void_p]
    library.parameters_size.restype = ctypes.c_size_t
    library.divide.restype = ctypes.c_uint32
    library.divide.argtypes = [ctypes.c_uint32, ctypes.c_uint64, ctypes.c_uint64]
    return library


@dataclasses.dataclass
class FakeLimits:
    thread_class: int = 1024
    max_grid_x: int = 2**31 - 1
    multiprocessors: int = 4


class HostDevice:
    """Stands where a CudaDevice stands, and runs each launch on the calling thread."""

    name = "cpu"

    def __init__(self, library, **limits):
        self.shim = library
        self.limits = FakeLimits(**limits)
        self.launches = []

    def compile(self, file, expressions):
        assert file == "paged_caching.cuh"
        return [self.parse(expression) for expression in expressions]

    @staticmethod
    def parse(expression):
        match = re.fullmatch(
            r"pagedcache::pagedCaching<pagedcache::(B?F\d\d), (int|long long), (\d+)>", expression
        )
        dtype = ("F16", "BF16", "F32").index(match[1])
        return dtype, 4 if match[2] == "int" else 8, int(match[3])

    def stream(self, stream):
        return 0

    def prepare(self, function, rows, threads, words):
        words = (ctypes.c_uint64 * len(words))(*words)
        assert ctypes.sizeof(words) == self.shim.parameters_size()

        def run(blocks, stream):
            self.launches.append((function, (blocks, rows), threads))
            assert self.shim.run(*function, blocks, rows, threads, words) == 0

        return SimpleNamespace(words=words, run=run)

    def current_stream(self):
        return 0

    def capturing(self, stream):
        return False

    def wait(self, stream):
        pass

    def read(self, address, size, stream):
        return np.frombuffer(ctypes.string_at(address, size), np.uint8)

    def record(self, empty):
        return HostRecord(empty)


class HostRecord:
    """Stands where a Record stands."""

    def __init__(self, empty):
        self._empty = empty
        self._words = (ctypes.c_int64 * len(empty))(*empty)
        self.address = ctypes.addressof(self._words)

    def read(self):
        return list(self._words)

    def clear(self):
        self._words[:] = self._empty


def descriptor_on(device, case, *, raising=False, debug=False):
    """Return a descriptor for a case on a HostDevice."""
    info = info_of(case)
    if raising or debug:
        make = lambda: nvidia.PagedCaching(info, device)  # noqa: E731
        checked = Checked(make, device, info, raising=raising, debug=debug)
        return pc.Descriptor(info, "cpu", checked)
    return pc.Descriptor(info, "cpu", nvidia.PagedCaching(info, device))


def info_of(case):
    names = ("k_cache", "v_cache", "k", "v", "slot_mapping")
    described = []
    for name in names:
        dtype, _, shape, strides = case.recipe[name]
        described.append(pc.TensorDescriptor(dtype, shape, strides))
    return pc.PagedCachingInfo.create(*described, layout=case.layout)
