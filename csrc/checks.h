// What every op asks of its arguments, on every backend. A message opens with the op's name, and says what was got.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

namespace torchlars {

inline bool is_supported(c10::ScalarType dtype) {
  switch (dtype) {
    case c10::kDouble:
    case c10::kFloat:
    case c10::kBFloat16:
    case c10::kHalf:
    case c10::kComplexDouble:
    case c10::kComplexFloat:
      return true;
    default:
      return false;
  }
}

// The type in which a layer's trust ratio is kept and its gradient is computed.
inline c10::ScalarType compute_dtype(c10::ScalarType grad, c10::ScalarType param) {
  const auto widest = c10::toRealValueType(c10::promoteTypes(grad, param));
  return widest == c10::kDouble ? c10::kDouble : c10::kFloat;
}

// Bytes from a tensor's first element to the end of its last one. The tensor is not empty.
inline int64_t extent(const at::Tensor& tensor) {
  int64_t elements = tensor.numel();
  if (!tensor.is_non_overlapping_and_dense()) {
    elements = 1;
    for (int64_t d = 0; d < tensor.dim(); ++d) {
      elements += (tensor.size(d) - 1) * tensor.stride(d);
    }
  }
  return elements * static_cast<int64_t>(tensor.element_size());
}

// False where the storage is smaller than the tensor, as after untyped_storage().resize_(0). Other devices than CPU and
// CUDA may keep their memory elsewhere.
inline bool has_memory(const at::Tensor& tensor) {
  if (!(tensor.is_cpu() || tensor.is_cuda()) || !tensor.has_storage() || tensor.numel() == 0) {
    return true;
  }
  const int64_t begin = tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
  return static_cast<int64_t>(tensor.unsafeGetTensorImpl()->unsafe_storage().nbytes()) >= begin + extent(tensor);
}

inline void check_tensors(const char* op, const char* name, at::TensorList tensors) {
  TORCH_CHECK(!tensors.empty(), op, ": expected at least one tensor (got: ", name, " is empty)");
  const at::Tensor& first = tensors[0];
  for (size_t i = 0; i < tensors.size(); ++i) {
    const at::Tensor& tensor = tensors[i];
    TORCH_CHECK(tensor.defined(), op, ": expected tensors (", name, "[", i, "] is undefined)");
    TORCH_CHECK(tensor.layout() == c10::kStrided, op, ": expected strided tensors (", name, "[", i,
                "]: ", tensor.layout(), ")");
    TORCH_CHECK(is_supported(tensor.scalar_type()), op,
                ": expected float64, float32, bfloat16, float16, complex128 or complex64 (", name, "[", i,
                "]: ", tensor.scalar_type(), ")");
    TORCH_CHECK(tensor.device() == first.device(), op, ": expected tensors on one device (", name,
                "[0]: ", first.device(), ", ", name, "[", i, "]: ", tensor.device(), ")");
    TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": expected tensors of one dtype (", name,
                "[0]: ", first.scalar_type(), ", ", name, "[", i, "]: ", tensor.scalar_type(), ")");
  }
}

inline void check_length(const char* op, const char* name, size_t length, const char* than, size_t expected) {
  TORCH_CHECK(length == expected, op, ": expected lists of one length (", than, ": ", expected, ", ", name, ": ",
              length, ")");
}

inline void check_numbers(const char* op, const char* name, at::ArrayRef<double> numbers, bool may_be_zero) {
  for (size_t i = 0; i < numbers.size(); ++i) {
    const bool in_range = std::isfinite(numbers[i]) && (may_be_zero ? numbers[i] >= 0 : numbers[i] > 0);
    TORCH_CHECK(in_range, op, ": expected ", may_be_zero ? "non-negative" : "positive", " numbers (", name, "[", i,
                "]: ", numbers[i], ")");
  }
}

