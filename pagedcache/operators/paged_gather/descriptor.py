# SPDX-License-Identifier: Apache-2.0
"""A paged gather that is checked once and run any number of times."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pagedcache.cache.sides import refuse_bad_scales
from pagedcache.operators.paged_gather.info import FREE, NAMES, OPTIONAL, PagedGatherInfo
from pagedcache.operators.slot_operation import SlotOperation

if TYPE_CHECKING:
    from pagedcache.backend.handle import Handle
    from pagedcache.operators.careful import Inspect


class GatherDescriptor(SlotOperation[PagedGatherInfo]):
    """A paged gather, checked once and run any number of times.

    Created by `create`, run by `calculate`, ended by `destroy` or by the end of a ``with`` block.

    Attributes
    ----------
    info : PagedGatherInfo
        Sizes and strides, in elements.
    device : str
        Such as ``"cpu"`` or ``"cuda:0"``.
    workspace_size : int
        0: a gather needs no workspace.

    Notes
    -----
    Streams, threads and forks are as in `Descriptor`.
    """

    name: ClassVar[str] = "paged_gather"
    arguments: ClassVar[tuple[str, ...]] = NAMES
    free: ClassVar[frozenset[str]] = frozenset(FREE)
    optional: ClassVar[frozenset[str]] = frozenset(OPTIONAL)
    implementations: ClassVar[dict[str, str]] = {
        "cpu": "pagedcache.operators.paged_gather.cpu:PagedGather",
        "cuda": "pagedcache.operators.paged_gather.nvidia:PagedGather",
        "rocm": "pagedcache.operators.paged_gather.nvidia:PagedGather",
    }

    @classmethod
    def create(
        cls,
        k_cache: Any,
        v_cache: Any,
        slot_mapping: Any,
        k_out: Any,
        v_out: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        k_format: str | None = None,
        v_format: str | None = None,
        layout: str | None = None,
        handle: Handle | None = None,
        on_invalid: str = "skip",
        debug: bool | None = None,
    ) -> GatherDescriptor:
        """Check the tensors, pick the backend of their device, and compile.

        Parameters
        ----------
        k_cache, v_cache : array or TensorDescriptor
            As in `Descriptor.create`. `v_cache` and `v_out` may both be ``None``.
        slot_mapping : array or TensorDescriptor
            ``[num_tokens]``, int64 or int32. A slot may be read any number of times.
        k_out, v_out : array or TensorDescriptor
            ``[num_tokens or more, num_kv_heads, head_size]``, float16, bfloat16 or float32, with
            any strides that are not negative, the last axis 1. They must share no memory with each
            other, with a cache or with a scale.
        k_scale, v_scale : array or TensorDescriptor, optional
            Of the shapes that `Descriptor.create` names; all of them are read.
        k_format, v_format : str, optional
            As in `Descriptor.create`. Needed where a cache is of bytes (uint8), and where it is of
            another of the three types above than `k_out` and `v_out`.
        layout : {"HND", "NHD"}, optional
            By default, the one in which the caches have as many KV heads as `k_out`.
        handle : Handle, optional
            The device to run on. By default, the one that the arrays are on.
        on_invalid : {"skip", "raise"}
            What to do about slots outside the cache, which are never read. ``"skip"``: count them
            for `check`. ``"raise"``: `calculate` waits and raises `InvalidSlotError`.
        debug : bool, optional
            Whether each `calculate` first waits for the stream, and raises if an output shares
            memory with the slots (`SourceOverlapError`), or a scale that all tokens share is not
            positive and finite. By default, whether ``PAGEDCACHE_DEBUG`` is 1.

        Returns
        -------
        GatherDescriptor
            For any number of tokens.

        Raises
        ------
        PagedCacheError
            The message names the argument, what it must be and what it was.

        Notes
        -----
        On CUDA this compiles the kernel, so create a descriptor before a stream capture begins.
        """
        return cls._create(
            (k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale),
            functools.partial(
                PagedGatherInfo.create, layout=layout, k_format=k_format, v_format=v_format
            ),
            handle=handle,
            on_invalid=on_invalid,
            debug=debug,
        )

    def calculate(
        self,
        k_cache: Any,
        v_cache: Any,
        slot_mapping: Any,
        k_out: Any,
        v_out: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        stream: Any = None,
    ) -> None:
        """Read what is stored in the slot of each token into its row of the outputs.

        Row ``t`` becomes ``float32(code) * scale`` of slot ``slot_mapping[t]``, rounded to the
        dtype of the output; bits are copied unchanged if the dtypes are equal. Rows of negative
        slots, which are padding, and of slots past the end are left as they are; the latter are
        reported as `create` was told to.

        Parameters
        ----------
        k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale : array or int
            Of the device, dtypes, shapes and strides that the descriptor was created for, but with
            any number of tokens, which is the length of `slot_mapping`; the outputs may have more
            rows. An int is the address of such data and is trusted.
        stream : optional
            As in `Descriptor.calculate`.

        Raises
        ------
        PagedCacheError
            Before anything is queued or written, except for a `LaunchError` and, with
            ``on_invalid="raise"``, an `InvalidSlotError`.

        Notes
        -----
        On CUDA the gather is queued on the stream and this returns at once. It allocates,
        synchronizes and compiles nothing, so it can be captured. If the cache was written on
        another stream, order that stream before this one. Any number of threads may call this at
        the same time.
        """
        if not self.latest(k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale, stream):
            self.run((k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale), stream)

    def bind(
        self,
        k_cache: Any,
        v_cache: Any,
        slot_mapping: Any,
        k_out: Any,
        v_out: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        stream: Any = None,
    ) -> Callable[[], None]:
        """Return a function that queues the gather of these arrays each time it is called.

        Parameters
        ----------
        k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale : array or int
            See `calculate`, and `Descriptor.bind` for what must stay as it is.
        stream : optional
            See `calculate`. By default, the stream that is current at each call.

        Returns
        -------
        callable
            Without arguments. Raises `DestroyedError` after `destroy`. Threads may share it.

        Raises
        ------
        PagedCacheError
            See `calculate`.
        """
        arrays = (k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale)
        return self._bind(arrays, stream)

    @property
    def _inspect(self) -> Inspect:
        return functools.partial(refuse_bad_scales, self.info.sides)

    def __repr__(self) -> str:
        info = self.info
        state = "" if self._implementation is not None else ", destroyed"
        return (
            f"<pagedcache.GatherDescriptor {info.layout} {self._formats()} to {info.dtype} on "
            f"{self.device}: {self._heads()} heads, {info.num_blocks} blocks of {info.block_size}, "
            f"{info.slot_dtype} slots{state}>"
        )
