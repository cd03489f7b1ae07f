# SPDX-License-Identifier: Apache-2.0
"""NIXL, as one side uses it: memory, transfers and messages. Nothing here knows blocks.

What is raised refers to the frames of the calls that raise it, and NIXL could not stop while these
refer to its objects. So transfers and messages return why they failed, and raise nothing.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import logging
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagedcache.status import MissingLibraryError, shown

if TYPE_CHECKING:
    from pagedcache.tensors import Array

OLDEST = (1, 5)  # the first NIXL that takes strided lists of pieces
MINE = "NIXL_INIT_AGENT"  # NIXL's word for the memory of this side

_links: weakref.WeakSet[Link] = weakref.WeakSet()


class Failure(NamedTuple):
    """Why NIXL could not do something: whether the other side is gone, and what NIXL says."""

    gone: bool
    said: str


class Pieces:
    """Memory of a side that transfers name by index.

    Attributes
    ----------
    handle : object or None
        NIXL's; None once the link was closed.
    """

    def __init__(self, handle: Any) -> None:
        self.handle = handle


class Flight:
    """One transfer.

    Attributes
    ----------
    handle : object or None
        NIXL's; None once it has ended, or the link was closed.
    result : bool or Failure
        False while it goes on, then True or why it failed.
    """

    __slots__ = ("_link", "handle", "result")

    def __init__(self, link: Link, handle: Any) -> None:
        self._link, self.handle = link, handle
        self.result: bool | Failure = False

    @property
    def ended(self) -> bool:
        """Whether it has ended, in whatever way, so that memory is not touched any more."""
        return self.handle is None or bool(self._link.look(self))


class Link:
    """One side's NIXL.

    Parameters
    ----------
    name : str
        By which other sides know it. No two may have the same.

    Attributes
    ----------
    nixl : nixl_agent
    flights : set of Flight
        All that go on.

    Raises
    ------
    MissingLibraryError
        NIXL is not installed.
    """

    def __init__(self, name: str) -> None:
        module = load()
        self.nixl: Any = module.nixl_agent(name, module.nixl_agent_config(backends=["UCX"]))
        self.flights: set[Flight] = set()
        self._pieces: weakref.WeakSet[Pieces] = weakref.WeakSet()
        _links.add(self)

    def register(self, kind: str, index: int, ranges: list[tuple[int, int]]) -> None:
        """Let NIXL use memory: addresses and bytes, of a kind and on a device that NIXL names."""
        rows = np.array([(begin, size, index) for begin, size in ranges], np.uint64)
        self.nixl.register_memory(rows, kind)

    def prepare(
        self, whose: str, kind: str, index: int, rows: list[tuple[int, int, int]], count: int
    ) -> Pieces:
        """Return pieces of registered memory, of this side or another.

        Each row is an address, bytes, and the distance from one piece to the next; `count` pieces
        of the first row come first, then those of the second, and so on.
        """
        strided = [(begin, size, index, step, count) for begin, size, step in rows]
        made = self.nixl.prep_xfer_dlist(whose, np.array(strided, np.uint64), kind)
        pieces = Pieces(made)
        self._pieces.add(pieces)
        return pieces

    def start(
        self, operation: str, mine: Pieces, here: Array, theirs: Pieces, there: Array
    ) -> Flight | Failure:
        """Start to read ("READ") or write ("WRITE") pieces of the other side, named by index."""
        flight: Flight | None = None
        try:
            sides = [
                part
                for pieces, index in ((mine, here), (theirs, there))
                for part in (pieces.handle, index.ravel().astype(np.int32))
            ]
            flight = Flight(self, self.nixl.make_prepped_xfer(operation, *sides))
            self.flights.add(flight)  # before it begins, in case this is interrupted
            state: Any = self.nixl.transfer(flight.handle)
        except Exception as error:
            state = _failure(error)
        if flight is None or state == "ERR" or isinstance(state, Failure):
            if flight is not None:
                self.flights.discard(flight)
                flight.handle = None
            return _failure(state)
        return flight

    def look(self, flight: Flight) -> bool | Failure:
        """Return whether a transfer is done, or why it failed."""
        if flight.result:
            return flight.result
        try:
            state = self.nixl.check_xfer_state(flight.handle)
        except Exception as error:
            state = _failure(error)
        if state not in ("DONE", "ERR") and not isinstance(state, Failure):
            return False
        self.flights.discard(flight)
        flight.handle = None  # the last reference, so NIXL frees it
        flight.result = True if state == "DONE" else _failure(state)
        return flight.result

    def send(self, whose: str, message: bytes) -> Failure | None:
        """Send a message to another side."""
        try:
            self.nixl.send_notif(whose, message)
        except Exception as error:
            return _failure(error)
        return None

    def close(self) -> None:
        """Stop NIXL, which lets all memory go. What goes on is not waited for."""
        for flight in self.flights:
            flight.handle = None
        self.flights.clear()
        for pieces in self._pieces:
            pieces.handle = None
        # It stops when nothing refers to it: this and handles.
        self.nixl.agent = None
        self.nixl = None

    def keep_for_ever(self) -> None:
        """Let NIXL's objects outlive this process."""
        kept = [self.nixl, getattr(self.nixl, "agent", None)]
        kept += [flight.handle for flight in self.flights]
        kept += [pieces.handle for pieces in self._pieces]
        for each in kept:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


def _failure(cause: Any) -> Failure:
    """Return why something failed, without what a traceback refers to."""
    if isinstance(cause, Failure):
        return cause
    if not isinstance(cause, Exception):
        return Failure(gone=False, said=str(cause))
    name = type(cause).__name__
    return Failure(name == "nixlRemoteDisconnectError", f"{name}: {shown(cause, str)}")


def _after_fork() -> None:
    # What ends NIXL's objects in the child would disturb the parent.
    for link in _links:
        link.keep_for_ever()


os.register_at_fork(after_in_child=_after_fork)


def load() -> Any:
    """Import NIXL.

    Raises
    ------
    MissingLibraryError
        It is not installed, or too old.
    """
    first = "nixl" not in sys.modules
    how = (
        "without PyTorch, which it asks for and does not need: pip install --no-deps nixl "
        "nixl-cu12 (for CUDA 13: nixl-cu13)"
    )
    try:
        nixl = importlib.import_module("nixl")
    except ImportError as error:
        rule = f"needs NIXL, which cannot be imported ({error}); {how}"
        raise MissingLibraryError("pagedcache.transfer", rule) from error
    version = importlib.metadata.version("nixl")
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        rule = f"needs NIXL {OLDEST[0]}.{OLDEST[1]} or newer; {how}"
        raise MissingLibraryError("pagedcache.transfer", rule, version)
    if first and not os.environ.get("NIXL_LOG_LEVEL"):
        # It prints to the standard output for each agent.
        logging.getLogger("nixl").setLevel(logging.WARNING)
    return nixl
