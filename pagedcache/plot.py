# SPDX-License-Identifier: Apache-2.0
"""Plots of a paged cache: the pool, the block tables, a slot mapping. Requires matplotlib.

Nothing else in this package imports this module. The colour of a sequence depends on its position
in the mapping of block tables, so keep finished sequences there, with an empty table, if colours
should stay the same from plot to plot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.patches import Patch, Rectangle

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FREE, SHARED, WRITTEN = "white", "tab:gray", "tab:blue"
INVALID = "tab:red"
# Gray and red are left out, since they mean shared and invalid.
_SEQUENCES = ("blue", "orange", "green", "purple", "brown", "pink", "olive", "cyan")

Tables = Mapping[str, Sequence[int]]


def pool(tables: Tables, num_blocks: int, *, columns: int = 16, ax: Axes | None = None) -> Axes:
    """Draw the blocks of a pool as a grid, coloured by sequence, or as shared or free.

    Parameters
    ----------
    tables : mapping of str to sequence of int
        The block table of each sequence, by its name; negative entries are padding.
    num_blocks : int
        Number of blocks in the pool.
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
    for block in range(num_blocks):
        held = holders[block]
        colour = SHARED if held > 1 else colours[owner[block]] if held else FREE
        row, column = divmod(block, columns)
        _cell(ax, column, row, str(block), colour)
    legend = {name: colours[name] for name, table in tables.items() if len(table)}
    if max(holders.values(), default=0) > 1:
        legend["shared"] = SHARED
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
    ink = "black" if sum(to_rgba(colour)[:3]) > 1.6 else "white"
    # Text over a hatch needs a background of its own.
    box = {"facecolor": colour, "edgecolor": "none", "pad": 1} if hatch else None
    drawn = ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, bbox=box)
    drawn.set_fontsize(7)


def _legend(ax: Axes, colours: Mapping[str, str]) -> None:
    patches = [
        Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=name)
        for name, colour in colours.items()
    ]
    ax.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)
