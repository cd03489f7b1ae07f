# SPDX-License-Identifier: Apache-2.0
"""Whole sequences from one `KVCache` to another, without the blocks that the other side has.

One side offers a sequence, and holds its blocks. The other side finds what it has, reads the rest,
and says so, which frees the blocks. If the first side stops waiting, it withdraws the offer, and
may use its blocks again at once, although the other side may be reading them. So after the blocks
the other side reads a word on the board of the first, which a withdrawal clears before anything
else: if the word is still there, all blocks were as they were offered.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.pool import Sequence
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    PoolExhaustedError,
    as_int,
    shown,
)
from pagedcache.transfer.agent import Agent
from pagedcache.transfer.card import from_bytes, to_bytes
from pagedcache.transfer.errors import (
    TransferError,
    TransferTimeoutError,
    check_timeout,
    wait_for,
)
from pagedcache.transfer.peer import Peer

if TYPE_CHECKING:
    from pagedcache.kv_cache import KVCache
    from pagedcache.tensors import Array
    from pagedcache.transfer.jobs import Job, Steps


class Offer:
    """A sequence that another side may take. `offer` makes it.

    It holds the blocks until the other side has them, or until it is withdrawn, as it is at the end
    of a ``with`` block. The sequence may be appended to and freed in the meantime.

    Attributes
    ----------
    message : bytes
        For `accept` on the other side.
    num_blocks : int
        Blocks that are offered.
    """

    def __init__(
        self,
        agent: Agent,
        sequence: Sequence,
        num_written: int | None,
        stream: Any,
        peer: Peer | None,
    ) -> None:
        cache = _cache_of(agent)
        agent._alive()
        if not isinstance(sequence, Sequence):
            raise BadParamTypeError("sequence", "must be a Sequence", shown(sequence))
        if sequence.pool is not cache.pool:
            raise BadParamError("sequence", "must be one of the cache of agent", shown(sequence))
        count = sequence.num_tokens
        if num_written is not None:
            rule = "the number of tokens, "
            count = as_int("num_written", num_written, 0, count, rule)
        agent._wait_for_writes(stream)
        table = sequence.block_table[: -(-count // cache.block_size)]
        self._agent, self._peer, self._grant = agent, peer, agent._board.grant()
        self._held: Sequence | None = sequence.fork()
        self._answer = _answer(self._grant.word)
        self._taken = False
        agent._open_offers[self._answer] = self
        self.num_blocks = len(table)
        header = {
            "agent": agent._id,
            "grant": self._grant,
            "key": sequence.key.hex(),
            "num_written": count,
            "blocks": table,
        }
        tokens = np.asarray(sequence.token_ids, "<i4").tobytes()
        self.message = to_bytes("offer", header, tokens)

    @property
    def done(self) -> bool:
        """Whether the other side has it. It does not wait for that; see `Job.done`.

        Raises
        ------
        TransferError
            The side that it was handed over to is gone. Its blocks are held until `withdraw`.
        """
        if self._held is not None:
            self._agent.progress()
        if self._held is not None and self._peer is not None:
            self._peer._look()
        return self._taken

    def wait(self, timeout: float | None = None) -> None:
        """Return once the other side has it.

        Parameters
        ----------
        timeout : float, optional
            In seconds. By default, there is none. A side that has died is noticed if it was handed
            over to it; a message of `offer` may be with anyone.

        Raises
        ------
        TransferTimeoutError
            The other side does not have it by then. Wait again, or `withdraw` it.
        TransferError
            It was withdrawn, or the other side is gone.
        """

        def done() -> bool:
            if not self.done and self._held is None:
                raise TransferError("the offer", "was withdrawn before it was taken", "agent")
            return self._taken

        wait_for(done, timeout, repr(self), self._agent._pause)

    def withdraw(self) -> None:
        """Let the blocks go. It does nothing if the other side has them already.

        If it is reading them, its `accept` raises `TransferError`.
        """
        if self._held is None:
            return
        # First, since the blocks may be written to as soon as they are free.
        self._agent._board.revoke(self._grant)
        self._agent._open_offers.pop(self._answer, None)
        if not self._held.freed:
            self._held.free()
        self._held = None
        if self._peer is not None:  # also if it was taken: its message may come after that
            self._peer._try_to_send(b"pagedcache withdrawn %d" % self._grant.word)

    def _take(self) -> None:
        self._taken = True
        self.withdraw()

    def __enter__(self) -> Offer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.withdraw()

    def __repr__(self) -> str:
        state = "taken" if self._taken else "open" if self._held is not None else "withdrawn"
        return f"<Offer of {self.num_blocks} blocks, {state}>"


class Arrival:
    """A sequence on its way to this side. `receive` makes it.

    Attributes
    ----------
    peer : Peer
    num_found : int
        How many of its tokens were in the cache already.
    num_blocks : int
        How many blocks are fetched.
    """

    def __init__(self, peer: Peer, message: bytes, stream: Any) -> None:
        agent = peer.agent
        cache = _cache_of(agent)
        agent._alive()
        header, body = from_bytes("offer", "message", message, "Offer.message")
        if header["agent"] != peer._id:
            rule = f"must be an offer of peer {peer.name!r}"
            raise BadParamError("message", rule, f"one of {header['agent'][:-33]!r}")
        agent.progress()
        self.peer, self.num_found = peer, 0
        self._written, self._grant = header["num_written"], header["grant"]
        self._arrived = self._given_up = False
        self._sequence: Sequence | None = None
        self._job: Job | None = None
        tokens = array("i", np.frombuffer(body, "<i4").tolist())
        key, blocks = bytes.fromhex(header["key"]), header["blocks"]
        try:
            self._sequence = sequence = cache.sequence(tokens, key=key, publish=False)
            self.num_found = sequence.num_cached_tokens
            found = self.num_found // cache.block_size
            theirs = blocks[found:]
            mine = sequence.block_table[found : found + len(theirs)]
            self.num_blocks = len(theirs)
            self._job = peer._job(self._steps(np.array(mine), np.array(theirs)), len(mine))
            agent._wait_for_writes(stream)
            self._job._step()
            if self._job.error is not None:
                raise self._job.error
        except BaseException:
            self.give_up()
            raise

    def _steps(self, mine: Array, theirs: Array) -> Steps:
        if len(mine):
            yield from self.peer._read_blocks(mine, theirs)
        if not (yield from self.peer._is_granted(*self._grant)):
            rule = "has withdrawn its offer, so what arrived may be anything"
            raise TransferError(f"peer {self.peer.name!r}", rule, "peer")

    @property
    def done(self) -> bool:
        """Whether the sequence is there. It does not wait for it; see `Job.done`.

        Raises
        ------
        TransferError
            It will not come. Its blocks are free, or as `give_up` says.
        """
        if self._arrived:
            return True
        if self._given_up:
            raise self._error()
        try:
            if self._job is None or not self._job.done:
                return False
        except BaseException:
            self.give_up()
            raise
        assert self._sequence is not None
        self._sequence.num_cached_tokens = max(self._written, self.num_found)
        size = self._sequence.pool.block_size
        if self._written // size >= self._sequence.num_tokens // size:
            self._sequence.publish()
        self._arrived = True
        self._tell()
        return True

    def wait(self, timeout: float | None = None) -> Sequence:
        """Return the sequence once it is there.

        Parameters
        ----------
        timeout : float, optional
            In seconds. By default, there is none; see `Job.wait`.

        Returns
        -------
        Sequence
            Its `num_cached_tokens` is how many of its tokens have their K and V here.

        Raises
        ------
        TransferTimeoutError
            It is not there by then. Wait again, or `give_up`.
        TransferError
            It will not come: the other side has withdrawn it or is gone. Its blocks are free.
        """
        wait_for(lambda: self.done, timeout, repr(self), self.peer.agent._pause)
        assert self._sequence is not None
        return self._sequence

    def give_up(self) -> None:
        """Do without the sequence.

        Its blocks are free once nothing can write to them any more: when the transfer has ended or
        the agent is closed. It does nothing once the sequence is there.
        """
        if self._arrived or self._given_up:
            return
        self._given_up = True
        self.peer.agent._given_up.add(self)
        self._let_go()

    def _let_go(self) -> None:
        if self.peer.agent.closed or self._job is None or not self._job._running():
            self.peer.agent._given_up.discard(self)
            self._forget()

    def _forget(self) -> None:
        if self._sequence is not None:
            self._sequence.free(num_written=self.num_found)
            self._sequence = None

    def _error(self) -> Exception:
        if self._job is not None and self._job.error is not None:
            return self._job.error
        return TransferError("the arrival", "was given up", "agent")

    def _tell(self) -> None:
        """Tell the other side that its blocks may go, and forget that it had handed them over."""
        self.peer.agent._inbox.get(self.peer._id, {}).pop(b"%d" % self._grant[1], None)
        # If that fails, it is gone by now, and all blocks are here.
        self.peer._try_to_send(_answer(self._grant[1]))

    def __repr__(self) -> str:
        state = "there" if self._arrived else "given up" if self._given_up else "on its way"
        return (
            f"<Arrival from peer {self.peer.name!r}: {self.num_blocks} blocks, and "
            f"{self.num_found} tokens that were here, {state}>"
        )


def offer(
    agent: Agent,
    sequence: Sequence,
    *,
    num_written: int | None = None,
    stream: Any = None,
) -> Offer:
    """Offer a sequence to any side that is given the message.

    Parameters
    ----------
    agent : Agent
        Of a `KVCache`.
    sequence : Sequence
        Of that cache. It may be appended to and freed at once; the offer holds its blocks.
    num_written : int, optional
        How many of its tokens, from the front, have their K and V in the cache. By default, all.
    stream : optional
        The stream of the writes. The call waits for all that is queued on it; see `Peer.send`.

    Returns
    -------
    Offer
        Send its `message` to a process that has the card of this agent.

    Raises
    ------
    PagedCacheError
    """
    return Offer(agent, sequence, num_written, stream, None)


def receive(peer: Peer, message: bytes | None = None, *, stream: Any = None) -> Arrival | None:
    """Take a sequence that the other side offers, and do not wait for it.

    The pool gives it blocks, all at once; those whose tokens are found here are shared, and the
    others are read from the other side. Other sequences find its new blocks once they are there; if
    full blocks were not all written over there, once you have written the rest and call
    `Sequence.publish`.

    Parameters
    ----------
    peer : Peer
        Of an agent of a `KVCache`.
    message : bytes, optional
        `Offer.message` of the other side. By default, the next sequence that it has handed over,
        see `KVCache.send`.
    stream : optional
        See `Peer.fetch`.

    Returns
    -------
    Arrival or None
        None if no message is given, and nothing was handed over that has not been taken.

    Raises
    ------
    PoolExhaustedError
        There are too few free blocks. Nothing was changed, and the offer still stands.
    TransferError
        The other side is gone.
    """
    _cache_of(_check_peer(peer).agent)
    if message is not None:
        return Arrival(peer, message, stream)
    peer.agent.progress()
    if not peer.agent._inbox.get(peer._id):
        peer._look()
        return None
    with _next_of(peer) as offered:
        return Arrival(peer, offered, stream)


def accept(
    peer: Peer,
    message: bytes | None = None,
    *,
    timeout: float | None = None,
    stream: Any = None,
) -> Sequence:
    """Take a sequence that the other side offers, and return it once it is there.

    Parameters
    ----------
    peer, message, stream
        As in `receive`, except that this waits until a sequence is handed over.
    timeout : float, optional
        In seconds. By default, there is none; see `Job.wait`.

    Returns
    -------
    Sequence
        Its `num_cached_tokens` is how many of its tokens have their K and V here.

    Raises
    ------
    PoolExhaustedError
        There are too few free blocks. Nothing was changed, and the offer still stands.
    TransferTimeoutError
        Nothing was handed over by then; or it is not there by then, and was given up: see
        `Arrival.give_up`. The offer still stands.
    TransferError
        The other side has withdrawn it or is gone. Its blocks are free.
    """
    timeout = check_timeout(timeout)
    end = None if timeout is None else time.monotonic() + timeout
    agent = _check_peer(peer).agent
    _cache_of(agent)
    if message is None:

        def come() -> bool:
            agent.progress()
            peer._look()
            return bool(agent._inbox.get(peer._id))

        rule = "has handed over no sequence within {:g} s"
        wait_for(come, timeout, f"peer {peer.name!r}", agent._pause, rule)
    with nullcontext(message) if message is not None else _next_of(peer) as offered:
        arrival = Arrival(peer, offered, stream)
        try:
            return arrival.wait(None if end is None else max(end - time.monotonic(), 0))
        except BaseException:
            arrival.give_up()
            if arrival._arrived and arrival._sequence is not None:  # interrupted at the last moment
                arrival._sequence.free()
            raise


@contextmanager
def _next_of(peer: Peer) -> Iterator[bytes]:
    """Take the first message of a side, and keep it for another time if it still stands."""
    waiting = peer.agent._inbox[peer._id]
    word = next(iter(waiting))
    try:
        yield waiting[word]
    except PoolExhaustedError as error:
        if error.needed > _cache_of(peer.agent).num_blocks:  # it will never fit
            waiting.pop(word, None)
        raise
    except (TransferTimeoutError, KeyboardInterrupt):
        raise
    except BaseException:
        waiting.pop(word, None)
        raise
    waiting.pop(word, None)


def _check_peer(peer: object) -> Peer:
    if not isinstance(peer, Peer):
        rule = "must be a Peer, which Agent.connect returns"
        raise BadParamTypeError("peer", rule, shown(peer))
    return peer


def _answer(word: int) -> bytes:
    return f"pagedcache taken {word}".encode()


def _cache_of(agent: Agent) -> KVCache:
    if not isinstance(agent, Agent):
        raise BadParamTypeError("agent", "must be an Agent", shown(agent))
    if agent.cache is None:
        rule = "must be of a KVCache, which knows its sequences"
        raise BadParamError("agent", rule, repr(agent))
    return agent.cache
