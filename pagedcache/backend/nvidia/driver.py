# SPDX-License-Identifier: Apache-2.0
"""Calls to the CUDA driver that CuPy does not offer, through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from typing import Any

_LIBRARY = "libcuda.so.1"
_CAPTURE_MODE_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


@functools.cache
def library() -> Any:
    """Return the driver.

    Raises
    ------
    OSError
        There is none on this machine.
    """
    # CDLL, not PyDLL: a launch may wait for room in its queue, and must not hold the GIL then.
    return ctypes.CDLL(_LIBRARY)


@contextlib.contextmanager
def relaxed_capture_mode() -> Iterator[None]:
    """Allow calls, on this thread, that would end a capture which another thread has begun.

    A capture in the default, global mode forbids allocating, copying and waiting to all threads,
    because that might be meant to be captured. What is done here never is.
    """
    exchange = library().cuThreadExchangeStreamCaptureMode
    mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
    exchange(ctypes.byref(mode))
    try:
        yield
    finally:
        exchange(ctypes.byref(mode))
