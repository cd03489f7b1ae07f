# SPDX-License-Identifier: Apache-2.0
"""What a write or read with steps needs to know about its tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.cache.formats import FORMATS, SOURCE_DTYPES, Format
from pagedcache.cache.layout import SIZES, resolve_layout
from pagedcache.cache.tables import SLOT_DTYPES, cache_rule, check_tables, rows_rule, scale_rule
from pagedcache.dtypes import BF16, E4M3, E5M2, F16, F32, I32, I64, U8, Dtype
from pagedcache.expressions import Kind, Parameter
from pagedcache.operators.paged_gather.info import NAMES as READ_NAMES
from pagedcache.operators.paged_gather.info import OPTIONAL as READ_OPTIONAL
from pagedcache.operators.paged_gather.info import letters_of
from pagedcache.rules import Rule, Rules
from pagedcache.status import BadParamError, BadTensorDtypeError, shown
from pagedcache.steps import Pipeline, ResolvedPipeline, RowShape

if TYPE_CHECKING:
    from pagedcache.cache.scales import Scale
    from pagedcache.cache.sides import Side
    from pagedcache.tensors import TensorDescriptor

BOOL: Dtype = np.dtype(np.bool_)
KINDS = {
    **dict.fromkeys((F16, BF16, F32), Kind.FLOAT),
    **dict.fromkeys((I32, I64), Kind.INT),
    BOOL: Kind.BOOL,
}
NUMBER_KINDS = {float: Kind.FLOAT, int: Kind.INT, bool: Kind.BOOL}
INVALID_OF = {"q": -1, "k": -2, "v": -3}
"""What a report has in place of a slot if an index of a step has left its parameter."""

Q_DTYPES = (*SOURCE_DTYPES, E4M3, E5M2, U8)
Q_FORMATS = tuple(name for name, each in FORMATS.items() if not each.is_integer)

WRITE_NAMES = (
    "k_cache", "v_cache", "k", "v", "slot_mapping",
    "q", "q_out", "k_out", "v_out", "k_scale", "v_scale",
)  # fmt: skip
WRITE_OPTIONAL = WRITE_NAMES[5:]
WRITE_FREE = ("k", "v", "slot_mapping", "q", "q_out", "k_out", "v_out")


@dataclass(frozen=True, slots=True)
class Program:
    """What a kernel was created with.

    Attributes
    ----------
    reads : bool
        Whether it is a `ReadKernel`.
    pipelines : dict of str to Pipeline
        By letter: ``"q"``, ``"k"``, ``"v"``.
    layout : str or None
    formats : dict of str to str or None
        The formats that were asked for, by letter.
    """

    reads: bool
    pipelines: Mapping[str, Pipeline]
    layout: str | None
    formats: Mapping[str, str | None]

    @property
    def names(self) -> tuple[str, ...]:
        """Its tensors, but for parameters."""
        return READ_NAMES if self.reads else WRITE_NAMES

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters, in the order in which steps name them."""
        every = (name for each in self.pipelines.values() for name in each.assumed)
        return tuple(dict.fromkeys(every))

    @property
    def by_token(self) -> frozenset[str]:
        """Parameters whose first axis has an entry for each token."""
        return frozenset().union(*(each.by_token for each in self.pipelines.values()))

    def resolve(self, kinds: Mapping[str, Parameter]) -> dict[str, ResolvedPipeline]:
        """Return the pipelines for parameters of some kinds and rows of any shape."""
        return {letter: each.resolve(RowShape(), kinds) for letter, each in self.pipelines.items()}


@dataclass(frozen=True, slots=True)
class RowsByToken:
    """Rows in the order of tokens. Strides are in elements.

    Attributes
    ----------
    name : str
        Of the argument.
    format : Format
    heads, size : int
    token_stride, head_stride : int
    """

    name: str
    format: Format
    heads: int
    size: int
    token_stride: int
    head_stride: int


