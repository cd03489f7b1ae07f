# SPDX-License-Identifier: Apache-2.0
"""The plots: what is drawn, not its pixels."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402

from pagedcache import BlockPool, EventLog, plot  # noqa: E402

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


def test_text_stands_out():
    def lightness(colour):  # WCAG's relative luminance
        linear = np.array(to_rgb(colour))
        linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    tables = {f"s{i}": [i] for i in range(8)} | {"other": [8, 0]}
    ax = plot.pool(tables, 10, cached=[9])
    for patch, text in zip(ax.patches, ax.texts, strict=True):
        low, high = sorted(map(lightness, (patch.get_facecolor()[:3], text.get_color())))
        assert (high + 0.05) / (low + 0.05) > 4.5


def test_cached_blocks():
    ax = plot.pool(TABLES, 7, cached=np.array([1, 2, 5]))
    key = legend(ax)
    assert list(key) == ["A", "B", "shared", "cached, but free", "free"]
    # Block 2 is held by A, and block 5 is shared: they are drawn as without `cached`.
    holders = ["B", "cached, but free", "A", "B", "free", "shared", "free"]
    assert [colour for colour, _ in cells(ax).values()] == [key[holder] for holder in holders]
    assert ax.get_title() == "4 of 7 blocks in use"
    assert list(legend(plot.pool(TABLES, 7, cached=[5]))) == ["A", "B", "shared", "free"]


def some_events(clock):
    """Return the log of a pool in which there is sharing, a copy and an eviction."""
    pool = BlockPool(num_blocks=6, block_size=4)
    before = pool.sequence(range(6))  # the log does not begin with an empty pool
    with EventLog(pool, clock=clock) as log:
        again = pool.sequence(range(9))
        fork = again.fork()
        fork.append(9)
        pool.take_copies()
        for sequence in (before, again, fork):
            sequence.free()
        pool.sequence(range(50, 70))
    return log


@pytest.fixture
def log():
    times = iter(range(100, 200))
    return some_events(lambda: next(times) * 0.5)


def area_at(ax, x, y):
    """Return the label of the area in which a point is."""
    found = [
        area.get_label()
        for area in ax.collections
        if any(path.contains_point((x, y)) for path in area.get_paths())
    ]
    assert len(found) <= 1, "areas overlap"
    return found[0] if found else None


def columns(ax, middles):
    """Return how high each area is in each place, from the bottom."""
    top = int(max(area.get_datalim(ax.transData).y1 for area in ax.collections))
    found = [[area_at(ax, x, y + 0.5) for y in range(top)] for x in middles]
    for column in found:  # each area is in one piece, in the same order everywhere
        names = [name for name, _ in itertools.groupby(column)]
        order = [area.get_label() for area in ax.collections]
        assert names == [name for name in [*order, None] if name in names]
    return [Counter(column) for column in found]


def test_occupancy(log):
    ax = plot.occupancy(log, unit=None)
    key = legend(ax)
    assert list(key) == ["free", "cached, but free", "held by one", "shared by several"]
    assert len(set(key.values())) == 4
    assert [to_hex(area.get_facecolor()[0]) for area in ax.collections] == [*key.values()][::-1]
    filled = log.occupancy()
    assert max(now.shared for now in filled) == 3
    assert max(now.cached_free for now in filled) == 2
    for column, now in zip(columns(ax, np.arange(len(filled)) + 0.5), filled, strict=True):
        assert column == Counter(
            {
                "shared by several": now.shared,
                "held by one": now.used - now.shared,
                "cached, but free": now.cached_free,
                "free": now.free,
            }
        )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("event number", "blocks (6 in all)")
    assert ax.get_xlim() == (0, len(filled))
    assert ax.get_ylim() == (0, 6)


def test_sharing(log):
    ax = plot.sharing(log, unit=None)
    assert list(legend(ax)) == ["saved by sharing", "in use"]
    found = columns(ax, np.arange(len(log)) + 0.5)
    filled = log.occupancy()
    assert [column["in use"] for column in found] == [now.used for now in filled]
    # `before` has 2 blocks. `again` finds one of them and takes 2, and `fork` has all of its 3. The
    # copy changes an entry; then the three are freed, and the last sequence takes 5.
    entries = [2, 3, 5, 5, 5, 8, 8, 8, 8, 6, 3, 0, 0, 5, 5, 5]
    saved = [column["saved by sharing"] for column in found]
    assert saved == [max(n - now.used, 0) for n, now in zip(entries, filled, strict=True)]
    assert max(saved) == 4
    assert [text.get_text().strip() for text in ax.texts] == ["6 blocks in all"]


def test_fragmentation(log):
    ax = plot.fragmentation(log, unit=None)
    assert list(legend(ax)) == ["with a token", "without a token"]
    filled = log.occupancy()
    empty = [now.empty_slots for now in filled]
    assert max(empty) > 4
    for column, now in zip(columns(ax, np.arange(len(filled)) + 0.5), filled, strict=True):
        assert column["without a token"] == now.empty_slots
        assert column["with a token"] == now.used * 4 - now.empty_slots
    share = sum(empty) / sum(now.used * 4 for now in filled)
    assert ax.get_title() == f"{share:.1%} of the slots hold no token, on average"
    assert ax.get_ylabel() == "slots of used blocks"


def test_seconds_are_counted_from_the_first_entry(log):
    ax = plot.occupancy(log)
    assert ax.get_xlabel() == "time, s"
    first, last = (log.entries[i][0] for i in (0, -1))
    start, end = ax.get_xlim()
    assert start == 0 < last - first <= end < 1.2 * (last - first)
    other = plot.occupancy(log, unit="step")
    assert other.get_xlabel() == "step"
    assert other.get_xlim() == (first, first + end)


OVER_TIME = (plot.occupancy, plot.sharing, plot.fragmentation)


def test_of_entries_with_one_time_the_last_is_drawn():
    pool, now = BlockPool(num_blocks=4, block_size=2), 0
    with EventLog(pool, clock=lambda: now) as log:
        first = pool.sequence(range(6))
        first.free()
        now = 3
        pool.sequence(range(20, 23))
        now = 4
        pool.sequence(range(30, 31))
    found = columns(plot.occupancy(log, unit="step"), [1.5, 3.5, 4.5, 5.5])
    assert [column["held by one"] for column in found[:3]] == [0, 2, 3]
    assert [column["cached, but free"] for column in found[:3]] == [3, 2, 1]
    # The last moment is as long as the others on average, 2.
    assert found[3] == found[2]
    fragmentation = plot.fragmentation(log, unit="step")
    # 1 of 4 slots for 1 step, then 2 of 6 for 2.
    assert fragmentation.get_title().startswith(f"{(1 + 2 * 2) / (4 + 2 * 6):.1%}")


@pytest.mark.parametrize("draw", OVER_TIME)
@pytest.mark.parametrize("unit", ["s", None])
def test_a_log_without_events(draw, unit):
    log = EventLog(BlockPool(num_blocks=4, block_size=2))
    ax = draw(log, unit=unit)
    assert ax.get_xlim() == (0, 1)
    assert area_at(ax, 0.5, 0.5) == ("free" if draw is plot.occupancy else None)


@pytest.mark.parametrize("draw", OVER_TIME)
def test_over_time_draws_where_it_is_told(draw, log):
    _, ax = pyplot.subplots()
    assert draw(log, ax=ax) is ax
    assert pyplot.get_fignums() == [1]


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
