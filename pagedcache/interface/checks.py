"""What a descriptor checks of the data itself, for callers who would rather wait than not know."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.dtypes import BF16, F16, F32, Dtype
from pagedcache.info import NAMES, InvalidSlots, PagedCachingInfo
from pagedcache.status import (
    CacheOverlapError,
    DuplicateSlotError,
    InvalidSlotError,
    NonFiniteError,
    NotSupportedError,
    SourceOverlapError,
)
from pagedcache.tensors import Array, TensorDescriptor, overlap, view

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Device, PagedCaching, Writer

_EXPONENTS = {F16: 0x7C00, BF16: 0x7F80, F32: 0x7F800000}  # all ones: infinity or NaN


def refuse_overlap(info: PagedCachingInfo, k_cache: int, v_cache: int) -> None:
    """Raise if the caches at two addresses share memory.

    Raises
    ------
    CacheOverlapError
    """
    one = _at(info.tensor("k_cache"), k_cache)
    other = _at(info.tensor("v_cache"), v_cache)
    if overlap(one, other):
        rule = "must not share memory with k_cache"
        raise CacheOverlapError("v_cache", rule, f"{_span(other)} and {_span(one)}")


def invalid(found: InvalidSlots, info: PagedCachingInfo) -> InvalidSlotError:
    """Return the error that tells of invalid slots."""
    return InvalidSlotError(found.token, found.slot, found.count, info.num_slots)


class Checked:
    """An implementation that looks at the data of each call, and therefore waits.

    Parameters
    ----------
    make : callable
        Returns a backend's implementation.
    device : Device
    info : PagedCachingInfo
    raising : bool
        Whether to wait for each write and raise for its invalid slots.
    debug : bool
        Whether to look for duplicate slots, values that are not finite, and shared memory.
    """

    def __init__(
        self,
        make: Callable[[], PagedCaching],
        device: Device,
        info: PagedCachingInfo,
        *,
        raising: bool,
        debug: bool,
    ) -> None:
        self._make, self._device, self._info = make, device, info
        self._raising, self._debug = raising, debug
        self._shared = make()
        self.workspace_size: int = self._shared.workspace_size
        self.launch_config = self._shared.launch_config
        self.invalid_slots = self._shared.invalid_slots
        # Taken by one call at a time, so that it is told of its own slots only.
        self._idle: list[PagedCaching] = []

    def writer(self, num_tokens: int) -> Writer:
        """Return a function that looks, writes, and looks again, each as far as was asked for."""
        return functools.partial(self._write, num_tokens)

    def _write(
        self,
        num_tokens: int,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slot_mapping: int,
        workspace: int,
        stream: Any,
    ) -> None:
        handle = self._device.stream(stream)
        if self._device.capturing(handle):
            option = "debug" if self._debug else "on_invalid='raise'"
            rule = "waits for the stream, which cannot be done while it is captured; use check()"
            raise NotSupportedError(option, rule)
        addresses = (k_cache, v_cache, k, v, slot_mapping)
        if self._debug:
            self._look(num_tokens, addresses, handle)
        if not self._raising:
            self._shared.writer(num_tokens)(*addresses, workspace, handle)
            return
        try:
            implementation = self._idle.pop()
        except IndexError:
            implementation = self._make()
        implementation.writer(num_tokens)(*addresses, workspace, handle)
        found = implementation.invalid_slots(handle)
        self._idle.append(implementation)
        if found:
            raise invalid(found, self._info)

    def _look(self, num_tokens: int, addresses: tuple[int, ...], handle: int) -> None:
        info = dataclasses.replace(self._info, num_tokens=num_tokens)
        places = zip(NAMES, addresses, strict=True)
        views = {name: _at(info.tensor(name), address) for name, address in places}
        for name in ("k", "v", "slot_mapping"):
            for cache in ("k_cache", "v_cache"):
                if overlap(views[name], views[cache]):
                    rule = f"must not share memory with {cache}, which is written"
                    got = f"{_span(views[name])} and {_span(views[cache])}"
                    raise SourceOverlapError(name, rule, got)
        slots = self._fetch(views["slot_mapping"], handle)
        written = np.flatnonzero((slots >= 0) & (slots < info.num_slots))
        _refuse_duplicates(slots, written)
        for name in ("k", "v"):
            _refuse_non_finite(name, self._fetch(views[name], handle), info.dtype, written)

    def _fetch(self, there: Array, handle: int) -> Array:
        """Return a view of device memory with its data behind it."""
        start, end = np.lib.array_utils.byte_bounds(there)
        data = self._device.read(start, end - start, handle)
        fetched: Array = np.ndarray(there.shape, there.dtype, data, strides=there.strides)
        return fetched


def _at(tensor: TensorDescriptor, address: int) -> Array:
    """Return a tensor at an address, its elements as integers of their size."""
    size = tensor.dtype.itemsize
    steps = tuple(step * size for step in tensor.strides)
    return view(address, np.dtype(f"i{size}"), tensor.shape, steps)


def _refuse_duplicates(slots: Array, written: Array) -> None:
    order = written[np.argsort(slots[written], kind="stable")]
    twice = np.flatnonzero(slots[order[1:]] == slots[order[:-1]])
    if twice.size:
        # Of all such pairs, the one whose second token comes first.
        at = twice[order[twice + 1].argmin()]
        first, second = order[at], order[at + 1]
        rule = f"must not have one slot twice, but tokens {first} and {second} have the same"
        raise DuplicateSlotError("slot_mapping", rule, f"slot {slots[first]}")


def _refuse_non_finite(name: str, rows: Array, dtype: Dtype, written: Array) -> None:
    mask = _EXPONENTS[dtype]
    bad = (rows & mask) == mask
    found = np.argwhere(bad[written])
    if found.size:
        at, head, element = map(int, found[0])
        token = int(written[at])
        rule = f"must be finite, but token {token}, head {head}, element {element} is not"
        raise NonFiniteError(name, rule, rows[token, head, element].view(dtype))


def _span(array: Array) -> str:
    start, end = np.lib.array_utils.byte_bounds(array)
    return f"{start:#x} to {end:#x}"
