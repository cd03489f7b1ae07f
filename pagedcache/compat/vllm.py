# SPDX-License-Identifier: Apache-2.0
"""vLLM's ``reshape_and_cache_flash``, as ``torch.ops._C_cache_ops`` has it (vLLM 0.11)."""

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
        ``[num_blocks, block_size, num_kv_heads, head_size]``, in any memory order; each with
        strides of its own.
    slot_mapping : array
        ``[num_tokens]``, int64 or int32.
    kv_cache_dtype : str
        ``"auto"``: that of `key`. Others quantise, which is not supported yet.
    k_scale, v_scale : array or float, optional
        Not used with ``"auto"``, as there.

    Raises
    ------
    NotSupportedError
        For another `kv_cache_dtype`.
    PagedCacheError
        Of `key` and `value` it speaks as k and v. See `pagedcache.paged_caching`, also for streams
        and threads.
    """
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype != "auto":
        rule = "must be 'auto'; a cache of another dtype than K and V is not supported yet"
        raise NotSupportedError("kv_cache_dtype", rule, shown(kv_cache_dtype))
    paged_caching(key_cache, value_cache, key, value, slot_mapping, layout="NHD")
