# SPDX-License-Identifier: Apache-2.0
"""The operators for PyTorch's compiler: ``torch.ops.pagedcache.paged_caching`` and its mirror.

Eager code does not need this module, since `pagedcache.paged_caching` and `pagedcache.paged_gather`
take tensors as they are. Importing it registers both together with what ``torch.compile`` and
``torch.export`` must know: what they write, and that they return nothing. `operator` registers a
`WriteKernel` or `ReadKernel` of yours in the same way. ``pagedcache`` does not import this module.
Requires PyTorch 2.4 or newer.

``pagedcache.torch.paged_caching(k_cache, v_cache, k, v, slot_mapping, layout=None,
on_invalid="skip", k_scale=None, v_scale=None, k_format=None, v_format=None)`` and
``pagedcache.torch.paged_gather(k_cache, v_cache, slot_mapping, k_out, v_out, ...)``, with the same
options, take PyTorch tensors only; see `pagedcache.paged_caching` and `pagedcache.paged_gather` for
what they must be. They run on PyTorch's current stream. In code that a compiler functionalizes, as
all backends but ``"eager"`` do, an error of ``on_invalid="raise"`` leaves what would be written as
it was, and a write counts as one to its scales, also if they are only read. In code that inductor
compiles, take scales inside pages from a view of the whole buffer, ``pages.view(torch.float32)[...,
i]``, not from a slice that is viewed (PyTorch 2.13 makes wrong tensors of those).

Examples
--------
>>> import torch
>>> import pagedcache.torch
>>> @torch.compile(fullgraph=True, backend="eager")
... def step(k_cache, v_cache, k, v, slots):
...     pagedcache.torch.paged_caching(k_cache, v_cache, k * 2, v, slots)
>>> k_cache, v_cache = torch.zeros(2, 4, 1, 2, 8)
>>> step(k_cache, v_cache, torch.ones(3, 1, 8), torch.ones(3, 1, 8), torch.tensor([6, -1, 1]))
>>> k_cache[:, 0, :, 0].tolist()
[[0.0, 2.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pagedcache.arrays.find import library_of
from pagedcache.locks import make_lock
from pagedcache.operators.paged_caching.one_call import paged_caching as _paged_caching
from pagedcache.operators.paged_gather.one_call import paged_gather as _paged_gather
from pagedcache.operators.programs.kernels import ReadKernel, WriteKernel
from pagedcache.status import BadParamError, BadParamTypeError, shown

WRITE, GATHER = "pagedcache::paged_caching", "pagedcache::paged_gather"

torch.library.define(
    WRITE,
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot_mapping, "
    "str? layout=None, str on_invalid='skip', Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None, "
    "str? k_format=None, str? v_format=None) -> ()",
)
torch.library.define(
    GATHER,
    "(Tensor k_cache, Tensor? v_cache, Tensor slot_mapping, Tensor(a!) k_out, Tensor(b!)? v_out, "
    "str? layout=None, str on_invalid='skip', Tensor? k_scale=None, Tensor? v_scale=None, "
    "str? k_format=None, str? v_format=None) -> ()",
)


def _write(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: str | None = None,
    on_invalid: str = "skip",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_format: str | None = None,
    v_format: str | None = None,
) -> None:
    _check_storage(k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale)
    _paged_caching(
        k_cache,
        v_cache,
        k,
        v,
        slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        k_format=k_format,
        v_format=v_format,
        layout=layout,
        on_invalid=on_invalid,
    )


def _gather(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor | None,
    layout: str | None = None,
    on_invalid: str = "skip",
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    k_format: str | None = None,
    v_format: str | None = None,
) -> None:
    _check_storage(k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale)
    _paged_gather(
        k_cache,
        v_cache,
        slot_mapping,
        k_out,
        v_out,
        k_scale=k_scale,
        v_scale=v_scale,
        k_format=k_format,
        v_format=v_format,
        layout=layout,
        on_invalid=on_invalid,
    )


def _check_storage(*tensors: torch.Tensor | None) -> None:
    """Raise for a tensor that reaches past its memory.

    Some versions of PyTorch's inductor hand such ones to an operator that writes a view of another
    dtype, if the code took a slice before the view.
    """
    for tensor in tensors:
        if tensor is None or not tensor.numel():
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        last = tensor.storage_offset() + sum((length - 1) * step for length, step in steps)
        if (last + 1) * tensor.element_size() > tensor.untyped_storage().nbytes():
            rule = (
                "must not reach past its memory; if the compiler made it so, view the whole buffer "
                "in the other dtype first, and slice that"
            )
            raise BadParamError("a tensor", rule, f"shape {tuple(tensor.shape)}")


def _overload(name: str) -> Any:
    """Return an operator that is registered."""
    namespace, _, short = name.partition("::")
    return getattr(getattr(torch.ops, namespace), short).default


def _write_nothing(*arguments: Any, **named: Any) -> None:
    """Check the devices of tensors without memory. There is no result to describe."""
    every = (*arguments, *named.values())
    devices = {tensor.device for tensor in every if isinstance(tensor, torch.Tensor)}
    if len(devices) > 1:  # such as real caches and a slot mapping on "meta"
        got = " and ".join(sorted(map(str, devices)))
        raise BadParamError("all tensors", "must be on one device", got)


def _without_memory(overload: Any) -> Callable[..., None]:
    """Return what checks a call of an operator whose tensors have no memory.

    A compiler would compute wrong gradients of what is written: it does not show the operator which
    tensors require grad when it runs.
    """
    arguments = overload._schema.arguments
    names = tuple(each.name for each in arguments)
    written = {each.name for each in arguments if each.alias_info and each.alias_info.is_write}

    def check(*arrays: Any, **named: Any) -> None:
        _write_nothing(*arrays, **named)
        for name, array in (*zip(names, arrays, strict=False), *named.items()):
            if name in written and array is not None:
                library_of(name, array).check_write(name, array)

    return check


for _name, _function in ((WRITE, _write), (GATHER, _gather)):
    torch.library.impl(_name, ("cpu", "cuda"), _function)
    torch.library.register_fake(_name, _without_memory(_overload(_name)))

paged_caching = torch.ops.pagedcache.paged_caching.default
"""See `pagedcache.paged_caching`.

