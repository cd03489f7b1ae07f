# SPDX-License-Identifier: Apache-2.0
"""The plots: what is drawn, not its pixels."""

from __future__ import annotations

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402

from pagedcache import plot  # noqa: E402

TABLES = {"A": [5, 2], "ended": [], "B": [5, 0, 3]}


@pytest.fixture(autouse=True)
def closes_figures():
    yield
    pyplot.close("all")


def cells(ax):
    """Return the colour and text of each cell, by column and row."""
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    found = {}
    for patch in ax.patches:
        x, y = patch.get_xy()
        assert (x, y) not in found, "two cells in one place"
        found[x, y] = to_hex(patch.get_facecolor()), texts[x + 0.5, y + 0.5]
    return found


def legend(ax):
    box = ax.get_legend()
    texts = [text.get_text() for text in box.get_texts()]
    return dict(
        zip(texts, (to_hex(patch.get_facecolor()) for patch in box.get_patches()), strict=True)
    )


def labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_pool():
    ax = plot.pool(TABLES, 7, columns=4)
    key = legend(ax)
    assert list(key) == ["A", "B", "shared", "free"]
    assert len(set(key.values())) == 4
    holders = ["B", "free", "A", "B", "free", "shared", "free"]
    assert cells(ax) == {
        (block % 4, block // 4): (key[holder], str(block)) for block, holder in enumerate(holders)
    }
    assert ax.get_title() == "4 of 7 blocks in use"
    assert ax.get_ylim() == (2, 0)  # block 0 at the top


def test_a_sequence_keeps_its_colour_when_another_ends():
    before = legend(plot.pool({"A": [0], "B": [1]}, 2))
    after = legend(plot.pool({"A": [], "B": [1]}, 2))
    assert after == {"B": before["B"], "free": before.get("free", "#ffffff")}


def test_an_empty_pool():
    ax = plot.pool({}, 3)
    assert legend(ax) == {"free": "#ffffff"}
    assert [text for _, text in cells(ax).values()] == ["0", "1", "2"]
    assert ax.get_title() == "0 of 3 blocks in use"


def test_many_sequences_all_have_a_colour():
    tables = {f"s{i}": [i] for i in range(20)}
    key = legend(plot.pool(tables, 20))
    assert set(tables) <= set(key)
    assert to_hex(plot.SHARED) not in key.values()


def test_block_tables():
    ax = plot.block_tables(TABLES)
    key = legend(plot.pool(TABLES, 7))
    assert cells(ax) == {
        (0, 0): (key["shared"], "5"),
        (1, 0): (key["A"], "2"),
        (0, 2): (key["shared"], "5"),
        (1, 2): (key["B"], "0"),
        (2, 2): (key["B"], "3"),
    }
    assert labels(ax.yaxis) == ["A", "ended", "B"]
    assert labels(ax.xaxis) == ["0", "1", "2"]


def test_no_block_tables():
    assert cells(plot.block_tables({})) == {}


def test_slot_mapping():
    ax = plot.slot_mapping([6, 7, -1, 0, 12, -3], block_size=4, num_blocks=3)
    free, written, invalid = map(to_hex, (plot.FREE, plot.WRITTEN, plot.INVALID))
    assert labels(ax.yaxis) == ["block 0", "block 1", "padding", "invalid"]
    found = cells(ax)
    assert len(found) == 2 * 4 + 2 + 1
    tokens = {place: what for place, what in found.items() if what[1]}
    assert tokens == {
        (0, 0): (written, "t3"),
        (2, 1): (written, "t0"),
        (3, 1): (written, "t1"),
        (0, 2): (free, "t2"),
        (1, 2): (free, "t5"),
        (0, 3): (invalid, "t4"),
    }
    hatched = {patch.get_xy() for patch in ax.patches if patch.get_hatch()}
    assert hatched == {(0, 2), (1, 2)}


def test_extra_rows_only_if_needed():
    assert labels(plot.slot_mapping([0], 2, 1).yaxis) == ["block 0"]
    assert labels(plot.slot_mapping([], 2, 1).yaxis) == []


def test_more_padding_than_a_block_is_wide():
    ax = plot.slot_mapping([-1] * 5, block_size=2, num_blocks=1)
    assert ax.get_xlim() == (0, 5)
    assert len(cells(ax)) == 5


@pytest.mark.parametrize(
    "draw",
    [
        lambda ax: plot.pool(TABLES, 7, ax=ax),
        lambda ax: plot.block_tables(TABLES, ax=ax),
        lambda ax: plot.slot_mapping([0], 4, 1, ax=ax),
    ],
    ids=["pool", "block_tables", "slot_mapping"],
)
def test_draws_where_it_is_told(draw):
    _, ax = pyplot.subplots()
    assert draw(ax) is ax
    assert pyplot.get_fignums() == [1]


def test_padding_in_tables_is_ignored():
    tables = {"A": np.array([3, 1, -1]), "B": np.array([3, -1, -1])}
    ax = plot.pool(tables, 4)
    assert ax.get_title() == "2 of 4 blocks in use"
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        plot.pool(tables, 4, columns=0)
    with pytest.raises(
        ValueError, match="blocks below num_blocks, 3, got block 3 in the table of A"
    ):
        plot.pool(tables, 3)


def test_a_block_twice_in_one_table_is_not_shared():
    ax = plot.pool({"A": [2, 2], "B": [1]}, 4)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["A", "B", "free"]


def test_two_tokens_with_one_slot_are_both_drawn():
    ax = plot.slot_mapping([1, 0, 1], 2, 1)
    assert [text.get_text() for text in ax.texts] == ["t1", "t0 t2"]
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        plot.slot_mapping([1], 0, 1)
