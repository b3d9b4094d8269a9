"""Loads the compiled extension if it is there and was built for the torch that is installed; else says why not."""

from __future__ import annotations

import importlib
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

import torch

__all__: list[str] = []

PACKAGE = Path(__file__).parent
IN_SOURCES = (PACKAGE.parent / "setup.py").exists()  # a checkout, which comes before any installed torchlars
REPAIR = f"pip install --no-build-isolation --force-reinstall --no-deps {'-e ' if IN_SOURCES else ''}."


def _load() -> tuple[ModuleType | None, str]:
    """Return the extension and what was decided when it was built, or None and why there is none."""
    if not (PACKAGE / "_build.py").exists():
        return None, f"its extension was never built here ({PACKAGE})"
    try:
        build = importlib.import_module("torchlars._build")
        built_for, has_extension, decision = build.torch_version, build.has_extension, build.decision
        of_minor = [*built_for.split(".")[:2], build.torch_cuda]
    except Exception as error:  # whatever a damaged file may raise
        return None, f"the note of its build is damaged ({error!r})"
    if of_minor != [*torch.__version__.split(".")[:2], torch.version.cuda]:
        # Compared before loading: an extension of another torch may crash instead of raising.
        return None, f"it was built for torch {built_for}, but {torch.__version__} is installed"
    if not has_extension:
        return None, decision
    # Looked for here alone: an editable install's finder would lend that of another folder.
    if PathFinder.find_spec("torchlars._C", [str(PACKAGE)]) is None:
        return None, f"its extension, built for torch {built_for}, is missing ({PACKAGE})"
    try:
        return importlib.import_module("torchlars._C"), decision
    except ImportError as error:
        return None, f"its extension, built for torch {built_for}, cannot be loaded ({error})"


extension, reason = _load()

if extension is None:
    warnings.warn(
        f"torchlars uses its reference in plain torch, with the same results but slower: {reason}. "
        f"To repair it, run in the sources of torchlars: {REPAIR}",
        RuntimeWarning,
        stacklevel=2,
    )
