# SPDX-License-Identifier: Apache-2.0
"""A paged caching write that is checked once and run any number of times."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pagedcache.operators.base import NO_WORKSPACE
from pagedcache.operators.paged_caching.info import FREE, NAMES, OPTIONAL, PagedCachingInfo
from pagedcache.operators.paged_caching.inspect import inspect
from pagedcache.operators.slot_operation import SlotOperation

if TYPE_CHECKING:
    from pagedcache.backend.handle import Handle
    from pagedcache.operators.careful import Inspect


class Descriptor(SlotOperation[PagedCachingInfo]):
    """A paged caching write, checked once and run any number of times.

    Created by `create`, run by `calculate`, ended by `destroy` or by the end of a ``with`` block.

    Attributes
    ----------
    info : PagedCachingInfo
        Sizes and strides, in elements.
    device : str
        Such as ``"cpu"`` or ``"cuda:0"``.
    workspace_size : int
        Bytes of workspace that `calculate` needs.

    Notes
    -----
    Threads may share a descriptor and use it at the same time, each on a stream of its own. It
    holds no reference to the arrays that it was created from. On CUDA it does not survive a
    ``fork``: a process that was forked after CUDA was used cannot use CUDA, and is told so.
    """

    name: ClassVar[str] = "paged_caching"
    arguments: ClassVar[tuple[str, ...]] = NAMES
    free: ClassVar[frozenset[str]] = frozenset(FREE)
    optional: ClassVar[frozenset[str]] = frozenset(OPTIONAL)
    implementations: ClassVar[dict[str, str]] = {
        "cpu": "pagedcache.operators.paged_caching.cpu:PagedCaching",
        "cuda": "pagedcache.operators.paged_caching.nvidia:implementation",
        "rocm": "pagedcache.operators.paged_caching.nvidia:implementation",
    }

    @classmethod
    def create(
        cls,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        slot_mapping: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        k_format: str | None = None,
        v_format: str | None = None,
        layout: str | None = None,
        handle: Handle | None = None,
        on_invalid: str = "skip",
        debug: bool | None = None,
    ) -> Descriptor:
        """Check the tensors, pick the backend of their device, and compile.

        Parameters
        ----------
        k_cache, v_cache : array or TensorDescriptor
            Arrays of NumPy, CuPy or PyTorch, or any with DLPack, ``__cuda_array_interface__`` or
            ``__array_interface__``; never copied.
            ``[num_blocks, num_kv_heads, block_size, head_size]`` for layout ``"HND"``,
            ``[num_blocks, block_size, num_kv_heads, head_size]`` for ``"NHD"``; float16, bfloat16,
            float32, float8_e4m3fn, float8_e5m2, int8, or uint8 for bytes in any 8-bit format or in
            int4, which has a last axis of ``head_size / 2``. Each may have any strides, but the
            last axis must have stride 1. No two elements may share memory, in one cache or, where
            both are arrays, in the two. V may have a head size and a format of its own.
        k, v : array or TensorDescriptor
            ``[num_tokens or more, num_kv_heads, head_size]``, float16, bfloat16 or float32, with
            any strides that are not negative, the last axis 1. These, the slots, and scales that
            are read may also be JAX arrays.
        slot_mapping : array or TensorDescriptor
            ``[num_tokens]``, int64 or int32.
        k_scale, v_scale : array or TensorDescriptor, optional
            float32 scales: optional for 8-bit floats (1 by default), required for int8 and int4.
            The shape says what shares a scale. One element: the whole cache.
            ``[num_kv_heads]``: a head. ``[num_kv_heads, head_size]``: a dimension of a head. These
            are read, and ``x / scale`` is stored. ``[num_blocks, num_kv_heads, block_size]`` (in
            ``"NHD"``, ``[num_blocks, block_size, num_kv_heads]``): a token's row in a head; with
            one more axis of ``head_size / n``: ``n`` neighbouring elements of such a row. These are
            computed and written: ``scale = max(amax / most, 1e-6)``, where `most` is 448, 57344,
            127 or 7, and ``x * (1 / scale)`` is stored. In a cache of a single row, one element in
            such a shape is computed too. Any strides, so scales may be beside the
            rows or inside them, but they must share no memory with a cache.
        k_format, v_format : str, optional
            How K and V are stored: ``"float16"``, ``"bfloat16"``, ``"float32"``,
            ``"float8_e4m3fn"``, ``"float8_e5m2"``, ``"int8"`` or ``"int4"``. Needed where a cache
            is of bytes (uint8), and where it is of another of the first three than `k` and `v`. By
            default, the dtype of the cache.
        layout : {"HND", "NHD"}, optional
            By default, the one in which the caches have as many KV heads as `k`. It must be given
            if a block has as many slots as there are KV heads, which allows both.
        handle : Handle, optional
            The device to run on. By default, the one that the arrays are on.
        on_invalid : {"skip", "raise"}
            What to do about slots outside the cache, which are never written. ``"skip"``: count
            them for `check`, and wait for nothing. ``"raise"``: `calculate` waits for the write and
            raises `InvalidSlotError` once the valid tokens have been written.
        debug : bool, optional
            Whether each `calculate` first waits for the stream, copies slots, K and V to the host,
            and raises, with nothing written, if two tokens have one slot (`DuplicateSlotError`), a
            row that would be written has a NaN or an infinity (`NonFiniteError`), a scale that is
            read is not positive and finite (`BadParamError`), or K, V or the slots share memory
            with a cache (`SourceOverlapError`). Slow. By default, whether the
            environment variable ``PAGEDCACHE_DEBUG`` is 1.

        Returns
        -------
        Descriptor
            For any number of tokens.

        Raises
        ------
        PagedCacheError
            The message names the argument, what it must be and what it was; see
            `pagedcache.status`.

        Notes
        -----
        On CUDA this compiles the kernel, which takes about 0.1 s the first time; later processes
        find it in CuPy's cache on disk. Create a descriptor before a stream capture begins, unless
        `warmup` has compiled its kernel in this process. Each takes 64 bytes of device memory until
        the process ends, because a graph may write to them even after `destroy`.
        """
        return cls._create(
            (k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale),
            functools.partial(
                PagedCachingInfo.create, layout=layout, k_format=k_format, v_format=v_format
            ),
            handle=handle,
            on_invalid=on_invalid,
            debug=debug,
        )

    def calculate(
        self,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        slot_mapping: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        workspace: Any = None,
        workspace_size: int = NO_WORKSPACE,
        stream: Any = None,
    ) -> None:
        """Write the K and V of each token to its slot.

        Token ``t`` goes to block ``slot_mapping[t] // block_size``, offset
        ``slot_mapping[t] % block_size``. A negative slot is padding and is skipped. A slot of
        ``info.num_slots`` or more is never written, and is reported as `create` was told to. If two
        tokens have the same slot, either of them may end up there; where the cache is in another
        format, the row may become a mix of both.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale : array or int
            Of the device, dtypes, shapes and strides that the descriptor was created for, but with
            any number of tokens, which is the length of `slot_mapping`; `k` and `v` may have more
            rows. An int is the address of such data and is trusted; if `slot_mapping` is one, the
            number of tokens is that of `create`.
        workspace : array or int, optional
            Scratch memory on the device, needed only if the descriptor's `workspace_size` is not 0.
        workspace_size : int
            Its size in bytes.
        stream : optional
            On CUDA, the stream to queue the write on: a ``cupy.cuda.Stream``, a
            ``torch.cuda.Stream``, any object with ``__cuda_stream__``, or the handle as an int. By
            default, the current stream of the library that `k_cache` belongs to: PyTorch's for its
            tensors; for arrays with only ``__cuda_array_interface__`` the stream that they name, or
            the default stream; CuPy's for all others and for addresses. Not used on the CPU.

        Raises
        ------
        PagedCacheError
            Before anything is queued or written, except for a `LaunchError` and, with
            ``on_invalid="raise"``, an `InvalidSlotError`.

        Notes
        -----
        On CUDA the write is queued on the stream and this returns at once. Nothing is allocated on
        the device, synchronized or compiled (but `create` with ``on_invalid="raise"`` or `debug`
        makes this wait for the stream, so it cannot be captured). If inputs were made on another
        stream, order that stream before this one; JAX arrays are waited for on the host. On the CPU
        the write is done when this returns. Any number of threads may call this at the same time;
        writes to the same slot race.

        PyTorch's autograd sees an in-place operation without a gradient: it notices if it had kept
        a cache that is written, and a cache that requires grad is refused unless gradients are
        disabled. No gradient flows from a cache to K and V.
        """
        if (
            workspace is not None
            or workspace_size is not NO_WORKSPACE
            or not self.latest(k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale, stream)
        ):
            arrays = (k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale)
            self.run(arrays, stream, workspace, workspace_size)

    def bind(
        self,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        slot_mapping: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        stream: Any = None,
    ) -> Callable[[], None]:
        """Return a function that queues the write of these arrays each time it is called.

        For buffers that stay where they are and are refilled, as for a CUDA graph. The arrays are
        checked here, once, and kept alive by the function. They must stay as they are: it goes
        unnoticed if one is resized, gets other memory, or requires grad later on.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale : array or int
            See `calculate`.
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
        return self._bind((k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale), stream)

    def _write_at(
        self,
        k_cache: int | None,
        v_cache: int | None,
        k: int | None,
        v: int | None,
        slot_mapping: int | None,
        workspace: int | None = None,
        workspace_size: int = NO_WORKSPACE,
        stream: int | None = None,
    ) -> None:
        """Write as many tokens as at `create`, given addresses, as in C; 0 is NULL."""
        matcher = self.matchers.get(int)  # of addresses
        if (
            matcher is None
            or workspace_size is not NO_WORKSPACE
            or not (type(workspace) is int or workspace is None)
            or not (type(stream) is int or stream is None)
            or not matcher(k_cache, v_cache, k, v, slot_mapping, None, None, stream or 0)
        ):
            addresses = (k_cache, v_cache, k, v, slot_mapping)
            self._run_at(addresses, workspace, workspace_size, stream)

    @property
    def _inspect(self) -> Inspect:
        return functools.partial(inspect, self.info)

    def __repr__(self) -> str:
        info = self.info
        formats = str(info.dtype) if info.copies else f"{info.dtype} to {self._formats()}"
        state = "" if self._implementation is not None else ", destroyed"
        return (
            f"<pagedcache.Descriptor {info.layout} {formats} on {self.device}: {self._heads()} "
            f"heads, {info.num_blocks} blocks of {info.block_size}, {info.slot_dtype} slots{state}>"
        )
