# SPDX-License-Identifier: Apache-2.0
"""Slot mappings: a loop over tokens is the reference for NumPy, the host and GPUs."""

from __future__ import annotations

import bisect
import itertools

import numpy as np
import pytest
from host_device import HostDevice

import pagedcache as pc
from pagedcache.operators.slot_mapping.descriptor import PageSlots

DTYPES = np.int32, np.int64
SEEDS = 120


def wanted_slots(tables, starts, positions, length, block_size, cp_size, cp_rank, cp_interleave):
    """Return slots and the tokens whose positions have no block, one token at a time."""
    slots, invalid = [-1] * length, []
    begins = starts.tolist()[:-1]
    for token in range(min(length, len(positions), max(int(starts[-1]), 0))):
        position = int(positions[token])
        request = bisect.bisect_right(begins, token) - 1
        if position < 0 or request < 0 or token < begins[0]:
            continue
        entry, offset = divmod(position, block_size * cp_size)
        turn, rest = divmod(offset, cp_interleave)
        if turn % cp_size != cp_rank:
            continue
        local = turn // cp_size * cp_interleave + rest
        table = tables[request]
        if entry >= len(table) or table[entry] < 0:
            invalid.append(token)
        else:
            slots[token] = int(table[entry]) * block_size + local
    return slots, invalid


