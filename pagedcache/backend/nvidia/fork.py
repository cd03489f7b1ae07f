"""Whether this process was forked from one that used CUDA, which CUDA does not survive."""

from __future__ import annotations

import os

RULE = (
    "was in use before this process was forked, and CUDA does not survive that; start processes "
    "with multiprocessing's 'spawn' method, or use CUDA in them only"
)

_user: int | None = None


def note_use() -> None:
    """Remember that this process uses CUDA."""
    global _user
    if _user is None:
        _user = os.getpid()


def forked() -> bool:
    """Tell whether CUDA was in use when this process was forked."""
    return _user not in (None, os.getpid())
