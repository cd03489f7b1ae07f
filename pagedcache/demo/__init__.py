# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedcache demo``: the operator on real input, explained step by step."""

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
from pagedcache.demo.formats import COPY, STORAGES, Storage
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
REPEATS = 20  # writes in each timing
BATCH = 8  # decode steps are padded to this many tokens
COLOURS = {"A": 36, "B": 32, "C": 33, "D": 35, "*": 1, "#": 2}  # of marks, as ANSI codes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if usable)")

    def add(name: str, default: object, more: str, **options: Any) -> None:
        parser.add_argument(name, default=default, help=f"{more} (default: {default})", **options)

    add("--layout", "HND", "layout of the caches", choices=("HND", "NHD"))
    dtypes = ("float16", "bfloat16", "float32")
    add("--dtype", "bfloat16", "dtype of K, V and the caches", choices=dtypes)
    formats = f"how the caches store K and V; {COPY}: in their own dtype"
    add("--format", COPY, formats, choices=(COPY, *STORAGES))
    add("--block-size", 16, "slots per block", type=_int_in(1, 1024), metavar="TOKENS")
    add("--decode", 8, "number of decode steps", type=_int_in(0, 1024), metavar="STEPS")
    parser.add_argument("--model", type=Path, metavar="FILE", help="SmolLM2 model file (GGUF)")
    parser.add_argument("--no-download", action="store_true", help="never use the network")
    parser.add_argument("--synthetic", action="store_true", help="random K and V, without a model")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo.

    Returns
    -------
    int
        0 if every byte is where it belongs, 1 if not, 2 if the arguments cannot be used.
    """
    try:
        handle = pc.Handle(arguments.device)
        dense = _dense(arguments)
        place, move = _arrays_on(handle)
        with place:
            return _demonstrate(arguments, handle, dense, move)
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
    """Dense K and V of each text, and the number of tokens that all texts begin with."""

    texts: dict[str, tuple[Array, Array]]
    prefix: int


def _dense(arguments: argparse.Namespace) -> _Dense:
    dtype = as_dtype("dtype", arguments.dtype)
    tokens: dict[str, list[int]]
    source = None
    if arguments.synthetic:
        print("K and V are synthetic, as requested.")
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
        _print_wrapped(
            f"K and V are those of the first layer of {path.name}: token embedding, RMS norm, "
            f"projections and rotary embedding; {source.num_kv_heads} KV heads, head size "
            f"{source.head_size}."
        )
        texts = {name: source.k_and_v(ids) for name, ids in tokens.items()}
    else:
        # Four letters per token is about right for English. K and V depend on the token's position.
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
    print(f"Four texts begin with the same {prefix} tokens and then differ:")
    for name, ids in tokens.items():
        print(f"  {name} {len(ids):>4} tokens  {textwrap.shorten(PROMPTS[name], 72)}")
    cast = {name: (k.astype(dtype), v.astype(dtype)) for name, (k, v) in texts.items()}
    return _Dense(cast, prefix)


def _pieces(text: str) -> list[str]:
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def _demonstrate(
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

    why = "as requested" if arguments.device else "the default: CUDA if it is usable, else the CPU"
    print(f"\nDevice: {handle!r}\n  {why}")
    for report in pc.backends().values():
        if not report.usable:
            _print_wrapped(f"  {report.device_type} is not usable: {report.reason}")
    middle = (heads, block_size) if layout == "HND" else (block_size, heads)
    shape = (pool.num_blocks, *middle, size)
    storage = STORAGES.get(arguments.format)
    cache_dtype, parts = np.dtype(arguments.dtype), f"a {arguments.dtype} array {list(shape)}"
    if storage is not None:
        shape = (*shape[:3], size // storage.packed)
        cache_dtype, parts = np.dtype(np.uint8), f"{storage.name} in {list(shape)} bytes"
    print()
    _print_wrapped(
        f"The cache: {pool.num_blocks} blocks, block size {block_size}; K and V are each {parts} "
        f"({layout})" + (f", with {storage}." if storage else ".")
    )
    print("  . free   # held by others   A B C D held by that sequence   * shared by several")
    print("  (one mark per block; the number on the left is that of the first block in the row)")
    print("Before: every byte is random, so a stray write would show.")
    print(_coloured(pool.picture()))

    image = [_random(rng, shape, cache_dtype) for _ in "kv"]
    k_cache, v_cache = (move(cache) for cache in image)
    given: list[Array] = []  # scales that are read
    scales: dict[str, Any] = {}
    options: dict[str, Any] = {"layout": layout}
    if storage is not None:
        if storage.computes:
            image += [_random(rng, (*shape[:3], *storage.groups(size)), np.float32) for _ in "kv"]
        else:
            given = [storage.scale_of(_all_rows(dense, which)) for which in (0, 1)]
        k_scale, v_scale = (move(scale) for scale in given or image[2:])
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        options |= {"k_format": storage.name, "v_format": storage.name}
    row_bytes = sum(array[0].nbytes for array in image) // block_size  # of a token, stored

    # Prefill: all prompts at once, except for blocks that another sequence has already written.
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
    arrays = (k_cache, v_cache, move(k), move(v), move(np.concatenate(slots)))
    began = time.perf_counter()
    descriptor = pc.Descriptor.create(*arrays, handle=handle, **(scales | options))
    created = time.perf_counter() - began
    first, each = _timed(lambda: descriptor.calculate(*arrays, **scales), on_gpu)

    shared = sequences["B"].shared
    print(f"\nPrefill: {len(rows)} tokens of {len(sequences)} prompts in one call.")
    plural = "s" * (shared != 1)
    _print_wrapped(
        "  Blocks that are full of common tokens are shared. The first "
        f"{dense.prefix} tokens fill "
        + (
            f"{shared} block{plural}, which A wrote and every block table begins with."
            if shared
            else "no block, so each sequence has its own copy."
        )
    )
    moved = k.nbytes + v.nbytes + len(rows) * (row_bytes + 8)
    compiled = " (including compilation)" * on_gpu
    print(f"  Descriptor created in {created * 1e3:.1f} ms{compiled}.")
    _print_wrapped(
        f"  {moved:,} bytes read and written in {each * 1e6:.1f} us on {handle.device} (mean of "
        f"{REPEATS}; the first took {first * 1e6:.1f} us)."
    )
    print(_coloured(pool.picture()))

    # Decode: one token per sequence in each step, taken from the texts.
    for _ in range(steps):
        rows = [(name, sequence.length) for name, sequence in sequences.items()]
        slots = [pool.extend(sequence, 1) for sequence in sequences.values()]
        padded = np.full(BATCH, PADDING, np.int64)
        padded[: len(rows)] = np.concatenate(slots)
        rows += [("A", 0)] * (BATCH - len(rows))
        k, v = (_gather(dense, rows, which) for which in (0, 1))
        arrays = (k_cache, v_cache, move(k), move(v), move(padded))
        descriptor.calculate(*arrays, **scales)
    limited = f" (of {arguments.decode} requested: the shortest text ends)"
    limited *= steps < arguments.decode
    print(f"\nDecode: {steps} steps{limited} with the same descriptor.")
    _print_wrapped(
        f"  Each step writes one token per sequence, padded to {BATCH} tokens with slot {PADDING}, "
        "which is skipped; engines pad batches to a fixed size in the same way. The next token "
        "comes from the text, so no model has to be run."
    )
    if steps:
        _, each = _timed(lambda: descriptor.calculate(*arrays, **scales), on_gpu)
        moved = len(sequences) * ((k.nbytes + v.nbytes) // len(k) + row_bytes) + BATCH * 8
        print(f"  {moved:,} bytes in {each * 1e6:.1f} us per step.")
    print(_coloured(pool.picture()))

    print("\nBlock tables (the blocks of each sequence, in token order):")
    for sequence in sequences.values():
        print(f"  {sequence.name} {sequence.length:>4} tokens  {_short(sequence.block_table)}")
    _explain_one(pool, sequences["D"])
    descriptor.destroy()
    written = [k_cache, v_cache, *(() if given else scales.values())]
    back = [array.get() if on_gpu else array for array in written]
    if storage is None:
        wanted = [{name: both[i] for name, both in dense.texts.items()} for i in (0, 1)]
        return _compare(wanted, pool, sequences, image, back, layout)

    k, v = (_all_rows(dense, which) for which in (0, 1))
    k_out, v_out = move(np.zeros_like(k)), move(np.zeros_like(v))
    everything = np.concatenate(
        [pool.slots(sequence, np.arange(sequence.length)) for sequence in sequences.values()]
    )
    read = (k_cache, v_cache, move(everything), k_out, v_out)
    pc.paged_gather(*read, **(scales | options))
    stored = sum(array.nbytes for array in (*image, *given))
    plain = pool.num_blocks * block_size * (k[0].nbytes + v[0].nbytes)
    print()
    _print_wrapped(
        f"Memory: caches and scales take {stored:,} bytes, {stored / plain:.3f} of the {plain:,} "
        f"of caches that copy {arguments.dtype}."
    )
    print("Read back by paged_gather through the block tables, beside the dense K and V:")
    # What must have been stored and read is computed here once more.
    wanted = [{} for _ in image]
    misread = ""
    ends = np.cumsum([sequence.length for sequence in sequences.values()])[:-1]
    for which, (letter, rows_of_all, out) in enumerate(
        zip("KV", (k, v), (k_out, v_out), strict=True)
    ):
        found = out.get() if on_gpu else out
        print(f"  {letter}  {_error(found, rows_of_all, letter)}")
        codes, computed = storage.encode(rows_of_all, given[which] if given else None)
        wanted[which] = dict(zip(sequences, np.split(codes, ends), strict=True))
        if computed is not None:
            wanted[2 + which] = dict(zip(sequences, np.split(computed, ends), strict=True))
        expected = storage.decode(codes, given[which] if computed is None else computed)
        if wrong := _difference(found, expected.astype(rows_of_all.dtype)):
            misread = f"{letter} that was read back differs from what is stored: {wrong}"
    return _compare(wanted, pool, sequences, image, back, layout, storage, misread)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an array of random bytes."""
    made: Array = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8).view(dtype)
    return made[..., 0]


