# SPDX-License-Identifier: Apache-2.0
"""The steps that have a name: normalise, rotate, transform, round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.cache.formats import CUDA_NAMES, FORMATS, Format
from pagedcache.expressions import Kind, Parameter
from pagedcache.expressions.evaluate import pairs
from pagedcache.status import BadParamError, shown
from pagedcache.steps.base import (
    Around,
    Resolved,
    RowShape,
    Step,
    check_axes,
    cuda_float,
    cuda_function,
    number,
    parameter_name,
    refuse,
    whole,
)

if TYPE_CHECKING:
    from pagedcache.tensors import Array

STYLES = ("neox", "interleaved")
CAST_FORMATS = ("float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2")
_TRUE: Array = np.asarray(True)


def rms_norm(weight: str, eps: float, *, weight_offset: float = 0.0) -> Step:
    """Divide a row by its root mean square, and multiply it by a weight.

    ``x / sqrt(mean(x * x) + eps) * (weight_offset + weight[dim])``, in float32; the mean is that of
    the whole head. Exact: the same bits on the CPU and on every GPU.

    Parameters
    ----------
    weight : str
        Name of the parameter with the weights, ``[head_size]``, float16, bfloat16 or float32.
    eps : float
    weight_offset : float
        1 where weights are stored less 1, as in Gemma.

    Returns
    -------
    Step
        For `WriteKernel` or `ReadKernel`.

    Raises
    ------
    BadParamError, BadParamTypeError
        `weight` is no name, or a number is not one, is not finite or, of `eps`, is negative.

    Notes
    -----
    The formula is that of Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    epsilon = number("eps", eps)
    if epsilon < 0:
        raise BadParamError("eps", "must not be negative", epsilon)
    return RmsNorm(
        parameter_name("weight", weight),
        epsilon,
        number("weight_offset", weight_offset),
    )


def rope(cos_sin: str, positions: str, *, style: str = "neox", first: int = 0) -> Step:
    """Rotate pairs of elements by angles that depend on the token's position.

    A pair ``(a, b)`` becomes ``(a * cos - b * sin, b * cos + a * sin)``, in float32, each operation
    rounded. Exact: the same bits on the CPU and on every GPU.

    Parameters
    ----------
    cos_sin : str
        Name of the parameter with the table, ``[max_position, rotated]``: for each position
        ``rotated / 2`` cosines, then as many sines; float16, bfloat16 or float32.
    positions : str
        Name of the parameter with the position of each token, ``[num_tokens]``, int32 or int64. The
        rows of a token whose position is not in the table are not written, and are reported by
        ``check()``.
    style : {"neox", "interleaved"}
        Which elements are a pair: ``i`` and ``i + rotated / 2``, or ``2 * i`` and ``2 * i + 1``.
    first : int
        The first dimension of a head that is rotated; ``rotated`` of them are, and the others stay.

    Returns
    -------
    Step
        For `WriteKernel` or `ReadKernel`.

    Raises
    ------
    BadParamError, BadParamTypeError
        A name is no name, or `style` or `first` is not allowed.

    Notes
    -----
    Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021. The table is
    laid out as vLLM's and SGLang's ``cos_sin_cache``.
    """
    if not isinstance(style, str) or style not in STYLES:
        raise BadParamError("style", f"must be one of {', '.join(STYLES)}", shown(style))
    return Rope(
        parameter_name("cos_sin", cos_sin),
        parameter_name("positions", positions),
        style,
        whole("first", first, 0),
    )


def hadamard(*, group: int | None = None) -> Step:
    """Apply the orthonormal Walsh-Hadamard transform, which spreads outliers over a row.

    Sums and differences, of neighbours first, then a product with ``group ** -0.5``. It is its own
    inverse but for rounding. Exact: the same bits on the CPU and on every GPU.

    Parameters
    ----------
    group : int, optional
        How many neighbouring dimensions are transformed together: a power of two that divides the
        head size. By default, all of a head.

    Returns
    -------
    Step
        For `WriteKernel` or `ReadKernel`.

    Raises
    ------
    BadParamError, BadParamTypeError
        `group` is not a power of two.
    """
    if group is not None:
        group = whole("group", group, 1)
        if group & (group - 1):
            raise BadParamError("group", "must be a power of two", group)
    return Hadamard(group)


