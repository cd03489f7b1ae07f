"""How arrays are read."""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from layouts import expected, same, simple_case

import pagedcache as pc
from pagedcache import arrays


class FakeCupy:
    """As much of CuPy as a reader needs."""

    class ndarray:  # noqa: N801
        def __init__(self, like, device):
            self.shape, self.strides, self.dtype = like.shape, like.strides, like.dtype
            self.data = SimpleNamespace(ptr=64, device_id=device)

    def __init__(self, devices):
        self.cuda = SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=lambda: devices))


@pytest.mark.parametrize("devices", [1, 2])
def test_no_reader_takes_the_array_of_another_library(devices):
    array = np.zeros((2, 3), np.float16)
    fake = FakeCupy(devices)
    theirs = fake.ndarray(array, devices - 1)
    cupy, numpy = arrays._cupy_reader(fake), arrays._NUMPY

    def taken(reader, own, other):
        recognises = reader.recogniser(own)
        assert recognises(own)
        try:
            return recognises(other) and reader.address(other)
        except (AttributeError, ValueError):
            return False

    # True equals 1, so a flag must not stand where another library has a device number.
    assert not taken(cupy, theirs, array)
    assert not taken(numpy, array, theirs)
    elsewhere = fake.ndarray(array, 0)
    assert cupy.recogniser(theirs)(elsewhere) == (devices == 1)


def test_the_one_call_form_tells_libraries_apart(monkeypatch):
    # A CuPy array of the same look, on the only GPU there is, right after NumPy's.
    from pagedcache.interface import descriptor, one_call

    monkeypatch.setattr(one_call, "_latest", (object(), None, None))
    fake = FakeCupy(1)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(arrays, "readers", dict(arrays.readers))
    monkeypatch.setattr(descriptor, "readers", arrays.readers)
    cache = np.zeros((4, 1, 2, 8), np.float16)
    rows, slots = np.ones((3, 1, 8), np.float16), np.arange(3)
    five = [cache, cache.copy(), rows, rows, slots]
    pc.paged_caching(*five)
    for position in range(5):
        mixed = list(five)
        mixed[position] = fake.ndarray(mixed[position], 0)
        with pytest.raises(ValueError, match="must be on c"):
            pc.paged_caching(*mixed)


def in_numpy(array):
    return array


def in_torch(array):
    import torch

    return torch.from_numpy(array)


def in_torch_of_another_version(array):
    return in_torch(array)


def in_cupy(array):
    """Make one that looks the same; there is no memory, which takes no GPU."""
    import cupy

    memory = cupy.cuda.UnownedMemory(4096 + id(array), array.nbytes, array, 0)
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(array.shape, array.dtype, pointer, array.strides)


@pytest.mark.parametrize("library", [in_numpy, in_cupy, in_torch, in_torch_of_another_version])
def test_arrays_are_recognised_by_everything_but_the_address(library, monkeypatch):
    if library is in_cupy:
        cupy = pytest.importorskip("cupy")
        monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 1)
        monkeypatch.setattr(arrays, "_cupy_reader", arrays._cupy_reader.__wrapped__)
        monkeypatch.setattr(arrays, "readers", dict(arrays.readers))
    elif library is not in_numpy:
        torch = pytest.importorskip("torch")
        if library is in_torch_of_another_version:
            monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    array = np.zeros((2, 3, 4), np.float16)
    mine, reader = library(array), arrays.reader_of("k", library(array))
    recognises = reader.recogniser(mine, mine)
    assert recognises(mine, library(array.copy()))
    others = [array[:1], array.astype(np.int16), array.transpose(1, 0, 2), array[..., :2]]
    others += [np.zeros((2, 3, 8), np.float16)[..., :4], np.zeros((4, 3, 4), np.float16)[::2]]
    others = [library(other) for other in others]
    if library is in_numpy:
        others.append(array.copy())
        others[-1].flags.writeable = False
    elif library is not in_cupy:
        others += [mine.to("meta"), torch._neg_view(mine)]
    for other in others:
        assert not recognises(mine, other)
        assert not recognises(other, mine)
        recognises_other = reader.recogniser(other)
        assert [recognises_other(array) for array in others] == [array is other for array in others]


