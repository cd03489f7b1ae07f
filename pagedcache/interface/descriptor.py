"""The paged caching operator: write the K and V of each token to the slot that it was given."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.arrays import adopt, reader_of, readers
from pagedcache.environment import switched_on
from pagedcache.info import NAMES, PagedCachingInfo
from pagedcache.interface import checks
from pagedcache.interface.arguments import Arguments, as_address, not_null
from pagedcache.interface.explain import SlotExplanation, as_html
from pagedcache.interface.handle import Handle, parse_device
from pagedcache.status import BadParamError, BadParamTypeError, DestroyedError, shown
from pagedcache.tensors import TensorDescriptor

if TYPE_CHECKING:
    from pagedcache.backend.protocol import LaunchConfig, PagedCaching, Writer

ON_INVALID = ("skip", "raise")

# What recognises the arrays of a call, how their addresses and their stream are found, and what
# writes them.
_Accepted = tuple[
    Callable[..., bool], Callable[[Any], int], Callable[[Any, int], int] | None, "Writer"
]
_NOTHING: _Accepted = (lambda *_: False, int, None, lambda *_: None)


class Descriptor:
    """A paged caching write, checked once and run any number of times.

    Made by `create`; runs with `calculate`; ends with `destroy` or at the end of a ``with`` block.

    Attributes
    ----------
    info : PagedCachingInfo
        Sizes and strides, in elements.
    device : str
        ``"cpu"``, ``"cuda:0"``.
    index : int
        The number in `device`, 0 if there is none.
    workspace_size : int
        Bytes of workspace that `calculate` needs.

    Notes
    -----
    A descriptor may be shared by threads, also while they write on streams of their own. It holds
    no reference to the arrays it was made from. On CUDA it does not survive a ``fork``: in a
    process that is forked after CUDA was used, all use of CUDA is refused with an error that says
    so.
    """

    def __init__(self, info: PagedCachingInfo, device: str, opaque: PagedCaching) -> None:
        self.info = info
        self.device = device
        self.index = parse_device("device", device)[1] or 0
        self.workspace_size: int = opaque.workspace_size
        self._opaque: PagedCaching | None = opaque
        self._write_as_created = opaque.writer(info.num_tokens) if info.num_tokens else None
        self._arguments = Arguments(info, device)
        self._item_mask = info.dtype.itemsize - 1
        self._slot_mask = info.slot_dtype.itemsize - 1
        self._accepted = _NOTHING
        self._apart: int | None = None  # bytes from K cache to V cache, when last looked at

    @classmethod
    def create(
        cls,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        slot_mapping: Any,
        *,
        layout: str = "HND",
        handle: Handle | None = None,
        on_invalid: str = "skip",
        debug: bool | None = None,
    ) -> Descriptor:
        """Check the five tensors, pick the backend, and compile.

        Parameters
        ----------
        k_cache, v_cache : array or TensorDescriptor
            Arrays of NumPy, CuPy or PyTorch, or anything with DLPack, ``__cuda_array_interface__``
            or ``__array_interface__``; never copied.
            ``[num_blocks, num_kv_heads, block_size, head_size]`` for layout ``"HND"``,
            ``[num_blocks, block_size, num_kv_heads, head_size]`` for ``"NHD"``; float16, bfloat16
            or float32. Strides are free and may differ between the two, but the last axis must
            have stride 1. No two elements may share memory, in one cache or, where both are
            arrays, between the two. V may have a head size of its own.
        k, v : array or TensorDescriptor
            ``[num_tokens or more, num_kv_heads, head_size]``, of the same dtype; any strides of 0
            or more, the last axis 1. These and the slots may be JAX arrays too.
        slot_mapping : array or TensorDescriptor
            ``[num_tokens]``, int64 or int32.
        layout : {"HND", "NHD"}
        handle : Handle, optional
            The device to run on. Not given: the one that the arrays are on.
        on_invalid : {"skip", "raise"}
            What to do about slots at or past the end, which are never written. ``"skip"``: count
            them, for `check` to tell, and wait for nothing. ``"raise"``: `calculate` waits for the
            write and raises `InvalidSlotError`, the valid tokens having been written.
        debug : bool, optional
            Whether each `calculate` first waits for the stream, copies slots, K and V to the host,
            and raises, with nothing written, for two tokens with one slot (`DuplicateSlotError`), a
            NaN or an infinity in a row that would be written (`NonFiniteError`), and K, V or slots
            that share memory with a cache (`SourceOverlapError`) or caches that share it
            (`CacheOverlapError`). Slow. Not given: if the environment variable
            ``PAGEDCACHE_DEBUG`` is 1.

        Returns
        -------
        Descriptor
            Serves any number of tokens.

        Raises
        ------
        PagedCacheError
            Its message names the argument, the rule and what was got; see `pagedcache.status`.

        Notes
        -----
        On CUDA this compiles the kernel (about 0.1 s the first time, then found in CuPy's cache
        on disk), so call it before a stream capture begins.
        """
        arrays = (k_cache, v_cache, k, v, slot_mapping)
        described = [_describe(name, array) for name, array in zip(NAMES, arrays, strict=True)]
        info = PagedCachingInfo.create(*described, layout=layout)
        if not isinstance(on_invalid, str) or on_invalid not in ON_INVALID:
            rule = f"must be one of {', '.join(ON_INVALID)}"
            raise BadParamError("on_invalid", rule, shown(on_invalid))
        if debug is None:
            debug = switched_on("PAGEDCACHE_DEBUG", default=False)
        if not isinstance(debug, bool):
            raise BadParamTypeError("debug", "must be True, False or None", shown(debug))
        if handle is not None and not isinstance(handle, Handle):
            raise BadParamTypeError("handle", "must be a pagedcache.Handle", shown(handle))
        place = _common_device(described)
        if handle is None:
            handle = Handle(place)
        elif place is not None and not _same_device(place, handle.device):
            rule = f"must be the device of the arrays, {place}"
            raise BadParamError("handle", rule, handle.device)
        if not any(isinstance(cache, TensorDescriptor) for cache in (k_cache, v_cache)):
            caches = {"k_cache": k_cache, "v_cache": v_cache}
            places = [not_null(name, adopt(name, at).address, 1) for name, at in caches.items()]
            checks.refuse_overlap(info, *places)
        device = handle.opened()
        make = functools.partial(device.operator, "paged_caching", info)
        raising = on_invalid == "raise"
        if raising or debug:
            return cls(
                info, device.name, checks.Checked(make, device, info, raising=raising, debug=debug)
            )
        return cls(info, device.name, make())

    def launch_config(self, num_tokens: int) -> LaunchConfig:
        """Return the launch that `calculate` would make for `num_tokens` tokens.

        Raises
        ------
        BadParamError
            `num_tokens` is negative.
        DestroyedError
            After `destroy`.
        """
        if not isinstance(num_tokens, (int, np.integer)) or num_tokens < 0:
            raise BadParamError("num_tokens", "must be an int of 0 or more", shown(num_tokens))
        return self._alive().launch_config(int(num_tokens))

    def check(self) -> None:
        """Raise if a slot was at or past the end in the writes since the last check.

        For descriptors with ``on_invalid="skip"``. Waits for everything that is queued on the
        device, and clears what it tells. Writes that are captured into a CUDA graph report at each
        replay. Slots that other threads' writes meet while this runs may be told now, later or not.

        Raises
        ------
        InvalidSlotError
            With the lowest token whose slot was invalid, that slot in the earliest call, the number
            of such tokens in all calls, and the capacity.
        LaunchError
            Something that was queued on the device failed.
        NotSupportedError
            A stream is being captured.
        DestroyedError
            After `destroy`.
        """
        if found := self._alive().invalid_slots(None):
            raise checks.invalid(found, self.info)

    def explain(self, slot_or_token: int, slot_mapping: Any = None) -> SlotExplanation:
        """Tell where a token goes: block, offset, and bytes in each cache. Made to be looked at.

        Parameters
        ----------
        slot_or_token : int
            A slot; if `slot_mapping` is given, the index of a token in it.
        slot_mapping : array, optional
            Of ints, on any device; it is read, so on a GPU this waits for it.

        Returns
        -------
        SlotExplanation

        Raises
        ------
        BadParamError
            `slot_or_token` is no int, or no token of `slot_mapping`; or that is no ints.
        DestroyedError
            After `destroy`.
        """
        self._alive()
        try:
            slot, token = operator.index(slot_or_token), None
        except TypeError:
            rule = "must be an int"
            raise BadParamTypeError("slot_or_token", rule, shown(slot_or_token)) from None
        if slot_mapping is not None:
            try:
                count = len(slot_mapping)
                found = operator.index(slot_mapping[slot]) if 0 <= slot < count else None
            except Exception as error:
                rule = f"must be ints along one axis ({error})"
                raise BadParamTypeError("slot_mapping", rule, type(slot_mapping)) from error
            if found is None:
                rule = f"must be one of the {count} tokens of slot_mapping"
                raise BadParamError("slot_or_token", rule, slot)
            slot, token = found, slot
        if not -(2**63) <= slot < 2**63:
            raise BadParamError("slot_or_token", "must fit in 64 bits", shown(slot))
        return SlotExplanation.of(self.info, slot, token)

    def calculate(
        self,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        slot_mapping: Any,
        *,
        workspace: Any = None,
        workspace_size: int = 0,
        stream: Any = None,
    ) -> None:
        """Write the K and V of each token to its slot.

        Token ``t`` goes to block ``slot_mapping[t] // block_size``, offset
        ``slot_mapping[t] % block_size``. A negative slot is padding and is skipped; a slot at or
        past ``info.num_slots`` is never written, and reported as `create` was told to. If two
        tokens have one slot, which of them stays is not defined.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping : array or int
            As at `create`: same device, dtype, shape and strides, but any number of tokens, which
            is the length of `slot_mapping`. `k` and `v` may hold more rows. An int is the address
            of such data and is trusted; if `slot_mapping` is one, the number of tokens is that of
            `create`.
        workspace : array or int, optional
            Scratch memory on the device; needed only if `workspace_size` of the descriptor is
            not 0.
        workspace_size : int
            Its size in bytes.
        stream : optional
            On CUDA, the stream to queue the write on: a ``cupy.cuda.Stream``, a
            ``torch.cuda.Stream``, anything with ``__cuda_stream__``, or the handle as an int.
            ``None`` is the current stream of the library that `k_cache` is of: PyTorch's for its
            tensors; for arrays with only ``__cuda_array_interface__`` the stream that they name, or
            the default stream; CuPy's for all others and for addresses. Not used on the CPU.

        Raises
        ------
        PagedCacheError
            Before anything is launched and with nothing written, but for a `LaunchError` and, with
            ``on_invalid="raise"``, an `InvalidSlotError`.

        Notes
        -----
        On CUDA the write is queued on the stream and this returns at once: nothing is allocated on
        the device, synchronised or compiled (but see `create` for ``on_invalid="raise"`` and
        `debug`, which wait for the stream and cannot be captured). Inputs made on another stream
        must be ordered before this one by the caller; but a JAX array is waited for, on the host.
        On the CPU the write is done when this returns. Any number of threads may call this at once;
        writes to the same slots race.
        """
        if (
            workspace is not None
            or type(workspace_size) is not int
            or workspace_size
            or not self.write_again(k_cache, v_cache, k, v, slot_mapping, stream)
        ):
            arrays = (k_cache, v_cache, k, v, slot_mapping)
            self._check_and_write(arrays, workspace, workspace_size, stream)

    def write_again(
        self, k_cache: Any, v_cache: Any, k: Any, v: Any, slot_mapping: Any, stream: Any
    ) -> bool:
        """Write if all five are as in the call before, so checked; tell whether they were."""
        recognises, address, current, write = self._accepted  # read once: threads may replace it
        try:
            if not recognises(k_cache, v_cache, k, v, slot_mapping):
                return False
            k_cache_at, v_cache_at = address(k_cache), address(v_cache)
            k_at, v_at, slots_at = address(k), address(v), address(slot_mapping)
        except Exception:
            return False
        if current is not None and stream is None:
            stream = current(k_cache, self.index)
        self._write(write, k_cache_at, v_cache_at, k_at, v_at, slots_at, 0, stream)
        return True

    def write_at(
        self,
        k_cache: int | None,
        v_cache: int | None,
        k: int | None,
        v: int | None,
        slot_mapping: int | None,
        workspace: int | None = None,
        workspace_size: int = 0,
        stream: int | None = None,
    ) -> None:
        """Write as many tokens as at `create`, all tensors given by their addresses, as in C.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping, workspace : int or None
            Addresses on the device, which are trusted; 0 and ``None`` are NULL.
        workspace_size : int
            In bytes.
        stream : int or None
            Handle of the stream. 0 and ``None`` are CUDA's default stream, as in C.

        Raises
        ------
        PagedCacheError
            As `calculate`.
        """
        write = self._write_as_created  # read once: another thread may destroy this
        if (
            type(k_cache) is type(v_cache) is type(k) is type(v) is type(slot_mapping) is int
            and type(workspace_size) is int
            and workspace_size == 0 == self.workspace_size
            and write is not None
        ):
            self._write(write, k_cache, v_cache, k, v, slot_mapping, 0, stream or 0)
            return
        addresses = [
            as_address(name, address)
            for name, address in zip(
                (*NAMES, "workspace", "stream"),
                (k_cache, v_cache, k, v, slot_mapping, workspace, stream),
                strict=True,
            )
        ]
        *tensors, workspace, stream = addresses
        self._check_and_write(tuple(tensors), workspace, workspace_size, stream)

    def _write(
        self,
        write: Writer,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slot_mapping: int,
        workspace: int,
        stream: Any,
    ) -> None:
        """Check the addresses of tensors that are otherwise known to be right, and write."""
        bits = k_cache | v_cache | k | v
        if (
            bits & self._item_mask
            or slot_mapping & self._slot_mask
            or (bits | slot_mapping) >> 63
            or not (k_cache and v_cache and k and v and slot_mapping)
        ):
            self._arguments.refuse_addresses((k_cache, v_cache, k, v, slot_mapping))
        if v_cache - k_cache != self._apart:
            self._apart = self._arguments.distance(k_cache, v_cache)
        write(k_cache, v_cache, k, v, slot_mapping, workspace, stream)

    def _check_and_write(
        self, arrays: tuple[Any, ...], workspace: Any, workspace_size: int, stream: Any
    ) -> None:
        """Check everything, and remember the arrays' looks."""
        opaque = self._alive()
        k_cache, v_cache, k, v, slot_mapping, tokens = self._arguments.read(arrays)
        if stream is None and type(arrays[0]) is not int:
            current = reader_of("k_cache", arrays[0]).stream
            stream = current and current(arrays[0], self.index)
        workspace_at = self._arguments.workspace(workspace, workspace_size, self.workspace_size)
        if not tokens:
            return
        write = opaque.writer(tokens)
        if self.workspace_size == 0:
            self._accepted = _accept(arrays, write)
            if self._opaque is None:  # another thread has destroyed this meanwhile
                self._accepted = _NOTHING
        self._write(write, k_cache, v_cache, k, v, slot_mapping, workspace_at, stream)

    def destroy(self) -> None:
        """Let go of the kernel and the device. Twice is no error; any other use after it is."""
        self._opaque = None
        self._write_as_created = None
        self._accepted = _NOTHING

    def __enter__(self) -> Descriptor:
        self._alive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    def __repr__(self) -> str:
        info = self.info
        heads = f"{info.num_kv_heads} x {info.head_size}"
        if info.v_head_size != info.head_size:
            heads += f" (V {info.v_head_size})"
        state = "" if self._opaque is not None else ", destroyed"
        return (
            f"<pagedcache.Descriptor {info.layout} {info.dtype} on {self.device}: {heads} heads, "
            f"{info.num_blocks} blocks of {info.block_size}, {info.slot_dtype} slots{state}>"
        )

    def _repr_html_(self) -> str:
        info = self.info
        rows = [
            ("layout", f"{info.layout}, {info.dtype}, {info.slot_dtype} slots"),
            ("device", self.device),
            ("capacity", f"{info.num_blocks} blocks of {info.block_size} = {info.num_slots} slots"),
            ("KV heads", str(info.num_kv_heads)),
            ("head size", f"{info.head_size} of K, {info.v_head_size} of V"),
            *((f"strides of {name}", str(info.tensor(name).strides)) for name in NAMES[:4]),
        ]
        if self._opaque is None:
            rows.append(("state", "destroyed"))
        else:
            config = self._opaque.launch_config(info.num_tokens)
            rows.append(
                (
                    f"launch for {info.num_tokens} tokens",
                    f"grid {config.grid}, block {config.block}",
                )
            )
        return as_html(rows)

    def _alive(self) -> PagedCaching:
        if self._opaque is None:
            raise DestroyedError("descriptor", "must not be used after destroy")
        return self._opaque


