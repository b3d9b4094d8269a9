// Schemas of the ops, their registration for CPU and CUDA, and the Python module. The ops are documented in
// torchlars/reference.py, which also computes them on every other device.
#include <ATen/core/LegacyTypeDispatch.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "eager.h"
#include "plan.h"

namespace torchlars::cpu {
at::Tensor squared_norms(const SquaredNormsArguments& arguments);
at::Tensor trust_ratios(const TrustRatiosArguments& arguments);
void scale_gradients_(const ScaleGradientsArguments& arguments);
void scale_updates_(const ScaleUpdatesArguments& arguments);
void sgd_(const SgdArguments& arguments);
void adam_(const AdamArguments& arguments);
}  // namespace torchlars::cpu

#ifdef TORCHLARS_WITH_CUDA
namespace torchlars::cuda {
at::Tensor squared_norms(const SquaredNormsArguments& arguments);
at::Tensor trust_ratios(const TrustRatiosArguments& arguments);
void scale_gradients_(const ScaleGradientsArguments& arguments);
void scale_updates_(const ScaleUpdatesArguments& arguments);
void sgd_(const SgdArguments& arguments);
void adam_(const AdamArguments& arguments);
void set_run_bytes(int64_t bytes);
}  // namespace torchlars::cuda
#endif

namespace {

void check_value(bool holds, const std::string& message) {
  if (!holds) {
    throw pybind11::value_error(message);
  }
}

// A plan of sizes from Python, checked so that no arithmetic in plan.h overflows.
torchlars::Plan plan_of(const char* function, std::vector<int64_t> numels) {
  check_value(!numels.empty(), c10::str(function, ": expected at least one size (got: numels is empty)"));
  constexpr int64_t kMaxWork = std::numeric_limits<int64_t>::max() / 2;
  constexpr int64_t kMaxChunkWork = torchlars::kMaxChunks * torchlars::kChunkWork;  // of one tensor
  int64_t work = 0;
  for (size_t i = 0; i < numels.size(); ++i) {
    const auto got = [&] { return c10::str(" (numels[", i, "]: ", numels[i], ")"); };
    check_value(numels[i] >= 0, c10::str(function, ": expected non-negative sizes", got()));
    check_value(numels[i] <= kMaxWork - kMaxChunkWork - work,
                c10::str(function, ": expected sizes whose work stays below 2^62", got()));
    work += numels[i] + kMaxChunkWork;
  }
  return torchlars::Plan(std::move(numels));
}

// All chunks that walk(order, visit) visits, as (tensor, chunk, begin, end).
template <typename Walk>
std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> visits_of(bool backwards, const Walk& walk) {
  std::vector<std::tuple<int64_t, int64_t, int64_t, int64_t>> chunks;
  walk(backwards ? torchlars::Order::kBackwards : torchlars::Order::kForwards,
       [&](int64_t tensor, int64_t chunk, torchlars::Range range) {
         chunks.emplace_back(tensor, chunk, range.begin, range.end);
       });
  return chunks;
}

// What the dispatcher calls on a device: makes one struct of the arguments, checks it, and calls the device's function.
template <typename Arguments, typename Arguments::Result (*kFunction)(const Arguments&),
          typename Signature = torchlars::Signature<Arguments>>
struct Kernel;

template <typename Arguments, typename Arguments::Result (*kFunction)(const Arguments&), typename Result,
          typename... Parameters>
struct Kernel<Arguments, kFunction, Result(Parameters...)> {
  static Result call(Parameters... parameters) {
    const at::AutoDispatchBelowADInplaceOrView no_autograd;
    const Arguments arguments{parameters...};
    torchlars::check(arguments);
    return kFunction(arguments);
  }
};

template <typename Arguments, typename Arguments::Result (*kFunction)(const Arguments&)>
void implement(torch::Library& m) {
  m.impl(Arguments::kOp, Kernel<Arguments, kFunction>::call);
}

}  // namespace

// Keyword-only after the tensors, and no two bools in a row: callers in C++ pass all of them by position.
TORCH_LIBRARY(torchlars, m) {
  m.def(
      "squared_norms(Tensor[] tensors, *, Tensor[]? others=None, float[] scales=[], Tensor? inv_scale=None) -> Tensor");
  m.def(
      "trust_ratios(Tensor param_squared_norms, Tensor grad_squared_norms, *, float[] weight_decays, "
      "float[] trust_coefs, float[] eps, ScalarType dtype, bool clip=False, float[] lrs=[], bool of_updates=False, "
      "Tensor? lr_tensor=None) -> Tensor");
  m.def(
      "scale_gradients_(Tensor(a!)[] grads, Tensor[] params, *, bool maximize, float[] weight_decays, "
      "bool decayed_norm=False, Tensor(b!)? ratios=None, float[] trust_coefs=[], float[] eps=[], bool clip=False, "
      "float[] lrs=[], bool lr_in_momentum=False, Tensor? lr_tensor=None, Tensor? inv_scale=None) -> ()");
  m.def(
      "scale_updates_(Tensor(a!)[] params, Tensor[] old_params, *, Tensor(b!) ratios, float[] trust_coefs=[], "
      "float[] eps=[], bool clip=False, float[] lrs=[], Tensor? lr_tensor=None) -> ()");
  m.def(
      "sgd_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, *, Tensor(c!)[]? momentum_scales=None, "
      "int[] row_lengths=[], int[] offsets=[], bool maximize, "
      "float[] weight_decays, bool decayed_norm=False, float[] lrs, bool lr_in_momentum=False, Tensor? lr_tensor=None, "
      "float[] momentums, float[] dampenings, bool nesterov=False, Tensor(d!)? ratios=None, float[] trust_coefs=[], "
      "float[] eps=[], bool clip=False, Tensor? inv_scale=None) -> ()");
  m.def(
      "adam_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor(d!)[] steps, *, bool maximize, float[] weight_decays, bool decoupled_weight_decay, float beta1, "
      "float beta2, float adam_eps, bool decayed_norm=False, float[] lrs, Tensor? lr_tensor=None, "
      "bool of_updates=False, Tensor(e!)? ratios=None, float[] trust_coefs=[], float[] eps=[], bool clip=False, "
      "Tensor(f!)? squared_norms=None, Tensor? inv_scale=None) -> ()");
}

