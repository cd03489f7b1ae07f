# SPDX-License-Identifier: Apache-2.0
"""What operations on the slots of a paged cache have in common."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from pagedcache.arrays.addresses import check_address
from pagedcache.arrays.find import adopt
from pagedcache.cache.explain import CacheInfo, SlotExplanation, StoredElement, read_element
from pagedcache.cache.layout import LAYOUTS
from pagedcache.operators.base import Info, Operation
from pagedcache.status import BadParamError, BadParamTypeError, InvalidSlotError, shown

if TYPE_CHECKING:
    from pagedcache.backend.protocol import Invalid, LaunchConfig
    from pagedcache.cache.sides import Side
    from pagedcache.display import Rows
    from pagedcache.dtypes import Dtype
    from pagedcache.tensors import Tensor


class SlotInfo(Info, CacheInfo, Protocol):
    """What is known about the tensors of an operation on slots."""

    @property
    def layout(self) -> str:
        """The order of the axes of the caches."""

    @property
    def dtype(self) -> Dtype:
        """Of the rows by token."""

    @property
    def slot_dtype(self) -> Dtype:
        """Of the slot mapping."""

    @property
    def num_tokens(self) -> int:
        """Length of the slot mapping that it was created with."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the caches."""


SlotInfoT = TypeVar("SlotInfoT", bound=SlotInfo)


class SlotOperation(Operation[SlotInfoT]):
    """An operation on the slots of a paged cache."""

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

    def explain(
        self,
        slot_or_token: int,
        slot_mapping: Any = None,
        *,
        k_cache: Any = None,
        v_cache: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        head: int = 0,
        dim: int = 0,
    ) -> SlotExplanation:
        """Show where a token is: its block, offset, and bytes in each cache.

        Bytes are counted from the first element of each cache array, also where K and V are views
        of one array.

        With caches, also what is stored there: the code, scale and value of one element of each.

        Parameters
        ----------
        slot_or_token : int
            A slot; if `slot_mapping` is given, the index of a token in it.
        slot_mapping : array, optional
            Of ints, on any device. It is read, so on a GPU this waits for it.
        k_cache, v_cache, k_scale, v_scale : array, optional
            Like those that the descriptor was created for. On a GPU, one element of each is read,
            after what is queued on the current stream.
        head, dim : int
            The KV head, and the dimension in it, of these elements.

        Returns
        -------
        SlotExplanation
            Made to be printed, or displayed in a notebook.

        Raises
        ------
        BadParamError
            `slot_or_token` is not an int or not a token of `slot_mapping`, `slot_mapping` is not a
            sequence of ints, or `head` or `dim` is out of range, if an element is read.
        PagedCacheError
            An array is not like the one that the descriptor was created for, or is missing.
        DestroyedError
            After `destroy`.
        """
        self._alive()
        slot, token = _find_slot(slot_or_token, slot_mapping)
        arrays = {"k": (k_cache, k_scale), "v": (v_cache, v_scale)}

        def read_elements(block: int, offset: int) -> list[StoredElement]:
            return [
                self._read_element(side, *arrays[side.letter], (block, offset, head, dim))
                for side in self.info.sides
                if arrays[side.letter][0] is not None
            ]

        return SlotExplanation.of(self.info, slot, token, read_elements)

    def _read_element(
        self, side: Side, cache: Any, scale: Any, place: tuple[int, int, int, int]
    ) -> StoredElement:
        *_, head, dim = place
        counts = {"head": self.info.num_kv_heads, "dim": side.head_size}
        for (name, count), index in zip(counts.items(), (head, dim), strict=True):
            if not isinstance(index, (int, np.integer)) or not 0 <= index < count:
                raise BadParamError(name, f"must be an int from 0 to {count - 1}", shown(index))
        letter = side.letter
        tensor = self._adopt(f"{letter}_cache", cache)
        scale_tensor = None if side.scale is None else self._adopt(f"{letter}_scale", scale)
        stream = self._current_stream(cache)()

        def read(address: int, size: int) -> Any:
            return self._device.read(address, size, stream)

        return read_element(side, LAYOUTS[self.info.layout], tensor, scale_tensor, place, read)

    def _adopt(self, name: str, array: Any) -> Tensor:
        """Return an array that is like that of the argument with this name."""
        tensor = adopt(name, array)
        [one] = [one for _, one in self._arguments.present if one.name == name]
        self._arguments.check(one, tensor)
        check_address(name, tensor.address, one.dtype.itemsize)
        return tensor

    def _invalid(self, found: Invalid, where: str = "in this call") -> InvalidSlotError:
        return InvalidSlotError(found.row, found.value, found.count, self.info.num_slots, where)

    # For people

    def _heads(self) -> str:
        sizes = [str(side.head_size) for side in self.info.sides]
        return f"{self.info.num_kv_heads} x {_once(sizes)}"

    def _formats(self) -> str:
        return _once([side.format.name for side in self.info.sides])

    def _rows(self) -> Rows:
        info = self.info
        present = self._arguments.present
        strides = {one.name: one.strides for _, one in present if len(one.shape) > 1}
        sizes = [f"{side.head_size} of {side.letter.upper()}" for side in info.sides]
        rows = [
            ("layout", f"{info.layout}, {info.dtype}, {info.slot_dtype} slots"),
            ("device", self.device),
            ("capacity", f"{info.num_blocks} blocks of {info.block_size} = {info.num_slots} slots"),
            ("KV heads", str(info.num_kv_heads)),
            ("head size", ", ".join(sizes)),
        ]
        for side in info.sides:
            if not side.copies(info.dtype):
                scale = "no scale" if side.scale is None else f"scales: {side.scale}"
                rows.append((f"{side.letter.upper()} cache", f"{side.format.name}, {scale}"))
        rows += [(f"strides of {name}, bytes", str(steps)) for name, steps in strides.items()]
        if self._implementation is not None:
            config = self._implementation.launch_config(info.num_tokens)
            launch = f"grid {config.grid}, block {config.block}"
            rows.append((f"launch for {info.num_tokens} tokens", launch))
        return rows


def _once(of_k_and_v: list[str]) -> str:
    """Return what is said of K and V, V only if it differs."""
    k, v = of_k_and_v[0], of_k_and_v[-1]
    return k if k == v else f"{k} (V {v})"


def _find_slot(slot_or_token: Any, slot_mapping: Any) -> tuple[int, int | None]:
    """Return a slot, and its token if a slot mapping was given."""
    token: int | None = None
    try:
        slot = operator.index(slot_or_token)
    except Exception:  # of whatever was given
        rule = "must be an int"
        raise BadParamTypeError("slot_or_token", rule, shown(slot_or_token)) from None
    if slot_mapping is not None:
        try:
            count = len(slot_mapping)
            found = None
            if 0 <= slot < count:
                entry = slot_mapping[slot]
                # CuPy's elements are arrays without axes, which are no index.
                found = operator.index(entry.item() if hasattr(entry, "item") else entry)
        except Exception as error:
            rule = f"must be a sequence of ints ({error})"
            raise BadParamTypeError("slot_mapping", rule, type(slot_mapping)) from error
        if found is None:
            rule = f"must be one of the {count} tokens of slot_mapping"
            raise BadParamError("slot_or_token", rule, shown(slot))
        slot, token = found, slot
    if not -(2**63) <= slot < 2**63:
        raise BadParamError("slot_or_token", "must fit in 64 bits", shown(slot))
    return slot, token
