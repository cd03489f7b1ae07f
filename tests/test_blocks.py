# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks: a loop over pairs is the reference for NumPy, the host and GPUs."""

from __future__ import annotations

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest
from host_device import HostDevice

import pagedcache as pc
from pagedcache.arrays.find import adopt
from pagedcache.operators.blocks import cpu
from pagedcache.operators.blocks.arrays import make_arrays
from pagedcache.operators.blocks.pairs import OnDevice, invalid_on_device

DTYPES = (np.uint8, np.float16, ml_dtypes.bfloat16, np.float32, np.int64, ml_dtypes.float8_e4m3fn)
SEEDS = 150


def random_array(rng, blocks, shape, dtype):
    """Return an array of random bytes with blocks on axis 0, in one of many arrangements, and its
    memory."""

    def memory(*lengths):
        size = int(np.prod(lengths)) * np.dtype(dtype).itemsize
        return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(lengths)

    kind = rng.integers(0, 6)
    if kind == 0:  # K or V of one tensor
        whole = memory(blocks, 2, *shape)
        return whole[:, int(rng.integers(0, 2))], whole
    if kind == 1:  # between others of a row
        whole = memory(blocks, *shape[:-1], shape[-1] + 3)
        return whole[..., 1 : 1 + shape[-1]], whole
    if kind == 2:  # axes in another order
        order = rng.permutation(len(shape) + 1)
        whole = memory(*np.array([blocks, *shape])[order])
        return whole.transpose(np.argsort(order)), whole
    if kind == 3:  # every other block, and backwards within one
        whole = memory(blocks * 2, *shape)
        return whole[::2, ::-1], whole
    whole = memory(blocks, *shape)
    return whole, whole


def random_pairs(rng, in_source, in_target, within):
    """Return pairs with no target twice; within one list, often in chains and cycles."""
    count = int(rng.integers(0, in_target + 1))
    targets = rng.permutation(in_target)[:count]
    kind = rng.integers(0, 4)
    if within and kind == 0:  # a permutation
        sources = rng.permutation(targets)
    elif within and kind == 1:  # all move by one
        targets = np.sort(targets)
        sources = np.clip(targets + int(rng.choice([-1, 1])), 0, in_source - 1)
    else:
        sources = rng.integers(0, in_source, count)
    return np.stack([sources, targets], 1).reshape(-1, 2)


class Case:
    def __init__(self, seed):
        self.rng = rng = np.random.default_rng(seed)
        self.within = bool(rng.integers(0, 2))
        self.in_source, self.in_target = (int(n) for n in rng.integers(1, 12, 2))
        if self.within:
            self.in_target = self.in_source
        self.sources, self.targets, self.memory = [], [], []
        for _ in range(int(rng.integers(1, 5))):
            shape = rng.choice([1, 2, 3, 5, 8, 16, 40], int(rng.integers(1, 4))).tolist()
            dtype = DTYPES[rng.integers(0, len(DTYPES))]
            source, memory = random_array(rng, self.in_source, shape, dtype)
            target = source
            if not self.within:
                target, memory = random_array(rng, self.in_target, shape, dtype)
            self.sources.append(source)
            self.targets.append(target)
            self.memory.append(memory)
        self.pairs = random_pairs(rng, self.in_source, self.in_target, self.within)

    def bytes(self):
        return [each.tobytes() for each in self.memory]

    def expect(self):
        """Return what all memory must be afterwards, and leave it as it is."""
        before = [each.copy() for each in self.memory]
        blocks = [source.copy() for source in self.sources]
        for old, target in zip(blocks, self.targets, strict=True):
            for source, to in self.pairs.tolist():
                target[to] = old[source]
        wanted = self.bytes()
        for each, old in zip(self.memory, before, strict=True):
            each.reshape(-1).view(np.uint8)[:] = old.reshape(-1).view(np.uint8)
        return wanted


def on_host(compiler, case):
    """Return the kernel, compiled for the host, and its report."""
    from pagedcache.operators.blocks.nvidia import BlockCopy

    device = HostDevice(compiler)
    report = device.report()
    return BlockCopy(make_arrays(case.sources, case.targets), device, report, warps=16), report


