# SPDX-License-Identifier: Apache-2.0
"""The paged caching write as one function."""

from __future__ import annotations

import functools
from typing import Any

from pagedcache.operators.one_call import Kept
from pagedcache.operators.paged_caching.descriptor import Descriptor
from pagedcache.operators.paged_caching.info import PagedCachingInfo


def paged_caching(
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    slot_mapping: Any,
    *,
    k_scale: Any = None,
    v_scale: Any = None,
    k_format: str | None = None,
    v_format: str | None = None,
    layout: str | None = None,
    stream: Any = None,
    on_invalid: str = "skip",
) -> None:
    """Write the K and V of each token to its slot, in one call.

    The first call for arrays of some dtypes, shapes, strides and device creates a descriptor; later
    calls, with any number of tokens, find it again.

    Parameters
    ----------
    k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale : array
        See `Descriptor.create`.
    k_format, v_format : str, optional
        See `Descriptor.create`.
    layout : {"HND", "NHD"}, optional
        See `Descriptor.create`.
    stream : optional
        See `Descriptor.calculate`, also for what is and is not synchronized.
    on_invalid : {"skip", "raise"}
        See `Descriptor.create`. Slots that are skipped here are not reported; use a descriptor and
        its `check` for that.

    Raises
    ------
    PagedCacheError
        Before anything is queued or written, except for a `LaunchError` and, with
        ``on_invalid="raise"``, an `InvalidSlotError`.

    Notes
    -----
    The first call for new shapes compiles, as `Descriptor.create` does, so make it before a stream
    capture begins. Any number of threads may call this at the same time. The 256 descriptors that
    were found again most recently are kept. The environment variable ``PAGEDCACHE_DEBUG`` is read
    when a descriptor is created.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> cache = np.zeros((2, 4, 1, 2, 8), np.float16)  # K and V: 4 blocks, 1 head, 2 slots, size 8
    >>> k, v = np.ones((3, 1, 8), np.float16), np.full((3, 1, 8), 2, np.float16)
    >>> pc.paged_caching(cache[0], cache[1], k, v, np.array([6, -1, 1]))
    >>> cache[0, :, 0, :, 0].tolist()  # slot 6 is block 3, offset 0; -1 is padding
    [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    """
    recent = _kept.recent
    for entry in recent:
        known_layout, known_on_invalid, known_k_format, known_v_format, descriptor = entry
        if (
            layout is known_layout
            and on_invalid is known_on_invalid
            and k_format is known_k_format
            and v_format is known_v_format
            and descriptor.latest(k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale, stream)
        ):
            if entry is not recent[0]:
                _kept.found(entry)
            return
    arrays = (k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale)
    _kept.run(arrays, (layout, on_invalid, k_format, v_format), stream)


def _create(*arrays_and_options: Any) -> Descriptor:
    *arrays, layout, on_invalid, k_format, v_format = arrays_and_options
    return Descriptor._create(
        tuple(arrays),
        functools.partial(
            PagedCachingInfo.create, layout=layout, k_format=k_format, v_format=v_format
        ),
        handle=None,
        on_invalid=on_invalid,
        debug=None,
        reported=False,
    )


_kept = Kept(Descriptor, _create)
