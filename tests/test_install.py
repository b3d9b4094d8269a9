"""Installing: what setup.py decides and says, and what import does when the extension is missing, stale or broken."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchlars
from torchlars import _extension

ROOT = Path(__file__).parents[1]
PACKAGE = Path(torchlars.__file__).parent
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="the pretended toolkit is a shell script")
REPAIR = "pip install --no-build-isolation --force-reinstall --no-deps ."


def run(*arguments, cwd=ROOT, **environment):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("TORCH", "CUDA_", "CXX"))}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True
    )


# What setup.py decides


@pytest.fixture
def pretend_torch(tmp_path):
    """Return a folder with a torch that has a version and what setup.py takes from torch, for decisions that need no more."""

    def make(version, cuda, hip=None, more=""):
        package = tmp_path / "pretended" / "torch"
        (package / "utils").mkdir(parents=True)
        (package / "utils" / "cpp_extension.py").write_text(
            "import setuptools\nfrom setuptools.command.build_ext import build_ext as BuildExtension\n"
            "def CUDAExtension(name, sources, **options): return setuptools.Extension(name, sources)\n"
            "CppExtension = CUDAExtension\n"
        )
        (package / "__init__.py").write_text(
            f"class version: cuda, hip = {cuda!r}, {hip!r}\n__version__ = {version!r}\n__path__ = [{str(package)!r}]\n{more}"
        )
        return str(package.parent)

    return make


@pytest.fixture
def pretend_toolkit(tmp_path):
    """Return a folder that looks like a CUDA toolkit."""

    def make(release):
        folder = tmp_path / "toolkit"
        (folder / "bin").mkdir(parents=True)
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
        nvcc = folder / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.0'\n")
        nvcc.chmod(0o755)
        return str(folder)

    return make


@pytest.mark.parametrize("value", ["2", "yes", "on"])
def test_a_wish_that_is_neither_0_nor_1_is_refused(value, pretend_torch):
    result = run("setup.py", "--name", TORCHLARS_CUDA=value, PYTHONPATH=pretend_torch("2.13.0+cpu", None))
    assert result.returncode != 0
    assert f"TORCHLARS_CUDA must be 0, 1 or unset (got: {value!r})" in result.stderr


def test_cuda_cannot_be_forced_over_a_cpu_build_of_torch(pretend_torch):
    result = run("setup.py", "--name", TORCHLARS_CUDA="1", PYTHONPATH=pretend_torch("2.13.0+cpu", None))
    assert result.returncode != 0
    assert "TORCHLARS_CUDA=1, but CUDA cannot be built: torch 2.13.0+cpu is not built for CUDA" in result.stderr


@needs_shell
@pytest.mark.parametrize(
    ("built_for", "release", "message"),
    [
        ("13.0", "12.6", "torch is built for CUDA 13.0, but the toolkit is CUDA 12.6"),
        ("12.6", "12.0", "the toolkit must be CUDA 12.1 or newer (got: 12.0)"),
    ],
)
def test_cuda_cannot_be_forced_with_a_toolkit_that_cannot_build_it(
    built_for, release, message, pretend_torch, pretend_toolkit
):
    path, toolkit = pretend_torch("2.14.1", built_for), pretend_toolkit(release)
    result = run("setup.py", "--name", TORCHLARS_CUDA="1", PYTHONPATH=path, CUDA_HOME=toolkit)
    assert result.returncode != 0
    assert message in result.stderr


@pytest.mark.skipif(Path("/usr/local/cuda/bin/nvcc").exists(), reason="a toolkit is installed here")
def test_cuda_cannot_be_forced_without_a_toolkit(pretend_torch):
    result = run("setup.py", "--name", TORCHLARS_CUDA="1", PYTHONPATH=pretend_torch("2.14.1", "13.0"), PATH="/bin")
    assert result.returncode != 0
    assert "no CUDA toolkit with nvcc and cuda_runtime.h was found; set CUDA_HOME" in result.stderr


def decide(**environment):
    """Return what setup.py decides."""
    code = "import runpy, sys; sys.argv = ['setup.py', '--name']; print(runpy.run_path('setup.py')['decision'])"
    result = run("-c", code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


ROCM = (
    "torch 2.11.0+rocm7.1 is built for ROCm, which is not supported yet; "
    "tensors on the GPU take the reference in plain torch"
)


def test_on_rocm_the_cpu_kernels_are_built_and_setup_says_why(pretend_torch):
    path = pretend_torch("2.11.0+rocm7.1", None, "7.1.25424")
    assert decide(PYTHONPATH=path) == f"CPU only: {ROCM}"
    result = run("setup.py", "--name", TORCHLARS_CUDA="1", PYTHONPATH=path)
    assert result.returncode != 0
    assert f"TORCHLARS_CUDA=1, but CUDA cannot be built: {ROCM}" in result.stderr


@needs_shell
@pytest.mark.parametrize("arch_list", [None, ""], ids=["unset", "empty"])
@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("12.6", "7.5;8.0;8.6;9.0+PTX"),
        ("12.8", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        ("12.10", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        ("13.0", "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
    ],
)
def test_default_architectures_are_those_that_the_toolkit_knows(
    arch_list, release, expected, pretend_torch, pretend_toolkit
):
    environment = {} if arch_list is None else {"TORCH_CUDA_ARCH_LIST": arch_list}
    path, toolkit = pretend_torch("2.14.1", release), pretend_toolkit(release)
    assert decide(PYTHONPATH=path, CUDA_HOME=toolkit, **environment) == f"CPU and CUDA {release} for {expected}"


def visible(*capabilities):
    return (
        f"class cuda:\n    device_count = lambda: {len(capabilities)}\n"
        f"    get_device_capability = lambda index: {capabilities!r}[index]\n"
    )


TOO_OLD = {
    "6.1": "6.1",
    "6.0+PTX": "6.0+PTX",
    "5.2;8.6": "5.2",
    "8.6 5.3": "5.3",
    "9.0;3.5": "3.5",
    "Pascal": "Pascal",
    "Ampere;Maxwell+Tegra": "Maxwell+Tegra",
    "Kepler+Tesla": "Kepler+Tesla",
}
NEW_ENOUGH = ["7.0", "8.0 9.0+PTX", "Volta;Ampere", "9.0a", "10.0;12.1a+PTX"]


@needs_shell
@pytest.mark.parametrize("arch_list", [*TOO_OLD, *NEW_ENOUGH])
def test_architectures_whose_kernels_take_too_few_arguments_are_refused_by_name(
    arch_list, pretend_torch, pretend_toolkit, monkeypatch
):
    from torch.utils.cpp_extension import _get_cuda_arch_flags

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", arch_list)
    compiled = [int(number) for number in re.findall(r"code=sm_(\d+)", " ".join(_get_cuda_arch_flags()))]
    assert (min(compiled) < 70) == (arch_list in TOO_OLD), "what torch makes of it"
    path, toolkit = pretend_torch("2.14.1", "12.6"), pretend_toolkit("12.6")
    environment = {"PYTHONPATH": path, "CUDA_HOME": toolkit, "TORCH_CUDA_ARCH_LIST": arch_list}
    if arch_list in NEW_ENOUGH:
        assert decide(**environment).endswith(f" for {arch_list}")
        return
    result = run("setup.py", "--name", **environment)
    assert result.returncode != 0
    assert f"must be 7.0 or newer (got: {TOO_OLD[arch_list]}, TORCH_CUDA_ARCH_LIST={arch_list})" in result.stderr


@needs_shell
@pytest.mark.parametrize(
    ("capabilities", "refusal"),
    [
        ([(8, 6), (6, 1)], "must be 7.0 or newer (got: 6.1, TORCH_CUDA_ARCH_LIST=native)"),
        ([], "TORCH_CUDA_ARCH_LIST=native, but torch sees no GPU"),
        ([(8, 6), (9, 0)], None),
    ],
)
def test_native_architectures_are_those_of_the_gpus(capabilities, refusal, pretend_torch, pretend_toolkit):
    path = pretend_torch("2.14.1", "12.6", more=visible(*capabilities))
    environment = {"PYTHONPATH": path, "CUDA_HOME": pretend_toolkit("12.6"), "TORCH_CUDA_ARCH_LIST": "native"}
    if refusal is None:
        assert decide(**environment).endswith(" for native")
        return
    result = run("setup.py", "--name", **environment)
    assert result.returncode != 0
    assert refusal in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is asked for on Linux")
def test_a_compiler_without_openmp_is_no_compiler(tmp_path):
    """clang on Debian and Ubuntu comes without OpenMP, and the build ended amid the errors of torch's headers."""
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\necho \"fatal error: 'omp.h' file not found\" >&2; exit 1\n")
    compiler.chmod(0o755)
    remedy = "(for clang on Debian and Ubuntu: apt install libomp-dev; or set CXX=g++)"
    expected = f"no extension, but the reference in plain torch: {compiler} finds no OpenMP {remedy}"
    assert decide(CXX=str(compiler)) == expected


