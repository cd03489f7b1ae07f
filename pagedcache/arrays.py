"""The one place that decides how an object of any array library becomes an address with a shape.

Everything behind it sees a `Tensor` and never an array library. Nothing is copied, and no library
is imported to ask whether an array is of it: an array exists only once its library is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from pagedcache.dtypes import BF16, Dtype, as_dtype
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    NullPointerError,
    PagedCacheError,
)
from pagedcache.tensors import Tensor, row_major


class Reader(NamedTuple):
    """How the arrays of one library are read.

    Attributes
    ----------
    recogniser : callable
        From some arrays of this library to a function that tells whether as many others are the
        same in all that a `Tensor` holds, so the same to every check, but for the address and for
        strides along axes of one element. That function is called at each call, and is meant to be
        cheap; it may fail, or take the arrays of another library for those of this one.
    address : callable
        From an array to its address. Fails on the arrays of other libraries.
    read : callable
        From the name of an argument and an array to a `Tensor`.
    stream : callable or None
        From an array and the index of its device to the handle of the stream that its library
        would use now. ``None``: the backend's own.
    """

    recogniser: Callable[..., Callable[..., bool]]
    address: Callable[[Any], int]
    read: Callable[[str, Any], Tensor]
    stream: Callable[[Any, int], int] | None = None


def adopt(subject: str, array: object) -> Tensor:
    """Read address, dtype, shape, strides and device of an array, without a copy.

    Parameters
    ----------
    subject : str
        The argument to name in an error.
    array : array
        Of NumPy, CuPy, PyTorch or JAX, or anything with DLPack, ``__cuda_array_interface__`` or
        ``__array_interface__``.

    Returns
    -------
    Tensor
        Without elements, its strides are those of the array or row-major.

    Raises
    ------
    NullPointerError
        `array` is ``None``.
    BadParamTypeError
        `array` is no array, or one without plain memory of its own.
    BadParamError
        Its exporter would have to copy it.
    BadTensorDtypeError
        Its dtype is none of NumPy or ml_dtypes.
    """
    tensor = reader_of(subject, array).read(subject, array)
    if 0 in tensor.shape and tensor.strides[-1] != tensor.dtype.itemsize:
        # Nothing is ever found by these strides; NumPy makes them 0 where it converts no elements.
        steps = row_major(tensor.shape)
        return tensor._replace(strides=tuple(step * tensor.dtype.itemsize for step in steps))
    return tensor


def reader_of(subject: str, array: object) -> Reader:
    """Return how arrays of this type are read; raises as `adopt` does for what is no array."""
    return readers.get(type(array)) or _find_reader(subject, array)


def part(subject: str, array: Any, index: Any) -> Any:
    """Return ``array[index]``, a view of the same memory.

    Raises
    ------
    BadParamError
        It is a copy.
    BadParamTypeError
        `array` is no array, or cannot be indexed.
    """
    with _plain_memory(subject, array):
        taken = array[index]
    if type(array) not in readers:  # those give views
        whole, some = adopt(subject, array), adopt(subject, taken)
        step = index[1] * whole.strides[1] if index[1] is not None else 0
        if whole.writable and some.address != whole.address + step:
            raise _copied(subject)
    return taken


def current_streams(device: int) -> list[int]:
    """Return the current stream of each library that is in use and has streams of its own."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return []
    return [torch._C._cuda_getCurrentRawStream(device)]


def _read_numpy(_subject: str, array: np.ndarray[Any, Any]) -> Tensor:
    return Tensor(
        array.ctypes.data, array.dtype, array.shape, array.strides, "cpu", array.flags.writeable
    )


