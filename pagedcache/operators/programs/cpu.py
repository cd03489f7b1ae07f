# SPDX-License-Identifier: Apache-2.0
"""Writes and reads with steps in NumPy, the specification of both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.backend.protocol import Implementation, Invalid, LaunchConfig
from pagedcache.cache.cpu import ConvertedRows, read_slots
from pagedcache.dtypes import BF16, F16
from pagedcache.operators.programs.info import INVALID_OF
from pagedcache.steps import Around
from pagedcache.tensors import Array, view

if TYPE_CHECKING:
    from pagedcache.backend.cpu import CpuDevice, CpuReport
    from pagedcache.operators.programs.info import ArrayParameter, ProgramInfo, RowsByToken

_AT_A_TIME = 1 << 16  # elements, so that they stay in a cache of the processor


class ProgramOnCpu(Implementation):
    """Runs on the calling thread, and is done when `run` returns."""

    def __init__(self, info: ProgramInfo, device: CpuDevice, report: CpuReport) -> None:
        self._info, self._report = info, report
        for pipeline in info.pipelines.values():
            pipeline.check_cpu()
        sizes = info.num_blocks, info.block_size, info.num_kv_heads
        self._caches = {side.letter: ConvertedRows(side, info.dtype, *sizes) for side in info.sides}
        most = max(each.heads * each.size for each in (info.sources or info.outs).values())
        self._at_a_time = max(_AT_A_TIME // most, 1)

    def launch_config(self, rows: int) -> LaunchConfig:
        """Return one thread, whatever the number of tokens."""
        return LaunchConfig((1, 1, 1), (1, 1, 1))

    def run(self, tokens: int, *values: Any) -> None:
        """Write or read this many tokens. Takes addresses, numbers, and a stream."""
        info = self._info
        given = dict(zip(info.names, values, strict=False))
        slots, valid, invalid = read_slots(
            given["slot_mapping"], info.slot_dtype, tokens, info.num_slots
        )
        if invalid is not None:
            self._report.add(invalid)
        parameters = {each.name: _parameter(each, given[each.name], tokens) for each in info.arrays}
        for name, kind in info.numbers:
            with np.errstate(over="ignore"):
                parameters[name] = np.asarray(given[name], _DTYPES[kind])
        rows = {
            each.name: _rows(each, given[each.name], tokens)
            for each in (*info.sources.values(), *info.outs.values())
        }
        part = self._read_part if info.reads else self._write_part
        for letter in info.letters:
            bad = np.zeros(tokens, np.int64)
            for some in self._parts(tokens, valid):
                bad[some] = part(letter, given, rows, parameters, some, slots, valid)
            if bad.any():
                first = int(np.flatnonzero(bad)[0])
                self._report.add(Invalid(int(bad.sum()), first, INVALID_OF[letter]))

    def _parts(self, tokens: int, valid: Array) -> Iterator[Array]:
        """Yield the numbers of tokens, as many at a time as are done quickly."""
        every = np.flatnonzero(valid) if self._info.reads else np.arange(tokens)
        for first in range(0, len(every), self._at_a_time):
            yield every[first : first + self._at_a_time]

    def _around(
        self, letter: str, tokens: Array, slots: Array, parameters: Mapping[str, Array]
    ) -> Around:
        info = self._info
        rows = (info.sources or info.outs)[letter]
        slot = slots[tokens].reshape(-1, 1, 1)
        block, offset = np.divmod(slot, info.block_size)
        indices = {
            "dim": np.arange(rows.size), "head": np.arange(rows.heads)[:, None],
            "token": tokens.reshape(-1, 1, 1), "slot": slot, "block": block, "offset": offset,
        }  # fmt: skip
        return Around(indices, parameters)

    def _write_part(
        self,
        letter: str,
        given: Mapping[str, Any],
        rows: Mapping[str, Array],
        parameters: Mapping[str, Array],
        tokens: Array,
        slots: Array,
        valid: Array,
    ) -> Array:
        """Write some tokens of one side; return how many rows of each valid one were not valid."""
        info = self._info
        pipeline, source, out = info.pipelines[letter], info.sources[letter], info.outs.get(letter)
        around = self._around(letter, tokens, slots, parameters)
        bits = rows[source.name][tokens]
        values, inside = pipeline.apply(source.format.decode(bits), around)
        codes, scales = values, None
        if pipeline.quantizer is not None:
            codes, scales, also = pipeline.quantizer.quantized(values, around)
            inside = inside & also
        if out is not None:
            plain = out.format == source.format and not pipeline.steps
            made = bits if plain else out.format.encode(values)
            chosen = np.nonzero(inside)
            rows[out.name][tokens[chosen[0]], chosen[1]] = made[chosen]
        if letter in self._caches:
            self._store(letter, given, codes, scales, bits, tokens, slots, valid, inside)
        bad: Array = np.where(valid[tokens], (~inside).sum(axis=1), 0)
        return bad

    def _store(
        self,
        letter: str,
        given: Mapping[str, Any],
        codes: Array,
        scales: Array | None,
        bits: Array,
        tokens: Array,
        slots: Array,
        valid: Array,
        inside: Array,
    ) -> None:
        info, cache = self._info, self._caches[letter]
        at, scale_at = given[f"{letter}_cache"], given[f"{letter}_scale"]
        side, pipeline = info.side(letter), info.pipelines[letter]
        assert side is not None
        block, offset = np.divmod(np.where(valid, slots, 0)[tokens], info.block_size)
        chosen = inside & valid[tokens][:, None]
        if side.copies(info.dtype) and not pipeline.steps:
            token, head = np.nonzero(chosen)
            cache.codes(at)[block[token], offset[token], head] = bits[token, head]
            return
        if pipeline.quantizer is None:
            with np.errstate(all="ignore"):
                codes, scales = cache.converted(codes, scale_at)
        cache.store(at, scale_at, codes, scales, block, offset, chosen)

    def _read_part(
        self,
        letter: str,
        given: Mapping[str, Any],
        rows: Mapping[str, Array],
        parameters: Mapping[str, Array],
        tokens: Array,
        slots: Array,
        valid: Array,
    ) -> Array:
        """Read some tokens of one side; return how many rows of each were not valid."""
        info, cache = self._info, self._caches[letter]
        at, scale_at = given[f"{letter}_cache"], given[f"{letter}_scale"]
        pipeline, out, side = info.pipelines[letter], info.outs[letter], info.side(letter)
        assert side is not None
        block, offset = np.divmod(slots[tokens], info.block_size)
        if side.copies(info.dtype) and not pipeline.steps:
            rows[out.name][tokens] = cache.codes(at)[block, offset]
            return np.zeros(len(tokens), np.int64)
        around = self._around(letter, tokens, slots, parameters)
        values, inside = pipeline.apply(cache.stored(at, scale_at, block, offset), around)
        chosen = np.nonzero(inside)
        rows[out.name][tokens[chosen[0]], chosen[1]] = out.format.encode(values)[chosen]
        bad: Array = (~inside).sum(axis=1)
        return bad


_DTYPES = {float: np.float32, int: np.int64, bool: np.bool_}


def _rows(rows: RowsByToken, at: int, tokens: int) -> Array:
    """Return rows by token, as bits."""
    item = rows.format.dtype.itemsize
    steps = rows.token_stride * item, rows.head_stride * item, item
    return view(at, rows.format.code_dtype, (tokens, rows.heads, rows.size), steps)


def _parameter(array: ArrayParameter, at: int, tokens: int) -> Array:
    """Return a parameter as bool, int64 or float32, for as many tokens as there are."""
    shape = tuple(tokens if length is None else length for length in array.shape)
    bits = np.dtype(f"u{array.dtype.itemsize}")
    there = view(at, bits, shape, tuple(step * array.dtype.itemsize for step in array.strides))
    values = np.ascontiguousarray(there).reshape(shape).view(array.dtype)
    if array.dtype in (BF16, F16):
        with np.errstate(invalid="ignore"):  # a NaN that signals
            return values.astype(np.float32)
    return values.astype(np.int64) if array.dtype.kind == "i" else values
