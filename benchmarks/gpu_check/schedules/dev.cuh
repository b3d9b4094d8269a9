// Device side of the experiment: this file's kernels beside the project's own (csrc/cuda/kernels.cuh).
#pragma once
#include "../csrc/cuda/launches.h"
#include "sched.h"

#ifdef SHIM
#include "shim.h"
#endif

namespace tl = torchlars;

// ---- memory accesses with hints. All volatile asm: they stay in program order, so that loads ahead of a wait stay so.
enum { kPlain = 0, kCs = 1, kPolicy = 2 };
template <int MODE>
__device__ __forceinline__ uint4 ld16(const void* p, uint64_t pol) {
  uint4 v;
  if constexpr (MODE == kPlain) {
    asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  } else if constexpr (MODE == kCs) {
    asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  } else {
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0,%1,%2,%3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(pol));
  }
  return v;
}
template <int MODE>
__device__ __forceinline__ void st16(void* p, uint4 v, uint64_t pol) {
  if constexpr (MODE == kPlain) {
    asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
  } else if constexpr (MODE == kCs) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  } else {
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1,%2,%3,%4}, %5;" ::"l"(p), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w), "l"(pol)
                 : "memory");
  }
}
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
  return p;
}
__device__ __forceinline__ uint64_t evict_last() {
  uint64_t p;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
  return p;
}
// H: 0 no hints; 1 m and all stores streaming (.cs); 2 m, stores, and the update's reads of p and g evict-first;
// 3 as 2, and what measure reads evict-last (or evict-first ahead of a large layer's last `keep` elements).
template <int H>
struct Hint {
  static constexpr int measure = H == 3 ? kPolicy : kPlain;
  static constexpr int again = H >= 2 ? kPolicy : kPlain;  // the second read of p and g
  static constexpr int stream = H == 0 ? kPlain : H == 1 ? kCs : kPolicy;
};

template <typename T>
struct Vec {
  static constexpr int size = 16 / sizeof(T);
};
template <typename T>
__device__ __forceinline__ void unpack(const uint4& v, float (&f)[Vec<T>::size]) {
  const tl::cuda::Pack<T>& x = reinterpret_cast<const tl::cuda::Pack<T>&>(v);
#pragma unroll
  for (int i = 0; i < Vec<T>::size; ++i) f[i] = static_cast<float>(x.values[i]);
}
template <typename T>
__device__ __forceinline__ uint4 pack(const float (&f)[Vec<T>::size]) {
  tl::cuda::Pack<T> x;
#pragma unroll
  for (int i = 0; i < Vec<T>::size; ++i) x.values[i] = static_cast<T>(f[i]);
  return reinterpret_cast<const uint4&>(x);
}

// SUM 0: double throughout, as the project; 1: a pack's squares in float, then double.
template <typename T, int SUM>
__device__ __forceinline__ void add_squares(double& sum, const uint4& v) {
  float f[Vec<T>::size];
  unpack<T>(v, f);
  if constexpr (SUM == 0) {
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) sum = tl::cuda::add_square(sum, static_cast<double>(f[i]));
  } else {
    float q[Vec<T>::size];
#pragma unroll
    for (int i = 0; i < Vec<T>::size; ++i) q[i] = f[i] * f[i];
#pragma unroll
    for (int w = Vec<T>::size / 2; w > 0; w /= 2) {
#pragma unroll
      for (int i = 0; i < w; ++i) q[i] += q[i + w];
    }
    sum += static_cast<double>(q[0]);
  }
}

// A thread's sums of squares of a chunk of p and g; packs >= 1. Reads beyond the end are of the last pack, and unused.
template <typename T, int BS, int UN, int H, int SUM>
__device__ __forceinline__ void measure_chunk(const uint4* p, const uint4* g, int packs, uint64_t pol, double& sp,
                                              double& sg) {
  sp = 0;
  sg = 0;
  for (int first = threadIdx.x; first < packs; first += UN * BS) {
    uint4 a[UN], b[UN];
#pragma unroll
    for (int u = 0; u < UN; ++u) {
      const int i = min(first + u * BS, packs - 1);
      a[u] = ld16<Hint<H>::measure>(p + i, pol);
      b[u] = ld16<Hint<H>::measure>(g + i, pol);
    }
#pragma unroll
    for (int u = 0; u < UN; ++u) {
      if (first + u * BS < packs) {
        add_squares<T, SUM>(sp, a[u]);
        add_squares<T, SUM>(sg, b[u]);
      }
    }
  }
}