def _by_look(look: Callable[[Any], tuple[Any, ...]]) -> Callable[..., Callable[..., bool]]:
    """Return a recogniser that compares what `look` returns for each array."""

    def recogniser(*arrays: Any) -> Callable[..., bool]:
        known = tuple(map(look, arrays))
        if len(known) != 5:
            return lambda *arrays: tuple(map(look, arrays)) == known
        k1, k2, k3, k4, k5 = known  # one by one, five take 0.2 us less
        return lambda a1, a2, a3, a4, a5: (
            look(a1) == k1
            and look(a2) == k2
            and look(a3) == k3
            and look(a4) == k4
            and look(a5) == k5
        )

    return recogniser


# attrgetter takes all attributes in one call, which is what makes a look cheap.
_NUMPY = Reader(
    _by_look(operator.attrgetter("shape", "strides", "dtype", "device", "flags.writeable")),
    operator.attrgetter("ctypes.data"),
    _read_numpy,
)

readers: dict[type, Reader] = {np.ndarray: _NUMPY}
"""By type of array, for those that can be recognised; entered when the first is seen."""


@functools.cache
def _cupy_reader(cupy: Any) -> Reader:
    names = ["shape", "dtype"]
    if cupy.cuda.runtime.getDeviceCount() > 1:
        names.append("data.device_id")
    by_strides = _by_look(operator.attrgetter("strides", *names))
    # Not documented, but CuPy keeps it, where it makes a tuple of strides whenever it is asked.
    by_order = _by_look(operator.attrgetter("_c_contiguous", *names))

    def recogniser(*arrays: Any) -> Callable[..., bool]:
        contiguous = all(getattr(array, "_c_contiguous", False) for array in arrays)
        return (by_order if contiguous else by_strides)(*arrays)

    return Reader(recogniser, operator.attrgetter("data.ptr"), _read_cupy)


def _read_cupy(_subject: str, array: Any) -> Tensor:
    memory = array.data
    device = f"cuda:{memory.device_id}"
    return Tensor(memory.ptr, array.dtype, array.shape, array.strides, device, writable=True)


@functools.cache
def _torch_reader(torch: Any) -> Reader:
    # None in a build without CUDA; the public torch.cuda.current_stream takes 1 us.
    current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    by_look = _by_look(lambda t: (t.shape, t.stride(), t.dtype, t.device, t.is_neg()))

    def recogniser(*tensors: Any) -> Callable[..., bool]:
        try:
            # What torch.compile knows its inputs by, in a third of the time that a look takes.
            guards: Any = torch._C._dynamo.guards.TensorGuards(
                *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
            )
        except (AttributeError, TypeError):  # of some other version
            return by_look(*tensors)
        check = guards.check
        # Asked about a nested tensor, `check` would end the process (seen with PyTorch 2.13).
        if len(tensors) != 5:
            return lambda *tensors: not any(t.is_nested for t in tensors) and check(*tensors)
        return lambda t1, t2, t3, t4, t5: (
            not (t1.is_nested or t2.is_nested or t3.is_nested or t4.is_nested or t5.is_nested)
            and check(t1, t2, t3, t4, t5)
        )

    def read(subject: str, tensor: Any) -> Tensor:
        with _plain_memory(subject, tensor):
            return read_dense(subject, tensor)

    def read_dense(subject: str, tensor: Any) -> Tensor:
        if tensor.layout is not torch.strided:
            raise BadParamTypeError(subject, "must be a dense tensor", f"layout {tensor.layout}")
        if tensor.is_neg() or tensor.is_conj():
            rule = "must hold its values in memory; call resolve_neg() or resolve_conj()"
            raise BadParamError(subject, rule, "a lazily negated or conjugated view")
        dtype = _torch_dtype(subject, tensor.dtype)
        strides = tuple(step * dtype.itemsize for step in tensor.stride())
        return Tensor(
            tensor.data_ptr(), dtype, tuple(tensor.shape), strides, str(tensor.device), True
        )

    return Reader(
        recogniser,
        torch.Tensor.data_ptr,
        read,
        current_stream and (lambda tensor, device: current_stream(device) if tensor.is_cuda else 0),
    )


