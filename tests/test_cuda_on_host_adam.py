"""The CUDA kernels of Adam, their own source, compiled by g++ and executed on the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from host_adam import ADAM_WAYS, check_adam, execute_adam
from host_driver import (
    ADAM,
    BUILDS,
    CASES,
    DTYPES,
    LAMB,
    LAMB_IN_TWO_PARTS,
    SEVERAL_LAUNCHES,
    compile_driver,
    copy_sources,
    needs_host_shim,
    new_case,
    only,
    skip_without_sanitizers,
)

pytestmark = needs_host_shim


@pytest.fixture(scope="session")
def driver(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """Compile the kernels as they are, once a session for each build."""

    def compiled(build: str) -> Path:
        flags = [*BUILDS[build], only("adam")]
        return (
            build_once(f"cuda_on_host-{build}-adam", lambda to: compile_driver(to, copy_sources(to), *flags)) / "driver"
        )

    return compiled


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", ADAM_WAYS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name, dtype in product(CASES, DTYPES)
        if name != "decays beyond float" and (name != SEVERAL_LAUNCHES or dtype == torch.float32)
    ],
    ids=str,
)
def test_adam_equals_the_reference(
    name: str, dtype: torch.dtype, kind: str, build: str, driver: Callable[[str], Path]
) -> None:
    skip_without_sanitizers(build)
    case, ways = new_case(name, dtype), ADAM_WAYS[kind](dtype)
    if build == "sanitized":
        ways = [way for way in ways if way.op in (LAMB, LAMB_IN_TWO_PARTS) or (way.op == ADAM and way.has_ratios)]
    if name == SEVERAL_LAUNCHES:
        ways = ways[1:6] if build == "plain" else ways[4:6]
    check_adam(case, ways, execute_adam(driver(build), case, ways))
