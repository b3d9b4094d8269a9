// The update rule of Adam and AdamW, shared by CPU and CUDA. Mathematics and sources: torchlars/optim/adam.py.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>

#include "trust_ratio.h"

namespace torchlars {

// What divides the moments at the t-th step, as their averages began at zero.
struct BiasCorrections {
  double of_exp_avg;     // 1 - beta1^t
  double of_exp_avg_sq;  // 1 - beta2^t
};

C10_HOST_DEVICE inline BiasCorrections bias_corrections(double beta1, double beta2, double step) {
  return {1 - std::pow(beta1, step), 1 - std::pow(beta2, step)};
}

// The numbers of one layer's step. T is the type of the arithmetic: float, or double for double layers.
template <typename T>
struct AdamNumbers {
  // ratio is that of the gradient. The one of an update is a factor of its lr.
  C10_HOST_DEVICE AdamNumbers(double ratio, double weight_decay, bool decoupled_weight_decay, bool maximize,
                              double beta1, double beta2, double eps, const BiasCorrections& corrections,
                              double inv_scale)
      : ratio(static_cast<T>(maximize ? -ratio : ratio)),
        weight_decay(static_cast<T>(decoupled_weight_decay ? 0
                                    : maximize             ? -weight_decay
                                                           : weight_decay)),
        decoupled_weight_decay(static_cast<T>(decoupled_weight_decay ? weight_decay : 0)),
        change(static_cast<T>(beta1 > 0.5 ? 1 - beta1 : -beta1)),
        beta2(static_cast<T>(beta2)),
        new_in_exp_avg_sq(static_cast<T>(1 - beta2)),
        root_factor(static_cast<T>(corrections.of_exp_avg / std::sqrt(corrections.of_exp_avg_sq))),
        eps(static_cast<T>(corrections.of_exp_avg * eps)),
        inv_scale(static_cast<T>(inv_scale)) {}

  template <typename Other>
  C10_HOST_DEVICE explicit AdamNumbers(const AdamNumbers<Other>& other)
      : ratio(static_cast<T>(other.ratio)),
        weight_decay(static_cast<T>(other.weight_decay)),
        decoupled_weight_decay(static_cast<T>(other.decoupled_weight_decay)),
        change(static_cast<T>(other.change)),
        beta2(static_cast<T>(other.beta2)),
        new_in_exp_avg_sq(static_cast<T>(other.new_in_exp_avg_sq)),
        root_factor(static_cast<T>(other.root_factor)),
        eps(static_cast<T>(other.eps)),
        inv_scale(static_cast<T>(other.inv_scale)) {}

  T ratio;                   // 1 without trust ratios; negative with maximize
  T weight_decay;            // the coupled one, negative with maximize: the decay still pulls towards zero
  T decoupled_weight_decay;  // likewise 0 if the decay is of the other kind
  T change;                  // 1 - beta1 if beta1 > 0.5, else -beta1
  T beta2;
  T new_in_exp_avg_sq;  // 1 - beta2
  T root_factor;        // (1 - beta1^t) / sqrt(1 - beta2^t)
  T eps;                // times 1 - beta1^t
  T inv_scale;          // of the gradient; never 0, as such a step is skipped
};

// Updates the moments of one element. kDecays: by a gradient that holds weight decay.
template <bool kDecays, typename T>
C10_HOST_DEVICE C10_ALWAYS_INLINE void update_moments(T param, T grad, T& exp_avg, T& exp_avg_sq,
                                                      const AdamNumbers<T>& numbers) {
  const T direction = kDecays ? adapted_gradient(grad, param, numbers.weight_decay, numbers.ratio, numbers.inv_scale)
                              : adapted_gradient(grad, numbers.ratio, numbers.inv_scale);
  // beta1 * exp_avg + (1 - beta1) * direction, from the one of the two that has the larger factor.
  exp_avg = (numbers.change > 0 ? exp_avg : direction) + numbers.change * (direction - exp_avg);
  exp_avg_sq = numbers.beta2 * exp_avg_sq + (numbers.new_in_exp_avg_sq * direction) * direction;
}

// The update of one element: what lr multiplies and the parameter loses. kDecays: with decoupled weight decay. The
// fraction is that of both moments with their biases corrected, times 1 - beta1^t above and below.
template <bool kDecays, typename T>
C10_HOST_DEVICE C10_ALWAYS_INLINE T adam_update(T param, T exp_avg, T exp_avg_sq, const AdamNumbers<T>& numbers) {
  const T update = exp_avg / (numbers.root_factor * std::sqrt(exp_avg_sq) + numbers.eps);
  return kDecays ? update + numbers.decoupled_weight_decay * param : update;
}

}  // namespace torchlars
