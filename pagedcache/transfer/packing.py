# SPDX-License-Identifier: Apache-2.0
"""Blocks that are scattered in short runs: packed, read by the other side, and unpacked there.

A transfer of each run would crawl, and the side that does nothing can neither pack nor unpack. So
both work. The side that has the blocks packs some into its staging memory, and says so; the other
one reads them into its own, unpacks them, and says so. To fetch is to ask for that.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.arrays.find import adopt
from pagedcache.arrays.memory import memory_like
from pagedcache.operators.blocks.descriptor import BlockDescriptor
from pagedcache.status import BadParamError, shown
from pagedcache.transfer.card import from_bytes, to_bytes
from pagedcache.transfer.errors import TransferError

if TYPE_CHECKING:
    from pagedcache.tensors import Array
    from pagedcache.transfer.agent import Agent
    from pagedcache.transfer.jobs import Steps
    from pagedcache.transfer.peer import Peer

STAGING = 32 << 20  # bytes at most, once for blocks that go and once for those that come
REGIONS = 4  # of each of them, so that one is packed while another is on its way
PROBE = 0.5  # seconds without a word from the other side, before it is asked whether it is there
# How messages begin that must not be read twice: the same blocks would count twice.
ONCE = tuple(f"pagedcache {kind} ".encode() for kind in ("blocks", "want", "got", "failed"))
_ALIGNMENT = 16  # bytes, of the parts of a packed block


class Staging:
    """Memory with packed blocks, and what packs and unpacks them.

    Attributes
    ----------
    block_bytes : int
        Of a packed block.
    count : int
        How many there is room for, in each direction.
    room : int
        Packed blocks in a region, which is contiguous and moves in one transfer.
    going, coming : int
        Addresses.
    free_going, free_coming : list of int
        The first slots of free regions.
    ranges : list of (int, int)
        Address and bytes of this memory.
    """

    def __init__(self, arrays: list[Any], device: str) -> None:
        tensors = [adopt(f"caches[{i}]", array) for i, array in enumerate(arrays)]
        sizes = [math.prod(each.shape[1:]) * each.dtype.itemsize for each in tensors]
        parts = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
        self.block_bytes = sum(parts)
        count = max(1, min(STAGING // self.block_bytes, tensors[0].shape[0]))
        self.room = -(-count // REGIONS)
        self.count = -(-count // self.room) * self.room
        memory = memory_like(arrays, device)
        self._kept, views, self.ranges = [], [], []
        for _ in range(2):
            whole = memory.zeros(self.block_bytes * self.count)
            self._kept.append(whole)
            self.ranges.append((adopt("staging", whole).address, self.block_bytes * self.count))
            rows = []
            for tensor, at in zip(tensors, itertools.accumulate(parts, initial=0), strict=False):
                inner = [math.prod(tensor.shape[i + 1 :]) for i in range(1, len(tensor.shape))]
                steps = [self.block_bytes, *(each * tensor.dtype.itemsize for each in inner)]
                shape = (self.count, *tensor.shape[1:])
                rows.append(memory.part(whole, tensor.dtype, shape, tuple(steps), at))
            views.append(rows)
        (self.going, _), (self.coming, _) = self.ranges
        self.pack = BlockDescriptor.create(arrays, views[0]).copy
        self.unpack = BlockDescriptor.create(views[1], arrays).copy
        regions = range(0, self.count, self.room)
        self.free_going, self.free_coming = [*regions], [*regions]


class Push:
    """Blocks of this side that the other one takes.

    Attributes
    ----------
    left : int
        Blocks that the other side has not confirmed.
    failed : bool
        Whether it cannot take them.
    """

    def __init__(self, peer: Peer, here: Array, there: Array, wanted_by: int | None) -> None:
        self.peer, self.left, self.failed = peer, len(here), False
        self._here, self._there, self._wanted_by = here, there, wanted_by
        self._regions: dict[int, int] = {}  # by their first slots: blocks that were not read yet

    def steps(self) -> Steps:
        """Pack, tell, and wait until all were taken."""
        agent, peer = self.peer.agent, self.peer
        staging = agent._staging
        assert staging is not None
        number, grant = -1, None
        sent = 0
        packing: deque[tuple[Callable[[], bool], Array]] = deque()
        patience = Patience(peer)
        try:
            number, grant = agent._number(self), agent._board.grant()
            while self.left:
                if sent < len(self._here) and staging.free_going:
                    here, there = (
                        each[sent:][: staging.room] for each in (self._here, self._there)
                    )
                    first = staging.free_going.pop()
                    self._regions[first] = len(here)
                    slots = first + np.arange(len(here))
                    staging.pack(np.stack([here, slots], 1), stream=agent._stream)
                    packing.append((agent._device.mark(agent._stream), np.stack([slots, there])))
                    sent += len(here)
                while packing and packing[0][0]():
                    header = {"push": number, "for": self._wanted_by, "grant": grant}
                    peer._tell("blocks", header, packing.popleft()[1])
                yield from patience.steps(self.left)
                if self.failed:
                    rule = "could not take the blocks"
                    raise TransferError(f"peer {peer.name!r}", rule, "peer")
        finally:
            # What the other side may still read of them it does not use: the grant is looked at
            # afterwards.
            if grant is not None:
                agent._board.revoke(grant)
            staging.free_going += self._regions
            agent._numbered.pop(number, None)
            if self.left and self._wanted_by is not None and not self.failed:
                message = message_of("failed", {"want": self._wanted_by}, self._here[:0])
                peer._try_to_send(message)

    def taken(self, slot: int, count: int) -> None:
        """Note that the other side has read some blocks of a region."""
        staging = self.peer.agent._staging
        assert staging is not None
        first = slot - slot % staging.room
        if self._regions.get(first, 0) < count:
            return
        self.left -= count
        self._regions[first] -= count
        if not self._regions[first]:
            del self._regions[first]
            staging.free_going.append(first)


class Want:
    """Blocks that this side has asked for.

    Attributes
    ----------
    left : int
        Blocks that have not come.
    taking : int
        How many parts are being taken.
    error : TransferError or None
        Why the rest will not come.
    """

    def __init__(self, peer: Peer, here: Array, there: Array) -> None:
        self.peer, self.left, self.taking = peer, len(here), 0
        self.error: TransferError | None = None
        self._here, self._there = here, there

    def steps(self) -> Steps:
        """Ask, and wait until all are there."""
        agent = self.peer.agent
        number = agent._number(self)
        patience = Patience(self.peer)
        try:
            self.peer._tell("want", {"want": number}, np.stack([self._there, self._here]))
            while self.left > 0:
                yield from patience.steps(self.left)
                if self.error is not None and not self.taking:  # nothing is being written
                    raise self.error
        finally:
            del agent._numbered[number]


def take(peer: Peer, header: dict[str, Any], slots: Array, targets: Array) -> Steps:
    """Read what the other side has packed, unpack it, and say so."""
    agent = peer.agent
    staging = agent._staging
    assert staging is not None
    number = header["for"]
    want = agent._numbered.get(number)

    def wanted() -> bool:
        """Return whether the blocks may still be written to."""
        if number is None:
            return True
        return isinstance(want, Want) and want.error is None and agent._numbered.get(number) is want

    failed = TransferError(f"peer {peer.name!r}", "has given up what it was asked for", "peer")
    counted = False
    try:
        if isinstance(want, Want):
            want.taking, counted = want.taking + 1, True
        while len(slots):
            if not wanted() or (isinstance(want, Want) and want.peer is not peer):
                raise TransferError("blocks", "that nobody waits for")
            if not staging.free_coming:
                yield
                continue
            first = staging.free_coming.pop()
            count = min(len(slots), staging.room)
            here = first + np.arange(count)
            try:
                yield from peer._move("READ", here, slots[:count])
                if not (yield from peer._is_granted(*header["grant"])):
                    raise failed
                if not wanted():
                    raise TransferError("blocks", "that nobody waits for any more")
                staging.unpack(np.stack([here, targets[:count]], 1), stream=agent._stream)
                unpacked = agent._device.mark(agent._stream)
                while not unpacked():
                    yield
            except Exception:
                staging.free_coming.append(first)
                raise
            except BaseException:  # an interruption, so it may still be read to
                agent._free_later(functools.partial(staging.free_coming.append, first))
                raise
            staging.free_coming.append(first)
            if isinstance(want, Want):
                want.left -= count
            peer._tell("got", {"push": header["push"], "count": count}, slots[:1])
            slots, targets = slots[count:], targets[count:]
    except TransferError as error:
        failed = error
        raise
    except GeneratorExit:
        raise
    except BaseException as error:
        rule = f"could not take the blocks: {shown(error)}"
        failed = TransferError(f"agent {agent.name!r}", rule, "agent")
        raise
    finally:
        if isinstance(want, Want):
            want.taking -= counted
            if len(slots):
                want.error = want.error or failed
        if len(slots) and not agent.closed:
            peer._try_to_send(message_of("failed", {"push": header["push"]}, slots[:0]))


class Patience:
    """Waits for the other side, and asks whether it is there if nothing happens for a while."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._left, self._since = -1, 0.0

    def steps(self, left: int) -> Steps:
        """Let others work once, and ask if it is time.

        Parameters
        ----------
        left : int
            What changes whenever something has happened.

        Raises
        ------
        TransferError
            It is gone.
        """
        if left != self._left:
            self._left, self._since = left, time.monotonic()
        yield
        if time.monotonic() - self._since > PROBE:
            yield from self._peer._must_be_there()
            self._since = time.monotonic()


