# SPDX-License-Identifier: Apache-2.0
"""Storage formats: what is stored for a value, and what is read back.

The NumPy functions here are the specification of every conversion. Each takes or returns float32,
and rounds once. ``cuda_src/formats.cuh`` gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.dtypes import BF16, E4M3, E5M2, F16, F32, I8, U8, Dtype, names
from pagedcache.status import BadParamError, BadTensorDtypeError, shown

if TYPE_CHECKING:
    from pagedcache.tensors import Array


@dataclass(frozen=True, slots=True)
class Format:
    """How one element of K or V is stored.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype
        Of an array whose elements are stored this way.
    most : float
        The largest magnitude that it has with either sign: what the largest element of a row
        becomes if its scale is computed.
    packed : int
        Elements of K or V in one element of an array.
    """

    name: str
    dtype: Dtype
    most: float
    packed: int = 1

    @property
    def is_float(self) -> bool:
        """Whether it is a float type that K and V can come in, which takes no scale."""
        return self.dtype in SOURCE_DTYPES

    @property
    def is_integer(self) -> bool:
        """Whether values are rounded to integers, for which a scale is needed."""
        return self.name in ("int8", "int4")

    @property
    def bits(self) -> int:
        """Bits of an element of K or V."""
        return self.dtype.itemsize * 8 // self.packed

    @property
    def code_dtype(self) -> Dtype:
        """Unsigned ints as wide as the elements of an array."""
        return np.dtype(f"u{self.dtype.itemsize}")

    def encode(self, values: Array) -> Array:
        """Return what is stored for values.

        Rounds to the nearest, ties to even for floats and away from zero for integers. 8-bit
        floats and integers saturate, float16 and bfloat16 overflow to infinity. NaN becomes 0 in an
        integer; in a float, its sign is clear and all other bits are set.

        Parameters
        ----------
        values : array of float32
            Any shape; the length of the last axis is a multiple of `packed`.

        Returns
        -------
        array of `code_dtype`
            The last axis is `packed` times as short.
        """
        if self.is_integer:
            whole = _rounded(values, self.most)
            if self.packed == 2:
                whole = whole[..., ::2] & 15 | (whole[..., 1::2] & 15) << 4
            return whole.view(np.uint8)
        if not self.is_float:
            values = np.clip(values, np.float32(-self.most), np.float32(self.most))
        with np.errstate(all="ignore"):
            codes: Array = values.astype(self.dtype).view(self.code_dtype)
        nan = np.isnan(values)
        if nan.any():
            codes = np.where(nan, self.code_dtype.type((1 << (self.bits - 1)) - 1), codes)
        return codes

    def decode(self, codes: Array) -> Array:
        """Return the values, as float32, of what `encode` returned; exact.

        Parameters
        ----------
        codes : array of `code_dtype`
        """
        if self.packed == 2:
            # The shift to the right repeats the sign.
            both = np.stack([(codes << 4).view(np.int8) >> 4, codes.view(np.int8) >> 4], axis=-1)
            return np.reshape(both, (*codes.shape[:-1], -1)).astype(np.float32)
        with np.errstate(invalid="ignore"):  # a NaN that signals
            values: Array = codes.view(self.dtype).astype(np.float32)
        return values


def _rounded(values: Array, most: float) -> Array:
    """Return int8: the nearest integers in ``-most - 1`` to `most`, halves away from zero."""
    clipped = np.clip(np.where(np.isnan(values), np.float32(0), values), -most - 1, most)
    whole: Array = np.trunc(clipped)
    whole += np.copysign(np.abs(clipped - whole) >= 0.5, clipped)
    return whole.astype(np.int8)


SOURCE_DTYPES = (F16, BF16, F32)
"""In which K and V come, and in which they are read back."""

FORMATS = {
    each.name: each
    for each in (
        *(Format(str(dtype), dtype, np.inf) for dtype in SOURCE_DTYPES),
        Format("float8_e4m3fn", E4M3, 448.0),
        Format("float8_e5m2", E5M2, 57344.0),
        Format("int8", I8, 127.0),
        Format("int4", U8, 7.0, packed=2),
    )
}

CUDA_NAMES = {
    "float16": "F16", "bfloat16": "BF16", "float32": "F32",
    "float8_e4m3fn": "E4M3", "float8_e5m2": "E5M2", "int8": "I8", "int4": "I4",
}  # fmt: skip
"""What formats are called in the CUDA source."""

CACHE_DTYPES = (*SOURCE_DTYPES, E4M3, E5M2, I8, U8)
_IN_BYTES = tuple(name for name, each in FORMATS.items() if each.dtype.itemsize == 1)


def resolve_format(
    letter: str, named: object, cache: Dtype, source: Dtype, source_name: str
) -> Format:
    """Return the format of a cache, by its dtype or by its name.

    Parameters
    ----------
    letter : {"k", "v"}
    named : str or None
        The argument `k_format` or `v_format`.
    cache, source : numpy.dtype
        Of the cache, and of what is written to it or read from it.
    source_name : str
        The argument that `source` is the dtype of.

    Raises
    ------
    BadTensorDtypeError
        No format has this dtype, or the dtypes differ and no format is named.
    BadParamError
        `named` is not a format, or not one of this dtype; or none is named and the cache is of
        bytes.
    """
    name, argument = f"{letter}_cache", f"{letter}_format"
    if cache not in CACHE_DTYPES:
        raise BadTensorDtypeError(name, f"must be {names(CACHE_DTYPES)}", cache)
    if named is None:
        if cache == U8:
            rule = f"must be given, because {name} is of bytes (uint8); use one of "
            raise BadParamError(argument, rule + ", ".join(map(repr, _IN_BYTES)))
        found = FORMATS[str(cache)]
        if found.is_float and cache != source:
            rule = f"must be {cache} like {name}, unless {argument}={str(cache)!r} asks to convert"
            raise BadTensorDtypeError(source_name, rule, source)
        return found
    if not isinstance(named, str) or named not in tuple(FORMATS):
        rule = f"must be one of {', '.join(FORMATS)} or None"
        raise BadParamError(argument, rule, shown(named))
    found = FORMATS[str.__str__(named)]
    if cache not in ((found.dtype, U8) if found.dtype.itemsize == 1 else (found.dtype,)):
        rule = f"must match the dtype of {name}, {cache}"
        raise BadParamError(argument, rule, shown(named))
    return found
