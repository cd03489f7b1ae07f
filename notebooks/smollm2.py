# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M on a paged KV cache, small enough to read: NumPy on the CPU, CUDA on a GPU.

A step has a fixed number of rows, and each row is one token of some sequence: its id, its position,
and the block table of its sequence. A new prompt has many tokens to compute, a decoding sequence
just one, so the same step does prefill and decode in any mix. Shapes never change and inputs are
refilled in place, so on a GPU the whole step fits in one CUDA graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import pagedcache as pc

if TYPE_CHECKING:
    from pagedcache.demo.model import ModelFile

Array = Any  # of NumPy or CuPy

# The weights of a layer, and their names in the file. Matrices are [outputs, inputs].
WEIGHTS = {
    "attention_norm": ["attn_norm"],
    "qkv": ["attn_q", "attn_k", "attn_v"],
    "output": ["attn_output"],
    "feed_forward_norm": ["ffn_norm"],
    "gate_up": ["ffn_gate", "ffn_up"],
    "down": ["ffn_down"],
}


class Operations(NamedTuple):
    """What the model computes, in float32, by NumPy or by the kernels of ``smollm2.cu``."""

    # (x, weight): rows divided by their root mean square, times weight
    rms_norm: Callable[..., Array]
    # (x, matrix, plus=None): x @ matrix.T, plus another array if given
    product: Callable[..., Array]
    # (gate_up): silu(gate) * up, where each row is one of gate, followed by one of up
    gated: Callable[..., Array]
    # (q, k, v, tables, positions): each row of Q, [rows, heads, head size], attends to the tokens
    # of its block table up to its position, both int32; K and V are pages in layout NHD
    attention: Callable[..., Array]


def numpy_operations(epsilon: float) -> Operations:
    """Return the operations for arrays of NumPy."""

    def rms_norm(x: Array, weight: Array) -> Array:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight

    def product(x: Array, matrix: Array, plus: Array | None = None) -> Array:
        return x @ matrix.T if plus is None else x @ matrix.T + plus

    def gated(gate_up: Array) -> Array:
        gate, up = np.split(gate_up, 2, axis=-1)
        return gate * (0.5 + 0.5 * np.tanh(0.5 * gate)) * up  # this sigmoid never overflows

    def attention(q: Array, k: Array, v: Array, tables: Array, positions: Array) -> Array:
        rows, (_, _, kv_heads, size) = len(q), k.shape
        keys, values = (x[tables].reshape(rows, -1, kv_heads, size).swapaxes(1, 2) for x in (k, v))
        # Query heads come in groups; each group shares one KV head.
        scores = q.reshape(rows, kv_heads, -1, size) @ keys.swapaxes(2, 3) * size**-0.5
        later = np.arange(keys.shape[2]) > positions[:, None]
        scores = np.where(later[:, None, None], -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True) @ values).reshape(rows, -1)

    return Operations(rms_norm, product, gated, attention)


