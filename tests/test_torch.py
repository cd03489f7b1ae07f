# SPDX-License-Identifier: Apache-2.0
"""The operator as torch sees it, and tensors in and out of compiled code."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest
from layouts import expected, same, simple_case
from test_arrays import torch_view

import pagedcache as pc

torch = pytest.importorskip("torch")

# PyTorch raises these itself when it discards compiled code.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def op():
    import pagedcache.torch

    return pagedcache.torch.paged_caching


@pytest.fixture(autouse=True, scope="module")
def forget_what_was_compiled():
    yield
    torch._dynamo.reset()


def tensors(case):
    return [torch_view(view) for view in case.arrays()]


def test_writes(op):
    for layout in ("HND", "NHD"):
        case = simple_case(layout=layout)
        wanted = expected(case)
        assert op(*tensors(case), layout) is None
        same(case, wanted)
        op(*tensors(case), layout=layout, on_invalid="raise")
    case.views["slot_mapping"][3] = 28
    with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[3\] = 28"):
        op(*tensors(case), layout="NHD", on_invalid="raise")


@pytest.mark.parametrize("mode", ["inference_mode", "no_grad"])
def test_where_nothing_is_recorded(op, mode):
    case = simple_case(dtype="float32")
    wanted = expected(case)
    with getattr(torch, mode)():
        op(*tensors(case))
    same(case, wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", ["int32", "int64"])
def test_opcheck(op, dtype, slots):
    case = simple_case(dtype=dtype, slots=slots)
    for name in ("k", "v", "k_cache", "v_cache"):
        case.views[name][...] = 1  # opcheck compares, and NaN is not equal to itself
    passed = torch.library.opcheck(op, tuple(tensors(case)))
    assert set(passed.values()) == {"SUCCESS"}
    assert len(passed) >= 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_whole(op, backend):
    case = simple_case(dtype="float32")
    for name in ("k", "v", "k_cache", "v_cache"):
        case.views[name][...] = len(name)
    wanted = expected(case)

    @torch.compile(fullgraph=True, backend=backend)
    def step(stacked, k, v, slots):
        op(stacked[0], stacked[1], k + 0, v, slots)
        return stacked.sum()

    k_cache, v_cache, k, v, slots = tensors(case)
    stacked = torch.stack([k_cache, v_cache])
    assert torch.equal(step(stacked, k, v, slots), stacked.sum())
    case.views["k_cache"][...], case.views["v_cache"][...] = stacked.numpy()
    same(case, wanted)


def test_autograd_notices_an_overwritten_cache(op):
    case = simple_case(dtype="float32")
    k_cache, v_cache, k, v, slots = tensors(case)
    versions = k_cache._version, v_cache._version
    x = torch.ones_like(k_cache, requires_grad=True)
    product = (x * k_cache).sum()
    op(k_cache, v_cache, k, v, slots)
    assert k_cache._version > versions[0]
    assert v_cache._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_write_that_raises_is_noticed_by_autograd_too(op):
    case = simple_case(dtype="float32", blocks=1, block_size=4)
    case.views["slot_mapping"][:] = range(9)
    k_cache, v_cache, k, v, slots = tensors(case)
    product = (torch.ones_like(k_cache, requires_grad=True) * k_cache).sum()
    with pytest.raises(pc.InvalidSlotError):
        op(k_cache, v_cache, k, v, slots, on_invalid="raise")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_a_tensor_without_memory_among_others_is_refused(op):
    case = simple_case(dtype="float32")
    before = case.copy().buffers
    for position in range(5):
        mixed = tensors(case)
        mixed[position] = mixed[position].to("meta")
        with pytest.raises(ValueError, match="must be on one device, got cpu and meta"):
            op(*mixed)
    same(case, before)
    assert op(*(tensor.to("meta") for tensor in tensors(case))) is None


def test_a_nested_tensor_is_refused():
    case = simple_case(dtype="float32")
    five, wanted = tensors(case), expected(case)
    nested = torch.nested.nested_tensor([torch.ones(1, 8)])
    with pc.Descriptor.create(*five) as descriptor:
        for _ in range(2):  # matched, the second time
            for call in (descriptor.calculate, pc.paged_caching):
                call(*five)
                for position in range(5):
                    mixed = list(five)
                    mixed[position] = nested
                    with pytest.raises(TypeError, match="memory that can be read"):
                        call(*mixed)
    same(case, wanted)


def test_exports(op):
    class Step(torch.nn.Module):
        def forward(self, k_cache, v_cache, k, v, slots):
            op(k_cache, v_cache, k, v, slots)
            return k_cache[0]

    case = simple_case(dtype="float32")
    wanted = expected(case)
    program = torch.export.export(Step(), tuple(tensors(case)))
    assert "pagedcache.paged_caching" in str(program.graph)
    program.module()(*tensors(case))
    same(case, wanted)


def test_the_docstring():
    import pagedcache.torch

    assert doctest.testmod(pagedcache.torch).failed == 0


def test_is_imported_only_when_asked_for():
    program = "import sys, pagedcache, pagedcache.compat.vllm; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def write_ways(tensors):
    """Return every way to write these tensors, each used twice: with a full check, and matched."""
    descriptor = pc.Descriptor.create(*tensors)
    return [
        descriptor.calculate, descriptor.calculate, pc.paged_caching, pc.paged_caching,
        lambda *arrays: descriptor.bind(*arrays)(),
    ]  # fmt: skip


@pytest.mark.parametrize("private", [True, False])
def test_all_writes_tell_autograd(private, monkeypatch):
    """A gradient that needs the overwritten values is refused, not computed from the new ones."""
    if not private:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    case = simple_case(dtype="float32")
    arrays = tensors(case)
    for write in write_ways(arrays):
        versions = [array._version for array in arrays]
        x = torch.ones_like(arrays[0], requires_grad=True)
        y = torch.ones_like(arrays[1], requires_grad=True)
        products = (x * arrays[0]).sum(), (y * arrays[1]).sum()
        write(*arrays)
        bumped = [array._version - before for array, before in zip(arrays, versions, strict=True)]
        assert bumped == [1, 1, 0, 0, 0]
        for product in products:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("position", [0, 1])
def test_a_cache_that_requires_grad_is_refused(private, position, monkeypatch):
    if not private:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    case = simple_case(dtype="float32")
    for view in ("k", "v", "k_cache", "v_cache"):
        case.views[view][...] = len(view)
    arrays = tensors(case)
    name = ("k_cache", "v_cache")[position]
    leaf = list(arrays)
    leaf[position] = arrays[position].clone().requires_grad_()
    result = list(arrays)
    result[position] = leaf[position] * 1  # not a leaf; the write would have no gradient
    for write in write_ways(arrays):
        for bad in (leaf, result):
            before = bad[position].detach().clone()
            for _ in range(2):
                with pytest.raises(RuntimeError, match=f"{name} must not require grad") as caught:
                    write(*bad)
                assert isinstance(caught.value, pc.RequiresGradError)
                assert caught.value.status == pc.Status.BAD_PARAM
                assert torch.equal(before, bad[position])
                with torch.no_grad():
                    for _ in range(2):
                        write(*bad)
                with torch.inference_mode():
                    write(*bad)
                bad[position].data.copy_(before)
            write(*arrays)
    bound = pc.Descriptor.create(*arrays)
    with torch.no_grad():
        bound = bound.bind(*leaf)
        bound()
    with pytest.raises(pc.RequiresGradError, match=name):
        bound()


def test_sources_may_require_grad():
    case = simple_case(dtype="float32")
    wanted = expected(case)
    arrays = tensors(case)
    arrays[2], arrays[3] = arrays[2].requires_grad_(), arrays[3].requires_grad_() * 1
    for write in write_ways(arrays):
        write(*arrays)
    same(case, wanted)
    assert not arrays[0].requires_grad


def test_inference_tensors_are_written():
    """They have no version, and autograd never keeps them."""
    case = simple_case(dtype="float32")
    wanted = expected(case)
    with torch.inference_mode():
        inside = [array.clone() for array in tensors(case)]
        for write in write_ways(inside):
            write(*inside)
    for write in write_ways(inside):
        write(*inside)
    for name, array in zip(("k_cache", "v_cache"), inside, strict=False):
        case.views[name][...] = array.numpy()
    same(case, wanted)


@pytest.mark.parametrize("private", [True, False], ids=["guards", "public functions"])
def test_after_inference_tensors_others_are_noticed(monkeypatch, private):
    if not private:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    normal = tensors(simple_case(dtype="float32"))
    with torch.inference_mode():
        inside = [array.clone() for array in normal]
    with pc.Descriptor.create(*inside) as descriptor:
        for _ in range(2):
            descriptor.calculate(*inside)
        for written in (1, 2):
            descriptor.calculate(*normal)
            assert [array._version for array in normal] == [written, written, 0, 0, 0]


@pytest.mark.parametrize("private", [True, False], ids=["guards", "public functions"])
def test_inference_mode_hides_no_write(monkeypatch, private):
    if not private:
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    normal = tensors(simple_case(dtype="float32"))
    with torch.inference_mode():
        inside = [array.clone() for array in normal]
    with pc.Descriptor.create(*inside) as descriptor:
        descriptor.calculate(*inside)  # outside of the mode
        with torch.inference_mode():
            descriptor.calculate(*normal)
            descriptor.calculate(*inside)
        descriptor.calculate(*inside)
    assert [array._version for array in normal] == [1, 1, 0, 0, 0]


def test_the_operator_refuses_a_leaf_too(op):
    case = simple_case(dtype="float32")
    arrays = tensors(case)
    arrays[0].requires_grad_()
    with pytest.raises(RuntimeError):
        op(*arrays)
    with torch.no_grad():
        op(*arrays)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("computed", [False, True])
def test_formats(op, backend, computed):
    """A write in a format and its gather, also compiled, with scales that are read or written."""
    import pagedcache.torch

    def step(cache, other, scale, rows, slots):
        out = torch.zeros_like(rows)
        op(cache, other, rows * 2, rows, slots, "NHD", k_scale=scale, v_scale=scale + 1)
        pagedcache.torch.paged_gather(cache, None, slots, out, None, "NHD", k_scale=scale)
        return out

    rows = torch.randn(6, 3, 8)
    slots = torch.tensor([5, 1, 19, 7, 0, 2])
    cache = torch.zeros(5, 4, 3, 8, dtype=torch.int8)
    other = torch.zeros_like(cache)
    scale = torch.full((5, 4, 3) if computed else (1,), 0.05)
    if backend:
        step = torch.compile(step, fullgraph=True, backend=backend)
    out = step(cache, other, scale, rows, slots)
    largest = (rows * 2).abs().amax(-1, keepdim=True)
    unit = largest / 127 if computed else torch.tensor(0.05)
    wanted = torch.where(largest > 127 * unit, out, rows * 2)
    assert ((out - wanted).abs() <= unit * 0.51).all()
    flat = cache.reshape(20, 3, 8)
    assert flat[slots].any()
    untouched = [slot for slot in range(20) if slot not in slots]
    assert not flat[untouched].any()
    if computed:
        assert torch.allclose(scale.reshape(20, 3)[slots], unit[..., 0])
        assert (scale.reshape(20, 3)[untouched] == 0.05).all()


def test_opcheck_in_a_format(op):
    import pagedcache.torch

    cache = torch.zeros(5, 4, 3, 8, dtype=torch.int8)
    rows, slots, scale = torch.ones(6, 3, 8), torch.arange(6), torch.ones(5, 4, 3)
    for operator, arguments in (
        (op, (cache, cache.clone(), rows, rows, slots)),
        (pagedcache.torch.paged_gather, (cache, cache.clone(), slots, rows, rows.clone())),
    ):
        more = {"layout": "NHD", "k_scale": scale, "v_scale": scale.clone()}
        passed = torch.library.opcheck(operator, arguments, more)
        assert set(passed.values()) == {"SUCCESS"}


def test_tensors_past_their_memory_are_refused(op):
    """As inductor makes them where code takes a slice and then views it in another dtype."""
    import pagedcache.torch

    cache, other = (torch.zeros(5, 4, 3, 8) for _ in "kv")
    rows, slots = torch.ones(6, 3, 8), torch.arange(6)
    op(cache, other, rows, rows, slots, "NHD")
    other.untyped_storage().resize_(5 * 4 * 3 * 8 * 4 - 1)
    for call in (
        lambda: op(cache, other, rows, rows, slots, "NHD"),
        lambda: pagedcache.torch.paged_gather(other, None, slots, rows, None, "NHD"),
    ):
        with pytest.raises(pc.PagedCacheError, match="must not reach past its memory"):
            call()
    assert (cache.reshape(20, 3, 8)[:6] == 1).all()
