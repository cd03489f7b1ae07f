# SPDX-License-Identifier: Apache-2.0
"""`WriteKernel` and `ReadKernel`: a write or read that its user programs."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from pagedcache.cache.formats import FORMATS
from pagedcache.cache.layout import LAYOUTS
from pagedcache.display import as_html
from pagedcache.locks import make_lock
from pagedcache.operators.base import ON_INVALID
from pagedcache.operators.one_call import Kept
from pagedcache.operators.paged_caching.descriptor import Descriptor
from pagedcache.operators.paged_caching.info import PagedCachingInfo
from pagedcache.operators.paged_gather.descriptor import GatherDescriptor
from pagedcache.operators.paged_gather.info import PagedGatherInfo
from pagedcache.operators.programs.info import NUMBER_KINDS, Q_FORMATS, Program
from pagedcache.operators.programs.operation import ProgramOperation, Variant
from pagedcache.operators.programs.text import steps_text
from pagedcache.status import BadParamError, BadParamTypeError, shown
from pagedcache.steps import Pipeline, Step
from pagedcache.steps.element import Element
from pagedcache.steps.pipeline import merged
from pagedcache.tensors import TensorDescriptor

MOST_RECENT = 8
_OPTIONS = ("layout", "k_format", "v_format", "q_format", "on_invalid", "debug")
MOST_PARAMETERS = 64


class _Kernel:
    """What `WriteKernel` and `ReadKernel` share."""

    def __init__(
        self,
        program: Program,
        on_invalid: str,
        debug: bool | None,
    ) -> None:
        _check_options(program, on_invalid)
        if debug is not None and not isinstance(debug, bool):
            raise BadParamTypeError("debug", "must be True, False or None", shown(debug))
        self._program, self._on_invalid, self._debug = program, on_invalid, debug
        self._names = frozenset(program.parameters)
        for name in program.parameters:
            if name in program.names or name in ("stream", "self"):
                rule = "must not be that of an argument of the call"
                raise BadParamError("the name of a parameter", rule, shown(name))
        if len(self._names) > MOST_PARAMETERS:
            rule = f"must have at most {MOST_PARAMETERS} parameters"
            raise BadParamError("the steps", rule, len(self._names))
        self._count = len(self._names)
        self._variants: dict[tuple[tuple[str, type], ...], Variant] = {}
        # What to try before anything is looked up: how to pick parameters, and the operation.
        self._recent: tuple[tuple[Any, ProgramOperation], ...] = ()
        self._lock = make_lock()
        self._plain = (
            None if any(p.all_steps for p in program.pipelines.values()) else self._copies()
        )

    def _copies(self) -> Kept[Any]:
        """Return the operations of calls without any step."""
        program = self._program
        kind: Any = GatherDescriptor if program.reads else Descriptor
        make: Any = PagedGatherInfo.create if program.reads else PagedCachingInfo.create
        formats = {f"{letter}_format": program.formats[letter] for letter in "kv"}
        make_info = functools.partial(make, layout=program.layout, **formats)

        def create(*arrays: Any) -> Any:
            return kind._create(
                arrays, make_info, handle=None, on_invalid=self._on_invalid, debug=self._debug
            )

        return Kept(kind, create)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters, in the order in which the steps name them."""
        return self._program.parameters

    @functools.cached_property
    def source(self) -> str:
        """The CUDA text of the steps.

        Arrays are as they are indexed; all other parameters are assumed to be float numbers. No
        device is needed. The operations are those of ``expressions.cuh`` and ``steps.cuh``.
        """
        program = self._program
        kinds = merged(each.assumed for each in program.pipelines.values())
        return steps_text(program.resolve(kinds), program.parameters)

    def check(self) -> None:
        """Raise if the calls since the last check met an invalid slot or index.

        On a GPU, this waits for the streams that the kernel was run on since then; see
        `Descriptor.check`. With ``on_invalid="raise"``, calls raise themselves.

        Raises
        ------
        InvalidSlotError
            A slot was past the end of the cache.
        InvalidIndexError
            An index in a step, such as a position, was outside the array that it is an index of.
        """
        for operation in self._operations():
            operation.check()

    def _operations(self) -> list[Any]:
        """Return all operations that recent calls used."""
        kept = [variant.kept for variant in list(self._variants.values())]
        if self._plain is not None:
            kept.append(self._plain)
        return [operation for each in kept for operation in each.operations()]

    def _run(self, tensors: tuple[Any, ...], parameters: dict[str, Any], stream: Any) -> None:
        """Run for arrays that no recent operation has matched."""
        variant, parameters = self._variant(parameters)
        arrays = (*tensors, *variant.values(parameters))
        # The latest matcher may not have seen these parameters, but NumPy's numbers.
        if not variant.kept.run_recent(arrays, (), stream):
            variant.kept.run(arrays, (), stream)
        self._put_first(variant)

    def _warm_up(self, tensors: tuple[Any, ...], parameters: dict[str, Any]) -> None:
        """Make the operation for such arrays, which may be tensor descriptors."""
        variant, parameters = self._variant(parameters)
        arrays = (*tensors, *variant.values(parameters))
        if any(isinstance(array, TensorDescriptor) for array in arrays):
            variant.create(*arrays)
            return
        variant.kept.find(arrays, ())
        self._put_first(variant)

    def _run_plain(self, arrays: tuple[Any, ...], stream: Any) -> None:
        """Run a call without any step."""
        assert self._plain is not None
        if not self._plain.run_recent(arrays, (), stream):
            self._plain.run(arrays, (), stream)

    def _warm_up_plain(self, arrays: tuple[Any, ...]) -> None:
        """Make the operation of a call without any step."""
        assert self._plain is not None
        if any(isinstance(array, TensorDescriptor) for array in arrays):
            self._plain.create(*arrays)
        else:
            self._plain.find(arrays, ())

    def _variant(self, parameters: dict[str, Any]) -> tuple[Variant, dict[str, Any]]:
        """Return what to use for such parameters, and these with numbers as Python's."""
        self._check_names(parameters)
        parameters = {name: _plain(value) for name, value in parameters.items()}
        numbers = tuple(
            (name, type(parameters[name]))
            for name in self._program.parameters
            if type(parameters[name]) in NUMBER_KINDS
        )
        variant = self._variants.get(numbers)
        if variant is None:
            with self._lock:
                variant = self._variants.setdefault(
                    numbers, Variant(self._program, numbers, self._on_invalid, self._debug)
                )
        return variant, parameters

    def _check_names(self, parameters: Mapping[str, Any]) -> None:
        for name in parameters:
            if name in _OPTIONS and name not in self._names:
                kind = "ReadKernel" if self._program.reads else "WriteKernel"
                rule = f"must not be given to a call; give it to {kind}({name}=...)"
                raise BadParamError(name, rule)
            if name not in self._names:
                close = difflib.get_close_matches(name, self._names, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise BadParamError(name, f"must not be given, because no step names it{hint}")
        for letter, pipeline in self._program.pipelines.items():
            for i, step in enumerate(pipeline.all_steps):
                for name in step.assumed:
                    if name not in parameters:
                        rule = f"must be given, because {letter}[{i}] names it: {step}"
                        raise BadParamError(name, rule)

    def _put_first(self, variant: Variant) -> None:
        with self._lock:
            operation = variant.kept.recent[0][-1]
            others = (each for each in self._recent if each[1] is not operation)
            self._recent = ((variant.values, operation), *others)[:MOST_RECENT]

    def _rows(self) -> list[tuple[str, str]]:
        program = self._program
        rows = []
        for letter, pipeline in program.pipelines.items():
            if letter == "q" and not pipeline.all_steps:
                continue
            steps = " \N{RIGHTWARDS ARROW} ".join(map(str, pipeline.all_steps)) or "as it is"
            rows.append((letter, steps))
        rows.append(("parameters", ", ".join(program.parameters) or "none"))
        rows += [(f"{letter}_format", name) for letter, name in program.formats.items() if name]
        rows.append(("layout", program.layout or "the one that the shapes allow"))
        for operation in self._operations()[:MOST_RECENT]:
            info = operation.info
            sizes = ", ".join(f"{side.head_size} of {side.letter.upper()}" for side in info.sides)
            formats = ", ".join(side.format.name for side in info.sides)
            used = (
                f"{info.dtype} to {formats}, {info.num_kv_heads} KV heads, {sizes}, {info.layout}"
            )
            rows.append(("used for", f"{used}, on {operation.device}"))
        return rows

    def _repr_html_(self) -> str:
        return as_html(self._rows())

    def __repr__(self) -> str:
        said = [
            f"{letter}=[{', '.join(map(_said, pipeline.all_steps))}]"
            for letter, pipeline in self._program.pipelines.items()
            if pipeline.all_steps
        ]
        return f"{type(self).__name__}({', '.join(said)})"


class WriteKernel(_Kernel):
    """A write into a paged cache whose rows go through steps of yours, as one kernel.

    Rows of q, K and V are loaded, held as float32 through all steps, rounded once and stored: K and
    V in their slots, q and, if asked for, K and V by token.

    Parameters
    ----------
    k, v, q : sequence of str or step
        What happens to each row. A string is an expression for each element, in which ``x`` is the
        element; see the guide to expressions. Other steps are `rms_norm`, `rope`, `hadamard`,
        `cast`, `quantize` and `cuda`. By default, rows stay as they are.
    layout : {"HND", "NHD"}, optional
        See `Descriptor.create`.
    k_format, v_format : str, optional
        See `Descriptor.create`.
    q_format : {"float8_e4m3fn", "float8_e5m2"}, optional
        What is stored in `q_out`, where that is an array of bytes (uint8).
    on_invalid : {"skip", "raise"}
        What to do about slots outside the cache, and about indices in steps, such as positions,
        that are outside their parameter. Such rows are never written, nor read out of bounds.
        ``"skip"``: count them for `check`, and wait for nothing. ``"raise"``: each call waits, and
        raises.
    debug : bool, optional
        See `Descriptor.create`.

    Raises
    ------
    ExpressionError
        A string is not an expression; the message marks the place.
    BadParamError, BadParamTypeError
        A step or an option is not allowed; the message names it, as in ``k[1]``.

    Notes
    -----
    No device is needed to make a kernel. The steps are compiled into one CUDA kernel on the first
    call for some dtypes, formats and head sizes, and kept on disk. Other numbers and other numbers
    of tokens, blocks and slots compile nothing; other strides, lengths of tables or numbers of
    heads only if they allow other accesses to memory.

    The same bytes are written on the CPU and on every GPU, if all functions in the expressions are
    exact.

    Any number of threads may call one kernel at the same time.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> store = pc.WriteKernel(k=["x * gain[head, dim]"], v=["min(x, most)"])
    >>> cache = np.zeros((2, 4, 1, 2, 8), np.float16)  # K and V: 4 blocks, 1 head, 2 slots, size 8
    >>> k, v = np.ones((3, 1, 8), np.float16), np.full((3, 1, 8), 2, np.float16)
    >>> gain = np.arange(8, dtype=np.float32)[None]
    >>> store(cache[0], cache[1], k, v, np.array([6, -1, 1]), gain=gain, most=1.5)
    >>> cache[0, 3, 0, 0].tolist(), cache[1, 3, 0, 0, :2].tolist()
    ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [1.5, 1.5])
    """

    def __init__(
        self,
        *,
        k: Any = (),
        v: Any = (),
        q: Any = (),
        layout: str | None = None,
        k_format: str | None = None,
        v_format: str | None = None,
        q_format: str | None = None,
        on_invalid: str = "skip",
        debug: bool | None = None,
    ) -> None:
        pipelines = {
            "q": Pipeline.of("q", q, quantizes=False),
            "k": Pipeline.of("k", k, quantizes=True),
            "v": Pipeline.of("v", v, quantizes=True),
        }
        formats = {"q": q_format, "k": k_format, "v": v_format}
        super().__init__(Program(False, pipelines, layout, formats), on_invalid, debug)

    def __call__(
        self,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        slot_mapping: Any,
        *,
        q: Any = None,
        q_out: Any = None,
        k_out: Any = None,
        v_out: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        stream: Any = None,
        **parameters: Any,
    ) -> None:
        """Write the K and V of each token to its slot, after the steps, and q to `q_out`.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale : array
            See `Descriptor.create`.
        q : array, optional
            ``[num_tokens or more, num_q_heads, head_size]``, of the dtype of `k`, with any strides
            that are not negative, the last axis 1. Needed if there are steps for q.
        q_out : array, optional
            Where q is stored after its steps, token by token; of the shape of `q`; float16,
            bfloat16, float32, float8_e4m3fn or float8_e5m2. It may be `q` itself. Rows of padding
            are stored too.
        k_out, v_out : array, optional
            Where K and V are stored too, token by token, as they are before they are quantised:
            float16, bfloat16 or float32. They may be `k` and `v` themselves.
        stream : optional
            See `Descriptor.calculate`, also for what is and is not synchronized.
        **parameters : array or number
            What the steps name. Arrays are float16, bfloat16, float32, int32, int64 or bool, of any
            strides that are not negative, on the device of the cache; one whose first index is
            ``token`` has an entry for each token. A number does not compile anew, whatever its
            value, but ints, floats and bools are different kinds.

        Raises
        ------
        ExpressionError
            An expression does not fit its parameters; the message marks the place.
        PagedCacheError
            Before anything is queued or written, except for a `LaunchError` and, with
            ``on_invalid="raise"``, an `InvalidSlotError` or `InvalidIndexError`.

        Notes
        -----
        Nothing is allocated on the device or synchronized, and after the first call of its kind
        nothing is compiled, so a call can be captured into a CUDA graph. JAX arrays can be read,
        but not written.
        """
        if len(parameters) == self._count:
            try:
                for values, operation in self._recent:
                    if operation.latest(
                        k_cache, v_cache, k, v, slot_mapping, q, q_out, k_out, v_out, k_scale,
                        v_scale, *values(parameters), stream,
                    ):  # fmt: skip
                        return
            except KeyError:
                pass  # which is told below
        if self._plain is not None and q is q_out is k_out is v_out is None and not parameters:
            self._run_plain((k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale), stream)
            return
        tensors = (k_cache, v_cache, k, v, slot_mapping, q, q_out, k_out, v_out, k_scale, v_scale)
        self._run(tensors, parameters, stream)

    def warmup(
        self,
        k_cache: Any,
        v_cache: Any,
        k: Any,
        v: Any,
        slot_mapping: Any,
        *,
        q: Any = None,
        q_out: Any = None,
        k_out: Any = None,
        v_out: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        **parameters: Any,
    ) -> None:
        """Compile for such arguments, and write nothing.

        Parameters
        ----------
        k_cache, v_cache, k, v, slot_mapping, q, q_out, k_out, v_out, k_scale, v_scale, **parameters
            As in a call; arrays may also be `TensorDescriptor` with a device.

        Raises
        ------
        PagedCacheError
            As in a call; a `CompileError` with the log of the compiler.

        Notes
        -----
        Nothing is queued. Any number of threads may call this at the same time; it must not be
        called while its thread captures a CUDA graph.
        """
        if self._plain is not None and q is q_out is k_out is v_out is None and not parameters:
            self._warm_up_plain((k_cache, v_cache, k, v, slot_mapping, k_scale, v_scale))
            return
        tensors = (k_cache, v_cache, k, v, slot_mapping, q, q_out, k_out, v_out, k_scale, v_scale)
        self._warm_up(tensors, parameters)


class ReadKernel(_Kernel):
    """A read from a paged cache whose rows go through steps of yours, as one kernel.

    The mirror of `WriteKernel`: in the steps, ``x`` is what is stored, times its scale, as float32.

    Parameters
    ----------
    k, v : sequence of str or step
        See `WriteKernel`; there is no `quantize`.
    layout : {"HND", "NHD"}, optional
    k_format, v_format : str, optional
    on_invalid : {"skip", "raise"}
    debug : bool, optional
        See `WriteKernel`.

    Raises
    ------
    ExpressionError, BadParamError, BadParamTypeError
        See `WriteKernel`.

    Notes
    -----
    Compiling, threads and exactness are as for `WriteKernel`.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> load = pc.ReadKernel(k=["x - mean[dim]"], k_format="float16", v_format="float16")
    >>> cache = np.ones((2, 4, 1, 2, 8), np.float16)  # K and V: 4 blocks, 1 head, 2 slots, size 8
    >>> k_out, v_out = np.zeros((2, 2, 1, 8), np.float32)
    >>> load(cache[0], cache[1], np.array([6, 1]), k_out, v_out, mean=np.full(8, 0.25, np.float32))
    >>> k_out[0, 0, :2].tolist(), v_out[0, 0, :2].tolist()
    ([0.75, 0.75], [1.0, 1.0])
    """

    def __init__(
        self,
        *,
        k: Any = (),
        v: Any = (),
        layout: str | None = None,
        k_format: str | None = None,
        v_format: str | None = None,
        on_invalid: str = "skip",
        debug: bool | None = None,
    ) -> None:
        pipelines = {
            "k": Pipeline.of("k", k, quantizes=False),
            "v": Pipeline.of("v", v, quantizes=False),
        }
        formats = {"k": k_format, "v": v_format}
        super().__init__(Program(True, pipelines, layout, formats), on_invalid, debug)

    def __call__(
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
        **parameters: Any,
    ) -> None:
        """Read the K and V of each slot, and store them by token after the steps.

        Parameters
        ----------
        k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale, stream
            See `paged_gather`.
        **parameters : array or number
            See `WriteKernel`.

        Raises
        ------
        ExpressionError
            An expression does not fit its parameters; the message marks the place.
        PagedCacheError
            See `WriteKernel`.

        Notes
        -----
        Rows of padding, and of invalid slots and indices, are left as they are.
        """
        if len(parameters) == self._count:
            try:
                for values, operation in self._recent:
                    if operation.latest(
                        k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale,
                        *values(parameters), stream,
                    ):  # fmt: skip
                        return
            except KeyError:
                pass  # which is told below
        tensors = (k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale)
        if self._plain is not None and not parameters:
            self._run_plain(tensors, stream)
            return
        self._run(tensors, parameters, stream)

    def warmup(
        self,
        k_cache: Any,
        v_cache: Any,
        slot_mapping: Any,
        k_out: Any,
        v_out: Any,
        *,
        k_scale: Any = None,
        v_scale: Any = None,
        **parameters: Any,
    ) -> None:
        """Compile for such arguments, and read nothing.

        Parameters
        ----------
        k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale, **parameters
            As in a call; arrays may also be `TensorDescriptor` with a device.

        Raises
        ------
        PagedCacheError
            As in a call; a `CompileError` with the log of the compiler.

        Notes
        -----
        Nothing is queued. Any number of threads may call this at the same time; it must not be
        called while its thread captures a CUDA graph.
        """
        tensors = (k_cache, v_cache, slot_mapping, k_out, v_out, k_scale, v_scale)
        if self._plain is not None and not parameters:
            self._warm_up_plain(tensors)
            return
        self._warm_up(tensors, parameters)


def _check_options(program: Program, on_invalid: object) -> None:
    """Refuse at once what the first call would refuse."""
    layout: object = program.layout
    if layout is not None and (not isinstance(layout, str) or layout not in tuple(LAYOUTS)):
        rule = f"must be one of {', '.join(LAYOUTS)} or None"
        raise BadParamError("layout", rule, shown(program.layout))
    for letter, name in program.formats.items():
        allowed = Q_FORMATS if letter == "q" else tuple(FORMATS)
        if name is not None and (not isinstance(name, str) or name not in allowed):
            rule = f"must be one of {', '.join(allowed)} or None"
            raise BadParamError(f"{letter}_format", rule, shown(name))
    if not isinstance(on_invalid, str) or on_invalid not in ON_INVALID:
        rule = f"must be one of {', '.join(ON_INVALID)}"
        raise BadParamError("on_invalid", rule, shown(on_invalid))


def _plain(value: Any) -> Any:
    """Return numbers of NumPy as Python's."""
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    return value


def _said(step: Step) -> str:
    return repr(str(step)) if isinstance(step, Element) else str(step)
