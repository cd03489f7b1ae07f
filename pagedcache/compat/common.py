# SPDX-License-Identifier: Apache-2.0
"""What the functions of other projects share: views of arrays, scales, rows of bytes."""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import numpy as np

from pagedcache.arrays.find import adopt, library_of, part
from pagedcache.arrays.library import reading, type_name
from pagedcache.arrays.torch import Torch
from pagedcache.dtypes import F16, Dtype
from pagedcache.operators.one_call import Kept
from pagedcache.operators.paged_caching.descriptor import Descriptor
from pagedcache.operators.paged_caching.info import PagedCachingInfo
from pagedcache.status import (
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    shown,
)

FLOAT8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""From what vLLM and SGLang call a format to what it is called here."""


def shape_of(array: Any) -> tuple[Any, ...]:
    """Return the shape of an array, ``()`` if it has none."""
    try:
        return tuple(array.shape)
    except Exception:  # of whatever was given
        return ()


def is_of_bytes(array: Any) -> bool:
    """Return whether an array says that its elements take one byte."""
    return getattr(getattr(array, "dtype", None), "itemsize", 0) == 1


def viewable(name: str, array: Any) -> Any:
    """Return an array of which views can be taken.

    Raises
    ------
    BadParamTypeError
        It is of no library whose views are known to be of the same memory.
    """
    if not library_of(name, array).has_matchers:
        rule = "must be an array of NumPy, CuPy or PyTorch, because views of it are taken"
        raise BadParamTypeError(name, rule, type_name(array))
    return array


def viewed(name: str, array: Any, dtype: Dtype) -> Any:
    """Return the same memory as an array of another dtype; the last axis counts its elements.

    Parameters
    ----------
    name : str
        The argument to name in an error.
    array : array
        Of NumPy, CuPy or PyTorch.
    dtype : numpy.dtype

    Raises
    ------
    BadTensorStridesError
        Some elements would not be aligned.
    BadParamTypeError
        Its library refuses, as where the last axis does not hold whole elements.
    """
    library = library_of(name, viewable(name, array))
    tensor = adopt(name, array)
    size, wanted = tensor.dtype.itemsize, dtype.itemsize
    if size != wanted:
        axes = zip(tensor.shape[:-1], tensor.strides, strict=False)
        used = [step for length, step in axes if length > 1]
        if 0 not in tensor.shape and any(at % wanted for at in (tensor.address, *used)):
            rule = f"must have an address and strides of whole {dtype}, to be read as such"
            got = f"{tensor.strides} bytes at {tensor.address:#x}"
            raise BadTensorStridesError(name, rule, got)
    with reading(name, array):
        if isinstance(library, Torch):
            return array.view(getattr(sys.modules["torch"], str(dtype)))
        return array.view(dtype)


def static_scale(name: str, scale: Any) -> Any:
    """Return a scale that is read, of which there is one, or one for each KV head.

    Raises
    ------
    BadParamTypeError
        It is a number.
    BadTensorShapeError
        It has other axes than one of KV heads.
    """
    if isinstance(scale, (int, float, np.generic)):
        rule = (
            "must be a float32 array on the device of the caches, of one element or of one for "
            "each KV head, because the kernel reads it there; make one, once, and pass it"
        )
        raise BadParamTypeError(name, rule, f"the number {shown(scale)}")
    shape = shape_of(scale)
    if len(shape) < 2:
        return scale
    # An axis for each of blocks, slots and heads would have it written.
    if math.prod(shape) != 1:
        rule = "must have one element or the shape [num_kv_heads]"
        raise BadTensorShapeError(name, rule, f"shape {shape}")
    with reading(name, scale):
        return viewable(name, scale).reshape(1)


def copy_bytes(
    names: tuple[str, ...], k_cache: Any, v_cache: Any, k: Any, v: Any, slots: Any, layout: str
) -> None:
    """Write rows whose elements are of one byte, such as 8-bit floats, as they are.

    They are written as half as many float16, of which a write changes no bit. They may be anything
    but finite, so ``PAGEDCACHE_DEBUG`` does not inspect them.

    Parameters
    ----------
    names : tuple of str
        What the caller calls the K cache, the V cache, K and V.
    k_cache, v_cache, k, v, slots : array
        See `Descriptor.create`.
    layout : {"HND", "NHD"}

    Raises
    ------
    BadTensorDtypeError
        The dtype of K or V is not that of its cache.
    BadTensorShapeError
        The head size is odd.
    PagedCacheError
        See `pagedcache.paged_caching`.
    """
    arrays = (k_cache, v_cache, k, v)
    tensors = [adopt(name, array) for name, array in zip(names, arrays, strict=True)]
    for i in (0, 1):
        given, stored = tensors[i + 2].dtype, tensors[i].dtype
        if given != stored:
            rule = f"must be {stored} like {names[i]}, because its bytes are copied"
            raise BadTensorDtypeError(names[i + 2], rule, given)
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.shape and tensor.shape[-1] % 2:
            rule = "must have an even head size, because its bytes are copied in pairs"
            raise BadTensorShapeError(name, rule, f"shape {tensor.shape}")
    pairs = [viewed(name, array, F16) for name, array in zip(names, arrays, strict=True)]
    run_kept(_bytes, (*pairs, slots, None, None), (layout,))


def run_kept(kept: Kept[Descriptor], arrays: tuple[Any, ...], options: tuple[Any, ...]) -> None:
    """Run the descriptor for these arrays and options, creating it if there is none."""
    if not kept.run_recent(arrays, options, None):
        kept.run(arrays, options, None)


def one_head(name: str, array: Any, axes: str) -> Any:
    """Return rows ``[num_tokens, size]`` as those of one head, ``[num_tokens, 1, size]``."""
    if len(shape_of(array)) != 2:
        adopt(name, array)
        raise BadTensorShapeError(name, f"must have 2 axes {axes}", f"shape {shape_of(array)}")
    return part(name, array, (slice(None), None))


def _create(*arrays_and_layout: Any) -> Descriptor:
    *arrays, layout = arrays_and_layout
    return Descriptor._create(
        tuple(arrays),
        functools.partial(PagedCachingInfo.create, layout=layout),
        handle=None,
        on_invalid="skip",
        debug=False,
        reported=False,
    )


_bytes = Kept(Descriptor, _create)
