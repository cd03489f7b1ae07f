# SPDX-License-Identifier: Apache-2.0
"""Scales: which elements of a cache share one, by the shape of the array that holds them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.cache.layout import LAYOUTS, SIZES
from pagedcache.status import BadParamError, BadTensorShapeError

if TYPE_CHECKING:
    from pagedcache.cache.formats import Format
    from pagedcache.tensors import Array, TensorDescriptor

SMALLEST = np.float32(1e-6)
"""The smallest scale that is computed, as in vLLM: what a row of zeros gets."""

SMALLEST_POWER = np.float32(1e-4)
"""The same before it is made a power of two."""

WRITTEN = ("token_head", "group")
"""Granularities that a write computes."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The scales of one cache.

    Attributes
    ----------
    granularity : {"tensor", "head", "channel", "token_head", "group"}
        What shares a scale: everything; a KV head; a dimension of a head; a token's row in a head;
        neighbouring dimensions of such a row. The last two are computed by the write.
    group : int
        How many neighbouring dimensions of a head share one.
    block_stride, slot_stride, head_stride, group_stride : int
        In elements; 0 along axes that the scales do not have.
    powers : bool
        Whether one that is computed is a power of two.
    """

    granularity: str
    group: int
    block_stride: int
    slot_stride: int
    head_stride: int
    group_stride: int
    powers: bool = False

    def __str__(self) -> str:
        computed = ", computed by a write" if self.is_written else ""
        return f"{self.granularity}{computed}"

    @property
    def is_written(self) -> bool:
        """Whether a write computes it."""
        return self.granularity in WRITTEN


def scale_axes(
    letter: str,
    stored: Format,
    layout: str,
    scale: TensorDescriptor | None,
    sizes: Mapping[str, int],
) -> tuple[str, tuple[str, ...]]:
    """Return the granularity that the shape of a scale means, and the names of its axes.

    Parameters
    ----------
    letter : {"k", "v"}
    stored : Format
        Of the cache.
    layout : {"HND", "NHD"}
    scale : TensorDescriptor or None
    sizes : mapping of str to int
        The lengths of the axes of the cache.

    Returns
    -------
    granularity : str
        Empty if there is no scale.
    axes : tuple of str

    Raises
    ------
    BadParamError
        A scale is needed and there is none, or the format takes none.
    BadTensorShapeError
        No granularity has such a shape.
    """
    name = f"{letter}_scale"
    if scale is None:
        if stored.is_integer:
            rule = f"must be given, because {letter}_cache stores {stored.name}, which needs one"
            raise BadParamError(name, rule)
        return "", ()
    if stored.is_float:
        rule = f"must be None, because {letter}_cache stores {stored.name}, which takes no scale"
        raise BadParamError(name, rule, f"an array of shape {scale.shape}")
    size = SIZES[letter]
    rows = LAYOUTS[layout][:3]
    shape = scale.shape
    for granularity, axes in (
        ("token_head", rows),
        ("channel", ("num_kv_heads", size)),
        ("head", ("num_kv_heads",)),
    ):
        if shape == tuple(sizes[axis] for axis in axes):
            return granularity, axes
    if len(shape) == 4 and shape[:3] == tuple(sizes[axis] for axis in rows):
        if (
            shape[3]
            and sizes[size] % shape[3] == 0
            and sizes[size] // shape[3] % stored.packed == 0
        ):
            return "group", (*rows, f"{letter}_groups")
        whole = f"a number of groups that divides the {size}, {sizes[size]}"
        if stored.packed > 1:
            whole += f", into groups of a multiple of {stored.packed}"
        raise BadTensorShapeError(name, f"must have {whole}, on its last axis", f"shape {shape}")
    if math.prod(shape) == 1:
        return "tensor", ("one",) * len(shape)
    rule = (
        f"must have one element, the shape [num_kv_heads] or [num_kv_heads, {size}], or, for "
        f"scales that a write computes, [{', '.join(rows)}] or [{', '.join(rows)}, groups] "
        f"(layout {layout})"
    )
    raise BadTensorShapeError(name, rule, f"shape {shape}")


def resolve_scale(
    granularity: str,
    axes: tuple[str, ...],
    steps: tuple[int, ...],
    size: int,
    shape: tuple[int, ...],
    *,
    powers: bool = False,
) -> Scale:
    """Return a scale, given the names of its axes, their strides in elements and lengths.

    `size` is the head size.
    """
    by_axis = dict(zip(axes, steps, strict=True))
    group, last = size, 0
    if granularity == "channel":
        group, last = 1, steps[-1]
    elif granularity == "group":
        group, last = size // shape[-1], steps[-1]
    return Scale(
        granularity,
        group,
        by_axis.get("num_blocks", 0),
        by_axis.get("block_size", 0),
        by_axis.get("num_kv_heads", 0),
        last,
        powers,
    )


def computed(values: Array, most: float, *, powers: bool = False) -> Array:
    """Return the scale for the values along the last axis, as float32.

    ``max(amax / most, 1e-6)``, where ``amax`` is the largest magnitude, NaN left out. This is what
    vLLM's per-token-head formats compute (0.33.0, ``triton_reshape_and_cache_flash.py``). With
    `powers`, the least power of two that is no less than ``max(amax / most, 1e-4)``, as in its
    ``fp8_ds_mla`` (``cache_kernels.cu``).
    """
    # Not np.fmax, which returns a NaN for one that signals.
    sizes = np.where(np.isnan(values), np.float32(0), np.abs(values))
    amax: Array = sizes.max(axis=-1)
    with np.errstate(all="ignore"):
        scale: Array = np.maximum(amax / np.float32(most), SMALLEST_POWER if powers else SMALLEST)
    if powers:
        bits = scale.view(np.uint32) + np.uint32(0x7FFFFF)  # to the next exponent, if it is none
        scale = (bits & np.uint32(0x7F800000)).view(np.float32)
    return scale
