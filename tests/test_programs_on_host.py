# SPDX-License-Identifier: Apache-2.0
"""Random writes and reads with steps: the real kernels, compiled for the host, against NumPy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import program_cases
import pytest
from host_device import HostDevice
from program_cases import different, operation_of, reported

import pagedcache as pc
from pagedcache.operators.programs import nvidia

KERNELS, CALLS = 14, 40


def on_host(compiler, operation):
    """Return the same operation, whose kernel is compiled for the host."""
    expected = operation._arguments.expected
    return type(operation)(operation.info, expected, HostDevice(compiler))


def check(compiler, case, seed):
    """Compare a call on the host with the same on the CPU; return whether rows were reported."""
    (tokens, wanted), (_, found) = case.arrays(seed), case.arrays(seed)
    operation, arguments = operation_of(case, wanted)
    host = on_host(compiler, operation)
    if seed % 2:
        del host._implementation._wide._grids[:-1]  # as if there were many tokens
    operation.run(arguments, None)
    _, arguments = operation_of(case, found)
    host.run(arguments, None)
    told = reported(operation)
    assert told == reported(host), (case, seed)
    assert not different(found, wanted), (case, seed)
    return bool(told and tokens)


@pytest.mark.parametrize("number", range(KERNELS))
def test_random_writes(compiler, number):
    case = program_cases.random_case(number)
    for seed in range(CALLS):
        check(compiler, case, seed)


@pytest.mark.parametrize("number", range(KERNELS // 3))
def test_random_reads(compiler, number):
    case = program_cases.random_case(1_000 + number, reads=True)
    for seed in range(CALLS):
        check(compiler, case, seed)


def test_rows_are_reported(compiler):
    case = program_cases.random_case(3)
    assert "positions" in case.kernel.parameters
    assert any(check(compiler, case, seed) for seed in range(20))


def test_all_threads_of_a_row_agree(compiler):
    """An index that leaves its array in one dimension makes the whole row invalid."""
    kernel = pc.WriteKernel(k=["x * table[dim + ids[token]]"], v=["x"])
    k, v = np.random.default_rng(0).standard_normal((2, 4, 2, 64)).astype(np.float32)
    given = {"table": np.ones(64, np.float32), "ids": np.array([0, 1, 0, -1])}
    slots, caches = np.array([0, 1, 2, 3]), [np.zeros((2, 1, 4, 2, 64), np.float32) for _ in "ab"]
    variant, parameters = kernel._variant(given)
    for cache, on in zip(caches, (None, compiler), strict=True):
        arguments = (*cache, k, v, slots, *[None] * 6, *variant.values(parameters))
        operation = variant.create(*arguments)
        operation = operation if on is None else on_host(on, operation)
        operation.run(arguments, None)
        assert reported(operation) == (4, 1)
    assert caches[0].tobytes() == caches[1].tobytes()
    assert not caches[1][0, 0, [1, 3]].any()
    assert caches[1][0, 0, [0, 2]].all()


def test_many_tokens_take_several_launches(compiler, monkeypatch):
    monkeypatch.setattr(nvidia, "MOST", 3_000)  # threads
    kernel = pc.WriteKernel(k=["x + token"], v=["x * scale[token] + scale[299 - token]"])
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 300, 2, 128)).astype(np.float32)
    slots, scale = rng.permutation(320)[:300], rng.standard_normal(300).astype(np.float32)
    caches = [np.zeros((20, 16, 2, 128), np.float32) for _ in range(4)]
    variant, parameters = kernel._variant({"scale": scale})
    arguments = (*caches[:2], k, v, slots, *[None] * 6, *variant.values(parameters))
    operation = variant.create(*arguments)
    host = on_host(compiler, operation)
    assert host._implementation._widest.most_rows < 100
    operation.run(arguments, None)
    host.run((*caches[2:], *arguments[2:]), None)
    assert len(host._device.launches) > 3
    assert caches[0].tobytes() == caches[2].tobytes()
    assert caches[1].tobytes() == caches[3].tobytes()
    assert np.array_equal(
        caches[0].reshape(320, 2, 128)[slots],
        (k + np.arange(300)[:, None, None]).astype(np.float32),
    )


def test_unaligned_addresses(compiler):
    kernel = pc.WriteKernel(k=[pc.rope("cos_sin", "positions")])
    memory = np.zeros(4096, np.float32)
    for shift in (0, 1, 2, 5):
        k = memory[shift : shift + 3 * 2 * 64].reshape(3, 2, 64)
        k[...] = np.random.default_rng(shift).standard_normal(k.shape)
        table = np.random.default_rng(1).standard_normal((9, 64)).astype(np.float32)
        given = {"cos_sin": table, "positions": np.array([3, 0, 8])}
        caches = [np.zeros((2, 2, 4, 64), np.float32) for _ in range(4)]
        variant, parameters = kernel._variant(given)
        arguments = (*caches[:2], k, k, np.array([7, -1, 2]), *[None] * 6)
        arguments += variant.values(parameters)
        operation = variant.create(*arguments)
        host = on_host(compiler, operation)
        operation.run(arguments, None)
        host.run((*caches[2:], *arguments[2:]), None)
        assert caches[0].tobytes() == caches[2].tobytes()
        assert caches[1].tobytes() == caches[3].tobytes()
        assert (host._implementation._narrow is None) == (shift == 0)


def compared(compiler, kernel, size, dtype=np.float32, **parameters):
    """Compare the memory of a small write on the host and on the CPU, and return the K cache."""
    k, v = np.random.default_rng(0).standard_normal((2, 5, 2, size)).astype(dtype)
    slots = np.array([7, -1, 3, 0, 5])
    caches = [np.zeros((2, 2, 4, 2, size), dtype) for _ in range(2)]
    variant, parameters = kernel._variant(parameters)
    for cache, on in zip(caches, (None, compiler), strict=True):
        arguments = (*cache, k, v, slots, *[None] * 6, *variant.values(parameters))
        operation = variant.create(*arguments)
        (operation if on is None else on_host(on, operation)).run(arguments, None)
        assert reported(operation) is None
    assert caches[0].tobytes() == caches[1].tobytes()
    return caches[1][0].reshape(8, 2, size), k, slots


@pytest.mark.parametrize("size", [1, 3, 5, 7, 20])
def test_casting_rows_of_odd_sizes(compiler, size):
    kernel = pc.WriteKernel(k=[pc.cast("float8_e4m3fn")], v=[pc.cast("float8_e5m2"), "x + 1"])
    cache, k, slots = compared(compiler, kernel, size)
    wanted = k.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(cache[slots[[0, 2, 3, 4]]], wanted[[0, 2, 3, 4]])


def test_small_numbers_are_kept(compiler):
    kernel = pc.WriteKernel(k=["factor"], v=["x * factor"])
    cache, _, slots = compared(compiler, kernel, 4, factor=1e-42)
    assert (cache[slots[0]] == np.float32(1e-42)).all()


@pytest.mark.parametrize("size", [20, 64, 96])
def test_row_functions_of_unusual_rows(compiler, size):
    """Rows of negative numbers, and of zeros of both signs, of which the first is taken."""
    rows = "(-1.0 - abs(x) if token != 3 else (0.0 if dim > 0 else -0.0))"
    kernel = pc.WriteKernel(k=[rows, "1 / row_max(x)"], v=[f"-{rows}", "1 / row_min(x)"])
    cache, _, slots = compared(compiler, kernel, size)
    assert (cache[slots[3]] == -np.inf).all()
    assert (cache[slots[0]] < 0).all()


@pytest.mark.parametrize(("size", "group"), [(12, 3), (96, 48), (160, 5), (40, 8), (64, 2)])
def test_groups_of_any_size(compiler, size, group):
    quantizer = pc.quantize("row_sum(x * x) + 0.5", "x / s + row_max(x)", "int8", group=group)
    kernel = pc.WriteKernel(k=["x"], v=[quantizer], k_format="float8_e4m3fn")
    k, v = np.random.default_rng(0).standard_normal((2, 5, 2, size)).astype(np.float32)
    slots = np.array([7, -1, 3, 0, 5])
    results = []
    for on in (None, compiler):
        k_cache = np.zeros((2, 4, 2, size), np.uint8)
        v_cache = np.zeros((2, 4, 2, size), np.int8)
        k_scale, v_scale = np.zeros((2, 2, 4, 2, size // group), np.float32)
        variant, _ = kernel._variant({})
        arguments = (k_cache, v_cache, k, v, slots, *[None] * 4, k_scale, v_scale)
        operation = variant.create(*arguments)
        (operation if on is None else on_host(on, operation)).run(arguments, None)
        results.append((k_cache, v_cache, k_scale, v_scale))
    for found, wanted in zip(*results, strict=True):
        assert found.tobytes() == wanted.tobytes()
    assert v_scale.reshape(8, 2, -1)[[7, 3, 0, 5]].all()
