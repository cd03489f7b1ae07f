"""The main job on real input, told step by step: ``python -m pagedcache demo``."""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import pagedcache as pc
from pagedcache.demo.model import FirstLayer, NoModelError, find_model
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
BATCH = 8  # decode steps are padded to this many tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if usable)")
    parser.add_argument("--layout", choices=("HND", "NHD"), default="HND")
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--block-size", type=_at_least(1), default=16, metavar="TOKENS")
    parser.add_argument("--decode", type=_at_least(0), default=8, metavar="STEPS")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a llama model in GGUF")
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
    except (pc.PagedCacheError, NoModelError) as error:
        print(f"pagedcache demo: {error}")
        return 2
    return _tell(arguments, handle, dense)


class _Dense:
    """K and V of each text as one dense array, and how many tokens the texts share."""

    def __init__(self, texts: dict[str, tuple[Array, Array]], prefix: int) -> None:
        self.texts = texts
        self.prefix = prefix


def _dense(arguments: argparse.Namespace) -> _Dense:
    dtype = as_dtype("dtype", arguments.dtype)
    tokens: dict[str, list[int]]
    if arguments.synthetic:
        source = None
        print("K and V are synthetic, as asked for.")
    else:
        try:
            source = FirstLayer(arguments.model or find_model(download=not arguments.no_download))
        except NoModelError as error:
            if arguments.model:
                raise
            source = None
            print(f"K and V are synthetic, because {error}.")
    if source is not None:
        tokens = {name: source.tokens(PREFIX + text) for name, text in PROMPTS.items()}
        print("K and V are those of the first layer of SmolLM2-135M, for four short texts.")
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
    cast = {name: (k.astype(dtype), v.astype(dtype)) for name, (k, v) in texts.items()}
    return _Dense(cast, prefix)


def _pieces(text: str) -> list[str]:
    return [text[at : at + 4] for at in range(0, len(text), 4)]


