// The checks of the ops' arguments, for all devices. A message opens with the op's name and says what was got.
// torchlars/_checks.py has the same in Python.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/Exception.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "arguments.h"
#include "codes.h"

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

// Bytes from the begin of a tensor's first element to the end of its last one. The tensor must not be empty.
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

// Whether no two elements share memory. Exact for every layout that slicing, permuting and expanding produce.
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

// The elements of a row, which is one index of dimension 0.
inline int64_t row_length(const at::Tensor& tensor) {
  return c10::multiply_integers(tensor.sizes().begin() + 1, tensor.sizes().end());
}

// The shape of the scales of a tensor whose momentum is in 8 bits: a number for each block of each row.
inline std::array<int64_t, 2> scales_shape(const at::Tensor& tensor) {
  return {tensor.size(0), divide_up(row_length(tensor), kBlock)};
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

inline void check_needs(const char* op, const char* name, const char* is, bool given, const char* needed, bool has) {
  TORCH_CHECK(has || !given, op, ": expected ", needed, " where ", name, " ", is);
}

inline bool is_positive(double number) { return std::isfinite(number) && number > 0; }
inline bool is_non_negative(double number) { return std::isfinite(number) && number >= 0; }
inline bool is_finite(double number) { return std::isfinite(number); }

// One number for each layer, each in its range.
inline void check_numbers(const char* op, const char* name, at::ArrayRef<double> numbers, const char* than,
                          size_t layers, bool (*holds)(double) = is_non_negative) {
  check_length(op, name, numbers.size(), than, layers);
  const char* const kind = holds == is_positive ? "positive" : holds == is_finite ? "finite" : "non-negative";
  for (size_t i = 0; i < numbers.size(); ++i) {
    TORCH_CHECK(holds(numbers[i]), op, ": expected ", kind, " numbers (", name, "[", i, "]: ", numbers[i], ")");
  }
}

// Two lists of tensors that are used in pairs. Shapes are not checked.
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

// Pairs must be of one shape, except where free_where_zero[i] is 0, if that is given.
inline void check_shapes(const char* op, const char* name, at::TensorList tensors, const char* other_name,
                         at::TensorList others, at::ArrayRef<double> free_where_zero = {}) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(tensors[i].sizes() == others[i].sizes() || (!free_where_zero.empty() && free_where_zero[i] == 0), op,
                ": expected ", name, " and ", other_name, " of one shape (", name, "[", i, "]: ", tensors[i].sizes(),
                ", ", other_name, "[", i, "]: ", others[i].sizes(), ")");
  }
}

inline void check_writable(const char* op, const char* name, at::TensorList tensors) {
  for (size_t i = 0; i < tensors.size(); ++i) {
    TORCH_CHECK(is_writable_in_place(tensors[i]), op, ": expected ", name, " that can be written in place (", name, "[",
                i, "]: shape ", tensors[i].sizes(), ", strides ", tensors[i].strides(),
                " overlap in memory); clone it first");
  }
}

// A tensor of one element that is read on the device.
inline void check_scale(const char* op, const char* name, const std::optional<at::Tensor>& given, c10::ScalarType dtype,
                        c10::Device device) {
  if (given.has_value()) {
    TORCH_CHECK(given->numel() == 1 && given->scalar_type() == dtype && given->device() == device, op, ": expected ",
                name, " to be one ", dtype == c10::kDouble ? "float64" : "float32", " on ", device, " (got: shape ",
                given->sizes(), ", ", given->scalar_type(), ", ", given->device(), ")");
  }
}

// The learning rate of each layer, and a factor for all of them.
inline void check_lrs(const char* op, at::ArrayRef<double> lrs, const std::optional<at::Tensor>& lr_tensor,
                      const char* than, size_t layers, c10::Device device, bool are_needed) {
  check_needs(op, "lr_tensor", "is given", lr_tensor.has_value(), "lrs", are_needed || !lrs.empty());
  if (are_needed || !lrs.empty()) {
    check_numbers(op, "lrs", lrs, than, layers);
  }
  check_scale(op, "lr_tensor", lr_tensor, c10::kDouble, device);
}

