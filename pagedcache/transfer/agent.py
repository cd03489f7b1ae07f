# SPDX-License-Identifier: Apache-2.0
"""Agents, which blocks are sent from and to, and jobs, which are blocks on their way."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable
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
from pagedcache.transfer.card import describe, difference, pack, read_memory, unpack
from pagedcache.transfer.errors import TransferError, wait_for

if TYPE_CHECKING:
    from pagedcache.tensors import Array
    from pagedcache.transfer.handover import Arrival, Offer

OFFERS = 1024  # that an agent may have at a time
OLDEST = (1, 5)  # the first NIXL that takes strided lists of blocks
MINE = "NIXL_INIT_AGENT"  # NIXL's word for the memory of this side


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
        contiguous run of a block is sent by itself; runs of less than 1,024 bytes are refused.
    label : str, optional
        What must be the same on both sides and cannot be seen from shapes and dtypes, such as the
        model, or the layout of arrays with as many heads as slots.

    Attributes
    ----------
    name : str
    cache : KVCache or None
    num_blocks : int
    block_bytes : int
        Bytes that are sent for a block.
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

    def __init__(self, name: str, caches: Any, *, label: str = "") -> None:
        for subject, text in (("name", name), ("label", label)):
            if not isinstance(text, str):
                raise BadParamTypeError(subject, "must be a string", shown(text))
        self.name = name
        self.cache = caches if isinstance(caches, KVCache) else None
        arrays = [caches.blocks] if self.cache is not None else caches
        self._memory, facts = read_memory(arrays)
        self._arrays = list(arrays)
        kind = "a list of arrays" if self.cache is None else "a KVCache"
        inside = {} if self.cache is None else describe(self.cache)
        # Words that the user knows come first, since the first difference is what is named.
        self._facts = {"what it is made of": kind, "label": label, **inside, **facts}
        self.num_blocks = self._memory.num_blocks
        self.block_bytes = sum(size for _, size, _ in self._memory.rows)
        self.closed = False
        self._process = os.getpid()
        self._device = Handle(self._memory.device).opened()
        library = library_of("caches[0]", arrays[0])
        self._current_stream: Callable[[], int] = (
            library.current_stream("caches[0]", arrays[0], self._memory.gpu)
            or self._device.current_stream
        )
        self._peers: dict[str, Peer] = {}
        self._jobs: set[Job] = set()
        self._given_up: set[Arrival] = set()
        self.offers: dict[bytes, Offer] = {}  # open ones, by the message that says "taken"
        # Others read offers in the first row, and this side reads those of others into the second:
        # see `handover`.
        self.board = np.zeros((2, OFFERS), np.uint64)
        self.free_offers, self.free_words = [*range(OFFERS)], [*range(OFFERS)]
        nixl = _load()
        # NIXL knows sides by name, so a process that is started again must have another one.
        self.id = f"{name}-{uuid.uuid4().hex}"
        try:
            self._nixl: Any = nixl.nixl_agent(self.id, nixl.nixl_agent_config(backends=["UCX"]))
            self._register(self._memory.kind, self._memory.gpu, self._memory.ranges)
            self._register("DRAM", 0, [(self.board.ctypes.data, self.board.nbytes)])
        except Exception as error:
            rule = f"could not start NIXL, or let it use the memory of caches: {shown(error, str)}"
            raise TransferError(f"agent {name!r}", rule, "agent") from error
        self.blocks_here = self._prepare(
            MINE, self._memory.kind, self._memory.gpu, self._memory.rows, self.num_blocks
        )
        row = (self.board[1].ctypes.data, 8, 8)
        self.words_here = self._prepare(MINE, "DRAM", 0, [row], OFFERS)
        header = {
            "id": self.id,
            "name": name,
            "facts": self._facts,
            "memory": self._memory._asdict(),
            "board": self.board.ctypes.data,
        }
        self._card = pack("card", header, self._nixl.get_agent_metadata())

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
        header, metadata = unpack("card", "card", card, "Agent.card")
        if header["id"] == self.id:
            rule = "must be that of another agent; within a cache, use pagedcache.copy_blocks"
            raise BadParamError("card", rule, f"the card of agent {self.name!r} itself")
        if wrong := difference(self._facts, header["facts"]):
            raise wrong
        found = self._peers.get(header["id"])
        if found is None:
            try:
                self._nixl.add_remote_agent(metadata)
            except Exception as error:
                rule = "must be a card that NIXL can read; use the same NIXL on both sides"
                raise BadParamError("card", rule, shown(error, str)) from error
            found = self._peers[header["id"]] = Peer(self, header)
        return found

    def close(self) -> None:
        """End all transfers, withdraw all offers, and let the arrays go.

        What others send over a network does not arrive any more, and they get an error. A process
        on this host may copy by itself (CMA) until it has noticed, a moment later, so let the other
        sides finish before, and do not use the memory for something else until they know. Closing
        twice is allowed.
        """
        if self.closed:
            return
        self.closed = True
        if self._process != os.getpid():  # NIXL's threads are not in a forked process
            return
        for offer in list(self.offers.values()):
            offer.withdraw()
        for job in list(self._jobs):
            rule = "was closed before its transfers were done"
            job._fail(TransferError(f"agent {self.name!r}", rule, "agent"))
        for peer in self._peers.values():
            peer.blocks_there = peer.words_there = None
        # NIXL stops, and lets the memory go, when nothing refers to it any more: this and handles.
        self._nixl.agent = None
        self.blocks_here = self.words_here = self._nixl = None
        self._advance()
        self._arrays = []

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

    def _wait_for_stream(self, stream: Any) -> None:
        """Wait for what was queued before: NIXL is not ordered with streams."""
        if self.cache is not None:
            self.cache.apply_copies(stream=stream)
        handle = self._current_stream() if stream is None else self._device.stream(stream)
        done = self._device.mark(handle)
        while not done():
            time.sleep(2e-5)

    def _advance(self) -> None:
        """Let go of the blocks of what was given up, once nothing can write to them."""
        for arrival in list(self._given_up):
            arrival._let_go()

    def _read_messages(self) -> None:
        """Note which offers were taken."""
        for messages in self._alive().get_new_notifs().values():
            for message in messages:
                if found := self.offers.get(message):
                    found._take()


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
        self.agent, self.name, self.id = agent, str(header["name"]), str(header["id"])
        memory = header["memory"]
        self.num_blocks = int(memory["num_blocks"])
        self._runs = len(memory["rows"])
        place = memory["kind"], memory["gpu"]
        self.blocks_there = agent._prepare(self.id, *place, memory["rows"], self.num_blocks)
        self.words_there = agent._prepare(self.id, "DRAM", 0, [(header["board"], 8, 8)], OFFERS)

    def send(self, mine: Any, theirs: Any, *, stream: Any = None) -> Job:
        """Write blocks of this side to blocks of the other side.

        Parameters
        ----------
        mine, theirs : list of int, or array of ints on the host
            As many of each: block ``mine[i]`` here goes to block ``theirs[i]`` there. No block
            twice in `theirs`.
        stream : optional
            The stream of the writes that come before; see `Descriptor.calculate`. The call waits
            for all that is queued on it, or on the current stream, since NIXL has no streams. A
            `KVCache` makes the copies that forks need before that.

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
        other side. Tell it in a way of your own, or use `pagedcache.transfer.offer`, which does.
        Between processes of one host, the copy may be made by this call, which then takes as long.
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

    def _start(self, operation: str, mine: Any, theirs: Any, stream: Any) -> Job:
        agent = self.agent
        agent._alive()
        agent._advance()
        here = _blocks("mine", mine, agent.num_blocks)
        there = _blocks("theirs", theirs, self.num_blocks)
        if len(here) != len(there):
            rule = f"must have as many blocks as mine, {len(here)}"
            raise BadParamError("theirs", rule, len(there))
        name, targets = ("theirs", there) if operation == "WRITE" else ("mine", here)
        _check_once(name, targets)
        agent._wait_for_stream(stream)
        handle = self._post(operation, here, there) if len(here) else None
        return Job(self, handle, len(here), agent.block_bytes * len(here))

    def fetch_word(self, offer: int, place: int) -> Job:
        """Read what the other side says of an offer now into a place of the board."""
        handle = self._post("READ", np.array([place]), np.array([offer]), of_board=True)
        return Job(self, handle, 0, 8)

    def _post(self, operation: str, here: Array, there: Array, *, of_board: bool = False) -> Any:
        """Start a transfer, and return NIXL's handle of it."""
        # What is raised refers to this frame, and NIXL could not stop while it refers to NIXL.
        handle = self._try_to_post(operation, here, there, of_board=of_board)
        if isinstance(handle, TransferError):
            raise handle
        return handle

    def _try_to_post(self, operation: str, here: Array, there: Array, *, of_board: bool) -> Any:
        agent = self.agent
        if of_board:
            sides = [(agent.words_here, here), (self.words_there, there)]
        else:
            runs = np.arange(self._runs)[:, None]
            sides = [
                (agent.blocks_here, runs * agent.num_blocks + here),
                (self.blocks_there, runs * self.num_blocks + there),
            ]
        try:
            pieces = [(prepared, index.ravel().astype(np.int32)) for prepared, index in sides]
            handle = agent._alive().make_prepped_xfer(operation, *pieces[0], *pieces[1])
            state = agent._alive().transfer(handle)
        except Exception as error:
            return self._failure(error)
        return self._failure(state) if state == "ERR" else handle

    def _failure(self, cause: object) -> TransferError:
        name = type(cause).__name__
        if name == "nixlRemoteDisconnectError":
            rule = (
                "is gone: its process has ended, its agent was closed, or the network failed; "
                "connect to the card of a new agent"
            )
            return TransferError(f"peer {self.name!r}", rule, "peer")
        rule = f"failed: NIXL says {name}: {shown(cause, str)}"
        return TransferError(f"the transfer with peer {self.name!r}", rule)

    def __repr__(self) -> str:
        return f"<pagedcache.transfer.Peer {self.name!r}: {self.num_blocks} blocks>"


