# SPDX-License-Identifier: Apache-2.0
"""Agents, which blocks are sent from and to, and their view of each other."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import itertools
import logging
import os
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Generator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.arrays.find import library_of
from pagedcache.backend.handle import Handle
from pagedcache.kv_cache import KVCache
from pagedcache.operators.blocks.pairs import OnDevice, read_blocks
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    DestroyedError,
    DuplicateBlockError,
    InvalidBlockError,
    MissingLibraryError,
    shown,
)
from pagedcache.transfer import card as cards
from pagedcache.transfer.board import PLACES, Board
from pagedcache.transfer.errors import TransferError
from pagedcache.transfer.jobs import Flight, Job, Steps
from pagedcache.transfer.packing import (
    Patience,
    Push,
    Staging,
    Want,
    gone,
    message_of,
    read_message,
)

if TYPE_CHECKING:
    from pagedcache.pool import Sequence
    from pagedcache.tensors import Array
    from pagedcache.transfer.handover import Arrival, Offer

EAGER = 1e-3  # seconds that `send` may wait for the other side's leave before it returns
OLDEST = (1, 5)  # the first NIXL that takes strided lists of blocks
MOST_UNREAD = 1024  # messages of a side that is not connected yet
MINE = "NIXL_INIT_AGENT"  # NIXL's word for the memory of this side

_log = logging.getLogger(__name__)


_agents: weakref.WeakSet[Agent] = weakref.WeakSet()


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
        fast (``notes/performance.md``). It takes up to 32 MiB of memory on the device for each
        direction, or a block if that is larger.

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
        self._flights: set[Flight] = set()
        self._serving: list[Steps] = []  # what others have asked for
        self._numbers = itertools.count()
        self._numbered: dict[int, Push | Want] = {}
        self._unread: dict[str, list[bytes]] = {}  # messages of those that are not connected yet
        self._given_up: set[Arrival] = set()
        self._open_offers: dict[bytes, Offer] = {}  # open ones, by the message that says "taken"
        # Messages of offers, by who sent them and by the word of their grant.
        self._inbox: dict[str, dict[bytes, bytes]] = {}
        self._board = Board()
        self._open = self._board.grant()  # for all blocks, until this is closed
        nixl = _load()
        self._staging = Staging(self._arrays, self._memory.device) if self.packs else None
        # NIXL knows sides by name, so a process that is started again must have another one.
        self._id = f"{name}-{uuid.uuid4().hex}"
        rows, pieces, ranges = self._memory.rows, self.num_blocks, self._memory.ranges
        there = rows
        if self._staging is not None:
            size, pieces, ranges = (
                self._staging.block_bytes,
                self._staging.count,
                self._staging.ranges,
            )
            rows, there = [(self._staging.coming, size, size)], [(self._staging.going, size, size)]
        where = self._memory.kind, self._memory.gpu
        words = self._board.words
        try:
            self._nixl: Any = nixl.nixl_agent(self._id, nixl.nixl_agent_config(backends=["UCX"]))
            self._register(*where, ranges)
            self._register("DRAM", 0, [(words.ctypes.data, words.nbytes)])
            self._blocks_here = self._prepare(MINE, *where, rows, pieces)
            row = (words[1].ctypes.data, 8, 8)
            self._words_here = self._prepare(MINE, "DRAM", 0, [row], PLACES)
        except Exception as error:
            rule = f"could not start NIXL, or let it use the memory of caches: {shown(error, str)}"
            raise TransferError(f"agent {name!r}", rule, "agent") from error
        self._pieces = pieces
        _agents.add(self)
        header = {
            "id": self._id,
            "name": name,
            "facts": self._facts,
            "num_blocks": self.num_blocks,
            "memory": [*where, there, pieces],
            "board": words.ctypes.data,
            "open": self._open,
        }
        self._card = cards.to_bytes("card", header, self._nixl.get_agent_metadata())

    def _register(self, kind: str, index: int, ranges: list[tuple[int, int]]) -> None:
        rows = np.array([(begin, size, index) for begin, size in ranges], np.uint64)
        self._nixl.register_memory(rows, kind)

    def _prepare(
        self, whose: str, kind: str, index: int, rows: list[tuple[int, int, int]], count: int
    ) -> Any:
        """Return NIXL's list of all pieces: the first run of all blocks, then the second, ..."""
        pieces = [(begin, size, index, step, count) for begin, size, step in rows]
        return self._nixl.prep_xfer_dlist(whose, np.array(pieces, np.uint64), kind)

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
                self._nixl.add_remote_agent(metadata)
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
            except BaseException:
                self._serving.remove(steps)
                raise
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
            for flight in self._flights:
                flight.handle = None
            self._flights.clear()
            for peer in self._peers.values():
                peer._blocks_there = peer._words_there = None
            # NIXL stops, and lets the memory go, when nothing refers to it: this and handles.
            self._nixl.agent = None
            self._blocks_here = self._words_here = self._nixl = None
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

    def _alive(self) -> Any:
        """Return NIXL's agent."""
        if self._process != os.getpid():
            rule = "was made in another process, and cannot be used after a fork; make one here"
            raise DestroyedError(f"agent {self.name!r}", rule)
        if self.closed:
            rule = "was closed and cannot be used any more"
            raise DestroyedError(f"agent {self.name!r}", rule)
        return self._nixl

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
        """Let go of the blocks of what was given up, once nothing can write to them."""
        for arrival in list(self._given_up):
            arrival._let_go()

    def _read_messages(self) -> None:
        for sender, messages in self._alive().get_new_notifs().items():
            for message in messages:
                self._read(sender, message)

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


