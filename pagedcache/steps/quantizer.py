# SPDX-License-Identifier: Apache-2.0
"""A quantiser of the user's: what the scale of a row is, and the code of an element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.cache.formats import FORMATS, Format
from pagedcache.expressions import Expression, Kind, Node, Parameter, parse
from pagedcache.expressions.cuda import printed
from pagedcache.expressions.evaluate import Scope, evaluate
from pagedcache.expressions.tree import OPERATIONS
from pagedcache.status import BadParamError, BadParamTypeError, shown
from pagedcache.steps.base import Around, Resolved, RowShape, Step, refuse, whole
from pagedcache.steps.element import evaluation

if TYPE_CHECKING:
    from pagedcache.tensors import Array

SCALE = "s"
F32 = FORMATS["float32"]
QUANTIZED = tuple(name for name, each in FORMATS.items() if not each.is_float)


def quantize(
    scale: str,
    code: str,
    format: str,  # noqa: A002 - as it is called everywhere in this package
    *,
    group: int | None = None,
) -> Step:
    """Quantise rows by two expressions of your own. The last step of `k` or `v` of a write.

    Parameters
    ----------
    scale : str
        An expression for the scale of a row, or of a group, such as
        ``"max(row_max(abs(x)) / 127, 1e-6)"``. It may not differ from element to element: ``x`` and
        ``dim`` stand inside row functions only, which are about the group if there is one. It is
        stored in `k_scale` or `v_scale`, which must be given, in the shape of scales that a write
        computes; see `Descriptor.create`.
    code : str
        An expression for what is stored of an element, in which ``s`` is the scale, such as
        ``"x / s"``. It is rounded to the format: integers to the nearest, halves away from zero.
        `paged_gather` reads ``code * s``.
    format : str
        Of the cache: ``"int8"``, ``"int4"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``.
    group : int, optional
        How many neighbouring dimensions share a scale; it divides the head size. By default, a row
        has one.

    Returns
    -------
    Step
        For `WriteKernel`.

    Raises
    ------
    ExpressionError
        `scale` or `code` is not an expression; the message marks the place.
    BadParamError, BadParamTypeError
        `format` or `group` is not allowed.
    """
    for name, text in (("scale", scale), ("code", code)):
        if not isinstance(text, str):
            raise BadParamTypeError(name, "must be an expression, as a string", shown(text))
    if not isinstance(format, str) or format not in QUANTIZED:
        raise BadParamError("format", f"must be one of {', '.join(QUANTIZED)}", shown(format))
    if group is not None:
        group = whole("group", group, 1)
    made = parse(scale, "the scale of quantize"), parse(code, "the code of quantize")
    if "scale" in made[1].parameters:
        made[1].fail(f"must call the scale {SCALE}")
    if SCALE in made[0].parameters:
        raise BadParamError("scale", f"must not have {SCALE}, which is the scale itself", scale)
    return Quantize(*made, FORMATS[format], group)


@dataclass(frozen=True)
class Quantize(Step):
    """See `quantize`."""

    scale: Expression
    code: Expression
    format: Format
    group: int | None

    def __str__(self) -> str:
        group = f", group={self.group}" if self.group else ""
        return f"quantize({self.scale.text!r}, {self.code.text!r}, {self.format.name!r}{group})"

    @property
    def assumed(self) -> dict[str, Parameter]:
        """What the expressions name, but the scale."""
        both = self.scale.assumed | self.code.assumed
        return {name: each for name, each in both.items() if name != SCALE}

    @property
    def by_token(self) -> frozenset[str]:
        """Parameters whose first index is ``token``."""
        return self.scale.by_token | self.code.by_token

    def resolve(
        self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]
    ) -> Quantizer:
        """Type the expressions."""
        if self.group is not None and row.size is not None and row.size % self.group:
            rule = f"must have a group that divides the head size, {row.size}"
            refuse(subject, self, rule, self.group)
        known = {**parameters, SCALE: Parameter(Kind.FLOAT)}
        scale = self.scale.typed(parameters, row.lengths)
        if _varies(scale):
            self.scale.fail("must give one number for a row; use x and dim inside row functions")
        return Quantizer(self, scale, self.code.typed(known, row.lengths))


def _varies(node: Node, known: dict[int, bool] | None = None) -> bool:
    """Return whether a value may differ from element to element of a row."""
    known = {} if known is None else known  # parts of a tree may stand in several places
    if id(node) not in known:
        operation = OPERATIONS.get(node.operation)
        itself = node.operation in ("element", "at") or node.value == "dim"
        inside = operation is None or not operation.of_row
        known[id(node)] = itself or (
            inside and any(_varies(operand, known) for operand in node.operands)
        )
    return known[id(node)]


class Quantizer(Resolved):
    """A quantiser for rows of some size.

    Attributes
    ----------
    group : int or None
    """

    def __init__(self, step: Quantize, scale: Node, code: Node) -> None:
        self.group = step.group
        self._scale, self._code = scale, code
        names = dict.fromkeys((*step.scale.parameters, *step.code.parameters), "")
        self.checks = any(printed("step", node, names).checks for node in (scale, code))

    def quantized(self, rows: Array, around: Around) -> tuple[Array, Array, Array]:
        """Return what is rounded to codes, the scales, and which rows are valid.

        The scales are ``[tokens, heads, groups]``.
        """
        tokens, heads, size = rows.shape
        group = self.group or size
        grouped = rows.reshape(tokens, heads, -1, group)
        indices = {
            name: index.reshape(-1, group) if name == "dim" else index[..., None]
            for name, index in around.indices.items()
        }
        scales, inside = evaluate(self._scale, Scope(grouped, indices, around.parameters))
        scales = np.ascontiguousarray(scales[..., 0])
        parameters = {**around.parameters, SCALE: scales[..., None]}
        codes, also = evaluate(self._code, Scope(grouped, indices, parameters))
        stored = F32.encode(scales).view(np.float32)  # with one NaN, as in formats
        good: Array = np.asarray((inside & also).all(axis=(-2, -1)))
        return np.reshape(codes, rows.shape), stored, good

    def text(self, name: str, members: Mapping[str, str]) -> str:
        """Return CUDA text with a function that sets codes and scales."""
        group = str(self.group or "Rows::kSize")
        scale = printed(f"{name}_scale", self._scale, members)
        code = printed(f"{name}_code", self._code, {**members, SCALE: "place.s"})
        return f"""{scale.text}{code.text}template <typename Rows, typename Values>
__device__ __forceinline__ void {name}(Rows& rows, [[maybe_unused]] const Values& parameters, int h,
                                       float (&codes)[Rows::kElements],
                                       float (&scales)[Rows::kElements]) {{
  {{
{evaluation(scale, "scales", group)}  }}
  {{
{evaluation(code, "codes", group, "scales")}  }}
}}
"""
