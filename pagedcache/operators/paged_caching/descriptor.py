# SPDX-License-Identifier: Apache-2.0
"""A paged caching write that is checked once and run any number of times."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pagedcache.operators.base import NO_WORKSPACE, Operation
from pagedcache.operators.paged_caching.explain import SlotExplanation
from pagedcache.operators.paged_caching.info import RULES, PagedCachingInfo
from pagedcache.operators.paged_caching.inspect import inspect
from pagedcache.status import BadParamError, BadParamTypeError, InvalidSlotError, shown

if TYPE_CHECKING:
    from pagedcache.backend.handle import Handle
    from pagedcache.backend.protocol import Invalid, LaunchConfig
    from pagedcache.display import Rows
    from pagedcache.operators.careful import Inspect


class Descriptor(Operation[PagedCachingInfo]):
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
    arguments: ClassVar[tuple[str, ...]] = RULES["HND"].names
    free: ClassVar[frozenset[str]] = RULES["HND"].free_names
    implementations: ClassVar[dict[str, str]] = {
        "cpu": "pagedcache.operators.paged_caching.cpu:PagedCaching",
        "cuda": "pagedcache.operators.paged_caching.nvidia:PagedCaching",
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
        layout: str | None = None,
        handle: Handle | None = None,
        on_invalid: str = "skip",
        debug: bool | None = None,
    ) -> Descriptor:
        """Check the five tensors, pick the backend of their device, and compile.

        Parameters
        ----------
        k_cache, v_cache : array or TensorDescriptor
            Arrays of NumPy, CuPy or PyTorch, or any with DLPack, ``__cuda_array_interface__`` or
            ``__array_interface__``; never copied.
            ``[num_blocks, num_kv_heads, block_size, head_size]`` for layout ``"HND"``,
            ``[num_blocks, block_size, num_kv_heads, head_size]`` for ``"NHD"``; float16, bfloat16
            or float32. Each may have any strides, but the last axis must have stride 1. No two
            elements may share memory, in one cache or, where both are arrays, in the two. V may
            have a head size of its own.
        k, v : array or TensorDescriptor
            ``[num_tokens or more, num_kv_heads, head_size]``, of the same dtype, with any strides
            that are not negative, the last axis 1. These and the slots may also be JAX arrays.
        slot_mapping : array or TensorDescriptor
            ``[num_tokens]``, int64 or int32.
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
            row that would be written has a NaN or an infinity (`NonFiniteError`), or K, V or the
            slots share memory with a cache (`SourceOverlapError`). Slow. By default, whether the
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
        find it in CuPy's cache on disk. Create a descriptor before a stream capture begins. Each
        one takes 64 bytes of device memory until the process ends, because a graph may write to
        them even after `destroy`.
        """
        return cls._create(
            (k_cache, v_cache, k, v, slot_mapping),
            functools.partial(PagedCachingInfo.create, layout=layout),
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
        workspace: Any = None,
        workspace_size: int = NO_WORKSPACE,
        stream: Any = None,
    ) -> None:
        """Write the K and V of each token to its slot.

        Token ``t`` goes to block ``slot_mapping[t] // block_size``, offset
        ``slot_mapping[t] % block_size``. A negative slot is padding and is skipped. A slot of
        ``info.num_slots`` or more is never written, and is reported as `create` was told to. If two
        tokens have the same slot, either of them may end up there.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping : array or int
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
            or not self.latest(k_cache, v_cache, k, v, slot_mapping, stream)
        ):
            arrays = (k_cache, v_cache, k, v, slot_mapping)
            self.run(arrays, stream, workspace, workspace_size)

    def bind(
        self, k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any, *, stream: Any = None
    ) -> Callable[[], None]:
        """Return a function that queues the write of these arrays each time it is called.

        For buffers that stay where they are and are refilled, as for a CUDA graph. The arrays are
        checked here, once, and kept alive by the function. They must stay as they are: it goes
        unnoticed if one is resized, gets other memory, or requires grad later on.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping : array or int
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
        return self._bind((k_cache, v_cache, k, v, slot_mapping), stream)

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
            or not matcher(k_cache, v_cache, k, v, slot_mapping, stream or 0)
        ):
            addresses = (k_cache, v_cache, k, v, slot_mapping)
            self._run_at(addresses, workspace, workspace_size, stream)

    def launch_config(self, num_tokens: int) -> LaunchConfig:
        """Return the launch that `calculate` makes for this many tokens.

        Parameters
        ----------
        num_tokens : int

        Returns
        -------
        LaunchConfig

        Raises
        ------
        BadParamError
            `num_tokens` is not an int, or is negative.
        DestroyedError
            After `destroy`.
        """
        return self._launch_config("num_tokens", num_tokens)

    def check(self) -> None:
        """Raise if the calls since the last check met a slot past the end of the cache.

        For descriptors with ``on_invalid="skip"``. On CUDA this waits for the streams that the
        descriptor was run on since then, and for nothing else: other threads can go on, and can
        capture. A stream that was passed as an int must still exist.

        Calls in a CUDA graph are reported too, but a replay is not waited for: synchronize its
        stream first. Slots that other threads meet meanwhile are reported now or next time.

        Raises
        ------
        InvalidSlotError
            With the first token whose slot was invalid, its slot in the earliest such call, the
            number of such tokens in all calls, and the capacity of the cache.
        LaunchError
            Something that was queued on these streams failed.
        NotSupportedError
            One of these streams is being captured, or is CUDA's default stream while a stream that
            blocks it is being captured.
        DestroyedError
            After `destroy`.

        Notes
        -----
        If other threads ran this descriptor on the per-thread default stream, this waits for all
        streams of the device, since nothing else can name theirs.
        """
        super().check()

    def explain(self, slot_or_token: int, slot_mapping: Any = None) -> SlotExplanation:
        """Show where a token goes: its block, offset, and bytes in each cache.

        Parameters
        ----------
        slot_or_token : int
            A slot; if `slot_mapping` is given, the index of a token in it.
        slot_mapping : array, optional
            Of ints, on any device. It is read, so on a GPU this waits for it.

        Returns
        -------
        SlotExplanation
            Made to be printed, or displayed in a notebook.

        Raises
        ------
        BadParamError
            `slot_or_token` is not an int or not a token of `slot_mapping`, or `slot_mapping` is not
            a sequence of ints.
        DestroyedError
            After `destroy`.
        """
        self._alive()
        try:
            slot, token = operator.index(slot_or_token), None
        except Exception:  # of whatever was given
            rule = "must be an int"
            raise BadParamTypeError("slot_or_token", rule, shown(slot_or_token)) from None
        if slot_mapping is not None:
            try:
                count = len(slot_mapping)
                found = operator.index(slot_mapping[slot]) if 0 <= slot < count else None
            except Exception as error:
                rule = f"must be a sequence of ints ({error})"
                raise BadParamTypeError("slot_mapping", rule, type(slot_mapping)) from error
            if found is None:
                rule = f"must be one of the {count} tokens of slot_mapping"
                raise BadParamError("slot_or_token", rule, shown(slot))
            slot, token = found, slot
        if not -(2**63) <= slot < 2**63:
            raise BadParamError("slot_or_token", "must fit in 64 bits", shown(slot))
        return SlotExplanation.of(self.info, slot, token)

    @property
    def _inspect(self) -> Inspect:
        return functools.partial(inspect, self.info)

    def _invalid(self, found: Invalid, where: str = "in this call") -> InvalidSlotError:
        return InvalidSlotError(found.row, found.value, found.count, self.info.num_slots, where)

    def __repr__(self) -> str:
        info = self.info
        heads = f"{info.num_kv_heads} x {info.head_size}"
        if info.v_head_size != info.head_size:
            heads += f" (V {info.v_head_size})"
        state = "" if self._implementation is not None else ", destroyed"
        return (
            f"<pagedcache.Descriptor {info.layout} {info.dtype} on {self.device}: {heads} heads, "
            f"{info.num_blocks} blocks of {info.block_size}, {info.slot_dtype} slots{state}>"
        )

    def _rows(self) -> Rows:
        info = self.info
        strides = {one.name: one.strides for one in self._arguments.expected if len(one.shape) > 1}
        rows = [
            ("layout", f"{info.layout}, {info.dtype}, {info.slot_dtype} slots"),
            ("device", self.device),
            ("capacity", f"{info.num_blocks} blocks of {info.block_size} = {info.num_slots} slots"),
            ("KV heads", str(info.num_kv_heads)),
            ("head size", f"{info.head_size} of K, {info.v_head_size} of V"),
            *((f"strides of {name}, bytes", str(steps)) for name, steps in strides.items()),
        ]
        if self._implementation is not None:
            config = self._implementation.launch_config(info.num_tokens)
            launch = f"grid {config.grid}, block {config.block}"
            rows.append((f"launch for {info.num_tokens} tokens", launch))
        return rows
