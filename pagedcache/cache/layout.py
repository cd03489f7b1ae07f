# SPDX-License-Identifier: Apache-2.0
"""Layouts: the order of the axes of a cache."""

from __future__ import annotations

from pagedcache.status import BadParamError, BadTensorShapeError, shown

LAYOUTS = {
    "HND": ("num_blocks", "num_kv_heads", "block_size", "head_size"),
    "NHD": ("num_blocks", "block_size", "num_kv_heads", "head_size"),
}

SIZES = {"k": "head_size", "v": "v_head_size"}
"""What the last axis of K and of V is called."""


def resolve_layout(
    layout: object,
    k_cache: tuple[int, ...],
    k: tuple[int, ...],
    default: str = "HND",
    subject: str = "k",
) -> str:
    """Return the layout that was asked for, or the one that two shapes allow.

    Parameters
    ----------
    layout : {"HND", "NHD", None}
        ``None``: the one in which a cache of shape `k_cache` has as many KV heads as `k`.
    k_cache, k : tuple of int
        Shapes.
    default : str
        Returned if the shapes are wrong in other ways, or if all layouts mean the same.
    subject : str
        The argument that has the shape `k`.

    Raises
    ------
    BadParamError
        `layout` is not a layout; or is ``None``, and the shapes allow both.
    BadTensorShapeError
        `layout` is ``None``, and the shapes allow neither.
    """
    if layout is not None:
        if not isinstance(layout, str) or layout not in tuple(LAYOUTS):
            rule = f"must be one of {', '.join(LAYOUTS)} or None"
            raise BadParamError("layout", rule, shown(layout))
        return str.__str__(layout)  # of a subclass, such as a member of an enum
    if len(k_cache) != 4 or len(k) != 3 or 0 in k_cache:
        return default
    found = {name: k_cache[axes.index("num_kv_heads")] for name, axes in LAYOUTS.items()}
    fitting = [name for name, heads in found.items() if heads == k[1]]
    if not fitting:
        choices = " or ".join(f"{heads} in layout {name}" for name, heads in found.items())
        rule = f"must have the num_kv_heads of k_cache, {choices}"
        raise BadTensorShapeError(subject, rule, f"shape {k}")
    if len(fitting) > 1 and k[1] > 1:
        rule = (
            f"must be given, because a cache of shape {k_cache} has {k[1]} KV heads and blocks of "
            f"{k[1]} slots; use {' or '.join(f'layout={name!r}' for name in fitting)}"
        )
        raise BadParamError("layout", rule)
    return fitting[0] if len(fitting) == 1 else default
