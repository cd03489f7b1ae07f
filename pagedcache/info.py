"""What a paged caching write needs to know of its five tensors, and every rule they must obey."""

from __future__ import annotations

from dataclasses import dataclass

from pagedcache.dtypes import BF16, F16, F32, I32, I64, Dtype
from pagedcache.status import (
    BadParamError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    shown,
)
from pagedcache.tensors import TensorDescriptor, overlaps_itself, view

NAMES = ("k_cache", "v_cache", "k", "v", "slot_mapping")
DTYPES = (F16, BF16, F32)
SLOT_DTYPES = (I64, I32)
_ANYWHERE = 1 << 20  # an address, where only differences count
LAYOUTS = {
    "HND": ("num_blocks", "num_kv_heads", "block_size", "head_size"),
    "NHD": ("num_blocks", "block_size", "num_kv_heads", "head_size"),
}


@dataclass(frozen=True, slots=True)
class InvalidSlots:
    """What is known of slots at or past the end, of one call or of several.

    Attributes
    ----------
    count : int
        How many tokens had one.
    token, slot : int
        The lowest such token, and its slot in the earliest call where it had one.
    """

    count: int
    token: int
    slot: int

    def joined(self, later: InvalidSlots) -> InvalidSlots:
        """Return what is known of both."""
        first = self if self.token <= later.token else later
        return InvalidSlots(self.count + later.count, first.token, first.slot)


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedCachingInfo:
    """Sizes and strides of one paged caching write; strides are in elements.

    A stride of an axis of length 1 is never used and stands as 0 (but for the token axis, whose
    length is that of each call). The names follow InfiniCore's ``PagedCachingInfo``.

    Attributes
    ----------
    dtype : numpy.dtype
        Of `k`, `v` and both caches: float16, bfloat16 or float32.
    slot_dtype : numpy.dtype
        int64 or int32.
    layout : str
        ``"HND"`` or ``"NHD"``: the order of the axes that the caches were described in.
    num_tokens : int
        Length of the slot mapping that the descriptor was created with.
    num_blocks, block_size, num_kv_heads : int
        Of both caches.
    head_size, v_head_size : int
        Elements of one head of K and of V.
    k_token_stride, k_head_stride, v_token_stride, v_head_stride : int
        Of the sources.
    k_cache_block_stride, k_cache_head_stride, k_cache_slot_stride : int
        Of the K cache: from block to block, head to head, and slot to slot inside a block.
    v_cache_block_stride, v_cache_head_stride, v_cache_slot_stride : int
        Of the V cache.
    """

    dtype: Dtype
    slot_dtype: Dtype
    layout: str
    num_tokens: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    v_head_size: int
    k_token_stride: int
    k_head_stride: int
    v_token_stride: int
    v_head_stride: int
    k_cache_block_stride: int
    k_cache_head_stride: int
    k_cache_slot_stride: int
    v_cache_block_stride: int
    v_cache_head_stride: int
    v_cache_slot_stride: int

    @property
    def num_slots(self) -> int:
        """Capacity of the cache in tokens; slots run from 0 to ``num_slots - 1``."""
        return self.num_blocks * self.block_size

    def tensor(self, name: str) -> TensorDescriptor:
        """Return what argument `name` of a write of `num_tokens` tokens must look like.

        Parameters
        ----------
        name : {"k_cache", "v_cache", "k", "v", "slot_mapping"}
        """
        if name == "slot_mapping":
            return TensorDescriptor(self.slot_dtype, (self.num_tokens,))
        head_size = self.head_size if name[0] == "k" else self.v_head_size
        lengths = {"head": self.num_kv_heads, "slot": self.block_size, "block": self.num_blocks}
        axes = ["block", "head", "slot"] if self.layout == "HND" else ["block", "slot", "head"]
        if not name.endswith("_cache"):
            lengths["token"], axes = self.num_tokens, ["token", "head"]
        shape = (*(lengths[axis] for axis in axes), head_size)
        strides = (*(getattr(self, f"{name}_{axis}_stride") for axis in axes), 1)
        return TensorDescriptor(self.dtype, shape, strides)

    @classmethod
    def create(
        cls,
        k_cache: TensorDescriptor,
        v_cache: TensorDescriptor,
        k: TensorDescriptor,
        v: TensorDescriptor,
        slot_mapping: TensorDescriptor,
        *,
        layout: str = "HND",
    ) -> PagedCachingInfo:
        """Check five tensor descriptors against each other and collect what a write needs.

        Parameters
        ----------
        k_cache, v_cache : TensorDescriptor
            ``[num_blocks, num_kv_heads, block_size, head_size]`` for layout ``"HND"``,
            ``[num_blocks, block_size, num_kv_heads, head_size]`` for ``"NHD"``.
        k, v : TensorDescriptor
            ``[num_tokens or more, num_kv_heads, head_size]``.
        slot_mapping : TensorDescriptor
            ``[num_tokens]``, int64 or int32.
        layout : {"HND", "NHD"}

        Returns
        -------
        PagedCachingInfo

        Raises
        ------
        BadParamError
            Unknown layout.
        BadTensorDtypeError, BadTensorShapeError, BadTensorStridesError
            The message names the tensor, the rule and what was found.
        """
        if not isinstance(layout, str) or layout not in tuple(LAYOUTS):
            raise BadParamError("layout", f"must be one of {', '.join(LAYOUTS)}", shown(layout))
        layout = str.__str__(layout)  # of a subclass, such as a member of an enum
        tensors = {
            "k_cache": k_cache,
            "v_cache": v_cache,
            "k": k,
            "v": v,
            "slot_mapping": slot_mapping,
        }
        _check_dtypes(tensors)
        _check_shapes(tensors, layout)
        _check_strides(tensors)

        heads, slots = (1, 2) if layout == "HND" else (2, 1)
        k_steps, v_steps = _steps(k_cache), _steps(v_cache)
        return cls(
            dtype=k_cache.dtype,
            slot_dtype=slot_mapping.dtype,
            layout=layout,
            num_tokens=slot_mapping.shape[0],
            num_blocks=k_cache.shape[0],
            block_size=k_cache.shape[slots],
            num_kv_heads=k_cache.shape[heads],
            head_size=k_cache.shape[3],
            v_head_size=v_cache.shape[3],
            k_token_stride=token_step(k.shape, k.strides),
            k_head_stride=_steps(k)[1],
            v_token_stride=token_step(v.shape, v.strides),
            v_head_stride=_steps(v)[1],
            k_cache_block_stride=k_steps[0],
            k_cache_head_stride=k_steps[heads],
            k_cache_slot_stride=k_steps[slots],
            v_cache_block_stride=v_steps[0],
            v_cache_head_stride=v_steps[heads],
            v_cache_slot_stride=v_steps[slots],
        )


