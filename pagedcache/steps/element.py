# SPDX-License-Identifier: Apache-2.0
"""Steps that say what becomes of each element: an expression, or CUDA text."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pagedcache.expressions import Expression, Kind, Node, Parameter, parse
from pagedcache.expressions.cuda import Function, Printed, printed
from pagedcache.expressions.evaluate import Scope, evaluate
from pagedcache.expressions.tree import INDICES
from pagedcache.status import BadParamError, BadParamTypeError, NotSupportedError, shown
from pagedcache.steps.base import (
    Around,
    Resolved,
    RowShape,
    Step,
    cuda_function,
    parameter_name,
)

if TYPE_CHECKING:
    from pagedcache.tensors import Array

ROW_FUNCTIONS = {
    "row_sum": ("Sum", False), "row_mean": ("Sum", True),
    "row_max": ("Largest", False), "row_min": ("Smallest", False),
}  # fmt: skip
TAKEN = (*INDICES, "x", "y", "at", "place", "parameters", "inside")
_TRUE: Array = np.asarray(True)


@dataclass(frozen=True)
class Element(Step):
    """An expression for each element."""

    expression: Expression

    def __str__(self) -> str:
        return self.expression.text

    @property
    def assumed(self) -> dict[str, Parameter]:
        """What the expression names."""
        return self.expression.assumed

    @property
    def by_token(self) -> frozenset[str]:
        """Parameters whose first index is ``token``."""
        return self.expression.by_token

    def resolve(self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]) -> Resolved:
        """Type the expression."""
        return _Element(self.expression.typed(parameters, row.lengths), self.expression.parameters)


class _Element(Resolved):
    def __init__(self, node: Node, parameters: tuple[str, ...]) -> None:
        self._node = node
        made = printed("step", node, dict.fromkeys(parameters, ""))
        self.checks, self.meets = made.checks, bool(made.rows)

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        values, inside = evaluate(self._node, Scope(rows, around.indices, around.parameters))
        return values, np.asarray(inside.all(axis=-1))

    def text(self, name: str, members: Mapping[str, str]) -> str:
        made = printed(f"{name}_element", self._node, members)
        body = f"""#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {{
{evaluation(made, "rows.x[h]")}  }}"""
        return made.text + cuda_function(name, body)


def evaluation(made: Printed, to: str, group: str = "Rows::kSize", scale: str = "") -> str:
    """Return statements that evaluate what was printed into an array, for the heads `h`.

    `scale` names the array with the scale of each element, if the expression has it.
    """
    lines = []
    if made.rows:
        lines.append(f"    Found<Rows> found[{len(made.rows)}];")
    for i, row in enumerate(made.rows):
        combine, mean = ROW_FUNCTIONS[row.operation]
        flags = ", ".join(str(each).lower() for each in (mean, row.checks, row.shares))
        lines.append(f"    evaluateRow<{combine}, {group}, {flags}>(rows, h, found[{i}],")
        lines.append(f"        {_function(row, i, scale)});")
    shares = str(made.element.shares).lower()
    lines.append(f"    evaluate<{shares}>(rows, h, {to},")
    lines.append(f"        {_function(made.element, len(made.rows), scale)});")
    return "\n".join(lines) + "\n"


def _function(function: Function, rows: int, scale: str) -> str:
    """Return a lambda that calls a function with the row functions so far."""
    found = ", ".join(f"{{found[{j}].values[i], found[{j}].inside[i]}}" for j in range(rows))
    row = f"const RowValue row[] = {{{found}}};" if rows else "const RowValue* const row = nullptr;"
    place = f"auto here = place; here.s = {scale}[i];" if scale else "const auto& here = place;"
    return (
        "[&]([[maybe_unused]] int i, const auto& place, bool& inside) { "
        f"{row} {place} return {function.name}(here, parameters, row, inside); }}"
    )


def cuda(
    text: str,
    *,
    numpy: Callable[..., Any] | None = None,
    parameters: tuple[str, ...] | None = None,
) -> Step:
    """Run CUDA text for each element: the way out for what an expression cannot say.

    Parameters
    ----------
    text : str
        Statements in CUDA C++ that set ``y``, a float. In scope are ``x``, the element as a float;
        the indices ``dim``, ``head``, ``token``, ``slot``, ``block`` and ``offset``, 64-bit
        integers; ``at(d)``, the element of the same row at another dimension; and the parameters,
        those that are numbers as ``gain``, arrays as ``gain(head, dim)``. An index that leaves an
        array reads 0, and makes the row invalid; on the CPU, that is up to `numpy`. Numbers too
        small to be normal may become 0. The text is code: whoever writes it can do anything on the
        GPU.
    numpy : callable, optional
        The same in NumPy, for the CPU: called with ``x``, float32 ``[tokens, heads, head_size]``,
        and by keyword with those of the indices and parameters that it names; returns what
        broadcasts to the shape of ``x``. Without it, the step runs on GPUs only.
    parameters : tuple of str, optional
        The parameters that the text uses. By default, those that `numpy` names.

    Returns
    -------
    Step
        For `WriteKernel` or `ReadKernel`.

    Raises
    ------
    BadParamError, BadParamTypeError
        `text` is empty or no string, or `numpy` and `parameters` do not fit it. What is wrong with
        the CUDA itself is a `CompileError` of the first call.

    Examples
    --------
    >>> import numpy as np
    >>> import pagedcache as pc
    >>> leaky = pc.cuda("y = x > 0.0f ? x : slope * x;",
    ...                 numpy=lambda x, slope: np.where(x > 0, x, slope * x))
    """
    if not isinstance(text, str):
        raise BadParamTypeError("text", "must be a string of CUDA C++", shown(text))
    if not text.strip():
        raise BadParamError("text", "must not be empty")
    named = _named(numpy) if numpy is not None else ()
    if parameters is None:
        names = tuple(name for name in named if name not in INDICES)
    else:
        if not isinstance(parameters, (tuple, list)):
            rule = "must be a tuple of names of parameters"
            raise BadParamTypeError("parameters", rule, shown(parameters))
        names = tuple(parameter_name("parameters", name) for name in parameters)
        if unknown := [name for name in named if name not in (*names, *INDICES)]:
            raise BadParamError("parameters", f"must have {unknown[0]}, which numpy= names", names)
    if taken := [name for name in names if name in TAKEN]:
        raise BadParamError("parameters", f"must not have {taken[0]}, which the text has already")
    return Cuda(text.strip(), numpy, names, named)


def _named(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the arguments of a twin, but the first, which is ``x``."""
    rule = "must be a function of x, and of indices and parameters by their names"
    try:
        arguments = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise BadParamTypeError("numpy", rule, shown(function)) from None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    first = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if (
        not arguments
        or arguments[0].kind not in first
        or any(each.kind not in kinds for each in arguments[1:])
    ):
        raise BadParamTypeError("numpy", rule, shown(function))
    return tuple(each.name for each in arguments[1:])