def read_message(agent: Agent, peer: Peer, message: bytes) -> None:
    """Do what the other side asks, or note what it says."""
    kind = message.split(b" ", 2)[1].decode()
    header, body = from_bytes(kind, "message", message, "another agent")
    blocks: Array = np.frombuffer(body, "<i4").astype(np.int64)
    if kind == "failed" and "want" in header:
        want = agent._numbered.get(header["want"])
        if isinstance(want, Want) and want.peer is peer:
            rule = "could not send the blocks"
            want.error = want.error or TransferError(f"peer {peer.name!r}", rule, "peer")
        return
    if kind in ("got", "failed"):
        push = agent._numbered.get(header["push"])
        if isinstance(push, Push) and push.peer is peer:
            if kind == "got":
                push.taken(int(blocks[0]), int(header["count"]))
            else:
                push.failed = True
        return
    first, second = blocks.reshape(2, -1)
    # A side of another version, or none of ours, must not reach other memory.
    limits = (peer._pieces, agent.num_blocks)
    if kind == "want":
        limits = (agent.num_blocks, peer.num_blocks)
    for each, limit in zip((first, second), limits, strict=True):
        if each.size and not 0 <= each.min() <= each.max() < limit:
            raise BadParamError("message", "must name blocks that exist", kind)
    if kind == "want":
        agent._serving.append(Push(peer, first, second, int(header["want"])).steps())
    else:
        agent._serving.append(take(peer, header, first, second))


def message_of(kind: str, header: dict[str, Any], blocks: Array) -> bytes:
    """Return a message for the other side."""
    return to_bytes(kind, header, blocks.astype("<i4").tobytes())
