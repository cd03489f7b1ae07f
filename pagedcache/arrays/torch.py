# SPDX-License-Identifier: Apache-2.0
"""PyTorch tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from pagedcache.arrays.library import Library, reading
from pagedcache.dtypes import Dtype, as_dtype
from pagedcache.status import (
    BadParamError,
    BadParamTypeError,
    BadTensorDtypeError,
    RequiresGradError,
)
from pagedcache.tensors import Expected, Tensor

MOST_GUARDS = 1024


class Torch(Library):
    """Tensors of PyTorch.

    Some of PyTorch's private functions are used, since they are several times as fast as the public
    ones, which are used where a version lacks them (a test names those that it lacks).

    Parameters
    ----------
    torch : module
    """

    has_matchers = True

    def __init__(self, torch: Any) -> None:
        self._torch = torch
        # ``None`` in a build without CUDA.
        self._stream_handle = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        self._bump = _version_bump(torch)

    def read(self, subject: str, array: Any) -> Tensor:
        """Return address, dtype, shape, strides and device of a tensor, without a copy."""
        with reading(subject, array):
            if array.layout is not self._torch.strided:
                raise BadParamTypeError(subject, "must be a dense tensor", f"layout {array.layout}")
            if array.is_neg() or array.is_conj():
                rule = "must not be a lazily negated or conjugated view; call resolve_neg() or "
                raise BadParamError(subject, f"{rule}resolve_conj() first")
            dtype = _numpy_dtype(subject, array.dtype)
            strides = tuple(step * dtype.itemsize for step in array.stride())
            return Tensor(
                array.data_ptr(), dtype, tuple(array.shape), strides, str(array.device), True
            )

    def current_stream(self, subject: str, array: Any, device: int) -> Callable[[], int] | None:
        """Return a function that returns the handle of PyTorch's current stream."""
        if not array.is_cuda:
            return None
        if self._stream_handle is not None:
            return functools.partial(self._stream_handle, device)
        current = self._torch.cuda.current_stream
        return lambda: int(current(device).cuda_stream)

    def streams_in_use(self, device: int) -> list[int]:
        """Return PyTorch's current stream on a device, if PyTorch uses CUDA in this process."""
        cuda = self._torch.cuda
        return [int(cuda.current_stream(device).cuda_stream)] if cuda.is_initialized() else []

    def empty(self, subject: str, like: Any, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return a tensor where `like` is."""
        of_torch = getattr(self._torch, str(dtype))
        return self._torch.empty(shape, dtype=of_torch, device=like.device)

    def check_write(self, subject: str, array: Any) -> None:
        """Raise if autograd would have to record the write, as it does for its own operators."""
        if array.requires_grad and self._torch.is_grad_enabled():
            rule = (
                "must not require grad, because this write has no gradient; use torch.no_grad() or "
                f"pass {subject}.detach()"
            )
            raise RequiresGradError(subject, rule)

    def noting_writes(
        self, subjects: Sequence[str], arrays: Sequence[Any]
    ) -> Callable[[], None] | None:
        """Return a function that lets autograd notice if it has kept a tensor that is written."""
        noted = tuple(array for array in arrays if not array.is_inference())  # never kept
        if not noted:
            return None
        if not any(array.requires_grad for array in noted):
            return functools.partial(self._bump, noted)

        def note() -> None:
            for subject, array in zip(subjects, arrays, strict=True):
                self.check_write(subject, array)
            self._bump(noted)

        return note

    def conditions(
        self,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        counted_by: str,
        constants: dict[str, Any],
    ) -> list[str]:
        """Return expressions that are true of tensors that match what is expected."""
        # `check` below refuses a tensor that it is given twice, such as one scale for K and V.
        first: dict[int, str] = {}
        for one, array in zip(expected, arrays, strict=True):
            first.setdefault(id(array), one.name)
        pairs = list(zip(expected, arrays, strict=True))
        again = [(one.name, first[id(array)]) for one, array in pairs]
        twice = [f"{name} is {other}" for name, other in again if name != other]
        once = [(one, array) for one, array in pairs if first[id(array)] == one.name]
        expected, arrays = [one for one, _ in once], [array for _, array in once]
        return twice + self._conditions(expected, arrays, counted_by, constants)

    def _conditions(
        self,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        counted_by: str,
        constants: dict[str, Any],
    ) -> list[str]:
        names = [one.name for one in expected]
        # `check` below ends the process if it meets a nested tensor (seen with PyTorch 2.13).
        nested = " or ".join(f"{name}.is_nested" for name in names)
        found = [f"not ({nested})"]
        constants["_grad_enabled"] = self._torch.is_grad_enabled
        if any(
            one.written and array.requires_grad for one, array in zip(expected, arrays, strict=True)
        ):
            found.append("not _grad_enabled()")
        for one, array in zip(expected, arrays, strict=True):
            if one.written:
                # In inference mode, `check` below takes one kind of tensor for the other.
                found.append(f"{'' if array.is_inference() else 'not '}{one.name}.is_inference()")
        steps = [list(array.stride()) for array in arrays]
        for one, strides in zip(expected, steps, strict=True):
            if one.free:
                strides[0] = one.strides[0] // one.dtype.itemsize
        longer = [one.free and not one.loose and one.name != counted_by for one in expected]
        try:
            constants["_guards"] = guards = _Guards(self._torch, expected, arrays, steps, longer)
        except (AttributeError, TypeError):  # of some other version
            return found + self._public_conditions(expected, arrays, steps, longer, constants)
        constants["_match_any_length"], constants["_never"] = (
            guards.match_any_length,
            lambda *_: False,
        )
        tensors = ", ".join(names)
        return [
            *found,
            f"(_guards.get(_count, _never)({tensors}) or _match_any_length(_count, {tensors}))",
        ]

    def _public_conditions(
        self,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        steps: Sequence[Sequence[int]],
        longer: Sequence[bool],
        constants: dict[str, Any],
    ) -> list[str]:
        constants["_Tensor"] = self._torch.Tensor
        found = []
        for one, array, strides, may_be in zip(expected, arrays, steps, longer, strict=True):
            name = one.name
            constants[f"_{name}_dtype"] = array.dtype
            constants[f"_{name}_device"] = array.device
            constants[f"_{name}_shape"] = one.shape[1:] if one.free else one.shape
            constants[f"_{name}_strides"] = tuple(strides)
            found += [
                f"type({name}) is _Tensor",
                f"{name}.dtype is _{name}_dtype",
                f"{name}.device == _{name}_device",
                f"{name}.shape{'[1:]' * one.free} == _{name}_shape",
                f"{name}.stride() == _{name}_strides",
                f"not {name}.is_neg()",
            ]
            if one.written:
                found.append(f"{name}.requires_grad is {array.requires_grad}")
            if may_be:
                found.append(f"{name}.size(0) >= _count")
        return found

    def address(self, name: str) -> str:
        """Return an expression for the address of a tensor."""
        return f"{name}.data_ptr()"

    def rows(self, expected: Expected, constants: dict[str, Any]) -> str:
        """Return an expression for the length of the first axis."""
        row = math.prod(expected.shape[1:])
        if row == 1:
            return f"{expected.name}.numel()"  # size(0) takes three times as long
        constants[f"_{expected.name}_row"] = row
        return f"{expected.name}.numel() // _{expected.name}_row"

    def statements(
        self, expected: Sequence[Expected], arrays: Sequence[Any], constants: dict[str, Any]
    ) -> list[str]:
        """Return statements that let autograd notice which tensors are written."""
        noted = [
            one.name
            for one, array in zip(expected, arrays, strict=True)
            if one.written and not array.is_inference()
        ]
        constants["_bump"] = self._bump
        return [f"_bump(({', '.join(noted)},))"] if noted else []


class _Guards(dict[int, Callable[..., bool]]):
    """By numbers of rows, whether tensors match what is expected and have exactly so many.

    Guards are what ``torch.compile`` matches its inputs with: one call for all tensors, which also
    compares their devices, and whether they require grad. A guard of exact lengths saves reading
    each of them, so there is one for each number of rows that was seen.
    """

    def __init__(
        self,
        torch: Any,
        expected: Sequence[Expected],
        arrays: Sequence[Any],
        steps: Sequence[Sequence[int]],
        longer: Sequence[bool],
    ) -> None:
        super().__init__()
        make = torch._C._dynamo.guards.TensorGuards
        shapes = [(None, *one.shape[1:]) if one.free else one.shape for one in expected]

        def guard(arrays: Sequence[Any], shapes: Sequence[Any]) -> Callable[..., bool]:
            # It keeps none of these tensors alive.
            sizes = [*map(list, shapes)]
            made = make(*arrays, dynamic_dims_sizes=sizes, dynamic_dims_strides=steps)
            check: Callable[..., bool] = made.check
            return check

        self._guard, self._of_any_length, self._longer = guard, guard(arrays, shapes), longer

    def match_any_length(self, count: int, *tensors: Any) -> bool:
        """Return whether tensors match what is expected, and remember their lengths if they do."""
        if not self._of_any_length(*tensors):
            return False
        shapes = [tensor.shape for tensor in tensors]
        if any(shape[0] < count for shape, may in zip(shapes, self._longer, strict=True) if may):
            return False
        if len(self) >= MOST_GUARDS:
            self.clear()
        self[count] = self._guard(tensors, shapes)
        return True


def _version_bump(torch: Any) -> Callable[[tuple[Any, ...]], None]:
    """Return what tells autograd that tensors are written in place."""
    bump: Callable[[tuple[Any, ...]], None]
    try:
        bump = torch._C._increment_version  # half the time of the public function, which calls it
        bump((torch.empty(0),))
    except Exception:  # of some other version
        bump = torch.autograd.graph.increment_version
    return bump


@functools.cache
def _numpy_dtype(subject: str, dtype: Any) -> Dtype:
    try:
        return as_dtype(subject, str(dtype).removeprefix("torch."))
    except BadTensorDtypeError:
        rule = "must have a dtype that NumPy or ml_dtypes has"
        raise BadTensorDtypeError(subject, rule, dtype) from None
