// The formulas of LARS, each once, for every C++ backend. Mathematics and sources: torchlars/lars.py.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>

namespace torchlars {

// The trust ratio of one layer, from squared norms. Always in double: a bucket has few layers, so precision is free.
// A layer with a zero norm keeps its gradient's own length. NaN is no zero: it stays NaN, so that the fault is seen.
C10_HOST_DEVICE inline double trust_ratio(double param_squared_norm, double grad_squared_norm, double weight_decay,
                                          double trust_coef, double eps) {
  const double param_norm = std::sqrt(param_squared_norm);
  const double grad_norm = std::sqrt(grad_squared_norm);
  const double norms = param_norm + grad_norm;
  const bool is_nan = norms != norms;
  if (!is_nan && (param_norm == 0 || grad_norm == 0)) {
    return 1;
  }
  return trust_coef * param_norm / (grad_norm + weight_decay * param_norm + eps);
}

// One element of the gradient that the base optimizer sees. T is the type of the arithmetic: float, or double for
// double layers. weight_decay is negative in a group that maximizes, so that the decay pulls towards zero there too.
template <typename T>
C10_HOST_DEVICE inline T adapted_gradient(T grad, T param, T weight_decay, T ratio) {
  return ratio * (grad + weight_decay * param);
}

// The same where nothing decays: the parameter need not be read.
template <typename T>
C10_HOST_DEVICE inline T adapted_gradient(T grad, T ratio) {
  return ratio * grad;
}

}  // namespace torchlars
