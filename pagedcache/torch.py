# SPDX-License-Identifier: Apache-2.0
"""The operator for PyTorch's compiler: ``torch.ops.pagedcache.paged_caching``.

Eager code does not need this module, since `pagedcache.paged_caching` takes tensors as they are.
Importing it registers the operator together with what ``torch.compile`` and ``torch.export`` must
know: that it writes both caches and returns nothing. `pagedcache` does not import this module.
Requires PyTorch 2.4 or newer.

``pagedcache.torch.paged_caching(k_cache, v_cache, k, v, slot_mapping, layout=None,
on_invalid="skip")`` takes PyTorch tensors only; see `pagedcache.paged_caching` for what they must
be. It runs on PyTorch's current stream. In code that a compiler functionalizes, as all backends
but ``"eager"`` do, an error of ``on_invalid="raise"`` leaves the caches as they were.

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

import torch

from pagedcache.operators.paged_caching.one_call import paged_caching as _paged_caching
from pagedcache.status import BadParamError

NAME = "pagedcache::paged_caching"

torch.library.define(
    NAME,
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor slot_mapping, "
    "str? layout=None, str on_invalid='skip') -> ()",
)


def _write(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: str | None = None,
    on_invalid: str = "skip",
) -> None:
    _paged_caching(k_cache, v_cache, k, v, slot_mapping, layout=layout, on_invalid=on_invalid)


def _write_nothing(*tensors: torch.Tensor | str | None, **_: str | None) -> None:
    """Check the devices of tensors without memory. There is no result to describe."""
    devices = {tensor.device for tensor in tensors if isinstance(tensor, torch.Tensor)}
    if len(devices) > 1:  # such as real caches and a slot mapping on "meta"
        got = " and ".join(sorted(map(str, devices)))
        raise BadParamError("k_cache, v_cache, k, v and slot_mapping", "must be on one device", got)


torch.library.impl(NAME, ("cpu", "cuda"), _write)
torch.library.register_fake(NAME, _write_nothing)

paged_caching = torch.ops.pagedcache.paged_caching.default
"""``(k_cache, v_cache, k, v, slot_mapping, layout=None, on_invalid="skip")``; see `paged_caching`.

Runs on PyTorch's current stream. ``on_invalid="raise"`` waits for it, so it cannot be captured.
"""