@dataclass(frozen=True)
class Cuda(Step):
    """See `cuda`."""

    code: str
    twin: Callable[..., Any] | None = field(repr=False)
    parameters: tuple[str, ...]
    named: tuple[str, ...]

    def __str__(self) -> str:
        return f"cuda({self.code!r})"

    @property
    def assumed(self) -> dict[str, Parameter]:
        """The parameters, as numbers."""
        return dict.fromkeys(self.parameters, Parameter(Kind.FLOAT))

    def resolve(self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]) -> Resolved:
        """Return the step."""
        return _Cuda(subject, self, {name: parameters[name] for name in self.parameters})


class _Cuda(Resolved):
    checks = True

    def __init__(self, subject: str, step: Cuda, parameters: Mapping[str, Parameter]) -> None:
        self._subject, self._step, self._parameters = subject, step, parameters

    def check_cpu(self) -> None:
        if self._step.twin is None:
            rule = "has no numpy=, which is needed on the CPU; give the same as a NumPy function"
            raise NotSupportedError(f"{self._subject} {self._step}", rule)

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        step = self._step
        assert step.twin is not None
        everything = {**around.indices, **around.parameters}
        named = {name: everything[name].view() for name in step.named}
        for array in (rows := rows.view(), *named.values()):
            array.flags.writeable = False
        subject = f"the numpy= of {self._subject} {step}"
        rule = f"must return numbers that broadcast to {rows.shape}"
        try:
            with np.errstate(all="ignore"):
                made = np.asarray(step.twin(rows, **named))
                if made.dtype.kind not in "biufV":  # V: those of ml_dtypes
                    raise BadParamTypeError(subject, rule, shown(made))
                return np.broadcast_to(made.astype(np.float32), rows.shape), _TRUE
        except BadParamTypeError:
            raise
        except Exception as error:
            raise BadParamError(subject, f"{rule}, but failed ({error})") from error

    def text(self, name: str, members: Mapping[str, str]) -> str:
        lines = [f"[[maybe_unused]] const Whole {index} = place.{index};" for index in INDICES]
        lines.append("[[maybe_unused]] const float x = place.x;")
        lines.append(
            "[[maybe_unused]] const auto at = [&](Whole d) { return place.at(inside, d); };"
        )
        for each, parameter in self._parameters.items():
            member = members[each]
            if parameter.ndim:
                mask = (1 << parameter.ndim) - 1
                call = f"{member}.template at<{mask}u>(in, static_cast<Whole>(indices)...)"
                lines.append(
                    f"[[maybe_unused]] const auto {each} = [&](auto... indices) {{ bool in = true; "
                    f"const auto value = {call}; inside = inside && in; return value; }};"
                )
            else:
                lines.append(f"[[maybe_unused]] const auto {each} = {member};")
        lines += ["float y = x;", "{", self._step.code, "}", "return y;"]
        body = "\n".join(f"  {line}" for line in lines)
        element = f"""template <typename Place, typename Values>
__device__ __forceinline__ float {name}_element(const Place& place,
                                                [[maybe_unused]] const Values& parameters,
                                                bool& inside) {{
{body}
}}
"""
        shares = str(re.search(r"\bat\b", self._step.code) is not None).lower()
        call = f"""#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {{
    evaluate<{shares}>(rows, h, rows.x[h], [&](int, const auto& place, bool& inside) {{
      return {name}_element(place, parameters, inside);
    }});
  }}"""
        return element + cuda_function(name, call)


def element(subject: str, text: str) -> Step:
    """Return the step of an expression."""
    return Element(parse(text, subject))