class Peer:
    """The other side of transfers. `Agent.connect` makes it.

    Attributes
    ----------
    name : str
        That of the other agent.
    agent : Agent
        This side.
    num_blocks : int
        How many the other side has.
    """

    def __init__(self, agent: Agent, header: dict[str, Any]) -> None:
        self.agent, self.name, self._id = agent, str(header["name"]), str(header["id"])
        self.num_blocks = int(header["num_blocks"])
        kind, gpu, rows, pieces = header["memory"]
        self._runs, self._pieces, self._open = len(rows), int(pieces), header["open"]
        self._patience = Patience(self)
        self._looking: Steps | None = None
        self._blocks_there = agent._prepare(self._id, kind, gpu, rows, pieces)
        row = (header["board"], 8, 8)
        self._words_there = agent._prepare(self._id, "DRAM", 0, [row], PLACES)

    def send(self, mine: Any, theirs: Any, *, stream: Any = None) -> Job:
        """Write blocks of this side to blocks of the other side.

        Parameters
        ----------
        mine, theirs : list of int, or array of ints on the host
            As many of each: block ``mine[i]`` here goes to block ``theirs[i]`` there. No block
            twice in `theirs`.
        stream : optional
            The stream of the writes that come before; see `Descriptor.calculate`. The call waits
            for all that is queued on it, or on the current stream, since neither NIXL nor packing
            is ordered with it. A `KVCache` makes the copies that forks need before that.

        Returns
        -------
        Job

        Raises
        ------
        InvalidBlockError, DuplicateBlockError
            A block does not exist, or is written twice. Nothing was sent.
        TransferError
            The other side is gone.

        Notes
        -----
        Do not write to these blocks until the job is done, and see that nobody uses those of the
        other side. Tell it in a way of your own, or use `hand_over`, which does. Between processes
        of one host, the copy may be made by this call, which then takes as long. If the other side
        is slow to answer, the copy begins when the job is next looked at.
        """
        return self._start("WRITE", mine, theirs, stream)

    def fetch(self, theirs: Any, mine: Any, *, stream: Any = None) -> Job:
        """Read blocks of the other side into blocks of this side.

        Parameters
        ----------
        theirs, mine : list of int, or array of ints on the host
            As many of each: block ``theirs[i]`` there goes to block ``mine[i]`` here. No block
            twice in `mine`.
        stream : optional
            As in `send`: the call waits for it, so that nothing that was queued before reads the
            blocks too late. What is queued once the job is done sees the new blocks.

        Returns
        -------
        Job

        Raises
        ------
        InvalidBlockError, DuplicateBlockError
            A block does not exist, or is written twice. Nothing was read.
        TransferError
            The other side is gone.

        Notes
        -----
        Do not use blocks `mine` until the job is done, and see that the other side keeps those of
        its own as they are. As in `send`, the call may take as long as the copy.
        """
        return self._start("READ", mine, theirs, stream)

    def hand_over(
        self, sequence: Sequence, *, num_written: int | None = None, stream: Any = None
    ) -> Offer:
        """Offer a sequence to the other side, and tell it, for `pagedcache.transfer.accept`.

        The other side must be connected to this one. See `KVCache.send`, which is the same.

        Parameters
        ----------
        sequence, num_written, stream
            See `pagedcache.transfer.offer`.

        Returns
        -------
        Offer

        Raises
        ------
        TransferError
            The other side is gone.
        """
        from pagedcache.transfer.handover import offer

        made = offer(self.agent, sequence, num_written=num_written, stream=stream, peer=self)
        try:
            self._send_message(made.message)
        except BaseException:
            made.withdraw()
            raise
        return made

    # What jobs are made of

    def _start(self, operation: str, mine: Any, theirs: Any, stream: Any) -> Job:
        agent = self.agent
        agent._alive()
        agent.progress()
        here = _blocks("mine", mine, agent.num_blocks)
        there = _blocks("theirs", theirs, self.num_blocks)
        if len(here) != len(there):
            rule = f"must have as many blocks as mine, {len(here)}"
            raise BadParamError("theirs", rule, len(there))
        name, targets = ("theirs", there) if operation == "WRITE" else ("mine", here)
        _check_once(name, targets)
        agent._wait_for_writes(stream)
        steps = self._send if operation == "WRITE" else self._fetch
        job = self._job(steps(here, there) if len(here) else _nothing(), len(here))
        job._step()
        if job.error is not None:
            raise job.error
        return job

    def _job(self, steps: Steps, num_blocks: int) -> Job:
        return Job(self, steps, num_blocks, self.agent.block_bytes * num_blocks)

    def _send(self, here: Array, there: Array) -> Steps:
        if self.agent.packs:
            yield from Push(self, here, there, None).steps()
            return
        yield from self._must_be_there(EAGER)
        yield from self._move("WRITE", here, there)

    def _fetch(self, here: Array, there: Array) -> Steps:
        yield from self._read_blocks(here, there)
        yield from self._must_be_there()

    def _read_blocks(self, here: Array, there: Array) -> Steps:
        if self.agent.packs:
            yield from Want(self, here, there).steps()
        else:
            yield from self._move("READ", here, there)

    def _must_be_there(self, patience: float = 0) -> Steps:
        """Raise if the other side was closed."""
        place, word = self._open
        if not (yield from self._is_granted(place, word, patience)):
            raise gone(self.name)

    def _look(self) -> None:
        """Ask now and then whether the other side is there.

        Raises
        ------
        TransferError
            It is gone.
        """
        self._looking = self._looking or self._patience.steps(0)
        try:
            next(self._looking)
        except StopIteration:
            self._looking = None
        except TransferError:
            self._looking = None
            raise

    def _is_granted(
        self, place: int, word: int, patience: float = 0
    ) -> Generator[None, None, bool]:
        """Return whether the other side still has a word on its board."""
        board = self.agent._board
        here = board.take_place()
        try:
            read = np.array([here]), np.array([place])
            yield from self._move("READ", *read, patience, of_board=True)
        except TransferError:
            board.give_back(here)
            raise
        found = int(board.words[1, here])
        board.give_back(here)
        return found == word

    def _move(
        self,
        operation: str,
        here: Array,
        there: Array,
        patience: float = 0,
        *,
        of_board: bool = False,
    ) -> Steps:
        """Start a transfer of NIXL, and wait for it, at first without a pause."""
        flight = self._post(operation, here, there, of_board=of_board)
        end = time.monotonic() + patience if patience else 0
        while not self._landed(flight):
            if not end or time.monotonic() > end:
                yield

    # What is raised refers to frames of these calls, and NIXL could not stop while they refer to
    # NIXL. So what does returns errors.

    def _post(self, operation: str, here: Array, there: Array, *, of_board: bool) -> Flight:
        made = self._try_to_post(operation, here, there, of_board=of_board)
        if isinstance(made, TransferError):
            raise made
        return made

    def _landed(self, flight: Flight) -> bool:
        landed = self._state(flight)
        if isinstance(landed, TransferError):
            raise landed
        return landed

    def _tell(self, kind: str, header: dict[str, Any], blocks: Array) -> None:
        self._send_message(message_of(kind, header, blocks))

    def _send_message(self, message: bytes) -> None:
        if failed := self._try_to_send(message):
            raise failed

    def _try_to_post(
        self, operation: str, here: Array, there: Array, *, of_board: bool
    ) -> Flight | TransferError:
        agent = self.agent
        flight: Flight | None = None
        if of_board:
            sides = [(agent._words_here, here), (self._words_there, there)]
        else:
            runs = np.arange(self._runs)[:, None]
            sides = [
                (agent._blocks_here, runs * agent._pieces + here),
                (self._blocks_there, runs * self._pieces + there),
            ]
        try:
            pieces = [(prepared, index.ravel().astype(np.int32)) for prepared, index in sides]
            flight = Flight(agent._alive().make_prepped_xfer(operation, *pieces[0], *pieces[1]))
            agent._flights.add(flight)  # before it begins, in case this is interrupted
            state: Any = agent._alive().transfer(flight.handle)
        except Exception as error:
            state = error
        if state == "ERR" or isinstance(state, Exception):
            if flight is not None:
                agent._flights.discard(flight)
                flight.handle = None
            return self._failure(state)
        assert flight is not None
        return flight

    def _state(self, flight: Flight) -> bool | TransferError:
        agent = self.agent
        try:
            state = agent._alive().check_xfer_state(flight.handle)
        except DestroyedError:
            raise
        except Exception as error:
            state = error
        if state not in ("DONE", "ERR") and not isinstance(state, Exception):
            return False
        agent._flights.discard(flight)
        flight.handle = None  # the last reference, so NIXL frees it
        return True if state == "DONE" else self._failure(state)

    def _ended(self, flight: Flight) -> bool:
        """Return whether a transfer that somebody left behind has ended, in whatever way."""
        return flight.handle is None or bool(self._state(flight))

    def _try_to_send(self, message: bytes) -> TransferError | None:
        try:
            self.agent._alive().send_notif(self._id, message)
        except DestroyedError:
            raise
        except Exception as error:
            return self._failure(error)
        return None

    def _failure(self, cause: object) -> TransferError:
        name = type(cause).__name__
        if name == "nixlRemoteDisconnectError":
            self.agent._inbox.pop(self._id, None)
            return gone(self.name)
        said = f"{name}: {shown(cause, str)}" if isinstance(cause, Exception) else cause
        rule = f"failed: NIXL says {said}"
        return TransferError(f"the transfer with peer {self.name!r}", rule)

    def __repr__(self) -> str:
        return f"<pagedcache.transfer.Peer {self.name!r}: {self.num_blocks} blocks>"


