# SPDX-License-Identifier: Apache-2.0
"""Plant faults, one at a time, and see whether the tests find them.

    python tests/planted_faults.py [--jobs N] [--gpu] [--list] [name ...]

Each fault is one edit that a refactoring could slip in. It is made in a temporary copy of the
checkout, where the tests that should find it are run. The tests need no GPU, but g++, CuPy with
NVRTC, and PyTorch; with ``--gpu``, the faults are those that only a GPU finds. pytest does not
collect this file.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).resolve().parents[1]
TIME_LIMIT = 240  # seconds for one fault; a test that hangs has found it

FOUND, HANGS, NOT_FOUND, DOES_NOT_APPLY = "found", "found (hangs)", "NOT FOUND", "DOES NOT APPLY"

# Tests that serve for many faults, as pytest names them in the folder of the tests.
HOST = "test_kernel_on_host.py::"
DEFINITION = f"{HOST}test_kernel_writes_what_the_definition_says"
FORMATS = "test_formats.py::"
BY_DEFINITION = f"{FORMATS}test_cpu_does_what_the_definition_says"
AS_ON_CPU = f"{FORMATS}test_the_kernel_does_what_the_cpu_does"
IN_PARTS = f"{FORMATS}test_a_thread_with_several_parts"
SM_90 = "test_kernel_compiles.py::test_every_instance_compiles[90]"
SLOTS = "test_invalid_slots.py"
ARRAYS, BAD_INPUT, DEVICE = "test_arrays.py", "test_bad_input.py::test_arrays", "test_device.py"
CPU = "test_cpu.py::test_writes_what_the_definition_says"
TORCH, REGISTRY, LAUNCH = "test_torch.py", "test_registry.py", "test_launch.py"

# Files that many faults are in.
STORING, GATHER = "cuda_src/paged_storing.cuh", "cuda_src/paged_gather.cuh"
CONVERSIONS, CACHE = "cuda_src/formats.cuh", "pagedcache/cache"
KERNEL, COMMON = "cuda_src/paged_caching.cuh", "cuda_src/common.cuh"
NVIDIA = "pagedcache/operators/paged_caching/nvidia.py"
ON_CPU = "pagedcache/cache/cpu.py"
BACKEND = "pagedcache/backend/nvidia"
EXPRESSIONS, LANGUAGE = "pagedcache/expressions", "cuda_src/expressions.cuh"
STEPS_CUDA, PROGRAMMED = "cuda_src/steps.cuh", "cuda_src/programmed.cuh"
STEPS, PROGRAMS = "pagedcache/steps", "pagedcache/operators/programs"
WRITES = "test_programs_on_host.py::test_random_writes"
READS = "test_programs_on_host.py::test_random_reads"
SLOT_KERNEL, BLOCK_KERNEL = "cuda_src/slot_mapping.cuh", "cuda_src/block_copy.cuh"
SLOT_TESTS, BLOCK_TESTS = "test_slot_mapping.py::", "test_blocks.py::"
KV_CACHE, KV_TESTS, POOL = "pagedcache/kv_cache.py", "test_kv_cache.py::", "pagedcache/pool"
TRANSFER, TRANSFER_TESTS = "pagedcache/transfer", "test_transfer.py::"
OPERATORS, ARRAY_LIBRARIES = "pagedcache/operators", "pagedcache/arrays"


class Fault(NamedTuple):
    """One edit, and the tests that should fail because of it.

    Attributes
    ----------
    name : str
    file : str
        Relative to the checkout.
    old, new : str
        Text that must occur exactly once in the file, and what replaces it.
    tests : tuple of str
        Test files, or tests as ``file::test``, in the folder of the tests.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # The kernel
    Fault(
        "the kernel does not wait for the kernel ahead",
        KERNEL,
        "  waitForKernelAhead();\n",
        "",
        (SM_90,),
    ),
    Fault(
        "a prefetch reads what the kernel ahead may still write",
        COMMON,
        'asm volatile("prefetch.global.L2 [%0];"',
        'asm volatile("{.reg .u16 x; ld.global.u16 x, [%0];}"',
        (SM_90,),
    ),
    Fault(
        "every kernel lets the next one start at once",
        KERNEL,
        "  if (kAhead) letNextKernelStart();",
        "  letNextKernelStart();",
        (SM_90,),
    ),
    Fault(
        "a kernel that gets ahead starts the next one after its wait",
        KERNEL,
        "  if (kAhead) letNextKernelStart();",
        "  if (!kAhead) letNextKernelStart();",
        (SM_90,),
    ),
    Fault("V is not prefetched", KERNEL, "    if (has_v) prefetch(v_at);\n", "", (SM_90,)),
    Fault(
        "the slot just past the end is written",
        KERNEL,
        "static_cast<unsigned long long>(slot) < p.num_slots",
        "static_cast<unsigned long long>(slot) <= p.num_slots",
        (DEFINITION, SLOTS),
    ),
    Fault(
        "negative slots are written",
        KERNEL,
        "static_cast<unsigned long long>(slot) < p.num_slots",
        "slot < static_cast<long long>(p.num_slots)",
        (DEFINITION,),
    ),
    Fault(
        "V goes to the heads of K",
        KERNEL,
        "head * p.v_to.head_stride",
        "head * p.k_to.head_stride",
        (DEFINITION,),
    ),
    Fault(
        "blocks are not stepped over in V",
        KERNEL,
        "block * p.v_to.block_step",
        "block * p.k_to.block_step",
        (DEFINITION,),
    ),
    Fault(
        "both rows of blocks copy K",
        KERNEL,
        "has_k = first_row && in_row",
        "has_k = in_row",
        (f"{HOST}test_one_row_of_blocks_copies_k_and_the_other_v",),
    ),
    Fault(
        "both rows of blocks report",
        KERNEL,
        "first_of_token = first_row && in_row",
        "first_of_token = in_row",
        (DEFINITION,),
    ),
    Fault(
        "the vectors behind a shorter row of V are written",
        KERNEL,
        "last_row && in_row < p.v_vectors",
        "last_row",
        (DEFINITION,),
    ),
    Fault(
        "the heads of a tile are counted from its tokens",
        KERNEL,
        "const unsigned int head = in_tile >> shift;",
        "const unsigned int head = in_tile / p.tile_rows;",
        (DEFINITION,),
    ),
    Fault(
        "a tile that is not full is written past its tokens",
        KERNEL,
        "if (token >= p.call.tokens) return;",
        "if (tile << shift >= p.call.tokens) return;",
        (DEFINITION, f"{HOST}test_tiles"),
    ),
    Fault(
        "offsets in a cache have 32 bits",
        KERNEL,
        "to * p.k_to.slot_stride + block * p.k_to.block_step;",
        "static_cast<int>(to * p.k_to.slot_stride + block * p.k_to.block_step);",
        (f"{HOST}test_caches_past_4_gib",),
    ),
    Fault(
        "a second launch reports its own tokens",
        KERNEL,
        "p.first_token + token",
        "token",
        (f"{SLOTS}::test_a_call_that_takes_several_launches",),
    ),
    Fault(
        "the slot just past the end is not reported",
        KERNEL,
        "slot >= static_cast<long long>(p.num_slots)",
        "slot > static_cast<long long>(p.num_slots)",
        (SLOTS,),
    ),
    Fault(
        "a divisor is shifted by one bit less",
        COMMON,
        "                                     shift);",
        "                                     (shift - 1));",
        (f"{HOST}test_division_is_exact",),
    ),
    Fault(
        "a report keeps the latest row",
        COMMON,
        "      if (row >= *lowest) return;\n      *lowest = row;",
        "      *lowest = row < *lowest ? row - 1 : row;",
        (SLOTS,),
    ),
    Fault(
        "a report counts each row twice",
        COMMON,
        "atomicAdd(&to->count, 1ULL);",
        "atomicAdd(&to->count, 2ULL);",
        (SLOTS,),
    ),
    Fault(
        "a report that is taken is not cleared",
        COMMON,
        "to->count = atomicExch(&from->count, 0ULL);",
        "to->count = from->count;",
        (SLOTS,),
    ),
    Fault(
        "a row that is not counted yet is lost",
        COMMON,
        "if (to->count != 0) *row = kNoRow;",
        "*row = kNoRow;",
        (f"{HOST}test_a_row_that_is_not_counted_yet_stays",),
    ),
    Fault(
        "invalid slots are not counted one at a time",
        COMMON,
        "atomicAdd(&to->count, 1ULL);",
        "to->count += 1;",
        (SM_90,),
    ),
    Fault(
        "the lock of a report locks nobody out",
        COMMON,
        "if (atomicCAS(lock, 0ULL, 1ULL) != 0) return false;",
        "*lock = 1;",
        (SM_90,),
    ),
    # What a launch is made of
    Fault(
        "K and V are packed in the wrong order",
        NVIDIA,
        "launch.pack(k, v, slots, tokens, k_cache, v_cache)",
        "launch.pack(v, k, slots, tokens, k_cache, v_cache)",
        (DEFINITION,),
    ),
    Fault(
        "a bound write packs the caches in the wrong order",
        NVIDIA,
        "launch.pack(k, v, slots, rows, k_cache, v_cache)",
        "launch.pack(k, v, slots, rows, v_cache, k_cache)",
        (f"{HOST}test_bound_writes",),
    ),
    Fault(
        "a bound write of many tokens makes one launch",
        f"{BACKEND}/plans.py",
        "        if rows > kernel.most_rows:\n",
        "        if False:\n",
        (f"{HOST}test_bound_writes",),
    ),
    Fault(
        "the last tile has no threads",
        f"{BACKEND}/plans.py",
        "-(-(-(-rows // self._tile) * self._per_tile) // self.threads)",
        "-(-(rows // self._tile * self._per_tile) // self.threads)",
        (DEFINITION, f"{HOST}test_tiles"),
    ),
    Fault(
        "the last block of threads is missing",
        f"{BACKEND}/plans.py",
        "-(-(-(-rows // self._tile) * self._per_tile) // self.threads)",
        "max(-(-rows // self._tile) * self._per_tile // self.threads, 1)",
        (DEFINITION,),
    ),
    Fault(
        "the width does not depend on the heads of V",
        NVIDIA,
        "        info.v_head_stride,\n",
        "",
        (f"{HOST}test_widest_access_that_strides_allow",),
    ),
    Fault(
        "the width does not depend on the slots of the K cache",
        NVIDIA,
        "        info.k_cache_slot_stride,\n",
        "",
        (f"{HOST}test_widest_access_that_strides_allow",),
    ),
    Fault(
        "the width does not depend on the address of V",
        NVIDIA,
        "(k_cache | v_cache | k | v) & self._mask",
        "(k_cache | v_cache | k) & self._mask",
        (f"{HOST}test_addresses_that_need_a_narrower_access_after_others",),
    ),
    Fault(
        "misaligned slots are refused by the first call only",
        NVIDIA,
        " or slots & self._slot_mask",
        "",
        (f"{HOST}test_misaligned_addresses_are_refused_after_others",),
    ),
    Fault(
        "a narrow launch is kept for addresses that are aligned",
        NVIDIA,
        "self._plans if kernel is self._widest else None",
        "self._plans",
        (f"{HOST}test_addresses_that_need_a_narrower_access_after_others",),
    ),
    Fault(
        "the second part of a call reads the slots of the first",
        NVIDIA,
        "slots_at = slots + done * self._slot_size",
        "slots_at = slots",
        (DEFINITION,),
    ),
    Fault(
        "a block's step contains its slots",
        NVIDIA,
        "block - info.block_size * slot, head",
        "block, head",
        (DEFINITION,),
    ),
    Fault(
        "an implementation with another report keeps the launches of the first",
        f"{BACKEND}/plans.py",
        "        other._report_to(report)\n",
        "        other._report, other._streams = report, report.streams\n",
        (SLOTS,),
    ),
    Fault(
        "more slots than the kernel counts are accepted",
        NVIDIA,
        "if info.num_slots > MOST:",
        "if info.num_slots > 2 * MOST:",
        (f"{HOST}test_more_slots_than_the_kernel_counts_are_refused",),
    ),
    Fault(
        "a new number of blocks is not handed to the driver",
        f"{BACKEND}/launch.py",
        "config.grid_x = latest_blocks = blocks",
        "latest_blocks = blocks",
        (LAUNCH,),
    ),
    Fault(
        "a new stream is not handed to the driver",
        f"{BACKEND}/launch.py",
        "config.stream = latest_stream = ",
        "latest_stream = ",
        (LAUNCH,),
    ),
    Fault(
        "the rows of a grid are its third axis",
        f"{BACKEND}/launch.py",
        "1, rows, 1, threads, 1, 1, 0, None",
        "1, 1, rows, threads, 1, 1, 0, None",
        (LAUNCH,),
    ),
    Fault(
        "a launch asks for another attribute",
        f"{BACKEND}/launch.py",
        "_PROGRAMMATIC_STREAM_SERIALIZATION = 6",
        "_PROGRAMMATIC_STREAM_SERIALIZATION = 7",
        (LAUNCH,),
    ),
    Fault(
        "every launch is programmatic",
        f"{BACKEND}/launch.py",
        "int(programmatic)\n",
        "1\n",
        (LAUNCH,),
    ),
    Fault(
        "launches share their parameters",
        f"{BACKEND}/launch.py",
        "self._parameters = type(parameters).from_buffer_copy(parameters)",
        "self._parameters = parameters",
        (LAUNCH,),
    ),
    Fault(
        "a thread that never used CUDA cannot launch",
        f"{BACKEND}/launch.py",
        "                runtime.setDevice(self._device)  # which makes one current\n",
        "",
        (LAUNCH,),
    ),
    Fault(
        "a launch goes to the current device",
        f"{BACKEND}/launch.py",
        "self._queue if runtime.getDeviceCount() == 1 else self._queue_on_its_device",
        "self._queue",
        (LAUNCH,),
    ),
    Fault(
        "a C struct is read without its pointers",
        f"{BACKEND}/parameters.py",
        "            fields.append((member, ctypes.c_void_p))\n",
        "            fields.append((member, ctypes.c_uint))\n",
        (DEFINITION, "test_parameters.py"),
    ),
    Fault(
        "members of an unknown kind are left out",
        f"{BACKEND}/parameters.py",
        "        if match is None or (",
        "        if fields is None or (",
        ("test_parameters.py",),
    ),
    Fault(
        "padding of a C struct is not noticed",
        f"{BACKEND}/parameters.py",
        "if packed.size != ctypes.sizeof(call):",
        "if packed.size > ctypes.sizeof(call):",
        ("test_parameters.py",),
    ),
    Fault(
        "a file is included as often as it is named",
        f"{BACKEND}/source.py",
        "        if path in seen:\n",
        "        if False:\n",
        ("test_parameters.py",),
    ),
    Fault(
        "a file beside the one that includes it is not looked for",
        f"{BACKEND}/source.py",
        "return own if own.exists() else folder() / name",
        "return folder() / name",
        ("test_parameters.py",),
    ),
    # Devices
    Fault(
        "compute capability 6 is accepted",
        f"{BACKEND}/device.py",
        "LOWEST_CAPABILITY = (7, 0)",
        "LOWEST_CAPABILITY = (6, 0)",
        (DEVICE,),
    ),
    Fault(
        "programmatic launch before CUDA 12.3",
        f"{BACKEND}/device.py",
        "PROGRAMMATIC_DRIVER = 12030",
        "PROGRAMMATIC_DRIVER = 12000",
        (DEVICE,),
    ),
    Fault(
        "compiled as C++14",
        f"{BACKEND}/device.py",
        'OPTIONS = ("--std=c++17", ',
        'OPTIONS = ("--std=c++14", ',
        (SM_90, f"{DEVICE}::test_compiles_once_and_keeps_what_it_compiled"),
    ),
    Fault(
        "compiled functions are found again by their file alone",
        f"{BACKEND}/device.py",
        "key = (file, expressions, text)",
        "key = (file, expressions[:0], text)",
        (f"{DEVICE}::test_compiles_once_and_keeps_what_it_compiled",),
    ),
    Fault(
        "the kernel that takes reports is another one",
        f"{BACKEND}/device.py",
        "self._take_report = kernels[-1].ptr",
        "self._take_report = kernels[0].ptr",
        (f"{DEVICE}::test_compiles_once_and_keeps_what_it_compiled",),
    ),
    Fault(
        "functions of CuPy are not kept",
        f"{BACKEND}/device.py",
        "                self._compiled[key] = kernels\n"
        "        return [kernel.ptr for kernel in self._compiled[key][: len(expressions)]]",
        "                return [kernel.ptr for kernel in kernels[: len(expressions)]]\n"
        "        return [kernel.ptr for kernel in self._compiled[key][: len(expressions)]]",
        (f"{DEVICE}::test_compiles_once_and_keeps_what_it_compiled",),
    ),
    Fault(
        "the limit of another axis of the grid",
        f"{BACKEND}/device.py",
        'attributes["MaxGridDimX"]',
        'attributes["MaxGridDimY"]',
        (f"{DEVICE}::test_what_a_device_says_about_itself",),
    ),
    Fault(
        "a stream of PyTorch on another device is accepted",
        f"{BACKEND}/context.py",
        "if device not in (None, self.index):",
        "if device not in (None, self.index) and not hasattr(stream, 'device_index'):",
        (f"{DEVICE}::test_streams_of_other_libraries",),
    ),
    Fault(
        "the version of a stream protocol is taken for its handle",
        f"{ARRAY_LIBRARIES}/find.py",
        "stream.__cuda_stream__()[1]",
        "stream.__cuda_stream__()[0]",
        (f"{DEVICE}::test_streams_of_other_libraries",),
    ),
    Fault(
        "a capture stays in the relaxed mode",
        f"{BACKEND}/driver.py",
        "    finally:\n        exchange(ctypes.byref(mode))\n",
        "    finally:\n        pass\n",
        (DEVICE,),
    ),
    # Reports
    Fault(
        "check waits for no stream",
        f"{BACKEND}/report.py",
        "                self._context.wait(stream)\n",
        "                pass\n",
        (DEVICE,),
    ),
    Fault(
        "streams are forgotten while they are busy",
        f"{BACKEND}/report.py",
        "if self._context.capturing(stream) or not self._context.idle(stream):",
        "if self._context.capturing(stream):",
        (DEVICE,),
    ),
    Fault(
        "a stream may end before it was waited for",
        f"{BACKEND}/report.py",
        "self.streams[int(stream)] = self._context.keeper(stream)",
        "self.streams[int(stream)] = None",
        (DEVICE,),
    ),
    Fault(
        "two reports share their words",
        f"{BACKEND}/report.py",
        "return [slab + index * 2 * _SIZE for",
        "return [slab + index * _SIZE for",
        (DEVICE,),
    ),
    Fault(
        "a row that was taken before it was counted is not told",
        f"{BACKEND}/report.py",
        "if row != NO_ROW and count:",
        "if count:",
        (DEVICE,),
    ),
    Fault(
        "the latest of two calls is told",
        "pagedcache/backend/protocol.py",
        "first = self if self.row <= later.row else later",
        "first = self if self.row < later.row else later",
        (SLOTS,),
    ),
    # Arguments of a call
    Fault(
        "a call does not compare strides",
        f"{OPERATORS}/arguments.py",
        "length > 1 and step != wanted for",
        "length < 0 and step != wanted for",
        (BAD_INPUT,),
    ),
    Fault(
        "a call does not compare dtypes",
        f"{OPERATORS}/arguments.py",
        "if tensor.dtype != one.dtype:",
        "if tensor.dtype.itemsize != one.dtype.itemsize:",
        (BAD_INPUT, ARRAYS),
    ),
    Fault(
        "a call does not compare devices",
        f"{OPERATORS}/arguments.py",
        "        if tensor.device != self._device:\n            raise _changed(",
        "        if tensor.device is None:\n            raise _changed(",
        (REGISTRY,),
    ),
    Fault(
        "K and V of a call may have too few rows",
        f"{OPERATORS}/arguments.py",
        "check_rows(one.name, tensor.shape[0], self.counted_by, rows)",
        "pass",
        (BAD_INPUT,),
    ),
    Fault(
        "overlap is looked for on one side",
        f"{OPERATORS}/arguments.py",
        "if -sizes[1] < distance < sizes[0]:",
        "if 0 <= distance < sizes[0]:",
        ("test_debug.py",),
    ),
    Fault(
        "caches that share memory are known to share none",
        f"{OPERATORS}/arguments.py",
        "            if rows > known.get(other_at - at, 0):\n",
        "            known[other_at - at] = MOST_ROWS\n"
        "            if rows > known.get(other_at - at, 0):\n",
        ("test_debug.py",),
    ),
    Fault(
        "a call may write read-only arrays",
        f"{OPERATORS}/arguments.py",
        "                check_writable(one.name, array, tensor)\n",
        "                pass\n",
        (BAD_INPUT, ARRAYS),
    ),
    # The table of rules
    Fault(
        "dtypes may be mixed",
        "pagedcache/rules.py",
        "if rule.like is not None and",
        "if rule.like is None and rule.name != self.counted_by and",
        (BAD_INPUT,),
    ),
    Fault(
        "axes of one name may differ",
        "pagedcache/rules.py",
        "                if length != known:\n",
        "                if length > known:\n",
        (BAD_INPUT,),
    ),
    Fault(
        "a cache may overlap itself",
        "pagedcache/rules.py",
        "if rule.written and there.size and overlaps_itself(there):",
        "if not rule.written and there.size and overlaps_itself(there):",
        (BAD_INPUT,),
    ),
    Fault(
        "one row of a fused projection is taken for a contiguous one",
        "pagedcache/rules.py",
        "if rows > 1 or strides[0] >= one_row:",
        "if rows > 1:",
        ("test_cpu.py",),
    ),
    Fault(
        "V must have the head size of K",
        "pagedcache/cache/tables.py",
        "(*LAYOUTS[layout][:3], SIZES[letter]),",
        '(*LAYOUTS[layout][:3], "head_size"),',
        (CPU,),
    ),
    # Layouts
    Fault(
        "a cache that allows both layouts is not asked about",
        "pagedcache/cache/layout.py",
        "if len(fitting) > 1 and k[1] > 1:",
        "if len(fitting) > 2:",
        ("test_layout.py",),
    ),
    Fault(
        "the layout is told from the slots",
        "pagedcache/cache/layout.py",
        'axes.index("num_kv_heads")',
        'axes.index("block_size")',
        ("test_layout.py",),
    ),
    Fault(
        "a layout that is given is not looked at",
        "pagedcache/cache/layout.py",
        "    if layout is not None:\n",
        "    if layout is not None and 0 in k_cache:\n",
        ("test_layout.py",),
    ),
    Fault(
        "the operator of PyTorch forgets the layout",
        "pagedcache/torch.py",
        "    _paged_caching(\n",
        "    layout = 'HND'\n    _paged_caching(\n",
        (f"{TORCH}::test_writes", "test_layout.py"),
    ),
    # Any operation
    Fault(
        "autograd is not told of a first write",
        f"{OPERATORS}/base.py",
        "            note()\n        if self.workspace_size:",
        "            pass\n        if self.workspace_size:",
        (TORCH,),
    ),
    Fault(
        "autograd is not told of a bound write",
        f"{OPERATORS}/base.py",
        "            if note is not None:\n                note()\n            queue(",
        "            queue(",
        (TORCH,),
    ),
    Fault(
        "a bound write ignores its stream",
        f"{OPERATORS}/base.py",
        "            current_stream = lambda: handle  # noqa: E731\n",
        "            pass\n",
        (REGISTRY,),
    ),
    Fault(
        "a bound write keeps the stream that was current",
        f"{OPERATORS}/base.py",
        "        note = self._noting_writes(arrays)\n\n        def run()",
        "        note = self._noting_writes(arrays)\n        now = current_stream()\n"
        "        current_stream = lambda: now\n\n        def run()",
        (REGISTRY,),
    ),
    Fault(
        "a bound write does not keep its arrays",
        f"{OPERATORS}/base.py",
        "        run.arrays = arrays  #",
        "        #",
        ("test_cpu.py",),
    ),
    Fault(
        "a bound write survives its descriptor",
        f"{OPERATORS}/base.py",
        "            if self._implementation is None:\n                self._alive()\n",
        "",
        ("test_toy_operator.py", "test_cpu.py"),
    ),
    Fault(
        "a destroyed descriptor still serves arrays that it knows",
        f"{OPERATORS}/base.py",
        "        if self._implementation is None:\n            self.matchers, self.latest =",
        "        if False:\n            self.matchers, self.latest =",
        ("test_cpu.py", "test_bad_input.py::test_use_after_destroy"),
    ),
    Fault(
        "a stream that is given is not kept alive",
        f"{BACKEND}/context.py",
        "return KeptStream.of(handle, stream)",
        "return handle",
        (DEVICE,),
    ),
    Fault(
        "check tells what it found again",
        "pagedcache/backend/cpu/__init__.py",
        "found, self._found = self._found, None",
        "found = self._found",
        (SLOTS,),
    ),
    # Careful calls
    Fault(
        "debug waits in a capture",
        f"{OPERATORS}/careful.py",
        "        if self._device.capturing(stream):\n",
        "        if self._device.capturing(stream) and self._refuse:\n",
        (DEVICE,),
    ),
    Fault(
        "calls that raise share one report",
        f"{OPERATORS}/careful.py",
        "            report = self._device.report()\n"
        "            implementation = self._implementation.reporting_to(report)\n",
        "            implementation = self._implementation\n"
        "            report = getattr(implementation, '_report')\n",
        (SLOTS,),
    ),
    Fault(
        "sources may lie in the V cache",
        f"{OPERATORS}/careful.py",
        "            for other in written:\n",
        "            for other in written[:1]:\n",
        ("test_debug.py",),
    ),
    Fault(
        "slots past the end count as duplicates",
        f"{OPERATORS}/paged_caching/inspect.py",
        "(slots >= 0) & (slots < info.num_slots)",
        "slots >= 0",
        ("test_debug.py",),
    ),
    Fault(
        "large numbers are taken for infinite",
        f"{OPERATORS}/paged_caching/inspect.py",
        "BF16: 0x7F80",
        "BF16: 0x7F00",
        ("test_debug.py",),
    ),
    # The CPU
    Fault(
        "the CPU writes the slot just past the end",
        ON_CPU,
        "outside = slots >= num_slots",
        "outside = slots > num_slots",
        (CPU, SLOTS),
    ),
    Fault(
        "the CPU tells the last invalid token",
        ON_CPU,
        "token = int(outside.argmax())",
        "token = int(np.flatnonzero(outside)[-1])",
        (SLOTS,),
    ),
    Fault(
        "blocks that are filled from the middle are taken for whole ones",
        ON_CPU,
        " & (slots[first] % block_size == 0)",
        "",
        (CPU, "test_cpu.py::test_any_order_of_slots"),
    ),
    Fault(
        "blocks with a gap are taken for whole ones",
        ON_CPU,
        " & (starts == block_size - 1)",
        "",
        (CPU, "test_cpu.py::test_any_order_of_slots"),
    ),
    Fault(
        "blocks that are apart in the source are read as one slice",
        ON_CPU,
        "breaks = np.flatnonzero(np.diff(numbers) != step) + 1",
        "breaks = np.flatnonzero(np.diff(numbers) < step) + 1",
        ("test_cpu.py::test_any_order_of_slots",),
    ),
    Fault(
        "what K has written as blocks is not written of V",
        ON_CPU,
        "            valid = valid.copy()\n",
        "",
        (CPU, "test_cpu.py::test_any_order_of_slots"),
    ),
    Fault(
        "heads that are side by side in the cache alone are copied as one",
        ON_CPU,
        "side_by_side = source[1] == cache[2] == row",
        "side_by_side = cache[2] == row",
        (CPU,),
    ),
    Fault(
        "slots of 32 bits are compared as such",
        ON_CPU,
        "(dtype.itemsize,)).astype(np.int64)",
        "(dtype.itemsize,)).copy()",
        ("test_bad_input.py::test_a_block_past_the_range_of_its_slots",),
    ),
    # One call
    Fault(
        "the one call forgets the number of blocks",
        f"{OPERATORS}/one_call.py",
        "        return dtype, shape, strides, tensor.device",
        "        return dtype, shape if name in self._kind.free else shape[1:], strides, "
        "tensor.device",
        (REGISTRY,),
    ),
    Fault(
        "the one call forgets strides",
        f"{OPERATORS}/one_call.py",
        "        return dtype, shape, strides, tensor.device",
        "        return dtype, shape, tensor.device",
        (REGISTRY, "test_cpu.py", "test_layout.py"),
    ),
    Fault(
        "the one call forgets dtypes",
        f"{OPERATORS}/one_call.py",
        "        return dtype, shape, strides, tensor.device",
        "        return shape, strides, tensor.device",
        (REGISTRY,),
    ),
    Fault(
        "the one call forgets its options",
        f"{OPERATORS}/one_call.py",
        "key = (options, *signatures)",
        "key = tuple(signatures)",
        (SLOTS, "test_layout.py"),
    ),
    Fault(
        "a recent descriptor serves any option",
        f"{OPERATORS}/one_call.py",
        "if all(map(operator.is_, options, known)) and",
        "if",
        (SLOTS, "test_layout.py"),
    ),
    Fault(
        "a recent descriptor serves any layout",
        f"{OPERATORS}/paged_caching/one_call.py",
        "            layout is known_layout\n            and on_invalid",
        "            on_invalid",
        ("test_layout.py",),
    ),
    Fault(
        "the descriptor that was found last is forgotten first",
        f"{OPERATORS}/one_call.py",
        "            self._kept.pop(key, None)\n",
        "",
        (REGISTRY,),
    ),
    Fault(
        "a descriptor that is found often stays behind others",
        f"{OPERATORS}/one_call.py",
        "        if self._found % FOUND_OFTEN == 0:\n",
        "        if False:\n",
        (REGISTRY,),
    ),
    Fault(
        "descriptors change places at each call",
        f"{OPERATORS}/one_call.py",
        "        if self._found % FOUND_OFTEN == 0:\n",
        "        if self._found:\n",
        (REGISTRY,),
    ),
    # Matchers, and array libraries
    Fault(
        "a matcher compares no strides",
        f"{ARRAY_LIBRARIES}/numpy.py",
        '        f"{name}.strides == _{name}_strides",\n',
        "",
        (ARRAYS,),
    ),
    Fault(
        "a matcher compares no dtype",
        f"{ARRAY_LIBRARIES}/numpy.py",
        '        f"{name}.dtype == _{name}_dtype",\n',
        "",
        (ARRAYS,),
    ),
    Fault(
        "a matcher ignores the number of blocks",
        f"{ARRAY_LIBRARIES}/numpy.py",
        '        return f"{name}.shape == _{name}_shape"',
        '        return f"{name}.shape[1:] == _{name}_shape[1:]"',
        (ARRAYS,),
    ),
    Fault(
        "a matcher takes read-only arrays",
        f"{ARRAY_LIBRARIES}/numpy.py",
        "            if one.written:\n",
        "            if one.written and one.free:\n",
        (ARRAYS,),
    ),
    Fault(
        "a matcher takes K and V that are too short",
        f"{ARRAY_LIBRARIES}/library.py",
        '>= _count"] if at_least',
        '>= 0"] if at_least',
        (ARRAYS,),
    ),
    Fault(
        "a matcher takes arrays of another GPU",
        f"{ARRAY_LIBRARIES}/cupy.py",
        "            if several:\n",
        "            if several and not one.written:\n",
        (ARRAYS,),
    ),
    Fault(
        "a matcher takes misaligned addresses",
        f"{ARRAY_LIBRARIES}/matching.py",
        "& {size - 1}",
        "& {size - size}",
        (ARRAYS,),
    ),
    Fault(
        "a matcher takes caches that share memory",
        f"{ARRAY_LIBRARIES}/matching.py",
        'condition = f"-{sizes[1]} < _distance < {sizes[0]}"',
        'condition = f"0 < _distance < {sizes[0]}"',
        (ARRAYS,),
    ),
    Fault(
        "a matcher ignores the stream that is given",
        f"{ARRAY_LIBRARIES}/matching.py",
        "            _stream = _handle_of(_stream)",
        "            _stream = _current_stream()",
        (ARRAYS,),
    ),
    Fault(
        "a leaf that requires grad is accepted once it is known",
        f"{ARRAY_LIBRARIES}/torch.py",
        'found.append("not _grad_enabled()")',
        'found.append("True")',
        (TORCH,),
    ),
    Fault(
        "a leaf that requires grad is accepted",
        f"{ARRAY_LIBRARIES}/torch.py",
        "if array.requires_grad and self._torch.is_grad_enabled():",
        "if array.requires_grad and not array.is_leaf and self._torch.is_grad_enabled():",
        (TORCH,),
    ),
    Fault(
        "autograd is not told of writes into arrays that are known",
        f"{ARRAY_LIBRARIES}/torch.py",
        "if noted else []",
        "if not noted else []",
        (TORCH,),
    ),
    Fault(
        "guards take tensors that are too short",
        f"{ARRAY_LIBRARIES}/torch.py",
        "if any(shape[0] < count for shape",
        "if any(shape[0] < 0 for shape",
        (ARRAYS,),
    ),
    Fault(
        "guards are kept for ever",
        f"{ARRAY_LIBRARIES}/torch.py",
        "        if len(self) >= MOST_GUARDS:\n            self.clear()\n",
        "",
        (ARRAYS,),
    ),
    Fault(
        "guards compare no lengths",
        f"{ARRAY_LIBRARIES}/torch.py",
        "self[count] = self._guard(tensors, shapes)",
        "self[count] = self._of_any_length",
        (ARRAYS,),
    ),
    Fault(
        "a nested tensor ends the process",
        f"{ARRAY_LIBRARIES}/torch.py",
        'found = [f"not ({nested})"]',
        "found = []",
        (TORCH,),
    ),
    Fault(
        "DLPack's offset is forgotten",
        f"{ARRAY_LIBRARIES}/dlpack.py",
        "(tensor.data or 0) + tensor.byte_offset",
        "tensor.data or 0",
        (ARRAYS,),
    ),
    Fault(
        "the stream of an exporter is forgotten",
        f"{ARRAY_LIBRARIES}/interfaces.py",
        'int(array.__cuda_array_interface__.get("stream") or 0)',
        "0",
        (ARRAYS,),
    ),
    # The C interface
    Fault(
        "the C interface returns one status for all errors",
        "pagedcache/infiniop.py",
        "    except PagedCacheError as error:\n        return error.status\n"
        "    except Exception:\n        return Status.INTERNAL_ERROR\n    return Status.SUCCESS\n",
        "    except Exception:\n        return Status.INTERNAL_ERROR\n    return Status.SUCCESS\n",
        ("test_bad_input.py",),
    ),
    Fault(
        "bfloat16 has another number in C",
        "pagedcache/infiniop.py",
        "    BF16 = 19\n",
        "    BF16 = 18\n",
        ("test_bad_input.py",),
    ),
    Fault(
        "a status has another number in C",
        "pagedcache/status.py",
        "    BAD_TENSOR_DTYPE = 10\n",
        "    BAD_TENSOR_DTYPE = 9\n",
        ("test_bad_input.py",),
    ),
    Fault(
        "a NULL stream is the current one",
        f"{OPERATORS}/paged_caching/descriptor.py",
        "k_cache, v_cache, k, v, slot_mapping, None, None, stream or 0)",
        "k_cache, v_cache, k, v, slot_mapping, None, None, stream)",
        (REGISTRY,),
    ),
    # Expressions
    Fault(
        "a call of anything is in the language",
        f"{EXPRESSIONS}/parse.py",
        "        if name not in FUNCTIONS:\n",
        "        if False:\n",
        ("test_expressions.py",),
    ),
    Fault(
        "an attribute is in the language",
        f"{EXPRESSIONS}/parse.py",
        "                return (test, body, other)\n",
        "                return (test, body, other)\n"
        "            case ast.Attribute(value):\n                return (value,)\n",
        ("test_expressions.py",),
    ),
    Fault(
        "of a chain of comparisons only the last counts",
        f"{EXPRESSIONS}/parse.py",
        'self._all("and", [self._compared(at, *each) for each in pairs])',
        'self._all("and", [self._compared(at, *each) for each in pairs][-1:])',
        ("test_expressions.py",),
    ),
    Fault(
        "a mark is counted in bytes",
        f"{EXPRESSIONS}/parse.py",
        "start = len(encoded[: at.col_offset].decode())",
        "start = at.col_offset",
        ("test_expressions.py",),
    ),
    Fault(
        "an index that a condition rules out counts",
        f"{EXPRESSIONS}/evaluate.py",
        "return inside & np.where(test, yes, no)",
        "return inside & yes & no",
        ("test_expressions.py",),
    ),
    Fault(
        "a sum of a row goes from left to right",
        f"{EXPRESSIONS}/evaluate.py",
        '    "row_sum": lambda row: pairs(row, np.add, 0.0),',
        '    "row_sum": lambda row: np.add.accumulate(row, -1)[..., -1],',
        ("test_expressions.py",),
    ),
    Fault(
        "a negative index reads from the end",
        f"{EXPRESSIONS}/evaluate.py",
        "good = (index >= 0) & (index < length)",
        "good = (index >= -length) & (index < length)",
        ("test_expressions.py",),
    ),
    Fault(
        "a printed index may be negative",
        LANGUAGE,
        "inside = inside && each[i] >= 0 && each[i] < lengths[i];",
        "inside = inside && each[i] < lengths[i];",
        ("test_expressions_on_host.py",),
    ),
    Fault(
        "a printed condition rules no index out",
        f"{EXPRESSIONS}/cuda.py",
        'f"{inside} && ({test} ? {yes} : {no})"',
        'f"{inside} && {yes} && {no}"',
        ("test_expressions_on_host.py",),
    ),
    Fault(
        "halves are rounded to even on a GPU",
        LANGUAGE,
        "return magnitude(rest) >= 0.5f ?",
        "return magnitude(rest) > 0.5f ?",
        ("test_expressions_on_host.py",),
    ),
    Fault(
        "a remainder of integers has the sign of the dividend on a GPU",
        LANGUAGE,
        "return quotient - (quotient * b != a && (a < 0) != (b < 0));",
        "return quotient;",
        ("test_expressions_on_host.py",),
    ),
    Fault(
        "the larger of a number and a NaN is the NaN on a GPU",
        LANGUAGE,
        "return less(a, b) || isnan(a) ? b : a;",
        "return less(a, b) ? b : a;",
        ("test_expressions_on_host.py",),
    ),
    Fault(
        "a difference flushes subnormal numbers on a GPU",
        LANGUAGE,
        "float subtract(float a, float b) { return pagedcache::subtract(a, b); }",
        "float subtract(float a, float b) { return a - b; }",
        ("test_expressions_compile.py::test_expressions_compile[90]",),
    ),
    Fault(
        "a comparison flushes subnormal numbers on a GPU",
        LANGUAGE,
        'PAGEDCACHE_COMPARED(less, "setp.lt", <)',
        "__device__ __forceinline__ bool less(float a, float b) { return a < b; }",
        ("test_expressions_compile.py::test_expressions_compile[90]",),
    ),
    # Formats and scales
    Fault(
        "a scale that is computed has no smallest value on a GPU",
        STORING,
        "return larger(scale, 1e-6f);",
        "return scale;",
        (AS_ON_CPU,),
    ),
    Fault(
        "one thread in a group does not take part in the largest value",
        STORING,
        "step = lanes / 2; step > 0; step /= 2",
        "step = lanes / 2; step > 1; step /= 2",
        (AS_ON_CPU,),
    ),
    Fault(
        "vectors past the first of a thread are left out",
        STORING,
        "      more.store(cache, i, vectors, valid, scaled);\n",
        "",
        (AS_ON_CPU,),
    ),
    Fault(
        "vectors past the first of a thread do not take part in the largest value",
        STORING,
        "      most = larger(most, more.largest());\n",
        "",
        (AS_ON_CPU,),
    ),
    Fault(
        "parts of a vector are next to each other in the cache",
        STORING,
        "to + (i * vectors + vector) * kTo, codes",
        "to + (vector * kParts + i) * kTo, codes",
        (IN_PARTS,),
    ),
    Fault(
        "an invalid slot's token is written to slot 0",
        STORING,
        "      if (valid) storePacked<kTo>",
        "      storePacked<kTo>",
        (AS_ON_CPU,),
    ),
    Fault(
        "an invalid slot's scale is written to slot 0",
        STORING,
        "if (valid && lane == 0)",
        "if (lane == 0)",
        (AS_ON_CPU,),
    ),
    Fault(
        "the last part of a vector alone says whether the quotients are right",
        STORING,
        "right = quotients.of(values) && right;",
        "right = quotients.of(values);",
        (IN_PARTS,),
    ),
    Fault(
        "only the first part of a vector is divided again",
        STORING,
        "part < Held::kParts * vectors; part += vectors",
        "part < vectors; part += vectors",
        (IN_PARTS,),
    ),
    Fault(
        "a reciprocal is not rounded down",
        CONVERSIONS,
        " - (multiplyAdd(-reciprocal, by, 1.0f) < 0.0f)",
        "",
        (FORMATS.rstrip(":"),),
    ),
    Fault(
        "the scale of an infinite row is the least one",
        CONVERSIONS,
        "return isNan(quotient) ? value : quotient;",
        "return quotient;",
        (AS_ON_CPU,),
    ),
    Fault(
        "a scale is a product with the reciprocal, not a quotient",
        CONVERSIONS,
        "  const float quotient = multiplyAdd(-beyond, kReciprocal, first);\n",
        "  const float quotient = multiplyQuickly(value, kReciprocal);\n",
        (AS_ON_CPU,),
    ),
    Fault(
        "the parts of a gather are next to each other",
        GATHER,
        "    char* const to = out + static_cast<long long>(part) * kTo;",
        "    char* const to = out + static_cast<long long>(at.in_row * kParts + i) * kTo;",
        (IN_PARTS,),
    ),
    Fault(
        "the groups of a gather are counted in vectors, not in parts",
        "pagedcache/cache/nvidia.py",
        "part = min(elements, WIDEST // rows.dtype.itemsize)",
        "part = elements",
        (AS_ON_CPU,),
    ),
    Fault(
        "the scale of a head is that of the first",
        STORING,
        "  scales += at.head * side.scales.head_stride;\n",
        "",
        (AS_ON_CPU,),
    ),
    Fault(
        "a group's scale is where that of the first is",
        STORING,
        "inSlot(side.scales, 0, to, block) + unit * side.group_stride",
        "inSlot(side.scales, 0, to, block)",
        (AS_ON_CPU,),
    ),
    Fault(
        "V is converted as K is",
        STORING,
        "storeRows<T, Slot, FormatOf<VFormat>, kVMode, kVElements, kAhead>",
        "storeRows<T, Slot, FormatOf<KFormat>, kKMode, kVElements, kAhead>",
        (AS_ON_CPU,),
    ),
    Fault(
        "both sides of a conversion report",
        STORING,
        "call.v_scale, false)",
        "call.v_scale, true)",
        (AS_ON_CPU,),
    ),
    Fault(
        "a conversion does not wait for the kernel ahead",
        STORING,
        "  waitForKernelAhead();\n",
        "",
        ("test_formats_compile.py::test_every_conversion_compiles[90-pagedStoring]",),
    ),
    Fault(
        "a gather does not wait for the kernel ahead",
        GATHER,
        "  waitForKernelAhead();\n",
        "",
        ("test_formats_compile.py::test_every_conversion_compiles[90-pagedGather]",),
    ),
    Fault(
        "a gather takes the scale of the first group",
        GATHER,
        "side.per_group.divide(part);",
        "0 * part;",
        (AS_ON_CPU,),
    ),
    Fault(
        "a product may be contracted with a sum",
        CONVERSIONS,
        'asm("mul.rn.f32 %0, %1, %2;"',
        'asm("mul.rn.ftz.f32 %0, %1, %2;"',
        ("test_formats_compile.py::test_every_conversion_compiles[90-pagedGather]",),
    ),
    Fault(
        "8-bit floats round half up",
        CONVERSIONS,
        "rest += (1u << (kDropped - 1)) - 1 + (rest >> kDropped & 1u);",
        "rest += 1u << (kDropped - 1);",
        (f"{FORMATS}test_every_conversion_to_a_format",),
    ),
    Fault(
        "halves round to even in integers",
        CONVERSIONS,
        "return whole + (rest >= 0.5f) - (rest <= -0.5f);",
        "return whole + (rest > 0.5f) - (rest < -0.5f);",
        (f"{FORMATS}test_every_conversion_to_a_format",),
    ),
    Fault(
        "an 8-bit float does not saturate",
        CONVERSIONS,
        "  if (rest > kMost) rest = kMost;\n",
        "",
        (f"{FORMATS}test_every_conversion_to_a_format",),
    ),
    Fault(
        "the reciprocal is not corrected",
        CONVERSIONS,
        "values[i] = multiplyAdd(-beyond, reciprocal, first);",
        "values[i] = beyond == beyond ? first : beyond;",
        (f"{FORMATS}test_quotients_that_are_hard_to_round",),
    ),
    Fault(
        "negative scales are divided by quickly",
        CONVERSIONS,
        "usual = by >= 0x1p-40f && by <= 0x1p40f;",
        "usual = by <= 0x1p40f;",
        (f"{FORMATS}test_unusual_scales_are_left_to_a_division",),
    ),
    Fault(
        "int4 has the even dimension in the upper half",
        f"{CACHE}/formats.py",
        "whole[..., ::2] & 15 | (whole[..., 1::2] & 15) << 4",
        "whole[..., 1::2] & 15 | (whole[..., ::2] & 15) << 4",
        (BY_DEFINITION,),
    ),
    Fault(
        "NaN keeps its sign",
        f"{CACHE}/formats.py",
        "        if nan.any():\n",
        "        if False:\n",
        (BY_DEFINITION,),
    ),
    Fault(
        "NaN that signals are not left out of the largest value",
        f"{CACHE}/scales.py",
        "    sizes = np.where(np.isnan(values), np.float32(0), np.abs(values))\n",
        "    sizes = np.abs(values)\n",
        (BY_DEFINITION,),
    ),
    Fault(
        "values are divided by a scale that is computed",
        f"{CACHE}/cpu.py",
        "groups * (np.float32(1) / found)[..., None]",
        "groups / found[..., None]",
        (f"{FORMATS}test_a_scale_that_is_computed_is_multiplied_by_its_reciprocal",),
    ),
    Fault(
        "channels with a thread for each element share a scale",
        f"{CACHE}/nvidia.py",
        'side.scale.granularity == "channel" or side.scale.group % elements',
        "side.scale.group % elements",
        (AS_ON_CPU,),
    ),
    Fault(
        "rows are taken to be aligned as caches are",
        f"{CACHE}/nvidia.py",
        "            (side.token_stride * size, by_token),\n",
        "",
        (f"{FORMATS}test_elements_of_a_thread",),
    ),
    Fault(
        "an address that is misaligned takes a wide access",
        f"{CACHE}/nvidia.py",
        "return next(each for each in self._kernels if each.allows(named))",
        "return self._widest",
        (f"{FORMATS}test_misaligned_addresses",),
    ),
    Fault(
        "a scale may share memory with a cache",
        f"{CACHE}/tables.py",
        "        apart=True,\n",
        "        apart=False,\n",
        (f"{FORMATS}test_scales_that_share_memory",),
    ),
    Fault(
        "an output may share memory with a cache",
        f"{CACHE}/tables.py",
        "        apart=not written,\n",
        "",
        (f"{FORMATS}test_outputs_that_share_memory",),
    ),
    Fault(
        "a scale that is computed is not told to autograd",
        f"{CACHE}/tables.py",
        "written=computes and granularity in WRITTEN,",
        "written=False,",
        (f"{FORMATS}test_autograd_sees_scales_that_are_computed",),
    ),
    Fault(
        "a scale appears where none was before",
        f"{OPERATORS}/arguments.py",
        "            if one is None and array is not None:\n",
        "            if False:\n",
        (f"{FORMATS}test_scales_at_each_call",),
    ),
    Fault(
        "a matcher takes any scale where there was none",
        f"{ARRAY_LIBRARIES}/matching.py",
        '[f"{name} is None" for name in missing]',
        "[]",
        (f"{FORMATS}test_scales_at_each_call",),
    ),
    Fault(
        "the one call forgets the format",
        f"{OPERATORS}/paged_caching/one_call.py",
        "            and k_format is known_k_format\n",
        "",
        (f"{FORMATS}test_formats_of_one_dtype_in_turn",),
    ),
    Fault(
        "an element is explained with the scale of another",
        f"{CACHE}/explain.py",
        "+ dim // of.group * of.group_stride",
        "+ dim * of.group_stride",
        (f"{FORMATS}test_explain_an_element",),
    ),
    # Functions of other projects
    Fault(
        "vLLM's caches are taken for HND",
        "pagedcache/compat/vllm.py",
        'slot_mapping, layout="NHD")',
        'slot_mapping, layout="HND")',
        ("test_compat.py",),
    ),
    Fault(
        "vLLM's cells of 656 bytes have any scales",
        "pagedcache/compat/vllm.py",
        'k_format="float8_e4m3fn", powers=True',
        'k_format="float8_e4m3fn", powers=False',
        ("test_compat_formats.py",),
    ),
    Fault(
        "FlashInfer's pages are measured along their heads",
        "pagedcache/compat/flashinfer.py",
        '[2 if kv_layout == "HND" else 1]',
        '[1 if kv_layout == "HND" else 2]',
        ("test_compat.py",),
    ),
    Fault(
        "SGLang's rows are blocks of many slots",
        "pagedcache/compat/sglang.py",
        'layout="NHD",',
        'layout="HND",',
        ("test_compat.py",),
    ),
    # Around it
    Fault(
        "a second backend of a type replaces the first",
        "pagedcache/backend/registry.py",
        "        if known != target:\n",
        "        if known is None:\n",
        (REGISTRY,),
    ),
    Fault(
        "a backend is used before it was checked",
        "pagedcache/backend/registry.py",
        "    backend.check()\n",
        "",
        (REGISTRY,),
    ),
    Fault(
        "warming up leaves slots of 32 bits cold",
        f"{OPERATORS}/paged_caching/warmup.py",
        "mapping = TensorDescriptor(slot_dtype, (1,))",
        "mapping = TensorDescriptor(slots[0], (1,))",
        ("test_warmup.py",),
    ),
    Fault(
        "an environment variable may be anything",
        "pagedcache/environment.py",
        'if value not in ("0", "1"):',
        'if value == "":',
        ("test_debug.py",),
    ),
    Fault(
        "locks stay locked in a forked process",
        "pagedcache/locks.py",
        "        lock._at_fork_reinit()",
        "        pass",
        ("test_faults.py::test_locks_that_are_held_in_a_fork_are_free_in_the_child",),
    ),
    Fault(
        "a forked process may use CUDA",
        f"{BACKEND}/fork.py",
        "return _user not in (None, os.getpid())",
        "return _user not in (None, os.getpid(), os.getppid())",
        ("test_faults.py::test_a_forked_process_is_told_so",),
    ),
    Fault(
        "html is not escaped",
        "pagedcache/display.py",
        "{html.escape(value)}",
        "{value}",
        (SLOTS,),
    ),
    Fault(
        "a slot is explained as if slots adjoined",
        "pagedcache/cache/explain.py",
        "offset * side.slot_stride)",
        "offset * side.head_size)",
        (SLOTS,),
    ),
    Fault(
        "the bench divides by the wrong rate",
        "pagedcache/bench/__init__.py",
        "{times[MEMCPY] / times[peers.OURS]:>15.3f}",
        "{times[peers.OURS] / times[MEMCPY]:>15.3f}",
        ("test_bench.py",),
    ),
    Fault(
        "a peer that refuses a case ends the bench",
        "pagedcache/bench/__init__.py",
        "            if name == peers.OURS:\n                raise\n",
        "            raise\n",
        ("test_bench.py",),
    ),
    Fault(
        "the bench tells a reason in many lines",
        "pagedcache/bench/peers.py",
        "lines = str(error).strip().splitlines() or",
        "lines = [str(error).strip()] or",
        ("test_bench.py",),
    ),
    Fault(
        "the host's time is that of the first set",
        "pagedcache/bench/measure.py",
        "turns = [i % sets for i in range(calls)]",
        "turns = [0 for i in range(calls)]",
        ("test_bench.py",),
    ),
    Fault(
        "host times are multiples of the worst peer's",
        "pagedcache/bench/host.py",
        "best = min(rivals, default=math.nan)",
        "best = max(rivals, default=math.nan)",
        ("test_bench.py",),
    ),
    Fault(
        "rows are padded with zeros for the largest",
        STEPS_CUDA,
        "struct Largest {\n  static constexpr unsigned int kPadding = 0x7fffffffu;",
        "struct Largest {\n  static constexpr unsigned int kPadding = 0;",
        ("test_programs_on_host.py::test_row_functions_of_unusual_rows",),
    ),
    Fault(
        "neighbours in other threads are combined in either order",
        STEPS_CUDA,
        "if (Combine::kEitherWay || !(lane & step)) {",
        "if (true) {",
        ("test_programs_on_host.py::test_row_functions_of_unusual_rows",),
    ),
    Fault(
        "a group that is no power of two ends in the next",
        STEPS_CUDA,
        "for (unsigned int group = lane; group < kSize / kGroup; group += kLanes) {",
        "for (unsigned int group = lane; group + 1 < kSize / kGroup; group += kLanes) {",
        ("test_programs_on_host.py::test_groups_of_any_size",),
    ),
    Fault(
        "parts of a row are left out of a sum",
        STEPS_CUDA,
        "constexpr int kTogether = kWhole <= kSpan ? 1 : kWhole / kSpan;",
        "constexpr int kTogether = 1;",
        (WRITES, READS),
    ),
    Fault(
        "tiny elements are divided quickly",
        STEPS_CUDA,
        "  return (asBits(value) << 1) - 1 >= (0x2b800000u << 1) - 1;  // 2^-40",
        "  return true;",
        (WRITES, READS),
    ),
    Fault(
        "the second of a pair is turned with the first as it is by now",
        STEPS_CUDA,
        "  b = add(multiply(b, cosine), multiply(a, sine));\n  a = first;",
        "  a = first;\n  b = add(multiply(b, cosine), multiply(a, sine));",
        (WRITES,),
    ),
    Fault(
        "rotated dimensions begin at the head",
        STEPS_CUDA,
        "const unsigned int dim = rows.dim(i), at = dim - kFirst;",
        "const unsigned int dim = rows.dim(i), at = dim;",
        (WRITES,),
    ),
    Fault(
        "a position past its table is taken for another",
        STEPS_CUDA,
        "    rows.inside[h] = rows.inside[h] && angles.inside;\n",
        "",
        ("test_programs_on_host.py",),
    ),
    Fault(
        "a transform in other threads has the wrong sign",
        STEPS_CUDA,
        "x[i] = rows.lane & lanes ? subtract(other, x[i]) : add(x[i], other);",
        "x[i] = rows.lane & lanes ? subtract(x[i], other) : add(x[i], other);",
        (WRITES, READS),
    ),
    Fault(
        "a transform is not orthonormal",
        STEPS_CUDA,
        "return power == 2 ? root * 0x1.6a09e6p-1f : root;",
        "return root;",
        (WRITES, READS),
    ),
    Fault(
        "rows that do not agree are stored in part",
        PROGRAMMED,
        "  Side::apply(rows, values);\n  if constexpr (Side::kChecks) rows.agree();\n"
        "#pragma unroll\n  for (int h = 0; h < Held::kHeads; ++h) {\n    [[maybe",
        "  Side::apply(rows, values);\n#pragma unroll\n"
        "  for (int h = 0; h < Held::kHeads; ++h) {\n    [[maybe",
        ("test_programs_on_host.py::test_all_threads_of_a_row_agree",),
    ),
    Fault(
        "rows of padding are reported",
        PROGRAMMED,
        "if (!rows.inside[h] && valid) report(",
        "if (!rows.inside[h]) report(",
        ("test_programs_on_host.py",),
    ),
    Fault(
        "threads past the last token store",
        PROGRAMMED,
        "    valid = valid && exists;\n",
        "",
        ("test_programs_on_host.py",),
    ),
    Fault(
        "the scale of a group is stored in the place of another",
        PROGRAMMED,
        "*reinterpret_cast<unsigned int*>(to + dim / kGroup * group_stride) =",
        "*reinterpret_cast<unsigned int*>(to + dim / kGroup / 2 * group_stride) =",
        ("test_programs_on_host.py::test_groups_of_any_size",),
    ),
    Fault(
        "the second head of a thread is stored in the place of the first",
        PROGRAMMED,
        "char* const to = cache + inSlot(side.cache, rows.head + h, at.slot, at.block);",
        "char* const to = cache + inSlot(side.cache, rows.head, at.slot, at.block);",
        (WRITES,),
    ),
    Fault(
        "tokens of a later launch begin anew",
        PROGRAMMED,
        "rows.token = p.first_token + number;",
        "rows.token = number;",
        ("test_programs_on_host.py::test_many_tokens_take_several_launches",),
    ),
    Fault(
        "the way back forgets the scale",
        PROGRAMMED,
        "  if constexpr (Side::kMode > kConverted) {",
        "  if constexpr (false) {",
        (READS,),
    ),
    Fault(
        "wide accesses at any address",
        f"{PROGRAMS}/nvidia.py",
        "            address % wanted[name] == 0\n",
        "            address >= 0 or wanted[name]\n",
        ("test_programs_on_host.py::test_unaligned_addresses",),
    ),
    Fault(
        "heads that are shared need not be even",
        f"{PROGRAMS}/text.py",
        "        return math.gcd(heads, MOST_HEADS)",
        "        return MOST_HEADS",
        (WRITES,),
    ),
    Fault(
        "an axis may have any length",
        f"{EXPRESSIONS}/parse.py",
        "if wanted is not None and length != wanted:",
        "if wanted is not None and length is not None and length < wanted:",
        ("test_programs.py", "test_expressions.py", "test_programs_on_host.py"),
    ),
    Fault(
        "parameters that no step names are ignored",
        f"{PROGRAMS}/kernels.py",
        "            if name not in self._names:\n",
        '            if name not in self._names and name == "":\n',
        ("test_programs.py",),
    ),
    Fault(
        "a scale may differ from element to element",
        f"{STEPS}/quantizer.py",
        "        if _varies(scale):\n",
        "        if False:\n",
        ("test_programs.py",),
    ),
    Fault(
        "numbers of another kind match",
        "pagedcache/arrays/matching.py",
        '        conditions.append(f"type({name}) is {kind.__name__}")\n',
        '        conditions.append(f"isinstance({name}, (int, float))")\n',
        ("test_programs.py",),
    ),
    Fault(
        "rms_norm forgets eps on the CPU",
        f"{STEPS}/named.py",
        "np.sqrt(mean + np.float32(step.eps))",
        "np.sqrt(mean)",
        ("test_recipes.py", "test_programs_on_host.py"),
    ),
    Fault(
        "cosines and sines change places on the CPU",
        f"{STEPS}/named.py",
        "cosines, sines = angles[:, None, :half], angles[:, None, half:]",
        "sines, cosines = angles[:, None, :half], angles[:, None, half:]",
        ("test_recipes.py",),
    ),
    Fault(
        "invalid rows are put out on the CPU",
        f"{PROGRAMS}/cpu.py",
        "            chosen = np.nonzero(inside)\n            rows[out.name]",
        "            chosen = np.nonzero(inside | True)\n            rows[out.name]",
        ("test_programs.py",),
    ),
    Fault(
        "scales of invalid rows are written on the CPU",
        "pagedcache/cache/cpu.py",
        "scales = None if scales is None else scales[token, head]",
        "scales = None if scales is None else scales[token, head] * 0 + 1",
        ("test_recipes.py", "test_programs_on_host.py"),
    ),
    Fault(
        "in place use is refused in debug mode",
        "pagedcache/operators/careful.py",
        "if in_place.get(other) == name and",
        "if in_place.get(other) == other and",
        ("test_programs.py::test_in_place",),
    ),
    Fault(
        "the bench's blocks are filled out of order",
        "pagedcache/bench/case.py",
        "(blocks[:, None] * block_size + np.arange(block_size)).ravel()",
        "(blocks[:, None] + np.arange(block_size) * block_size).ravel()",
        ("test_bench.py",),
    ),
    Fault(
        "the demo computes tokens that were found",
        "pagedcache/demo/__init__.py",
        "starts = [sequence.num_cached_tokens for",
        "starts = [0 for",
        ("test_demo.py::test_sequences_begin_with_the_same_blocks",),
    ),
    Fault(
        "the demo does not compare what no token belongs to",
        "pagedcache/demo/__init__.py",
        "_difference(found.blocks[block], expected.blocks[block])",
        "_difference(found.blocks[block], found.blocks[block])",
        ("test_demo.py::test_notices_a_wrong_byte",),
    ),
    # Slot mappings
    Fault(
        "a token is given to the request after its own",
        SLOT_KERNEL,
        "(starts[middle] <= token ? request : end) = middle;",
        "(starts[middle] < token ? request : end) = middle;",
        (f"{SLOT_TESTS}test_random_cases[host]",),
    ),
    Fault(
        "requests of a warp end one too early",
        SLOT_KERNEL,
        "samples[i] <= token + kLanes - 1",
        "samples[i] <= token + kLanes - 2",
        (f"{SLOT_TESTS}test_random_cases[host]",),
    ),
    Fault(
        "an entry past a block table is read",
        SLOT_KERNEL,
        "  if (entry < p.table_length) {",
        "  if (entry <= p.table_length) {",
        (f"{SLOT_TESTS}test_random_cases[host]",),
    ),
    Fault(
        "slots past the last token stay",
        SLOT_KERNEL,
        "position < 0 || token >= tokens || requests.end == 0",
        "position < 0 || token > tokens || requests.end == 0",
        (f"{SLOT_TESTS}test_random_cases[host]",),
    ),
    Fault(
        "turns of context parallelism are those of another rank",
        SLOT_KERNEL,
        "turn - round * call.cp_size != call.cp_rank",
        "turn - round * call.cp_size != call.cp_rank - call.cp_rank",
        (f"{SLOT_TESTS}test_random_cases[host]",),
    ),
    Fault(
        "a position without a block is not reported",
        SLOT_KERNEL,
        "  if (!fits) report(p.report, token, position);\n",
        "",
        (f"{SLOT_TESTS}test_random_cases[host]",),
    ),
    Fault(
        "a page of another sequence is taken",
        SLOT_KERNEL,
        "after < call.num_indices ? after : call.num_indices;",
        "call.num_indices + 0 * after;",
        (f"{SLOT_TESTS}test_page_slots_on_the_host",),
    ),
    Fault(
        "too few block tables go unnoticed",
        f"{OPERATORS}/slot_mapping/descriptor.py",
        "    if tables < num_requests:",
        "    if tables < num_requests - 1:",
        (f"{SLOT_TESTS}test_what_bad_input_gets",),
    ),
    Fault(
        "an array that may be shorter is refused",
        "pagedcache/arrays/library.py",
        "one.free and not one.loose and one.name",
        "one.free and one.name",
        (f"{SLOT_TESTS}test_one_descriptor_serves_any_number_of_requests_and_tokens",),
    ),
    # Copies of blocks
    Fault(
        "a pair of a chain is done before what it overwrites was read",
        BLOCK_KERNEL,
        "      move(list.pair(node));\n      next = node + 1;",
        "      next = node + 1;",
        (f"{BLOCK_TESTS}test_random_cases_on_the_host[int32]",),
    ),
    Fault(
        "a cycle is done by nobody",
        BLOCK_KERNEL,
        "    if (node == i) return true;\n",
        "",
        (f"{BLOCK_TESTS}test_random_cases_on_the_host[int64]",),
    ),
    Fault(
        "a cycle is done by each of its pairs",
        BLOCK_KERNEL,
        "    if (node < i) return false;\n",
        "",
        (f"{BLOCK_TESTS}test_random_cases_on_the_host[int64]",),
    ),
    Fault(
        "the source of the last pair is read too late",
        BLOCK_KERNEL,
        "    tile.load(held, array.from + last.source * array.from_block);\n",
        "",
        (f"{BLOCK_TESTS}test_random_cases_on_the_host[parameters]",),
    ),
    Fault(
        "of several pairs with one target, the last is done",
        BLOCK_KERNEL,
        "list.first(pair.target) != i;",
        "list.first(pair.target) == list.count;",
        (f"{BLOCK_TESTS}test_pairs_on_a_device_that_cannot_be_copied_are_reported",),
    ),
    Fault(
        "a source past the end is read",
        BLOCK_KERNEL,
        "p.source < in_source && p.target < in_target",
        "p.target < in_target",
        (f"{BLOCK_TESTS}test_pairs_on_a_device_that_cannot_be_copied_are_reported",),
    ),
    Fault(
        "vectors past the end of a block are copied",
        BLOCK_KERNEL,
        "    left = static_cast<int>(array.vectors - index);",
        "    left = static_cast<int>(array.vectors + 1 - index);",
        (f"{BLOCK_TESTS}test_random_cases_on_the_host[parameters]",),
    ),
    Fault(
        "an axis of the target takes the steps of the source",
        BLOCK_KERNEL,
        "    to += at * axis.to;",
        "    to += at * axis.from;",
        (f"{BLOCK_TESTS}test_random_cases_on_the_host[parameters]",),
    ),
    Fault(
        "axes that are apart in one array are merged",
        f"{OPERATORS}/blocks/arrays.py",
        "merged[-1][1:] == (length * step, length * to_step)",
        "merged[-1][1] == length * step",
        (f"{BLOCK_TESTS}test_random_cases_on_the_host[parameters]",),
    ),
    Fault(
        "a wide access is used where a stride does not allow it",
        f"{OPERATORS}/blocks/arrays.py",
        "        sizes += [step for _, *steps in self.axes for step in steps]\n",
        "",
        (f"{BLOCK_TESTS}test_the_width_of_accesses",),
    ),
    Fault(
        "pairs on the host are done in the order they come in",
        f"{OPERATORS}/blocks/pairs.py",
        "        found.reverse()\n",
        "",
        (f"{BLOCK_TESTS}test_random_cases_in_numpy",),
    ),
    Fault(
        "the function keeps arrays alive",
        f"{OPERATORS}/blocks/one_call.py",
        "        _kept[key] = operation\n",
        "        _kept[key] = operation\n        operation.kept = sources\n",
        (f"{BLOCK_TESTS}test_a_descriptor_keeps_its_arrays_and_the_function_does_not",),
    ),
    # The cache
    Fault(
        "a fork writes to the block that it shares",
        KV_CACHE,
        "        if copies := self.pool.copies:\n",
        "        if copies := []:\n",
        (f"{KV_TESTS}test_a_prefix_is_found_and_a_fork_gets_its_own_block",),
    ),
    Fault(
        "blocks of host memory that are given back are still counted",
        "pagedcache/host_blocks.py",
        "        self.used -= len(blocks)\n",
        "",
        (f"{KV_TESTS}test_host_blocks_that_are_given_back_are_used_again",),
    ),
    Fault(
        "blocks that were found are brought back too",
        KV_CACHE,
        "        host = offloaded._blocks[found:]\n",
        "        host = offloaded._blocks[: len(sequence.block_table) - found]\n",
        (f"{KV_TESTS}test_offload_and_restore",),
    ),
    Fault(
        "what was not written is kept",
        KV_CACHE,
        "        sequence.free(num_written=written)\n",
        "        sequence.free()\n",
        (f"{KV_TESTS}test_what_was_not_written_is_not_kept",),
    ),
    Fault(
        "scales of a layer are those of the next",
        KV_CACHE,
        "layer * in_layer + places[number]",
        "layer * in_layer + places[number % 2]",
        (f"{KV_TESTS}test_what_is_read_back_is_what_the_operators_store",),
    ),
    Fault(
        "the last page of a full sequence is empty",
        KV_CACHE,
        "length - (length - 1) // size * size if length else 0",
        "length % size",
        (f"{KV_TESTS}test_block_tables_as_attention_kernels_take_them",),
    ),
    # The pool
    Fault(
        "the pool: heads are evicted before tails",
        f"{POOL}/blocks.py",
        "        for block in reversed(blocks):\n            if records[block] is None:",
        "        for block in blocks:\n            if records[block] is None:",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: a hit is not compared by tokens",
        f"{POOL}/prefixes.py",
        "if record[1] != part or not (",
        "if not (",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: a hit is not compared by parent",
        f"{POOL}/prefixes.py",
        "record[2] is link or (start == 0 and record[2] == link)",
        "True or (start == 0 and record[2] == link)",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: the source of a copy is not held",
        f"{POOL}/blocks.py",
        "        self._sources[source] = self._sources.get(source, 0) + 1\n",
        "",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: one block too many is found",
        f"{POOL}/blocks.py",
        'self._make("token_ids", token_ids, key, to_compute=1, publish=publish)',
        'self._make("token_ids", token_ids, key, to_compute=0, publish=publish)',
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: an append writes into a shared block",
        f"{POOL}/blocks.py",
        "copies = start % size and table[-1] in self._more_holders",
        "copies = False",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: the copy of a freed target is kept",
        f"{POOL}/blocks.py",
        "        dropped = [(copies.pop(target), target) for target in blocks if target in copies]",
        "        dropped = [(copies.pop(target), target) for target in blocks if False]",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: num_written off by one block",
        f"{POOL}/blocks.py",
        "self._forget(table[num_written // self._block_size :])",
        "self._forget(table[num_written // self._block_size + 1 :])",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: hits count as room",
        f"{POOL}/blocks.py",
        "free = len(self._free) + len(idle) - len(revived)",
        "free = len(self._free) + len(idle)",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: a dead parent is ignored",
        f"{POOL}/blocks.py",
        " or not prefixes.is_found(link):",
        ":",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: key ignored in the root",
        f"{POOL}/hashes.py",
        "sha256(_ROOT + key)",
        "sha256(_ROOT)",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: twin forgotten when the first is evicted",
        f"{POOL}/prefixes.py",
        "            twins = self.twins.get(record[0])\n            if twins is None:",
        "            twins = None\n            if twins is None:",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: copy of a copy from the copy",
        f"{POOL}/blocks.py",
        "        source = self._copies.get(last, last)",
        "        source = last",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: free used first-freed first",
        f"{POOL}/blocks.py",
        "            taken.reverse()\n",
        "            pass\n",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: the log forgets copies",
        f"{POOL}/log.py",
        "                self.count(source, -1, copies=-1)",
        "                pass",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: a subscriber's error goes through",
        f"{POOL}/blocks.py",
        "    except Exception:",
        "    except ZeroDivisionError:",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "the pool: the big-endian order is kept",
        f"{POOL}/hashes.py",
        "        tokens.byteswap()\n",
        "",
        ("test_pool.py", "test_pool_model.py"),
    ),
    Fault(
        "copies of blocks on the CPU: only what fits the temporary is copied",
        "pagedcache/operators/blocks/cpu.py",
        "for first in range(0, len(pairs), at_once):",
        "for first in range(0, min(len(pairs), at_once), at_once):",
        ("test_blocks.py",),
    ),
    # Other processes
    Fault(
        "transfer: a word is not cleared",
        f"{TRANSFER}/board.py",
        "        self.words[0, grant.place] = 0\n",
        "",
        (f"{TRANSFER_TESTS}test_a_withdrawn_offer_never_gives_wrong_bytes",),
    ),
    Fault(
        "transfer: blocks are sent to a side that was closed",
        f"{TRANSFER}/peer.py",
        "        yield from self._must_be_there(EAGER)\n",
        "",
        (f"{TRANSFER_TESTS}test_the_word_that_close_clears_first_is_enough",),
    ),
    Fault(
        "transfer: what was fetched of a side that was closed counts",
        f"{TRANSFER}/peer.py",
        "        yield from self._must_be_there()\n\n    def _read",
        "\n    def _read",
        (f"{TRANSFER_TESTS}test_the_word_that_close_clears_first_is_enough",),
    ),
    Fault(
        "transfer: nobody looks whether an offer still stands",
        f"{TRANSFER}/handover.py",
        "        if not (yield from self.peer._is_granted(*self._grant)):\n",
        "        if False:\n",
        (f"{TRANSFER_TESTS}test_a_withdrawn_offer_never_gives_wrong_bytes",),
    ),
    Fault(
        "transfer: what has arrived is not found",
        f"{TRANSFER}/handover.py",
        "            self._sequence.publish()\n",
        "            pass\n",
        (f"{TRANSFER_TESTS}test_what_was_accepted_is_found_by_others",),
    ),
    Fault(
        "transfer: blocks that were not written are found",
        f"{TRANSFER}/handover.py",
        "        if self._written // size >= self._sequence.num_tokens // size:\n",
        "        if True:\n",
        (f"{TRANSFER_TESTS}test_part_of_a_sequence",),
    ),
    Fault(
        "transfer: what is on its way is found",
        f"{TRANSFER}/handover.py",
        "key=key, publish=False)",
        "key=key)",
        (f"{TRANSFER_TESTS}test_a_sequence_that_is_on_its_way_is_not_found",),
    ),
    Fault(
        "transfer: a sequence that does not fit is forgotten",
        f"{TRANSFER}/handover.py",
        "        if error.needed > _cache_of(peer.agent).num_blocks:  # it will never fit\n",
        "        if True:\n",
        (f"{TRANSFER_TESTS}test_what_was_handed_over_and_cannot_be_taken",),
    ),
    Fault(
        "transfer: a cache hands over what was not written",
        KV_CACHE,
        "hand_over(sequence, num_written, stream)",
        "hand_over(sequence, None, stream)",
        (f"{TRANSFER_TESTS}test_part_of_a_sequence",),
    ),
    Fault(
        "transfer: a region is used again before all of it was read",
        f"{TRANSFER}/packing.py",
        "        if not self._regions[first]:\n",
        "        if True:\n",
        (f"{TRANSFER_TESTS}test_scattered_blocks_are_packed_on_both_sides",),
    ),
    Fault(
        "transfer: the second part of a packed list goes where the first went",
        f"{TRANSFER}/packing.py",
        "        slots, targets = slots[count:], targets[count:]\n",
        "        slots = slots[count:]\n",
        (f"{TRANSFER_TESTS}test_scattered_blocks_are_packed_on_both_sides",),
    ),
    Fault(
        "transfer: a side that is gone is waited for",
        f"{TRANSFER}/packing.py",
        "        if time.monotonic() - self._since > PROBE:\n",
        "        if False:\n",
        (f"{TRANSFER_TESTS}test_a_side_that_is_gone_before_it_packs_or_unpacks",),
    ),
    Fault(
        "transfer: parts of a packed block overlap",
        f"{TRANSFER}/packing.py",
        "itertools.accumulate(parts, initial=0)",
        "itertools.accumulate([each // 2 for each in parts], initial=0)",
        (f"{TRANSFER_TESTS}test_scattered_blocks_are_packed_on_both_sides",),
    ),
    Fault(
        "the pool: a hidden sequence that relies on what was forgotten is found",
        f"{POOL}/blocks.py",
        "        if not self._may_publish(sequence):\n            return\n        size, last",
        "        size, last",
        ("test_pool.py::test_a_hidden_sequence_is_never_found_if_it_cannot_be_trusted",),
    ),
    Fault(
        "the pool: a hidden sequence is found when it grows",
        f"{POOL}/blocks.py",
        "        if publish:\n            sequence._link = link\n        elif link is not None:\n",
        "        sequence._link = link\n        if not publish and link is not None:\n",
        ("test_pool.py::test_a_hidden_sequence_is_found_once_it_is_published",),
    ),
    Fault(
        "transfer: an offer that never fits stops all later ones",
        f"{TRANSFER}/handover.py",
        "        if error.needed > _cache_of(peer.agent).num_blocks:  # it will never fit\n",
        "        if False:\n",
        (f"{TRANSFER_TESTS}test_an_offer_that_never_fits_does_not_stop_others",),
    ),
    Fault(
        "transfer: nobody is told of a withdrawal",
        f"{TRANSFER}/handover.py",
        '            self._peer._try_to_send(b"pagedcache withdrawn %d" % self._grant.word)\n',
        "            pass\n",
        (f"{TRANSFER_TESTS}test_an_offer_that_was_withdrawn_does_not_stop_others",),
    ),
    Fault(
        "transfer: what a transfer has come to is forgotten once somebody has looked",
        f"{TRANSFER}/link.py",
        "        if flight.result:\n            return flight.result\n",
        "",
        (f"{TRANSFER_TESTS}test_an_interruption_leaves_other_jobs_alone",),
    ),
    Fault(
        "transfer: regions that were left behind stay taken",
        f"{TRANSFER}/agent.py",
        "                free()\n",
        "                pass\n",
        (f"{TRANSFER_TESTS}test_an_interruption_while_blocks_are_taken",),
    ),
    Fault(
        "transfer: a side that is gone takes its successor with it",
        f"{TRANSFER}/peer.py",
        "        if agent._peers.get(self._id) is self:\n",
        "        if True:\n",
        (f"{TRANSFER_TESTS}test_a_network_that_failed",),
    ),
    Fault(
        "transfer: nobody is told of blocks that cannot be packed",
        f"{TRANSFER}/packing.py",
        "            if self.left and self._wanted_by is not None and not self.failed:\n",
        "            if False:\n",
        (f"{TRANSFER_TESTS}test_a_side_that_cannot_pack_says_so",),
    ),
    Fault(
        "transfer: a region is free while it may be read to",
        f"{TRANSFER}/packing.py",
        "                agent._free_later(functools.partial(staging.free_coming.append, first))\n",
        "                staging.free_coming.append(first)\n",
        (f"{TRANSFER_TESTS}test_an_interruption_while_blocks_are_taken",),
    ),
    Fault(
        "transfer: sides that are gone are kept",
        f"{TRANSFER}/peer.py",
        "            known.pop(self._id, None)\n",
        "            pass\n",
        (f"{TRANSFER_TESTS}test_a_peer_that_has_died",),
    ),
    Fault(
        "transfer: regions of a peer that died stay taken",
        f"{TRANSFER}/packing.py",
        "            staging.free_going += self._regions\n",
        "",
        (f"{TRANSFER_TESTS}test_a_third_side_is_served_after_one_has_died",),
    ),
    Fault(
        "transfer: only the job that is waited for goes on",
        f"{TRANSFER}/agent.py",
        "        for job in list(self._jobs):\n            job._step()\n",
        "",
        (f"{TRANSFER_TESTS}test_jobs_may_be_waited_for_in_any_order",),
    ),
    Fault(
        "transfer: nobody is told of blocks that could not be taken",
        f"{TRANSFER}/packing.py",
        'peer._try_to_send(message_of("failed"',
        '(message_of("failed"',
        (f"{TRANSFER_TESTS}test_blocks_that_cannot_be_taken",),
    ),
    Fault(
        "transfer: blocks are unpacked after their fetch has failed",
        f"{TRANSFER}/packing.py",
        "if self.error is not None and not self.taking:",
        "if self.error is not None:",
        (f"{TRANSFER_TESTS}test_parts_that_are_taken_after_one_has_failed",),
    ),
    Fault(
        "transfer: an interrupted job is done",
        f"{TRANSFER}/jobs.py",
        '            self._fail(TransferError(repr(self), rule, "agent"))\n',
        "",
        (f"{TRANSFER_TESTS}test_an_interrupted_fetch_is_not_done",),
    ),
    Fault(
        "transfer: places of failed reads are lost",
        f"{TRANSFER}/peer.py",
        "        except TransferError:\n            board.give_back(here)\n            raise\n",
        "        finally:\n            pass\n",
        (f"{TRANSFER_TESTS}test_failed_transfers_leave_nothing_behind",),
    ),
    Fault(
        "transfer: a forked child ends what its parent uses",
        f"{TRANSFER}/link.py",
        "os.register_at_fork(after_in_child=_after_fork)\n",
        "",
        (f"{TRANSFER_TESTS}test_a_forked_process_that_ends_disturbs_nobody",),
    ),
    Fault(
        "a restored sequence is found before all of it was written",
        KV_CACHE,
        "publish=offloaded._publish",
        "publish=True",
        (f"{KV_TESTS}test_what_was_not_written_is_not_found_after_it_was_restored",),
    ),
    Fault(
        "the pool: what two publish is told twice",
        f"{POOL}/blocks.py",
        "found[b] is r and b not in known",
        "found[b] is r",
        ("test_pool.py::test_a_block_is_stored_once_whoever_publishes_it",),
    ),
)

