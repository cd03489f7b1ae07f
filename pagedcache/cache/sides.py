# SPDX-License-Identifier: Apache-2.0
"""K and V of a call on a paged cache: what each has of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.dtypes import F32
from pagedcache.status import BadParamError

if TYPE_CHECKING:
    from pagedcache.cache.formats import Format
    from pagedcache.cache.scales import Scale
    from pagedcache.dtypes import Dtype
    from pagedcache.tensors import Array


@dataclass(frozen=True, slots=True)
class Side:
    """K or V. Strides are in elements of the arrays.

    Attributes
    ----------
    letter : {"k", "v"}
    head_size : int
    token_stride, head_stride : int
        Of the rows by token.
    block_stride, slot_stride, cache_head_stride : int
        Of the cache.
    format : Format
        Of the cache.
    scale : Scale or None
    """

    letter: str
    head_size: int
    token_stride: int
    head_stride: int
    block_stride: int
    slot_stride: int
    cache_head_stride: int
    format: Format
    scale: Scale | None

    def copies(self, dtype: Dtype) -> bool:
        """Return whether the cache holds the bits of rows of this dtype."""
        return self.format.dtype == dtype


def refuse_bad_scales(sides: Sequence[Side], data: Mapping[str, Array]) -> None:
    """Raise for a scale that is not positive and finite, of those that do not belong to a token.

    Raises
    ------
    BadParamError
    """
    for side in sides:
        name = f"{side.letter}_scale"
        if name in data and side.scale is not None and not side.scale.is_written:
            scales = data[name].view(F32)
            with np.errstate(invalid="ignore"):
                bad = np.argwhere(~((scales > 0) & np.isfinite(scales)))
            if len(bad):
                at = tuple(map(int, bad[0]))
                subject = f"{name}[{', '.join(map(str, at))}]" if at else name
                raise BadParamError(subject, "must be positive and finite", float(scales[at]))
