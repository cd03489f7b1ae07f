# SPDX-License-Identifier: Apache-2.0
"""Data types: those of NumPy, plus those of ml_dtypes that NumPy lacks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from pagedcache.status import BadTensorDtypeError, shown

Dtype = np.dtype[Any]

F16: Dtype = np.dtype(np.float16)
BF16: Dtype = np.dtype(ml_dtypes.bfloat16)
F32: Dtype = np.dtype(np.float32)
E4M3: Dtype = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2: Dtype = np.dtype(ml_dtypes.float8_e5m2)
I8: Dtype = np.dtype(np.int8)
U8: Dtype = np.dtype(np.uint8)
I32: Dtype = np.dtype(np.int32)
I64: Dtype = np.dtype(np.int64)


def as_dtype(subject: str, value: object) -> Dtype:
    """Return `value` as a NumPy dtype.

    Parameters
    ----------
    subject : str
        The argument to name in an error.
    value : object
        A dtype, a scalar type, or a name such as ``"bfloat16"``.

    Returns
    -------
    numpy.dtype

    Raises
    ------
    BadTensorDtypeError
        `value` is not a dtype. ``None`` is not one either, although NumPy reads it as float64.
    """
    try:
        if value is not None:
            return np.dtype(value)  # type: ignore[call-overload, no-any-return]
    except Exception:  # NumPy raises errors of many types here
        pass
    raise BadTensorDtypeError(subject, "must be a dtype or the name of one", shown(value))


def names(dtypes: tuple[Dtype, ...]) -> str:
    """Return the names of dtypes as in ``"float16, bfloat16 or float32"``."""
    *first, last = map(str, dtypes)
    return f"{', '.join(first)} or {last}" if first else last
