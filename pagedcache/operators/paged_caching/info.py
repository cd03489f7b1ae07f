# SPDX-License-Identifier: Apache-2.0
"""What a paged caching write needs to know about its five tensors."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcache.cache.layout import LAYOUTS, resolve_layout
from pagedcache.dtypes import BF16, F16, F32, I32, I64, Dtype
from pagedcache.operators.rules import Rule, Rules
from pagedcache.status import BadParamTypeError, shown
from pagedcache.tensors import TensorDescriptor

NAMES = ("k_cache", "v_cache", "k", "v", "slot_mapping")
DTYPES = (F16, BF16, F32)
SLOT_DTYPES = (I64, I32)


def _rules(layout: str) -> Rules:
    axes = LAYOUTS[layout]
    return Rules(
        tensors=(
            Rule("k_cache", axes, DTYPES, written=True),
            Rule("v_cache", (*axes[:3], "v_head_size"), DTYPES, like="k_cache", written=True),
            Rule("k", ("num_tokens", "num_kv_heads", "head_size"), DTYPES, like="k_cache"),
            Rule("v", ("num_tokens", "num_kv_heads", "v_head_size"), DTYPES, like="k_cache"),
            Rule("slot_mapping", ("num_tokens",), SLOT_DTYPES),
        ),
        free="num_tokens",
        counted_by="slot_mapping",
        note=f" (layout {layout})",
    )


RULES = {layout: _rules(layout) for layout in LAYOUTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCachingInfo:
    """Sizes and strides of one paged caching write; strides are in elements.

    The stride of an axis of length 1 is never used and is given as 0, except for the token axis,
    whose length may differ from call to call. The names follow InfiniCore's ``PagedCachingInfo``.

    Attributes
    ----------
    dtype : numpy.dtype
        Of `k`, `v` and both caches: float16, bfloat16 or float32.
    slot_dtype : numpy.dtype
        int64 or int32.
    layout : {"HND", "NHD"}
        The order of the axes that the caches were described in.
    num_tokens : int
        Length of the slot mapping that the descriptor was created with.
    num_blocks, block_size, num_kv_heads : int
        Of both caches.
    head_size, v_head_size : int
        Elements of one head of K and of V.
    k_token_stride, k_head_stride, v_token_stride, v_head_stride : int
        Of the sources.
    k_cache_block_stride, k_cache_head_stride, k_cache_slot_stride : int
        Of the K cache: from block to block, head to head, and slot to slot within a block.
    v_cache_block_stride, v_cache_head_stride, v_cache_slot_stride : int
        Of the V cache.
    """

    dtype: Dtype
    slot_dtype: Dtype
    layout: str
    num_tokens: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    k_token_stride: int
    k_head_stride: int
    v_token_stride: int
    v_head_stride: int
    k_cache_block_stride: int
    k_cache_head_stride: int
    k_cache_slot_stride: int
    v_cache_block_stride: int
    v_cache_head_stride: int
    v_cache_slot_stride: int

    @property
    def num_slots(self) -> int:
        """Capacity of the cache in tokens; valid slots are 0 to ``num_slots - 1``."""
        return self.num_blocks * self.block_size

    @property
    def rules(self) -> Rules:
        """The table that the tensors were checked against."""
        return RULES[self.layout]

    @classmethod
    def create(
        cls,
        k_cache: TensorDescriptor,
        v_cache: TensorDescriptor,
        k: TensorDescriptor,
        v: TensorDescriptor,
        slot_mapping: TensorDescriptor,
        *,
        layout: str | None = None,
    ) -> PagedCachingInfo:
        """Check five tensor descriptors against each other and collect what a write needs.

        Parameters
        ----------
        k_cache, v_cache : TensorDescriptor
            ``[num_blocks, num_kv_heads, block_size, head_size]`` for layout ``"HND"``,
            ``[num_blocks, block_size, num_kv_heads, head_size]`` for ``"NHD"``.
        k, v : TensorDescriptor
            ``[num_tokens or more, num_kv_heads, head_size]``.
        slot_mapping : TensorDescriptor
            ``[num_tokens]``, int64 or int32.
        layout : {"HND", "NHD"}, optional
            By default, the one that the shapes allow.

        Returns
        -------
        PagedCachingInfo

        Raises
        ------
        BadParamError
            Unknown layout, or none is given and the shapes allow both.
        BadParamTypeError
            An argument is not a `TensorDescriptor`.
        BadTensorDtypeError, BadTensorShapeError, BadTensorStridesError
            The message names the tensor, the rule and what was found.
        """
        described = dict(zip(NAMES, (k_cache, v_cache, k, v, slot_mapping), strict=True))
        for name, tensor in described.items():
            if not isinstance(tensor, TensorDescriptor):
                raise BadParamTypeError(name, "must be a TensorDescriptor", shown(tensor))
        layout = resolve_layout(layout, k_cache.shape, k.shape)
        rules = RULES[layout]
        sizes = rules.check(described)
        axes = LAYOUTS[layout]
        k_steps, v_steps = (
            dict(zip(axes, rules.steps(name, described[name]), strict=True))
            for name in ("k_cache", "v_cache")
        )
        k_rows, v_rows = (rules.steps(name, described[name]) for name in ("k", "v"))
        return cls(
            dtype=k_cache.dtype,
            slot_dtype=slot_mapping.dtype,
            layout=layout,
            num_tokens=sizes["num_tokens"],
            num_blocks=sizes["num_blocks"],
            block_size=sizes["block_size"],
            num_kv_heads=sizes["num_kv_heads"],
            head_size=sizes["head_size"],
            v_head_size=sizes["v_head_size"],
            k_token_stride=k_rows[0],
            k_head_stride=k_rows[1],
            v_token_stride=v_rows[0],
            v_head_stride=v_rows[1],
            k_cache_block_stride=k_steps["num_blocks"],
            k_cache_head_stride=k_steps["num_kv_heads"],
            k_cache_slot_stride=k_steps["block_size"],
            v_cache_block_stride=v_steps["num_blocks"],
            v_cache_head_stride=v_steps["num_kv_heads"],
            v_cache_slot_stride=v_steps["block_size"],
        )
