# SPDX-License-Identifier: Apache-2.0
"""What a release is made of: one version everywhere, workflows and templates that hold."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pagedcache as pc

CHECKOUT = Path(__file__).parents[1]
yaml = pytest.importorskip("yaml")
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "pyproject.toml").exists(), reason="there is no checkout here"
)

WORKFLOWS = sorted(path.name for path in CHECKOUT.glob(".github/workflows/*.yml"))
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def read(path):
    return (CHECKOUT / path).read_text("utf-8")


def load(path):
    return yaml.safe_load(read(path))


def jobs_of(name):
    return load(f".github/workflows/{name}")["jobs"]


def test_one_version():
    newest, date = re.search(r"^## (\S+) - (\S+)$", read("CHANGELOG.md"), re.MULTILINE).groups()
    citation = load("CITATION.cff")
    assert newest == citation["version"] == pc.__version__
    assert date == citation["date-released"]


def test_the_pythons_that_are_supported():
    described = read("pyproject.toml")
    assert f'requires-python = ">={PYTHONS[0]}"' in described
    assert tuple(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', described)) == PYTHONS
    matrix = jobs_of("test.yml")["pythons"]["strategy"]["matrix"]
    assert tuple(matrix["python"]) == PYTHONS
    assert f"{PYTHONS[0]} to {PYTHONS[-1]}" in read("docs/support.md")


def test_citation():
    citation = load("CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= citation.keys()
    assert f'license = "{citation["license"]}"' in read("pyproject.toml")
    assert f"Copyright 2026 {citation['authors'][0]['name']}\n" in read("NOTICE")


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows(name):
    """They call what exists, take little, and name versions of the actions that they use."""
    workflow = load(f".github/workflows/{name}")
    assert workflow["permissions"] == {"contents": "read"}  # jobs say what else they need
    assert True in workflow  # "on", which YAML reads as a truth value
    commands = read("run.py")
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 45
        for step in job["steps"]:
            if "uses" in step:
                assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|release/v\d+)", step["uses"])
                continue
            words = shlex.split(step["run"])
            if words[:2] == ["python3", "run.py"]:
                assert f'command == "{words[2]}"' in commands
                assert all((CHECKOUT / path).exists() for path in words[3:])
            elif "/" in words[0]:
                assert (CHECKOUT / words[0]).stat().st_mode & 0o100


def test_there_are_workflows():
    assert WORKFLOWS == ["docs.yml", "publish.yml", "test.yml"]


def test_publishing_needs_no_password():
    jobs = jobs_of("publish.yml")
    assert "permissions" not in jobs["build"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert jobs["publish"]["needs"] == "build"
    assert jobs["publish"]["steps"][-1] == {
        "uses": "pypa/gh-action-pypi-publish@release/v1",
        "with": {"attestations": True},
    }
    assert "secrets." not in read(".github/workflows/publish.yml")


@pytest.mark.parametrize("name", ["bug", "idea", "run"])
def test_issue_templates(name):
    template = load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= template.keys()
    [about] = [field for field in template["body"] if field["id"] == "about"]
    assert about["attributes"]["label"] == "Output of `python -m pagedcache`"
    required = about.get("validations", {}).get("required", False)
    assert required is (name != "idea")


IMPORT = """
import sys
def refuse(event, arguments):
    if event.startswith(("socket.", "urllib.", "http.client.", "subprocess.")) or (
        event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    ):
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(refuse)
import pagedcache, pagedcache.compat.vllm, pagedcache.demo, pagedcache.plot, pagedcache.bench
loaded = [name for name in ("cupy", "torch", "jax", "gguf") if name in sys.modules]
assert not loaded, loaded
"""


def test_an_import_opens_no_connection_and_writes_no_file():
    pytest.importorskip("matplotlib")
    import matplotlib.pyplot  # noqa: F401 - it writes a list of fonts the first time

    done = subprocess.run(
        [sys.executable, "-B", "-c", IMPORT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
