# SPDX-License-Identifier: Apache-2.0
"""Status codes, and the exceptions that carry them.

Every error that this package raises is a `PagedCacheError` with a `status`, and also the built-in
exception that a Python user would expect::

    PagedCacheError
    |-- InternalError (RuntimeError)                        INTERNAL_ERROR
    |   |-- CompileError                                    INTERNAL_ERROR
    |   `-- LaunchError                                     INTERNAL_ERROR
    |-- NotSupportedError (NotImplementedError)             NOT_IMPLEMENTED
    |-- BadParamError (ValueError)                          BAD_PARAM
    |   |-- BadParamTypeError (TypeError)                   BAD_PARAM
    |   |-- DestroyedError (RuntimeError)                   BAD_PARAM
    |   |-- RequiresGradError (RuntimeError)                BAD_PARAM
    |   |-- FreedError (RuntimeError)                       BAD_PARAM
    |   |-- PoolExhaustedError (MemoryError)                BAD_PARAM
    |   |-- InvalidSlotError (IndexError)                   BAD_PARAM
    |   |-- InvalidIndexError (IndexError)                  BAD_PARAM
    |   |-- InvalidPositionError (IndexError)               BAD_PARAM
    |   |-- InvalidBlockError (IndexError)                  BAD_PARAM
    |   |-- DuplicateBlockError                             BAD_PARAM
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

import operator
from collections.abc import Callable
from enum import IntEnum
from typing import Any


class Status(IntEnum):
    """Result codes, with the names and numbers of InfiniCore's ``infiniStatus_t``."""

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
    """Base class of every error that this package raises.

    Parameters
    ----------
    subject : str
        What the error is about: an argument, a device, a backend or a step.
    rule : str
        What it must be, or what went wrong.
    got : object, optional
        What it was instead.

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
    """Return the `repr` of a value for a message, or the name of its type if `repr` fails.

    It fails for an int of thousands of digits, and for an array whose memory is gone.
    """
    try:
        return how(value)
    except Exception:
        return f"a {type(value).__name__}"


def as_int(
    subject: str, value: Any, least: int | None = None, most: int | None = None, what: str = ""
) -> int:
    """Return an argument that must be an int, in a range, if one is given.

    Parameters
    ----------
    subject : str
        Its name.
    value : int, or anything with ``__index__``
    least, most : int, optional
        The range, both included; without `least`, any int will do.
    what : str
        What `most` is, in words before it.

    Raises
    ------
    BadParamTypeError
        It is not an int.
    BadParamError
        It is out of the range.
    """
    try:
        found = operator.index(value)
    except TypeError:
        raise BadParamTypeError(subject, "must be an int", shown(value)) from None
    if least is None:
        return found
    if most is None:
        if found < least:
            raise BadParamError(subject, f"must be at least {least}", shown(found))
    elif not least <= found <= most:
        raise BadParamError(subject, f"must be from {least} to {what}{most}", shown(found))
    return found


class InternalError(PagedCacheError, RuntimeError):
    """Something failed for a reason that no argument explains."""


class CompileError(InternalError):
    """A kernel did not compile. The message contains the compiler's log."""


class LaunchError(InternalError):
    """The driver refused a launch, or work that was queued earlier failed."""


class NotSupportedError(PagedCacheError, NotImplementedError):
    """The backend does not support this."""

    status = Status.NOT_IMPLEMENTED


class BadParamError(PagedCacheError, ValueError):
    """An argument has a value that is not allowed."""

    status = Status.BAD_PARAM


class BadParamTypeError(BadParamError, TypeError):
    """An argument has a type that is not allowed."""


class DestroyedError(BadParamError, RuntimeError):
    """A handle or descriptor was used after ``destroy``."""


class FreedError(BadParamError, RuntimeError):
    """A sequence of a pool was used after ``free``."""


