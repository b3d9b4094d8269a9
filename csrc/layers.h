// From tensors of any layout to flat ranges of memory, which is all that kernels know. Shared by CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace torchlars {

// The tensor itself if its elements fill memory without gaps (contiguous, channels_last, transposed, ...), else a copy.
inline at::Tensor dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
}

inline bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

// Gradient and parameter as a kernel can sweep them side by side: dense, of one dtype, in one memory order. Each is
// the tensor itself wherever that is already so, else a copy. param is undefined where nothing decays.
struct Pair {
  at::Tensor grad;
  at::Tensor param;
};

inline Pair side_by_side(const at::Tensor& grad, const at::Tensor& param, double weight_decay) {
  const auto dtype = c10::promoteTypes(grad.scalar_type(), param.scalar_type());
  Pair pair{dense(grad.to(dtype)), at::Tensor()};
  if (weight_decay != 0) {
    pair.param = dense(param.to(dtype));
    if (!same_strides(pair.grad, pair.param)) {
      pair.param = pair.grad.new_empty_strided(pair.grad.sizes(), pair.grad.strides()).copy_(pair.param);
    }
  }
  return pair;
}

// Puts a computed gradient where the user's is, in the same tensor object, and lets autograd know.
inline void write_back(const at::Tensor& computed, const at::Tensor& grad) {
  if (!computed.is_same(grad)) {
    grad.copy_(computed);
  }
  if (!grad.is_inference()) {
    grad.unsafeGetTensorImpl()->bump_version();
  }
}

// Numbers in memory: a complex one is two of them.
inline int64_t real_numel(const at::Tensor& tensor) {
  return tensor.is_complex() ? 2 * tensor.numel() : tensor.numel();
}

inline c10::ScalarType real_dtype(const at::Tensor& tensor) { return c10::toRealValueType(tensor.scalar_type()); }

}  // namespace torchlars
