# SPDX-License-Identifier: Apache-2.0
"""Kernels with steps as operators of torch, in and out of compiled code."""

from __future__ import annotations

import gc
import itertools
import shutil

import pytest

import pagedcache as pc
from pagedcache.status import BadParamError

torch = pytest.importorskip("torch")

# PyTorch raises these itself when it discards compiled code.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HEADS, Q_HEADS, SIZE = 2, 4, 16
BLOCKS, BLOCK_SIZE = 5, 4
NUMBERS = {"factor": float, "count": int, "flag": bool}
BACKENDS = [
    "eager",
    "aot_eager",
    pytest.param(
        "inductor",
        marks=pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ here"),
    ),
]
new_name = map("pagedcache_tests::op{}".format, itertools.count()).__next__


@pytest.fixture(autouse=True)
def forget_what_was_compiled():
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def operator():
    import pagedcache.torch

    return pagedcache.torch.operator


def write_kernel(**options):
    rope = pc.rope("cos_sin", "positions")
    return pc.WriteKernel(
        q=[pc.rms_norm("weight", 1e-6), rope],
        k=["x * factor + count", rope],
        v=["-x if flag else x"],
        **options,
    )


def model(tokens, seed=0):
    """Return what a layer has: caches, the rows of q, K and V in one tensor, and parameters."""
    made = torch.Generator().manual_seed(seed + tokens)
    heads = Q_HEADS + 2 * HEADS
    slots = torch.randperm(BLOCKS * BLOCK_SIZE, generator=made)[:tokens]
    slots[1] = -1
    return {
        "caches": torch.full((2, BLOCKS, BLOCK_SIZE, HEADS, SIZE), 7.0),
        "rows": torch.randn(tokens, heads, SIZE, generator=made),
        "slots": slots,
        "weight": torch.randn(SIZE, generator=made),
        "cos_sin": torch.randn(50, SIZE, generator=made),
        "positions": torch.randint(50, (tokens,), generator=made),
    }


def in_place(store, m, factor=0.5, count=3, flag=True):
    """Write, with q, K and V in place, in rows that the code has made."""
    rows = m["rows"] * 2
    before = rows.view(-1)
    k, v = rows[:, Q_HEADS:-HEADS], rows[:, -HEADS:]
    store(
        m["caches"][0], m["caches"][1], k, v, m["slots"], q=rows[:, :Q_HEADS],
        q_out=rows[:, :Q_HEADS], k_out=k, v_out=v, weight=m["weight"], cos_sin=m["cos_sin"],
        positions=m["positions"], factor=factor, count=count, flag=flag,
    )  # fmt: skip
    return rows + 0, before + 0


def in_place_in_inputs(store, m, factor=0.5, count=3, flag=True):
    """Write, with q in place, in rows that the code is given."""
    q, k, v = m["rows"].split((Q_HEADS, HEADS, HEADS), 1)
    store(
        m["caches"][0], m["caches"][1], k, v, m["slots"], q=q, q_out=q, weight=m["weight"],
        cos_sin=m["cos_sin"], positions=m["positions"], factor=factor, count=count, flag=flag,
    )  # fmt: skip
    return (q.amax(),)


def elsewhere(store, m, factor=0.5, count=3, flag=True):
    """Write, with q as bfloat16 in a tensor that the code has made."""
    q, k, v = m["rows"].split((Q_HEADS, HEADS, HEADS), 1)
    q_out = torch.full_like(q, 9, dtype=torch.bfloat16)
    store(
        m["caches"][0], m["caches"][1], k, v, m["slots"], q=q, q_out=q_out, weight=m["weight"],
        cos_sin=m["cos_sin"], positions=m["positions"], factor=factor, count=count, flag=flag,
    )  # fmt: skip
    return q_out, q


def agree(step, compiled, kernel, store, tokens, **numbers):
    """Compare all that a step leaves and returns with that of direct calls of the kernel."""
    direct, found = model(tokens), model(tokens)
    wanted = step(kernel, direct, **numbers)
    returned = compiled(store, found, **numbers)
    assert (direct["caches"] != 7).any()
    for name, tensor in direct.items():
        assert torch.equal(tensor, found[name]), name
    for one, other in zip(wanted, returned, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("step", [in_place, in_place_in_inputs, elsewhere])
def test_eager(operator, step):
    kernel = write_kernel()
    store = operator(kernel, new_name(), numbers=NUMBERS)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            for flag in (True, False):
                agree(step, step, kernel, store, 9, flag=flag)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [in_place, in_place_in_inputs, elsewhere])
