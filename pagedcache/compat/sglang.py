# SPDX-License-Identifier: Apache-2.0
"""SGLang's ``store_cache``, of ``sglang.jit_kernel.kvcache`` (SGLang 0.5.10)."""

from __future__ import annotations

from typing import Any

from pagedcache.arrays.find import adopt, part
from pagedcache.compat.common import FLOAT8, copy_bytes, is_of_bytes, static_scale
from pagedcache.dtypes import U8
from pagedcache.operators.paged_caching.one_call import paged_caching
from pagedcache.status import BadParamError, BadParamTypeError, BadTensorShapeError, shown


def store_cache(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    indices: Any,
    *,
    row_bytes: int = 0,
    num_split: int = 0,
    k_scale: Any = None,
    v_scale: Any = None,
    kv_cache_dtype: str = "auto",
) -> None:
    """Write the row of each token to the row of the pool that `indices` gives.

    Differs from SGLang in how it treats invalid indices: a negative index or one past the end is
    skipped, where SGLang stops the GPU. Row 0 is a row like any other.

    Parameters
    ----------
    k, v : array
        ``[num_tokens, ...]``: one row per token, flat or ``[num_kv_heads, head_size]``. Those of
        bytes or 8-bit floats are copied to pools of the same dtype, as in SGLang; their last axis
        must be even.
    k_cache, v_cache : array
        ``[num_rows, ...]``, with the same axes after the first. Pools of 8-bit floats store
        ``x / scale`` of the rows of float16, bfloat16 or float32 that they are given.
    indices : array
        ``[num_tokens]``, int64 or int32.
    row_bytes, num_split : int
        Not used: the first follows from the arrays, the second tunes SGLang's kernel.
    k_scale, v_scale : array, optional
        Of pools of 8-bit floats: float32, on their device, of one element or ``[num_kv_heads]``.
        ``None`` is 1.
    kv_cache_dtype : {"auto", "fp8_e4m3", "fp8_e5m2"}
        What pools of bytes (uint8) store if the rows are not of bytes. ``"auto"`` is the dtype of
        the pools.

    Raises
    ------
    BadTensorShapeError
        `k`, `v` or a cache has neither two nor three axes.
    BadParamError
        Unknown `kv_cache_dtype`; it is not given, but needed; or a scale is a number, or given for
        rows that are copied.
    PagedCacheError
        See `pagedcache.paged_caching`, also for streams and threads.

    Notes
    -----
    The last three arguments stand for what SGLang's pool does before it calls ``store_cache``: it
    divides `k` and `v` by their scales in their own dtype, in place, and casts the quotients. So it
    rounds twice, which for bfloat16 changes some of the codes by one (2.7 % in a trial), and leaves
    `k` and `v` divided. Here the quotient is one of float32, rounded once, and `k` and `v` stay as
    they are. What is too large becomes the largest value.
    """
    pools = (_pool("k_cache", k_cache), _pool("v_cache", v_cache))
    rows = (_rows("k", k), _rows("v", v))
    if is_of_bytes(k) or is_of_bytes(v):
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if scale is not None:
                rule = "must be None, because rows whose elements are of one byte are copied"
                raise BadParamError(name, rule)
        copy_bytes(("k_cache", "v_cache", "k", "v"), *pools, *rows, indices, "NHD")
        return
    is_auto = isinstance(kv_cache_dtype, str) and kv_cache_dtype == "auto"
    formats = (None, None) if is_auto else _formats(kv_cache_dtype)
    for name, pool in (("k_cache", k_cache), ("v_cache", v_cache)):
        if formats[0] is None and is_of_bytes(pool) and adopt(name, pool).dtype == U8:
            rule = f"must be 'fp8_e4m3' or 'fp8_e5m2', because {name} is of bytes (uint8)"
            raise BadParamError("kv_cache_dtype", rule, shown(kv_cache_dtype))
    paged_caching(
        *pools, *rows, indices,
        k_scale=static_scale("k_scale", k_scale), v_scale=static_scale("v_scale", v_scale),
        k_format=formats[0], v_format=formats[1], layout="NHD",
    )  # fmt: skip


def _formats(kv_cache_dtype: Any) -> tuple[str, str]:
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype not in FLOAT8:
        rule = "must be 'auto', 'fp8_e4m3' or 'fp8_e5m2'"
        raise BadParamError("kv_cache_dtype", rule, shown(kv_cache_dtype))
    return (FLOAT8[kv_cache_dtype],) * 2


def _rows(name: str, array: Any) -> Any:
    """Return ``[tokens, heads, size]``; a flat row counts as one head."""
    try:
        shape = tuple(array.shape)
    except Exception:  # of whatever was given
        raise BadParamTypeError(name, "must be an array", f"{type(array).__name__}") from None
    if len(shape) not in (2, 3):
        rule = "must have 2 or 3 axes [rows, (num_kv_heads,) size]"
        raise BadTensorShapeError(name, rule, f"shape {shape}")
    return array if len(shape) == 3 else part(name, array, (slice(None), None))


def _pool(name: str, array: Any) -> Any:
    """Return ``[blocks, 1, heads, size]``: each row is a block of one slot."""
    return part(name, _rows(name, array), (slice(None), None))
