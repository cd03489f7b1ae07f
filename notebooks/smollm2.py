# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M on a paged KV cache, small enough to read: NumPy on the CPU, CuPy on a GPU.

A step has a fixed number of rows, and each row is one token of some sequence. A row consists of a
token id, its position, the slot that its K and V are written to, and the block table of its
sequence; unused rows get slot -1. A new prompt has many tokens to compute, a decoding sequence just
one, so the same step does prefill and decode in any mix. Shapes never change and inputs are
refilled in place, so on a GPU the whole step fits in one CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import pagedcache as pc
from pagedcache.demo.pool import PADDING, Pool, Sequence

if TYPE_CHECKING:
    from pagedcache.demo.model import ModelFile

Array = Any  # of NumPy or CuPy
Row = tuple["Request", int, int]  # a token to compute: its request, position, slot


class Layer(NamedTuple):
    """Weights of one layer; matrices are ``[outputs, inputs]``."""

    attention_norm: Array
    qkv: Array
    output: Array
    feed_forward_norm: Array
    gate_up: Array
    down: Array


class Model:
    """The weights, and the forward pass in float32.

    Parameters
    ----------
    source : ModelFile
        The model file.
    xp : module
        ``numpy`` or ``cupy``.
    context : int
        Number of positions supported, the longest that a sequence can get.
    """

    def __init__(self, source: ModelFile, xp: Any, context: int) -> None:
        def load(*names: str) -> Array:
            return xp.asarray(np.concatenate([source.tensor(f"{name}.weight") for name in names]))

        def layer(block: str) -> Layer:
            return Layer(
                load(f"{block}.attn_norm"),
                load(f"{block}.attn_q", f"{block}.attn_k", f"{block}.attn_v"),
                load(f"{block}.attn_output"),
                load(f"{block}.ffn_norm"),
                load(f"{block}.ffn_gate", f"{block}.ffn_up"),
                load(f"{block}.ffn_down"),
            )

        self.xp = xp
        self.context = context
        self.heads: int = source.field("llama.attention.head_count")
        self.kv_heads = source.num_kv_heads
        self.head_size = source.head_size
        self.end: int = source.field("tokenizer.ggml.eos_token_id")
        self.epsilon = float(source.field("llama.attention.layer_norm_rms_epsilon"))
        self.embedding = load("token_embd")  # its transpose is also the output matrix
        self.layers = [layer(f"blk.{i}") for i in range(source.field("llama.block_count"))]
        self.norm = load("output_norm")
        # The rotary embedding rotates pair i at position p by p * base^(-2i / head_size).
        exponents = np.arange(0, self.head_size, 2) / self.head_size
        angles = np.arange(context)[:, None] * source.field("llama.rope.freq_base") ** -exponents
        cos_sin = np.concatenate([np.cos(angles), np.sin(angles)], -1)
        self.cos_sin = xp.asarray(cos_sin.astype(np.float32))  # [context, head size]
        self.places = xp.arange(context)
        self.product = np_product if xp is np else make_cupy_product()

    def forward(
        self, ids: Array, positions: Array, slots: Array, tables: Array, cache: PagedCache
    ) -> Array:
        """Write the K and V of each row to its slot; return the logits of the next token."""
        x = self.embedding[ids]
        masked = (self.places > positions[:, None])[:, None, None, :]
        for i, layer in enumerate(self.layers):
            q, k, v = self._split(self.product(self._normed(x, layer.attention_norm), layer.qkv))
            cache.write(i, q, k, v, slots, positions)
            keys, values = cache.read(i, tables)
            mixed = self._attention(q, keys, values, masked)
            x = x + self.product(mixed, layer.output)
            gate_up = self.product(self._normed(x, layer.feed_forward_norm), layer.gate_up)
            gate, up = self.xp.split(gate_up, 2, axis=-1)
            x = x + self.product(gate * self._sigmoid(gate) * up, layer.down)
        return self.product(self._normed(x, self.norm), self.embedding)

    def _normed(self, x: Array, weight: Array) -> Array:
        return x / self.xp.sqrt((x * x).mean(-1, keepdims=True) + self.epsilon) * weight

    def _sigmoid(self, x: Array) -> Array:
        return 0.5 + 0.5 * self.xp.tanh(0.5 * x)  # never overflows

    def _split(self, qkv: Array) -> list[Array]:
        """Return Q, K and V, ``[rows, heads, head size]``; all are views of `qkv`."""
        heads = qkv.reshape(len(qkv), -1, self.head_size)
        parts: list[Array] = self.xp.split(heads, [self.heads, self.heads + self.kv_heads], axis=1)
        return parts

    def _attention(self, q: Array, keys: Array, values: Array, masked: Array) -> Array:
        """Let each row attend to its own sequence, up to its own position."""
        xp, rows = self.xp, len(q)
        # Query heads come in groups; each group shares one KV head.
        q = q.reshape(rows, self.kv_heads, -1, self.head_size) * self.head_size**-0.5
        scores = xp.where(masked, -np.inf, self.product(q, keys.transpose(0, 2, 1, 3)))
        weights = xp.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        return self.product(weights, values.transpose(0, 2, 3, 1)).reshape(rows, -1)


