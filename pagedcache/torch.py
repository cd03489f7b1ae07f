# SPDX-License-Identifier: Apache-2.0
"""The operators for PyTorch's compiler: ``torch.ops.pagedcache.paged_caching`` and its mirror.

Eager code does not need this module, since `pagedcache.paged_caching` and `pagedcache.paged_gather`
take tensors as they are. Importing it registers both together with what ``torch.compile`` and
``torch.export`` must know: what they write, and that they return nothing. `pagedcache` does not
import this module. Requires PyTorch 2.4 or newer.

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

from typing import Any

import torch

from pagedcache.operators.paged_caching.one_call import paged_caching as _paged_caching
from pagedcache.operators.paged_gather.one_call import paged_gather as _paged_gather
from pagedcache.status import BadParamError

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


def _write_nothing(*arguments: Any, **named: Any) -> None:
    """Check the devices of tensors without memory. There is no result to describe."""
    every = (*arguments, *named.values())
    devices = {tensor.device for tensor in every if isinstance(tensor, torch.Tensor)}
    if len(devices) > 1:  # such as real caches and a slot mapping on "meta"
        got = " and ".join(sorted(map(str, devices)))
        raise BadParamError("all tensors", "must be on one device", got)


for _name, _function in ((WRITE, _write), (GATHER, _gather)):
    torch.library.impl(_name, ("cpu", "cuda"), _function)
    torch.library.register_fake(_name, _write_nothing)

paged_caching = torch.ops.pagedcache.paged_caching.default
"""See `pagedcache.paged_caching`.

Runs on PyTorch's current stream. ``on_invalid="raise"`` waits for it, so it cannot be captured.
"""

paged_gather = torch.ops.pagedcache.paged_gather.default
"""See `pagedcache.paged_gather`. Streams are as for `paged_caching`."""
