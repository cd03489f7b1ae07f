# SPDX-License-Identifier: Apache-2.0
"""Plots of a paged cache. Requires matplotlib, which the extras ``bench`` and ``notebook`` install.

`block` shows where the bytes of a slot are. `pool`, `block_tables` and `slot_mapping` show one
moment; `occupancy`, `sharing` and `fragmentation` show what an `EventLog` has noted, over time.

Nothing else in this package imports this module. The colour of a sequence depends on its position
in the mapping of block tables, so keep finished sequences there, with an empty table, if colours
should stay the same from plot to plot. The hues are those of Okabe and Ito, which people with any
kind of colour vision can tell apart (https://jfly.uni-koeln.de/color/).
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

try:
    from matplotlib import pyplot
    from matplotlib.colors import to_hex, to_rgba
    from matplotlib.patches import Patch, Rectangle
except ImportError as error:
    needed = "pagedcache.plot needs matplotlib, which the extra bench installs"
    raise ImportError(f"{needed}: pip install 'pagedcache[bench]'") from error

from pagedcache.arrays.find import adopt
from pagedcache.cache.layout import LAYOUTS
from pagedcache.status import BadParamError, BadParamTypeError, as_int, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pagedcache.tensors import Tensor

FREE, SHARED, WRITTEN = "white", "#606060", "#0072b2"
INVALID = "#d55e00"
# Over time: from dark to light, so that they differ in lightness as well as in hue.
HELD, CACHED, EMPTY = "#8fc1e3", "#fbe3b5", "#f0a860"
# Of sequences, and of KV heads: blue, orange, green, purple, light blue, yellow. Gray and red are
# left out, since they mean shared and invalid.
_HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#f0e442")
_HEADS = (*_HUES, INVALID, "black")
_FONT = 10  # points
_MOST_TEXT = 7  # characters of that size in a cell
_SMALL = 7  # points, the number of a slot, and what is written upwards
_MARK = 3  # points, the line around a slot
_NARROWEST = 4.5  # inches, so that a title fits
_WIDEST = 8  # cells in a row of tokens that are not written, unless blocks are wider
_STRIP = 0.22  # of the height of a cell, what is hatched
_GAP = 0.5  # between blocks that are not neighbours
_FOUND = "free, but can be found"
_HATCHES = ("", "//", "..", "xx", "\\\\", "++")

Tables = Mapping[str, Sequence[int]]


class _Piece(NamedTuple):
    """Bytes next to each other, of one slot of one KV head of an array."""

    start: int
    stop: int
    name: str
    head: int
    offset: int


class Log(Protocol):
    """What is asked of an `EventLog`."""

    @property
    def entries(self) -> Sequence[tuple[float, Any]]:
        """Each event with its time, after the state that the log began with."""

    def occupancy(self) -> Sequence[Any]:
        """Return how the pool was filled after each of them."""


def pool(
    tables: Tables,
    num_blocks: int,
    *,
    cached: Iterable[int] = (),
    columns: int = 16,
    ax: Axes | None = None,
) -> Axes:
    """Draw the blocks of a pool as a grid, coloured by sequence, or as shared, cached or free.

    Parameters
    ----------
    tables : mapping of str to sequence of int
        The block table of each sequence, by its name; negative entries are padding.
    num_blocks : int
        Number of blocks in the pool.
    cached : iterable of int
        Blocks that can be found by their tokens, such as `BlockPool.cached_blocks`. Those in no
        table are drawn as free, but can be found.
    columns : int
        Blocks per row of the grid, at most.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. By default, those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadParamError
        `tables` is not such a mapping, or has a block past the pool; a number is out of range.
    """
    tables, num_blocks = _ints(tables), as_int("num_blocks", num_blocks, 1)
    columns = min(as_int("columns", columns, 1), num_blocks)
    for name, table in tables.items():
        if table and max(table) >= num_blocks:
            rule = f"must have blocks below num_blocks, {num_blocks}"
            raise BadParamError("tables", rule, f"block {max(table)} in the table of {name}")
    rows = -(-num_blocks // columns)
    ax = _axes(ax, columns, rows, len(tables) + 3)
    styles = _styles(tables)
    holders = Counter(block for table in tables.values() for block in set(table))
    owner = {block: name for name, table in tables.items() for block in table}
    idle = {int(block) for block in cached} - owner.keys()
    for block in range(num_blocks):
        held = holders[block]
        style = (SHARED, "") if held > 1 else styles[owner[block]] if held else (FREE, "")
        if block in idle:
            style = CACHED, ""
        row, column = divmod(block, columns)
        _cell(ax, column, row, str(block), *style)
    legend = {name: styles[name] for name, table in tables.items() if len(table)}
    if max(holders.values(), default=0) > 1:
        legend["shared"] = SHARED, ""
    if idle:
        legend[_FOUND] = CACHED, ""
    _legend(ax, {**legend, "free": (FREE, "")})
    ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)  # or else blocks seem to be missing from the last row
    ax.set_title(f"{len(holders)} of {num_blocks} blocks in use")
    return ax


def block_tables(tables: Tables, *, ax: Axes | None = None) -> Axes:
    """Draw block tables, one row per sequence: the blocks that hold its tokens, in token order.

    Parameters
    ----------
    tables : mapping of str to sequence of int
        The block table of each sequence, by its name; negative entries are padding. Blocks in
        several tables are drawn as shared.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. By default, those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
    """
    tables = _ints(tables)
    columns = max(1, *map(len, tables.values())) if tables else 1
    ax = _axes(ax, columns, len(tables))
    styles = _styles(tables)
    holders = Counter(block for table in tables.values() for block in set(table))
    for row, (name, table) in enumerate(tables.items()):
        for column, block in enumerate(table):
            style = (SHARED, "") if holders[block] > 1 else styles[name]
            _cell(ax, column, row, str(block), *style)
    ax.set(xlim=(0, columns), ylim=(max(len(tables), 1), 0), xlabel="entry of the block table")
    ax.set_xticks([column + 0.5 for column in range(columns)], [str(i) for i in range(columns)])
    ax.set_yticks([row + 0.5 for row in range(len(tables))], list(tables))
    entries = sum(map(len, tables.values()))
    ax.set_title(f"{entries} entries of block tables, {len(holders)} blocks")
    return ax


def slot_mapping(
    slots: Iterable[int], block_size: int, num_blocks: int, *, ax: Axes | None = None
) -> Axes:
    """Draw where tokens go, with a row for each block that is written and a column for each offset.

    Each cell has the number of its slot in a corner; where several tokens have the same slot, the
    first of them is named, and how many more there are. A gap with dots is between blocks that are
    not neighbours. Tokens that are not written are drawn in extra rows below: padding, which has a
    negative slot, and tokens with an invalid slot, past the end of the cache.

    Parameters
    ----------
    slots : iterable of int
        The slot of each token.
    block_size, num_blocks : int
        Slots per block, and number of blocks in the cache.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. By default, those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadParamError
        `slots` are not ints in one dimension, or a number is out of range.
    """
    block_size = as_int("block_size", block_size, 1)
    num_blocks = as_int("num_blocks", num_blocks, 1)
    num_slots = num_blocks * block_size
    try:
        tokens = [(token, operator.index(slot)) for token, slot in enumerate(slots)]
    except TypeError:
        rule = "must be ints in one dimension, the slot of each token"
        raise BadParamTypeError("slots", rule, shown(slots)) from None
    valid: dict[int, list[str]] = {}
    for token, slot in tokens:
        if 0 <= slot < num_slots:
            valid.setdefault(slot, []).append(f"t{token}")
    blocks = sorted({slot // block_size for slot in valid})
    outside = {
        "padding": [(token, slot) for token, slot in tokens if slot < 0],
        "invalid": [(token, slot) for token, slot in tokens if slot >= num_slots],
    }
    outside = {kind: found for kind, found in outside.items() if found}
    width = max(block_size, _WIDEST)  # of the extra rows, at most
    columns = max([block_size, *(min(len(found), width) for found in outside.values())])
    gaps = sum(after != before + 1 for before, after in itertools.pairwise(blocks))
    extra = sum(_GAP - (-len(found) // width) for found in outside.values())
    ax = _axes(ax, columns, len(blocks) + gaps * _GAP + extra)
    row = 0.0
    labels: dict[float, str] = {}
    for before, block in zip([None, *blocks], blocks, strict=False):
        if before is not None and block != before + 1:
            ax.text(block_size / 2, row + _GAP / 2, "...", ha="center", va="center")
            row += _GAP
        labels[row] = f"block {block}"
        for offset in range(block_size):
            slot = block * block_size + offset
            writers = valid.get(slot, [])
            colour = WRITTEN if writers else FREE
            text = " +".join([*writers[:1], *([str(len(writers) - 1)] if writers[1:] else [])])
            _cell(ax, offset, row, text, colour, size=_FONT if len(text) < _MOST_TEXT else _SMALL)
            _number(ax, offset, row, slot, colour)
        row += 1
    for kind, found in outside.items():
        row += _GAP
        labels[row] = kind
        for place, (token, slot) in enumerate(found):
            at, column = divmod(place, width)
            if kind == "padding":
                _cell(ax, column, row + at, f"t{token}", FREE, "////")
            else:
                _cell(ax, column, row + at, f"t{token}", INVALID)
                _number(ax, column, row + at, slot, INVALID)
        row -= -len(found) // width
    ax.set(xlim=(0, columns), ylim=(max(row, 1), 0), xlabel="offset in the block")
    ax.xaxis.set_label_position("top")  # offsets are those of blocks, not of the rows below
    ax.xaxis.tick_top()
    ax.set_xticks([i + 0.5 for i in range(block_size)], [str(i) for i in range(block_size)])
    ax.set_yticks([at + 0.5 for at in labels], list(labels.values()))
    ax.spines[:].set_visible(False)
    written = sum(map(len, valid.values()))
    places = f"{len(blocks)} block" + "s" * (len(blocks) != 1)
    ax.set_title(f"{written} of {len(tokens)} tokens are written, to {places}")
    return ax


def block(
    arrays: Mapping[str, Any],
    slot: int,
    *,
    layout: str | None = None,
    memory: Any = None,
    columns: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the bytes of a block as they lie in memory, and mark those of one slot.

    Bytes go from left to right, and then from row to row. Each KV head has a colour, which is
    darker from slot to slot; the second array and those after it have a hatched strip. Bytes of
    other blocks, or of none of the arrays, are blank. Where they would fill a row or more, a line
    says how many there are.

    Parameters
    ----------
    arrays : mapping of str to array
        Parts of a cache by their names, such as ``{"K": k_cache, "V": v_cache}``. Scales of each
        token and head are such parts, too. The first three axes are those of `layout`, and equal in
        all arrays; any others are within a slot of a KV head. Arrays may be of any library and on
        any device: only the address, the shape and the strides are read.
    slot : int
        The slot to mark. The block is the one that it is in, ``slot // block_size``.
    layout : {"HND", "NHD"}
        The order of the first three axes: blocks, KV heads and slots, or blocks, slots and KV
        heads. It must be given: the shapes of caches alone fit both.
    memory : array, optional
        An array that all of `arrays` are views of. Bytes are counted from its start. By default,
        they are counted from the start of each array, and arrays that are interleaved are drawn as
        one.
    columns : int, optional
        Bytes per row. By default, as many as all slots of a KV head take, or all KV heads of a
        slot, whichever are next to each other.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. By default, those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes

    Raises
    ------
    BadParamError
        `arrays` is not a mapping of arrays, or they do not fit each other, `layout` or `memory`, or
        share bytes; or `slot` or `columns` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from pagedcache import plot
    >>> k_cache = np.zeros((6, 3, 4, 8), np.float16)  # blocks, KV heads, slots, head size
    >>> plot.block({"K": k_cache}, 9, layout="HND").get_title()
    'block 2: slot 9 has 48 bytes, in 3 pieces'
    """
    if layout not in LAYOUTS:
        raise BadParamError("layout", f"must be {' or '.join(LAYOUTS)}", shown(layout))
    arrays = _mapping("arrays", arrays, '{"K": k_cache, "V": v_cache}')
    tensors = {name: adopt(name, array) for name, array in arrays.items()}
    sizes = _block_sizes(tensors, layout)
    num_slots = sizes["num_blocks"] * sizes["block_size"]
    slot = as_int("slot", slot, 0, num_slots - 1)
    if columns is None:
        columns = _neighbours(next(iter(tensors.values())))
    columns = as_int("columns", columns, 1)
    number, offset = divmod(slot, sizes["block_size"])
    memories = _memories(tensors, memory)
    spans: list[tuple[int, int, _Piece]] = []  # where it is drawn: row * columns + column
    lines: dict[int, str] = {}
    labels: dict[int, str] = {}
    row = 0
    for base, names in memories:
        if len(memories) > 1:
            lines[row], row = ", ".join(names), row + 1
        pieces = [piece for name in names for piece in _pieces(name, tensors[name], number, layout)]
        end = 0
        for run in _runs(pieces, columns):
            if end:
                lines[row], row = f"... {run[0].start - end:,} bytes ...", row + 1
            end = run[-1].stop
            moved = row * columns - run[0].start
            spans += [(piece.start + moved, piece.stop + moved, piece) for piece in run]
            for start in range(run[0].start - base, end - base, columns):
                labels[row], row = f"{start:,}", row + 1

    if ax is None:
        entries = sizes["num_kv_heads"] + len(tensors) + 1
        height = max(1.2 + 0.42 * row, _height(entries))
        _, ax = pyplot.subplots(figsize=(11, height), layout="constrained")
    hatches = dict(zip(tensors, itertools.cycle(_HATCHES), strict=False))
    extent = ax.get_window_extent()
    points, height = (each * 72 / ax.figure.dpi for each in (extent.width, extent.height / row))
    for start, stop, piece in spans:
        colour = _shade(piece.head, (piece.offset + 1) / sizes["block_size"])
        mine = slot - offset + piece.offset
        texts = ["", str(mine), f"slot {mine}"]
        texts.append(f"head {piece.head}, {texts[-1]}")
        texts.append(f"{piece.name}, {texts[-1]}")
        spare = len(str(num_slots - 1)) - len(str(mine))  # so that all slots have the same text
        for at, column, width in _in_rows(start, stop, columns):
            room = width / columns * points / (0.55 * _FONT)  # characters
            text = max((text for text in texts if len(text) + spare < room), key=len, default="")
            _cell(ax, column, at, text, colour, hatches[piece.name], width)
            wide, high = width / columns * points, (1 - _STRIP) * height
            if not text and wide > 1.5 * _SMALL and len(piece.name) * 0.6 * _SMALL < high:
                middle = (column + width / 2, at + (1 - _STRIP) / 2)
                style: dict[str, Any] = {"color": _ink(colour), "fontsize": _SMALL}
                style["rotation"] = 90 if len(piece.name) > 1 else 0
                ax.text(*middle, piece.name, ha="center", va="center", **style)
    marked = _joined((start, stop) for start, stop, piece in spans if piece.offset == offset)
    for start, stop in marked:
        for at, column, width in _in_rows(start, stop, columns):
            ax.add_patch(Rectangle((column, at), width, 1, fill=False, linewidth=_MARK))
    for at, text in lines.items():
        ax.text(columns / 2, at + 0.5, text, ha="center", va="center", fontsize=_FONT)

    others = (
        []
        if len(tensors) == 1
        else [
            Patch(facecolor=FREE, edgecolor="black", linewidth=0.5, hatch=hatch, label=name)
            for name, hatch in hatches.items()
        ]
    )
    others.append(Patch(fill=False, linewidth=_MARK, label=f"slot {slot}"))
    heads = {f"KV head {head}": (_shade(head), "") for head in range(sizes["num_kv_heads"])}
    _legend(ax, heads, others)
    ax.set(
        xlim=(0, columns), ylim=(row, 0), xlabel="byte in the row", ylabel="first byte of the row"
    )
    step = 1
    while columns > 12 * step:
        step *= 2
    ax.set_xticks(range(0, columns + 1, step))
    ax.set_yticks([at + 0.5 for at in labels], list(labels.values()))
    size = sum(stop - start for start, stop in marked)
    count = f"{len(marked)} pieces" if len(marked) > 1 else "one piece"
    ax.set_title(f"block {number}: slot {slot} has {size:,} bytes, in {count}")
    return ax


