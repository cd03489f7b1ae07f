# SPDX-License-Identifier: Apache-2.0
"""The reference is complete, and the pictures are those that their script draws."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest

from pagedcache import __main__ as command_line

DOCS = Path(__file__).parents[1] / "docs"
REFERENCE = DOCS / "reference"
MODULES = (  # users have a name from the first that has it
    "pagedcache",
    "pagedcache.pool",
    "pagedcache.transfer",
    "pagedcache.compat.flashinfer",
    "pagedcache.compat.sglang",
    "pagedcache.compat.vllm",
    "pagedcache.infiniop",
    "pagedcache.plot",
    "pagedcache.status",
)
TORCH = {f"pagedcache.torch.{name}" for name in ("operator", "paged_caching", "paged_gather")}
HELPERS = {"pagedcache.status.as_int", "pagedcache.status.shown"}
# How the lists of the reference are written: autosummary's items and directives.
ITEM = re.compile(r"   (?P<item>pagedcache[\w.]*)$")
DIRECTIVE = re.compile(r"\.\. (?P<kind>auto\w+|py:function|currentmodule):: (?P<name>[\w.]+)")


def site_pages():
    """Return the pages of text; notebooks are for running."""
    parts = ("docs", "notes")
    found = [path for part in parts for path in (DOCS.parent / part).rglob("*.md")]
    named = [path.relative_to(DOCS.parent).as_posix() for path in found]
    return {"ARCHITECTURE.md", "SECURITY.md", *named} - {
        each for each in named if each.startswith("docs/_build")
    }


WORDS = 2300  # that are read in ten minutes, code included


@pytest.mark.parametrize("page", sorted(site_pages()))
def test_no_page_takes_more_than_ten_minutes(page):
    assert len((DOCS.parent / page).read_text("utf-8").split()) <= WORDS


def public_names():
    """Return the public names, each with the module that users have it from."""
    found = {}
    for module in map(importlib.import_module, MODULES):
        defined = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
            if inspect.isclass(value) or inspect.isfunction(value)
        ]
        for name in getattr(module, "__all__", defined):
            value = getattr(module, name)
            found.setdefault(id(value), f"{module.__name__}.{name}")
    return set(found.values()) - HELPERS | TORCH


def documented_names():
    """Return the names on all pages of the reference, with how often each is there."""
    found = Counter()
    for page in REFERENCE.glob("*.md"):
        module = ""
        for line in page.read_text("utf-8").splitlines():
            if item := ITEM.match(line):
                found[item["item"]] += 1
            elif directive := DIRECTIVE.match(line):
                name = directive["name"]
                if directive["kind"] == "currentmodule":
                    module = name
                elif directive["kind"] != "autosummary":
                    inside = name.startswith("pagedcache")
                    found[name if inside else f"{module}.{name}"] += 1
    return found


def test_every_public_name_is_in_the_reference_once():
    public, documented = public_names(), documented_names()
    assert len(public) > 100
    assert sorted(public - set(documented)) == []
    assert [name for name, times in documented.items() if times > 1] == []


def test_nothing_else_is_in_the_reference():
    # Backends of other packages are written against the protocol.
    others = {name for name in documented_names() if ".backend.protocol" not in name}
    assert others - public_names() == {"pagedcache.torch"}


@pytest.mark.parametrize("command", ["about", "warmup", "demo", "bench"])
def test_every_option_is_in_the_reference(command, capsys):
    with pytest.raises(SystemExit):
        command_line.main([command, "--help"])
    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    page = (REFERENCE / "command_line.md").read_text("utf-8")
    (section,) = re.findall(rf"^## {command}\n(.*?)(?=^## )", page, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)
    assert set(re.findall(r"`(--[a-z-]+)", " ".join(cells))) == options


def test_pictures_are_as_they_are_drawn():
    drawn = runpy.run_path(str(DOCS / "pictures.py"))["draw"]()
    assert drawn == {path.name: path.read_text("utf-8") for path in DOCS.glob("_static/*.svg")}
