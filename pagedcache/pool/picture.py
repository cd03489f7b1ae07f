# SPDX-License-Identifier: Apache-2.0
"""A pool as a grid of blocks, in plain SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence

_MOST_CELLS = 2048  # larger pools have several blocks in a cell
_SIDE = 12  # of a cell, in pixels

# Of middling lightness, so that they stand out from a white page and from a black one.
_COLOURS = ("#4c8bf5", "#e0803a", "#3aa76d", "#b065d8", "#c9a227", "#2aa5b8", "#d9608f", "#8a7f5c")
_SHARED, _CACHED, _FREE, _PARKED = "shared", "cached", "free", "parked"
_Kind = str | int  # one of these, or the number of a sequence
_LOOKS = {
    _SHARED: "fill:#7f7f7f;stroke:currentColor;stroke-width:2",
    _CACHED: "fill:currentColor;fill-opacity:.35",
    _PARKED: "fill:currentColor;fill-opacity:.7",
    _FREE: "fill:none;stroke:currentColor;stroke-opacity:.3",
}
_WORDS = {
    _SHARED: "held by several sequences",
    _CACHED: "free, but can be found",
    _PARKED: "held until a copy is taken",
    _FREE: "free",
}


def draw(
    num_blocks: int,
    block_size: int,
    tables: Mapping[int, Sequence[int]],
    shared: Container[int],
    cached: Iterable[int],
    parked: Iterable[int],
) -> str:
    """Return a grid of blocks, coloured by who holds them, with a legend.

    Parameters
    ----------
    num_blocks, block_size : int
    tables : mapping
        For the number of each sequence, its blocks.
    shared, cached, parked
        Blocks that several sequences hold, that are free but can be found, and that are held for a
        copy.
    """
    kinds: list[_Kind] = [_FREE] * num_blocks
    for number, table in tables.items():
        for block in table:
            kinds[block] = _SHARED if block in shared else number
    for block in cached:
        kinds[block] = _CACHED
    for block in parked:
        kinds[block] = _PARKED

    per_cell = -(-num_blocks // _MOST_CELLS)
    if per_cell == 1:
        cells = kinds
    else:
        # The one that most blocks of a cell are.
        ranges = range(0, num_blocks, per_cell)
        cells = [Counter(kinds[start : start + per_cell]).most_common(1)[0][0] for start in ranges]
    columns = min(len(cells), max(32, math.isqrt(len(cells) * 2)))
    rows = -(-len(cells) // columns)

    paths: dict[str, list[str]] = {}
    for place, kind in enumerate(cells):
        row, column = divmod(place, columns)
        paths.setdefault(_look(kind), []).append(f"M{column * _SIDE + 1} {row * _SIDE + 1}")
    square = f"h{_SIDE - 2}v{_SIDE - 2}h-{_SIDE - 2}z"
    shapes = "".join(
        f'<path style="{look}" d="{"".join(move + square for move in moves)}"/>'
        for look, moves in paths.items()
    )
    width, height = columns * _SIDE, rows * _SIDE
    caption = f"{num_blocks:,} blocks of {block_size:,} slots"
    if per_cell > 1:
        caption += f"; each cell stands for {per_cell:,} of them, and shows what most of them are"
    return (
        f'<div style="font-family:sans-serif;font-size:12px">{caption}<br>'
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{caption}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{shapes}</svg>'
        f"<br>{_legend(Counter(kinds))}</div>"
    )


def _look(kind: _Kind) -> str:
    if isinstance(kind, int):
        return f"fill:{_COLOURS[kind % len(_COLOURS)]}"
    return _LOOKS[kind]


def _legend(counts: Counter[_Kind]) -> str:
    numbers = sorted(kind for kind in counts if isinstance(kind, int))
    text = "".join(
        _entry(_look(number), f"sequence {number}: {counts[number]:,}") for number in numbers[:16]
    )
    if len(numbers) > 16:
        blocks = sum(counts[number] for number in numbers[16:])
        text += f"{len(numbers) - 16:,} more sequences: {blocks:,}<br>"
    others = [(kind, words) for kind, words in _WORDS.items() if counts[kind]]
    return text + "".join(
        _entry(_look(kind), f"{words}: {counts[kind]:,}") for kind, words in others
    )


def _entry(look: str, words: str) -> str:
    return (
        '<span style="white-space:nowrap;margin-right:1em"><svg width="12" height="12" '
        f'viewBox="0 0 12 12"><path style="{look}" d="M1 1h10v10h-10z"/></svg> {words}</span> '
    )
