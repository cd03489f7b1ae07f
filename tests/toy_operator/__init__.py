# SPDX-License-Identifier: Apache-2.0
"""An operator of two tensors, in a folder of its own: ``target[row] = -source[row]``.

It exists to show that an operator needs no change anywhere else: a table, a class, an
implementation for each device. Row 13 is taken as an invalid index, so that it reports one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pagedcache.backend.handle import Handle
from pagedcache.backend.protocol import Invalid
from pagedcache.dtypes import F32
from pagedcache.operators.base import Operation
from pagedcache.operators.one_call import Kept
from pagedcache.rules import Rule, Rules
from pagedcache.status import BadParamError
from pagedcache.tensors import TensorDescriptor

UNLUCKY = 13
RULES = Rules(
    tensors=(
        Rule("target", ("num_rows", "size"), (F32,), written=True),
        Rule("source", ("num_rows", "size"), (F32,)),
    ),
    free="num_rows",
    counted_by="source",
)


@dataclass(frozen=True)
class NegateInfo:
    size: int
    target_stride: int
    source_stride: int
    rules: Rules = RULES

    @classmethod
    def create(cls, target: TensorDescriptor, source: TensorDescriptor) -> NegateInfo:
        described = {"target": target, "source": source}
        sizes = RULES.check(described)
        strides = [RULES.steps(name, tensor)[0] for name, tensor in described.items()]
        return cls(sizes["size"], *strides)


class Negate(Operation[NegateInfo]):
    name: ClassVar[str] = "negate"
    arguments: ClassVar[tuple[str, ...]] = ("target", "source")
    free: ClassVar[frozenset[str]] = frozenset(arguments)
    implementations: ClassVar[dict[str, str]] = {
        "cpu": "toy_operator.cpu:Negate",
        "cuda": "toy_operator.nvidia:Negate",
    }

    @classmethod
    def create(
        cls,
        target: Any,
        source: Any,
        *,
        handle: Handle | None = None,
        on_invalid: str = "skip",
        debug: bool | None = None,
    ) -> Negate:
        return cls._create(
            (target, source), NegateInfo.create, handle=handle, on_invalid=on_invalid, debug=debug
        )

    def calculate(self, target: Any, source: Any, *, stream: Any = None) -> None:
        if not self.latest(target, source, stream):
            self.run((target, source), stream)

    def bind(self, target: Any, source: Any, *, stream: Any = None) -> Any:
        return self._bind((target, source), stream)

    def _invalid(self, found: Invalid, where: str = "in this call") -> Exception:
        return BadParamError("source", f"must not have a row {UNLUCKY} ({found.count} {where})")


def negate(target: Any, source: Any, *, stream: Any = None) -> None:
    for (negation,) in kept.recent:
        if negation.latest(target, source, stream):
            return
    kept.run((target, source), (), stream)


kept = Kept(Negate, Negate.create)