def test_adopt_reads_without_a_copy():
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)[:, ::2, 1:]
    tensor = arrays.adopt("k", array)
    assert tensor == (array.ctypes.data, array.dtype, (2, 2, 3), (48, 32, 4), "cpu", True)
    described = tensor.describe("k")
    assert (described.shape, described.strides, described.device) == ((2, 2, 3), (12, 8, 1), "cpu")


def test_subclasses_of_an_array_are_arrays():
    class Mine(np.ndarray):
        pass

    array = np.zeros(3).view(Mine)
    assert arrays.adopt("k", array).shape == (3,)
    assert Mine not in arrays.readers  # it may differ from time to time


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
        with pytest.raises(ValueError, match="k_cache must be writable, got a read-only array"):
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
            with pytest.raises(ValueError, match="k must have a row for each of the 4000"):
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
        (torch.empty(shape, dtype=torch.bits16), TypeError, "dtype of NumPy or ml_dtypes"),
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

    read = arrays.adopt("k", Device())
    assert read == (4096, np.dtype(np.float16), (2, 3, 4), (24, 8, 2), "cuda:1", True)
    assert arrays.adopt("k", Device(strides=(64, 16, 2))).strides == (64, 16, 2)
    assert arrays.adopt("k", Device(typestr="<V2")).dtype.name == "bfloat16"
    assert not arrays.adopt("k", Device(data=(4096, True))).writable
    stream = arrays.reader_of("k", Device()).stream
    assert [stream(Device(stream=s), 0) for s in (None, 1, 2, 77)] == [0, 1, 2, 77]
    with pytest.raises(TypeError, match="k must have memory that can be read"):
        arrays.adopt("k", Device(shape=None))
    with pytest.raises(TypeError, match="k must be a dtype"):
        arrays.adopt("k", Device(typestr="<Z9"))


def test_dlpack_of_other_devices_and_types():
    class Odd(Versioned):
        def __init__(self, array, **fields):
            super().__init__(array)
            self.fields = fields

        def __dlpack__(self, **options):
            capsule = self.array.__dlpack__(max_version=(1, 0))
            pointer = arrays._capsule_pointer(capsule, b"dltensor_versioned")
            managed = arrays._DLManagedTensorVersioned.from_address(pointer)
            for name, value in self.fields.items():
                setattr(managed.tensor, name, value)
            assert ctypes.sizeof(managed) == 80
            return capsule

    array = np.zeros((3, 4), np.float32)
    assert arrays.adopt("k", Odd(array)).address == array.ctypes.data
    assert arrays.adopt("k", Odd(array, byte_offset=8)).address == array.ctypes.data + 8
    assert arrays.adopt("k", Odd(array, device_type=2, device_id=3)).device == "cuda:3"
    bits = arrays.adopt("k", Odd(array, dtype_code=4, dtype_bits=16))
    assert (bits.dtype.name, bits.strides) == ("bfloat16", (8, 2))
    with pytest.raises(
        ValueError, match="memory of the CPU or of a CUDA device, got DLPack device 4"
    ):
        arrays.adopt("k", Odd(array, device_type=4))
    with pytest.raises(TypeError, match="got DLPack type 2 of 32 bits x 2"):
        arrays.adopt("k", Odd(array, dtype_lanes=2))
    with pytest.raises(TypeError, match="got DLPack type 3 of 32"):
        arrays.adopt("k", Odd(array, dtype_code=3))


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
    assert arrays.adopt("k", empty).strides == (32, 16, 2)
    qkv = np.zeros((5, 6, 8), np.float16)
    assert arrays.adopt("k", qkv[:0, 2:4]).strides == (96, 16, 2)
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
        arrays.adopt("k", Copying())


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