def np_product(x: Array, matrix: Array) -> Array:
    """Return ``x @ matrix.T`` for each matrix in a stack."""
    return np.matmul(x, np.swapaxes(matrix, -1, -2))


def make_cupy_product() -> Any:
    """Return the same for CuPy, without cuBLAS, which CuPy refuses to capture (its issue 6290)."""
    import cupy

    @functools.cache
    def kernel(rows: int) -> Any:
        return cupy.RawKernel(PRODUCT, "product", (f"-DROWS={rows}",))

    def product(x: Array, matrix: Array) -> Array:
        x, matrix = cupy.ascontiguousarray(x), cupy.ascontiguousarray(matrix)
        *stack, rows, length = x.shape
        outputs = matrix.shape[-2]
        out = cupy.empty((*stack, rows, outputs), np.float32)
        grid, block = (-(-outputs // 8), math.prod(stack)), (32, 8)
        kernel(rows)(grid, block, (x, matrix, out, np.int32(outputs), np.int32(length)))
        return out

    return product


PRODUCT = r"""
extern "C" __global__ void product(const float* x, const float* matrix, float* out, int outputs,
                                   int length) {
  // One warp per output: it reads a row of the matrix once, for all rows of x.
  const int output = blockIdx.x * blockDim.y + threadIdx.y;
  if (output >= outputs) return;
  x += (long long)blockIdx.y * ROWS * length;
  matrix += ((long long)blockIdx.y * outputs + output) * length;
  out += (long long)blockIdx.y * ROWS * outputs + output;
  float sums[ROWS] = {};
  for (int i = threadIdx.x; i < length; i += 32)
    for (int row = 0; row < ROWS; ++row) sums[row] += matrix[i] * x[row * length + i];
  for (int row = 0; row < ROWS; ++row) {
    for (int other = 16; other; other /= 2) sums[row] += __shfl_xor_sync(~0u, sums[row], other);
    if (threadIdx.x == 0) out[row * outputs] = sums[row];
  }
}
"""


class PagedCache:
    """K and V of all layers, ``[layers, blocks, block size, KV heads, head size]``.

    Attributes
    ----------
    kernel : WriteKernel
        Rotates Q and K, and writes K and V; one for all layers and steps.
    """

    def __init__(self, model: Model, num_blocks: int, block_size: int) -> None:
        shape = (len(model.layers), num_blocks, block_size, model.kv_heads, model.head_size)
        self.k, self.v = (model.xp.zeros(shape, np.float32) for _ in "kv")
        self.block_bytes: int = (self.k.nbytes + self.v.nbytes) // num_blocks
        self.cos_sin = model.cos_sin
        # In this file, the two numbers of a pair are adjacent.
        rope = pc.rope("cos_sin", "positions", style="interleaved")
        self.kernel = pc.WriteKernel(q=[rope], k=[rope], layout="NHD")

    def write(
        self, layer: int, q: Array, k: Array, v: Array, slots: Array, positions: Array
    ) -> None:
        """Write K, rotated, and V of one layer, and rotate Q in place.

        All three are ``[rows, heads, head size]``.
        """
        self.kernel(
            self.k[layer], self.v[layer], k, v, slots,
            q=q, q_out=q, cos_sin=self.cos_sin, positions=positions,
        )  # fmt: skip

    def read(self, layer: int, tables: Array) -> tuple[Array, Array]:
        """Return the K and V of whole sequences, ``[rows, context, KV heads, head size]``."""
        shape = (len(tables), -1, *self.k.shape[-2:])
        return self.k[layer][tables].reshape(shape), self.v[layer][tables].reshape(shape)


class DenseCache(PagedCache):
    """The same with one context-long block per sequence, rotated and written by indexing."""

    def write(
        self, layer: int, q: Array, k: Array, v: Array, slots: Array, positions: Array
    ) -> None:
        """Do the same as the kernel without it, so that there is something to compare it with."""
        cos_sin = self.cos_sin[positions][:, None, :]
        cos, sin = cos_sin[..., : k.shape[-1] // 2], cos_sin[..., k.shape[-1] // 2 :]
        for x in (q, k):
            even, odd = x[..., 0::2], x[..., 1::2]
            even[...], odd[...] = even * cos - odd * sin, odd * cos + even * sin
        used = slots >= 0
        for cache, rows in ((self.k, k), (self.v, v)):
            cache[layer].reshape(-1, *rows.shape[1:])[slots[used]] = rows[used]


@dataclass(eq=False)
class Request:
    """A prompt and the tokens generated after it.

    Attributes
    ----------
    name : str
    ids : list of int
        Tokens of the prompt, followed by those generated.
    prompt, limit : int
        Number of tokens in the prompt, and the most there may be in total.
    row : int
        Row that predicted its latest token; -1 if there is none yet.
    """

    name: str
    ids: list[int]
    prompt: int
    limit: int
    row: int = -1
    sequence: Sequence = field(default_factory=lambda: Sequence(""))

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
        Size of the pool. With a dense cache, `num_blocks` is the number of sequences, and the block
        size is the context of the model.
    rows : int
        Number of tokens in a step.
    dense : bool
        Use a `DenseCache`, for comparison.
    graph : bool
        Capture the step in a CUDA graph; CuPy only, and not with a dense cache.
    """

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        block_size: int = 16,
        rows: int = 16,
        *,
        dense: bool = False,
        graph: bool = False,
    ) -> None:
        xp = self.xp = model.xp
        block_size = model.context if dense else block_size
        if model.context % block_size:
            raise ValueError(f"context {model.context} must be a multiple of {block_size}")
        self.model = model
        self.cache = (DenseCache if dense else PagedCache)(model, num_blocks, block_size)
        self.pool = Pool(num_blocks, block_size, 0, np.random.default_rng(0))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.peak = 0  # blocks
        entries = model.context // block_size
        # One array on the host and one on the device, so that each step needs a single copy.
        self._host = np.zeros((3 + entries) * rows, np.int64)
        self._device = xp.asarray(self._host)
        self._host_parts = _parts(self._host, rows)
        self._device_parts = _parts(self._device, rows)
        self.logits = xp.zeros((rows, len(model.embedding)), np.float32)
        self.tokens = xp.zeros(rows, np.int64)
        self._stream: Any = nullcontext()
        self._run = self._forward
        if graph:
            self._capture()

    @property
    def used(self) -> int:
        """Number of blocks held by sequences."""
        return self.pool.num_blocks - len(self.pool.free)

    def submit(self, name: str, ids: list[int], new_tokens: int) -> Request:
        """Queue a prompt, to be followed by at most `new_tokens` tokens."""
        request = Request(name, list(ids), len(ids), len(ids) + new_tokens)
        blocks = self._blocks(request)
        if request.limit > self.model.context or blocks > self.pool.num_blocks:
            raise ValueError(f"{name} is too long: {request.limit} tokens in {blocks} blocks")
        self.waiting.append(request)
        return request

    def step(self) -> list[Request]:
        """Compute one token in each row; return the requests that have finished."""
        rows = self._schedule()
        self._fill(rows)
        with self._stream:
            self._device[...] = self.xp.asarray(self._host)
            self._run()
            tokens = self.tokens.tolist()
        ended = []
        for row, (request, position, _) in enumerate(rows):
            if position == len(request.ids) - 1:  # all its known tokens are computed
                request.row = row
                request.ids.append(tokens[row])
                if tokens[row] == self.model.end or len(request.ids) == request.limit:
                    ended.append(request)
        for request in ended:
            self.running.remove(request)
            self.pool.release(request.sequence)
        return ended

    def _schedule(self) -> list[Row]:
        rows: list[Row] = []
        for request in self.running:
            self._take(request, rows)
        while self.waiting and len(rows) < len(self.tokens) and self._admit(self.waiting[0]):
            self._take(self.waiting.popleft(), rows)
        self.peak = max(self.peak, self.used)
        return rows

    def _take(self, request: Request, rows: list[Row]) -> None:
        """Assign rows and slots to the next tokens of a request, while there are rows left."""
        start = request.sequence.length
        count = min(len(request.ids) - start, len(self.tokens) - len(rows))
        slots = self.pool.extend(request.sequence, count).tolist()
        rows += [(request, start + i, slot) for i, slot in enumerate(slots)]

    def _admit(self, request: Request) -> bool:
        """Start a request if it fits, sharing the prefix blocks of a running request.

        Even blocks that are filled in this very step can be shared: in each layer, all rows write
        before any row reads.
        """
        parent, common = None, 0
        for other in self.running:
            same = common_prefix(other.ids, request.ids[:-1])  # the last token must be computed
            if min(same, other.sequence.length) > common:
                parent, common = other.sequence, min(same, other.sequence.length)
        request.sequence = self.pool.add(request.name, parent, common)
        # Only admit a request if nobody can run out of blocks later.
        missing = (
            self._blocks(each) - len(each.sequence.block_table) for each in [*self.running, request]
        )
        if sum(missing) > len(self.pool.free):
            self.pool.release(request.sequence)
            return False
        self.running.append(request)
        return True

    def _blocks(self, request: Request) -> int:
        return -(-(request.limit - 1) // self.pool.block_size)  # the last token is never fed back

    def _fill(self, rows: list[Row]) -> None:
        ids, positions, slots, tables = self._host_parts
        self._host[:] = 0
        slots[:] = PADDING
        for row, (request, position, slot) in enumerate(rows):
            ids[row], positions[row], slots[row] = request.ids[position], position, slot
            table = request.sequence.block_table
            tables[row, : len(table)] = table

    def _forward(self) -> None:
        self.logits[...] = self.model.forward(*self._device_parts, self.cache)
        self.tokens[...] = self.logits.argmax(-1)

    def _capture(self) -> None:
        """Capture one step; from then on, a step is a single graph launch."""
        import cupy

        self._host_parts[2][:] = PADDING
        self._device[...] = cupy.asarray(self._host)
        cupy.cuda.Device().synchronize()  # the weights were copied on another stream
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # A memory pool of its own: nobody else may get the memory that the graph will use again.
        self._memory = cupy.cuda.MemoryPool()
        with self._stream, cupy.cuda.using_allocator(self._memory.malloc):
            self._forward()  # compiles the kernels, and fills the pool
            self._stream.begin_capture()
            self._forward()
            graph = self._stream.end_capture()
        self._run = lambda: graph.launch(self._stream)


def _parts(inputs: Array, rows: int) -> tuple[Array, Array, Array, Array]:
    """Return ids, positions, slots and block tables, which are stored in this order."""
    ids, positions, slots = inputs[: 3 * rows].reshape(3, rows)
    return ids, positions, slots, inputs[3 * rows :].reshape(rows, -1)


def common_prefix(one: list[int], other: list[int]) -> int:
    """Return the length of the common prefix of two lists."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
