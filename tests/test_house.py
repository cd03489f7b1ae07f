# SPDX-License-Identifier: Apache-2.0
"""The order of the house (see ARCHITECTURE.md), and what every file begins with."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import pagedcache as pc

PACKAGE = Path(pc.__file__).parent
CHECKOUT = Path(__file__).parents[1]
# From the ground up; each imports those of its own floor and below.
FLOORS = (
    {"status", "locks", "display", "environment", "dtypes", "tensors", "rules"},
    {"pool"},
    {"arrays"},
    {"backend"},
    {"expressions"},
    {"cache"},
    {"steps"},
    {"operators"},
    {"host_blocks"},
    {"infiniop", "compat", "torch", "kv_cache"},
    {"transfer"},
    {"__init__"},
    {"demo", "bench", "plot", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(path):
    """Yield the top-level names of this package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            package, _, rest = module.partition(".")
            if package == "pagedcache":
                room = rest.split(".")[0]
                yield room if room in FLOOR_OF else "__init__"


def test_imports_go_down():
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        seen.add(room)
        for other in imported_rooms(path):
            assert FLOOR_OF[other] <= FLOOR_OF[room], f"{path} imports {other}, which is above it"
    assert seen == set(FLOOR_OF)


def test_architecture_has_the_same_order():
    if not (CHECKOUT / "ARCHITECTURE.md").exists():
        pytest.skip("there is no checkout here")
    page = (CHECKOUT / "ARCHITECTURE.md").read_text("utf-8")
    house = page.partition("\npagedcache/\n")[2].partition("\ncuda_src/\n")[0]
    lines = re.findall(r"^  (?! )(.*)", house, re.MULTILINE)
    rooms = [room for line in lines for room in re.findall(r"(\w+)(?:/|\.py)(?=  )", line)]
    assert sorted(rooms) == sorted(FLOOR_OF)
    floors = [FLOOR_OF[room] for room in rooms]
    assert floors == sorted(floors, reverse=True)


def test_every_source_file_names_its_licence():
    if not (CHECKOUT / "pyproject.toml").exists():
        pytest.skip("there is no checkout here")
    folders = ("pagedcache", "cuda_src", "tests", "docs")
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*")]
    files = [path for path in files if path.suffix in (".py", ".cuh", ".h")]
    files = [path for path in files if "_build" not in path.parts]
    assert len(files) > 90
    for path in [*files, CHECKOUT / "run.py"]:
        first = path.read_text("utf-8").split("\n", 1)[0]
        assert first.endswith("SPDX-License-Identifier: Apache-2.0"), path
