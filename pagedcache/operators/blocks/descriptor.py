# SPDX-License-Identifier: Apache-2.0
"""Copies of blocks, whose arrays are checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

from pagedcache.arrays.find import adopt_stream, library_of
from pagedcache.backend.handle import Handle, parse_device
from pagedcache.backend.registry import import_target
from pagedcache.display import as_html
from pagedcache.locks import make_lock
from pagedcache.operators.base import ON_INVALID
from pagedcache.operators.blocks.arrays import make_arrays
from pagedcache.operators.blocks.pairs import (
    OnDevice,
    check_blocks,
    check_pairs,
    invalid_on_device,
    read_blocks,
)
from pagedcache.status import BadParamError, DestroyedError, NotSupportedError, shown

if TYPE_CHECKING:
    from pagedcache.arrays.library import Library
    from pagedcache.backend.protocol import Device, Report
    from pagedcache.tensors import Array

Self = TypeVar("Self", bound="BlockDescriptor")


class BlockMover(Protocol):
    """What copies blocks on a device. Made from a `BlockArrays`, a device and a report."""

    def copy(self, pairs: Array | OnDevice, stream: int) -> None:
        """Queue the copy of pairs; those on the host have been checked."""

    def zero(self, blocks: Array | OnDevice, stream: int) -> None:
        """Queue filling blocks of the targets with zeros; those on the host have been checked."""


class Worker(NamedTuple):
    """A device that can do the work, what does it there, and what that reports to."""

    device: Device
    blocks: BlockMover
    report: Report


class BlockOperation:
    """Copies of blocks of arrays that have been checked. Holds no array.

    Attributes
    ----------
    table : BlockArrays
    workers : list of Worker
        Where it can be done; two for a copy between two GPUs.
    raises : bool
        Whether calls with lists in the memory of a device wait, and raise.
    """

    implementations: ClassVar[Mapping[str, str]] = {
        "cpu": "pagedcache.operators.blocks.cpu:BlockCopy",
        "cuda": "pagedcache.operators.blocks.nvidia:make_copy",
        "rocm": "pagedcache.operators.blocks.nvidia:make_copy",
    }

    def __init__(
        self,
        sources: Any,
        targets: Any,
        on_invalid: str,
        *,
        read: bool = True,
        names: tuple[str, str] = ("sources", "targets"),
    ) -> None:
        if not isinstance(on_invalid, str) or on_invalid not in ON_INVALID:
            rule = f"must be one of {', '.join(ON_INVALID)}"
            raise BadParamError("on_invalid", rule, shown(on_invalid))
        self.table = table = make_arrays(sources, targets, names)
        self.raises = on_invalid == "raise"
        self.lock = make_lock()
        self.workers: list[Worker] = []
        # Two GPUs are as fast either way. What was written last is usually on the source's stream.
        devices = dict.fromkeys((table.source_device, table.target_device))
        for name in [name for name in devices if name != "cpu"] or ["cpu"]:
            device = Handle(name).opened()
            target = self.implementations.get(device.kind)
            make: Any = import_target(target) if target else device.operator("copy_blocks")
            report = device.report(read=read or self.raises)
            self.workers.append(Worker(device, make(table, device, report), report))

    def worker_of(self, stream: Any) -> Worker:
        """Return the worker that has a stream; the first if that is not known."""
        if len(self.workers) > 1 and stream is not None and not isinstance(stream, int):
            _, index = adopt_stream(stream)
            for worker in self.workers:
                if worker.device.name == f"{worker.device.kind}:{index}":
                    return worker
        return self.workers[0]

    def check(self, where: str) -> None:
        """Raise for what has been reported, and say where that was counted."""
        for worker in self.workers:
            if found := worker.report.take():
                raise invalid_on_device(found, self.table.in_source, self.table.in_target, where)


class BlockDescriptor:
    """Copies of blocks between lists of arrays that are checked once.

    Created by `create`, run by `copy` and `zero`, ended by `destroy` or by the end of a ``with``
    block.

    Attributes
    ----------
    device : str
        The GPU that does the work, such as ``"cuda:0"``, or ``"cpu"``.
    block_bytes : int
        Bytes of one block in all arrays.
    num_blocks : int
        Blocks of the targets.

    Notes
    -----
    The arrays are kept alive. Resizing or reallocating one is not detected. Streams, threads and
    forks are as in `Descriptor`.
    """

    def __init__(self, operation: BlockOperation, sources: Any, targets: Any) -> None:
        self._operation: BlockOperation | None = operation
        self._arrays: tuple[Any, ...] = (*sources, *targets)
        self._table = table = operation.table
        device = operation.workers[0].device
        self.device = device.name
        self.block_bytes, self.num_blocks = table.block_bytes, table.in_target
        first = targets[0] if table.target_device == device.name else sources[0]
        library: Library = library_of("targets[0]", first)
        index = parse_device("device", device.name)[1] or 0
        self._current_stream: Callable[[], int] = (
            library.current_stream("targets[0]", first, index) or device.current_stream
        )
        self._notes = _noting_writes(targets)

    @classmethod
    def create(
        cls: type[Self], sources: Any, targets: Any = None, *, on_invalid: str = "skip"
    ) -> Self:
        """Check the arrays, and compile.

        Parameters
        ----------
        sources : list of array
            With blocks on their first axis, as many in each, of any dtypes, shapes and strides: K,
            V and scales of all layers. All of them on one GPU, on the CPU, or in pinned host memory
            if the targets are on a GPU.
        targets : list of array, optional
            As many, with blocks of the same shapes and dtypes, and any number of them. They must
            share no memory with each other, and none with the sources, unless they are the sources.
            That is the default: blocks are copied within the arrays.
        on_invalid : {"skip", "raise"}
            What to do about pairs in the memory of a GPU that cannot be copied. ``"skip"``: count
            them for `check`. ``"raise"``: wait, and raise. Pairs on the host are always checked.

        Returns
        -------
        BlockDescriptor
            For any number of blocks.

        Raises
        ------
        PagedCacheError
            The message names the array, what it must be and what it was.

        Notes
        -----
        On CUDA this compiles the kernels, and puts 120 bytes for each array on the device, where
        they stay until the process ends, because a graph may read them. Call it before a stream
        capture begins.
        """
        targets = sources if targets is None else targets
        return cls(BlockOperation(sources, targets, on_invalid), sources, targets)

    def copy(self, pairs: Any, *, stream: Any = None) -> None:
        """Copy blocks of the sources to blocks of the targets, in all arrays.

        Parameters
        ----------
        pairs : sequence of (int, int), or array
            Block of the sources and block of the targets; see `copy_blocks`.
        stream : optional
            The stream to queue the copy on; see `copy_blocks`. By default, the current one of the
            library that the arrays on the GPU belong to.

        Raises
        ------
        InvalidBlockError, DuplicateBlockError
            Of pairs on the host. Nothing was queued or written.
        DestroyedError
            After `destroy`.
        PagedCacheError
            See `copy_blocks`.
        """
        self._alive()
        found = read_blocks("pairs", pairs, 2)
        if not isinstance(found, OnDevice):
            check_pairs(found, self._table.in_source, self._table.in_target)
        self._run("pairs", found, stream)

    def zero(self, blocks: Any, *, stream: Any = None) -> None:
        """Fill blocks of the targets with zeros, in all arrays.

        Parameters
        ----------
        blocks : sequence of int, or array
            See `zero_blocks`.
        stream : optional
            See `copy`.

        Raises
        ------
        InvalidBlockError
            Of blocks on the host. Nothing was queued or written.
        DestroyedError
            After `destroy`.
        PagedCacheError
            See `zero_blocks`.
        """
        self._alive()
        found = read_blocks("blocks", blocks, 1)
        if not isinstance(found, OnDevice):
            check_blocks(found, self._table.in_target)
        self._run("blocks", found, stream)

    def _run(self, name: str, found: Array | OnDevice, stream: Any) -> None:
        operation = self._alive()
        device, blocks, _ = operation.worker_of(stream)
        if isinstance(found, OnDevice) and found.tensor.device != device.name:
            rule = f"must be on the host or on {device.name}, where the work is done"
            raise BadParamError(name, rule, found.tensor.device)
        run = blocks.copy if name == "pairs" else blocks.zero
        handle = self._current_stream() if stream is None else device.stream(stream)
        waits = isinstance(found, OnDevice) and operation.raises
        if waits and device.capturing(handle):
            rule = "waits for the stream, which is being captured; use check() after a replay"
            raise NotSupportedError("on_invalid='raise'", rule)
        for note in self._notes:
            note()
        if not waits:
            run(found, handle)
            return
        with operation.lock:  # so that a call is told of its own pairs only
            run(found, handle)
            operation.check("in this call")

    def check(self) -> None:
        """Raise if pairs in the memory of a GPU could not be copied, since the last check.

        It waits as `Descriptor.check` does.

        Raises
        ------
        InvalidBlockError
            A block did not exist; with the first such pair of the earliest such call, and the
            number of pairs that were not copied.
        DuplicateBlockError
            An earlier pair of the same call had the same target. The first of them was copied.
        PagedCacheError
            See `Descriptor.check`.
        """
        self._alive().check("since the last check")

    def destroy(self) -> None:
        """Let the arrays go.

        Destroying twice is allowed; any other use after that raises `DestroyedError`.
        """
        self._operation, self._arrays, self._notes = None, (), []

    def __enter__(self: Self) -> Self:
        self._alive()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.destroy()

    def _alive(self) -> BlockOperation:
        if self._operation is None:
            raise DestroyedError("descriptor", "has been destroyed and cannot be used any more")
        return self._operation

    def __repr__(self) -> str:
        table = self._table
        state = "" if self._operation is not None else ", destroyed"
        places = f"within {len(table.arrays)} arrays on {table.target_device}"
        if not table.within:
            places = (
                f"from {len(table.arrays)} arrays on {table.source_device} "
                f"({table.in_source} blocks) to {table.target_device}"
            )
        return (
            f"<pagedcache.BlockDescriptor {places}: {table.in_target} blocks of "
            f"{table.block_bytes} bytes{state}>"
        )

    def _repr_html_(self) -> str:
        table = self._table
        return as_html(
            [
                ("operator", "copy_blocks"),
                ("from", f"{table.source_device}, {table.in_source} blocks"),
                ("to", f"{table.target_device}, {table.in_target} blocks"),
                ("arrays", str(len(table.arrays))),
                ("a block", f"{table.block_bytes} bytes"),
            ]
        )


def _noting_writes(targets: Sequence[Any]) -> list[Callable[[], None]]:
    """Return what libraries want to be called before each write into these arrays."""
    groups: dict[Library, list[tuple[str, Any]]] = {}
    for i, array in enumerate(targets):
        name = f"targets[{i}]"
        groups.setdefault(library_of(name, array), []).append((name, array))
    notes = (library.noting_writes(*zip(*pairs, strict=True)) for library, pairs in groups.items())
    return [note for note in notes if note is not None]