// The trust ratios of layers, and the numbers that they are decided from.
template <typename Arguments>
void check_ratios(const Arguments& arguments, const std::optional<at::Tensor>& ratios, const char* name,
                  at::TensorList tensors, at::TensorList params) {
  const char* const op = Arguments::kOp;
  check_needs(op, "trust_coefs", "are given", measures(arguments), "ratios", ratios.has_value());
  check_needs(op, "eps", "are given", !arguments.eps.empty(), "trust_coefs", measures(arguments));
  check_needs(op, "clip", "is True", arguments.clip, "trust_coefs", measures(arguments));
  if (measures(arguments)) {
    check_numbers(op, "trust_coefs", arguments.trust_coefs, name, tensors.size(), is_positive);
    check_numbers(op, "eps", arguments.eps, name, tensors.size());
  }
  if (ratios.has_value()) {
    const auto dtype = compute_dtype(tensors[0].scalar_type(), params[0].scalar_type());
    TORCH_CHECK(ratios->dim() == 1 && ratios->is_contiguous() && ratios->scalar_type() == dtype, op,
                ": expected ratios to be a contiguous vector of ", dtype, " (got: shape ", ratios->sizes(), ", ",
                ratios->scalar_type(), ")");
    check_length(op, "ratios", ratios->size(0), name, tensors.size());
    TORCH_CHECK(ratios->device() == tensors[0].device(), op, ": expected tensors on one device (", name,
                "[0]: ", tensors[0].device(), ", ratios: ", ratios->device(), ")");
  }
}

inline void check_squared_norms(const char* op, const char* name, const at::Tensor& squared_norms) {
  TORCH_CHECK(squared_norms.dim() == 1 && squared_norms.scalar_type() == c10::kDouble && squared_norms.is_contiguous(),
              op, ": expected a contiguous vector of float64 (", name, ": shape ", squared_norms.sizes(), ", ",
              squared_norms.scalar_type(), ")");
}

inline void check(const SquaredNormsArguments& arguments) {
  const char* const op = SquaredNormsArguments::kOp;
  const auto& [tensors, others, scales, inv_scale] = arguments;
  check_tensors(op, "tensors", tensors);
  check_needs(op, "scales", "are given", !scales.empty(), "others", others.has_value());
  if (others.has_value()) {
    check_pairs(op, "tensors", tensors, "others", *others);
    check_numbers(op, "scales", scales, "tensors", tensors.size(), is_finite);
    check_shapes(op, "tensors", tensors, "others", *others, scales);
  }
  check_scale(op, "inv_scale", inv_scale, c10::kFloat, tensors[0].device());
}

inline void check(const TrustRatiosArguments& arguments) {
  const char* const op = TrustRatiosArguments::kOp;
  const char* const than = "param_squared_norms";
  const at::Tensor& params = arguments.param_squared_norms;
  const at::Tensor& grads = arguments.grad_squared_norms;
  check_squared_norms(op, than, params);
  check_squared_norms(op, "grad_squared_norms", grads);
  const size_t layers = params.size(0);
  check_length(op, "grad_squared_norms", grads.size(0), than, layers);
  TORCH_CHECK(params.device() == grads.device(), op, ": expected tensors on one device (", than, ": ", params.device(),
              ", grad_squared_norms: ", grads.device(), ")");
  check_numbers(op, "weight_decays", arguments.weight_decays, than, layers);
  check_numbers(op, "trust_coefs", arguments.trust_coefs, than, layers, is_positive);
  check_numbers(op, "eps", arguments.eps, than, layers);
  TORCH_CHECK(arguments.dtype == c10::kDouble || arguments.dtype == c10::kFloat, op,
              ": expected float64 or float32 (dtype: ", arguments.dtype, ")");
  check_lrs(op, arguments.lrs, arguments.lr_tensor, than, layers, params.device(),
            arguments.clip || arguments.of_updates);
}

