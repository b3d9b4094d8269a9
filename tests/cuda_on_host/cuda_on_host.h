// What the kernels use of CUDA, on one thread of a CPU under g++. A block's threads are fibers of their own stacks,
// which take turns only where CUDA has them wait for each other: `__syncthreads` for all of a block, a shuffle for the
// lanes of a warp. Blocks run one after another. Include it before the kernels.
#pragma once

#include <math.h>  // fma, outside of any namespace as in CUDA
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
// In a section of their own, whose borders the linker tells, so that every block can start with garbage in them.
#define __shared__ static __attribute__((section("cuda_shared")))
#define __syncthreads() cuda_on_host::sync_threads(__LINE__)
#define __shfl_down_sync(mask, value, delta) cuda_on_host::shuffle_down(__LINE__, mask, value, delta)
#define __shfl_xor_sync(mask, value, lane_mask) cuda_on_host::shuffle_xor(__LINE__, mask, value, lane_mask)

extern "C" char __start_cuda_shared[], __stop_cuda_shared[];

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index gridDim, blockIdx, blockDim, threadIdx;

namespace cuda_on_host {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 * 1024;

// A line of execution that can be left and taken up again, on a stack of its own.
struct Context {
  bool started = false;
  ucontext_t start{};
  void* place[5] = {};  // where it was left
  const void* stack = nullptr;
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// swapcontext would do, but it has the kernel change signal masks every time, and takes thirty times as long.
__attribute__((noinline, no_sanitize("address"))) inline void jump(Context& from, Context& to) {
  if (__builtin_setjmp(from.place) == 0) {
    if (to.started) {
      __builtin_longjmp(to.place, 1);
    }
    to.started = true;
    setcontext(&to.start);
  }
}

inline void leave(Context& from, Context& to) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
#endif
  jump(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

struct Barrier {
  unsigned arrived = 0;
  int line = 0;  // of the source, where the threads wait
};

struct Thread : Context {
  std::unique_ptr<char[]> memory{new char[kStack]};
  const Barrier* waits_at = nullptr;
  bool ended = false;
  unsigned shuffles = 0;
  double offered[2] = {};  // to the other lanes; by turns, as the next shuffle may begin before all have read this one
};

inline Context scheduler{true};  // what `launch` was called in
inline std::vector<std::unique_ptr<Thread>> threads;
inline std::function<void()> kernel;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline bool released = false;  // whether threads were since the scheduler last looked
inline int64_t order = 0;      // in which threads and blocks get their turn; 0: ascending, -1: descending, else a seed

inline std::vector<unsigned> in_order(unsigned count) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0u);
  if (order == -1) {
    std::reverse(indices.begin(), indices.end());
  } else if (order != 0) {
    std::shuffle(indices.begin(), indices.end(), std::mt19937_64(order));
  }
  return indices;
}

[[noreturn]] inline void fail(const char* what, int line, int other_line) {
  std::fprintf(stderr, "cuda_on_host: block %u, thread %u: %s (line %d, line %d)\n", blockIdx.x, threadIdx.x, what,
               line, other_line);
  std::_Exit(1);
}

inline void wait(Barrier& barrier, unsigned expected, int line) {
  if (barrier.arrived > 0 && barrier.line != line) {
    fail("threads meet that wait in different places", barrier.line, line);
  }
  Thread& thread = *threads[threadIdx.x];
  thread.waits_at = &barrier;
  barrier.line = line;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    for (const auto& other : threads) {
      other->waits_at = other->waits_at == &barrier ? nullptr : other->waits_at;
    }
    released = true;
  }
  leave(thread, scheduler);
}

inline void sync_threads(int line) { wait(block_barrier, blockDim.x, line); }

// The value of another lane of the warp. A double holds every number that kernels exchange.
inline double shuffle(int line, unsigned mask, double value, unsigned from) {
  if (mask != 0xffffffffu) {
    fail("only shuffles of whole warps are known here", line, line);
  }
  Thread& thread = *threads[threadIdx.x];
  const unsigned turn = thread.shuffles++ % 2;
  thread.offered[turn] = value;
  wait(warp_barriers[threadIdx.x / kWarp], kWarp, line);
  return threads[threadIdx.x / kWarp * kWarp + from]->offered[turn];
}

inline double shuffle_down(int line, unsigned mask, double value, unsigned delta) {
  const unsigned lane = threadIdx.x % kWarp;
  return shuffle(line, mask, value, lane + delta < kWarp ? lane + delta : lane);
}

inline unsigned shuffle_xor(int line, unsigned mask, unsigned value, unsigned lane_mask) {
  return static_cast<unsigned>(shuffle(line, mask, value, threadIdx.x % kWarp ^ lane_mask));
}

// The life of a fiber: the same thread of one block after another.
inline void live() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_size);
#endif
  for (;;) {
    Thread& thread = *threads[threadIdx.x];
    kernel();
    thread.ended = true;
    leave(thread, scheduler);
  }
}

inline void hire(unsigned count) {
  while (threads.size() < count) {
    threads.push_back(std::make_unique<Thread>());
    Thread& thread = *threads.back();
    thread.stack = thread.memory.get();
    thread.stack_size = kStack;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.memory.get();
    thread.start.uc_stack.ss_size = kStack;
    makecontext(&thread.start, live, 0);
  }
  warp_barriers.resize(count / kWarp);
}

// Whoever comes first in the order goes on, as far as it can: so threads run as far apart as their barriers let them.
inline void run_block(const std::vector<unsigned>& turns) {
  std::fill(__start_cuda_shared, __stop_cuda_shared, char(0xff));  // NaN
  for (const auto& thread : threads) {
    thread->ended = false;
  }
  for (size_t turn = 0; turn < turns.size();) {
    threadIdx.x = turns[turn++];
    Thread& thread = *threads[threadIdx.x];
    if (!thread.ended && thread.waits_at == nullptr) {
      released = false;
      leave(scheduler, thread);
      turn = released ? 0 : turn;
    }
  }
  for (threadIdx.x = 0; threadIdx.x < turns.size(); ++threadIdx.x) {
    const Barrier* barrier = threads[threadIdx.x]->waits_at;
    if (barrier != nullptr) {
      fail("waits for threads that never come", barrier->line, barrier->line);
    }
  }
}

// Instead of kernel<<<blocks, block_size>>>(arguments...). The number of threads is the same in every launch.
template <typename Kernel, typename... Arguments>
void launch(Kernel* function, unsigned blocks, unsigned block_size, const Arguments&... arguments) {
  kernel = [&] { function(arguments...); };
  gridDim.x = blocks;
  blockDim.x = block_size;
  hire(block_size);
  const auto turns = in_order(block_size);
  for (const unsigned block : in_order(blocks)) {
    blockIdx.x = block;
    run_block(turns);
  }
}

}  // namespace cuda_on_host
