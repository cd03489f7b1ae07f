# SPDX-License-Identifier: Apache-2.0
"""Bad input: the right status, type and words, nothing written, and the next good call works."""

from __future__ import annotations

import contextlib
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import expected, forget, same, simple_case
from numpy.lib.stride_tricks import as_strided

import pagedcache as pc
from pagedcache import infiniop
from pagedcache.operators.one_call import MOST_KEPT
from pagedcache.status import Status

NAMES = ("k_cache", "v_cache", "k", "v", "slot_mapping")


def swap(name, change):
    """Return a change of the arguments that replaces one array."""
    return lambda arrays: {**arrays, name: change(arrays[name])}


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def misaligned(array):
    raw = np.zeros(array.nbytes + 1, np.uint8)
    return raw[1:].view(array.dtype).reshape(array.shape)


# (change of good arguments, status, built-in type, words that the message must have)
TENSORS = [
    *[
        (swap(name, lambda a: a.astype(np.float64)), Status.BAD_TENSOR_DTYPE, TypeError,
         [name, "float64"])
        for name in NAMES[:4]
    ],
    *[
        (swap(name, lambda a: a.astype(np.float32)), Status.BAD_TENSOR_DTYPE, TypeError,
         ["must be", "float32"])
        for name in NAMES[:4]
    ],
    *[
        (swap("slot_mapping", lambda a, t=t: a.astype(t)), Status.BAD_TENSOR_DTYPE, TypeError,
         ["slot_mapping", "int64 or int32", np.dtype(t).name])
        for t in (np.uint64, np.uint32, np.int16, np.float32, np.bool_)
    ],
    (swap("k", lambda a: a.astype(">f2")), Status.BAD_TENSOR_DTYPE, TypeError, ["k ", ">f2"]),
    *[
        (swap(name, lambda a: a.reshape(-1)[:1].reshape(())), Status.BAD_TENSOR_SHAPE,
         ValueError, [name, "must have", "ax", "shape ()"])
        for name in NAMES
    ],
    *[
        (swap(name, lambda a: a[None]), Status.BAD_TENSOR_SHAPE, ValueError, [name, "ax", "[num_"])
        for name in NAMES
    ],
    (swap("v_cache", lambda a: a[:-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v_cache", "num_blocks of k_cache, 7"]),
    (swap("v_cache", lambda a: a[:, :-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v_cache", "num_kv_heads of k_cache, 3"]),
    (swap("v_cache", lambda a: a[:, :, :-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v_cache", "block_size of k_cache, 4"]),
    (swap("v_cache", lambda a: a[..., :-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v must have the v_head_size of v_cache, 7"]),
    (swap("k", lambda a: a[:, :-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["k must have the num_kv_heads of k_cache, 3"]),
    (swap("k", lambda a: a[..., :-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["k must have the head_size of k_cache, 8"]),
    (swap("v", lambda a: a[:, :-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v must have the num_kv_heads of k_cache, 3"]),
    (swap("k", lambda a: a[:-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["k must have at least 9 rows, one for each entry of slot_mapping", "8 rows"]),
    (swap("v", lambda a: a[:-1].copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v must have at least 9 rows, one for each entry of slot_mapping", "8 rows"]),
    (swap("k_cache", lambda a: a[:0]), Status.BAD_TENSOR_SHAPE, ValueError,
     ["k_cache", "num_blocks of at least 1"]),
    (swap("k_cache", lambda a: a[..., :0]), Status.BAD_TENSOR_SHAPE, ValueError,
     ["k_cache", "head_size of at least 1"]),
    *[
        (swap(name, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]), Status.BAD_TENSOR_STRIDES,
         ValueError, [name, "stride 1 on its last axis"])
        for name in NAMES
    ],
    *[
        (swap(name, lambda a: a[::-1]), Status.BAD_TENSOR_STRIDES, ValueError, [name, "negative"])
        for name in NAMES[:4]
    ],
    *[
        (swap(name, lambda a: as_strided(a, a.shape, (0, *a.strides[1:]))),
         Status.BAD_TENSOR_STRIDES, ValueError, [name, "overlap itself"])
        for name in NAMES[:2]
    ],
    *[
        (swap(name, lambda a: as_strided(a, a.shape, (a.strides[0] // 2, *a.strides[1:]))),
         Status.BAD_TENSOR_STRIDES, ValueError, [name, "overlap itself"])
        for name in NAMES[:2]
    ],
    *[
        (swap(name, lambda a: a[:, ::-1]), Status.BAD_TENSOR_STRIDES, ValueError,
         [name, "negative"])
        for name in NAMES[:4]
    ],
    *[
        (swap(name, lambda a, t=t: np.zeros(a.shape, t)), Status.BAD_TENSOR_DTYPE, TypeError,
         [f"{name} must be", np.dtype(t).name])
        for name, t in (("k_cache", np.complex64), ("v_cache", np.bool_), ("k", np.int16),
                        ("v", np.uint8), ("v", ml_dtypes.float8_e4m3fn),
                        ("slot_mapping", np.int8), ("slot_mapping", np.uint8))
    ],
    (swap("k_cache", lambda a: a.transpose(0, 2, 1, 3).copy()), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v_cache must have the block_size of k_cache, 4", "layout NHD"]),
    (swap("k_cache", lambda a: a[:, :0]), Status.BAD_TENSOR_SHAPE, ValueError,
     ["k_cache", "num_kv_heads of at least 1"]),
    (swap("v_cache", lambda a: a[:, :, :0]), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v_cache", "block_size of at least 1"]),
    (swap("v", lambda a: a[:0]), Status.BAD_TENSOR_SHAPE, ValueError,
     ["v must have at least 9 rows", "0 rows"]),
]  # fmt: skip

OBJECTS = [
    *[
        (swap(name, lambda a: None), Status.NULL_POINTER, TypeError, [name, "None"])
        for name in NAMES
    ],
    *[
        (swap(name, lambda a: a.tolist()), Status.BAD_PARAM, TypeError, [name, "array", "list"])
        for name in NAMES
    ],
    (swap("k", lambda a: "k"), Status.BAD_PARAM, TypeError, ["k must be", "str"]),
    (swap("k", lambda a: 1.5), Status.BAD_PARAM, TypeError, ["k must be", "float"]),
    *[
        (swap(name, frozen), Status.BAD_PARAM, ValueError, [name, "writable", "read-only"])
        for name in NAMES[:2]
    ],
    *[
        (swap(name, misaligned), Status.BAD_PARAM, ValueError, [name, "multiple of its item size"])
        for name in NAMES
    ],
    (
        lambda arrays: {**arrays, "v_cache": arrays["k_cache"]},
        Status.BAD_PARAM,
        ValueError,
        ["v_cache must not"],
    ),
]


def test_the_table_is_long():
    assert len(TENSORS + OBJECTS) >= 80


def good():
    case = simple_case(dtype="float16")
    return case, dict(zip(NAMES, case.arrays(), strict=True))


def refused(call, status, kind, words):
    with pytest.raises(pc.PagedCacheError) as caught:
        call()
    error = caught.value
    assert error.status == status
    assert isinstance(error, kind)
    for word in words:
        assert word in str(error), str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(("change", "status", "kind", "words"), TENSORS + OBJECTS)
def test_arrays(change, status, kind, words):
    case, arrays = good()
    untouched = case.copy().buffers
    changed = change(arrays)
    before = {
        name: array.copy() for name, array in changed.items() if isinstance(array, np.ndarray)
    }
    refused(lambda: pc.paged_caching(*changed.values()), status, kind, words)
    if (change, status, kind, words) not in OBJECTS:
        refused(lambda: pc.Descriptor.create(*changed.values()), status, kind, words)
    for name, array in before.items():
        assert np.array_equal(array, changed[name], equal_nan=array.dtype.kind == "f")
    same(case, untouched)

    # A descriptor made for the good ones refuses the bad ones too, and then serves the good ones.
    with pc.Descriptor.create(*arrays.values()) as descriptor:
        with pytest.raises(pc.PagedCacheError) as caught:
            descriptor.calculate(*changed.values())
        assert isinstance(caught.value, (TypeError, ValueError))
        same(case, untouched)
        wanted = expected(case)
        descriptor.calculate(*arrays.values())
    same(case, wanted)


@pytest.mark.parametrize("layout", ["hnd", "NDH", "", 0, 3, ["HND"]])
def test_layout(layout):
    _, arrays = good()
    words = ["layout", "HND, NHD", repr(layout)]
    refused(
        lambda: pc.paged_caching(*arrays.values(), layout=layout), Status.BAD_PARAM, ValueError,
        words,
    )  # fmt: skip
    refused(
        lambda: pc.Descriptor.create(*arrays.values(), layout=layout), Status.BAD_PARAM,
        ValueError, words,
    )  # fmt: skip


def test_use_after_destroy():
    case, arrays = good()
    descriptor = pc.Descriptor.create(*arrays.values())
    descriptor.destroy()
    descriptor.destroy()
    for call in (
        lambda: descriptor.calculate(*arrays.values()),
        lambda: descriptor.launch_config(1),
        lambda: descriptor.__enter__(),
    ):
        refused(call, Status.BAD_PARAM, RuntimeError, ["descriptor", "destroy"])
    assert "destroyed" in repr(descriptor)
    handle = pc.Handle("cpu")
    kept = pc.Descriptor.create(*arrays.values(), handle=handle)
    handle.destroy()
    refused(
        lambda: pc.Descriptor.create(*arrays.values(), handle=handle), Status.BAD_PARAM,
        RuntimeError, ["handle", "destroy"],
    )  # fmt: skip
    wanted = expected(case)
    kept.calculate(*arrays.values())
    same(case, wanted)


class NeedsWorkspace:
    """A backend's implementation that wants scratch memory."""

    workspace_size = 64

    def __init__(self):
        self.got = []

    def run(self, *arguments):
        self.got.append(arguments)


def test_workspace():
    _, arrays = good()
    with pc.Descriptor.create(*arrays.values()) as plain:
        info = plain.info
        refused(
            lambda: plain.calculate(*arrays.values(), workspace_size=-1),
            Status.INSUFFICIENT_WORKSPACE, ValueError, ["workspace_size", "at least 0", "-1"],
        )  # fmt: skip
        refused(
            lambda: plain.calculate(*arrays.values(), workspace_size="64"),
            Status.BAD_PARAM, TypeError, ["workspace_size", "int"],
        )  # fmt: skip
    opaque = NeedsWorkspace()
    described = [pc.TensorDescriptor(a.dtype, a.shape) for a in arrays.values()]
    expected = info.rules.expected(dict(zip(NAMES, described, strict=True)))
    kind = type("WithWorkspace", (pc.Descriptor,), {"_implement": lambda *_: opaque})
    descriptor = kind(info, expected, pc.Handle("cpu").opened())
    scratch = np.zeros(64, np.uint8)
    for size in (0, 63):
        refused(
            lambda size=size: descriptor.calculate(
                *arrays.values(), workspace=scratch, workspace_size=size
            ),
            Status.INSUFFICIENT_WORKSPACE, ValueError, ["workspace_size", "64 bytes", str(size)],
        )  # fmt: skip
    refused(
        lambda: descriptor.calculate(*arrays.values(), workspace_size=64),
        Status.NULL_POINTER, ValueError, ["workspace"],
    )  # fmt: skip
    assert opaque.got == []
    descriptor.calculate(*arrays.values(), workspace=scratch, workspace_size=64)
    assert opaque.got == [
        (9, *(a.ctypes.data for a in arrays.values()), 0, 0, 0, scratch.ctypes.data)
    ]
    with pytest.raises(ValueError, match="must not need a workspace"):
        descriptor.bind(*arrays.values())
    status = infiniop.infiniopPagedCaching(
        descriptor, scratch.ctypes.data, 64, *(a.ctypes.data for a in arrays.values()), 0
    )
    assert status == Status.SUCCESS
    assert opaque.got[1] == opaque.got[0]


@pytest.mark.parametrize(
    ("device", "status", "kind", "words"),
    [
        ("tpu", Status.DEVICE_TYPE_NOT_SUPPORTED, ValueError, ["device", "cpu, cuda", "'tpu'"]),
        ("tpu:0", Status.DEVICE_TYPE_NOT_SUPPORTED, ValueError, ["'tpu'"]),
        ("cpu:1", Status.DEVICE_NOT_FOUND, ValueError, ["device", "cpu:1"]),
        ("CUDA", Status.BAD_PARAM, ValueError, ["device", "cuda:0"]),
        ("cuda:-1", Status.BAD_PARAM, ValueError, ["device"]),
        ("", Status.BAD_PARAM, ValueError, ["device"]),
        (0, Status.BAD_PARAM, TypeError, ["device", "str"]),
    ],
)
def test_devices(device, status, kind, words):
    refused(lambda: pc.Handle(device), status, kind, words)


def test_tensors_on_different_devices():
    _, arrays = good()
    described = [
        pc.TensorDescriptor(array.dtype, array.shape, device="cpu") for array in arrays.values()
    ]
    described[2] = pc.TensorDescriptor(arrays["k"].dtype, arrays["k"].shape, device="cuda:0")
    words = ["k must be on cpu like k_cache", "cuda:0"]
    refused(lambda: pc.Descriptor.create(*described), Status.BAD_PARAM, ValueError, words)
    described = [
        pc.TensorDescriptor(array.dtype, array.shape, device="tpu:0") for array in arrays.values()
    ]
    refused(
        lambda: pc.Descriptor.create(*described), Status.DEVICE_TYPE_NOT_SUPPORTED, ValueError,
        ["tpu"],
    )  # fmt: skip
    refused(
        lambda: pc.Descriptor.create(*described, handle=pc.Handle("cpu")), Status.BAD_PARAM,
        ValueError, ["handle", "tpu:0", "cpu"],
    )  # fmt: skip
    refused(
        lambda: pc.Descriptor.create(*arrays.values(), handle="cpu"), Status.BAD_PARAM, TypeError,
        ["handle", "pagedcache.Handle"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "kind"),
    [
        (("no_such_type", (2,)), Status.BAD_TENSOR_DTYPE, TypeError),
        ((None, (2,)), Status.BAD_TENSOR_DTYPE, TypeError),
        (("float16", (2, -1)), Status.BAD_TENSOR_SHAPE, ValueError),
        (("float16", (2**48,)), Status.BAD_TENSOR_SHAPE, ValueError),
        (("float16", (2, 2), (2**63, 1)), Status.BAD_TENSOR_STRIDES, ValueError),
        (("float16", 3), Status.BAD_TENSOR_SHAPE, ValueError),
        (("float16", (2.5,)), Status.BAD_TENSOR_SHAPE, ValueError),
        (("float16", (2, 3), (1,)), Status.BAD_TENSOR_STRIDES, ValueError),
        (("float16", (2, 3), "ab"), Status.BAD_TENSOR_STRIDES, ValueError),
        (("float16", (2, 3), None, 0), Status.BAD_PARAM, TypeError),
    ],
)
def test_tensor_descriptors(arguments, status, kind):
    refused(lambda: pc.TensorDescriptor(*arguments), status, kind, ["must "])


def test_addresses():
    case, arrays = good()
    untouched = case.copy().buffers
    with pc.Descriptor.create(*arrays.values()) as descriptor:
        for position, name in enumerate(NAMES):
            addresses = case.addresses()
            addresses[position] = 0
            refused(partial(descriptor.calculate, *addresses), Status.NULL_POINTER, ValueError,
                    [name, "null"])  # fmt: skip
            addresses[position] = 2**64
            refused(partial(descriptor.calculate, *addresses), Status.BAD_PARAM, ValueError,
                    [name, "below 2**63"])  # fmt: skip
            got = infiniop.infiniopPagedCaching(descriptor, 0, 0, *addresses, 0)
            assert got == Status.BAD_PARAM
            addresses[position] = case.addresses()[position] + 1
            refused(partial(descriptor.calculate, *addresses), Status.BAD_PARAM, ValueError,
                    [name, "multiple"])  # fmt: skip
        same(case, untouched)
        refused(lambda: descriptor.launch_config(-1), Status.BAD_PARAM, ValueError,
                ["num_tokens", "-1"])  # fmt: skip
    refused(lambda: pc.Descriptor.create(*case.addresses()), Status.BAD_PARAM, TypeError,
            ["k_cache", "int"])  # fmt: skip


def kind_of(dtype):
    kinds = {np.dtype(kind): number for number, kind in infiniop._DTYPES.items()}
    return kinds.get(dtype, infiniop.InfiniDtype.F64)  # for a byte order that C has no number for


def through_infiniop(handle, arrays):
    """Describe, create and write, as C would; return the first status that is no success."""
    described, addresses = [], []
    for array in arrays.values():
        if not isinstance(array, np.ndarray):
            return infiniop.infiniopCreatePagedCachingDescriptor(handle, *[array] * 5)[0]
        strides = [step // array.itemsize for step in array.strides]
        ok, tensor = infiniop.infiniopCreateTensorDescriptor(
            array.ndim, array.shape, strides, kind_of(array.dtype)
        )
        assert ok == Status.SUCCESS
        described.append(tensor)
        addresses.append(array.ctypes.data)
    status, descriptor = infiniop.infiniopCreatePagedCachingDescriptor(handle, *described)
    if status != Status.SUCCESS:
        assert descriptor is None
        return status
    return infiniop.infiniopPagedCaching(descriptor, 0, 0, *addresses, 0)


@pytest.mark.parametrize(("change", "status", "kind", "words"), TENSORS + OBJECTS)
def test_infiniop_returns_the_status(change, status, kind, words):
    case, arrays = good()
    untouched = case.copy().buffers
    _, handle = infiniop.infiniopCreateHandle(infiniop.InfiniDevice.CPU, 0)
    changed = change(arrays)
    if "read-only" in words:
        changed = {name: array.copy() for name, array in changed.items()}
        status = Status.SUCCESS  # an address does not tell; it is trusted
    assert through_infiniop(handle, changed) == status
    same(case, untouched)
    wanted = expected(case)
    assert through_infiniop(handle, arrays) == Status.SUCCESS
    same(case, wanted)


def test_infiniop_never_raises():
    create = infiniop.infiniopCreateTensorDescriptor
    assert infiniop.infiniopCreateHandle(99, 0) == (Status.DEVICE_TYPE_NOT_SUPPORTED, None)
    assert infiniop.infiniopCreateHandle("cpu", 0) == (Status.DEVICE_TYPE_NOT_SUPPORTED, None)
    assert infiniop.infiniopCreateHandle(infiniop.InfiniDevice.ASCEND, 0) == (
        Status.DEVICE_TYPE_NOT_SUPPORTED, None,
    )  # fmt: skip
    assert infiniop.infiniopCreateHandle(infiniop.InfiniDevice.CPU, 5) == (
        Status.DEVICE_NOT_FOUND, None,
    )  # fmt: skip
    assert infiniop.infiniopCreateHandle(infiniop.InfiniDevice.CPU, -1) == (Status.BAD_PARAM, None)
    assert infiniop.infiniopDestroyHandle(None) == Status.NULL_POINTER
    assert infiniop.infiniopDestroyHandle(3) == Status.BAD_PARAM
    assert infiniop.infiniopDestroyTensorDescriptor(None) == Status.NULL_POINTER
    assert infiniop.infiniopDestroyPagedCachingDescriptor(None) == Status.NULL_POINTER
    assert infiniop.infiniopGetPagedCachingWorkspaceSize(None) == (Status.NULL_POINTER, None)
    assert create(1, None, None, infiniop.InfiniDtype.F16) == (Status.NULL_POINTER, None)
    assert create(1, (3,), None, 0) == (Status.BAD_TENSOR_DTYPE, None)
    assert create(1, (3,), None, 77) == (Status.BAD_TENSOR_DTYPE, None)
    assert create(2, (3,), None, infiniop.InfiniDtype.F16) == (Status.BAD_TENSOR_SHAPE, None)
    assert create(1, (-3,), None, infiniop.InfiniDtype.F16) == (Status.BAD_TENSOR_SHAPE, None)
    assert create("x", (3,), None, infiniop.InfiniDtype.F16)[0] != Status.SUCCESS
    status, tensor = create(2, (3, 4), (8, 1), infiniop.InfiniDtype.BF16)
    assert status == Status.SUCCESS
    assert (tensor.shape, tensor.strides) == ((3, 4), (8, 1))
    assert tensor.dtype == ml_dtypes.bfloat16
    assert infiniop.infiniopCreatePagedCachingDescriptor(None, *[tensor] * 5) == (
        Status.NULL_POINTER, None,
    )  # fmt: skip
    _, handle = infiniop.infiniopCreateHandle(infiniop.InfiniDevice.CPU, 0)
    assert infiniop.infiniopCreatePagedCachingDescriptor(handle, None, *[tensor] * 4) == (
        Status.NULL_POINTER, None,
    )  # fmt: skip
    assert infiniop.infiniopPagedCaching(None, 0, 0, 1, 1, 1, 1, 1, 0) == Status.NULL_POINTER

    case, arrays = good()
    untouched = case.copy().buffers
    descriptor = pc.Descriptor.create(*arrays.values())
    for position in range(5):
        for nothing in (0, None):
            addresses = case.addresses()
            addresses[position] = nothing
            got = infiniop.infiniopPagedCaching(descriptor, 0, 0, *addresses, 0)
            assert got == Status.NULL_POINTER
        addresses[position] = arrays["k"]
        got = infiniop.infiniopPagedCaching(descriptor, 0, 0, *addresses, 0)
        assert got == Status.BAD_PARAM
    got = infiniop.infiniopPagedCaching(descriptor, 0, -1, *case.addresses(), 0)
    assert got == Status.INSUFFICIENT_WORKSPACE
    same(case, untouched)
    wanted = expected(case)
    assert infiniop.infiniopPagedCaching(descriptor, 0, 0, *case.addresses(), 0) == Status.SUCCESS
    same(case, wanted)


JUNK = [
    None, 0, 1, -1, 2**64, -(2**70), 1.5, "x", b"y", [], (), {}, object(), np.int64(3), True,
    float("nan"), [1, 2], np.zeros(3), np.array(5), len, pc.TensorDescriptor("float16", (2,)),
]  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.data())
def test_junk_gets_a_status_or_an_error_of_ours(data):
    junk = st.sampled_from(JUNK)
    functions = [name for name in vars(infiniop) if name.startswith("infiniop")]
    function = getattr(infiniop, data.draw(st.sampled_from(sorted(functions))))
    arguments = [data.draw(junk) for _ in inspect.signature(function).parameters]
    result = function(*arguments)
    status = result[0] if isinstance(result, tuple) else result
    assert isinstance(status, Status)
    assert status != Status.INTERNAL_ERROR

    _, arrays = good()
    options = {name: data.draw(junk) for name in ("workspace", "workspace_size")}
    position, value = data.draw(st.integers(0, 4)), data.draw(junk)
    replaced = list(arrays.values())
    replaced[position] = value
    five = [data.draw(junk) for _ in range(5)]
    with pc.Descriptor.create(*arrays.values()) as descriptor:
        for call in (
            lambda: pc.paged_caching(*five, layout=data.draw(junk)),
            lambda: pc.paged_caching(*replaced),
            lambda: pc.Descriptor.create(*replaced, handle=data.draw(junk)),
            lambda: descriptor.launch_config(value),
            lambda: pc.Handle(value),
            lambda: pc.register_backend(value, value),
            lambda: pc.TensorDescriptor(value, value, value, value),
            lambda: pc.TensorDescriptor("float16", (2, 3), value),
        ):
            with contextlib.suppress(pc.PagedCacheError):
                call()
        if not isinstance(options["workspace"], int):  # which would be an address, and trusted
            with contextlib.suppress(pc.PagedCacheError):
                descriptor.calculate(*arrays.values(), **options)
        if type(value) is not int:
            with pytest.raises(pc.PagedCacheError):
                descriptor.calculate(*replaced)


class Unhashable(str):
    __hash__ = None


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("value", [np.array(["HND", "HND"]), np.array(["HND"]), Unhashable("XND"),
                                   mock.ANY, b"HND"])  # fmt: skip
@pytest.mark.parametrize("option", ["layout", "on_invalid"])
def test_options_of_any_type(option, value, warm):
    case, arrays = good()
    if warm:
        pc.paged_caching(*arrays.values())
    untouched = case.copy().buffers
    for call in (pc.paged_caching, pc.Descriptor.create):
        with pytest.raises(pc.PagedCacheError, match=f"{option} must be one of"):
            call(*arrays.values(), **{option: value})
    same(case, untouched)


def test_strings_of_other_kinds_are_strings():
    case, arrays = good()
    wanted = expected(case)
    pc.paged_caching(*arrays.values(), layout=np.str_("HND"), on_invalid=np.str_("skip"))
    same(case, wanted)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: pc.Handle("cpu:" + "9" * 5000), ValueError),
        (lambda: pc.TensorDescriptor({"names": ["a"], "formats": []}, (1,)), TypeError),
        (lambda: pc.TensorDescriptor(("f4", -1), (1,)), TypeError),
        (lambda: pc.TensorDescriptor("f2,(", (1,)), TypeError),
        (lambda: pc.TensorDescriptor("\ud800", (1,)), TypeError),
        (lambda: pc.TensorDescriptor("f2", (1 // n for n in (1, 0))), ValueError),
        (lambda: pc.TensorDescriptor("f2", (2**40, 2**10)), ValueError),
        (lambda: pc.TensorDescriptor("f2", (2**20, 8), (2**47, 1)), ValueError),
        (lambda: pc.warmup("cpu", dtypes=5), TypeError),
        (lambda: pc.warmup("cpu", slot_dtypes=None), TypeError),
    ],
    ids=map(str, range(10)),
)
def test_odd_arguments(call, kind):
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, pc.PagedCacheError)


def test_explain_of_odd_slot_mappings():
    _, arrays = good()
    with pc.Descriptor.create(*arrays.values()) as descriptor:
        for odd in (5, np.array(5), ["a"], [1.7], {1: 2}, np.zeros((2, 2), int)):
            with pytest.raises(TypeError, match="slot_mapping must be a sequence of ints"):
                descriptor.explain(0, odd)
    with pytest.raises(RuntimeError, match="destroy"):
        descriptor.explain(0)


def test_a_head_past_2_gib_is_refused_on_the_cpu():
    cache, row = (pc.TensorDescriptor("f2", shape) for shape in ((2, 1, 2, 2**30), (1, 1, 2**30)))
    slots = pc.TensorDescriptor("int64", (1,))
    with pytest.raises(NotImplementedError, match="bytes of K or V in a head") as caught:
        pc.Descriptor.create(cache, cache, row, row, slots, handle=pc.Handle("cpu"))
    assert caught.value.status == Status.NOT_IMPLEMENTED


def test_a_block_past_the_range_of_its_slots():
    cache = pc.TensorDescriptor("f2", (1, 1, 2**31, 1))
    row, slots = pc.TensorDescriptor("f2", (2, 1, 1)), pc.TensorDescriptor("int32", (2,))
    k_cache, v_cache = np.zeros((2, 6), np.float16)
    k, where = np.ones(2, np.float16), np.array([0, 5], np.int32)
    with pc.Descriptor.create(cache, cache, row, row, slots, handle=pc.Handle("cpu")) as descriptor:
        # Far apart, as caches of that size would be, but only their first bytes are there.
        descriptor._arguments.apart[0, 1] = {v_cache.ctypes.data - k_cache.ctypes.data: 1 << 62}
        descriptor._write_at(*(array.ctypes.data for array in (k_cache, v_cache, k, k, where)))
    assert k_cache.tolist() == v_cache.tolist() == [1, 0, 0, 0, 0, 1]


def test_threads_that_all_need_new_descriptors(monkeypatch):
    errors, kept = [], forget(monkeypatch)

    def write(first):
        try:
            for size in range(first, first + 60):
                cache = np.zeros((1, 1, 1, size), np.float16)
                row = np.ones((1, 1, size), np.float16)
                pc.paged_caching(cache, cache.copy(), row, row, np.array([0]))
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, range(1000, 1480, 60)))
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert len(kept._kept) <= MOST_KEPT


class Unreadable:
    """Has no repr, as an array whose memory is gone has none."""

    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize("odd", [10**5000, -(10**5000), Unreadable()], ids=["huge", "low", "odd"])
def test_what_cannot_be_shown_is_named_by_its_type(odd):
    _, arrays = good()
    five = arrays.values()
    with pc.Descriptor.create(*five) as descriptor:
        for call in (
            lambda: pc.Descriptor.create(*five, layout=odd),
            lambda: pc.Descriptor.create(*five, on_invalid=odd),
            lambda: pc.Descriptor.create(*five, debug=odd),
            lambda: pc.Descriptor.create(*five, handle=odd),
            lambda: pc.Handle(odd),
            lambda: descriptor.explain(odd),
            lambda: descriptor.launch_config(odd if odd != 10**5000 else -odd),
            lambda: descriptor.calculate(*five, workspace_size=odd if odd != 10**5000 else -odd),
        ):
            with pytest.raises(pc.PagedCacheError) as caught:
                call()
            assert f"got a {type(odd).__name__}" in str(caught.value)


def test_an_option_may_be_a_member_of_an_enum():
    import enum

    class Layout(str, enum.Enum):
        HND = "HND"

    class Skip(str, enum.Enum):
        skip = "skip"

    _, arrays = good()
    with pc.Descriptor.create(
        *arrays.values(), layout=Layout.HND, on_invalid=Skip.skip
    ) as descriptor:
        assert type(descriptor.info.layout) is str
        descriptor.calculate(*arrays.values())
    pretends = type("Pretends", (str,), {"__str__": lambda self: "HND"})("foo")
    with pytest.raises(ValueError, match="layout must be one of HND, NHD"):
        pc.Descriptor.create(*arrays.values(), layout=pretends)


def test_a_call_that_destroys_what_it_runs_is_the_last():
    """As another thread may, between the run and what is remembered of it."""
    case = simple_case()
    descriptor = pc.Descriptor.create(*case.arrays())

    def match(*_):
        descriptor.destroy()
        return True

    descriptor.matchers[np.ndarray] = match
    descriptor.calculate(*case.arrays())
    for _ in range(2):
        with pytest.raises(ValueError, match="descriptor has been destroyed"):
            descriptor.calculate(*case.arrays())


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [((576, 512), (261128, 52224, 1088, 1)), ((96, 64), (160, 23048456, 480176, 1))],
    ids=["blocks padded", "blocks innermost"],
)
def test_k_and_v_side_by_side_do_not_overlap(sizes, strides):
    from pagedcache.tensors import overlap, overlaps_itself, view

    steps = tuple(2 * step for step in strides)
    start = 1 << 20  # nothing is read
    k, v, shifted = (
        view(at, np.dtype(np.int16), (3001, 5, 48, size), steps)
        for at, size in (
            (start, sizes[0]), (start + 2 * sizes[0], sizes[1]), (start + 2, sizes[1])
        )
    )  # fmt: skip
    assert not (overlaps_itself(k))
    assert not (overlaps_itself(v))
    assert not (overlap(k, v))
    assert overlap(k, shifted)


def test_infiniop_gives_the_same_status_after_a_good_call():
    from pagedcache import infiniop

    case = simple_case()
    arrays = case.arrays()
    addresses = [array.ctypes.data for array in arrays]
    write = infiniop.infiniopPagedCaching
    with pc.Descriptor.create(*arrays, handle=pc.Handle("cpu")) as descriptor:
        for _ in range(2):
            assert write(descriptor, "garbage", 0, *addresses, 0) == Status.BAD_PARAM
            assert write(descriptor, 0, 0, *addresses, "stream") == Status.BAD_PARAM
            assert write(descriptor, 0, 0, *arrays, 0) == Status.BAD_PARAM
            assert write(descriptor, 0, 0, *addresses, 0) == Status.SUCCESS
            assert write(descriptor, None, 0, *addresses, None) == Status.SUCCESS
            descriptor.calculate(*arrays)


class RaisingIndex:
    def __index__(self):
        raise ZeroDivisionError


def test_odd_values_get_our_errors():
    case = simple_case()
    with pc.Descriptor.create(*case.arrays()) as descriptor:
        with pytest.raises(pc.PagedCacheError, match="slot_or_token must be an int"):
            descriptor.explain(RaisingIndex())
        with pytest.raises(pc.PagedCacheError, match="slot_or_token must be one of the 2 tokens"):
            descriptor.explain(10**5000, [1, 2])
    with pytest.raises(pc.PagedCacheError, match="k_cache must be a TensorDescriptor, got None"):
        pc.PagedCachingInfo.create(None, None, None, None, None)


def test_distances_that_are_remembered_are_bounded(monkeypatch):
    from pagedcache.operators import arguments

    monkeypatch.setattr(arguments, "MOST_APART", 3)
    memory = np.zeros((9, 2, 1, 2, 4), np.float32)
    row, slots = np.ones((1, 1, 4), np.float32), np.array([1])
    with pc.Descriptor.create(*memory[:2], row, row, slots) as descriptor:
        for far in range(1, 9):
            descriptor.calculate(memory[0], memory[far], row, row, slots)
            assert len(descriptor._arguments.apart[0, 1]) <= 3
    assert (memory[1:, 0, 0, 1] == 1).all()


def test_numbers_of_c():
    """Those of infinicore.h, on which programs in other languages rely."""
    assert {status.name: int(status) for status in Status} == {
        "SUCCESS": 0, "INTERNAL_ERROR": 1, "NOT_IMPLEMENTED": 2, "BAD_PARAM": 3, "NULL_POINTER": 4,
        "DEVICE_TYPE_NOT_SUPPORTED": 5, "DEVICE_NOT_FOUND": 6, "DEVICE_NOT_INITIALIZED": 7,
        "DEVICE_ARCHITECTURE_NOT_SUPPORTED": 8, "BAD_TENSOR_DTYPE": 10, "BAD_TENSOR_SHAPE": 11,
        "BAD_TENSOR_STRIDES": 12, "INSUFFICIENT_WORKSPACE": 13,
    }  # fmt: skip
    dtypes = {"F16": 12, "F32": 13, "BF16": 19, "I32": 5, "I64": 6, "F64": 14, "BOOL": 2}
    assert {name: int(infiniop.InfiniDtype[name]) for name in dtypes} == dtypes
    assert (int(infiniop.InfiniDevice.CPU), int(infiniop.InfiniDevice.NVIDIA)) == (0, 1)
    for number, name in ((12, "float16"), (13, "float32"), (19, "bfloat16"), (5, "int32")):
        status, tensor = infiniop.infiniopCreateTensorDescriptor(1, (3,), None, number)
        assert (status, tensor.dtype.name) == (Status.SUCCESS, name)
