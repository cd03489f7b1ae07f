# SPDX-License-Identifier: Apache-2.0
"""New arrays: bytes on a device or in pinned host memory, and arrays of any shape in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pagedcache.status import BadParamTypeError, shown

if TYPE_CHECKING:
    from pagedcache.dtypes import Dtype
    from pagedcache.tensors import Array


class Memory(Protocol):
    """Where a library puts new arrays.

    Attributes
    ----------
    device : str
        Such as ``"cpu"`` or ``"cuda:0"``.
    """

    device: str

    def zeros(self, size: int) -> Any:
        """Return `size` zero bytes."""

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return an array whose elements may be anything."""

    def part(
        self, whole: Any, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...], at: int
    ) -> Any:
        """Return an array in bytes that `zeros` returned; strides and place are in bytes."""

    def moved(self, array: Array) -> Any:
        """Return a copy of an array of the host, in the order of the current stream."""

    def pinned(self, shape: tuple[int, ...]) -> Any:
        """Return bytes in host memory that the device can copy from and to."""

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Make a stream current, by its handle: new arrays are for what is queued on it."""

    def current_stream(self) -> int:
        """Return the handle of the stream that this library uses now."""


class NumpyMemory:
    """Arrays of NumPy."""

    device = "cpu"

    def zeros(self, size: int) -> Any:
        """Return `size` zero bytes."""
        return np.zeros(size, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return an array whose elements may be anything."""
        return np.empty(shape, dtype)

    def part(
        self, whole: Any, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...], at: int
    ) -> Any:
        """Return an array in bytes that `zeros` returned."""
        return np.ndarray(shape, dtype, whole, at, strides)

    def moved(self, array: Array) -> Any:
        """Return a copy of an array."""
        return array.copy()

    def pinned(self, shape: tuple[int, ...]) -> Any:
        """Return bytes."""
        return np.empty(shape, np.uint8)

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Do nothing: there are no streams."""
        return nullcontext()

    def current_stream(self) -> int:
        """Return 0: there are no streams."""
        return 0


class CupyMemory:
    """Arrays of CuPy on one GPU.

    Parameters
    ----------
    cupy : module
    index : int
    """

    def __init__(self, cupy: Any, index: int) -> None:
        self._cupy, self._index = cupy, index
        self.device = f"cuda:{index}"

    def zeros(self, size: int) -> Any:
        """Return `size` zero bytes."""
        with self._cupy.cuda.Device(self._index):
            return self._cupy.zeros(size, np.uint8)

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return an array whose elements may be anything."""
        with self._cupy.cuda.Device(self._index):
            return self._cupy.empty(shape, dtype)

    def part(
        self, whole: Any, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...], at: int
    ) -> Any:
        """Return an array in bytes that `zeros` returned."""
        return self._cupy.ndarray(shape, dtype, whole.data + at, strides)

    def moved(self, array: Array) -> Any:
        """Return a copy of an array of the host, in the order of the current stream."""
        with self._cupy.cuda.Device(self._index):
            return self._cupy.asarray(array)

    def pinned(self, shape: tuple[int, ...]) -> Any:
        """Return bytes in pinned host memory."""
        size = int(np.prod(shape))
        held = self._cupy.cuda.alloc_pinned_memory(size)
        return np.frombuffer(held, np.uint8, size).reshape(shape)

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        """Make a stream current in CuPy, by its handle."""
        cuda = self._cupy.cuda
        with cuda.Device(self._index), cuda.Stream.from_external(StreamHandle(stream)):
            yield

    def current_stream(self) -> int:
        """Return the handle of CuPy's current stream on the GPU."""
        return int(self._cupy.cuda.get_current_stream(self._index).ptr)


class TorchMemory:
    """Tensors of PyTorch on one device.

    Parameters
    ----------
    torch : module
    device : torch.device
    """

    def __init__(self, torch: Any, device: Any) -> None:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self._torch, self._device = torch, device
        self.device = str(device)

    def zeros(self, size: int) -> Any:
        """Return `size` zero bytes."""
        return self._torch.zeros(size, dtype=self._torch.uint8, device=self._device)

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return a tensor whose elements may be anything."""
        return self._torch.empty(shape, dtype=self._dtype(dtype), device=self._device)

    def part(
        self, whole: Any, dtype: Dtype, shape: tuple[int, ...], strides: tuple[int, ...], at: int
    ) -> Any:
        """Return a tensor in bytes that `zeros` returned."""
        size = dtype.itemsize
        typed = whole.view(self._dtype(dtype))
        return typed.as_strided(shape, [step // size for step in strides], at // size)

    def moved(self, array: Array) -> Any:
        """Return a copy of an array of the host, in the order of the current stream."""
        tensor = self._torch.tensor(array)
        if self._device.type == "cuda":  # a copy from pageable memory would wait for the stream
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor

    def pinned(self, shape: tuple[int, ...]) -> Any:
        """Return bytes in host memory, pinned if the device is a GPU."""
        pin = self._device.type == "cuda"
        return self._torch.empty(shape, dtype=self._torch.uint8, pin_memory=pin)

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Make a stream current in PyTorch, by its handle."""
        if self._device.type != "cuda":
            return nullcontext()
        cuda = self._torch.cuda
        made: AbstractContextManager[Any] = cuda.stream(
            cuda.ExternalStream(stream, device=self._device)
        )
        return made

    def current_stream(self) -> int:
        """Return the handle of PyTorch's current stream on the device."""
        if self._device.type != "cuda":
            return 0
        return int(self._torch.cuda.current_stream(self._device).cuda_stream)

    def _dtype(self, dtype: Dtype) -> Any:
        return getattr(self._torch, str(dtype))


class StreamHandle:
    """The handle of a stream, with the protocol of streams."""

    def __init__(self, handle: int) -> None:
        self._handle = int(handle)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def memory_on(device: Any, default: Callable[[str | None], str]) -> Memory:
    """Return where new arrays go.

    Parameters
    ----------
    device : str, torch.device or None
        A name for arrays of NumPy or CuPy; a ``torch.device`` for tensors of PyTorch.
    default : callable
        From a name or ``None`` to the full name of a device.

    Raises
    ------
    BadParamTypeError
        `device` is none of these.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(device, torch.device):
        default(str(device))  # says more than PyTorch if it cannot be used
        return TorchMemory(torch, device)
    if device is not None and not isinstance(device, str):
        rule = "must be a name such as 'cuda:0', a torch.device, or None"
        raise BadParamTypeError("device", rule, shown(device))
    name = default(device)
    if name == "cpu":
        return NumpyMemory()
    import cupy

    return CupyMemory(cupy, int(name.partition(":")[2]))


def memory_like(arrays: Iterable[Any], device: str) -> Memory:
    """Return where new arrays go that may have the dtypes of others, which are on a device."""
    torch = sys.modules.get("torch")
    for array in arrays:
        if torch is not None and isinstance(array, torch.Tensor):
            return TorchMemory(torch, array.device)
    return memory_on(device, lambda name: name or device)
