# SPDX-License-Identifier: Apache-2.0
"""The main job on real input, told step by step: ``python -m pagedcache demo``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import pagedcache as pc
from pagedcache.demo.model import ModelFile, NoModelError, find_model, require_readers
from pagedcache.demo.pool import PADDING, Pool, Sequence
from pagedcache.dtypes import as_dtype

Array = NDArray[Any]

PREFIX = (
    "You are a patient librarian who answers the questions of visitors. Answer in one short "
    "paragraph, in plain words, without lists, and say so when you do not know.\n\n"
)
PROMPTS = {
    "A": "Question: Why is the sky blue at noon and red in the evening?\nAnswer: Air scatters blue "
    "light more than red, and in the evening the light has crossed so much more air that little "
    "but red is left.",
    "B": "Question: What is a page table?\nAnswer: A list that says where each page of a program's "
    "memory really is.",
    "C": "Question: How many legs does a spider have, and how many does a beetle have?\nAnswer: A "
    "spider has 8 legs and a beetle has 6.",
    "D": "Question: Who wrote the first program for a machine, when did that happen, and what was "
    "the program meant to compute?\nAnswer: Ada Lovelace is usually named; in 1843 she published "
    "a plan by which the Analytical Engine, which was never finished, would have computed the "
    "Bernoulli numbers.",
}
REPEATS = 20  # of each timed write
BATCH = 8  # decode steps are padded to this many tokens
COLOURS = {"A": 36, "B": 32, "C": 33, "D": 35, "*": 1, "#": 2}  # of marks, on a terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if usable)")
    parser.add_argument("--layout", choices=("HND", "NHD"), default="HND")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--block-size", type=_int_in(1, 1024), default=16, metavar="TOKENS")
    parser.add_argument("--decode", type=_int_in(0, 1024), default=8, metavar="STEPS")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a SmolLM2 model in GGUF")
    parser.add_argument("--no-download", action="store_true", help="never use the network")
    parser.add_argument("--synthetic", action="store_true", help="made-up K and V, no model")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns
    -------
    int
        0 if every byte is where it belongs, 1 if not, 2 if the arguments cannot be served.
    """
    try:
        handle = pc.Handle(arguments.device)
        dense = _dense(arguments)
        place, move = _arrays_on(handle)
        with place:
            return _tell(arguments, handle, dense, move)
    except (pc.PagedCacheError, NoModelError) as error:
        print(f"pagedcache demo: {error}")
        return 2


def _arrays_on(handle: pc.Handle) -> tuple[AbstractContextManager[Any], Callable[[Array], Any]]:
    kind, _, index = handle.device.partition(":")
    if kind != "cuda":
        return nullcontext(), np.copy
    import cupy

    return cupy.cuda.Device(int(index)), cupy.asarray


class _Dense(NamedTuple):
    """K and V of each text as one dense array, and how many tokens the texts share."""

    texts: dict[str, tuple[Array, Array]]
    prefix: int


def _dense(arguments: argparse.Namespace) -> _Dense:
    dtype = as_dtype("dtype", arguments.dtype)
    tokens: dict[str, list[int]]
    source = None
    if arguments.synthetic:
        print("K and V are synthetic, as asked for.")
    else:
        try:
            require_readers()  # before anything is downloaded for them
            path = arguments.model or find_model(download=not arguments.no_download)
            source = ModelFile(path)
        except NoModelError as error:
            if arguments.model:
                raise
            print(f"K and V are synthetic, because {error}.")
    if source is not None:
        tokens = {name: source.tokens(PREFIX + text) for name, text in PROMPTS.items()}
        _say(
            f"K and V are those of the first layer of {path.name}: token embedding, RMS norm, "
            f"projections, rotary embedding; {source.num_kv_heads} KV heads of {source.head_size}."
        )
        texts = {name: source.k_and_v(ids) for name, ids in tokens.items()}
    else:
        # Four letters a token is about right for English; a token's K and V depend on its place.
        tokens = {
            name: [zlib.crc32(piece.encode()) for piece in _pieces(PREFIX) + _pieces(text)]
            for name, text in PROMPTS.items()
        }
        rng = np.random.default_rng(0)
        made: dict[tuple[int, int], Array] = {}
        texts = {}
        for name, ids in tokens.items():
            rows = [
                made.setdefault((place, token), rng.standard_normal((2, 3, 64), np.float32))
                for place, token in enumerate(ids)
            ]
            k_and_v = np.stack(rows, 1)
            texts[name] = k_and_v[0], k_and_v[1]
    first, *others = tokens.values()
    prefix = min(
        next((i for i, pair in enumerate(zip(first, ids, strict=False)) if pair[0] != pair[1]), 0)
        for ids in others
    )
    print(f"Four texts begin with the same {prefix} tokens and go on differently:")
    for name, ids in tokens.items():
        print(f"  {name} {len(ids):>4} tokens  {textwrap.shorten(PROMPTS[name], 72)}")
    cast = {name: (k.astype(dtype), v.astype(dtype)) for name, (k, v) in texts.items()}
    return _Dense(cast, prefix)


