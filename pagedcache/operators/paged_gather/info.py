# SPDX-License-Identifier: Apache-2.0
"""What a paged gather needs to know about its tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pagedcache.cache.formats import SOURCE_DTYPES, Format
from pagedcache.cache.layout import resolve_layout
from pagedcache.cache.tables import (
    SLOT_DTYPES,
    cache_rule,
    check_tables,
    rows_rule,
    scale_rule,
)
from pagedcache.rules import Rule, Rules
from pagedcache.status import BadParamError, BadParamTypeError, shown
from pagedcache.tensors import TensorDescriptor

if TYPE_CHECKING:
    from pagedcache.cache.sides import Side
    from pagedcache.dtypes import Dtype

NAMES = ("k_cache", "v_cache", "slot_mapping", "k_out", "v_out", "k_scale", "v_scale")
OPTIONAL = ("v_cache", "v_out", "k_scale", "v_scale")
FREE = ("slot_mapping", "k_out", "v_out")
_NO_V = "must be None, because v_cache is None"


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedGatherInfo:
    """Sizes and strides of one paged gather.

    Attributes
    ----------
    dtype : numpy.dtype
        Of `k_out` and `v_out`: float16, bfloat16 or float32.
    slot_dtype : numpy.dtype
        int64 or int32.
    layout : {"HND", "NHD"}
        The order of the axes that the caches were described in.
    num_tokens : int
        Length of the slot mapping that the descriptor was created with.
    num_blocks, block_size, num_kv_heads : int
        Of the caches.
    sides : tuple of Side
        K, and V if there is V: head sizes, formats, scales, and strides in elements.
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
    sides: tuple[Side, ...]
    rules: Rules = field(repr=False, compare=False)

    @property
    def num_slots(self) -> int:
        """Capacity of the cache in tokens; valid slots are 0 to ``num_slots - 1``."""
        return self.num_blocks * self.block_size

    @classmethod
    def create(
        cls,
        k_cache: TensorDescriptor,
        v_cache: TensorDescriptor | None = None,
        slot_mapping: TensorDescriptor | None = None,
        k_out: TensorDescriptor | None = None,
        v_out: TensorDescriptor | None = None,
        k_scale: TensorDescriptor | None = None,
        v_scale: TensorDescriptor | None = None,
        *,
        layout: str | None = None,
        k_format: str | None = None,
        v_format: str | None = None,
    ) -> PagedGatherInfo:
        """Check tensor descriptors against each other and collect what a gather needs.

        Parameters
        ----------
        k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale : TensorDescriptor
            See `GatherDescriptor.create`.
        layout, k_format, v_format : str, optional
            See `GatherDescriptor.create`.

        Returns
        -------
        PagedGatherInfo

        Raises
        ------
        PagedCacheError
            The message names the tensor, the rule and what was found.
        """
        given = (k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale)
        described: dict[str, TensorDescriptor] = {}
        for name, tensor in zip(NAMES, given, strict=True):
            if tensor is None and name in OPTIONAL:
                continue
            if not isinstance(tensor, TensorDescriptor):
                raise BadParamTypeError(name, "must be a TensorDescriptor", shown(tensor))
            described[name] = tensor
        letters = letters_of(described)
        if v_format is not None and letters == "k":
            raise BadParamError("v_format", _NO_V, shown(v_format))
        k_out = described["k_out"]
        layout = resolve_layout(layout, k_cache.shape, k_out.shape, subject="k_out")
        rules, sizes, sides = check_tables(
            described,
            functools.partial(make_rules, layout),
            layout,
            {letter: f"{letter}_out" for letter in letters},
            {"k": k_format, "v": v_format},
        )
        return cls(
            dtype=k_out.dtype,
            slot_dtype=described["slot_mapping"].dtype,
            layout=layout,
            num_tokens=sizes["num_tokens"],
            num_blocks=sizes["num_blocks"],
            block_size=sizes["block_size"],
            num_kv_heads=sizes["num_kv_heads"],
            sides=sides,
            rules=rules,
        )


def letters_of(described: Mapping[str, TensorDescriptor]) -> str:
    """Return the sides that there are."""
    if "v_cache" in described and "v_out" in described:
        return "kv"
    for name, other in (("v_cache", "v_out"), ("v_out", "v_cache")):
        if name in described:
            rule = f"must be None, because {other} is None; give both to read V back"
            raise BadParamError(name, rule, f"an array of shape {described[name].shape}")
    scale = described.get("v_scale")
    if scale is not None:
        raise BadParamError("v_scale", _NO_V, f"an array of shape {scale.shape}")
    return "k"


def make_rules(
    layout: str,
    formats: Mapping[str, Format],
    scales: Mapping[str, tuple[str, tuple[str, ...]]],
) -> Rules:
    """Return the table of tensors for caches in these formats, of V only if it has one."""
    found = {
        **{name: Rule(name, (), (), optional=True) for name in OPTIONAL},
        "slot_mapping": Rule("slot_mapping", ("num_tokens",), SLOT_DTYPES),
    }
    for letter, stored in formats.items():
        like = None if letter == "k" else "k_out"
        for rule in (
            cache_rule(letter, layout, stored, written=False),
            rows_rule(f"{letter}_out", SOURCE_DTYPES, like=like, written=True),
            scale_rule(letter, scales, computes=False),
        ):
            found[rule.name] = rule
    return Rules(
        tensors=tuple(found[name] for name in NAMES),
        free="num_tokens",
        counted_by="slot_mapping",
        note=f" (layout {layout})",
    )
