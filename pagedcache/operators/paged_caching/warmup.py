# SPDX-License-Identifier: Apache-2.0
"""Compiling ahead of time, for when compiling later would be too late."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pagedcache.backend.handle import Handle
from pagedcache.cache.formats import SOURCE_DTYPES
from pagedcache.cache.tables import SLOT_DTYPES
from pagedcache.dtypes import Dtype, as_dtype
from pagedcache.operators.paged_caching.descriptor import Descriptor
from pagedcache.status import BadParamTypeError, shown
from pagedcache.tensors import TensorDescriptor


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """What one step of `warmup` prepared.

    Attributes
    ----------
    device : str
        ``"cuda:0"``.
    dtype, slot_dtype : str
        The kernels are for these types, with any shapes, strides and layout.
    seconds : float
        How long it took: about 0.1 s if it was compiled, 0.02 s if it was in the cache on disk.
    """

    device: str
    dtype: str
    slot_dtype: str
    seconds: float

    def __str__(self) -> str:
        kernel = f"paged_caching {self.dtype}, {self.slot_dtype} slots"
        return f"{kernel:40} ready on {self.device} in {self.seconds:.3f} s"


def warmup(
    device: str | None = None,
    *,
    dtypes: Iterable[object] = SOURCE_DTYPES,
    slot_dtypes: Iterable[object] = SLOT_DTYPES,
) -> list[WarmedUp]:
    """Compile the kernels of plain copies, or load them from the cache on disk; open the device.

    After this, descriptors for any shape are created without compiling, also while a stream is
    being captured into a CUDA graph, when compiling is not possible. Kernels for other formats, and
    of `paged_gather`, depend on more than their dtypes: create such a descriptor before the
    capture.

    Parameters
    ----------
    device : str, optional
        See `Handle`. By default, CUDA's current device if it is usable here, else the CPU, where
        nothing has to be compiled.
    dtypes : iterable of dtype-like
        Of K, V and the caches. By default, float16, bfloat16 and float32.
    slot_dtypes : iterable of dtype-like
        By default, int64 and int32.

    Returns
    -------
    list of WarmedUp
        One for each pair of types, to be printed.

    Raises
    ------
    PagedCacheError
        See `Handle` and `Descriptor.create`.
    """
    return list(warming_up(device, dtypes=dtypes, slot_dtypes=slot_dtypes))


def warming_up(
    device: str | None, *, dtypes: Iterable[object], slot_dtypes: Iterable[object]
) -> Iterator[WarmedUp]:
    """Do what `warmup` does, and yield each step when it is done."""
    kinds, slots = _dtypes("dtypes", dtypes), _dtypes("slot_dtypes", slot_dtypes)
    handle = Handle(device)
    for dtype in kinds:
        for slot_dtype in slots:
            start = time.perf_counter()
            cache, row = TensorDescriptor(dtype, (1,) * 4), TensorDescriptor(dtype, (1,) * 3)
            mapping = TensorDescriptor(slot_dtype, (1,))
            Descriptor.create(cache, cache, row, row, mapping, handle=handle).destroy()
            seconds = time.perf_counter() - start
            yield WarmedUp(handle.device, dtype.name, slot_dtype.name, seconds)


def _dtypes(name: str, values: Iterable[object]) -> list[Dtype]:
    try:
        listed = list(values)
    except TypeError:
        raise BadParamTypeError(name, "must be an iterable of dtypes", shown(values)) from None
    return [as_dtype(name, value) for value in listed]
