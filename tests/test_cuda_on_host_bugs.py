"""Bugs planted into the CUDA kernels' source, each of which the comparison on the CPU must catch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from host_adam import ADAM_WAYS, check_adam, execute_adam
from host_driver import (
    BUILDS,
    DTYPES,
    FAMILIES,
    IN_BLOCKS,
    LAMB,
    SEVERAL_LAUNCHES,
    SGD_WAYS,
    WAYS,
    Case,
    Way,
    check,
    check_sgd,
    coded_sgd_ways,
    compile_driver,
    copy_sources,
    execute,
    needs_host_shim,
    new_case,
    only,
    run_compiler,
    skip_without_sanitizers,
)

pytestmark = needs_host_shim
COMPILES_FAST = ["-O0", "-g0"]
IN_8_BITS = "momentum in 8 bits"  # a kind of ways


@dataclass
class Bug:
    """A change of the sources, and what must be said of it."""

    old: str
    new: str
    caught_by: str
    case: str = "borders"
    build: str = "plain"
    file: str = "cuda/kernels.cuh"
    family: str = "scale"  # of ops
    kind: str = "plain"  # of ways
    dtype: torch.dtype = torch.float32


BUGS = {
    "the tail of a sum ends early": Bug("if (i < count) {", "if (i < count - 1) {", "differ", file="cuda/sums.cuh"),
    "the tail of a gradient ends early": Bug(
        "if (i < count) {\n    if", "if (i < count - 1) {\n    if", "gradients differ"
    ),
    "a tail reads one past the end": Bug(
        "summed[i]", "summed[i + 1]", "heap-buffer-overflow", build="sanitized", file="cuda/sums.cuh"
    ),
    "a parameter is read one past the end": Bug(
        "rewrite(x[i], y[i])", "rewrite(x[i], y[i + 1])", "heap-buffer-overflow", build="sanitized"
    ),
    "packs are read past the end": Bug(
        "if (first + u * kThreads < num_packs) {\n        loaded",
        "if (first < num_packs) {\n        loaded",
        "heap-buffer-overflow",
        build="sanitized",
        file="cuda/packs.cuh",
    ),
    "packs are measured past the end": Bug(
        "if (first + u * kThreads < num_packs) {\n        loaded",
        "if (first < num_packs) {\n        loaded",
        "heap-buffer-overflow",
        build="sanitized",
        file="cuda/sums.cuh",
    ),
    "packs need no alignment": Bug(
        "return reinterpret_cast<uintptr_t>(array) % alignof(Pack<T, kNumbers>) == 0",
        "return array == array",
        "misaligned address",
        case="misaligned views",
        build="sanitized",
        file="cuda/packs.cuh",
    ),
    "a pack that is not aligned is read from elsewhere": Bug(
        "loaded.values[i] = array[pack * kSize + i]",
        "loaded.values[i] = array[pack + i]",
        "differ",
        case="misaligned views",
        file="cuda/packs.cuh",
    ),
    "a pack that is not aligned is written elsewhere": Bug(
        "array[pack * kSize + i] = ", "array[pack + i] = ", "differ", case="misaligned views", file="cuda/packs.cuh"
    ),
    "packs of a parameter need no alignment": Bug(
        "is_aligned(x) && is_aligned(y)",
        "is_aligned(x)",
        "misaligned address",
        case="misaligned views",
        build="sanitized",
    ),
    "values are added too early": Bug(
        "  __syncthreads();\n  double sum = 0;", "  double sum = 0;", "differ", file="cuda/sums.cuh"
    ),
    "values are overwritten too early": Bug(
        "__syncthreads();  // values may be written again", "", "differ", file="cuda/sums.cuh"
    ),
    "a ratio is broadcast too early": Bug(
        "  __syncthreads();\n  return shared", "  return shared", "differ", file="cuda/sums.cuh"
    ),
    "half of a block skips a barrier": Bug(
        "  __syncthreads();\n  double",
        "  if (threadIdx.x < 128) {\n    __syncthreads();\n  }\n  double",
        "threads meet that wait in different places",
        file="cuda/sums.cuh",
    ),
    "a thread ends early": Bug(
        "  __shared__ double values",
        "  if (threadIdx.x == 100) {\n    return 0;\n  }\n  __shared__ double values",
        "waits for threads that never come",
        file="cuda/sums.cuh",
    ),
    "shared memory is taken to be zero": Bug(
        "values[threadIdx.x] = value;",
        "if (value != 0) {\n    values[threadIdx.x] = value;\n  }",
        "differ",
        case="only an empty layer",
        file="cuda/sums.cuh",
    ),
    "a shuffle is left out": Bug(
        "offset = kWarp / 2; offset > 0", "offset = kWarp / 2; offset > 1", "differ", file="cuda/sums.cuh"
    ),
    "sums are floats": Bug(
        "sum += squares.value()", "sum = static_cast<float>(sum + squares.value())", "differ", file="cuda/sums.cuh"
    ),
    "what a sum loses is forgotten": Bug(
        "lost_ += lost_in_sum(sum_, square, sum);", "", "squared norms differ", file="cuda/sums.cuh"
    ),
    "what a square loses is forgotten": Bug(
        "lost_ += fmaf(x, x, -square);", "", "squared norms differ", file="cuda/sums.cuh"
    ),
    "what an addition loses is forgotten": Bug(
        "lost_in_sum(a, product, sum) + rest",
        "rest",
        "squared norms differ",
        file="cuda/sums.cuh",
        kind="in dialects",
    ),
    "a scale is rounded to float": Bug(
        "rest = scale_rest + fmaf",
        "rest = fmaf",
        "squared norms differ",
        file="cuda/sums.cuh",
        kind="in dialects",
    ),
    "squares vanish in float": Bug(
        "0x1p-80f", "0", "norms differ|ratios differ", case="every binade", file="cuda/sums.cuh"
    ),
    "squares overflow in float": Bug(
        "0x1p120f", "INFINITY", "norms differ|ratios differ", case="every binade", file="cuda/sums.cuh"
    ),
    "sums that cancel are taken in float": Bug(
        " && rests_ <= kMostRests * sum_",
        "",
        "norms differ|ratios differ",
        case="gradients that cancel the decay",
        file="cuda/sums.cuh",
        kind="in dialects",
    ),
    "sums that cancel with the rest of a scale are taken in float": Bug(
        "fmaf(scale_rest, scale_rest, fmaf(rest, rest, rests_))",
        "fmaf(rest, rest, rests_)",
        "norms differ|ratios differ",
        case="gradients that cancel the decay",
        file="cuda/sums.cuh",
        kind="in dialects",
    ),
    "a scale whose rest float cannot hold is taken in float": Bug(
        "0x1p-100 <=",
        "0x1p-126 <=",
        "norms differ|ratios differ",
        case="decays beyond float",
        file="cuda/sums.cuh",
        kind="in dialects",
    ),
    "a zero hides other numbers": Bug(
        "is_zero = is_zero && ",
        "is_zero = ",
        "norms differ|ratios differ",
        case="zeros with an exception",
        file="cuda/sums.cuh",
    ),
    "equal numbers are taken for unmoved ones": Bug(
        "(scale == -1 && a - b == 0)",
        "a - b == 0",
        "norms differ|ratios differ",
        case="zeros with an exception",
        file="cuda/sums.cuh",
        kind="in dialects",
    ),
    "infinite numbers are taken for unmoved ones": Bug(
        "a - b == 0",
        "a == b",
        "norms differ|ratios differ",
        case="zeros with an exception",
        file="cuda/sums.cuh",
        kind="of updates",
    ),
    "chunks are counted backwards from one too many": Bug(
        "gridDim.x - 1 - blockIdx.x", "gridDim.x - blockIdx.x", "differ"
    ),
    "a layer's first chunk goes to the layer before": Bug("<= value", "< value", "differ", file="plan.h"),
    "a ratio is not written": Bug(
        "if (place.chunk == first)", "if (blockIdx.x == 0 && place.chunk == first)", "ratios differ"
    ),
    "a ratio is taken from another block": Bug("return broadcast(ratio)", "return ratios[place.layer]", "differ"),
    "a ratio too many is decided": Bug("layer < layers.count", "layer <= layers.count", "wrote outside of its memory"),
    "maximize is ignored": Bug("options.maximize ? -layer.weight_decay :", "", "gradients differ"),
    "a sum is measured in packs that are not aligned": Bug(
        "is_aligned(x) && is_aligned(y)",
        "is_aligned(x)",
        "misaligned address",
        case="misaligned views",
        build="sanitized",
        file="cuda/sums.cuh",
        kind="in dialects",
    ),
    "what is added is not measured": Bug(
        "layer.scale == 0", "layer.scale == layer.scale", "norms differ|ratios differ", kind="in dialects"
    ),
    "what is added is not scaled in packs": Bug(
        "const auto b = static_cast<float>(loaded.y.values[i]);",
        "const auto b = static_cast<float>(loaded.y.values[i] / scale);",
        "differ",
        kind="in dialects",
        file="cuda/sums.cuh",
    ),
    "what is added is not scaled in the tail": Bug(
        "+ scale * static_cast", "+ static_cast", "differ", kind="in dialects", file="cuda/sums.cuh"
    ),
    "the decay is counted twice": Bug(
        "options.decayed_norm ? 0 :", "", "ratios differ", file="trust_ratio.h", kind="in dialects"
    ),
    "nothing is clipped": Bug(
        "ratio > 1 ? 1 : ratio", "ratio", "ratios differ", file="trust_ratio.h", kind="in dialects"
    ),
    "a ratio is clipped that was not divided by lr": Bug(
        "options.of_updates ? ratio : ratio / lr", "ratio", "ratios differ", file="trust_ratio.h", kind="in dialects"
    ),
    "lr is not in the momentum": Bug("options.lr_in_momentum ? static", "false ? static", "differ", kind="in dialects"),
    "an update is not divided by lr": Bug(
        "grad_norm /= lr;", "", "ratios differ", file="trust_ratio.h", kind="of updates"
    ),
    "a step of no length is divided by lr 0": Bug(
        "options.of_updates && grad_norm != 0",
        "options.of_updates && (grad_norm /= grad_norm) > 0",
        "ratios differ",
        file="trust_ratio.h",
        kind="of updates",
        case="zero norms and empty layers",
    ),
    "an update starts from what it was scaled to": Bug(
        "return old_param + ratio", "return param + ratio", "differ", file="trust_ratio.h", kind="of updates"
    ),
    "lr stays outside of the momentum of SGD": Bug(
        "lr_in_momentum ? lr : 1", "1", "differ", file="sgd.h", family="sgd"
    ),
    "lr is applied twice": Bug("lr_in_momentum ? 1 : lr", "lr", "differ", file="sgd.h", family="sgd"),
    "a skipped step is taken": Bug(
        "if (inv_scale == 0) {\n    return;",
        "if (inv_scale != inv_scale) {\n    return;",
        "a skipped step was written",
        kind="of scaled gradients",
        case="NaN and infinity",
    ),
    "a skipped step has infinite gradients": Bug(
        "inv_scale == 0 ? 0 :",
        "",
        "ratios differ",
        file="trust_ratio.h",
        kind="of scaled gradients",
        case="NaN and infinity",
    ),
    "sums of scaled gradients are taken for those of gradients": Bug(
        "unscaled_squared_norm(grad_sum, scale_of_sums(options))",
        "grad_sum",
        "ratios differ",
        kind="of scaled gradients",
    ),
    "what is added to scaled gradients is not scaled": Bug(
        "layer.scale / value_of(inv_scale)", "layer.scale", "ratios differ", kind="of scaled gradients"
    ),
    "the decay is unscaled too": Bug(
        "(inv_scale * grad + weight_decay * param)",
        "(inv_scale * (grad + weight_decay * param))",
        "gradients differ",
        file="trust_ratio.h",
        kind="of scaled gradients",
    ),
    "a second launch reads the first one's sums": Bug(
        "chunks, arguments, partials.from(chunk),\n           ratios ?",
        "chunks, arguments, partials,\n           ratios ?",
        "ratios differ",
        case=SEVERAL_LAUNCHES,
        file="cuda/launches.h",
    ),
    "the tail of a parameter ends early": Bug(
        "if (i < count) {\n    M none", "if (i < count - 1) {\n    M none", "differ", family="sgd"
    ),
    "a momentum is read from another pack": Bug(
        "kSize>(momentum, pack)", "kSize>(momentum, pack / 2)", "differ", family="sgd"
    ),
    "a wider momentum is taken in the parameter's packs": Bug(
        "x.momentum = load_pack<kAligned, kSize>(momentum, pack)",
        "*reinterpret_cast<Pack<M>*>(&x.momentum) = load_pack<kAligned, Pack<M>::kSize>(momentum, pack)",
        "differ",
        family="sgd",
        dtype=torch.bfloat16,
    ),
    "a momentum is not written": Bug(
        "store_pack<kAligned>(momentum, pack, x.momentum);", "", "momenta differ", family="sgd"
    ),
    "a momentum is read where there is none": Bug(
        "if constexpr (kMomentum) {\n          x", "if (true) {\n          x", "SEGV", build="sanitized", family="sgd"
    ),
    "packs of a momentum need no alignment": Bug(
        " && is_aligned(momentum)",
        "",
        "misaligned address",
        case="misaligned views",
        build="sanitized",
        family="sgd",
    ),
    "maximize does not negate the gradient": Bug(
        "maximize ? -ratio : ratio", "ratio", "parameters differ", file="sgd.h", family="sgd"
    ),
    "maximize negates the decay too": Bug(
        "maximize ? -weight_decay : weight_decay", "weight_decay", "parameters differ", file="sgd.h", family="sgd"
    ),
    "dampening is ignored": Bug(
        "layer.momentum, layer.dampening", "layer.momentum, 0", "parameters differ", family="sgd"
    ),
    "nesterov is ignored": Bug("else if (options.nesterov)", "else if (false)", "parameters differ", family="sgd"),
    "lr_tensor is ignored": Bug("layer.lr * *options.lr_tensor", "layer.lr", "parameters differ", family="sgd"),
    "lr is rounded before it is scaled": Bug(
        "layer.lr * *options.lr_tensor", "float(layer.lr) * float(*options.lr_tensor)", "differ", family="sgd"
    ),
    "what does not decay takes 0 times infinity": Bug(
        "const bool decays = numbers.weight_decay != 0",
        "const bool decays = true",
        "parameters differ",
        case="NaN and infinity",
        family="sgd",
    ),
    "a skipped step of SGD is taken": Bug(
        "if (value_of(options.inv_scale) == 0) {",
        "if (false) {",
        "a skipped step was written",
        family="sgd",
        kind="of scaled gradients",
    ),
    "SGD takes scaled gradients for unscaled ones": Bug(
        "inv_scale(static_cast<T>(inv_scale))",
        "inv_scale(1)",
        "parameters differ",
        file="sgd.h",
        family="sgd",
        kind="of scaled gradients",
    ),
    "a second launch takes the first one's ratios": Bug(
        "ratios == nullptr ? nullptr : ratios + layer",
        "ratios",
        "parameters differ",
        case=SEVERAL_LAUNCHES,
        file="cuda/launches.h",
        family="sgd",
    ),
    "a launch has a layer too many": Bug(
        "Layers<AnyLayer, kMost>::kCapacity)",
        "Layers<AnyLayer, kMost>::kCapacity + 1)",
        "insufficient space|out of bounds|overflow",
        case=SEVERAL_LAUNCHES,
        file="cuda/launches.h",
        build="sanitized",
        family="sgd",
    ),
    "a small launch has a layer too many": Bug(
        "count <= Layers<AnyLayer, kFew>::kCapacity",
        "count <= Layers<AnyLayer, kFew>::kCapacity + 1000",
        "insufficient space|out of bounds|overflow",
        case=SEVERAL_LAUNCHES,
        file="cuda/launches.h",
        build="sanitized",
        family="sgd",
    ),
    **{
        name: Bug(old, new, "differ", case=IN_BLOCKS, file=file, family="sgd", kind=IN_8_BITS)
        for name, file, old, new in [
            ("the last block of a chunk is left out", "codes.h", "index < end", "index + 1 < end"),
            ("a shard is taken for a whole layer", "codes.h", "offset + static_cast<uint32_t>(row)", "row"),
            ("a shard's rows are taken for whole ones", "codes.h", "* whole_row_length", "* row_length"),
            ("a faulty block is erased", "codes.h", "largest >= kInfinity", "false"),
            ("a tiny block is coded", "codes.h", "kLeast = 0x0d800000u", "kLeast = 1"),
            ("codes are rounded to nearest", "codes.h", "+ dither(momentum, salt)", "+ 0.5f"),
            ("codes are rounded towards zero", "codes.h", "std::floor(", "std::trunc("),
            ("half of a block has a scale", "cuda/kernels.cuh", "__shfl_xor_sync(0xffffffffu, value, offset)", "value"),
            ("the dither takes the new parameter", "cuda/kernels.cuh", "params.values[i]), index(i))", "0), index(i))"),
        ]
    },
    "blocks of rows of odd length are read in packs": Bug(
        "layer.rows.row_length % kEach == 0 && ",
        "",
        "misaligned address",
        case=IN_BLOCKS,
        build="sanitized",
        family="sgd",
        kind=IN_8_BITS,
    ),
    **{
        name: Bug(old, new, caught_by, file=file, family="adam")
        for name, file, old, new, caught_by in [
            (
                "a step is written while others read it",
                "cuda/adam.cuh",
                "partials.steps[place.chunk] = step",
                "partials.steps[place.chunk] = *layer.step = step",
                "differ",
            ),
            ("a step is not written", "cuda/adam.cuh", "*layer.step = step;", "", "steps differ"),
            ("a step is not counted", "cuda/adam.cuh", "step += 1;", "", "steps differ"),
            (
                "every block counts a step",
                "cuda/kernels.cuh",
                "place.chunk == layers.first_chunk[place.layer] && threadIdx.x == 0",
                "threadIdx.x == 0",
                "steps differ",
            ),
            ("corrections are not shared", "cuda/adam.cuh", "broadcast(corrections)", "corrections", "differ"),
            ("both corrections are of one beta", "adam.h", "std::pow(beta2, step)", "std::pow(beta1, step)", "differ"),
            (
                "a decay is not decoupled",
                "adam.h",
                "static_cast<T>(decoupled_weight_decay ? 0",
                "static_cast<T>(false ? 0",
                "moments differ",
            ),
            (
                "a decoupled decay is left out of what is measured",
                "cuda/adam.cuh",
                "numbers.decoupled_weight_decay != 0",
                "kApplies && numbers.decoupled_weight_decay != 0",
                "squared norms of updates differ|ratios differ",
            ),
            (
                "a decoupled decay is left out of what is applied",
                "cuda/adam.cuh",
                "numbers.decoupled_weight_decay != 0",
                "!kApplies && numbers.decoupled_weight_decay != 0",
                "parameters differ",
            ),
            ("eps is left out", "adam.h", " + numbers.eps)", ")", "differ"),
            ("maximize is ignored by Adam", "adam.h", "maximize ? -ratio : ratio", "ratio", "moments differ"),
            (
                "moments are updated again by the second launch",
                "cuda/adam.cuh",
                "was_measured || layer.grad == nullptr",
                "layer.grad == nullptr",
                "moments differ",
            ),
            (
                "a ratio of updates is not applied",
                "cuda/adam.cuh",
                "(of_updates ? ratio : 1)",
                "1",
                "parameters differ",
            ),
            (
                "a ratio of updates is that of gradients",
                "cuda/adam.cuh",
                "of_updates ? 1 : ratio, step",
                "ratio, step",
                "moments differ",
            ),
            ("lr is in a ratio of updates", "cuda/adam.cuh", "of_updates ? 1 : lr_of", "lr_of", "ratios differ"),
            (
                "a decoupled decay is in a ratio of gradients",
                "cuda/adam.cuh",
                "of_updates || options.decoupled_weight_decay ? 0",
                "of_updates ? 0",
                "ratios differ",
            ),
            ("the tail of a step ends early", "cuda/adam.cuh", "if (i < count)", "if (i < count - 1)", "differ"),
            (
                "second moments are read from first ones",
                "cuda/adam.cuh",
                "kSize>(exp_avg_sq, pack)",
                "kSize>(exp_avg, pack)",
                "differ",
            ),
            (
                "updates are summed in place of parameters",
                "cuda/adam.cuh",
                "partials.params[place.chunk] = of_params",
                "partials.params[place.chunk] = of_updates",
                "squared norms of params differ|ratios differ",
            ),
        ]
    },
    "what is measured are updates of moments before they were rounded": Bug(
        "    exp_avg_sq = static_cast<M>(v);\n",
        "    exp_avg_sq = static_cast<M>(v);\n    if (!kApplies) {\n      return adam_update<true>(w, m, v, numbers);\n    }\n",
        "squared norms of updates differ|ratios differ",
        file="cuda/adam.cuh",
        family="adam",
        dtype=torch.bfloat16,
    ),
    "what one pass applies are updates of moments after they were rounded": Bug(
        "    if constexpr (!kApplies) {\n      m =",
        "    if constexpr (true) {\n      m =",
        "parameters differ",
        file="cuda/adam.cuh",
        family="adam",
        dtype=torch.bfloat16,
    ),
    "wider moments are measured in packs of the parameter": Bug(
        "Numbers<kAligned, Compute, kSize>{}, updates",
        "Numbers<kAligned, Compute>{}, reinterpret_cast<Pack<Compute>(&)[kUnroll]>(updates)",
        "ratios differ|squared norms of updates differ",
        file="cuda/adam.cuh",
        family="adam",
        dtype=torch.bfloat16,
    ),
    "packs of second moments need no alignment": Bug(
        " && is_aligned(exp_avg_sq)",
        "",
        "misaligned address",
        case="misaligned views",
        build="sanitized",
        file="cuda/adam.cuh",
        family="adam",
    ),
    "a gradient is read where there is none": Bug(
        "kMoments ? grad[i] : T(0)", "grad[i]", "null pointer", build="sanitized", file="cuda/adam.cuh", family="adam"
    ),
    **{
        name: Bug(old, new, "a skipped step was written", file=file, family="adam", kind="of scaled gradients")
        for name, file, old, new in [
            ("a skipped step of Adam is taken", "cuda/adam.cuh", "(value_of(options.inv_scale) == 0)", "(false)"),
            ("a skipped step of Adam is measured", "cuda/adam.cuh", "(value_of(options.inv_scale) != 0)", "(true)"),
            ("a skipped step is counted", "cuda/kernels.cuh", " && value_of(inv_scale) != 0", ""),
        ]
    },
    "updates are measured as scaled ones": Bug(
        "options.ratio.of_updates ? 1 : value_of",
        "value_of",
        "ratios",
        file="cuda/adam.cuh",
        family="adam",
        kind="of scaled gradients",
    ),
    **{
        name: Bug(old, new, "ratios differ|steps differ", case=SEVERAL_LAUNCHES, file=file, family="adam")
        for name, file, old, new in [
            (
                "a launch of Adam takes ratios of another",
                "cuda/launches.h",
                "ratios ? ratios + layer : nullptr",
                "ratios",
            ),
            ("a launch of Adam takes steps of another", "cuda/kernels.cuh", "steps ? steps + chunk : nullptr", "steps"),
        ]
    },
}


@pytest.fixture(scope="session")
def headers(build_once: Callable[[str, Callable[[Path], None]], Path]) -> Callable[[str], Path]:
    """Precompile the headers that all bugs share, once a session for each build."""
    shared = ("cuda_on_host.h", "cstring", "limits", "c10/util/BFloat16.h", "c10/util/Half.h")

    def precompiled(build: str) -> Path:
        def precompile(folder: Path) -> None:
            header = folder / "headers.h"
            header.write_text("".join(f"#include <{name}>\n" for name in shared))
            run_compiler(*BUILDS[build], *COMPILES_FAST, "-x", "c++-header", header, "-o", f"{header}.gch")

        return build_once(f"cuda_on_host-headers-{build}", precompile) / "headers.h"

    return precompiled


def replace_in(file: Path, old: str, new: str) -> None:
    source = file.read_text()
    assert old in source, f"{file.name} has no such text: {old}"
    file.write_text(source.replace(old, new))


def plant(bug: Bug, folder: Path, headers: Path) -> Path:
    """Compile the kernels with a bug in them, as far as the bug's case needs them."""
    csrc = copy_sources(folder)
    replace_in(csrc / bug.file, bug.old, bug.new)
    if bug.case != SEVERAL_LAUNCHES:  # one size of launches compiles faster than three
        replace_in(csrc / "cuda" / "kernels.cuh", "{4096, 16384, 32764}", "{32764, 32764, 32764}")
    needed = f"-DONLY_DTYPE={DTYPES.index(bug.dtype)}", only(bug.family)
    return compile_driver(folder, csrc, *BUILDS[bug.build], *COMPILES_FAST, "-include", headers, *needed)


