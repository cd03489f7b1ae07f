# SPDX-License-Identifier: Apache-2.0
"""Blocks between two GPUs of one host, and threads that drive one each."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import pagedcache as pc

pytestmark = pytest.mark.gpu
cupy = pytest.importorskip("cupy")


@pytest.fixture(autouse=True)
def _two_gpus():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")


BLOCKS = 24
SHAPES = (((5, 3, 64), np.float16), ((5, 3), np.float32), ((7,), np.uint8))


def arrays_on(device, seed):
    """Return random arrays with blocks on their first axis, some with gaps, and copies of them."""
    rng = np.random.default_rng(seed)
    made, images = [], []
    for shape, dtype in SHAPES:
        image = rng.integers(0, 256, (BLOCKS, 2, *shape, np.dtype(dtype).itemsize), np.uint8)
        with cupy.cuda.Device(device):
            whole = cupy.asarray(image).reshape(BLOCKS, 2, -1).view(dtype)
        made.append(whole.reshape(BLOCKS, 2, *shape)[:, 1])
        images.append(image)
    return made, images


def check(arrays, images, pairs, sources):
    """Compare whole memory with what it must be after a copy."""
    for array, image, source in zip(arrays, images, sources, strict=True):
        wanted = image.copy()
        wanted[pairs[:, 1], 1] = source[pairs[:, 0], 1]
        assert array.base.get().tobytes() == wanted.tobytes()


def random_pairs(seed, count=15):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, BLOCKS, count), rng.permutation(BLOCKS)[:count]], 1)


@pytest.fixture(params=[True, False], ids=["peer access", "no peer access"])
def peer_access(request, monkeypatch):
    if not request.param:
        from pagedcache.operators.blocks import transfers

        monkeypatch.setattr(transfers, "_reaches", lambda *_: False)
        monkeypatch.setattr("pagedcache.operators.blocks.one_call._kept", {})
    return request.param


@pytest.mark.parametrize("source", [0, 1])
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("stream_on", [None, 0, 1])
def test_copies_between_two_gpus(peer_access, source, current, stream_on):
    target = 1 - source
    sources, read = arrays_on(source, 1)
    targets, images = arrays_on(target, 2)
    if not peer_access:  # then the copy engines do it, for which blocks must be contiguous
        for device, arrays in ((source, sources), (target, targets)):
            with cupy.cuda.Device(device):
                arrays[:] = [array.copy() for array in arrays]
    stream = None
    if stream_on is not None:
        with cupy.cuda.Device(stream_on):
            stream = cupy.cuda.Stream(non_blocking=True)
    for device in (0, 1):
        cupy.cuda.Device(device).synchronize()
    pairs = random_pairs(source)
    with cupy.cuda.Device(current):
        pc.copy_blocks(sources, targets, pairs, stream=stream)
    for device in (0, 1):
        cupy.cuda.Device(device).synchronize()
    if peer_access:
        check(targets, images, pairs, read)
        for array, image in zip(sources, read, strict=True):
            assert array.base.get().tobytes() == image.tobytes()
        return
    for array, image, other in zip(targets, images, read, strict=True):
        wanted = image[:, 1].copy()
        wanted[pairs[:, 1]] = other[pairs[:, 0], 1]
        assert array.get().tobytes() == wanted.tobytes()


def test_what_cannot_be_copied_without_peer_access(monkeypatch):
    from pagedcache.operators.blocks import transfers

    monkeypatch.setattr(transfers, "_reaches", lambda *_: False)
    [source], [target] = arrays_on(0, 1)[0][:1], arrays_on(1, 2)[0][:1]
    descriptor = pc.BlockDescriptor.create([source], [target])
    with cupy.cuda.Device(0):
        pairs = cupy.zeros((1, 2), np.int32)
    with pytest.raises(pc.PagedCacheError, match="pairs must be on the host, because neither GPU"):
        descriptor.copy(pairs)


def test_pairs_in_the_memory_of_either_gpu():
    for where in (0, 1):
        sources, read = arrays_on(0, 1)
        targets, images = arrays_on(1, 2)
        pairs = random_pairs(5)
        with cupy.cuda.Device(where):
            there, stream = cupy.asarray(pairs), cupy.cuda.Stream(non_blocking=True)
        for device in (0, 1):
            cupy.cuda.Device(device).synchronize()
        descriptor = pc.BlockDescriptor.create(sources, targets)
        descriptor.copy(there, stream=stream)
        descriptor.check()
        check(targets, images, pairs, read)
        with cupy.cuda.Device(1 - where):
            other = cupy.asarray(pairs)
        with pytest.raises(pc.PagedCacheError, match="pairs must be on the host or on cuda:"):
            descriptor.copy(other, stream=stream)


def cache_on(device):
    return pc.KVCache(2, 16, 4, 2, 8, dtype="float32", device=f"cuda:{device}", format="int8",
                      scale="token")  # fmt: skip


def test_a_sequence_goes_from_one_cache_to_the_other():
    rng = np.random.default_rng(0)
    here, there = cache_on(0), cache_on(1)
    for first, second in ((here, there), (there, here)):
        tokens = rng.integers(0, 1000, 22).tolist()
        sequence = first.sequence(tokens)
        index = int(first.device[-1])
        with cupy.cuda.Device(index):
            for layer in range(2):
                k, v = (cupy.asarray(rng.standard_normal((22, 2, 8), np.float32)) for _ in range(2))
                first.write(layer, k, v, first.slots(sequence))
            cupy.cuda.Device(index).synchronize()
        found = second.pool.resume(tokens)
        pairs = list(zip(sequence.block_table, found.block_table, strict=True))
        pc.copy_blocks([first.blocks], [second.blocks], pairs)
        for device in (0, 1):
            cupy.cuda.Device(device).synchronize()
        for layer in range(2):
            for one, other in zip(
                first.read(layer, sequence), second.read(layer, found), strict=True
            ):
                assert np.array_equal(one.get(), other.get())


def test_threads_that_drive_one_gpu_each():
    failed = []

    def work(device):
        try:
            with cupy.cuda.Device(device):
                cache, rng = cache_on(device), np.random.default_rng(device)
                for turn in range(60):
                    tokens = rng.integers(0, 50, int(rng.integers(1, 30))).tolist()
                    with cache.sequence(tokens) as sequence:
                        start = sequence.num_cached_tokens
                        rows = rng.standard_normal((2, len(tokens) - start, 2, 8), np.float32)
                        k, v = map(cupy.asarray, rows)
                        cache.write(turn % 2, k, v, cache.slots(sequence))
                        found, _ = cache.read(turn % 2, sequence, start=start)
                        assert np.abs(found.get() - rows[0]).max() < 0.05
                        away = cache.offload(sequence.fork())
                        again = cache.restore(away)
                        other, _ = cache.read(turn % 2, again, start=start)
                        assert np.array_equal(other.get(), found.get())
                        again.free()
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
