# SPDX-License-Identifier: Apache-2.0
"""The bench: what it writes is checked, its numbers add up, and it runs without a GPU."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest

from pagedcache import bench
from pagedcache.bench import peers
from pagedcache.bench.case import Axes, Case


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