__device__ __forceinline__ double2 warp_down(double2 v) {  // lane 0 has the sum
#pragma unroll
  for (int o = 16; o > 0; o /= 2) {
    v.x += __shfl_down_sync(0xffffffffu, v.x, o);
    v.y += __shfl_down_sync(0xffffffffu, v.y, o);
  }
  return v;
}

// For warp 0, after the barrier: lane 0 has the block's sum.
template <int BS>
__device__ __forceinline__ double2 add_warps(const double2* sums) {
  if constexpr (BS <= 256) {
    double2 t = {0, 0};
#pragma unroll
    for (int w = 0; w < BS / 32; ++w) {
      t.x += sums[w].x;
      t.y += sums[w].y;
    }
    return t;
  } else {
    double2 t = {0, 0};
    if ((threadIdx.x & 31) < BS / 32) t = sums[threadIdx.x & 31];
    return warp_down(t);
  }
}

// For warp 0: lane 0 has the ratio. UNROLL: loads in flight; few where registers are full of an update's packs.
template <int UNROLL = 4>
__device__ __forceinline__ float decide_by_warp(const double2* partials, int n, const Hyper& h) {
  double2 s = {0, 0};
#pragma unroll UNROLL
  for (int i = threadIdx.x & 31; i < n; i += 32) {
    const double2 v = __ldcg(partials + i);
    s.x += v.x;
    s.y += v.y;
  }
  s = warp_down(s);
  float ratio = 1;
  if ((threadIdx.x & 31) == 0) {
    ratio = static_cast<float>(tl::trust_ratio(s.x, s.y, h.wd, h.trust, h.eps, 0., tl::RatioOptions{}));
  }
  return ratio;
}

enum { kFused = 0, kWrapper = 1, kSgd = 2 };  // what an update does; kSgd: with the ratio 1

template <int OP, int UN>
struct Loaded {
  uint4 p[UN], g[UN], m[OP == kWrapper ? 1 : UN];
};
template <typename T, int BS, int UN, int H, int OP>
__device__ __forceinline__ void load_group(Loaded<OP, UN>& x, const uint4* p, const uint4* g, const uint4* m, int first,
                                           int packs, uint64_t pol) {
#pragma unroll
  for (int u = 0; u < UN; ++u) {
    const int i = min(first + u * BS, packs - 1);
    x.p[u] = ld16<Hint<H>::again>(p + i, pol);
    x.g[u] = ld16<Hint<H>::again>(g + i, pol);
    if constexpr (OP != kWrapper) x.m[u] = ld16<Hint<H>::stream>(m + i, pol);
  }
}
template <typename T, int BS, int UN, int H, int OP>
__device__ __forceinline__ void store_group(const Loaded<OP, UN>& x, uint4* p, uint4* g, uint4* m, int first, int packs,
                                            uint64_t pol, const Hyper& h, float ratio) {
  constexpr int S = Vec<T>::size;
#pragma unroll
  for (int u = 0; u < UN; ++u) {
    const int i = first + u * BS;
    if (i < packs) {
      float fp[S], fg[S];
      unpack<T>(x.p[u], fp);
      unpack<T>(x.g[u], fg);
      if constexpr (OP == kWrapper) {
#pragma unroll
        for (int k = 0; k < S; ++k) fg[k] = ratio * (fg[k] + h.fwd * fp[k]);
        st16<Hint<H>::stream>(g + i, pack<T>(fg), pol);
      } else {
        float fm[S];
        unpack<T>(x.m[u], fm);
#pragma unroll
        for (int k = 0; k < S; ++k) {
          const float d = ratio * (fg[k] + h.fwd * fp[k]);
          fm[k] = h.fmom * fm[k] + h.fund * d;
          fp[k] = fp[k] - h.flr * fm[k];
        }
        st16<Hint<H>::stream>(p + i, pack<T>(fp), pol);
        st16<Hint<H>::stream>(m + i, pack<T>(fm), pol);
      }
    }
  }
}

struct Chunk {
  uint4 *p, *g, *m;
  int packs, begin;
};
template <typename T>
__device__ __forceinline__ Chunk chunk_of(const LayerRef& l, int index) {
  const int begin = index * l.size;  // < n < 2^31
  const int count = min(l.size, l.n - begin);
  Chunk c;
  c.p = reinterpret_cast<uint4*>(static_cast<T*>(l.p) + begin);
  c.g = reinterpret_cast<uint4*>(static_cast<T*>(l.g) + begin);
  c.m = reinterpret_cast<uint4*>(static_cast<T*>(l.m) + begin);
  c.packs = count / Vec<T>::size;
  c.begin = begin;
  return c;
}
template <int H>
__device__ __forceinline__ uint64_t stream_policy() {
  if constexpr (H >= 2) {
    return evict_first();
  } else {
    return 0;
  }
}
template <int H>
__device__ __forceinline__ uint64_t measure_policy(int begin, int n, int keep) {
  if constexpr (H == 3) {
    const uint64_t last = evict_last(), first = evict_first();
    return begin >= n - keep ? last : first;
  } else {
    return 0;
  }
}

