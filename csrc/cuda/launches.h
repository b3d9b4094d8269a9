// Launches of the kernels: on which layers, in how many blocks. Host code over raw pointers, without ATen, which the
// host shim in tests/ compiles too. The caller passes `launch(kernel, blocks, arguments...)`.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "adam.cuh"
#include "kernels.cuh"

namespace torchlars::cuda {

// The type of a trust ratio and of a layer's arithmetic.
template <typename T>
using compute_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Consecutive layers of a vector.
template <typename AnyLayer>
struct Slice {
  Slice(const std::vector<AnyLayer>& layers) : Slice(layers, {0, static_cast<int64_t>(layers.size())}) {}
  Slice(const std::vector<AnyLayer>& layers, Range range)
      : first(layers.data() + range.begin), count(range.end - range.begin) {}

  const AnyLayer* begin() const { return first; }
  const AnyLayer* end() const { return first + count; }

  const AnyLayer* first;
  int64_t count;
};

template <typename AnyLayer>
int64_t count_chunks(const Slice<AnyLayer>& layers) {
  int64_t chunks = 0;
  for (const AnyLayer& layer : layers) {
    chunks += num_chunks(layer.numel);
  }
  return chunks;
}

// Fills the arguments of one launch with layers, and calls visit(arguments, blocks for their chunks).
template <size_t kBytes, typename AnyLayer, typename Visit>
int64_t visit_launch(const AnyLayer* layers, int64_t count, const Visit& visit) {
  static_assert(sizeof(Layers<AnyLayer, kBytes>) + kOtherArguments <= kBytes, "they must fit a kernel's arguments");
  Layers<AnyLayer, kBytes> arguments{};
  arguments.count = static_cast<int32_t>(count);
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) {
    arguments.first_chunk[i] = static_cast<int32_t>(chunks);
    arguments.layer[i] = layers[i];
    chunks += num_chunks(layers[i].numel);
  }
  arguments.first_chunk[count] = static_cast<int32_t>(chunks);
  visit(arguments, static_cast<int>(chunks));
  return chunks;
}

// Calls visit(arguments of one launch, blocks for their chunks, index of the first layer, index of the first chunk)
// until all layers are done.
template <typename AnyLayer, typename Visit>
void for_launches(const Slice<AnyLayer>& layers, const Visit& visit) {
  constexpr auto kFew = kArgumentBytes[0], kSome = kArgumentBytes[1], kMost = kArgumentBytes[2];
  int64_t first_chunk = 0;
  for (int64_t first = 0; first < layers.count;) {
    const int64_t count = std::min<int64_t>(layers.count - first, Layers<AnyLayer, kMost>::kCapacity);
    const auto at = [&](const auto& arguments, int chunks) { visit(arguments, chunks, first, first_chunk); };
    const AnyLayer* from = layers.first + first;
    first_chunk += count <= Layers<AnyLayer, kFew>::kCapacity    ? visit_launch<kFew>(from, count, at)
                   : count <= Layers<AnyLayer, kSome>::kCapacity ? visit_launch<kSome>(from, count, at)
                                                                 : visit_launch<kMost>(from, count, at);
    first += count;
  }
}

// Fills partial sums of squares, count_chunks(layers) of each that is not null.
template <typename T, typename Launch>
void launch_measure(const Launch& launch, const Slice<MeasuredLayer>& layers, Partials partials,
                    const float* inv_scale) {
  for_launches(layers, [&](const auto& arguments, int chunks, int64_t, int64_t chunk) {
    launch(measure<T, std::decay_t<decltype(arguments)>>, chunks, arguments, partials.from(chunk), inv_scale);
  });
}

template <typename Launch>
void launch_add_partials(const Launch& launch, const Slice<MeasuredLayer>& layers, const double* partials,
                         double* squared_norms, const float* inv_scale) {
  for_launches(layers, [&](const auto& arguments, int, int64_t layer, int64_t chunk) {
    launch(add_partials<std::decay_t<decltype(arguments)>>, arguments.count, arguments, partials + chunk,
           squared_norms + layer, inv_scale);
  });
}

template <typename Ratio, typename Launch>
void launch_decide(const Launch& launch, const Slice<Layer>& layers, const double* param_squared_norms,
                   const double* grad_squared_norms, Ratio* ratios, const LarsOptions& options) {
  for_launches(layers, [&](const auto& arguments, int, int64_t layer, int64_t) {
    launch(decide<Ratio, std::decay_t<decltype(arguments)>>, static_cast<int>(divide_up(arguments.count, kThreads)),
           arguments, param_squared_norms + layer, grad_squared_norms + layer, ratios + layer, options);
  });
}

// Where there are partial sums, ratios are written, else they are read. Except for updates they may be null then: 1.

template <typename T, typename Launch>
void launch_apply(const Launch& launch, const Slice<Layer>& layers, Partials partials, compute_type<T>* ratios,
                  const LarsOptions& options) {
  for_launches(layers, [&](const auto& arguments, int chunks, int64_t layer, int64_t chunk) {
    launch(apply<T, compute_type<T>, std::decay_t<decltype(arguments)>>, chunks, arguments, partials.from(chunk),
           ratios ? ratios + layer : nullptr, options);
  });
}

template <typename T, typename Launch>
void launch_apply_to_updates(const Launch& launch, const Slice<Layer>& layers, Partials partials,
                             compute_type<T>* ratios, const LarsOptions& options) {
  for_launches(layers, [&](const auto& arguments, int chunks, int64_t layer, int64_t chunk) {
    launch(apply_to_updates<T, compute_type<T>, std::decay_t<decltype(arguments)>>, chunks, arguments,
           partials.from(chunk), ratios + layer, options);
  });
}

// M: the type of the momentum, int8_t for layers that are CodedSgdLayer.
template <typename T, typename M, typename AnyLayer, typename Launch>
void launch_update(const Launch& launch, const Slice<AnyLayer>& layers, Partials partials, compute_type<T>* ratios,
                   const SgdOptions& options) {
  for_launches(layers, [&](const auto& arguments, int chunks, int64_t layer, int64_t chunk) {
    launch(update<T, M, compute_type<T>, std::decay_t<decltype(arguments)>>, chunks, arguments, partials.from(chunk),
           ratios == nullptr ? nullptr : ratios + layer, options);
  });
}

// M: the type of the moments.

template <typename T, typename M, typename Launch>
void launch_measure_adam(const Launch& launch, const Slice<AdamLayer>& layers, Partials partials,
                         const AdamOptions& options) {
  for_launches(layers, [&](const auto& arguments, int chunks, int64_t, int64_t chunk) {
    launch(measure_adam<T, M, compute_type<T>, std::decay_t<decltype(arguments)>>, chunks, arguments,
           partials.from(chunk), options);
  });
}

template <typename T, typename M, typename Launch>
void launch_update_adam(const Launch& launch, const Slice<AdamLayer>& layers, Partials partials,
                        compute_type<T>* ratios, const AdamOptions& options) {
  for_launches(layers, [&](const auto& arguments, int chunks, int64_t layer, int64_t chunk) {
    launch(update_adam<T, M, compute_type<T>, std::decay_t<decltype(arguments)>>, chunks, arguments,
           partials.from(chunk), ratios ? ratios + layer : nullptr, options);
  });
}

}  // namespace torchlars::cuda
