# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and each has the same cells as its .py."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagedcache.demo import model

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("0*.py"))]
SECONDS = 300  # a cell; the model's are the long ones, and CI machines are slow


def test_all_are_here():
    names = ["01_quickstart", "02_layouts", "03_smollm2", "04_speed", "07_pool_and_cache"]
    assert names == NAMES
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_those_of_the_script(name):
    script, notebook = (jupytext.read(NOTEBOOKS / f"{name}{end}") for end in (".py", ".ipynb"))
    pairs = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (script, notebook)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("name", NAMES)
def test_runs(name):
    if name == "03_smollm2":
        try:
            model.require_readers()
            model.find_model()
        except model.NoModelError as error:
            pytest.skip(f"no model: {error}")
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=resources).execute()
