"""How arrays are read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pagedcache import tensors


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
    cupy, numpy = tensors._cupy_reader(fake), tensors._NUMPY
    # True equals 1, so a flag must not stand where another library has a device number.
    assert cupy.look(theirs) != numpy.look(array)
    for reader, array_of_another in ((cupy, array), (numpy, theirs)):
        with pytest.raises((AttributeError, ValueError)):
            reader.look(array_of_another), reader.address(array_of_another)
    elsewhere = fake.ndarray(array, 0)
    assert (cupy.look(theirs) == cupy.look(elsewhere)) == (devices == 1)


def test_the_one_call_form_tells_libraries_apart(monkeypatch):
    # A CuPy array of the same look, on the only GPU there is, right after NumPy's.
    import sys

    import pagedcache as pc
    from pagedcache.interface import descriptor

    monkeypatch.setattr(descriptor, "_latest", (None,) * 4)
    fake = FakeCupy(1)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(tensors, "readers", dict(tensors.readers))
    monkeypatch.setattr(descriptor, "readers", tensors.readers)
    cache = np.zeros((4, 1, 2, 8), np.float16)
    rows, slots = np.ones((3, 1, 8), np.float16), np.arange(3)
    arrays = [cache, cache.copy(), rows, rows, slots]
    pc.paged_caching(*arrays)
    for position in range(5):
        mixed = list(arrays)
        mixed[position] = fake.ndarray(mixed[position], 0)
        with pytest.raises(ValueError, match="must be on c"):
            pc.paged_caching(*mixed)


def test_a_look_sees_everything_but_the_address():
    look = tensors._NUMPY.look
    array = np.zeros((2, 3, 4), np.float16)
    assert look(array) == look(array.copy())
    frozen = array.copy()
    frozen.flags.writeable = False
    for other in (
        array[:1],
        array.astype(np.int16),
        array.transpose(1, 0, 2),
        array[..., :2],
        frozen,
    ):
        assert look(other) != look(array)


def test_adopt_reads_without_a_copy():
    array = np.arange(24, dtype=np.int32).reshape(2, 3, 4)[:, ::2, 1:]
    tensor = tensors.adopt("k", array)
    assert tensor == (array.ctypes.data, array.dtype, (2, 2, 3), (48, 32, 4), "cpu", True)
    described = tensor.describe("k")
    assert (described.shape, described.strides, described.device) == ((2, 2, 3), (12, 8, 1), "cpu")


def test_subclasses_of_an_array_are_arrays():
    class Mine(np.ndarray):
        pass

    array = np.zeros(3).view(Mine)
    assert tensors.adopt("k", array).shape == (3,)
    assert tensors.readers[Mine] is tensors._NUMPY
