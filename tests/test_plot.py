# SPDX-License-Identifier: Apache-2.0
"""The plots: what is drawn, not its pixels."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.colors import to_hex, to_rgb  # noqa: E402

from pagedcache import BlockPool, Descriptor, EventLog, plot  # noqa: E402
from pagedcache.compat import vllm  # noqa: E402
from pagedcache.status import BadParamError  # noqa: E402

TABLES = {"A": [5, 2], "ended": [], "B": [5, 0, 3]}


@pytest.fixture(autouse=True)
def closes_figures():
    yield
    pyplot.close("all")


def texts_in(ax, patch, size=10):
    """Return the texts in a cell that have a size in points."""
    (x, y), width = patch.get_xy(), patch.get_width()
    found = []
    for text in ax.texts:
        at, line = text.get_position()
        inside = x < at < x + width and y < line < y + 1
        if inside and text.get_text() and text.get_fontsize() == size:
            found.append(text.get_text())
    return found


def text_in(ax, patch):
    found = texts_in(ax, patch)
    assert len(found) <= 1, "two texts in one cell"
    return found[0] if found else ""


def is_strip(patch):
    """Return whether a patch is the hatched part of a cell."""
    return patch.get_height() < 1


def cells(ax):
    """Return the colour and text of each cell, by column and row."""
    found = {}
    for patch in ax.patches:
        if not is_strip(patch):
            assert patch.get_xy() not in found, "two cells in one place"
            found[patch.get_xy()] = to_hex(patch.get_facecolor()), text_in(ax, patch)
    return found


def strips(ax):
    """Return the hatch of each cell that has one, by column and row."""
    cells = {patch.get_xy() for patch in ax.patches if patch.get_fill() and not is_strip(patch)}
    found = {}
    for patch in filter(is_strip, ax.patches):
        x, y = patch.get_xy()
        (cell,) = [at for at in cells if at[0] == x and at[1] < y < at[1] + 1]
        assert y + patch.get_height() == pytest.approx(cell[1] + 1)
        found[cell] = patch.get_hatch()
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
    ax = plot.pool(tables, 20)
    key = legend(ax)
    assert set(tables) <= set(key)
    assert to_hex(plot.SHARED) not in key.values()
    looks = [(p.get_facecolor(), p.get_hatch()) for p in ax.get_legend().get_patches()]
    assert len(set(looks)) == len(looks) == 21


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
    assert ax.get_title() == "5 entries of block tables, 4 blocks"
    assert labels(ax.yaxis) == ["A", "ended", "B"]
    assert labels(ax.xaxis) == ["0", "1", "2"]


def test_no_block_tables():
    assert cells(plot.block_tables({})) == {}


def test_slot_mapping():
    ax = plot.slot_mapping([6, 7, -1, 0, 20, -3, 16], block_size=4, num_blocks=5)
    free, written, invalid = map(to_hex, (plot.FREE, plot.WRITTEN, plot.INVALID))
    assert labels(ax.yaxis) == ["block 0", "block 1", "block 4", "padding", "invalid"]
    assert ax.get_title() == "4 of 7 tokens are written, to 3 blocks"
    assert ax.get_xlabel() == "offset in the block"
    found = cells(ax)
    assert len(found) == 3 * 4 + 2 + 1
    tokens = {place: what for place, what in found.items() if what[1]}
    assert texts_in(ax, next(p for p in ax.patches if p.get_xy() == (0, 5.5)), size=7) == ["20"]
    assert tokens == {  # there are gaps before block 4 and the rows of padding and invalid slots
        (0, 0): (written, "t3"),
        (2, 1): (written, "t0"),
        (3, 1): (written, "t1"),
        (0, 2.5): (written, "t6"),
        (0, 4): (free, "t2"),
        (1, 4): (free, "t5"),
        (0, 5.5): (invalid, "t4"),
    }
    assert set(strips(ax)) == {(0, 4), (1, 4)}
    assert [text.get_position() for text in ax.texts if text.get_text() == "..."] == [(2, 2.25)]
    blocks = [(y, block) for y, block in ((0, 0), (1, 1), (2.5, 4))]
    for patch in ax.patches:
        x, y = patch.get_xy()
        numbers = [str(block * 4 + int(x)) for at, block in blocks if at == y] or ["20"] * (
            y == 5.5
        )
        assert is_strip(patch) or texts_in(ax, patch, size=7) == numbers


def test_extra_rows_only_if_needed():
    assert labels(plot.slot_mapping([0], 2, 1).yaxis) == ["block 0"]
    assert labels(plot.slot_mapping([], 2, 1).yaxis) == []


def test_more_padding_than_a_block_is_wide():
    ax = plot.slot_mapping([-1] * 5 + [9] * 10, block_size=2, num_blocks=1)
    assert ax.get_xlim() == (0, 8)
    assert ax.get_ylim() == (4, 0)  # one row of padding, two of invalid slots, and gaps
    found = cells(ax)
    assert len(found) == 15
    assert found[0, 3][1] == "t13"


def test_several_tokens_in_one_slot():
    ax = plot.slot_mapping([1, 0, 1, 1], block_size=2, num_blocks=1)
    assert [text for _, text in cells(ax).values()] == ["t1", "t0 +2"]


def test_text_stands_out():
    def lightness(colour):  # WCAG's relative luminance
        linear = np.array(to_rgb(colour))
        linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    tables = {f"s{i}": [i] for i in range(8)} | {"other": [8, 0]}
    ax = plot.pool(tables, 10, cached=[9])
    for patch, text in zip(itertools.filterfalse(is_strip, ax.patches), ax.texts, strict=True):
        low, high = sorted(map(lightness, (patch.get_facecolor()[:3], text.get_color())))
        assert (high + 0.05) / (low + 0.05) > 4.5


BLOCKS, HEADS, SLOTS, SIZE = 5, 3, 4, 8  # of the caches below


def stacked():
    pool = np.zeros((2, BLOCKS, HEADS, SLOTS, SIZE), np.float16)
    return pool, "HND", {"K": pool[0], "V": pool[1]}


def packed():
    pool = np.zeros((BLOCKS, SLOTS, HEADS, 2 * SIZE), np.float16)
    return pool, "NHD", {"K": pool[..., :SIZE], "V": pool[..., SIZE:]}


def layers_inside_a_block():
    pool = np.zeros((BLOCKS, 2, 2, SLOTS, HEADS, SIZE), np.float32)
    return (
        pool,
        "NHD",
        {f"{n}{layer}": pool[:, layer, i] for layer in (0, 1) for i, n in enumerate("KV")},
    )


def one_layer_of_three():
    pool = np.zeros((BLOCKS, 3, 2, HEADS, SLOTS, SIZE), np.float16)
    return pool, "HND", {"K": pool[:, 1, 0], "V": pool[:, 1, 1]}


def heads_outside_of_blocks():
    pool = np.zeros((HEADS, BLOCKS, SLOTS, SIZE), np.float16)
    return pool, "HND", {"K": pool.swapaxes(0, 1)}


def scales_in_the_page():
    page = np.zeros((BLOCKS, HEADS, SLOTS, 2 * (SIZE + 4)), np.uint8)
    names = ("K", "V", "K scale", "V scale")
    views = vllm.per_token_head_views(page, "int8_per_token_head")
    return page, "NHD", dict(zip(names, views, strict=True))


def one_head():
    pool = np.zeros((BLOCKS, SLOTS, 13), np.float16)
    return pool, "HND", {"K": pool[:, None, :, :9], "V": pool[:, None, :, 9:]}


def gaps_between_elements():
    pool = np.zeros((BLOCKS, SLOTS, HEADS, SIZE, 2), np.uint8)
    return pool, "NHD", {"K": pool[..., 0]}


LAYOUTS = [stacked, packed, layers_inside_a_block, one_layer_of_three, heads_outside_of_blocks]
LAYOUTS += [scales_in_the_page, one_head, gaps_between_elements]


def drawn_bytes(ax):
    """Return the cells that each byte is in: its patch, hatch, and texts if it is filled."""
    first = dict(zip(ax.get_yticks() - 0.5, labels(ax.yaxis), strict=True))
    hatched = strips(ax)
    filled, marked = {}, set()
    for patch in ax.patches:
        (x, y), width = patch.get_xy(), patch.get_width()
        if is_strip(patch):
            continue
        assert 0 <= x < x + width <= ax.get_xlim()[1]
        start = int(first[y].replace(",", "")) + int(x)
        for byte in range(start, start + width):
            if patch.get_fill():
                assert byte not in filled, "drawn twice"
                texts = text_in(ax, patch), texts_in(ax, patch, size=7)
                filled[byte] = patch, hatched.get((x, y), ""), *texts
            else:
                marked.add(byte)
    return filled, marked


def bytes_of_block(memory, arrays, layout, block):
    """Return the array, KV head and offset of each byte of a block, by writing to the arrays."""
    found = {}
    for name, array in arrays.items():
        by_head = array[block] if layout == "HND" else array[block].swapaxes(0, 1)
        for head, offset in np.ndindex(by_head.shape[:2]):
            memory[...] = 0
            by_head[head, offset] = np.full(1, 0x7F7F7F7F, "u4").view(array.dtype)[0]
            for byte in np.flatnonzero(memory.ravel().view(np.uint8)):
                assert byte not in found
                found[byte] = name, head, offset
    return found


@pytest.mark.parametrize("columns", [None, 20])
@pytest.mark.parametrize("make", LAYOUTS, ids=lambda make: make.__name__)
def test_block(make, columns):
    memory, layout, arrays = make()
    block, offset = 3, 1
    slot = block * SLOTS + offset
    ax = plot.block(arrays, slot, layout=layout, memory=memory, columns=columns)
    filled, marked = drawn_bytes(ax)
    expected = bytes_of_block(memory, arrays, layout, block)
    assert filled.keys() == expected.keys()
    assert marked == {byte for byte, (_, _, at) in expected.items() if at == offset}

    box = ax.get_legend()
    key = dict(zip((text.get_text() for text in box.get_texts()), box.get_patches(), strict=True))
    hatches = {name: key[name].get_hatch() for name in arrays if len(arrays) > 1}
    assert len(set(hatches.values())) == len(hatches)
    colours = {}
    for byte, (name, head, at) in expected.items():
        patch, hatch, text, upwards = filled[byte]
        full = f"{name}, head {head}, slot {slot - offset + at}"
        assert not text or full.endswith(text)
        assert upwards in ([], [name])
        assert not (text and upwards)
        assert hatch == (hatches.get(name) or "")
        assert colours.setdefault((head, at), patch.get_facecolor()) == patch.get_facecolor()
    assert len(set(colours.values())) == len(colours)  # one for each head and slot
    for head in {head for head, _ in colours}:
        shades = [sum(colours[head, at][:3]) for at in range(SLOTS)]
        assert shades == sorted(shades, reverse=True)  # from light to dark
        assert colours[head, SLOTS - 1] == key[f"KV head {head}"].get_facecolor()


@pytest.mark.parametrize(
    "make", [stacked, packed, one_layer_of_three, one_head, scales_in_the_page]
)
def test_marked_bytes_are_those_that_are_written(make):
    memory, layout, arrays = make()
    k_cache, v_cache, *scales = arrays.values()
    slot = 3 * SLOTS + 1
    _, marked = drawn_bytes(plot.block(arrays, slot, layout=layout, memory=memory))
    heads = k_cache.shape[1 if layout == "HND" else 2]
    k, v = (np.full((1, heads, cache.shape[3]), -1.7, np.float16) for cache in (k_cache, v_cache))
    slots, options = np.array([slot]), {"layout": layout}
    named = dict(zip(("k_scale", "v_scale"), scales, strict=False))
    write = Descriptor.create(k_cache, v_cache, k, v, slots, **named, **options)
    changed, data = set(), memory.reshape(-1).view(np.uint8)
    for before in (0, 0xFF):  # any byte that is written differs from one of them
        data[...] = before
        write.calculate(k_cache, v_cache, k, v, slots, **named)
        changed |= {*np.flatnonzero(data != before).tolist()}
    assert changed == marked
    if not scales:
        told, found = set(), write.explain(slot)
        for cache, ranges in ((k_cache, found.k_ranges), (v_cache, found.v_ranges)):
            start = cache.ctypes.data - memory.ctypes.data
            told |= {start + byte for span in ranges for byte in range(*span)}
        assert told == marked


def test_rows_of_a_block():
    caches = {"HND": np.zeros((4, 2, 8, 16), np.int8), "NHD": np.zeros((4, 8, 2, 16), np.int8)}
    for layout, columns, first in (("HND", 128, ["256", "384"]), ("NHD", 32, [256, 288, 320])):
        ax = plot.block({"K": caches[layout]}, 9, layout=layout)
        assert ax.get_xlim() == (0, columns)
        assert labels(ax.yaxis)[:3] == [*map(str, first)]
    assert ax.get_title() == "block 1: slot 9 has 32 bytes, in one piece"


def test_memories_of_a_block():
    k, v = np.zeros((2, 4, 3, 2, 8), np.float16)  # one right after the other
    for other in (k, k.copy()):
        ax = plot.block({"V": v, "K": other}, 2, layout="HND")
        assert labels(ax.yaxis) == ["96", "128", "160"] * 2
        assert ax.get_title() == "block 1: slot 2 has 96 bytes, in 6 pieces"
        between = [text for text in ax.texts if text.get_position()[1] % 1 == 0.5]
        lines = [text for text in between if text.get_position()[1] not in ax.get_yticks()]
        assert [text.get_text() for text in lines] == ["V", "K"]

    memory, layout, arrays = stacked()
    ax = plot.block(arrays, 0, layout=layout, memory=memory)
    assert f"... {4 * HEADS * SLOTS * SIZE * 2:,} bytes ..." in [t.get_text() for t in ax.texts]

    every_other_slot = np.zeros((2, 4, 2, 8), np.int8)[:, ::2]  # 16 bytes are left out
    for columns, rows in ((16, ["0", "32"]), (17, ["0", "17", "34"])):
        ax = plot.block({"K": every_other_slot}, 0, layout="NHD", columns=columns)
        assert labels(ax.yaxis) == rows


def test_text_of_a_block_is_what_there_is_room_for():
    wide = {"cache": np.zeros((2, 1, 2, 64), np.int8)}
    narrow = {"cache": np.zeros((2, 2, 64, 64), np.int8)}
    assert plot.block(wide, 0, layout="HND").texts[0].get_text() == "cache, head 0, slot 0"
    assert not plot.block(narrow, 0, layout="HND").texts[0].get_text()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("layout must be HND or NHD, got 'NDH'", {"layout": "NDH"}),
        ("layout must be HND or NHD, got None", {"layout": None}),
        ("slot must be from 0 to 19, got 20", {"slot": 20}),
        ("slot must be from 0 to 19, got -1", {"slot": -1}),
        ("columns must be at least 1, got 0", {"columns": 0}),
        ("arrays must be a mapping from names, such as .*, got a list", {"arrays": [1]}),
        (r"same first three axes, .*, got shapes \{\}", {"arrays": {}}),
        (r"same first three axes, .*\(5, 3, 4, 8\), .*\(5, 4, 3\)", {"V": np.zeros((5, 4, 3))}),
        (r"same first three axes, .*\(1,\)", {"scale": np.zeros(1)}),
        ("memory must hold all arrays, got K, which is outside", {"memory": np.zeros(9)}),
    ],
)
def test_what_cannot_be_drawn(message, change):
    k_cache = np.zeros((BLOCKS, HEADS, SLOTS, SIZE), np.float16)
    more = {name: change.pop(name) for name in [*change] if name[0].isupper() or name == "scale"}
    options = {"arrays": {"K": k_cache, **more}, "slot": 0, "layout": "HND", **change}
    with pytest.raises(BadParamError, match=message):
        plot.block(**options)
    with pytest.raises(BadParamError, match="arrays must share no bytes, got K and V"):
        plot.block({"K": k_cache, "V": k_cache}, 0, layout="HND")


def test_cached_blocks():
    ax = plot.pool(TABLES, 7, cached=np.array([1, 2, 5]))
    key = legend(ax)
    assert list(key) == ["A", "B", "shared", "free, but can be found", "free"]
    # Block 2 is held by A, and block 5 is shared: they are drawn as without `cached`.
    holders = ["B", "free, but can be found", "A", "B", "free", "shared", "free"]
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
    assert list(key) == ["free", "free, but can be found", "held by one", "shared by several"]
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
                "free, but can be found": now.cached_free,
                "free": now.free,
            }
        )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("event number", "blocks (6 in all)")
    assert ax.get_xlim() == (0, len(filled))
    assert ax.get_ylim() == (0, 1.03 * 6)


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
    assert [column["free, but can be found"] for column in found[:3]] == [3, 2, 1]
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
        lambda ax: plot.block({"K": np.zeros((1, 1, 1))}, 0, layout="HND", ax=ax),
    ],
    ids=["pool", "block_tables", "slot_mapping", "block"],
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


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: plot.slot_mapping([1], 0, 1), "block_size must be at least 1, got 0"),
        (lambda: plot.slot_mapping([[1, 2]], 4, 8), r"slots must be ints in one dimension.*\[\[1"),
        (lambda: plot.pool(BlockPool(num_blocks=4, block_size=2), 4),
         "tables must be a mapping from names, such as .*, got a BlockPool"),
        (lambda: plot.block_tables([[1]]), "tables must be a mapping .*, got a list"),
        (lambda: plot.pool({"A": 3}, 4), "tables must have a sequence of ints for each name, got"),
        (lambda: plot.pool({}, 0), "num_blocks must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments(draw, message):
    with pytest.raises(BadParamError, match=message):
        draw()


@pytest.mark.parametrize("draw", OVER_TIME)
def test_a_pool_is_no_log(draw):
    with pytest.raises(BadParamError, match="log must be an EventLog of a pool, got BlockPool"):
        draw(BlockPool(num_blocks=4, block_size=2))


def test_without_matplotlib():
    code = "import sys; sys.modules['matplotlib'] = None; import pagedcache.plot"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert "ImportError: pagedcache.plot needs matplotlib, which the extra bench" in found.stderr


def test_a_pool_is_no_wider_than_its_blocks():
    assert plot.pool({}, 12).get_xlim() == (0, 12)
    assert plot.pool({}, 20).get_xlim() == (0, 16)