inline void check_hyper_parameters(const char* op, size_t layers, const char* than, at::ArrayRef<double> weight_decays,
                                   at::ArrayRef<double> trust_coefs, at::ArrayRef<double> eps) {
  check_length(op, "weight_decays", weight_decays.size(), than, layers);
  check_length(op, "trust_coefs", trust_coefs.size(), than, layers);
  check_length(op, "eps", eps.size(), than, layers);
  check_numbers(op, "weight_decays", weight_decays, true);
  check_numbers(op, "trust_coefs", trust_coefs, false);
  check_numbers(op, "eps", eps, true);
}

// True where no two elements can share memory. Exact for every layout that slicing, permuting and expanding produce.
inline bool is_writable_in_place(const at::Tensor& tensor) {
  if (tensor.numel() < 2 || tensor.is_non_overlapping_and_dense()) {
    return true;
  }
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) {
      dims.emplace_back(tensor.stride(d), tensor.size(d));
    }
  }
  std::sort(dims.begin(), dims.end());
  int64_t extent = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= extent) {
      return false;
    }
    extent += stride * (size - 1);
  }
  return true;
}

// Two lists of tensors that go together, pair by pair; their shapes apart.
inline void check_pairs(const char* op, const char* name, at::TensorList tensors, const char* other_name,
                        at::TensorList others) {
  check_tensors(op, name, tensors);
  check_tensors(op, other_name, others);
  check_length(op, other_name, others.size(), name, tensors.size());
  TORCH_CHECK(tensors[0].device() == others[0].device(), op, ": expected tensors on one device (", name,
              "[0]: ", tensors[0].device(), ", ", other_name, "[0]: ", others[0].device(), ")");
  TORCH_CHECK(tensors[0].is_complex() == others[0].is_complex(), op, ": expected ", name, " and ", other_name,
              " to be both real or both complex (", name, "[0]: ", tensors[0].scalar_type(), ", ", other_name,
              "[0]: ", others[0].scalar_type(), ")");
}

// Shapes are free where free_where_zero[i] is 0, if that is given.
inline void check_shapes(const char* op, const char* name, at::TensorList tensors, const char* other_name,
                         at::TensorList others, at::ArrayRef<double> free_where_zero = {}) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].sizes() == others[i].sizes() || (!free_where_zero.empty() && free_where_zero[i] == 0), op,
                ": expected ", name, " and ", other_name, " of one shape (", name, "[", i, "]: ", tensors[i].sizes(),
                ", ", other_name, "[", i, "]: ", others[i].sizes(), ")");
  }
}

// Gradients and parameters. equal_shapes: also where weight_decays[i] is 0 and params[i] is not read.
inline void check_layers(const char* op, at::TensorList grads, at::TensorList params,
                         at::ArrayRef<double> weight_decays, bool equal_shapes) {
  check_pairs(op, "grads", grads, "params", params);
  check_length(op, "weight_decays", weight_decays.size(), "grads", grads.size());
  check_numbers(op, "weight_decays", weight_decays, true);
  check_shapes(op, "grads", grads, "params", params, equal_shapes ? at::ArrayRef<double>() : weight_decays);
}

inline void check_writable(const char* op, const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(is_writable_in_place(tensors[i]), op, ": expected ", name, " that can be written in place (", name, "[",
                i, "]: shape ", tensors[i].sizes(), ", strides ", tensors[i].strides(),
                " overlap in memory); clone it first");
  }
}

inline void check_sums(const char* op, at::TensorList tensors, at::TensorList others, at::ArrayRef<double> scales) {
  check_pairs(op, "tensors", tensors, "others", others);
  check_length(op, "scales", scales.size(), "tensors", tensors.size());
  check_shapes(op, "tensors", tensors, "others", others, scales);
  for (size_t i = 0; i < scales.size(); ++i) {
    TORCH_CHECK(std::isfinite(scales[i]), op, ": expected finite numbers (scales[", i, "]: ", scales[i], ")");
  }
}