class PoolExhaustedError(BadParamError, MemoryError):
    """A pool has fewer free blocks than a call needs. Nothing was changed.

    Attributes
    ----------
    needed : int
        The number of free blocks that the call needs; as in `BlockPool.num_needed`.
    free : int
        The number of blocks that are free.
    num_blocks : int
        The number of blocks that there are.
    """

    def __init__(
        self,
        subject: str,
        needed: int,
        free: int,
        num_blocks: int,
        where: str = "of the pool",
        otherwise: str = "make a pool with more blocks",
    ) -> None:
        super().__init__(subject, "")
        self.needed, self.free, self.num_blocks = needed, free, num_blocks
        self._where, self._otherwise = where, otherwise

    def __str__(self) -> str:
        blocks = "block" if self.needed == 1 else "blocks"
        return (
            f"{self.subject} must fit into the free blocks {self._where}, but {self.needed} "
            f"{blocks} must be free and {self.free} of {self.num_blocks} are; free sequences and "
            f"try again, or {self._otherwise}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        numbers = self.needed, self.free, self.num_blocks
        return type(self), (self.subject, *numbers, self._where, self._otherwise)


class RequiresGradError(BadParamError, RuntimeError):
    """A PyTorch tensor that requires grad would be written in place."""


class InvalidSlotError(BadParamError, IndexError):
    """Some slots are outside the cache. The tokens with valid slots have been written.

    Attributes
    ----------
    token : int
        The first token whose slot is invalid.
    slot : int
        Its slot.
    count : int
        The number of tokens with an invalid slot.
    capacity : int
        The number of slots in the cache.
    """

    def __init__(
        self, token: int, slot: int, count: int, capacity: int, where: str = "in this call"
    ) -> None:
        super().__init__("slot_mapping", "")
        self.token, self.slot, self.count, self.capacity = token, slot, count, capacity
        self._where = where

    def __str__(self) -> str:
        slots = "slot" if self.count == 1 else "slots"
        return (
            f"slot_mapping[{self.token}] = {self.slot} is outside the cache, which has "
            f"{self.capacity} slots ({self.count} invalid {slots} {self._where})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.token, self.slot, self.count, self.capacity, self._where)


class InvalidIndexError(BadParamError, IndexError):
    """An index in a step, such as a position, is out of range.

    Parameters
    ----------
    steps : {"q", "k", "v"}
        Whose steps have it.
    token : int
        The first token with such an index.
    count : int
        How many rows could not be written for this, or because their slot was invalid.
    where : str
        What was counted.
    """

    def __init__(self, steps: str, token: int, count: int, where: str = "in this call") -> None:
        super().__init__(steps, "")
        self.steps, self.token, self.count = steps, token, count
        self._where = where

    def __str__(self) -> str:
        rows = "row" if self.count == 1 else "rows"
        return (
            f"the steps of {self.steps} have an index, such as a position, that is out of range at "
            f"token {self.token}, so its row was not written ({self.count} invalid {rows} "
            f"{self._where})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.steps, self.token, self.count, self._where)


class InvalidPositionError(BadParamError, IndexError):
    """Some positions have no block in the table of their request. Their slots are -1.

    Attributes
    ----------
    token : int
        The first token with such a position.
    position : int
        Its position.
    count : int
        The number of such tokens.
    """

    def __init__(self, token: int, position: int, count: int, where: str = "in this call") -> None:
        super().__init__("positions", "")
        self.token, self.position, self.count = token, position, count
        self._where = where

    def __str__(self) -> str:
        tokens = "token" if self.count == 1 else "tokens"
        return (
            f"positions[{self.token}] = {self.position} has no block in the block table of its "
            f"request ({self.count} such {tokens} {self._where})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.token, self.position, self.count, self._where)


class InvalidBlockError(BadParamError, IndexError):
    """A list of blocks names some that do not exist.

    Attributes
    ----------
    index : int
        The first entry that does.
    block : int
        What it names.
    num_blocks : int
        How many there are.
    count : int
        The number of such entries.
    """

    def __init__(
        self,
        name: str,
        side: str,
        index: int,
        block: int,
        num_blocks: int,
        count: int,
        where: str = "in this call",
    ) -> None:
        super().__init__(name, "")
        self.side, self.index, self.block = side, index, block
        self.num_blocks, self.count, self._where = num_blocks, count, where

    def __str__(self) -> str:
        entries = "entry" if self.count == 1 else "entries"
        side = f" as its {self.side}" if self.side else ""
        return (
            f"{self.subject}[{self.index}] has block {self.block}{side}, but there are "
            f"{self.num_blocks} blocks ({self.count} invalid {entries} {self._where})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self.side, self.index, self.block, self.num_blocks, self.count, self._where)
        return type(self), (self.subject, *values)


class DuplicateBlockError(BadParamError):
    """Two pairs copy to one block, so either of them could be what ends up there."""


class DuplicateSlotError(BadParamError):
    """Two tokens in one call have the same slot, so either of them may end up there."""


class NonFiniteError(BadParamError):
    """K or V contains a NaN or an infinity."""


class CacheOverlapError(BadParamError):
    """Two arrays that are written, such as the K cache and the V cache, share memory."""


class SourceOverlapError(BadParamError):
    """An array that is read shares memory with one that is written."""


class NullPointerError(PagedCacheError, TypeError, ValueError):
    """An argument that must have data is ``None`` or has address 0."""

    status = Status.NULL_POINTER


class DeviceTypeNotSupportedError(PagedCacheError, ValueError):
    """No backend is registered for this device type."""

    status = Status.DEVICE_TYPE_NOT_SUPPORTED


class DeviceNotFoundError(PagedCacheError, RuntimeError, ValueError):
    """There is no device with this index."""

    status = Status.DEVICE_NOT_FOUND


class DeviceNotInitializedError(PagedCacheError, RuntimeError):
    """The backend cannot be used on this machine or in this process."""

    status = Status.DEVICE_NOT_INITIALIZED


class MissingLibraryError(DeviceNotInitializedError, ImportError):
    """A library that the backend needs is not installed or cannot be loaded."""


class DeviceArchitectureNotSupportedError(PagedCacheError, RuntimeError):
    """The device is older or smaller than the kernels require."""

    status = Status.DEVICE_ARCHITECTURE_NOT_SUPPORTED


class BadTensorDtypeError(PagedCacheError, TypeError):
    """A tensor has the wrong data type."""

    status = Status.BAD_TENSOR_DTYPE


class BadTensorShapeError(PagedCacheError, ValueError):
    """A tensor has the wrong number of axes or the wrong shape."""

    status = Status.BAD_TENSOR_SHAPE


class BadTensorStridesError(PagedCacheError, ValueError):
    """A tensor has strides that the operator does not support."""

    status = Status.BAD_TENSOR_STRIDES


class InsufficientWorkspaceError(PagedCacheError, ValueError):
    """The workspace is smaller than the descriptor requires."""

    status = Status.INSUFFICIENT_WORKSPACE