// What scale_gradients_, sgd_ and adam_ have in common.
template <typename Arguments>
void check_layers(const Arguments& arguments, bool lrs_are_needed, at::ArrayRef<double> free_where_zero) {
  const char* const op = Arguments::kOp;
  const auto& [grads, params] = std::tie(arguments.grads, arguments.params);
  check_pairs(op, "grads", grads, "params", params);
  check_numbers(op, "weight_decays", arguments.weight_decays, "grads", grads.size());
  check_shapes(op, "grads", grads, "params", params, free_where_zero);
  check_needs(op, "decayed_norm", "is True", arguments.decayed_norm, "trust_coefs", measures(arguments));
  check_ratios(arguments, arguments.ratios, "grads", grads, params);
  check_lrs(op, arguments.lrs, arguments.lr_tensor, "grads", grads.size(), grads[0].device(), lrs_are_needed);
  check_scale(op, "inv_scale", arguments.inv_scale, c10::kFloat, grads[0].device());
}

inline void check(const ScaleGradientsArguments& arguments) {
  // Of a layer that does not decay, only the norm of the parameter is read.
  const auto free_where_zero = measures(arguments) ? at::ArrayRef<double>() : arguments.weight_decays;
  check_layers(arguments, arguments.clip || arguments.lr_in_momentum, free_where_zero);
  check_writable(ScaleGradientsArguments::kOp, "grads", arguments.grads);
}

inline void check(const ScaleUpdatesArguments& arguments) {
  const char* const op = ScaleUpdatesArguments::kOp;
  const auto& [params, old_params] = std::tie(arguments.params, arguments.old_params);
  check_pairs(op, "params", params, "old_params", old_params);
  TORCH_CHECK(params[0].scalar_type() == old_params[0].scalar_type(), op,
              ": expected params and old_params of one dtype (params[0]: ", params[0].scalar_type(),
              ", old_params[0]: ", old_params[0].scalar_type(), ")");
  check_shapes(op, "params", params, "old_params", old_params);
  check_writable(op, "params", params);
  check_ratios(arguments, arguments.ratios, "params", params, old_params);
  check_needs(op, "lrs", "are given", !arguments.lrs.empty(), "trust_coefs", measures(arguments));
  check_lrs(op, arguments.lrs, arguments.lr_tensor, "params", params.size(), params[0].device(), measures(arguments));
}

// Whether a tensor fills its memory without gaps, one row after the other.
inline bool has_rows_in_order(const at::Tensor& tensor) {
  return tensor.dim() > 0 && tensor.is_non_overlapping_and_dense() &&
         (tensor.size(0) < 2 || tensor.numel() == 0 || tensor.stride(0) == row_length(tensor));
}

// Whether the momentum of a whole layer is coded, by its shape and dtype alone.
inline bool is_coded(const at::Tensor& param, int64_t min_size) {
  const auto dtype = param.scalar_type();
  return (dtype == c10::kFloat || dtype == c10::kBFloat16 || dtype == c10::kHalf) &&
         param.numel() >= std::max<int64_t>(min_size, 1) && param.dim() <= kMaxDims && has_rows_in_order(param) &&
         row_length(param) >= kMinRowLength;
}

