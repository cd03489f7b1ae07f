# SPDX-License-Identifier: Apache-2.0
"""CUDA source: where it is, what it includes, and the structs that it declares."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from pagedcache.status import InternalError

_PACKAGE = Path(__file__).parents[2]
# Package data in a wheel. An editable install has no copy and reads that of the checkout.
_PLACES = (_PACKAGE / "cuda_src", _PACKAGE.parent / "cuda_src")
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


def folder() -> Path:
    """Return the folder of this package's CUDA source.

    Raises
    ------
    InternalError
        It is not part of this installation.
    """
    for place in _PLACES:
        if place.is_dir():
            return place
    raise InternalError("cuda_src", f"must be at {' or '.join(map(str, _PLACES))}; reinstall")


@functools.cache
def read(file: str | Path) -> str:
    """Return a source file with the files that it includes, each once.

    The whole program is one string, since CuPy's compile cache goes by that text and would not
    notice a change in a file that it includes.

    Parameters
    ----------
    file : str or Path
        The name of a file of this package, or the path of any other. What it includes is looked for
        beside it, and then in this package.
    """
    seen: set[Path] = set()

    def inlined(path: Path) -> str:
        if path in seen:
            return ""
        seen.add(path)
        return _INCLUDE.sub(lambda match: inlined(beside(path, match[1])), path.read_text("utf-8"))

    def beside(path: Path, name: str) -> Path:
        own = path.parent / name
        return own if own.exists() else folder() / name

    path = Path(file)
    return inlined(path if path.is_absolute() else folder() / path)
