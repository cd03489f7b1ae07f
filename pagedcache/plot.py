# SPDX-License-Identifier: Apache-2.0
"""Plots of a paged cache. Requires matplotlib.

`pool`, `block_tables` and `slot_mapping` show one moment; `occupancy`, `sharing` and
`fragmentation` show what an `EventLog` has noted, over time.

Nothing else in this package imports this module. The colour of a sequence depends on its position
in the mapping of block tables, so keep finished sequences there, with an empty table, if colours
should stay the same from plot to plot.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FREE, SHARED, WRITTEN = "white", "tab:gray", "tab:blue"
INVALID = "tab:red"
# Over time: from dark to light, so that they differ in lightness as well as in hue.
HELD, CACHED, EMPTY = "#8fc1e3", "#fbe3b5", "#f0a860"
# Gray and red are left out, since they mean shared and invalid.
_SEQUENCES = ("blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan")

Tables = Mapping[str, Sequence[int]]


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
        Blocks that can be found by their tokens. Those in no table are drawn as cached, but free.
    columns : int
        Blocks per row of the grid.
    ax : matplotlib.axes.Axes, optional
        The axes to draw on. By default, those of a new figure.

    Returns
    -------
    matplotlib.axes.Axes
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    tables = _ints(tables)
    for name, table in tables.items():
        if table and max(table) >= num_blocks:
            rule = f"tables must have blocks below num_blocks, {num_blocks}"
            raise ValueError(f"{rule}, got block {max(table)} in the table of {name}")
    rows = -(-num_blocks // columns)
    ax = _axes(ax, columns, rows)
    colours = _colours(tables)
    holders = Counter(block for table in tables.values() for block in set(table))
    owner = {block: name for name, table in tables.items() for block in table}
    idle = {int(block) for block in cached} - owner.keys()
    for block in range(num_blocks):
        held = holders[block]
        colour = SHARED if held > 1 else colours[owner[block]] if held else FREE
        if block in idle:
            colour = CACHED
        row, column = divmod(block, columns)
        _cell(ax, column, row, str(block), colour)
    legend = {name: colours[name] for name, table in tables.items() if len(table)}
    if max(holders.values(), default=0) > 1:
        legend["shared"] = SHARED
    if idle:
        legend["cached, but free"] = CACHED
    _legend(ax, {**legend, "free": FREE})
    ax.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
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
    colours = _colours(tables)
    holders = Counter(block for table in tables.values() for block in set(table))
    for row, (name, table) in enumerate(tables.items()):
        for column, block in enumerate(table):
            _cell(ax, column, row, str(block), SHARED if holders[block] > 1 else colours[name])
    ax.set(xlim=(0, columns), ylim=(max(len(tables), 1), 0), xlabel="entry of the block table")
    ax.set_xticks([column + 0.5 for column in range(columns)], [str(i) for i in range(columns)])
    ax.set_yticks([row + 0.5 for row in range(len(tables))], list(tables))
    return ax


def slot_mapping(
    slots: Iterable[int], block_size: int, num_blocks: int, *, ax: Axes | None = None
) -> Axes:
    """Draw where tokens go, with a row for each block that is written and a column for each offset.

    Tokens that are not written are drawn in extra rows below: padding, which has a negative slot,
    and tokens with an invalid slot, past the end of the cache.

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
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    tokens = [(token, int(slot)) for token, slot in enumerate(slots)]
    valid: dict[int, list[str]] = {}
    for token, slot in tokens:
        if 0 <= slot < num_blocks * block_size:
            valid.setdefault(slot, []).append(f"t{token}")
    blocks = sorted({slot // block_size for slot in valid})
    outside = {
        "padding": [token for token, slot in tokens if slot < 0],
        "invalid": [token for token, slot in tokens if slot >= num_blocks * block_size],
    }
    outside = {kind: found for kind, found in outside.items() if found}
    labels = [f"block {block}" for block in blocks] + list(outside)
    columns = max(block_size, *map(len, outside.values())) if outside else block_size
    ax = _axes(ax, columns, len(labels))
    for row, block in enumerate(blocks):
        for offset in range(block_size):
            writers = valid.get(block * block_size + offset, [])
            _cell(ax, offset, row, " ".join(writers), WRITTEN if writers else FREE)
    for row, (kind, found) in enumerate(outside.items(), len(blocks)):
        for column, token in enumerate(found):
            if kind == "padding":
                _cell(ax, column, row, f"t{token}", FREE, hatch="////")
            else:
                _cell(ax, column, row, f"t{token}", INVALID)
    ax.set(xlim=(0, columns), ylim=(max(len(labels), 1), 0), xlabel="offset in the block")
    ax.set_xticks([i + 0.5 for i in range(block_size)], [str(i) for i in range(block_size)])
    ax.set_yticks([row + 0.5 for row in range(len(labels))], labels)
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
        "cached, but free": (CACHED, [now.cached_free for now in moments]),
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
    ax.axhline(num_blocks, color="black", linestyle="--", linewidth=1)
    ax.set_ylim(0, 1.05 * max(num_blocks, ax.get_ylim()[1]))
    text = ax.text(places[0], num_blocks, f" {num_blocks:,} blocks in all", va="bottom")
    text.set(fontsize=9, bbox={"facecolor": FREE, "edgecolor": "none", "pad": 1})
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


def _state(log: Log) -> Any:
    """Return the pool that a log began with."""
    return log.entries[0][1]


def _drawn(log: Log, unit: str | None) -> dict[float, int]:
    """Return the times of a log, each with the last entry that has it."""
    return {i if unit is None else when: i for i, (when, _) in enumerate(log.entries)}


def _moments(log: Log, unit: str | None) -> tuple[list[float], list[Any], str]:
    """Return where each moment begins and the last one ends, how the pool was filled, a label."""
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
    ax.set(xlim=(places[0], places[-1]), ylim=(0, max(*below, 1)))
    ax.set_xlabel(xlabel, fontsize=11)
    ax.set_ylabel(ylabel, fontsize=11)
    colours = {name: colour for name, (colour, _) in areas.items()}
    _legend(ax, dict(reversed(colours.items())))  # in the order of the areas
    return ax


def _axes(ax: Axes | None, columns: int, rows: int) -> Axes:
    if ax is None:
        _, ax = pyplot.subplots(figsize=(1.2 + 0.45 * columns, 0.9 + 0.45 * max(rows, 1)))
    ax.set_aspect("equal")
    return ax


def _ints(tables: Tables) -> dict[str, list[int]]:
    """Return the tables as lists, without padding (negative entries)."""
    return {
        name: [int(block) for block in table if int(block) >= 0] for name, table in tables.items()
    }


def _colours(tables: Tables) -> dict[str, str]:
    names = _SEQUENCES * (len(tables) // len(_SEQUENCES) + 1)
    return {name: f"tab:{colour}" for name, colour in zip(tables, names, strict=False)}


def _cell(ax: Axes, column: int, row: int, text: str, colour: str, hatch: str = "") -> None:
    style: dict[str, Any] = {"facecolor": colour, "edgecolor": "black", "linewidth": 0.5}
    ax.add_patch(Rectangle((column, row), 1, 1, hatch=hatch, **style))
    ink = "black" if _lightness(colour) > 0.18 else "white"  # whichever has more contrast
    # Text over a hatch needs a background of its own.
    box = {"facecolor": colour, "edgecolor": "none", "pad": 1} if hatch else None
    drawn = ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, bbox=box)
    drawn.set_fontsize(9)


def _lightness(colour: str) -> float:
    """Return the relative luminance of a colour, as WCAG defines it."""
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in map(float, to_rgba(colour)[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _legend(ax: Axes, colours: Mapping[str, str]) -> None:
    patches = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=name)
        for name, colour in colours.items()
    ]
    ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