def cast(dtype: object) -> Step:
    """Round to a float type, and go on in float32.

    Where other programs round between two steps. To the nearest, ties to even; 8-bit floats
    saturate, the others overflow to infinity. Exact.

    Parameters
    ----------
    dtype : dtype-like
        float16, bfloat16, float32, float8_e4m3fn or float8_e5m2.

    Returns
    -------
    Step
        For `WriteKernel` or `ReadKernel`.

    Raises
    ------
    BadParamError
        `dtype` is not one of these.
    """
    name = dtype if isinstance(dtype, str) else _dtype_name(dtype)
    if name not in CAST_FORMATS:
        raise BadParamError("dtype", f"must be one of {', '.join(CAST_FORMATS)}", shown(dtype))
    return Cast(FORMATS[name])


def _dtype_name(dtype: object) -> str:
    try:
        return np.dtype(dtype).name  # type: ignore[call-overload, no-any-return]
    except Exception:  # of whatever was given; PyTorch's dtypes have such names
        return str(dtype).rpartition(".")[2]


@dataclass(frozen=True)
class RmsNorm(Step):
    """See `rms_norm`."""

    weight: str
    eps: float
    offset: float

    def __str__(self) -> str:
        offset = f", weight_offset={self.offset:g}" if self.offset else ""
        return f"rms_norm({self.weight!r}, eps={self.eps:g}{offset})"

    @property
    def assumed(self) -> dict[str, Parameter]:
        """The weight."""
        return {self.weight: Parameter(Kind.FLOAT, 1)}

    def resolve(self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]) -> Resolved:
        """Check the weight."""
        weight = parameters[self.weight]
        check_axes(subject, self, self.weight, weight, Kind.FLOAT, ("head_size",))
        if row.size is not None and weight.shape != (row.size,):
            rule = f"needs {self.weight} of shape ({row.size},), one for each dimension of a head"
            refuse(subject, self, rule, f"shape {weight.shown_shape}")
        return _RmsNorm(self)


class _RmsNorm(Resolved):
    meets = True

    def __init__(self, step: RmsNorm) -> None:
        self._step = step

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        step = self._step
        mean = pairs(rows * rows, np.add, 0.0) / np.float32(rows.shape[-1])
        root = np.sqrt(mean + np.float32(step.eps))
        factors = around.parameters[step.weight]
        if step.offset:
            factors = np.float32(step.offset) + factors
        return rows / root[..., None] * factors, _TRUE

    def text(self, name: str, members: Mapping[str, str]) -> str:
        step = self._step
        numbers = f"{cuda_float(step.eps)}, {cuda_float(step.offset)}"
        flag = str(bool(step.offset)).lower()
        return cuda_function(name, f"  rmsNorm<{flag}>(rows, {members[step.weight]}, {numbers});")