def _tell(arguments: argparse.Namespace, handle: pc.Handle, dense: _Dense) -> int:
    on_gpu = handle.device != "cpu"
    layout, block_size, steps = arguments.layout, arguments.block_size, arguments.decode
    _, heads, size = next(iter(dense.texts.values()))[0].shape
    lengths = {name: len(k) for name, (k, _) in dense.texts.items()}
    steps = min(steps, min(lengths.values()) - dense.prefix - 1)
    rng = np.random.default_rng(1)
    needed = sum(-(-length // block_size) for length in lengths.values())
    pool = Pool(needed * 2, block_size, needed * 3 // 5, rng)

    why = "as asked for" if arguments.device else "the default: CUDA if it is usable, else the CPU"
    print(f"\nDevice: {handle!r}\n  {why}")
    for report in pc.backends().values():
        if not report.usable:
            print(f"  not {report.device_type}: {report.reason}")
    middle = (heads, block_size) if layout == "HND" else (block_size, heads)
    shape = (pool.num_blocks, *middle, size)
    print(
        f"\nThe cache: {pool.num_blocks} blocks of {block_size} tokens, for K and for V an array "
        f"{list(shape)} of {arguments.dtype} ({layout})."
    )
    print("Before (. free, # held by somebody else):")
    print(pool.picture())

    itemsize = np.dtype(arguments.dtype).itemsize
    image = [
        rng.integers(0, 256, (*shape, itemsize), np.uint8).view(arguments.dtype)[..., 0]
        for _ in "kv"
    ]
    move: Callable[[Array], Any] = np.copy
    if on_gpu:
        import cupy

        cupy.cuda.Device(int(handle.device.partition(":")[2])).use()
        move = cupy.asarray
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
    took = _timed(lambda: descriptor.calculate(*arrays), on_gpu)

    shared = sequences["B"].shared
    print(f"\nPrefill: {len(rows)} tokens of {len(sequences)} prompts in one call.")
    print(
        f"  All prompts begin with the same {dense.prefix} tokens. Only full blocks can be shared, "
        f"so {shared} block{'s' * (shared != 1)} of A\n  stand{'s' * (shared == 1)} in every block "
        f"table and {'was' if shared == 1 else 'were'} written once."
    )
    moved = 2 * (k.nbytes + v.nbytes) + len(rows) * 8
    print(f"  Descriptor made in {made * 1e3:.1f} ms{' (with the compile)' if on_gpu else ''}.")
    print(f"  {moved:,} bytes read and written in {took * 1e6:.1f} us on {handle.device}.")
    print(pool.picture())

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
    print(f"\nDecode: {steps} steps, one token a sequence, padded to {BATCH} with slot {PADDING},")
    print("  which is skipped; the same descriptor serves every number of tokens.")
    print("  The texts are known, so the true next token is fed and no model has to be run.")
    if steps:
        took = _timed(lambda: descriptor.calculate(*arrays), on_gpu)
        moved = 2 * len(sequences) * (k.nbytes + v.nbytes) // len(k) + BATCH * 8
        print(f"  {moved:,} bytes in {took * 1e6:.1f} us each.")
    print(pool.picture())
    legend = ", ".join(f"{name} {sequence.length}" for name, sequence in sequences.items())
    print(f"  letters: blocks of one sequence (tokens: {legend}); * shared")

    print("\nBlock tables (the pages of each sequence, in the order of its tokens):")
    for sequence in sequences.values():
        print(f"  {sequence.name}  {_short(sequence.block_table)}")
    _explain_one(pool, sequences["D"])
    descriptor.destroy()
    back = [cache.get() if on_gpu else cache for cache in (k_cache, v_cache)]
    return _compare(dense, pool, sequences, image, back, layout)


def _gather(dense: _Dense, rows: list[tuple[str, int]], which: int) -> Array:
    return np.stack([dense.texts[name][which][place] for name, place in rows])


def _short(table: list[int], most: int = 16) -> str:
    shown = " ".join(f"{block:>3}" for block in table[:most])
    return f"{shown} ... {len(table)} blocks" if len(table) > most else shown


def _explain_one(pool: Pool, sequence: Sequence) -> None:
    token = sequence.length - 1
    page, offset = divmod(token, pool.block_size)
    block = sequence.block_table[page]
    print(
        f"  The last token of {sequence.name} is number {token}: page {token} // {pool.block_size} "
        f"= {page} of its table is block {block},\n  offset {token} % {pool.block_size} = {offset},"
        f" so its slot is {block} * {pool.block_size} + {offset} = "
        f"{block * pool.block_size + offset}."
    )


def _timed(write: Callable[[], None], on_gpu: bool) -> float:
    """Return the seconds of one write, the mean of several that all write the same."""
    times = 20
    write()
    if not on_gpu:
        began = time.perf_counter()
        for _ in range(times):
            write()
        return (time.perf_counter() - began) / times
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(times):
        write()
    stop.record()
    stop.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, stop)) / 1e3 / times


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
    for which, (expected, cache) in enumerate(zip(image, back, strict=True)):
        for name, sequence in sequences.items():
            for place in range(sequence.length):
                block = sequence.block_table[place // pool.block_size]
                offset = place % pool.block_size
                at = (block, slice(None), offset) if layout == "HND" else (block, offset)
                row = dense.texts[name][which][place]
                if cache[at].tobytes() != row.tobytes():
                    print(f"\nMISMATCH: {'KV'[which]} of token {place} of {name}, block {block}")
                    return 1
                read += row.nbytes
                expected[at] = row
        differing = np.flatnonzero(expected.view(np.uint8) != cache.view(np.uint8))
        if differing.size:
            print(f"\nMISMATCH: {differing.size} bytes of the {'KV'[which]} cache were touched")
            return 1
    total = sum(cache.nbytes for cache in back)
    print(f"\nOK: {read:,} bytes read back through the block tables equal the dense K and V,")
    print(f"    and all {total:,} bytes of both caches are as they must be, untouched slots too.")
    return 0


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    parse.__name__ = f"int of {least} or more"
    return parse
