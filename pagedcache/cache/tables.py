# SPDX-License-Identifier: Apache-2.0
"""The tensors that operators on a paged cache share, as rules of their tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pagedcache.cache.formats import CACHE_DTYPES, SOURCE_DTYPES, Format, resolve_format
from pagedcache.cache.layout import LAYOUTS, SIZES
from pagedcache.cache.scales import WRITTEN, resolve_scale, scale_axes
from pagedcache.cache.sides import Side
from pagedcache.dtypes import F32, I32, I64, Dtype, names
from pagedcache.rules import Rule, Rules
from pagedcache.status import BadTensorDtypeError

if TYPE_CHECKING:
    from pagedcache.tensors import TensorDescriptor

SLOT_DTYPES = (I64, I32)


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


def scale_rule(
    letter: str, scales: Mapping[str, tuple[str, tuple[str, ...]]], *, computes: bool
) -> Rule:
    """Return what a scale must look like, which need not be there.

    Parameters
    ----------
    letter : {"k", "v"}
    scales : mapping of str to tuple
        By letter, the granularity and the axes, as `pagedcache.cache.scales.scale_axes` returns
        them.
    computes : bool
        Whether the operator computes scales of this granularity, if any do.
    """
    granularity, axes = scales.get(letter, ("", ()))
    return Rule(
        f"{letter}_scale",
        axes,
        (F32,),
        written=computes and granularity in WRITTEN,
        apart=True,
        optional=True,
        any_stride=True,
    )


MakeRules = Callable[[Mapping[str, Format], Mapping[str, tuple[str, tuple[str, ...]]]], Rules]
"""From the formats of K and V, and the granularities and axes of their scales, to a table."""


def check_tables(
    described: Mapping[str, TensorDescriptor],
    make_rules: MakeRules,
    layout: str,
    rows: Mapping[str, str],
    named: Mapping[str, object],
    *,
    powers: bool = False,
) -> tuple[Rules, dict[str, int], tuple[Side, ...]]:
    """Check tensors against each other, and against the formats of the caches.

    Parameters
    ----------
    described : mapping of str to TensorDescriptor
        By name; scales may be missing.
    make_rules : callable
    layout : {"HND", "NHD"}
    rows : mapping of str to str
        From ``"k"``, and ``"v"`` if there is V, to the name of its rows by token.
    named : mapping of str to str or None
        The formats that were asked for, by the same letters.
    powers : bool
        Whether scales that are computed are powers of two.

    Returns
    -------
    rules : Rules
        The table that the tensors fit.
    sizes : dict of str to int
        The lengths of the axes.
    sides : tuple of Side
        K, and V if there is V.

    Raises
    ------
    BadTensorDtypeError, BadTensorShapeError, BadTensorStridesError, BadParamError
        The message names the tensor, the rule and what was found.
    """
    for name in rows.values():
        dtype = described[name].dtype
        if dtype not in SOURCE_DTYPES:
            raise BadTensorDtypeError(name, f"must be {names(SOURCE_DTYPES)}", dtype)
    formats = {
        letter: resolve_format(
            letter, named[letter], described[f"{letter}_cache"].dtype, described[name].dtype, name
        )
        for letter, name in rows.items()
    }
    plain = {name: each for name, each in described.items() if not name.endswith("_scale")}
    sizes = make_rules(formats, {}).check(plain)
    scales = {
        letter: scale_axes(letter, formats[letter], layout, described.get(f"{letter}_scale"), sizes)
        for letter in rows
    }
    rules = make_rules(formats, scales)
    rules.check(described)

    def side(letter: str) -> Side:
        cache, of_rows, scale = f"{letter}_cache", rows[letter], f"{letter}_scale"
        size = sizes[SIZES[letter]]
        by_axis = dict(zip(LAYOUTS[layout], rules.steps(cache, described[cache]), strict=True))
        token, head, _ = rules.steps(of_rows, described[of_rows])
        granularity, axes = scales[letter]
        found = None
        if granularity:
            steps = rules.steps(scale, described[scale])
            shape = described[scale].shape
            found = resolve_scale(granularity, axes, steps, size, shape, powers=powers)
        return Side(
            letter,
            size,
            token,
            head,
            by_axis["num_blocks"],
            by_axis["block_size"],
            by_axis["num_kv_heads"],
            formats[letter],
            found,
        )

    return rules, sizes, tuple(map(side, rows))
