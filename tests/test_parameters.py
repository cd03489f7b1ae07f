# SPDX-License-Identifier: Apache-2.0
"""Structs that are read from CUDA source, and the source itself with what it includes."""

from __future__ import annotations

import ctypes

import pytest

from pagedcache.backend.nvidia import source
from pagedcache.backend.nvidia.parameters import packer, structure
from pagedcache.status import InternalError, Status

GOOD = """
struct Inner {
  unsigned short bits;  // a comment; with a semicolon
};
struct Outer {
  Inner one;
  const char* text;
  long long* const place;
  there::Inner two;
  unsigned int count;
  double size;
};
struct Divides {
  unsigned int by;

  __device__ int divide(int value) const { return value / by; }
};
"""


def test_a_struct_is_laid_out_as_in_c():
    outer = structure(GOOD, "Outer")
    offsets = {name: getattr(outer, name).offset for name, _ in outer._fields_}
    assert offsets == {"one": 0, "text": 8, "place": 16, "two": 24, "count": 28, "size": 32}
    assert ctypes.sizeof(outer) == 40
    made = outer(count=7, size=0.5, text=2**40)
    made.two.bits = 9
    assert (made.count, made.size, made.text, made.two.bits) == (7, 0.5, 2**40, 9)
    assert [name for name, _ in structure(GOOD, "Divides")._fields_] == ["by"]


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("int values[4]", "struct Odd has a member of a kind that is not supported, got int val"),
        ("int one, two", "not supported, got int one, two"),
        ("int one = 1", "not supported, got int one = 1"),
        ("const int& one", "not supported, got const int& one"),
        ("bool one", "struct bool is not declared in the CUDA source"),
        ("Missing one", "struct Missing is not declared in the CUDA source"),
    ],
)
def test_a_member_that_cannot_be_laid_out_is_refused(member, words):
    # Members before and behind it are fine.
    text = f"struct Odd {{\n  int first;\n  {member};\n  int last;\n}};\n"
    with pytest.raises(InternalError) as caught:
        structure(text, "Odd")
    assert words in str(caught.value)
    assert caught.value.status == Status.INTERNAL_ERROR


def test_a_struct_that_is_not_there():
    for name in ("Nowhere", "Inn", "inner"):
        with pytest.raises(InternalError, match=f"struct {name} is not declared"):
            structure(GOOD, name)


def call_of(*members):
    text = "struct Call {\n" + "".join(f"  {member};\n" for member in members) + "};\n"
    text += "struct Parameters {\n  Call call;\n  int more;\n};\n"
    return structure(text, "Parameters")


def test_what_a_call_changes_is_packed_in_its_order():
    kind = call_of("const char* at", "unsigned short half", "int low", "long long rows", "float x",
                   "unsigned int count")  # fmt: skip
    made = kind(more=5)
    packer(kind)(made, 0, 2**63 + 1, 65535, -3, -(2**40), 0.25, 2**32 - 1)
    call = made.call
    assert (call.at, call.half, call.low, call.rows) == (2**63 + 1, 65535, -3, -(2**40))
    assert (call.x, call.count, made.more) == (0.25, 2**32 - 1, 5)


def test_padding_at_the_end_is_refused():
    with pytest.raises(InternalError, match="struct Call has padding that cannot be packed"):
        packer(call_of("long long rows", "int count"))


def test_each_file_is_included_once(tmp_path):
    for name, text in (
        ("main.cuh", '#include "one.cuh"\n#include "two.cuh"\nint main;\n'),
        ("one.cuh", '#include "two.cuh"\nint one;\n'),
        ("two.cuh", '#include "one.cuh"\nint two;\n'),
    ):
        (tmp_path / name).write_text(text)
    assert source.read(tmp_path / "main.cuh") == "int two;\nint one;\nint main;\n"


def test_a_file_beside_it_is_included_rather_than_ours(tmp_path):
    (tmp_path / "mine.cuh").write_text('#include "common.cuh"\nint mine;\n')
    ours = (source.folder() / "common.cuh").read_text("utf-8")
    assert source.read(tmp_path / "mine.cuh") == f"{ours}int mine;\n"
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "mine.cuh").write_text('#include "common.cuh"\nint mine;\n')
    (beside / "common.cuh").write_text("int theirs;\n")
    assert source.read(beside / "mine.cuh") == "int theirs;\nint mine;\n"


def test_an_installation_without_source(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "_PLACES", (tmp_path / "a", tmp_path / "b"))
    with pytest.raises(InternalError, match=r"cuda_src must be at .*a or .*b; reinstall"):
        source.folder()
