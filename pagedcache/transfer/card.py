# SPDX-License-Identifier: Apache-2.0
"""What one side must know of the other, as bytes: how a cache is laid out, and where it is."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagedcache.arrays.find import adopt
from pagedcache.backend.handle import Handle
from pagedcache.operators.blocks.arrays import make_arrays, read_arrays
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorStridesError,
    NotSupportedError,
    shown,
)
from pagedcache.tensors import Array, span

if TYPE_CHECKING:
    from pagedcache.kv_cache import KVCache

VERSION = 2
SHORTEST = 1024
"""Bytes. Each run is a transfer of its own, so blocks with shorter ones are packed first."""

_LENGTHS = struct.Struct("<II")  # of what follows: bytes of the header, checksum
_MOST_PIECES = 2**31 - 1  # NIXL's indices are int32


class Memory(NamedTuple):
    """Where the blocks of a cache are.

    Attributes
    ----------
    rows : list of (int, int, int)
        Of each contiguous run of a block: its address in block 0, its bytes, and the bytes from
        one block to the next.
    ranges : list of (int, int)
        Address and bytes of all memory that has blocks; no two meet.
    kind : {"DRAM", "VRAM"}
        In the words of NIXL.
    device : str
    gpu : int
        Its index; 0 on the CPU.
    num_blocks : int
    block_bytes : int
    packs : bool
        Whether blocks are packed; `rows` is empty then.
    """

    rows: list[tuple[int, int, int]]
    ranges: list[tuple[int, int]]
    kind: str
    device: str
    gpu: int
    num_blocks: int
    block_bytes: int
    packs: bool


def read_memory(arrays: Any, *, pack: bool) -> tuple[Memory, dict[str, Any]]:
    """Return where the blocks of some arrays are, and how they are laid out.

    Parameters
    ----------
    arrays : list of array
    pack : bool
        Whether blocks are packed even where they are contiguous.

    Raises
    ------
    PagedCacheError
        They cannot be sent; the message names the array.
    """
    tensors = read_arrays("caches", arrays)
    device, _, index = tensors[0].device.partition(":")
    if device not in ("cpu", "cuda"):
        rule = f"must be on the CPU or on CUDA, since NIXL does not know {device}"
        raise NotSupportedError("caches[0]", rule)
    table = make_arrays(arrays, arrays, ("caches", "caches"))
    rows: list[tuple[int, int, int]] = []
    ranges: list[tuple[int, int]] = []
    packs = pack or any(array.row < SHORTEST and array.axes for array in table.arrays)
    facts: dict[str, Any] = {"number of arrays": len(tensors), "pack": packs}
    for i, (tensor, array) in enumerate(zip(tensors, table.arrays, strict=True)):
        subject = f"caches[{i}]"
        if any(step < 0 for step in tensor.strides):
            rule = "must not have strides that run backwards"
            raise BadTensorStridesError(subject, rule, f"{tensor.strides} bytes")
        if not packs:
            steps = [range(0, length * step, step) for length, step, _ in array.axes]
            places = [sum(offsets) for offsets in itertools.product(*steps)]
            rows += [(tensor.address + at, array.row, tensor.strides[0]) for at in places]
        size = span(tensor.shape, tensor.strides, tensor.dtype.itemsize)
        ranges.append((tensor.address, tensor.address + size))
        axes = list(zip(tensor.shape, tensor.strides, strict=True))[1:]
        facts[f"dtype of {subject}"] = str(tensor.dtype)
        facts[f"shape of a block of {subject}"] = [length for length, _ in axes]
        inner = [step if length > 1 else 0 for length, step in axes]
        facts[f"strides in a block of {subject}, in bytes,"] = inner
    num_blocks = tensors[0].shape[0]
    if len(rows) * num_blocks > _MOST_PIECES:
        rule = f"must have at most {_MOST_PIECES} contiguous runs in all blocks"
        raise BadParamError("caches", rule, len(rows) * num_blocks)
    kind = "DRAM" if device == "cpu" else "VRAM"
    where = tensors[0].device, int(index or 0)
    memory = Memory(rows, _joined(ranges), kind, *where, num_blocks, table.block_bytes, packs)
    return memory, facts


def describe(cache: KVCache) -> dict[str, Any]:
    """Return how a cache is laid out, in the words of its user."""
    first = cache.layers[0]
    static = [
        scale
        for layer in cache.layers
        for scale in (layer.k_scale, layer.v_scale)
        if scale is not None and len(scale.shape) < 3
    ]
    scales = [None if each is None else each.shape[1:] for each in (first.k_scale, first.v_scale)]
    return {
        "layout": cache.layout,
        "dtype": str(cache.dtype),
        "format": cache.format,
        "block_size": cache.block_size,
        "num_layers": cache.num_layers,
        "num_kv_heads": cache.num_kv_heads,
        "length of a stored row of K and V": [first.k.shape[-1], first.v.shape[-1]],
        "scale": "given" if static else [None if each is None else [*each] for each in scales],
        # They are not in the blocks, so the other side reads with its own.
        "digest of the given scales": _digest(static) if static else None,
        "block_bytes": cache.block_bytes,
    }


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> BadParamError | None:
    """Return what to raise for a cache that is laid out otherwise than this one."""
    for what in [*mine, *(name for name in theirs if name not in mine)]:
        here, there = (side.get(what, "unknown") for side in (mine, theirs))
        if here != there:
            rule = f"must be of a cache with the same layout as here, where {what} is {here!r}"
            return BadParamError("card", rule, repr(there))
    return None


def to_bytes(kind: str, header: dict[str, Any], body: bytes) -> bytes:
    """Return a message that `from_bytes` takes apart, on any machine."""
    text = json.dumps(header).encode()
    checksum = zlib.crc32(text + body)
    return _first_line(kind) + _LENGTHS.pack(len(text), checksum) + text + body


def from_bytes(kind: str, subject: str, data: Any, made_by: str) -> tuple[dict[str, Any], bytes]:
    """Return the header and the body of a message.

    Raises
    ------
    PagedCacheError
        It is not such a message, is damaged, or is of another version.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise BadParamTypeError(subject, f"must be the bytes of {made_by}", shown(data))
    data = bytes(data)
    begins = _first_line(kind)
    if not data.startswith(begins):
        rule = f"must be the bytes of {made_by}"
        line = data.split(b"\n", 1)[0]
        if line.startswith(f"pagedcache {kind} ".encode()):
            rule = f"must be of version {VERSION}; use the same pagedcache on both sides"
        raise BadParamError(subject, rule, shown(data[:40]))
    rest = data[len(begins) :]
    try:
        size, checksum = _LENGTHS.unpack_from(rest)
        text, body = rest[_LENGTHS.size :][:size], rest[_LENGTHS.size + size :]
        if zlib.crc32(text + body) != checksum:
            raise ValueError
        return json.loads(text), body
    except (ValueError, struct.error):
        rule = f"must be all of the bytes of {made_by}, unchanged"
        raise BadParamError(subject, rule, f"{len(data)} bytes that are damaged") from None


def _first_line(kind: str) -> bytes:
    return f"pagedcache {kind} {VERSION}\n".encode()


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ranges of addresses that meet as one, each as its begin and its length."""
    joined: list[list[int]] = []
    for begin, end in sorted(ranges):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return [(begin, end - begin) for begin, end in joined]


def _digest(scales: list[Any]) -> str:
    found = hashlib.sha256()
    for scale in scales:
        found.update(_on_host(scale).tobytes())
    return found.hexdigest()


def _on_host(array: Any) -> Array:
    tensor = adopt("scale", array)
    device = Handle(tensor.device).opened()
    size = span(tensor.shape, tensor.strides, tensor.dtype.itemsize)
    read = device.read(tensor.address, size, device.current_stream())
    found: Array = np.ndarray(tensor.shape, tensor.dtype, read.tobytes(), 0, tensor.strides)
    return found
