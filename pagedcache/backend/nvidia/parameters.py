# SPDX-License-Identifier: Apache-2.0
"""A kernel's parameters: a C struct that is declared once, in the CUDA source.

From that declaration come the ctypes structure that the host fills in, and the function that packs
what changes from call to call.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Callable
from typing import Any

from pagedcache.status import InternalError

MOST = 2**31
"""Dividends of `divisor` are below this."""

_TYPES: dict[str, Any] = {
    "long long": ctypes.c_longlong,
    "unsigned long long": ctypes.c_ulonglong,
    "int": ctypes.c_int,
    "unsigned int": ctypes.c_uint,
    "unsigned short": ctypes.c_ushort,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}
_FORMATS = {
    ctypes.c_void_p: "Q",
    ctypes.c_longlong: "q",
    ctypes.c_ulonglong: "Q",
    ctypes.c_int: "i",
    ctypes.c_uint: "I",
    ctypes.c_ushort: "H",
    ctypes.c_float: "f",
    ctypes.c_double: "d",
}
_FIELD = re.compile(r"(?:const )?([\w: ]+?)\s*(\*(?: const)?)?\s*(\w+)(?:\[(\d+)\])?")


@functools.cache
def structure(source: str, name: str) -> type[ctypes.Structure]:
    """Return the ctypes structure of a struct in CUDA source.

    Its members must be numbers, pointers, arrays of char, or structs of such, one to a declaration.

    Raises
    ------
    InternalError
        The source does not declare it, or has a member of another kind.
    """
    # Up to the first member function or the end: those have parentheses.
    declared = re.search(rf"^struct {name} {{\n(.*?)^}};", source, re.MULTILINE | re.DOTALL)
    if declared is None:
        raise InternalError(f"struct {name}", "is not declared in the CUDA source")
    body = re.sub(r"//[^\n]*", "", declared[1])
    fields: list[tuple[str, Any]] = []
    for declaration in body.split(";"):
        if "(" in declaration or not declaration.strip():
            break
        match = _FIELD.fullmatch(" ".join(declaration.split()))
        if match is None or (match[4] and match[1] != "char"):
            raise InternalError(f"struct {name}", "has a member of a kind that is not supported",
                                declaration.strip())  # fmt: skip
        kind, pointer, member, length = match.groups()
        if length:
            fields.append((member, ctypes.c_char * int(length)))
        elif pointer:
            fields.append((member, ctypes.c_void_p))
        else:
            fields.append((member, _TYPES.get(kind) or structure(source, kind.split("::")[-1])))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@functools.cache
def packer(kind: type[ctypes.Structure]) -> Callable[..., None]:
    """Return a function that writes what changes from call to call into a kernel's parameters.

    That is the first member of `kind`, a struct of numbers, pointers and arrays of char. The
    function takes a buffer, the offset of the parameters in it, and all members of that struct in
    their order, an array as bytes. It takes about 0.3 us, where assigning them to a ctypes
    structure takes several times as long.
    """
    first: Any = kind._fields_[0]
    call = first[1]
    fields: Any = call._fields_
    packed = struct.Struct("@" + "".join(_format(each) for _, each in fields))
    if packed.size != ctypes.sizeof(call):
        raise InternalError(f"struct {call.__name__}", "has padding that cannot be packed")
    return packed.pack_into


def _format(kind: Any) -> str:
    if issubclass(kind, ctypes.Array):
        return f"{kind._length_}s"
    return _FORMATS[kind]


def divisor(kind: type[ctypes.Structure], value: int) -> ctypes.Structure:
    """Return ``struct Divisor`` of the CUDA source, which divides numbers below `MOST` exactly."""
    shift = 31 + (value - 1).bit_length()
    return kind(multiplier=(1 << shift) // value + 1, shift=shift)
