# SPDX-License-Identifier: Apache-2.0
"""The operation of a kernel for parameters of some kinds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pagedcache.cache.sides import refuse_bad_scales
from pagedcache.operators.one_call import Kept
from pagedcache.operators.paged_caching.inspect import inspect
from pagedcache.operators.paged_gather.info import FREE as READ_FREE
from pagedcache.operators.paged_gather.info import OPTIONAL as READ_OPTIONAL
from pagedcache.operators.programs.info import (
    INVALID_OF,
    WRITE_FREE,
    WRITE_OPTIONAL,
    Program,
    ProgramInfo,
)
from pagedcache.operators.slot_operation import SlotOperation
from pagedcache.status import InvalidIndexError

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Invalid
    from pagedcache.operators.careful import Inspect

_LETTER_OF = {value: letter for letter, value in INVALID_OF.items()}


class ProgramOperation(SlotOperation[ProgramInfo]):
    """A write or read with steps, checked once and run any number of times."""

    implementations: ClassVar[dict[str, str]] = {
        "cpu": "pagedcache.operators.programs.cpu:ProgramOnCpu",
        "cuda": "pagedcache.operators.programs.nvidia:ProgramKernel",
        "rocm": "pagedcache.operators.programs.nvidia:ProgramKernel",
    }

    @property
    def _inspect(self) -> Inspect:
        if self.info.reads:
            return functools.partial(refuse_bad_scales, self.info.sides)
        return functools.partial(inspect, self.info)

    def _invalid(self, found: Invalid, where: str = "in this call") -> Any:
        letter = _LETTER_OF.get(found.value)
        if letter is None:
            return super()._invalid(found, where)
        return InvalidIndexError(letter, found.row, found.count, where)


class Variant:
    """The operations of a kernel for parameters of which some are arrays and some are numbers.

    Parameters
    ----------
    program : Program
    numbers : tuple of (str, type)
        The parameters that are numbers, and what they are.
    on_invalid : {"skip", "raise"}
    debug : bool or None

    Attributes
    ----------
    values : callable
        From the parameters by name, to a tuple of arrays, followed by numbers.
    kept : Kept
    """

    def __init__(
        self,
        program: Program,
        numbers: tuple[tuple[str, type], ...],
        on_invalid: str,
        debug: bool | None,
    ) -> None:
        names = tuple(name for name, _ in numbers)
        arrays = tuple(name for name in program.parameters if name not in names)
        self.values = _picker((*arrays, *names))
        free = READ_FREE if program.reads else WRITE_FREE
        optional = READ_OPTIONAL if program.reads else WRITE_OPTIONAL
        self._kind: type[ProgramOperation] = type(
            "ReadProgram" if program.reads else "WriteProgram",
            (ProgramOperation,),
            {
                "__doc__": ProgramOperation.__doc__,
                "name": "read_kernel" if program.reads else "write_kernel",
                "arguments": (*program.names, *arrays),
                "free": frozenset((*free, *(set(arrays) & program.by_token))),
                "optional": frozenset(optional),
                "numbers": numbers,
            },
        )
        self._make_info = functools.partial(ProgramInfo.create, program, numbers)
        self._options: dict[str, Any] = {"on_invalid": on_invalid, "debug": debug}
        self.kept: Kept[ProgramOperation] = Kept(self._kind, self.create)

    def create(self, *arrays: Any) -> ProgramOperation:
        """Return an operation for these arrays; numbers may follow."""
        arrays = arrays[: len(self._kind.arguments)]
        return self._kind._create(arrays, self._make_info, handle=None, **self._options)


def _picker(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Return a function from a dict to the values of these names."""
    picked = ", ".join(f"d[{name!r}]" for name in names)
    # Generated, since a call takes microseconds, and a loop would be a tenth of it.
    picker: Callable[[dict[str, Any]], tuple[Any, ...]] = eval(
        f"lambda d: ({picked}{',' if names else ''})"
    )
    return picker