inline void check_updates(const char* op, at::TensorList params, at::TensorList old_params) {
  check_pairs(op, "params", params, "old_params", old_params);
  TORCH_CHECK(params[0].scalar_type() == old_params[0].scalar_type(), op,
              ": expected params and old_params of one dtype (params[0]: ", params[0].scalar_type(),
              ", old_params[0]: ", old_params[0].scalar_type(), ")");
  check_shapes(op, "params", params, "old_params", old_params);
  check_writable(op, "params", params);
}

inline void check_lr_scale(const char* op, const std::optional<at::Tensor>& given, c10::Device device) {
  if (given.has_value()) {
    const at::Tensor& lr_scale = *given;
    TORCH_CHECK(lr_scale.numel() == 1 && lr_scale.scalar_type() == c10::kDouble && lr_scale.device() == device, op,
                ": expected lr_scale to be one float64 on ", device, " (got: shape ", lr_scale.sizes(), ", ",
                lr_scale.scalar_type(), ", ", lr_scale.device(), ")");
  }
}

// What gradients are multiplied by before anything else. Where it is 0 the step is skipped.
inline void check_inv_scale(const char* op, const std::optional<at::Tensor>& given, c10::Device device) {
  if (given.has_value()) {
    const at::Tensor& inv_scale = *given;
    TORCH_CHECK(inv_scale.numel() == 1 && inv_scale.scalar_type() == c10::kFloat && inv_scale.device() == device, op,
                ": expected inv_scale to be one float32 on ", device, " (got: shape ", inv_scale.sizes(), ", ",
                inv_scale.scalar_type(), ", ", inv_scale.device(), ")");
  }
}

// The learning rates of layers: a number each, and what multiplies them all.
struct Lrs {
  at::ArrayRef<double> lrs;  // may be empty where none is needed
  const std::optional<at::Tensor>& lr_scale;
};

inline void check_lrs(const char* op, size_t layers, const char* than, const Lrs& given, c10::Device device,
                      bool are_needed) {
  if (are_needed || !given.lrs.empty()) {
    check_length(op, "lrs", given.lrs.size(), than, layers);
  }
  check_numbers(op, "lrs", given.lrs, true);
  check_lr_scale(op, given.lr_scale, device);
}

inline void check_squared_norms(const char* op, const char* name, const at::Tensor& squared_norms) {
  TORCH_CHECK(squared_norms.dim() == 1 && squared_norms.scalar_type() == c10::kDouble && squared_norms.is_contiguous(),
              op, ": expected a contiguous vector of float64 (", name, ": shape ", squared_norms.sizes(), ", ",
              squared_norms.scalar_type(), ")");
}

inline void check_trust_ratios(const at::Tensor& param_squared_norms, const at::Tensor& grad_squared_norms,
                               at::ArrayRef<double> weight_decays, at::ArrayRef<double> trust_coefs,
                               at::ArrayRef<double> eps, c10::ScalarType dtype, const Lrs& lrs, bool need_lrs) {
  const char* op = "trust_ratios";
  check_squared_norms(op, "param_squared_norms", param_squared_norms);
  check_squared_norms(op, "grad_squared_norms", grad_squared_norms);
  const size_t layers = param_squared_norms.size(0);
  check_length(op, "grad_squared_norms", grad_squared_norms.size(0), "param_squared_norms", layers);
  check_hyper_parameters(op, layers, "param_squared_norms", weight_decays, trust_coefs, eps);
  TORCH_CHECK(param_squared_norms.device() == grad_squared_norms.device(), op,
              ": expected tensors on one device (param_squared_norms: ", param_squared_norms.device(),
              ", grad_squared_norms: ", grad_squared_norms.device(), ")");
  TORCH_CHECK(dtype == c10::kDouble || dtype == c10::kFloat, op, ": expected float64 or float32 (dtype: ", dtype, ")");
  check_lrs(op, layers, "param_squared_norms", lrs, param_squared_norms.device(), need_lrs);
}