constexpr int kKeepAll = 1 << 30;

template <int BS, int UN>
constexpr int min_blocks() {
  return BS * UN == 1024 ? (BS == 256 ? 3 : BS == 512 ? 2 : 1) : BS == 256 ? 4 : 1;
}

// ---- plain launches (A of this file, B, B-pdl, B-pipe). griddepcontrol does nothing without the launch attribute.

template <typename T, int BS, int UN, int H, int SUM>
__device__ __forceinline__ void measure_block(const int* first, const LayerRef* layers, int count, int item,
                                              double2* partials, int keep) {
  __shared__ double2 sums[BS / 32];
  const int layer = find_last([&](int i) { return first[i]; }, count, item);
  const Chunk c = chunk_of<T>(layers[layer], item - first[layer]);
  double sp, sg;
  measure_chunk<T, BS, UN, H, SUM>(c.p, c.g, c.packs, measure_policy<H>(c.begin, layers[layer].n, keep), sp, sg);
  const double2 w = warp_down({sp, sg});
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = w;
  __syncthreads();
  cudaGridDependencySynchronize();  // all before is of this run only; no kernel ends before the one ahead has ended
  if (threadIdx.x < 32) {
    const double2 t = add_warps<BS>(sums);
    if (threadIdx.x == 0) partials[item] = t;
  }
}
template <typename T, int BS, int UN, int H, int OP>
__device__ __forceinline__ void update_block(const int* first, const LayerRef* layers, const Hyper& h, int count,
                                             int item, const double2* partials) {
  __shared__ float ratio_s;
  const int layer = find_last([&](int i) { return first[i]; }, count, item);
  const Chunk c = chunk_of<T>(layers[layer], item - first[layer]);
  const uint64_t pol = stream_policy<H>();
  Loaded<OP, UN> x;
  load_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, threadIdx.x, c.packs, pol);
  float ratio = 1;
  if constexpr (OP != kSgd) {
    cudaGridDependencySynchronize();
    if (threadIdx.x < 32) {
      const float r = decide_by_warp(partials + first[layer], first[layer + 1] - first[layer], h);
      if (threadIdx.x == 0) ratio_s = r;
    }
    __syncthreads();
    ratio = ratio_s;
  }
  store_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, threadIdx.x, c.packs, pol, h, ratio);
  for (int i = threadIdx.x + UN * BS; i < c.packs; i += UN * BS) {
    load_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, i, c.packs, pol);
    store_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, i, c.packs, pol, h, ratio);
  }
}

template <typename T, int BS, int UN, int H, int SUM, int CAP>
__global__ void __launch_bounds__(BS, min_blocks<BS, UN>())
    measure_k(const __grid_constant__ Args<CAP> a, double2* partials, int keep) {
  cudaTriggerProgrammaticLaunchCompletion();
  measure_block<T, BS, UN, H, SUM>(a.first, a.layer, a.count, blockIdx.x, partials, keep);
}
template <typename T, int BS, int UN, int H, int OP, int CAP>
__global__ void __launch_bounds__(BS, min_blocks<BS, UN>())
    update_k(const __grid_constant__ Args<CAP> a, const double2* partials) {
  cudaTriggerProgrammaticLaunchCompletion();
  update_block<T, BS, UN, H, OP>(a.first, a.layer, a.hyper, a.count, gridDim.x - 1 - blockIdx.x, partials);
}
// Run k is measured (partials_m) while run k-1 is updated (partials_u), blocks of both mixed evenly.
template <typename T, int BS, int UN, int H, int OP, int CAP>
__global__ void __launch_bounds__(BS, min_blocks<BS, UN>())
    pipe_k(const __grid_constant__ Args<CAP> am, const __grid_constant__ Args<CAP> au, double2* partials_m,
           const double2* partials_u) {
  cudaTriggerProgrammaticLaunchCompletion();
  const int nm = am.count ? am.first[am.count] : 0, nu = au.count ? au.first[au.count] : 0;
  const long long b = blockIdx.x;
  const int before = static_cast<int>(b * nu / (nm + nu));  // update blocks ahead of this one
  const int after = static_cast<int>((b + 1) * nu / (nm + nu));
  if (after > before) {
    update_block<T, BS, UN, H, OP>(au.first, au.layer, au.hyper, au.count, nu - 1 - before, partials_u);
  } else {
    measure_block<T, BS, UN, H, 0>(am.first, am.layer, am.count, static_cast<int>(b) - before, partials_m, kKeepAll);
  }
}
// Plain SGD, forwards; blocks from block0 on, so that torch's cutting into launches can be imitated.
template <typename T, int BS, int UN, int H>
__global__ void __launch_bounds__(BS) sgd_k(const __grid_constant__ Args<kCapLayers> a, int block0) {
  update_block<T, BS, UN, H, kSgd>(a.first, a.layer, a.hyper, a.count, block0 + blockIdx.x, nullptr);
}

