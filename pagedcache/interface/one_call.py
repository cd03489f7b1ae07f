"""The operator as one function: descriptors are found again, not made again."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from pagedcache.arrays import adopt
from pagedcache.info import NAMES, token_step
from pagedcache.interface.descriptor import Descriptor

if TYPE_CHECKING:
    from pagedcache.tensors import Tensor


def paged_caching(
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    slot_mapping: Any,
    *,
    layout: str = "HND",
    stream: Any = None,
    on_invalid: str = "skip",
) -> None:
    """Write the K and V of each token to its slot, in one call.

    The descriptor for arrays of these shapes, strides, dtypes and device is made on the first call
    and found again on later ones.

    Parameters
    ----------
    k_cache, v_cache, k, v, slot_mapping : array
        See `Descriptor.create`.
    layout : {"HND", "NHD"}
    stream : optional
        See `Descriptor.calculate`, also for what is and is not synchronised.
    on_invalid : {"skip", "raise"}
        See `Descriptor.create`. What is skipped is told to nobody here.

    Raises
    ------
    PagedCacheError
        Before anything is launched and with nothing written, but for a `LaunchError` and, with
        ``on_invalid="raise"``, an `InvalidSlotError`.

    Notes
    -----
    A first call for new shapes compiles, as `Descriptor.create` does: make it before a capture. Any
    number of threads may call this at once. The environment variable ``PAGEDCACHE_DEBUG`` counts
    when the descriptor is made, which is kept until 256 others were needed.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> cache = np.zeros((2, 4, 1, 2, 8), np.float16)  # K and V: 4 blocks of 2 slots, 1 head of 8
    >>> k, v = np.ones((3, 1, 8), np.float16), np.full((3, 1, 8), 2, np.float16)
    >>> pc.paged_caching(cache[0], cache[1], k, v, np.array([6, -1, 1]))
    >>> cache[0, :, 0, :, 0].tolist()  # slot 6 is block 3, offset 0; -1 is padding
    [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    """
    global _latest
    latest_layout, latest_on_invalid, descriptor = _latest  # read once: threads may replace it
    if (
        layout is not latest_layout
        or on_invalid is not latest_on_invalid
        or not descriptor.write_again(k_cache, v_cache, k, v, slot_mapping, stream)
    ):
        arrays = (k_cache, v_cache, k, v, slot_mapping)
        descriptor = _find_descriptor(arrays, layout, on_invalid)
        descriptor.calculate(*arrays, stream=stream)
        _latest = layout, on_invalid, descriptor


_MOST_DESCRIPTORS = 256
_descriptors: dict[Any, Descriptor] = {}
_keeping = threading.Lock()
# Options of the latest call, and the descriptor that served it.
_latest: tuple[Any, Any, Any] = (object(), None, None)


def _find_descriptor(arrays: tuple[Any, ...], layout: str, on_invalid: str) -> Descriptor:
    tensors = [adopt(name, array) for name, array in zip(NAMES, arrays, strict=True)]
    create = functools.partial(Descriptor.create, *arrays, layout=layout, on_invalid=on_invalid)
    if type(layout) is not str or type(on_invalid) is not str:
        return create()  # which refuses what is no string at all
    key = (layout, on_invalid, *(_signature(tensor) for tensor in tensors))
    descriptor = _descriptors.get(key)
    if descriptor is None:
        descriptor = create()
        with _keeping:
            while len(_descriptors) >= _MOST_DESCRIPTORS:
                del _descriptors[next(iter(_descriptors))]
            _descriptors[key] = descriptor
    return descriptor


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
    # The token axis is free, and it is the first of every tensor that is not a cache.
    if len(shape) == 3:
        step = token_step(shape, strides, dtype.itemsize)
        return dtype, shape[1:], (step, *strides[1:]), tensor.device
    if len(shape) == 1 and shape[0] <= 1:
        strides = (dtype.itemsize,)  # a step that is never taken
    return dtype, shape if len(shape) == 4 else shape[1:], strides, tensor.device
