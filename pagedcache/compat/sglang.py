# SPDX-License-Identifier: Apache-2.0
"""SGLang's ``store_cache``, of ``sglang.jit_kernel.kvcache`` (SGLang 0.5.10)."""

from __future__ import annotations

from typing import Any

from pagedcache.arrays.find import part
from pagedcache.operators.paged_caching.one_call import paged_caching
from pagedcache.status import BadParamTypeError, BadTensorShapeError


def store_cache(
    k: Any,
    v: Any,
    k_cache: Any,
    v_cache: Any,
    indices: Any,
    *,
    row_bytes: int = 0,
    num_split: int = 0,
) -> None:
    """Write the row of each token to the row of the pool that `indices` gives.

    Differs from SGLang in how it treats invalid indices: a negative index or one past the end is
    skipped, where SGLang stops the GPU. Row 0 is a row like any other.

    Parameters
    ----------
    k, v : array
        ``[num_tokens, ...]``: one row per token, flat or ``[num_kv_heads, head_size]``.
    k_cache, v_cache : array
        ``[num_rows, ...]``, with the same axes after the first.
    indices : array
        ``[num_tokens]``, int64 or int32.
    row_bytes, num_split : int
        Not used: the first follows from the arrays, the second tunes SGLang's kernel.

    Raises
    ------
    BadTensorShapeError
        `k`, `v` or a cache has neither two nor three axes.
    PagedCacheError
        See `pagedcache.paged_caching`, also for streams and threads.
    """
    paged_caching(
        _pool("k_cache", k_cache), _pool("v_cache", v_cache), _rows("k", k), _rows("v", v), indices,
        layout="NHD",
    )  # fmt: skip


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
