# SPDX-License-Identifier: Apache-2.0
"""A pipeline: the steps of q, K or V, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pagedcache.expressions import Kind
from pagedcache.status import BadParamError, BadParamTypeError, shown
from pagedcache.steps.base import Around, Resolved, RowShape, Step
from pagedcache.steps.element import element
from pagedcache.steps.quantizer import Quantize, Quantizer

if TYPE_CHECKING:
    from pagedcache.expressions import Parameter
    from pagedcache.tensors import Array


def merged(assumed: Iterable[Mapping[str, Parameter]]) -> dict[str, Parameter]:
    """Return what several steps assume of parameters; one that is not a float is meant as such."""
    found: dict[str, Parameter] = {}
    for each in assumed:
        for name, parameter in each.items():
            if name not in found or found[name].kind is Kind.FLOAT:
                found[name] = parameter
    return found


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The steps of q, K or V.

    Attributes
    ----------
    letter : {"q", "k", "v"}
    steps : tuple of Step
        Without the quantiser.
    quantizer : Quantize or None
    """

    letter: str
    steps: tuple[Step, ...]
    quantizer: Quantize | None = None

    @classmethod
    def of(cls, letter: str, steps: object, *, quantizes: bool) -> Pipeline:
        """Return the pipeline of steps as a user gives them.

        Parameters
        ----------
        letter : {"q", "k", "v"}
        steps : sequence of Step or str, Step or str
            A string is an expression.
        quantizes : bool
            Whether the last may be a quantiser.
        """
        listed: Sequence[object]
        if isinstance(steps, (str, Step)):
            listed = [steps]
        elif isinstance(steps, Sequence):
            listed = steps
        else:
            raise BadParamTypeError(letter, "must be a list of steps", shown(steps))
        made = [cls._step(f"{letter}[{i}]", step) for i, step in enumerate(listed)]
        for i, step in enumerate(made):
            if isinstance(step, Quantize) and (not quantizes or i < len(made) - 1):
                rule = "must be the last step" if quantizes else "can only be a step of k or v"
                raise BadParamError(f"{letter}[{i}] quantize", f"{rule} of a WriteKernel")
        last = made[-1] if made else None
        if isinstance(last, Quantize):
            return cls(letter, tuple(made[:-1]), last)
        return cls(letter, tuple(made))

    @staticmethod
    def _step(subject: str, step: object) -> Step:
        if isinstance(step, str):
            return element(subject, step)
        if not isinstance(step, Step):
            rule = "must be an expression, as a string, or a step such as pagedcache.rms_norm(...)"
            raise BadParamTypeError(subject, rule, shown(step))
        return step

    @property
    def all_steps(self) -> tuple[Step, ...]:
        """The steps with the quantiser."""
        return self.steps if self.quantizer is None else (*self.steps, self.quantizer)

    @property
    def assumed(self) -> dict[str, Parameter]:
        """The parameters of all steps, and what they are if nothing else is known."""
        return merged(step.assumed for step in self.all_steps)

    @property
    def by_token(self) -> frozenset[str]:
        """Parameters whose first axis has an entry for each token."""
        return frozenset().union(*(step.by_token for step in self.all_steps))

    def halves(self, parameters: Mapping[str, Parameter]) -> list[tuple[int, int]]:
        """Return the first dimension and the distance of pairs that are rotated, of halves."""
        return [pair for step in self.steps for pair in step.halves(parameters)]

    @property
    def tables(self) -> list[str]:
        """Parameters that are read for pairs, from both halves of their last axis."""
        return [name for step in self.steps for name in step.tables]

    def resolve(self, row: RowShape, parameters: Mapping[str, Parameter]) -> ResolvedPipeline:
        """Return the pipeline for such rows and parameters.

        Raises
        ------
        BadParamError
            A step does not fit.
        """
        made = [
            step.resolve(f"{self.letter}[{i}]", row, parameters)
            for i, step in enumerate(self.steps)
        ]
        quantizer = None
        if self.quantizer is not None:
            subject = f"{self.letter}[{len(self.steps)}]"
            quantizer = self.quantizer.resolve(subject, row, parameters)
        return ResolvedPipeline(self, tuple(made), quantizer)

    def __str__(self) -> str:
        return " | ".join(map(str, self.all_steps)) or "as it is"


@dataclass(frozen=True, slots=True)
class ResolvedPipeline:
    """A pipeline for rows of some size, and parameters of some kinds and shapes."""

    pipeline: Pipeline
    steps: tuple[Resolved, ...]
    quantizer: Quantizer | None

    @property
    def checks(self) -> bool:
        """Whether the threads of a row have to agree on whether it is valid."""
        return any(step.checks for step in self.steps)

    def check_cpu(self) -> None:
        """Raise if a step cannot be done in NumPy."""
        for step in self.steps:
            step.check_cpu()

    @property
    def meets(self) -> bool:
        """Whether the threads of a row wait for each other, in a sum or a transform."""
        return any(step.meets for step in self.steps)

    def apply(self, rows: Array, around: Around) -> tuple[Array, Array]:
        """Return rows after all steps but the quantiser, and which are valid."""
        inside: Array = np.ones(rows.shape[:2], np.bool_)
        with np.errstate(all="ignore"):
            for step in self.steps:
                rows, also = step.apply(rows, around)
                inside = inside & also
        return rows, inside

    def text(self, members: Mapping[str, str]) -> str:
        """Return CUDA text with a struct ``<Letter>Steps``."""
        letter = self.pipeline.letter
        parts, loads, calls = [], [], []
        for i, (said, step) in enumerate(zip(self.pipeline.steps, self.steps, strict=True)):
            parts.append(
                f"// {letter}[{i}]: {_comment(said)}\n{step.text(f'{letter}{i}', members)}"
            )
            loaded = step.loads(members)
            if loaded:
                loads.append(f"    auto loaded{i} = {loaded};")
            calls.append(f"    {letter}{i}(rows, parameters{f', loaded{i}' if loaded else ''});")
        quantize = ""
        checks = str(self.checks).lower()
        quantizer_checks = "false"
        if self.quantizer is not None:
            comment = f"// {letter}[{len(self.steps)}]: {_comment(self.pipeline.quantizer)}\n"
            parts.append(comment + self.quantizer.text(f"{letter}_codes", members))
            quantizer_checks = str(self.quantizer.checks).lower()
            quantize = f"""  template <typename Rows, typename Values>
  __device__ __forceinline__ static void quantize(Rows& rows, const Values& parameters, int h,
                                                  float (&codes)[Rows::kElements],
                                                  float (&scales)[Rows::kElements]) {{
    {letter}_codes(rows, parameters, h, codes, scales);
  }}
"""
        body = "\n".join(loads + calls)
        parts.append(f"""struct {letter.upper()}Steps {{
  static constexpr bool kChecks = {checks}, kCodesCheck = {quantizer_checks};
  template <typename Rows, typename Values>
  __device__ __forceinline__ static void apply([[maybe_unused]] Rows& rows,
                                               [[maybe_unused]] const Values& parameters) {{
{body}
  }}
{quantize}}};
""")
        return "\n".join(parts)


def _comment(step: object) -> str:
    # A backslash at the end of a comment would continue it.
    return str(step).encode("unicode_escape").decode() + " ;"
