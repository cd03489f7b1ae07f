# SPDX-License-Identifier: Apache-2.0
"""Rows of a paged cache in NumPy: the specification of how they are converted.

Every operation is one of IEEE float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.backend.protocol import Invalid
from pagedcache.cache.formats import FORMATS
from pagedcache.cache.scales import computed
from pagedcache.dtypes import F32, Dtype
from pagedcache.status import NotSupportedError
from pagedcache.tensors import Array, view

if TYPE_CHECKING:
    from pagedcache.cache.sides import Side

_MOST_ROW = 2**31 - 1  # bytes of a NumPy element
_AT_A_TIME = 1 << 16  # elements that are converted, so that they stay in a cache of the processor


def read_slots(
    at: int, dtype: Dtype, tokens: int, num_slots: int
) -> tuple[Array, Array, Invalid | None]:
    """Return slots as int64, which of them are valid, and what there is to report about others."""
    # A copy, since another thread may change them between two reads.
    slots = view(at, dtype, (tokens,), (dtype.itemsize,)).astype(np.int64)
    outside = slots >= num_slots
    valid = (slots >= 0) & ~outside
    if not outside.any():
        return slots, valid, None
    token = int(outside.argmax())
    return slots, valid, Invalid(int(outside.sum()), token, int(slots[token]))


def rows_of(
    side: Side, dtype: Dtype, num_blocks: int, block_size: int, num_kv_heads: int
) -> CopiedRows | ConvertedRows:
    """Return how K or V is written and read; see `ConvertedRows`."""
    kind = CopiedRows if side.copies(dtype) else ConvertedRows
    return kind(side, dtype, num_blocks, block_size, num_kv_heads)


class CopiedRows:
    """K or V, if the cache holds the bits of the rows by token. See `ConvertedRows`."""

    def __init__(
        self, side: Side, dtype: Dtype, num_blocks: int, block_size: int, num_kv_heads: int
    ) -> None:
        # A row of bytes is one NumPy element, so it is copied as bits, and with one memcpy.
        size = dtype.itemsize
        row = side.head_size * size
        if row > _MOST_ROW:
            rule = f"must have at most {_MOST_ROW} bytes of K or V in a head on the CPU"
            raise NotSupportedError(f"{side.letter}_cache", rule, row)
        heads = num_kv_heads
        source: tuple[int, ...] = (side.token_stride * size, side.head_stride * size)
        cache: tuple[int, ...] = (
            side.block_stride * size, side.slot_stride * size, side.cache_head_stride * size,
        )  # fmt: skip
        self._heads: tuple[int, ...] = (heads,)
        side_by_side = source[1] == cache[2] == row
        if heads == 1 or (side_by_side and row * heads <= _MOST_ROW):
            # The heads of a token are contiguous on both sides: one row holds them all.
            row, self._heads, source, cache = row * heads, (), source[:1], cache[:2]
        self._row = np.dtype((np.void, row))
        self._source, self._cache = source, cache
        self._shape = (num_blocks, block_size, *self._heads)
        # Where the rows of a block are contiguous too, one element holds a whole block.
        contiguous = not self._heads and source[0] == row and cache[1] in (row, 0)
        whole = contiguous and block_size * row <= _MOST_ROW
        self._block = np.dtype((np.void, block_size * row)) if whole else None

    def write(
        self, cache: int, source: int, scale: int, slots: Array, valid: Array, blocks: Array
    ) -> None:
        """Store the rows of valid tokens, given those at which whole blocks begin."""
        block_size = self._shape[1]
        if self._block is not None and blocks.size:
            self._write_blocks(cache, source, slots, blocks)
            valid = valid.copy()
            valid[(blocks[:, None] + np.arange(block_size)).ravel()] = False
        tokens: Any = slice(None) if valid.all() else valid
        block, offset = np.divmod(slots[tokens], block_size)
        rows = view(source, self._row, (len(slots), *self._heads), self._source)
        view(cache, self._row, self._shape, self._cache)[block, offset] = rows[tokens]

    def read(self, cache: int, rows_at: int, scale: int, slots: Array, valid: Array) -> None:
        """Read the rows of valid tokens back."""
        tokens: Any = slice(None) if valid.all() else valid
        block, offset = np.divmod(slots[tokens], self._shape[1])
        rows = view(rows_at, self._row, (len(slots), *self._heads), self._source)
        rows[tokens] = view(cache, self._row, self._shape, self._cache)[block, offset]

    def _write_blocks(self, cache: int, source: int, slots: Array, blocks: Array) -> None:
        assert self._block is not None
        block_size = self._shape[1]
        starts = (len(slots) - block_size + 1,)
        rows = view(source, self._block, starts, self._source)  # that begin at each token
        cache_blocks = view(cache, self._block, self._shape[:1], self._cache[:1])
        # One after the other in the source, as in a prompt: a slice, which NumPy does not copy.
        for first, last in _evenly_spaced(blocks, block_size):
            taken = blocks[first:last]
            each = slice(int(taken[0]), int(taken[-1]) + 1, block_size)
            cache_blocks[slots[taken] // block_size] = rows[each]


class ConvertedRows:
    """K or V, if the cache is in another format than the rows by token.

    Parameters
    ----------
    side : Side
    dtype : numpy.dtype
        Of the rows by token.
    num_blocks, block_size, num_kv_heads : int
    """

    def __init__(
        self, side: Side, dtype: Dtype, num_blocks: int, block_size: int, num_kv_heads: int
    ) -> None:
        self._dtype, self._bits = dtype, np.dtype(f"u{dtype.itemsize}")
        self._format, self._scale = side.format, side.scale
        self._block_size = block_size
        size, width, item = side.head_size, side.format.dtype.itemsize, dtype.itemsize
        self._row = num_kv_heads, size
        self._row_steps = side.token_stride * item, side.head_stride * item, item
        self._shape = num_blocks, block_size, num_kv_heads, size // side.format.packed
        self._steps = (
            side.block_stride * width, side.slot_stride * width, side.cache_head_stride * width,
            width,
        )  # fmt: skip
        self._at_a_time = max(_AT_A_TIME // (num_kv_heads * size), 1)
        if (scale := side.scale) is not None:
            self._groups = size // scale.group, scale.group
            steps = scale.block_stride, scale.slot_stride, scale.head_stride, scale.group_stride
            self._scale_steps = tuple(F32.itemsize * step for step in steps)

    def write(
        self, cache: int, rows_at: int, scale: int, slots: Array, valid: Array, blocks: Array
    ) -> None:
        """Store the rows of valid tokens. `blocks` are those at which whole blocks begin."""
        rows = view(rows_at, self._bits, (len(slots), *self._row), self._row_steps)
        for tokens, block, offset in self._parts(slots, valid):
            with np.errstate(all="ignore"):
                values = rows[tokens].view(self._dtype).astype(np.float32)
                values, scales = self.converted(values, scale)
            self.store(cache, scale, values, scales, block, offset)

    def converted(self, values: Array, scale: int) -> tuple[Array, Array | None]:
        """Return what is rounded to codes, and the scales if they are computed."""
        if self._scale is None:
            return values, None
        groups = values.reshape(-1, self._row[0], *self._groups)
        if not self._scale.is_written:
            groups = groups / self._read_scales(scale)[..., None]
            return np.reshape(groups, values.shape), None
        found = computed(groups, self._format.most, powers=self._scale.powers)
        groups = groups * (np.float32(1) / found)[..., None]
        return np.reshape(groups, values.shape), found

    def store(
        self,
        cache: int,
        scale: int,
        values: Array,
        scales: Array | None,
        block: Array,
        offset: Array,
        chosen: Array | None = None,
    ) -> None:
        """Round values ``[tokens, heads, size]`` to codes, and store them with their scales.

        `chosen` says which rows ``[tokens, heads]``; all by default.
        """
        codes = self.codes(cache)
        made = self._format.encode(values)
        at: Any = (block, offset)
        if chosen is not None:
            token, head = np.nonzero(chosen)
            at, made = (block[token], offset[token], head), made[token, head]
            scales = None if scales is None else scales[token, head]
        codes[at] = made
        if scales is not None:
            self._scales(scale)[at] = scales

    def read(self, cache: int, rows_at: int, scale: int, slots: Array, valid: Array) -> None:
        """Read the rows of valid tokens back."""
        rows = view(rows_at, self._bits, (len(slots), *self._row), self._row_steps)
        target = FORMATS[str(self._dtype)]
        for tokens, block, offset in self._parts(slots, valid):
            rows[tokens] = target.encode(self.stored(cache, scale, block, offset))

    def stored(self, cache: int, scale: int, block: Array, offset: Array) -> Array:
        """Return the values of rows, float32 ``[tokens, heads, size]``."""
        codes = self.codes(cache)
        with np.errstate(all="ignore"):
            values = self._format.decode(codes[block, offset])
            return self._multiplied(values, scale, block, offset)

    def codes(self, cache: int) -> Array:
        """Return what is stored, ``[num_blocks, block_size, num_kv_heads, elements]``."""
        return view(cache, self._format.code_dtype, self._shape, self._steps)

    def _parts(self, slots: Array, valid: Array) -> Iterator[tuple[Array, Array, Array]]:
        """Yield tokens, their blocks and offsets, as many at a time as are converted quickly."""
        tokens = np.flatnonzero(valid)
        for first in range(0, len(tokens), self._at_a_time):
            some = tokens[first : first + self._at_a_time]
            yield some, *np.divmod(slots[some], self._block_size)

    def _multiplied(self, values: Array, at: int, block: Array, offset: Array) -> Array:
        if self._scale is None:
            return values
        groups = values.reshape(-1, self._row[0], *self._groups)
        if self._scale.is_written:
            scales = self._scales(at)[block, offset]
        else:
            scales = self._read_scales(at)
        return np.reshape(groups * scales[..., None], values.shape)

    def _read_scales(self, at: int) -> Array:
        """Return scales that do not depend on the slot, ``[num_kv_heads, groups]``."""
        return view(at, F32, (self._row[0], self._groups[0]), self._scale_steps[2:])

    def _scales(self, at: int) -> Array:
        """Return scales of slots, ``[num_blocks, block_size, num_kv_heads, groups]``."""
        return view(at, F32, (*self._shape[:3], self._groups[0]), self._scale_steps)


def whole_blocks(slots: Array, valid: Array, block_size: int) -> Array:
    """Return the tokens at which a run of tokens begins that fills a whole block in order."""
    if len(slots) < block_size or block_size == 1:
        return np.empty(0, np.intp)
    in_order = np.cumsum(np.concatenate(([0], np.diff(slots) == 1)))
    starts = in_order[block_size - 1 :] - in_order[: len(slots) - block_size + 1]
    first = slice(len(slots) - block_size + 1)
    whole = valid[first] & (slots[first] % block_size == 0) & (starts == block_size - 1)
    return np.flatnonzero(whole)


def _evenly_spaced(numbers: Array, step: int) -> list[tuple[int, int]]:
    """Return where runs of numbers that are `step` apart begin and end."""
    breaks = np.flatnonzero(np.diff(numbers) != step) + 1
    return list(zip([0, *breaks.tolist()], [*breaks.tolist(), len(numbers)], strict=True))
