"""Status codes and the exceptions that carry them.

Every error that this package raises is a `PagedCacheError` with a `status`, and also the built-in
type that a Python user would expect::

    PagedCacheError
    |-- InternalError (RuntimeError)                        INTERNAL_ERROR
    |   |-- CompileError                                    INTERNAL_ERROR
    |   `-- LaunchError                                     INTERNAL_ERROR
    |-- NotSupportedError (NotImplementedError)             NOT_IMPLEMENTED
    |-- BadParamError (ValueError)                          BAD_PARAM
    |   |-- BadParamTypeError (TypeError)                   BAD_PARAM
    |   |-- DestroyedError (RuntimeError)                   BAD_PARAM
    |   |-- InvalidSlotError (IndexError)                   BAD_PARAM
    |   |-- DuplicateSlotError                              BAD_PARAM
    |   |-- NonFiniteError                                  BAD_PARAM
    |   |-- CacheOverlapError                               BAD_PARAM
    |   `-- SourceOverlapError                              BAD_PARAM
    |-- NullPointerError (TypeError, ValueError)            NULL_POINTER
    |-- DeviceTypeNotSupportedError (ValueError)            DEVICE_TYPE_NOT_SUPPORTED
    |-- DeviceNotFoundError (RuntimeError, ValueError)      DEVICE_NOT_FOUND
    |-- DeviceNotInitializedError (RuntimeError)            DEVICE_NOT_INITIALIZED
    |   `-- MissingLibraryError (ImportError)               DEVICE_NOT_INITIALIZED
    |-- DeviceArchitectureNotSupportedError (RuntimeError)  DEVICE_ARCHITECTURE_NOT_SUPPORTED
    |-- BadTensorDtypeError (TypeError)                     BAD_TENSOR_DTYPE
    |-- BadTensorShapeError (ValueError)                    BAD_TENSOR_SHAPE
    |-- BadTensorStridesError (ValueError)                  BAD_TENSOR_STRIDES
    `-- InsufficientWorkspaceError (ValueError)             INSUFFICIENT_WORKSPACE
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any


class Status(IntEnum):
    """Result codes, with the numbers of InfiniCore's ``infiniStatus_t``."""

    SUCCESS = 0
    INTERNAL_ERROR = 1
    NOT_IMPLEMENTED = 2
    BAD_PARAM = 3
    NULL_POINTER = 4
    DEVICE_TYPE_NOT_SUPPORTED = 5
    DEVICE_NOT_FOUND = 6
    DEVICE_NOT_INITIALIZED = 7
    DEVICE_ARCHITECTURE_NOT_SUPPORTED = 8
    BAD_TENSOR_DTYPE = 10
    BAD_TENSOR_SHAPE = 11
    BAD_TENSOR_STRIDES = 12
    INSUFFICIENT_WORKSPACE = 13


class PagedCacheError(Exception):
    """Base of every error of this package.

    Parameters
    ----------
    subject : str
        The argument (or the device, backend or step) that the error is about.
    rule : str
        What it must be, or what went wrong.
    got : object, optional
        What was found instead.

    Attributes
    ----------
    status : Status
        The code that the C-style interface returns for this error.
    """

    status = Status.INTERNAL_ERROR

    def __init__(self, subject: str, rule: str, *got: object) -> None:
        super().__init__(subject, rule, *got)
        self.subject = subject

    def __str__(self) -> str:
        subject, rule, *got = self.args
        return f"{subject} {rule}" + (f", got {shown(got[0], str)}" if got else "")


def shown(value: object, how: Callable[[object], str] = repr) -> str:
    """Return the `repr` of a value for a message, or its type, where that fails.

    As it does for an int of thousands of digits, or an array whose memory is gone.
    """
    try:
        return how(value)
    except Exception:
        return f"a {type(value).__name__}"


class InternalError(PagedCacheError, RuntimeError):
    """Something failed that no argument explains."""


class CompileError(InternalError):
    """A kernel did not compile; the message holds the compiler's log."""


class LaunchError(InternalError):
    """The driver refused a launch."""


class NotSupportedError(PagedCacheError, NotImplementedError):
    """The backend does not have this operator."""

    status = Status.NOT_IMPLEMENTED


class BadParamError(PagedCacheError, ValueError):
    """An argument has a value that it must not have."""

    status = Status.BAD_PARAM


class BadParamTypeError(BadParamError, TypeError):
    """An argument is of a type that cannot serve."""


class DestroyedError(BadParamError, RuntimeError):
    """A handle or descriptor was used after ``destroy``."""


class InvalidSlotError(BadParamError, IndexError):
    """Slots at or past the end of the cache; the valid tokens have been written.

    Attributes
    ----------
    token : int
        The lowest token whose slot is invalid.
    slot : int
        Its slot.
    count : int
        How many tokens have an invalid slot.
    capacity : int
        Number of slots of the cache.
    """

    def __init__(self, token: int, slot: int, count: int, capacity: int) -> None:
        rule = (
            f"must have slots below the capacity of the cache, {capacity}, or negative ones for "
            f"padding; {count} of its tokens {'has' if count == 1 else 'have'} not, the first is "
            f"token {token}"
        )
        super().__init__("slot_mapping", rule, f"slot {slot}")
        self.token, self.slot, self.count, self.capacity = token, slot, count, capacity

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.token, self.slot, self.count, self.capacity)


class DuplicateSlotError(BadParamError):
    """Two tokens of one call have the same slot, so which of them stays is not defined."""


class NonFiniteError(BadParamError):
    """K or V holds a NaN or an infinity."""


class CacheOverlapError(BadParamError):
    """The K cache and the V cache share memory."""


class SourceOverlapError(BadParamError):
    """K, V or the slot mapping shares memory with a cache."""


class NullPointerError(PagedCacheError, TypeError, ValueError):
    """``None`` or address 0 where there must be data."""

    status = Status.NULL_POINTER


class DeviceTypeNotSupportedError(PagedCacheError, ValueError):
    """No backend is registered for this type of device."""

    status = Status.DEVICE_TYPE_NOT_SUPPORTED


class DeviceNotFoundError(PagedCacheError, RuntimeError, ValueError):
    """There is no device with this index."""

    status = Status.DEVICE_NOT_FOUND


class DeviceNotInitializedError(PagedCacheError, RuntimeError):
    """The backend cannot reach its device on this machine."""

    status = Status.DEVICE_NOT_INITIALIZED


class MissingLibraryError(DeviceNotInitializedError, ImportError):
    """A library that the backend needs is not installed or cannot be loaded."""


class DeviceArchitectureNotSupportedError(PagedCacheError, RuntimeError):
    """The device is below what the kernels need."""

    status = Status.DEVICE_ARCHITECTURE_NOT_SUPPORTED


class BadTensorDtypeError(PagedCacheError, TypeError):
    """A tensor has the wrong data type."""

    status = Status.BAD_TENSOR_DTYPE


class BadTensorShapeError(PagedCacheError, ValueError):
    """A tensor has the wrong rank or shape."""

    status = Status.BAD_TENSOR_SHAPE


class BadTensorStridesError(PagedCacheError, ValueError):
    """A tensor has strides that the operator cannot follow."""

    status = Status.BAD_TENSOR_STRIDES


class InsufficientWorkspaceError(PagedCacheError, ValueError):
    """The workspace is smaller than the descriptor asks for."""

    status = Status.INSUFFICIENT_WORKSPACE