@dataclass(frozen=True, slots=True)
class ArrayParameter:
    """A parameter that is an array. Strides are in elements.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype
    shape : tuple
        ``None`` for an axis that is as long as there are tokens.
    strides : tuple of int
    """

    name: str
    dtype: Dtype
    shape: tuple[int | None, ...]
    strides: tuple[int, ...]

    @property
    def kind(self) -> Kind:
        """What an element is."""
        return KINDS[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """Sizes, strides and steps of one operation.

    Attributes
    ----------
    dtype : numpy.dtype
        Of the rows by token of K and V.
    slot_dtype : numpy.dtype
    layout : {"HND", "NHD"}
    num_tokens, num_blocks, block_size, num_kv_heads : int
    sides : tuple of Side
        K, and V if there is V.
    reads : bool
        Whether rows go from the cache to tokens.
    sources : dict of str to RowsByToken
        What is written, by letter; empty if `reads`.
    outs : dict of str to RowsByToken
        What rows are stored in besides the cache, by letter.
    pipelines : dict of str to ResolvedPipeline
    parameters : tuple of str
        The names of all parameters, in the order in which steps name them.
    arrays : tuple of ArrayParameter
    numbers : tuple of (str, type)
    halves : dict of str to list
        By letter, the first dimension and the distance of pairs that are rotated.
    tables : dict of str to list
        By letter, parameters that are read for pairs, from both halves of their last axis.
    rules : Rules
    """

    dtype: Dtype
    slot_dtype: Dtype
    layout: str
    num_tokens: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    sides: tuple[Side, ...]
    reads: bool
    sources: Mapping[str, RowsByToken]
    outs: Mapping[str, RowsByToken]
    pipelines: Mapping[str, ResolvedPipeline]
    parameters: tuple[str, ...]
    arrays: tuple[ArrayParameter, ...]
    numbers: tuple[tuple[str, type], ...]
    halves: Mapping[str, list[tuple[int, int]]]
    tables: Mapping[str, list[str]]
    rules: Rules = field(repr=False, compare=False)

    @property
    def num_slots(self) -> int:
        """Capacity of the cache in tokens; valid slots are 0 to ``num_slots - 1``."""
        return self.num_blocks * self.block_size

    @property
    def names(self) -> tuple[str, ...]:
        """All arguments of a call, arrays first."""
        return (*self.rules.names, *(name for name, _ in self.numbers))

    @property
    def letters(self) -> str:
        """The sides that there are, q first."""
        return "".join(letter for letter in "qkv" if letter in self.pipelines)

    def side(self, letter: str) -> Side | None:
        """Return K or V; ``None`` for q."""
        return next((each for each in self.sides if each.letter == letter), None)

    @classmethod
    def create(
        cls, program: Program, numbers: tuple[tuple[str, type], ...], **described: TensorDescriptor
    ) -> ProgramInfo:
        """Check tensor descriptors against each other and against the steps.

        Raises
        ------
        PagedCacheError
            The message names the tensor or the step, the rule and what was found.
        """
        letters = letters_of(described) if program.reads else _letters_written(described, program)
        rows = {letter: f"{letter}_out" if program.reads else letter for letter in letters}
        of_cache = {letter: name for letter, name in rows.items() if letter != "q"}
        layout = resolve_layout(
            program.layout,
            described["k_cache"].shape,
            described[rows["k"]].shape,
            subject=rows["k"],
        )
        formats = dict(program.formats)
        for letter, pipeline in program.pipelines.items():
            if pipeline.quantizer is not None:
                formats[letter] = _format_of_quantizer(letter, formats[letter], pipeline)
        arrays = tuple(name for name in program.parameters if name in described)
        make_rules = functools.partial(_make_rules, program, layout, letters, arrays, described)
        rules, sizes, sides = check_tables(described, make_rules, layout, of_cache, formats)
        found_arrays = tuple(_array(program, name, described[name], rules) for name in arrays)
        parameters = {
            each.name: Parameter(each.kind, len(each.shape), each.shape) for each in found_arrays
        }
        parameters |= {name: Parameter(NUMBER_KINDS[kind], 0, ()) for name, kind in numbers}
        sources, outs = {}, {}
        for letter in letters:
            heads = sizes["num_q_heads" if letter == "q" else "num_kv_heads"]
            size = sizes["q_head_size" if letter == "q" else SIZES[letter]]

            def by_token(
                name: str, heads: int = heads, size: int = size, letter: str = letter
            ) -> RowsByToken:
                token, head, _ = rules.steps(name, described[name])
                stored = _out_format(name, described[name].dtype, formats.get(letter))
                return RowsByToken(name, stored, heads, size, token, head)

            if not program.reads:
                sources[letter] = by_token(letter)
            if f"{letter}_out" in described:
                outs[letter] = by_token(f"{letter}_out")
        of_rows = {letter: (sources or outs)[letter] for letter in letters}
        pipelines = {
            letter: program.pipelines[letter].resolve(RowShape(each.heads, each.size), parameters)
            for letter, each in of_rows.items()
        }
        for side in sides:
            if not program.reads:
                _check_quantizer(side, pipelines[side.letter])
        return cls(
            dtype=described[rows["k"]].dtype,
            slot_dtype=described["slot_mapping"].dtype,
            layout=layout,
            num_tokens=sizes["num_tokens"],
            num_blocks=sizes["num_blocks"],
            block_size=sizes["block_size"],
            num_kv_heads=sizes["num_kv_heads"],
            sides=sides,
            reads=program.reads,
            sources=sources,
            outs=outs,
            pipelines=pipelines,
            parameters=program.parameters,
            arrays=found_arrays,
            numbers=numbers,
            halves={letter: program.pipelines[letter].halves(parameters) for letter in letters},
            tables={letter: program.pipelines[letter].tables for letter in letters},
            rules=rules,
        )


def _letters_written(described: Mapping[str, TensorDescriptor], program: Program) -> str:
    """Return the sides of a write."""
    steps = program.pipelines["q"].all_steps
    if "q" in described:
        if "q_out" not in described:
            raise BadParamError("q_out", "must be given, because q is; it may be q itself")
        return "qkv"
    if steps:
        raise BadParamError("q", "must be given, because the kernel has steps for q")
    if "q_out" in described:
        raise BadParamError("q", "must be given, because q_out is")
    return "kv"


def _format_of_quantizer(letter: str, named: str | None, pipeline: Pipeline) -> str:
    assert pipeline.quantizer is not None
    name = pipeline.quantizer.format.name
    if named is not None and named != name:
        rule = f"must be {name!r} or None, because the steps of {letter} quantise to {name}"
        raise BadParamError(f"{letter}_format", rule, shown(named))
    return name


def _make_rules(
    program: Program,
    layout: str,
    letters: str,
    arrays: tuple[str, ...],
    described: Mapping[str, TensorDescriptor],
    formats: Mapping[str, Format],
    scales: Mapping[str, tuple[str, tuple[str, ...]]],
) -> Rules:
    """Return the table of tensors."""
    optional = READ_OPTIONAL if program.reads else WRITE_OPTIONAL
    found = {
        **{name: Rule(name, (), (), optional=True) for name in optional},
        "slot_mapping": Rule("slot_mapping", ("num_tokens",), SLOT_DTYPES),
    }
    out_like = "k_out" if program.reads else None
    for letter in letters:
        rules = []
        if letter == "q":
            of_q = ("num_tokens", "num_q_heads", "q_head_size")
            rules.append(Rule("q", of_q, SOURCE_DTYPES, like="k"))
            rules.append(Rule("q_out", of_q, Q_DTYPES, written=True, in_place="q"))
        else:
            like = None if letter == "k" else "k"
            rules.append(cache_rule(letter, layout, formats.get(letter), written=not program.reads))
            rules.append(scale_rule(letter, scales, computes=not program.reads))
            out = rows_rule(
                f"{letter}_out",
                SOURCE_DTYPES,
                like=out_like if letter == "v" else None,
                written=True,
            )
            if not program.reads:
                rules.append(rows_rule(letter, SOURCE_DTYPES, like=like))
                out = Rule(out.name, out.axes, out.dtypes, None, True, in_place=letter)
            rules.append(out)
        for rule in rules:
            if rule.name in described or rule.name not in optional:
                found[rule.name] = rule
    for name in arrays:
        axes: tuple[str, ...] = tuple(f"{name}_{i}" for i in range(len(described[name].shape)))
        if name in program.by_token and axes:
            axes = ("num_tokens", *axes[1:])
        found[name] = Rule(name, axes, tuple(KINDS), any_stride=True)
    names = (*program.names, *arrays)
    return Rules(
        tensors=tuple(found[name] for name in names),
        free="num_tokens",
        counted_by="slot_mapping",
        note=f" (layout {layout})",
    )


def _array(
    program: Program, name: str, described: TensorDescriptor, rules: Rules
) -> ArrayParameter:
    shape: tuple[int | None, ...] = described.shape
    if name in program.by_token and shape:
        shape = (None, *shape[1:])
    return ArrayParameter(name, described.dtype, shape, rules.steps(name, described))


def _out_format(name: str, dtype: Dtype, named: str | None) -> Format:
    """Return how rows by token are stored."""
    if name != "q_out":
        return FORMATS[str(dtype)]
    if dtype == U8:
        if named is None:
            rule = "must be given, because q_out is of bytes (uint8); use 'float8_e4m3fn' or "
            raise BadParamError("q_format", rule + "'float8_e5m2'")
        if named not in Q_FORMATS or FORMATS[named].dtype.itemsize != 1:
            rule = "must be 'float8_e4m3fn' or 'float8_e5m2', because q_out is of bytes"
            raise BadParamError("q_format", rule, shown(named))
        return FORMATS[named]
    if named is not None and named != str(dtype):
        raise BadTensorDtypeError("q_out", f"must be {named}, as q_format says", dtype)
    return FORMATS[str(dtype)]


def _check_quantizer(side: Side, pipeline: ResolvedPipeline) -> None:
    """Raise unless the scales of a quantiser have a place."""
    quantizer, scale = pipeline.quantizer, side.scale
    if quantizer is None:
        return
    group = quantizer.group or side.head_size
    if scale is None or not scale.is_written or scale.group != group:
        groups = side.head_size // group
        shape = "of a token and head" + (f", and {groups} groups" if groups > 1 else "")
        rule = f"must have the shape of scales {shape}, because the steps of {side.letter} quantise"
        got = "None" if scale is None else f"the shape of a scale of a {_said(scale)}"
        raise BadParamError(f"{side.letter}_scale", rule, got)


def _said(scale: Scale) -> str:
    return scale.granularity.replace("_", " and ")