def _steps(tensor: TensorDescriptor) -> tuple[int, ...]:
    return tuple(
        step if length > 1 else 0 for length, step in zip(tensor.shape, tensor.strides, strict=True)
    )


def token_step(shape: tuple[int, ...], strides: tuple[int, ...], unit: int = 1) -> int:
    """Return the step from row to row of K or V, also where there is one row now and more later.

    Parameters
    ----------
    shape, strides : tuple of int
        Of three axes.
    unit : int
        What the strides count an element as: 1, or its size in bytes.
    """
    rows, heads, size = shape
    one_row = (heads - 1) * strides[1] + size * unit
    if rows > 1 or strides[0] >= one_row:
        return strides[0]
    return heads * size * unit  # a step that is never taken, such as that of x[None]


def _check_dtypes(tensors: dict[str, TensorDescriptor]) -> None:
    dtype = tensors["k_cache"].dtype
    for name, tensor in tensors.items():
        if name == "slot_mapping":
            if tensor.dtype not in SLOT_DTYPES:
                raise BadTensorDtypeError(name, "must be int64 or int32", tensor.dtype)
        elif tensor.dtype not in DTYPES:
            rule = "must be float16, bfloat16 or float32"
            raise BadTensorDtypeError(name, rule, tensor.dtype)
        elif tensor.dtype != dtype:
            raise BadTensorDtypeError(name, f"must be {dtype} as k_cache is", tensor.dtype)


def _check_shapes(tensors: dict[str, TensorDescriptor], layout: str) -> None:
    axes = {
        "k_cache": LAYOUTS[layout],
        "v_cache": LAYOUTS[layout],
        "k": ("num_tokens", "num_kv_heads", "head_size"),
        "v": ("num_tokens", "num_kv_heads", "head_size"),
        "slot_mapping": ("num_tokens",),
    }
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in tensors.items():
        expected = f"[{', '.join(axes[name])}]"
        if len(tensor.shape) != len(axes[name]):
            rule = f"must have {len(axes[name])} axes {expected} (layout {layout})"
            raise BadTensorShapeError(name, rule, f"shape {tensor.shape}")
        for axis, length in zip(axes[name], tensor.shape, strict=True):
            if axis == "num_tokens":
                continue
            if length < 1:
                rule = f"must have a {axis} of at least 1 in {expected}"
                raise BadTensorShapeError(name, rule, f"shape {tensor.shape}")
            # V may have a head size of its own.
            shared = axis if axis != "head_size" else f"head_size of {name[0]}"
            known, origin = sizes.setdefault(shared, (length, name))
            if length != known:
                rule = f"must have the {axis} of {origin}, {known}, in {expected} (layout {layout})"
                if axis == "num_kv_heads" and not name.endswith("_cache"):
                    rule += _other_layout(tensors["k_cache"].shape, layout, length)
                raise BadTensorShapeError(name, rule, f"shape {tensor.shape}")
    tokens = tensors["slot_mapping"].shape[0]
    for name in ("k", "v"):
        if tensors[name].shape[0] < tokens:
            rule = f"must have a row for each of the {tokens} slots of slot_mapping"
            raise BadTensorShapeError(name, rule, f"{tensors[name].shape[0]} rows")


def _other_layout(cache: tuple[int, ...], layout: str, heads: int) -> str:
    """Return a hint at the layout in which a cache of this shape has so many heads."""
    fitting = [
        other
        for other, axes in LAYOUTS.items()
        if other != layout and cache[axes.index("num_kv_heads")] == heads
    ]
    return "".join(f"; in layout {other} it has {heads}" for other in fitting)


def _check_strides(tensors: dict[str, TensorDescriptor]) -> None:
    for name, tensor in tensors.items():
        steps = _steps(tensor)
        if tensor.shape[-1] > 1 and steps[-1] != 1:
            rule = "must have stride 1 on its last axis"
            raise BadTensorStridesError(name, rule, f"strides {tensor.strides} (elements)")
        if any(step < 0 for step in steps):
            rule = "must not have negative strides"
            raise BadTensorStridesError(name, rule, f"strides {tensor.strides} (elements)")
        size = tensor.dtype.itemsize
        in_bytes = tuple(step * size for step in steps)
        if name.endswith("_cache") and overlaps_itself(
            view(_ANYWHERE, tensor.dtype, tensor.shape, in_bytes)
        ):
            rule = "must not overlap itself: two of its elements would share their bytes"
            raise BadTensorStridesError(name, rule, f"strides {tensor.strides} (elements)")
