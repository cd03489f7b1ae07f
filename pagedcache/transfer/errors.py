# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between two sides, and waiting for them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from numbers import Real
from typing import Any

from pagedcache.status import BadParamError, BadParamTypeError, InternalError, shown


class TransferError(InternalError):
    """Blocks did not arrive, or not all of them. What the targets hold is not known.

    Attributes
    ----------
    side : {"peer", "agent", "unknown"}
        Which side failed: the other one, this one, or it cannot be told, as for a network.
    """

    def __init__(self, subject: str, rule: str, side: str = "unknown") -> None:
        super().__init__(subject, rule)
        self.side = side

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.side)


class TransferTimeoutError(TransferError, TimeoutError):
    """The time that `wait` was given is over. What it waited for goes on, and may still happen."""


def check_timeout(timeout: float | None) -> float | None:
    """Return seconds to wait for; raises if that is no time."""
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, Real):
        rule = "must be a number of seconds or None"
        raise BadParamTypeError("timeout", rule, shown(timeout))
    if not timeout >= 0:
        raise BadParamError("timeout", "must be at least 0 seconds", timeout)
    try:
        return float(timeout)
    except OverflowError:
        return math.inf


def wait_for(
    done: Callable[[], bool],
    timeout: float | None,
    subject: str,
    longest: float = 1e-3,
    rule: str = "is not done after {:g} s; it goes on, so wait again",
) -> None:
    """Call a function until it returns True, with pauses of at most so many seconds.

    Raises
    ------
    TransferTimeoutError
        It is not done after `timeout` seconds.
    """
    timeout = check_timeout(timeout)
    began = time.monotonic()
    while not done():
        passed = time.monotonic() - began
        pause = min(passed / 20, longest)  # short at first, so that short transfers take no longer
        if timeout is not None:
            if passed >= timeout:
                raise TransferTimeoutError(subject, rule.format(timeout))
            pause = min(pause, timeout - passed)
        time.sleep(pause)
