# SPDX-License-Identifier: Apache-2.0
"""What a paged caching write needs to know about its tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pagedcache.cache.formats import SOURCE_DTYPES, Format
from pagedcache.cache.layout import resolve_layout
from pagedcache.cache.sides import Side
from pagedcache.cache.tables import (
    SLOT_DTYPES,
    cache_rule,
    check_tables,
    rows_rule,
    scale_rule,
)
from pagedcache.rules import Rule, Rules
from pagedcache.status import BadParamTypeError, shown
from pagedcache.tensors import TensorDescriptor

if TYPE_CHECKING:
    from pagedcache.cache.scales import Scale
    from pagedcache.dtypes import Dtype

NAMES = ("k_cache", "v_cache", "k", "v", "slot_mapping", "k_scale", "v_scale")
REQUIRED, OPTIONAL = NAMES[:5], NAMES[5:]
FREE = ("k", "v", "slot_mapping")


@dataclass(frozen=True, slots=True)
class Stored:
    """How K or V is stored.

    Attributes
    ----------
    format : Format
    scale : Scale or None
    """

    format: Format
    scale: Scale | None = None


def make_rules(
    layout: str,
    formats: Mapping[str, Format],
    scales: Mapping[str, tuple[str, tuple[str, ...]]],
) -> Rules:
    """Return the table of tensors for caches in these formats, with such scales."""
    return Rules(
        tensors=(
            cache_rule("k", layout, formats.get("k"), written=True),
            cache_rule("v", layout, formats.get("v"), written=True),
            rows_rule("k", SOURCE_DTYPES),
            rows_rule("v", SOURCE_DTYPES, like="k"),
            Rule("slot_mapping", ("num_tokens",), SLOT_DTYPES),
            scale_rule("k", scales, computes=True),
            scale_rule("v", scales, computes=True),
        ),
        free="num_tokens",
        counted_by="slot_mapping",
        note=f" (layout {layout})",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCachingInfo:
    """Sizes and strides of one paged caching write; strides are in elements.

    The stride of an axis of length 1 is never used and is given as 0, except for the token axis,
    whose length may differ from call to call. The names follow InfiniCore's ``PagedCachingInfo``.

    Attributes
    ----------
    dtype : numpy.dtype
        Of `k` and `v`: float16, bfloat16 or float32.
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
    k_stored, v_stored : Stored
        The formats of the caches, and their scales.
    rules : Rules
        The table that the tensors were checked against.
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
    k_stored: Stored
    v_stored: Stored
    rules: Rules = field(repr=False, compare=False)

    @property
    def num_slots(self) -> int:
        """Capacity of the cache in tokens; valid slots are 0 to ``num_slots - 1``."""
        return self.num_blocks * self.block_size

    @property
    def sides(self) -> tuple[Side, Side]:
        """K and V."""

        def side(letter: str, head_size: int) -> Side:
            names = ("token", "head", "cache_block", "cache_slot", "cache_head")
            strides: list[int] = [getattr(self, f"{letter}_{name}_stride") for name in names]
            stored: Stored = getattr(self, f"{letter}_stored")
            return Side(letter, head_size, *strides, stored.format, stored.scale)  # type: ignore[call-arg, arg-type]

        return side("k", self.head_size), side("v", self.v_head_size)

    @property
    def copies(self) -> bool:
        """Whether both caches hold the bits of `k` and `v` as they are."""
        return all(side.copies(self.dtype) for side in self.sides)

    @classmethod
    def create(
        cls,
        k_cache: TensorDescriptor,
        v_cache: TensorDescriptor,
        k: TensorDescriptor,
        v: TensorDescriptor,
        slot_mapping: TensorDescriptor,
        k_scale: TensorDescriptor | None = None,
        v_scale: TensorDescriptor | None = None,
        *,
        layout: str | None = None,
        k_format: str | None = None,
        v_format: str | None = None,
        powers: bool = False,
    ) -> PagedCachingInfo:
        """Check tensor descriptors against each other and collect what a write needs.

        Parameters
        ----------
        k_cache, v_cache : TensorDescriptor
            ``[num_blocks, num_kv_heads, block_size, head_size]`` for layout ``"HND"``,
            ``[num_blocks, block_size, num_kv_heads, head_size]`` for ``"NHD"``.
        k, v : TensorDescriptor
            ``[num_tokens or more, num_kv_heads, head_size]``.
        slot_mapping : TensorDescriptor
            ``[num_tokens]``, int64 or int32.
        k_scale, v_scale : TensorDescriptor, optional
            See `Descriptor.create`.
        layout : {"HND", "NHD"}, optional
            By default, the one that the shapes allow.
        k_format, v_format : str, optional
            See `Descriptor.create`.
        powers : bool
            Whether scales that are computed are powers of two; see ``pagedcache.cache.scales``.

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
        given = (k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale)
        described: dict[str, TensorDescriptor] = {}
        for name, tensor in zip(NAMES, given, strict=True):
            if tensor is None and name not in REQUIRED:
                continue
            if not isinstance(tensor, TensorDescriptor):
                raise BadParamTypeError(name, "must be a TensorDescriptor", shown(tensor))
            described[name] = tensor
        layout = resolve_layout(layout, k_cache.shape, k.shape)
        rules, sizes, (k_side, v_side) = check_tables(
            described,
            functools.partial(make_rules, layout),
            layout,
            {"k": "k", "v": "v"},
            {"k": k_format, "v": v_format},
            powers=powers,
        )
        return cls(
            dtype=k.dtype,
            slot_dtype=slot_mapping.dtype,
            layout=layout,
            num_tokens=sizes["num_tokens"],
            num_blocks=sizes["num_blocks"],
            block_size=sizes["block_size"],
            num_kv_heads=sizes["num_kv_heads"],
            head_size=sizes["head_size"],
            v_head_size=sizes["v_head_size"],
            k_token_stride=k_side.token_stride,
            k_head_stride=k_side.head_stride,
            v_token_stride=v_side.token_stride,
            v_head_stride=v_side.head_stride,
            k_cache_block_stride=k_side.block_stride,
            k_cache_head_stride=k_side.cache_head_stride,
            k_cache_slot_stride=k_side.slot_stride,
            v_cache_block_stride=v_side.block_stride,
            v_cache_head_stride=v_side.cache_head_stride,
            v_cache_slot_stride=v_side.slot_stride,
            k_stored=Stored(k_side.format, k_side.scale),
            v_stored=Stored(v_side.format, v_side.scale),
            rules=rules,
        )
