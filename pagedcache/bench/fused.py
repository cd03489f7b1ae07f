# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedcache bench --fused``: writes with steps, beside the fused kernels of peers.

Each case is one pipeline: 32 query heads and 8 KV heads of 128, bfloat16, in PyTorch tensors. The
floor is one memcpy that moves as many bytes. SGLang and FlashInfer are measured where their
kernels are installed; what they wrote is compared with float64 before they are timed.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pagedcache as pc
from pagedcache.bench.measure import ROUNDS, Graph, host_microseconds
from pagedcache.bench.peers import UnavailableError, why

Q_HEADS, HEADS, SIZE, BLOCK_SIZE = 32, 8, 128, 16
MAX_POSITION, EPS, BASE = 8192, 1e-6, 10000.0
MOST_SETS, IN_A_ROW = 16, 10
MEMCPY, OURS, PLAIN = "memcpy", "pagedcache", "without steps"
DESCRIPTION = (
    f"{Q_HEADS} query heads, {HEADS} KV heads, head size {SIZE}, bfloat16, NHD, block size "
    f"{BLOCK_SIZE}; random blocks; {IN_A_ROW} writes of each set of inputs in a row"
)
ROPE = [pc.rope("cos_sin", "positions")]

Write = Callable[[int], Any]


@dataclass(frozen=True)
class Pipeline:
    """What is measured.

    Attributes
    ----------
    title : str
    steps : dict of str to list
        By letter.
    stored : str
        Name of the format of the caches and, if there are steps for q, of `q_out`.
    peers : tuple of str
        Functions of this module.
    """

    title: str
    steps: dict[str, list[Any]]
    stored: str = "bfloat16"
    peers: tuple[str, ...] = ()


def _normed(weight: str) -> list[Any]:
    return [pc.rms_norm(weight, EPS), *ROPE]


PIPELINES = {
    "rope": Pipeline(
        "rotate q and k, store", {"q": ROPE, "k": ROPE}, peers=("sglang_rope", "sglang_two")
    ),
    "norm": Pipeline(
        "normalise and rotate q and k, store",
        {"q": _normed("q_weight"), "k": _normed("k_weight")},
        peers=("sglang_norm",),
    ),
    "float8": Pipeline(
        "rotate q and k; q, k and v to float8_e4m3fn; store",
        {"q": ROPE, "k": ROPE},
        "float8_e4m3fn",
        ("flashinfer_rope",),
    ),
    "gain": Pipeline(
        "x * gain[head, dim] on k and v, store",
        {letter: ["x * gain[head, dim]"] for letter in "kv"},
    ),
    "none": Pipeline("no steps", {}),
}


