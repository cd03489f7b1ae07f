"""Data types: NumPy's, with ml_dtypes for the ones that NumPy lacks."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from pagedcache.status import BadTensorDtypeError, shown

Dtype = np.dtype[Any]

F16: Dtype = np.dtype(np.float16)
BF16: Dtype = np.dtype(ml_dtypes.bfloat16)
F32: Dtype = np.dtype(np.float32)
I32: Dtype = np.dtype(np.int32)
I64: Dtype = np.dtype(np.int64)


def as_dtype(subject: str, value: object) -> Dtype:
    """Return the NumPy dtype that `value` names.

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
        If `value` names no dtype. ``None`` names none (NumPy would read it as float64).
    """
    try:
        if value is not None:
            return np.dtype(value)  # type: ignore[call-overload, no-any-return]
    except Exception:  # NumPy has many for what is no dtype
        pass
    raise BadTensorDtypeError(subject, "must be a dtype or its name", shown(value))
