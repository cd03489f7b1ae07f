# SPDX-License-Identifier: Apache-2.0
"""Arrays that export DLPack, read by its C structures (dlpack.h, versions 0 and 1)."""

from __future__ import annotations

import ctypes
from typing import Any

from pagedcache.arrays.library import Library, copied, reading
from pagedcache.dtypes import as_dtype
from pagedcache.status import BadParamError, BadTensorDtypeError
from pagedcache.tensors import Tensor, row_major


class DLPack(Library):
    """Arrays with ``__dlpack__``."""

    def read(self, subject: str, array: Any) -> Tensor:
        """Return address, dtype, shape, strides and device of an array, without a copy."""
        with reading(subject, array):
            kind, _ = array.__dlpack_device__()
            # On CUDA, -1 asks the exporter not to synchronise.
            stream: dict[str, Any] = {"stream": -1} if int(kind) in _CUDA else {}
            try:
                capsules = [
                    array.__dlpack__(max_version=(1, 0), copy=False, **stream) for _ in range(2)
                ]
            except TypeError:  # an exporter from before DLPack had versions
                capsules = [array.__dlpack__(**stream) for _ in range(2)]
            # Not every exporter that copies says so, but two copies cannot be in one place.
            tensor, again = (parse(subject, capsule) for capsule in capsules)
            if tensor.address != again.address:
                raise copied(subject)
            return tensor


class _DLTensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensorVersioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h; without a version, a capsule has the tensor alone."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_READ_ONLY, _IS_COPIED = 1, 2  # flags
_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_FLOAT8 = {10: "float8_e4m3fn", 12: "float8_e5m2"}

capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
capsule_pointer.restype = ctypes.c_void_p
capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


def parse(subject: str, capsule: Any) -> Tensor:
    """Read a capsule without consuming it, so that it frees its tensor when it is freed."""
    flags = 0
    if _capsule_is(capsule, b"dltensor_versioned"):
        pointer = capsule_pointer(capsule, b"dltensor_versioned")
        managed = DLManagedTensorVersioned.from_address(pointer)
        flags, tensor = managed.flags, managed.tensor
    else:
        tensor = _DLTensor.from_address(capsule_pointer(capsule, b"dltensor"))
    if flags & _IS_COPIED:
        raise copied(subject)
    if tensor.device_type in _HOST:
        device = "cpu"
    elif tensor.device_type in _CUDA:
        device = f"cuda:{tensor.device_id}"
    else:
        rule = "must be in the memory of the CPU or of a CUDA device"
        got = f"DLPack device {tensor.device_type}:{tensor.device_id}"
        raise BadParamError(subject, rule, got)
    bits, kind = tensor.dtype_bits, _KINDS.get(tensor.dtype_code)
    float8 = _FLOAT8.get(tensor.dtype_code) if bits == 8 else None
    if (kind is None and float8 is None) or tensor.dtype_lanes != 1:
        rule = "must have a dtype that NumPy or ml_dtypes has"
        got = f"DLPack type {tensor.dtype_code} of {bits} bits x {tensor.dtype_lanes}"
        raise BadTensorDtypeError(subject, rule, got)
    dtype = as_dtype(subject, float8 or (kind if kind == "bool" else f"{kind}{bits}"))
    shape = tuple(tensor.shape[: tensor.ndim])
    steps = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else row_major(shape)
    return Tensor(
        (tensor.data or 0) + tensor.byte_offset,
        dtype,
        shape,
        tuple(step * dtype.itemsize for step in steps),
        device,
        not flags & _READ_ONLY,
    )