# What only a GPU shows: its streams, and which device is current.
GPU = "test_nvidia.py::"
GPU_FAULTS = (
    Fault(
        "tensors of PyTorch are written on the default stream",
        f"{ARRAY_LIBRARIES}/torch.py",
        "return functools.partial(self._stream_handle, device)",
        "return lambda: 0",
        (f"{GPU}test_torch_streams_with_a_late_producer",),
    ),
    Fault(
        "arrays of JAX are read before they are computed",
        f"{ARRAY_LIBRARIES}/jax.py",
        "            array.block_until_ready()\n",
        "",
        (f"{GPU}test_jax_arrays_that_are_still_computed",),
    ),
    Fault(
        "the operator of PyTorch is not there for CUDA",
        "pagedcache/torch.py",
        'torch.library.impl(_name, ("cpu", "cuda"), _function)',
        'torch.library.impl(_name, ("cpu",), _function)',
        (f"{GPU}test_torch_compile_on_the_gpu",),
    ),
    # With two GPUs
    Fault(
        "all arrays of CuPy are on the first GPU",
        f"{ARRAY_LIBRARIES}/cupy.py",
        'device = f"{self._kind}:{memory.device_id}"',
        'device = f"{self._kind}:0"',
        (f"{GPU}test_second_device_while_the_first_is_current",),
    ),
    Fault(
        "memory is allocated on the current GPU",
        f"{BACKEND}/context.py",
        "            with cupy.cuda.Device(self.index), self._outside_captures():\n",
        "            with self._outside_captures():\n",
        (f"{GPU}test_second_device_while_the_first_is_current",),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if a fault was not found or does not apply, else 0."""
    parser = argparse.ArgumentParser(description="Plant faults and see whether the tests find them")
    parser.add_argument("names", nargs="*", metavar="name", help="parts of names (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time (default: 2)")
    parser.add_argument("--gpu", action="store_true", help="plant those that only a GPU finds")
    parser.add_argument("--list", action="store_true", help="print the names and plant nothing")
    parsed = parser.parse_args(arguments)
    table = GPU_FAULTS if parsed.gpu else FAULTS
    chosen = [
        fault for fault in table
        if not parsed.names or any(name in fault.name for name in parsed.names)
    ]  # fmt: skip
    if parsed.list:
        print("\n".join(f"{fault.name}  ({', '.join(fault.tests)})" for fault in chosen))
        return 0
    if not chosen:
        print(f"No fault has a name with {' or '.join(parsed.names)} in it.")
        return 1
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        return plant(chosen, parsed.jobs, Path(folder))


def plant(faults: Sequence[Fault], jobs: int, folder: Path) -> int:
    """Plant faults in copies of the checkout within a folder; return the exit code."""
    whole = folder / "unchanged"
    copy_checkout(whole)
    print(f"{len(faults)} faults. First their tests on an unchanged copy ...", flush=True)
    began = time.monotonic()
    tests = dict.fromkeys(test for fault in faults for test in fault.tests)
    if said := failure_on(whole, tests):
        print(f"The tests do not pass without a fault:\n{said}")
        return 1
    print(f"... pass in {time.monotonic() - began:.0f} s.", flush=True)
    outcomes: dict[str, list[str]] = {}
    for fault in GPU_FAULTS:  # which are not planted here, but must not be out of date
        if text_with(fault, whole) is None:
            outcomes.setdefault(DOES_NOT_APPLY, []).append(fault.name)
            print(f"           {DOES_NOT_APPLY:<14}  {fault.name}", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        pending = {
            pool.submit(outcome, fault, whole, folder / str(number)): fault
            for number, fault in enumerate(faults)
        }
        for done, future in enumerate(as_completed(pending), 1):
            result, name = future.result(), pending[future].name
            outcomes.setdefault(result, []).append(name)
            print(f"{done:>4}/{len(faults)}  {result:<14}  {name}", flush=True)
    missed = [name for kind in (NOT_FOUND, DOES_NOT_APPLY) for name in outcomes.get(kind, [])]
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in sorted(outcomes.items()))
    print(f"{len(faults)} faults in {time.monotonic() - began:.0f} s: {counts}")
    return 1 if missed else 0


def outcome(fault: Fault, whole: Path, copy: Path) -> str:
    """Return what became of a fault that is planted in a copy of its own."""
    shutil.copytree(whole, copy)
    try:
        text = text_with(fault, copy)
        if text is None:
            return DOES_NOT_APPLY
        (copy / fault.file).write_text(text, "utf-8")
        return FOUND if failure_on(copy, fault.tests) else NOT_FOUND
    except subprocess.TimeoutExpired:
        return HANGS
    finally:
        shutil.rmtree(copy)


def text_with(fault: Fault, copy: Path) -> str | None:
    """Return the text of a fault's file with the fault, or None if it does not apply."""
    file = copy / fault.file
    text = file.read_text("utf-8") if file.exists() else ""
    return text.replace(fault.old, fault.new) if text.count(fault.old) == 1 else None


def copy_checkout(to: Path) -> None:
    """Copy the files that git tracks, as they are in the working tree, and new files of tests."""
    listed = ["git", "ls-files", "-z", "--cached"]
    new = ["git", "ls-files", "-z", "--others", "--exclude-standard", "tests"]
    for command in (listed, new):
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        for name in filter(None, done.stdout.split("\0")):
            if (CHECKOUT / name).is_file():  # not one that was deleted in the working tree
                (to / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(CHECKOUT / name, to / name)


def failure_on(copy: Path, tests: Iterable[str]) -> str:
    """Run tests in a copy, with the package of that copy; return what a failure said, or nothing.

    Raises
    ------
    subprocess.TimeoutExpired
        They do not end.
    """
    variables = {name: value for name, value in os.environ.items() if name != "PAGEDCACHE_DEBUG"}
    environment = {
        **variables,
        "PYTHONPATH": str(copy),  # ahead of the editable install of the checkout
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    found = _run([sys.executable, "-c", "import pagedcache; print(pagedcache.__file__)"],
                 copy, environment)  # fmt: skip
    if found.returncode == 0 and Path(found.stdout.strip()).parents[1] != copy.resolve():
        raise RuntimeError(f"not the package of the copy is imported, but {found.stdout.strip()}")
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
    paths = [f"tests/{test}" for test in tests]
    done = _run([sys.executable, "-m", "pytest", *options, *paths], copy, environment)
    shutil.rmtree(copy / ".hypothesis", ignore_errors=True)  # what it learned from this fault
    return "" if done.returncode == 0 else done.stdout + done.stderr or str(done.returncode)


def _run(
    command: Sequence[str], folder: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False,
        timeout=TIME_LIMIT,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
