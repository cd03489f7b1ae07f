# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``reshape_and_cache_flash``, as in ``torch.ops._C_cache_ops`` (vLLM 0.11)."""

from __future__ import annotations

from typing import Any

from pagedcache.operators.paged_caching.one_call import paged_caching
from pagedcache.status import NotSupportedError, shown


def reshape_and_cache_flash(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str = "auto",
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    """Write `key` and `value` to their slots; negative slots are padding.

    Parameters
    ----------
    key, value : array
        ``[num_tokens or more, num_kv_heads, head_size]``.
    key_cache, value_cache : array
        ``[num_blocks, block_size, num_kv_heads, head_size]``, in any memory order; the two
        may have different strides.
    slot_mapping : array
        ``[num_tokens]``, int64 or int32.
    kv_cache_dtype : str
        ``"auto"`` is the dtype of `key`. All others quantize, which is not supported yet.
    k_scale, v_scale : array or float, optional
        Not used with ``"auto"``, as in vLLM.

    Raises
    ------
    NotSupportedError
        `kv_cache_dtype` is not ``"auto"``.
    PagedCacheError
        See `pagedcache.paged_caching`, also for streams and threads. In these messages, the arrays
        are k, v, k_cache and v_cache.
    """
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype != "auto":
        rule = "must be 'auto'; a cache whose dtype is not that of K and V is not supported yet"
        raise NotSupportedError("kv_cache_dtype", rule, shown(kv_cache_dtype))
    paged_caching(key_cache, value_cache, key, value, slot_mapping, layout="NHD")
