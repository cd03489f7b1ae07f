# SPDX-License-Identifier: Apache-2.0
"""vLLM's writes: the operators of ``torch.ops._C_cache_ops``, and a Triton one (vLLM 0.33)."""

from __future__ import annotations

import functools
from typing import Any

from pagedcache.arrays.cupy import Cupy
from pagedcache.arrays.find import adopt, library_of
from pagedcache.compat.common import (
    FLOAT8,
    one_head,
    run_kept,
    static_scale,
    viewable,
    viewed,
)
from pagedcache.dtypes import E4M3, F32, I8, U8, Dtype
from pagedcache.operators.one_call import Kept
from pagedcache.operators.paged_caching import one_call
from pagedcache.operators.paged_caching.descriptor import Descriptor
from pagedcache.operators.paged_caching.info import PagedCachingInfo
from pagedcache.operators.paged_caching.one_call import paged_caching
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    NotSupportedError,
    shown,
)

COPIES = ("auto", "float16", "bfloat16")
PER_TOKEN_HEAD: dict[str, tuple[str, Dtype]] = {
    "int8_per_token_head": ("int8", I8),
    "fp8_per_token_head": ("float8_e4m3fn", E4M3),
}
CELL_ROWS, CELL_BYTES, CELL_GROUPS = (512, 64), 656, 4  # of fp8_ds_mla


