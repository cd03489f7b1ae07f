# SPDX-License-Identifier: Apache-2.0
"""Environment variables that turn a feature on or off."""

from __future__ import annotations

import os

from pagedcache.status import BadParamError


def switched_on(name: str, *, default: bool) -> bool:
    """Return whether an environment variable is 1; `default` if it is unset or empty.

    Raises
    ------
    BadParamError
        The variable is neither 0 nor 1.
    """
    value = os.environ.get(name) or str(int(default))
    if value not in ("0", "1"):
        raise BadParamError(f"environment variable {name}", "must be 0 or 1", repr(value))
    return value == "1"
