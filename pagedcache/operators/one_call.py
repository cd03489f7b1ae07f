# SPDX-License-Identifier: Apache-2.0
"""Operators as one function: an operation is found again by the signatures of its arrays."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pagedcache.arrays.find import adopt
from pagedcache.locks import make_lock
from pagedcache.operators.base import Operation
from pagedcache.rules import row_step

if TYPE_CHECKING:
    from pagedcache.tensors import Tensor

OperationT = TypeVar("OperationT", bound=Operation[Any])

MOST_KEPT = 256
MOST_RECENT = 8
FOUND_OFTEN = 32


class Kept(Generic[OperationT]):
    """The operations that recent calls used.

    Parameters
    ----------
    kind : type
        A subclass of `Operation`.
    create : callable
        From arrays, followed by options, to an operation.

    Attributes
    ----------
    recent : tuple of tuples
        Options followed by an operation, to try before any is looked up. A model has layers of a
        few shapes, and calls for them in turn.
    """

    def __init__(self, kind: type[OperationT], create: Callable[..., OperationT]) -> None:
        self._kind = kind
        self.create = create
        self._kept: dict[Hashable, OperationT] = {}  # the least recently found first
        self._lock = make_lock()
        self.recent: tuple[tuple[Any, ...], ...] = ()
        self._found = 0

    def run_recent(self, arrays: tuple[Any, ...], options: tuple[Any, ...], stream: Any) -> bool:
        """Run a recent operation if its latest matcher matches; return whether one did.

        `run` does not try that matcher. Where every tenth of a microsecond counts, a caller has
        this loop inline.
        """
        recent = self.recent
        for entry in recent:
            if all(map(operator.is_, options, entry)) and entry[-1].latest(*arrays, stream):
                if entry is not recent[0]:
                    self.found(entry)
                return True
        return False

    def run(self, arrays: tuple[Any, ...], options: tuple[Any, ...], stream: Any) -> None:
        """Run the operation for these arrays and options, creating it if there is none."""
        for *known, operation in self.recent:
            if all(map(operator.is_, options, known)) and operation.run_if_matched(arrays, stream):
                return
        self.find(arrays, options).run(arrays, stream)

    def find(self, arrays: tuple[Any, ...], options: tuple[Any, ...]) -> OperationT:
        """Return the operation for these arrays and options, creating it if there is none."""
        names, optional = self._kind.arguments, self._kind.optional
        tensors = [
            None if array is None and name in optional else adopt(name, array)
            for name, array in zip(names, arrays, strict=False)  # numbers may follow
        ]
        if not all(option is None or type(option) is str for option in options):
            return self.create(*arrays, *options)  # refused if it is not a string at all
        signatures = (
            self._signature(name, tensor) for name, tensor in zip(names, tensors, strict=True)
        )
        key = (options, *signatures)
        operation = self._kept.get(key) or self.create(*arrays, *options)
        with self._lock:
            self._kept.pop(key, None)
            self._kept[key] = operation
            if len(self._kept) > MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._put_first((*options, operation))
        return operation

    def operations(self) -> list[OperationT]:
        """Return all that are kept."""
        with self._lock:
            return list(self._kept.values())

    def found(self, entry: tuple[Any, ...]) -> None:
        """Note that an entry of `recent` was found behind others, and now and then put it first.

        Where all calls are for one entry, few of them find it behind others. Where calls are for
        several in turn, none of them is worth putting first.
        """
        self._found += 1
        if self._found % FOUND_OFTEN == 0:
            with self._lock:
                self._put_first(entry)

    def _put_first(self, entry: tuple[Any, ...]) -> None:
        others = (each for each in self.recent if each[-1] is not entry[-1])
        self.recent = (entry, *others)[:MOST_RECENT]

    def _signature(self, name: str, tensor: Tensor | None) -> Hashable:
        if tensor is None:
            return None
        dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
        if name in self._kind.free and shape:
            strides = (row_step(shape, strides, dtype.itemsize), *strides[1:])
            shape = (-1, *shape[1:])
        return dtype, shape, strides, tensor.device
