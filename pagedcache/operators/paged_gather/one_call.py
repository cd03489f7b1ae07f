# SPDX-License-Identifier: Apache-2.0
"""The paged gather as one function."""

from __future__ import annotations

import functools
from typing import Any

from pagedcache.operators.one_call import Kept
from pagedcache.operators.paged_gather.descriptor import GatherDescriptor
from pagedcache.operators.paged_gather.info import PagedGatherInfo


def paged_gather(
    k_cache: Any,
    v_cache: Any,
    slot_mapping: Any,
    k_out: Any,
    v_out: Any,
    *,
    layout: str | None = None,
    k_scale: Any = None,
    v_scale: Any = None,
    k_format: str | None = None,
    v_format: str | None = None,
    stream: Any = None,
    on_invalid: str = "skip",
) -> None:
    """Read what is stored in the slot of each token into its row of the outputs, in one call.

    The first call for arrays of some dtypes, shapes, strides and device creates a descriptor; later
    calls, with any number of tokens, find it again.

    Parameters
    ----------
    k_cache, v_cache, slot_mapping, k_out, v_out : array
        See `GatherDescriptor.create` and `GatherDescriptor.calculate`.
    layout, k_scale, v_scale, k_format, v_format : optional
        See `GatherDescriptor.create`.
    stream : optional
        See `GatherDescriptor.calculate`, also for what is and is not synchronized.
    on_invalid : {"skip", "raise"}
        See `GatherDescriptor.create`. Slots that are skipped here are not reported; use a
        descriptor and its `check` for that.

    Raises
    ------
    PagedCacheError
        Before anything is queued or written, except for a `LaunchError` and, with
        ``on_invalid="raise"``, an `InvalidSlotError`.

    Notes
    -----
    The first call for new shapes compiles, so make it before a stream capture begins. Any number of
    threads may call this at the same time. The 256 descriptors that were found again most recently
    are kept.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> k_cache = np.arange(8, dtype=np.float32).reshape(4, 1, 2, 1)  # 4 blocks of 2 slots
    >>> rows = np.zeros((3, 1, 1), np.float32)
    >>> pc.paged_gather(k_cache, None, np.array([6, -1, 1]), rows, None)
    >>> rows.ravel().tolist()
    [6.0, 0.0, 1.0]
    """
    arrays = (k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale)
    options = (layout, on_invalid, k_format, v_format)
    if not _kept.run_recent(arrays, options, stream):
        _kept.run(arrays, options, stream)


def _create(*arrays_and_options: Any) -> GatherDescriptor:
    *arrays, layout, on_invalid, k_format, v_format = arrays_and_options
    return GatherDescriptor._create(
        tuple(arrays),
        functools.partial(
            PagedGatherInfo.create, layout=layout, k_format=k_format, v_format=v_format
        ),
        handle=None,
        on_invalid=on_invalid,
        debug=None,
        reported=False,
    )


_kept = Kept(GatherDescriptor, _create)
