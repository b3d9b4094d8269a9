"""Loads the compiled extension if it is there and was built for the torch that is installed; else says why not."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

__all__: list[str] = []

REPAIR = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> tuple[ModuleType | None, str]:
    """Return the extension and what was decided when it was built, or None and why there is none."""
    try:
        build = importlib.import_module("torchlars._build")
    except ImportError:
        return None, "its extension was never built here"
    built_for = build.torch_version.split(".")[:2]
    if built_for != torch.__version__.split(".")[:2]:
        # Compared before loading: an extension of another torch may crash instead of raising.
        return None, f"it was built for torch {build.torch_version}, but {torch.__version__} is installed"
    try:
        return importlib.import_module("torchlars._C"), build.decision
    except ImportError as error:
        return None, f"its extension, built for torch {build.torch_version}, cannot be loaded ({error})"


extension, reason = _load()

if extension is None:
    warnings.warn(
        f"torchlars uses its reference in plain torch, with the same results but slower: {reason}. "
        f"To repair it, run in the sources of torchlars: {REPAIR}",
        RuntimeWarning,
        stacklevel=2,
    )
