# SPDX-License-Identifier: Apache-2.0
"""How arrays are read."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import expected, forget, same, simple_case

import pagedcache as pc
from pagedcache.arrays import dlpack, find, matching
from pagedcache.arrays.cupy import CONTIGUOUS
from pagedcache.operators.arguments import Arguments


class FakeCupy:
    """As much of CuPy as reading its arrays needs."""

    class ndarray:  # noqa: N801
        def __init__(self, like, device):
            self.shape, self.strides, self.dtype = like.shape, like.strides, like.dtype
            self.ndim, self._c_contiguous = like.ndim, like.flags.c_contiguous
            self.data = SimpleNamespace(ptr=like.ctypes.data, device_id=device)
            self.like = like

        def __len__(self):
            return self.shape[0]

    def __init__(self, devices):
        self.cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: devices))


@pytest.fixture
def fake_cupy(monkeypatch):
    """Return a function that pretends there is a CuPy with so many devices."""

    def pretend(devices):
        fake = FakeCupy(devices)
        monkeypatch.setitem(sys.modules, "cupy", fake)
        monkeypatch.setattr(find, "libraries", dict(find.libraries))
        monkeypatch.setattr(matching, "libraries", find.libraries)
        return fake

    return pretend


def in_numpy(array):
    return array


def in_torch(array):
    return torch_view(array)


def in_torch_of_another_version(array):
    return torch_view(array)


def in_cupy(array):
    """Make one that looks the same, over the same memory; that takes no GPU."""
    import cupy

    memory = cupy.cuda.UnownedMemory(array.ctypes.data, array.nbytes, array, 0)
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(array.shape, array.dtype, pointer, array.strides)


LOOKS = {
    "k_cache": ((4, 3, 2, 8), np.float16),
    "v_cache": ((4, 3, 2, 8), np.float16),
    "k": ((5, 3, 8), np.float16),
    "v": ((5, 3, 8), np.float16),
    "slot_mapping": ((5,), np.int64),
}


def five(**changes):
    """Return five arrays, with some replaced."""
    made = {name: np.zeros(shape, dtype) for name, (shape, dtype) in LOOKS.items()}
    return {**made, **changes}


def arguments_like(described, names=tuple(LOOKS)):
    """Return what the arguments of a write without scales must be like."""
    rules = pc.PagedCachingInfo.create(*described.values()).rules
    expected = rules.expected(described)[:5]
    renamed = [one._replace(name=name) for one, name in zip(expected, names, strict=True)]
    return Arguments(names, renamed, names[-1], "cpu")


def call_for(given, to_library, ran, apart=None):
    """Return a matcher of arrays of a library, which appends its arguments to `ran`."""
    described = {name: pc.TensorDescriptor(a.dtype, a.shape) for name, a in five().items()}
    arguments = arguments_like(described)
    arguments.apart.update(apart or {})
    return matching.make_matcher(
        arguments,
        [to_library(array) for array in given.values()],
        lambda *arguments: ran.append(arguments),
        lambda: 7,
        lambda stream: stream.handle,
        check_alignment=True,
    )


LIBRARY_OF = [in_numpy, in_cupy, in_torch, in_torch_of_another_version]


@pytest.fixture(params=LIBRARY_OF, ids=lambda library: library.__name__)
def to_library(request, monkeypatch):
    library = request.param
    if library is in_cupy:
        cupy = pytest.importorskip("cupy")
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    elif library is not in_numpy:
        torch = pytest.importorskip("torch")
        if library is in_torch_of_another_version:
            monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    adopt_any = library(np.zeros(3))
    find.library_of("k", adopt_any)  # known from now on
    return library


def test_arrays_match_whatever_their_address_and_number_of_rows(to_library):
    ran, given = [], five()
    call = call_for(given, to_library, ran)
    for rows in (5, 1, 3, 5):
        other = five(
            k=np.zeros((rows, 3, 8), np.float16),
            v=np.zeros((rows + 2, 3, 8), np.float16),
            slot_mapping=np.zeros(rows, np.int64),
        )
        assert call(*map(to_library, other.values()), None)
        assert ran.pop() == (rows, *(array.ctypes.data for array in other.values()), 7)
    arrays = [to_library(array) for array in given.values()]
    assert call(*arrays, 9)
    assert call(*arrays, SimpleNamespace(handle=11))
    assert [each[-1] for each in ran] == [9, 11]


def variants(name):
    """Yield arrays that must not match in the place of one."""
    shape, dtype = LOOKS[name]
    good = np.zeros(shape, dtype)
    yield good.astype(np.float32 if dtype == np.float16 else np.int32)
    yield good.view(np.int16) if dtype == np.float16 else good.view(np.uint64)
    yield np.zeros((*shape[:-1], shape[-1] * 2), dtype)[..., ::2]  # a last stride of 2
    yield good[None]
    yield good[..., 0] if good.ndim > 1 else good[:0]
    if good.ndim > 1:
        yield np.zeros((*shape[:-1], 4), dtype)
        yield np.zeros((*shape[:-1], 16), dtype)[..., :8]  # other strides
        yield np.zeros((shape[0], 2, *shape[2:]), dtype)
        yield np.zeros((shape[0], 6, *shape[2:]), dtype)[:, ::2]
        yield np.swapaxes(np.zeros((shape[1], shape[0], *shape[2:]), dtype), 0, 1)
    if good.ndim == 4:
        yield np.zeros((5, *shape[1:]), dtype)
        yield np.zeros((3, *shape[1:]), dtype)
        yield np.zeros((*shape[:2], 3, 8), dtype)
        yield np.zeros((8, *shape[1:]), dtype)[::2]
    else:
        yield good[:0]
        if name != "slot_mapping":
            yield good[:4]  # too few rows
            yield np.zeros((10, *shape[1:]), dtype)[::2]
            yield np.zeros((1, 2, 8), dtype)


@pytest.mark.parametrize("name", LOOKS)
def test_other_arrays_do_not_match(to_library, name):
    ran = []
    call = call_for(five(), to_library, ran)
    assert call(*map(to_library, five().values()), None)
    for index, other in enumerate(variants(name)):
        arrays = [to_library(array) for array in five(**{name: other}).values()]
        assert not call(*arrays, None), (index, other.shape, other.strides)
    # ... nor what is no array of this library at all.
    for odd in (None, 3, "x", [1.0], np.zeros(3) if to_library is not in_numpy else b"y"):
        arrays = [to_library(array) for array in five().values()]
        arrays[list(LOOKS).index(name)] = odd
        assert not call(*arrays, None)
    assert len(ran) == 1


def test_what_only_one_library_has(to_library):
    ran, given = [], five()
    call = call_for(given, to_library, ran)
    if to_library is in_numpy:
        given["k_cache"].flags.writeable = False
        assert not call(*given.values(), None)
    elif to_library is not in_cupy:
        import torch

        for position in range(5):
            arrays = [to_library(array) for array in five().values()]
            for odd in (arrays[position].to("meta"), torch.nn.Buffer(arrays[position])):
                mixed = [*arrays[:position], odd, *arrays[position + 1 :]]
                if type(odd) is not torch.Tensor or odd.device.type == "meta":
                    assert not call(*mixed, None)
            if position < 4:
                arrays[position] = torch._neg_view(arrays[position])
                assert not call(*arrays, None)
    assert ran == []


def test_a_slice_of_rows_matches_by_its_strides(to_library):
    """Rows of a fused projection are further apart than they are long, also if there is one."""
    qkv = np.zeros((9, 6, 8), np.float16)
    ran, given = [], five(k=qkv[:5, :3], v=qkv[:5, 3:])
    described = {
        name: pc.TensorDescriptor(a.dtype, a.shape, [s // a.itemsize for s in a.strides])
        for name, a in given.items()
    }
    call = matching.make_matcher(
        arguments_like(described),
        [to_library(array) for array in given.values()],
        lambda *arguments: ran.append(arguments), lambda: 0, int, check_alignment=True,
    )  # fmt: skip
    for rows in (9, 1, 5):
        slots = np.zeros(rows, np.int64)
        other = five(k=qkv[:rows, :3], v=qkv[:rows, 3:], slot_mapping=slots)
        assert call(*map(to_library, other.values()), None)
    whole = five(k=np.zeros((5, 3, 8), np.float16))
    assert not call(*map(to_library, whole.values()), None)
    assert [each[0] for each in ran] == [9, 1, 5]


def test_tensors_may_have_any_names(to_library):
    """Also those of variables in a matcher."""
    described = {name: pc.TensorDescriptor(a.dtype, a.shape) for name, a in five().items()}
    arguments = arguments_like(described, ("run", "count", "stream", "guards", "ndarray"))
    arrays, ran = [to_library(array) for array in five().values()], []
    matcher = matching.make_matcher(
        arguments, arrays, lambda *arguments: ran.append(arguments), lambda: 0, int,
        check_alignment=True,
    )  # fmt: skip
    assert matcher(*arrays, None)
    assert not matcher(*reversed(arrays), None)
    assert [each[0] for each in ran] == [5]


def test_caches_that_share_memory_do_not_match(to_library):
    pool = np.zeros((6, 3, 2, 8), np.float16)
    size, block = 4 * 3 * 2 * 8 * 2, 3 * 2 * 8 * 2
    for blocks, fine in ((0, False), (1, False), (2, False)):
        ran = []
        given = five(k_cache=pool[:4], v_cache=pool[blocks : blocks + 4])
        call = call_for(five(), to_library, ran)
        assert call(*map(to_library, given.values()), None) is fine
        swapped = five(k_cache=given["v_cache"], v_cache=given["k_cache"])
        assert not call(*map(to_library, swapped.values()), None)
        # Unless it is known that they are interleaved.
        distance = given["v_cache"].ctypes.data - given["k_cache"].ctypes.data
        assert distance == blocks * block < size
        call = call_for(five(), to_library, ran, {(0, 1): {distance: 1 << 62}})
        assert call(*map(to_library, given.values()), None)
        assert not call(*map(to_library, swapped.values()), None) or blocks == 0
    pool = np.zeros((8, 3, 2, 8), np.float16)
    ran = []
    call = call_for(five(), to_library, ran)
    for one, other in ((pool[:4], pool[4:]), (pool[4:], pool[:4])):
        assert call(*map(to_library, five(k_cache=one, v_cache=other).values()), None)


@pytest.mark.parametrize("name", LOOKS)
def test_misaligned_arrays_do_not_match(to_library, name):
    if to_library not in (in_numpy, in_cupy):
        pytest.skip("PyTorch makes no such tensor")
    good = five()[name]
    raw = np.zeros(good.nbytes + 1, np.uint8)
    moved = raw[1:].view(good.dtype).reshape(good.shape)
    ran = []
    call = call_for(five(), to_library, ran)
    assert not call(*map(to_library, five(**{name: moved}).values()), None)
    assert ran == []


def test_libraries_may_be_mixed_in_a_make_matcher():
    pytest.importorskip("torch")
    given = five()
    arrays = [torch_view(a) if i % 2 else a for i, a in enumerate(given.values())]
    for array in arrays:
        find.library_of("k", array)
    ran = []
    described = {name: pc.TensorDescriptor(a.dtype, a.shape) for name, a in given.items()}
    call = matching.make_matcher(
        arguments_like(described), arrays,
        lambda *arguments: ran.append(arguments), lambda: 0, int, check_alignment=True,
    )  # fmt: skip
    assert call(*arrays, None)
    assert ran == [(5, *(a.ctypes.data for a in given.values()), 0)]
    assert not call(*given.values(), None)
    assert not call(*map(torch_view, given.values()), None)


@pytest.mark.parametrize("devices", [1, 2])
def test_arrays_of_another_device_do_not_match(fake_cupy, devices):
    fake = fake_cupy(devices)
    ran = []
    on = lambda device: lambda array: fake.ndarray(array, device)  # noqa: E731
    find.library_of("k", on(0)(np.zeros(3)))
    call = call_for(five(), on(devices - 1), ran)
    assert call(*map(on(devices - 1), five().values()), None)
    for position in range(5):
        arrays = [on(devices - 1)(array) for array in five().values()]
        arrays[position] = on(0)(arrays[position].like)
        # With one device, there is nothing to compare.
        assert call(*arrays, None) is (devices == 1)


@pytest.mark.parametrize("devices", [1, 2])
def test_no_library_takes_the_array_of_another(fake_cupy, devices):
    fake = fake_cupy(devices)
    theirs = lambda array: fake.ndarray(array, devices - 1)  # noqa: E731
    find.library_of("k", theirs(np.zeros(3)))
    ran = []
    for mine, other in ((in_numpy, theirs), (theirs, in_numpy)):
        call = call_for(five(), mine, ran)
        for position in range(5):
            arrays = [mine(array) for array in five().values()]
            arrays[position] = other(five()[list(LOOKS)[position]])
            assert not call(*arrays, None)
    assert ran == []


def test_the_one_call_form_tells_libraries_apart(fake_cupy, monkeypatch):
    # A CuPy array of the same look, on the only GPU there is, right after NumPy's.
    forget(monkeypatch)
    fake = fake_cupy(1)
    arrays = list(five(slot_mapping=np.arange(5)).values())
    pc.paged_caching(*arrays)
    for position in range(5):
        mixed = list(arrays)
        mixed[position] = fake.ndarray(mixed[position], 0)
        with pytest.raises(ValueError, match="must be on c"):
            pc.paged_caching(*mixed)


def test_private_functions_that_are_used_are_there():
    """They are several times as fast as the public ones, which are used where they are missing."""
    torch = pytest.importorskip("torch")
    from pagedcache.arrays.torch import Torch

    tensor = torch.zeros(3, 4)
    assert callable(torch._C._increment_version), "torch._C._increment_version is gone"
    before = tensor._version
    torch._C._increment_version((tensor,))
    assert tensor._version == before + 1, "torch._C._increment_version does something else"
    guards = torch._C._dynamo.guards.TensorGuards(
        tensor, dynamic_dims_sizes=[[None, 4]], dynamic_dims_strides=[[4, 1]]
    )
    changed = "torch._C._dynamo.guards.TensorGuards compares something else"
    assert guards.check(torch.zeros(7, 4)), changed
    for other in (torch.zeros(3, 5), torch.zeros(4, 3).T, tensor.int(), tensor.to("meta")):
        assert not guards.check(other), changed
    assert not guards.check(torch.zeros(3, 4, requires_grad=True)), changed
    if torch.cuda.is_available():
        assert callable(torch._C._cuda_getCurrentRawStream), "_cuda_getCurrentRawStream is gone"
    assert Torch(torch)._bump is torch._C._increment_version
    cupy = pytest.importorskip("cupy")
    assert hasattr(cupy.ndarray, CONTIGUOUS), f"cupy.ndarray.{CONTIGUOUS} is gone"
    assert getattr(in_cupy(np.zeros((2, 3))), CONTIGUOUS) is True
    assert getattr(in_cupy(np.zeros((2, 3))[:, ::2]), CONTIGUOUS) is False


def test_without_private_functions(monkeypatch):
    torch = pytest.importorskip("torch")
    from pagedcache.arrays.torch import Torch

    monkeypatch.delattr(torch._C, "_increment_version")
    public = Torch(torch)
    assert public._bump is torch.autograd.graph.increment_version
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    current = SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=device + 5))
    public = Torch(SimpleNamespace(_C=torch._C, cuda=current, autograd=torch.autograd))
    assert public.current_stream("k", SimpleNamespace(is_cuda=True), 3)() == 8
    assert public.current_stream("k", SimpleNamespace(is_cuda=False), 3) is None
    cupy = pytest.importorskip("cupy")
    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
    monkeypatch.setattr("pagedcache.arrays.cupy.CONTIGUOUS", "_gone")
    ran = []
    find.library_of("k", in_cupy(np.zeros(3)))
    call = call_for(five(), in_cupy, ran)
    assert call(*map(in_cupy, five().values()), None)
    strided = five(k=np.zeros((5, 6, 8), np.float16)[:, ::2])
    assert not call(*map(in_cupy, strided.values()), None)


def test_adopt_reads_without_a_copy():
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)[:, ::2, 1:]
    tensor = find.adopt("k", array)
    assert tensor == (array.ctypes.data, array.dtype, (2, 2, 3), (48, 32, 4), "cpu", True)
    described = tensor.describe("k")
    assert (described.shape, described.strides, described.device) == ((2, 2, 3), (12, 8, 1), "cpu")


def test_subclasses_of_an_array_are_arrays():
    class Mine(np.ndarray):
        pass

    array = np.zeros(3).view(Mine)
    assert find.adopt("k", array).shape == (3,)
    assert Mine not in find.libraries  # it may differ from time to time


# The arrays of other libraries

NAMES = ("k_cache", "v_cache", "k", "v", "slot_mapping")


def torch_view(view):
    """Return a torch tensor over the memory of a NumPy array, bfloat16 too."""
    import torch

    bits = torch.from_numpy(view.view(f"i{view.dtype.itemsize}"))
    return bits.view(getattr(torch, view.dtype.name))


class Exporter:
    """An array that offers one protocol, and nothing else."""

    def __init__(self, array, **attributes):
        self.array = array
        for name, value in attributes.items():
            setattr(self, name, value)


class Interface(Exporter):
    @property
    def __array_interface__(self):
        return self.array.__array_interface__


class Versioned(Exporter):
    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Unversioned(Exporter):
    def __dlpack__(self, stream=None):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Copying(Unversioned):
    def __dlpack__(self, stream=None):
        return self.array.copy().__dlpack__()


class CopyingSilently(Versioned):
    def __dlpack__(self, **options):
        return self.array.copy().__dlpack__(**options)


class Buffer(Exporter):
    @property
    def __array_interface__(self):
        return {**self.array.__array_interface__, "data": self.array.tobytes()}


class SaysItCopied(Versioned):
    def __dlpack__(self, *, max_version=None, copy=None, dl_device=None, stream=None):
        return self.array.__dlpack__(max_version=max_version, copy=True)


def from_library(library):
    """Return a function from a NumPy array to an array of a library over the same memory."""
    if library == "torch":
        pytest.importorskip("torch")
        return torch_view
    if library == "torch through DLPack":
        pytest.importorskip("torch")
        return lambda view: Versioned(torch_view(view))
    if library == "array interface":
        return Interface
    if library == "DLPack":
        return Versioned
    assert library == "DLPack of old"
    return Unversioned


LIBRARIES = ["torch", "torch through DLPack", "array interface", "DLPack", "DLPack of old"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("slots", ["int32", "int64"])
def test_writes_into_the_arrays_of(library, dtype, slots):
    if dtype == "bfloat16" and library.startswith("DLPack"):
        pytest.skip("NumPy, the exporter here, does not export it")
    foreign = from_library(library)
    case = simple_case(dtype=dtype, slots=slots, k_size=12)
    wanted = expected(case)
    arrays = [foreign(view) for view in case.arrays()]
    with pc.Descriptor.create(*arrays) as descriptor:
        for _ in range(2):
            descriptor.calculate(*arrays)
        descriptor.calculate(*arrays[:4], case.views["slot_mapping"])  # libraries may be mixed
        descriptor.calculate(*case.arrays()[:2], *arrays[2:])
    same(case, wanted)
    case.buffers["k_cache"][...] = wanted["k_cache"][...] = 0
    again = expected(case)
    for _ in range(2):
        pc.paged_caching(*arrays)
    same(case, again)


@pytest.mark.parametrize("library", LIBRARIES)
def test_strides_are_kept(library):
    foreign = from_library(library)
    case = simple_case(dtype="float32")
    fused = np.arange(9 * 3 * 24, dtype=np.float32).reshape(9, 72)  # Q, K and V of each token
    k, v = (fused[:, start : start + 24].reshape(9, 3, 8) for start in (24, 48))
    stacked = np.zeros((7, 2, 3, 4, 8), np.float32)  # K and V inside a block
    arrays = [foreign(view) for view in (stacked[:, 0], stacked[:, 1], k, v)]
    pc.paged_caching(*arrays, foreign(case.views["slot_mapping"]))
    for token, slot in enumerate(case.views["slot_mapping"].tolist()):
        if slot >= 0:
            assert (stacked[slot // 4, 0, :, slot % 4] == k[token]).all()
            assert (stacked[slot // 4, 1, :, slot % 4] == v[token]).all()


def test_jax_arrays_are_read_and_never_written():
    jax = pytest.importorskip("jax")
    for dtype in ("float16", "bfloat16", "float32"):
        case = simple_case(dtype=dtype, slots="int32")
        wanted = expected(case)
        k_cache, v_cache, *sources = case.arrays()
        sources = [jax.numpy.array(source) for source in sources]
        assert [str(source.dtype) for source in sources] == [dtype, dtype, "int32"]
        with pc.Descriptor.create(k_cache, v_cache, *sources) as descriptor:
            for _ in range(2):
                descriptor.calculate(k_cache, v_cache, *sources)
        same(case, wanted)
        pc.paged_caching(k_cache, v_cache, *sources)
        theirs = jax.numpy.array(k_cache)
        before = np.array(theirs).view(f"u{theirs.dtype.itemsize}")
        with pytest.raises(ValueError, match="k_cache must be writable, got a JAX array"):
            pc.paged_caching(theirs, v_cache, *sources)
        assert (np.array(theirs).view(before.dtype) == before).all()


def test_a_jax_tracer_is_no_memory():
    jax = pytest.importorskip("jax")
    case = simple_case(dtype="float32", slots="int32")

    def write(k):
        pc.paged_caching(*case.arrays()[:2], k, *case.arrays()[3:])

    with pytest.raises(TypeError, match="k must have memory that can be read without a copy"):
        jax.jit(write)(case.views["k"])


def test_read_only_outputs_of_any_library():
    case = simple_case(dtype="float32")
    arrays = case.arrays()
    untouched = case.copy().buffers
    frozen = arrays[0].view()
    frozen.flags.writeable = False
    for foreign in (frozen, Interface(frozen), Versioned(frozen)):
        with pytest.raises(ValueError, match="k_cache must be writable"):
            pc.paged_caching(foreign, *arrays[1:])
        with pytest.raises(ValueError, match="k_cache must be writable"):
            pc.Descriptor.create(*arrays).calculate(foreign, *arrays[1:])
    same(case, untouched)


@pytest.mark.parametrize("exporter", [Copying, CopyingSilently, SaysItCopied, Buffer])
@pytest.mark.parametrize("name", NAMES)
def test_an_exporter_that_copies_is_refused(exporter, name):
    case = simple_case(dtype="float32")
    untouched = case.copy().buffers
    arrays = {name: case.views[name] for name in NAMES}
    arrays[name] = exporter(arrays[name])
    for call in (pc.paged_caching, pc.Descriptor.create):
        with pytest.raises(ValueError, match=f"{name} must be readable without a copy") as caught:
            call(*arrays.values())
        assert caught.value.status == pc.Status.BAD_PARAM
    same(case, untouched)


def test_exporters_that_fail_in_any_way():
    class Broken:
        def __getattr__(self, name):
            raise ValueError("not today")

    class BrokenStream:
        __cuda_array_interface__ = None

    case = simple_case(dtype="float32")
    untouched = case.copy().buffers
    with pc.Descriptor.create(*case.arrays()) as descriptor:
        for bad in (Broken(), BrokenStream()):
            for position in range(5):
                five = case.arrays()
                five[position] = bad
                for call in (pc.paged_caching, pc.Descriptor.create, descriptor.calculate):
                    with pytest.raises(pc.PagedCacheError, match=NAMES[position]):
                        call(*five)
    same(case, untouched)


def test_a_subclass_that_shows_itself_otherwise_each_time():
    class Flickering(np.ndarray):
        looks = 0

        @property
        def shape(self):
            Flickering.looks += 1
            return (4000,) if Flickering.looks % 2 else (4,)

    case = simple_case(tokens=4, dtype="float32")
    k_cache, v_cache, k, v, slots = case.arrays()
    with pc.Descriptor.create(*case.arrays()) as descriptor:
        for _ in range(4):
            with contextlib.suppress(pc.PagedCacheError):
                descriptor.calculate(k_cache, v_cache, k, v, slots.view(Flickering))
            with pytest.raises(ValueError, match="k must have at least 4000 rows"):
                descriptor.calculate(k_cache, v_cache, k, v, np.full(4000, -1))


def test_what_torch_does_not_hold_in_memory():
    torch = pytest.importorskip("torch")
    case = simple_case(dtype="float32")
    arrays = case.arrays()
    untouched = case.copy().buffers
    shape = case.views["k"].shape
    negated = torch.complex(torch.zeros(shape), torch.ones(shape)).conj().imag
    for bad, kind, words in (
        (negated, ValueError, "call resolve_neg"),
        (torch.zeros(shape).to_sparse(), TypeError, "dense tensor"),
        (torch.zeros(shape, device="meta"), ValueError, "meta"),
        (torch.nested.nested_tensor([torch.zeros(3, 8)] * 9), TypeError, "k must have memory"),
        (torch.zeros(shape, dtype=torch.float8_e4m3fn), TypeError, "float16, bfloat16 or float32"),
        (torch.empty(shape, dtype=torch.bits16), TypeError, "dtype that NumPy or ml_dtypes has"),
    ):
        with pytest.raises(kind, match=words) as caught:
            pc.paged_caching(*arrays[:2], bad, *arrays[3:])
        assert isinstance(caught.value, pc.PagedCacheError)
    plain = torch_view(case.views["k"])
    with pc.Descriptor.create(*map(torch_view, arrays)) as descriptor:
        rows = [torch_view(array) for array in arrays]
        descriptor.calculate(*rows)
        rows[2] = negated
        with pytest.raises(ValueError, match="call resolve_neg"):
            descriptor.calculate(*rows)
        rows[2] = plain
        descriptor.calculate(*rows)
    assert not np.array_equal(untouched["k_cache"], case.buffers["k_cache"])


def test_a_tensor_whose_memory_was_freed():
    pytest.importorskip("torch")
    case = simple_case(dtype="float32")
    wanted = expected(case)
    tensors = [torch_view(view) for view in case.arrays()]
    descriptor = pc.Descriptor.create(*tensors)
    descriptor.calculate(*tensors)
    for position, name in enumerate(NAMES):
        freed = list(tensors)
        freed[position] = tensors[position].clone()
        descriptor.calculate(*freed)
        freed[position].untyped_storage().resize_(0)
        for _ in range(2):
            for call in (descriptor.calculate, pc.paged_caching):
                with pytest.raises(pc.PagedCacheError, match=name) as caught:
                    call(*freed)
                assert caught.value.status in (pc.Status.NULL_POINTER, pc.Status.BAD_PARAM)
    case.buffers["k_cache"][...] = wanted["k_cache"]
    descriptor.calculate(*tensors)
    same(case, wanted)


def test_torch_parameters_and_subclasses():
    torch = pytest.importorskip("torch")
    case = simple_case(dtype="float32")
    wanted = expected(case)
    arrays = [torch_view(view) for view in case.arrays()]
    arrays[:4] = [torch.nn.Parameter(array, requires_grad=False) for array in arrays[:4]]
    for _ in range(2):
        pc.paged_caching(*arrays)
    same(case, wanted)


def test_nothing_is_imported_for_other_libraries():
    program = (
        "import sys, numpy as np, pagedcache as pc\n"
        "a = np.zeros((2, 1, 1, 1), 'f2')\n"
        "pc.paged_caching(a, a.copy(), a[:, 0], a[:, 0], np.arange(2))\n"
        "print([m for m in ('torch', 'jax', 'numba', 'cupy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


class FakeRuntime:
    """As much of CuPy as __cuda_array_interface__ needs."""

    def pointerGetAttributes(self, address):  # noqa: N802
        return SimpleNamespace(device=1)


def test_cuda_array_interface(monkeypatch):
    """Read without a GPU: nothing but numbers."""
    fake = SimpleNamespace(
        cuda=SimpleNamespace(runtime=FakeRuntime()), ndarray=type("ndarray", (), {})
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    base = {"data": (4096, False), "typestr": "<f2", "shape": (2, 3, 4), "version": 3}

    class Device:
        def __init__(self, **changes):
            self.__cuda_array_interface__ = {**base, **changes}

    read = find.adopt("k", Device())
    assert read == (4096, np.dtype(np.float16), (2, 3, 4), (24, 8, 2), "cuda:1", True)
    assert find.adopt("k", Device(strides=(64, 16, 2))).strides == (64, 16, 2)
    assert find.adopt("k", Device(typestr="<V2")).dtype.name == "bfloat16"
    assert not find.adopt("k", Device(data=(4096, True))).writable
    library = find.library_of("k", Device())
    streams = [library.current_stream("k_cache", Device(stream=s), 0)() for s in (None, 1, 2, 77)]
    assert streams == [0, 1, 2, 77]
    with pytest.raises(TypeError, match="k must have memory that can be read"):
        find.adopt("k", Device(shape=None))
    with pytest.raises(TypeError, match="k must be a dtype"):
        find.adopt("k", Device(typestr="<Z9"))


def test_dlpack_of_other_devices_and_types():
    class Odd(Versioned):
        def __init__(self, array, **fields):
            super().__init__(array)
            self.fields = fields

        def __dlpack__(self, **options):
            capsule = self.array.__dlpack__(max_version=(1, 0))
            pointer = dlpack.capsule_pointer(capsule, b"dltensor_versioned")
            managed = dlpack.DLManagedTensorVersioned.from_address(pointer)
            for name, value in self.fields.items():
                setattr(managed.tensor, name, value)
            assert ctypes.sizeof(managed) == 80
            return capsule

    array = np.zeros((3, 4), np.float32)
    assert find.adopt("k", Odd(array)).address == array.ctypes.data
    assert find.adopt("k", Odd(array, byte_offset=8)).address == array.ctypes.data + 8
    assert find.adopt("k", Odd(array, device_type=2, device_id=3)).device == "cuda:3"
    bits = find.adopt("k", Odd(array, dtype_code=4, dtype_bits=16))
    assert (bits.dtype.name, bits.strides) == ("bfloat16", (8, 2))
    with pytest.raises(
        ValueError, match="memory of the CPU or of a CUDA device, got DLPack device 4"
    ):
        find.adopt("k", Odd(array, device_type=4))
    with pytest.raises(TypeError, match="got DLPack type 2 of 32 bits x 2"):
        find.adopt("k", Odd(array, dtype_lanes=2))
    with pytest.raises(TypeError, match="got DLPack type 3 of 32"):
        find.adopt("k", Odd(array, dtype_code=3))


def test_arrays_that_numba_filled():
    numba = pytest.importorskip("numba")

    @numba.njit
    def fill(rows, start):
        for i in range(rows.size):
            rows.flat[i] = start + i
        return rows

    case = simple_case(dtype="float32")
    arrays_of_numba = case.arrays()
    for start, name in enumerate(("k", "v")):
        fill(case.views[name], start)
    wanted = expected(case)
    pc.paged_caching(*arrays_of_numba)
    same(case, wanted)


def test_arrays_without_elements_have_any_strides():
    empty = np.zeros((0, 2, 8)).astype(np.float16)
    assert empty.strides == (0, 0, 0)  # what NumPy makes of them
    assert find.adopt("k", empty).strides == (32, 16, 2)
    qkv = np.zeros((5, 6, 8), np.float16)
    assert find.adopt("k", qkv[:0, 2:4]).strides == (96, 16, 2)
    case = simple_case(tokens=5, heads=2, dtype="float16")
    k_cache, v_cache, _, _, slots = case.arrays()
    none, wanted = (k_cache, v_cache, empty, empty, slots[:0]), expected(case)
    with pc.Descriptor.create(*none) as descriptor:
        descriptor.calculate(*none)
        descriptor.calculate(*case.arrays())
        same(case, wanted)
        for changed in (none, (k_cache, v_cache, empty[:, :, ::-1], empty, slots[:0])):
            descriptor.calculate(*changed)
            pc.paged_caching(*changed)
    same(case, wanted)


def test_an_interface_that_copies_is_refused():
    class Copying:
        def __init__(self):
            self.kept = []

        @property
        def __array_interface__(self):
            self.kept.append(np.zeros((2, 3), np.float16))
            return self.kept[-1].__array_interface__

    with pytest.raises(ValueError, match="k must be readable without a copy"):
        find.adopt("k", Copying())


def test_steps_that_are_never_taken_may_be_anything():
    case = simple_case(tokens=1, heads=1, dtype="float16")
    k_cache, v_cache, k, v, slots = case.arrays()
    wanted = expected(case)
    for steps in ((17, 16, 2), (2**62, 2, 2), (-(2**62), 2**50, 2)):
        odd = np.lib.stride_tricks.as_strided(k, (1, 1, 8), steps)
        pc.paged_caching(k_cache, v_cache, odd, v, slots)
        with pc.Descriptor.create(k_cache, v_cache, odd, v, slots) as descriptor:
            descriptor.calculate(k_cache, v_cache, odd, v, slots)
            descriptor.calculate(*case.arrays())
    same(case, wanted)


def test_guards_of_a_number_of_rows_that_was_seen():
    """They are of exact lengths, so other lengths of K and V are looked at anew each time."""
    pytest.importorskip("torch")
    find.library_of("k", in_torch(np.zeros(3)))
    ran = []
    call = call_for(five(), in_torch, ran)
    for rows_of_k, rows_of_v in ((5, 5), (7, 5), (4, 5), (5, 9), (5, 4), (7, 9), (0, 5), (5, 5)):
        given = five(k=np.zeros((rows_of_k, 3, 8), "f2"), v=np.zeros((rows_of_v, 3, 8), "f2"))
        fine = min(rows_of_k, rows_of_v) >= 5
        for _ in range(2):
            assert call(*map(in_torch, given.values()), None) is fine
    assert {each[0] for each in ran} == {5}
    assert len(ran) == 2 * 5


def test_guards_are_forgotten_when_there_are_many(monkeypatch):
    pytest.importorskip("torch")
    from pagedcache.arrays import torch as room

    made, ran = [], []

    class Seen(room._Guards):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(room, "_Guards", Seen)
    monkeypatch.setattr(room, "MOST_GUARDS", 3)
    find.library_of("k", in_torch(np.zeros(3)))
    call = call_for(five(), in_torch, ran)
    [guards] = made
    for rows in (1, 2, 3, 4, 1, 5, 2, 2, 3, 4):
        given = five(
            k=np.zeros((rows, 3, 8), "f2"), v=np.zeros((rows, 3, 8), "f2"),
            slot_mapping=np.zeros(rows, "i8"),
        )  # fmt: skip
        assert call(*map(in_torch, given.values()), None)
        assert rows in guards
        assert len(guards) <= 3
        short = {**given, "k": given["k"][1:]}
        assert not call(*map(in_torch, short.values()), None)
    assert [each[0] for each in ran] == [1, 2, 3, 4, 1, 5, 2, 2, 3, 4]
