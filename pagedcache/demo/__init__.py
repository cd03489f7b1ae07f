# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedcache demo``: the operator on real input, explained step by step."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import pagedcache as pc
from pagedcache.demo.formats import COPY, STORAGES, Storage
from pagedcache.demo.model import ModelFile, NoModelError, find_model, require_readers
from pagedcache.dtypes import as_dtype

if TYPE_CHECKING:
    from pagedcache.pool import Sequence

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
    """Texts: their tokens, K and V of one after another, and how many tokens all begin with."""

    tokens: dict[str, list[int]]
    k: Array
    v: Array
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
        texts = [source.k_and_v(ids) for ids in tokens.values()]
    else:
        # Four letters per token is about right for English. K and V depend on the token's position.
        tokens = {
            name: [zlib.crc32(piece.encode()) >> 1 for piece in _pieces(PREFIX) + _pieces(text)]
            for name, text in PROMPTS.items()
        }
        rng = np.random.default_rng(0)
        made: dict[tuple[int, int], Array] = {}
        texts = []
        for ids in tokens.values():
            rows = [
                made.setdefault((place, token), rng.standard_normal((2, 3, 64), np.float32))
                for place, token in enumerate(ids)
            ]
            k_and_v = np.stack(rows, 1)
            texts.append((k_and_v[0], k_and_v[1]))
    first, *others = tokens.values()
    prefix = min(
        next((i for i, pair in enumerate(zip(first, ids, strict=False)) if pair[0] != pair[1]), 0)
        for ids in others
    )
    print(f"Four texts begin with the same {prefix} tokens and then differ:")
    for name, ids in tokens.items():
        print(f"  {name} {len(ids):>4} tokens  {textwrap.shorten(PROMPTS[name], 72)}")
    k, v = (np.concatenate(each).astype(dtype) for each in zip(*texts, strict=True))
    return _Dense(tokens, k, v, prefix)


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
    lengths = [len(ids) for ids in dense.tokens.values()]
    steps = min(arguments.decode, min(lengths) - dense.prefix - 1)
    needed = sum(-(-length // block_size) for length in lengths)
    storage = STORAGES.get(arguments.format)
    make_cache = functools.partial(
        pc.KVCache,
        *(1, needed * 2, block_size, *dense.k.shape[1:]),
        dtype=arguments.dtype,
        format=storage.name if storage else None,
        scale=storage.scale_for(dense.k, dense.v) if storage else None,
        layout=layout,
    )
    cache, expected, found = (make_cache(device=where) for where in (handle.device, "cpu", "cpu"))
    layer = cache.layers[0]
    # Others were here first. Some have left, so the free blocks are scattered.
    others = [cache.sequence([token], key=b"others") for token in range(cache.num_blocks)]
    rng = np.random.default_rng(1)
    for place in rng.permutation(cache.num_blocks)[needed * 3 // 5 :]:
        others[place].free()

    why = "as requested" if arguments.device else "the default: CUDA if it is usable, else the CPU"
    print(f"\nDevice: {handle!r}\n  {why}")
    cuda = pc.backends()["cuda"]
    if not cuda.usable:
        _print_wrapped(f"  cuda is not usable: {cuda.reason}")
    shape = list(layer.k.shape)
    parts = f"{storage.name} in {shape} bytes" if storage else f"a {arguments.dtype} array {shape}"
    print()
    _print_wrapped(
        f"The cache: {cache.num_blocks} blocks, block size {block_size}; K and V are each {parts} "
        f"({layout})" + (f", with {storage}." if storage else ".")
    )
    _print_wrapped(
        "  It is a pagedcache.KVCache of one layer, which owns these arrays. Its pool knows which "
        "block holds which tokens, and gives out the free ones."
    )
    print("  . free   # held by others   A B C D held by that sequence   * shared by several")
    print("  (one mark per block; the number on the left is that of the first block in the row)")
    print("Before: every byte is random, so a stray write would show.")
    sequences: dict[str, Sequence] = {}
    _print_picture(cache.pool, sequences)
    expected.blocks[:] = rng.integers(0, 256, expected.blocks.shape, np.uint8)
    cache.blocks[:] = move(expected.blocks)

    # Prefill: all prompts at once, except for tokens whose blocks are found.
    for name, ids in dense.tokens.items():
        sequences[name] = cache.sequence(ids[: len(ids) - steps])
    starts = [sequence.num_cached_tokens for sequence in sequences.values()]
    k, v, slots = _inputs(cache, dense, sequences, starts, move)
    scales = {"k_scale": layer.k_scale, "v_scale": layer.v_scale}
    began = time.perf_counter()
    descriptor = pc.Descriptor.create(
        layer.k, layer.v, k, v, slots, **scales, **cache.options, handle=handle
    )
    created = time.perf_counter() - began

    def write() -> None:
        descriptor.calculate(layer.k, layer.v, k, v, slots, **scales)

    first, each = _timed(write, on_gpu)
    shared = min(starts[1:]) // block_size
    print(f"\nPrefill: {len(slots)} tokens of {len(sequences)} prompts in one call.")
    plural = "s" * (shared != 1)
    _print_wrapped(
        "  The pool finds full blocks again by their tokens and all tokens before them. The first "
        f"{dense.prefix} tokens fill "
        + (
            f"{shared} block{plural}, which A writes and every block table begins with: B, C "
            "and D need not compute them."
            if shared
            else "no block, so each sequence has its own copy."
        )
    )
    _print_wrapped(
        "  pagedcache.slot_mapping computes the slot of each token from the block tables, on the "
        "device."
    )
    written = layer if storage and storage.computes else layer[:2]
    stored = sum(part.nbytes for part in written) // (cache.num_blocks * block_size)
    row_bytes = (k.nbytes + v.nbytes) // len(k) + stored
    compiled = " (including compilation)" * on_gpu
    print(f"  Descriptor created in {created * 1e3:.1f} ms{compiled}.")
    _print_wrapped(
        f"  {len(slots) * (row_bytes + 8):,} bytes read and written in {each * 1e6:.1f} us on "
        f"{handle.device} (mean of {REPEATS}; the first took {first * 1e6:.1f} us)."
    )
    _print_picture(cache.pool, sequences)

    # Decode: one token per sequence in each step, taken from the texts.
    for _ in range(steps):
        starts = [sequence.num_tokens for sequence in sequences.values()]
        for (name, sequence), start in zip(sequences.items(), starts, strict=True):
            sequence.append(dense.tokens[name][start])
        k, v, slots = _inputs(cache, dense, sequences, starts, move, BATCH)
        write()
    limited = f" (of {arguments.decode} requested: the shortest text ends)"
    limited *= steps < arguments.decode
    print(f"\nDecode: {steps} steps{limited} with the same descriptor.")
    _print_wrapped(
        "  Each step appends one token to each sequence, which takes a free block where its last "
        f"one is full. slot_mapping pads the slots to a batch of {BATCH} with -1, which is "
        "skipped; engines pad to a fixed size in the same way. The next token comes from the text, "
        "so no model has to be run."
    )
    if steps:
        _, each = _timed(write, on_gpu)
        moved = len(sequences) * row_bytes + BATCH * 8
        print(f"  {moved:,} bytes in {each * 1e6:.1f} us per step.")
    _print_picture(cache.pool, sequences)
    descriptor.destroy()

    print("\nBlock tables (the blocks of each sequence, in token order):")
    for name, sequence in sequences.items():
        print(f"  {name} {sequence.num_tokens:>4} tokens  {_short(sequence.block_table)}")
    _explain_one(*list(sequences.items())[-1], block_size)
    return _check(dense, sequences, storage, cache, expected, found)


def _inputs(
    cache: pc.KVCache,
    dense: _Dense,
    sequences: dict[str, Sequence],
    starts: list[int],
    move: Callable[[Array], Any],
    batch: int = 0,
) -> tuple[Any, Any, Any]:
    """Return K, V and slots of the tokens from `starts` on, on the device, padded to a batch."""
    ends = [sequence.num_tokens for sequence in sequences.values()]
    query_start_loc = np.cumsum([0, *np.subtract(ends, starts)])
    positions = np.concatenate([np.arange(*each) for each in zip(starts, ends, strict=True)])
    firsts = np.cumsum([0, *(len(ids) for ids in dense.tokens.values())])[:-1]
    rows = firsts.repeat(np.diff(query_start_loc)) + positions
    rows = np.pad(rows, (0, max(batch - len(rows), 0)))
    slots = move(np.zeros(len(rows), np.int64))
    pc.slot_mapping(
        cache.block_tables(sequences.values()).tables,
        move(query_start_loc),
        move(positions),
        block_size=cache.block_size,
        out=slots,
    )
    return move(dense.k[rows]), move(dense.v[rows]), slots


def _check(
    dense: _Dense,
    sequences: dict[str, Sequence],
    storage: Storage | None,
    cache: pc.KVCache,
    expected: pc.KVCache,
    found: pc.KVCache,
) -> int:
    """Compare what is stored and what is read back with what NumPy makes of K and V.

    Two more caches are in host memory: `expected` as the cache was before the first write, and
    `found` for what is in it now.
    """
    if storage is not None:
        taken = sum(part.nbytes for part in cache.layers[0] if part is not None)
        plain = cache.num_blocks * cache.block_size * (dense.k[0].nbytes + dense.v[0].nbytes)
        print()
        _print_wrapped(
            f"Memory: K, V and scales take {taken:,} bytes, {taken / plain:.3f} of the {plain:,} "
            f"that K and V take in {cache.dtype}."
            + f" Alignment in blocks makes it {cache.nbytes:,}."
            * (cache.nbytes > taken)
        )
        print("Read back by KVCache.read through the block tables, beside the dense K and V:")
    read = [cache.read(0, sequence) for sequence in sequences.values()]
    k, v = (np.concatenate([_on_host(rows) for rows in each]) for each in zip(*read, strict=True))
    wanted: dict[int, Array] = {}  # by place in a layer
    misread = None
    for which, (rows, back) in enumerate(((dense.k, k), (dense.v, v))):
        letter, codes, decoded = "KV"[which], rows, rows
        if storage is not None:
            print(f"  {letter}  {_error(back, rows, letter)}")
            scale = storage.scale_of(rows)
            codes, computed = storage.encode(rows, None if storage.computes else scale)
            if computed is not None:
                wanted[2 + which] = scale = computed
            decoded = storage.decode(codes, scale).astype(rows.dtype)
        wanted[which] = codes
        if wrong := _difference(back, decoded):
            misread = f"{letter} that was read back differs from what is stored: {wrong}"
    found.blocks[:] = _on_host(cache.blocks)
    marks = _marks(cache.pool, sequences)
    if fault := _fault(wanted, sequences, marks, storage, expected, found) or misread:
        print(f"\nMISMATCH: {fault}")
        return 1
    compared = sum(rows.nbytes for rows in wanted.values())
    source, same = "the", "the same"
    if storage is not None:
        source, same = "those that NumPy makes of the", "exactly what they stand for"
    print(f"\nOK: {compared:,} stored bytes equal {source} dense K and V,")
    print(f"    KVCache.read returns {same},")
    print(f"    and all {cache.nbytes:,} bytes of the cache are as expected,", end=" ")
    print("unwritten slots included.")
    return 0


def _fault(
    wanted: dict[int, Array],
    sequences: dict[str, Sequence],
    marks: list[str],
    storage: Storage | None,
    expected: pc.KVCache,
    found: pc.KVCache,
) -> str | None:
    """Return in words which byte of a cache is wrong; ``None`` if all are right."""
    tokens = [
        (name, place, sequence.block_table[place // found.block_size], place % found.block_size)
        for name, sequence in sequences.items()
        for place in range(sequence.num_tokens)
    ]
    for which, rows in sorted(wanted.items()):
        noun = "KV"[which % 2]
        source = f"the dense {noun}" + (f" in {storage.name}" if storage else "")
        if which > 1:
            noun, source = f"scale of {noun}", f"that of {source}"
        right, got = expected.layers[0][which], found.layers[0][which]
        for row, (name, place, block, offset) in zip(rows, tokens, strict=True):
            at = (block, slice(None), offset) if found.layout == "HND" else (block, offset)
            if wrong := _difference(got[at], row):
                what = f"{noun} of token {place} of {name} (block {block}, offset {offset})"
                return f"{what} differs from {source}: {wrong}"
            right[at] = row
    for block, mark in enumerate(marks):
        if wrong := _difference(found.blocks[block], expected.blocks[block]):
            return f"block {block} ({mark}) was written where no token belongs: {wrong}"
    return None


def _on_host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else array  # of CuPy


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


def _print_wrapped(text: str) -> None:
    """Print a paragraph, with all lines indented like the first."""
    indent = " " * (len(text) - len(text.lstrip()))
    print(
        textwrap.fill(
            text, 96, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    )


def _marks(pool: pc.BlockPool, sequences: dict[str, Sequence]) -> list[str]:
    """Return a mark for each block that says who holds it."""
    names = {sequence: name for name, sequence in sequences.items()}
    marks = ["."] * pool.num_blocks
    for sequence in pool.sequences:
        for block in sequence.block_table:
            marks[block] = names.get(sequence, "#") if marks[block] == "." else "*"
    return marks


def _print_picture(pool: pc.BlockPool, sequences: dict[str, Sequence]) -> None:
    """Print the marks in rows, coloured on a terminal unless NO_COLOR is set."""
    columns, gap = (32, " ") if pool.num_blocks <= 256 else (80, "")
    marks = _marks(pool, sequences)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        marks = [f"\x1b[{COLOURS[mark]}m{mark}\x1b[0m" if mark != "." else mark for mark in marks]
    for row in range(0, pool.num_blocks, columns):
        print(f"  {row:>4}  {gap.join(marks[row : row + columns])}")


def _short(table: list[int], most: int = 16) -> str:
    shown = " ".join(f"{block:>3}" for block in table[:most])
    return f"{shown} ... {len(table)} blocks" if len(table) > most else shown


def _explain_one(name: str, sequence: Sequence, block_size: int) -> None:
    token = sequence.num_tokens - 1
    entry, offset = divmod(token, block_size)
    block = sequence.block_table[entry]
    _print_wrapped(
        f"  The last token of {name} is token {token}, counting from 0. Entry {token} // "
        f"{block_size} = {entry} of its block table is block {block}, and its offset is "
        f"{token} % {block_size} = {offset}, so its slot is {block} * {block_size} + "
        f"{offset} = {block * block_size + offset}."
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
