# SPDX-License-Identifier: Apache-2.0
"""From a device type to the backend that serves it.

Targets are ``"module:Class"`` strings, imported only when a device of that type is needed. Other
packages add theirs with `register_backend` or through the entry-point group
``pagedcache.backends`` (name = device type, value = target).
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
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
    "rocm": "pagedcache.backend.rocm:RocmBackend",
}


@dataclass(frozen=True, slots=True)
class BackendReport:
    """One row of `backends`.

    Attributes
    ----------
    device_type : str
        The part of a device's name before the colon, such as ``"cpu"`` or ``"cuda"``.
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
    """Register the backend of a device type, without importing it.

    Parameters
    ----------
    device_type : str
        A lower-case name, the part before the colon of devices such as ``"ascend:0"``.
    target : str
        ``"package.module:Class"``, a class that satisfies `pagedcache.backend.protocol.Backend`.

    Raises
    ------
    BadParamError
        `device_type` or `target` is not of this form, or `device_type` already has another target.
        Registering the same target again is allowed, so that modules can be reloaded.
    BadParamTypeError
        The module has been imported already, and the class is not a backend.
    """
    if not isinstance(device_type, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", device_type):
        rule = "must be a lower-case name such as 'ascend'"
        raise BadParamError("device_type", rule, shown(device_type))
    if not isinstance(target, str) or not re.fullmatch(r"[\w.]+:\w+", target):
        raise BadParamError("target", "must be of the form 'package.module:Class'", shown(target))
    for known in sorted(_known().get(device_type, set())):
        if known != target:
            rule = f"is already served by {known} and cannot have a second backend"
            raise BadParamError(f"device type {device_type!r}", rule, target)
    module, _, name = target.partition(":")
    if module in sys.modules and hasattr(sys.modules[module], name):
        _check_backend(target, getattr(sys.modules[module], name))
    _targets[device_type] = target


def backends() -> dict[str, BackendReport]:
    """List every registered backend, and whether and why it is usable here.

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
            reason, usable = f"it fails: {error!r}", False
        reports[device_type] = BackendReport(device_type, target, usable, reason)
    return reports


def backend_of(device_type: str) -> Backend:
    """Return the backend of a device type, importing it when it is first used.

    Raises
    ------
    DeviceTypeNotSupportedError
        No backend is registered for this type.
    PagedCacheError
        The backend cannot be used on this machine; the error says why.
    """
    known = _known()
    if device_type not in known:
        rule = f"must be of a registered type ({', '.join(known)})"
        raise DeviceTypeNotSupportedError("device", rule, shown(device_type))
    target, *others = sorted(known[device_type])
    if others:
        rule = "has several backends, brought by different installed packages"
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
    try:
        kind = import_target(target)
    except ImportError as error:
        rule = f"cannot be imported: {error}"
        raise MissingLibraryError(f"backend {target}", rule) from error
    except Exception as error:  # of another package
        raise InternalError(f"backend {target}", f"cannot be imported: {error!r}") from error
    _check_backend(target, kind)
    try:
        backend: Backend = kind()
    except Exception as error:
        raise InternalError(f"backend {target}", f"cannot be created: {error!r}") from error
    return backend


def _check_backend(target: str, kind: Any) -> None:
    missing = [name for name in ("check", "open") if not callable(getattr(kind, name, None))]
    if missing or not isinstance(kind, type):
        rule = "must be a class with the methods check and open (pagedcache.backend.protocol)"
        got = f"a {type(kind).__name__} without {' and '.join(missing)}" if missing else shown(kind)
        raise BadParamTypeError(f"backend {target}", rule, got)


def import_target(target: str) -> Any:
    """Return what ``"module:name"`` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
