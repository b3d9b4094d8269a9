// The kernels of csrc/cuda, compiled for the host and found by the names that nvcc registers.
#pragma once

#include <cstddef>
#include <functional>
#include <vector>

namespace fake_cuda {

// A launch with copies of its arguments, to be run later and more than once.
using Work = std::function<void()>;

struct Kernel {
  size_t argument_bytes;  // with what aligns them
  std::vector<size_t> argument_sizes;
  std::function<Work(unsigned blocks, unsigned threads, void** arguments)> bind;
};

}  // namespace fake_cuda

// Null: no kernel has this name.
extern "C" const fake_cuda::Kernel* find_host_kernel(const char* mangled_name);
