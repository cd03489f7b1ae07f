# SPDX-License-Identifier: Apache-2.0
"""Slot mappings that are checked once and run any number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pagedcache.operators.base import Operation
from pagedcache.operators.slot_mapping.info import (
    NAMES,
    PAGE_NAMES,
    PageSlotsInfo,
    SlotMappingInfo,
)
from pagedcache.status import (
    BadParamError,
    BadTensorShapeError,
    InvalidPositionError,
    as_int,
)

if TYPE_CHECKING:
    from pagedcache.backend.handle import Handle
    from pagedcache.backend.protocol import Invalid, LaunchConfig
    from pagedcache.display import Rows

MOST_SIZE = 1 << 31
ALONE = (1, 0, 1)  # cp_size, cp_rank and cp_interleave without context parallelism


class SlotMappingDescriptor(Operation[SlotMappingInfo]):
    """A slot mapping, checked once and run any number of times.

    Created by `create`, run by `calculate`, ended by `destroy` or by the end of a ``with`` block.

    Attributes
    ----------
    info : SlotMappingInfo
        Dtypes, and what a block table looks like.
    device : str
        Such as ``"cpu"`` or ``"cuda:0"``.

    Notes
    -----
    Streams, threads and forks are as in `Descriptor`.
    """

    name: ClassVar[str] = "slot_mapping"
    arguments: ClassVar[tuple[str, ...]] = NAMES
    free: ClassVar[frozenset[str]] = frozenset(NAMES)
    numbers: ClassVar[tuple[tuple[str, type], ...]] = (
        ("num_requests", int),
        ("num_positions", int),
        ("block_size", int),
        ("cp_size", int),
        ("cp_rank", int),
        ("cp_interleave", int),
    )
    implementations: ClassVar[dict[str, str]] = {
        "cpu": "pagedcache.operators.slot_mapping.cpu:SlotMapping",
        "cuda": "pagedcache.operators.slot_mapping.nvidia:SlotMapping",
        "rocm": "pagedcache.operators.slot_mapping.nvidia:SlotMapping",
    }

    @classmethod
    def create(
        cls,
        block_tables: Any,
        query_start_loc: Any,
        positions: Any,
        out: Any,
        *,
        handle: Handle | None = None,
        on_invalid: str = "skip",
    ) -> SlotMappingDescriptor:
        """Check the tensors, pick the backend of their device, and compile.

        Parameters
        ----------
        block_tables : array or TensorDescriptor
            ``[num_requests or more, max_blocks]``, int32 or int64: the blocks of each request. Rows
            may be further apart than they are long.
        query_start_loc : array or TensorDescriptor
            ``[num_requests + 1]``, int32 or int64, never decreasing: where the tokens of each
            request begin, and the number of tokens.
        positions : array or TensorDescriptor
            ``[num_tokens or more]``, int32 or int64: the position of each token in its request.
        out : array or TensorDescriptor
            ``[any length]``, int64 or int32. It must not share memory with the others.
        handle : Handle, optional
            The device to run on. By default, the one that the arrays are on.
        on_invalid : {"skip", "raise"}
            What to do about positions without a block. ``"skip"``: count them for `check`.
            ``"raise"``: `calculate` waits and raises `InvalidPositionError`.

        Returns
        -------
        SlotMappingDescriptor
            For any number of requests, tokens and entries of `out`.

        Raises
        ------
        PagedCacheError
            The message names the argument, what it must be and what it was.

        Notes
        -----
        On CUDA this compiles the kernel, so create a descriptor before a stream capture begins.
        """
        return cls._create(
            (block_tables, query_start_loc, positions, out),
            SlotMappingInfo.create,
            handle=handle,
            on_invalid=on_invalid,
            debug=False,
        )

    def calculate(
        self,
        block_tables: Any,
        query_start_loc: Any,
        positions: Any,
        out: Any,
        *,
        block_size: int,
        cp_size: int = 1,
        cp_rank: int = 0,
        cp_interleave: int = 1,
        stream: Any = None,
    ) -> None:
        """Fill `out` with the slot of each token, and with -1 from there to its end.

        See `slot_mapping`, also for the parameters. The arrays must be of the device, dtypes and
        strides that the descriptor was created for, and block tables as long.

        Raises
        ------
        PagedCacheError
            Before anything is queued or written, except for a `LaunchError` and, with
            ``on_invalid="raise"``, an `InvalidPositionError`.

        Notes
        -----
        On CUDA this is queued on the stream and returns at once. It allocates, synchronizes and
        compiles nothing, so it can be captured. Any number of threads may call it at the same time.
        """
        sizes = (block_size, cp_size, cp_rank, cp_interleave)
        numbers = checked_numbers(block_tables, query_start_loc, positions, sizes)
        arrays = (block_tables, query_start_loc, positions, out, *numbers)
        if not self.latest(*arrays, stream):
            self.run(arrays, stream)

    def bind(
        self,
        block_tables: Any,
        query_start_loc: Any,
        positions: Any,
        out: Any,
        *,
        block_size: int,
        cp_size: int = 1,
        cp_rank: int = 0,
        cp_interleave: int = 1,
        stream: Any = None,
    ) -> Callable[[], None]:
        """Return a function that fills `out` from these arrays each time it is called.

        Parameters
        ----------
        block_tables, query_start_loc, positions, out : array
            See `calculate`, and `Descriptor.bind` for what must stay as it is.
        block_size, cp_size, cp_rank, cp_interleave : int
            See `slot_mapping`.
        stream : optional
            See `Descriptor.calculate`. By default, the stream that is current at each call.

        Returns
        -------
        callable
            Without arguments. Raises `DestroyedError` after `destroy`. Threads may share it.

        Raises
        ------
        PagedCacheError
            See `calculate`.
        """
        sizes = (block_size, cp_size, cp_rank, cp_interleave)
        numbers = checked_numbers(block_tables, query_start_loc, positions, sizes)
        return self._bind((block_tables, query_start_loc, positions, out, *numbers), stream)

    def launch_config(self, length: int) -> LaunchConfig:
        """Return the launch that `calculate` makes for an `out` of this length.

        Raises
        ------
        BadParamError
            `length` is not an int, or is negative.
        DestroyedError
            After `destroy`.
        """
        return self._launch_config("length", length)

    def check(self) -> None:
        """Raise if the calls since the last check met a position without a block.

        For descriptors with ``on_invalid="skip"``. It waits as `Descriptor.check` does.

        Raises
        ------
        InvalidPositionError
            With the first such token, its position in the earliest such call, and the number of
            such tokens in all calls.
        PagedCacheError
            See `Descriptor.check`.
        """
        super().check()

    def _invalid(self, found: Invalid, where: str = "in this call") -> Exception:
        return InvalidPositionError(found.row, found.value, found.count, where)

    def _rows(self) -> Rows:
        dtypes = zip(NAMES, self.info.dtypes, strict=True)
        return [
            ("operator", self.name),
            ("device", self.device),
            ("longest block table", f"{self.info.table_length} blocks"),
            *((name, str(dtype)) for name, dtype in dtypes),
        ]

    def __repr__(self) -> str:
        state = "" if self._implementation is not None else ", destroyed"
        return (
            f"<pagedcache.SlotMappingDescriptor on {self.device}: block tables of "
            f"{self.info.table_length}, {self.info.dtypes[-1]} slots{state}>"
        )


class PageSlots(Operation[PageSlotsInfo]):
    """A slot mapping for tables that follow one another, and tokens that name their sequence."""

    name: ClassVar[str] = "page_slots"
    arguments: ClassVar[tuple[str, ...]] = PAGE_NAMES
    free: ClassVar[frozenset[str]] = frozenset(PAGE_NAMES)
    numbers: ClassVar[tuple[tuple[str, type], ...]] = (
        ("num_sequences", int),
        ("num_indices", int),
        ("page_size", int),
        ("num_pages", int),
    )
    implementations: ClassVar[dict[str, str]] = {
        "cpu": "pagedcache.operators.slot_mapping.cpu:PageSlots",
        "cuda": "pagedcache.operators.slot_mapping.nvidia:PageSlots",
        "rocm": "pagedcache.operators.slot_mapping.nvidia:PageSlots",
    }

    @classmethod
    def create(cls, *arrays: Any) -> PageSlots:
        """Return an operation for these arrays; numbers may follow."""
        return cls._create(
            arrays[: len(PAGE_NAMES)],
            PageSlotsInfo.create,
            handle=None,
            on_invalid="skip",
            debug=False,
            reported=False,
        )


def checked_numbers(
    block_tables: Any, query_start_loc: Any, positions: Any, sizes: tuple[int, int, int, int]
) -> tuple[int, ...]:
    """Return the numbers of a call: lengths that its arrays have, and its sizes.

    Raises
    ------
    BadTensorShapeError
        `query_start_loc` is empty, or there are fewer block tables than requests.
    BadParamError
        A size is out of range.
    """
    try:
        num_requests, num_positions = len(query_start_loc) - 1, len(positions)
        tables = len(block_tables)
    except TypeError:  # not arrays, or without an axis; `run` says which
        num_requests = num_positions = tables = 0
    if num_requests < 0:
        rule = "must have at least one entry, the number of tokens"
        raise BadTensorShapeError("query_start_loc", rule, "shape (0,)")
    if tables < num_requests:
        rule = f"must have a row for each of the {num_requests} requests of query_start_loc"
        raise BadTensorShapeError("block_tables", rule, f"{tables} rows")
    if type(sizes[0]) is int and 0 < sizes[0] < MOST_SIZE and sizes[1:] == ALONE:
        return num_requests, num_positions, *sizes
    return num_requests, num_positions, *_checked_sizes(*sizes)


def _checked_sizes(
    block_size: int, cp_size: int, cp_rank: int, cp_interleave: int
) -> tuple[int, int, int, int]:
    names = ("block_size", "cp_size", "cp_rank", "cp_interleave")
    given = (block_size, cp_size, cp_rank, cp_interleave)
    found = dict(zip(names, map(as_int, names, given), strict=True))
    for name in ("block_size", "cp_size", "cp_interleave"):
        if not 0 < found[name] < MOST_SIZE:
            raise BadParamError(name, f"must be from 1 to {MOST_SIZE - 1}", found[name])
    if not 0 <= found["cp_rank"] < found["cp_size"]:
        rule = f"must be from 0 to {found['cp_size'] - 1}, since cp_size is {found['cp_size']}"
        raise BadParamError("cp_rank", rule, found["cp_rank"])
    if found["block_size"] % found["cp_interleave"]:
        rule = f"must divide block_size, {found['block_size']}"
        raise BadParamError("cp_interleave", rule, found["cp_interleave"])
    return found["block_size"], found["cp_size"], found["cp_rank"], found["cp_interleave"]