def _pieces(text: str) -> list[str]:
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def _tell(
    arguments: argparse.Namespace,
    handle: pc.Handle,
    dense: _Dense,
    move: Callable[[Array], Any],
) -> int:
    on_gpu = move is not np.copy
    layout, block_size = arguments.layout, arguments.block_size
    _, heads, size = next(iter(dense.texts.values()))[0].shape
    lengths = {name: len(k) for name, (k, _) in dense.texts.items()}
    steps = min(arguments.decode, min(lengths.values()) - dense.prefix - 1)
    rng = np.random.default_rng(1)
    needed = sum(-(-length // block_size) for length in lengths.values())
    pool = Pool(needed * 2, block_size, needed * 3 // 5, rng)

    why = "as asked for" if arguments.device else "the default: CUDA if it is usable, else the CPU"
    print(f"\nDevice: {handle!r}\n  {why}")
    for report in pc.backends().values():
        if not report.usable:
            _say(f"  not {report.device_type}: {report.reason}")
    middle = (heads, block_size) if layout == "HND" else (block_size, heads)
    shape = (pool.num_blocks, *middle, size)
    print(
        f"\nThe cache: {pool.num_blocks} blocks of {block_size} tokens, for K and for V an array "
        f"{list(shape)} of {arguments.dtype} ({layout})."
    )
    print("  . free   # held by others   A B C D held by that sequence   * shared by several")
    print("  (one mark a block; at the left, the number of the first block of the row)")
    print("Before: every byte is random, so that a stray write would show.")
    print(_paint(pool.picture()))

    itemsize = np.dtype(arguments.dtype).itemsize
    image = [
        rng.integers(0, 256, (*shape, itemsize), np.uint8).view(arguments.dtype)[..., 0]
        for _ in "kv"
    ]
    k_cache, v_cache = (move(cache) for cache in image)

    # Prefill: every prompt at once, but for the blocks that another sequence has written already.
    sequences: dict[str, Sequence] = {}
    rows: list[tuple[str, int]] = []
    slots: list[Array] = []
    for name, length in lengths.items():
        owner = next(iter(sequences.values()), None)
        sequence = sequences[name] = pool.add(name, owner, dense.prefix)
        start = sequence.length
        slots.append(pool.extend(sequence, length - steps - start))
        rows += [(name, place) for place in range(start, sequence.length)]
    k, v = (_gather(dense, rows, which) for which in (0, 1))
    arrays = [k_cache, v_cache, move(k), move(v), move(np.concatenate(slots))]
    began = time.perf_counter()
    descriptor = pc.Descriptor.create(*arrays, layout=layout, handle=handle)
    made = time.perf_counter() - began
    first, each = _timed(lambda: descriptor.calculate(*arrays), on_gpu)

    shared = sequences["B"].shared
    print(f"\nPrefill: {len(rows)} tokens of {len(sequences)} prompts in one call.")
    plural = "s" * (shared != 1)
    _say(
        f"  Blocks are shared where they are full of common tokens. The common {dense.prefix} fill "
        + (
            f"{shared} block{plural}: A wrote them, and all block tables begin with the same."
            if shared
            else "no block, so each sequence has its own copy."
        )
    )
    moved = 2 * (k.nbytes + v.nbytes) + len(rows) * 8
    print(f"  Descriptor made in {made * 1e3:.1f} ms{' (with the compile)' * on_gpu}.")
    _say(
        f"  {moved:,} bytes read and written in {each * 1e6:.1f} us on {handle.device} (mean of "
        f"{REPEATS}; the first took {first * 1e6:.1f} us)."
    )
    print(_paint(pool.picture()))

    # Decode: one token of each sequence a step. The texts are known, so the next one is fed.
    for _ in range(steps):
        rows = [(name, sequence.length) for name, sequence in sequences.items()]
        slots = [pool.extend(sequence, 1) for sequence in sequences.values()]
        padded = np.full(BATCH, PADDING, np.int64)
        padded[: len(rows)] = np.concatenate(slots)
        rows += [("A", 0)] * (BATCH - len(rows))
        arrays = [k_cache, v_cache, *(move(_gather(dense, rows, which)) for which in (0, 1))]
        arrays.append(move(padded))
        descriptor.calculate(*arrays)
    limited = f" (of {arguments.decode}: the shortest text ends)" * (steps < arguments.decode)
    print(f"\nDecode: {steps} steps{limited} with the same descriptor.")
    _say(
        f"  One token a sequence, padded to {BATCH} with slot {PADDING}, which is skipped, as "
        "engines pad a batch to a fixed size. The texts are known: the true next token is fed, "
        "so no model has to be run."
    )
    if steps:
        _, each = _timed(lambda: descriptor.calculate(*arrays), on_gpu)
        moved = 2 * len(sequences) * (k.nbytes + v.nbytes) // len(k) + BATCH * 8
        print(f"  {moved:,} bytes in {each * 1e6:.1f} us each.")
    print(_paint(pool.picture()))

    print("\nBlock tables (the blocks of each sequence, in the order of its tokens):")
    for sequence in sequences.values():
        print(f"  {sequence.name} {sequence.length:>4} tokens  {_short(sequence.block_table)}")
    _explain_one(pool, sequences["D"])
    descriptor.destroy()
    back = [cache.get() if on_gpu else cache for cache in (k_cache, v_cache)]
    return _compare(dense, pool, sequences, image, back, layout)


def _gather(dense: _Dense, rows: list[tuple[str, int]], which: int) -> Array:
    return np.stack([dense.texts[name][which][place] for name, place in rows])


def _say(text: str) -> None:
    """Print a paragraph; its indentation is that of its first line."""
    indent = " " * (len(text) - len(text.lstrip()))
    print(
        textwrap.fill(
            text, 96, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    )


def _paint(picture: str) -> str:
    """Colour the marks if this is a terminal and nobody objects."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return picture
    return re.sub(r"[A-D*#]", lambda mark: f"\x1b[{COLOURS[mark[0]]}m{mark[0]}\x1b[0m", picture)


def _short(table: list[int], most: int = 16) -> str:
    shown = " ".join(f"{block:>3}" for block in table[:most])
    return f"{shown} ... {len(table)} blocks" if len(table) > most else shown


def _explain_one(pool: Pool, sequence: Sequence) -> None:
    token = sequence.length - 1
    entry, offset = divmod(token, pool.block_size)
    block = sequence.block_table[entry]
    _say(
        f"  The last token of {sequence.name} is number {token}, counted from 0: entry {token} // "
        f"{pool.block_size} = {entry} of its table is block {block}, offset {token} % "
        f"{pool.block_size} = {offset}, so its slot is {block} * {pool.block_size} + {offset} = "
        f"{block * pool.block_size + offset}."
    )


def _timed(write: Callable[[], None], on_gpu: bool) -> tuple[float, float]:
    """Return the seconds of the first write, and of each of the repeats, which write the same."""
    if not on_gpu:
        times = [time.perf_counter()]
        for _ in range(1 + REPEATS):
            write()
            times.append(time.perf_counter())
        return times[1] - times[0], (times[-1] - times[1]) / REPEATS
    import cupy

    start, first, last = (cupy.cuda.Event() for _ in range(3))
    start.record()
    write()
    first.record()
    for _ in range(REPEATS):
        write()
    last.record()
    last.synchronize()
    elapsed = cupy.cuda.get_elapsed_time
    return float(elapsed(start, first)) / 1e3, float(elapsed(first, last)) / 1e3 / REPEATS


def _compare(
    dense: _Dense,
    pool: Pool,
    sequences: dict[str, Sequence],
    image: list[Array],
    back: list[Array],
    layout: str,
) -> int:
    """Compare what came back with the dense K and V, and the whole caches byte for byte."""
    read = 0
    for letter, which in ("K", 0), ("V", 1):
        expected, cache = image[which], back[which]
        for name, sequence in sequences.items():
            for place in range(sequence.length):
                block = sequence.block_table[place // pool.block_size]
                offset = place % pool.block_size
                at = (block, slice(None), offset) if layout == "HND" else (block, offset)
                row = dense.texts[name][which][place]
                if wrong := _difference(cache[at], row):
                    what = f"{letter} of token {place} of {name} (block {block}, offset {offset})"
                    print(f"\nMISMATCH: {what} is not the dense {letter}: {wrong}")
                    return 1
                read += row.nbytes
                expected[at] = row
        for block, mark in enumerate(pool.marks()):
            if wrong := _difference(cache[block], expected[block]):
                what = f"block {block} ({mark}) of the {letter} cache"
                print(f"\nMISMATCH: {what} was written where no token belongs: {wrong}")
                return 1
    total = sum(cache.nbytes for cache in back)
    print(f"\nOK: {read:,} bytes read back through the block tables equal the dense K and V,")
    print(f"    and all {total:,} bytes of both caches are as they must be, untouched slots too.")
    return 0


def _difference(got: Array, expected: Array) -> str | None:
    """Say which bytes differ; ``None`` if none does."""
    one, other = (np.ascontiguousarray(array).view(np.uint8).ravel() for array in (got, expected))
    places = np.flatnonzero(one != other)
    if not places.size:
        return None
    first = places[0]
    return (
        f"{places.size} of {one.size} bytes, first byte {first}, which is {one[first]:#04x} and "
        f"not {other[first]:#04x}"
    )


def _int_in(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {least} to {most}, got {value}")
        return value

    parse.__name__ = "int"  # what argparse calls it
    return parse
