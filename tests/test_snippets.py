# SPDX-License-Identifier: Apache-2.0
"""The code on every page of docs/ and in README.md runs, and links lead somewhere.

Blocks of Python run in order, those of a page in one namespace and in a folder of its own. Without
a GPU, ``import cupy as cp`` becomes ``import numpy as cp``. Blocks with ``>>>`` are doctests. A
comment on the line before a block says what it needs, besides the package and NumPy:

    <!-- needs: gpu, torch -->

Where a module is missing, such a block is compiled and not run. Blocks that need a GPU are run
by a test of their own. Commands of shells are parsed, and the files that they name must exist.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import importlib.util
import itertools
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

import pagedcache as pc
from pagedcache import __main__ as command_line

markdown_it = pytest.importorskip("markdown_it")

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
IDS = [path.relative_to(ROOT).as_posix() for path in PAGES]
ELSEWHERE = {
    "docs/howto/ideas_from_papers.md": "test_recipes.py",
    "docs/howto/recipes.md": "test_recipes.py",  # each section for itself, with what it writes
    "docs/howto/two_hosts.md": "test_transfer.py",  # in two processes
}
LINKING = [
    *PAGES,
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("notes/*.md")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]
PYTHON, SHELL = ("python", "pycon", "py"), ("sh", "bash", "shell", "console")
KNOWN = {"gpu", "jax", "matplotlib", "numba", "torch"}
NEEDS = re.compile(r"<!-- needs: ([\w, ]+) -->")
DIRECTIVE = re.compile(r"\{([\w-]+)\} *(\S*)")
HAS_GPU = pc.backends()["cuda"].usable


@dataclass(frozen=True)
class Block:
    """Code on a page, the line that it begins at, and what it needs."""

    language: str
    code: str
    line: int
    needs: frozenset[str]

    @property
    def is_python(self):
        return self.language in PYTHON

    @property
    def is_doctest(self):
        return self.is_python and re.search(r"^>>> ", self.code, re.MULTILINE) is not None


def tokens_of(text):
    return markdown_it.MarkdownIt("commonmark").enable("table").parse(text)


def blocks_of(text, first=0):
    """Return the blocks of code on a page, also those inside of directives."""
    found, needs = [], frozenset()
    for token in tokens_of(text):
        if token.type == "html_block" and (named := NEEDS.search(token.content)):
            needs = frozenset(re.findall(r"\w+", named[1]))
            continue
        if token.type == "fence":
            line = first + token.map[0] + 1
            directive = DIRECTIVE.match(token.info)
            if directive and directive[1] in ("code-block", "code"):
                code = re.sub(r"\A(:\w.*\n)+\n?", "", token.content)
                found.append(Block(directive[2], code, line, needs))
            elif directive:
                found += blocks_of(token.content, line)
            else:
                found.append(Block(token.info.split(" ")[0], token.content, line, needs))
        needs = frozenset()
    return found


@functools.cache
def page(path):
    return blocks_of(path.read_text("utf-8"))


def run(path, names, block):
    """Run a block, or raise what is wrong with it."""
    code = block.code
    if not HAS_GPU:
        code = code.replace("import cupy as cp", "import numpy as cp")
    if not block.is_doctest:
        exec(compile("\n" * block.line + code, str(path), "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(code, names, path.name, str(path), block.line)
    told = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    runner.run(test, out=told.append, clear_globs=False)
    names.update(test.globs)
    assert not told, "".join(told)


def compile_only(path, block):
    codes = [block.code]
    if block.is_doctest:
        codes = [each.source for each in doctest.DocTestParser().get_examples(block.code)]
    for code in codes:
        compile(code, f"{path}, line {block.line}", "exec")


def run_page(path, without=()):
    """Run the blocks that need nothing of `without`; return what was missing for the others."""
    names, missing = {"__name__": "__main__"}, set()
    for block in page(path):
        if not block.is_python:
            continue
        assert block.needs <= KNOWN
        modules = block.needs - {"gpu"}
        lacking = {name for name in modules if importlib.util.find_spec(name) is None}
        if lacking or block.needs & set(without):
            compile_only(path, block)
            missing |= lacking
        else:
            run(path, names, block)
    return missing


@pytest.fixture
def _apart(tmp_path, monkeypatch):
    """A folder to write to, and a compiler of PyTorch's that needs none of C++."""
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("torch") is not None:
        torch = importlib.import_module("torch")
        # What inductor makes of these operators is tested in test_torch_programs.py.
        quick = functools.partial(torch.compile, backend="aot_eager")
        monkeypatch.setattr(torch, "compile", quick)