class Job:
    """Blocks on their way. `Peer.send` and `Peer.fetch` make it.

    It cannot be taken back: until it is done or has failed, or its agent is closed, memory is read
    and written, whether or not anyone waits. Its agent keeps it until then.

    Attributes
    ----------
    peer : Peer
    num_blocks : int
    nbytes : int
    error : TransferError or None
        Why it failed, as far as is known.
    """

    def __init__(self, peer: Peer, handle: Any, num_blocks: int, nbytes: int) -> None:
        self.peer, self.num_blocks, self.nbytes = peer, num_blocks, nbytes
        self.error: TransferError | None = None
        self._handle = handle
        if handle is not None:
            peer.agent._jobs.add(self)

    @property
    def done(self) -> bool:
        """Whether all blocks are there. It never waits.

        Raises
        ------
        TransferError
            The job failed.
        """
        if self._handle is not None:
            try:
                state = self.peer.agent._alive().check_xfer_state(self._handle)
            except DestroyedError:
                raise
            except Exception as error:
                self._fail(self.peer._failure(error))
            else:
                if state == "ERR":
                    self._fail(self.peer._failure(state))
                elif state == "DONE":
                    self._release()
        if self.error is not None:
            raise self.error
        return self._handle is None

    def _running(self) -> bool:
        """Return whether memory may still be read and written."""
        try:
            return not self.done
        except TransferError:
            return False

    def wait(self, timeout: float | None = None) -> None:
        """Return once all blocks are there.

        Parameters
        ----------
        timeout : float, optional
            In seconds. By default, there is none: a host that is switched off is noticed after some
            time, and one that is only stopped never.

        Raises
        ------
        TransferTimeoutError
            The job is not done by then. It goes on, and keeps its blocks: do not use them. Wait
            again, or close the agent, which ends it on this side. What `send` has sent may still
            arrive after that.
        TransferError
            The job failed; ``error.side`` says on which side. What is in the targets is not known.
        """
        wait_for(lambda: self.done, timeout, repr(self))

    def _fail(self, error: TransferError) -> None:
        self.error = error
        self._release()

    def _release(self) -> None:
        self._handle = None  # the last reference, so NIXL frees it
        self.peer.agent._jobs.discard(self)

    def __repr__(self) -> str:
        state = "going on" if self._handle is not None else "failed" if self.error else "done"
        return (
            f"<Job with peer {self.peer.name!r}: {self.num_blocks} blocks, {self.nbytes} bytes, "
            f"{state}>"
        )


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
