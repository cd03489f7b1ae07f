# SPDX-License-Identifier: Apache-2.0
"""Backends are found by device type, imported when used, and never replaced in silence."""

from __future__ import annotations

import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from layouts import expected, forget, same, simple_case
from test_arrays import torch_view

import pagedcache as pc
from pagedcache.arrays import find
from pagedcache.backend import registry
from pagedcache.backend.cpu import CpuReport
from pagedcache.backend.protocol import Implementation, LaunchConfig
from pagedcache.operators.one_call import FOUND_OFTEN, MOST_KEPT, MOST_RECENT
from pagedcache.status import Status


class Write(Implementation):
    def __init__(self, info, device, report):
        self.info, self.device, self.report = info, device, report

    def launch_config(self, rows):
        return LaunchConfig((rows, 1, 1), (1, 1, 1))

    def run(self, *arguments):
        self.device.calls.append(arguments)


class ToyDevice:
    kind = "toy"

    def __init__(self, index):
        self.name = f"toy:{index or 0}"
        self.calls = []
        self.current = 4

    def current_stream(self):
        return self.current

    def stream(self, stream):
        return {"mine": 5}[stream] if isinstance(stream, str) else stream

    def report(self, *, read=True):
        return CpuReport()

    def describe(self):
        return "a toy"

    def limits_table(self):
        return []

    def operator(self, name):
        if name != "paged_caching":
            raise pc.status.NotSupportedError(name, "is not in the toy backend")
        return Write


class ToyBackend:
    def check(self):
        pass

    def open(self, index):
        return ToyDevice(index)


@pytest.fixture
def clean(monkeypatch):
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    module = types.ModuleType("toy_backend")
    module.Toy, module.Other = ToyBackend, ToyBackend
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    yield
    registry._load.cache_clear()


def test_the_built_in_ones():
    reports = pc.backends()
    assert list(reports)[:3] == ["cpu", "cuda", "rocm"]
    assert reports["cpu"].usable
    assert "NumPy" in reports["cpu"].reason
    assert reports["cuda"].usable or reports["cuda"].reason
    assert pc.Handle().device == ("cuda:0" if reports["cuda"].usable else "cpu")


def test_another_package_brings_a_device(clean):
    pc.register_backend("toy", "toy_backend:Toy")
    pc.register_backend("toy", "toy_backend:Toy")
    assert pc.backends()["toy"] == pc.BackendReport("toy", "toy_backend:Toy", True, "a toy")
    case = simple_case()
    described = [pc.TensorDescriptor(a.dtype, a.shape, device="toy:3") for a in case.arrays()]
    descriptor = pc.Descriptor.create(*described)
    assert descriptor.device == "toy:3"
    assert descriptor.launch_config(5).grid == (5, 1, 1)
    for _ in range(2):
        descriptor.calculate(*case.addresses(), stream="mine")
        descriptor.calculate(*case.addresses())
    descriptor.bind(*case.addresses())()
    device = descriptor._device
    assert device.calls == [(9, *case.addresses(), 0, 0, stream) for stream in (5, 4, 5, 4, 4)]
    with pytest.raises(ValueError, match=r"k_cache must have device toy:3, as when .* got cpu"):
        descriptor.calculate(*case.arrays())


def test_two_targets_for_one_type_are_refused(clean):
    pc.register_backend("toy", "toy_backend:Toy")
    for device_type in ("toy", "cpu", "cuda"):
        with pytest.raises(ValueError, match="cannot have a second backend") as caught:
            pc.register_backend(device_type, "toy_backend:Other")
        assert caught.value.status == Status.BAD_PARAM


def test_entry_points(clean, monkeypatch):
    monkeypatch.setattr(registry, "_entry_points", lambda: (("toy", "toy_backend:Toy"),))
    assert pc.Handle("toy:1").device == "toy:1"
    with pytest.raises(ValueError, match="cannot have a second backend"):
        pc.register_backend("toy", "toy_backend:Other")
    several = (("toy", "toy_backend:Toy"), ("toy", "toy_backend:Other"))
    monkeypatch.setattr(registry, "_entry_points", lambda: several)
    with pytest.raises(ValueError, match="has several backends, brought by different installed"):
        pc.Handle("toy")
    # The types that nobody disputes still work.
    assert pc.Handle("cpu").device == "cpu"
    assert not pc.backends()["toy"].usable