def reshape_and_cache_flash(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str = "auto",
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    """Write `key` and `value` to their slots; negative slots are padding.

    Parameters
    ----------
    key, value : array
        ``[num_tokens or more, num_kv_heads, head_size]``.
    key_cache, value_cache : array
        ``[num_blocks, block_size, num_kv_heads, head_size]``, in any memory order; the two
        may have different strides. For 8-bit floats, of that dtype or of bytes (uint8).
    slot_mapping : array
        ``[num_tokens]``, int64 or int32.
    kv_cache_dtype : str
        ``"auto"``, ``"float16"`` and ``"bfloat16"`` copy: the caches have the dtype of `key`.
        ``"fp8"``, which is ``"fp8_e4m3"``, and ``"fp8_e5m2"`` store ``x / scale`` as 8-bit floats.
    k_scale, v_scale : array, optional
        float32, on the device of the caches: of one element, or ``[num_kv_heads]``. ``None`` is 1.
        Not used by copies, as in vLLM.

    Raises
    ------
    NotSupportedError
        `kv_cache_dtype` is another format of vLLM's.
    BadParamTypeError
        A scale is a number.
    PagedCacheError
        See `pagedcache.paged_caching`, also for streams and threads. In these messages, the arrays
        are k, v, k_cache and v_cache, and what `kv_cache_dtype` says is k_format and v_format.

    Notes
    -----
    As in vLLM 0.33.0, by its source: the quotient is one of float32, rounded to the nearest, ties
    to even; what is too large, and infinity, becomes the largest value; NaN becomes 0x7F. vLLM
    0.11 reads only the first of several scales.
    """
    if isinstance(kv_cache_dtype, str) and kv_cache_dtype in COPIES:
        try:
            paged_caching(key_cache, value_cache, key, value, slot_mapping, layout="NHD")
        except BadParamError as error:
            if error.subject not in ("k_format", "v_format"):
                raise
            rule = f"must be one of {', '.join(map(repr, FLOAT8))}, because the caches are of bytes"
            raise BadParamError("kv_cache_dtype", rule, shown(kv_cache_dtype)) from None
        return
    name = _float8(kv_cache_dtype, (*COPIES, *FLOAT8))
    paged_caching(
        key_cache,
        value_cache,
        key,
        value,
        slot_mapping,
        k_scale=static_scale("k_scale", k_scale),
        v_scale=static_scale("v_scale", v_scale),
        k_format=name,
        v_format=name,
        layout="NHD",
    )


def triton_reshape_and_cache_flash_per_token_head_quant(
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    k_scale_cache: Any,
    v_scale_cache: Any,
    slot_mapping: Any,
    kv_quant_mode: Any = None,
) -> None:
    """Write `key` and `value` to their slots, with a scale for each token and head.

    The scale is ``max(amax / most, 1e-6)``, where `amax` is the largest magnitude of the row, and
    `most` is 127 or 448. It is stored beside ``x * (1 / scale)``.

    Parameters
    ----------
    key, value : array
        ``[num_tokens or more, num_kv_heads, head_size]``; `value` may have another head size.
    key_cache, value_cache : array
        ``[num_blocks, block_size, num_kv_heads, head_size]``: int8, float8_e4m3fn, or bytes
        (uint8). Any strides, but the last axis must have stride 1.
    k_scale_cache, v_scale_cache : array
        ``[num_blocks, block_size, num_kv_heads]``, float32, which are written. Any strides; for
        scales inside the rows, see `per_token_head_views`.
    slot_mapping : array
        ``[num_tokens]``, int64 or int32.
    kv_quant_mode : str or KVQuantMode, optional
        ``"int8_per_token_head"`` or ``"fp8_per_token_head"``, or that member of vLLM's enum. Needed
        for caches of bytes. By default, what the dtype of `key_cache` says.

    Raises
    ------
    NotSupportedError
        `kv_quant_mode` is another one, such as ``"int4_per_token_head"``, which has zero points.
    BadTensorDtypeError
        The dtype of the caches does not say how they are stored.
    BadTensorShapeError
        The scales do not have the first three axes of the caches.
    PagedCacheError
        See `pagedcache.paged_caching`, also for streams and threads. In these messages, the arrays
        are k, v, k_cache, v_cache, k_scale and v_scale.

    Notes
    -----
    int8 is rounded to the nearest, halves away from zero; older versions of vLLM truncate. All
    arithmetic is that of IEEE float32, each operation rounded once. Triton's division is not, so a
    scale of vLLM's may differ in its last bit, and then, rarely, a code by one. A row with a NaN
    gets the scale of its other elements.
    """
    mode = getattr(kv_quant_mode, "name", kv_quant_mode)
    arrays = (key_cache, value_cache, key, value, slot_mapping, k_scale_cache, v_scale_cache)
    run_kept(_rows, arrays, (mode,))


def per_token_head_views(
    kv_cache: Any, kv_cache_dtype: str, head_size: int | None = None
) -> tuple[Any, Any, Any, Any]:
    """Return the caches and scales that vLLM keeps in one buffer of bytes, as views of it.

    Each slot of a head holds K, the scale of K, V, and the scale of V; a scale is a float32.

    Parameters
    ----------
    kv_cache : array
        ``[num_blocks, num_kv_heads, block_size, content]`` in any memory order, of NumPy, CuPy or
        PyTorch, and of elements of one byte. `content` is the sum of both head sizes, and 8.
    kv_cache_dtype : {"int8_per_token_head", "fp8_per_token_head"}
    head_size : int, optional
        Of K. By default, that of V.

    Returns
    -------
    key_cache, value_cache : array
        ``[num_blocks, block_size, num_kv_heads, head_size]``, int8 or float8_e4m3fn; of CuPy, which
        has no 8-bit floats, uint8.
    k_scale_cache, v_scale_cache : array
        ``[num_blocks, block_size, num_kv_heads]``, float32.

    Raises
    ------
    NotSupportedError
        `kv_cache_dtype` is another one.
    BadTensorDtypeError, BadTensorShapeError, BadTensorStridesError
        The elements of `kv_cache` are not bytes, or do not hold four such arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from pagedcache.compat import vllm
    >>> pages = np.zeros((9, 2, 16, 2 * (64 + 4)), np.uint8)
    >>> caches = vllm.per_token_head_views(pages, "int8_per_token_head")
    >>> [view.shape for view in caches]
    [(9, 16, 2, 64), (9, 16, 2, 64), (9, 16, 2), (9, 16, 2)]
    >>> k, v = np.ones((3, 2, 64), np.float16), np.ones((3, 2, 64), np.float16)
    >>> slots = np.array([5, 6, -1])
    >>> vllm.triton_reshape_and_cache_flash_per_token_head_quant(k, v, *caches, slots)
    >>> pages[0, 0, 5, :4].view(np.int8).tolist(), pages[0, 0, 5, 64:68].view(np.float32) * 127
    ([127, 127, 127, 127], array([1.], dtype=float32))
    """
    _, dtype = PER_TOKEN_HEAD[_per_token_head_mode("kv_cache_dtype", kv_cache_dtype)]
    tensor = adopt("kv_cache", viewable("kv_cache", kv_cache))
    if tensor.dtype.itemsize != 1:
        raise BadTensorDtypeError("kv_cache", "must be of elements of one byte", tensor.dtype)
    axes = "[num_blocks, num_kv_heads, block_size, content]"
    if len(tensor.shape) != 4:
        raise BadTensorShapeError("kv_cache", f"must have 4 axes {axes}", f"shape {tensor.shape}")
    if head_size is not None and not isinstance(head_size, int):
        raise BadParamTypeError("head_size", "must be an int or None", shown(head_size))
    content = tensor.shape[3]
    size = content // 2 - F32.itemsize if head_size is None else head_size
    sizes = (size, content - size - 2 * F32.itemsize)
    if min(sizes) < 1 or (head_size is None and sizes[0] != sizes[1]):
        rule = f"must hold K, V and two scales of 4 bytes on its last axis {axes}"
        raise BadTensorShapeError("kv_cache", rule, f"shape {tensor.shape}")
    if dtype == E4M3 and isinstance(library_of("kv_cache", kv_cache), Cupy):
        dtype = U8
    by_slot = kv_cache.swapaxes(1, 2)
    caches, scales, start = [], [], 0
    for size in sizes:
        end = start + size
        caches.append(viewed("kv_cache", by_slot[..., start:end], dtype))
        start = end + F32.itemsize
        scales.append(viewed("kv_cache", by_slot[..., end:start], F32)[..., 0])
    return caches[0], caches[1], scales[0], scales[1]


def concat_and_cache_mla(
    kv_c: Any,
    k_pe: Any,
    kv_cache: Any,
    slot_mapping: Any,
    kv_cache_dtype: str = "auto",
    scale: Any = None,
) -> None:
    """Write `kv_c` and `k_pe` of each token side by side to its slot.

    Parameters
    ----------
    kv_c : array
        ``[num_tokens or more, kv_lora_rank]``.
    k_pe : array
        ``[num_tokens or more, qk_rope_head_dim]``.
    kv_cache : array
        ``[num_blocks, block_size, kv_lora_rank + qk_rope_head_dim]``, of NumPy, CuPy or PyTorch.
        For 8-bit floats, of that dtype or of bytes (uint8). For ``"fp8_ds_mla"``,
        ``[num_blocks, block_size, 656]``, of elements of one byte.
    slot_mapping : array
        ``[num_tokens]``, int64 or int32.
    kv_cache_dtype : str
        ``"auto"``, ``"fp8"`` and the like: see `reshape_and_cache_flash`. ``"fp8_ds_mla"``: a cell
        of 512 float8_e4m3fn, four float32 scales, one for every 128 of them, and 64 values of
        `k_pe` as they are.
    scale : array, optional
        float32, of one element, on the device of the cache, by which both are divided. ``None`` is
        1. Used for ``"fp8"`` and the like only.

    Raises
    ------
    NotSupportedError
        `kv_cache_dtype` is another format of vLLM's.
    BadTensorShapeError, BadTensorDtypeError
        The arrays do not have the axes above, or do not fit the cell of ``"fp8_ds_mla"``.
    PagedCacheError
        See `pagedcache.paged_caching`, also for streams and threads. In these messages, `kv_c` is
        k, `k_pe` is v, and their parts of `kv_cache` are k_cache and v_cache.

    Notes
    -----
    A scale of ``"fp8_ds_mla"`` is the least power of two that is no less than
    ``max(amax / 448, 1e-4)``, as in vLLM 0.33 and in FlashMLA; vLLM 0.11 stores ``amax / 448``
    itself. Attention kernels take the values of `k_pe` for bfloat16; float16 is copied all the
    same, as in vLLM.
    """
    kinds = (*COPIES, *FLOAT8, "fp8_ds_mla")
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype not in kinds:
        _float8(kv_cache_dtype, kinds)
    rows = (
        one_head("kv_c", kv_c, "[num_tokens, kv_lora_rank]"),
        one_head("k_pe", k_pe, "[num_tokens, qk_rope_head_dim]"),
    )
    sizes = (rows[0].shape[2], rows[1].shape[2])
    shape = adopt("kv_cache", viewable("kv_cache", kv_cache)).shape
    if len(shape) != 3:
        rule = "must have 3 axes [num_blocks, block_size, width]"
        raise BadTensorShapeError("kv_cache", rule, f"shape {shape}")
    if kv_cache_dtype == "fp8_ds_mla":
        _cache_cells(*rows, kv_cache, slot_mapping)
        return
    if shape[2] != sum(sizes):
        rule = f"must have {sizes[0]} + {sizes[1]} elements on its last axis, for kv_c and k_pe"
        raise BadTensorShapeError("kv_cache", rule, f"shape {shape}")
    cells = kv_cache[:, :, None]
    name = FLOAT8.get(kv_cache_dtype)
    scale = None if name is None else static_scale("scale", scale)
    paged_caching(
        cells[..., : sizes[0]],
        cells[..., sizes[0] :],
        *rows,
        slot_mapping,
        k_scale=scale,
        v_scale=scale,
        k_format=name,
        v_format=name,
        layout="NHD",
    )


def _cache_cells(kv_c: Any, k_pe: Any, kv_cache: Any, slot_mapping: Any) -> None:
    """Write the cells of ``"fp8_ds_mla"``, given rows of one head."""
    for name, array, size in zip(("kv_c", "k_pe"), (kv_c, k_pe), CELL_ROWS, strict=True):
        tensor = adopt(name, array)
        if tensor.shape[2] != size:
            rule = f"must have {size} elements in a row for 'fp8_ds_mla'"
            raise BadTensorShapeError(name, rule, tensor.shape[2])
        if tensor.dtype.itemsize != 2:
            rule = "must be bfloat16 or float16 for 'fp8_ds_mla'"
            raise BadTensorDtypeError(name, rule, tensor.dtype)
    tensor = adopt("kv_cache", kv_cache)
    if tensor.dtype.itemsize != 1:
        rule = "must be of elements of one byte for 'fp8_ds_mla'"
        raise BadTensorDtypeError("kv_cache", rule, tensor.dtype)
    if tensor.shape[2] != CELL_BYTES:
        rule = f"must have {CELL_BYTES} bytes on its last axis for 'fp8_ds_mla'"
        raise BadTensorShapeError("kv_cache", rule, f"shape {tensor.shape}")
    cells = viewed("kv_cache", kv_cache, U8)[:, :, None]
    codes, end = CELL_ROWS[0], CELL_ROWS[0] + CELL_GROUPS * F32.itemsize
    arrays = (
        cells[..., :codes],
        viewed("kv_cache", cells[..., end:], adopt("k_pe", k_pe).dtype),
        kv_c,
        k_pe,
        slot_mapping,
        viewed("kv_cache", cells[..., codes:end], F32),
        None,
    )
    run_kept(_cells, arrays, ())


def _create_cells(*arrays: Any) -> Descriptor:
    return Descriptor._create(
        arrays,
        functools.partial(
            PagedCachingInfo.create, layout="NHD", k_format="float8_e4m3fn", powers=True
        ),
        handle=None,
        on_invalid="skip",
        debug=None,
        reported=False,
    )


def _create_rows(*arrays_and_mode: Any) -> Descriptor:
    """Check what calls for arrays like these need not check again."""
    *arrays, mode = arrays_and_mode
    name = _per_token_head(arrays[0], mode)
    for letter, of, scale in (("k", "key", arrays[5]), ("v", "value", arrays[6])):
        shape = adopt(f"{letter}_scale_cache", scale).shape
        wanted = adopt(f"{of}_cache", arrays["kv".index(letter)]).shape[:3]
        if shape != wanted:  # others would be scales that are read
            rule = f"must have the shape {wanted}, the first three axes of {of}_cache"
            raise BadTensorShapeError(f"{letter}_scale_cache", rule, f"shape {shape}")
    return one_call._create(*arrays, "NHD", "skip", name, name)


_rows = Kept(Descriptor, _create_rows)
_cells = Kept(Descriptor, _create_cells)


def _float8(kv_cache_dtype: Any, kinds: tuple[str, ...]) -> str:
    """Return the format that `kv_cache_dtype` names, or refuse it, naming `kinds`."""
    if isinstance(kv_cache_dtype, str) and kv_cache_dtype in FLOAT8:
        return FLOAT8[kv_cache_dtype]
    rule = f"must be one of {', '.join(map(repr, kinds))}"
    if isinstance(kv_cache_dtype, str) and kv_cache_dtype in PER_TOKEN_HEAD:
        rule += "; this one is triton_reshape_and_cache_flash_per_token_head_quant's"
    raise NotSupportedError("kv_cache_dtype", rule, shown(kv_cache_dtype))


def _per_token_head(key_cache: Any, kv_quant_mode: Any) -> str:
    """Return the format of caches with a scale for each token and head."""
    if kv_quant_mode is not None:
        return PER_TOKEN_HEAD[_per_token_head_mode("kv_quant_mode", kv_quant_mode)][0]
    found = adopt("key_cache", key_cache).dtype
    for name, dtype in PER_TOKEN_HEAD.values():
        if found == dtype:
            return name
    if found == U8:
        rule = "must be given, because key_cache is of bytes (uint8); use one of "
        raise BadParamError("kv_quant_mode", rule + ", ".join(map(repr, PER_TOKEN_HEAD)))
    raise BadTensorDtypeError("key_cache", "must be int8, float8_e4m3fn or uint8", found)


def _per_token_head_mode(subject: str, mode: Any) -> str:
    """Return the name of a mode, given that or the member of an enum that is called so."""
    name = mode if isinstance(mode, str) else getattr(mode, "name", None)
    lower = name.lower() if isinstance(name, str) else ""
    if lower not in PER_TOKEN_HEAD:
        rule = f"must be one of {', '.join(map(repr, PER_TOKEN_HEAD))}"
        raise NotSupportedError(subject, rule, shown(mode))
    return lower
