"""Where the CUDA source is: package data in a wheel, the top-level folder in a checkout."""

from __future__ import annotations

import functools
from pathlib import Path

from pagedcache.status import InternalError

_PACKAGE = Path(__file__).parents[2]
# An editable install has no copy inside the package and reads the checkout's.
_PLACES = (_PACKAGE / "cuda_src", _PACKAGE.parent / "cuda_src")


def folder() -> Path:
    """Return the folder of the CUDA source.

    Raises
    ------
    InternalError
        The installation lost it.
    """
    for place in _PLACES:
        if place.is_dir():
            return place
    raise InternalError("cuda_src", f"must be at {' or '.join(map(str, _PLACES))}", "nothing")


@functools.cache
def read(file: str) -> str:
    """Return the text of one source file. It includes nothing, so this is the whole program."""
    return (folder() / file).read_text(encoding="utf-8")
