# SPDX-License-Identifier: Apache-2.0
"""How Sphinx builds the site: ``python3 run.py docs``.

The source of the site is the whole repository, so a relative link holds in the repository and on
the site alike.
"""

import ast
import zlib
from pathlib import Path
from typing import Any

from sphinx.util.nodes import make_refnode

import pagedcache

HERE = Path(__file__).parent
PACKAGE = Path(pagedcache.__file__).parent

project = "pagedcache"
author = "The pagedcache authors"
copyright = author  # noqa: A001 - Sphinx's name
version = release = pagedcache.__version__

root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/0*.ipynb", "ARCHITECTURE.md", "SECURITY.md", "notes/*.md"]
exclude_patterns = [".*", "docs/_*", "tests", "pagedcache", "cuda_src", "dist", "build"]

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_nb",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx_design",
]

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the outputs that the notebooks hold are shown

templates_path = [str(HERE / "_templates")]
default_role = "py:obj"  # `name`
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say more than annotations do
autodoc_mock_imports = ["torch"]  # pagedcache.torch, without PyTorch
numpydoc_show_class_members = False  # the template for classes lists them

plot_include_source = True
plot_html_show_source_link = plot_html_show_formats = False
plot_formats = [("png", 100)]
plot_rcparams = {"savefig.bbox": "tight"}

# Names that no page of ours defines are found in these. Where they cannot be downloaded, an empty
# inventory takes their place, and names of these projects are text without a link.
EMPTY = HERE / "_build" / "empty.inv"
EMPTY.parent.mkdir(exist_ok=True)
EMPTY.write_bytes(
    b"# Sphinx inventory version 2\n# Project: none\n# Version: \n"
    b"# The remainder of this file is compressed using zlib.\n" + zlib.compress(b"")
)
intersphinx_mapping = {
    "numpy": ("https://numpy.org/doc/stable/", (None, str(EMPTY))),
    "cupy": ("https://docs.cupy.dev/en/stable/", (None, str(EMPTY))),
    "torch": ("https://docs.pytorch.org/docs/stable/", (None, str(EMPTY))),
}
intersphinx_timeout = 5
nitpicky = True


def names_of_arguments() -> set[str]:
    """Return the names of all arguments and fields, to which docstrings refer without a link."""
    trees = [ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    arguments = {node.arg for node in nodes if isinstance(node, ast.arg)}
    fields = {
        node.id if isinstance(node, ast.Name) else node.attr
        for parent in nodes
        for node in ast.iter_child_nodes(parent)
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store)
        if isinstance(node, ast.Attribute) or isinstance(parent, ast.AnnAssign)
    }
    return arguments | fields


nitpick_ignore_regex = [
    ("py:.*", r"(numpy|cupy|torch|logging|time|dict|repr|ml_dtypes|jax)(\..*)?"),
    ("py:obj", "|".join(sorted(names_of_arguments()))),
    ("py:obj", "send|fetch|wait"),  # which several classes have
]

html_theme = "pydata_sphinx_theme"
html_title = "pagedcache"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["redirect"]  # from the top of the site to docs/index.html
html_show_sourcelink = html_copy_source = False
ALONE = ("index", "start", "install", "concepts", "notebooks", "speed", "support", "changelog")
html_sidebars: dict[str, list[str]] = {
    f"docs/{page}": [] for page in ALONE
}  # these have no pages of a section beside
html_theme_options = {
    "show_prev_next": False,
    "header_links_before_dropdown": 9,
    "navbar_align": "left",
    "footer_start": ["copyright"],
    "footer_end": ["sphinx-version"],
}


def find_class(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Return a link to what a docstring names without its module or class.

    Fields that stand in a table have no place of their own: the link is to the class then.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    objects = env.domains["py"].objects
    of_class = f"{node.get('py:module')}.{node.get('py:class')}.{target}"
    for name in (of_class, f"pagedcache.{target}"):
        if name in objects:
            place = objects[name]
            return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, text)
    if not target[:1].isupper():
        return None
    for name in (target, target.split(".")[0]):
        found = [
            each for each in objects if each.endswith(f".{name}") and not objects[each].aliased
        ]
        if len(found) == 1:
            place = objects[found[0]]
            return make_refnode(app.builder, node["refdoc"], place.docname, place.node_id, text)
    return None


def hide_constructor(_app: Any, what: str, _name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """Leave out the arguments of a class that users do not make: they are not described."""
    described = "Parameters\n" in (obj.__doc__ or "")
    return ("", "") if what in ("class", "exception") and not described else None


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("missing-reference", find_class)
    app.connect("autodoc-process-signature", hide_constructor)