def pages_where(true):
    return [
        pytest.param(path, id=name)
        for path, name in zip(PAGES, IDS, strict=True)
        if any(true(block) for block in page(path))
    ]


def pages_here(true):
    """Return those whose Python no other test runs."""
    return [each for each in pages_where(true) if each.id not in ELSEWHERE]


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("path", pages_here(lambda block: block.is_python))
def test_python_runs(path):
    if missing := run_page(path, without=["gpu"]):
        pytest.skip(f"all but the blocks that need {', '.join(sorted(missing))} ran")


@pytest.mark.gpu
@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("path", pages_here(lambda block: "gpu" in block.needs))
def test_python_runs_on_a_gpu(path):
    pytest.importorskip("cupy")
    if missing := run_page(path):
        pytest.skip(f"all but the blocks that need {', '.join(sorted(missing))} ran")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_runs_elsewhere_is_read_there(name):
    tree = ast.parse((ROOT / "tests" / ELSEWHERE[name]).read_text("utf-8"))
    constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    assert Path(name).name in constants  # a string of its own, not a word in a comment
    for block in page(ROOT / name):
        if block.is_python:
            compile_only(ROOT / name, block)


# Commands


def commands(path):
    """Return the commands of a page's shell blocks, as words."""
    for block in page(path):
        if block.language in SHELL:
            for line in block.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                parts = [[]]
                for word in words:
                    if word in ("&&", ";", "|"):
                        parts.append([])
                    else:
                        parts[-1].append(word)
                yield from filter(None, parts)


def extras():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    table = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return re.findall(r"^([\w-]+) = \[", table, re.MULTILINE)


def parse_command(words, monkeypatch):
    """Let the command line parse its arguments, and do nothing."""
    nothing = lambda *_: 0  # noqa: E731
    monkeypatch.setattr(command_line, "about", nothing)
    monkeypatch.setattr(command_line, "warm_up", nothing)
    monkeypatch.setattr(command_line.demo, "run", nothing)
    monkeypatch.setattr(command_line.bench, "run", nothing)
    assert command_line.main(words) == 0


def own_commands():
    """Return what run.py does itself, and does not pass on."""
    return re.findall(r'command == "(\w+)"', (ROOT / "run.py").read_text("utf-8"))


def check_files(path, words):
    """Files that a command names are in the checkout, or the page tells how they come to be."""
    text = path.read_text("utf-8")
    for word in words:
        is_file = "/" in word or re.search(r"\.(py|ipynb|md|txt|json|toml)$", word)
        if not is_file or word.startswith((".venv/", "http", "-", "/", "~")):
            continue
        made_here = f"`{word}`" in text
        assert made_here or any(ROOT.glob(word)), f"{path.name}: there is no {word}"


@pytest.mark.parametrize("path", pages_where(lambda block: block.language in SHELL))
def test_commands_exist(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in commands(path):
        names = [*itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words)]
        if names[1:3] == ["-m", "pagedcache"]:
            parse_command(names[3:], monkeypatch)
        elif names[1:2] == ["run.py"]:
            if names[2] not in own_commands():
                parse_command(names[2:], monkeypatch)
        elif names[:2] == ["pip", "install"]:
            for word in names[2:]:
                asked = re.fullmatch(r"(?:\.|pagedcache)\[([\w,-]+)\]", word)
                assert not asked or {*asked[1].split(",")} <= {*extras()}, word
        else:
            check_files(path, names[1:])


