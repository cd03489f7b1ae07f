# SPDX-License-Identifier: Apache-2.0
"""Writes and gathers of this package and writes of its installed peers, behind one interface.

A peer takes a `Case` and returns a function that writes set ``i`` of it. If it is not installed, or
does not support the layout, a size or a format, it raises `UnavailableError` with a one-sentence
reason. A peer that supports only one layout gets the same bytes in that layout.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pagedcache as pc
from pagedcache.bench.case import COPY as PLAIN

if TYPE_CHECKING:
    from pagedcache.bench.case import Case

Write = Callable[[int], Any]


class UnavailableError(Exception):
    """The peer cannot be measured; the message says why."""


def why(error: Exception) -> str:
    """Return in one line why a peer is not measured."""
    lines = str(error).strip().splitlines() or ["no reason given"]
    return (
        lines[0] if isinstance(error, UnavailableError) else f"{type(error).__name__}: {lines[0]}"
    )


def pagedcache(case: Case) -> Write:
    """Return this package's write or gather, with a descriptor."""
    k_cache, v_cache, sets, scales = case.k_cache, case.v_cache, case.sets, case.scales
    if case.axes.operator == "gather":
        each = [(slots, *out) for (_, _, slots), out in zip(sets, case.outputs, strict=True)]
        slots, *out = each[0]
        gather = pc.GatherDescriptor.create(
            k_cache, v_cache, slots, out[0], out[1], **scales, **case.options
        )
        return lambda i: gather.calculate(k_cache, v_cache, *each[i], **scales)
    k, v, slots = sets[0]
    write = pc.Descriptor.create(k_cache, v_cache, k, v, slots, **scales, **case.options)
    return lambda i: write.calculate(k_cache, v_cache, *sets[i], **scales)


def cupy_fancy(case: Case) -> Write:
    """Return CuPy's fancy assignment."""
    _only_copies(case)
    block_size, bits = case.axes.block_size, f"u{case.dtype.itemsize}"
    caches = [cache.view(bits) for cache in (case.k_cache, case.v_cache)]
    sets = [(k.view(bits), v.view(bits), slots) for k, v, slots in case.sets]
    heads_first = case.axes.layout == "HND"

    def write(i: int) -> None:
        slots = sets[i][2]
        block, offset = slots // block_size, slots % block_size
        for cache, rows in zip(caches, sets[i], strict=False):
            if heads_first:
                cache[block, :, offset] = rows
            else:
                cache[block, offset] = rows

    return write


def torch_index_put(case: Case) -> Write:
    """Return PyTorch's ``index_put_``."""
    _only_copies(case)
    block_size = case.axes.block_size
    caches, sets = in_torch(case)

    def write(i: int) -> None:
        slots = sets[i][2]
        where = slots // block_size, slots % block_size
        for cache, rows in zip(caches, sets[i], strict=False):
            cache.index_put_(where, rows)

    return write


def triton_rows(case: Case) -> Write:
    """Return a Triton kernel with one program per token, as small engines use."""
    _only_copies(case)
    _import("triton")
    from pagedcache.bench.triton_rows import launch

    caches, sets = in_torch(case)
    return lambda i: launch(*caches, *sets[i])


def flashinfer(case: Case) -> Write:
    """Return FlashInfer's ``append_paged_kv_cache``: one request, an identity page table."""
    _only_copies(case)
    append = _import("flashinfer.page").append_paged_kv_cache
    if case.axes.head_size not in (64, 128, 256) or case.axes.head_size != case.axes.v_head_size:
        raise UnavailableError("it supports only head sizes 64, 128 and 256, the same for K and V")
    torch = _import("torch")
    caches, sets = in_torch(case, heads_first=case.axes.layout == "HND")
    blocks = caches[0].shape[0]
    place = {"dtype": torch.int32, "device": "cuda"}
    indices = torch.arange(blocks, **place)
    indptr = torch.tensor([0, blocks], **place)
    last = torch.tensor([case.axes.block_size], **place)
    requests = [torch.zeros(len(slots), **place) for _, _, slots in sets]
    positions = [slots.int() for _, _, slots in sets]

    def write(i: int) -> None:
        k, v, _ = sets[i]
        append(
            k, v, requests[i], positions[i], (caches[0], caches[1]), indices, indptr, last,
            kv_layout=case.axes.layout,
        )  # fmt: skip

    return write


