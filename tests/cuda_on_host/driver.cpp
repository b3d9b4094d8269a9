// Reads cases from stdin, runs the kernels on each in the way of csrc/cuda/ops_cuda.cu, and writes what they computed
// to stdout. The other side is tests/test_cuda_on_host.py.
#include "cuda_on_host.h"

// After what stands in for CUDA.
#include <cstring>
#include <limits>

#include "cuda/launches.h"

namespace {

using namespace torchlars::cuda;

// What stdin holds: a Case, its Numbers, all parameters, all gradients; and the next case.
struct Case {
  int64_t dtype, three_ops, maximize, order, layers;
};
struct Numbers {
  int64_t numel, param_offset, grad_offset;
  double weight_decay, trust_coef, eps;
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

template <typename T>
void run(const Case& header) {
  std::vector<Numbers> numbers(header.layers);
  check(read_bytes(numbers.data(), sizeof(Numbers) * numbers.size()), "the input ends too early");
  std::vector<Buffer<T>> params, grads;
  for (const Numbers& n : numbers) {
    params.emplace_back(n.numel, n.param_offset).read();
  }
  for (const Numbers& n : numbers) {
    grads.emplace_back(n.numel, n.grad_offset).read();
  }

  std::vector<MeasuredLayer> both, only_params, only_grads, sizes;
  std::vector<Layer> decided, swept;
  for (size_t i = 0; i < numbers.size(); ++i) {
    const Numbers& n = numbers[i];
    const T* read_param = n.weight_decay == 0 ? nullptr : params[i].data();
    both.push_back({n.numel, params[i].data(), grads[i].data()});
    only_params.push_back({n.numel, params[i].data()});
    only_grads.push_back({n.numel, nullptr, grads[i].data()});
    sizes.push_back({n.numel});
    decided.push_back({0, nullptr, nullptr, n.weight_decay, n.trust_coef, n.eps});
    swept.push_back({n.numel, read_param, grads[i].data(), n.weight_decay});
    if (!header.three_ops) {
      swept.back().trust_coef = n.trust_coef;
      swept.back().eps = n.eps;
    }
  }

  const Buffer<double> param_partials(count_chunks(both)), grad_partials(count_chunks(both));
  const Buffer<double> param_norms(header.layers), grad_norms(header.layers);
  const Buffer<compute_type<T>> ratios(header.layers);
  cuda_on_host::order = header.order;
  if (header.three_ops) {
    launch_measure<T>(launch, only_params, param_partials.data(), nullptr);
    launch_add_partials(launch, sizes, param_partials.data(), param_norms.data());
    launch_measure<T>(launch, only_grads, nullptr, grad_partials.data());
    launch_add_partials(launch, sizes, grad_partials.data(), grad_norms.data());
    launch_decide(launch, decided, param_norms.data(), grad_norms.data(), ratios.data());
    launch_apply<T>(launch, swept, ratios.data(), header.maximize);
  } else {
    launch_measure<T>(launch, both, param_partials.data(), grad_partials.data());
    launch_decide_and_apply<T>(launch, swept, param_partials.data(), grad_partials.data(), ratios.data(),
                               header.maximize);
  }

  for (const auto* buffers : {&params, &grads}) {
    for (const auto& buffer : *buffers) {
      buffer.write();
    }
  }
  param_norms.write();
  grad_norms.write();
  ratios.write();
}

}  // namespace

int main() {
  using Run = void (*)(const Case&);
#ifdef ONLY_FLOAT  // compiles faster
  const Run runs[] = {nullptr, run<float>};
#else
  const Run runs[] = {run<double>, run<float>, run<c10::BFloat16>, run<c10::Half>};
#endif
  for (Case header; read_bytes(&header, sizeof(header));) {
    runs[header.dtype](header);
  }
}
