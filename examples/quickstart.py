"""From a fresh checkout to the digits example, or to the test suite, in one command.

  python3 examples/quickstart.py              set up, then run examples/digits.py
  python3 examples/quickstart.py --seeds 5    the same; every other argument goes to the example
  python3 examples/quickstart.py --test -n 2  set up, then run the tests; every other argument goes to pytest

The set-up uses the Python that runs this script if torch can be imported there. Otherwise it uses the virtual
environment .venv in the repository, which it makes at the first run, and installs torch into it. Then it
installs what else is missing and builds torchlars in place. Every command is printed before it runs.

The environment variable TORCHLARS_TORCH names the torch to install into .venv, as pip takes it
(torch==2.14.1, or the path of a wheel). Without it, that is the torch which torchlars is tested with.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV_PYTHON = ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
TESTED_TORCH = "torch==2.13.0"
BUILD_PACKAGES = ["setuptools>=77", "wheel", "ninja"]
EXAMPLE_PACKAGES = ["numpy", "scikit-learn", "matplotlib", "tqdm"]
TEST_PACKAGES = ["pytest", "pytest-xdist", "numpy"]

IMPORT_TORCH = "import torch; print(torch.__version__)"
LIST_INSTALLED = """\
import importlib.metadata as m, json; print(json.dumps([(d.name, d.version) for d in m.distributions()]))"""

VENV_REMEDY = """\
This Python can't make virtual environments with pip. On Debian and Ubuntu: apt install python3-venv"""
TORCH_REMEDY = """\
If pip found no torch for this Python or this machine, run this script with another Python, or name another
torch in the environment variable TORCHLARS_TORCH."""
PACKAGES_REMEDY = """\
If pip refused because the system manages this environment, run this script in a virtual environment that has
torch, or with a Python that has none: then it makes a virtual environment itself."""
NO_COMPILER_REMEDY = """\
No C++ compiler was found. Install one (Debian and Ubuntu: apt install g++; macOS: xcode-select --install;
Windows: Build Tools for Visual Studio) and run this script again."""
NO_HEADERS_REMEDY = """\
Python.h was not found. Install Python's headers (Debian and Ubuntu: apt install python3-dev)."""


def quoted(command: list[str]) -> str:
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def run(command: list[str], remedy: str = "", cwd: Path | None = None) -> None:
    """Prints and runs a command. If it fails, says so and leaves with its exit code."""
    prefix = f"cd {quoted([str(cwd)])} && " if cwd and cwd != Path.cwd() else ""
    print(f"$ {prefix}{quoted(command)}", flush=True)
    code = subprocess.run(command, cwd=cwd).returncode
    if code != 0:
        message = f"quickstart: this command failed with exit code {code}: {quoted(command)}\n{remedy}"
        print(message.rstrip(), file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def ask(python: str, code: str) -> str:
    """What a line of Python prints in an interpreter, or nothing where it fails: that is an answer too."""
    command = [python, "-c", code]
    print(f"$ {quoted(command)}", flush=True)
    answer = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def has_torch(python: str) -> bool:
    """Whether torch can be imported, for which being installed is not enough."""
    version = ask(python, IMPORT_TORCH)
    print(version or "(no torch that can be imported)", flush=True)
    return bool(version)


def missing(requirements: list[str], python: str) -> list[str]:
    """The requirements (a name, or a name and its lowest major version) that an interpreter doesn't meet."""
    installed = json.loads(ask(python, LIST_INSTALLED) or "[]")
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in installed}

    def met(requirement: str) -> bool:
        name, _, lowest = requirement.partition(">=")
        return name in versions and int(versions[name].split(".")[0]) >= int(lowest or 0)

    return [requirement for requirement in requirements if not met(requirement)]


def build_remedy() -> str:
    """The likeliest reason why the extension did not build on this machine."""
    compilers = ["c++", "g++", "clang++", "cl", *os.environ.get("CXX", "").split()[:1]]
    if not any(shutil.which(compiler) for compiler in compilers):
        return NO_COMPILER_REMEDY
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return NO_HEADERS_REMEDY
    return "The reason is in the output above."


def set_up(packages: list[str]) -> str:
    """Provides torch, these packages and torchlars built in place; returns the interpreter that has them."""
    python, torch = sys.executable, os.environ.get("TORCHLARS_TORCH")
    if torch and torch.startswith("-"):
        sys.exit(
            f"quickstart: TORCHLARS_TORCH must name a torch, as in torch==2.14.1, not an option of pip (got: {torch})"
        )
    wanted, remedy = [], PACKAGES_REMEDY
    if has_torch(python):
        if torch:
            print("(TORCHLARS_TORCH is not used, because this environment has a torch)", flush=True)
    else:
        python, remedy = str(VENV_PYTHON), TORCH_REMEDY
        if not VENV_PYTHON.exists():
            run([sys.executable, "-m", "venv", str(ROOT / ".venv")], VENV_REMEDY)
            wanted = [torch or TESTED_TORCH]
        elif torch or not has_torch(python):
            wanted = [torch or TESTED_TORCH]

    wanted += missing(["pip", *BUILD_PACKAGES, *packages], python)
    if "pip" in wanted:
        wanted.remove("pip")
        run([python, "-m", "ensurepip"], VENV_REMEDY)
    install = [python, "-m", "pip", "install"]
    if wanted:
        run([*install, *wanted], remedy)
    run([*install, "--no-build-isolation", "--no-deps", "-e", "."], build_remedy(), cwd=ROOT)
    run([python, "-m", "torchlars"], cwd=ROOT)  # tells which backends were built, and why not the others
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="quickstart.py [-h] [--test] [arguments for the example or for pytest ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--test", action="store_true", help="run the test suite instead of the example")
    args, others = parser.parse_known_args()
    if sys.hexversion < 0x030A0000:
        sys.exit(f"quickstart: torchlars needs Python 3.10 or newer (got: {sys.version.split()[0]})")
    if args.test:
        python = set_up(TEST_PACKAGES)
        run([python, "-m", "pytest", *others], cwd=ROOT)
    else:
        python = set_up(EXAMPLE_PACKAGES)
        run([python, str(ROOT / "examples" / "digits.py"), *others])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