def ways_of(family: str, kind: str, dtype: torch.dtype) -> list[Way]:
    ways: Any = {"scale": WAYS, "sgd": {**SGD_WAYS, IN_8_BITS: coded_sgd_ways}, "adam": ADAM_WAYS}[family][kind]
    return ways(dtype) if callable(ways) else ways


def compare(family: str, driver: Path, case: Case, ways: list[Way]) -> None:
    if family == "adam":
        check_adam(case, ways, execute_adam(driver, case, ways))
    else:
        (check_sgd if family == "sgd" else check)(case, ways, execute(driver, case, ways))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("build", BUILDS)
def test_without_a_bug_nothing_is_caught(
    build: str, family: str, headers: Callable[[str], Path], tmp_path: Path
) -> None:
    """The other changes that planting a bug makes are no bugs themselves."""
    skip_without_sanitizers(build)
    none = Bug("namespace torchlars", "namespace torchlars", "nothing", build=build, family=family)
    case, driver = new_case(none.case, none.dtype), plant(none, tmp_path, headers(build))
    for kind in {"scale": WAYS, "sgd": SGD_WAYS, "adam": ADAM_WAYS}[family]:
        compare(family, driver, case, ways_of(family, kind, none.dtype)[-2:])


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str, headers: Callable[[str], Path], tmp_path: Path) -> None:
    bug = BUGS[name]
    skip_without_sanitizers(bug.build)
    case, ways = new_case(bug.case, bug.dtype), ways_of(bug.family, bug.kind, bug.dtype)
    if bug.family == "sgd":
        ways = ways[::-1]
    elif bug.family == "scale" and bug.kind == "plain":
        ways = [ways[1], ways[-2]]
    if bug.case == SEVERAL_LAUNCHES:
        ways = {"scale": ways[-1:], "sgd": ways[1:2], "adam": [way for way in ways if way.op == LAMB][:1]}[bug.family]
    driver = plant(bug, tmp_path, headers(bug.build))
    with pytest.raises(AssertionError, match=bug.caught_by):
        compare(bug.family, driver, case, ways)
