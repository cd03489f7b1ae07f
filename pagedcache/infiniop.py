# SPDX-License-Identifier: Apache-2.0
"""The operator behind the C functions of InfiniCore's ``infiniop``, name for name.

The names, numbers and semantics of this interface are InfiniCore's
(github.com/InfiniTensor/InfiniCore), so code written for it can use this package. No function
raises: each returns a `Status`, or ``(Status, value)`` where C has an out pointer; the value is
``None`` unless the status is ``SUCCESS``. Addresses are ints and are trusted, as in C; 0 and
``None`` are NULL. The logical order of axes is HND. The number of tokens in a call is that of the
tensor descriptors. A NULL stream is CUDA's default stream, not CuPy's current one.

`infiniopPagedCaching` is asynchronous on a GPU: it returns once the write is queued on the stream.
All functions may be called from any thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, ParamSpec, TypeVar

import ml_dtypes
import numpy as np

from pagedcache.backend.handle import Handle
from pagedcache.operators.paged_caching.descriptor import Descriptor
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    DeviceTypeNotSupportedError,
    NullPointerError,
    PagedCacheError,
    Status,
    shown,
)
from pagedcache.tensors import TensorDescriptor


class InfiniDevice(IntEnum):
    """Device types, with the numbers of ``infiniDevice_t``."""

    CPU = 0
    NVIDIA = 1
    CAMBRICON = 2
    ASCEND = 3
    METAX = 4
    MOORE = 5
    ILUVATAR = 6
    KUNLUN = 7
    HYGON = 8


class InfiniDtype(IntEnum):
    """Data types, with the numbers of ``infiniDtype_t``."""

    INVALID = 0
    BYTE = 1
    BOOL = 2
    I8 = 3
    I16 = 4
    I32 = 5
    I64 = 6
    U8 = 7
    U16 = 8
    U32 = 9
    U64 = 10
    F8 = 11
    F16 = 12
    F32 = 13
    F64 = 14
    C16 = 15
    C32 = 16
    C64 = 17
    C128 = 18
    BF16 = 19


_DTYPES: dict[InfiniDtype, Any] = {
    InfiniDtype.BYTE: np.uint8,
    InfiniDtype.BOOL: np.bool_,
    InfiniDtype.I8: np.int8,
    InfiniDtype.I16: np.int16,
    InfiniDtype.I32: np.int32,
    InfiniDtype.I64: np.int64,
    InfiniDtype.U8: np.uint8,
    InfiniDtype.U16: np.uint16,
    InfiniDtype.U32: np.uint32,
    InfiniDtype.U64: np.uint64,
    InfiniDtype.F8: ml_dtypes.float8_e4m3fn,
    InfiniDtype.F16: np.float16,
    InfiniDtype.F32: np.float32,
    InfiniDtype.F64: np.float64,
    InfiniDtype.C64: np.complex64,
    InfiniDtype.C128: np.complex128,
    InfiniDtype.BF16: ml_dtypes.bfloat16,
}

P = ParamSpec("P")
T = TypeVar("T")


def _status(function: Callable[P, None]) -> Callable[P, Status]:
    """Turn a function that raises into one that returns a status."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Status:
        try:
            function(*args, **kwargs)
        except PagedCacheError as error:
            return error.status
        except Exception:
            return Status.INTERNAL_ERROR
        return Status.SUCCESS

    return call


