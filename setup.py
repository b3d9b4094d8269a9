"""Builds the extension torchlars._C. One decision, CPU only or with CUDA, is taken here, printed and kept.

TORCHLARS_CUDA=0 leaves CUDA out, TORCHLARS_CUDA=1 insists on it; unset, CUDA is built where torch and a toolkit
allow it.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# Older ones read no licence expression, and new environments may hold them. 0 is one that does not know its version.
if 0 < int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"torchlars: setuptools must be 77 or newer (got: {setuptools.__version__}); "
        "install it: pip install 'setuptools>=77,<82', or leave out --no-build-isolation"
    )

if not os.access(Path.cwd(), os.W_OK):
    sys.exit(
        f"torchlars: the folder of the sources must be writable, because setuptools builds in it (got: {Path.cwd()}); "
        "copy it, and install the copy"
    )

# Without a list, torch compiles for the GPUs it sees, and fails where it sees none. PTX serves whatever is newer.
ARCH_LIST, ARCH_LIST_OF_12_8 = "7.5;8.0;8.6;9.0+PTX", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"


def import_torch():
    """Import the torch that torchlars will run with. pip's isolated builds hide it: then ask the interpreter itself."""
    try:
        import torch
    except ImportError:
        # -I keeps PYTHONPATH and the working directory out, and also the packages of the user, which may hold torch.
        code = "import pathlib, site, sys\n"
        code += "if sys.prefix == sys.base_prefix: site.addsitedir(site.getusersitepackages())\n"
        code += "import torch; print(pathlib.Path(torch.__file__).parents[1])"
        found = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
        if found.returncode != 0:
            return None
        sys.path.append(found.stdout.splitlines()[-1])
        import torch
    return torch


def find_toolkit():
    """Return (folder, version) of a CUDA toolkit that has both a compiler and headers, or (None, None)."""
    nvcc = shutil.which("nvcc")
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    folders += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    for folder in filter(None, [*folders, "/usr/local/cuda"]):
        compiler = shutil.which("nvcc", path=str(Path(folder) / "bin"))
        if compiler and (Path(folder) / "include" / "cuda_runtime.h").exists():
            printed = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
            release = re.search(r"release (\d+\.\d+)", printed)
            if release:
                return folder, release[1]
    return None, None


