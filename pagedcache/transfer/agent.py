# SPDX-License-Identifier: Apache-2.0
"""Agents, which blocks are sent from and to."""

from __future__ import annotations

import itertools
import logging
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagedcache.arrays.find import library_of
from pagedcache.backend.handle import Handle
from pagedcache.kv_cache import KVCache
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    DestroyedError,
    PagedCacheError,
    shown,
)
from pagedcache.transfer import card as cards
from pagedcache.transfer.board import PLACES, Board
from pagedcache.transfer.errors import TransferError
from pagedcache.transfer.link import MINE, Link
from pagedcache.transfer.packing import ONCE, Push, Staging, Want, read_message
from pagedcache.transfer.peer import Peer

if TYPE_CHECKING:
    from pagedcache.transfer.handover import Arrival, Offer
    from pagedcache.transfer.jobs import Job, Steps
    from pagedcache.transfer.link import Flight

MOST_UNREAD = 1024  # messages of a side that is not connected yet
_log = logging.getLogger(__name__)


class Agent:
    """One side of transfers: a cache whose blocks others may read and write, and go to others.

    Give `card` to another process in any way, and let it call `connect`. Then either side may send
    and fetch, and the other one need not do anything.

    Parameters
    ----------
    name : str
        For messages. Several agents may have the same.
    caches : KVCache or list of array
        Arrays with blocks on their first axis, as many in each, all on the CPU or on one GPU, of
        any library. A block is a block of all of them. Blocks should be contiguous, since each
        contiguous run of a block is sent by itself. Where blocks of an array are not, and have runs
        of less than 1,024 bytes, they are packed first, and both sides must work: see `progress`.
    label : str, optional
        What must be the same on both sides and cannot be seen from shapes and dtypes, such as the
        model, or the layout of arrays with as many heads as slots.
    pack : bool
        Whether to pack blocks that are contiguous, too, on both sides. Between two H200, blocks of
        32 KiB arrived five to eight times as fast, and those of 2 MiB a quarter to an eighth as
        fast; on CPUs, those of 4 KiB one and a half times to twice as fast, larger ones more slowly
        (``notes/blocks.md``). It takes up to 32 MiB of memory on the device for each direction, or
        a block if that is larger.

    Attributes
    ----------
    name : str
    cache : KVCache or None
    num_blocks : int
    block_bytes : int
        Bytes that are sent for a block.
    packs : bool
        Whether blocks are packed before they are sent.
    closed : bool

    Raises
    ------
    MissingLibraryError
        NIXL is not installed.
    TransferError
        NIXL cannot start, or cannot use this memory.
    PagedCacheError
        A cache cannot be sent; the message names it.

    Notes
    -----
    The arrays are kept alive, and their memory stays registered, until `close`. They must stay as
    they are until then. Anyone who has the card can read and write all of their memory, so give it
    to processes that you trust.

    An agent and all that comes of it belong to one thread, and to the process that made them. NIXL
    has a thread of its own for each agent, which keeps looking for messages.

    Examples
    --------
    Both sides may be in one process:

    >>> import numpy as np
    >>> from pagedcache.transfer import Agent
    >>> here, there = np.full((8, 4096), 7, np.uint8), np.zeros((16, 4096), np.uint8)
    >>> with Agent("one", [here]) as one, Agent("other", [there]) as other:  # doctest: +SKIP
    ...     job = one.connect(other.card).send([2, 3], [15, 0])
    ...     job.wait(timeout=30)
    ...     there[:, 0].tolist()
    [7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7]
    """

    def __init__(self, name: str, caches: Any, *, label: str = "", pack: bool = False) -> None:
        for subject, text in (("name", name), ("label", label)):
            if not isinstance(text, str):
                raise BadParamTypeError(subject, "must be a string", shown(text))
        if not isinstance(pack, bool):
            raise BadParamTypeError("pack", "must be a bool", shown(pack))
        self.name = name
        self.cache = caches if isinstance(caches, KVCache) else None
        arrays = [caches.blocks] if self.cache is not None else caches
        self._memory, facts = cards.read_memory(arrays, pack=pack)
        self._arrays = list(arrays)
        kind = "a list of arrays" if self.cache is None else "a KVCache"
        inside = {} if self.cache is None else cards.describe(self.cache)
        # Words that the user knows come first, since the first difference is what is named.
        self._facts = {"what it is made of": kind, "label": label, **inside, **facts}
        self.num_blocks = self._memory.num_blocks
        self.block_bytes = self._memory.block_bytes
        self.closed = False
        self._process = os.getpid()
        self._device = Handle(self._memory.device).opened()
        library = library_of("caches[0]", arrays[0])
        self._current_stream: Callable[[], int] = (
            library.current_stream("caches[0]", arrays[0], self._memory.gpu)
            or self._device.current_stream
        )
        self.packs = self._memory.packs
        self._pause = 1e-5 if self.packs else 1e-3  # seconds; where both sides work, both wait
        self._stream = self._device.side_stream()  # blocks are packed and unpacked on it
        self._peers: dict[str, Peer] = {}
        self._jobs: set[Job] = set()
        self._serving: list[Steps] = []  # what others have asked for
        self._numbers = itertools.count()
        self._numbered: dict[int, Push | Want] = {}
        self._messages: deque[tuple[str, bytes]] = deque()  # that were not read yet
        self._unread: dict[str, list[bytes]] = {}  # messages of those that are not connected yet
        self._given_up: set[Arrival] = set()
        self._left_behind: list[tuple[Callable[[], object], list[Flight]]] = []
        self._lost: set[str] = set()  # sides that were connected and are gone
        self._open_offers: dict[bytes, Offer] = {}  # open ones, by the message that says "taken"
        # Messages of offers, by who sent them and by the word of their grant.
        self._inbox: dict[str, dict[bytes, bytes]] = {}
        self._board = Board()
        self._open = self._board.grant()  # for all blocks, until this is closed
        self._staging = Staging(self._arrays, self._memory.device) if self.packs else None
        # NIXL knows sides by name, so a process that is started again must have another one.
        self._id = f"{name}-{uuid.uuid4().hex}"
        link: Link | None = None
        try:
            self._link = link = Link(self._id)
            self._card = self._open_memory()
        except BaseException as error:
            if link is not None:
                link.close()
            if not isinstance(error, Exception) or isinstance(error, PagedCacheError):
                raise
            rule = f"could not start NIXL, or let it use the memory of caches: {shown(error, str)}"
            raise TransferError(f"agent {name!r}", rule, "agent") from error

    def _open_memory(self) -> bytes:
        """Let others reach blocks and words, and return the card that tells them how."""
        memory, words = self._memory, self._board.words
        kind, gpu = memory.kind, memory.gpu
        here, count, ranges = memory.rows, self.num_blocks, memory.ranges
        there = here
        if (staging := self._staging) is not None:
            size, count, ranges = staging.block_bytes, staging.count, staging.ranges
            here, there = [(staging.coming, size, size)], [(staging.going, size, size)]
        link = self._link
        link.register(kind, gpu, ranges)
        link.register("DRAM", 0, [(words.ctypes.data, words.nbytes)])
        self._pieces = count
        self._blocks_here = link.prepare(MINE, kind, gpu, here, count)
        row = (words[1].ctypes.data, 8, 8)
        self._words_here = link.prepare(MINE, "DRAM", 0, [row], PLACES)
        header = {
            "id": self._id,
            "name": self.name,
            "facts": self._facts,
            "num_blocks": self.num_blocks,
            "memory": [kind, gpu, there, count],
            "board": words.ctypes.data,
            "open": self._open,
        }
        return cards.to_bytes("card", header, link.nixl.get_agent_metadata())

    @property
    def card(self) -> bytes:
        """What the other side needs for `connect`: how the cache is laid out, and where it is."""
        self._alive()
        return self._card

    def connect(self, card: bytes) -> Peer:
        """Return the other side, to send blocks to and fetch blocks from.

        The connection is made by the first transfer, so only that tells whether the other side is
        there.

        Parameters
        ----------
        card : bytes
            `card` of an agent of another process, or another one of this process.

        Returns
        -------
        Peer
            The same for the same card.

        Raises
        ------
        BadParamError
            It is no card, that of this agent, or that of a cache that is laid out otherwise; the
            message names the first difference. The numbers of blocks may differ, and the distances
            between them.
        """
        self._alive()
        header, metadata = cards.from_bytes("card", "card", card, "Agent.card")
        if header["id"] == self._id:
            rule = "must be that of another agent; within a cache, use pagedcache.copy_blocks"
            raise BadParamError("card", rule, f"the card of agent {self.name!r} itself")
        if wrong := cards.difference(self._facts, header["facts"]):
            raise wrong
        found = self._peers.get(header["id"])
        if found is None:
            try:
                if header["id"] in self._lost:  # perhaps only the network failed
                    self._link.nixl.remove_remote_agent(header["id"])
                    self._lost.discard(header["id"])
                self._link.nixl.add_remote_agent(metadata)
                found = self._peers[header["id"]] = Peer(self, header)
            except Exception as error:
                rule = "must be a card that NIXL can read; use the same NIXL on both sides"
                raise BadParamError("card", rule, shown(error, str)) from error
            for message in self._unread.pop(header["id"], []):
                self._read(found._id, message)
        return found

    def progress(self) -> None:
        """Do what the other sides ask of this one, as far as it can be done without waiting.

        Only where blocks are packed (`packs`): then neither `send` nor `fetch` of another side goes
        on unless this side calls this repeatedly, or waits for a job, an offer or an arrival of its
        own, which calls it too. All jobs of this side go on as well.

        It packs and unpacks on a stream of its own, which waits for no other: as with blocks that
        are not packed, see that nothing uses those that others read or write.
        """
        self._read_messages()
        self._advance()
        for job in list(self._jobs):
            job._step()
        for steps in list(self._serving):
            try:
                next(steps)
                continue
            except StopIteration:
                pass
            except TransferError as error:
                _log.debug("agent %r gave up what another side had asked for: %s", self.name, error)
            except Exception:
                _log.exception("agent %r could not do what another side had asked for", self.name)
            # After an interruption it stays: whether or not it has ended, the next turn tells.
            self._serving.remove(steps)

    def close(self) -> None:
        """End all transfers, withdraw all offers, and let the arrays go.

        What others send from then on does not arrive, and they get an error: before each transfer
        they read a word of this side, which is cleared first. What a process on this host was
        copying by itself at that moment (CMA) still arrives, so let the other sides finish before.
        Closing twice is allowed.
        """
        if self.closed:
            return
        if self._process != os.getpid():  # NIXL's threads are not in a forked process
            self.closed = True
            return
        try:
            self._board.revoke(self._open)
            for offer in list(self._open_offers.values()):
                offer.withdraw()
            self.closed = True
            for job in list(self._jobs):
                rule = "was closed before its transfers were done"
                job._fail(TransferError(f"agent {self.name!r}", rule, "agent"))
            self._serving.clear()
            if self.packs:
                self._wait_for(self._stream)
        finally:
            self.closed = True
            self._link.close()
            self._advance()
            self._arrays, self._staging = [], None

    def __enter__(self) -> Agent:
        self._alive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self._jobs)} jobs going on"
        return (
            f"<pagedcache.transfer.Agent {self.name!r}: {self.num_blocks} blocks of "
            f"{self.block_bytes} bytes on {self._memory.device}, {state}>"
        )

    # For peers, jobs and offers

    def _alive(self) -> Link:
        """Return the link, unless this was closed."""
        if self._process != os.getpid():
            rule = "was made in another process, and cannot be used after a fork; make one here"
            raise DestroyedError(f"agent {self.name!r}", rule)
        if self.closed:
            rule = "was closed and cannot be used any more"
            raise DestroyedError(f"agent {self.name!r}", rule)
        return self._link

    def _wait_for_writes(self, stream: Any) -> None:
        """Wait for what was queued before: neither NIXL nor packing is ordered with streams."""
        if self.cache is not None:
            self.cache.apply_copies(stream=stream)
        self._wait_for(self._current_stream() if stream is None else self._device.stream(stream))

    def _wait_for(self, stream: int) -> None:
        done = self._device.mark(stream)
        while not done():
            time.sleep(2e-5)

    def _advance(self) -> None:
        """Let go of what was given up or left behind, once nothing can write to it."""
        for arrival in list(self._given_up):
            arrival._let_go()
        for left in self._left_behind[:]:
            free, flights = left
            if all(flight.ended for flight in flights):
                self._left_behind.remove(left)
                free()

    def _free_later(self, free: Callable[[], object]) -> None:
        """Call a function once all transfers that go on now have ended.

        For what an interruption has left behind, which nobody else looks at.
        """
        self._left_behind.append((free, [*self._link.flights]))

    def _read_messages(self) -> None:
        arrived = self._alive().nixl.get_new_notifs()
        self._messages += [(sender, each) for sender, found in arrived.items() for each in found]
        while self._messages:
            sender, message = self._messages[0]
            once = message.startswith(ONCE)  # others may be read again after an interruption
            if once:
                self._messages.popleft()
            self._read(sender, message)
            if not once:
                self._messages.popleft()

    def _read(self, sender: str, message: bytes) -> None:
        """Do what a message asks, or note what it says."""
        kind, _, number = message.rpartition(b" ")
        if kind == b"pagedcache taken":
            if found := self._open_offers.get(message):  # else it was withdrawn
                found._take()
        elif kind == b"pagedcache withdrawn":
            self._inbox.get(sender, {}).pop(number, None)
        elif message.startswith(b"pagedcache offer "):
            try:
                word = cards.from_bytes("offer", "message", message, "Offer.message")[0]["grant"][1]
            except Exception:
                _log.exception("agent %r cannot read an offer of %r", self.name, sender)
            else:
                self._inbox.setdefault(sender, {})[b"%d" % word] = message
        elif self.packs and message.startswith(b"pagedcache "):
            peer = self._peers.get(sender)
            if peer is None:
                unread = self._unread.setdefault(sender, [])
                if len(unread) < MOST_UNREAD:
                    unread.append(message)
                return
            try:
                read_message(self, peer, message)
            except Exception:
                _log.exception("agent %r cannot read a message of %r", self.name, sender)

    def _number(self, what: Push | Want) -> int:
        """Return a number by which the other side can refer to something."""
        number = next(self._numbers)
        self._numbered[number] = what
        return number
