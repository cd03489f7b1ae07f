# SPDX-License-Identifier: Apache-2.0
"""The tensors that operators on a paged cache share, as rules of their tables."""

from __future__ import annotations

from pagedcache.cache.formats import CACHE_DTYPES, Format
from pagedcache.cache.layout import LAYOUTS
from pagedcache.cache.scales import WRITTEN
from pagedcache.dtypes import F32, I32, I64, Dtype
from pagedcache.rules import Rule

SLOT_DTYPES = (I64, I32)
SIZES = {"k": "head_size", "v": "v_head_size"}
"""What the last axis is called."""


def cache_rule(letter: str, layout: str, stored: Format | None = None, *, written: bool) -> Rule:
    """Return what a cache must look like.

    Parameters
    ----------
    letter : {"k", "v"}
    layout : {"HND", "NHD"}
    stored : Format, optional
        Its format, if that is known.
    written : bool
        Whether the operator writes it. One that is read must share no memory with what is written.
    """
    return Rule(
        f"{letter}_cache",
        (*LAYOUTS[layout][:3], SIZES[letter]),
        CACHE_DTYPES,
        written=written,
        apart=not written,
        packed=1 if stored is None else stored.packed,
    )


def rows_rule(
    name: str, dtypes: tuple[Dtype, ...], *, like: str | None = None, written: bool = False
) -> Rule:
    """Return what the rows of K or V by token must look like; `name` begins with its letter."""
    axes = ("num_tokens", "num_kv_heads", SIZES[name[0]])
    return Rule(name, axes, dtypes, like=like, written=written)


def scale_rule(letter: str, granularity: str, axes: tuple[str, ...], *, computes: bool) -> Rule:
    """Return what a scale must look like, which need not be there.

    Parameters
    ----------
    letter : {"k", "v"}
    granularity : str
    axes : tuple of str
        See `pagedcache.cache.scales.scale_axes`.
    computes : bool
        Whether the operator computes scales of this granularity, if any do.
    """
    return Rule(
        f"{letter}_scale",
        axes,
        (F32,),
        written=computes and granularity in WRITTEN,
        apart=True,
        optional=True,
        any_stride=True,
    )
