"""The CUDA kernels' own source, compiled by g++ and executed on the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from host_driver import (
    BUILDS,
    CASES,
    DTYPES,
    IN_BLOCKS,
    LARS_SGD,
    SEVERAL_LAUNCHES,
    SGD_WAYS,
    WAYS,
    check,
    check_sgd,
    coded_sgd_ways,
    compile_driver,
    copy_sources,
    execute,
    needs_host_shim,
    new_case,
    only,
    skip_without_sanitizers,
)

pytestmark = needs_host_shim
CASES_IN_DTYPES = [
    (name, dtype) for name, dtype in product(CASES, DTYPES) if name != SEVERAL_LAUNCHES or dtype == torch.float32
]


@pytest.fixture(scope="session")
def driver(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str, str], Path]:
    """Compile the kernels as they are, once a session for each build and each family of ops."""

    def compiled(build: str, family: str) -> Path:
        flags = [*BUILDS[build], only(family)]
        name = f"cuda_on_host-{build}-{family}"
        return build_once(name, lambda folder: compile_driver(folder, copy_sources(folder), *flags)) / "driver"

    return compiled


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", WAYS)
@pytest.mark.parametrize(("name", "dtype"), CASES_IN_DTYPES, ids=str)
def test_kernels_equal_the_reference(
    name: str, dtype: torch.dtype, kind: str, build: str, driver: Callable[[str, str], Path]
) -> None:
    skip_without_sanitizers(build)
    case, ways = new_case(name, dtype), WAYS[kind]
    if build != "plain":  # sanitizers look at which memory is used, and that does not depend on the order
        ways = ways[-2:]
    if name == SEVERAL_LAUNCHES:
        ways = ways[-2:] if build == "plain" else ways[:1]
    check(case, ways, execute(driver(build, "scale"), case, ways))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", SGD_WAYS)
@pytest.mark.parametrize(("name", "dtype"), CASES_IN_DTYPES, ids=str)
def test_sgd_equals_the_reference(
    name: str, dtype: torch.dtype, kind: str, build: str, driver: Callable[[str, str], Path]
) -> None:
    skip_without_sanitizers(build)
    case, ways = new_case(name, dtype), SGD_WAYS[kind](dtype)
    if build == "sanitized":
        ways = [way for way in ways if way.op == LARS_SGD]
    if name == SEVERAL_LAUNCHES:
        ways = ways[-2:] if build == "plain" else ways[-1:]
    check_sgd(case, ways, execute(driver(build, "sgd"), case, ways))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(
    "name", [IN_BLOCKS, "borders", "every binade", "zero norms and empty layers", SEVERAL_LAUNCHES]
)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sgd_with_momentum_in_8_bits_equals_the_reference(
    name: str, dtype: torch.dtype, build: str, driver: Callable[[str, str], Path]
) -> None:
    skip_without_sanitizers(build)
    case, ways = new_case(name, dtype), coded_sgd_ways(dtype)
    if build == "sanitized":
        ways = [way for way in ways if way.op == LARS_SGD][:2]
    if name == SEVERAL_LAUNCHES:
        ways = ways[-2:] if build == "plain" else ways[-1:]
    check_sgd(case, ways, execute(driver(build, "sgd"), case, ways))
