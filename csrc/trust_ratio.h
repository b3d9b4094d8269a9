// The formulas of LARS, shared by CPU and CUDA. Mathematics and sources: torchlars/lars.py.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>

namespace torchlars {

// Options of the trust ratio that all layers of a call share.
struct RatioOptions {
  bool decayed_norm = false;  // the gradient's norm is that of g + weight_decay * w
  bool clip = false;          // the ratio becomes min(ratio / lr, 1); of updates min(ratio, 1)
  bool of_updates = false;    // the gradient's norm is that of an update lr * u
};

// The trust ratio of one layer, from squared norms, in double. It is 1 where a norm is 0, and NaN where a norm is NaN.
// lr is read only with clip or of_updates.
C10_HOST_DEVICE inline double trust_ratio(double param_squared_norm, double grad_squared_norm, double weight_decay,
                                          double trust_coef, double eps, double lr, const RatioOptions& options) {
  const double param_norm = std::sqrt(param_squared_norm);
  double grad_norm = std::sqrt(grad_squared_norm);
  if (options.of_updates && grad_norm != 0) {
    grad_norm /= lr;
  }
  const double norms = param_norm + grad_norm;
  const bool is_nan = norms != norms;
  double ratio = 1;
  if (is_nan || (param_norm != 0 && grad_norm != 0)) {
    const double decay = options.decayed_norm ? 0 : weight_decay;
    ratio = trust_coef * param_norm / (grad_norm + decay * param_norm + eps);
  }
  if (options.clip) {
    ratio = options.of_updates ? ratio : ratio / lr;
    ratio = ratio > 1 ? 1 : ratio;
  }
  return ratio;
}

// The squared norm of inv_scale * x, from that of x. It is 0 if the step is skipped, whatever x holds, so that the
// ratio is 1.
C10_HOST_DEVICE inline double unscaled_squared_norm(double squared_norm, double inv_scale) {
  return inv_scale == 0 ? 0 : squared_norm * (inv_scale * inv_scale);
}

// One element of the gradient that is given to the base optimizer. T is the type of the arithmetic: float, or double
// for double layers. weight_decay is negative with maximize: the decay still pulls towards zero. inv_scale is 1 where
// gradients are not scaled, which changes no bit. It is never 0, as such a step is skipped.
template <typename T>
C10_HOST_DEVICE C10_ALWAYS_INLINE T adapted_gradient(T grad, T param, T weight_decay, T ratio, T inv_scale) {
  return ratio * (inv_scale * grad + weight_decay * param);
}

// The same without weight decay.
template <typename T>
C10_HOST_DEVICE C10_ALWAYS_INLINE T adapted_gradient(T grad, T ratio, T inv_scale) {
  return ratio * (inv_scale * grad);
}

// One element of a parameter whose update is scaled, from its values before and after the base optimizer's step.
template <typename T>
C10_HOST_DEVICE C10_ALWAYS_INLINE T scaled_update(T param, T old_param, T ratio) {
  return old_param + ratio * (param - old_param);
}

}  // namespace torchlars