def test_compiles_whole(operator, backend, step):
    kernel = write_kernel()
    store = operator(kernel, new_name(), numbers=NUMBERS)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    agree(step, compiled, kernel, store, 9)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_numbers_of_tokens_and_ints_compile_nothing(operator, backend):
    kernel = write_kernel()
    store = operator(kernel, new_name(), numbers=NUMBERS)
    made = []

    def counting(graph, examples):
        made.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, examples)

    compiled = torch.compile(in_place, fullgraph=True, backend=counting, dynamic=True)
    agree(in_place, compiled, kernel, store, 7, count=3)
    first = len(made)
    for tokens, count in ((9, 4), (13, -5), (19, 2**40)):
        agree(in_place, compiled, kernel, store, tokens, count=count)
    assert len(made) == first
    for factor in (0.25, 1.5):  # one each may be compiled
        agree(in_place, compiled, kernel, store, 9, factor=factor)
    agree(in_place, compiled, kernel, store, 9, flag=False)


def test_a_number_may_be_a_tensor_without_axes(operator):
    kernel = pc.WriteKernel(k=["x * factor"])
    store = operator(kernel, new_name())

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(caches, k, v, slots, factor):
        store(caches[0], caches[1], k, v, slots, factor=factor + 1)

    for factor in (0.5, 3.0):
        caches = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, SIZE)
        k = torch.randn(6, HEADS, SIZE)
        step(caches, k, k, torch.arange(6), torch.tensor(factor))
        assert torch.equal(caches[0].flatten(0, 1)[:6], k * (factor + 1))
        assert torch.equal(caches[1].flatten(0, 1)[:6], k)


@pytest.mark.parametrize("twice", [True, False])
def test_opcheck(operator, twice):
    store = operator(write_kernel(), new_name(), numbers=NUMBERS)
    m = model(9)
    q, k, v = (each.clone() for each in m["rows"].split((Q_HEADS, HEADS, HEADS), 1))
    parameters = {name: m[name] for name in ("weight", "cos_sin", "positions")}
    named = {"q": q, "q_out": q if twice else q.clone(), "factor": 0.5, "count": 3, "flag": True}
    passed = torch.library.opcheck(
        store, (m["caches"][0].clone(), m["caches"][1].clone(), k, v, m["slots"]),
        named | parameters,
    )  # fmt: skip
    assert set(passed.values()) == {"SUCCESS"}
    assert len(passed) >= 4


def test_exports(operator):
    kernel = write_kernel()
    store = operator(kernel, new_name(), numbers=NUMBERS)

    class Step(torch.nn.Module):
        def forward(self, m):
            return in_place(store, m)

    program = torch.export.export(Step(), (model(9),))
    assert store._schema.name.replace("::", ".") in str(program.graph)
    for each in (program, program.run_decompositions({})):
        module = each.module()
        agree(in_place, lambda _, m, module=module: module(m), kernel, store, 9)


@pytest.mark.parametrize("backend", [None, *BACKENDS[:2]])
def test_scales_are_written_and_read_back(operator, backend):
    """A write that computes scales and a read that takes them, with steps, in one graph."""
    size = pc.quantize("max(row_max(abs(x)) / 127, 1e-6)", "x / s", "int8")
    write = pc.WriteKernel(k=["x * gain[dim]", size], v=[size], layout="NHD")
    read = pc.ReadKernel(k=["x / gain[dim]"], v=["x - shift"], layout="NHD")
    store = operator(write, new_name())
    load = operator(read, new_name(), numbers={"shift": float})

    def step(store, load, caches, scales, rows, slots, gain):
        k_out, v_out = torch.zeros_like(rows), torch.zeros_like(rows)
        store(
            caches[0], caches[1], rows * 2, rows, slots,
            k_scale=scales[0], v_scale=scales[1], gain=gain,
        )  # fmt: skip
        load(
            caches[0], caches[1], slots, k_out, v_out,
            k_scale=scales[0], v_scale=scales[1], gain=gain, shift=0.5,
        )  # fmt: skip
        return k_out, v_out

    compiled = torch.compile(step, fullgraph=True, backend=backend) if backend else step
    rows, slots = torch.randn(6, HEADS, SIZE), torch.tensor([5, 1, -1, 7, 0, 2])
    gain = torch.arange(1.0, SIZE + 1)
    results = []
    for first, second, run in ((write, read, step), (store, load, compiled)):
        caches = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, SIZE, dtype=torch.int8)
        scales = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS)
        results.append((caches, scales, *run(first, second, caches, scales, rows, slots, gain)))
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(wanted, found)
    caches, scales, _, v_out = results[1]
    assert caches.any()
    assert (scales.flatten(1, 2) != 0).any(-1).sum(-1).tolist() == [5, 5]
    near = (v_out + 0.5 - rows).abs().amax((1, 2)) < 0.05
    assert near.tolist() == [True, True, False, True, True, True]


