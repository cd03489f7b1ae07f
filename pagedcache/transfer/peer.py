# SPDX-License-Identifier: Apache-2.0
"""The other sides of transfers, as an agent sees them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.operators.blocks.pairs import OnDevice, read_blocks
from pagedcache.status import (
    BadParamError,
    DestroyedError,
    DuplicateBlockError,
    InvalidBlockError,
)
from pagedcache.transfer.board import PLACES
from pagedcache.transfer.errors import TransferError
from pagedcache.transfer.jobs import Job, Steps
from pagedcache.transfer.link import Failure
from pagedcache.transfer.packing import Patience, Push, Want, message_of

if TYPE_CHECKING:
    from pagedcache.pool import Sequence
    from pagedcache.tensors import Array
    from pagedcache.transfer.agent import Agent
    from pagedcache.transfer.handover import Offer
    from pagedcache.transfer.link import Flight, Pieces

EAGER = 1e-3  # seconds that `send` may wait for the other side's leave before it returns


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
        self._blocks_there: Pieces | None = agent._link.prepare(self._id, kind, gpu, rows, pieces)
        row = (header["board"], 8, 8)
        self._words_there: Pieces | None = agent._link.prepare(self._id, "DRAM", 0, [row], PLACES)

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
        other side. Tell it in a way of your own; for sequences, `KVCache.send` does. Between
        processes of one host, the copy may be made by this call, which then takes as long. If the
        other side is slow to answer, the copy begins when the job is next looked at.
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

    # What jobs and offers are made of

    def _hand_over(self, sequence: Sequence, num_written: int | None, stream: Any) -> Offer:
        """Offer a sequence to the other side, and tell it; see `KVCache.send`."""
        from pagedcache.transfer.handover import Offer

        made = Offer(self.agent, sequence, num_written, stream, self)
        try:
            self._send_message(made.message)
        except BaseException:
            made.withdraw()
            raise
        return made

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
            raise self._gone()

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
        except BaseException:  # it may still be read to
            self.agent._free_later(functools.partial(board.give_back, here))
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

    def _post(self, operation: str, here: Array, there: Array, *, of_board: bool) -> Flight:
        agent = self.agent
        link = agent._alive()
        if self._blocks_there is None or self._words_there is None:
            raise self._gone()
        mine, theirs = agent._words_here, self._words_there
        if not of_board:
            mine, theirs = agent._blocks_here, self._blocks_there
            runs = np.arange(self._runs)[:, None]
            here, there = runs * agent._pieces + here, runs * self._pieces + there
        flight = link.start(operation, mine, here, theirs, there)
        if isinstance(flight, Failure):
            raise self._error(flight)
        return flight

    def _landed(self, flight: Flight) -> bool:
        landed = self.agent._alive().look(flight)
        if isinstance(landed, Failure):
            raise self._error(landed)
        return landed

    def _tell(self, kind: str, header: dict[str, Any], blocks: Array) -> None:
        self._send_message(message_of(kind, header, blocks))

    def _send_message(self, message: bytes) -> None:
        link = self.agent._alive()
        if self._blocks_there is None:
            raise self._gone()
        if failure := link.send(self._id, message):
            raise self._error(failure)

    def _try_to_send(self, message: bytes) -> None:
        """Send a message that it does not miss if it is gone."""
        with contextlib.suppress(TransferError, DestroyedError):
            self._send_message(message)

    def _error(self, failure: Failure) -> TransferError:
        if failure.gone:
            return self._gone()
        rule = f"failed: NIXL says {failure.said}"
        return TransferError(f"the transfer with peer {self.name!r}", rule)

    def _gone(self) -> TransferError:
        """Forget all about a side that is gone, and return what to raise.

        If it is connected again, it is another one.
        """
        agent = self.agent
        self._blocks_there = self._words_there = None
        if agent._peers.get(self._id) is self:
            agent._lost.add(self._id)
            for known in (agent._peers, agent._inbox, agent._unread):
                known.pop(self._id, None)
        self._looking = None  # which ends it, unless it is what has found out
        rule = (
            "is gone: its process has ended, its agent was closed, or the network failed; connect "
            "to the card of a new agent, or again to this one if it is still there"
        )
        return TransferError(f"peer {self.name!r}", rule, "peer")

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
