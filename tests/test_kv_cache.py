# SPDX-License-Identifier: Apache-2.0
"""The cache: what is written is read back, whatever happens to its blocks in between."""

from __future__ import annotations

import copy

import numpy as np
import pytest

import pagedcache as pc
from pagedcache.arrays.find import adopt
from pagedcache.cache.formats import FORMATS

LAYERS, HEADS, SIZES = 2, 3, (16, 8)
STORED = (  # format, scale
    (None, None),
    ("float16", None),
    ("float8_e4m3fn", None),
    ("float8_e5m2", "head"),
    ("float8_e4m3fn", "pair"),
    ("int8", "token"),
    ("int4", 8),
    ("int8", 4),
    ("int4", "channel"),
)
HERE = ("numpy", "torch", pytest.param("cupy", marks=pytest.mark.gpu),
        pytest.param("torch cuda", marks=pytest.mark.gpu))  # fmt: skip


class Place:
    """Where a cache is, and how arrays get there and back."""

    def __init__(self, name):
        self.device = "cpu" if name == "numpy" else "cuda"
        self.move = np.asarray
        if name == "cupy":
            self.move = pytest.importorskip("cupy").asarray
        elif name != "numpy":
            torch = pytest.importorskip("torch")
            self.device = torch.device("cuda" if "cuda" in name else "cpu")
            self.move = lambda array: torch.from_numpy(np.array(array)).to(self.device)

    def back(self, array):
        if hasattr(array, "get"):
            return array.get()
        return array.cpu().numpy() if hasattr(array, "cpu") else array


@pytest.fixture(params=HERE)
def place(request):
    return Place(request.param)


def scale_of(kind):
    rng = np.random.default_rng(0)
    shapes = {
        "head": (LAYERS, HEADS),
        "channel": None,
        "pair": (LAYERS,),
    }
    if kind not in shapes:
        return kind
    if kind == "channel":
        return tuple(
            rng.uniform(0.1, 1, (LAYERS, HEADS, size)).astype(np.float32) for size in SIZES
        )
    pair = rng.uniform(0.1, 1, (2, *shapes[kind])).astype(np.float32)
    return pair[0] if kind == "head" else tuple(pair)


def make(place, stored=None, kind=None, **options):
    options = {"layout": "NHD", "dtype": "float32", **options}
    return pc.KVCache(
        LAYERS, 12, 4, HEADS, SIZES[0], v_head_size=SIZES[1], device=place.device,
        format=stored, scale=scale_of(kind), **options,
    )  # fmt: skip


def rows(seed, count):
    rng = np.random.default_rng(seed)
    return [
        [rng.standard_normal((count, HEADS, size)).astype(np.float32) for size in SIZES]
        for _ in range(LAYERS)
    ]


def write(cache, place, kv, slots, part=slice(None)):
    for layer, (k, v) in enumerate(kv):
        cache.write(layer, place.move(k[part]), place.move(v[part]), slots)


def read(cache, place, sequence, **options):
    return [
        [place.back(each) for each in cache.read(layer, sequence, **options)]
        for layer in range(LAYERS)
    ]


def equal(one, other):
    return all(
        np.array_equal(x, y)
        for of_layer, of_other in zip(one, other, strict=True)
        for x, y in zip(of_layer, of_other, strict=True)
    )


def joined(*parts):
    return [
        [np.concatenate([part[layer][side] for part in parts]) for side in (0, 1)]
        for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("stored", "kind"), STORED)
