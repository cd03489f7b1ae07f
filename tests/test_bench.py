# SPDX-License-Identifier: Apache-2.0
"""The bench: what it writes is checked, its numbers add up, and it runs without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest

from pagedcache import bench
from pagedcache.bench import host, peers
from pagedcache.bench.case import Axes, Case
from pagedcache.bench.measure import host_microseconds


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


@pytest.mark.parametrize("options", [["--tokens", "0"], ["--slots", "sorted"], ["--heads", "x"]])
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
            assert case.is_written(i), name
