# SPDX-License-Identifier: Apache-2.0
"""``python -m pagedcache``: details for bug reports, warm-up, demo and benchmark."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from pagedcache import Handle, PagedCacheError, __version__, backends, bench, demo
from pagedcache.backend.nvidia import source
from pagedcache.cache.formats import SOURCE_DTYPES
from pagedcache.cache.tables import SLOT_DTYPES
from pagedcache.operators.paged_caching.warmup import warming_up


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    description = "Print details for a bug report, compile the kernels, run the demo or benchmark."
    parser = argparse.ArgumentParser(prog="python -m pagedcache", description=description)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser(
        "about", help="print versions, backends, device limits and folders (default)"
    )
    warm = commands.add_parser(
        "warmup", help="compile all kernels now, so that no later call has to"
    )
    warm.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if usable)")
    demo.add_arguments(
        commands.add_parser("demo", help="write the K and V of real text into a paged cache")
    )
    bench.add_arguments(
        commands.add_parser("bench", help="time the write against a memcpy and the installed peers")
    )
    parsed = parser.parse_args(arguments)
    if parsed.command == "demo":
        return demo.run(parsed)
    if parsed.command == "bench":
        return bench.run(parsed)
    if parsed.command == "warmup":
        return warm_up(parsed.device)
    return about()


def warm_up(device: str | None) -> int:
    """Compile all kernels, and print each when it is ready."""
    try:
        for done in warming_up(device, dtypes=SOURCE_DTYPES, slot_dtypes=SLOT_DTYPES):
            print(done, flush=True)
    except PagedCacheError as error:
        print(error, file=sys.stderr)
        return 1
    on_cpu = done.device == "cpu"
    print("The CPU compiles nothing." if on_cpu else f"Compile cache: {compile_cache()}")
    return 0


def about() -> int:
    """Print everything that a bug report needs."""
    print(f"pagedcache {__version__} at {Path(__file__).parent}")
    print(f"Python {platform.python_version()}, {platform.platform()}")
    for names in (
        ("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-7-0"),
        ("cuda-toolkit", "cuda-bindings", "torch", "jax", "numba", "triton"),
    ):
        print(", ".join(f"{name} {version(name)}" for name in names))
    print(f"\nCUDA source    {source.folder()}")
    print(f"compile cache  {compile_cache()}")
    print("\nBackends")
    for report in backends().values():
        mark = "usable    " if report.usable else "not usable"
        print(f"  {report.device_type:<6} {mark}  {report.reason}")
    handle = Handle()
    print(f"\nDefault device: {handle.device}")
    for name, value in handle.opened().limits_table():
        print(f"  {name:<22} {value}")
    return 0


def version(distribution: str) -> str:
    """Return the installed version of a distribution, or ``"not installed"``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compile_cache() -> str:
    """Return the folder where CuPy caches compiled kernels, marked if it cannot be written."""
    # As in CuPy, a ~ in the variable is not expanded. Unlike Path.home(), this never raises.
    home = os.path.expanduser("~/.cupy/kernel_cache")  # noqa: PTH111
    folder = os.environ.get("CUPY_CACHE_DIR", home)
    return folder if folder and _can_be_written(Path(folder)) else f"{folder!r} (not writable)"


def _can_be_written(folder: Path) -> bool:
    """Return whether a folder is writable or can be created."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except OSError:  # for example, the name is too long
        return False
    return existing.is_dir() and os.access(existing, os.W_OK)


if __name__ == "__main__":
    try:
        code = main()
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
