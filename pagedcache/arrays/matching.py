# SPDX-License-Identifier: Apache-2.0
"""Matchers: calls for arrays like those that were checked, with any number of rows.

Checking five arrays in full takes tens of microseconds, and a write takes six. So the first arrays
of each library are checked in full, and later ones are compared with them by a matcher: a function
that is generated for these arrays, as `dataclasses` generates an ``__init__``. Its source names
each attribute that is compared, without a loop or a call that it could do without. For a write of
five CuPy arrays, it begins::

    if not (k_cache._c_contiguous and k_cache.dtype == _k_cache_dtype and ...
            and (_count := len(slot_mapping)) > 0 and len(k) >= _count and len(v) >= _count):
        return False
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from pagedcache.arrays.addresses import ADDRESSES
from pagedcache.arrays.find import libraries
from pagedcache.tensors import Expected, span

if TYPE_CHECKING:
    from pagedcache.arrays.library import Library

Matcher = Callable[..., bool]
"""Takes arrays and a stream. Makes the call if the arrays match, and returns whether they did."""

Apart = dict[tuple[int, int], dict[int, int]]
"""For pairs of arrays, distances in bytes, and up to how many rows they share no memory there.

Whether they do depends on nothing else.
"""


class Arguments(Protocol):
    """What a matcher needs to know about the arguments of a call."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all arguments."""

    @property
    def expected(self) -> tuple[Expected | None, ...]:
        """What each array must be like; ``None`` if it must be ``None``."""

    @property
    def counted_by(self) -> str:
        """The array whose first axis has the number of rows. Free axes of others may be longer."""

    @property
    def numbers(self) -> tuple[tuple[str, type], ...]:
        """Names and types of numbers that follow the arrays."""

    @property
    def present(self) -> list[tuple[int, Expected]]:
        """Those that are not ``None``, with their places among the arguments."""

    @property
    def apart_pairs(self) -> list[tuple[int, Expected, int, Expected]]:
        """Pairs of arrays that must share no memory."""

    @property
    def apart(self) -> Apart:
        """Distances shorter than an array at which they are known to share none."""


def make_matcher(
    arguments: Arguments,
    arrays: Sequence[Any],
    run: Callable[..., None],
    current_stream: Callable[[], int],
    handle_of: Callable[[Any], int],
    *,
    check_alignment: bool,
) -> Matcher | None:
    """Return a function that makes a call if its arrays match the given ones.

    Parameters
    ----------
    arguments : Arguments
    arrays : sequence of array, int or None
        Arrays that are as they must be.
    run : callable
        Takes the number of rows, the addresses, the numbers, and the handle of a stream.
    current_stream : callable
        Returns the handle for a stream of ``None``.
    handle_of : callable
        Returns the handle of a stream that is neither ``None`` nor an int.
    check_alignment : bool
        Whether an address matches only if it is a multiple of the item size.

    Returns
    -------
    callable or None
        ``None`` if an array is of a library that has no matchers.
    """
    expected = arguments.expected
    groups: dict[int, tuple[Library, list[Expected], list[Any]]] = {}
    for index, one in arguments.present:
        array = arrays[index]
        library = ADDRESSES if type(array) is int else libraries.get(type(array))
        if library is None or not library.has_matchers:
            return None
        _, mine, theirs = groups.setdefault(id(library), (library, [], []))
        mine.append(one)
        theirs.append(array)
    constants: dict[str, Any] = {
        "_run": run,
        "_current_stream": current_stream,
        "_handle_of": handle_of,
    }
    names, counted_by = arguments.names, arguments.counted_by
    missing = [name for name, one in zip(names, expected, strict=True) if one is None]
    conditions, statements = [f"{name} is None" for name in missing], []
    address, count = {}, ""
    for library, mine, theirs in groups.values():
        conditions += library.conditions(mine, theirs, counted_by, constants)
        statements += library.statements(mine, theirs, constants)
        for one in mine:
            address[one.name] = library.address(one.name)
            if one.name == counted_by:
                count = library.rows(one, constants)
    for name, kind in arguments.numbers:
        conditions.append(f"type({name}) is {kind.__name__}")
        if kind is int:
            conditions.append(f"-0x8000000000000000 <= {name} <= 0x7fffffffffffffff")
    # Arrays of another library are refused sooner than they are counted.
    conditions.sort(key=lambda condition: "_count" in condition)
    uncounted = sum("_count" not in condition for condition in conditions)
    conditions.insert(uncounted, f"(_count := {count}) > 0")
    lines = [f"if not ({' and '.join(conditions)}):", "    return False"]
    lines += [f"_at_{name} = {expression}" for name, expression in address.items()]
    present = [one for _, one in arguments.present]
    lines += _address_checks(present, check_alignment=check_alignment)
    for i, one, j, other in arguments.apart_pairs:
        known = arguments.apart.setdefault((i, j), {})
        lines += _overlap_check(one, other, known, constants)
    addresses = tuple(f"_at_{name}" if name in address else "0" for name in names)
    numbers = tuple(name for name, _ in arguments.numbers)
    names, addresses = (*names, *numbers), (*addresses, *numbers)
    factory = _factory(names, addresses, tuple(constants), (*lines, *statements))
    made: Matcher = factory(**constants)
    return made


