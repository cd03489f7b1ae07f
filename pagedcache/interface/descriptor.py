"""The paged caching operator: write the K and V of each token to the slot that it was given."""

from __future__ import annotations

import functools
import operator
import os
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pagedcache.arrays import adopt, reader_of, readers
from pagedcache.info import NAMES, PagedCachingInfo, token_step
from pagedcache.interface import checks
from pagedcache.interface.explain import SlotExplanation, as_html
from pagedcache.interface.handle import Handle, parse_device
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    BadTensorShapeError,
    BadTensorStridesError,
    DestroyedError,
    InsufficientWorkspaceError,
    NullPointerError,
)
from pagedcache.tensors import Tensor, TensorDescriptor

if TYPE_CHECKING:
    from pagedcache.backend.protocol import LaunchConfig
    from pagedcache.dtypes import Dtype

ON_INVALID = ("skip", "raise")


class _Expected(NamedTuple):
    """What one argument of `calculate` must look like; the token axis is free."""

    dtype: Dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes


class Descriptor:
    """A paged caching write, checked once and run any number of times.

    Made by `create`; runs with `calculate`; ends with `destroy` or at the end of a ``with`` block.

    Attributes
    ----------
    info : PagedCachingInfo
        Sizes and strides, in elements.
    device : str
        ``"cpu"``, ``"cuda:0"``.
    workspace_size : int
        Bytes of workspace that `calculate` needs.

    Notes
    -----
    A descriptor may be shared by threads, also while they write on streams of their own. It holds
    no reference to the arrays it was made from. On CUDA it does not survive a ``fork``: in a
    process that is forked after CUDA was used, all use of CUDA is refused with an error that says
    so.
    """

    def __init__(self, info: PagedCachingInfo, device: str, opaque: Any) -> None:
        self.info = info
        self.device = device
        self._index = parse_device("device", device)[1] or 0
        self.workspace_size: int = opaque.workspace_size
        self._opaque = opaque
        self._expected = tuple(_expectation(info, name) for name in NAMES)
        self._item_mask = info.dtype.itemsize - 1
        self._slot_mask = info.slot_dtype.itemsize - 1
        self._accepted: Any = None
        self._spans = tuple(_span(expected) for expected in self._expected[:2])
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
            raise BadParamError("on_invalid", rule, repr(on_invalid))
        if debug is None:
            debug = os.environ.get("PAGEDCACHE_DEBUG") == "1"
        if not isinstance(debug, bool):
            raise BadParamTypeError("debug", "must be True, False or None", repr(debug))
        if handle is not None and not isinstance(handle, Handle):
            raise BadParamTypeError("handle", "must be a pagedcache.Handle", repr(handle))
        place = _common_device(described)
        if handle is None:
            handle = Handle(place)
        elif place is not None and not _same_device(place, handle.device):
            rule = f"must be the device of the arrays, {place}"
            raise BadParamError("handle", rule, handle.device)
        if not any(isinstance(cache, TensorDescriptor) for cache in (k_cache, v_cache)):
            caches = (adopt("k_cache", k_cache), adopt("v_cache", v_cache))
            checks.refuse_overlap(info, *(cache.address for cache in caches))
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
            raise BadParamError("num_tokens", "must be an int of 0 or more", repr(num_tokens))
        config: LaunchConfig = self._alive().launch_config(int(num_tokens))
        return config

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
            `slot_or_token` is no int, or no token of `slot_mapping`.
        """
        try:
            slot, token = operator.index(slot_or_token), None
        except TypeError:
            rule = "must be an int"
            raise BadParamTypeError("slot_or_token", rule, repr(slot_or_token)) from None
        if slot_mapping is not None:
            count = len(slot_mapping)
            if not 0 <= slot < count:
                rule = f"must be one of the {count} tokens of slot_mapping"
                raise BadParamError("slot_or_token", rule, slot)
            slot, token = int(slot_mapping[slot]), slot
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
        try:
            look, address, _, current = readers[type(k_cache)]
            looks = look(k_cache), look(v_cache), look(k), look(v), look(slot_mapping)
            k_cache_at, v_cache_at = address(k_cache), address(v_cache)
            k_at, v_at, slots_at = address(k), address(v), address(slot_mapping)
        except Exception:
            looks = None
        # What looks as the arrays of the call before did has been checked then.
        if (
            looks != self._accepted
            or looks is None
            or workspace is not None
            or type(workspace_size) is not int
            or workspace_size
        ):
            arrays = (k_cache, v_cache, k, v, slot_mapping)
            self._check_and_write(arrays, looks, workspace, workspace_size, stream)
            return
        # What `_write` does, without another call: this is the hot path.
        if (k_cache_at | v_cache_at | k_at | v_at) & self._item_mask or slots_at & self._slot_mask:
            self._refuse_addresses((k_cache_at, v_cache_at, k_at, v_at, slots_at))
        if v_cache_at - k_cache_at != self._apart:
            self._refuse_overlap(k_cache_at, v_cache_at)
        if tokens := looks[4][0][0]:
            if current is not None and stream is None:
                stream = current(k_cache, self._index)
            opaque = self._opaque or self._alive()
            opaque.calculate(k_cache_at, v_cache_at, k_at, v_at, slots_at, tokens, 0, stream)

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
        if (
            type(k_cache) is type(v_cache) is type(k) is type(v) is type(slot_mapping) is int
            and k_cache > 0 < v_cache
            and k > 0 < v
            and slot_mapping > 0
            and type(workspace_size) is int
            and workspace_size == 0 == self.workspace_size
            and self._opaque is not None
        ):
            tokens = self.info.num_tokens
            self._write(k_cache, v_cache, k, v, slot_mapping, tokens, 0, stream or 0)
            return
        addresses = [
            _as_address(name, address)
            for name, address in zip(
                (*NAMES, "workspace", "stream"),
                (k_cache, v_cache, k, v, slot_mapping, workspace, stream),
                strict=True,
            )
        ]
        *tensors, workspace, stream = addresses
        self._check_and_write(tuple(tensors), None, workspace, workspace_size, stream)

    def _write(
        self,
        k_cache: int,
        v_cache: int,
        k: int,
        v: int,
        slot_mapping: int,
        num_tokens: int,
        workspace: int,
        stream: Any,
    ) -> None:
        """Check the addresses of tensors that are otherwise known to be right, and write."""
        bits = k_cache | v_cache | k | v
        if bits & self._item_mask or slot_mapping & self._slot_mask or (bits | slot_mapping) >> 63:
            self._refuse_addresses((k_cache, v_cache, k, v, slot_mapping))
        if v_cache - k_cache != self._apart:
            self._refuse_overlap(k_cache, v_cache)
        if num_tokens:
            self._alive().calculate(
                k_cache, v_cache, k, v, slot_mapping, num_tokens, workspace, stream
            )

    def _check_and_write(
        self, arrays: tuple[Any, ...], looks: Any, workspace: Any, workspace_size: int, stream: Any
    ) -> None:
        """Check everything, and remember what the arrays looked like."""
        self._alive()
        k_cache, v_cache, k, v, slot_mapping = arrays
        if stream is None and type(k_cache) is not int:
            current = reader_of("k_cache", k_cache).stream
            stream = current and current(k_cache, self._index)
        expected = self._expected
        k_cache_at = self._cache("k_cache", k_cache, expected[0])
        v_cache_at = self._cache("v_cache", v_cache, expected[1])
        slots_at, tokens = self._slots(slot_mapping)
        k_at = self._rows("k", k, expected[2], tokens)
        v_at = self._rows("v", v, expected[3], tokens)
        workspace_at = self._workspace(workspace, workspace_size)
        if self.workspace_size == 0:
            self._accepted = looks
        self._write(k_cache_at, v_cache_at, k_at, v_at, slots_at, tokens, workspace_at, stream)

    def destroy(self) -> None:
        """Let go of the kernel and the device. Twice is no error; any other use after it is."""
        self._opaque = None
        self._accepted = None

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

    def _alive(self) -> Any:
        if self._opaque is None:
            raise DestroyedError("descriptor", "must not be used after destroy")
        return self._opaque

    def _cache(self, name: str, array: Any, expected: _Expected) -> int:
        if type(array) is int:
            return _address(name, array, 1)
        tensor = adopt(name, array)
        if tensor.shape != expected.shape:
            raise _unlike(BadTensorShapeError, name, f"shape {expected.shape}", tensor.shape)
        self._check_rest(name, tensor, expected)
        if not tensor.writable:
            raise BadParamError(name, "must be writable", "a read-only array")
        return _address(name, tensor.address, 1)

    def _rows(self, name: str, array: Any, expected: _Expected, tokens: int) -> int:
        if type(array) is int:
            return _address(name, array, tokens)
        tensor = adopt(name, array)
        shape = tensor.shape
        if len(shape) != 3 or shape[1:] != expected.shape:
            heads, size = expected.shape
            raise _unlike(BadTensorShapeError, name, f"shape (rows, {heads}, {size})", shape)
        if shape[0] < tokens:
            rule = f"must have a row for each of the {tokens} slots of slot_mapping"
            raise BadTensorShapeError(name, rule, f"{shape[0]} rows")
        self._check_rest(name, tensor, expected)
        return _address(name, tensor.address, tokens)

    def _slots(self, array: Any) -> tuple[int, int]:
        name, expected = "slot_mapping", self._expected[4]
        if type(array) is int:
            tokens = self.info.num_tokens
            return _address(name, array, tokens), tokens
        tensor = adopt(name, array)
        if len(tensor.shape) != 1:
            raise _unlike(BadTensorShapeError, name, "shape (num_tokens,)", tensor.shape)
        self._check_rest(name, tensor, expected)
        tokens = tensor.shape[0]
        return _address(name, tensor.address, tokens), tokens

    def _check_rest(self, name: str, tensor: Tensor, expected: _Expected) -> None:
        if tensor.dtype != expected.dtype:
            raise _unlike(BadTensorDtypeError, name, f"dtype {expected.dtype}", tensor.dtype)
        if tensor.strides != expected.strides and any(
            length > 1 and step != wanted
            for length, step, wanted in zip(
                tensor.shape, tensor.strides, expected.strides, strict=True
            )
        ):
            raise _unlike(
                BadTensorStridesError, name, f"strides {expected.strides} bytes", tensor.strides
            )
        if tensor.device != self.device:
            raise _unlike(BadParamError, name, f"device {self.device}", tensor.device)

    def _refuse_addresses(self, addresses: tuple[int, ...]) -> None:
        for name, address, expected in zip(NAMES, addresses, self._expected, strict=True):
            if address >> 63:
                raise BadParamError(name, "must be an address below 2^63", hex(address))
            size = expected.dtype.itemsize
            if address % size:
                rule = f"must start at a multiple of its item size ({size} bytes)"
                raise BadParamError(name, rule, hex(address))

    def _refuse_overlap(self, k_cache: int, v_cache: int) -> None:
        """Refuse caches that share memory; whether they do depends on their distance alone."""
        distance = v_cache - k_cache
        if not (distance >= self._spans[0] or -distance >= self._spans[1]):
            checks.refuse_overlap(self.info, k_cache, v_cache)
        self._apart = distance

    def _workspace(self, workspace: Any, size: int) -> int:
        if not isinstance(size, (int, np.integer)):
            raise BadParamTypeError("workspace_size", "must be an int", repr(size))
        if workspace is not None and type(workspace) is not int:
            tensor = adopt("workspace", workspace)
            if tensor.device != self.device:
                raise _unlike(BadParamError, "workspace", f"device {self.device}", tensor.device)
            workspace = tensor.address
        if size < self.workspace_size:
            rule = f"must be at least {self.workspace_size} bytes"
            raise InsufficientWorkspaceError("workspace_size", rule, size)
        if not workspace and self.workspace_size:
            raise NullPointerError("workspace", "must be memory on the device", repr(workspace))
        return workspace or 0


def paged_caching(
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    slot_mapping: Any,
    *,
    layout: str = "HND",
    stream: Any = None,
    on_invalid: str = "skip",
) -> None:
    """Write the K and V of each token to its slot, in one call.

    The descriptor for arrays of these shapes, strides, dtypes and device is made on the first call
    and found again on later ones.

    Parameters
    ----------
    k_cache, v_cache, k, v, slot_mapping : array
        See `Descriptor.create`.
    layout : {"HND", "NHD"}
    stream : optional
        See `Descriptor.calculate`, also for what is and is not synchronised.
    on_invalid : {"skip", "raise"}
        See `Descriptor.create`. What is skipped is told to nobody here.

    Raises
    ------
    PagedCacheError
        Before anything is launched and with nothing written, but for a `LaunchError` and, with
        ``on_invalid="raise"``, an `InvalidSlotError`.

    Notes
    -----
    A first call for new shapes compiles, as `Descriptor.create` does: make it before a capture. Any
    number of threads may call this at once. The environment variable ``PAGEDCACHE_DEBUG`` counts
    when the descriptor is made, which is kept until 256 others were needed.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> cache = np.zeros((2, 4, 1, 2, 8), np.float16)  # K and V: 4 blocks of 2 slots, 1 head of 8
    >>> k, v = np.ones((3, 1, 8), np.float16), np.full((3, 1, 8), 2, np.float16)
    >>> pc.paged_caching(cache[0], cache[1], k, v, np.array([6, -1, 1]))
    >>> cache[0, :, 0, :, 0].tolist()  # slot 6 is block 3, offset 0; -1 is padding
    [[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    """
    global _latest
    try:
        look, address, _, current = readers[type(k_cache)]
        looks = look(k_cache), look(v_cache), look(k), look(v), look(slot_mapping)
        k_cache_at, v_cache_at = address(k_cache), address(v_cache)
        k_at, v_at, slots_at = address(k), address(v), address(slot_mapping)
    except Exception:
        looks = None
    # Read once: threads may replace it.
    latest_layout, latest_on_invalid, latest_looks, descriptor = _latest
    if (
        looks is None
        or looks != latest_looks
        or layout != latest_layout
        or on_invalid != latest_on_invalid
    ):
        arrays = (k_cache, v_cache, k, v, slot_mapping)
        descriptor = _find_descriptor(arrays, layout, on_invalid)
        descriptor.calculate(*arrays, stream=stream)
        _latest = layout, on_invalid, looks, descriptor
        return
    tokens = looks[4][0][0]
    if current is not None and stream is None:
        stream = current(k_cache, descriptor._index)
    descriptor._write(k_cache_at, v_cache_at, k_at, v_at, slots_at, tokens, 0, stream)


_MOST_DESCRIPTORS = 256
_descriptors: dict[Any, Descriptor] = {}
# Options of the latest call, what its arrays looked like, and the descriptor that served it.
_latest: tuple[Any, Any, Any, Any] = (None, None, None, None)


def _find_descriptor(arrays: tuple[Any, ...], layout: str, on_invalid: str) -> Descriptor:
    tensors = [adopt(name, array) for name, array in zip(NAMES, arrays, strict=True)]
    create = functools.partial(Descriptor.create, *arrays, layout=layout, on_invalid=on_invalid)
    if not isinstance(layout, str) or not isinstance(on_invalid, str):
        return create()  # which refuses it
    key = (layout, on_invalid, *(_signature(tensor) for tensor in tensors))
    descriptor = _descriptors.get(key)
    if descriptor is None:
        descriptor = create()
        if len(_descriptors) >= _MOST_DESCRIPTORS:
            _descriptors.pop(next(iter(_descriptors)), None)
        _descriptors[key] = descriptor
    return descriptor


def _signature(tensor: Tensor) -> tuple[Any, ...]:
    dtype, shape, strides = tensor.dtype, tensor.shape, tensor.strides
    # The token axis is free, and it is the first of every tensor that is not a cache.
    if len(shape) == 3:
        step = token_step(shape, strides, dtype.itemsize)
        return dtype, shape[1:], (step, *strides[1:]), tensor.device
    return dtype, shape if len(shape) == 4 else shape[1:], strides, tensor.device


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


def _expectation(info: PagedCachingInfo, name: str) -> _Expected:
    tensor = info.tensor(name)
    shape = tensor.shape if name.endswith("_cache") else tensor.shape[1:]
    size = tensor.dtype.itemsize
    return _Expected(tensor.dtype, shape, tuple(step * size for step in tensor.strides))


def _span(expected: _Expected) -> int:
    """Return the bytes from the first element to the end of the last."""
    steps = zip(expected.shape, expected.strides, strict=True)
    return expected.dtype.itemsize + sum((length - 1) * step for length, step in steps)


def _as_address(name: str, value: object) -> int:
    if value is None:
        return 0
    if not isinstance(value, int):
        raise BadParamTypeError(name, "must be an address, as an int", repr(value))
    return int(value)


def _address(name: str, address: int, count: int) -> int:
    if address <= 0 and count:
        raise NullPointerError(name, "must not be a null pointer", hex(address))
    return address


def _unlike(kind: type[Exception], name: str, expected: str, got: object) -> Exception:
    return kind(name, f"must have {expected} as at create", got)