@pytest.fixture
def installed(clean, tmp_path, monkeypatch):
    """Install a package that brings a backend, and return it."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    folder = shutil.copytree(Path(__file__).with_name("outside_backend"), tmp_path / "package")
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", tmp_path / "site"]
    subprocess.run([*pip, *offline, folder], check=True)
    monkeypatch.syspath_prepend(tmp_path / "site")
    known = dict(find.libraries)
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()
    find.libraries.clear()
    find.libraries.update(known)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pagedcache_npu"]:
        del sys.modules[name]


@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_package_from_outside_is_installed_and_used(installed, layout):
    assert "pagedcache_npu" not in sys.modules
    handle = pc.Handle("npu")  # found by its entry point
    assert repr(handle) == "Handle('npu:0': a made-up NPU)"
    assert pc.backends()["npu"].usable
    npu = sys.modules["pagedcache_npu"]
    case = simple_case(tokens=9, k_size=8, v_size=6, layout=layout)
    case.views["slot_mapping"][3] = 7 * 4  # past the end
    arrays = [npu.Array(array) for array in case.arrays()]
    wanted = [*case.arrays()]
    pc.paged_caching(*wanted, layout=layout)
    pc.paged_caching(*arrays, layout=layout)
    for array, one in zip(arrays, wanted, strict=True):
        assert array.get().tobytes() == one.tobytes()
    k, v = (np.zeros_like(array) for array in wanted[2:4])
    k_out, v_out = npu.Array(k), npu.Array(v)
    pc.paged_gather(*arrays[:2], arrays[4], k_out, v_out, layout=layout)
    pc.paged_gather(*wanted[:2], wanted[4], k, v, layout=layout)
    assert k_out.get().tobytes() == k.tobytes()
    assert v_out.get().tobytes() == v.tobytes()
    assert k.any()
    with pc.Descriptor.create(*arrays, layout=layout, handle=handle) as write:
        write.calculate(*arrays)
        with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[3\] = 28 is outside"):
            write.check()
    with pytest.raises(ValueError, match="k must be on npu:0 like v_cache, got cpu"):
        pc.paged_caching(*arrays[:2], *wanted[2:], layout=layout)
    codes = npu.Array(np.zeros(case.views["k_cache"].shape, np.int8))
    scale = npu.Array(np.ones(1, np.float32))
    with pytest.raises(NotImplementedError, match="k_cache must have dtype bfloat16 on NPUs"):
        pc.paged_caching(codes, *arrays[1:], k_scale=scale, k_format="int8", layout=layout)


def test_targets_are_imported_only_when_used(clean):
    pc.register_backend("lazy", "no_such_module_at_all:Backend")
    assert pc.Handle("cpu").device == "cpu"
    with pytest.raises(ImportError, match="no_such_module_at_all:Backend cannot be imported") as e:
        pc.Handle("lazy")
    assert e.value.status == Status.DEVICE_NOT_INITIALIZED
    pc.register_backend("wrong", "toy_backend:Missing")
    with pytest.raises(RuntimeError, match="has no attribute 'Missing'"):
        pc.Handle("wrong")
    reports = pc.backends()
    assert not reports["lazy"].usable
    assert not reports["wrong"].usable


def test_a_broken_plug_in_breaks_nothing_else(clean, monkeypatch):
    class Broken(ToyBackend):
        def check(self):
            raise RuntimeError("no licence")

    class Unmade(ToyBackend):
        def __init__(self):
            raise OSError("no file")

    sys.modules["toy_backend"].Broken, sys.modules["toy_backend"].Unmade = Broken, Unmade
    pc.register_backend("broken", "toy_backend:Broken")
    pc.register_backend("unmade", "toy_backend:Unmade")
    reports = pc.backends()
    assert reports["broken"].reason == "it fails: RuntimeError('no licence')"
    assert "cannot be created: OSError('no file')" in reports["unmade"].reason
    assert pc.Handle().device in ("cpu", "cuda:0")


@pytest.mark.parametrize(
    ("device_type", "target"),
    [
        ("Toy", "a:B"),
        ("toy:0", "a:B"),
        ("", "a:B"),
        (3, "a:B"),
        ("toy", "a.B"),
        ("toy", ToyBackend),
    ],
)
def test_names(clean, device_type, target):
    with pytest.raises(ValueError, match="must be"):
        pc.register_backend(device_type, target)


def test_an_operator_that_a_device_lacks():
    with pytest.raises(NotImplementedError, match=r"'gather' is not implemented on the CPU") as e:
        pc.Handle("cpu").opened().operator("gather")
    assert e.value.status == Status.NOT_IMPLEMENTED


def test_what_is_not_a_backend_is_refused_at_once(clean, monkeypatch):
    module = sys.modules["toy_backend"]
    module.Half = type("Half", (), {"open": lambda self, index: None})
    module.instance = ToyBackend()
    for name, words in (("Half", "without check"), ("instance", "ToyBackend object")):
        with pytest.raises(TypeError, match="must be a class with the methods check and open") as e:
            pc.register_backend("odd", f"toy_backend:{name}")
        assert words in str(e.value)
    monkeypatch.delitem(sys.modules, "toy_backend")  # not imported yet, so nothing can be said
    pc.register_backend("odd", "toy_backend:Half")
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    with pytest.raises(TypeError, match="must be a class with the methods check and open"):
        pc.Handle("odd")
    assert not pc.backends()["odd"].usable


def test_one_call_finds_its_descriptor_again(monkeypatch):
    kept = forget(monkeypatch)
    made, create = [], kept.create
    kept.create = lambda *arguments: made.append(1) or create(*arguments)
    case = simple_case(tokens=9)
    k_cache, v_cache, k, v, slots = case.arrays()
    pc.paged_caching(k_cache, v_cache, k, v, slots)
    pc.paged_caching(k_cache, v_cache, k, v, slots)
    pc.paged_caching(k_cache, v_cache, k[:4], v[:4], slots[:4])
    assert len(made) == 1
    pc.paged_caching(k_cache, v_cache, k, v, slots.astype(np.int32))
    assert len(made) == 2
    # Caches that differ in one axis alone need descriptors of their own.
    for axis in range(4):
        shape = list(k_cache.shape)
        shape[axis] += 1
        larger = np.zeros(shape, k_cache.dtype), np.zeros(shape, k_cache.dtype)
        rows = np.ones((3, shape[1], shape[3]), k_cache.dtype)
        last = shape[0] * shape[2] - 1
        for _ in range(2):
            slots = np.array([0, last, last + 1])
            pc.paged_caching(*larger, rows, rows, slots, layout="HND")
        assert len(made) == 3 + axis
        for cache in larger:
            assert (cache[-1, :, -1] == 1).all()
            assert np.count_nonzero(cache) == 2 * rows[0].size
    assert len(made) == 6


def test_the_least_recently_used_descriptors_are_forgotten(monkeypatch):
    kept = forget(monkeypatch)
    made, create = [], kept.create
    kept.create = lambda *arguments: made.append(arguments[0].shape[-1]) or create(*arguments)

    def write(size):
        cache = np.zeros((1, 1, 1, size), np.float16)
        pc.paged_caching(cache, cache.copy(), cache[0], cache[0], np.array([0]))

    sizes = range(1, MOST_KEPT + 1)
    for size in sizes:
        write(size)
    write(1)  # so the least recently used is 2
    assert made == list(sizes)
    for size in range(1000, 1010):
        write(size)
    assert len(kept._kept) == MOST_KEPT
    del made[:]
    write(1)
    assert made == []
    write(2)
    assert made == [2]
    assert len(kept.recent) == MOST_RECENT


@pytest.fixture
def on_toy(clean):
    """Return a case, and a descriptor of it on a toy device."""
    pc.register_backend("toy", "toy_backend:Toy")
    case = simple_case()
    described = [pc.TensorDescriptor(a.dtype, a.shape, device="toy:3") for a in case.arrays()]
    return case, pc.Descriptor.create(*described)


def test_a_bound_write_runs_on_its_stream_or_on_the_current_one(on_toy):
    case, descriptor = on_toy
    device = descriptor._device
    write, on_mine = (descriptor.bind(*case.addresses(), stream=s) for s in (None, "mine"))
    for current in (4, 7, 0):
        device.current = current
        write()
        on_mine()
    assert [call[-1] for call in device.calls] == [4, 5, 7, 5, 0, 5]
    assert {call[:-1] for call in device.calls} == {(9, *case.addresses(), 0, 0)}


def test_a_null_stream_in_c_is_the_default_one(on_toy):
    case, descriptor = on_toy
    for stream in (None, 0, None, 6, None):
        status = pc.infiniop.infiniopPagedCaching(descriptor, None, 0, *case.addresses(), stream)
        assert status == Status.SUCCESS
    assert [call[-1] for call in descriptor._device.calls] == [0, 0, 0, 6, 0]


def test_arrays_that_differ_in_one_thing_alone_have_descriptors_of_their_own(monkeypatch):
    kept = forget(monkeypatch)
    pool = np.zeros((2, 7, 3, 4, 16), np.float16)
    rows = np.ones((9, 3, 16), np.float16)
    k, v, slots = rows[..., :8], rows[..., 8:], np.arange(9)
    plain = np.zeros((2, 7, 3, 4, 8), np.float16)
    variants = [
        (plain[0], plain[1], k, v, slots),
        (pool[0, ..., :8], plain[1], k, v, slots),  # strides of a cache
        (plain[0], pool[1, ..., 8:], k, v, slots),
        (plain[0], plain[1], k.copy(), v, slots),  # strides of a source
        (*plain.astype("bfloat16"), *np.split(rows.astype("bfloat16"), 2, -1), slots),
        (np.zeros((8, 3, 4, 8), np.float16), np.zeros((8, 3, 4, 8), np.float16), k, v, slots),
    ]
    for _ in range(2):
        for arrays in variants:
            for cache in arrays[:2]:
                cache[...] = 0
            pc.paged_caching(*arrays)
            for cache in arrays[:2]:
                written = cache.transpose(0, 2, 1, 3).reshape(-1, 3, 8)
                assert (written[:9] == 1).all()
                assert not (written[9:] != 0).any()
    assert len(kept._kept) == len(variants)


def test_a_descriptor_that_is_found_often_is_tried_first(monkeypatch):
    """And one that is found now and then is not, since several would change places all the time."""
    kept = forget(monkeypatch)
    cases = [simple_case(heads=heads) for heads in (2, 3)]
    for case in cases:
        pc.paged_caching(*case.arrays())
    *_, descriptor = kept.recent[0]
    assert descriptor.info.num_kv_heads == 3
    for _ in range(FOUND_OFTEN - 1):
        pc.paged_caching(*cases[0].arrays())
        assert kept.recent[0][-1] is descriptor
    pc.paged_caching(*cases[0].arrays())
    assert [entry[-1].info.num_kv_heads for entry in kept.recent] == [2, 3]
    for case in cases:
        case.buffers["k_cache"][...] = 0
        wanted = expected(case)
        pc.paged_caching(*case.arrays())
        same(case, wanted)
    assert len(kept._kept) == len(kept.recent) == 2


def test_libraries_in_turn_share_a_descriptor(monkeypatch):
    pytest.importorskip("torch")
    kept = forget(monkeypatch)
    made, create = [], kept.create
    kept.create = lambda *arguments: made.append(1) or create(*arguments)
    case = simple_case()
    slots = case.views["slot_mapping"]
    for turn in range(12):
        tokens = 9 - turn % 3
        slots[...] = np.random.default_rng(turn).permutation(28)[:9]
        arrays = [*case.arrays()[:2], *(array[:tokens] for array in case.arrays()[2:])]
        wanted = case.copy()
        pc.Descriptor.create(*arrays).calculate(*wanted.arrays()[:2], *arrays[2:])
        if turn % 2:
            arrays = [torch_view(array) for array in arrays]
        pc.paged_caching(*arrays)
        same(case, wanted.buffers)
    assert len(made) == len(kept._kept) == len(kept.recent) == 1
