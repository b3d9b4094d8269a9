"""Runs Python with the runtime of this folder: ``python tests/fake_cuda/run.py -m pytest tests/test_cuda.py``."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA_HOME = os.environ.get("CUDA_HOME", "/usr/local/cuda")


def build() -> Path:
    """Return the folder of the libraries, which are built where they or what they are made of have changed."""
    sources = [
        Path(__file__),
        *HERE.glob("*.cpp"),
        *HERE.glob("*.h"),
        *ROOT.glob("csrc/*.h"),
        *ROOT.glob("csrc/cuda/*"),
        *ROOT.glob("tests/cuda_on_host/*.h"),
    ]
    contents = b"".join(path.read_bytes() for path in sorted(sources))
    name = hashlib.sha256(contents + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"torchlars_fake_cuda_{name}"
    if folder.exists():
        return folder
    torch_folder = Path(torch.__file__).parent
    symbols = ["nm", "-D", "--undefined-only", torch_folder / "lib/libcaffe2_nvrtc.so"]
    symbols = subprocess.run(symbols, check=True, capture_output=True, text=True).stdout.split()
    calls = [name for name in symbols if re.fullmatch("cu[A-Z].*", name) and name != "cuDevicePrimaryCtxGetState"]
    driver = ["-Wl,-soname,libcuda.so.1", "-DDRIVER_CALLS=" + " ".join(f"UNSUPPORTED({name})" for name in calls)]
    unfinished = tempfile.mkdtemp()
    compile_ = ["g++", "-std=c++20", "-shared", "-fPIC", "-O1", "-ffp-contract=off"]
    kernels = ["-isystem", torch_folder / "include", f"-I{ROOT / 'csrc'}", f"-I{HERE.parent / 'cuda_on_host'}"]
    commands = [
        [*compile_, *driver, f"-I{CUDA_HOME}/include", HERE / "runtime.cpp", "-o", f"{unfinished}/libfake_cuda.so"],
        [*compile_, *kernels, HERE / "kernels.cpp", "-o", f"{unfinished}/libkernels.so"],
    ]
    compilers = [subprocess.Popen(command) for command in commands]
    if sum(compiler.wait() != 0 for compiler in compilers):
        sys.exit("fake_cuda: the libraries could not be built")
    try:
        os.rename(unfinished, folder)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
    return folder


if __name__ == "__main__":
    library = build() / "libfake_cuda.so"
    path = os.pathsep.join(filter(None, [str(HERE), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "LD_PRELOAD": str(library), "FAKE_CUDA": str(library), "PYTHONPATH": path}
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment)
