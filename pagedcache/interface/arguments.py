"""The arguments of a call, held against what a descriptor was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagedcache.arrays import adopt
from pagedcache.info import NAMES, PagedCachingInfo
from pagedcache.interface.checks import refuse_overlap
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    InsufficientWorkspaceError,
    NullPointerError,
    shown,
)

if TYPE_CHECKING:
    from pagedcache.dtypes import Dtype
    from pagedcache.tensors import Tensor


class Expected(NamedTuple):
    """What one argument of `calculate` must look like; the token axis is free."""

    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes


class Arguments:
    """What the arguments of `calculate` must be like.

    Parameters
    ----------
    info : PagedCachingInfo
    device : str
        Where they must be.
    """

    def __init__(self, info: PagedCachingInfo, device: str) -> None:
        self._info = info
        self._device = device
        self._expected = tuple(_expectation(info, name) for name in NAMES)
        self._spans = tuple(_span(expected) for expected in self._expected[:2])

    def read(self, arrays: tuple[Any, ...]) -> tuple[int, int, int, int, int, int]:
        """Return the five addresses and the number of tokens; raise for what does not fit."""
        k_cache, v_cache, k, v, slot_mapping = arrays
        expected = self._expected
        k_cache_at = self._cache("k_cache", k_cache, expected[0])
        v_cache_at = self._cache("v_cache", v_cache, expected[1])
        slots_at, tokens = self._slots(slot_mapping)
        k_at = self._rows("k", k, expected[2], tokens)
        v_at = self._rows("v", v, expected[3], tokens)
        return k_cache_at, v_cache_at, k_at, v_at, slots_at, tokens

    def _cache(self, name: str, array: Any, expected: Expected) -> int:
        if type(array) is int:
            return not_null(name, array, 1)
        tensor = adopt(name, array)
        if tensor.shape != expected.shape:
            raise _unlike(BadTensorShapeError, name, f"shape {expected.shape}", tensor.shape)
        self._check_rest(name, tensor, expected)
        if not tensor.writable:
            raise BadParamError(name, "must be writable", "a read-only array")
        return not_null(name, tensor.address, 1)

    def _rows(self, name: str, array: Any, expected: Expected, tokens: int) -> int:
        if type(array) is int:
            return not_null(name, array, tokens)
        tensor = adopt(name, array)
        shape = tensor.shape
        if len(shape) != 3 or shape[1:] != expected.shape:
            heads, size = expected.shape
            raise _unlike(BadTensorShapeError, name, f"shape (rows, {heads}, {size})", shape)
        if shape[0] < tokens:
            rule = f"must have a row for each of the {tokens} slots of slot_mapping"
            raise BadTensorShapeError(name, rule, f"{shape[0]} rows")
        self._check_rest(name, tensor, expected)
        return not_null(name, tensor.address, tokens)

    def _slots(self, array: Any) -> tuple[int, int]:
        name, expected = "slot_mapping", self._expected[4]
        if type(array) is int:
            tokens = self._info.num_tokens
            return not_null(name, array, tokens), tokens
        tensor = adopt(name, array)
        if len(tensor.shape) != 1:
            raise _unlike(BadTensorShapeError, name, "shape (num_tokens,)", tensor.shape)
        self._check_rest(name, tensor, expected)
        tokens = tensor.shape[0]
        return not_null(name, tensor.address, tokens), tokens

    def _check_rest(self, name: str, tensor: Tensor, expected: Expected) -> None:
        if tensor.dtype != expected.dtype:
            raise _unlike(BadTensorDtypeError, name, f"dtype {expected.dtype}", tensor.dtype)
        axes = zip(tensor.shape, tensor.strides, expected.strides, strict=True)
        if (
            tensor.strides != expected.strides
            and 0 not in tensor.shape
            and any(length > 1 and step != wanted for length, step, wanted in axes)
        ):
            raise _unlike(
                BadTensorStridesError, name, f"strides {expected.strides} bytes", tensor.strides
            )
        if tensor.device != self._device:
            raise _unlike(BadParamError, name, f"device {self._device}", tensor.device)

    def refuse_addresses(self, addresses: tuple[int, ...]) -> None:
        """Raise for the first of five addresses that is 0, misaligned or past 2^63."""
        for name, address, expected in zip(NAMES, addresses, self._expected, strict=True):
            not_null(name, address, 1)
            if address >> 63:
                raise BadParamError(name, "must be an address below 2^63", hex(address))
            size = expected.dtype.itemsize
            if address % size:
                rule = f"must start at a multiple of its item size ({size} bytes)"
                raise BadParamError(name, rule, hex(address))

    def distance(self, k_cache: int, v_cache: int) -> int:
        """Return the bytes from the K cache to the V cache; raise if they share memory.

        Whether they do depends on this alone.
        """
        distance = v_cache - k_cache
        if not (distance >= self._spans[0] or -distance >= self._spans[1]):
            refuse_overlap(self._info, k_cache, v_cache)
        return distance

    def workspace(self, workspace: Any, size: int, needed: int) -> int:
        """Return the address of a workspace of at least `needed` bytes, 0 if none is."""
        if not isinstance(size, (int, np.integer)):
            raise BadParamTypeError("workspace_size", "must be an int", shown(size))
        if workspace is not None and type(workspace) is not int:
            tensor = adopt("workspace", workspace)
            if tensor.device != self._device:
                raise _unlike(BadParamError, "workspace", f"device {self._device}", tensor.device)
            workspace = tensor.address
        if size < needed:
            rule = f"must be at least {needed} bytes"
            raise InsufficientWorkspaceError("workspace_size", rule, size)
        if not workspace and needed:
            raise NullPointerError("workspace", "must be memory on the device", shown(workspace))
        return workspace or 0


def _expectation(info: PagedCachingInfo, name: str) -> Expected:
    tensor = info.tensor(name)
    shape = tensor.shape if name.endswith("_cache") else tensor.shape[1:]
    size = tensor.dtype.itemsize
    return Expected(tensor.dtype, shape, tuple(step * size for step in tensor.strides))


def _span(expected: Expected) -> int:
    """Return the bytes from the first element to the end of the last."""
    steps = zip(expected.shape, expected.strides, strict=True)
    return expected.dtype.itemsize + sum((length - 1) * step for length, step in steps)


def as_address(name: str, value: object) -> int:
    """Return an address as C would have it: ``None`` is 0."""
    if value is None:
        return 0
    if not isinstance(value, int):
        raise BadParamTypeError(name, "must be an address, as an int", shown(value))
    return int(value)


def not_null(name: str, address: int, count: int) -> int:
    """Return the address of `count` things; raise if it is none."""
    if address <= 0 and count:
        raise NullPointerError(name, "must not be a null pointer", hex(address))
    return address


def _unlike(kind: type[Exception], name: str, expected: str, got: object) -> Exception:
    return kind(name, f"must have {expected} as at create", got)
