# SPDX-License-Identifier: Apache-2.0
"""The bench: what it writes is checked, its numbers add up, and it runs without a GPU."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from pagedcache import bench
from pagedcache.__main__ import main
from pagedcache.bench import host, peers
from pagedcache.bench.case import Axes, Case
from pagedcache.bench.measure import host_microseconds

with contextlib.suppress(ImportError):
    import torch  # noqa: F401 - which cannot be imported once `AsCupy` stands where CuPy stands


@pytest.fixture(autouse=True)
def few_sets(monkeypatch):
    """Let small cases have few sets of inputs, which is enough where no time counts."""
    monkeypatch.setattr("pagedcache.bench.case.MOST_SETS", 16)


def run(*options):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(options))


def test_on_the_cpu(capsys, tmp_path):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    options = ["--device", "cpu", "--tokens", "1", "32", "--layout", "HND", "NHD"]
    pytest.importorskip("matplotlib")
    assert run(*options, "--json", str(numbers), "--plot", str(picture)) == 0
    told = capsys.readouterr().out
    assert "No GPU is used" in told
    assert told.count("of memcpy rate") == 2
    results = json.loads(numbers.read_text())
    assert [result["axes"]["layout"] for result in results["gpu"]] == ["HND", "NHD"]
    for result in results["gpu"]:
        assert [row["tokens"] for row in result["rows"]] == [1, 32]
        for row in result["rows"]:
            assert row["payload"] == row["tokens"] * 8 * 128 * 2 * 2
            assert set(row["us"]) == {"memcpy", "pagedcache"}
            assert all(time > 0 for time in row["us"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_formats_on_the_cpu(capsys, tmp_path):
    numbers, picture = tmp_path / "numbers.json", tmp_path / "picture.png"
    options = ["--device", "cpu", "--tokens", "1", "40", "--heads", "2", "--head-size", "64"]
    options += ["--format", "copy", "float8_e4m3fn", "int8", "int4", "--operator", "write"]
    pytest.importorskip("matplotlib")
    assert run(*options, "gather", "--json", str(numbers), "--plot", str(picture)) == 0
    told = capsys.readouterr().out
    results = json.loads(numbers.read_text())["gpu"]
    axes = [result["axes"] for result in results]
    assert [(one["format"], one["scale"], one["operator"]) for one in axes] == [
        (name, scale, operator)
        for name, scale in (
            ("copy", ""),
            ("float8_e4m3fn", "tensor"),
            ("int8", "token-head"),
            ("int4", "group"),
        )
        for operator in ("write", "gather")
    ]
    a_row = {"copy": 256, "float8_e4m3fn": 192, "int8": 192 + 4, "int4": 128 + 32 + 2 * 4}
    for result in results:
        stored = result["axes"]["format"] != "copy"
        for row in result["rows"]:  # K and V of two heads, half of what is read and written
            assert row["payload"] == row["tokens"] * 2 * 2 * a_row[result["axes"]["format"]] / 2
            names = {"memcpy", "pagedcache", *(["pagedcache copy"] * stored)}
            assert set(row["us"]) == names
            assert all(time > 0 for time in row["us"].values())
    assert told.count("of copy time") == 6
    assert told.count("Time of one gather, us") == told.count("Time of one write, us") == 4
    assert ", format: int8, scale: token-head, operator: gather\n" in told
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scales_are_an_axis_of_formats_alone():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    formats = ["--format", "copy", "float8_e5m2", "int4", "--scale", "tensor", "head"]
    axes = list(bench._axes(parser.parse_args(formats), 64))
    assert [(one.format, one.scale) for one in axes] == [
        ("copy", ""),
        ("float8_e5m2", "tensor"),
        ("float8_e5m2", "head"),
        ("int4", "tensor"),
        ("int4", "head"),
    ]
    assert {one.operator for one in axes} == {"write"}
    [plain] = bench._axes(parser.parse_args([]), 64)
    assert plain == Axes(64)
    assert plain.describe().endswith("inputs: cold")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--scale", "tensor"], "--scale needs a --format other than copy"),
        (["--format", "int4", "--head-size", "48"], "multiples of 32"),
        (["--format", "int4", "--scale", "head", "--head-size", "5"], "even head sizes"),
        (["--format", "int8", "--head-size", "2"], "more memory than bfloat16 at head size 2"),
        (["--operator", "gather", "--source", "qkv"], "needs --source plain"),
    ],
)
def test_what_cannot_be_measured_gets_one_sentence(capsys, options, words):
    assert run("--device", "cpu", *options) == 2
    told = capsys.readouterr().out
    assert words in told
    assert told.count("\n") == 1


def test_a_plot_needs_matplotlib(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert run("--device", "cpu", "--plot", str(tmp_path / "picture.png")) == 2
    assert capsys.readouterr().out == "--plot needs matplotlib: pip install matplotlib\n"


def test_files_that_cannot_be_written_are_refused_at_once(capsys, tmp_path):
    for option, words in (
        (["--json", str(tmp_path)], "is a folder"),
        (["--plot", "a.xyz"], ".png"),
    ):
        with pytest.raises(SystemExit):
            run("--device", "cpu", *option)
        assert words in capsys.readouterr().err


@pytest.mark.gpu
def test_on_the_gpu(capsys, tmp_path):
    numbers = tmp_path / "numbers.json"
    options = ["--tokens", "1", "300", "--source", "plain", "qkv", "--slots", "random"]
    assert run(*options, "--json", str(numbers)) == 0
    results = json.loads(numbers.read_text())
    assert len(results["gpu"]) == 2
    assert {"memcpy", "pagedcache", "CuPy fancy"} <= set(results["gpu"][0]["rows"][0]["us"])
    assert {"calculate, CuPy", "paged_caching, CuPy", "bind, CuPy"} <= set(results["host"])
    columns = {"fixed", "two in turn", "1 to 64", "4 caches"}
    assert all(set(row) == columns for row in results["host"].values())
    assert results["first_call"]["empty cache"] > results["first_call"]["from disk"] > 0
    assert "best peer's time" in capsys.readouterr().out


@pytest.mark.gpu
def test_formats_on_the_gpu(capsys, tmp_path):
    numbers = tmp_path / "numbers.json"
    options = ["--only-gpu-time", "--tokens", "1", "300", "--operator", "write", "gather"]
    options += ["--format", "copy", "float8_e4m3fn", "float8_e5m2", "int8", "int4"]
    assert run(*options, "--json", str(numbers)) == 0
    results = json.loads(numbers.read_text())["gpu"]
    assert len(results) == 10
    for result in results:
        wanted = {"memcpy", "pagedcache"}
        if result["axes"]["format"] != "copy":
            wanted.add("pagedcache copy")
        assert all(wanted <= set(row["us"]) for row in result["rows"])
    assert "pagedcache copy is not measured" not in capsys.readouterr().out


@pytest.mark.parametrize("source", ["plain", "qkv"])
@pytest.mark.parametrize("slots", ["blocks", "random", "sequential"])
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_a_case_knows_whether_it_was_written(layout, slots, source):
    axes = Axes(50, 2, 8, 4, 16, "bfloat16", layout, slots, source)
    case = Case(axes, np, 200, 1 << 12)
    assert axes.payload == 50 * 2 * (8 + 4) * 2
    assert case.num_slots == 208
    for k, v, where in case.sets:
        assert (k.shape, v.shape) == ((50, 2, 8), (50, 2, 4))
        assert len(set(where.tolist())) == 50
        assert where.min() >= 0
        assert where.max() < 208
    write = peers.pagedcache(case)
    assert not case.is_written(0)
    write(0)
    assert case.is_written(0)
    assert not case.is_written(1)
    case.clear()
    assert not case.is_written(0)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize("scale", ["tensor", "head", "token-head", "group"])
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("float8_e4m3fn", "float16"),
        ("float8_e5m2", "bfloat16"),
        ("int8", "float32"),
        ("int4", "bfloat16"),
    ],
)
def test_a_case_in_a_format_knows_whether_it_was_written(layout, scale, form, dtype):
    axes = Axes(300, 2, 64, 32, 16, dtype, layout, format=form, scale=scale)
    case = Case(axes, np, 400, 1)
    assert all(np.abs(k.astype(float)).max() < 2 for k, _, _ in case.sets)
    write = peers.pagedcache(case)
    case.clear()
    assert not case.is_right(0)
    write(0)
    assert case.is_right(0)
    assert not case.is_right(1)
    slot = int(case.sets[0][2][-2])  # tokens 0, 2, 4 and so on are compared
    at = (slot // 16, 1, slot % 16) if layout == "HND" else (slot // 16, slot % 16, 1)
    written = [case.k_cache, case.v_cache]
    if scale in ("token-head", "group"):
        written += case.scales.values()
    for array in written:
        bits = array.view(f"u{array.dtype.itemsize}")
        bits[at] ^= 1
        assert not case.is_right(0)
        bits[at] ^= 1
    assert case.is_right(0)
    assert case.plain.k_cache.dtype == case.dtype
    peers.pagedcache(case.plain)(0)
    assert case.plain.is_right(0)


@pytest.mark.parametrize("layout", ["HND", "NHD"])
@pytest.mark.parametrize(
    ("form", "scale"), [("copy", ""), ("float8_e5m2", "head"), ("int8", "token-head")]
)
def test_a_case_knows_whether_it_was_read(form, scale, layout):
    axes = Axes(50, 2, 64, 32, layout=layout, format=form, scale=scale, operator="gather")
    case = Case(axes, np, 64, 1)
    for one in {id(each): each for each in (case, case.plain)}.values():
        one.clear()
        assert not one.is_right(0)
        peers.pagedcache(one)(0)
        assert one.is_right(0)
        for out in one.outputs[0]:
            bits = out.view(np.uint16)
            bits[-1, 1, -1] ^= 1
            assert not one.is_right(0)
            bits[-1, 1, -1] ^= 1
    if form != "copy":  # what is read back is near what was written, so the caches hold it
        k, v = (rows.astype(np.float32) for rows in case.sets[0][:2])
        peers.pagedcache(case)(0)
        for rows, out in zip((k, v), case.outputs[0], strict=True):
            assert np.abs(out.astype(np.float32) - rows).max() < 0.26  # float8_e5m2: 1/8 of 2


def test_a_gather_reads_other_slots_in_each_set():
    case = Case(Axes(16, slots="sequential", operator="gather"), np, 64, 1)
    assert [each[2][0] for each in case.sets] == [0, 16]
    assert all(each[2][0] == 0 for each in Case(Axes(16, slots="sequential"), np, 64, 1).sets)


@pytest.mark.parametrize("scale", ["tensor", "token-head", "group"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_memcpy_moves_the_bytes_of_the_operator(scale, dtype):
    """Half of the bytes of K, V, codes and computed scales of one set, read and written."""
    axes = Axes(64, 2, 64, 32, dtype=dtype, format="int8", scale=scale)
    case = Case(axes, np, 64, 1)  # a full cache
    k, v, _ = case.sets[0]
    moved = k.nbytes + v.nbytes + case.k_cache.nbytes + case.v_cache.nbytes
    if scale != "tensor":
        moved += sum(each.nbytes for each in case.scales.values())
    for i in range(len(case.sets)):
        copied = list(case.memcpys(i))
        assert [size for *_, size in copied] == list(axes.copied)
        assert 2 * sum(size for *_, size in copied) == moved
        for (cache, to, rows, at, size), given in zip(copied, case.sets[i], strict=False):
            assert rows is given
            assert at == 0
            assert to + size <= cache.nbytes
            assert size <= rows.nbytes
    # The copy: K and V as they are, over the cache in turn.
    plain = Case(Axes(64, 2, 64, 32, dtype=dtype), np, 1024, 1)
    for i, (k, v, _) in enumerate(plain.sets):
        assert [each[2:] for each in plain.memcpys(i)] == [(k, 0, k.nbytes), (v, 0, v.nbytes)]
        assert [each[1] for each in plain.memcpys(i)] == [i * k.nbytes, i * v.nbytes]


def test_a_memcpy_in_place_of_a_gather_leaves_the_caches_alone():
    case = Case(Axes(64, 2, 64, 32, operator="gather"), np, 1024, 1)
    for i, (k, v) in enumerate(case.outputs):
        found = list(case.memcpys(i))
        pairs = zip(found, ((k, case.k_cache), (v, case.v_cache)), strict=True)
        assert all(to == 0 and target is out and source is cache
                   for (target, to, source, *_), (out, cache) in pairs)  # fmt: skip
        assert [at for *_, at, _ in found] == [i * k.nbytes, i * v.nbytes]


def test_blocks_are_filled_in_order():
    case = Case(Axes(64, block_size=16), np, 1024, 1)
    slots = case.sets[0][2].reshape(4, 16)
    assert (slots == slots[:, :1] + np.arange(16)).all()
    assert (slots[:, 0] % 16 == 0).all()


def test_a_wrong_peer_is_not_timed(monkeypatch, capsys):
    case = Case(Axes(8), np, 64, 1)
    monkeypatch.setattr(peers, "pagedcache", lambda case: lambda i: None)
    with pytest.raises(AssertionError, match="wrote wrong bytes"):
        bench._on_cpu(case.axes, argparse.Namespace(num_slots=64))


def test_missing_peers_say_why():
    case = Case(Axes(8), np, 64, 1)
    for name in ("sglang", "flashinfer", "vllm"):
        with pytest.raises(peers.UnavailableError, match="cannot be imported"):
            getattr(peers, name)(case)


def test_peers_say_why_they_are_not_measured_in_a_format():
    def reason(name, **axes):
        case = Case(dataclasses.replace(Axes(8), **axes), np, 64, 1)
        with pytest.raises(peers.UnavailableError) as refused:
            peers.PEERS[name](case)
        return str(refused.value)

    fp8 = {"format": "float8_e4m3fn", "scale": "tensor"}
    for name in peers.PEERS:
        if name == peers.OURS:
            continue
        assert reason(name, operator="gather") == "only its write is measured"
        if name != "vLLM":
            assert reason(name, **fp8) == "it copies K and V as they are"
    assert reason("vLLM", format="int8", scale="tensor").endswith("has no int8")
    assert reason("vLLM", format="float8_e5m2", scale="head").endswith("with --scale tensor")
    assert "cannot be imported" in reason("vLLM", **fp8)


@pytest.mark.parametrize(
    ("form", "name"), [("copy", "auto"), ("float8_e4m3fn", "fp8"), ("float8_e5m2", "fp8_e5m2")]
)
@pytest.mark.parametrize("layout", ["HND", "NHD"])
def test_what_vllm_is_called_with(monkeypatch, layout, form, name):
    """Its operator gets caches of bytes and float32 scales; here ours takes its place."""
    torch = pytest.importorskip("torch")
    called = []

    def operator(k, v, k_cache, v_cache, slots, kind, k_scale, v_scale):
        called.append(kind)
        assert k_scale.dtype == v_scale.dtype == torch.float32
        more = {}
        if form != "copy":
            assert k_cache.dtype == v_cache.dtype == torch.uint8
            assert k_scale.numel() == v_scale.numel() == 1
            more = {"k_scale": k_scale, "v_scale": v_scale, "k_format": form, "v_format": form}
        peers.pc.paged_caching(k_cache, v_cache, k, v, slots, layout="NHD", **more)

    fakes = {"vllm._custom_ops": SimpleNamespace(reshape_and_cache_flash=operator), "torch": torch}
    monkeypatch.setattr(peers, "_import", fakes.__getitem__)
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device, **more: ones(*shape, **more))
    axes = Axes(50, 2, layout=layout, format=form, scale="" if form == "copy" else "tensor")
    case = Case(axes, np, 64, 1)
    case.clear()
    peers.vllm(case)(0)
    assert called == [name]
    assert case.is_right(0)


@pytest.mark.parametrize(
    "options", [["--tokens", "0"], ["--slots", "sorted"], ["--heads", "x"], ["--format", "fp8"]]
)
def test_options_are_checked(options):
    with pytest.raises(SystemExit) as stopped:
        run(*options)
    assert stopped.value.code == 2


def test_an_unknown_device_gets_one_sentence(capsys):
    assert run("--device", "tpu") == 2
    assert capsys.readouterr().out.count("\n") == 1


class AsCupy:
    """Stands where CuPy stands: arrays of NumPy, and a device that is always ready."""

    class Device:
        attributes: ClassVar = {"L2CacheSize": 1}

        def synchronize(self):
            pass

    cuda = SimpleNamespace(Device=Device, Stream=lambda non_blocking: None)

    def __getattr__(self, name):
        return getattr(np, name)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    class Timed:
        """Stands where a graph stands."""

        median = 2.0

        def __init__(self, write, sets, *_):
            if write.__name__ != "copy":  # which takes addresses of CuPy
                for i in range(sets):
                    write(i)

        def time(self):
            pass

    monkeypatch.setitem(sys.modules, "cupy", AsCupy())
    monkeypatch.setattr(bench, "Graph", Timed)
    monkeypatch.setattr(bench.pc, "Handle", lambda name: SimpleNamespace(device="cuda:0"))
    monkeypatch.setattr(bench, "_machine", lambda handle: {"device": "a fake"})


def refusing(error):
    def prepare(case):
        raise error

    return prepare


PEERS = {
    "pagedcache": peers.pagedcache,
    "Good": peers.pagedcache,
    "Refuses": refusing(ValueError("head_size must be 64\nor 128\nbut is 80")),
    "Fails late": lambda case: refusing(RuntimeError("CUDA error: misaligned address\n\nmore")),
    "Lacks it": refusing(peers.UnavailableError("it has NHD only")),
    "Says nothing": refusing(KeyError()),
    "Wrong": lambda case: lambda i: None,
}
REASONS = {
    "Refuses": "ValueError: head_size must be 64",
    "Fails late": "RuntimeError: CUDA error: misaligned address",
    "Lacks it": "it has NHD only",
    "Says nothing": "KeyError: no reason given",
    "Wrong": "its result is wrong",
}


@pytest.mark.parametrize("own_cache", [(), ("Wrong",)])
def test_a_peer_that_refuses_a_case_gets_one_line(monkeypatch, capsys, as_on_a_gpu, own_cache):
    monkeypatch.setattr(peers, "PEERS", PEERS)
    monkeypatch.setattr(peers, "OWN_CACHE", own_cache)
    options = ["--only-gpu-time", "--num-slots", "64", "--heads", "2", "--head-size", "8"]
    assert run(*options, "--tokens", "8", "16") == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert "Traceback" not in told.out + told.err
    reasons = {name: why for name, why in REASONS.items() if name not in own_cache}
    [head] = [index for index, line in enumerate(lines) if line.lstrip().startswith("tokens ")]
    assert lines[head].split("  ")[-1].strip() == "of best peer"
    for name in PEERS:
        assert (name in lines[head]) is (name not in reasons)
    wanted = [f"  {name} is not measured: {why}" for name, why in reasons.items()]
    assert lines[-len(wanted) :] == wanted
    assert len(lines) == head + 1 + 2 + 1 + len(wanted)  # two sizes and a mean between them


@pytest.mark.parametrize("operator", ["write", "gather"])
@pytest.mark.parametrize("peers_too", [True, False])
def test_our_copy_is_measured_beside_a_format(
    monkeypatch, capsys, as_on_a_gpu, operator, peers_too
):
    made = []

    def ours(case):
        made.append((case.axes.format, case.axes.operator))
        return peers.pagedcache(case)

    def copies(case):  # to caches, or from caches, of the wrong format
        return peers.pagedcache(case.plain)

    monkeypatch.setattr(peers, "PEERS", {"pagedcache": ours, "Good": ours, "Copies": copies})
    options = ["--only-gpu-time", "--num-slots", "64", "--heads", "2", "--head-size", "32"]
    options += ["--format", "int8", "--operator", operator, "--tokens", "8"]
    assert run(*options, *([] if peers_too else ["--no-peers"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert made == [("int8", operator)] * (1 + peers_too)
    [head] = [index for index, line in enumerate(lines) if line.lstrip().startswith("tokens ")]
    wanted = ["memcpy", "pagedcache copy", "pagedcache", *(["Good"] * peers_too)]
    wanted += ["of memcpy rate", "of copy time", *(["of best peer"] * peers_too)]
    assert lines[head].split() == " ".join(["tokens", *wanted]).split()
    assert ("  Copies is not measured: its result is wrong" in lines) is peers_too


def test_our_own_refusal_is_no_line_but_an_error(monkeypatch, as_on_a_gpu):
    ours = {"pagedcache": refusing(ValueError("it is broken"))}
    monkeypatch.setattr(peers, "PEERS", ours)
    with pytest.raises(ValueError, match="it is broken"):
        run("--only-gpu-time", "--num-slots", "64", "--tokens", "8")


def test_ratios_of_the_table(capsys):
    rows = [
        {"tokens": 1, "us": {"memcpy": 3.0, "pagedcache": 2.0, "A": 4.0, "B": 8.0}},
        {"tokens": 64, "us": {"memcpy": 3.0, "pagedcache": 6.0, "B": 3.0}},
    ]
    bench._print_table(rows)
    _, _, one, two, mean = capsys.readouterr().out.splitlines()
    assert one.split() == ["1", "3.00", "2.00", "4.00", "8.00", "1.500", "0.500"]
    assert two.split() == ["64", "3.00", "6.00", "3.00", "0.500", "2.000"]
    assert mean.endswith(": 1.000")
    rows[0]["us"]["pagedcache copy"] = 8.0  # no rival
    bench._print_table(rows, "gather")
    first, _, one, two, _ = capsys.readouterr().out.splitlines()
    assert first == "Time of one gather, us"
    assert one.split() == ["1", "3.00", "2.00", "4.00", "8.00", "8.00", "1.500", "0.250", "0.500"]
    assert two.split() == ["64", "3.00", "6.00", "3.00", "0.500", "2.000"]


def test_every_set_has_its_turn():
    called = []
    took = host_microseconds(called.append, 3, lambda: called.append("drained"), calls=7)
    assert called == ["drained", 0, 1, 2, 0, 1, 2, 0, "drained"]
    assert took > 0


def test_host_times(monkeypatch, capsys):
    """Each competitor in each column; one that refuses is named once, and ours may not refuse."""
    seen = []

    def watched(case):
        def call(i):
            k, v, slots = case.sets[i]
            assert len(k) == len(v) == len(slots)
            seen.append((id(case.k_cache), case.k_cache.shape[1], len(case.sets), len(slots)))

        return call

    monkeypatch.setitem(sys.modules, "cupy", AsCupy())
    monkeypatch.setattr(host, "NUM_SLOTS", 128)
    monkeypatch.setattr(host, "ROUNDS", 1)
    monkeypatch.setattr(host, "_ours", lambda: {"ours": watched})
    monkeypatch.setattr(peers, "PEERS", PEERS)
    times, missing = host.host_times(with_peers=True)
    columns = ["fixed", "two in turn", "1 to 64", "4 caches"]
    assert list(times) == ["ours", "Good", "Wrong"]
    assert all(list(row) == columns for row in times.values())
    assert all(time > 0 for row in times.values() for time in row.values())
    # Only the bench of the GPU looks at what was written.
    assert missing == {name: why for name, why in REASONS.items() if name != "Wrong"}
    by_sets = {}
    for cache, heads, sets, tokens in seen:
        by_sets.setdefault(sets, set()).add((cache, heads, tokens))
    assert {tokens for *_, tokens in by_sets[2]} == {63, 64}
    assert {tokens for *_, tokens in by_sets[64]} == set(range(1, 65))
    assert sorted(heads for _, heads, _ in by_sets[1]) == [4, 4, 8, 8]  # four caches
    assert {tokens for *_, tokens in by_sets[1]} == {64}
    alone, nothing = host.host_times(with_peers=False)
    assert (list(alone), nothing) == (["ours"], {})
    monkeypatch.setattr(host, "_ours", lambda: {"ours": refusing(ValueError("it is broken"))})
    with pytest.raises(ValueError, match="it is broken"):
        host.host_times(with_peers=False)


def test_host_times_are_printed_as_multiples_of_the_best_peer(capsys):
    columns = ("fixed", "two in turn", "1 to 64", "4 caches")
    times = {
        "calculate, CuPy": dict(zip(columns, (2.0, 3.0, 4.0, 5.0), strict=True)),
        "SGLang": dict(zip(columns, (8.0, 8.0, 8.0, 9.0), strict=True)),
        "vLLM": dict(zip(columns, (4.0, 4.0, 4.0, 1.0), strict=True)),
    }
    host.print_host_times(times, {"FlashInfer": "it is not here"})
    lines = capsys.readouterr().out.splitlines()
    numbers = [line.split()[-4:] for line in lines if line.startswith("  calculate, CuPy")]
    assert numbers == [["2.00", "3.00", "4.00", "5.00"], ["0.50", "0.75", "1.00", "1.25"]]
    assert "best peer's 4.00 us" in "\n".join(lines)
    assert lines[-1] == "  FlashInfer is not measured: it is not here"
    host.print_host_times({"calculate, CuPy": times["calculate, CuPy"]}, {})
    assert "multiples" not in capsys.readouterr().out


def test_what_the_host_bench_calls_writes(monkeypatch):
    """All but the C function, which takes addresses of CuPy."""
    pytest.importorskip("torch")
    for name, prepare in host._ours().items():
        if name == "infiniopPagedCaching":
            continue
        case = Case(Axes(8, 2, 16, 16), np, 64, 1)
        case.clear()
        write = prepare(case)
        for i in range(len(case.sets)):
            write(i)
            assert is_stored(case, i) if host.FORMAT in name else case.is_written(i), name


def is_stored(case, i):
    """Return whether 8-bit floats of a set are in the first half of the caches' memory."""
    caches = [
        cache.view(np.uint8).ravel()[: cache.size].reshape(cache.shape)
        for cache in (case.k_cache, case.v_cache)
    ]
    wanted = [cache.copy() for cache in caches]
    formats = {"k_format": host.FORMAT, "v_format": host.FORMAT}
    peers.pc.paged_caching(*wanted, *case.sets[i], **formats, layout="HND")
    return all(map(np.array_equal, wanted, caches)) and all(cache.any() for cache in caches)


def test_fused_needs_a_gpu(capsys):
    assert main(["bench", "--fused", "--device", "cpu"]) == 2
    assert capsys.readouterr().out == "--fused needs a GPU\n"


@pytest.mark.gpu
def test_fused_on_a_gpu(capsys, tmp_path):
    pytest.importorskip("torch")
    file = tmp_path / "fused.json"
    options = ["--tokens", "1", "300", "--num-slots", "4096", "--no-peers", "--json", str(file)]
    assert main(["bench", "--fused", *options]) == 0
    results = json.loads(file.read_text("utf-8"))
    assert set(results["fused"]) == {"rope", "norm", "float8", "gain", "none"}
    for rows in results["fused"].values():
        assert [row["tokens"] for row in rows] == [1, 300]
        assert all(row["us"]["pagedcache"] > 0 for row in rows)
    assert all(each > 0 for each in results["host"].values())
    assert "of memcpy rate" in capsys.readouterr().out
