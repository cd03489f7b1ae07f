# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks on a GPU, and between it and pinned host memory."""

from __future__ import annotations

import numpy as np
import pytest
from test_blocks import Case, random_pairs

import pagedcache as pc

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy")

SEEDS = 200
INTS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def there(memory, view, place):
    """Return a copy of an array's memory, by `place`, and the same view of it."""
    moved = place(memory)
    kind = INTS[view.itemsize]
    at = view.ctypes.data - memory.ctypes.data
    if isinstance(moved, np.ndarray):
        buffer = moved.reshape(-1).view(np.uint8)
        return moved, np.ndarray(view.shape, kind, buffer, at, view.strides)
    pointer = cupy.cuda.MemoryPointer(moved.data.mem, moved.data.ptr - moved.data.mem.ptr + at)
    return moved, cupy.ndarray(view.shape, kind, pointer, strides=view.strides)


def on_gpu(memory):
    return cupy.asarray(np.ascontiguousarray(memory).view(INTS[memory.itemsize]))


def pinned(memory):
    import cupyx

    made = cupyx.empty_pinned(memory.shape, INTS[memory.itemsize])
    made[...] = memory.view(INTS[memory.itemsize])
    return made


def bytes_of(array):
    return cupy.asnumpy(array).tobytes()


class Moved:
    """A case whose sources and targets are elsewhere."""

    def __init__(self, case, source_place, target_place):
        self.memory, self.sources, self.targets = [], [], []
        for view, memory, source in zip(case.targets, case.memory, case.sources, strict=True):
            whole, target = there(memory, view, target_place)
            self.memory.append(whole)
            self.targets.append(target)
            if case.within:
                self.sources.append(target)
            else:
                dense = np.ascontiguousarray(source)
                self.sources.append(there(dense, dense, source_place)[1])


@pytest.mark.parametrize("where", ["host", "int32", "int64"])
def test_random_cases(where):
    for seed in range(SEEDS):
        case = Case(seed)
        wanted = case.expect()
        moved = Moved(case, on_gpu, on_gpu)
        pairs = case.pairs
        if where != "host":
            pairs = cupy.asarray(np.concatenate([pairs, [[-1, 0]]]), where)
        pc.copy_blocks(moved.sources, moved.targets, pairs, on_invalid="raise")
        assert [*map(bytes_of, moved.memory)] == wanted, seed


@pytest.mark.parametrize("stream", ["legacy", "own"])
@pytest.mark.parametrize("way", ["to host", "from host"])
def test_random_cases_with_pinned_memory(stream, way):
    places = (on_gpu, pinned) if way == "to host" else (pinned, on_gpu)
    stream = cupy.cuda.Stream.null if stream == "legacy" else cupy.cuda.Stream(non_blocking=True)
    for seed in range(SEEDS):
        case = Case(seed)
        if case.within:
            continue
        wanted = case.expect()
        moved = Moved(case, *places)
        cupy.cuda.Device().synchronize()
        pc.copy_blocks(moved.sources, moved.targets, case.pairs, stream=stream)
        stream.synchronize()
        assert [*map(bytes_of, moved.memory)] == wanted, seed


@pytest.mark.parametrize("by", ["kernel", "engines"])
@pytest.mark.parametrize("way", ["to host", "from host"])
def test_both_ways_to_pinned_memory(monkeypatch, way, by):
    from pagedcache.operators.blocks import transfers

    def limit(*_, **__):
        return 0 if by == "engines" else 1 << 62

    monkeypatch.setattr(transfers, "worth_engines", limit)
    rng = np.random.default_rng(5)
    for blocks, stride in ((40, 1), (33, 2)):
        dense = rng.integers(0, 256, (blocks * stride, 5, 512), np.uint8)
        to = rng.integers(0, 256, (90, 5, 512), np.uint8)
        source, target = (
            (on_gpu(dense)[::stride], pinned(to))
            if way == "to host"
            else (pinned(dense)[::stride], on_gpu(to))
        )
        for stream in (cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream.null):
            pairs = random_pairs(rng, blocks, 90, False)
            pairs = np.concatenate([pairs[pairs[:, 1] < 60], [[i, 60 + i] for i in range(25)]])
            cupy.cuda.Device().synchronize()
            pc.copy_blocks([source], [target], pairs, stream=stream)
            stream.synchronize()
            to[pairs[:, 1]] = dense[::stride][pairs[:, 0]]
            assert np.array_equal(cupy.asnumpy(target), to)


def test_what_is_faster_is_measured_once(monkeypatch):
    from pagedcache.operators.blocks import transfers

    device = pc.Handle("cuda").opened()
    times = iter([2.0, 1.0] * 3 + [1.0, 2.0])  # of the kernel and of the engines, from 256 KiB down
    monkeypatch.setattr(transfers, "_seconds", lambda *_: next(times))
    monkeypatch.setattr(transfers, "_worth", {})
    for _ in range(2):
        assert transfers.worth_engines(device, to_host=True) == 64 << 10
    assert next(times, None) is None


def test_pageable_memory_is_refused():
    cache = cupy.zeros((4, 8))
    with pytest.raises(pc.PagedCacheError, match=r"targets\[0\] must be pinned memory"):
        pc.copy_blocks([cache], [np.zeros((4, 8))], [(0, 1)])
    with pytest.raises(pc.PagedCacheError, match=r"sources\[0\] must be pinned memory"):
        pc.copy_blocks([np.zeros((4, 8))], [cache], [(0, 1)])