def occupancy(log: Log, *, unit: str | None = "s", ax: Axes | None = None) -> Axes:
    """Draw how the blocks of a pool were used over time, as areas on top of each other.

    From below: blocks that several sequences share, those that one sequence holds (or a copy that
    nobody has taken), those that nobody holds but that can be found, and the others.

    Parameters
    ----------
    log : EventLog
    unit : str, optional
        What the clock of the log counts. Seconds, ``"s"``, are drawn from the first entry on;
        anything else, such as ``"step"``, as it is. Of entries with the same time, the last is
        drawn. ``None``: all entries are, next to each other.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. By default, those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
    """
    places, moments, label = _moments(log, unit)
    areas = {
        "shared by several": (SHARED, [now.shared for now in moments]),
        "held by one": (HELD, [now.used - now.shared for now in moments]),
        _FOUND: (CACHED, [now.cached_free for now in moments]),
        "free": (FREE, [now.free for now in moments]),
    }
    return _stack(areas, places, label, f"blocks ({_state(log).num_blocks:,} in all)", ax)


def sharing(log: Log, *, unit: str | None = "s", ax: Axes | None = None) -> Axes:
    """Draw how many blocks sharing has saved over time.

    That is the difference between the entries of all block tables, which is how many blocks the
    sequences would hold if each had its own, and the blocks in use.

    Parameters
    ----------
    log : EventLog
    unit, ax : optional
        See `occupancy`.

    Returns
    -------
    matplotlib.axes.Axes
    """
    places, moments, label = _moments(log, unit)
    counted = _table_entries(log, unit)
    areas = {
        "in use": (HELD, [now.used for now in moments]),
        # A block that only a copy holds is in use, and in no table.
        "saved by sharing": (
            SHARED,
            [max(count - now.used, 0) for count, now in zip(counted, moments, strict=True)],
        ),
    }
    ax = _stack(areas, places, label, "blocks", ax)
    num_blocks = _state(log).num_blocks
    ax.axhline(num_blocks, color=FREE, linewidth=3)  # so that the line is seen on any colour
    ax.axhline(num_blocks, color="black", linestyle="--", linewidth=1.5)
    ax.set_ylim(0, 1.12 * max(num_blocks, ax.get_ylim()[1]))
    text = ax.annotate(
        f"{num_blocks:,} blocks in all",
        (places[0], num_blocks),
        (6, 4),
        textcoords="offset points",
        va="bottom",
    )
    text.set(fontsize=_FONT, bbox={"facecolor": FREE, "edgecolor": "none", "pad": 1})
    return ax


