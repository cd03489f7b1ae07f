# SPDX-License-Identifier: Apache-2.0
"""The wheel, the sdist and an editable install each compile a kernel from their own cuda_src."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index"]

pytest.importorskip("hatchling")
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "pyproject.toml").exists(), reason="there is no checkout here"
)

COMPILE = """
import site, sys
before = set(sys.path)
site.addsitedir({target!r})
sys.path.sort(key=lambda path: path in before)  # ahead of the copy that the tests themselves use
import pagedcache
from pagedcache.backend.nvidia import source
from pagedcache.operators.paged_caching import nvidia as paged_caching
from cupy.cuda import nvrtc
program = nvrtc.createProgram(source.read(paged_caching.FILE), "kernel.cu", (), ())
name = paged_caching.instance("bfloat16", "int64", 16, True)
nvrtc.addNameExpression(program, name)
nvrtc.compileProgram(program, ("--std=c++17", "-arch=sm_80"))
print(pagedcache.__file__)
print(source.folder())
print(len(nvrtc.getCUBIN(program)))
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    copy = tmp_path_factory.mktemp("checkout") / "pagedcache"
    keep = ("pagedcache", "cuda_src", "tests")
    for name in keep:
        shutil.copytree(
            CHECKOUT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
        )
    for file in CHECKOUT.iterdir():
        if file.is_file():
            shutil.copy(file, copy)
    return copy


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", out, "-t", "wheel", "-t", "sdist"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    return {"wheel": next(out.glob("*.whl")), "sdist": next(out.glob("*.tar.gz"))}


@pytest.mark.parametrize("way", ["wheel", "sdist", "editable"])
def test_compiles_from_its_own_copy(way, checkout, built, tmp_path):
    pytest.importorskip("cupy")
    what = ["-e", checkout] if way == "editable" else [built[way]]
    subprocess.run([*PIP, *OFFLINE, "--target", tmp_path, *what], check=True)
    program = [sys.executable, "-I", "-c", COMPILE.format(target=str(tmp_path))]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    package, folder, length = done.stdout.splitlines()
    home = checkout if way == "editable" else tmp_path
    assert Path(package) == home / "pagedcache" / "__init__.py"
    assert Path(folder).is_relative_to(home)
    assert int(length) > 1000


def test_wheel_holds_what_it_should(built):
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert {"pagedcache/cuda_src/common.cuh", "pagedcache/cuda_src/paged_caching.cuh"} <= names
    assert "pagedcache/py.typed" in names
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pagedcache"}
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert sorted(re.match(r"[\w-]+", need)[0] for need in needs if "extra" not in need) == [
        "ml-dtypes",
        "numpy",
    ]
    assert not [need for need in needs if re.match(r"cupy\b(?!-cuda|-rocm)", need)]
    for extra in ("cuda12", "cuda13", "test", "demo", "notebook"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert {"LICENSE", "NOTICE"} <= {Path(name).name for name in names if "/licenses/" in name}
    assert built["wheel"].name.endswith("-py3-none-any.whl")
    assert built["wheel"].stat().st_size < 500_000


WORKS = """
import numpy as np, pagedcache as pc
k_cache, v_cache = np.zeros((2, 4, 1, 2, 8), np.float16)
k = np.ones((3, 1, 8), np.float16)
pc.paged_caching(k_cache, v_cache, k, k, np.array([6, -1, 1]))
assert (k_cache.sum(), v_cache.sum()) == (16, 16)
cuda = pc.backends()["cuda"]
try:
    import cupy
except ImportError:
    print("no CuPy;", cuda.usable)
else:
    from cupy.cuda import nvrtc
    from pagedcache.backend.nvidia import source
    from pagedcache.operators.paged_caching import nvidia as paged_caching
    for width, ahead in paged_caching.INSTANCES:
        program = nvrtc.createProgram(source.read(paged_caching.FILE), "kernel.cu", (), ())
        name = paged_caching.instance("bfloat16", "int64", width, ahead)
        nvrtc.addNameExpression(program, name)
        nvrtc.compileProgram(program, ("--std=c++17", "-arch=sm_90"))
        assert nvrtc.getCUBIN(program).startswith(b"\\x7fELF")
    print("NVRTC", nvrtc.getVersion()[0])
"""


@pytest.mark.parametrize(
    ("extra", "says"), [("", "no CuPy; False"), ("[cuda12]", "NVRTC 12"), ("[cuda13]", "NVRTC 13")]
)
def test_the_wheel_in_an_empty_environment(built, tmp_path, extra, says):
    command = [sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"]
    subprocess.run(command, check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    install = [*pip, "install", "--quiet", "--no-compile", f"{built['wheel']}{extra}"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode and "No matching distribution" in done.stderr + done.stdout:
        pytest.skip("there is no package index to install from")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([python, "-I", "-c", WORKS], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (says, "")
    about = subprocess.run(
        [python, "-I", "-m", "pagedcache"], capture_output=True, text=True, check=True
    ).stdout
    assert len(about.splitlines()) <= 30  # one screen
    for words in (
        "pagedcache 0.",
        "Python 3.",
        "numpy",
        "cupy-cuda",
        "CUDA source",
        "cpu    usable",
    ):
        assert words in about
    if extra:
        both = subprocess.run(
            [*pip, "list", "--format=freeze"], capture_output=True, text=True, check=True
        ).stdout
        assert both.count("cupy-cuda") == 1


def test_two_cupys_are_named(tmp_path):
    for name in ("cupy-cuda12x", "cupy-cuda13x"):
        folder = tmp_path / f"{name.replace('-', '_')}-14.2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 14.2.0\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import pagedcache as pc\n"
        "from pagedcache.backend import nvidia\n"
        "try: pc.Handle('cuda')\n"
        "except pc.PagedCacheError as error: print(error.status.name, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert "needs exactly one CuPy; uninstall all of them, then install one" in done.stdout
    assert "cupy-cuda12x and cupy-cuda13x" in done.stdout
    assert done.stdout.startswith("DEVICE_NOT_INITIALIZED")
