# SPDX-License-Identifier: Apache-2.0
"""What all tests share: the compiler for the host, and skipping what needs a GPU."""

from __future__ import annotations

import os

# Set before NumPy is imported, also for the notebooks: one thread sums in the same order on any
# machine, and several spend a long time waiting for each other if cores are shared.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import shutil

import host_device
import pytest

import pagedcache as pc

collect_ignore = ["outside_backend"]  # a package of its own, which is installed where it is tested


@pytest.fixture(scope="session")
def compiler(tmp_path_factory):
    """Return a compiler of CUDA source for the host."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return host_device.Compiler(tmp_path_factory.mktemp("host"))


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    cuda = pc.backends()["cuda"]
    if not cuda.usable:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=cuda.reason))