class FusedCase:
    """Caches, and sets of inputs for one number of tokens.

    Parameters
    ----------
    pipeline : Pipeline
    tokens, num_slots : int
    rotate : int
        Bytes that all sets should have together.
    """

    def __init__(self, pipeline: Pipeline, tokens: int, num_slots: int, rotate: int) -> None:
        import torch

        self.pipeline, self.tokens = pipeline, tokens
        self.stored = getattr(torch, pipeline.stored)
        on_gpu: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        make = torch.Generator(device="cuda").manual_seed(tokens)
        heads = HEADS * 2 + (Q_HEADS if "q" in pipeline.steps else 0)
        self.elements = tokens * heads * SIZE
        count = min(MOST_SETS, max(2, -(-rotate // (self.elements * 2))))
        shape = (num_slots // BLOCK_SIZE, BLOCK_SIZE, HEADS, SIZE)
        self.caches = [torch.zeros(shape, device="cuda", dtype=self.stored) for _ in "kv"]
        angles = torch.arange(MAX_POSITION, device="cuda", dtype=torch.float64)[:, None] * (
            BASE ** (-torch.arange(0, SIZE, 2, device="cuda", dtype=torch.float64) / SIZE)
        )
        self.cos_sin = torch.cat([angles.cos(), angles.sin()], 1).float()
        self.weights = {
            # Of magnitude 1, so that rows that are normalised in place, again and again, stay rows.
            name: (torch.rand(SIZE, generator=make, device="cuda") - 0.5).sign().bfloat16()
            for name in ("q_weight", "k_weight")
        }
        self.gain = torch.rand(HEADS, SIZE, generator=make, device="cuda") + 0.5
        self.sets = []
        for _ in range(count):
            q, k, v = (
                torch.randn(tokens, heads, SIZE, generator=make, **on_gpu)
                for heads in (Q_HEADS, HEADS, HEADS)
            )
            slots = torch.randperm(num_slots // BLOCK_SIZE, generator=make, device="cuda")
            slots = (slots[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device="cuda")).view(-1)
            positions = torch.randint(MAX_POSITION, (tokens,), generator=make, device="cuda")
            q_out = torch.empty(q.shape, device="cuda", dtype=self.stored)
            self.sets.append((q, k, v, slots[:tokens].contiguous(), positions, q_out))

    def copy(self) -> Write:
        """Return a memcpy of as many bytes as are read and written."""
        import torch

        out = torch.finfo(self.stored).bits // 8
        size = self.elements * (2 + out) // 2
        pairs = [
            [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
            for _ in self.sets
        ]
        return lambda i: pairs[i][0].copy_(pairs[i][1])

    def ours(self) -> Write:
        """Return this package's kernel; q is changed in place unless it is converted."""
        kernel = pc.WriteKernel(**self.pipeline.steps)  # type: ignore[arg-type]
        parameters: dict[str, Any] = {"positions": None, "cos_sin": self.cos_sin, "gain": self.gain}
        parameters |= self.weights
        used: Any = {name: parameters[name] for name in kernel.parameters}
        k_cache, v_cache = self.caches
        in_place = self.stored.itemsize == 2
        with_q = "q" in self.pipeline.steps

        def write(i: int) -> None:
            q, k, v, slots, positions, q_out = self.sets[i]
            if with_q:
                used["positions"] = positions
                out = q if in_place else q_out
                kernel(k_cache, v_cache, k, v, slots, q=q, q_out=out, **used)
            else:
                kernel(k_cache, v_cache, k, v, slots, **used)

        return write

    def plain(self) -> Write:
        """Return `paged_caching` of the same K and V."""
        k_cache, v_cache = self.caches

        def write(i: int) -> None:
            _, k, v, slots, _, _ = self.sets[i]
            pc.paged_caching(k_cache, v_cache, k, v, slots)

        return write

    def check(self, write: Write, i: int = 0) -> None:
        """Raise if a function does not write what it should."""
        import torch

        q, k, v, slots, positions, q_out = self.sets[i]
        wanted = {"q": q.double(), "k": k.double(), "v": v.double()}
        for letter, steps in self.pipeline.steps.items():
            x = wanted[letter]
            if len(steps) > 1:
                root = (x.square().mean(-1, keepdim=True) + EPS).sqrt()
                x = x / root * self.weights[f"{letter}_weight"].double()
            if steps[-1] is ROPE[0]:
                cos, sin = self.cos_sin[positions].double()[:, None].chunk(2, -1)
                a, b = x.chunk(2, -1)
                x = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            else:
                x = x * self.gain.double()
            wanted[letter] = x
        kept = q.clone(), k.clone()
        write(i)
        flat = [cache.view(-1, HEADS, SIZE).view(torch.uint8)[slots] for cache in self.caches]
        found = {
            letter: rows.view(self.stored).double() for letter, rows in zip("kv", flat, strict=True)
        }
        if "q" in self.pipeline.steps:
            found["q"] = (q if self.stored.itemsize == 2 else q_out).double()
        q.copy_(kept[0])
        k.copy_(kept[1])
        # SGLang's sines are those of fast-math.
        tolerance = 0.1 if self.stored.itemsize == 2 else 0.14
        for letter, rows in found.items():
            difference = (rows - wanted[letter]).abs() / (wanted[letter].abs() + 0.05)
            if not difference.max() < tolerance:
                raise UnavailableError(f"its {letter} is wrong, by {float(difference.max()):.3g}")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UnavailableError(f"{name} cannot be imported ({error})") from error


def sglang_rope(case: FusedCase) -> Write:
    """SGLang's `apply_rope_inplace_with_kvcache`, one launch."""
    apply = _import("sglang.jit_kernel.rope").apply_rope_inplace_with_kvcache
    flat = [cache.view(-1, HEADS * SIZE) for cache in case.caches]

    def write(i: int) -> None:
        q, k, v, slots, positions, _ = case.sets[i]
        apply(q, k, v, *flat, case.cos_sin, positions, slots, is_neox=True)

    return write


def sglang_two(case: FusedCase) -> Write:
    """SGLang's `apply_rope_inplace`, then `store_cache`: the sequence that is not fused."""
    apply = _import("sglang.jit_kernel.rope").apply_rope_inplace
    store = _import("sglang.jit_kernel.kvcache").store_cache
    flat = [cache.view(-1, HEADS * SIZE) for cache in case.caches]

    def write(i: int) -> None:
        q, k, v, slots, positions, _ = case.sets[i]
        apply(q, k, case.cos_sin, positions, is_neox=True)
        store(k.view(len(k), -1), v.view(len(v), -1), *flat, slots)

    return write


def sglang_norm(case: FusedCase) -> Write:
    """SGLang's `fused_qk_norm_rope_out`, then `store_cache`."""
    import torch

    apply = _import("sglang.jit_kernel.fused_qknorm_rope").fused_qk_norm_rope_out
    store = _import("sglang.jit_kernel.kvcache").store_cache
    flat = [cache.view(-1, HEADS * SIZE) for cache in case.caches]
    packed = []
    for q, k, v, slots, positions, _ in case.sets:
        qkv = torch.cat([q, k, v], 1).view(len(q), -1)
        parts = qkv.split([Q_HEADS * SIZE, HEADS * SIZE, HEADS * SIZE], 1)
        packed.append((qkv, *parts, slots, positions.int()))

    def write(i: int) -> None:
        qkv, _, k, v, slots, positions = packed[i]
        apply(
            qkv, *case.weights.values(), positions, Q_HEADS, HEADS, HEADS, SIZE, EPS, BASE,
            True, 1.0, 1.0, 1.0, 1.0, SIZE,
        )  # fmt: skip
        store(k, v, *flat, slots)

    def checked(i: int) -> None:
        q, k, v = case.sets[i][:3]
        packed[i][0].copy_(torch.cat([q, k, v], 1).view(len(q), -1))
        write(i)
        q.copy_(packed[i][1].view(q.shape))

    write.checked = checked  # type: ignore[attr-defined]
    return write


def flashinfer_rope(case: FusedCase) -> Write:
    """FlashInfer's `rope_quantize_fp8_append_paged_kv_cache`, with an identity page table."""
    import torch

    append = _import("flashinfer.rope").rope_quantize_fp8_append_paged_kv_cache
    place: dict[str, Any] = {"dtype": torch.int32, "device": "cuda"}
    blocks = case.caches[0].shape[0]
    indices, indptr = torch.arange(blocks, **place), torch.tensor([0, blocks], **place)
    requests = [torch.zeros(case.tokens, **place) for _ in case.sets]
    where = [(slots.int(), positions.int()) for _, _, _, slots, positions, _ in case.sets]

    def write(i: int) -> None:
        q, k, v, _, _, q_out = case.sets[i]
        slots, positions = where[i]
        append(
            q, k, None, None, v, case.cos_sin, positions, tuple(case.caches), indices, indptr,
            requests[i], slots, quantize_dtype=case.stored, page_size=BLOCK_SIZE,
            q_rope_out=q_out, enable_pdl=True,
        )  # fmt: skip

    return write


def measure(pipeline: Pipeline, tokens: int, num_slots: int, *, with_peers: bool) -> dict[str, Any]:
    """Return the time of every competitor for one case, in microseconds."""
    import cupy

    device = cupy.cuda.Device()
    case = FusedCase(pipeline, tokens, num_slots, 4 * device.attributes["L2CacheSize"])
    stream = cupy.cuda.Stream(non_blocking=True)
    guess = 2 + case.elements * 4 / 4e6
    missing: dict[str, str] = {}
    graphs: dict[str, Graph] = {}
    competitors: dict[str, Callable[[], Write]] = {MEMCPY: case.copy, OURS: case.ours}
    if "q" not in pipeline.steps:
        competitors[PLAIN] = case.plain
    if with_peers:
        for name in pipeline.peers:
            competitors[name] = functools.partial(globals()[name], case)
    for name, prepare in competitors.items():
        try:
            write = prepare()
            if name not in (MEMCPY, PLAIN):
                case.check(getattr(write, "checked", write))
            device.synchronize()
            graphs[name] = Graph(write, len(case.sets), stream, guess, IN_A_ROW)
        except Exception as error:  # noqa: PERF203 - a peer may refuse a case with any error
            if name == OURS:
                raise
            missing[name] = why(error)
    for _ in range(ROUNDS):
        for graph in graphs.values():
            graph.time()
    times = {name: graph.median for name, graph in graphs.items()}
    return {"tokens": tokens, "us": times, "missing": missing}


def host_time(pipeline: Pipeline, num_slots: int) -> dict[str, float]:
    """Return the host time of a call, and of `Descriptor.calculate`, in microseconds."""
    import cupy

    drain = cupy.cuda.Device().synchronize
    cases = [FusedCase(pipeline, tokens, num_slots, 0) for tokens in (1, 16, 33, 64)]
    writes = [(case.ours(), i) for case in cases for i in range(2)]
    fixed = [(writes[0][0], i) for i in range(2)]
    first = cases[0]
    k_cache, v_cache = first.caches
    rows = [case.sets[i][1:4] for case in cases for i in range(2)]
    k, v, slots = rows[0]
    descriptor = pc.Descriptor.create(k_cache, v_cache, k, v, slots)

    def calculate(i: int) -> None:
        k, v, slots = rows[i]
        descriptor.calculate(k_cache, v_cache, k, v, slots)

    competitors: dict[str, list[tuple[Write, int]]] = {
        "calculate": [(calculate, i) for i in range(len(rows))],
        "fixed number of tokens": fixed,
        "changing number of tokens": writes,
    }
    found = {}
    for name, calls in competitors.items():

        def call(turn: int, calls: list[tuple[Write, int]] = calls) -> None:
            function, i = calls[turn]
            function(i)

        for turn in range(len(calls)):
            call(turn)
        times = [host_microseconds(call, len(calls), drain) for _ in range(9)]
        found[name] = sorted(times)[len(times) // 2]
    return found


def gpu_times(
    tokens: tuple[int, ...], num_slots: int, *, with_peers: bool, step: Callable[[], Any]
) -> dict[str, Any]:
    """Return the times of all pipelines; `step` is called after each case."""
    results: dict[str, Any] = {}
    for name, pipeline in PIPELINES.items():
        results[name] = []
        for count in tokens:
            results[name].append(measure(pipeline, count, num_slots, with_peers=with_peers))
            step()
    return results


def print_rows(pipeline: Pipeline, rows: list[dict[str, Any]]) -> None:
    """Print a table of one pipeline."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(row["us"] for row in rows)))
    rivals = [name for name in names if name not in (MEMCPY, OURS)]
    print(f"\n{pipeline.title}; {pipeline.stored}, us")
    head = [f"{name:>16}" for name in names]
    head += [f"{'of memcpy rate':>15}", *(f"{'of ' + name:>19}" for name in rivals)]
    print(f"{'tokens':>8}", *head)
    for row in rows:
        times = row["us"]
        line = [f"{times[name]:>16.2f}" if name in times else " " * 16 for name in names]
        line.append(f"{times[MEMCPY] / times[OURS]:>15.3f}")
        line += [
            f"{times[OURS] / times[name]:>19.3f}" if name in times else " " * 19 for name in rivals
        ]
        print(f"{row['tokens']:>8}", *line)
    for name, reason in {n: r for row in rows for n, r in row["missing"].items()}.items():
        print(f"  {name} is not measured: {reason}")