# Links


def text_of(path):
    """Return the text of a page, of a notebook that of its cells with text."""
    if path.suffix != ".ipynb":
        return path.read_text("utf-8")
    cells = json.loads(path.read_text("utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return "\n\n".join(texts)


def links_of(text):
    """Return the targets of links and pictures, also of those inside of directives."""
    for token in tokens_of(text):
        if token.type == "fence" and (directive := DIRECTIVE.match(token.info)):
            if directive[1] in ("image", "figure", "include", "literalinclude"):
                yield directive[2]
            elif directive[1] not in ("code-block", "code", "toctree"):
                yield from links_of(token.content)
        for each in token.children or ():
            if each.type in ("link_open", "image"):
                yield str(each.attrs.get("href") or each.attrs["src"])


@functools.cache
def anchors(path):
    """Return what links may name on a page: its headings, as GitHub and MyST call them."""
    found, text = set(), text_of(path)
    tokens = tokens_of(text)
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            title = "".join(each.content for each in inline.children)
            slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            numbered = (f"{slug}-{i}" if i else slug for i in itertools.count())
            found.add(next(each for each in numbered if each not in found))
    found.update(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE))
    return found


@pytest.mark.parametrize(
    "path", dict.fromkeys(LINKING), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_links_lead_somewhere(path):
    broken = []
    for link in links_of(text_of(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        named = anchor and target.suffix in (".md", ".ipynb") and target.exists()
        if not target.exists() or (named and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize(
    "path", [*PAGES, ROOT / "ARCHITECTURE.md"], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_pages_take_ten_minutes_at_most(path):
    """Which are 2,000 words."""
    code = sum(len(block.code.split()) for block in page(path))
    assert len(path.read_text("utf-8").split()) - code <= 2000


# What finds what is wrong on a page


def test_blocks_are_found():
    text = (
        "<!-- needs: gpu, torch -->\n```python\na = 1\n```\n\n```python\nb = 2\n```\n"
        "````{tab-item} X\n```sh\nls\n```\n````\n"
        "```{code-block} python\n:caption: y\n\nc = 3\n```\n"
    )
    found = blocks_of(text)
    assert [(each.language, each.code, each.line) for each in found] == [
        ("python", "a = 1\n", 2),
        ("python", "b = 2\n", 6),
        ("sh", "ls\n", 10),
        ("python", "c = 3\n", 14),
    ]
    assert [each.needs for each in found] == [{"gpu", "torch"}, set(), set(), set()]


def test_what_is_wrong_is_found(tmp_path):
    names = {}
    run(tmp_path, names, Block("python", "x = 3\n", 1, frozenset()))
    run(tmp_path, names, Block("pycon", ">>> y = x + 1\n>>> y\n4\n", 1, frozenset()))
    assert names["y"] == 4
    with pytest.raises(AssertionError, match=r"Got:\s+4"):
        run(tmp_path, names, Block("pycon", ">>> y\n5\n", 1, frozenset()))
    with pytest.raises(SyntaxError):
        compile_only(tmp_path, Block("pycon", ">>> y =\n5\n", 1, frozenset()))


def test_headings_are_found(tmp_path):
    (tmp_path / "a.md").write_text(
        "# When `x` is wrong\n\n## On a GPU, fast\n\n(here)=\n## B\n\n## B\n"
    )
    assert anchors(tmp_path / "a.md") == {
        "when-x-is-wrong", "on-a-gpu-fast", "here", "b", "b-1",
    }  # fmt: skip
    assert [*links_of("[a](b.md#c) ![d](e.png)\n```{note}\n[f](g)\n```\n")] == [
        "b.md#c",
        "e.png",
        "g",
    ]
