# SPDX-License-Identifier: Apache-2.0
"""What a step is: something that is done to rows, in NumPy and in CUDA, with the same bits."""

from __future__ import annotations

import keyword
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from pagedcache.expressions import Kind, Parameter
from pagedcache.status import BadParamError, BadParamTypeError, shown

if TYPE_CHECKING:
    from pagedcache.tensors import Array

FLOAT_MOST = float(np.finfo(np.float32).max)
MOST_WHOLE = 1 << 31


@dataclass(frozen=True, slots=True)
class RowShape:
    """The rows that a step is for.

    Attributes
    ----------
    heads, size : int or None
        How many heads a token has, and elements a row. ``None`` if that is not known yet.
    """

    heads: int | None = None
    size: int | None = None

    @property
    def lengths(self) -> dict[str, int]:
        """How many there are of the indices ``head`` and ``dim``, if that is known."""
        pairs = {"head": self.heads, "dim": self.size}
        return {name: length for name, length in pairs.items() if length is not None}


@dataclass(frozen=True, slots=True)
class Around:
    """What rows are among.

    Attributes
    ----------
    indices : dict of str to array
        int64; ``dim`` ``[size]``, ``head`` ``[heads, 1]``, and the others ``[tokens, 1, 1]``.
    parameters : dict of str to array
        bool, int64 or float32.
    """

    indices: Mapping[str, Array]
    parameters: Mapping[str, Array]


class Resolved:
    """A step for rows of some size and parameters of some kinds and shapes.

    Attributes
    ----------
    checks : bool
        Whether rows can turn out to be invalid: an index has left what it is an index of.
    meets : bool
        Whether the threads of a row wait for each other, in a sum or a transform.
    """

    checks: bool = False
    meets: bool = False

    def loads(self, members: Mapping[str, str]) -> str:
        """Return a CUDA expression of what the step needs, to be loaded before any step is run.

        Empty if there is no such thing. The function of the step takes it last.
        """
        return ""

    def check_cpu(self) -> None:
        """Raise if the step cannot be done in NumPy."""

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        """Return rows after this step, and which of them are valid.

        Parameters
        ----------
        rows : array of float32
            ``[tokens, heads, size]``.
        around : Around

        Returns
        -------
        rows : array of float32
        inside : array of bool
            ``[tokens, heads]``, or what broadcasts to that.
        """
        raise NotImplementedError

    def text(self, name: str, members: Mapping[str, str]) -> str:
        """Return CUDA text with a function of ``Rows& rows, const Values& parameters``.

        `members` says what each parameter is called there.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Step:
    """A step of a pipeline, as its user says it."""

    @property
    def assumed(self) -> dict[str, Parameter]:
        """The parameters, and what they are if nothing else is known."""
        raise NotImplementedError

    @property
    def by_token(self) -> frozenset[str]:
        """Parameters whose first axis has an entry for each token."""
        return frozenset()

    @property
    def tables(self) -> tuple[str, ...]:
        """Parameters that are read for pairs, from both halves of their last axis."""
        return ()

    def halves(self, parameters: Mapping[str, Parameter]) -> list[tuple[int, int]]:
        """Return the first dimension and the distance of pairs of elements, if there are any."""
        return []

    def resolve(self, subject: str, row: RowShape, parameters: Mapping[str, Parameter]) -> Resolved:
        """Return the step for such rows and parameters.

        Parameters
        ----------
        subject : str
            What errors call it, such as ``"k[0]"``.
        row : RowShape
        parameters : mapping of str to Parameter

        Raises
        ------
        BadParamError
            The parameters do not fit.
        """
        raise NotImplementedError


def parameter_name(subject: str, name: object) -> str:
    """Return the name of a parameter, which must be an identifier."""
    if not isinstance(name, str):
        rule = "must be the name of a parameter, as a string"
        raise BadParamTypeError(subject, rule, shown(name))
    # As Python does with names in source.
    name = unicodedata.normalize("NFKC", name)
    if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
        rule = "must be an identifier that does not begin with an underscore"
        raise BadParamError(subject, rule, shown(name))
    return name


def number(subject: str, value: object) -> float:
    """Return a number as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise BadParamTypeError(subject, "must be a number", shown(value))
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not abs(found) <= FLOAT_MOST:
        raise BadParamError(subject, "must be a finite number that fits in float32", shown(value))
    return found


def whole(subject: str, value: object, least: int) -> int:
    """Return an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise BadParamTypeError(subject, "must be an int", shown(value))
    if not least <= value < MOST_WHOLE:
        rule = f"must be at least {least}" if value < least else f"must be below {MOST_WHOLE}"
        raise BadParamError(subject, rule, shown(int(value)))
    return int(value)


def cuda_float(value: float) -> str:
    """Return a float32 as CUDA text, which no compiler rounds."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    if not np.isfinite(single):
        return f"asFloat({int(single.view(np.uint32)):#x}u)"
    return f"{float(single).hex()}f"


def cuda_function(name: str, body: str, more: str = "") -> str:
    """Return the function of a step, with more arguments if it has any."""
    kinds = "typename Rows, typename Values" + (", typename Loaded" if more else "")
    return f"""template <{kinds}>
__device__ __forceinline__ void {name}(
    Rows& rows, [[maybe_unused]] const Values& parameters{more}) {{
{body}
}}
"""


def refuse(subject: str, step: Step, rule: str, *got: Any) -> NoReturn:
    """Raise an error about a step."""
    raise BadParamError(f"{subject} {step}", rule, *got)


def check_axes(
    subject: str, step: Step, name: str, found: Parameter, kind: Kind, axes: tuple[str, ...]
) -> None:
    """Raise unless a parameter is an array with these axes, of numbers of this kind."""
    kinds = {Kind.FLOAT: "floats", Kind.INT: "integers", Kind.BOOL: "truth values"}
    if found.ndim != len(axes):
        got = f"{found.ndim} axes" if found.shape is None else f"shape {found.shown_shape}"
        plural = "axis" if len(axes) == 1 else "axes"
        got = got if found.ndim else "a number"
        refuse(subject, step, f"needs {name} with {len(axes)} {plural} [{', '.join(axes)}]", got)
    if found.kind is not kind:
        refuse(subject, step, f"needs {name} of {kinds[kind]}", kinds[found.kind])
