# SPDX-License-Identifier: Apache-2.0
"""The textbook Triton kernel for a paged write, for comparison: one program copies one token."""

from __future__ import annotations

from typing import Any

import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]


@triton.jit  # type: ignore[misc, untyped-decorator, unused-ignore]
def _rows(  # type: ignore[no-untyped-def] # noqa: ANN202 - Triton reads annotations its own way
    cache,  # noqa: ANN001
    rows,  # noqa: ANN001
    slots,  # noqa: ANN001
    block_stride,  # noqa: ANN001
    slot_stride,  # noqa: ANN001
    head_stride,  # noqa: ANN001
    row_stride,  # noqa: ANN001
    block_size: tl.constexpr,
    heads: tl.constexpr,
    size: tl.constexpr,
    width: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        at = tl.arange(0, width)
        real = at < heads * size
        value = tl.load(rows + token * row_stride + at, mask=real)
        base = slot // block_size * block_stride + slot % block_size * slot_stride
        tl.store(cache + base + at // size * head_stride + at % size, value, mask=real)


def launch(k_cache: Any, v_cache: Any, k: Any, v: Any, slots: Any) -> None:
    """Write K and V with one launch each; caches are ``[blocks, slots, heads, size]``."""
    for cache, rows in ((k_cache, k), (v_cache, v)):
        heads, size = rows.shape[1:]
        _rows[(len(slots),)](
            cache,
            rows,
            slots,
            cache.stride(0),
            cache.stride(1),
            cache.stride(2),
            rows.stride(0),
            cache.shape[1],
            heads,
            size,
            triton.next_power_of_2(heads * size),
        )