// Momentum in 8 bits.
inline void check_codes(const SgdArguments& arguments, at::TensorList scales) {
  const char* const op = SgdArguments::kOp;
  const auto& [params, grads, codes] = std::tie(arguments.params, arguments.grads, arguments.momentum_buffers);
  const size_t layers = params.size();
  check_length(op, "momentum_buffers", codes.size(), "grads", layers);
  check_length(op, "momentum_scales", scales.size(), "grads", layers);
  TORCH_CHECK(!params[0].is_complex() && compute_dtype(grads[0].scalar_type(), params[0].scalar_type()) == c10::kFloat,
              op, ": expected float32, bfloat16 or float16 where momentum_scales are given (params[0]: ",
              params[0].scalar_type(), ", grads[0]: ", grads[0].scalar_type(), ")");
  for (size_t i = 0; i < layers; ++i) {
    const at::Tensor& param = params[i];
    TORCH_CHECK(has_rows_in_order(param), op, ": expected params that fill their memory row by row where ",
                "momentum_scales are given (params[", i, "]: shape ", param.sizes(), ", strides ", param.strides(),
                ")");
    const auto check_kind = [&](const char* name, const at::Tensor& tensor, c10::ScalarType dtype) {
      TORCH_CHECK(tensor.layout() == c10::kStrided && tensor.scalar_type() == dtype, op, ": expected ", name, " of ",
                  dtype, " where momentum_scales are given (", name, "[", i, "]: ", tensor.scalar_type(), ")");
      TORCH_CHECK(tensor.device() == param.device(), op, ": expected tensors on one device (params[", i,
                  "]: ", param.device(), ", ", name, "[", i, "]: ", tensor.device(), ")");
    };
    check_kind("momentum_buffers", codes[i], c10::kChar);
    check_kind("momentum_scales", scales[i], c10::kFloat);
    const auto expected = scales_shape(param);
    TORCH_CHECK(scales[i].sizes() == at::IntArrayRef(expected) && scales[i].is_contiguous() && !scales[i].is_neg(), op,
                ": expected contiguous momentum_scales of one number for each block of a row (momentum_scales[", i,
                "]: shape ", scales[i].sizes(), ", expected: ", at::IntArrayRef(expected), ")");
  }
  check_shapes(op, "params", params, "momentum_buffers", codes);
  check_writable(op, "momentum_buffers", codes);
}

// A list of tensors that an optimizer keeps for its parameters.
inline void check_state(const char* op, const char* name, at::TensorList state, at::TensorList params) {
  check_tensors(op, name, state);
  check_length(op, name, state.size(), "params", params.size());
  check_writable(op, name, state);
  const at::Tensor& first = state[0];
  const at::Tensor& param = params[0];
  TORCH_CHECK(first.device() == param.device(), op, ": expected tensors on one device (params[0]: ", param.device(),
              ", ", name, "[0]: ", first.device(), ")");
  TORCH_CHECK(
      first.scalar_type() == param.scalar_type() || (param.element_size() == 2 && first.scalar_type() == c10::kFloat),
      op, ": expected ", name,
      " of the dtype of params, or of float32 for 16-bit ones (params[0]: ", param.scalar_type(), ", ", name,
      "[0]: ", first.scalar_type(), ")");
  check_shapes(op, "params", params, name, state);
}

inline void check(const SgdArguments& arguments) {
  const char* const op = SgdArguments::kOp;
  const size_t layers = arguments.grads.size();
  check_layers(arguments, /*lrs_are_needed=*/true, /*free_where_zero=*/{});
  check_writable(op, "params", arguments.params);
  check_numbers(op, "momentums", arguments.momentums, "grads", layers);
  check_numbers(op, "dampenings", arguments.dampenings, "grads", layers, is_finite);
  check_needs(op, "row_lengths", "are given", !arguments.row_lengths.empty(), "momentum_scales",
              arguments.momentum_scales.has_value());
  if (!(arguments.row_lengths.empty() && arguments.offsets.empty())) {
    check_length(op, "row_lengths", arguments.row_lengths.size(), "grads", layers);
    check_length(op, "offsets", arguments.offsets.size(), "grads", layers);
  }
  const at::TensorList buffers = arguments.momentum_buffers;
  if (buffers.empty()) {
    for (size_t i = 0; i < layers; ++i) {
      TORCH_CHECK(arguments.momentums[i] == 0, op, ": expected momentum_buffers where there is momentum (momentums[", i,
                  "]: ", arguments.momentums[i], ")");
    }
    check_needs(op, "nesterov", "is True", arguments.nesterov, "momentum_buffers", false);
    check_needs(op, "momentum_scales", "are given", arguments.momentum_scales.has_value(), "momentum_buffers", false);
    return;
  }
  if (arguments.momentum_scales.has_value()) {
    check_codes(arguments, *arguments.momentum_scales);
    return;
  }
  check_state(op, "momentum_buffers", buffers, arguments.params);
}

