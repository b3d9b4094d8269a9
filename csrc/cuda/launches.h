// Which kernels run, on which layers, in how many blocks. Pure host code over raw pointers, so that the host shim in
// tests/ goes through it too: `launch(kernel, blocks, arguments...)` is the caller's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.cuh"

namespace torchlars::cuda {

// The type of a trust ratio and of a layer's arithmetic.
template <typename T>
using compute_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename AnyLayer>
int64_t count_chunks(const std::vector<AnyLayer>& layers) {
  int64_t chunks = 0;
  for (const AnyLayer& layer : layers) {
    chunks += num_chunks(layer.numel);
  }
  return chunks;
}

// Calls visit(layers of one launch, index of its first layer, index of its first chunk) until all layers were served.
template <typename AnyLayer, typename Visit>
void for_launches(const std::vector<AnyLayer>& layers, const Visit& visit) {
  using Arguments = Layers<AnyLayer>;
  static_assert(sizeof(Arguments) + kOtherArguments <= kArgumentBytes, "they must fit the arguments of a kernel");
  int64_t first_chunk = 0;
  for (size_t first = 0; first < layers.size(); first += Arguments::kCapacity) {
    Arguments arguments{};
    arguments.count = static_cast<int32_t>(std::min<size_t>(layers.size() - first, Arguments::kCapacity));
    int64_t chunks = 0;
    for (int i = 0; i < arguments.count; ++i) {
      arguments.first_chunk[i] = static_cast<int32_t>(chunks);
      arguments.layer[i] = layers[first + i];
      chunks += num_chunks(arguments.layer[i].numel);
    }
    arguments.first_chunk[arguments.count] = static_cast<int32_t>(chunks);
    visit(arguments, static_cast<int64_t>(first), first_chunk);
    first_chunk += chunks;
  }
}

template <typename AnyLayer>
int chunks_of(const Layers<AnyLayer>& layers) {
  return layers.first_chunk[layers.count];
}

// Partial sums of squares, count_chunks(layers) of each. Any pointer may be null.
template <typename T, typename Launch>
void launch_measure(const Launch& launch, const std::vector<MeasuredLayer>& layers, double* param_partials,
                    double* grad_partials, const float* inv_scale) {
  for_launches(layers, [&](const Layers<MeasuredLayer>& arguments, int64_t, int64_t chunk) {
    launch(measure<T>, chunks_of(arguments), arguments, param_partials ? param_partials + chunk : nullptr,
           grad_partials ? grad_partials + chunk : nullptr, inv_scale);
  });
}

template <typename Launch>
void launch_add_partials(const Launch& launch, const std::vector<MeasuredLayer>& layers, const double* partials,
                         double* squared_norms, const float* inv_scale) {
  for_launches(layers, [&](const Layers<MeasuredLayer>& arguments, int64_t layer, int64_t chunk) {
    launch(add_partials, arguments.count, arguments, partials + chunk, squared_norms + layer, inv_scale);
  });
}

template <typename Ratio, typename Launch>
void launch_decide(const Launch& launch, const std::vector<Layer>& layers, const double* param_squared_norms,
                   const double* grad_squared_norms, Ratio* ratios, const LarsOptions& options) {
  for_launches(layers, [&](const Layers<Layer>& arguments, int64_t layer, int64_t) {
    launch(decide<Ratio>, static_cast<int>(divide_up(arguments.count, kThreads)), arguments,
           param_squared_norms + layer, grad_squared_norms + layer, ratios + layer, options);
  });
}

template <typename T, typename Launch>
void launch_apply(const Launch& launch, const std::vector<Layer>& layers, const compute_type<T>* ratios,
                  const LarsOptions& options) {
  for_launches(layers, [&](const Layers<Layer>& arguments, int64_t layer, int64_t) {
    launch(apply<T, compute_type<T>>, chunks_of(arguments), arguments, ratios + layer, options);
  });
}

template <typename T, typename Launch>
void launch_decide_and_apply(const Launch& launch, const std::vector<Layer>& layers, const double* param_partials,
                             const double* grad_partials, compute_type<T>* ratios, const LarsOptions& options) {
  for_launches(layers, [&](const Layers<Layer>& arguments, int64_t layer, int64_t chunk) {
    launch(decide_and_apply<T, compute_type<T>>, chunks_of(arguments), arguments, param_partials + chunk,
           grad_partials + chunk, ratios + layer, options);
  });
}

template <typename T, typename Launch>
void launch_apply_to_updates(const Launch& launch, const std::vector<Layer>& layers, const compute_type<T>* ratios) {
  for_launches(layers, [&](const Layers<Layer>& arguments, int64_t layer, int64_t) {
    launch(apply_to_updates<T, compute_type<T>>, chunks_of(arguments), arguments, ratios + layer);
  });
}

template <typename T, typename Launch>
void launch_decide_and_apply_to_updates(const Launch& launch, const std::vector<Layer>& layers,
                                        const double* param_partials, const double* grad_partials,
                                        compute_type<T>* ratios, const LarsOptions& options) {
  for_launches(layers, [&](const Layers<Layer>& arguments, int64_t layer, int64_t chunk) {
    launch(decide_and_apply_to_updates<T, compute_type<T>>, chunks_of(arguments), arguments, param_partials + chunk,
           grad_partials + chunk, ratios + layer, options);
  });
}

// ratios may be null: plain SGD. M: the type of the momentum.
template <typename T, typename M, typename Launch>
void launch_update(const Launch& launch, const std::vector<SgdLayer>& layers, const compute_type<T>* ratios,
                   const SgdOptions& options) {
  for_launches(layers, [&](const Layers<SgdLayer>& arguments, int64_t layer, int64_t) {
    launch(update<T, M, compute_type<T>>, chunks_of(arguments), arguments, ratios ? ratios + layer : nullptr, options);
  });
}

template <typename T, typename M, typename Launch>
void launch_decide_and_update(const Launch& launch, const std::vector<SgdLayer>& layers, const double* param_partials,
                              const double* grad_partials, compute_type<T>* ratios, const SgdOptions& options) {
  for_launches(layers, [&](const Layers<SgdLayer>& arguments, int64_t layer, int64_t chunk) {
    launch(decide_and_update<T, M, compute_type<T>>, chunks_of(arguments), arguments, param_partials + chunk,
           grad_partials + chunk, ratios + layer, options);
  });
}

}  // namespace torchlars::cuda