def test_many_pairs_and_long_chains():
    rng = np.random.default_rng(0)
    blocks = 4_000
    k = rng.integers(0, 256, (blocks, 3, 640), np.uint8)
    v = rng.integers(0, 1 << 30, (blocks, 7), np.int64)
    for pairs in (
        np.stack([np.arange(1, blocks), np.arange(blocks - 1)], 1),
        np.stack([np.arange(blocks), np.roll(np.arange(blocks), 7)], 1),
        np.stack([rng.integers(0, blocks, 2_000), rng.permutation(blocks)[:2_000]], 1),
    ):
        arrays = [cupy.asarray(k), cupy.asarray(v)]
        pc.copy_blocks(arrays, arrays, pairs)
        for array, old in zip(arrays, (k, v), strict=True):
            wanted = old.copy()
            wanted[pairs[:, 1]] = old[pairs[:, 0]]
            assert np.array_equal(array.get(), wanted)
        few = [cupy.asarray(k[:60]), cupy.asarray(v[:60])]
        inside = pairs[(pairs < 60).all(1)]
        pc.copy_blocks(few, few, cupy.asarray(inside), on_invalid="raise")
        wanted = k[:60].copy()
        wanted[inside[:, 1]] = k[:60][inside[:, 0]]
        assert np.array_equal(few[0].get(), wanted)


def test_pairs_on_the_gpu_are_reported():
    cache = cupy.arange(10)[:, None] * cupy.ones(3)
    with pc.BlockDescriptor.create([cache]) as descriptor:
        descriptor.copy(cupy.asarray([[0, 1], [10, 2], [3, 1], [-1, 4], [5, 6]]))
        with pytest.raises(pc.InvalidBlockError, match=r"pairs\[1\] has block 10.*2 invalid"):
            descriptor.check()
        descriptor.check()
        assert cache[:, 0].tolist() == [0, 0, 2, 3, 4, 5, 5, 7, 8, 9]
        descriptor.zero(cupy.asarray([3, 99, -1], np.int32))
        with pytest.raises(pc.InvalidBlockError, match="block 99"):
            descriptor.check()
    words = "must not have one target twice, got block 1 again in pair 1"
    with pytest.raises(pc.DuplicateBlockError, match=words):
        pc.copy_blocks([cache], [cache], cupy.asarray([[0, 1], [3, 1]]), on_invalid="raise")


def test_in_a_graph():
    cache = cupy.arange(40.0).reshape(10, 4)
    host_pairs, pairs = [(0, 9), (9, 0)], cupy.full((5, 2), -1, np.int32)
    blocks = cupy.full(3, -1)
    descriptor = pc.BlockDescriptor.create([cache])
    descriptor.copy(pairs)
    descriptor.zero(blocks)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        descriptor.copy(host_pairs, stream=stream)
        descriptor.copy(pairs, stream=stream)
        descriptor.zero(blocks, stream=stream)
        graph = stream.end_capture()
    wanted = cache.get()
    for given, zeroed in (([(1, 2), (2, 3)], [5]), ([(3, 3)], []), ([(4, 1), (1, 4)], [2, 9])):
        pairs[:] = -1
        pairs[: len(given)] = cupy.asarray(given)
        blocks[:] = -1
        blocks[: len(zeroed)] = cupy.asarray(zeroed, np.int64)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for each in (host_pairs, given):
            old = wanted.copy()
            for source, target in each:
                wanted[target] = old[source]
        wanted[zeroed] = 0
        assert np.array_equal(cache.get(), wanted)
    descriptor.check()


def test_pytorch_on_its_current_stream():
    torch = pytest.importorskip("torch")
    cache = torch.arange(40, device="cuda", dtype=torch.float32).reshape(10, 4).to(torch.bfloat16)
    wanted = cache.clone()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        cache += 1
        pc.copy_blocks([cache], [cache], [(0, 1), (1, 2)])
        pc.zero_blocks([cache], torch.tensor([7], device="cuda"))
        cache *= 2
    torch.cuda.synchronize()
    old = wanted + 1
    wanted = old.clone()
    wanted[1], wanted[2], wanted[7] = old[0], old[1], 0
    assert torch.equal(cache, wanted * 2)
    host = torch.zeros(3, 4, dtype=torch.bfloat16, pin_memory=True)
    pc.copy_blocks([cache], [host], [(1, 2), (2, 0)])
    torch.cuda.synchronize()
    assert torch.equal(host[2], cache[1].cpu())
    assert torch.equal(host[0], cache[2].cpu())


def test_threads_share_a_descriptor():
    import threading

    caches = [cupy.arange(64.0).reshape(16, 4) for _ in range(4)]
    descriptor = pc.BlockDescriptor.create(caches)
    failed = []

    def swap(first):
        try:
            stream = cupy.cuda.Stream(non_blocking=True)
            for _ in range(101):
                descriptor.copy([(first, first + 1), (first + 1, first)], stream=stream)
            stream.synchronize()
        except Exception as error:
            failed.append(error)

    cupy.cuda.Device().synchronize()
    threads = [threading.Thread(target=swap, args=(2 * i,)) for i in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failed
    wanted = np.arange(64.0).reshape(8, 2, 4)[:, ::-1].reshape(16, 4)
    for cache in caches:
        assert np.array_equal(cache.get(), wanted)