// ---- one launch with tickets

struct State {
  unsigned ticket, left;
  unsigned mcount[kCapLayers];
  unsigned long long word[kCapLayers];  // 1 << 32 | bits of the ratio, once it is decided
};

__device__ __forceinline__ unsigned ld_acquire(const unsigned* p) {
  unsigned v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ unsigned long long ld_relaxed(const unsigned long long* p) {
  unsigned long long v;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void st_relaxed(unsigned long long* p, unsigned long long v) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
// Waits until done(), but not for ever: then sets *error, and all other waits end soon too.
template <typename Done>
__device__ __forceinline__ void spin(const Done& done, int* error) {
  if (done()) return;
  const long long begin = clock64();
  for (unsigned polls = 1;; ++polls) {
    __nanosleep(20);
    if (done()) return;
    if (polls % 256 == 0 && (clock64() - begin > 200000000ll || *static_cast<volatile int*>(error) != 0)) {
      *static_cast<volatile int*>(error) = 1;
      return;
    }
  }
}

// Adds one, after all that the thread wrote before.
__device__ __forceinline__ unsigned add_release(unsigned* p) {
  unsigned old;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(p) : "memory");
  return old;
}
// asm: the compiler would aggregate an atomicAdd over the warp, and with that wait for its result at once.
__device__ __forceinline__ unsigned add_relaxed(unsigned* p) {
  unsigned old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(p) : "memory");
  return old;
}
__device__ __forceinline__ void red_release(unsigned* p) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory");
}
__device__ __forceinline__ void fence_acq_rel() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// DEC 0: each update adds its layer's partial sums again; 1: the last measure of a layer does, and publishes the ratio.
template <typename T, int BS, int UN, int H, int DEC, int OP, int SUM>
__global__ void __launch_bounds__(BS, min_blocks<BS, UN>())
    ticket_k(const __grid_constant__ TArgs a, State* st, double2* partials, int* error) {
  __shared__ double2 sums_s[2][BS / 32];
  __shared__ float ratio_s[2];
  __shared__ int next_s[2];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int total = a.tickets;
  const uint64_t pol = stream_policy<H>();
  Cursor cursor;
  int parity = 0;
  if (threadIdx.x == 0) next_s[1] = static_cast<int>(add_relaxed(&st->ticket));
  __syncthreads();
  int t = next_s[1];
  // One barrier an item. What is shared has two copies: an item's successor writes the other one, and the one behind
  // that writes only after a barrier at which all had read.
  while (t < total) {
    int next = total;  // of thread 0, which draws now what it looks at later
    if (a.persistent && threadIdx.x == 0) next = static_cast<int>(add_relaxed(&st->ticket));
    const Item it = decode(a, t, cursor);
    const LayerRef& l = a.layer[it.layer];
    const int first = a.first[it.layer], n = a.first[it.layer + 1] - first;
    const Chunk c = chunk_of<T>(l, it.item - first);
    if (it.kind == kM) {
      double sp, sg;
      measure_chunk<T, BS, UN, H, SUM>(c.p, c.g, c.packs, measure_policy<H>(c.begin, l.n, a.keep), sp, sg);
      const double2 w = warp_down({sp, sg});
      if (lane == 0) sums_s[parity][warp] = w;
      if (threadIdx.x == 0) next_s[parity] = next;
      __syncthreads();
      if (warp == 0) {
        const double2 sum = add_warps<BS>(sums_s[parity]);
        if constexpr (DEC == 0) {
          if (lane == 0) {
            __stcg(partials + it.item, sum);
            red_release(&st->mcount[it.layer]);
          }
        } else {
          unsigned old = 0;
          if (lane == 0) {
            __stcg(partials + it.item, sum);
            if (n > 1) old = add_release(&st->mcount[it.layer]);
          }
          old = __shfl_sync(0xffffffffu, old, 0);
          if (old == n - 1u) {
            if (lane == 0) fence_acq_rel();
            __syncwarp();
            const float ratio = decide_by_warp(partials + first, n, a.hyper);
            if (lane == 0) {
              st_relaxed(&st->word[it.layer], 1ull << 32 | __float_as_uint(ratio));
            }
          }
          __syncwarp();
        }
      }
      t = next_s[parity];
    } else {
      Loaded<OP, UN> x;
      load_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, threadIdx.x, c.packs, pol);
      if constexpr (DEC == 0) {
        if (warp == 0) {
          if (lane == 0) {
            spin([&] { return ld_acquire(&st->mcount[it.layer]) >= static_cast<unsigned>(n); }, error);
          }
          __syncwarp();
          const float ratio = decide_by_warp<2>(partials + first, n, a.hyper);
          if (lane == 0) ratio_s[parity] = ratio;
        }
      } else if (threadIdx.x == 0) {
        unsigned long long word = 0;
        spin([&] { return ((word = ld_relaxed(&st->word[it.layer])) >> 32) != 0; }, error);
        ratio_s[parity] = __uint_as_float(static_cast<unsigned>(word));
      }
      if (threadIdx.x == 0) next_s[parity] = next;
      __syncthreads();
      const float ratio = ratio_s[parity];
      t = next_s[parity];
      store_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, threadIdx.x, c.packs, pol, a.hyper, ratio);
      for (int i = threadIdx.x + UN * BS; i < c.packs; i += UN * BS) {
        load_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, i, c.packs, pol);
        store_group<T, BS, UN, H, OP>(x, c.p, c.g, c.m, i, c.packs, pol, a.hyper, ratio);
      }
    }
    parity ^= 1;
  }
  // The last block to leave puts all counters back. Every other one has drawn and read all that it ever will: thread 0
  // had those values in hand before it came here.
  if (a.self_reset) {
    __shared__ bool is_last;
    if (threadIdx.x == 0) is_last = add_relaxed(&st->left) == gridDim.x - 1;
    __syncthreads();
    if (is_last) {
      for (int i = threadIdx.x; i < a.count; i += BS) {
        st->mcount[i] = 0;
        st->word[i] = 0;
      }
      if (threadIdx.x == 0) {
        st->ticket = 0;
        st->left = 0;
      }
    }
  }
}

