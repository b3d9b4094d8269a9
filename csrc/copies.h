// Copies of the parameters of a step.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty_strided.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include <cstring>
#include <utility>
#include <vector>

#include "plan.h"

namespace torchlars {

// Copies memory past the caches, to an address that is a multiple of 16. Other stores read memory before they write it.
inline void stream(char* to, const char* from, int64_t bytes) {
  int64_t done = 0;
#ifdef __SSE2__
  for (; done + 16 <= bytes; done += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + done),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + done)));
  }
  _mm_sfence();
#endif
  std::memcpy(to + done, from + done, bytes - done);
}

// Copies of dense tensors on a CPU, made by all threads: torch copies one tensor after the other. Each has memory of
// its own. A block for all would often be so large that glibc takes it from the kernel in every step, and a page that
// is new takes longer than its copy.
inline std::vector<at::Tensor> copies_on_cpu(at::TensorList tensors) {
  constexpr int64_t kGrainBytes = 512 << 10;   // the least work of a thread
  constexpr int64_t kStreamedBytes = 8 << 20;  // so much has left the caches when it is read, after the base's step
  struct Copy {
    char* to;
    const char* from;
  };
  std::vector<at::Tensor> copied;
  std::vector<Copy> memory;
  std::vector<int64_t> sizes;
  int64_t total = 0;
  copied.reserve(tensors.size());
  memory.reserve(tensors.size());
  sizes.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    at::Tensor& copy =
        copied.emplace_back(at::detail::empty_strided_cpu(tensor.sizes(), tensor.strides(), tensor.scalar_type()));
    memory.push_back({static_cast<char*>(copy.mutable_data_ptr()), static_cast<const char*>(tensor.const_data_ptr())});
    sizes.push_back(static_cast<int64_t>(tensor.nbytes()));
    total += sizes.back();
  }
  const Plan plan(std::move(sizes));  // of bytes: chunks begin at multiples of 16
  const bool streams = total >= kStreamedBytes;
  at::parallel_for(0, plan.work, kGrainBytes, [&](int64_t begin, int64_t end) {
    plan.for_chunks_starting_in(begin, end, Order::kForwards, [&](int64_t i, int64_t, Range range) {
      char* const to = memory[i].to + range.begin;
      const char* const from = memory[i].from + range.begin;
      streams ? stream(to, from, range.end - range.begin) : (void)std::memcpy(to, from, range.end - range.begin);
    });
  });
  return copied;
}

// Copies of dense tensors of one device, in their memory order.
inline std::vector<at::Tensor> copies(at::TensorList tensors) {
  if (tensors[0].is_cpu()) {
    return copies_on_cpu(tensors);
  }
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  std::vector<at::Tensor> copied;
  copied.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    copied.push_back(at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options()));
  }
  at::_foreach_copy_(copied, tensors);
  return copied;
}

}  // namespace torchlars
