# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's ``append_paged_kv_cache``, of ``flashinfer.page`` (FlashInfer 0.6)."""

from __future__ import annotations

from typing import Any

from pagedcache.arrays.find import adopt, part
from pagedcache.arrays.library import reading
from pagedcache.cache.tables import SLOT_DTYPES
from pagedcache.compat.common import copy_bytes, is_of_bytes, shape_of
from pagedcache.operators.paged_caching.one_call import paged_caching
from pagedcache.operators.slot_mapping.one_call import page_slots
from pagedcache.status import BadParamError, BadTensorDtypeError, BadTensorShapeError, shown


def append_paged_kv_cache(
    append_key: Any,
    append_value: Any,
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
) -> None:
    """Write the K and V of each token to the pages of its sequence.

    The slots are computed first, on the device, into a new array. To write many layers, compute
    them once (`pagedcache.slot_mapping`) and call `pagedcache.paged_caching` for each layer.

    Parameters
    ----------
    append_key, append_value : array
        ``[num_tokens, num_kv_heads, head_size]``, of the dtype of `paged_kv_cache`. To store 8-bit
        floats or integers, cast before; they are copied, and `head_size` must be even.
    batch_indices : array
        ``[num_tokens]``: the sequence of each token. A negative entry is padding and is skipped.
    positions : array
        ``[num_tokens]``: the position of each token in its sequence. A token past the pages of its
        sequence, or of a sequence that does not exist, is not written, like one whose slot is
        past the end of the cache.
    paged_kv_cache : array or pair of arrays
        ``[num_pages, 2, page_size, num_kv_heads, head_size]`` for ``"NHD"``,
        ``[num_pages, 2, num_kv_heads, page_size, head_size]`` for ``"HND"``; or a pair of
        arrays for K and V, each without the axis of length 2.
    kv_indices : array
        ``[num_pages_in_use]``: the pages of all sequences, one sequence after another.
    kv_indptr : array
        ``[num_sequences + 1]``: the pages of sequence ``i`` are
        ``kv_indices[kv_indptr[i]:kv_indptr[i + 1]]``.
    kv_last_page_len : array
        Not used, because `positions` determines every slot. Present to match the signature.
    kv_layout : {"NHD", "HND"}
        The order of the axes of `paged_kv_cache`.

    Raises
    ------
    BadTensorShapeError
        `paged_kv_cache` is neither one array with five axes nor two with four, an index array does
        not have exactly one axis, `append_value`, `batch_indices` or `positions` is not as long
        as `append_key`, or `head_size` is odd and elements are of one byte.
    BadTensorDtypeError
        An index array does not have an integer dtype; or `append_key` or `append_value` is not of
        the dtype of the pages, and the elements of one of them are of one byte.
    BadParamError
        Unknown `kv_layout`.
    PagedCacheError
        See `pagedcache.paged_caching`, also for streams and threads. In these messages,
        `append_key` is k and `append_value` is v.
    """
    if not isinstance(kv_layout, str) or kv_layout not in ("NHD", "HND"):
        raise BadParamError("kv_layout", "must be 'NHD' or 'HND'", shown(kv_layout))
    k_cache, v_cache = _caches(paged_kv_cache)
    num_pages, page_size = k_cache.shape[0], k_cache.shape[2 if kv_layout == "HND" else 1]
    tables = {
        "batch_indices": batch_indices,
        "positions": positions,
        "kv_indices": kv_indices,
        "kv_indptr": kv_indptr,
    }
    for name, table in tables.items():
        _check_indices(name, table)
    key_shape = shape_of(append_key)
    for name, array in (
        ("append_value", append_value),
        ("batch_indices", batch_indices),
        ("positions", positions),
    ):
        shape = shape_of(array)
        if shape[:1] != key_shape[:1]:
            rule = f"must be as long as append_key, which has shape {key_shape}"
            raise BadTensorShapeError(name, rule, f"shape {shape}")
    slots = page_slots(
        *(_wide(name, table) for name, table in tables.items()),
        page_size=page_size,
        num_pages=num_pages,
    )
    arrays = (k_cache, v_cache, append_key, append_value)
    if any(map(is_of_bytes, arrays)):
        copy_bytes(
            ("paged_kv_cache",) * 2 + ("append_key", "append_value"), *arrays, slots, kv_layout
        )
        return
    paged_caching(*arrays, slots, layout=kv_layout)


def _caches(paged_kv_cache: Any) -> tuple[Any, Any]:
    """Return the K cache and the V cache, given as one array or as a pair."""
    if isinstance(paged_kv_cache, (tuple, list)):
        caches = tuple(paged_kv_cache)
        got = f"{len(caches)} arrays"
    else:
        shape = shape_of(paged_kv_cache)
        name, both = "paged_kv_cache", (0, 1) if shape[1:2] == (2,) else ()
        caches = tuple(part(name, paged_kv_cache, (slice(None), index)) for index in both)
        got = f"shape {shape}"
    if len(caches) != 2 or any(len(shape_of(cache)) != 4 for cache in caches):
        rule = "must have 5 axes [num_pages, 2, ...], or be a pair of arrays with 4 axes"
        raise BadTensorShapeError("paged_kv_cache", rule, got)
    return caches[0], caches[1]


def _check_indices(name: str, array: Any) -> None:
    tensor = adopt(name, array)
    if tensor.dtype.kind not in "iu":
        raise BadTensorDtypeError(name, "must have an integer dtype", tensor.dtype)
    if len(tensor.shape) != 1:
        raise BadTensorShapeError(name, "must have one axis", f"shape {tensor.shape}")


def _wide(name: str, array: Any) -> Any:
    """Return an array of ints that the kernel takes, which is this array if it has such."""
    if adopt(name, array).dtype in SLOT_DTYPES:
        return array
    with reading(name, array):
        return array.long() if hasattr(array, "long") else array.astype("int64")
