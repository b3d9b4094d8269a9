// The update rule of SGD, shared by CPU and CUDA. Mathematics and sources: torchlars/optim/sgd.py.
#pragma once

#include <c10/macros/Macros.h>

#include "trust_ratio.h"

namespace torchlars {

// The numbers of one layer's step. T is the type of the arithmetic: float, or double for double layers.
template <typename T>
struct SgdNumbers {
  // lr_in_momentum: lr multiplies the ratio, and with it what the momentum collects, instead of the step.
  C10_HOST_DEVICE SgdNumbers(double ratio, double weight_decay, bool maximize, double lr, bool lr_in_momentum,
                             double momentum, double dampening, double inv_scale)
      : ratio(static_cast<T>((maximize ? -ratio : ratio) * (lr_in_momentum ? lr : 1))),
        weight_decay(static_cast<T>(maximize ? -weight_decay : weight_decay)),
        lr(static_cast<T>(lr_in_momentum ? 1 : lr)),
        momentum(static_cast<T>(momentum)),
        undampened(static_cast<T>(1 - dampening)),
        inv_scale(static_cast<T>(inv_scale)) {}

  template <typename Other>
  C10_HOST_DEVICE explicit SgdNumbers(const SgdNumbers<Other>& other)
      : ratio(static_cast<T>(other.ratio)),
        weight_decay(static_cast<T>(other.weight_decay)),
        lr(static_cast<T>(other.lr)),
        momentum(static_cast<T>(other.momentum)),
        undampened(static_cast<T>(other.undampened)),
        inv_scale(static_cast<T>(other.inv_scale)) {}

  T ratio;         // 1 without trust ratios; negative with maximize
  T weight_decay;  // negative with maximize: the decay still pulls towards zero
  T lr;
  T momentum;
  T undampened;  // 1 − dampening
  T inv_scale;   // of the gradient; never 0, as such a step is skipped
};

// One element: updates its momentum, if there is any, and returns the new parameter.
template <bool kDecays, bool kMomentum, bool kNesterov, typename T>
C10_HOST_DEVICE C10_ALWAYS_INLINE T sgd(T param, T grad, T& momentum, const SgdNumbers<T>& numbers) {
  T direction = kDecays ? adapted_gradient(grad, param, numbers.weight_decay, numbers.ratio, numbers.inv_scale)
                        : adapted_gradient(grad, numbers.ratio, numbers.inv_scale);
  if (kMomentum) {
    momentum = numbers.momentum * momentum + numbers.undampened * direction;
    direction = kNesterov ? direction + numbers.momentum * momentum : momentum;
  }
  return param - numbers.lr * direction;
}

}  // namespace torchlars
