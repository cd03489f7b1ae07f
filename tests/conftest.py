# SPDX-License-Identifier: Apache-2.0
"""What the tests share: whether there is a GPU, and how a case is made and run."""

from __future__ import annotations

import os

# Before NumPy is imported, and for the notebooks too: one thread adds in one order on any machine,
# and several wait for each other very long where cores are shared.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import shutil

import host_device
import pytest

import pagedcache as pc


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """Compiles CUDA source for the host."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++ here")
    return host_device.Compiler(tmp_path_factory.mktemp("host"))


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    cuda = pc.backends()["cuda"]
    if not cuda.usable:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=cuda.reason))