def cuda_operations(epsilon: float) -> Operations:
    """Return the operations for arrays of CuPy; each is one launch, sized as the file says."""
    import cupy

    text = (Path(__file__).parent / "smollm2.cu").read_text("utf-8")
    module = cupy.RawModule(code=text, options=("--std=c++17",))
    kernels = {name: module.get_function(name) for name in Operations._fields}

    def run(name: str, shape: Any, grid: Any, threads: int, *arguments: Any) -> Array:
        out = cupy.empty(shape, np.float32)
        typed = (np.int32(each) if isinstance(each, int) else each for each in arguments)
        kernels[name](grid, (threads,), (out, *typed))
        return out

    def rms_norm(x: Array, weight: Array) -> Array:
        rows, length = x.shape
        return run("rms_norm", x.shape, (rows,), 32, x, weight, length, np.float32(epsilon))

    def product(x: Array, matrix: Array, plus: Array | None = None) -> Array:
        rows, (outputs, length) = len(x), matrix.shape
        arrays = x, matrix, np.uintp(0) if plus is None else plus
        shape, grid = (rows, outputs), (outputs // 4, -(-rows // 16))
        return run("product", shape, grid, 192, *arrays, rows, outputs, length)

    def gated(gate_up: Array) -> Array:
        rows, length = len(gate_up), gate_up.shape[1] // 2
        return run("gated", (rows, length), (-(-length // 256), rows), 256, gate_up, length)

    def attention(q: Array, k: Array, v: Array, tables: Array, positions: Array) -> Array:
        rows, heads, size = q.shape
        strides = q.strides[0] // 4, k.strides[0] // 4
        sizes = *strides, *k.shape[1:3], tables.shape[1]
        arrays = q, k, v, tables, positions
        return run("attention", (rows, heads * size), (heads, rows), 256, *arrays, *sizes)

    return Operations(rms_norm, product, gated, attention)


class Model:
    """The weights, from a file to NumPy or CuPy, and the forward pass in float32.

    Sequences can be as long as `context`.
    """

    def __init__(self, source: ModelFile | MadeUp, xp: Any, context: int) -> None:
        def load(*names: str) -> Array:
            return xp.asarray(np.concatenate([source.tensor(f"{name}.weight") for name in names]))

        def layer(i: int) -> SimpleNamespace:
            of_layer = {own: [f"blk.{i}.{name}" for name in WEIGHTS[own]] for own in WEIGHTS}
            return SimpleNamespace(**{own: load(*names) for own, names in of_layer.items()})

        self.xp = xp
        self.context = context
        self.heads: int = source.field("llama.attention.head_count")
        self.kv_heads = source.num_kv_heads
        self.head_size = source.head_size
        self.end: int = source.field("tokenizer.ggml.eos_token_id")
        self.embedding = load("token_embd")  # also the output matrix
        self.layers = [layer(i) for i in range(source.field("llama.block_count"))]
        self.norm = load("output_norm")
        # The rotary embedding rotates pair i at position p by p * base^(-2i / head_size).
        exponents = np.arange(0, self.head_size, 2) / self.head_size
        angles = np.arange(context)[:, None] * source.field("llama.rope.freq_base") ** -exponents
        cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], -1)
        self.cos_sin = xp.asarray(cos_sin.astype(np.float32))  # [context, head size]
        epsilon = float(source.field("llama.attention.layer_norm_rms_epsilon"))
        self.ops = (numpy_operations if xp is np else cuda_operations)(epsilon)

    def forward(self, ids: Array, attend: Callable[..., Array]) -> Array:
        """Return the logits of the token after each row.

        ``attend(layer, q, k, v)`` is given Q, K and V, ``[rows, heads, head size]``, which are not
        rotated yet. It stores K and V, and returns ``[rows, heads * head size]``.
        """
        ops, x = self.ops, self.embedding[ids]
        for i, layer in enumerate(self.layers):
            qkv = ops.product(ops.rms_norm(x, layer.attention_norm), layer.qkv)
            x = ops.product(attend(i, *self.split(qkv)), layer.output, plus=x)
            gate_up = ops.product(ops.rms_norm(x, layer.feed_forward_norm), layer.gate_up)
            x = ops.product(ops.gated(gate_up), layer.down, plus=x)
        return ops.product(ops.rms_norm(x, self.norm), self.embedding)

    def split(self, qkv: Array) -> list[Array]:
        """Return Q, K and V, ``[rows, heads, head size]``; all are views of `qkv`."""
        heads = qkv.reshape(len(qkv), -1, self.head_size)
        parts: list[Array] = self.xp.split(heads, [self.heads, self.heads + self.kv_heads], axis=1)
        return parts


class MadeUp:
    """Stands in for a `ModelFile` where there is none: random weights, and tokens are bytes."""

    num_kv_heads, head_size, layers, hidden, inner = 3, 64, 4, 192, 512

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def tokens(self, text: str) -> list[int]:
        """Return the bytes of a text."""
        return list(text.encode())

    def field(self, name: str) -> Any:
        """Return a number that `Model` asks for."""
        return {
            "llama.attention.head_count": 3 * self.num_kv_heads,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.block_count": self.layers,
            "llama.rope.freq_base": 1e4,
            "tokenizer.ggml.eos_token_id": 0,
        }[name]

    def tensor(self, name: str) -> Array:
        """Return ones for a norm, and for a matrix numbers that keep the size of its input."""
        kind = name.removesuffix(".weight").rpartition(".")[2]
        rows = self.head_size * self.num_kv_heads
        shapes = {
            "token_embd": (256, self.hidden),
            "attn_q": (3 * rows, self.hidden),
            "attn_k": (rows, self.hidden),
            "attn_v": (rows, self.hidden),
            "attn_output": (self.hidden, 3 * rows),
            "ffn_gate": (self.inner, self.hidden),
            "ffn_up": (self.inner, self.hidden),
            "ffn_down": (self.hidden, self.inner),
        }
        if kind not in shapes:
            return np.ones(self.hidden, np.float32)
        shape = shapes[kind]
        return self._rng.standard_normal(shape, np.float32) * np.float32(shape[1] ** -0.5)


def attend_windows(model: Model, q: Array, k: Array, v: Array, length: int) -> Array:
    """Let each row attend to the rows before it in its window, and to itself.

    Parameters
    ----------
    model : Model
    q : array
        ``[rows, heads, head size]``. Each `length` rows are a window.
    k, v : array
        ``[rows, KV heads, head size]``, float32 and contiguous.

    Returns
    -------
    array
        ``[rows, heads * head size]``.
    """
    xp, windows, (_, kv_heads, size) = model.xp, len(q) // length, k.shape
    if xp is not np:  # a window is a block
        tables = xp.arange(windows, dtype=np.int32).repeat(length)[:, None]
        positions = xp.tile(xp.arange(length, dtype=np.int32), windows)
        pages = (x.reshape(windows, length, kv_heads, size) for x in (k, v))
        return model.ops.attention(q, *pages, tables, positions)

    def by_head(x: Array) -> Array:
        return np.moveaxis(x.reshape(windows, length, kv_heads, -1, size), 1, 3)

    out = np.empty((windows, kv_heads, q.shape[1] // kv_heads, length, size), np.float32)
    queries, keys, values = by_head(q) * np.float32(size**-0.5), by_head(k), by_head(v)
    step = 64  # rows at a time, so that what is between stays near the processor
    for start in range(0, length, step):
        part, stop = slice(start, start + step), min(start + step, length)
        scores = queries[..., part, :] @ keys[..., :stop, :].swapaxes(-1, -2)
        scores[..., np.triu(np.ones(scores.shape[-2:], bool), start + 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[..., part, :] = weights @ values[..., :stop, :] / weights.sum(-1, keepdims=True)
    return np.moveaxis(out, 3, 1).reshape(len(q), -1)


def dense_tokens(model: Model, prompt: list[int], new_tokens: int) -> list[int]:
    """Return what follows a prompt, as the engine does, but alone and with a dense cache.

    K and V are in arrays as long as the context, and rotated and written by indexing.
    """
    xp, ids, start = model.xp, list(prompt), 0
    shape = (len(model.layers), 1, model.context, model.kv_heads, model.head_size)
    k_cache, v_cache = xp.zeros(shape, np.float32), xp.zeros(shape, np.float32)

    def rotated(x: Array) -> Array:
        cos, sin = xp.split(model.cos_sin[positions][:, None], 2, axis=-1)
        even, odd = x[..., 0::2], x[..., 1::2]  # the two numbers of a pair are adjacent
        return xp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape)

    def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
        k_cache[layer, 0, positions], v_cache[layer, 0, positions] = rotated(k), v
        table = xp.zeros((len(q), 1), np.int32)  # the context is one block
        return model.ops.attention(rotated(q), k_cache[layer], v_cache[layer], table, positions)

    while start == 0 or (len(ids) < len(prompt) + new_tokens and ids[-1] != model.end):
        positions = xp.arange(start, len(ids), dtype=np.int32)
        logits = model.forward(xp.asarray(ids[start:]), attend)
        start = len(ids)
        ids.append(int(logits[-1].argmax()))
    return ids[len(prompt) :]


@dataclass(eq=False)
class Request:
    """A prompt and the tokens generated after it."""

    name: str
    ids: list[int]  # of the prompt, followed by those generated
    prompt: int  # number of tokens in it
    limit: int  # most tokens in total
    sequence: Any = None  # pagedcache.pool.Sequence, from when it is admitted until it ends
    found: int = 0  # tokens that were in the cache when it was admitted
    computed: int = 0  # tokens that are in the cache
    row: int = -1  # that predicted its latest token

    @property
    def generated(self) -> list[int]:
        """Tokens generated after the prompt."""
        return self.ids[self.prompt :]


class Engine:
    """Continuous batching: in each step, running sequences first, then new ones while they fit.

    Parameters
    ----------
    model : Model
    num_blocks, block_size : int
        Size of the cache.
    rows : int
        Number of tokens in a step.
    graph : bool
        Capture the step in a CUDA graph; CuPy only.
    """

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        block_size: int = 16,
        rows: int = 16,
        *,
        graph: bool = False,
    ) -> None:
        self.model = model
        sizes = (len(model.layers), num_blocks, block_size, model.kv_heads, model.head_size)
        device = "cpu" if model.xp is np else None  # the current GPU
        self.cache = pc.KVCache(*sizes, dtype=np.float32, device=device)
        rope = pc.rope("cos_sin", "positions", style="interleaved")
        self.kernel = pc.WriteKernel(q=[rope], k=[rope], **self.cache.options)  # for all layers
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.peak = 0  # blocks
        self.rows = rows
        # Block tables, ids and positions, and where rows begin. They are one array on the host and
        # one on the device, so that each step needs a single copy.
        entries = -(-model.context // block_size)
        self._host = np.zeros(rows * (entries + 3) + 1, np.int32)
        self._device = model.xp.asarray(self._host)
        self._stream: Any = nullcontext()
        self._run = self._forward
        if graph:
            self._capture()

    def submit(self, name: str, ids: list[int], new_tokens: int) -> Request:
        """Queue a prompt, to be followed by at most `new_tokens` tokens."""
        request = Request(name, list(ids), len(ids), len(ids) + new_tokens)
        blocks = self._blocks(request)
        if request.limit > self.model.context or blocks > self.cache.num_blocks:
            raise ValueError(f"{name} is too long: {request.limit} tokens in {blocks} blocks")
        self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Compute one token in each row; return the requests that have finished."""
        rows = self._schedule()
        self._fill(rows)
        with self._stream:
            self._device[...] = self.model.xp.asarray(self._host)
            self._run()
            tokens = self.tokens.tolist()
        ended = []
        for row, (request, position) in enumerate(rows):
            if position < len(request.ids) - 1:
                continue  # more of its known tokens are to be computed
            request.row = row
            request.ids.append(tokens[row])
            if tokens[row] == self.model.end or len(request.ids) == request.limit:
                ended.append(request)
            else:
                request.sequence.append(tokens[row])
        for request in ended:
            self.running.remove(request)
            request.sequence.free()
        return ended

    def _schedule(self) -> list[tuple[Request, int]]:
        """Return what to compute in each row: a request, and the position of a token of it."""
        rows: list[tuple[Request, int]] = []
        running = deque(self.running)
        while len(rows) < self.rows:
            if running:
                request = running.popleft()
            elif self.waiting and self._admit(self.waiting[0]):
                request = self.waiting.popleft()
            else:
                break
            start = request.computed
            request.computed = min(len(request.ids), start + self.rows - len(rows))
            rows += [(request, position) for position in range(start, request.computed)]
        self.peak = max(self.peak, self.cache.pool.num_used)
        return rows

    def _admit(self, request: Request) -> bool:
        """Start a request, unless somebody could run out of blocks later.

        Blocks of its prefix are found even if they are filled in this very step, since in each
        layer all rows write before any row reads. None is filled later: a row is left for a new
        request only once all tokens of the running ones have theirs.
        """
        pool = self.cache.pool
        later = self._blocks(request) - -(-len(request.ids) // pool.block_size)
        for each in self.running:
            later += self._blocks(each) - len(each.sequence.block_table)
        if pool.num_needed(request.ids) + later > pool.num_free:
            return False
        sequence = request.sequence = self.cache.sequence(request.ids)
        request.found = request.computed = sequence.num_cached_tokens
        self.running.append(request)
        return True

    def _blocks(self, request: Request) -> int:
        return -(-(request.limit - 1) // self.cache.block_size)  # the last token is never fed back

    def _parts(self, inputs: Array) -> tuple[Array, Array, Array, Array]:
        """Return block tables, ids, positions and where rows begin, which are stored in a row."""
        tables, numbers = inputs[: -3 * self.rows - 1], inputs[-3 * self.rows - 1 :]
        ids, positions = numbers[: 2 * self.rows].reshape(2, self.rows)
        return tables.reshape(self.rows, -1), ids, positions, numbers[2 * self.rows :]

    def _fill(self, rows: list[tuple[Request, int]]) -> None:
        self._host[:] = 0
        tables, ids, positions, starts = self._parts(self._host)
        for row, (request, position) in enumerate(rows):
            table = request.sequence.block_table
            tables[row, : len(table)] = table
            ids[row], positions[row] = request.ids[position], position
        starts[:] = np.minimum(np.arange(self.rows + 1), len(rows))  # the others are padding

    def _forward(self) -> None:
        tables, ids, positions, starts = self._parts(self._device)
        slots = pc.slot_mapping(tables, starts, positions, block_size=self.cache.block_size)
        turn = {"cos_sin": self.model.cos_sin, "positions": positions}

        def attend(layer: int, q: Array, k: Array, v: Array) -> Array:
            pages = self.cache.layers[layer]
            # Rotates Q in place; rotates K and writes K and V to their slots.
            self.kernel(pages.k, pages.v, k, v, slots, q=q, q_out=q, **turn)
            return self.model.ops.attention(q, pages.k, pages.v, tables, positions)

        self.logits = self.model.forward(ids, attend)
        self.tokens = self.logits.argmax(-1)

    def _capture(self) -> None:
        """Capture one step; from then on, a step is a single graph launch."""
        import cupy

        cupy.cuda.Device().synchronize()  # the weights were copied on another stream
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # A memory pool of its own: nobody else may get the memory that the graph will use again.
        self._memory = cupy.cuda.MemoryPool()
        with self._stream, cupy.cuda.using_allocator(self._memory.malloc):
            self._forward()  # compiles the kernels, and fills the pool
            self._stream.begin_capture()
            self._forward()
            self.graph = self._stream.end_capture()
        self._run = lambda: self.graph.launch(self._stream)
