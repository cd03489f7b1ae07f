# SPDX-License-Identifier: Apache-2.0
"""Token ids of any kind, as int32."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Iterable
from typing import Any

from pagedcache.status import BadParamError, BadParamTypeError, shown

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1
TOKEN_BYTES = array("i").itemsize


def as_tokens(token_ids: Any) -> array[int]:
    """Return a copy of token ids as int32.

    Raises
    ------
    BadParamTypeError
        They are not a series of ints.
    BadParamError
        One of them is outside int32.
    """
    if type(token_ids) is array and token_ids.typecode == "i":
        return token_ids[:]
    values: Any = token_ids
    if not isinstance(token_ids, list | tuple | range):
        tokens = _copy_of_int32(token_ids)
        if tokens is not None:
            return tokens
        values = _as_list(token_ids)
    try:
        return array("i", values)
    except (TypeError, OverflowError):
        raise _what_is_wrong(values) from None


def as_token(token_id: Any) -> int | None:
    """Return a single token id as an int, or None if this is a series of them."""
    if isinstance(token_id, list | tuple | range | array):
        return None
    try:
        token = operator.index(token_id)
    except TypeError:
        return None
    if not _LOWEST <= token <= _HIGHEST:
        raise _not_int32("token_ids", token)
    return token


def _copy_of_int32(values: Any) -> array[int] | None:
    """Return the memory of int32 in a row, such as a NumPy array, as it is; None for others."""
    try:
        view = memoryview(values)
    except TypeError:
        return None
    if view.format != "i" or view.ndim != 1:
        return None
    tokens = array("i")
    tokens.frombytes(view.tobytes())
    return tokens


def _as_list(values: Any) -> list[Any]:
    # Arrays of all libraries have tolist, which is far faster than iterating over them.
    to_list = getattr(values, "tolist", None)
    try:
        listed = list(values) if to_list is None else to_list()
    except TypeError as error:
        if isinstance(values, Iterable):
            raise  # from inside a generator of the caller's
        raise _not_a_series(values) from error
    if not isinstance(listed, list):
        raise _not_a_series(values)
    if to_list is not None and listed and isinstance(listed[0], bool):
        raise BadParamTypeError("token_ids", "must be ints", "an array of bools")
    return listed


def _what_is_wrong(values: Iterable[Any]) -> BadParamError:
    for place, value in enumerate(values):
        try:
            token = operator.index(value)
        except TypeError:
            if isinstance(value, list):
                return BadParamTypeError("token_ids", "must have one axis", "several")
            rule = "must be an int that fits into int32"
            return BadParamTypeError(f"token_ids[{place}]", rule, shown(value))
        if not _LOWEST <= token <= _HIGHEST:
            return _not_int32(f"token_ids[{place}]", token)
    return _not_a_series(values)


def _not_int32(subject: str, token: int) -> BadParamError:
    rule = f"must fit into int32, {_LOWEST} to {_HIGHEST}"
    return BadParamError(subject, rule, shown(token))


def _not_a_series(values: object) -> BadParamError:
    rule = "must be a list, an array or another series of ints"
    return BadParamTypeError("token_ids", rule, shown(values))
