// From tensors of any layout to flat ranges of memory, which is all that kernels know. Shared by CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/MaybeOwned.h>

#include <utility>
#include <vector>

#include "arguments.h"
#include "trust_ratio.h"

namespace torchlars {

// A tensor as kernels can sweep it: its elements fill memory without gaps. The user's own wherever that is already so,
// else a copy.
using Swept = c10::MaybeOwned<at::Tensor>;

inline Swept dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? Swept::borrowed(tensor) : Swept::owned(tensor.contiguous());
}

inline Swept dense(const at::Tensor& tensor, c10::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? dense(tensor) : Swept::owned(at::Tensor(*dense(tensor.to(dtype))));
}

// Whether two tensors of one shape lie in memory in the same order. Strides of dimensions of size 1 do not matter.
inline bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  if (a.strides() == b.strides()) {  // nearly always, and cheaper to tell
    return true;
  }
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) {
      return false;
    }
  }
  return true;
}

// Dense, and in the memory order of another dense tensor, so that the two can be swept side by side. Lazy conjugations
// are resolved, as the dispatcher does not do it in an optional list of tensors.
inline Swept beside(const at::Tensor& other, const at::Tensor& tensor, c10::ScalarType dtype) {
  const bool is_lazy = tensor.is_conj() || tensor.is_neg();
  if (tensor.scalar_type() == dtype && tensor.is_non_overlapping_and_dense() && same_strides(other, tensor) &&
      !is_lazy) {
    return Swept::borrowed(tensor);
  }
  at::Tensor copy = other.new_empty_strided(other.sizes(), other.strides(), tensor.options().dtype(dtype));
  copy.copy_(tensor);
  return Swept::owned(std::move(copy));
}

// The dtype in which gradient and parameter can be swept side by side.
inline c10::ScalarType swept_dtype(const at::Tensor& grad, const at::Tensor& param) {
  return grad.scalar_type() == param.scalar_type() ? grad.scalar_type()
                                                   : c10::promoteTypes(grad.scalar_type(), param.scalar_type());
}

// What a sweep over gradients takes of a layer. param is undefined where nothing decays.
struct Pair {
  Pair(const at::Tensor& grad, const at::Tensor& param, double weight_decay) {
    const auto dtype = swept_dtype(grad, param);
    this->grad = dense(grad, dtype);
    if (weight_decay != 0) {
      this->param = beside(*this->grad, param, dtype);
    }
  }

  Swept grad;
  Swept param;
};

// What a step of SGD takes of a layer. momentum is undefined where there is none.
struct Triple {
  Triple(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* momentum) {
    const auto dtype = swept_dtype(grad, param);
    this->param = dense(param, dtype);
    this->grad = beside(*this->param, grad, dtype);
    if (momentum != nullptr) {
      const bool is_float = momentum->scalar_type() == c10::kFloat;
      this->momentum = beside(*this->param, *momentum, is_float && dtype != c10::kDouble ? c10::kFloat : dtype);
    }
  }

  Swept param;
  Swept grad;
  Swept momentum;
};

// What is added to each tensor of a list before it is measured: scales[i] * others[i]. Nothing where the scale is 0.
struct Addends {
  at::TensorList others;
  at::ArrayRef<double> scales;  // empty: nothing at all
};

// The scales of the parameters that are added to gradients before these are measured: their decay, with decayed_norm.
template <typename Arguments>
std::vector<double> decays_in_norm(const Arguments& arguments) {
  std::vector<double> scales;
  if (arguments.decayed_norm) {
    for (const double weight_decay : arguments.weight_decays) {
      scales.push_back(arguments.maximize ? -weight_decay : weight_decay);
    }
  }
  return scales;
}

// How scale_gradients_ and sgd_ decide trust ratios.
template <typename Arguments>
RatioOptions ratio_options(const Arguments& arguments) {
  RatioOptions options;
  options.decayed_norm = arguments.decayed_norm;
  options.clip = arguments.clip;
  return options;
}

// Lets autograd know that a tensor was written.
inline void note_write(const at::Tensor& tensor) {
  if (!tensor.is_inference()) {
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// Puts what was computed where the user's is, in the same tensor object, and lets autograd know.
inline void write_back(const Swept& computed, const at::Tensor& tensor) {
  if (!computed->is_same(tensor)) {
    tensor.copy_(*computed);
  }
  note_write(tensor);
}

// Numbers in memory: a complex one is two of them.
inline int64_t real_numel(const at::Tensor& tensor) {
  return tensor.is_complex() ? 2 * tensor.numel() : tensor.numel();
}

inline c10::ScalarType real_dtype(const at::Tensor& tensor) { return c10::toRealValueType(tensor.scalar_type()); }

}  // namespace torchlars
