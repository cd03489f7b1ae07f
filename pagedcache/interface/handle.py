"""A handle: the device that descriptors are made for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pagedcache.backend.registry import backend_of
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    DestroyedError,
    PagedCacheError,
    shown,
)

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Device


class Handle:
    """A device, opened and asked for its limits.

    Parameters
    ----------
    device : str, optional
        ``"cpu"``, ``"cuda"`` (CuPy's current device) or ``"cuda:1"``, or a type that another
        package's backend serves. Not given: CUDA if it is usable here, else the CPU.

    Attributes
    ----------
    device : str
        The canonical name: ``"cpu"``, ``"cuda:0"``.

    Raises
    ------
    DeviceTypeNotSupportedError
        No backend serves this type of device.
    DeviceNotFoundError
        There is no device with this index.
    DeviceNotInitializedError
        The backend cannot work here: no CuPy, no driver, no NVRTC. The message says what to do.
    DeviceArchitectureNotSupportedError
        The device is below what the kernels need.

    Notes
    -----
    Handles are immutable but for `destroy` and may be shared by threads. Opening a CUDA device
    creates its primary context; do not ``fork`` after that.
    """

    def __init__(self, device: str | None = None) -> None:
        kind, index = parse_device("device", default_device_type() if device is None else device)
        self._device: Device | None = backend_of(kind).open(index)
        self.device = self._device.name

    def destroy(self) -> None:
        """Let go of the device. Descriptors that were made with this handle keep working."""
        self._device = None

    def opened(self) -> Device:
        """Return the backend's device.

        Raises
        ------
        DestroyedError
            After `destroy`.
        """
        if self._device is None:
            raise DestroyedError("handle", "must not be used after destroy")
        return self._device

    def __repr__(self) -> str:
        state = self._device.describe() if self._device is not None else "destroyed"
        return f"Handle({self.device!r}: {state})"


def default_device_type() -> str:
    """Return ``"cuda"`` if that backend is usable here, else ``"cpu"``."""
    try:
        backend_of("cuda").open(None)
    except PagedCacheError:
        return "cpu"
    return "cuda"


def parse_device(subject: str, device: object) -> tuple[str, int | None]:
    """Split ``"cuda:1"`` into its type and index.

    Raises
    ------
    BadParamTypeError, BadParamError
        Not a string, or not of that form.
    """
    if not isinstance(device, str):
        raise BadParamTypeError(subject, "must be a str such as 'cpu' or 'cuda:0'", shown(device))
    match = re.fullmatch(r"([a-z][a-z0-9_]*)(?::(\d{1,9}))?", device)
    if match is None:
        raise BadParamError(subject, "must read like 'cpu' or 'cuda:0'", shown(device))
    return match[1], None if match[2] is None else int(match[2])
