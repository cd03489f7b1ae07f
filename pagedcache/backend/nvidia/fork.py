# SPDX-License-Identifier: Apache-2.0
"""Whether this process was forked from one that had used CUDA, which CUDA does not survive."""

from __future__ import annotations

import os

RULE = (
    "cannot be used in a process that was forked after CUDA was initialized; start processes with "
    "multiprocessing's 'spawn' method, or use CUDA only in them"
)

_user: int | None = None


def note_use() -> None:
    """Remember that this process uses CUDA."""
    global _user
    if _user is None:
        _user = os.getpid()


def forked() -> bool:
    """Return whether this process was forked from one that had used CUDA through this package."""
    return _user not in (None, os.getpid())