@pytest.mark.parametrize("at_once", [cpu.AT_ONCE, 100])
def test_random_cases_in_numpy(monkeypatch, at_once):
    monkeypatch.setattr(cpu, "AT_ONCE", at_once)
    for seed in range(SEEDS):
        case = Case(seed)
        wanted = case.expect()
        sources = case.sources if seed % 2 or not case.within else list(case.sources)
        pc.copy_blocks(sources, case.targets, case.pairs)
        assert case.bytes() == wanted, seed


@pytest.mark.parametrize("where", ["parameters", "int32", "int64"])
def test_random_cases_on_the_host(compiler, where):
    pytest.importorskip("cupy")
    for seed in range(SEEDS):
        case = Case(seed)
        wanted = case.expect()
        kernel, report = on_host(compiler, case)
        pairs = case.pairs
        if where != "parameters" and len(pairs):
            padded = np.insert(pairs, int(case.rng.integers(0, len(pairs) + 1)), -1, axis=0)
            held = np.ascontiguousarray(padded, where)
            pairs = OnDevice(adopt("pairs", held))
        kernel.copy(pairs, 0)
        assert case.bytes() == wanted, seed
        assert report.take() is None


def test_pairs_on_a_device_that_cannot_be_copied_are_reported(compiler):
    pytest.importorskip("cupy")
    told = {pc.InvalidBlockError: 0, pc.DuplicateBlockError: 0}
    for seed in range(SEEDS):
        case = Case(seed)
        if len(case.pairs) < 2:
            continue
        good = case.pairs
        i, j = case.rng.permutation(len(good))[:2].tolist()
        bad = good.copy()
        if seed % 2:
            bad[i, 0] = case.in_source + int(case.rng.integers(0, 1 << 20))
        else:
            i, j = max(i, j), min(i, j)
            bad[i, 1] = bad[j, 1]
        case.pairs = np.delete(good, i, axis=0)
        wanted = case.expect()
        kernel, report = on_host(compiler, case)
        kernel.copy(OnDevice(adopt("pairs", bad)), 0)
        assert case.bytes() == wanted, seed
        found = report.take()
        assert (found.count, found.row) == (1, i)
        error = invalid_on_device(found, case.in_source, case.in_target, "in this call")
        told[type(error)] += 1
        if seed % 2:
            assert f"block {bad[i, 0]} as its source, but there are {case.in_source}" in str(error)
        else:
            assert f"got block {bad[i, 1]} again in pair {i}" in str(error)
    assert min(told.values()) > 20


def test_zeros_that_do_not_exist(compiler):
    pytest.importorskip("cupy")
    case = Case(3)
    kernel, report = on_host(compiler, case)
    kernel.zero(OnDevice(adopt("blocks", np.array([0, 70, 1 << 62]))), 0)
    error = invalid_on_device(report.take(), case.in_source, case.in_target, "in this call")
    assert f"blocks[1] has block 70, but there are {case.in_target} blocks (2" in str(error)


def test_a_target_that_does_not_exist_is_called_so(compiler):
    pytest.importorskip("cupy")
    case = Case(0)
    case.sources, case.targets = [np.zeros((100, 3))], [np.zeros((10, 3))]
    kernel, report = on_host(compiler, case)
    kernel.copy(OnDevice(adopt("pairs", np.array([[5, 50]]))), 0)
    error = invalid_on_device(report.take(), 100, 10, "in this call")
    assert "pairs[0] has block 50 as its target, but there are 10 blocks" in str(error)


def test_blocks_of_too_many_bytes(compiler):
    pytest.importorskip("cupy")
    size = (1 << 31) + 1  # an odd number, so bytes are copied one by one
    memory = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (1, size), (size, 1))
    case = Case(0)
    case.sources, case.targets = [memory], [memory]
    with pytest.raises(
        pc.PagedCacheError, match="must have fewer than 2147483648 bytes in a block"
    ):
        on_host(compiler, case)


