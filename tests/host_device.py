# SPDX-License-Identifier: Apache-2.0
"""A device that runs the real CUDA source, compiled by g++, on the calling thread.

It replaces a CudaDevice, for any operator: it compiles whatever source file and template instances
are asked for.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import pagedcache as pc
from pagedcache.backend.nvidia import parameters, source
from pagedcache.backend.nvidia.report import EMPTY, LastRow
from pagedcache.operators.paged_caching.info import REQUIRED

HERE = Path(__file__).parent
TAKE = "pagedcache::takeReport"


class Compiler:
    """Compiles CUDA source for the host into a folder, with PAGEDCACHE_HOST_FLAGS.

    Where threads meet, they do so in warps of NVIDIA's GPUs, or in AMD's waves of `wave` lanes.
    """

    def __init__(self, folder, wave=None, sources=None):
        self.folder = folder
        self.wave = wave
        self.sources = sources or source.folder()
        self.lock = threading.Lock()

    @functools.cache  # noqa: B019 - there is one per session
    def library(self, file, expressions, more=""):
        """Return a library with a function ``run_<number>`` for each expression."""
        path = Path(file)
        path = path if path.is_absolute() else self.sources / path
        lines = [f'#include "{HERE / "host_shim.h"}"', f'#include "{path}"', more]
        if self.wave:
            lines.insert(1, f'#include "{self.sources / "hip.cuh"}"')
        own = source.read(path).replace(source.read(self.sources / "common.cuh"), "")
        if self.wave or re.search(r"\b(ballot|exchanged|meet)\(", own):  # its threads meet
            lines.insert(0, "#define PAGEDCACHE_WARPS")
            if self.wave:
                lines.insert(0, f"#define PAGEDCACHE_WAVE {self.wave}")
        for number, expression in enumerate(expressions):
            lines.append(
                f'extern "C" void run_{number}(unsigned int blocks, unsigned int rows, '
                f"unsigned int threads, const void* parameters) {{\n"
                f"  launch({expression}, blocks, rows, threads, parameters);\n}}"
            )
        text = "\n".join([*lines, ""])
        flags = ["-std=c++17", "-Og", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
        flags += ["-ffp-contract=off"]  # each operation is rounded once
        flags += ["-fno-gnu-unique"]  # else libraries share what is static in functions of one name
        flags += ["-Wno-unknown-pragmas", "-Wno-unused-function"]  # for unroll; for the shim
        flags += os.environ.get("PAGEDCACHE_HOST_FLAGS", "").split()
        stem = self.folder / hashlib.sha256(" ".join([text, *flags]).encode()).hexdigest()[:16]
        stem.with_suffix(".cpp").write_text(text)
        program = [shutil.which("g++"), *flags, "-I", self.sources]
        program += [stem.with_suffix(".cpp"), "-o", stem.with_suffix(".so")]
        subprocess.run(program, check=True)
        library = ctypes.CDLL(str(stem.with_suffix(".so")))
        for number in range(len(expressions)):
            run = getattr(library, f"run_{number}")
            run.argtypes, run.restype = [ctypes.c_uint] * 3 + [ctypes.c_void_p], None
        return library

    def function(self, file, expression, text=""):
        """Return a function that launches a kernel, which is compiled when it is first called."""

        def run(*arguments):
            with self.lock:
                library = self.library(file, (expression,), text)
            library.run_0(*arguments)
            take_deadlocks = getattr(library, "take_deadlocks", lambda: 0)
            assert not take_deadlocks(), "a thread waited for one that does not come"

        return run


@dataclasses.dataclass
class FakeLimits:
    thread_class: int = 1024
    max_grid_x: int = 2**31 - 1
    multiprocessors: int = 4


class HostDevice:
    kind = "cuda"
    name = "cpu"  # where its arrays are

    def __init__(self, compiler, **limits):
        self.compiler = compiler
        self.limits = FakeLimits(**limits)
        self.kept = []
        self.launches = []  # of (expression, (blocks, rows), threads)

    def compile(self, file, expressions, text=""):
        return [
            (expression, self.compiler.function(file, expression, text))
            for expression in expressions
        ]

    def prepare(self, function, rows, threads, arguments):
        expression, run = function
        arguments = type(arguments).from_buffer_copy(arguments)

        def launch(blocks, stream):
            self.launches.append((expression, (blocks, rows), threads))
            run(blocks, rows, threads, ctypes.addressof(arguments))

        pack = functools.partial(parameters.packer(type(arguments)), arguments, 0)
        return SimpleNamespace(pack=pack, run=launch)

    def resident(self, data):
        held = ctypes.create_string_buffer(data, len(data))
        self.kept.append(held)
        return ctypes.addressof(held)

    def current_stream(self):
        return 0

    def stream(self, stream):
        return 0

    def capturing(self, stream):
        return False

    def read(self, address, size, stream):
        return np.frombuffer(ctypes.string_at(address, size), np.uint8)

    def report(self, *, read=True):
        return HostReport(self.compiler)


class HostReport:
    """A report in host memory, taken by the real kernel."""

    def __init__(self, compiler):
        kind = parameters.structure(source.read("common.cuh"), "TakeReportParameters")
        self.words = (ctypes.c_int64 * 8)(*EMPTY, *EMPTY)
        self.address = ctypes.addressof(self.words)
        self.streams = {}
        self._last = LastRow()
        self._run = compiler.function("common.cuh", TAKE)
        self._arguments = kind()
        parameters.packer(kind)(self._arguments, 0, self.address, self.address + 32)

    def note(self, stream):
        self.streams[stream] = None

    def take(self):
        self._run(1, 1, 1, ctypes.addressof(self._arguments))
        self.streams.clear()
        count, _, row, value = self.words[4:]
        return self._last.read(count, row, value)


def descriptor_on(device, case, **options):
    """Return a descriptor for a case on a HostDevice."""
    described = dict(zip(REQUIRED, described_by(case), strict=True))
    info = pc.PagedCachingInfo.create(*described.values(), layout=case.layout)
    return pc.Descriptor(info, info.rules.expected(described), device, **options)


def described_by(case):
    """Return the tensor descriptors of a case."""
    recipes = (case.recipe[name] for name in REQUIRED)
    return [pc.TensorDescriptor(dtype, shape, strides) for dtype, _, shape, strides in recipes]
