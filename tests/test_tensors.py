"""How arrays are read."""

from __future__ import annotations

import numpy as np
import pytest

from pagedcache import tensors


def test_looks_of_different_libraries_never_compare_equal():
    array = np.zeros((2, 3), np.float16)
    look = tensors._NUMPY.look(array)
    assert look[:3] == (array.shape, array.strides, array.dtype)
    # True equals 1, so a flag must not stand where another library has a device number.
    assert "cpu" in look
    pytest.importorskip("cupy")
    fake = type("Memory", (), {"device_id": 1, "ptr": 64})()
    cupy_like = type("Array", (), {"shape": (2, 3), "strides": (6, 2), "dtype": array.dtype})()
    cupy_like.data = fake
    assert tensors._CUPY.look(cupy_like) != look


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
