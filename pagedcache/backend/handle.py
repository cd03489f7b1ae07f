# SPDX-License-Identifier: Apache-2.0
"""A handle: the device that operations are created for."""

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
    """An open device.

    Parameters
    ----------
    device : str, optional
        ``"cpu"``, ``"cuda"`` (CuPy's current device), ``"cuda:1"``, ``"rocm"``, or a device of a
        type that another package has registered. By default, CUDA if it is usable here, else the
        CPU.

    Attributes
    ----------
    device : str
        The full name, such as ``"cpu"`` or ``"cuda:0"``.

    Raises
    ------
    DeviceTypeNotSupportedError
        No backend serves this type of device.
    DeviceNotFoundError
        There is no device with this index.
    DeviceNotInitializedError
        The backend cannot be used here: CuPy, the driver or NVRTC is missing. The message says what
        to do.
    DeviceArchitectureNotSupportedError
        The device is older or smaller than the kernels require.

    Notes
    -----
    A handle may be shared by threads; only `destroy` changes it. Opening a CUDA device creates its
    primary context, after which the process must not ``fork``.
    """

    def __init__(self, device: str | None = None) -> None:
        kind, index = parse_device("device", default_device_type() if device is None else device)
        self._device: Device | None = backend_of(kind).open(index)
        self.device = self._device.name

    def destroy(self) -> None:
        """Release the device. Descriptors that were created with this handle keep working."""
        self._device = None

    def opened(self) -> Device:
        """Return the backend's device.

        Raises
        ------
        DestroyedError
            After `destroy`.
        """
        if self._device is None:
            raise DestroyedError("handle", "has been destroyed and cannot be used any more")
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
        `device` is not a string, or not of this form.
    """
    if not isinstance(device, str):
        rule = "must be a string such as 'cpu' or 'cuda:0'"
        raise BadParamTypeError(subject, rule, shown(device))
    match = re.fullmatch(r"([a-z][a-z0-9_]*)(?::(\d{1,9}))?", device)
    if match is None:
        raise BadParamError(subject, "must be of the form 'cpu' or 'cuda:0'", shown(device))
    return match[1], None if match[2] is None else int(match[2])