@pytest.mark.parametrize("where", ["numpy", "parameters", "int32", "int64"])
def test_zeros(request, where):
    for seed in range(60):
        case = Case(seed)
        blocks = case.rng.integers(0, case.in_target, int(case.rng.integers(0, 9)))
        old = [target.copy() for target in case.targets]
        before = case.bytes()
        for target in case.targets:
            target[blocks] = np.zeros((), target.dtype)
        wanted = case.bytes()
        for target, each in zip(case.targets, old, strict=True):
            target[...] = each
        assert case.bytes() == before
        if where == "numpy":
            pc.zero_blocks(case.targets, blocks.tolist())
        else:
            pytest.importorskip("cupy")
            kernel, report = on_host(request.getfixturevalue("compiler"), case)
            given = blocks
            if where != "parameters" and len(blocks):
                given = OnDevice(adopt("blocks", np.append(blocks, -5).astype(where)))
            kernel.zero(given, 0)
            assert report.take() is None
        assert case.bytes() == wanted, seed


def test_many_pairs_of_a_list_that_is_a_chain():
    cache = np.arange(5_000.0)[:, None] * [1, 1]
    pc.copy_blocks([cache], [cache], [(i + 1, i) for i in range(4_999)])
    assert cache[:, 1].tolist() == [*range(1, 5_000), 4_999]
    pc.copy_blocks([cache], [cache], np.stack([np.arange(5_000), np.roll(np.arange(5_000), 1)], 1))
    assert cache[:, 0].tolist() == [*range(2, 5_000), 4_999, 1]


