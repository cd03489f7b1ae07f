# SPDX-License-Identifier: Apache-2.0
"""Warming up, and the command line of it."""

from __future__ import annotations

import pytest

import pagedcache as pc
from pagedcache.__main__ import main


def test_one_line_for_each_pair_of_types():
    done = pc.warmup("cpu")
    assert [(one.dtype, one.slot_dtype) for one in done] == [
        (dtype, slots)
        for dtype in ("float16", "bfloat16", "float32")
        for slots in ("int64", "int32")
    ]
    assert {one.device for one in done} == {"cpu"}
    assert all(one.seconds > 0 for one in done)
    [only] = pc.warmup("cpu", dtypes=["bfloat16"], slot_dtypes=["int32"])
    assert str(only).startswith("paged_caching bfloat16, int32 slots")
    assert "ready on cpu in 0." in str(only)


def test_compiles_on_the_device_that_is_asked_for(monkeypatch):
    asked = []
    implement = pc.Descriptor._implement
    monkeypatch.setattr(
        pc.Descriptor,
        "_implement",
        lambda self, info, device, report: (
            asked.append((info, device.name)) or implement(info, device, report)
        ),
    )
    pc.warmup("cpu", dtypes=["float32"])
    assert [str(info.slot_dtype) for info, _ in asked] == ["int64", "int32"]
    assert {(str(info.dtype), device) for info, device in asked} == {("float32", "cpu")}


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"device": "tpu"}, ValueError, "tpu"),
        ({"dtypes": ["float64"]}, TypeError, "float64"),
        (
            {"dtypes": ["bfloat17"]},
            TypeError,
            "dtypes must be a dtype or the name of one, got 'bfloat17'",
        ),
        ({"slot_dtypes": ["int16"]}, TypeError, "slot_mapping must be int64 or int32"),
    ],
)
def test_bad_input(options, kind, words):
    with pytest.raises(kind, match=words) as caught:
        pc.warmup(**{"device": "cpu", **options})
    assert isinstance(caught.value, pc.PagedCacheError)


def test_command_line(capsys):
    assert main(["warmup", "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert last == "The CPU compiles nothing."
    assert main(["warmup", "--device", "cpu:3"]) == 1
    captured = capsys.readouterr()
    assert "device must be 'cpu'" in captured.err
    assert captured.out == ""