@functools.cache
def _torch_dtype(subject: str, dtype: Any) -> Dtype:
    try:
        return as_dtype(subject, str(dtype).removeprefix("torch."))
    except BadTensorDtypeError:
        raise BadTensorDtypeError(
            subject, "must have a dtype of NumPy or ml_dtypes", dtype
        ) from None


def _read_jax(subject: str, array: Any) -> Tensor:
    """Read a JAX array once it is computed; nothing can be written to one."""
    with _plain_memory(subject, array):
        array.block_until_ready()
        tensor = _parse_dlpack(subject, array.__dlpack__())
    return tensor._replace(writable=False)


def _read_dlpack(subject: str, array: Any) -> Tensor:
    with _plain_memory(subject, array):
        kind, _ = array.__dlpack_device__()
        # On CUDA, -1 asks for no synchronisation.
        stream: dict[str, Any] = {"stream": -1} if int(kind) in _DLPACK_CUDA else {}
        try:
            capsules = [
                array.__dlpack__(max_version=(1, 0), copy=False, **stream) for _ in range(2)
            ]
        except TypeError:  # an exporter from before there were versions
            capsules = [array.__dlpack__(**stream) for _ in range(2)]
        # Not all that copy say so, but whoever does copies twice, while both are there.
        tensor, again = (_parse_dlpack(subject, capsule) for capsule in capsules)
        if tensor.address != again.address:
            raise _copied(subject)
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


class _DLManagedTensorVersioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h; before versions, a capsule held the tensor alone."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _DLTensor),
    )


_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_DLPACK_READ_ONLY, _DLPACK_IS_COPIED = 1, 2
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_capsule_is = ctypes.pythonapi.PyCapsule_IsValid
_capsule_is.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _parse_dlpack(subject: str, capsule: Any) -> Tensor:
    """Read a capsule that nobody consumes, so that it frees its tensor with itself."""
    flags = 0
    if _capsule_is(capsule, b"dltensor_versioned"):
        pointer = _capsule_pointer(capsule, b"dltensor_versioned")
        managed = _DLManagedTensorVersioned.from_address(pointer)
        flags, tensor = managed.flags, managed.tensor
    else:
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    if flags & _DLPACK_IS_COPIED:
        raise _copied(subject)
    if tensor.device_type in _DLPACK_HOST:
        device = "cpu"
    elif tensor.device_type in _DLPACK_CUDA:
        device = f"cuda:{tensor.device_id}"
    else:
        rule = "must be in the memory of the CPU or of a CUDA device"
        got = f"DLPack device {tensor.device_type}:{tensor.device_id}"
        raise BadParamError(subject, rule, got)
    bits, kind = tensor.dtype_bits, _DLPACK_KINDS.get(tensor.dtype_code)
    if kind is None or tensor.dtype_lanes != 1:
        got = f"DLPack type {tensor.dtype_code} of {bits} bits x {tensor.dtype_lanes}"
        raise BadTensorDtypeError(subject, "must have a dtype of NumPy or ml_dtypes", got)
    dtype = as_dtype(subject, kind if kind == "bool" else f"{kind}{bits}")
    shape = tuple(tensor.shape[: tensor.ndim])
    steps = tuple(tensor.strides[: tensor.ndim]) if tensor.strides else row_major(shape)
    return Tensor(
        (tensor.data or 0) + tensor.byte_offset,
        dtype,
        shape,
        tuple(step * dtype.itemsize for step in steps),
        device,
        not flags & _DLPACK_READ_ONLY,
    )


def _copied(subject: str) -> BadParamError:
    return BadParamError(subject, "must be readable without a copy", "an exporter that copies")