def fragmentation(log: Log, *, unit: str | None = "s", ax: Axes | None = None) -> Axes:
    """Draw how many slots of used blocks held no token over time.

    They are at the bottom, and those with a token are above them; the title says which share of the
    slots held no token, on average over time.

    Parameters
    ----------
    log : EventLog
    unit, ax : optional
        See `occupancy`.

    Returns
    -------
    matplotlib.axes.Axes
    """
    places, moments, label = _moments(log, unit)
    size = _state(log).block_size
    empty = [now.empty_slots for now in moments]
    full = [now.used * size - now.empty_slots for now in moments]
    areas = {"without a token": (EMPTY, empty), "with a token": (HELD, full)}
    ax = _stack(areas, places, label, "slots of used blocks", ax)
    lasted = [after - before for before, after in itertools.pairwise(places)]
    sums = [sum(map(operator.mul, slots, lasted)) for slots in (empty, full)]
    share = sums[0] / sum(sums) if sum(sums) else 0.0
    ax.set_title(f"{share:.1%} of the slots hold no token, on average")
    return ax


def _block_sizes(tensors: Mapping[str, Tensor], layout: str) -> dict[str, int]:
    """Return the lengths of the first three axes, which all tensors have."""
    axes = LAYOUTS[layout][:3]
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    fitting = {shape[:3] for shape in shapes.values() if len(shape) >= 3 and 0 not in shape}
    if len(fitting) != 1 or not all(shape[:3] in fitting for shape in shapes.values()):
        rule = f"must have the same first three axes, [{', '.join(axes)}, ...], and elements"
        raise BadParamError("arrays", rule, f"shapes {shapes}")
    return dict(zip(axes, fitting.pop(), strict=True))


