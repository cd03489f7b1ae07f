# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks as functions."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from pagedcache.arrays.find import adopt
from pagedcache.locks import make_lock
from pagedcache.operators.blocks.descriptor import BlockDescriptor, BlockOperation

MOST_KEPT = 64


def copy_blocks(
    sources: Any, targets: Any, pairs: Any, *, stream: Any = None, on_invalid: str = "skip"
) -> None:
    """Copy blocks of some arrays to blocks of others, or within them, in all arrays at once.

    Block ``pairs[i, 0]`` of each source is copied to block ``pairs[i, 1]`` of its target. Where
    sources and targets are the same arrays, pairs may depend on each other: each target gets what
    its source was before the call.

    Parameters
    ----------
    sources, targets : list of array
        See `BlockDescriptor.create`. Pass the same list for a copy within.
    pairs : sequence of (int, int), or array
        ``[n, 2]``, ints. On the host, they are checked: a block that does not exist or a target
        that occurs twice is refused, and nothing is copied. In the memory of the GPU that does the
        work, contiguous int32 or int64, they cannot be: such a pair is not copied (of those with
        one target the first is), and a pair with a negative entry is padding.
    stream : optional
        See `Descriptor.calculate`, where the first target takes the place of `k_cache`, or the
        first source, if the targets are in host memory.
    on_invalid : {"skip", "raise"}
        What to do about pairs in the memory of a GPU that cannot be copied. ``"raise"``: wait, and
        raise. For a report without waiting, use a `BlockDescriptor` and its `check`.

    Raises
    ------
    InvalidBlockError, DuplicateBlockError
        See above.
    PagedCacheError
        An array cannot be used. Nothing is queued or written.

    Notes
    -----
    On a GPU this is one launch, queued on the stream, and returns at once. It needs no memory for
    the blocks; more than 448 pairs on the host are first copied to the device. It can be captured
    after a first call for these arrays, except for so many pairs on the host.

    Between a GPU and pinned host memory, runs of neighbouring blocks are joined, and are copied
    either in one batch by the copy engines (CUDA 12.8 and newer), or by a kernel that reaches host
    memory, whichever was faster for runs of such a size when that was measured: once for a GPU and
    a direction, by the first such copy, which waits for it (some hundredths of a second). Wait for
    the stream before the host reads what was copied, or changes what is being copied.

    The 64 lists of arrays that were used most recently are remembered. For the least time of the
    host, keep a `BlockDescriptor`.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> k, v = np.arange(4.0).reshape(4, 1), np.arange(4.0).reshape(4, 1) * 10
    >>> pc.copy_blocks([k, v], [k, v], [(0, 1), (1, 2)])
    >>> k.ravel().tolist(), v.ravel().tolist()
    ([0.0, 0.0, 1.0, 3.0], [0.0, 0.0, 10.0, 30.0])
    """
    _descriptor(sources, targets, on_invalid).copy(pairs, stream=stream)


def zero_blocks(caches: Any, blocks: Any, *, stream: Any = None, on_invalid: str = "skip") -> None:
    """Fill blocks with zeros, in all arrays at once.

    Memory that was never written may hold NaN, which some attention kernels spread from slots that
    they mask; so fill a block before it is used for the first time.

    Parameters
    ----------
    caches : list of array
        See `BlockDescriptor.create`, where they are the targets.
    blocks : sequence of int, or array
        ``[n]``. On the host, they are checked; in the memory of the GPU, those that do not exist
        are not filled, and negative ones are padding.
    stream, on_invalid : optional
        See `copy_blocks`.

    Raises
    ------
    InvalidBlockError
        A block does not exist.
    PagedCacheError
        An array cannot be used. Nothing is queued or written.

    Notes
    -----
    See `copy_blocks`.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> k = np.ones((4, 2))
    >>> pc.zero_blocks([k], [3, 1])
    >>> k[:, 0].tolist()
    [1.0, 0.0, 1.0, 0.0]
    """
    names = "caches", "caches"
    _descriptor(caches, caches, on_invalid, names).zero(blocks, stream=stream)


_kept: dict[Hashable, BlockOperation] = {}  # the least recently used first
_lock = make_lock()


def _descriptor(
    sources: Any,
    targets: Any,
    on_invalid: str,
    names: tuple[str, str] = ("sources", "targets"),
) -> BlockDescriptor:
    """Return a descriptor for this call, with an operation that was used before if there is one."""
    if not all(isinstance(each, (list, tuple)) for each in (sources, targets)):
        made = BlockOperation(sources, targets, on_invalid, names=names)
        return BlockDescriptor(made, sources, targets)
    read = [adopt(f"{names[0]}[{i}]", array) for i, array in enumerate(sources)]
    if targets is not sources:
        read += [adopt(f"{names[1]}[{i}]", array) for i, array in enumerate(targets)]
    key = (len(sources), targets is sources, str(on_invalid), *read)
    with _lock:
        operation = _kept.pop(key, None)
    if operation is None:
        operation = BlockOperation(sources, targets, on_invalid, read=False, names=names)
    with _lock:
        _kept[key] = operation
        if len(_kept) > MOST_KEPT:
            del _kept[next(iter(_kept))]
    return BlockDescriptor(operation, sources, targets)