def test_what_is_read_back_is_what_the_operators_store(place, stored, kind, layout):
    cache = make(place, stored, kind, layout=layout)
    sequence, kv = cache.sequence(range(10)), rows(1, 10)
    write(cache, place, kv, cache.slots(sequence))
    found = read(cache, place, sequence)
    # The same by the operators, on plain arrays.
    packed = 2 if stored == "int4" else 1
    dtype = np.dtype(np.float32) if stored is None else FORMATS[stored].dtype
    axes = (4, HEADS) if layout == "NHD" else (HEADS, 4)
    caches = [np.zeros((12, *axes, size // packed), dtype) for size in SIZES]
    slots = np.asarray(sequence.slots())
    formats = {"k_format": stored, "v_format": stored, "layout": layout}
    for layer in range(LAYERS):
        scales = [None, None]
        given = scale_of(kind)
        if kind == "token":
            scales = [np.zeros((12, *axes), np.float32) for _ in SIZES]
        elif isinstance(kind, int):
            scales = [np.zeros((12, *axes, size // kind), np.float32) for size in SIZES]
        elif given is not None:
            pair = given if isinstance(given, tuple) else (given, given)
            scales = [each[layer].reshape(1) if each.ndim == 1 else each[layer] for each in pair]
        formats |= {"k_scale": scales[0], "v_scale": scales[1]}
        pc.paged_caching(*caches, *kv[layer], slots, **formats)
        wanted = [np.empty_like(each) for each in kv[layer]]
        pc.paged_gather(*caches, slots, *wanted, **formats)
        for one, other in zip(found[layer], wanted, strict=True):
            assert np.array_equal(one, other)
        layer_arrays = cache.layers[layer]
        assert tuple(layer_arrays.k.shape) == caches[0].shape
        stored_bytes = place.back(layer_arrays.k)
        assert np.ascontiguousarray(stored_bytes).tobytes() == caches[0].tobytes()
    part = read(cache, place, sequence, start=3, stop=8)
    assert equal(part, [[each[3:8] for each in layer] for layer in found])


def test_a_prefix_is_found_and_a_fork_gets_its_own_block(place):
    cache = make(place)
    kv = rows(1, 10)
    first = cache.sequence(range(10))
    write(cache, place, kv, cache.slots(first))
    other = cache.sequence([*range(8), 77, 78, 79])
    assert other.num_cached_tokens == 8
    tail = rows(2, 3)
    write(cache, place, tail, cache.slots(other))
    assert equal(read(cache, place, other), joined([[k[:8] for k in each] for each in kv], tail))

    fork = first.fork()
    new, own = rows(3, 1), rows(4, 1)
    slots = fork.append(50)
    write(cache, place, new, slots)  # copies the shared block first
    write(cache, place, own, first.append(60))
    assert equal(read(cache, place, fork), joined(kv, new))
    assert equal(read(cache, place, first), joined(kv, own))
    assert fork.block_table[:2] == first.block_table[:2]
    assert fork.block_table[2] != first.block_table[2]
    assert cache.pool.copies == []
    assert "5 of 12 blocks of 4 in use" in repr(cache)


def test_a_copy_that_is_refused_is_made_later(monkeypatch):
    place = Place("numpy")
    cache = make(place)
    kv = rows(1, 6)
    first = cache.sequence(range(6))
    write(cache, place, kv, cache.slots(first))
    fork = first.fork()
    slots = fork.append(9)
    real = pc.BlockDescriptor.copy

    def refuse(*_, **__):
        raise pc.status.LaunchError("launch", "failed")

    monkeypatch.setattr(pc.BlockDescriptor, "copy", refuse)
    with pytest.raises(pc.status.LaunchError):
        write(cache, place, rows(2, 1), slots)
    monkeypatch.setattr(pc.BlockDescriptor, "copy", real)
    write(cache, place, rows(2, 1), slots)
    assert equal(read(cache, place, fork), joined(kv, rows(2, 1)))


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("stored", "kind"), [(None, None), ("int4", 8)])
def test_offload_and_restore(place, kept, stored, kind):
    cache = make(place, stored, kind)
    kv = rows(1, 11)
    sequence = cache.sequence(range(11))
    write(cache, place, kv, cache.slots(sequence))
    before = read(cache, place, sequence)
    away = cache.offload(sequence)
    assert (away.num_blocks, away.num_written, list(away.token_ids)) == (3, 11, [*range(11)])
    assert "11 tokens in 3 blocks" in repr(away)
    assert "3 blocks" in cache._repr_html_()
    with pytest.raises(pc.FreedError):
        cache.read(0, sequence)
    if kept:
        blocker = cache.sequence()
    else:  # others take all blocks, and write to them
        blocker = cache.sequence(range(100, 148))
        write(cache, place, rows(9, 48), cache.slots(blocker))
        with pytest.raises(pc.PoolExhaustedError, match=r"resume .* 3 blocks must be free and 0"):
            cache.restore(away)
    blocker.free()
    back = cache.restore(away)
    assert back.num_cached_tokens == 11
    assert equal(read(cache, place, back), before)
    new = rows(3, 1)
    write(cache, place, new, back.append(5))
    if stored is None:
        assert equal(read(cache, place, back), joined(kv, new))
    with pytest.raises(pc.FreedError, match="offloaded was restored or freed"):
        cache.restore(away)
    assert cache.num_host_blocks == 0
    again = cache.offload(back)
    assert cache.num_host_blocks == 3
    again.free()
    again.free()
    assert cache.pool.num_used == cache.num_host_blocks == 0


def test_host_blocks_that_are_given_back_are_used_again(place):
    cache = make(place, host_blocks=3)
    for turn in range(4):
        sequence, kv = cache.sequence(range(100 * turn, 100 * turn + 11)), rows(turn, 11)
        write(cache, place, kv, cache.slots(sequence))
        away = cache.offload(sequence)
        cache.pool.reset_prefix_cache()
        back = cache.restore(away)
        assert equal(read(cache, place, back), kv)
        back.free()


def test_what_was_not_written_is_not_kept(place):
    cache = make(place)
    kv = rows(1, 6)
    sequence = cache.sequence(range(10))
    write(cache, place, kv, cache.slots(sequence, 0, 6))
    away = cache.offload(sequence, num_written=6)
    assert away.num_blocks == cache.num_host_blocks == 2
    assert cache.pool.find(range(10)) == 4  # the block of tokens 4 to 7 is forgotten
    cache.pool.reset_prefix_cache()
    back = cache.restore(away)
    assert (back.num_tokens, back.num_cached_tokens) == (10, 6)
    assert equal(read(cache, place, back, stop=6), kv)


def test_block_tables_as_attention_kernels_take_them(place):
    cache = make(place)
    sequences = [cache.sequence(range(100 * n, 100 * n + n)) for n in (5, 0, 9, 4)]
    tables, lengths, indices, indptr, last = map(place.back, cache.block_tables(sequences))
    assert all(each.dtype == np.int32 for each in (tables, lengths, indices, indptr, last))
    assert lengths.tolist() == [5, 0, 9, 4]
    assert tables.shape == (4, 3)
    for row, sequence in zip(tables.tolist(), sequences, strict=True):
        table = sequence.block_table
        assert row == table + [0] * (3 - len(table))
    assert indptr.tolist() == [0, 2, 2, 5, 6]
    assert indices.tolist() == [block for each in sequences for block in each.block_table]
    assert last.tolist() == [1, 0, 1, 4]
    starts = np.cumsum([0, *lengths])
    positions = np.concatenate([np.arange(n) for n in lengths])
    slots = pc.slot_mapping(
        place.move(tables), place.move(starts), place.move(positions), block_size=4
    )
    wanted = [slot for each in sequences for slot in each.slots()]
    assert place.back(slots).tolist() == wanted
    wide = cache.block_tables(sequences, max_blocks=7)
    assert place.back(wide.tables)[:, :3].tolist() == tables.tolist()
    assert tuple(wide.tables.shape) == (4, 7)
    with pytest.raises(pc.PagedCacheError, match=r"max_blocks must be at least 3, .*, got 2"):
        cache.block_tables(sequences, max_blocks=2)
    empty = cache.block_tables([])
    assert tuple(empty.tables.shape) == (0, 1)
    nothing = cache.block_tables([cache.sequence()])
    starts = place.move(np.zeros(2, np.int32))
    idle = pc.slot_mapping(nothing.tables, starts, place.move(np.array([3])), block_size=4)
    assert place.back(idle).tolist() == [-1]
    assert place.back(empty.indptr).tolist() == [0]


def test_layers_of_a_block_are_neighbours(place):
    cache = make(place, "int8", "token")
    assert tuple(cache.blocks.shape) == (12, cache.block_bytes)
    assert cache.nbytes == 12 * cache.block_bytes
    # In a layer: 4 x 3 x 16 bytes of K, 4 x 3 x 8 of V, and twice 4 x 3 scales, each aligned.
    assert cache.block_bytes == LAYERS * (256 + 128 + 128 + 128)
    parts = [array for layer in cache.layers for array in layer]
    starts = [adopt("a part", each).address for each in parts]
    base = adopt("blocks", cache.blocks).address
    assert [start - base for start in starts] == [0, 256, 384, 512, 640, 896, 1024, 1152]
    sequence, kv = cache.sequence(range(4)), rows(1, 4)
    write(cache, place, kv, cache.slots(sequence))
    [block] = sequence.block_table
    blocks = place.back(cache.blocks)
    assert blocks[block].any()
    assert not np.delete(blocks, block, axis=0).any()
    other = cache.sequence(range(50, 54))
    cache.blocks[other.block_table[0]] = cache.blocks[block]
    assert equal(read(cache, place, other), read(cache, place, sequence))


def test_a_write_kernel_takes_the_arrays_of_a_layer(place):
    cache = make(place, "float8_e4m3fn")
    kernel = pc.WriteKernel(k=["x * 2"], **cache.options)
    sequence, kv = cache.sequence(range(3)), rows(1, 3)
    arrays = cache.layers[1]
    kernel(arrays.k, arrays.v, *map(place.move, kv[1]), cache.slots(sequence))
    k, _ = cache.read(1, sequence)
    assert np.abs(place.back(k) - 2 * kv[1][0]).max() < 0.5


GOOD = {"num_layers": 2, "num_blocks": 4, "block_size": 4, "num_kv_heads": 1, "head_size": 8}


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"num_blocks": -1}, ValueError, "num_blocks must be"),
        ({"block_size": 1.5}, TypeError, "block_size must be"),
        ({"head_size": "8"}, TypeError, "head_size must be an int, got '8'"),
        ({"v_head_size": 0}, ValueError, "v_head_size must be at least 1"),
        ({"host_blocks": 0}, ValueError, "host_blocks must be at least 1"),
        ({"dtype": "int8"}, TypeError, "dtype must be float16, bfloat16 or float32, got int8"),
        ({"format": "fp8"}, ValueError, "format must be one of float16, .* got 'fp8'"),
        ({"format": "int4", "head_size": 7, "scale": "token"}, ValueError,
         "head_size must be even"),
        ({"format": "int8"}, ValueError, "scale must be given for int8: 'token', a number of"),
        ({"scale": 8}, ValueError, "scale must be None, since bfloat16 takes none, got 8"),
        ({"format": "int8", "scale": "row"}, ValueError, "scale must be 'token'"),
        ({"format": "int8", "scale": 3}, ValueError, "scale must divide the head size, 8, got 3"),
        ({"format": "int8", "scale": True}, ValueError, "scale.* must be an array"),
        ({"format": "int8", "scale": np.float32([1, -1])}, ValueError,
         r"scale\[0\] must be positive and finite"),
        ({"format": "int8", "scale": np.ones(2)}, TypeError, r"scale\[0\] must be float32"),
        ({"format": "int8", "scale": np.ones(3, np.float32)}, ValueError,
         r"scale\[0\] must have one of the shapes \[2\], \[2, 1\], \[2, 1, 8\]"),
        ({"layout": "DHN"}, ValueError, "layout must be one of"),
        ({"device": 3}, TypeError, "device must be a name such as 'cuda:0'"),
        ({"device": "tpu"}, ValueError, "tpu"),
    ],
)  # fmt: skip
def test_what_bad_sizes_get(change, kind, words):
    with pytest.raises(pc.PagedCacheError, match=words) as error:
        pc.KVCache(**{"device": "cpu", **GOOD, **change})
    assert isinstance(error.value, kind)


@pytest.mark.parametrize("name", ["meta", "cuda"])
def test_a_device_of_pytorch_that_cannot_be_used(name):
    torch = pytest.importorskip("torch")
    if name == "cuda" and pc.backends()["cuda"].usable:
        pytest.skip("it can be used here")
    with pytest.raises(pc.PagedCacheError, match=name):
        pc.KVCache(**GOOD, device=torch.device(name))


def test_what_bad_calls_get():
    place = Place("numpy")
    cache, other = make(place, host_blocks=2), make(place)
    sequence = cache.sequence(range(10))
    stranger = other.sequence(range(3))
    for call in (
        lambda: cache.read(0, stranger),
        lambda: cache.slots(stranger),
        lambda: cache.offload(stranger),
        lambda: cache.block_tables([sequence, stranger]),
    ):
        with pytest.raises(pc.PagedCacheError, match="sequence must be one of this cache"):
            call()
    with pytest.raises(TypeError, match="sequence must be a Sequence, got 7"):
        cache.slots(7)
    for layer in (-1, 2, "a"):
        with pytest.raises(pc.PagedCacheError, match="layer must be an int from 0 to 1"):
            cache.read(layer, sequence)
    with pytest.raises(pc.PagedCacheError, match="slots must be an array or a sequence of ints"):
        cache.write(0, *rows(1, 1)[0], ["a"])
    for odd in ([1.5], ["3"], [True], None, [[1]]):
        with pytest.raises(pc.PagedCacheError, match="slots must be"):
            cache.write(0, *rows(1, 1)[0], odd)
    with pytest.raises(pc.PagedCacheError, match="start must be"):
        cache.slots(sequence, -1)
    with pytest.raises(pc.PagedCacheError, match="num_written must be from 0 to"):
        cache.offload(sequence, num_written=11)
    with pytest.raises(TypeError, match="num_written must be an int, got 'a'") as error:
        cache.offload(sequence, num_written="a")
    assert isinstance(error.value, pc.PagedCacheError)
    words = "3 blocks must be free and 2 of 2 are; .* make the cache with more host_blocks"
    with pytest.raises(pc.PoolExhaustedError, match=words):
        cache.offload(sequence)
    assert sequence.num_tokens == 10  # nothing was changed
    with pytest.raises(pc.PagedCacheError, match="offloaded must be what offload of this cache"):
        cache.restore(sequence)
    away = other.offload(other.sequence(range(3)), num_written=0)
    with pytest.raises(pc.PagedCacheError, match="an Offloaded cannot be copied"):
        copy.copy(away)
    other.restore(away)
    with pytest.raises(pc.FreedError):
        other.restore(away)
    away = other.offload(other.sequence(range(3)))
    with pytest.raises(pc.PagedCacheError, match="offloaded must be what offload of this cache"):
        cache.restore(away)


BUSY = r"""
extern "C" __global__ void busy(long long cycles) {
  const long long began = clock64();
  while (clock64() - began < cycles) {}
}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cupy", "torch cuda"])
def test_methods_wait_for_nothing_and_are_in_the_order_of_their_stream(name):
    cupy = pytest.importorskip("cupy")
    place = Place(name)
    cache = make(place)
    busy = cupy.RawKernel(BUSY, "busy")
    kv = [[place.move(each) for each in layer] for layer in rows(1, 12)]
    others = [[[place.move(each) for each in layer] for layer in rows(n, 48)] for n in (7, 8)]
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in "ab"]

    def turn(stream, cycles, number):
        """Do everything on one stream, which is busy, while another one is current, and busy."""
        event = cupy.cuda.Event()
        for each in streams:
            busy((1,), (1,), (cycles,), stream=each)
        tokens = range(100 * number, 100 * number + 12)
        sequence = cache.sequence(tokens)
        for layer in range(LAYERS):
            cache.write(layer, *kv[layer], sequence.slots(), stream=stream)
        away = cache.offload(sequence, stream=stream)
        cache.pool.reset_prefix_cache()
        blocker = cache.sequence(range(5000, 5048))  # all blocks, which are overwritten
        for layer in range(LAYERS):
            cache.write(layer, *others[number % 2][layer], blocker.slots(), stream=stream)
        blocker.free()
        back = cache.restore(away, stream=stream)
        found = [cache.read(layer, back, stream=stream) for layer in range(LAYERS)]
        event.record(stream)
        waited = event.done
        back.free()
        cache.pool.reset_prefix_cache()
        stream.synchronize()
        for layer in range(LAYERS):
            for one, other in zip(found[layer], kv[layer], strict=True):
                assert np.array_equal(place.back(one), place.back(other))
        return waited

    cupy.cuda.Device().synchronize()
    with streams[1]:
        turn(streams[0], 1000, 0)  # compiles, allocates and measures
        assert not any(turn(streams[0], 300_000_000, number) for number in (1, 2, 3))


@pytest.mark.parametrize("publish", [True, False])
@pytest.mark.parametrize(("written", "whole"), [(32, False), (99, True), (100, True)])
def test_what_was_not_written_is_not_found_after_it_was_restored(publish, written, whole):
    cache = pc.KVCache(1, 24, 16, 1, 4, dtype="float32", device="cpu")
    tokens = list(range(100))
    away = cache.offload(cache.sequence(tokens, publish=publish), num_written=written)
    assert cache.pool.find([*tokens, 5]) == (written // 16 * 16 if publish else 0)
    cache.pool.reset_prefix_cache()
    back = cache.restore(away)
    assert back.num_cached_tokens == written
    assert back.published == (publish and whole)
    assert cache.pool.find([*tokens, 5]) == (96 if publish and whole else 0)
    back.publish()
    assert cache.pool.find([*tokens, 5]) == 96


def test_a_write_can_raise_for_slots_past_the_end():
    cache = pc.KVCache(1, 2, 4, 1, 4, dtype="float32", device="cpu")
    k = np.ones((2, 1, 4), np.float32)
    cache.write(0, k, k, [1, 8])
    with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[1\] = 8 is outside the cache"):
        cache.write(0, k, k, [1, 8], on_invalid="raise")
