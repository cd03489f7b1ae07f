# SPDX-License-Identifier: Apache-2.0
"""An operator on tensors of fixed dtypes, shapes and strides, checked once and run often.

What is here is the same for any operator. An operator adds a class with its name, a table of rules,
and public methods that name its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from pagedcache.arrays.addresses import ADDRESSES
from pagedcache.arrays.find import adopt, library_of
from pagedcache.arrays.matching import Matcher, make_matcher
from pagedcache.backend.handle import Handle, parse_device
from pagedcache.backend.registry import import_target
from pagedcache.display import Rows, as_html
from pagedcache.environment import switched_on
from pagedcache.operators.arguments import Arguments, as_address, check_overlap, check_writable
from pagedcache.operators.careful import Careful, Inspect
from pagedcache.status import BadParamError, BadParamTypeError, DestroyedError, shown
from pagedcache.tensors import Expected, Tensor, TensorDescriptor

if TYPE_CHECKING:
    from pagedcache.arrays.library import Library
    from pagedcache.backend.protocol import Device, Implementation, Invalid, LaunchConfig
    from pagedcache.rules import Rules

ON_INVALID = ("skip", "raise")
NO_WORKSPACE = 0  # Python has one 0, so whether a size is this one is quickly told

Matchers = dict[type, Matcher]
"""By the type of the first array, a matcher of arrays like those that were checked last."""


def _match_nothing(*_: Any) -> bool:
    return False


class Info(Protocol):
    """What an operator's create function finds out about its tensors."""

    @property
    def rules(self) -> Rules:
        """The table that the tensors were checked against."""


InfoT = TypeVar("InfoT", bound=Info)
Self = TypeVar("Self", bound="Operation[Any]")


