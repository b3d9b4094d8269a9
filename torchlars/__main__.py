"""``python -m torchlars`` tells which torchlars this is, which backends it has, and why not the others."""

import platform

import torch

import torchlars
from torchlars import _extension


def main() -> None:
    """Print versions and backends."""
    extension = _extension.extension
    cuda = "not loaded"
    if extension is not None and extension.has_cuda:
        cuda = "loaded" if torch.cuda.is_available() else "loaded, but no device is visible"
    print(f"torchlars  {torchlars.__version__}")
    print(f"torch      {torch.__version__} (CUDA {torch.version.cuda})")
    print(f"python     {platform.python_version()} on {platform.platform()}")
    print("backends")
    print("  reference  loaded (any device)")
    print(f"  CPU        {'loaded' if extension is not None else 'not loaded'}")
    print(f"  CUDA       {cuda}")
    print(f"why        {_extension.reason}")
    if extension is None:
        print(f"repair     {_extension.REPAIR}")


if __name__ == "__main__":
    main()
