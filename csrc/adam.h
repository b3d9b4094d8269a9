// The update rule of Adam and AdamW, shared by CPU and CUDA. Mathematics and sources: torchlars/optim/adam.py.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>

#include "trust_ratio.h"

namespace torchlars {

// The reciprocals of 1 - beta1^t and of the root of 1 - beta2^t, at the t-th step.
struct BiasCorrections {
  double of_exp_avg;
  double of_root;
};

C10_HOST_DEVICE inline BiasCorrections bias_corrections(double beta1, double beta2, double step) {
  return {1 / (1 - std::pow(beta1, step)), 1 / std::sqrt(1 - std::pow(beta2, step))};
}

// The numbers of one layer's step. T is the type of the arithmetic.
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
        beta1(static_cast<T>(beta1)),
        beta2(static_cast<T>(beta2)),
        new_in_exp_avg(static_cast<T>(1 - beta1)),
        new_in_exp_avg_sq(static_cast<T>(1 - beta2)),
        correction(static_cast<T>(corrections.of_exp_avg)),
        root_correction(static_cast<T>(corrections.of_root)),
        eps(static_cast<T>(eps)),
        inv_scale(static_cast<T>(inv_scale)) {}

  template <typename Other>
  C10_HOST_DEVICE explicit AdamNumbers(const AdamNumbers<Other>& other)
      : ratio(static_cast<T>(other.ratio)),
        weight_decay(static_cast<T>(other.weight_decay)),
        decoupled_weight_decay(static_cast<T>(other.decoupled_weight_decay)),
        beta1(static_cast<T>(other.beta1)),
        beta2(static_cast<T>(other.beta2)),
        new_in_exp_avg(static_cast<T>(other.new_in_exp_avg)),
        new_in_exp_avg_sq(static_cast<T>(other.new_in_exp_avg_sq)),
        correction(static_cast<T>(other.correction)),
        root_correction(static_cast<T>(other.root_correction)),
        eps(static_cast<T>(other.eps)),
        inv_scale(static_cast<T>(other.inv_scale)) {}

  T ratio;                   // 1 without trust ratios; negative with maximize
  T weight_decay;            // the coupled one, negative with maximize: the decay still pulls towards zero
  T decoupled_weight_decay;  // likewise 0 if the decay is of the other kind
  T beta1;
  T beta2;
  T new_in_exp_avg;     // 1 - beta1
  T new_in_exp_avg_sq;  // 1 - beta2
  T correction;         // of the first moment's bias
  T root_correction;    // of the bias of the second moment's root
  T eps;
  T inv_scale;  // of the gradient; never 0, as such a step is skipped
};

// Updates the moments of one element. kDecays: by a gradient that holds weight decay.
template <bool kDecays, typename T>
C10_HOST_DEVICE inline void update_moments(T param, T grad, T& exp_avg, T& exp_avg_sq, const AdamNumbers<T>& numbers) {
  const T direction = kDecays ? adapted_gradient(grad, param, numbers.weight_decay, numbers.ratio, numbers.inv_scale)
                              : adapted_gradient(grad, numbers.ratio, numbers.inv_scale);
  exp_avg = numbers.beta1 * exp_avg + numbers.new_in_exp_avg * direction;
  exp_avg_sq = numbers.beta2 * exp_avg_sq + (numbers.new_in_exp_avg_sq * direction) * direction;
}

// The update of one element: what lr multiplies and the parameter loses. kDecays: with decoupled weight decay.
template <bool kDecays, typename T>
C10_HOST_DEVICE inline T adam_update(T param, T exp_avg, T exp_avg_sq, const AdamNumbers<T>& numbers) {
  const T root = std::sqrt(exp_avg_sq) * numbers.root_correction;
  const T update = (exp_avg * numbers.correction) / (root + numbers.eps);
  return kDecays ? update + numbers.decoupled_weight_decay * param : update;
}

}  // namespace torchlars
