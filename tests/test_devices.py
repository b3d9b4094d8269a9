"""Devices that have no kernels of ours take the reference: by themselves, and beside others in a group."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchlars
from torchlars import LAMB, LARS

TOY = Path(__file__).parent / "toy_device.py"


def test_a_device_of_privateuse1():
    """The dispatcher has no kernel for it, and takes the default one."""
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch makes no devices in Python")
    done = subprocess.run([sys.executable, str(TOY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


def with_gradient(param):
    param = torch.nn.Parameter(param)
    param.grad = torch.ones_like(param) / 4
    return param


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS device")
@pytest.mark.parametrize("wrap", [LARS, LAMB])
def test_mps(wrap, backend):
    values = torch.tensor([3.0, 4.0])
    params = [with_gradient(values.to(device)) for device in ("mps", "cpu")]
    wrap(torch.optim.SGD(params, lr=0.5, momentum=0.9, weight_decay=0.1)).step()
    torch.testing.assert_close(params[0].cpu(), params[1])


SGDS = pytest.mark.parametrize("sgd", [torch.optim.SGD, torchlars.optim.SGD], ids=["torch", "torchlars"])


@SGDS
@pytest.mark.parametrize(
    "wrap",
    [LARS, lambda base: LARS(base, norm="decayed", clip=True), lambda base: LARS(base, apply_to="update"), LAMB],
    ids=["LARS", "LARC, decayed", "LARS-update", "LAMB"],
)
def test_meta_beside_the_cpu(wrap, sgd, backend):
    """Shapes without values, as one steps to count memory: nothing is read, and other devices are not disturbed."""
    values = torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    params = [with_gradient(values.clone()), with_gradient(values.to("meta"))]
    alone = [with_gradient(values.clone())]
    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1}
    optimizer, expected = wrap(sgd(params, **options)), wrap(sgd(alone, **options))
    for _ in range(2):
        optimizer.step()
        expected.step()
    assert torch.equal(params[0], alone[0])
    assert not torch.equal(params[0], values)
    assert optimizer.state[params[1]]["momentum_buffer"].device.type == "meta"
    ratios = optimizer.trust_ratios()
    assert [ratios[param].device.type for param in params] == ["cpu", "meta"]