@pytest.mark.parametrize(
    ("shape", "part", "row", "axes", "width"),
    [
        ((8, 16, 4), np.s_[:], 256, 0, 16),
        ((8, 16, 3), np.s_[:], 192, 0, 16),
        ((8, 3), np.s_[:], 12, 0, 4),
        ((8, 16, 8), np.s_[:, :, :4], 16, 1, 16),
        ((8, 16, 6), np.s_[:, :, :4], 16, 1, 8),
        ((8, 16, 8), np.s_[:, :, 1:5], 16, 1, 4),
        ((9, 16, 4), np.s_[1:, ::2], 16, 1, 16),
        ((8, 16, 4), np.s_[:, :, ::2], 4, 1, 4),  # two axes of one step are merged
        ((8, 16, 4), np.s_[:, ::-1], 16, 1, 16),
    ],
)
def test_the_width_of_accesses(shape, part, row, axes, width):
    memory = np.zeros(int(np.prod(shape)) + 4, np.float32)
    whole = memory[memory.ctypes.data % 16 // 4 and 4 - memory.ctypes.data % 16 // 4 :]
    array = whole[: int(np.prod(shape))].reshape(shape)[part]
    [found] = make_arrays([array], [array]).arrays
    assert (found.row, len(found.axes), found.width) == (row, axes, width)
    assert found.block_bytes == array[0].nbytes


GOOD = np.zeros((4, 2, 3), np.float32)
OTHER = np.zeros((5, 2, 3), np.float32)


@pytest.mark.parametrize(
    ("sources", "targets", "pairs", "kind", "words"),
    [
        ([GOOD], [OTHER], [(0, 5)], IndexError,
         r"pairs\[0\] has block 5 as its target, but there are 5 blocks"),
        ([GOOD], [OTHER], [(0, 1), (4, 2), (9, 3)], IndexError,
         r"pairs\[1\] has block 4 as its source, but there are 4 blocks \(2 invalid entries"),
        ([GOOD], [OTHER], [(-1, 2)], IndexError, r"pairs\[0\] has block -1 as its source"),
        ([GOOD], [OTHER], [(0, 1), (1, 2), (2, 1)], ValueError,
         "pairs must not have one target twice, .* got block 1 in pairs 0 and 2"),
        ([GOOD], [OTHER], [(0, 1, 2)], ValueError, r"pairs must have shape \[n, 2\]"),
        ([GOOD], [OTHER], [(0,), (1, 2)], TypeError, r"pairs must be a list of \(source, target\)"),
        ([GOOD], [OTHER], [(0.0, 1.0)], TypeError, r"pairs must be a list of \(source, target\)"),
        ([GOOD], [OTHER], "ab", TypeError, "pairs must be an array"),
        ([GOOD], [OTHER], np.zeros((1, 2)), TypeError, "pairs must be ints, got float64"),
        (GOOD, [OTHER], [], TypeError, "sources must be a list of arrays with blocks"),
        ([], [], [], ValueError, "sources must have at least one array"),
        ([GOOD], [OTHER, OTHER], [], ValueError, "targets must have as many arrays as sources, 1"),
        ([GOOD, OTHER], [GOOD, OTHER], [], ValueError,
         r"sources\[1\] must have as many blocks as sources\[0\], 4"),
        ([GOOD], [OTHER.astype(np.float64)], [], TypeError,
         r"targets\[0\] must have the dtype of sources\[0\], float32"),
        ([GOOD], [OTHER.reshape(5, 3, 2)], [], ValueError,
         r"targets\[0\] must have blocks of the shape of sources\[0\], \(2, 3\)"),
        ([GOOD], [np.broadcast_to(OTHER[:, :1], OTHER.shape)], [], ValueError, "writable"),
        ([GOOD[:, 0, 0]], [GOOD[:, 0, 0]], [], ValueError, "must have an axis of blocks"),
        ([GOOD[:3]], [GOOD[1:]], [], ValueError,
         r"sources\[0\] must not share memory with targets\[0\], unless all targets are"),
        ([GOOD, OTHER[:4]], [GOOD, GOOD], [], ValueError,
         r"targets\[1\] must not share memory with targets\[0\]"),
        ([None], [OTHER], [], ValueError, r"sources\[0\] must be an array"),
        ([np.empty((2, 2), object)], [OTHER], [], TypeError,
         r"sources\[0\] must have elements that are bytes, and not Python objects"),
    ],
)  # fmt: skip
def test_what_bad_input_gets(sources, targets, pairs, kind, words):
    GOOD[:], OTHER[:] = 1, 2
    with pytest.raises(pc.PagedCacheError, match=words) as error:
        pc.copy_blocks(sources, targets, pairs)
    assert isinstance(error.value, kind)
    assert GOOD.min() == GOOD.max() == 1
    assert OTHER.min() == OTHER.max() == 2


def test_blocks_to_fill_are_checked():
    with pytest.raises(pc.InvalidBlockError, match=r"blocks\[1\] has block 4, but there are 4"):
        pc.zero_blocks([GOOD], [0, 4])
    with pytest.raises(ValueError, match=r"blocks must have shape \[n\]"):
        pc.zero_blocks([GOOD], [(0, 1)])
    with pytest.raises(ValueError, match=r"caches\[0\] must be writable"):
        pc.zero_blocks([np.broadcast_to(GOOD[:1], GOOD.shape)], [0])
    with pytest.raises(TypeError, match="caches must be a list of arrays"):
        pc.zero_blocks(GOOD, [0])
    with pytest.raises(ValueError, match="on_invalid must be one of"):
        pc.zero_blocks([GOOD], [0], on_invalid="maybe")


def test_a_descriptor_keeps_its_arrays_and_the_function_does_not():
    arrays = [np.zeros((3, 4)), np.zeros((3, 2), np.int8)]
    descriptor = pc.BlockDescriptor.create(arrays)
    assert descriptor.block_bytes == 34
    assert repr(descriptor) == (
        "<pagedcache.BlockDescriptor within 2 arrays on cpu: 3 blocks of 34 bytes>"
    )
    assert "34 bytes" in descriptor._repr_html_()
    alive = weakref.ref(arrays[0])
    arrays.clear()
    gc.collect()
    with descriptor:
        alive()[0] = 7
        descriptor.copy([(0, 2)])
        assert alive()[2].tolist() == [7] * 4
        descriptor.zero([2])
        descriptor.check()
    gc.collect()
    assert alive() is None
    with pytest.raises(pc.status.DestroyedError):
        descriptor.copy([(0, 2)])
    lone = np.zeros((3, 4))
    pc.copy_blocks([lone], [lone], [(0, 1)])
    alive = weakref.ref(lone)
    del lone
    gc.collect()
    assert alive() is None


def test_torch_is_told_of_the_write():
    torch = pytest.importorskip("torch")
    cache = torch.ones(4, 3)
    version = cache._version
    pc.zero_blocks([cache], [1])
    assert cache.sum() == 9
    assert cache._version > version
    needs = torch.ones(4, 3, requires_grad=True)
    with pytest.raises(pc.RequiresGradError):
        pc.zero_blocks([needs], [1])


def test_errors_can_be_pickled():
    import pickle

    error = pc.InvalidBlockError("pairs", "source", 1, 2, 3, 4)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    error = pc.InvalidPositionError(1, 2, 3)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