def _neighbours(tensor: Tensor) -> int:
    """Return the bytes from one to the next of the outer of KV heads and slots, in a block."""
    blocks, *within = (
        step if length > 1 else 0
        for length, step in zip(tensor.shape[:3], tensor.strides[:3], strict=True)
    )
    steps = [abs(step) for step in (blocks, max(within, key=abs)) if step]
    return min(steps, default=tensor.dtype.itemsize * math.prod(tensor.shape[3:]))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first byte, and the one after the last."""
    ends = [(length - 1) * step for length, step in zip(tensor.shape, tensor.strides, strict=True)]
    low = tensor.address + sum(min(end, 0) for end in ends)
    return low, tensor.address + sum(max(end, 0) for end in ends) + tensor.dtype.itemsize


def _memories(tensors: Mapping[str, Tensor], memory: Any) -> list[tuple[int, list[str]]]:
    """Return where bytes are counted from, and the names of the tensors that are drawn there."""
    extents = {name: _extent(tensor) for name, tensor in tensors.items()}
    if memory is not None:
        low, high = _extent(adopt("memory", memory))
        for name, (start, stop) in extents.items():
            if start < low or stop > high:
                raise BadParamError("memory", "must hold all arrays", f"{name}, which is outside")
        return [(low, list(tensors))]
    found: list[tuple[int, int, list[str]]] = []
    for name, (start, stop) in sorted(extents.items(), key=lambda item: item[1]):
        if found and start < found[-1][1]:
            low, high, names = found.pop()
            found.append((low, max(high, stop), [*names, name]))
        else:
            found.append((start, stop, [name]))
    order = list(tensors).index  # as given
    groups = [(low, sorted(names, key=order)) for low, _, names in found]
    return sorted(groups, key=lambda group: order(group[1][0]))


def _pieces(name: str, tensor: Tensor, number: int, layout: str) -> Iterator[_Piece]:
    """Yield the pieces of a tensor in a block."""
    within = np.zeros(1, np.int64)  # from the first byte of a slot of a KV head to its elements
    for length, step in zip(tensor.shape[3:], tensor.strides[3:], strict=True):
        within = (within[:, None] + step * np.arange(length)).ravel()
    width = tensor.dtype.itemsize
    elements = _joined((first, first + width) for first in within.tolist())
    sizes, steps = (
        dict(zip(LAYOUTS[layout], numbers[:3], strict=False))
        for numbers in (tensor.shape, tensor.strides)
    )
    for head in range(sizes["num_kv_heads"]):
        for offset in range(sizes["block_size"]):
            first = tensor.address + number * steps["num_blocks"]
            first += head * steps["num_kv_heads"] + offset * steps["block_size"]
            for start, stop in elements:
                yield _Piece(first + start, first + stop, name, head, offset)


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return spans in order, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _runs(pieces: Iterable[_Piece], columns: int) -> list[list[_Piece]]:
    """Return the pieces in order, cut where there is a row or more between two of them."""
    runs: list[list[_Piece]] = []
    for piece in sorted(pieces):
        last = runs[-1][-1] if runs else None
        if last is not None and piece.start < last.stop:
            raise BadParamError("arrays", "must share no bytes", f"{last.name} and {piece.name}")
        if last is None or piece.start - last.stop >= columns:
            runs.append([])
        runs[-1].append(piece)
    return runs


def _in_rows(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, int]]:
    """Yield the row, the column and the width of each part of a span of bytes."""
    while start < stop:
        row, column = divmod(start, columns)
        width = min(stop - start, columns - column)
        yield row, column, width
        start += width


def _shade(head: int, part: float = 1) -> str:
    """Return the colour of a KV head, mixed with white unless `part` is 1."""
    light = 0.7 * (1 - part)
    mixed = [value + (1 - value) * light for value in to_rgba(_HEADS[head % len(_HEADS)])[:3]]
    return to_hex(mixed)


def _state(log: Log) -> Any:
    """Return the pool that a log began with."""
    if not hasattr(log, "entries"):
        raise BadParamTypeError("log", "must be an EventLog of a pool", type(log).__name__)
    return log.entries[0][1]


def _drawn(log: Log, unit: str | None) -> dict[float, int]:
    """Return the times of a log, each with the last entry that has it."""
    return {i if unit is None else when: i for i, (when, _) in enumerate(log.entries)}


def _moments(log: Log, unit: str | None) -> tuple[list[float], list[Any], str]:
    """Return where each moment begins and the last one ends, how the pool was filled, a label."""
    _state(log)  # refuses what is no log
    drawn, filled = _drawn(log, unit), log.occupancy()
    places = list(drawn)
    label = "event number" if unit is None else unit
    if unit == "s":
        label, places = "time, s", [when - places[0] for when in places]
    # Nobody knows how long the last one was, so it is drawn as long as the others on average.
    mean = (places[-1] - places[0]) / (len(places) - 1) if len(places) > 1 else 1
    return [*places, places[-1] + mean], [filled[entry] for entry in drawn.values()], label


def _table_entries(log: Log, unit: str | None) -> list[int]:
    """Return how many entries all block tables had in each moment."""
    signs = {"BlocksTaken": 1, "BlocksShared": 1, "BlocksReleased": -1}
    total, totals = 0, []
    for _, event in log.entries:
        kind = type(event).__name__
        if kind == "PoolState":
            total = sum(len(table) for table, _ in event.sequences.values())
        elif kind in signs:
            total += signs[kind] * len(event.blocks)
        totals.append(total)
    return [totals[entry] for entry in _drawn(log, unit).values()]


def _stack(
    areas: Mapping[str, tuple[str, Sequence[int]]],
    places: Sequence[float],
    xlabel: str,
    ylabel: str,
    ax: Axes | None,
) -> Axes:
    """Draw areas on top of each other: for each its name, its colour and its heights."""
    if ax is None:
        _, ax = pyplot.subplots(figsize=(9, 3.6), layout="constrained")
    below = [0] * len(places)
    for name, (colour, heights) in areas.items():
        above = [low + high for low, high in zip(below, [*heights, heights[-1]], strict=True)]
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "black", "linewidth": 0.3}
        ax.fill_between(places, below, above, step="post", label=name, **style)
        below = above
    ax.set(xlim=(places[0], places[-1]), ylim=(0, 1.03 * max(*below, 1)))
    ax.set_xlabel(xlabel, fontsize=11)
    ax.set_ylabel(ylabel, fontsize=11)
    styles = [(name, (colour, "")) for name, (colour, _) in areas.items()]
    _legend(ax, dict(reversed(styles)))  # in the order of the areas
    return ax


def _axes(ax: Axes | None, columns: int, rows: float, entries: int = 0) -> Axes:
    """Return axes with room for cells, and for so many entries of a legend."""
    if ax is None:
        height = max(0.9 + 0.5 * max(rows, 1), _height(entries))
        size = max(1.2 + 0.5 * columns, _NARROWEST), height
        _, ax = pyplot.subplots(figsize=size, layout="constrained")
    ax.set_aspect("equal")
    return ax


def _height(entries: int) -> float:
    """Return the inches that a figure needs for a legend."""
    return 0.8 + 0.21 * entries


def _ints(tables: Tables) -> dict[str, list[int]]:
    """Return the tables as lists, without padding (negative entries)."""
    tables = _mapping("tables", tables, '{"A": sequence.block_table}')
    try:
        return {
            name: [block for block in map(operator.index, table) if block >= 0]
            for name, table in tables.items()
        }
    except TypeError:
        rule = "must have a sequence of ints for each name"
        raise BadParamTypeError("tables", rule, shown(tables)) from None


def _mapping(subject: str, given: Any, such: str) -> Any:
    """Return a mapping, or raise."""
    if not isinstance(given, Mapping):
        rule = f"must be a mapping from names, such as {such}"
        raise BadParamTypeError(subject, rule, f"a {type(given).__name__}")
    return given


def _styles(tables: Tables) -> dict[str, tuple[str, str]]:
    """Return the colour and the hatch of each sequence."""
    styles = itertools.cycle((hue, hatch) for hatch in _HATCHES for hue in _HUES)
    return dict(zip(tables, styles, strict=False))


def _cell(
    ax: Axes,
    column: int,
    row: float,
    text: str,
    colour: str,
    hatch: str = "",
    width: int = 1,
    size: int = _FONT,
) -> None:
    style: dict[str, Any] = {"facecolor": colour, "edgecolor": "black", "linewidth": 0.5}
    style["clip_on"] = False  # or else half of an outer line is cut off
    ax.add_patch(Rectangle((column, row), width, 1, **style))
    if hatch:  # at the bottom, where no text is
        strip = Rectangle((column, row + 1 - _STRIP), width, _STRIP, hatch=hatch, **style)
        ax.add_patch(strip)
    place = (column + width / 2, row + 0.5 - (_STRIP / 2 if hatch else 0))
    drawn = ax.text(*place, text, ha="center", va="center", color=_ink(colour))
    drawn.set_fontsize(size)


def _number(ax: Axes, column: int, row: float, slot: int, colour: str) -> None:
    """Write the number of a slot into the corner of its cell."""
    place = (column + 0.06, row + 0.94)
    ax.text(*place, str(slot), va="bottom", color=_ink(colour), fontsize=_SMALL)


def _ink(colour: str) -> str:
    """Return whichever of black and white has more contrast."""
    return "black" if _lightness(colour) > 0.18 else "white"


def _lightness(colour: str) -> float:
    """Return the relative luminance of a colour, as WCAG defines it."""
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in map(float, to_rgba(colour)[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _legend(ax: Axes, styles: Mapping[str, tuple[str, str]], others: Iterable[Patch] = ()) -> None:
    patches = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.5, hatch=hatch, label=name)
        for name, (colour, hatch) in styles.items()
    ]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
    ax.legend(handles=[*patches, *others], **place, fontsize=_FONT, frameon=False)