def why_not_cuda(torch, toolkit_version):
    """Return why CUDA cannot be built, or None. Never looks at a visible GPU: containers are built without one."""
    if torch.version.hip:
        return (
            f"torch {torch.__version__} is built for ROCm, which is not supported yet; "
            "tensors on the GPU take the reference in plain torch"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if toolkit_version is None:
        return "no CUDA toolkit with nvcc and cuda_runtime.h was found; set CUDA_HOME"
    if toolkit_version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"torch is built for CUDA {torch.version.cuda}, but the toolkit is CUDA {toolkit_version}"
    if toolkit_version == "12.0":  # whose kernels take 4 KB of arguments
        return "the toolkit must be CUDA 12.1 or newer (got: 12.0)"
    return None


def choose_arch_list(torch, toolkit_version):
    """Return what to compile for, as TORCH_CUDA_ARCH_LIST has it. Architectures below 7.0 end the build."""
    arch_list = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not arch_list:
        is_12_8 = [int(number) for number in toolkit_version.split(".")] >= [12, 8]
        return ARCH_LIST_OF_12_8 if is_12_8 else ARCH_LIST
    archs = arch_list.replace(" ", ";").split(";")
    if archs == ["native"]:
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = [f"{major}.{minor}" for major, minor in capabilities]
        if not archs:
            sys.exit("torchlars: TORCH_CUDA_ARCH_LIST=native, but torch sees no GPU; name architectures, as in 8.0;9.0")
    for arch in archs:
        if re.match(r"[1-6]\.|Kepler|Maxwell|Pascal", arch):
            sys.exit(
                f"torchlars: architectures must be 7.0 or newer (got: {arch}, TORCH_CUDA_ARCH_LIST={arch_list}): older "
                "ones take no 32 KB of kernel arguments; leave it out, or leave CUDA out with TORCHLARS_CUDA=0"
            )
    return arch_list


def why_not_cpp():
    """Return why no extension can be compiled at all, or None."""
    compilers = [os.environ.get("CXX", "").split(" ")[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    if not any(map(shutil.which, compilers)):
        return f"no C++ compiler was found (looked for: {', '.join(compilers)})"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"Python's headers are missing ({header}; Debian and Ubuntu: apt install python3-dev)"
    if sys.platform == "linux":
        cxx = os.environ.get("CXX") or "c++"
        with_openmp = [*shlex.split(cxx), "-fopenmp", "-fsyntax-only", "-include", "omp.h", "-x", "c++", os.devnull]
        if subprocess.run(with_openmp, capture_output=True).returncode != 0:
            return f"{cxx} finds no OpenMP (for clang on Debian and Ubuntu: apt install libomp-dev; or set CXX=g++)"
    return None


def decide(torch):
    """Return (build the extension, build CUDA, the sentence that says so)."""
    wanted = os.environ.get("TORCHLARS_CUDA", "")
    if wanted not in ("", "0", "1"):
        sys.exit(f"torchlars: TORCHLARS_CUDA must be 0, 1 or unset (got: {wanted!r})")
    toolkit, toolkit_version = find_toolkit()
    no_cpp, no_cuda = why_not_cpp(), why_not_cuda(torch, toolkit_version)
    if wanted == "1" and (no_cpp or no_cuda):
        sys.exit(f"torchlars: TORCHLARS_CUDA=1, but CUDA cannot be built: {no_cpp or no_cuda}")
    if no_cpp:
        return False, False, f"no extension, but the reference in plain torch: {no_cpp}"
    if wanted == "0" or no_cuda:
        return True, False, f"CPU only: {'TORCHLARS_CUDA=0' if wanted == '0' else no_cuda}"
    os.environ["CUDA_HOME"] = toolkit
    arch_list = os.environ["TORCH_CUDA_ARCH_LIST"] = choose_arch_list(torch, toolkit_version)
    return True, True, f"CPU and CUDA {toolkit_version} for {arch_list}"


def extension(torch, with_cuda):
    sources = ["csrc/ops.cpp", "csrc/eager.cpp", "csrc/cpu/ops_cpu.cpp"] + with_cuda * ["csrc/cuda/ops_cuda.cu"]
    everything = [str(path) for path in sorted(Path("csrc").rglob("*")) if path.is_file()]
    if torch is None:
        return Extension("torchlars._C", sources, depends=everything)  # enough for an sdist, which compiles nothing
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # No contraction into fused multiply-adds: results are then those of the source on every processor. Nobody asks for
    # floating-point exceptions and errno, and GCC vectorises std::floor and std::sqrt only where it need not set them.
    # Hidden functions are called without the table of exported symbols.
    flags = ["-O3", "-fvisibility=hidden", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"]
    if os.name == "nt":
        flags = ["/O2", "/openmp"]
    link_flags, nvcc_flags = [], ["-O3", "--fmad=false", "-Xcompiler=-ffp-contract=off"]
    if os.name != "nt":
        nvcc_flags += ["-Xcompiler=-fvisibility=hidden"]
        # Messages of errors name source files: relative ones, so that the same sources give the same extension.
        for folder in (Path.cwd(), Path(torch.__file__).parents[1]):
            flags += [f"-fmacro-prefix-map={folder}/="]
            nvcc_flags += [f'-Xcompiler=-fmacro-prefix-map="{folder}/="']
        # Python's own flags ask for debug info, ten times the size of the code. It is left out unless the user asks.
        asked = shlex.split(f"{os.environ.get('CFLAGS', '')} {os.environ.get('CXXFLAGS', '')}")
        debug = [flag for flag in asked if flag.startswith("-g") and flag != "-g0"]
        flags += debug or ["-g0"]
        if sys.platform == "linux":  # at::parallel_for is compiled here, and without OpenMP it is a plain loop
            flags, link_flags = [*flags, "-fopenmp"], ["-fopenmp", *([] if debug else ["-Wl,-s"])]
    return (CUDAExtension if with_cuda else CppExtension)(
        "torchlars._C",
        sources,
        depends=everything,
        define_macros=[("TORCHLARS_WITH_CUDA", None)] if with_cuda else [],
        extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
    )


torch = import_torch()
has_extension, has_cuda, decision = decide(torch) if torch else (True, False, "")
if torch:
    from torch.utils.cpp_extension import BuildExtension as Base
else:
    Base = build_ext


class Build(Base):
    """Says what was decided, compiles, and leaves a note of it that torchlars reads before it loads the extension."""

    def finalize_options(self):
        super().finalize_options()
        self.force = True  # what an earlier run left may have been built for another torch, which no date tells
        self.build_temp = f"{self.build_temp}-torch-{torch and torch.__version__}"

    def run(self):
        if torch is None:
            sys.exit(
                "torchlars: it is compiled against the torch that it will run with, and none was found for "
                f"{sys.executable}; install torch first, then: pip install --no-build-isolation . "
                "(uv pip install has the same option)"
            )
        if [int(number) for number in torch.__version__.split(".")[:2]] < [2, 11]:
            sys.exit(f"torchlars: torch must be 2.11 or newer (got: {torch.__version__})")
        toolkit = f" (the toolkit in {os.environ['CUDA_HOME']})" if has_cuda else ""
        print(f"torchlars: {decision}{toolkit}", flush=True)
        target = Path("." if self.inplace else self.build_lib) / "torchlars"
        target.mkdir(parents=True, exist_ok=True)
        for left in target.glob("_C.*"):
            if left.suffix in (".so", ".pyd"):
                left.unlink()
        self.extensions = self.extensions if has_extension else []
        super().run()
        (target / "_build.py").write_text(
            '"""What setup.py decided, and for which torch. Written by it."""\n\n'
            f"torch_version = {torch.__version__!r}\ntorch_cuda = {torch.version.cuda!r}\n"
            f"has_extension = {has_extension!r}\ndecision = {decision!r}\n"
        )


setup(ext_modules=[extension(torch, has_cuda)], cmdclass={"build_ext": Build})
