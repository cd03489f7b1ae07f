# SPDX-License-Identifier: Apache-2.0
"""What the tensors of an operator must look like, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pagedcache.dtypes import Dtype, names
from pagedcache.status import BadTensorDtypeError, BadTensorShapeError, BadTensorStridesError
from pagedcache.tensors import Expected, TensorDescriptor, overlaps_itself, view

_ANYWHERE = 1 << 20  # an address, where only differences count


@dataclass(frozen=True, slots=True)
class Rule:
    """What one tensor must look like.

    Attributes
    ----------
    name : str
        Of the argument, an identifier that does not begin with an underscore.
    axes : tuple of str
        Their names. Axes of one name have the same length in all tensors.
    dtypes : tuple of numpy.dtype
        Those that are allowed.
    like : str or None
        The tensor whose dtype it must have.
    written : bool
        Whether the operator writes it. Then no two of its elements may share memory, and it may
        share none with another tensor that is written.
    apart : bool
        Whether it may share no memory with what is written, although it is only read. Others are
        compared in debug mode alone.
    optional : bool
        Whether there may be none.
    any_stride : bool
        Whether the last axis may have another stride than 1.
    packed : int
        How many elements of the last axis are stored in each element of the tensor.
    in_place : str or None
        The tensor that it may be itself, although it is written.
    loose : bool
        Whether its first axis may have any length from call to call, whatever other tensors have.
        The operator is told that length as a number, and checks it.
    """

    name: str
    axes: tuple[str, ...]
    dtypes: tuple[Dtype, ...]
    like: str | None = None
    written: bool = False
    apart: bool = False
    optional: bool = False
    any_stride: bool = False
    packed: int = 1
    in_place: str | None = None
    loose: bool = False


@dataclass(frozen=True, slots=True)
class Rules:
    """What the tensors of an operator must look like.

    Attributes
    ----------
    tensors : tuple of Rule
        In the order of the operator's arguments.
    free : str
        The axis whose length may differ from call to call; it is the first of each tensor that has
        it.
    counted_by : str
        The tensor whose free axis says how many rows a call has. Those of others may be longer.
    note : str
        What an error about a shape should also say.
    """

    tensors: tuple[Rule, ...]
    free: str
    counted_by: str
    note: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(rule.name for rule in self.tensors)

    @property
    def free_names(self) -> frozenset[str]:
        """The names of the tensors whose first axis is free."""
        return frozenset(rule.name for rule in self.tensors if self._is_free(rule))

    def _is_free(self, rule: Rule) -> bool:
        return rule.loose or rule.axes[:1] == (self.free,)

    def _present(self, described: Mapping[str, TensorDescriptor]) -> list[Rule]:
        return [rule for rule in self.tensors if not rule.optional or rule.name in described]

    def check(self, described: Mapping[str, TensorDescriptor]) -> dict[str, int]:
        """Check tensors against the table and each other.

        Parameters
        ----------
        described : mapping of str to TensorDescriptor
            By name; those that are optional may be missing.

        Returns
        -------
        dict of str to int
            The length of each axis, by its name; of the free axis, that of the tensor which counts.

        Raises
        ------
        BadTensorDtypeError, BadTensorShapeError, BadTensorStridesError
            The message names the tensor, the rule and what was found.
        """
        self._check_dtypes(described)
        sizes = self._check_shapes(described)
        for rule in self._present(described):
            self._check_strides(rule, described[rule.name])
        return sizes

    def steps(self, name: str, tensor: TensorDescriptor) -> tuple[int, ...]:
        """Return the strides of a tensor in elements, those that are never used set to 0.

        The stride of the free axis stays, since other calls may have more rows.
        """
        steps = _used_steps(tensor)
        if name in self.free_names:
            return (row_step(tensor.shape, tensor.strides), *steps[1:])
        return steps

    def expected(self, described: Mapping[str, TensorDescriptor]) -> tuple[Expected | None, ...]:
        """Return what each array must look like at each call; ``None`` for one that is missing."""

        def of(rule: Rule) -> Expected | None:
            if rule.name not in described:
                return None
            tensor = described[rule.name]
            return Expected(
                rule.name,
                tensor.dtype,
                tensor.shape,
                tuple(step * tensor.dtype.itemsize for step in self.steps(rule.name, tensor)),
                self._is_free(rule),
                rule.written,
                rule.written or rule.apart,
                rule.in_place,
                rule.loose,
            )

        return tuple(map(of, self.tensors))

    def _check_dtypes(self, described: Mapping[str, TensorDescriptor]) -> None:
        for rule in self._present(described):
            dtype = described[rule.name].dtype
            if dtype not in rule.dtypes:
                raise BadTensorDtypeError(rule.name, f"must be {names(rule.dtypes)}", dtype)
            if rule.like is not None and dtype != described[rule.like].dtype:
                wanted = described[rule.like].dtype
                raise BadTensorDtypeError(rule.name, f"must be {wanted} like {rule.like}", dtype)

    def _check_shapes(self, described: Mapping[str, TensorDescriptor]) -> dict[str, int]:
        sizes: dict[str, tuple[int, str]] = {}
        for rule in self._present(described):
            shape = described[rule.name].shape
            axes = f"[{', '.join(rule.axes)}]{self.note}"
            if len(shape) != len(rule.axes):
                plural = "axes" if len(rule.axes) > 1 else "axis"
                wanted = f"must have {len(rule.axes)} {plural} {axes}"
                raise BadTensorShapeError(rule.name, wanted, f"shape {shape}")
            lengths = (*shape[:-1], shape[-1] * rule.packed) if rule.packed > 1 else shape
            for index, (axis, length) in enumerate(zip(rule.axes, lengths, strict=True)):
                if index == 0 and self._is_free(rule):
                    continue
                if length < 1:
                    wanted = f"must have a {axis} of at least 1 in {axes}"
                    raise BadTensorShapeError(rule.name, wanted, f"shape {shape}")
                known, origin = sizes.setdefault(axis, (length, rule.name))
                if length != known:
                    wanted = f"must have the {axis} of {origin}, {known}, in {axes}"
                    packed = {each.name: each.packed for each in self.tensors}[origin]
                    if packed > 1 and axis == rule.axes[-1]:
                        wanted += f", where {packed} elements share a byte"
                        wanted += f", so it must be a multiple of {packed}" * (length % packed > 0)
                    raise BadTensorShapeError(rule.name, wanted, f"shape {shape}")
        rows = described[self.counted_by].shape[0]
        for rule in self._present(described):
            if self._is_free(rule) and not rule.loose:
                check_rows(rule.name, described[rule.name].shape[0], self.counted_by, rows)
        return {self.free: rows} | {axis: length for axis, (length, _) in sizes.items()}

    def _check_strides(self, rule: Rule, tensor: TensorDescriptor) -> None:
        strides = f"strides {tensor.strides} in elements"
        if not rule.any_stride and tensor.shape[-1] > 1 and tensor.strides[-1] != 1:
            wanted = "must have stride 1 on its last axis"
            raise BadTensorStridesError(rule.name, wanted, strides)
        steps = _used_steps(tensor)
        if any(step < 0 for step in steps):
            raise BadTensorStridesError(rule.name, "must not have negative strides", strides)
        in_bytes = tuple(step * tensor.dtype.itemsize for step in steps)
        bits = np.dtype(f"i{tensor.dtype.itemsize}")
        there = view(_ANYWHERE, bits, tensor.shape, in_bytes)
        if rule.written and there.size and overlaps_itself(there):
            wanted = "must not overlap itself, but two of its elements share memory"
            raise BadTensorStridesError(rule.name, wanted, strides)


def _used_steps(tensor: TensorDescriptor) -> tuple[int, ...]:
    """Return strides in elements, 0 where the length is 1 and the stride is never used."""
    pairs = zip(tensor.shape, tensor.strides, strict=True)
    return tuple(step if length > 1 else 0 for length, step in pairs)


def check_rows(name: str, rows: int, counted_by: str, needed: int) -> None:
    """Raise if a tensor has fewer rows than a call needs."""
    if rows < needed:
        wanted = f"must have at least {needed} rows, one for each entry of {counted_by}"
        raise BadTensorShapeError(name, wanted, f"{rows} rows")


def row_step(shape: tuple[int, ...], strides: tuple[int, ...], unit: int = 1) -> int:
    """Return the step from row to row of a tensor, also if it has one row now and more later.

    Parameters
    ----------
    shape, strides : tuple of int
    unit : int
        What strides count an element as: 1, or its size in bytes.
    """
    rows, *lengths = shape
    if not lengths:
        return strides[0] if rows > 1 else unit
    one_row = unit + sum(
        (length - 1) * step for length, step in zip(lengths, strides[1:], strict=True)
    )
    if rows > 1 or strides[0] >= one_row:
        return strides[0]
    return math.prod(lengths) * unit  # the stride is never used and may be 0, as that of x[None]
