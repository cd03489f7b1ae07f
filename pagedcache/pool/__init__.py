# SPDX-License-Identifier: Apache-2.0
"""Which block holds which tokens: a pool of blocks, block tables, prefixes that are found again.

- `tokens`: token ids of any kind, as int32
- `hashes`: what a block is found by
- `prefixes`: which blocks can be found
- `events`: what happened to blocks
- `statistics`: what a pool counts
- `picture`: a pool as a grid
- `sequence`: tokens, and the blocks that hold them
- `blocks`: the pool
- `log`: events with their times, and the pool that they describe

It computes numbers and touches no array: it needs nothing but the standard library.
"""

from pagedcache.pool.blocks import BlockPool
from pagedcache.pool.events import (
    AllBlocksCleared,
    BlockCopied,
    BlockMoved,
    BlockRemoved,
    BlocksReleased,
    BlocksShared,
    BlocksTaken,
    BlockStored,
    CopiesDropped,
    CopiesTaken,
    Event,
    PoolState,
    TokensAppended,
)
from pagedcache.pool.log import EventLog, Occupancy
from pagedcache.pool.sequence import Sequence
from pagedcache.pool.statistics import PoolStatistics

__all__ = [
    "AllBlocksCleared",
    "BlockCopied",
    "BlockMoved",
    "BlockPool",
    "BlockRemoved",
    "BlockStored",
    "BlocksReleased",
    "BlocksShared",
    "BlocksTaken",
    "CopiesDropped",
    "CopiesTaken",
    "Event",
    "EventLog",
    "Occupancy",
    "PoolState",
    "PoolStatistics",
    "Sequence",
    "TokensAppended",
]
