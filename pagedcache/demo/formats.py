# SPDX-License-Identifier: Apache-2.0
"""What caches in another format than K and V must hold. Plain NumPy, apart from the operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

COPY = "copy"
GROUP = 32
SMALLEST = np.float32(1e-6)


@dataclass(frozen=True)
class Storage:
    """How the demo stores K and V.

    Attributes
    ----------
    name : str
    most : float
        What the largest magnitude that shares a scale is stored as.
    scale : {None, "token", 32}
        What shares a scale: all of a cache, a token's row in a head, or 32 dimensions of one. The
        latter two are what `KVCache` is given.
    float_dtype : type, optional
        Of 8-bit floats.
    packed : int
        How many elements are in a byte.
    """

    name: str
    most: float
    scale: str | int | None
    float_dtype: Any = None
    packed: int = 1

    @property
    def computes(self) -> bool:
        """Whether the write computes the scales."""
        return self.scale is not None

    def __str__(self) -> str:
        if not self.computes:
            return f"one float32 scale for each, which makes its largest magnitude {self.most:g}"
        shared = f"every {GROUP} dimensions of a token and head"
        if self.scale == "token":
            shared = "each token and head"
        return f"a float32 scale for {shared}, which the write computes"

    def scale_of(self, rows: Array) -> Array:
        """Return the one scale that makes the largest magnitude `most`."""
        largest = np.abs(rows.astype(np.float32)).max(keepdims=True).reshape(1)
        scale: Array = largest / np.float32(self.most)
        return scale

    def scale_for(self, k: Array, v: Array) -> Any:
        """Return what `KVCache` is given as the scale of this K and V."""
        return self.scale if self.computes else (self.scale_of(k), self.scale_of(v))

    def groups(self, size: int) -> tuple[int, ...]:
        """Return the last axis of the scales of a head of this size, if they have one."""
        return (size // GROUP,) if self.scale == GROUP else ()

    def encode(self, rows: Array, scale: Array | None) -> tuple[Array, Array | None]:
        """Return the codes and the computed scales of ``[tokens, heads, size]``."""
        values = rows.astype(np.float32)
        if scale is not None:
            return self._codes(values / scale), None
        groups = values.reshape(*values.shape[:2], *(self.groups(values.shape[2]) or (1,)), -1)
        scales = np.maximum(np.abs(groups).max(-1) / np.float32(self.most), SMALLEST)
        codes = self._codes((groups * (1 / scales)[..., None]).reshape(values.shape))
        return codes, scales if self.scale == GROUP else scales[..., 0]

    def decode(self, codes: Array, scales: Array) -> Array:
        """Return ``[tokens, heads, size]`` as float32."""
        values: Array
        if self.float_dtype is not None:
            values = codes.view(self.float_dtype).astype(np.float32)
        elif self.packed == 1:
            values = codes.view(np.int8).astype(np.float32)
        else:
            halves = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1)
            values = ((halves ^ 8).astype(np.float32)) - 8
        if self.computes:
            groups = values.reshape(*values.shape[:2], *(self.groups(values.shape[2]) or (1,)), -1)
            values = (groups * scales.reshape(*groups.shape[:3], 1)).reshape(values.shape)
        else:
            values = values * scales
        return values

    def _codes(self, values: Array) -> Array:
        codes: Array
        if self.float_dtype is not None:
            codes = values.clip(-self.most, self.most).astype(self.float_dtype).view(np.uint8)
            return codes
        # In float64, since adding a half must not round.
        wide = values.astype(np.float64)
        whole = np.trunc(wide + np.copysign(0.5, wide)).clip(-self.most - 1, self.most)
        codes = whole.astype(np.int8).view(np.uint8)
        return codes if self.packed == 1 else codes[..., ::2] & 15 | codes[..., 1::2] << 4


STORAGES = {
    storage.name: storage
    for storage in (
        Storage("float8_e4m3fn", 448, None, ml_dtypes.float8_e4m3fn),
        Storage("float8_e5m2", 57344, None, ml_dtypes.float8_e5m2),
        Storage("int8", 127, "token"),
        Storage("int4", 7, GROUP, packed=2),
    )
}
