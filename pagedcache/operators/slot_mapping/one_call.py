# SPDX-License-Identifier: Apache-2.0
"""Slot mappings as one function."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedcache.arrays.find import library_of
from pagedcache.operators.one_call import Kept
from pagedcache.operators.slot_mapping.descriptor import (
    PageSlots,
    SlotMappingDescriptor,
    checked_numbers,
)
from pagedcache.operators.slot_mapping.info import NAMES, SlotMappingInfo

INT64 = np.dtype(np.int64)


def slot_mapping(
    block_tables: Any,
    query_start_loc: Any,
    positions: Any,
    *,
    block_size: int,
    out: Any = None,
    cp_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    stream: Any = None,
    on_invalid: str = "skip",
) -> Any:
    """Return the slot of each token of a batch, computed where the arrays are.

    Token ``t`` belongs to the request ``r`` for which ``query_start_loc[r] <= t <
    query_start_loc[r + 1]``. The token at position ``p`` of a request is in block
    ``block_tables[r, p // block_size]``, at offset ``p % block_size``; its slot is ``block *
    block_size + offset``.

    Parameters
    ----------
    block_tables : array
        ``[num_requests or more, max_blocks]``, int32 or int64: the blocks of each request.
    query_start_loc : array
        ``[num_requests + 1]``, int32 or int64, never decreasing: where the tokens of each request
        begin, and the number of tokens, which may be less than there are positions. Tokens before
        the first request are padding.
    positions : array
        ``[num_tokens or more]``, int32 or int64. A negative position is padding.
    block_size : int
        Slots in a block, on one rank.
    out : array, optional
        Of any length, int64 or int32: where the slots are put. From the last token to its end it is
        filled with -1, so a graph that was captured for more tokens writes none that are left from
        an earlier step. By default, a new int64 array as long as `positions`.
    cp_size, cp_rank : int
        Ranks of context parallelism, and which of them this is. An entry of a block table is then a
        block on each rank, and together they hold ``cp_size * block_size`` tokens. The slots of
        tokens that another rank holds are -1.
    cp_interleave : int
        How many neighbouring tokens are on one rank before the next has its turn. It must divide
        `block_size`.
    stream : optional
        See `Descriptor.calculate`, where `block_tables` takes the place of `k_cache`.
    on_invalid : {"skip", "raise"}
        The slot of a position that has no block (it is past the block table, the entry is negative,
        or its slot does not fit into `out`) is -1. Nothing past a table is read. ``"raise"``: also
        wait, and raise `InvalidPositionError`. For a report without waiting, use
        `SlotMappingDescriptor` and its `check`.

    Returns
    -------
    array
        `out`.

    Raises
    ------
    PagedCacheError
        Before anything is queued or written, except for a `LaunchError` and, with
        ``on_invalid="raise"``, an `InvalidPositionError`.

    Notes
    -----
    On CUDA this is one launch, queued on the stream, and returns at once. With `out` it allocates
    nothing, so it can be captured, after a first call for arrays of these dtypes and strides, which
    compiles. Any number of threads may call it at the same time.

    The tables, the order of tokens and context parallelism are those of vLLM 0.33
    (``BlockTables.compute_slot_mappings``).

    Examples
    --------
    Two requests: one has four tokens so far and computes the last two; the other begins.

    >>> import numpy as np
    >>> import pagedcache as pc
    >>> block_tables = np.array([[7, 2], [5, -1]], np.int32)
    >>> query_start_loc = np.array([0, 2, 5], np.int32)
    >>> positions = np.array([3, 4, 0, 1, 2])
    >>> pc.slot_mapping(block_tables, query_start_loc, positions, block_size=4).tolist()
    [31, 8, 20, 21, 22]
    """
    sizes = (block_size, cp_size, cp_rank, cp_interleave)
    numbers = checked_numbers(block_tables, query_start_loc, positions, sizes)
    if out is None:
        library = library_of("positions", positions)
        shape = library.read("positions", positions).shape
        out = library.empty("positions", positions, shape, INT64)
    arrays = (block_tables, query_start_loc, positions, out, *numbers)
    options = (on_invalid,)
    if not _kept.run_recent(arrays, options, stream):
        _kept.run(arrays, options, stream)
    return out


def page_slots(
    batch_indices: Any,
    positions: Any,
    kv_indices: Any,
    kv_indptr: Any,
    *,
    page_size: int,
    num_pages: int,
) -> Any:
    """Return the slots of tokens that name their sequence, for tables that follow one another.

    A negative sequence is padding. The slot of a token that has no page is the first one past the
    end of the cache.

    Parameters
    ----------
    batch_indices, positions, kv_indices, kv_indptr : array
        int32 or int64; see `pagedcache.compat.flashinfer.append_paged_kv_cache`.
    page_size, num_pages : int

    Returns
    -------
    array
        int64, as long as `batch_indices`.

    Raises
    ------
    PagedCacheError
        Before anything is queued.
    """
    library = library_of("batch_indices", batch_indices)
    out = library.empty("batch_indices", batch_indices, (len(batch_indices),), INT64)
    numbers = (max(len(kv_indptr) - 1, 0), len(kv_indices), page_size, num_pages)
    arrays = (batch_indices, positions, kv_indices, kv_indptr, out, *numbers)
    if not _kept_pages.run_recent(arrays, (), None):
        _kept_pages.run(arrays, (), None)
    return out


def _create(*arrays_and_options: Any) -> SlotMappingDescriptor:
    *arrays, on_invalid = arrays_and_options
    return SlotMappingDescriptor._create(
        tuple(arrays[: len(NAMES)]),
        SlotMappingInfo.create,
        handle=None,
        on_invalid=on_invalid,
        debug=False,
        reported=False,
    )


_kept = Kept(SlotMappingDescriptor, _create)
_kept_pages = Kept(PageSlots, PageSlots.create)
