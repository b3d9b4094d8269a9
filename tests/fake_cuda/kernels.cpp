// Loaded with symbols of its own: what it shares with the extension must not replace the extension's.
#include "cuda_on_host.h"

// After what stands in for CUDA.
#include <dlfcn.h>

#include <map>
#include <string>
#include <tuple>

#include "cuda/launches.h"
#include "kernels.h"

namespace {

using namespace torchlars::cuda;
using fake_cuda::Kernel;
using fake_cuda::Work;

std::map<std::string, Kernel> kernels;

template <typename... Params, size_t... I>
Kernel host_kernel(void (*kernel)(Params...), std::index_sequence<I...>) {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Params) - 1) / alignof(Params) * alignof(Params) + sizeof(Params)), ...);
  return {bytes, {sizeof(Params)...}, [kernel](unsigned blocks, unsigned threads, void** arguments) -> Work {
            // On the heap: a copy of a launch shares its arguments.
            const auto copies = std::make_shared<std::tuple<Params...>>(*static_cast<Params*>(arguments[I])...);
            return [=] {
              std::apply([&](const Params&... values) { cuda_on_host::launch(kernel, blocks, threads, values...); },
                         *copies);
            };
          }};
}

// Instead of a launch.
const auto take = [](auto* kernel, int, const auto&...) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(kernel), &info) == 0 || info.dli_sname == nullptr) {
    std::fprintf(stderr, "fake_cuda: a kernel has no symbol\n");
    std::abort();
  }
  [&]<typename... Params>(void (*typed)(Params...)) {
    kernels[info.dli_sname] = host_kernel(typed, std::index_sequence_for<Params...>{});
  }(kernel);
};

template <typename T, typename M>
void take_sgd(size_t count) {
  const std::vector<SgdLayer> layers(count, SgdLayer{1});
  launch_update<T, M>(take, Slice<SgdLayer>(layers), {}, nullptr, {});
}

template <typename T, typename M>
void take_adam(size_t count) {
  const std::vector<AdamLayer> layers(count, AdamLayer{1});
  launch_measure_adam<T, M>(take, layers, {}, {});
  launch_update_adam<T, M>(take, layers, {}, nullptr, {});
}

template <typename T>
void take_all(size_t count) {
  const std::vector<MeasuredLayer> measured(count, MeasuredLayer{1});
  const std::vector<Layer> layers(count, Layer{1});
  launch_measure<T>(take, measured, {}, nullptr);
  launch_add_partials(take, measured, nullptr, nullptr, nullptr);
  launch_decide<compute_type<T>>(take, layers, nullptr, nullptr, nullptr, {});
  launch_apply<T>(take, layers, {}, nullptr, {});
  launch_apply_to_updates<T>(take, layers, {}, nullptr, {});
  take_sgd<T, T>(count);
  take_sgd<T, compute_type<T>>(count);
  take_adam<T, T>(count);
  take_adam<T, compute_type<T>>(count);
  if constexpr (!std::is_same_v<T, double>) {
    const std::vector<CodedSgdLayer> coded(count);
    launch_update<T, int8_t>(take, Slice<CodedSgdLayer>(coded), {}, nullptr, {});
  }
}

}  // namespace

const Kernel* find_host_kernel(const char* mangled_name) {
  if (kernels.empty()) {
    for (size_t count = 1; count <= 1024; count *= 2) {  // the kernel may depend on how many layers there are
      take_all<float>(count);
      take_all<double>(count);
      take_all<c10::Half>(count);
      take_all<c10::BFloat16>(count);
    }
  }
  const auto found = kernels.find(mangled_name);
  return found == kernels.end() ? nullptr : &found->second;
}
