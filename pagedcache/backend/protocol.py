"""What a backend is: the shape that `pagedcache.backend.registry` loads and handles hold.

A backend serves one type of device. It opens devices, and a device makes the implementation of an
operator from that operator's info. An implementation is opaque to the interface layer: it gets
addresses and counts, and keeps whatever its hardware needs to itself. What the interface asks of an
implementation stands last here, a protocol for each operator.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pagedcache.status import NotSupportedError

if TYPE_CHECKING:
    from pagedcache.info import InvalidSlots
    from pagedcache.tensors import Array


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Geometry of one launch, as CUDA counts it.

    Attributes
    ----------
    grid, block : tuple of int
        Blocks in the grid and threads in a block, ``(x, y, z)``.
    shared_mem : int
        Dynamic shared memory of a block, in bytes.
    """

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_mem: int = 0


class Device(Protocol):
    """An opened device of a backend."""

    name: str  # canonical, as arrays on it are named: "cpu", "cuda:0"

    def describe(self) -> str:
        """Return one line that tells a person what this device is."""

    def limits_table(self) -> list[tuple[str, str]]:
        """Return what the device says of itself, as rows of a table."""

    def stream(self, stream: Any) -> int:
        """Return the handle of a stream; ``None`` is the array library's current one.

        Raises
        ------
        BadParamError
            It is no stream, or one of another device.
        """

    def capturing(self, stream: int) -> bool:
        """Tell whether what is queued on a stream is captured into a graph instead of run."""

    def read(self, address: int, size: int, stream: int) -> Array:
        """Return a copy of `size` bytes of the device, once all that is queued on `stream` is done.

        Raises
        ------
        LaunchError
            Something that was queued before failed.
        """

    def operator(self, name: str, info: Any) -> Any:
        """Return the implementation of operator `name` for `info`.

        Raises
        ------
        NotSupportedError
            The backend does not have this operator.
        """


class Backend(Protocol):
    """Serves one type of device. Constructed without arguments, once, when first needed."""

    def check(self) -> None:
        """Raise the `PagedCacheError` that tells why nothing here can be used, if so."""

    def open(self, index: int | None) -> Device:
        """Return device `index`; ``None`` is the one that the array library would use now."""


# Takes the addresses of K cache, V cache, K, V, slot mapping and workspace, and a stream.
Writer = Callable[[int, int, int, int, int, int, Any], None]


class PagedCaching(Protocol):
    """An implementation of ``"paged_caching"``, made from a `pagedcache.info.PagedCachingInfo`.

    Any number of threads may use one at once.
    """

    workspace_size: int  # bytes of scratch memory that a call needs

    def launch_config(self, num_tokens: int) -> LaunchConfig:
        """Return the launch that a write of `num_tokens` tokens makes."""

    def writer(self, num_tokens: int) -> Writer:
        """Return a function that queues a write of `num_tokens` tokens, one or more.

        Addresses are those of tensors as the info describes them, aligned to their item size.
        Negative slots are skipped; those at or past the end are skipped and counted.
        """

    def invalid_slots(self, stream: int | None) -> InvalidSlots | None:
        """Wait for a stream, or with ``None`` for the device; tell and forget what was counted."""


def load_operator(package: str, operators: Mapping[str, str], name: str) -> Any:
    """Import the class that implements an operator.

    Parameters
    ----------
    package : str
        Of the backend.
    operators : mapping
        From the operator's name to ``"module:Class"`` inside that package.
    name : str

    Raises
    ------
    NotSupportedError
        The backend does not have this operator.
    """
    if name not in operators:
        raise NotSupportedError(f"operator {name!r}", f"is not in the backend {package}")
    module, _, attribute = operators[name].partition(":")
    return getattr(importlib.import_module(f".{module}", package), attribute)
