"""What this machine has, and what a check on a GPU would miss on it. As JSON, from a process of its own.

Torch is imported here and not in main.py: whoever has looked at a GPU keeps a part of its memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("setuptools", "ninja", "pytest", "pybind11", "numpy", "timm", "triton")


def main() -> None:
    """Print what was found."""
    print(json.dumps(probe(builds="--prebuilt" not in sys.argv)))


def probe(builds: bool) -> dict[str, Any]:
    """Return the environment, and under "missing" a sentence for each thing without which nothing can be checked.

    Args:
        builds: whether the extension is to be built, too.
    """
    missing: list[str] = []
    found: dict[str, Any] = {
        "gpu": None,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "commit": commit(),
        "nvcc": nvcc(),
        "missing": missing,
        **{name: version(name) for name in MODULES},
    }
    try:
        import torch
    except ImportError as error:
        missing.append(f"torch cannot be imported ({error})")
    else:
        look_at(torch, found, missing)
    if builds:
        missing += missing_for_a_build(found)
    if found["pytest"] is None:
        missing.append("pytest is not installed")
    return found


def missing_for_a_build(found: dict[str, Any]) -> list[str]:
    """Return a sentence for each thing without which nothing can be built."""
    missing = []
    if found["nvcc"] is None:
        missing.append("no nvcc was found on PATH, in CUDA_HOME or in /usr/local/cuda")
    elif found.get("cuda") and found["nvcc"].split(".")[0] != found["cuda"].split(".")[0]:
        missing.append(f"torch is built for CUDA {found['cuda']}, but nvcc is of {found['nvcc']}")
    if found["setuptools"] is None or int(found["setuptools"].split(".")[0]) < 77:
        missing.append(f"setuptools must be 77 or newer (got: {found['setuptools']})")
    if shutil.which("ninja") is None:
        missing.append("no ninja was found on PATH")
    return missing


def look_at(torch: Any, found: dict[str, Any], missing: list[str]) -> None:
    """Add torch and its first GPU."""
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
    if [int(number) for number in torch.__version__.split(".")[:2]] < [2, 11]:
        missing.append(f"torch must be 2.11 or newer (got: {torch.__version__})")
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is not built for CUDA")
    elif not torch.cuda.is_available():
        missing.append("torch sees no GPU")
    else:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": round(properties.L2_cache_size / 2**20),
            "multiprocessors": properties.multi_processor_count,
            "driver": driver(),
        }


def version(name: str) -> str | None:
    """Return the version of a package, if it is there."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version" if importlib.util.find_spec(name) else None


def output(*command: str) -> str | None:
    """Return what a command prints, or None where it fails or is not there."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def commit() -> str | None:
    """Return the commit that is checked out, and whether files differ from it."""
    head = output("git", "rev-parse", "--short=12", "HEAD")
    return head and head + (" with changes" if output("git", "status", "--porcelain", "-uno") else "")


def nvcc() -> str | None:
    """Return the release of the toolkit, looked for where setup.py looks."""
    folders = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for compiler in [*(f"{folder}/bin/nvcc" for folder in folders), "nvcc", "/usr/local/cuda/bin/nvcc"]:
        release = re.search(r"release (\d+\.\d+)", output(compiler, "--version") or "")
        if release:
            return release[1]
    return None


def driver() -> str | None:
    """Return the driver's version."""
    versions = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


if __name__ == "__main__":
    main()
