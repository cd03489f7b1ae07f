# SPDX-License-Identifier: Apache-2.0
"""Set up everything and run the demo, the tests, or any other command of the package.

    python3 run.py demo     # or: test, check, docs, bench, ...

Creates a virtual environment in .venv, installs this checkout into it with what the command needs
(including CuPy for the CUDA version of the driver, if there is one), and runs the command. Later
runs reuse the environment; `. .venv/bin/activate` activates it in a shell. Requires Python 3.10 or
newer. With the option ``--as-is`` right after the command, nothing is installed.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
BIN = ENVIRONMENT / "bin"
PYTHON = str(BIN / "python")
CHECKS = (
    "ruff format --check .",
    "ruff check .",
    "mypy",
)
SOURCES = ("cuda_src/*.cuh", "tests/*.h", "tests/*/*.cuh")  # what clang-format checks


def driver_cuda() -> int:
    """Return the newest CUDA major version that the NVIDIA driver supports, 0 without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int()
    return version.value // 1000 if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def install(extras: list[str]) -> None:
    """Create the environment if there is none, and install this checkout with `extras`."""
    if not Path(PYTHON).exists():
        print(f"Creating {ENVIRONMENT} ...", flush=True)
        made = subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=False)
        if made.returncode:
            sys.exit("Python's venv module is incomplete; on Debian, run: apt install python3-venv")
    wanted = f"[{','.join(extras)}]" if extras else ""
    print(f"Installing pagedcache{wanted} ...", flush=True)
    bar = "on" if sys.stdout.isatty() else "off"
    pip = [PYTHON, "-m", "pip", "install", "--progress-bar", bar, "--quiet", "--quiet"]
    subprocess.run([*pip, "-e", f"{ROOT}{wanted}"], check=True)


def prepare(command: str) -> None:
    """Install what a command needs."""
    cuda = driver_cuda()
    gpu = [f"cuda{min(cuda, 13)}"] if cuda >= 12 else []
    if command == "test":
        # Without a driver, NVRTC still compiles the kernels for every architecture.
        install(["test", "demo", *(gpu or ["cuda12"])])
    elif command == "check":
        install(["dev", "test", "demo"])
    elif command == "docs":
        install(["docs"])
    else:
        install([extra for extra in ("demo", "bench") if extra == command] + gpu)


def main(arguments: list[str]) -> int:
    """Install what the command in the first argument needs, and run it with the other arguments."""
    if sys.version_info < (3, 10):  # noqa: UP036 - older versions can still run this file
        sys.exit(f"Python 3.10 or newer is required; this is {sys.version.split()[0]}")
    if not arguments or arguments[0].startswith("-"):
        print(__doc__)
        return 2
    command, *rest = arguments
    if rest[:1] == ["--as-is"]:
        rest = rest[1:]
    else:
        prepare(command)
    if command == "test":
        return subprocess.run([PYTHON, "-m", "pytest", *rest], cwd=ROOT, check=False).returncode
    if command == "check":
        failed = 0
        sources = sorted(str(path) for pattern in SOURCES for path in ROOT.glob(pattern))
        for check in (*CHECKS, "clang-format -n --Werror"):
            print(f"{check}:", flush=True)
            tool, *options = check.split()
            options += sources if tool == "clang-format" else []
            done = subprocess.run([str(BIN / tool), *options], cwd=ROOT, check=False)
            failed |= done.returncode
        print("A check failed." if failed else "All checks passed.")
        return failed
    if command == "docs":
        built = ROOT / "docs" / "_build"
        sphinx = [PYTHON, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs"]
        places = ["-d", str(built / "doctrees"), ".", str(built / "html")]
        code = subprocess.run([*sphinx, *rest, *places], cwd=ROOT, check=False).returncode
        wrong = "The site has warnings, which count as errors; see above."
        print(wrong if code else f"The site is {built / 'html' / 'index.html'}")
        return code
    program = [PYTHON, "-m", "pagedcache", command, *rest]
    return subprocess.run(program, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