inline void check(const AdamArguments& given) {
  const char* const op = AdamArguments::kOp;
  AdamArguments arguments = given;
  if (given.grads.empty()) {
    arguments.grads = given.params;  // in whose place nothing is read
    check_needs(op, "grads", "are empty", true, "of_updates", given.of_updates);
    check_needs(op, "grads", "are empty", true, "no trust_coefs", !measures(given));
    check_needs(op, "grads", "are empty", true, "no squared_norms", !given.squared_norms.has_value());
  }
  check_layers(arguments, /*lrs_are_needed=*/true, /*free_where_zero=*/{});
  check_writable(op, "params", arguments.params);
  check_state(op, "exp_avgs", arguments.exp_avgs, arguments.params);
  check_state(op, "exp_avg_sqs", arguments.exp_avg_sqs, arguments.params);
  TORCH_CHECK(arguments.exp_avgs[0].scalar_type() == arguments.exp_avg_sqs[0].scalar_type(), op,
              ": expected exp_avgs and exp_avg_sqs of one dtype (exp_avgs[0]: ", arguments.exp_avgs[0].scalar_type(),
              ", exp_avg_sqs[0]: ", arguments.exp_avg_sqs[0].scalar_type(), ")");
  check_length(op, "steps", arguments.steps.size(), "params", arguments.params.size());
  for (const at::Tensor& step : arguments.steps) {
    check_scale(op, "each of steps", step, c10::kFloat, arguments.params[0].device());
  }
  for (const auto& [name, beta] : {std::pair("beta1", arguments.beta1), std::pair("beta2", arguments.beta2)}) {
    TORCH_CHECK(0 <= beta && beta < 1, op, ": expected ", name, " in [0, 1) (got: ", beta, ")");
  }
  TORCH_CHECK(is_non_negative(arguments.adam_eps), op, ": expected a non-negative adam_eps (got: ", arguments.adam_eps,
              ")");
  check_needs(op, "of_updates", "is True", arguments.of_updates, "no decayed_norm", !arguments.decayed_norm);
  if (arguments.squared_norms.has_value()) {
    check_needs(op, "squared_norms", "are given", true, "of_updates", arguments.of_updates);
    check_needs(op, "squared_norms", "are given", true, "no ratios", !arguments.ratios.has_value());
    const at::Tensor &param = arguments.params[0], &grad = arguments.grads[0], &exp_avg = arguments.exp_avgs[0];
    TORCH_CHECK(grad.scalar_type() == param.scalar_type() || exp_avg.element_size() > 2, op,
                ": expected exp_avgs of float32 where squared_norms are given with grads of another dtype than params "
                "(params[0]: ",
                param.scalar_type(), ", grads[0]: ", grad.scalar_type(), ", exp_avgs[0]: ", exp_avg.scalar_type(), ")");
    check_squared_norms(op, "squared_norms", *arguments.squared_norms);
    check_length(op, "squared_norms", arguments.squared_norms->size(0), "twice the params",
                 2 * arguments.params.size());
    TORCH_CHECK(arguments.squared_norms->device() == arguments.params[0].device(), op,
                ": expected tensors on one device (params[0]: ", arguments.params[0].device(),
                ", squared_norms: ", arguments.squared_norms->device(), ")");
  }
}

}  // namespace torchlars