def test_reads_k_alone(operator):
    load = operator(pc.ReadKernel(k=["x + bias[head, dim]"]), new_name())
    cache, slots = torch.randn(BLOCKS, BLOCK_SIZE, HEADS, SIZE), torch.tensor([6, 1])
    bias = torch.randn(HEADS, SIZE)
    out = torch.zeros(2, HEADS, SIZE)
    for call in (load, torch.compile(load, fullgraph=True, backend="aot_eager")):
        call(cache, None, slots, out.zero_(), None, bias=bias)
        assert torch.equal(out, cache.flatten(0, 1)[slots] + bias)
    both = (cache, cache.clone(), slots, out, out.clone())
    passed = torch.library.opcheck(load, both, {"bias": bias})
    assert set(passed.values()) == {"SUCCESS"}


def test_a_kernel_without_steps(operator):
    store = operator(pc.WriteKernel(), new_name())
    caches, rows = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, SIZE), torch.randn(6, HEADS, SIZE)
    torch.compile(store, fullgraph=True, backend="aot_eager")(*caches, rows, rows, torch.arange(6))
    assert torch.equal(caches[1].flatten(0, 1)[:6], rows)


def test_the_operator_keeps_the_kernel(operator):
    store = operator(pc.WriteKernel(k=["x + 1"]), new_name())
    gc.collect()
    caches, rows = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, SIZE), torch.randn(6, HEADS, SIZE)
    store(*caches, rows, rows, torch.arange(6))
    assert torch.equal(caches[0].flatten(0, 1)[:6], rows + 1)


def test_autograd_notices(operator):
    store = operator(pc.WriteKernel(), new_name())
    cache, rows = torch.zeros(BLOCKS, BLOCK_SIZE, HEADS, SIZE), torch.randn(6, HEADS, SIZE)
    product = (torch.ones_like(cache, requires_grad=True) * cache).sum()
    store(cache, cache.clone(), rows, rows, torch.arange(6))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_what_is_written_must_not_require_grad(operator, backend):
    """A compiler would compute a gradient as if there were no step."""
    import pagedcache.torch

    kernel = write_kernel()
    store = operator(kernel, new_name(), numbers=NUMBERS)

    def write(m):
        return in_place(store, m)

    def gather(m):
        out = m["rows"][:, :HEADS] * 1
        pagedcache.torch.paged_gather(m["caches"][0], None, m["slots"], out, None)
        return out

    for step, name in ((write, "q_out"), (gather, "k_out")):
        called = torch.compile(step, fullgraph=True, backend=backend) if backend else step
        m = model(9)
        m["rows"].requires_grad_()
        with pytest.raises(RuntimeError, match=f"{name}.*must not require grad"):
            called(m)
        assert (m["caches"] == 7).all()
        with torch.no_grad():
            called(m)
    agree(in_place, in_place, kernel, store, 9)


def test_a_parameter_may_require_grad(operator):
    kernel = write_kernel()
    store = operator(kernel, new_name(), numbers=NUMBERS)
    m, wanted = model(9), model(9)
    m["weight"].requires_grad_()
    compiled = torch.compile(elsewhere, fullgraph=True, backend="aot_eager")
    found = compiled(store, m)
    assert torch.equal(elsewhere(kernel, wanted)[0], found[0])
    assert not found[0].requires_grad


def test_errors_of_a_call(operator):
    kernel = write_kernel(on_invalid="raise")
    store = operator(kernel, new_name(), numbers=NUMBERS)
    m = model(9)
    m["slots"][3] = BLOCKS * BLOCK_SIZE
    with pytest.raises(pc.InvalidSlotError, match=r"slot_mapping\[3\] = 20"):
        elsewhere(store, m)
    m = model(9)
    m["positions"][4] = 50
    with pytest.raises(pc.InvalidIndexError, match="at token 4"):
        elsewhere(store, m)
    m = model(9)
    with pytest.raises(RuntimeError, match="factor"):
        store(*m["caches"], *m["rows"].split(4, 1), m["slots"])
    with pytest.raises(RuntimeError, match="factor"):
        elsewhere(store, m, factor=torch.ones(9))
    m["weight"] = m["weight"].to("meta")
    with pytest.raises(BadParamError, match="must be on one device, got cpu and meta"):
        elsewhere(store, m)
    assert (m["caches"] == 7).all()
    everything_meta = {name: tensor.to("meta") for name, tensor in m.items()}
    elsewhere(store, everything_meta)