def sglang(case: Case) -> Write:
    """Return SGLang's ``store_cache``, which supports only flat rows (NHD)."""
    _only_copies(case)
    store = _import("sglang.jit_kernel.kvcache").store_cache
    if case.axes.source != "plain":
        raise UnavailableError("it is measured only with contiguous rows")
    torch = _import("torch")
    _, sets = in_torch(case)
    kind = sets[0][0].dtype
    flat = [
        torch.zeros(case.num_slots, case.axes.heads * size, dtype=kind, device="cuda")
        for size in (case.axes.head_size, case.axes.v_head_size)
    ]
    rows = [(k.reshape(len(k), -1), v.reshape(len(v), -1), slots) for k, v, slots in sets]
    store(*rows[0][:2], *flat, rows[0][2])
    bits = getattr(torch, f"int{8 * case.dtype.itemsize}")  # ints, since NaN != NaN
    *written, where = rows[0]
    found = [cache[where].view(bits) for cache in flat]
    if not all(map(torch.equal, found, [each.view(bits) for each in written])):
        raise UnavailableError("its result is wrong")
    return lambda i: store(rows[i][0], rows[i][1], flat[0], flat[1], rows[i][2])


def vllm(case: Case) -> Write:
    """Return vLLM's ``reshape_and_cache_flash``, which also stores 8-bit floats."""
    _only_writes(case)
    stored = VLLM_FORMATS.get(case.axes.format)
    if stored is None:
        raise UnavailableError(f"its reshape_and_cache_flash has no {case.axes.format}")
    if case.axes.scale not in ("", "tensor"):
        raise UnavailableError("it is measured only with --scale tensor")
    operator = _import("vllm._custom_ops").reshape_and_cache_flash
    if case.axes.head_size != case.axes.v_head_size:
        raise UnavailableError("it supports only one head size for K and V")
    torch = _import("torch")
    caches, sets = in_torch(case)
    if case.scales:
        scales = [torch.from_dlpack(scale) for scale in case.scales.values()]
    else:
        scales = [torch.ones((), dtype=torch.float32, device="cuda")] * 2
    return lambda i: operator(sets[i][0], sets[i][1], *caches, sets[i][2], stored, *scales)


OURS = "pagedcache"
COPY = "pagedcache copy"  # of the same tokens, beside another format
VLLM_FORMATS = {PLAIN: "auto", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8_e5m2"}
PEERS: dict[str, Callable[[Case], Write]] = {
    OURS: pagedcache,
    "SGLang": sglang,
    "FlashInfer": flashinfer,
    "vLLM": vllm,
    "Triton rows": triton_rows,
    "torch index_put": torch_index_put,
    "CuPy fancy": cupy_fancy,
}
# These write to a cache of their own, in their own layout, and check the result themselves.
OWN_CACHE = ("SGLang",)


def _only_writes(case: Case) -> None:
    if case.axes.operator != "write":
        raise UnavailableError("only its write is measured")


def _only_copies(case: Case) -> None:
    _only_writes(case)
    if case.axes.format != PLAIN:
        raise UnavailableError("it copies K and V as they are")


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UnavailableError(f"{name} cannot be imported ({error})") from error


def in_torch(case: Case, *, heads_first: bool = False) -> tuple[list[Any], list[Any]]:
    """Return the caches and the sets as PyTorch tensors.

    Caches become ``[blocks, slots, heads, size]``, or with `heads_first` stay in their layout; in a
    format of their own they are bytes (uint8).
    """
    torch = _import("torch")
    bits = f"i{case.dtype.itemsize}"
    kind = getattr(torch, case.axes.dtype)

    def tensor(array: Any) -> Any:
        return torch.from_dlpack(array.view(bits)).view(kind)

    caches = [
        (tensor if case.axes.format == PLAIN else torch.from_dlpack)(cache)
        for cache in (case.k_cache, case.v_cache)
    ]
    if case.axes.layout == "HND" and not heads_first:
        caches = [cache.permute(0, 2, 1, 3) for cache in caches]
    sets = [(tensor(k), tensor(v), torch.from_dlpack(slots)) for k, v, slots in case.sets]
    return caches, sets
