# SPDX-License-Identifier: Apache-2.0
"""A whole model on the paged cache: equal to the dense one, near llama.cpp, and smaller."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import pagedcache as pc
from pagedcache.demo import model as files

sys.path.insert(0, str(Path(__file__).parents[1] / "notebooks"))
import smollm2

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "smollm2.json").read_text())["cases"]
CONTEXT = 72
BLOCK_SIZE = 8
# Logits of the same step differ by up to 1e-4 between processors, since BLAS adds in other orders.
MARGIN = 1e-3
PREFIX = 24  # tokens that the last two prompts begin with in common: three blocks


@pytest.fixture(scope="session")
def source():
    try:
        files.require_readers()
        return files.ModelFile(files.find_model())
    except files.NoModelError as error:
        pytest.skip(f"no model: {error}")


@pytest.fixture(scope="session")
def model(source):
    return smollm2.Model(source, np, CONTEXT)


def run(engine):
    """Step to the end; return the number of steps."""
    steps = 0
    while engine.waiting or engine.running:
        ended = engine.step()
        steps += 1
        for request in [*engine.running, *ended]:
            if request.row >= 0:  # it chose a token in this step
                *_, second, first = np.sort(engine.logits[request.row])
                assert first - second > MARGIN, "rounding could have chosen the other token"
                request.row = -1
        held = {block for one in engine.running for block in one.sequence.block_table}
        assert len(held) == engine.used, "a block is held by nobody, or free and held"
    return steps


def submit(engine, new_tokens):
    return [engine.submit(str(i), case["prompt_ids"], new_tokens) for i, case in enumerate(CASES)]


@pytest.fixture(scope="session")
def dense(model):
    engine = smollm2.Engine(model, len(CASES), dense=True)
    requests = submit(engine, 20)
    run(engine)
    return engine, [request.generated for request in requests]


def test_next_token_as_llama_cpp(source, model):
    reference = np.load(DATA / "smollm2_logits.npz")
    engine = smollm2.Engine(model, 40, BLOCK_SIZE)
    requests = submit(engine, 1)
    found = {}
    while len(found) < len(CASES):
        found |= {request.name: engine.logits[request.row].copy() for request in engine.step()}
    for i, (case, request) in enumerate(zip(CASES, requests, strict=True)):
        assert source.tokens(case["prompt"]) == case["prompt_ids"]
        logits, expected = found[str(i)], reference[f"logits{i}"]
        assert request.generated == [expected.argmax()] == case["greedy_ids"][:1]
        assert np.corrcoef(logits, expected)[0, 1] >= 0.999
        assert abs(logits - expected).max() <= 1.08  # data/README.md says what it comes from


def test_paged_is_dense(model, dense, monkeypatch):
    writes = []
    write = pc.WriteKernel.__call__

    def counted(self, k_cache, v_cache, k, v, slot_mapping, **others):
        writes.append(slot_mapping.copy())
        write(self, k_cache, v_cache, k, v, slot_mapping, **others)

    monkeypatch.setattr(pc.WriteKernel, "__call__", counted)
    engine = smollm2.Engine(model, 40, BLOCK_SIZE)
    requests = submit(engine, 20)
    steps = run(engine)
    dense_engine, expected = dense
    assert [request.generated for request in requests] == expected
    assert requests[5].sequence.shared == PREFIX // BLOCK_SIZE
    assert requests[5].sequence.block_table[:3] == requests[4].sequence.block_table[:3]
    # All K and V came through the kernel: in each layer of each step one write.
    assert len(writes) == 30 * steps
    written = sum(int((slots >= 0).sum()) for slots in writes)
    lengths = [len(request.ids) - 1 for request in requests]  # the last token is not fed
    assert written == 30 * (sum(lengths) - PREFIX)
    assert len(engine.pool.free) == engine.pool.num_blocks
    engine.cache.kernel.check()  # no slot and no position was outside

    # A block has K and V of 30 layers, 8 tokens, 3 heads of 64, in float32.
    assert engine.cache.block_bytes == 2 * 30 * BLOCK_SIZE * 3 * 64 * 4 == 368_640
    assert dense_engine.cache.k.nbytes + dense_engine.cache.v.nbytes == 19_906_560
    assert lengths == [24, 30, 26, 25, 55, 54]
    # Dense, six sequences as long as the longest; paged, what was held at most.
    assert len(CASES) * max(lengths) * engine.cache.block_bytes // BLOCK_SIZE == 15_206_400
    assert (engine.peak, engine.peak * engine.cache.block_bytes) == (25, 9_216_000)


def test_the_kernel_rotates_and_writes_as_numpy(model):
    rows, blocks = 16, CONTEXT // BLOCK_SIZE
    rng = np.random.default_rng(0)
    heads = model.heads + 2 * model.kv_heads
    qkv = rng.standard_normal((rows, heads * model.head_size)).astype(np.float32)
    slots = rng.permutation(CONTEXT)[:rows]
    slots[5] = -1
    positions = rng.integers(CONTEXT, size=rows)
    found = []
    for cache in (
        smollm2.PagedCache(model, blocks, BLOCK_SIZE),
        smollm2.DenseCache(model, 1, CONTEXT),
    ):
        q, k, v = model._split(qkv.copy())
        before = q.copy()
        cache.write(3, q, k, v, slots, positions)
        assert (q != before).any()
        found.append([x.tobytes() for x in (q, cache.k, cache.v)])
    assert found[0] == found[1]


def test_continuous_batching_in_a_small_pool(model, dense):
    engine = smollm2.Engine(model, 11, BLOCK_SIZE)  # the longest alone needs 7
    requests = submit(engine, 20)
    together, reused, seen = 0, False, set()
    while engine.waiting or engine.running:
        before = set(engine.pool.free)
        ended = engine.step()
        together = max(together, len(engine.running) + len(ended))
        taken = before - set(engine.pool.free)
        reused |= bool(taken & seen)
        seen |= {block for request in ended for block in request.sequence.block_table}
    assert [request.generated for request in requests] == dense[1]
    assert 1 < together < len(CASES)
    assert reused, "no block went from a sequence that ended to a new one"
    assert engine.peak <= 11
    assert len(engine.pool.free) == 11


def test_rows_do_not_see_each_other(model, dense):
    engine = smollm2.Engine(model, 10, BLOCK_SIZE, rows=16)
    alone = engine.submit("alone", CASES[1]["prompt_ids"], 4)
    run(engine)
    assert alone.generated == dense[1][1][:4]


@pytest.mark.gpu
def test_a_graph_is_the_same_step(source, dense):
    import cupy

    model = smollm2.Model(source, cupy, CONTEXT)
    found = []
    for graph in (False, True):
        engine = smollm2.Engine(model, 40, BLOCK_SIZE, graph=graph)
        requests = submit(engine, 20)
        run(engine)
        found.append([request.generated for request in requests])
    assert found[0] == found[1]
    assert [one[:4] for one in found[0]] == [one[:4] for one in dense[1]]  # sums in another order


def test_what_cannot_be_served_is_said(model):
    engine = smollm2.Engine(model, 2, BLOCK_SIZE)
    with pytest.raises(ValueError, match="too long: 18 tokens in 3 blocks"):
        engine.submit("long", [1] * 10, 8)
    with pytest.raises(ValueError, match="too long: 73 tokens"):
        engine.submit("long", [1] * 10, CONTEXT - 9)
    with pytest.raises(ValueError, match="multiple of 7"):
        smollm2.Engine(model, 2, 7)


def test_common_prefix():
    assert smollm2.common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert smollm2.common_prefix([1, 2], [1, 2, 4]) == 2
    assert smollm2.common_prefix([], [1]) == 0