def _address_checks(expected: Sequence[Expected], *, check_alignment: bool) -> list[str]:
    """Return lines that refuse addresses of 0, and those that are misaligned."""
    conditions = [f"_at_{one.name}" for one in expected]
    sizes = {one.dtype.itemsize for one in expected} - {1} if check_alignment else set()
    for size in sizes:
        same = " | ".join(f"_at_{one.name}" for one in expected if one.dtype.itemsize == size)
        conditions.append(f"not ({same}) & {size - 1}")
    return [f"if not ({' and '.join(conditions)}):", "    return False"]


def _overlap_check(
    one: Expected, other: Expected, apart: dict[int, int], constants: dict[str, Any]
) -> list[str]:
    """Return lines that refuse two arrays that may share memory."""
    sizes = []
    for each in (one, other):
        if each.loose:
            constants[f"_step_of_{each.name}"] = each.strides[0]
            shape = (1, *each.shape[1:])
            size = f"_size_of_{each.name} + (len({each.name}) - 1) * _step_of_{each.name}"
        elif each.free:
            constants[f"_step_of_{each.name}"] = each.strides[0]
            shape = (1, *each.shape[1:])
            size = f"_size_of_{each.name} + (_count - 1) * _step_of_{each.name}"
        else:
            shape = each.shape
            size = f"_size_of_{each.name}"
        constants[f"_size_of_{each.name}"] = span(shape, each.strides, each.dtype.itemsize)
        sizes.append(f"({size})")
    lines = [f"_distance = _at_{other.name} - _at_{one.name}"]
    constants[f"_apart_{one.name}_{other.name}"] = apart
    condition = f"-{sizes[1]} < _distance < {sizes[0]}"
    if not (one.loose or other.loose):  # how many rows are apart depends on both lengths
        condition += f" and _count > _apart_{one.name}_{other.name}.get(_distance, 0)"
    return [*lines, f"if {condition}:", "    return False"]


@functools.lru_cache
def _factory(
    names: tuple[str, ...],
    addresses: tuple[str, ...],
    constants: tuple[str, ...],
    lines: tuple[str, ...],
) -> Callable[..., Matcher]:
    """Return a function from the constants to the matcher with these lines."""
    checks = "\n".join(f"            {line}" for line in lines)
    source = f"""
def make({", ".join(constants)}):
    def match({", ".join(names)}, _stream):
        try:
{checks}
        except Exception:  # of arrays of another library, which may fail in any way
            return False
        if _stream is None:
            _stream = _current_stream()
        elif type(_stream) is not int:
            _stream = _handle_of(_stream)
        _run(_count, {", ".join(addresses)}, _stream)
        return True
    return match
"""
    scope: dict[str, Any] = {}
    exec(compile(source, f"<matcher of {', '.join(names)}>", "exec"), scope)
    made: Callable[..., Matcher] = scope["make"]
    return made
