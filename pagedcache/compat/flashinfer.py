# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's ``append_paged_kv_cache``, of ``flashinfer.page`` (FlashInfer 0.6)."""

from __future__ import annotations

from typing import Any

from pagedcache.arrays.find import adopt, part
from pagedcache.operators.paged_caching.one_call import paged_caching
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
    """Write tokens to the pages that their sequences' page tables name.

    The slots are computed with the arrays' own library, in a handful of small operations that
    allocate; callers that write many layers should compute them once and call
    `pagedcache.paged_caching`.

    Parameters
    ----------
    append_key, append_value : array
        ``[num_tokens, num_kv_heads, head_size]``.
    batch_indices : array
        ``[num_tokens]``: which sequence each token is of; negative: padding, skipped.
    positions : array
        ``[num_tokens]``: where in its sequence. A token past the pages of its sequence, or of a
        sequence that is not there, is not written, as a slot past the end is not.
    paged_kv_cache : array or pair of arrays
        ``[num_pages, 2, page_size, num_kv_heads, head_size]`` for ``"NHD"``,
        ``[num_pages, 2, num_kv_heads, page_size, head_size]`` for ``"HND"``; or K and V apart,
        without the axis of 2.
    kv_indices : array
        ``[num_pages_in_use]``: the pages of all sequences, one sequence after the other.
    kv_indptr : array
        ``[num_sequences + 1]``: where each sequence's begin in `kv_indices`.
    kv_last_page_len : array
        Not used: `positions` says all. It stands here for the signature's sake.
    kv_layout : {"NHD", "HND"}

    Raises
    ------
    BadTensorShapeError
        `paged_kv_cache` is neither one array of five axes nor two of four, or an array of indices
        has not one axis.
    BadTensorDtypeError
        Indices are no ints.
    BadParamError
        Unknown `kv_layout`, or slots that cannot be computed from the others.
    PagedCacheError
        Of what is appended it speaks as k and v. See `pagedcache.paged_caching`, also for streams
        and threads.
    """
    if not isinstance(kv_layout, str) or kv_layout not in ("NHD", "HND"):
        raise BadParamError("kv_layout", "must be one of NHD, HND", shown(kv_layout))
    k_cache, v_cache = _caches(paged_kv_cache)
    num_pages, page_size = k_cache.shape[0], k_cache.shape[2 if kv_layout == "HND" else 1]
    tables = {
        "batch_indices": batch_indices,
        "positions": positions,
        "kv_indices": kv_indices,
        "kv_indptr": kv_indptr,
    }
    for name, table in tables.items():
        _refuse_but_ints(name, table)
    for name, length in (
        ("append_value", _shape(append_value)[:1]),
        ("batch_indices", batch_indices.shape),
        ("positions", positions.shape),
    ):
        if tuple(length) != _shape(append_key)[:1]:
            rule = f"must be as long as append_key, {_shape(append_key)[:1]}"
            raise BadTensorShapeError(name, rule, tuple(length))
    try:
        slots = _slots(batch_indices, positions, kv_indices, kv_indptr, num_pages, page_size)
    except Exception as error:
        rule = f"must be arrays of ints of one library ({error})"
        raise BadParamError("batch_indices, positions, kv_indices and kv_indptr", rule) from error
    paged_caching(k_cache, v_cache, append_key, append_value, slots, layout=kv_layout)


def _caches(paged_kv_cache: Any) -> tuple[Any, Any]:
    """Return the K and the V of a pool in either form."""
    if isinstance(paged_kv_cache, (tuple, list)):
        caches = tuple(paged_kv_cache)
        got = f"{len(caches)} arrays"
    else:
        shape = _shape(paged_kv_cache)
        name, both = "paged_kv_cache", (0, 1) if shape[1:2] == (2,) else ()
        caches = tuple(part(name, paged_kv_cache, (slice(None), index)) for index in both)
        got = f"shape {shape}"
    if len(caches) != 2 or any(len(_shape(cache)) != 4 for cache in caches):
        rule = "must have 5 axes [num_pages, 2, ...], or be a pair of arrays of 4 axes"
        raise BadTensorShapeError("paged_kv_cache", rule, got)
    return caches[0], caches[1]


def _shape(array: Any) -> tuple[Any, ...]:
    try:
        return tuple(array.shape)
    except (AttributeError, TypeError):
        return ()


def _refuse_but_ints(name: str, array: Any) -> None:
    tensor = adopt(name, array)
    if tensor.dtype.kind not in "iu":
        raise BadTensorDtypeError(name, "must be ints", tensor.dtype)
    if len(tensor.shape) != 1:
        raise BadTensorShapeError(name, "must have one axis", f"shape {tensor.shape}")


def _slots(
    batch_indices: Any,
    positions: Any,
    kv_indices: Any,
    kv_indptr: Any,
    num_pages: int,
    page_size: int,
) -> Any:
    # All conditions are 1 or 0, so that no index leaves its array, whatever the input.
    batch, position = _int64(batch_indices), _int64(positions)
    used = _int64(batch >= 0)
    known = used * _int64(batch < len(kv_indptr) - 1) * _int64(position >= 0)
    batch, position = batch * known, position * known
    start, end = _int64(kv_indptr[batch]), _int64(kv_indptr[(batch + 1) * known])
    entry = start + position // page_size
    inside = known * _int64(start >= 0) * _int64(entry < end) * _int64(entry < len(kv_indices))
    inside = inside * _int64(entry >= 0)
    page = _int64(kv_indices[entry * inside]) if len(kv_indices) else inside
    inside = inside * _int64(page >= 0) * _int64(page < num_pages)
    valid = page * inside * page_size + position * inside % page_size
    return valid + (used - inside) * (num_pages * page_size) + (used - 1)


def _int64(array: Any) -> Any:
    return array.long() if hasattr(array, "long") else array.astype("int64")