def test_tensors_past_their_memory_are_refused(operator):
    store = operator(pc.WriteKernel(k=["x + bias[dim]"]), new_name())
    caches, rows = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, SIZE), torch.randn(6, HEADS, SIZE)
    bias = torch.zeros(SIZE)
    bias.untyped_storage().resize_(SIZE * 4 - 1)
    with pytest.raises(BadParamError, match="must not reach past its memory"):
        store(*caches, rows, rows, torch.arange(6), bias=bias)
    assert not caches.any()


def test_the_same_kernel_again(operator):
    kernel, name = pc.WriteKernel(k=["x * factor"]), new_name()
    store = operator(kernel, name, numbers={"factor": float})
    assert operator(kernel, name, numbers={"factor": float}) is store
    namespace, short = name.split("::")
    assert getattr(getattr(torch.ops, namespace), short).default is store
    with pytest.raises(BadParamError) as caught:
        operator(kernel, name, numbers={"factor": int})
    rule = f"numbers must be as they were when {name} was registered, factor: float"
    assert str(caught.value) == f"{rule}, got factor: int"
    with pytest.raises(BadParamError, match="got none"):
        operator(kernel, name)
    other = operator(kernel, new_name())
    assert other is not store
    with pytest.raises(BadParamError, match=f"name must be new, .*, got '{name}'"):
        operator(pc.WriteKernel(k=["x * factor"]), name, numbers={"factor": float})
    assert operator(kernel, name, numbers={"factor": float}) is store


@pytest.mark.parametrize(
    "name",
    ["store", "", "::", "a::", "::b", "a::b::c", "a::b.c", "a b::c", "a::for", "größe::b", "a:b",
     "aten::my_store", "prim::my_store", "load_library::store", "higher_order::store", None, 3],
)  # fmt: skip
def test_names_that_are_none(operator, name):
    with pytest.raises(BadParamError) as caught:
        operator(pc.WriteKernel(), name)
    rule = 'name must be a namespace of yours and a name, such as "my_model::store"'
    assert str(caught.value) == f"{rule}, got {name!r}"
    assert isinstance(caught.value, TypeError) == (not isinstance(name, str))


@pytest.mark.parametrize("name", ["pagedcache::paged_caching", "pagedcache::_dir"])
def test_names_that_are_in_use(operator, name):
    with pytest.raises(BadParamError, match=f"name must be new, .*, got '{name}'"):
        operator(pc.WriteKernel(), name)


def test_a_name_that_another_library_has(operator):
    name = new_name()
    torch.library.define(f"{name}.overload", "(Tensor x) -> ()")
    with pytest.raises(BadParamError, match="name must be new"):
        operator(pc.WriteKernel(), name)


def test_other_bad_arguments(operator):
    kernel = pc.WriteKernel(k=["x * factor + count"])
    for numbers, message in (
        ({"most": int}, "numbers must name parameters of the kernel, factor, count, got 'most'"),
        ({"factor": str}, "numbers['factor'] must be float, int or bool, got <class 'str'>"),
        ({"factor": 1.5}, "numbers['factor'] must be float, int or bool, got 1.5"),
        (3, "numbers must be a dict from names of parameters to float, int or bool, got 3"),
    ):
        with pytest.raises(BadParamError) as caught:
            operator(kernel, new_name(), numbers=numbers)
        assert str(caught.value) == message
    with pytest.raises(BadParamError, match="parameters of the kernel, none, got 'a'"):
        operator(pc.WriteKernel(), new_name(), numbers={"a": int})
    with pytest.raises(TypeError, match="kernel must be a WriteKernel or a ReadKernel, got 3"):
        operator(3, new_name())


@pytest.mark.parametrize("name", ["größe", "länge"])
def test_names_of_parameters_that_pytorch_refuses(operator, name):
    kernel = pc.WriteKernel(k=[pc.rope(name, "positions")])
    assert name in kernel.parameters
    with pytest.raises(BadParamError, match=f"the name of a parameter must .*, got '{name}'"):
        operator(kernel, new_name())
