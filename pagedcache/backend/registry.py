"""From a device type to the backend that serves it.

Targets are ``"module:Class"`` strings, imported only when a device of that type is asked for.
Other packages add theirs with `register_backend` or through the entry-point group
``pagedcache.backends`` (name = device type, value = target).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedcache.status import (
    BadParamError,
    DeviceTypeNotSupportedError,
    InternalError,
    MissingLibraryError,
    PagedCacheError,
    shown,
)

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Backend

ENTRY_POINT_GROUP = "pagedcache.backends"

_targets = {
    "cpu": "pagedcache.backend.cpu:CpuBackend",
    "cuda": "pagedcache.backend.nvidia:NvidiaBackend",
}


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One row of `backends`.

    Attributes
    ----------
    device_type : str
        The part of a device's name before the colon: ``"cpu"``, ``"cuda"``.
    target : str
        ``"module:Class"``.
    usable : bool
        Whether a device of this type can be opened here and now.
    reason : str
        The device that would be opened, or why none can be.
    """

    device_type: str
    target: str
    usable: bool
    reason: str


def register_backend(device_type: str, target: str) -> None:
    """Name the backend of a type of device; nothing is imported yet.

    Parameters
    ----------
    device_type : str
        Lower-case name, the part of a device before the colon: ``"ascend"`` in ``"ascend:0"``.
    target : str
        ``"package.module:Class"``; the class satisfies `pagedcache.backend.protocol.Backend`.

    Raises
    ------
    BadParamError
        A name or target that is not of that form, or a second, different target for one type.
        The same pair twice is no error, so modules may be reloaded.
    """
    if not isinstance(device_type, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", device_type):
        rule = "must be a lower-case name such as 'ascend'"
        raise BadParamError("device_type", rule, shown(device_type))
    if not isinstance(target, str) or not re.fullmatch(r"[\w.]+:\w+", target):
        raise BadParamError("target", "must be 'package.module:Class'", shown(target))
    for known in sorted(_known().get(device_type, set())):
        if known != target:
            rule = f"has backend {known} already; it cannot also be served by another"
            raise BadParamError(f"device type {device_type!r}", rule, target)
    _targets[device_type] = target


def backends() -> dict[str, BackendReport]:
    """List every known backend, and whether and why it is usable here.

    Returns
    -------
    dict of str to BackendReport
        By device type.
    """
    reports = {}
    for device_type, targets in _known().items():
        target = " and ".join(sorted(targets))
        try:
            reason, usable = backend_of(device_type).open(None).describe(), True
        except PagedCacheError as error:
            reason, usable = str(error), False
        except Exception as error:
            reason, usable = f"fails: {error!r}", False
        reports[device_type] = BackendReport(device_type, target, usable, reason)
    return reports


def backend_of(device_type: str) -> Backend:
    """Return the backend of a device type, importing it if this is its first use.

    Raises
    ------
    DeviceTypeNotSupportedError
        No backend is registered for this type.
    PagedCacheError
        The backend cannot be used on this machine; the error says why.
    """
    known = _known()
    if device_type not in known:
        rule = f"must be of a type that a backend serves ({', '.join(known)})"
        raise DeviceTypeNotSupportedError("device", rule, shown(device_type))
    target, *others = sorted(known[device_type])
    if others:
        rule = "must have one backend, but installed packages bring different ones"
        raise BadParamError(f"device type {device_type!r}", rule, " and ".join([target, *others]))
    backend = _load(target)
    backend.check()
    return backend


def _known() -> dict[str, set[str]]:
    known = {name: {target} for name, target in _targets.items()}
    for name, target in _entry_points():
        known.setdefault(name, set()).add(target)
    return known


@functools.cache
def _entry_points() -> tuple[tuple[str, str], ...]:
    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return tuple((point.name, point.value) for point in points)


@functools.cache
def _load(target: str) -> Backend:
    module, _, name = target.partition(":")
    try:
        backend: Backend = getattr(importlib.import_module(module), name)()
    except ImportError as error:
        rule = f"cannot be imported: {error}"
        raise MissingLibraryError(f"backend {target}", rule) from error
    except Exception as error:  # another package's
        raise InternalError(f"backend {target}", f"cannot be made: {error!r}") from error
    return backend