inline void check_ratios(const char* op, const at::Tensor& ratios, at::TensorList grads, at::TensorList params,
                         const char* name = "grads") {
  const auto dtype = compute_dtype(grads[0].scalar_type(), params[0].scalar_type());
  TORCH_CHECK(ratios.dim() == 1 && ratios.is_contiguous() && ratios.scalar_type() == dtype, op,
              ": expected ratios to be a contiguous vector of ", dtype, " (got: shape ", ratios.sizes(), ", ",
              ratios.scalar_type(), ")");
  check_length(op, "ratios", ratios.size(0), name, grads.size());
  TORCH_CHECK(ratios.device() == grads[0].device(), op, ": expected tensors on one device (", name,
              "[0]: ", grads[0].device(), ", ratios: ", ratios.device(), ")");
}

// What a step of SGD takes, per layer.
struct SgdArguments {
  at::TensorList params;
  at::TensorList grads;
  at::TensorList momentum_buffers;  // empty: no momentum
  at::ArrayRef<double> weight_decays;
  at::ArrayRef<double> lrs;
  at::ArrayRef<double> momentums;
  at::ArrayRef<double> dampenings;
  bool nesterov;
  bool maximize;
  const std::optional<at::Tensor>& lr_scale;
  const std::optional<at::Tensor>& inv_scale;
};

inline void check_sgd(const char* op, const SgdArguments& sgd) {
  check_layers(op, sgd.grads, sgd.params, sgd.weight_decays, /*equal_shapes=*/true);
  check_writable(op, "params", sgd.params);
  check_length(op, "lrs", sgd.lrs.size(), "grads", sgd.grads.size());
  check_length(op, "momentums", sgd.momentums.size(), "grads", sgd.grads.size());
  check_length(op, "dampenings", sgd.dampenings.size(), "grads", sgd.grads.size());
  check_numbers(op, "lrs", sgd.lrs, true);
  check_numbers(op, "momentums", sgd.momentums, true);
  for (size_t i = 0; i < sgd.dampenings.size(); ++i) {
    TORCH_CHECK(std::isfinite(sgd.dampenings[i]), op, ": expected finite numbers (dampenings[", i,
                "]: ", sgd.dampenings[i], ")");
  }
  const at::Tensor& param = sgd.params[0];
  if (sgd.momentum_buffers.empty()) {
    for (size_t i = 0; i < sgd.momentums.size(); ++i) {
      TORCH_CHECK(sgd.momentums[i] == 0, op, ": expected momentum_buffers where there is momentum (momentums[", i,
                  "]: ", sgd.momentums[i], ")");
    }
    TORCH_CHECK(!sgd.nesterov, op, ": expected momentum_buffers where nesterov is True");
  } else {
    check_tensors(op, "momentum_buffers", sgd.momentum_buffers);
    check_length(op, "momentum_buffers", sgd.momentum_buffers.size(), "grads", sgd.grads.size());
    check_writable(op, "momentum_buffers", sgd.momentum_buffers);
    const at::Tensor& buffer = sgd.momentum_buffers[0];
    TORCH_CHECK(buffer.device() == param.device(), op, ": expected tensors on one device (params[0]: ", param.device(),
                ", momentum_buffers[0]: ", buffer.device(), ")");
    TORCH_CHECK(buffer.scalar_type() == param.scalar_type() ||
                    (param.element_size() == 2 && buffer.scalar_type() == c10::kFloat),
                op,
                ": expected momentum_buffers of the dtype of params, or of float32 for 16-bit ones "
                "(params[0]: ",
                param.scalar_type(), ", momentum_buffers[0]: ", buffer.scalar_type(), ")");
    for (size_t i = 0; i < sgd.params.size(); ++i) {
      TORCH_CHECK(sgd.momentum_buffers[i].sizes() == sgd.params[i].sizes(), op,
                  ": expected params and momentum_buffers of one shape (params[", i, "]: ", sgd.params[i].sizes(),
                  ", momentum_buffers[", i, "]: ", sgd.momentum_buffers[i].sizes(), ")");
    }
  }
  check_lr_scale(op, sgd.lr_scale, param.device());
  check_inv_scale(op, sgd.inv_scale, param.device());
}

}  // namespace torchlars
