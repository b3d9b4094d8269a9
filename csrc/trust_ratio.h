// The formulas of LARS, each once, for every C++ backend. Mathematics and sources: torchlars/lars.py.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>

namespace torchlars {

// How trust ratios are decided, beside the numbers of each layer.
struct RatioOptions {
  bool decayed_norm = false;  // the gradient's norm is that of g + weight_decay * w
  bool clip = false;          // no layer's step is longer than the base optimizer's own
  bool of_updates = false;    // in the gradient's place is an update, lr * u
};

// The trust ratio of one layer, from squared norms. Always in double: a bucket has few layers, so precision is free.
// A layer with a zero norm keeps its gradient's own length. NaN is no zero: it stays NaN, so that the fault is seen.
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

// The squared norm of inv_scale * x, from that of x. A step that is skipped has no gradient, whatever x holds: the
// ratio is 1 then.
C10_HOST_DEVICE inline double unscaled_squared_norm(double squared_norm, double inv_scale) {
  return inv_scale == 0 ? 0 : squared_norm * (inv_scale * inv_scale);
}

// One element of the gradient that the base optimizer sees. T is the type of the arithmetic: float, or double for
// double layers. weight_decay is negative in a group that maximizes, so that the decay pulls towards zero there too.
// inv_scale is 1 where gradients were not scaled: that changes no bit, and costs less than a way of its own. Where it
// is 0 the step is skipped, and nobody asks.
template <typename T>
C10_HOST_DEVICE inline T adapted_gradient(T grad, T param, T weight_decay, T ratio, T inv_scale) {
  return ratio * (inv_scale * grad + weight_decay * param);
}

// The same where nothing decays: the parameter need not be read.
template <typename T>
C10_HOST_DEVICE inline T adapted_gradient(T grad, T ratio, T inv_scale) {
  return ratio * (inv_scale * grad);
}

// One element of a parameter after a step, given what it was before and what the base optimizer made of it.
template <typename T>
C10_HOST_DEVICE inline T scaled_update(T param, T old_param, T ratio) {
  return old_param + ratio * (param - old_param);
}

}  // namespace torchlars