class Operation(Generic[InfoT]):
    """An operator on tensors of fixed dtypes, shapes and strides.

    Parameters
    ----------
    info : Info
    expected : tuple of Expected or None
        What the array of each argument must be like; ``None`` for one that is not given.
    device : Device
    on_invalid : {"skip", "raise"}
    debug : bool
    reported : bool
        Whether `check` will be called. If not, no memory is set aside for what it tells.

    Attributes
    ----------
    latest : Matcher
        What a public method tries first: the latest of `matchers`.
    matchers : Matchers
        What `run` tries before it checks everything.
    name : str
        Of the operator.
    arguments : tuple of str
        The names of its tensors, those that may be ``None`` last.
    free : frozenset of str
        Those whose first axis is free.
    optional : frozenset of str
        Those that may be ``None``.
    numbers : tuple of (str, type)
        Names and types of numbers that follow the tensors; they are passed on as they are.
    implementations : mapping of str to str
        From a device type to ``"module:Class"``, an `Implementation`. For other device types, the
        device is asked.
    """

    name: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]
    free: ClassVar[frozenset[str]]
    optional: ClassVar[frozenset[str]] = frozenset()
    numbers: ClassVar[tuple[tuple[str, type], ...]] = ()
    implementations: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        info: InfoT,
        expected: tuple[Expected | None, ...],
        device: Device,
        *,
        on_invalid: str = "skip",
        debug: bool = False,
        reported: bool = True,
    ) -> None:
        self.info = info
        self.device = device.name
        self._device = device
        self._report = device.report(read=reported)
        implementation = self._implement(info, device, self._report)
        if on_invalid == "raise" or debug:
            inspect = self._inspect if debug else None
            refuse = (lambda found: self._invalid(found)) if on_invalid == "raise" else None
            numbers = len(self.numbers)
            implementation = Careful(implementation, device, expected, inspect, refuse, numbers)
        self.workspace_size: int = implementation.workspace_size
        self._implementation: Implementation | None = implementation
        self._run = implementation.run
        self._arguments = Arguments(
            self.arguments, expected, info.rules.counted_by, device.name, self.numbers
        )
        self.matchers: Matchers = {}
        self.latest: Matcher = _match_nothing

    # What an operator adds

    @property
    def _inspect(self) -> Inspect:
        """What `debug` inspects, besides shared memory."""
        return lambda _: None

    def _invalid(self, found: Invalid, where: str = "in this call") -> Exception:
        """Return the error for invalid indices."""
        raise NotImplementedError

    def _rows(self) -> Rows:
        """Return what there is to say about `info`, as the rows of a table."""
        return []

    @classmethod
    def _implement(cls, info: InfoT, device: Device, report: Any) -> Implementation:
        target = cls.implementations.get(device.kind)
        make = import_target(target) if target else device.operator(cls.name)
        made: Implementation = make(info, device, report)
        return made

    # Creation

    @classmethod
    def _create(
        cls: type[Self],
        arrays: tuple[Any, ...],
        make_info: Callable[..., Any],
        *,
        handle: Handle | None,
        on_invalid: str,
        debug: bool | None,
        reported: bool = True,
    ) -> Self:
        tensors: dict[str, Tensor] = {}
        described: dict[str, TensorDescriptor] = {}
        for name, array in zip(cls.arguments, arrays, strict=True):
            if array is None and name in cls.optional:
                continue
            if isinstance(array, TensorDescriptor):
                described[name] = array
            else:
                tensors[name] = adopt(name, array)
                described[name] = tensors[name].describe(name)
        info = make_info(**described)
        expected = info.rules.expected(described)
        for one, array in zip(expected, arrays, strict=True):
            if one is not None and one.written and one.name in tensors:
                check_writable(one.name, array, tensors[one.name])
        if not isinstance(on_invalid, str) or on_invalid not in ON_INVALID:
            rule = f"must be one of {', '.join(ON_INVALID)}"
            raise BadParamError("on_invalid", rule, shown(on_invalid))
        if debug is None:
            debug = switched_on("PAGEDCACHE_DEBUG", default=False)
        if not isinstance(debug, bool):
            raise BadParamTypeError("debug", "must be True, False or None", shown(debug))
        device = _device_of(described, handle)
        made = cls(info, expected, device, on_invalid=on_invalid, debug=debug, reported=reported)
        made._check_created(tensors)
        return made

    def _check_created(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise if arrays that will be written share memory, as far as they are there already."""
        counted_by = self._arguments.counted_by
        rows = next(one.shape[0] for _, one in self._arguments.present if one.name == counted_by)
        for _, one, _, other in self._arguments.apart_pairs:
            if rows and one.name in tensors and other.name in tensors:
                at, other_at = (tensors[each.name].address for each in (one, other))
                one, other = (each if each.loose else each.with_rows(rows) for each in (one, other))
                if 0 not in (*one.shape, *other.shape):
                    check_overlap(one, at, other, other_at)

    # Calls

    def run(
        self, arrays: tuple[Any, ...], stream: Any, workspace: Any = None, workspace_size: int = 0
    ) -> None:
        """Check everything, run, and match arrays like these from now on."""
        self._alive()
        if (
            workspace is None
            and workspace_size is NO_WORKSPACE
            and self.run_if_matched(arrays, stream)
        ):
            return
        found = self._arguments.read(arrays)
        workspace_at = self._arguments.workspace(workspace, workspace_size, self.workspace_size)
        current_stream = self._current_stream(arrays[0])
        handle = current_stream() if stream is None else self._device.stream(stream)
        if not found[0]:
            return
        if (note := self._noting_writes(arrays)) is not None:
            note()
        if self.workspace_size:
            self._run(*found, handle, workspace_at)
            return
        self._match_from_now_on(arrays, current_stream)
        self._run(*found, handle)

    def run_if_matched(self, arrays: tuple[Any, ...], stream: Any) -> bool:
        """Run if a matcher other than the latest matches the arrays; return whether one did."""
        matcher = self.matchers.get(type(arrays[0]))
        if matcher is None or matcher is self.latest or not matcher(*arrays, stream):
            return False
        self.latest = matcher
        self._forget_if_destroyed()
        return True

    def _match_from_now_on(
        self, arrays: tuple[Any, ...], current_stream: Callable[[], int]
    ) -> None:
        """Make a matcher of arrays like these."""
        implementation = self._alive()
        matcher = make_matcher(
            self._arguments,
            arrays,
            self._run,
            current_stream,
            self._device.stream,
            check_alignment=not implementation.checks_alignment,
        )
        if matcher is not None:
            self.matchers[type(arrays[0])] = self.latest = matcher
            self._forget_if_destroyed()

    def _forget_if_destroyed(self) -> None:
        """Match nothing if another thread has destroyed this meanwhile."""
        if self._implementation is None:
            self.matchers, self.latest = {}, _match_nothing

    def _run_at(
        self, addresses: tuple[Any, ...], workspace: Any, workspace_size: Any, stream: Any
    ) -> None:
        """Check the arguments of a call in C, all of them addresses, and run.

        Those that are optional can be left out.
        """
        *given, workspace_at, handle = (
            as_address(name, address)
            for name, address in zip(
                (*self.arguments[: len(addresses)], "workspace", "stream"),
                (*addresses, workspace, stream),
                strict=True,
            )
        )
        missing = (None,) * (len(self.arguments) - len(addresses))
        self.run((*given, *missing), handle, workspace_at, workspace_size)

    def _bind(self, arrays: tuple[Any, ...], stream: Any) -> Callable[[], None]:
        """Return a function that runs on the same arrays each time."""
        implementation = self._alive()
        if self.workspace_size:
            rule = "must not need a workspace; call calculate() with one instead"
            raise BadParamError("the implementation", rule, f"{self.workspace_size} bytes")
        rows, *addresses = self._arguments.read(arrays)
        current_stream = self._current_stream(arrays[0])
        if stream is not None:
            handle = self._device.stream(stream)
            current_stream = lambda: handle  # noqa: E731
        queue: Callable[[int], None] = lambda _: None  # noqa: E731
        if rows:
            queue = implementation.prepared(rows, *addresses)
        note = self._noting_writes(arrays)

        def run() -> None:
            """Queue the same call again."""
            if self._implementation is None:
                self._alive()
            if note is not None:
                note()
            queue(current_stream())

        run.arrays = arrays  # type: ignore[attr-defined] # kept alive
        return run

    def _current_stream(self, array: Any) -> Callable[[], int]:
        name = self.arguments[0]
        library: Library = ADDRESSES if type(array) is int else library_of(name, array)
        index = parse_device("device", self.device)[1] or 0
        return library.current_stream(name, array, index) or self._device.current_stream

    def _noting_writes(self, arrays: tuple[Any, ...]) -> Callable[[], None] | None:
        """Return what libraries want to be called before each write into these arrays, if any."""
        groups: dict[Library, list[tuple[str, Any]]] = {}
        for one, array in zip(self._arguments.expected, arrays, strict=False):
            if one is not None and one.written and type(array) is not int:
                groups.setdefault(library_of(one.name, array), []).append((one.name, array))
        notes = [
            note
            for library, pairs in groups.items()
            if (note := library.noting_writes(*zip(*pairs, strict=True))) is not None
        ]
        if len(notes) < 2:
            return notes[0] if notes else None

        def note_all() -> None:
            for note in notes:
                note()

        return note_all

    # The public life of an operation

    def _launch_config(self, name: str, rows: int) -> LaunchConfig:
        """Return the launch for so many rows, which the public method calls `name`."""
        if not isinstance(rows, (int, np.integer)) or rows < 0:
            raise BadParamError(name, "must be a non-negative int", shown(rows))
        return self._alive().launch_config(int(rows))

    def check(self) -> None:
        """Raise if the calls since the last check met an invalid index.

        Raises
        ------
        PagedCacheError
            The operator's error for invalid indices, or what `Report.take` raises.
        DestroyedError
            After `destroy`.
        """
        self._alive()
        if found := self._report.take():
            raise self._invalid(found, "since the last check")

    def destroy(self) -> None:
        """Release the kernel and the device.

        Destroying twice is allowed; any other use after that raises `DestroyedError`.
        """
        self._implementation = None
        self._run = _run_destroyed
        self._forget_if_destroyed()

    def __enter__(self: Self) -> Self:
        self._alive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    def _repr_html_(self) -> str:
        state = [] if self._implementation is not None else [("state", "destroyed")]
        return as_html([*self._rows(), *state])

    def _alive(self) -> Implementation:
        if self._implementation is None:
            _run_destroyed()
        assert self._implementation is not None
        return self._implementation


def _run_destroyed(*_: int) -> None:
    raise DestroyedError("descriptor", "has been destroyed and cannot be used any more")


def _device_of(described: Mapping[str, TensorDescriptor], handle: Handle | None) -> Device:
    """Return the one device of all tensors, which must be that of the handle if there is one."""
    if handle is not None and not isinstance(handle, Handle):
        raise BadParamTypeError("handle", "must be a pagedcache.Handle", shown(handle))
    place: str | None = None
    origin = ""
    for name, tensor in described.items():
        if tensor.device is None:
            continue
        _, index = parse_device(f"the device of {name}", tensor.device)
        if place is not None and not _same_device(place, tensor.device):
            raise BadParamError(name, f"must be on {place} like {origin}", tensor.device)
        if place is None or index is not None:
            place, origin = tensor.device, name
    if handle is None:
        handle = Handle(place)
    elif place is not None and not _same_device(place, handle.device):
        raise BadParamError("handle", f"must be for the device of the arrays, {place}",
                            handle.device)  # fmt: skip
    return handle.opened()


def _same_device(one: str, other: str) -> bool:
    """Return whether two names may be of one device; a name without an index is of any."""
    (kind, index), (other_kind, other_index) = (
        parse_device("device", one),
        parse_device("device", other),
    )
    return kind == other_kind and (None in (index, other_index) or index == other_index)
