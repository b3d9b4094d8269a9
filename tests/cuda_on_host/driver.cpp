// Reads cases from stdin, runs the kernels on each in the way of csrc/cuda/ops_cuda.cu, and writes what they computed
// to stdout. The other side is tests/host_driver.py.
#include "cuda_on_host.h"

// After what stands in for CUDA.
#include <cstring>
#include <limits>

#include "cuda/launches.h"

namespace {

using namespace torchlars::cuda;
using torchlars::RatioOptions;

enum Op : int64_t { kScale, kScaleInThreeOps, kSgd, kLarsSgd, kAdam, kLarsAdam, kLamb, kLambInTwoParts };

// What stdin holds: a Case, its Numbers, all parameters, all gradients, then all momentum buffers, their scales, the
// ratios, the lr_tensor and the inv_scale if there are any; and the next case. What an op does not take is 0. Of Adam,
// momentum buffers are first moments, and all second moments, all steps and an AdamCase follow in place of scales.
struct Case {
  int64_t dtype, op, maximize, order, layers;
  int64_t momentum_dtype;  // -1: no momentum; 4: in 8 bits
  int64_t nesterov, has_ratios, has_lr_tensor, has_inv_scale;
  int64_t decayed_norm, clip, lr_in_momentum;
  int64_t of_updates;  // parameters before a step for parameters, after it for gradients; of Adam, what ratios are of
  int64_t decoupled;
};
struct AdamCase {
  double beta1, beta2, eps;
};
struct Numbers {
  int64_t numel, param_offset, grad_offset, momentum_offset, exp_avg_sq_offset;
  int64_t row_length, whole_row_length, place;  // of momentum in 8 bits; place: that of the first element
  double weight_decay, trust_coef, eps, lr, momentum, dampening;
};

bool read_bytes(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

void check(bool holds, const char* otherwise) {
  if (!holds) {
    std::fprintf(stderr, "driver: %s\n", otherwise);
    std::exit(1);
  }
}

// Memory for exactly so many elements, so that AddressSanitizer sees whoever leaves it; without it, guards stand
// around. All of it is NaN at first. The offset, in elements, moves it off a border of 16 bytes.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t numel, int64_t offset = 0)
      : begin_(kGuard + offset * sizeof(T)),
        end_(begin_ + numel * sizeof(T)),
        size_(end_ + kGuard),
        memory_(static_cast<unsigned char*>(std::malloc(size_)), std::free) {
    std::memset(memory_.get(), kLarge, size_);
    std::memset(memory_.get() + begin_, kNaN, end_ - begin_);
  }

  // An empty tensor has no memory in torch either.
  T* data() const { return end_ == kGuard ? nullptr : reinterpret_cast<T*>(memory_.get() + begin_); }

  void read() { check(read_bytes(memory_.get() + begin_, end_ - begin_), "the input ends too early"); }

  void write() const {
    for (size_t i = 0; i < size_; ++i) {
      check((begin_ <= i && i < end_) || memory_.get()[i] == kLarge, "a kernel wrote outside of its memory");
    }
    std::fwrite(memory_.get() + begin_, 1, end_ - begin_, stdout);
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr size_t kGuard = 0;
#else
  static constexpr size_t kGuard = 64;
#endif
  static constexpr unsigned char kNaN = 0xff, kLarge = 0x7f;  // repeated, in every dtype

  size_t begin_, end_, size_;
  std::unique_ptr<unsigned char, decltype(&std::free)> memory_;
};

const auto launch = [](auto* kernel, int blocks, const auto&... arguments) {
  cuda_on_host::launch(kernel, blocks, kThreads, arguments...);
};

constexpr int64_t kInt8 = 4;  // in the driver's dtypes

template <typename T>
std::vector<Buffer<T>> read_buffers(const std::vector<Numbers>& numbers, int64_t Numbers::* offset) {
  std::vector<Buffer<T>> buffers;
  for (const Numbers& n : numbers) {
    buffers.emplace_back(n.numel, n.*offset).read();
  }
  return buffers;
}

RatioOptions ratio_options(const Case& header) {
  RatioOptions options;
  options.decayed_norm = header.decayed_norm != 0;
  options.clip = header.clip != 0;
  options.of_updates = header.of_updates != 0;
  return options;
}

// What the parameter is multiplied by before it is added to what is measured.
double addend_scale(const Case& header, const Numbers& n) {
  const double decay = header.maximize ? -n.weight_decay : n.weight_decay;
  return header.of_updates ? -1 : header.decayed_norm ? decay : 0;
}

// Before and after any op.
template <typename T>
struct Tensors {
  explicit Tensors(const Case& header) : numbers(header.layers), param_norms(header.layers), grad_norms(header.layers) {
    check(read_bytes(numbers.data(), sizeof(Numbers) * numbers.size()), "the input ends too early");
    params = read_buffers<T>(numbers, &Numbers::param_offset);
    grads = read_buffers<T>(numbers, &Numbers::grad_offset);
    cuda_on_host::order = header.order;
  }

  std::vector<MeasuredLayer> measured(const Case& header) const {
    std::vector<MeasuredLayer> layers;
    for (size_t i = 0; i < numbers.size(); ++i) {
      layers.push_back({numbers[i].numel, params[i].data(), grads[i].data(), addend_scale(header, numbers[i])});
    }
    return layers;
  }

  template <typename M>
  void write(const std::vector<Buffer<M>>& momentum_buffers, const Buffer<compute_type<T>>& ratios) const {
    for (const auto* buffers : {&params, &grads}) {
      for (const auto& buffer : *buffers) {
        buffer.write();
      }
    }
    for (const auto& buffer : momentum_buffers) {
      buffer.write();
    }
    param_norms.write();
    grad_norms.write();
    ratios.write();
  }

  std::vector<Numbers> numbers;
  std::vector<Buffer<T>> params, grads;
  Buffer<double> param_norms, grad_norms;
};

// What lies on the device for all layers of an op, each in memory of its own.
struct Scales {
  explicit Scales(const Case& header) : header(header) {
    if (header.has_lr_tensor) {
      lr_tensor.read();
    }
    if (header.has_inv_scale) {
      inv_scale.read();
    }
  }

  const double* lr() const { return header.has_lr_tensor ? lr_tensor.data() : nullptr; }
  const float* inv() const { return header.has_inv_scale ? inv_scale.data() : nullptr; }

  const Case& header;
  Buffer<double> lr_tensor{1};
  Buffer<float> inv_scale{1};
};

template <typename Options>
Options options_of(const Case& header, const Scales& scales) {
  Options options;
  options.ratio = ratio_options(header);
  options.maximize = header.maximize != 0;
  options.lr_tensor = scales.lr();
  options.inv_scale = scales.inv();
  return options;
}

template <typename T>
void scale(const Case& header) {
  const Tensors<T> x(header);
  const auto& [numbers, params, grads, param_norms, grad_norms] = x;
  const Scales scales(header);
  auto options = options_of<LarsOptions>(header, scales);
  options.lr_in_momentum = header.lr_in_momentum != 0;
  const std::vector<MeasuredLayer> both = x.measured(header);
  std::vector<MeasuredLayer> only_params, only_grads, sizes;
  std::vector<Layer> decided, swept;
  for (size_t i = 0; i < numbers.size(); ++i) {
    const Numbers& n = numbers[i];
    const bool is_read = header.of_updates || n.weight_decay != 0;
    only_params.push_back({n.numel, params[i].data()});
    only_grads.push_back({n.numel, both[i].scale == 0 ? nullptr : params[i].data(), grads[i].data(), both[i].scale});
    sizes.push_back({n.numel});
    decided.push_back({0, nullptr, nullptr, header.of_updates ? 0 : n.weight_decay, n.trust_coef, n.eps, n.lr});
    swept.push_back({n.numel, is_read ? params[i].data() : nullptr, grads[i].data(), decided[i].weight_decay, 0, 0,
                     header.op == kScale || header.lr_in_momentum ? n.lr : 0});
    if (header.op == kScale) {
      swept.back().trust_coef = n.trust_coef;
      swept.back().eps = n.eps;
    }
  }

  const int64_t chunks = count_chunks<MeasuredLayer>(both);
  const Buffer<double> param_partials(chunks), grad_partials(chunks);
  const Buffer<compute_type<T>> ratios(header.layers);
  Partials partials{param_partials.data(), grad_partials.data()};
  if (header.op == kScaleInThreeOps) {
    launch_measure<T>(launch, only_params, {partials.params, nullptr}, nullptr);
    launch_add_partials(launch, sizes, partials.params, param_norms.data(), nullptr);
    launch_measure<T>(launch, only_grads, {nullptr, partials.grads}, scales.inv());
    launch_add_partials(launch, sizes, partials.grads, grad_norms.data(), scales.inv());
    launch_decide(launch, decided, param_norms.data(), grad_norms.data(), ratios.data(), options);
    partials = {};
  } else {
    launch_measure<T>(launch, both, partials, scales.inv());
  }
  if (header.of_updates) {
    launch_apply_to_updates<T>(launch, swept, partials, ratios.data(), options);
  } else {
    launch_apply<T>(launch, swept, partials, ratios.data(), options);
  }
  x.write(std::vector<Buffer<T>>(), ratios);
}

// M: the type of the momentum.
template <typename T, typename M>
void update_by_sgd(const Case& header) {
  const Tensors<T> x(header);
  std::vector<Buffer<M>> momentum_buffers;
  if (header.momentum_dtype >= 0) {
    momentum_buffers = read_buffers<M>(x.numbers, &Numbers::momentum_offset);
  }
  std::vector<Buffer<float>> momentum_scales;
  for (size_t i = 0; header.momentum_dtype == kInt8 && i < x.numbers.size(); ++i) {
    const Numbers& n = x.numbers[i];
    momentum_scales.emplace_back(n.numel / n.row_length * torchlars::divide_up(n.row_length, torchlars::kBlock)).read();
  }
  Buffer<compute_type<T>> ratios(header.layers);
  if (header.has_ratios) {
    ratios.read();
  }
  const Scales scales(header);
  std::vector<std::conditional_t<std::is_same_v<M, int8_t>, CodedSgdLayer, SgdLayer>> layers;
  for (size_t i = 0; i < x.numbers.size(); ++i) {
    const Numbers& n = x.numbers[i];
    void* momentum_buffer = momentum_buffers.empty() ? nullptr : momentum_buffers[i].data();
    const SgdLayer layer{n.numel, x.params[i].data(), x.grads[i].data(), momentum_buffer, n.weight_decay, 0, 0,
                         n.lr,    n.momentum,         n.dampening};
    if constexpr (std::is_same_v<M, int8_t>) {
      layers.push_back({layer,
                        momentum_scales[i].data(),
                        {n.row_length, static_cast<uint32_t>(n.whole_row_length), static_cast<uint32_t>(n.place)}});
    } else {
      layers.push_back(layer);
    }
    if (header.op == kLarsSgd) {
      layers.back().trust_coef = n.trust_coef;
      layers.back().eps = n.eps;
    }
  }

  auto options = options_of<SgdOptions>(header, scales);
  options.lr_in_momentum = header.lr_in_momentum != 0;
  options.nesterov = header.nesterov != 0;
  if (header.op == kLarsSgd) {
    const std::vector<MeasuredLayer> measured = x.measured(header);
    const int64_t chunks = count_chunks<MeasuredLayer>(measured);
    const Buffer<double> param_partials(chunks), grad_partials(chunks);
    const Partials partials{param_partials.data(), grad_partials.data()};
    launch_measure<T>(launch, measured, partials, scales.inv());
    launch_update<T, M>(launch, Slice(layers), partials, ratios.data(), options);
  } else {
    launch_update<T, M>(launch, Slice(layers), {}, header.has_ratios ? ratios.data() : nullptr, options);
  }
  x.write(momentum_buffers, ratios);
  for (const auto& buffer : momentum_scales) {
    buffer.write();
  }
}

// What was measured, as the host of the op's first part adds it.
template <typename T>
void add_partials_of_adam(const Tensors<T>& x, const Partials& partials, double* squared_norms) {
  std::vector<MeasuredLayer> layers;
  for (int list = 0; list < 2; ++list) {
    for (const Numbers& n : x.numbers) {
      layers.push_back({n.numel});
    }
  }
  launch_add_partials(launch, layers, partials.params, squared_norms, nullptr);
  std::memcpy(x.param_norms.data(), squared_norms, x.numbers.size() * sizeof(double));
  std::memcpy(x.grad_norms.data(), squared_norms + x.numbers.size(), x.numbers.size() * sizeof(double));
}

// M: the type of the moments.
template <typename T, typename M>
void update_by_adam(const Case& header) {
  const Tensors<T> x(header);
  const auto exp_avgs = read_buffers<M>(x.numbers, &Numbers::momentum_offset);
  const auto exp_avg_sqs = read_buffers<M>(x.numbers, &Numbers::exp_avg_sq_offset);
  std::vector<Buffer<float>> steps;
  for (size_t i = 0; i < x.numbers.size(); ++i) {
    steps.emplace_back(1).read();
  }
  AdamCase adam;
  check(read_bytes(&adam, sizeof(adam)), "the input ends too early");
  Buffer<compute_type<T>> ratios(header.layers);
  if (header.has_ratios) {
    ratios.read();
  }
  const Scales scales(header);
  std::vector<AdamLayer> layers;
  std::vector<Layer> decided;
  std::vector<MeasuredLayer> measured = x.measured(header), incremented;
  for (size_t i = 0; i < x.numbers.size(); ++i) {
    const Numbers& n = x.numbers[i];
    const bool decides = header.op == kLarsAdam || header.op == kLamb;
    layers.push_back({n.numel, x.params[i].data(), x.grads[i].data(), exp_avgs[i].data(), exp_avg_sqs[i].data(),
                      steps[i].data(), n.weight_decay, decides ? n.trust_coef : 0, decides ? n.eps : 0, n.lr});
    decided.push_back({0, nullptr, nullptr, 0, n.trust_coef, n.eps, 1});
    measured[i].scale = header.decoupled ? 0 : measured[i].scale;
    measured[i].step = steps[i].data();
    incremented.emplace_back().step = steps[i].data();
  }

  auto options = options_of<AdamOptions>(header, scales);
  options.decoupled_weight_decay = header.decoupled != 0;
  options.beta1 = adam.beta1;
  options.beta2 = adam.beta2;
  options.adam_eps = adam.eps;
  const int64_t chunks = count_chunks<AdamLayer>(layers);
  const Buffer<double> sums(2 * chunks);
  const Buffer<float> step_of_chunks(chunks);
  Partials partials{sums.data(), sums.data() + chunks};
  if (header.op == kAdam) {
    launch_measure<float>(launch, incremented, {}, scales.inv());
    launch_update_adam<T, M>(launch, layers, {}, header.has_ratios ? ratios.data() : nullptr, options);
  } else if (header.op == kLarsAdam) {
    launch_measure<T>(launch, measured, partials, scales.inv());
    launch_update_adam<T, M>(launch, layers, partials, ratios.data(), options);
  } else if (header.op == kLamb) {
    partials.steps = step_of_chunks.data();
    launch_measure_adam<T, M>(launch, layers, partials, options);
    launch_update_adam<T, M>(launch, layers, partials, ratios.data(), options);
  } else {
    const Buffer<double> squared_norms(2 * header.layers);
    launch_measure<float>(launch, incremented, {}, scales.inv());
    launch_measure_adam<T, M>(launch, layers, partials, options);
    add_partials_of_adam(x, partials, squared_norms.data());
    LarsOptions deciding;
    deciding.ratio = options.ratio;
    launch_decide(launch, decided, x.param_norms.data(), x.grad_norms.data(), ratios.data(), deciding);
    for (AdamLayer& layer : layers) {
      layer.grad = nullptr;
    }
    launch_update_adam<T, M>(launch, layers, {}, ratios.data(), options);
  }
  x.write(exp_avgs, ratios);
  for (const auto& buffer : exp_avg_sqs) {
    buffer.write();
  }
  for (const auto& buffer : steps) {
    buffer.write();
  }
}

#ifdef ONLY_DTYPE  // compiles faster
constexpr int kOnlyDtype = ONLY_DTYPE;
#else
constexpr int kOnlyDtype = -1;
#endif
enum Family { kScaling, kOfSgd, kOfAdam };  // of ops
#ifdef ONLY_FAMILY
constexpr int kOnlyFamily = ONLY_FAMILY;
#else
constexpr int kOnlyFamily = -1;
#endif

template <int kDtype, typename T>
void run(const Case& header) {
  const Family family = header.op < kSgd ? kScaling : header.op < kAdam ? kOfSgd : kOfAdam;
  const bool one_dtype = header.momentum_dtype < 0 || header.momentum_dtype == header.dtype;
  check(kOnlyDtype == -1 || kOnlyDtype == kDtype, "was compiled without this dtype");
  check(kOnlyFamily == -1 || kOnlyFamily == family, "was compiled without this op");
  if constexpr (kOnlyDtype == -1 || kOnlyDtype == kDtype) {
    if constexpr (kOnlyFamily == -1 || kOnlyFamily == kScaling) {
      if (family == kScaling) {
        scale<T>(header);
      }
    }
    if constexpr (kOnlyFamily == -1 || kOnlyFamily == kOfSgd) {
      if (family == kOfSgd && one_dtype) {
        update_by_sgd<T, T>(header);
      } else if (family == kOfSgd && header.momentum_dtype == kInt8) {
        if constexpr (sizeof(T) < 8) {
          update_by_sgd<T, int8_t>(header);
        }
      } else if (family == kOfSgd) {
        update_by_sgd<T, compute_type<T>>(header);
      }
    }
    if constexpr (kOnlyFamily == -1 || kOnlyFamily == kOfAdam) {
      if (family == kOfAdam) {
        one_dtype ? update_by_adam<T, T>(header) : update_by_adam<T, compute_type<T>>(header);
      }
    }
  }
}

}  // namespace

int main() {
  void (*const runs[])(const Case&) = {run<0, double>, run<1, float>, run<2, c10::BFloat16>, run<3, c10::Half>};
  for (Case header; read_bytes(&header, sizeof(header));) {
    runs[header.dtype](header);
  }
}