def test_the_interpreter_is_asked_for_its_own_torch(tmp_path):
    """Not for a module of that name in the working directory."""
    import setuptools

    (tmp_path / "torch.py").write_text("raise ImportError('another torch')\n")
    for name in ("setuptools", "_distutils_hack"):
        (tmp_path / "isolated" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "isolated" / name).symlink_to(Path(setuptools.__file__).parents[1] / name)
    code = "import runpy, sys; sys.path.remove(''); sys.argv = ['setup.py', '--name']; "
    code += f"print(runpy.run_path({str(ROOT / 'setup.py')!r})['torch'].__file__)"
    result = run("-S", "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "isolated"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == torch.__file__


@pytest.mark.skipif(os.name == "nt", reason="flags of GCC and clang")
@pytest.mark.parametrize("variable", ["CFLAGS", "CXXFLAGS"])
@pytest.mark.parametrize(
    ("flags", "debug"), [("", []), ("-O2 -g0", []), ("-g", ["-g"]), ("-O1 -ggdb3 -gz", ["-ggdb3", "-gz"])]
)
def test_debug_info_is_for_those_who_ask(variable, flags, debug):
    code = "import json, runpy, sys; sys.argv = ['setup.py', '--name']; build = runpy.run_path('setup.py'); "
    code += "made = build['extension'](build['torch'], False); print(json.dumps([made.extra_compile_args, made.extra_link_args]))"
    result = run("-c", code, **{"CFLAGS": "", "CXXFLAGS": "", variable: flags})
    assert result.returncode == 0, result.stderr
    compiling, linking = json.loads(result.stdout.splitlines()[-1])
    assert [flag for flag in compiling["cxx"] if flag.startswith("-g")] == (debug or ["-g0"])
    assert ("-Wl,-s" in linking) == (sys.platform == "linux" and not debug)


def test_the_extension_is_small_and_names_no_folder_of_its_builder(extension):
    built = Path(extension.__file__).read_bytes()
    if b".debug_info" in built:
        pytest.skip("built with debug info")
    assert extension.has_cuda or len(built) < 1_500_000
    assert b"csrc/checks.h" in built  # in the messages of errors
    for folder in (ROOT, Path(torch.__file__).parents[1]):
        assert f"{folder}/".encode() not in built


@pytest.mark.parametrize("option", ["-r/etc/passwd", "--index-url=http://localhost"])
def test_quickstart_hands_no_option_to_pip(option):
    result = run("examples/quickstart.py", TORCHLARS_TORCH=option)
    assert result.returncode == 1
    assert (
        f"quickstart: TORCHLARS_TORCH must name a torch, as in torch==2.14.1, not an option of pip (got: {option})"
        in result.stderr
    )


@pytest.fixture
def sources(tmp_path):
    """Return a copy of what is needed to build."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    shutil.copytree(ROOT / "torchlars", folder / "torchlars", ignore=shutil.ignore_patterns("_C*", "_build.py"))
    return folder


def test_without_a_compiler_the_package_is_built_and_says_why(sources):
    left = sources / "built" / "torchlars" / "_C.cpython-300.so"
    left.parent.mkdir(parents=True)
    left.touch()  # of an earlier build, for another torch perhaps
    result = run("setup.py", "-q", "build", "--build-lib", "built", cwd=sources, CXX="no-such-compiler")
    assert result.returncode == 0, result.stderr
    sentence = (
        "no extension, but the reference in plain torch: no C++ compiler was found (looked for: no-such-compiler)"
    )
    assert f"torchlars: {sentence}" in result.stdout
    assert sentence in (sources / "built" / "torchlars" / "_build.py").read_text()
    assert not left.exists()
    imported = run_copy("-c", "import torchlars", cwd=sources / "built")
    assert imported.returncode == 0
    assert imported.stderr.count("RuntimeWarning: torchlars uses its reference in plain torch") == 1
    assert f"but slower: {sentence}. To repair it" in imported.stderr


def test_cuda_cannot_be_forced_without_a_compiler(sources):
    result = run("setup.py", "-q", "build", cwd=sources, CXX="no-such-compiler", TORCHLARS_CUDA="1")
    assert result.returncode != 0
    assert "CUDA cannot be built: no C++ compiler was found (looked for: no-such-compiler)" in result.stderr


def test_without_torch_building_says_what_to_install(sources):
    hidden = (
        "import sys, subprocess; sys.modules['torch'] = None; sys.argv = ['setup.py', '-q', 'build_ext', '--inplace']; "
    )
    hidden += "subprocess.run = lambda *a, **k: type('Result', (), {'returncode': 1}); exec(open('setup.py').read())"
    result = run("-c", hidden, cwd=sources)
    assert result.returncode != 0
    assert "install torch first, then: pip install --no-build-isolation ." in result.stderr


def test_a_setuptools_that_cannot_read_the_licence_is_refused():
    """Python 3.11 gives 65.5 to new environments, and torch 2.11 and 2.12 leave it there."""
    pretended = "import setuptools, sys; setuptools.__version__ = '65.5.0'; sys.argv = ['setup.py', '--name']; "
    result = run("-c", pretended + "exec(open('setup.py').read())")
    assert result.returncode != 0
    assert "setuptools must be 77 or newer (got: 65.5.0); install it: pip install 'setuptools>=77,<82'" in result.stderr


def test_sources_that_cannot_be_written_to_are_told():
    pretended = "import os, sys; os.access = lambda path, mode: mode != os.W_OK; sys.argv = ['setup.py', '--name']; "
    result = run("-c", pretended + "exec(open('setup.py').read())")
    assert result.returncode != 0
    assert f"the folder of the sources must be writable, because setuptools builds in it (got: {ROOT})" in result.stderr


# What import does


def run_copy(*arguments, cwd):
    """Run Python on the package in ``cwd``, out of reach of an editable install, whose finder would fill the gaps."""
    path = os.pathsep.join(entry for entry in sys.path if entry.endswith(("site-packages", "dist-packages")))
    return run("-S", *arguments, cwd=cwd, PYTHONPATH=path)


@pytest.fixture
def package(tmp_path):
    """Return a folder with a copy of the package, without its extension."""
    shutil.copytree(PACKAGE, tmp_path / "torchlars", ignore=shutil.ignore_patterns("_C.*.so", "_C*.pyd", "_build.py"))
    return tmp_path


STEP = """
import sys, types, torch
class NoCompiler(types.ModuleType):  # torch imports its compiler for an optimizer's first step, which takes seconds
    __getattr__ = lambda self, name: lambda function=None, *args, **options: function
sys.modules["torch._dynamo"] = torch._dynamo = NoCompiler("torch._dynamo")
import torchlars
w = torch.nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
w.grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
torchlars.LARS(torch.optim.SGD([w], lr=1.0, weight_decay=0.1), eps=0.5, trust_coef=0.01).step()
assert torch.allclose(w.grad, torch.tensor([0.0225, 0.03], dtype=torch.float64), rtol=1e-14, atol=0), w.grad
import torchlars.ops
"""


def imported(package, repair=REPAIR, before=""):
    """Import and step; return the one warning that is allowed."""
    result = run_copy("-W", "default", "-c", before + STEP, cwd=package)
    assert result.returncode == 0, result.stderr
    warnings = [line for line in result.stderr.splitlines() if "Warning" in line]
    assert len(warnings) == 1, result.stderr
    assert (
        "RuntimeWarning: torchlars uses its reference in plain torch, with the same results but slower" in warnings[0]
    )
    assert warnings[0].endswith(f"To repair it, run in the sources of torchlars: {repair}")
    return warnings[0]


def write_note(package, torch_version):
    (package / "torchlars" / "_build.py").write_text(
        f"torch_version = {torch_version!r}\ntorch_cuda = {torch.version.cuda!r}\n"
        "has_extension = True\ndecision = 'CPU only: a test'\n"
    )


def extension_file(package):
    import importlib.machinery

    return package / "torchlars" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"


def test_a_missing_extension_is_told_once(package):
    assert "its extension was never built here" in imported(package)


def test_in_the_sources_the_remedy_is_to_build_in_place(package):
    """A checkout hides what was installed: installing once more would not help."""
    (package / "setup.py").touch()
    repair = "pip install --no-build-isolation --force-reinstall --no-deps -e ."
    assert f"its extension was never built here ({package / 'torchlars'})" in imported(package, repair)


@pytest.mark.parametrize("note", ["torch_version = ", "torch_version = 3", ""])
def test_a_damaged_note_is_told_once(package, note):
    (package / "torchlars" / "_build.py").write_text(note)
    assert "the note of its build is damaged (" in imported(package)


def test_an_extension_for_a_torch_without_cuda_is_stale_under_one_with_it(package):
    write_note(package, torch.__version__)
    note = package / "torchlars" / "_build.py"
    note.write_text(note.read_text().replace(f"torch_cuda = {torch.version.cuda!r}", "torch_cuda = '1.0'"))
    assert f"it was built for torch {torch.__version__}, but {torch.__version__} is installed" in imported(package)


def test_a_stale_extension_is_told_once_and_never_loaded(package):
    extension_file(package).write_bytes(b"loading this would fail in other words")
    write_note(package, "1.13.1+cu117")
    assert f"it was built for torch 1.13.1+cu117, but {torch.__version__} is installed" in imported(package)


def test_another_install_does_not_lend_its_extension(package, extension):
    """An editable install's finder, which comes last, finds the modules that a copy of the package lacks."""
    write_note(package, torch.__version__)
    lender = f"""
import importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {extension.__file__!r}) if name == "torchlars._C" else None
sys.meta_path.append(Finder)
"""
    told = imported(package, before=lender)
    assert f"its extension, built for torch {torch.__version__}, is missing ({package / 'torchlars'})" in told


def test_a_broken_extension_is_told_once(package):
    extension_file(package).write_bytes(b"no shared object")
    write_note(package, torch.__version__)
    told = imported(package)
    assert f"its extension, built for torch {torch.__version__}, cannot be loaded (" in told


def test_a_patch_release_of_torch_is_no_reason_to_rebuild(package, extension):
    shutil.copy(extension.__file__, package / "torchlars")
    major, minor = torch.__version__.split(".")[:2]
    write_note(package, f"{major}.{minor}.99")
    result = run_copy("-W", "error", "-c", STEP, cwd=package)
    assert result.returncode == 0, result.stderr


# python -m torchlars


def test_module_tells_versions_and_backends(extension):
    result = run("-m", "torchlars", cwd=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert lines["torchlars"] == torchlars.__version__
    assert lines["torch"].startswith(torch.__version__)
    assert lines["CPU"] == "loaded"
    assert lines["CUDA"].startswith("loaded" if extension.has_cuda else "not loaded")
    assert lines["why"] == _extension.reason
    assert "repair" not in lines


def test_module_tells_why_there_is_no_extension(package):
    result = run_copy("-W", "ignore", "-m", "torchlars", cwd=package)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in result.stdout.splitlines()}
    assert (lines["CPU"], lines["CUDA"]) == ("not loaded", "not loaded")
    assert lines["why"] == f"its extension was never built here ({package / 'torchlars'})"
    assert lines["repair"] == REPAIR
