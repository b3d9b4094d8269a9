// The arguments of each op, once for all devices, by the names and in the order of its schema in ops.cpp. Lists are
// borrowed from the caller. What arguments mean is documented in torchlars/reference.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>

#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

namespace torchlars {

struct SquaredNormsArguments {
  static constexpr const char* kOp = "squared_norms";
  using Result = at::Tensor;

  at::TensorList tensors;
  std::optional<at::TensorList> others;
  at::ArrayRef<double> scales;
  std::optional<at::Tensor> inv_scale;

  auto tie() const { return std::tie(tensors, others, scales, inv_scale); }
};

struct TrustRatiosArguments {
  static constexpr const char* kOp = "trust_ratios";
  using Result = at::Tensor;

  at::Tensor param_squared_norms;
  at::Tensor grad_squared_norms;
  at::ArrayRef<double> weight_decays;
  at::ArrayRef<double> trust_coefs;
  at::ArrayRef<double> eps;
  c10::ScalarType dtype = c10::kFloat;
  bool clip = false;
  at::ArrayRef<double> lrs;  // empty: none is needed
  bool of_updates = false;
  std::optional<at::Tensor> lr_tensor;

  auto tie() const {
    return std::tie(param_squared_norms, grad_squared_norms, weight_decays, trust_coefs, eps, dtype, clip, lrs,
                    of_updates, lr_tensor);
  }
};

// In the ops that follow, ratios are measured and written if trust_coefs are given, else read if ratios are given, else
// they are 1.

struct ScaleGradientsArguments {
  static constexpr const char* kOp = "scale_gradients_";
  using Result = void;

  at::TensorList grads;
  at::TensorList params;
  bool maximize = false;
  at::ArrayRef<double> weight_decays;
  bool decayed_norm = false;
  std::optional<at::Tensor> ratios;
  at::ArrayRef<double> trust_coefs;
  at::ArrayRef<double> eps;
  bool clip = false;
  at::ArrayRef<double> lrs;  // may be empty without clip and lr_in_momentum
  bool lr_in_momentum = false;
  std::optional<at::Tensor> lr_tensor;
  std::optional<at::Tensor> inv_scale;

  auto tie() const {
    return std::tie(grads, params, maximize, weight_decays, decayed_norm, ratios, trust_coefs, eps, clip, lrs,
                    lr_in_momentum, lr_tensor, inv_scale);
  }
};

struct ScaleUpdatesArguments {
  static constexpr const char* kOp = "scale_updates_";
  using Result = void;

  at::TensorList params;
  at::TensorList old_params;
  at::Tensor ratios;
  at::ArrayRef<double> trust_coefs;
  at::ArrayRef<double> eps;
  bool clip = false;
  at::ArrayRef<double> lrs;  // empty where ratios are read
  std::optional<at::Tensor> lr_tensor;

  auto tie() const { return std::tie(params, old_params, ratios, trust_coefs, eps, clip, lrs, lr_tensor); }
};

struct SgdArguments {
  static constexpr const char* kOp = "sgd_";
  using Result = void;

  at::TensorList params;
  at::TensorList grads;
  at::TensorList momentum_buffers;                // empty: no momentum
  std::optional<at::TensorList> momentum_scales;  // given: momentum_buffers are codes
  at::ArrayRef<int64_t> row_lengths;              // of whole layers; empty: these are whole
  at::ArrayRef<int64_t> offsets;                  // likewise
  bool maximize = false;
  at::ArrayRef<double> weight_decays;
  bool decayed_norm = false;
  at::ArrayRef<double> lrs;
  bool lr_in_momentum = false;
  std::optional<at::Tensor> lr_tensor;
  at::ArrayRef<double> momentums;
  at::ArrayRef<double> dampenings;
  bool nesterov = false;
  std::optional<at::Tensor> ratios;
  at::ArrayRef<double> trust_coefs;
  at::ArrayRef<double> eps;
  bool clip = false;
  std::optional<at::Tensor> inv_scale;

  auto tie() const {
    return std::tie(params, grads, momentum_buffers, momentum_scales, row_lengths, offsets, maximize, weight_decays,
                    decayed_norm, lrs, lr_in_momentum, lr_tensor, momentums, dampenings, nesterov, ratios, trust_coefs,
                    eps, clip, inv_scale);
  }
};

struct AdamArguments {
  static constexpr const char* kOp = "adam_";
  using Result = void;

  at::TensorList params;
  at::TensorList grads;  // empty: moments and steps are updated already
  at::TensorList exp_avgs;
  at::TensorList exp_avg_sqs;
  at::TensorList steps;
  bool maximize = false;
  at::ArrayRef<double> weight_decays;
  bool decoupled_weight_decay = false;
  double beta1 = 0;
  double beta2 = 0;
  double adam_eps = 0;
  bool decayed_norm = false;
  at::ArrayRef<double> lrs;
  std::optional<at::Tensor> lr_tensor;
  bool of_updates = false;
  std::optional<at::Tensor> ratios;
  at::ArrayRef<double> trust_coefs;
  at::ArrayRef<double> eps;
  bool clip = false;
  std::optional<at::Tensor> squared_norms;  // given: no parameter is updated
  std::optional<at::Tensor> inv_scale;

  auto tie() const {
    return std::tie(params, grads, exp_avgs, exp_avg_sqs, steps, maximize, weight_decays, decoupled_weight_decay, beta1,
                    beta2, adam_eps, decayed_norm, lrs, lr_tensor, of_updates, ratios, trust_coefs, eps, clip,
                    squared_norms, inv_scale);
  }
};

// Whether the op measures trust ratios and writes them.
template <typename Arguments>
bool measures(const Arguments& arguments) {
  return !arguments.trust_coefs.empty();
}

// The signature by which the dispatcher calls an op: tensors by reference, all else by value.
template <typename Member>
using Parameter =
    std::conditional_t<std::is_same_v<Member, at::Tensor> || std::is_same_v<Member, std::optional<at::Tensor>>,
                       const Member&, Member>;

template <typename Result, typename Members>
struct SignatureOf;

template <typename Result, typename... Members>
struct SignatureOf<Result, std::tuple<const Members&...>> {
  using type = Result(Parameter<Members>...);
};

template <typename Arguments>
using Signature =
    typename SignatureOf<typename Arguments::Result, decltype(std::declval<const Arguments&>().tie())>::type;

}  // namespace torchlars
