# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom, and what they show is right; each is as its .py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pagedcache as pc
from pagedcache.demo import model

matplotlib = pytest.importorskip("matplotlib")
jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = [path.stem for path in sorted(NOTEBOOKS.glob("0*.py"))]
INSTALL = (
    "# In Colab or Kaggle, take the # away from the next line; elsewhere the\n"
    "# package is installed already.\n"
    '# %pip install -q "pagedcache[notebook,cuda12]"'
)
SECONDS = 300  # a cell; the model's are the long ones, and CI machines are slow


def test_all_are_here():
    names = ["01_quickstart", "02_layouts", "03_smollm2", "04_speed", "05_formats"]
    names += ["06_program_the_write", "07_pool_and_cache"]
    assert names == NAMES
    assert [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_those_of_the_script(name):
    script, notebook = (jupytext.read(NOTEBOOKS / f"{name}{end}") for end in (".py", ".ipynb"))
    pairs = [[(cell.cell_type, cell.source) for cell in one.cells] for one in (script, notebook)]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize("name", NAMES)
def test_installs_in_one_cell(name):
    """The title is followed by what to do in Colab or Kaggle, which must not run elsewhere."""
    title, install, *others = jupytext.read(NOTEBOOKS / f"{name}.ipynb").cells
    words = "# \\d\\. .+\n\n> \\*\\*Colab or Kaggle\\*\\*: run this cell first"
    assert re.fullmatch(words + "(\\.|, and upload [^#]+\\.)", title.source)
    assert (install.cell_type, install.source) == ("code", INSTALL)
    of_model = ["smollm2.py", "smollm2.cu"]
    needed = {"03_smollm2": of_model, "04_speed": ["h200.json"], "05_formats": of_model}
    for file in needed.get(name, []):
        assert file in title.source
    assert not any("%pip" in cell.source for cell in others)


def test_numbers_of_04_are_those_of_the_notes():
    notes = (NOTEBOOKS.parent / "notes" / "writes.md").read_text("utf-8")
    numbers = re.search(r"launch, wait first \|.*\| ([\d. /]+) \| ([\d. /]+) \|", notes).groups()
    script = (NOTEBOOKS / "04_speed.py").read_text("utf-8")
    for name, row in zip(("without", "with"), numbers, strict=True):
        assert f"# | {name} | {row.replace(' / ', ' | ')} |" in script


def test_numbers_of_03_are_those_of_the_notes():
    notes = (NOTEBOOKS.parent / "notes" / "performance.md").read_text("utf-8")
    script = (NOTEBOOKS / "03_smollm2.py").read_text("utf-8")
    notes, script = (
        re.sub(r"\s+(# )?", " ", text) for text in (notes.partition("## A whole model")[2], script)
    )
    numbers = ("2,906", "942", "1,708", "275", "4.6 us", "1.27 ms", "0.13 ms")
    assert all(number in notes and number in script for number in numbers)


def test_numbers_of_05_are_of_the_real_model():
    cells = nbformat.read(NOTEBOOKS / "05_formats.ipynb", 4).cells
    shown = "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))
    assert "30 layers" in shown
    assert "made-up" not in shown


# Run after the last cell. What is checked here is what the text of the notebook says.
CHECKS = {
    "01_quickstart": """
def host(array):
    return array if xp is numpy else array.get()

assert (a.block_table[0], pool.num_free) == (b.block_table[0], 16 - 4)
assert b.num_cached_tokens == 4
k, v, k_cache, v_cache = map(host, (k, v, k_cache, v_cache))
for cache, rows, of_b in ((k_cache, k, k_of_b), (v_cache, v, v_of_b)):
    assert (cache[a.block_table].transpose(0, 2, 1, 3).reshape(-1, 2, 16)[:10] == rows[:10]).all()
    assert (host(of_b) == rows[[0, 1, 2, 3, 10, 11, 12]]).all()
    assert numpy.count_nonzero(cache) == numpy.count_nonzero(rows)  # nothing else was written
""",
    "02_layouts": """
errors = dict(zip(CHOICES, (both for both, _ in results)))
sizes = dict(zip(CHOICES, (size for _, size in results)))
eight = [choice for choice in CHOICES if sizes[choice] < 2 and choice[0] != "int4"]
for i in (0, 1):
    assert min(eight, key=lambda choice: errors[choice][i]) == ("int8", "row")
    assert errors["int4", "group of 32"][i] < errors["int4", "row"][i]
    assert errors["bfloat16", None][i] < 0.5
for choice in CHOICES:  # whether K is as precise as V
    in_k, in_v = errors[choice]
    assert in_k < 1.05 * in_v if "float" in choice[0] else in_k > 1.5 * in_v
    if choice[0] == "int4":
        assert sizes[choice] < sizes["bfloat16", None] / 3
""",
    "03_smollm2": """
assert (len(model.layers), model.heads, model.kv_heads, model.head_size) == (30, 9, 3, 64)
assert common >= 2 * BLOCK_SIZE
assert all(0 < len(request.generated) <= NEW_TOKENS for request in requests)
assert all(request.found == common // BLOCK_SIZE * BLOCK_SIZE for request in requests[1:])
assert dense == requests[3].generated and same
at_a_time = [len(tables) for tables in history]
assert max(at_a_time) == 3 < together == len(prompts)
assert NUM_BLOCKS == 2 + 3 * (engine._blocks(requests[0]) - 2)  # room for three, and 2 are shared
assert at_a_time[-1] == 0 and engine.cache.pool.num_free == NUM_BLOCKS
assert engine.cache.block_bytes == 2 * 30 * BLOCK_SIZE * 3 * 64 * 4  # K and V, layers, ..., float32
assert engine.peak == roomy.peak == 12 and paged_bytes < 0.6 * dense_bytes < full_bytes
assert [one.ids for one in roomy_requests] == [one.ids for one in requests]
assert 0.8 * steps < roomy_steps < steps
if on_gpu:
    assert [one.ids for one in eager_requests] == [one.ids for one in requests]
""",
    "04_speed": """
rows = here["gpu"][0]["rows"]
assert [row["tokens"] for row in rows] == TOKENS
ours = rates(rows, "pagedcache")
assert ours[-1] > 2 * ours[0]  # few tokens never reach the rate of many
first, *_, last = recorded["cold"]
assert (round(first["us"]["pagedcache"], 1), round(first["us"]["memcpy"], 1)) == (0.7, 2.0)
large = last["us"]
assert 0.95 < large["memcpy"] / large["pagedcache"] < 0.96
assert round(large["vLLM"] / large["memcpy"], 1) == 3.8
for row in recorded["cold"]:  # no peer is ahead by more than two runs differ
    us = row["us"]
    assert us["pagedcache"] < 1.01 * min(us[name] for name in STYLES if name != "memcpy")
copy, *others = (us["pagedcache"] for us in stored.values())
assert len(others) == 4 and all(us < 0.75 * copy for us in others)
for name, row in h200["host"].items():
    assert max(row.values()) < 20 if name not in SLOW else min(row.values()) > 20
of_call, of_write = times_of(h200, recorded["cold"])
assert of_call > 3 * of_write
calculate = h200["host"]["calculate, CuPy"].values()
assert (round(min(calculate), 1), round(max(calculate), 1)) == (7.3, 9.6)
with_torch = h200["host"]["calculate, torch"]
assert max(with_torch, key=with_torch.get) == "fixed"
assert (target == sources[-1]).all()  # what was timed really happened
if on_gpu:
    assert queued < finished
""",
    "05_formats": """
assert sorted(host(slots).tolist()) == list(range(len(ids)))
assert all(numpy.isfinite(each).all() for each in losses.values())
row = 2 * len(model.layers) * model.kv_heads * model.head_size  # elements of a token
assert (size["bfloat16"], size["float8_e5m2"]) == (2 * row, row)
assert size["int8, token"] == row + row / 16 and size["int4, 16 dimensions"] == row / 2 + row / 4
assert size["K int8, V int4"] == (size["int8, token"] + size["int4, 32 dimensions"]) / 2
for name in KINDS:  # V of the first layer is made of the tokens, so it is the same with any K
    _, k_pages, v_pages = read(ids, KINDS[name], COPY)
    assert (v_pages[0] == v_exact[0]).all() and k_pages.dtype != k_exact.dtype
    assert not numpy.array_equal(losses[name, "K"], exact)
assert abs(increase("bfloat16", "both")[0]) < 1
assert abs(increase("int8, token", "both")[0]) < 5
if isinstance(source, ModelFile):
    cost = {name: increase(name, "K")[0] for name, side in losses if side == "K"}
    assert cost["int4, token"] > 5 * increase("int4, token", "V")[0]
    assert cost["int4, a channel (known)"] < cost["int4, 16 dimensions"] < cost["int4, token"]
    assert cost["int4, token"] < cost["int4, a head (known)"]
    assert cost["int4, token, Hadamard"] < cost["int4, token"] / 2
""",
    "06_program_the_write": """
assert error(turned[0], k) < error(as_it_is[0], k) / 2
published = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0]
published += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]
numpy.testing.assert_allclose(level, published, atol=1e-4)
nearest = abs(relative[..., None] - level).argmin(-1)
stored = host(trips["NF4"][1]).reshape(-1, 32) / abs(groups).max(-1, keepdims=True)
assert numpy.isclose(stored, level[nearest], atol=1e-6).mean() > 0.9999  # some are near an edge
for side, numbers in enumerate((k, v)):
    assert error(trips["NF4"][side], numbers) < error(trips["int4"][side], numbers)
numpy.testing.assert_allclose(host(k_out), wanted, atol=1e-4)
numpy.testing.assert_allclose(host(q_out), rotated(normalised(q)), atol=1e-4)
assert (abs(products[middle] - 1) < 1e-5).all() and products.max() < 1 + 1e-5
assert min(times.values()) == times["copy"]
""",
    "07_pool_and_cache": """
assert server.num_intact == without.num_intact == 60
assert server.offloaded_at and without.step > server.step
assert without.num_computed > server.num_computed
assert evicted == [(4, 3), (2, 1, 0)]  # the blocks of B, then those of A; the last ones first
assert intact(cache, sky) and c.num_tokens == 48
assert set(was) & set(sky.block_table) == {0, 1, 2, 3}
assert sky.block_table == other_blocks[:-6:-1]  # the last blocks of the other went first
""",
}


def solutions_of(notebook):
    """Return what is folded in the last cell: code, and the text after it with what it prints."""
    last = notebook.cells[-1].source
    return re.findall(r"<details>.*?```python\n(.*?)```\n(.*?)</details>", last, re.DOTALL)


def test_solutions_of_06_print_what_it_says():
    notebook = jupytext.read(NOTEBOOKS / "06_program_the_write.py")
    solutions = solutions_of(notebook)
    assert len(solutions) == 3
    # No drawing, and nothing is timed.
    end = next(i for i, cell in enumerate(notebook.cells) if "## How fast?" in cell.source)
    cells = [
        cell for cell in notebook.cells[:end] if "hide-input" not in cell.metadata.get("tags", [])
    ]
    cells += [nbformat.v4.new_code_cell(code) for code, _ in solutions]
    notebook.cells = cells
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=resources).execute()
    for cell, (_, said) in zip(cells[-3:], solutions, strict=True):
        printed = "".join(output.get("text", "") for output in cell.outputs)
        numbers = re.findall(r"[\d.]*\d", printed)
        assert numbers
        assert numbers == re.findall(r"[\d.]*\d", said)[: len(numbers)]


@pytest.mark.parametrize("name", NAMES)
def test_runs(name, monkeypatch, tmp_path):
    if name == "03_smollm2":
        try:
            model.require_readers()
            model.find_model()
        except model.NoModelError as error:
            pytest.skip(f"no model: {error}")
    if name == "05_formats" and not pc.backends()["cuda"].usable:
        # Takes minutes with a model. Without one and a network it makes one up, and takes seconds.
        monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # its list of fonts
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("PIP_NO_INDEX", "1")
    notebook = jupytext.read(NOTEBOOKS / f"{name}.py")
    if name in CHECKS:
        notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[name]))
    resources = {"metadata": {"path": str(NOTEBOOKS)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=resources).execute()
