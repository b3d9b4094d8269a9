// Tensors of any layout as flat ranges of memory, which kernels take. Shared by CPU and CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/impl/COW.h>
#include <c10/util/MaybeOwned.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "arguments.h"
#include "checks.h"
#include "codes.h"
#include "trust_ratio.h"

namespace torchlars {

// A dense tensor, whose elements fill memory without gaps: the user's own tensor if it is dense, else a copy.
using Swept = c10::MaybeOwned<at::Tensor>;

inline Swept dense(const at::Tensor& tensor) {
  return tensor.is_non_overlapping_and_dense() ? Swept::borrowed(tensor) : Swept::owned(tensor.contiguous());
}

inline Swept dense(const at::Tensor& tensor, c10::ScalarType dtype) {
  return tensor.scalar_type() == dtype ? dense(tensor) : Swept::owned(at::Tensor(*dense(tensor.to(dtype))));
}

// Whether two tensors of one shape lie in memory in the same order. Strides of dimensions of size 1 do not matter.
inline bool same_strides(const at::Tensor& a, const at::Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), others = b.strides();
  if (strides.size() != others.size()) {
    return false;
  }
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1 && strides[d] != others[d]) {
      return false;
    }
  }
  return true;
}

// Whether a tensor's memory is computed or copied later: a lazy conjugation, or memory that is copied on write, which
// moves when another tensor that shares it is written.
inline bool is_lazy(const at::Tensor& tensor) {
  return tensor.is_conj() || tensor.is_neg() || c10::impl::cow::is_cow_data_ptr(tensor.storage().data_ptr());
}

// Dense, and in the memory order of another dense tensor, so that the two can be swept side by side. Lazy conjugations
// are resolved, as the dispatcher does not do it in an optional list of tensors.
inline Swept beside(const at::Tensor& other, const at::Tensor& tensor, c10::ScalarType dtype) {
  if (tensor.scalar_type() == dtype && tensor.is_non_overlapping_and_dense() && same_strides(other, tensor) &&
      !is_lazy(tensor)) {
    return Swept::borrowed(tensor);
  }
  at::Tensor copy = other.new_empty_strided(other.sizes(), other.strides(), tensor.options().dtype(dtype));
  copy.copy_(tensor);
  return Swept::owned(std::move(copy));
}

// The dtype to which a gradient and its parameter are converted before a kernel reads both.
inline c10::ScalarType swept_dtype(const at::Tensor& grad, const at::Tensor& param) {
  return grad.scalar_type() == param.scalar_type() ? grad.scalar_type()
                                                   : c10::promoteTypes(grad.scalar_type(), param.scalar_type());
}

// The tensors of a layer that are read or written together. param is undefined where weight_decay is 0.
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

// A tensor of the optimizer's state beside its parameter, in its own dtype if kernels take that beside the parameter's.
inline Swept state_beside(const at::Tensor& param, const at::Tensor& state) {
  const auto kept = state.scalar_type();
  const bool is_kept = kept == c10::kChar || (kept == c10::kFloat && param.scalar_type() != c10::kDouble);
  return beside(param, state, is_kept ? kept : param.scalar_type());
}

// The tensors of a layer in a step of SGD. momentum is undefined where there is none.
struct Triple {
  Triple(const at::Tensor& param, const at::Tensor& grad, const at::Tensor* momentum) {
    const auto dtype = swept_dtype(grad, param);
    this->param = dense(param, dtype);
    this->grad = beside(*this->param, grad, dtype);
    if (momentum != nullptr) {
      this->momentum = state_beside(*this->param, *momentum);
    }
  }

  Swept param;
  Swept grad;
  Swept momentum;
};

// The tensors of the i-th layer in a step of Adam. grad is undefined where there are none.
struct AdamTensors {
  AdamTensors(const AdamArguments& arguments, size_t i) {
    const at::Tensor& like = arguments.grads.empty() ? arguments.params[i] : arguments.grads[i];
    const auto dtype = swept_dtype(like, arguments.params[i]);
    param = dense(arguments.params[i], dtype);
    if (!arguments.grads.empty()) {
      grad = beside(*param, arguments.grads[i], dtype);
    }
    exp_avg = state_beside(*param, arguments.exp_avgs[i]);
    exp_avg_sq = state_beside(*param, arguments.exp_avg_sqs[i]);
  }

  Swept param;
  Swept grad;
  Swept exp_avg;
  Swept exp_avg_sq;
};

// How the i-th layer is cut into blocks, where momentum is in 8 bits.
inline Rows rows_of(const SgdArguments& arguments, size_t i) {
  Rows rows;
  rows.row_length = std::max<int64_t>(row_length(arguments.params[i]), 1);  // of an empty layer nothing is visited
  const bool is_whole = arguments.row_lengths.empty();
  rows.whole_row_length = static_cast<uint32_t>(is_whole ? rows.row_length : arguments.row_lengths[i]);
  rows.offset = is_whole ? 0 : static_cast<uint32_t>(arguments.offsets[i]);
  return rows;
}

// What is added to the tensors of a list before they are measured: scales[i] * others[i]; others[i] is not read where
// the scale is 0.
struct Addends {
  at::TensorList others;
  at::ArrayRef<double> scales;  // empty: nothing is added
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

// How scale_gradients_, sgd_ and adam_ decide trust ratios of gradients.
template <typename Arguments>
RatioOptions ratio_options(const Arguments& arguments) {
  RatioOptions options;
  options.decayed_norm = arguments.decayed_norm;
  options.clip = arguments.clip;
  return options;
}

// Bumps a tensor's version, by which autograd knows that it was written.
inline void note_write(const at::Tensor& tensor) {
  if (!tensor.is_inference()) {
    tensor.unsafeGetTensorImpl()->bump_version();
  }
}

// Copies a result to the user's tensor, if it was computed in a copy, and bumps that tensor's version.
inline void write_back(const Swept& computed, const at::Tensor& tensor) {
  if (!computed->is_same(tensor)) {
    tensor.copy_(*computed);
  }
  note_write(tensor);
}

// The number of real elements: a complex one counts as two.
inline int64_t real_numel(const at::Tensor& tensor) {
  return tensor.is_complex() ? 2 * tensor.numel() : tensor.numel();
}

inline c10::ScalarType real_dtype(const at::Tensor& tensor) { return c10::toRealValueType(tensor.scalar_type()); }

}  // namespace torchlars