def _describe(name: str, array: Any) -> TensorDescriptor:
    if isinstance(array, TensorDescriptor):
        return array
    tensor = adopt(name, array)
    described = tensor.describe(name)
    if name.endswith("_cache") and not tensor.writable:
        raise BadParamError(name, "must be writable", "a read-only array")
    return described


def _common_device(described: list[TensorDescriptor]) -> str | None:
    """Return the one device of those that have one; an index, where given, decides."""
    place: str | None = None
    origin = ""
    for name, tensor in zip(NAMES, described, strict=True):
        if tensor.device is None:
            continue
        _, index = parse_device(f"device of {name}", tensor.device)
        if place is not None and not _same_device(place, tensor.device):
            raise BadParamError(name, f"must be on {place} as {origin} is", tensor.device)
        if place is None or index is not None:
            place, origin = tensor.device, name
    return place


def _same_device(one: str, other: str) -> bool:
    """Compare two device names; one without an index is any of its type."""
    (kind, index), (other_kind, other_index) = (
        parse_device("device", one),
        parse_device("device", other),
    )
    return kind == other_kind and (None in (index, other_index) or index == other_index)


def _accept(arrays: tuple[Any, ...], write: Writer) -> _Accepted:
    """Return what is needed to know arrays like these again, where that is possible."""
    kind = type(arrays[0])
    if kind not in readers or any(type(array) is not kind for array in arrays):
        return _NOTHING
    reader = readers[kind]
    try:
        return reader.recogniser(*arrays), reader.address, reader.stream, write
    except Exception:
        return _NOTHING