def _blocks(name: str, blocks: Any, count: int) -> Array:
    """Return a list of blocks that exist."""
    found = read_blocks(name, blocks, 1)
    if isinstance(found, OnDevice):
        raise BadParamError(name, "must be on the host", f"an array on {found.tensor.device}")
    wrong = np.flatnonzero((found < 0) | (found >= count))
    if wrong.size:
        raise InvalidBlockError(name, "", int(wrong[0]), int(found[wrong[0]]), count, wrong.size)
    return found


def _check_once(name: str, blocks: Array) -> None:
    found, times = np.unique(blocks, return_counts=True)
    if len(found) != len(blocks):
        rule = "must not have one block twice, since either could be what ends up there"
        raise DuplicateBlockError(name, rule, f"block {int(found[times > 1][0])}")


def _nothing() -> Steps:
    yield from ()


def _keep_for_ever() -> None:
    """Let NIXL's objects outlive a forked process: what ends them there would disturb this one."""
    for agent in _agents:
        kept = [agent._nixl, getattr(agent._nixl, "agent", None)]
        kept += [agent._blocks_here, agent._words_here]
        kept += [flight.handle for flight in agent._flights]
        for peer in agent._peers.values():
            kept += [peer._blocks_there, peer._words_there]
        for each in kept:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


os.register_at_fork(after_in_child=_keep_for_ever)


def _load() -> Any:
    """Import NIXL."""
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