def _all_rows(dense: _Dense, which: int) -> Array:
    """Return K or V of all texts, one after the other."""
    return np.concatenate([both[which] for both in dense.texts.values()])


def _error(found: Array, dense: Array, letter: str) -> str:
    """Return in words how far from the dense rows those are that were read back."""
    wide = dense.astype(np.float64)
    with np.errstate(all="ignore"):  # what is read from a slot that was not written
        error = found.astype(np.float64) - wide
        part = np.sqrt((error**2).mean() / (wide**2).mean())
        largest = np.abs(error).max()
    return (
        f"root mean square error {part * 100:.3g} % of the root mean square of {letter}, "
        f"largest error {largest:.3g}"
    )


def _gather(dense: _Dense, rows: list[tuple[str, int]], which: int) -> Array:
    return np.stack([dense.texts[name][which][place] for name, place in rows])


def _print_wrapped(text: str) -> None:
    """Print a paragraph, with all lines indented like the first."""
    indent = " " * (len(text) - len(text.lstrip()))
    print(
        textwrap.fill(
            text, 96, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    )


def _coloured(picture: str) -> str:
    """Colour the marks on a terminal, unless NO_COLOR is set."""
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
    _print_wrapped(
        f"  The last token of {sequence.name} is token {token}, counting from 0. Entry {token} // "
        f"{pool.block_size} = {entry} of its block table is block {block}, and its offset is "
        f"{token} % {pool.block_size} = {offset}, so its slot is {block} * {pool.block_size} + "
        f"{offset} = {block * pool.block_size + offset}."
    )


def _timed(write: Callable[[], None], on_gpu: bool) -> tuple[float, float]:
    """Return the seconds of a first write, and the mean of `REPEATS` more of the same."""
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
    wanted: list[dict[str, Array]],
    pool: Pool,
    sequences: dict[str, Sequence],
    image: list[Array],
    back: list[Array],
    layout: str,
    storage: Storage | None = None,
    misread: str = "",
) -> int:
    """Compare what the block tables read back with what is wanted there, and caches in full.

    Parameters
    ----------
    wanted : list of dict
        By name of the sequence, what K, V, and the scales of both if there are any, must be.
    pool : Pool
    sequences : dict
    image, back : list of array
        Caches, and scales if there are any, before the first write and after the last.
    layout : {"HND", "NHD"}
    storage : Storage, optional
        The format of the caches, if it is one of their own.
    misread : str
        What is wrong if all of these are right.
    """
    read = 0
    for which, (expected, cache) in enumerate(zip(image, back, strict=True)):
        letter = "KV"[which % 2]
        noun, whole, source = letter, f"{letter} cache", f"the dense {letter}"
        if storage is not None:
            source += f" in {storage.name}"
        if which > 1:
            noun, whole, source = f"scale of {letter}", f"{letter} scales", f"that of {source}"
        for name, sequence in sequences.items():
            for place in range(sequence.length):
                block = sequence.block_table[place // pool.block_size]
                offset = place % pool.block_size
                at = (block, slice(None), offset) if layout == "HND" else (block, offset)
                row = wanted[which][name][place]
                if wrong := _difference(cache[at], row):
                    what = f"{noun} of token {place} of {name} (block {block}, offset {offset})"
                    print(f"\nMISMATCH: {what} differs from {source}: {wrong}")
                    return 1
                read += row.nbytes
                expected[at] = row
        for block, mark in enumerate(pool.marks()):
            if wrong := _difference(cache[block], expected[block]):
                what = f"block {block} ({mark}) of the {whole}"
                print(f"\nMISMATCH: {what} was written where no token belongs: {wrong}")
                return 1
    if misread:
        print(f"\nMISMATCH: {misread}")
        return 1
    total = sum(cache.nbytes for cache in back)
    if storage is not None:
        print(f"\nOK: {read:,} stored bytes equal those that NumPy makes of the dense K and V,")
        print("    what was read back is exactly what they stand for,")
        print(f"    and all {total:,} bytes are as expected, unwritten slots included.")
        return 0
    print(f"\nOK: {read:,} bytes read back through the block tables equal the dense K and V,")
    print(f"    and all {total:,} bytes of both caches are as expected, unwritten slots included.")
    return 0


def _difference(got: Array, expected: Array) -> str | None:
    """Return in words which bytes differ; ``None`` if none do."""
    one, other = (np.ascontiguousarray(array).view(np.uint8).ravel() for array in (got, expected))
    places = np.flatnonzero(one != other)
    if not places.size:
        return None
    first = places[0]
    return (
        f"{places.size} of {one.size} bytes differ, first byte {first}, got {one[first]:#04x} "
        f"instead of {other[first]:#04x}"
    )


def _int_in(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be between {least} and {most}, got {value}")
        return value

    parse.__name__ = "int"  # the name in argparse's errors
    return parse