def _status_and_value(function: Callable[P, T]) -> Callable[P, tuple[Status, T | None]]:
    """Turn a function that raises into one that returns a status and a value."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> tuple[Status, T | None]:
        try:
            return Status.SUCCESS, function(*args, **kwargs)
        except PagedCacheError as error:
            return error.status, None
        except Exception:
            return Status.INTERNAL_ERROR, None

    return call


@_status_and_value
def infiniopCreateHandle(device_type: int, device_id: int = 0) -> Handle:
    """Open device `device_id` of type `device_type`, an `InfiniDevice`."""
    if not isinstance(device_type, int) or device_type not in set(InfiniDevice):
        raise DeviceTypeNotSupportedError("device_type", "must be an InfiniDevice", device_type)
    if not isinstance(device_id, int) or device_id < 0:
        raise BadParamError("device_id", "must be a non-negative int", shown(device_id))
    device = InfiniDevice(device_type)
    kind = "cuda" if device is InfiniDevice.NVIDIA else device.name.lower()
    return Handle(f"{kind}:{device_id}")


@_status
def infiniopDestroyHandle(handle: Handle | None) -> None:
    """Release a handle; descriptors that were created with it keep working."""
    _required("handle", handle, Handle).destroy()


@_status_and_value
def infiniopCreateTensorDescriptor(
    ndim: int, shape: Sequence[int] | None, strides: Sequence[int] | None, dtype: int
) -> TensorDescriptor:
    """Describe a tensor; strides are in elements, or ``None`` for a contiguous tensor."""
    if shape is None:
        raise NullPointerError("shape", "is required", "None")
    if not isinstance(dtype, int) or dtype not in _DTYPES:
        raise BadTensorDtypeError(
            "dtype", "must be an InfiniDtype other than INVALID, C16 and C32", shown(dtype)
        )
    if not isinstance(ndim, int) or ndim < 0:
        raise BadParamError("ndim", "must be a non-negative int", shown(ndim))
    return TensorDescriptor(
        _DTYPES[InfiniDtype(dtype)],
        _entries(BadTensorShapeError, "shape", shape, ndim),
        None if strides is None else _entries(BadTensorStridesError, "strides", strides, ndim),
    )


@_status
def infiniopDestroyTensorDescriptor(desc: TensorDescriptor | None) -> None:
    """Release a tensor descriptor. It holds no resources."""
    _required("desc", desc, TensorDescriptor)


@_status_and_value
def infiniopCreatePagedCachingDescriptor(
    handle: Handle | None,
    k_cache_desc: TensorDescriptor | None,
    v_cache_desc: TensorDescriptor | None,
    k_desc: TensorDescriptor | None,
    v_desc: TensorDescriptor | None,
    slot_mapping_desc: TensorDescriptor | None,
) -> Descriptor:
    """Check the tensors, select the backend of the handle's device, and compile.

    The caches have the dtype of K and V: there are no other formats in C.
    """
    k_cache = _required("k_cache_desc", k_cache_desc, TensorDescriptor)
    v_cache = _required("v_cache_desc", v_cache_desc, TensorDescriptor)
    rows = _required("k_desc", k_desc, TensorDescriptor)
    for name, cache in (("k_cache_desc", k_cache), ("v_cache_desc", v_cache)):
        if cache.dtype != rows.dtype:
            raise BadTensorDtypeError(name, f"must be {rows.dtype} like k_desc", cache.dtype)
    return Descriptor.create(
        k_cache,
        v_cache,
        rows,
        _required("v_desc", v_desc, TensorDescriptor),
        _required("slot_mapping_desc", slot_mapping_desc, TensorDescriptor),
        layout="HND",
        handle=_required("handle", handle, Handle),
    )


@_status_and_value
def infiniopGetPagedCachingWorkspaceSize(desc: Descriptor | None) -> int:
    """Return the size in bytes of the workspace that `infiniopPagedCaching` needs."""
    return _required("desc", desc, Descriptor).workspace_size


def infiniopPagedCaching(
    desc: Descriptor | None,
    workspace: int | None,
    workspace_size: int,
    k_cache: int | None,
    v_cache: int | None,
    k: int | None,
    v: int | None,
    slot_mapping: int | None,
    stream: int | None,
) -> Status:
    """Queue the write of as many tokens as the descriptor of the slot mapping has."""
    try:
        if type(desc) is not Descriptor:
            desc = _required("desc", desc, Descriptor)
        desc._write_at(k_cache, v_cache, k, v, slot_mapping, workspace, workspace_size, stream)
    except PagedCacheError as error:
        return error.status
    except Exception:
        return Status.INTERNAL_ERROR
    return Status.SUCCESS


@_status
def infiniopDestroyPagedCachingDescriptor(desc: Descriptor | None) -> None:
    """Release a descriptor; using it afterwards returns ``BAD_PARAM``."""
    _required("desc", desc, Descriptor).destroy()


def _entries(kind: type[PagedCacheError], name: str, values: Sequence[int], ndim: int) -> list[int]:
    """Return the first `ndim` entries; C arrays may be longer."""
    try:
        return [values[axis] for axis in range(ndim)]
    except (TypeError, LookupError) as error:
        raise kind(name, f"must have at least ndim entries, {ndim}", shown(values)) from error


def _required(name: str, value: object, kind: type[T]) -> T:
    if value is None:
        raise NullPointerError(name, "is required", "None")
    if not isinstance(value, kind):
        raise BadParamTypeError(name, f"must be a {kind.__name__}", shown(value))
    return value
