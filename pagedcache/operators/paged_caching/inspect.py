# SPDX-License-Identifier: Apache-2.0
"""What debug mode looks for in the data of a write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.cache.sides import refuse_bad_scales
from pagedcache.dtypes import BF16, F16, F32, Dtype
from pagedcache.status import DuplicateSlotError, NonFiniteError

if TYPE_CHECKING:
    from pagedcache.operators.slot_operation import SlotInfo
    from pagedcache.tensors import Array

_EXPONENTS = {F16: 0x7C00, BF16: 0x7F80, F32: 0x7F800000}  # all ones: infinity or NaN


def inspect(info: SlotInfo, data: Mapping[str, Array]) -> None:
    """Raise for two tokens with one slot, and for a value or a scale that cannot be right.

    Parameters
    ----------
    info : SlotInfo
    data : mapping of str to array
        `k`, `v`, `slot_mapping` and scales that are read, as ints of their item size.

    Raises
    ------
    DuplicateSlotError, NonFiniteError, BadParamError
    """
    slots = data["slot_mapping"]
    written = np.flatnonzero((slots >= 0) & (slots < info.num_slots))
    _refuse_duplicates(slots, written)
    for name in ("k", "v"):
        _refuse_non_finite(name, data[name], info.dtype, written)
    refuse_bad_scales(info.sides, data)


def _refuse_duplicates(slots: Array, written: Array) -> None:
    order = written[np.argsort(slots[written], kind="stable")]
    twice = np.flatnonzero(slots[order[1:]] == slots[order[:-1]])
    if twice.size:
        # Of all such pairs, the one whose second token comes first.
        at = twice[order[twice + 1].argmin()]
        first, second = order[at], order[at + 1]
        rule = f"must not have a slot twice, but tokens {first} and {second} have the same one"
        raise DuplicateSlotError("slot_mapping", rule, f"slot {slots[first]}")


def _refuse_non_finite(name: str, rows: Array, dtype: Dtype, written: Array) -> None:
    mask = _EXPONENTS[dtype]
    bad = (rows & mask) == mask
    found = np.argwhere(bad[written])
    if found.size:
        at, head, element = map(int, found[0])
        token = int(written[at])
        value = rows[token, head, element].view(dtype)
        raise NonFiniteError(f"{name}[{token}, {head}, {element}]", "must be finite", value)
