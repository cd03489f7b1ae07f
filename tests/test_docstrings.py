# SPDX-License-Identifier: Apache-2.0
"""The examples of all docstrings run as they are shown."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import pagedcache as pc

PACKAGE = Path(pc.__file__).parent
# The examples of `pagedcache.torch` need PyTorch, and are run by its tests.
FILES = sorted(
    path.relative_to(PACKAGE.parent).with_suffix("")
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text("utf-8") and path != PACKAGE / "torch.py"
)


def test_there_are_examples():
    assert len(FILES) >= 8


@pytest.mark.parametrize("name", [".".join(path.parts) for path in FILES])
def test_examples(name):
    found = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert found.attempted
    assert found.failed == 0
