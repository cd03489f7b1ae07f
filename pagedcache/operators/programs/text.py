# SPDX-License-Identifier: Apache-2.0
"""The CUDA text of a program: its parameters, its steps, and which thread holds which elements.

What is fixed is in ``cuda_src/programmed.cuh`` and ``cuda_src/steps.cuh``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pagedcache.cache.formats import CUDA_NAMES
from pagedcache.cache.nvidia import (
    COMPUTED,
    CONVERTED,
    COPIED,
    QUANTIZED,
    SCALED,
    SCALED_ELEMENTS,
    SLOT_NAMES,
    WIDEST,
)
from pagedcache.dtypes import BF16, F16, F32, I32, I64
from pagedcache.expressions import Kind
from pagedcache.operators.programs.info import BOOL

if TYPE_CHECKING:
    from pagedcache.cache.formats import Format
    from pagedcache.operators.programs.info import ArrayParameter, ProgramInfo
    from pagedcache.steps import ResolvedPipeline

NAMESPACE = "pagedcache::language"
MOST_WIDTH, MOST_LANES = 8, 32
MOST_ELEMENTS = 32  # of a row in a thread
# The same as far as possible; more where tables are read for pairs, which heads can share.
USUAL_ELEMENTS, ELEMENTS_OF_PAIRS = 8, 16
LEAST_WIDTH_OF_PAIRS = 4
MOST_HEADS = 2  # of a thread
MOST_SIZE = MOST_LANES * MOST_ELEMENTS
STORED_TYPES = {F16: "F16", BF16: "BF16", F32: "F32", I64: "long long", I32: "int", BOOL: "bool"}
VALUE_TYPES = {Kind.FLOAT: "float", Kind.INT: "Whole", Kind.BOOL: "bool"}
NUMBER_TYPES = {
    float: ("double", "float"),
    int: ("long long", "Whole"),
    bool: ("long long", "bool"),
}


@dataclass(frozen=True, slots=True)
class Held:
    """How the threads of a row hold its elements; see ``Rows`` in ``steps.cuh``.

    Attributes
    ----------
    size : int
        Elements of a row.
    lanes : int
        Threads that hold it.
    width : int
        Neighbouring elements in a thread.
    """

    size: int
    lanes: int
    width: int

    @property
    def elements(self) -> int:
        """How many elements of a row a thread has room for."""
        return -(-self.size // (self.lanes * self.width)) * self.width

    @classmethod
    def of(cls, size: int, halves: Sequence[tuple[int, int]], usual: int) -> Held:
        """Return how rows are held, given the pairs that should be in one thread.

        Parameters
        ----------
        size : int
        halves : sequence of (int, int)
            The first dimension and the distance of pairs that are rotated.
        usual : int
            About how many elements a thread should hold.
        """
        widest = math.gcd(size, MOST_WIDTH)
        padded = 1 << (size - 1).bit_length()
        possible = [
            made
            for width in (8, 4, 2, 1)
            for lanes in (32, 16, 8, 4, 2, 1)
            if width <= widest and lanes * width <= padded
            and (made := cls(size, lanes, width)).elements <= MOST_ELEMENTS
        ]  # fmt: skip

        def together(made: Held) -> bool:
            span = made.lanes * made.width
            return all(first % span == 0 and half % span == 0 for first, half in halves)

        wide = [made for made in possible if made.width == widest]
        fitting = [
            made for made in possible if together(made) and made.width >= LEAST_WIDTH_OF_PAIRS
        ]
        return min(
            fitting or wide,
            key=lambda made: (-made.width, abs(made.elements - usual), made.lanes),
        )

    def text(self, heads: int) -> str:
        """Return the type in CUDA, of up to so many heads."""
        count = f"(kHeads < {heads} ? kHeads : {heads})"
        return f"Rows<{self.size}, {self.lanes}, {self.width}, {count}>"

    def heads(self, heads: int) -> int:
        """Return how many heads a thread may hold, of so many."""
        if self.elements > ELEMENTS_OF_PAIRS:
            return 1
        return math.gcd(heads, MOST_HEADS)


@dataclass(frozen=True, slots=True)
class Access:
    """How many neighbouring elements are accessed at once.

    Attributes
    ----------
    sides : dict of str to int
        Of rows, by letter.
    arrays : dict of str to int
        Of parameters, by name; 0 if they are not next to each other.
    """

    sides: Mapping[str, int]
    arrays: Mapping[str, int]

    @classmethod
    def of(cls, info: ProgramInfo, held: Mapping[str, Held], *, wide: bool) -> Access:
        """Return what strides allow, or with ``wide=False`` any address."""
        sides = {}
        for letter in info.letters:
            steps: list[tuple[Format, tuple[int, ...]]] = [
                (each.format, (each.token_stride, each.head_stride))
                for each in (info.sources.get(letter), info.outs.get(letter))
                if each is not None
            ]
            if (side := info.side(letter)) is not None:
                strides = side.block_stride, side.slot_stride, side.cache_head_stride
                steps.append((side.format, tuple(x * side.format.packed for x in strides)))
            widest = held[letter].width if wide else 1
            sides[letter] = next(
                count
                for count in (8, 4, 2, 1)
                if count <= widest and all(
                    stride * each.bits // 8 % needed(each.bits, count) == 0
                    for each, strides in steps for stride in strides
                )
            )  # fmt: skip
        tables = {name for letter in info.letters for name in info.tables[letter]}
        arrays = {
            each.name: _array_access(each, wide=wide, halves=each.name in tables)
            for each in info.arrays
        }
        return cls(sides, arrays)


def held_rows(info: ProgramInfo) -> dict[str, Held]:
    """Return how threads hold the rows of each side."""
    usual = ELEMENTS_OF_PAIRS if rotates(info) else USUAL_ELEMENTS
    sizes = {letter: (info.sources or info.outs)[letter].size for letter in info.letters}
    return {letter: Held.of(size, info.halves[letter], usual) for letter, size in sizes.items()}


def rotates(info: ProgramInfo) -> bool:
    """Return whether tables are read for pairs."""
    return any(info.tables.values())


def needed(bits: int, elements: int) -> int:
    """Return what the address of so many elements must be a multiple of, in bytes."""
    return max(min(bits * elements // 8, WIDEST), 1)


def _array_access(array: ArrayParameter, *, wide: bool, halves: bool) -> int:
    """Return how many elements along the last axis are accessed at once.

    With `halves`, also from its middle on.
    """
    if array.kind is not Kind.FLOAT or not array.shape or array.strides[-1] not in (0, 1):
        return 0
    last = array.shape[-1] or 1
    if array.strides[-1] == 0 and last > 1:
        return 0
    if not wide:
        return 1
    bits = array.dtype.itemsize * 8
    starts = (*array.strides[:-1], last // 2 if halves else last)
    return next(
        count
        for count in (8, 4, 2, 1)
        if all(step * bits // 8 % needed(bits, count) == 0 for step in starts)
    )


def mode(info: ProgramInfo, letter: str) -> int:
    """Return what happens to rows between the steps and the cache."""
    side, pipeline = info.side(letter), info.pipelines[letter]
    if side is None:
        return CONVERTED
    if pipeline.quantizer is not None:
        return QUANTIZED
    if side.copies(info.dtype) and not pipeline.steps:
        return COPIED
    if side.scale is None:
        return CONVERTED
    if info.reads:
        return SCALED
    if side.scale.is_written:
        return COMPUTED
    return SCALED_ELEMENTS if side.scale.granularity == "channel" else SCALED


def members(names: Sequence[str]) -> dict[str, str]:
    """Return what each parameter is called in the text."""
    return {name: f"parameters.p{i}" for i, name in enumerate(names)}


def steps_text(pipelines: Mapping[str, ResolvedPipeline], names: Sequence[str]) -> str:
    """Return the text of all steps, which is the same for all shapes and dtypes."""
    header = [f"// p{i} is {name}" for i, name in enumerate(names)]
    texts = [each.text(members(names)) for each in pipelines.values()]
    return "\n".join([*header, *texts])


def program_text(
    info: ProgramInfo,
    names: Sequence[str],
    held: Mapping[str, Held],
    access: Access,
    most_in_block: int,
) -> str:
    """Return the text that follows ``programmed.cuh``, for blocks of at most so many threads."""
    arrays = {each.name: each for each in info.arrays}
    tables = {each for letter in info.letters for each in info.tables[letter]}
    parts = [
        f"namespace pagedcache {{\nnamespace language {{\n\n{_structs(info, names)}",
        _values(info, names, arrays, access, tables),
        steps_text(info.pipelines, names),
        *(_side(info, letter, held[letter], access.sides[letter]) for letter in info.letters),
        _program(info, held, most_in_block),
        "}  // namespace language\n}  // namespace pagedcache\n",
    ]
    return "\n".join(parts)


def expression(info: ProgramInfo, heads: int, *, ahead: bool) -> str:
    """Return the C++ name of the kernel whose threads hold up to so many heads."""
    kernel = "programmedRead" if info.reads else "programmedWrite"
    return f"{NAMESPACE}::{kernel}<{NAMESPACE}::Program, {heads}, {str(ahead).lower()}>"


def _structs(info: ProgramInfo, names: Sequence[str]) -> str:
    numbers = {name: NUMBER_TYPES[kind][0] for name, kind in info.numbers}
    in_order = {name: i for i, name in enumerate(names)}
    call = [
        f"{'const void' if name == 'slot_mapping' else 'char'}* {name};"
        for name in info.rules.names[: len(info.rules.names) - len(info.arrays)]
    ]
    call += [f"const void* p{in_order[each.name]};" for each in info.arrays]
    call += [f"{numbers[name]} p{in_order[name]};" for name, _ in info.numbers]
    call += ["long long tokens;", "long long all_tokens;"]  # of this launch, and of the call
    fixed = ["ProgramCall call;", "ProgramSide q;", "ProgramSide k;", "ProgramSide v;"]
    fixed += ["Slots slots;", "Report* report;", "long long first_token;"]
    fixed.append("unsigned int thread_bits;")
    for each in info.arrays:
        for axis in range(len(each.shape)):
            member = f"p{in_order[each.name]}"
            fixed.append(f"long long {member}_length{axis};")
            fixed.append(f"long long {member}_stride{axis};")
    return "\n".join(
        [
            "struct ProgramCall {", *(f"  {line}" for line in call), "};\n",
            "struct ProgramParameters {", *(f"  {line}" for line in fixed), "};\n",
        ]
    )  # fmt: skip


def _values(
    info: ProgramInfo,
    names: Sequence[str],
    arrays: Mapping[str, ArrayParameter],
    access: Access,
    tables: set[str],
) -> str:
    kinds = dict(info.numbers)
    declared, made = [], []
    for i, name in enumerate(names):
        if name in kinds:
            kind = NUMBER_TYPES[kinds[name]][1]
            declared.append(f"{kind} p{i};")
            value = f"numberOf(p.call.p{i})"
            made.append(f"p{i}({value}{' != 0' if kind == 'bool' else ''})")
            continue
        array = arrays[name]
        stored = STORED_TYPES[array.dtype]
        at = f"static_cast<const {stored}*>(p.call.p{i})"
        axes = len(array.shape)
        if not axes:
            declared.append(f"{VALUE_TYPES[array.kind]} p{i};")
            made.append(f"p{i}(valueOf(*{at}))")
            continue
        last = array.shape[-1] if name in tables else 0
        declared.append(f"Array<{stored}, {axes}, {access.arrays[name]}, {last or 0}> p{i};")
        lengths = ", ".join(
            "p.call.all_tokens" if length is None else f"p.p{i}_length{axis}"
            for axis, length in enumerate(array.shape)
        )
        strides = ", ".join(f"p.p{i}_stride{axis}" for axis in range(axes))
        made.append(f"p{i}{{{at}, {{{lengths}}}, {{{strides}}}}}")
    initial = f"\n      : {', '.join(made)}" if made else ""
    lines = "\n".join(f"  {line}" for line in declared)
    return f"""struct ProgramValues {{
{lines}
  __device__ __forceinline__
      explicit ProgramValues([[maybe_unused]] const ProgramParameters& p){initial} {{}}
}};
"""


def _type(stored: Format) -> str:
    return f"FormatOf<{CUDA_NAMES[stored.name]}>"


def _side(info: ProgramInfo, letter: str, held: Held, access: int) -> str:
    side, out = info.side(letter), info.outs.get(letter)
    source = info.sources.get(letter)
    by_token = source or out
    assert by_token is not None
    stored = by_token.format if side is None else side.format
    group = held.size
    quantizer = info.pipelines[letter].quantizer
    if quantizer is not None:
        group = quantizer.group or held.size
    elif side is not None and side.scale is not None:
        group = side.scale.group
    copied = (
        out is not None
        and source is not None
        and out.format == source.format
        and not info.pipelines[letter].steps
    )
    flags = {
        "kHasOut": out is not None,
        "kOutIsCopied": copied,
        "kIsStored": side is not None,
    }
    lines = [
        f"template <int kHeads>\n  using Held = {held.text(held.heads(by_token.heads))};",
        f"using Source = {_type(by_token.format)};",
        f"using Out = {_type((out or by_token).format)};",
        f"using Format = {_type(stored)};",
        *(f"static constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()),
        f"static constexpr int kMode = {mode(info, letter)}, kGroup = {group};",
        # Elements of less than a byte are accessed in whole bytes.
        f"static constexpr int kAccess = {access}, kCacheAccess = {max(access, stored.packed)};",
        f"static constexpr long long kOf = kOf{letter.upper()};",
    ]
    body = "\n".join(f"  {line}" for line in lines)
    return f"struct Program{letter.upper()} : {letter.upper()}Steps {{\n{body}\n}};\n"


def _program(info: ProgramInfo, held: Mapping[str, Held], most_in_block: int) -> str:
    lines = [
        "using Parameters = ProgramParameters;",
        "using Values = ProgramValues;",
        f"using Slot = {SLOT_NAMES[str(info.slot_dtype)]};",
        *(f"using {letter.upper()} = Program{letter.upper()};" for letter in info.letters),
        f"static constexpr bool kHasQ = {str('q' in info.letters).lower()};",
        f"static constexpr bool kHasV = {str('v' in info.letters).lower()};",
        f"static constexpr int kMostElements = {max(each.elements for each in held.values())};",
        f"static constexpr int kMostInBlock = {most_in_block};",
    ]
    body = "\n".join(f"  {line}" for line in lines)
    return f"struct Program {{\n{body}\n}};\n"
