"""The paged caching write in NumPy: short enough to be the specification of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.backend.protocol import LaunchConfig

if TYPE_CHECKING:
    from pagedcache.info import PagedCachingInfo

Array = np.ndarray[Any, Any]


class PagedCaching:
    """Writes on the calling thread; done when `calculate` returns. Needs no workspace."""

    workspace_size = 0

    def __init__(self, info: PagedCachingInfo) -> None:
        self._info = info
        # Bits are copied as bits: no floating-point type, so no NaN is ever changed.
        self._bits = np.dtype(f"u{info.dtype.itemsize}")

    def launch_config(self, num_tokens: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def calculate(
        self,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slot_mapping: int,
        num_tokens: int,
        workspace: int,
        stream: object,
    ) -> None:
        """Write `num_tokens` rows of K and V, given the addresses of all five tensors."""
        info = self._info
        slots = _view(slot_mapping, info.slot_dtype, (num_tokens,), (1,))
        written = (slots >= 0) & (slots < info.num_slots)
        block, offset = np.divmod(slots[written], info.block_size)
        everything = slice(None) if written.all() else written
        for cache, rows, head_size, cache_strides, row_strides in (
            (
                k_cache,
                k,
                info.head_size,
                (info.k_cache_block_stride, info.k_cache_slot_stride, info.k_cache_head_stride),
                (info.k_token_stride, info.k_head_stride),
            ),
            (
                v_cache,
                v,
                info.v_head_size,
                (info.v_cache_block_stride, info.v_cache_slot_stride, info.v_cache_head_stride),
                (info.v_token_stride, info.v_head_stride),
            ),
        ):
            heads = (info.num_kv_heads, head_size)
            target = _view(
                cache, self._bits, (info.num_blocks, info.block_size, *heads), (*cache_strides, 1)
            )
            source = _view(rows, self._bits, (num_tokens, *heads), (*row_strides, 1))
            target[block, offset] = source[everything]


def _view(address: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Array:
    """Return the memory at `address` as an array; strides are in elements."""
    return np.asarray(_Memory(address, dtype, shape, strides))


class _Memory:
    """Memory that somebody else owns, in the form that NumPy reads without a copy."""

    def __init__(
        self, address: int, dtype: Any, shape: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "typestr": dtype.str,
            "shape": shape,
            "strides": tuple(step * dtype.itemsize for step in strides),
        }
