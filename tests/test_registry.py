"""Backends are found by device type, imported when used, and never replaced in silence."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from layouts import simple_case

import pagedcache as pc
from pagedcache.backend import registry
from pagedcache.backend.protocol import LaunchConfig
from pagedcache.status import Status


class Opaque:
    workspace_size = 0

    def __init__(self, info, calls):
        self.info = info
        self.calls = calls

    def launch_config(self, num_tokens):
        return LaunchConfig((num_tokens, 1, 1), (1, 1, 1))

    def writer(self, num_tokens):
        return lambda *arguments: self.calls.append((num_tokens, *arguments))


class ToyDevice:
    def __init__(self, index):
        self.name = f"toy:{index or 0}"
        self.calls = []

    def describe(self):
        return "a toy"

    def limits_table(self):
        return []

    def operator(self, name, info):
        if name != "paged_caching":
            raise pc.status.NotSupportedError(name, "is not in the toy backend")
        return Opaque(info, self.calls)


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
    assert list(reports)[:2] == ["cpu", "cuda"]
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
    descriptor.calculate(*case.addresses(), stream="mine")
    [call] = descriptor._opaque.calls
    assert call == (9, *case.addresses(), 0, "mine")
    with pytest.raises(ValueError, match="k_cache must have device toy:3 as at create, got cpu"):
        descriptor.calculate(*case.arrays())


def test_two_targets_for_one_type_are_refused(clean):
    pc.register_backend("toy", "toy_backend:Toy")
    for device_type in ("toy", "cpu", "cuda"):
        with pytest.raises(ValueError, match="cannot also be served by another") as caught:
            pc.register_backend(device_type, "toy_backend:Other")
        assert caught.value.status == Status.BAD_PARAM


def test_entry_points(clean, monkeypatch):
    monkeypatch.setattr(registry, "_entry_points", lambda: (("toy", "toy_backend:Toy"),))
    assert pc.Handle("toy:1").device == "toy:1"
    with pytest.raises(ValueError, match="cannot also be served by another"):
        pc.register_backend("toy", "toy_backend:Other")
    several = (("toy", "toy_backend:Toy"), ("toy", "toy_backend:Other"))
    monkeypatch.setattr(registry, "_entry_points", lambda: several)
    with pytest.raises(ValueError, match="must have one backend, but installed packages bring"):
        pc.Handle("toy")
    # The types that nobody disputes still work.
    assert pc.Handle("cpu").device == "cpu"
    assert not pc.backends()["toy"].usable


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

    class Unmade:
        def __init__(self):
            raise OSError("no file")

    sys.modules["toy_backend"].Broken, sys.modules["toy_backend"].Unmade = Broken, Unmade
    pc.register_backend("broken", "toy_backend:Broken")
    pc.register_backend("unmade", "toy_backend:Unmade")
    reports = pc.backends()
    assert reports["broken"].reason == "fails: RuntimeError('no licence')"
    assert "cannot be made: OSError('no file')" in reports["unmade"].reason
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


def test_an_operator_that_a_backend_lacks():
    with pytest.raises(
        NotImplementedError, match=r"'gather' is not in the backend .*cpu"
    ) as caught:
        pc.Handle("cpu").opened().operator("gather", None)
    assert caught.value.status == Status.NOT_IMPLEMENTED


def test_one_call_finds_its_descriptor_again(monkeypatch):
    from pagedcache.interface import one_call as room

    monkeypatch.setattr(room, "_descriptors", {})
    monkeypatch.setattr(room, "_latest", (object(), None, None))
    made = []
    create = pc.Descriptor.create.__func__
    monkeypatch.setattr(
        pc.Descriptor,
        "create",
        classmethod(lambda cls, *a, **o: made.append(1) or create(cls, *a, **o)),
    )
    case = simple_case(tokens=9)
    k_cache, v_cache, k, v, slots = case.arrays()
    pc.paged_caching(k_cache, v_cache, k, v, slots)
    pc.paged_caching(k_cache, v_cache, k, v, slots)
    pc.paged_caching(k_cache, v_cache, k[:4], v[:4], slots[:4])
    assert len(made) == 1
    pc.paged_caching(k_cache, v_cache, k, v, slots.astype(np.int32))
    assert len(made) == 2
    for _ in range(room._MOST_DESCRIPTORS + 5):
        heads = np.zeros((1, 1, 1, len(room._descriptors) + 9), np.float16)
        pc.paged_caching(heads, heads.copy(), heads[0], heads[0], np.array([0]))
    assert len(room._descriptors) <= room._MOST_DESCRIPTORS
