# SPDX-License-Identifier: Apache-2.0
"""Blocks of a cache to and from other processes and hosts, with NVIDIA's NIXL.

- `errors`: what can go wrong on the way
- `card`: what one side must know of the other, as bytes
- `board`: words by which one side lets others use its memory
- `link`: NIXL, as one side uses it
- `jobs`: `Job`, blocks on their way
- `packing`: blocks in short runs, which both sides pack and unpack
- `peer`: `Peer`, the other side
- `agent`: `Agent`, which other sides connect to
- `handover`: whole sequences, without the blocks that the other side has

NIXL is imported when an agent is made. Without PyTorch, install it with ``pip install --no-deps
nixl nixl-cu12``. The guide is ``docs/howto/two_hosts.md``.
"""

from pagedcache.transfer.agent import Agent
from pagedcache.transfer.errors import TransferError, TransferTimeoutError
from pagedcache.transfer.handover import Arrival, Offer, accept, offer, receive
from pagedcache.transfer.jobs import Job
from pagedcache.transfer.peer import Peer

__all__ = [
    "Agent",
    "Arrival",
    "Job",
    "Offer",
    "Peer",
    "TransferError",
    "TransferTimeoutError",
    "accept",
    "offer",
    "receive",
]
