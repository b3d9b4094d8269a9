"""Fixtures that several files use. What hardware there is and which backend a test runs on, no other file asks."""

import importlib
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from by_hand import WRAPPERS
from workers import Workers

from torchlars import _extension, ops, reference

NO_EXTENSION = _extension.extension is None
NO_CUDA = None
if not torch.cuda.is_available():
    NO_CUDA = "no device is visible"
elif NO_EXTENSION or not _extension.extension.has_cuda:
    NO_CUDA = _extension.reason


@pytest.fixture(params=["extension", "reference"])
def backend(request, monkeypatch):
    """Every test that asks for it runs twice: through the compiled extension and through the reference."""
    if request.param == "reference":
        monkeypatch.setattr(ops, "_backend", reference)
    elif NO_EXTENSION:
        pytest.skip(f"no extension: {_extension.reason}")
    return request.param


@pytest.fixture(params=WRAPPERS, ids=str)
def wrap(request):
    """Every test that asks for it runs for each of the wrappers."""
    return request.param


@pytest.fixture
def extension():
    """The compiled module, for tests of what only it has."""
    if NO_EXTENSION:
        pytest.skip(f"no extension: {_extension.reason}")
    return _extension.extension


@pytest.fixture
def cuda():
    """A CUDA device with kernels for it."""
    if NO_CUDA:
        pytest.skip(f"no CUDA: {NO_CUDA}")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(params=["cpu"] if NO_CUDA else ["cpu", "cuda"])
def device(request):
    """Every device here whose kernels stand against the reference."""
    return torch.device(request.param)


@pytest.fixture
def threads():
    """Set the number of CPU threads; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """One CPU thread for a whole file: where tensors are small, a second one would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checked_sparse_tensors():
    """Checks of sparse tensors for a whole file; torch warns where it is told neither to check nor not to."""
    with torch.sparse.check_sparse_tensor_invariants():
        yield


@pytest.fixture
def benchmark_module(monkeypatch):
    """Import a module of the benchmarks, which are no package to be installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture(scope="session")
def build_once(tmp_path_factory):
    """Build something into a folder once a session, whichever of pytest-xdist's workers asks first; returns the folder."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def build_once(name, build):
        import fcntl  # Linux has it, and what is compiled by tests needs Linux

        folder, done = shared / name, shared / f"{name}.done"
        with open(shared / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    return build_once


@pytest.fixture(autouse=True)
def _seed():
    # torch.manual_seed formats the stack for every kind of device that is not initialized yet: 4 ms a test.
    seed = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
    seed(20170813)


NO_GLOO = not dist.is_available() or not dist.is_gloo_available()


@pytest.fixture
def process_group():
    """A process group of this process alone."""
    if NO_GLOO:
        pytest.skip("torch has no gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def workers():
    """Four processes that can form a process group."""
    if NO_GLOO:
        pytest.skip("torch has no gloo")
    pool = Workers(4)
    yield pool
    pool.stop()