// ---- the experiment's own needs

__device__ __forceinline__ unsigned hash32(unsigned x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  x ^= x >> 16;
  return x;
}
template <typename T>
__global__ void fill_normal(T* x, long long n, unsigned seed, float scale) {
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const unsigned a = hash32(static_cast<unsigned>(i) * 2u + seed), b = hash32(a ^ 0x9e3779b9U ^ seed);
    const float u = (a + 1.0f) * 2.3283064e-10f, v = b * 2.3283064e-10f;
    x[i] = static_cast<T>(scale * sqrtf(-2 * logf(fminf(u, 1.0f))) * cospif(2 * v));
  }
}
__global__ void spin_us(int us) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
  do {
    __nanosleep(200);
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  } while (now - begin < us * 1000ull);
}
__global__ void flush_k(const uint4* x, long long n, unsigned* sink) {  // reads: leaves L2 full of clean, foreign lines
  unsigned s = 0;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const uint4 v = ld16<kPlain>(x + i, 0);
    s ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (s == 0x12345678u) *sink = s;
}
struct Diff {
  unsigned long long differing, bad;
  unsigned worst;  // bits of the largest error relative to max(|reference|, floor)
};
template <typename T>
__global__ void compare_k(const T* x, const T* ref, long long n, float tolerance, float floor, Diff* d) {
  unsigned long long differing = 0, bad = 0;
  float worst = 0;
  for (long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x; i < n; i += (long long)gridDim.x * blockDim.x) {
    const float a = static_cast<float>(x[i]), b = static_cast<float>(ref[i]);
    if (__float_as_uint(a) != __float_as_uint(b)) {
      ++differing;
      const float e = fabsf(a - b) / fmaxf(fabsf(b), floor);
      if (!(e <= tolerance)) ++bad;
      worst = fmaxf(worst, e == e ? e : __int_as_float(0x7f800000));
    }
  }
  if (differing) {
    atomicAdd(&d->differing, differing);
    if (bad) atomicAdd(&d->bad, bad);
    atomicMax(&d->worst, __float_as_uint(worst));
  }
}
