# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of the site: ``python docs/pictures.py``.

Each is written twice to docs/_static, for light and for dark pages.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

STATIC = Path(__file__).parent / "_static"
LIGHT = {
    "text": "#1f2328", "soft": "#57606a", "line": "#8c959f", "empty": "#f3f5f7",
    "a": "#a5dbe3", "b": "#f7cf9c", "c": "#cfc3f2", "d": "#b8e0b0", "mark": "#c2410c",
}  # fmt: skip
DARK = {
    "text": "#e6edf3", "soft": "#a9b4c0", "line": "#6e7681", "empty": "#222832",
    "a": "#1c6470", "b": "#80521b", "c": "#53429a", "d": "#31673a", "mark": "#fb923c",
}  # fmt: skip


class Picture:
    """Shapes with colours of a palette, by name."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title, self.shapes = (width, height), title, list[str]()

    def box(
        self, x: float, y: float, w: float, h: float, fill: str = "empty", *, text: str = "",
        mark: bool = False, dashed: bool = False, size: int = 15, corner: int = 3,
    ) -> None:  # fmt: skip
        """Draw a box with a text in its middle."""
        line = 'stroke="{mark}" stroke-width="3"' if mark else 'stroke="{line}" stroke-width="1"'
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{corner}" fill="{{{fill}}}" '
            f"{line}{dash}/>"
        )
        lines = text.split("\n") if text else []
        for row, each in enumerate(lines):
            middle = y + h / 2 + (row - (len(lines) - 1) / 2) * (size + 4) + size * 0.35
            self.text(x + w / 2, middle, each, anchor="middle", size=size)

    def text(
        self, x: float, y: float, text: str, *, anchor: str = "start", size: int = 15,
        colour: str = "text", bold: bool = False, code: bool = False,
    ) -> None:  # fmt: skip
        """Write one line."""
        font = ' font-family="ui-monospace,Menlo,Consolas,monospace"' if code else ""
        weight = ' font-weight="600"' if bold else ""
        self.shapes.append(
            f'<text x="{x}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" '
            f'fill="{{{colour}}}"{font}{weight}>{escape(text)}</text>'
        )

    def arrow(self, *points: tuple[float, float], colour: str = "soft") -> None:
        """Draw an arrow along points, or a curve from one to another that is beside and below."""
        (x1, y1), *_, (x2, y2) = points
        if len(points) == 2 and x1 != x2 and y1 != y2:
            middle = (y1 + y2) / 2
            path = f"M {x1} {y1} C {x1} {middle:g} {x2} {middle:g} {x2} {y2}"
        else:
            path = "M " + " L ".join(f"{x} {y}" for x, y in points)
        self.shapes.append(
            f'<path d="{path}" fill="none" stroke="{{{colour}}}" stroke-width="2" '
            f'marker-end="url(#head-{colour})"/>'
        )

    def svg(self, palette: dict[str, str]) -> str:
        """Return the picture as text."""
        width, height = self.size
        heads = "".join(
            f'<marker id="head-{colour}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" orient="auto">'
            f'<path d="M0 0L10 5L0 10z" fill="{{{colour}}}"/></marker>'
            for colour in ("soft", "mark")
        )
        body = "\n".join((f"<defs>{heads}</defs>", *self.shapes)).format_map(palette)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="system-ui,sans-serif" role="img">\n'
            f"<title>{escape(self.title)}</title>\n{body}\n</svg>\n"
        )


def slots() -> Picture:
    """Draw tokens of two sequences, their block tables, and the slots of a cache."""
    p = Picture(880, 400, "Block tables say in which blocks of the cache the tokens are.")
    tables = {"A": ("a", [2, 0, 4], 10, 20), "B": ("b", [2, 5], 7, 500)}
    cell, size = 32, 4
    for name, (colour, table, count, x) in tables.items():
        p.text(x, 24, f"Sequence {name}, {count} tokens", bold=True)
        for token in range(count):
            shared = token < size
            fill = "c" if shared else colour
            p.box(
                x + token * cell,
                36,
                cell,
                32,
                fill,
                text=str(token),
                mark=name + str(token) == "A9",
            )
        p.text(x, 108, "block table", colour="soft")
        for entry, block in enumerate(table):
            left = x + 100 + entry * 48
            p.box(left, 90, 40, 28, "c" if entry == 0 else colour, text=str(block))
            p.arrow((left + 20, 120), (20 + block * 143 + 62, 218))
    p.text(20, 330, "slot = block_table[t // 4] * 4 + t % 4", code=True)
    p.text(
        20, 358, "Token 9 of A: entry 9 // 4 = 2 of its block table is block 4, offset 9 % 4 = 1, "
        "so slot 4 * 4 + 1 = 17."
    )  # fmt: skip
    p.text(
        20, 384, "Block 2 is shared: both sequences begin with the same four tokens.", colour="soft"
    )
    held = {
        block: "c" if entry == 0 else colour
        for colour, table, *_ in tables.values()
        for entry, block in enumerate(table)
    }
    used = {2: 4, 0: 4, 4: 2, 5: 3}
    for block in range(6):
        x = 20 + block * 143
        p.text(x + 62, 290, f"block {block}", anchor="middle", colour="soft")
        for offset in range(size):
            slot = block * size + offset
            full = offset < used.get(block, 0)
            p.box(x + offset * 31, 224, 31, 46, held[block] if full else "empty", text=str(slot),
                  mark=slot == 17, size=14)  # fmt: skip
    return p


def layouts() -> Picture:
    """Draw the memory of one block in both layouts."""
    p = Picture(880, 330, "Where the rows of a block are in memory, for the layouts HND and NHD.")
    fills = "abd"
    for y, name, order, note in (
        (20, "HND", [(h, s) for h in range(3) for s in range(4)],
         "[blocks, KV heads, slots, head size]: all slots of a head are neighbours"),
        (180, "NHD", [(h, s) for s in range(4) for h in range(3)],
         "[blocks, slots, KV heads, head size]: all heads of a slot are neighbours"),
    ):  # fmt: skip
        p.text(20, y + 8, name, bold=True)
        p.text(70, y + 8, note, colour="soft")
        for place, (head, slot) in enumerate(order):
            x = 20 + place * 70
            p.box(x, y + 24, 68, 56, fills[head], text=f"head {head}\nslot {slot}", size=14,
                  mark=slot == 1)  # fmt: skip
        p.arrow((20, y + 98), (860, y + 98))
        p.text(20, y + 120, "memory of one block", colour="soft", size=13)
    p.text(860, 300, "Marked: the rows of one token, in slot 1.", anchor="end", colour="mark")
    return p


def scales() -> Picture:
    """Draw what shares a scale, for each shape of scales."""
    p = Picture(880, 320, "The elements of a cache that share a scale, for each shape of scales.")
    # The colour is a sum of these, times head, slot, and dimensions in groups of the last number.
    kinds = (
        ("whole cache", "[1]", "read", (0, 0, 0, 1)),
        ("a head", "[heads]", "read", (1, 0, 0, 1)),
        ("a dimension", "[heads, size]", "read", (1, 0, 1, 1)),
        ("a row", "[blocks, slots, heads]", "computed", (2, 1, 0, 1)),
        ("a group of a row", "[..., size / n]", "computed", (1, 3, 1, 4)),
    )
    for place, (name, shape, kind, (by_head, by_slot, by_dim, group)) in enumerate(kinds):
        x = 14 + place * 175
        p.text(x, 24, name, bold=True)
        for head in range(2):
            top = 40 + head * 92
            for slot in range(4):
                for dim in range(8):
                    colour = by_head * head + by_slot * slot + by_dim * (dim // group)
                    fill = "abcd"[colour % 4]
                    p.box(x + dim * 19, top + slot * 19, 19, 19, fill, corner=0)
        p.text(x, 244, shape, code=True, size=13 if len(shape) < 20 else 11)
        p.text(x, 268, kind, colour="mark" if kind == "computed" else "soft")
    p.text(
        14, 304, "Each picture: two KV heads, one above the other. A line is a slot, a column is a "
        "dimension. Neighbours of one colour share a scale.", colour="soft", size=13
    )  # fmt: skip
    return p


def formats() -> Picture:
    """Draw the bits of each format."""
    p = Picture(880, 268, "The bits of each format: sign, exponent and mantissa, or an integer.")
    kinds = (
        ("float16", 16, 5), ("bfloat16", 16, 8), ("float8_e4m3fn", 8, 4), ("float8_e5m2", 8, 5),
        ("int8", 8, 0), ("int4", 4, 0),
    )  # fmt: skip
    for row, (name, bits, exponent) in enumerate(kinds):
        y = 12 + row * 36
        p.text(20, y + 19, name, code=True)
        for bit in range(bits):
            fill = "d" if not exponent else "c" if bit == 0 else "a" if bit <= exponent else "b"
            p.box(200 + bit * 40, y, 38, 28, fill, corner=2)
        if name == "int4":
            for bit in range(bits):
                p.box(200 + (bits + bit) * 40, y, 38, 28, "empty", corner=2, dashed=True)
            p.text(200 + 8 * 40 + 12, y + 19, "the other half of the byte: another element",
                   colour="soft", size=13)  # fmt: skip
    for place, (fill, name) in enumerate(
        (("c", "sign"), ("a", "exponent"), ("b", "mantissa"), ("d", "integer"))
    ):
        p.box(200 + place * 130, 240, 18, 18, fill)
        p.text(226 + place * 130, 254, name, size=14)
    return p


def rounding() -> Picture:
    """Draw what quantising does to one number."""
    largest, x, most = 1.5, 0.5, 127
    scale = largest / most
    code = round(x / scale)
    title = f"{x} becomes the code {code}, and is read back as {code * scale:.3f}."
    p = Picture(880, 170, title)
    p.text(20, 26, f"int8: the largest magnitude that shares the scale is {largest}, so "
           f"scale = {largest} / {most} = {scale:.5f}", code=True, size=13)  # fmt: skip
    stages = (
        (f"{x}", "an element", "empty", ""), (f"{x / scale:.2f}", "", "a", "/ scale"),
        (f"{code}", "the code: stored", "b", "round"),
        (f"{code * scale:.3f}", "what is read", "empty", "* scale"),
    )  # fmt: skip
    for place, (number, note, fill, how) in enumerate(stages):
        x0 = 20 + place * 230
        p.box(x0, 62, 130, 48, fill, text=number, mark=place == 2)
        p.text(x0 + 65, 134, note, anchor="middle", colour="soft", size=14)
        if place:
            p.arrow((x0 - 98, 86), (x0 - 3, 86))
            p.text(x0 - 50, 76, how, anchor="middle", size=13, code=True)
    p.text(860, 162, f"error: {abs(x - code * scale):.3f}", anchor="end", colour="mark", size=14)
    return p


def prefix() -> Picture:
    """Draw two prompts, and the block that both begin with."""
    p = Picture(880, 250, "The second prompt begins with a full block that is found again.")
    prompts = (
        ("first prompt", (1, 2, 3, 4, 5, 6), "a", (0, 1), 20),
        ("second prompt", (1, 2, 3, 4, 9), "b", (0, 2), 480),
    )
    for name, tokens, fill, table, x in prompts:
        p.text(x, 24, name, bold=True)
        for place, token in enumerate(tokens):
            first = place < 4
            p.box(x + place * 44 + 16 * (not first), 36, 44, 32, "c" if first else fill,
                  text=str(token))  # fmt: skip
        p.arrow((x + 88, 70), (130 + table[0] * 310, 158))
        p.arrow((x + 236, 70), (130 + table[1] * 310, 158))
    for block, (held, fill) in enumerate((("1234", "c"), ("56", "a"), ("9", "b"))):
        x = 42 + block * 310
        for offset in range(4):
            text = held[offset : offset + 1]
            p.box(x + offset * 44, 162, 44, 40, fill if text else "empty", text=text)
        p.text(x + 88, 222, f"block {block}", anchor="middle", colour="soft")
    p.text(42, 244, "full: found by the hash of its tokens and of all before them", colour="mark",
           size=13)  # fmt: skip
    return p


def write() -> Picture:
    """Draw one launch, from rows to slots."""
    p = Picture(880, 190, "One launch takes rows through steps and a format to their slots.")
    stages = (
        ("K, V, and q", "rows by token", "empty"),
        ("steps", "normalise, rotate,\nan expression of yours", "a"),
        ("format and scale", "copy, 8 bits, 4 bits", "b"),
        ("slots", "of a paged cache", "c"),
    )
    for place, (name, note, fill) in enumerate(stages):
        x = 20 + place * 220
        p.box(x, 40, 180, 92, fill)
        lines = note.split("\n")
        p.text(x + 90, 72, name, anchor="middle", bold=True)
        for row, line in enumerate(lines):
            p.text(x + 90, 98 + row * 20, line, anchor="middle", size=14)
        if place:
            p.arrow((x - 38, 86), (x - 3, 86))
    p.box(228, 20, 426, 132, "none", dashed=True, corner=8)
    p.text(441, 174, "one kernel, one launch, float32 inside", anchor="middle", colour="soft")
    return p


def house() -> Picture:
    """Draw the folders of the package, in dependency order."""
    p = Picture(880, 560, "The layers of the package; each imports only those below it.")
    rows = (
        ("a", "faces", "command line  infiniop  compat  torch  transfer", "what users call"),
        ("a", "kv_cache", "arrays of all layers, with a pool and host memory", "a whole cache"),
        ("b", "operators", "paged_caching  paged_gather  programs  slot_mapping  blocks",
         "which operator?"),
        ("c", "steps", "rms_norm, rope, quantize, expressions", "what happens to a row?"),
        ("c", "cache", "layout, formats, scales, tables of tensors", "what is a paged cache?"),
        ("c", "expressions", "text to a tree, to NumPy and to CUDA", "what does a user say?"),
        ("d", "backend", "cpu  nvidia  rocm  others by entry point", "which device?"),
        ("d", "arrays", "numpy  cupy  torch  jax  dlpack", "which array library?"),
        ("d", "pool", "block tables, prefixes, events", "which block holds which tokens?"),
        ("empty", "words", "tensors  rules  dtypes  status", "what all use"),
    )  # fmt: skip
    for place, (fill, name, parts, question) in enumerate(rows):
        y = 14 + place * 50
        parts = parts.replace("  ", ", ")
        p.box(20, y, 550, 42, fill)
        p.text(34, y + 26, name, bold=True)
        p.text(142, y + 26, parts, size=13)
        p.text(622, y + 26, question, colour="soft")
    p.arrow((596, 20), (596, 500))
    p.text(20, 542, "Imports go down, never up: a test reads them. cuda_src holds the kernels that "
           "operators name.", colour="soft", size=14)  # fmt: skip
    return p


def call() -> Picture:
    """Draw the path of one call."""
    p = Picture(880, 430, "A call that was seen before goes straight to its launch.")
    p.box(330, 14, 220, 44, "empty", text="paged_caching(...)")
    p.arrow((440, 58), (440, 92))
    p.box(300, 94, 280, 56, "b", text="matcher: have arrays like\nthese been checked?")
    p.text(236, 114, "no", colour="soft")
    p.text(452, 176, "yes: the hot path", colour="mark")
    p.arrow((300, 122), (170, 122), (170, 182))
    steps = (
        ("a", "each array becomes a Tensor\n(arrays)"),
        ("c", "rules, layout, formats, sizes\n(operators, cache)"),
        ("d", "device opened, kernel compiled\n(backend)"),
    )
    for row, (fill, text) in enumerate(steps):
        y = 184 + row * 76
        p.box(20, y, 300, 54, fill, text=text, size=14)
        if row:
            p.arrow((170, y - 22), (170, y - 2))
    p.arrow((320, 363), (450, 363), (450, 320))
    p.text(340, 386, "and a matcher for the next call", colour="soft", size=13)
    p.arrow((440, 150), (440, 260), colour="mark")
    p.box(360, 262, 180, 56, "d", text="plan: instance, grid,\nparameters", size=14)
    p.arrow((540, 290), (604, 290), colour="mark")
    p.box(606, 262, 254, 56, "d", text="kernel: slot, vectors of K and V,\nstore", size=14)
    p.arrow((733, 318), (733, 362))
    p.box(606, 364, 254, 50, "empty", text="report: slots past the end,\nfor check()", size=14)
    return p


PICTURES = (slots, layouts, formats, rounding, scales, prefix, write, house, call)


def draw() -> dict[str, str]:
    """Return all files, by name."""
    palettes = {"light": LIGHT, "dark": DARK}
    return {
        f"{picture.__name__}-{name}.svg": picture().svg({**palette, "none": "none"})
        for picture in PICTURES
        for name, palette in palettes.items()
    }


if __name__ == "__main__":
    for name, text in draw().items():
        (STATIC / name).write_text(text, "utf-8")