def _read_cuda_interface(subject: str, array: Any) -> Tensor:
    """Read ``__cuda_array_interface__``; its stream is used, not waited for."""
    with _plain_memory(subject, array):
        interface = array.__cuda_array_interface__
        address, read_only = interface["data"]
        shape = tuple(map(operator.index, interface["shape"]))
        dtype = _interface_dtype(subject, interface["typestr"])
        strides = interface.get("strides")
        if strides is None:
            strides = [step * dtype.itemsize for step in row_major(shape)]
        strides = tuple(map(operator.index, strides))
        place = "cuda:0"
        if address:
            import cupy  # the array may be of a library that does without

            pointer = cupy.cuda.runtime.pointerGetAttributes(address)
            place = f"cuda:{pointer.device}"
    return Tensor(address, dtype, shape, strides, place, not read_only)


def _interface_stream(array: Any, _device: int) -> int:
    """Return the stream that the exporter names, or the default one."""
    with _plain_memory("k_cache", array):
        return int(array.__cuda_array_interface__.get("stream") or 0)


def _interface_dtype(subject: str, name: str) -> Dtype:
    """Return the dtype of a typestr; bfloat16 has none, and ml_dtypes writes it as V2."""
    return BF16 if name[1:] == "V2" else as_dtype(subject, name)


def _read_interface(subject: str, array: Any) -> Tensor:
    """Read ``__array_interface__``."""
    with _plain_memory(subject, array):
        interface = array.__array_interface__
        if not isinstance(interface["data"], tuple):  # a buffer, which may be one for this call
            raise _copied(subject)
        seen = np.asarray(array, copy=False)
        if seen.ctypes.data != interface["data"][0]:
            raise _copied(subject)
        dtype = _interface_dtype(subject, interface["typestr"])
    return _read_numpy(subject, seen)._replace(dtype=dtype)


@contextlib.contextmanager
def _plain_memory(subject: str, array: Any) -> Iterator[None]:
    """Turn whatever an exporter fails with into one error."""
    try:
        yield
    except PagedCacheError:
        raise
    except Exception as error:
        rule = f"must have memory that can be read without a copy ({error})"
        raise BadParamTypeError(subject, rule, _type_name(array)) from error


def _unknown(*_: Any) -> Any:
    raise TypeError  # these are read at each call


_JAX = Reader(_unknown, _unknown, _read_jax)
_DLPACK = Reader(_unknown, _unknown, _read_dlpack)
_CUDA_INTERFACE = Reader(_unknown, _unknown, _read_cuda_interface, _interface_stream)
_INTERFACE = Reader(_unknown, _unknown, _read_interface)


_EXPORTERS = {
    "__dlpack__": _DLPACK,
    "__cuda_array_interface__": _CUDA_INTERFACE,
    "__array_interface__": _INTERFACE,
}


def _find_reader(subject: str, array: object) -> Reader:
    if array is None:
        raise NullPointerError(subject, "must be an array", "None")
    cupy, torch, jax = (sys.modules.get(name) for name in ("cupy", "torch", "jax"))
    if isinstance(array, np.ndarray):
        reader, exact = _NUMPY, np.ndarray
    elif cupy is not None and isinstance(array, cupy.ndarray):
        reader, exact = _cupy_reader(cupy), cupy.ndarray
    elif torch is not None and isinstance(array, torch.Tensor):
        reader, exact = _torch_reader(torch), torch.Tensor
    elif jax is not None and isinstance(array, jax.Array):
        return _JAX
    else:
        for attribute, reader in _EXPORTERS.items():
            with contextlib.suppress(Exception):  # an attribute can fail in any way
                getattr(array, attribute)
                return reader
        rule = f"must be an array of NumPy, CuPy, PyTorch or JAX, or have {' or '.join(_EXPORTERS)}"
        raise BadParamTypeError(subject, rule, _type_name(array))
    if type(array) is not exact:
        return reader._replace(recogniser=_unknown)  # a subclass may differ from time to time
    return readers.setdefault(exact, reader)


def _type_name(array: object) -> str:
    return f"{type(array).__module__}.{type(array).__name__}"