TORCH_LIBRARY_IMPL(torchlars, CPU, m) {
  using namespace torchlars;
  implement<SquaredNormsArguments, cpu::squared_norms>(m);
  implement<TrustRatiosArguments, cpu::trust_ratios>(m);
  implement<ScaleGradientsArguments, cpu::scale_gradients_>(m);
  implement<ScaleUpdatesArguments, cpu::scale_updates_>(m);
  implement<SgdArguments, cpu::sgd_>(m);
  implement<AdamArguments, cpu::adam_>(m);
}

#ifdef TORCHLARS_WITH_CUDA
TORCH_LIBRARY_IMPL(torchlars, CUDA, m) {
  using namespace torchlars;
  implement<SquaredNormsArguments, cuda::squared_norms>(m);
  implement<TrustRatiosArguments, cuda::trust_ratios>(m);
  implement<ScaleGradientsArguments, cuda::scale_gradients_>(m);
  implement<ScaleUpdatesArguments, cuda::scale_updates_>(m);
  implement<SgdArguments, cuda::sgd_>(m);
  implement<AdamArguments, cuda::adam_>(m);
}
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Loads the ops of torchlars into torch.ops.torchlars.";
#ifdef TORCHLARS_WITH_CUDA
  m.attr("has_cuda") = true;
  m.def(
      "set_run_bytes",
      [](int64_t bytes) {
        check_value(bytes >= 0, c10::str("set_run_bytes: expected a non-negative number of bytes (got: ", bytes, ")"));
        torchlars::cuda::set_run_bytes(bytes);
      },
      pybind11::arg("bytes"),
      "For benchmarks: measure and scale layers on a GPU in runs of so many bytes of parameters, gradients and, of "
      "LAMB's updates, moments, which may fit its L2 cache. 0, the default: all layers at once.");
#else
  m.attr("has_cuda") = false;
#endif

  torchlars::bind_fast_path(m);

  m.def(
      "chunks",
      [](std::vector<int64_t> numels) {
        const auto plan = plan_of("chunks", std::move(numels));
        std::vector<std::tuple<int64_t, int64_t, int64_t>> chunks;
        for (size_t tensor = 0; tensor < plan.numel.size(); ++tensor) {
          for (int64_t chunk = 0; chunk < torchlars::num_chunks(plan.numel[tensor]); ++chunk) {
            const auto range = torchlars::chunk_range(plan.numel[tensor], chunk);
            chunks.emplace_back(tensor, range.begin, range.end);
          }
        }
        return chunks;
      },
      pybind11::arg("numels"), "Every chunk of the plan as (tensor, begin, end), in order.");
  m.def(
      "chunks_starting_in",
      [](std::vector<int64_t> numels, int64_t begin, int64_t end, bool backwards) {
        const auto plan = plan_of("chunks_starting_in", std::move(numels));
        check_value(0 <= begin && begin <= end && end <= plan.work,
                    c10::str("chunks_starting_in: expected 0 <= begin <= end <= ", plan.work,
                             ", the plan's work (begin: ", begin, ", end: ", end, ")"));
        return visits_of(backwards,
                         [&](auto order, const auto& visit) { plan.for_chunks_starting_in(begin, end, order, visit); });
      },
      pybind11::arg("numels"), pybind11::arg("begin"), pybind11::arg("end"), pybind11::arg("backwards") = false,
      "The share of a CPU thread: (tensor, chunk, begin, end) of every chunk whose work begins in [begin, end).");
  m.def(
      "chunks_of_part",
      [](std::vector<int64_t> numels, int64_t part, int64_t parts, bool backwards) {
        const auto plan = plan_of("chunks_of_part", std::move(numels));
        check_value(0 <= part && part < parts,
                    c10::str("chunks_of_part: expected 0 <= part < parts (part: ", part, ", parts: ", parts, ")"));
        return visits_of(backwards, [&](auto order, const auto& visit) { plan.for_part(part, parts, order, visit); });
      },
      pybind11::arg("numels"), pybind11::arg("part"), pybind11::arg("parts"), pybind11::arg("backwards") = false,
      "The share of a CPU thread that takes one of so many parts of every tensor, likewise.");
  m.def(
      "runs_within",
      [](const std::vector<int64_t>& sizes, int64_t limit) {
        std::vector<std::pair<int64_t, int64_t>> runs;
        for (const auto& run : torchlars::runs_within(sizes, limit)) {
          runs.emplace_back(run.begin, run.end);
        }
        return runs;
      },
      pybind11::arg("sizes"), pybind11::arg("limit"), "Runs of consecutive items as (begin, end).");
  m.def(
      "find_start",
      [](const std::vector<int64_t>& starts, int64_t value) {
        return torchlars::find_start(starts.data(), starts.size(), value);
      },
      pybind11::arg("starts"), pybind11::arg("value"), "The last i with starts[i] <= value.");
}
