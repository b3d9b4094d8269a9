// Which kernels run, on which layers, in how many blocks. Pure host code over raw pointers, so that the host shim in
// tests/ goes through it too: `launch(kernel, blocks, arguments...)` is the caller's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels.cuh"

namespace torchlars::cuda {

// One layer as the caller names it. Pointers that a kernel does not read may be null, numbers that it does not use 0.
struct Layer {
  int64_t numel = 0;
  const void* param = nullptr;
  void* grad = nullptr;
  double weight_decay = 0;
  double trust_coef = 0;
  double eps = 0;
};

// The type of a trust ratio and of a layer's arithmetic.
template <typename T>
using compute_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline int64_t count_chunks(const std::vector<Layer>& layers) {
  int64_t chunks = 0;
  for (const Layer& layer : layers) {
    chunks += num_chunks(layer.numel);
  }
  return chunks;
}

// Calls visit(layers of one launch, index of its first layer, index of its first chunk) until all layers were served.
template <typename Visit>
void for_launches(const std::vector<Layer>& layers, const Visit& visit) {
  int64_t first_chunk = 0;
  for (size_t first = 0; first < layers.size(); first += Layers::kCapacity) {
    Layers arguments{};
    arguments.count = static_cast<int32_t>(std::min<size_t>(layers.size() - first, Layers::kCapacity));
    int64_t chunks = 0;
    for (int i = 0; i < arguments.count; ++i) {
      const Layer& layer = layers[first + i];
      arguments.first_chunk[i] = static_cast<int32_t>(chunks);
      arguments.numel[i] = layer.numel;
      arguments.param[i] = layer.param;
      arguments.grad[i] = layer.grad;
      arguments.weight_decay[i] = layer.weight_decay;
      arguments.trust_coef[i] = layer.trust_coef;
      arguments.eps[i] = layer.eps;
      chunks += num_chunks(layer.numel);
    }
    arguments.first_chunk[arguments.count] = static_cast<int32_t>(chunks);
    visit(arguments, static_cast<int64_t>(first), first_chunk);
    first_chunk += chunks;
  }
}

inline int chunks_of(const Layers& layers) { return layers.first_chunk[layers.count]; }

// Partial sums of squares, count_chunks(layers) of each. Either pointer may be null.
template <typename T, typename Launch>
void launch_measure(const Launch& launch, const std::vector<Layer>& layers, double* param_partials,
                    double* grad_partials) {
  for_launches(layers, [&](const Layers& arguments, int64_t, int64_t chunk) {
    launch(measure<T>, chunks_of(arguments), arguments, param_partials ? param_partials + chunk : nullptr,
           grad_partials ? grad_partials + chunk : nullptr);
  });
}

template <typename Launch>
void launch_add_partials(const Launch& launch, const std::vector<Layer>& layers, const double* partials,
                         double* squared_norms) {
  for_launches(layers, [&](const Layers& arguments, int64_t layer, int64_t chunk) {
    launch(add_partials, arguments.count, arguments, partials + chunk, squared_norms + layer);
  });
}

template <typename Ratio, typename Launch>
void launch_decide(const Launch& launch, const std::vector<Layer>& layers, const double* param_squared_norms,
                   const double* grad_squared_norms, Ratio* ratios) {
  for_launches(layers, [&](const Layers& arguments, int64_t layer, int64_t) {
    launch(decide<Ratio>, static_cast<int>(divide_up(arguments.count, kThreads)), arguments,
           param_squared_norms + layer, grad_squared_norms + layer, ratios + layer);
  });
}

template <typename T, typename Launch>
void launch_apply(const Launch& launch, const std::vector<Layer>& layers, const compute_type<T>* ratios,
                  bool maximize) {
  for_launches(layers, [&](const Layers& arguments, int64_t layer, int64_t) {
    launch(apply<T, compute_type<T>>, chunks_of(arguments), arguments, ratios + layer, maximize ? -1.0 : 1.0);
  });
}

template <typename T, typename Launch>
void launch_decide_and_apply(const Launch& launch, const std::vector<Layer>& layers, const double* param_partials,
                             const double* grad_partials, compute_type<T>* ratios, bool maximize) {
  for_launches(layers, [&](const Layers& arguments, int64_t layer, int64_t chunk) {
    launch(decide_and_apply<T, compute_type<T>>, chunks_of(arguments), arguments, param_partials + chunk,
           grad_partials + chunk, ratios + layer, maximize ? -1.0 : 1.0);
  });
}

}  // namespace torchlars::cuda