@dataclass(frozen=True)
class Rope(Step):
    """See `rope`."""

    table: str
    positions: str
    style: str
    first: int

    def __str__(self) -> str:
        style = f", style={self.style!r}" if self.style != STYLES[0] else ""
        first = f", first={self.first}" if self.first else ""
        return f"rope({self.table!r}, {self.positions!r}{style}{first})"

    @property
    def assumed(self) -> dict[str, Parameter]:
        """The table and the positions."""
        return {self.table: Parameter(Kind.FLOAT, 2), self.positions: Parameter(Kind.INT, 1)}

    @property
    def by_token(self) -> frozenset[str]:
        """Each token has a position."""
        return frozenset({self.positions})

    @property
    def tables(self) -> tuple[str, ...]:
        """Cosines, and from the middle on sines."""
        return (self.table,)

    def halves(self, parameters: Mapping[str, Parameter]) -> list[tuple[int, int]]:
        """Return where the pairs are, if halves of what is rotated are turned together."""
        return [(self.first, self._rotated(parameters) // 2)] if self.style == "neox" else []

    def _rotated(self, parameters: Mapping[str, Parameter]) -> int:
        """Return how many dimensions are rotated; 0 if that is not known."""
        shape = parameters[self.table].shape
        return (shape[-1] or 0) if shape else 0

    def resolve(self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]) -> Resolved:
        """Check the table and the positions."""
        table, positions = parameters[self.table], parameters[self.positions]
        check_axes(subject, self, self.table, table, Kind.FLOAT, ("max_position", "rotated"))
        check_axes(subject, self, self.positions, positions, Kind.INT, ("num_tokens",))
        rotated = self._rotated(parameters)
        if table.shape is not None and (rotated % 2 or not rotated):
            rule = f"needs {self.table} with an even number of columns, cosines and sines"
            refuse(subject, self, rule, f"shape {table.shown_shape}")
        if row.size is not None and self.first + rotated > row.size:
            rule = f"must rotate dimensions inside the head, which has {row.size}"
            refuse(subject, self, rule, f"{self.first} to {self.first + rotated - 1}")
        return _Rope(self)


class _Rope(Resolved):
    def __init__(self, step: Rope) -> None:
        self._step = step

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        step = self._step
        table = around.parameters[step.table]
        position = around.parameters[step.positions][around.indices["token"].reshape(-1)]
        inside = (position >= 0) & (position < len(table))
        angles = table[np.where(inside, position, 0)]
        half = table.shape[1] // 2
        cosines, sines = angles[:, None, :half], angles[:, None, half:]
        stop = step.first + 2 * half
        if step.style == "neox":
            first, second = (slice(start, start + half) for start in (step.first, stop - half))
        else:
            first, second = slice(step.first, stop, 2), slice(step.first + 1, stop, 2)
        a, b = rows[..., first], rows[..., second]
        turned = rows.copy()
        turned[..., first] = a * cosines - b * sines
        turned[..., second] = b * cosines + a * sines
        return turned, inside[:, None]

    def loads(self, members: Mapping[str, str]) -> str:
        step = self._step
        table, positions = members[step.table], members[step.positions]
        return f"anglesOf<{self._kind}>(rows, {table}, {positions})"

    @property
    def _kind(self) -> str:
        return f"{str(self._step.style == 'neox').lower()}, {self._step.first}"

    def text(self, name: str, members: Mapping[str, str]) -> str:
        return cuda_function(name, f"  rope<{self._kind}>(rows, loaded);", ", Loaded& loaded")


@dataclass(frozen=True)
class Hadamard(Step):
    """See `hadamard`."""

    group: int | None

    def __str__(self) -> str:
        return f"hadamard({'' if self.group is None else f'group={self.group}'})"

    @property
    def assumed(self) -> dict[str, Parameter]:
        """None."""
        return {}

    def resolve(self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]) -> Resolved:
        """Check the group."""
        if row.size is not None:
            if self.group is None and row.size & (row.size - 1):
                rule = "needs a group, because the head size is not a power of two"
                refuse(subject, self, rule, row.size)
            if self.group is not None and row.size % self.group:
                rule = f"must have a group that divides the head size, {row.size}"
                refuse(subject, self, rule, self.group)
        return _Hadamard(self)


class _Hadamard(Resolved):
    meets = True

    def __init__(self, step: Hadamard) -> None:
        self._step = step

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        group = self._step.group or rows.shape[-1]
        x = rows.reshape(-1, group)
        step = 1
        while step < group:
            a, b = np.moveaxis(x.reshape(-1, group // (2 * step), 2, step), 2, 0)
            x = np.stack([a + b, a - b], axis=2).reshape(-1, group)
            step *= 2
        return (x * np.float32(group**-0.5)).reshape(rows.shape), _TRUE

    def text(self, name: str, members: Mapping[str, str]) -> str:
        return cuda_function(name, f"  hadamard<{self._step.group or 'Rows::kSize'}>(rows);")


@dataclass(frozen=True)
class Cast(Step):
    """See `cast`."""

    format: Format

    def __str__(self) -> str:
        return f"cast({self.format.name!r})"

    @property
    def assumed(self) -> dict[str, Parameter]:
        """None."""
        return {}

    def resolve(self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]) -> Resolved:
        """Return the step."""
        return _Cast(self)


class _Cast(Resolved):
    def __init__(self, step: Cast) -> None:
        self._format = step.format

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        return self._format.decode(self._format.encode(rows)), _TRUE

    def text(self, name: str, members: Mapping[str, str]) -> str:
        kind = f"FormatOf<{CUDA_NAMES[self._format.name]}>"
        return cuda_function(name, f"  cast<{kind}>(rows);")