Runs on PyTorch's current stream. ``on_invalid="raise"`` waits for it, so it cannot be captured.
"""

paged_gather = torch.ops.pagedcache.paged_gather.default
"""See `pagedcache.paged_gather`. Streams are as for `paged_caching`."""

WRITE_TENSORS = (
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot_mapping, *, "
    "Tensor? q=None, Tensor(c!)? q_out=None, Tensor(d!)? k_out=None, Tensor(e!)? v_out=None, "
    "Tensor(f!)? k_scale=None, Tensor(g!)? v_scale=None"
)
READ_TENSORS = (
    "Tensor k_cache, Tensor? v_cache, Tensor slot_mapping, Tensor(a!) k_out, Tensor(b!)? v_out, *, "
    "Tensor? k_scale=None, Tensor? v_scale=None"
)
NUMBER_TYPES: dict[type, str] = {float: "float", int: "SymInt", bool: "bool"}
"""What a number is in a schema. A SymInt may change from call to call in compiled code."""

_operators: dict[str, tuple[WriteKernel | ReadKernel, dict[str, type], Any]] = {}
"""By name: the kernel, its numbers and the operator."""
_lock = make_lock()


def operator(
    kernel: WriteKernel | ReadKernel, name: str, *, numbers: Mapping[str, type] | None = None
) -> Any:
    """Register a kernel with steps as an operator for PyTorch's compiler.

    Parameters
    ----------
    kernel : WriteKernel or ReadKernel
        It is kept for as long as the process runs.
    name : str
        A namespace of yours and a name, such as ``"my_model::store"``.
    numbers : dict of str to type, optional
        The parameters of the kernel that are numbers, by name, each float, int or bool. All others
        are tensors.

    Returns
    -------
    torch._ops.OpOverload
        ``torch.ops.my_model.store.default``. It takes PyTorch tensors, and what the kernel takes
        but for `stream`: all parameters by name, and none may be left out. It runs on PyTorch's
        current stream. The same kernel, name and numbers give the same operator again.

    Raises
    ------
    BadParamError
        The name has no namespace or is in use, `numbers` does not fit the kernel, or PyTorch does
        not allow the name of a parameter.

    Notes
    -----
    A tensor may be given twice to work in place, such as `q` as `q_out` too, also in compiled code.
    A write counts as one to the caches, to `q_out`, `k_out` and `v_out`, and to scales, also if
    those are only read.

    In compiled code, an int may change from call to call. Another value of a float or bool makes
    PyTorch compile its code around the operator anew, though not the kernel; give one that changes
    often as a tensor without axes.

    Examples
    --------
    >>> import torch
    >>> import pagedcache as pc
    >>> import pagedcache.torch
    >>> kernel = pc.WriteKernel(k=["x * gain[dim]"], v=["min(x, most)"])
    >>> store = pc.torch.operator(kernel, "my_model::store", numbers={"most": float})
    >>> @torch.compile(fullgraph=True, backend="eager")
    ... def step(k_cache, v_cache, k, v, slots, gain):
    ...     store(k_cache, v_cache, k * 2, v, slots, gain=gain, most=0.5)
    >>> k_cache, v_cache = torch.zeros(2, 4, 1, 2, 8)
    >>> k, v = torch.ones(2, 3, 1, 8)
    >>> step(k_cache, v_cache, k, v, torch.tensor([6, -1, 1]), torch.arange(8.0))
    >>> k_cache[3, 0, 0].tolist(), v_cache[3, 0, 0, :2].tolist()
    ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0], [0.5, 0.5])
    """
    if not isinstance(kernel, (WriteKernel, ReadKernel)):
        raise BadParamTypeError("kernel", "must be a WriteKernel or a ReadKernel", shown(kernel))
    chosen = _check_numbers(kernel, {} if numbers is None else numbers)
    namespace, short = _check_name(name)
    with _lock:
        other, before, found = _operators.get(name, (None, {}, None))
        if other is kernel:
            if chosen != before:
                rule = f"must be as they were when {name} was registered, {_said(before)}"
                raise BadParamError("numbers", rule, _said(chosen))
            return found
        if hasattr(getattr(torch.ops, namespace), short):
            rule = "must be new, because another kernel or library has registered it"
            raise BadParamError("name", rule, shown(name))
        found = _register(kernel, name, chosen)
        _operators[name] = kernel, chosen, found
    return found


def _register(kernel: WriteKernel | ReadKernel, name: str, numbers: Mapping[str, type]) -> Any:
    """Register a kernel, and return the operator."""
    tensors = READ_TENSORS if isinstance(kernel, ReadKernel) else WRITE_TENSORS
    kinds = dict.fromkeys(kernel.parameters, "Tensor")
    kinds |= {each: NUMBER_TYPES[kind] for each, kind in numbers.items()}
    parameters = "".join(f", {kind} {each}" for each, kind in kinds.items())

    def run(*arrays: Any, **named: Any) -> None:
        every = (*arrays, *named.values())
        _check_storage(*(each for each in every if isinstance(each, torch.Tensor)))
        kernel(*arrays, **named)

    torch.library.define(name, f"({tensors}{parameters}) -> ()")
    torch.library.impl(name, ("cpu", "cuda"), run)
    found = _overload(name)
    torch.library.register_fake(name, _without_memory(found))
    return found


def _check_name(name: object) -> tuple[str, str]:
    """Return the two parts of the name of an operator."""
    rule = 'must be a namespace of yours and a name, such as "my_model::store"'
    if not isinstance(name, str):
        raise BadParamTypeError("name", rule, shown(name))
    namespace, _, short = name.partition("::")
    if not (_is_identifier(namespace) and _is_identifier(short)):
        raise BadParamError("name", rule, shown(name))
    # Some names are PyTorch's, or those of methods of torch.ops.
    kind = type(getattr(torch.ops, namespace))
    if namespace in ("aten", "prim") or kind is not type(torch.ops.pagedcache):
        raise BadParamError("name", rule, shown(name))
    return namespace, short


def _check_numbers(kernel: WriteKernel | ReadKernel, numbers: object) -> dict[str, type]:
    """Check which parameters are numbers, and that a schema can have all of them."""
    if not isinstance(numbers, Mapping):
        rule = "must be a dict from names of parameters to float, int or bool"
        raise BadParamTypeError("numbers", rule, shown(numbers))
    for each, kind in numbers.items():
        if each not in kernel.parameters:
            rule = f"must name parameters of the kernel, {', '.join(kernel.parameters) or 'none'}"
            raise BadParamError("numbers", rule, shown(each))
        if not any(kind is known for known in NUMBER_TYPES):
            raise BadParamError(f"numbers[{each!r}]", "must be float, int or bool", shown(kind))
    for each in kernel.parameters:
        if not _is_identifier(each):
            rule = "must be of ASCII letters and no keyword of Python, for an operator of PyTorch"
            raise BadParamError("the name of a parameter", rule, shown(each))
    return dict(numbers)


def _is_identifier(name: str) -> bool:
    """Return whether a schema of PyTorch can have this name."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name)


def _said(numbers: Mapping[str, type]) -> str:
    return ", ".join(f"{each}: {kind.__name__}" for each, kind in numbers.items()) or "none"
