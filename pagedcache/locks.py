# SPDX-License-Identifier: Apache-2.0
"""Locks that are free in a forked process, whoever held them in its parent."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any


def make_lock() -> Any:
    """Return a `threading.Lock` that is free in a forked process.

    A lock that another thread holds during a ``fork`` would stay locked in the child forever, since
    that thread does not exist there. What such a lock guards must be usable at any point.
    """
    # Not a class of our own: in its __enter__ and __exit__, which are Python, a KeyboardInterrupt
    # could come between taking the lock and entering the block.
    made = threading.Lock()
    _locks.add(made)
    return made


_locks: weakref.WeakSet[Any] = weakref.WeakSet()


def _free_all() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()  # what Python's own modules use for this


os.register_at_fork(after_in_child=_free_all)
