# SPDX-License-Identifier: Apache-2.0
"""A second operator, in a folder of its own, gets all that is general without a change to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import toy_operator
from host_device import HostDevice
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_operator import Negate, NegateInfo, negate

import pagedcache as pc
from pagedcache.status import Status


def on_host(compiler):
    device = HostDevice(compiler)

    def create(target, source, **options):
        described = {
            name: pc.TensorDescriptor(a.dtype, a.shape, [step // 4 for step in a.strides])
            for name, a in (("target", target), ("source", source))
        }
        info = NegateInfo.create(*described.values())
        return Negate(info, info.rules.expected(described), device, **options)

    return create


@pytest.fixture(params=["cpu", "nvidia on the host"])
def create(request):
    if request.param == "cpu":
        return Negate.create
    return on_host(request.getfixturevalue("compiler"))


def expected(target, source):
    wanted = target.copy()
    for row in range(len(source)):
        if row != toy_operator.UNLUCKY:
            wanted[row] = -source[row]
    return wanted


def test_any_number_of_rows(create):
    wide = np.zeros((30, 9), np.float32)
    source = np.arange(30 * 5, dtype=np.float32).reshape(30, 5)
    with create(wide[:7, :5], source[:7]) as negation:
        for rows in (7, 1, 30, 12, 0, 30):
            wide[...] = 99
            wanted = wide.copy()
            wanted[:, :5] = expected(wide[:, :5], source[:rows])
            negation.calculate(wide[:, :5], source[:rows])
            assert np.array_equal(wide, wanted)
        with pytest.raises(ValueError, match=r"must not have a row 13 .2 since the last check"):
            negation.check()
        negation.check()


def test_what_is_general(create):
    target, source = np.zeros((20, 4), np.float32), np.ones((20, 4), np.float32)
    negation = create(target, source)
    again = negation.bind(target, source)
    again()
    assert np.array_equal(target, expected(np.zeros_like(target), source))
    for bad, kind, status, words in (
        ((target, source.astype(np.float64)), TypeError, Status.BAD_TENSOR_DTYPE, "source must"),
        ((target[:3], source), ValueError, Status.BAD_TENSOR_SHAPE, "target must have at least 20"),
        ((target, source[:, :3]), ValueError, Status.BAD_TENSOR_SHAPE, "source must have shape"),
        ((target, source[::2]), ValueError, Status.BAD_TENSOR_STRIDES, "source must have strides"),
        ((target, None), TypeError, Status.NULL_POINTER, "source must be an array"),
        ((target, 0), ValueError, Status.NULL_POINTER, "source must not be a null pointer"),
    ):
        with pytest.raises(kind, match=words) as caught:
            negation.calculate(*bad)
        assert caught.value.status == status
    raising = create(target, source, on_invalid="raise")
    with pytest.raises(ValueError, match=r"must not have a row 13 .1 in this call"):
        raising.calculate(target, source)
    with pytest.raises(pc.SourceOverlapError, match="source must not share memory with target"):
        create(target, source, debug=True).calculate(target, target)
    negation.destroy()
    for call in (again, negation.check, lambda: negation.calculate(target, source)):
        with pytest.raises(RuntimeError, match="has been destroyed"):
            call()


def test_one_call(monkeypatch):
    for rows in (3, 5, 3):
        target, source = np.zeros((rows, 4), np.float32), np.ones((rows, 4), np.float32)
        negate(target, source)
        assert (target == -1).all()
    assert len(toy_operator.kept._kept) == 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_both_backends_agree(compiler, rows, size, more, less):
    rng = np.random.default_rng(rows)
    target, source = (
        rng.standard_normal((rows, size + gap), np.float32)[:, :size] for gap in (more, less)
    )
    by_cpu, on_the_host = target.copy(), target
    Negate.create(by_cpu, source).calculate(by_cpu, source)
    on_host(compiler)(target, source).calculate(on_the_host, source)
    assert np.array_equal(by_cpu.view(np.int32), on_the_host.copy().view(np.int32))


@pytest.mark.gpu
def test_on_the_gpu():
    import cupy

    source = cupy.arange(300 * 7, dtype=np.float32).reshape(300, 7)
    target = cupy.zeros((300, 9), np.float32)[:, :7]
    with Negate.create(target[:5], source[:5]) as negation:
        negation.calculate(target, source)
        with pytest.raises(ValueError, match=r"must not have a row 13 .1 since the last check"):
            negation.check()
    zeros = np.zeros((300, 7), np.float32)
    assert np.array_equal(target.get(), expected(zeros, source.get()))


def test_nothing_general_knows_an_operator():
    """No file outside of an operator's folder names one, but those that are about this one."""
    package = Path(pc.__file__).parent
    general = [
        path
        for folder in ("arrays", "backend", "cache", "operators")
        for path in (package / folder).rglob("*.py")
        if not {"paged_caching", "paged_gather", "programs", "slot_mapping", "blocks"}
        & set(path.parts)
    ]
    assert len(general) > 25
    naming = [path for path in general if "paged_caching" in path.read_text("utf-8")]
    # Two docstrings say what else there is.
    assert {path.relative_to(package).as_posix() for path in naming} <= {"operators/__init__.py"}
    # But what is about paged caches may name what they have.
    about_caches = [path for path in general if "cache" in path.parts]
    about_caches.append(package / "operators" / "slot_operation.py")
    shared = [path for path in general if path not in about_caches]
    assert len(shared) > 25
    for name in pc.Descriptor.arguments:
        assert [path for path in shared if f'"{name}"' in path.read_text("utf-8")] == []
    common = (package.parent / "cuda_src" / "common.cuh").read_text("utf-8")
    assert "slot_mapping" not in common


def test_the_formatter_agrees():
    tool = Path(subprocess.sys.executable).with_name("clang-format")
    if not tool.exists():
        pytest.skip("clang-format is not installed")
    file = Path(__file__).parent / "toy_operator" / "negate.cuh"
    subprocess.run([tool, "-n", "--Werror", file], check=True)