class Case:
    """Random block tables and tokens."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        kinds = [DTYPES[i] for i in rng.integers(0, 2, 4)]
        requests = int(rng.choice([0, 1, 2, 5, 8, 40, 300, 700]))
        self.max_blocks = int(rng.integers(1, 9))
        interleave = int(rng.choice([1, 2, 4]))
        cp_size = int(rng.choice([1, 1, 2, 3]))
        self.sizes = {
            "block_size": int(rng.choice([4, 8, 16, 12])),
            "cp_size": cp_size,
            "cp_rank": int(rng.integers(0, cp_size)),
            "cp_interleave": interleave if cp_size > 1 else 1,
        }
        whole = rng.integers(-1, 1000, (requests + 2, self.max_blocks + 3))
        self.tables = whole.astype(kinds[0])[:, : self.max_blocks]  # rows are further apart
        counts = rng.integers(0, 12 if requests < 10 else 3, requests)
        first = int(rng.choice([0, 0, 0, 5, 40]))  # a slice of a larger batch
        self.starts = (first + np.concatenate([[0], np.cumsum(counts)])).astype(kinds[1])
        tokens = int(self.starts[-1])
        longest = self.max_blocks * self.sizes["block_size"] * cp_size
        more = int(rng.integers(0, 3))
        self.positions = rng.integers(-1, longest + 3, tokens + more).astype(kinds[2])
        if rng.integers(0, 8) == 0:
            self.positions = self.positions[: tokens // 2]
        self.length = tokens + int(rng.integers(-2, 6))
        self.length = max(self.length, 1)
        self.slot_dtype = kinds[3]

    @property
    def inputs(self):
        return self.tables, self.starts, self.positions

    def out(self):
        return np.full(self.length, 77, self.slot_dtype)

    def wanted(self):
        return wanted_slots(*self.inputs, self.length, **self.sizes)


def check(descriptor, case, move=lambda array: array, back=np.asarray):
    wanted, invalid = case.wanted()
    out = move(case.out())
    descriptor.calculate(*map(move, case.inputs), out, **case.sizes)
    assert back(out).tolist() == wanted
    if not invalid:
        descriptor.check()
        return False
    with pytest.raises(pc.InvalidPositionError) as error:
        descriptor.check()
    found = error.value
    first = invalid[0], int(case.positions[invalid[0]])
    assert (found.token, found.position, found.count) == (*first, len(invalid))
    return True


def on_host(compiler, descriptor):
    expected = descriptor._arguments.expected
    return type(descriptor)(descriptor.info, expected, HostDevice(compiler))


@pytest.mark.parametrize("where", ["cpu", "host"])
def test_random_cases(request, where):
    reported = 0
    for seed in range(SEEDS):
        case = Case(seed)
        descriptor = pc.SlotMappingDescriptor.create(*case.inputs, case.out())
        if where == "host":
            descriptor = on_host(request.getfixturevalue("compiler"), descriptor)
        reported += check(descriptor, case)
    assert reported > 20


@pytest.mark.gpu
def test_random_cases_on_a_gpu():
    cupy = pytest.importorskip("cupy")
    for seed in range(SEEDS):
        case = Case(seed)
        inputs = [*map(cupy.asarray, case.inputs), cupy.asarray(case.out())]
        inputs[0] = cupy.asarray(case.tables.base)[:, : case.max_blocks]
        descriptor = pc.SlotMappingDescriptor.create(*inputs)

        def move(array, tables=case.tables, there=inputs[0]):
            return there if array is tables else cupy.asarray(array)

        check(descriptor, case, move, cupy.asnumpy)
        slots = pc.slot_mapping(*inputs[:3], **case.sizes, out=inputs[3])
        assert slots is inputs[3]
        assert slots.tolist() == case.wanted()[0]


@pytest.mark.gpu
def test_many_tokens_on_a_gpu_in_a_graph():
    cupy = pytest.importorskip("cupy")
    requests, block_size, tokens = 64, 16, 70_000
    rng = np.random.default_rng(0)
    tables = rng.integers(0, 1 << 20, (requests, tokens // block_size)).astype(np.int32)
    out = cupy.zeros(tokens, np.int64)
    given = [cupy.asarray(tables), cupy.zeros(requests + 1, np.int32), cupy.zeros(tokens, np.int64)]
    pc.slot_mapping(*given, block_size=block_size, out=out)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        pc.slot_mapping(*given, block_size=block_size, out=out)
        graph = stream.end_capture()
    for used in (tokens, 64, 1, 65_536, 0):
        cuts = np.sort(rng.integers(0, used + 1, requests - 1))
        starts = np.concatenate([[0], cuts, [used]]).astype(np.int32)
        positions = np.zeros(tokens, np.int64)
        for r in range(requests):
            positions[starts[r] : starts[r + 1]] = np.arange(starts[r + 1] - starts[r]) + r
        given[1].set(starts)
        given[2].set(positions)
        cupy.cuda.Device().synchronize()  # they were set on another stream
        graph.launch(stream)
        stream.synchronize()
        request = np.searchsorted(starts, np.arange(used), side="right") - 1
        block = tables[request, positions[:used] // block_size].astype(np.int64)
        wanted = np.full(tokens, -1)
        wanted[:used] = block * block_size + positions[:used] % block_size
        assert np.array_equal(out.get(), wanted)


@pytest.mark.gpu
def test_pytorch_on_a_gpu_with_any_number_of_requests():
    torch = pytest.importorskip("torch")
    for seed in range(60):
        case = Case(seed)
        given = [torch.from_numpy(np.ascontiguousarray(each)).cuda() for each in case.inputs]
        slots = pc.slot_mapping(*given, **case.sizes)
        assert slots.dtype == torch.int64
        length = len(case.positions)
        wanted, _ = wanted_slots(*case.inputs, length, **case.sizes)
        assert slots.tolist() == wanted


def test_one_descriptor_serves_any_number_of_requests_and_tokens():
    tables = np.arange(40, dtype=np.int32).reshape(8, 5)
    out = np.zeros(30, np.int64)
    starts, positions = np.array([0, 2], np.int32), np.array([0, 1])
    descriptor = pc.SlotMappingDescriptor.create(tables[:1], starts, positions, out)
    matched = []
    for requests, each in itertools.product((1, 3, 8, 2), (1, 3, 2)):
        starts = np.arange(requests + 1, dtype=np.int32) * each
        positions = np.tile(np.arange(each), requests)
        descriptor.calculate(tables[:requests], starts, positions, out, block_size=2)
        assert out.tolist() == wanted_slots(tables, starts, positions, 30, 2, 1, 0, 1)[0]
        matched.append(descriptor.latest)
    assert len(set(matched)) == 1  # the matcher of the first call took all others


def test_torch_tensors_are_matched_with_any_number_of_requests():
    torch = pytest.importorskip("torch")
    tables = torch.arange(40, dtype=torch.int32).reshape(8, 5)
    for requests in (1, 8, 3, 0):
        starts = torch.arange(requests + 1, dtype=torch.int32)
        slots = pc.slot_mapping(tables[:requests], starts, starts[:-1].long(), block_size=2)
        wanted = wanted_slots(tables, starts, starts[:-1], requests, 2, 1, 0, 1)[0]
        assert isinstance(slots, torch.Tensor)
        assert slots.tolist() == wanted


def test_a_bound_mapping_follows_its_arrays():
    tables = np.array([[3, 1]], np.int32)
    starts, positions, out = np.array([0, 2], np.int32), np.array([0, 5]), np.zeros(3, np.int32)
    with pc.SlotMappingDescriptor.create(tables, starts, positions, out) as descriptor:
        run = descriptor.bind(tables, starts, positions, out, block_size=4)
        run()
        assert out.tolist() == [12, 5, -1]
        positions[1], starts[1] = 1, 1
        run()
        assert out.tolist() == [12, -1, -1]
        assert "block tables of 2, int32 slots" in repr(descriptor)
        assert "slot_mapping" in descriptor._repr_html_()
        assert descriptor.launch_config(5).grid == (1, 1, 1)
    with pytest.raises(pc.status.DestroyedError):
        run()


GOOD = {
    "block_tables": np.zeros((2, 3), np.int32),
    "query_start_loc": np.array([0, 1, 2], np.int32),
    "positions": np.array([0, 99]),
    "block_size": 4,
    "out": np.zeros(2, np.int64),
}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"block_tables": GOOD["block_tables"][:1]}, ValueError,
         "block_tables must have a row for each of the 2 requests of query_start_loc, got 1 rows"),
        ({"block_tables": GOOD["block_tables"][0]}, ValueError, "block_tables must have 2 axes"),
        ({"block_tables": GOOD["block_tables"].astype(np.float32)}, TypeError,
         "block_tables must be int64 or int32, got float32"),
        ({"query_start_loc": GOOD["query_start_loc"][:0]}, ValueError,
         "query_start_loc must have at least one entry"),
        ({"positions": None}, ValueError, "positions must be an array"),
        ({"positions": GOOD["positions"][::2].astype(np.int64)[:, None]}, ValueError,
         "positions must have 1 axis"),
        ({"out": np.zeros(2, np.int16)}, TypeError, "out must be int64 or int32, got int16"),
        ({"block_size": 0}, ValueError, "block_size must be from 1 to"),
        ({"block_size": -3}, ValueError, "block_size must be from 1 to"),
        ({"block_size": 1 << 40}, ValueError, "block_size must be from 1 to"),
        ({"block_size": "4"}, TypeError, "block_size must be an int, got '4'"),
        ({"cp_size": 0}, ValueError, "cp_size must be from 1 to"),
        ({"cp_size": 2, "cp_rank": 2}, ValueError, "cp_rank must be from 0 to 1"),
        ({"cp_size": 2, "cp_rank": -1}, ValueError, "cp_rank must be from 0 to 1"),
        ({"cp_size": 2, "cp_interleave": 3}, ValueError,
         "cp_interleave must divide block_size, 4, got 3"),
        ({"on_invalid": "ignore"}, ValueError, "on_invalid must be one of skip, raise"),
    ],
)  # fmt: skip
def test_what_bad_input_gets(change, kind, words):
    out = GOOD["out"].copy()
    with pytest.raises(pc.PagedCacheError, match=words) as error:
        pc.slot_mapping(**(GOOD | {"out": out} | change))
    assert isinstance(error.value, kind)
    assert not out.any()


@pytest.mark.parametrize("name", ["positions", "query_start_loc", "block_tables"])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_an_output_in_the_memory_of_an_input_is_refused(name, library):
    of = np.asarray if library == "numpy" else pytest.importorskip("torch").from_numpy
    memory = {
        "block_tables": np.zeros((9, 2), np.int64), "query_start_loc": np.array([0, 1, 2]),
        "positions": np.zeros(9, np.int64), "out": np.zeros(4, np.int64),
    }  # fmt: skip
    given = {each: of(array) for each, array in memory.items()}
    pc.slot_mapping(**given, block_size=4)  # so that there is a matcher
    inputs = memory[name].copy()
    given["out"] = of(memory[name].reshape(-1)[1:3])
    with pytest.raises(pc.CacheOverlapError, match=f"out must not share memory with {name}"):
        pc.slot_mapping(**given, block_size=4)
    assert np.array_equal(memory[name], inputs)


def test_slots_that_do_not_fit_are_reported(compiler):
    for dtype, block in ((np.int32, 1 << 28), (np.int64, 1 << 62), (np.int64, 1 << 32)):
        tables, starts = np.array([[5, block]]), np.array([0, 2], np.int32)
        positions, out = np.array([3, 19]), np.zeros(2, dtype)
        descriptor = pc.SlotMappingDescriptor.create(tables, starts, positions, out)
        for each in (descriptor, on_host(compiler, descriptor)):
            out[:] = 7
            each.calculate(tables, starts, positions, out, block_size=16)
            assert out.tolist() == [83, -1]
            with pytest.raises(pc.InvalidPositionError):
                each.check()


def test_page_slots_with_starts_that_would_wrap(compiler):
    arrays = [np.zeros(3, np.int64), np.array([0, 5, 2**63 - 1]), np.arange(4), None]
    for starts in ([2**63 - 1, 2**63 - 1], [1, 4]):
        arrays[3], out = np.array(starts), np.zeros(3, np.int64)
        operation = PageSlots.create(*arrays, out, 1, 4, 1, 4)
        for each in (operation, on_host(compiler, operation)):
            each.run((*arrays, out, 1, 4, 1, 4), None)
            assert out.tolist() == [1 if starts[0] == 1 else 4, 4, 4]


def test_invalid_positions_are_raised_after_the_others_are_done():
    out = GOOD["out"].copy() + 5
    words = r"positions\[1\] = 99 has no block in the block table of its request \(1 such token in"
    with pytest.raises(pc.InvalidPositionError, match=words):
        pc.slot_mapping(**(GOOD | {"out": out}), on_invalid="raise")
    assert out.tolist() == [0, -1]
    assert pc.slot_mapping(**(GOOD | {"out": None})).tolist() == [0, -1]


def test_page_slots_on_the_host(compiler):
    for seed in range(SEEDS // 2):
        rng = np.random.default_rng(seed)
        kinds = [DTYPES[i] for i in rng.integers(0, 2, 4)]
        sequences, tokens = int(rng.integers(0, 5)), int(rng.integers(1, 20))
        counts = rng.integers(0, 4, sequences)
        starts = np.concatenate([[0], np.cumsum(counts)]) + rng.integers(-1, 2)
        numbers = sequences, int(counts.sum()), int(rng.integers(1, 9)), int(rng.integers(1, 9))
        _, _, page_size, num_pages = numbers
        arrays = (
            rng.integers(-1, sequences + 2, tokens),
            rng.integers(-1, 4 * page_size, tokens),
            rng.integers(-1, num_pages + 1, int(counts.sum())),
            starts,
        )
        inputs = [each.astype(kind) for each, kind in zip(arrays, kinds, strict=True)]
        batch, positions, indices, starts = (each.tolist() for each in inputs)
        wanted = []
        for sequence, position in zip(batch, positions, strict=True):
            slot = -1 if sequence < 0 else num_pages * page_size
            if 0 <= sequence < sequences and position >= 0:
                entry, end = starts[sequence] + position // page_size, starts[sequence + 1]
                if starts[sequence] >= 0 and entry < min(end, len(indices)):
                    page = indices[entry]
                    if 0 <= page < num_pages:
                        slot = page * page_size + position % page_size
            wanted.append(slot)
        out = np.zeros(tokens, np.int64)
        operation = PageSlots.create(*inputs, out, *numbers)
        operation.run((*inputs, out, *numbers), None)
        assert out.tolist() == wanted
        out[:] = 0
        on_host(compiler, operation).run((*inputs, out, *numbers), None)
        assert out.tolist() == wanted
