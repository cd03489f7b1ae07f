# SPDX-License-Identifier: Apache-2.0
"""A paged KV cache: arrays of all layers, and the pool that says which block holds which tokens."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from pagedcache.arrays.find import adopt
from pagedcache.arrays.memory import memory_on
from pagedcache.backend.handle import Handle
from pagedcache.cache.formats import FORMATS, SOURCE_DTYPES, Format
from pagedcache.cache.layout import LAYOUTS
from pagedcache.display import as_html
from pagedcache.dtypes import F32, Dtype, as_dtype, names
from pagedcache.host_blocks import HostBlock, HostBlocks
from pagedcache.operators.blocks.descriptor import BlockDescriptor
from pagedcache.operators.paged_caching.one_call import paged_caching
from pagedcache.operators.paged_gather.one_call import paged_gather
from pagedcache.pool import BlockPool, Sequence
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    FreedError,
    NotSupportedError,
    as_int,
    shown,
)

ALIGNMENT = 128  # bytes; of blocks, and of K, V and scales in them
TOKEN = "token"


class CacheLayer(NamedTuple):
    """The arrays of one layer, which all operators and attention kernels take.

    Attributes
    ----------
    k, v : array
        ``[num_blocks, block_size, num_kv_heads, head_size]`` in layout NHD, ``[num_blocks,
        num_kv_heads, block_size, head_size]`` in HND; bytes where the cache has a format. A block
        of one layer is contiguous, and the next block is further away.
    k_scale, v_scale : array or None
    """

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any


class BlockTables(NamedTuple):
    """Block tables of some sequences, on the device and int32.

    Attributes
    ----------
    tables : array
        ``[num_sequences, longest table]``, at least one column, as FlashAttention
        (``block_table``), vLLM and `slot_mapping` take them. Entries past the end of a table are 0:
        a block that exists, since some kernels read ahead.
    lengths : array
        ``[num_sequences]``, tokens: ``cache_seqlens`` of FlashAttention, ``seq_lens`` of vLLM.
    indices, indptr, last_page_len : array
        As FlashInfer takes them: the blocks of one sequence after another, where those of each
        begin, and the tokens in the last block of each.
    """

    tables: Any
    lengths: Any
    indices: Any
    indptr: Any
    last_page_len: Any


class Offloaded:
    """A sequence in host memory. `KVCache.offload` makes it, and `KVCache.restore` takes it.

    It keeps its blocks of host memory until it is restored or freed, also if nobody refers to it.

    Attributes
    ----------
    token_ids : array of int32
        Its tokens.
    key : bytes
        What the sequence was made with.
    num_written : int
        How many of the tokens, from the front, have their K and V there.
    freed : bool
        Whether it was restored or freed.
    """

    def __init__(
        self, cache: KVCache, sequence: Sequence, num_written: int, blocks: list[HostBlock]
    ) -> None:
        self.token_ids, self.key = sequence.token_ids, sequence.key
        self.num_written, self.freed = num_written, False
        size = cache.block_size
        whole = num_written // size >= sequence.num_tokens // size
        self._publish = whole and sequence.published
        self._cache, self._blocks = cache, blocks

    @property
    def num_blocks(self) -> int:
        """Blocks that it takes in host memory."""
        return len(self._blocks)

    def free(self) -> None:
        """Give up what is in host memory. Freeing twice is allowed."""
        self._cache._host.give_back(self._blocks)
        self._blocks, self.freed = [], True

    def __reduce__(self) -> str:
        # Two objects that give back the same blocks would corrupt the cache.
        raise NotSupportedError("an Offloaded", "cannot be copied or pickled")

    def __repr__(self) -> str:
        state = ", freed" if self.freed else f" in {self.num_blocks} blocks of the host"
        return f"<Offloaded: {len(self.token_ids)} tokens{state}>"


class KVCache:
    """A paged KV cache of all layers of a model.

    It owns the arrays, and a `BlockPool` that says which block holds which tokens. All layers of a
    block, with their scales, are next to each other in memory, so a block is copied, offloaded or
    sent as one piece.

    Parameters
    ----------
    num_layers, num_blocks, block_size, num_kv_heads, head_size : int
        A block holds K and V of `block_size` tokens in all layers.
    v_head_size : int, optional
        Of V. By default, `head_size`.
    dtype : dtype-like
        Of K and V as they are written and read back: bfloat16, float16 or float32.
    format : str, optional
        How they are stored: ``"float8_e4m3fn"``, ``"float8_e5m2"``, ``"int8"``, ``"int4"``, or one
        of the dtypes. By default, as they are.
    scale : optional
        What a format needs. ``"token"``: a float32 for each token and head, computed by each write
        and stored in the block. An int: the same for each group of so many neighbouring dimensions.
        An array, or a pair of them for K and V, float32 and positive, which is read: ``[num_layers
        ]``, ``[num_layers, num_kv_heads]`` or ``[num_layers, num_kv_heads, head_size]``. ``None``:
        none, which 8-bit floats allow.
    layout : {"NHD", "HND"}
        The order of the axes of each layer's arrays.
    device : str or torch.device, optional
        ``"cpu"`` for arrays of NumPy, ``"cuda:0"`` for those of CuPy, a ``torch.device`` for
        tensors of PyTorch. By default, CuPy's current GPU if it is usable, else the CPU.
    prefix_caching : bool
        Whether blocks are found again by their tokens: see `BlockPool`.
    host_blocks : int, optional
        The most blocks that `offload` may hold in host memory. By default, there is no limit. This
        memory is allocated when it is needed, up to 64 MB at a time, and is kept from then on.

    Attributes
    ----------
    pool : BlockPool
    layers : tuple of CacheLayer
        The arrays of each layer. Whoever writes to them directly, and not with `write`, first calls
        `apply_copies`.
    blocks : array
        ``[num_blocks, block_bytes]``, bytes: all of the above. In a block, layer by layer: K, V,
        scales of K, scales of V, each from a multiple of 128 bytes on.
    options : dict
        What operators need to know beside the arrays of a layer: ``layout``, ``k_format`` and
        ``v_format``.
    device : str

    Raises
    ------
    PagedCacheError
        A size, format or scale cannot be used; the message names it.

    Notes
    -----
    Methods queue their work on the stream that is given, or on the current one of the library whose
    arrays these are, and wait for nothing; on the CPU it is done when they return. The first calls
    compile, allocate, or measure (see `offload`). All work on one
    cache must be in one order: on one stream, or on streams that wait for each other. Like its
    pool, a cache is not thread-safe: let one thread at a time call its methods.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> cache = pc.KVCache(2, 8, 4, 1, 2, dtype="float32", device="cpu")  # 2 layers, 8 blocks of 4
    >>> prompt = cache.sequence([11, 12, 13, 14, 15])
    >>> k = np.arange(10, dtype=np.float32).reshape(5, 1, 2)
    >>> for layer in range(2):
    ...     cache.write(layer, k, -k, cache.slots(prompt))
    >>> again = cache.sequence([11, 12, 13, 14, 99])  # the first block is found
    >>> again.num_cached_tokens
    4
    >>> cache.write(1, k[4:] + 90, k[4:] + 90, cache.slots(again))
    >>> cache.read(1, again)[0][:, 0, 0].tolist()
    [0.0, 2.0, 4.0, 6.0, 98.0]
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        *,
        v_head_size: int | None = None,
        dtype: object = "bfloat16",
        format: str | None = None,  # noqa: A002 - the word for it
        scale: Any = None,
        layout: str = "NHD",
        device: Any = None,
        prefix_caching: bool = True,
        host_blocks: int | None = None,
    ) -> None:
        v_head_size = head_size if v_head_size is None else v_head_size
        sizes = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "head_size": head_size,
            "v_head_size": v_head_size,
        }
        for name, size in sizes.items():
            sizes[name] = as_int(name, size, 1)
        if host_blocks is not None:
            host_blocks = as_int("host_blocks", host_blocks, 1)
        if not isinstance(layout, str) or layout not in LAYOUTS:
            rule = f"must be one of {', '.join(LAYOUTS)}"
            raise BadParamError("layout", rule, shown(layout))
        if type(dtype).__module__ == "torch":
            dtype = str(dtype).removeprefix("torch.")
        self.dtype = as_dtype("dtype", dtype)
        if self.dtype not in SOURCE_DTYPES:
            raise BadTensorDtypeError("dtype", f"must be {names(SOURCE_DTYPES)}", self.dtype)
        stored = _format(format, self.dtype)
        self.pool = BlockPool(num_blocks, block_size, prefix_caching=prefix_caching)
        self._memory = memory_on(device, lambda name: Handle(name).device)
        self._device = Handle(self._memory.device).opened()
        self.device = self._device.name
        self.num_layers, self.num_kv_heads = sizes["num_layers"], sizes["num_kv_heads"]
        self.layout, self.format = layout, stored.name
        named = None if stored.dtype == self.dtype else stored.name
        self.options: dict[str, Any] = {"layout": layout, "k_format": named, "v_format": named}
        self._head_sizes = sizes["head_size"], sizes["v_head_size"]
        self._allocate(stored, scale)
        self._within = BlockDescriptor.create([self.blocks])
        self._host = HostBlocks(self._memory, self.blocks, host_blocks)

    def _allocate(self, stored: Format, scale: Any) -> None:
        heads, slots = self.num_kv_heads, self.pool.block_size
        rows = (slots, heads) if self.layout == "NHD" else (heads, slots)
        parts: list[tuple[Dtype, tuple[int, ...]]] = []
        for name, size in zip(("head_size", "v_head_size"), self._head_sizes, strict=True):
            if size % stored.packed:
                raise BadParamError(name, f"must be even, since {stored.name} packs two", size)
            dtype = stored.dtype if stored.is_float else np.dtype(np.uint8)
            parts.append((dtype, (*rows, size // stored.packed)))
        given: tuple[Any, Any] = (None, None)
        if scale is None and stored.is_integer:
            rule = f"must be given for {stored.name}: {TOKEN!r}, a number of dimensions, or arrays"
            raise BadParamError("scale", rule, "None")
        if scale is not None and stored.is_float:
            raise BadParamError("scale", f"must be None, since {stored.name} takes none", scale)
        if isinstance(scale, str):
            if scale != TOKEN:
                rule = f"must be {TOKEN!r}, a number of dimensions, arrays, or None"
                raise BadParamError("scale", rule, shown(scale))
            parts += [(F32, rows)] * 2
        elif isinstance(scale, (int, np.integer)) and not isinstance(scale, bool):
            group = as_int("scale", scale, 1)
            for size in self._head_sizes:
                if size % group:
                    raise BadParamError("scale", f"must divide the head size, {size}", group)
            parts += [(F32, (*rows, size // group)) for size in self._head_sizes]
        elif scale is not None:
            pair = scale if isinstance(scale, (tuple, list)) else (scale, scale)
            if len(pair) != 2:
                raise BadParamError("scale", "must be an array or a pair of them", f"{len(pair)}")
            given = (self._static("scale[0]", pair[0], 0), self._static("scale[1]", pair[1], 1))
        in_layer, places = 0, []
        for dtype, shape in parts:
            places.append(in_layer)
            in_layer += _aligned(math.prod(shape) * dtype.itemsize)
        self.block_bytes = in_layer * self.num_layers
        num_blocks = self.pool.num_blocks
        whole = self._memory.zeros(self.block_bytes * num_blocks)

        def part(layer: int, number: int) -> Any:
            dtype, shape = parts[number]
            steps = [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape))]
            return self._memory.part(
                whole,
                dtype,
                (num_blocks, *shape),
                (self.block_bytes, *steps),
                layer * in_layer + places[number],
            )

        layers = []
        for layer in range(self.num_layers):
            scales = [None if each is None else each[layer] for each in given]
            if len(parts) == 4:
                scales = [part(layer, 2), part(layer, 3)]
            layers.append(CacheLayer(part(layer, 0), part(layer, 1), *scales))
        self.layers = tuple(layers)
        shape = (num_blocks, self.block_bytes)
        self.blocks = self._memory.part(whole, np.dtype(np.uint8), shape, (self.block_bytes, 1), 0)

    def _static(self, name: str, scale: Any, side: int) -> Any:
        """Return a scale that is read, on the device; of one element, as an array of one."""
        tensor = adopt(name, scale)
        if tensor.dtype != F32:
            raise BadTensorDtypeError(name, "must be float32", tensor.dtype)
        wanted = (self.num_layers, self.num_kv_heads, self._head_sizes[side])
        shape = tensor.shape
        if not 1 <= len(shape) <= 3 or shape != wanted[: len(shape)]:
            shapes = ", ".join(str(list(wanted[:n])) for n in (1, 2, 3))
            raise BadTensorShapeError(name, f"must have one of the shapes {shapes}", shape)
        if tensor.device == "cpu":
            values = np.asarray(scale)
            if not (np.isfinite(values) & (values > 0)).all():
                raise BadParamError(name, "must be positive and finite", shown(values.min()))
            scale = self._memory.moved(values)
        elif tensor.device != self.device:
            raise BadParamError(name, f"must be on {self.device} or on the host", tensor.device)
        return scale.reshape(self.num_layers, 1) if len(shape) == 1 else scale

    # Sequences

    @property
    def num_blocks(self) -> int:
        """Blocks on the device."""
        return self.pool.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.pool.block_size

    @property
    def num_host_blocks(self) -> int:
        """Blocks of offloaded sequences in host memory."""
        return self._host.used

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks on the device, with their scales."""
        return self.block_bytes * self.num_blocks

    def sequence(self, token_ids: Any = (), *, key: bytes = b"", publish: bool = True) -> Sequence:
        """Return a sequence with blocks for these tokens.

        See `BlockPool.sequence`: ``sequence.num_cached_tokens`` tokens at the front are in the
        cache already. Compute and write the others.

        Raises
        ------
        PoolExhaustedError
            There are too few free blocks. Nothing was changed.
        """
        return self.pool.sequence(token_ids, key=key, publish=publish)

    def slots(self, sequence: Sequence, start: int | None = None, stop: int | None = None) -> Any:
        """Return the slots of some tokens of a sequence, on the device.

        For a prompt. After `Sequence.append`, pass what that has returned to `write`.

        Parameters
        ----------
        sequence : Sequence
        start, stop : int, optional
            The first of them, and the one after the last. By default, those that were not found
            when the sequence was made.

        Returns
        -------
        array
            ``[stop - start]``, int64.
        """
        self._check(sequence)
        start = sequence.num_cached_tokens if start is None else start
        return self._moved(sequence.slots(start, stop))

    def block_tables(
        self, sequences: Iterable[Sequence], *, max_blocks: int | None = None
    ) -> BlockTables:
        """Return the block tables of some sequences, in one copy to the device.

        Parameters
        ----------
        sequences : iterable of Sequence
        max_blocks : int, optional
            Length of a row of `tables`. By default, that of the longest table.

        Returns
        -------
        BlockTables
            As FlashAttention, FlashInfer and vLLM take them.
        """
        found = list(sequences)
        for sequence in found:
            self._check(sequence)
        tables = [sequence.block_table for sequence in found]
        lengths = [sequence.num_tokens for sequence in found]
        count, longest = len(found), max(map(len, tables), default=0) or 1
        if max_blocks is not None:
            if as_int("max_blocks", max_blocks) < longest:
                rule = f"must be at least {longest}, the length of the longest block table"
                raise BadParamError("max_blocks", rule, max_blocks)
            longest = max_blocks
        starts = [0, *itertools.accumulate(map(len, tables))]
        padded = np.zeros((count, longest), np.int32)
        for row, table in zip(padded, tables, strict=True):
            row[: len(table)] = table
        size = self.block_size
        last = [length - (length - 1) // size * size if length else 0 for length in lengths]
        parts: list[Any] = [padded, lengths, [*itertools.chain(*tables)], starts, last]
        arrays = [np.asarray(each, np.int32) for each in parts]
        there = self._memory.moved(np.concatenate([each.ravel() for each in arrays]))
        ends = [*itertools.accumulate(each.size for each in arrays)]
        pieces = [
            there[end - each.size : end].reshape(each.shape)
            for each, end in zip(arrays, ends, strict=True)
        ]
        return BlockTables(*pieces)

    # Rows

    def write(
        self,
        layer: int,
        k: Any,
        v: Any,
        slots: Any,
        *,
        on_invalid: str = "skip",
        stream: Any = None,
    ) -> None:
        """Write the K and V of tokens to their slots in one layer.

        Parameters
        ----------
        layer : int
        k, v : array
            ``[num_tokens, num_kv_heads, head_size]``, of the dtype of the cache, on its device.
        slots : array, or sequence of int
            ``[num_tokens]``: what `slots`, `pagedcache.slot_mapping` or `Sequence.append` return.
            Those on the host are copied to the device at each call. Negative ones are padding.
        on_invalid : {"skip", "raise"}
            What to do about slots past the end, which are never written: see `paged_caching`.
            ``"raise"`` waits.
        stream : optional
            See `Descriptor.calculate`.

        Raises
        ------
        PagedCacheError
            See `pagedcache.paged_caching`.

        Notes
        -----
        Blocks that a fork must have of its own by now are copied first: see `apply_copies`. For
        steps on the way in, such as a norm or a rotation, call a `WriteKernel` with the arrays of
        `layers`. To capture writes in a graph, call `apply_copies` before each replay.
        """
        arrays = self._layer(layer)
        with self._on(stream):
            self.apply_copies(stream=stream)
            paged_caching(
                arrays.k,
                arrays.v,
                k,
                v,
                self._moved(slots),
                k_scale=arrays.k_scale,
                v_scale=arrays.v_scale,
                on_invalid=on_invalid,
                stream=stream,
                **self.options,
            )

    def read(
        self,
        layer: int,
        sequence: Sequence,
        *,
        start: int = 0,
        stop: int | None = None,
        stream: Any = None,
    ) -> tuple[Any, Any]:
        """Return the K and V of a sequence in one layer, as one array each.

        Parameters
        ----------
        layer : int
        sequence : Sequence
        start, stop : int, optional
            The first token, and the one after the last. By default, all.
        stream : optional
            See `Descriptor.calculate`.

        Returns
        -------
        k, v : array
            ``[stop - start, num_kv_heads, head_size]``, of the dtype of the cache.
        """
        self._check(sequence)
        arrays = self._layer(layer)
        places = sequence.slots(start, stop)
        shapes = [(len(places), self.num_kv_heads, size) for size in self._head_sizes]
        with self._on(stream):
            self.apply_copies(stream=stream)
            k, v = (self._memory.empty(shape, self.dtype) for shape in shapes)
            paged_gather(
                arrays.k,
                arrays.v,
                self._moved(places),
                k,
                v,
                k_scale=arrays.k_scale,
                v_scale=arrays.v_scale,
                stream=stream,
                **self.options,
            )
        return k, v

    def apply_copies(self, *, stream: Any = None) -> None:
        """Copy the blocks that forks have been given of their own, in all layers.

        `write`, `read` and `offload` begin with this. It returns at once if there are none.
        """
        if copies := self.pool.copies:
            self._within.copy(copies, stream=stream)
            self.pool.take_copies()

    # Host memory

    def offload(
        self, sequence: Sequence, *, num_written: int | None = None, stream: Any = None
    ) -> Offloaded:
        """Copy a sequence to host memory, and free its blocks on the device.

        The copy is queued on the stream, and nothing waits for it (but the first one in each
        direction, which measures; pinned memory takes a while to allocate). The blocks are free at
        once: who gets them writes to them later in the order of the stream. As after
        `Sequence.free`, they can still be found until then.

        Parameters
        ----------
        sequence : Sequence
            It is freed.
        num_written : int, optional
            How many of its tokens have been written; see `Sequence.free`. By default, all.
        stream : optional
            See `Descriptor.calculate`.

        Returns
        -------
        Offloaded
            For `restore`. Its memory is pinned if the cache is on a GPU.

        Raises
        ------
        PoolExhaustedError
            It would be more than `host_blocks`. Nothing was changed.
        """
        self._check(sequence)
        num_tokens = sequence.num_tokens
        written = num_tokens
        if num_written is not None:
            written = as_int("num_written", num_written, 0, num_tokens, "the number of tokens, ")
        self._handle(stream)  # refused before anything is changed
        table = sequence.block_table[: -(-written // self.block_size)]
        host = self._host.take(len(table))
        try:
            self.apply_copies(stream=stream)
            self._host.copy(table, host, to_host=True, stream=stream)
        except BaseException:
            self._host.give_back(host)
            raise
        made = Offloaded(self, sequence, written, host)
        sequence.free(num_written=written)
        return made

    def restore(self, offloaded: Offloaded, *, stream: Any = None) -> Sequence:
        """Bring a sequence back to the device.

        Blocks that are found there are shared; the others are copied from host memory, on the
        stream, and nothing waits for it.

        Parameters
        ----------
        offloaded : Offloaded
            Its host memory is given back.
        stream : optional
            See `Descriptor.calculate`.

        Returns
        -------
        Sequence
            With the same tokens. Its `num_cached_tokens` is how many were written when it was
            offloaded. If it had not been published, or full blocks had not all been written, other
            sequences do not find its blocks until you write the rest and call `Sequence.publish`.

        Raises
        ------
        PoolExhaustedError
            There are too few free blocks. Nothing was changed.
        FreedError
            It was restored or freed before.
        """
        if not isinstance(offloaded, Offloaded) or offloaded._cache is not self:
            rule = "must be what offload of this cache has returned"
            raise BadParamError("offloaded", rule, shown(offloaded))
        if offloaded.freed:
            raise FreedError("offloaded", "was restored or freed, and cannot be used any more")
        self._handle(stream)  # refused before anything is changed
        sequence = self.pool.resume(
            offloaded.token_ids, key=offloaded.key, publish=offloaded._publish
        )
        found = sequence.num_cached_tokens // self.block_size
        host = offloaded._blocks[found:]
        table = sequence.block_table[found : found + len(host)]
        try:
            self._host.copy(table, host, to_host=False, stream=stream)
        except BaseException:
            sequence.free(num_written=sequence.num_cached_tokens)
            raise
        sequence.num_cached_tokens = max(offloaded.num_written, sequence.num_cached_tokens)
        offloaded.free()
        return sequence

    # Other processes

    def send(
        self, sequence: Sequence, peer: Any, *, num_written: int | None = None, stream: Any = None
    ) -> Any:
        """Hand a sequence over to another process or host, where ``accept(peer)`` takes it.

        The other side finds what it has of these tokens, and reads the other blocks. Computed
        scales are in them; given ones must be equal on both sides.

        Parameters
        ----------
        sequence : Sequence
            It may be appended to and freed at once: its blocks are held until the other side has
            them.
        peer : pagedcache.transfer.Peer
            The other side, connected to an agent of this cache, and this one to it.
        num_written : int, optional
            How many of its tokens, from the front, have their K and V here. By default, all.
        stream : optional
            The stream of the writes. The call waits for all that is queued on it, or on the current
            one, since NIXL knows no streams.

        Returns
        -------
        pagedcache.transfer.Offer
            It has ``done``, ``wait(timeout)`` and ``withdraw()``.

        Raises
        ------
        TransferError
            The other side is gone.
        PagedCacheError
            See `pagedcache.transfer.offer`.
        """
        self._check(sequence)
        hand_over = getattr(peer, "_hand_over", None)  # transfers know caches, not the reverse
        if hand_over is None:
            rule = "must be a Peer, which pagedcache.transfer.Agent.connect returns"
            raise BadParamTypeError("peer", rule, shown(peer))
        return hand_over(sequence, num_written, stream)

    # Helpers

    def _check(self, sequence: object) -> None:
        if not isinstance(sequence, Sequence):
            raise BadParamTypeError("sequence", "must be a Sequence", shown(sequence))
        if sequence.pool is not self.pool:
            rule = "must be one of this cache; make it with KVCache.sequence"
            raise BadParamError("sequence", rule, f"{sequence!r} of another pool")

    def _layer(self, layer: int) -> CacheLayer:
        try:
            if layer < 0:
                raise IndexError
            return self.layers[layer]
        except (IndexError, TypeError):
            rule = f"must be an int from 0 to {self.num_layers - 1}"
            raise BadParamError("layer", rule, shown(layer)) from None

    def _moved(self, slots: Any) -> Any:
        """Return slots on the device, copied if they are on the host."""
        if hasattr(slots, "__dlpack__") or hasattr(slots, "__cuda_array_interface__"):
            if self.device == "cpu" or adopt("slots", slots).device != "cpu":
                return slots
            slots = np.asarray(slots)
        try:
            found = np.asarray(slots)
        except (TypeError, ValueError, OverflowError):
            found = np.empty(1, object)
        if found.ndim != 1 or (found.dtype.kind not in "iu" and found.size):
            rule = "must be an array or a sequence of ints"
            raise BadParamTypeError("slots", rule, shown(slots))
        return self._memory.moved(found.astype(np.int64))

    def _handle(self, stream: Any) -> int:
        return self._memory.current_stream() if stream is None else self._device.stream(stream)

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        """Let new arrays be for what is queued on a stream, if one is given."""
        if stream is None:
            yield
        else:
            with self._memory.on(self._handle(stream)):
                yield

    def __repr__(self) -> str:
        k_size, v_size = self._head_sizes
        sizes = f"{k_size}" if k_size == v_size else f"{k_size} (K) and {v_size} (V)"
        stored = str(self.dtype)
        if self.format != stored:
            stored = f"{stored} as {self.format}"
        return (
            f"<pagedcache.KVCache on {self.device}: {self.num_layers} layers of "
            f"{self.num_kv_heads} x {sizes}, {stored}, {self.layout}; {self.pool.num_used} of "
            f"{self.num_blocks} blocks of {self.block_size} in use, {_size(self.nbytes)}>"
        )

    def _repr_html_(self) -> str:
        rows = [
            ("device", self.device),
            ("layers", str(self.num_layers)),
            ("KV heads", str(self.num_kv_heads)),
            ("head size", " and ".join(map(str, dict.fromkeys(self._head_sizes)))),
            ("dtype", str(self.dtype)),
            ("stored as", self.format),
            ("layout", self.layout),
            ("a block", f"{self.block_size} tokens, {self.block_bytes:,} bytes"),
            ("all blocks", f"{self.num_blocks:,}, {_size(self.nbytes)}"),
            ("in host memory", f"{self.num_host_blocks} blocks"),
        ]
        return as_html(rows) + self.pool._repr_html_()


def _format(name: object, dtype: Dtype) -> Format:
    if name is None:
        return FORMATS[str(dtype)]
    if not isinstance(name, str) or name not in FORMATS:
        rule = f"must be one of {', '.join(FORMATS)} or None"
        raise BadParamError("format", rule, shown(name))
    return FORMATS[name]


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
