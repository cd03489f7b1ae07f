# SPDX-License-Identifier: Apache-2.0
"""Whole sequences from one `KVCache` to another, without the blocks that the other side has.

One side offers a sequence, and holds its blocks. The other side finds what it has, reads the rest,
and says so, which frees the blocks. If the first side stops waiting, it withdraws the offer, and
may use its blocks again at once, although the other side may be reading them. So after the blocks
the other side reads a word in the memory of the first, which a withdrawal clears before anything
else: if the word is still there, all blocks were as they were offered.
"""

from __future__ import annotations

import secrets
from array import array
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.pool import Sequence
from pagedcache.status import BadParamError, BadParamTypeError, shown
from pagedcache.transfer.agent import Agent, Job, Peer
from pagedcache.transfer.card import pack, unpack
from pagedcache.transfer.errors import TransferError, wait_for

if TYPE_CHECKING:
    from pagedcache.kv_cache import KVCache


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

    def __init__(self, agent: Agent, sequence: Sequence, num_written: int) -> None:
        size = _cache_of(agent).block_size
        table = sequence.block_table[: -(-num_written // size)]
        if not agent.free_offers:
            raise BadParamError("agent", "must have fewer offers; withdraw some", "the most")
        self._agent, self._slot = agent, agent.free_offers.pop()
        self._held: Sequence | None = sequence.fork()
        word = secrets.randbits(63) + 1
        self._answer = _answer(word)
        self._taken = False
        agent.offers[self._answer] = self
        self.num_blocks = len(table)
        agent.board[0, self._slot] = word
        header = {
            "agent": agent.id,
            "slot": self._slot,
            "word": word,
            "key": sequence.key.hex(),
            "num_written": num_written,
            "blocks": table,
        }
        tokens = np.asarray(sequence.token_ids, "<i4").tobytes()
        self.message = pack("offer", header, tokens)

    @property
    def done(self) -> bool:
        """Whether the other side has it. It never waits."""
        if self._held is not None:
            self._agent._read_messages()
        return self._taken

    def wait(self, timeout: float | None = None) -> None:
        """Return once the other side has it.

        Parameters
        ----------
        timeout : float, optional
            In seconds. By default, there is none, and one that has died will never take it.

        Raises
        ------
        TransferTimeoutError
            The other side does not have it by then. Wait again, or `withdraw` it.
        TransferError
            It was withdrawn.
        """

        def done() -> bool:
            if not self.done and self._held is None:
                raise TransferError("the offer", "was withdrawn before it was taken", "agent")
            return self._taken

        wait_for(done, timeout, repr(self))

    def withdraw(self) -> None:
        """Let the blocks go. It does nothing if the other side has them already.

        If it is reading them, its `accept` raises `TransferError`.
        """
        if self._held is None:
            return
        # First, since the blocks may be written to as soon as they are free.
        self._agent.board[0, self._slot] = 0
        self._agent.free_offers.append(self._slot)
        del self._agent.offers[self._answer]
        self._held.free()
        self._held = None

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

    def __init__(self, peer: Peer, message: bytes, stream: Any, *, hidden: bool) -> None:
        agent = peer.agent
        cache = _cache_of(agent)
        agent._alive()
        header, body = unpack("offer", "message", message, "Offer.message")
        if header["agent"] != peer.id:
            rule = f"must be an offer of peer {peer.name!r}"
            raise BadParamError("message", rule, f"one of {header['agent'][:-33]!r}")
        agent._advance()
        if not agent.free_words:
            raise BadParamError("agent", "must have fewer arrivals; wait for some", "the most")
        tokens = array("i", np.frombuffer(body, "<i4").tolist())
        sequence = cache.sequence(tokens, key=bytes.fromhex(header["key"]))
        self.peer, self.num_found = peer, sequence.num_cached_tokens
        self._written, self._offer, self._word = (
            header[name] for name in ("num_written", "slot", "word")
        )
        found = self.num_found // cache.block_size
        theirs = header["blocks"][found:]
        mine = sequence.block_table[found : found + len(theirs)]
        self.num_blocks = len(theirs)
        self._sequence: Sequence | None = sequence
        self._hidden, self._arrived = False, False
        self._given_up = False
        try:
            self._job: Job = peer.fetch(theirs, mine, stream=stream)
        except BaseException:
            self._forget()
            raise
        self._place: int | None = agent.free_words.pop()
        self._reads_word = False
        if hidden:
            self._hide()

    @property
    def done(self) -> bool:
        """Whether the sequence is there. It never waits.

        Raises
        ------
        TransferError
            It will not come, and its blocks are free.
        """
        if self._arrived:
            return True
        if self._sequence is None:
            raise self._error()
        try:
            if not self._job.done:
                return False
            agent = self.peer.agent
            assert self._place is not None
            if not self._reads_word:
                agent.board[1, self._place] = 0
                self._reads_word = True
                self._job = self.peer.fetch_word(self._offer, self._place)
                if not self._job.done:
                    return False
            if int(agent.board[1, self._place]) != self._word:
                rule = "has withdrawn its offer, so what arrived may be anything"
                self._job._fail(TransferError(f"peer {self.peer.name!r}", rule, "peer"))
                raise self._error()
        except TransferError:
            self._forget()
            raise
        self._free_place()
        self._sequence.num_cached_tokens = max(self._written, self.num_found)
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
        wait_for(lambda: self.done, timeout, repr(self))
        assert self._sequence is not None
        return self._sequence

    def give_up(self) -> None:
        """Do without the sequence.

        Its blocks are free once nothing can write to them any more: when the transfer has ended or
        the agent is closed. It does nothing once the sequence is there.
        """
        if self._arrived or self._sequence is None:
            return
        self._hide()
        self._given_up = True
        self.peer.agent._given_up.add(self)
        self._let_go()

    def _let_go(self) -> None:
        if self.peer.agent.closed or not self._job._running():
            self.peer.agent._given_up.discard(self)
            self._forget()

    def _hide(self) -> None:
        """Let no other sequence find blocks that are not there yet."""
        assert self._sequence is not None
        if not self._hidden:
            held = self._sequence.fork()
            held.num_cached_tokens = self.num_found
            self._sequence.free(num_written=self.num_found)
            self._sequence, self._hidden = held, True

    def _forget(self) -> None:
        if self._sequence is not None:
            self._sequence.free(num_written=self.num_found)
            self._sequence = None
            self._free_place()

    def _free_place(self) -> None:
        place = getattr(self, "_place", None)
        if place is not None:
            self.peer.agent.free_words.append(place)
            self._place = None

    def _error(self) -> TransferError:
        if self._job.error is not None:
            return self._job.error
        return TransferError("the arrival", "was given up", "agent")

    def _tell(self) -> None:
        """Tell the other side that its blocks may go."""
        nixl = self.peer.agent._alive()
        try:
            nixl.send_notif(self.peer.id, _answer(self._word))
        except Exception:
            return  # the other side is gone by now; all blocks are here

    def __repr__(self) -> str:
        state = "there" if self._arrived else "gone" if self._sequence is None else "on its way"
        return (
            f"<Arrival from peer {self.peer.name!r}: {self.num_blocks} blocks, and "
            f"{self.num_found} tokens that were here, {state}>"
        )


def offer(
    agent: Agent, sequence: Sequence, *, num_written: int | None = None, stream: Any = None
) -> Offer:
    """Offer a sequence to another side.

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
    cache = _cache_of(agent)
    agent._alive()
    if not isinstance(sequence, Sequence):
        raise BadParamTypeError("sequence", "must be a Sequence", shown(sequence))
    if sequence.pool is not cache.pool:
        raise BadParamError("sequence", "must be one of the cache of agent", shown(sequence))
    num_tokens = sequence.num_tokens
    written = num_tokens if num_written is None else num_written
    if not isinstance(written, (int, np.integer)) or not 0 <= written <= num_tokens:
        rule = f"must be from 0 to the number of tokens, {num_tokens}"
        raise BadParamError("num_written", rule, shown(num_written))
    agent._wait_for_stream(stream)
    return Offer(agent, sequence, int(written))


def receive(peer: Peer, message: bytes, *, stream: Any = None) -> Arrival:
    """Take a sequence that the other side offers, and do not wait for it.

    The pool gives it blocks, all at once; those whose tokens are found here are shared, and the
    others are read from the other side. Other sequences do not find its new blocks, neither before
    they are there nor later.

    Parameters
    ----------
    peer : Peer
        Of an agent of a `KVCache`.
    message : bytes
        `Offer.message` of the other side.
    stream : optional
        See `Peer.fetch`.

    Returns
    -------
    Arrival

    Raises
    ------
    PoolExhaustedError
        There are too few free blocks. Nothing was changed, and the offer still stands.
    TransferError
        The other side is gone.
    """
    return Arrival(peer, message, stream, hidden=True)


def accept(
    peer: Peer, message: bytes, *, timeout: float | None = None, stream: Any = None
) -> Sequence:
    """Take a sequence that the other side offers, and return it once it is there.

    Other sequences find its blocks then.

    Parameters
    ----------
    peer, message, stream
        As in `receive`.
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
        It is not there by then, and was given up: see `Arrival.give_up`. The offer still stands.
    TransferError
        The other side has withdrawn it or is gone. Its blocks are free.
    """
    arrival = Arrival(peer, message, stream, hidden=False)
    try:
        return arrival.wait(timeout)
    except BaseException:  # too late, or interrupted
        arrival.give_up()
        raise


def _answer(word: int) -> bytes:
    return f"pagedcache taken {word}".encode()


def _cache_of(agent: Agent) -> KVCache:
    if not isinstance(agent, Agent):
        raise BadParamTypeError("agent", "must be an Agent", shown(agent))
    if agent.cache is None:
        rule = "must be of a KVCache, which knows its sequences"
        raise BadParamError("agent", rule, repr(agent))
    return agent.cache
