// Schedules of the fused LARS-SGD step and of the wrapper's LARS part, timed side by side on one GPU.
//   variants [resnet50|vit|7b|all] [A|T|B|W|all] [quick]
// A line: set, variant, then cells "column:median us(ratio to the SGD floor of the same process)", then the best cell
// again with the L2 flushed before each replay. !WRONG / !TIMEOUT / !ERR mark a cell loudly.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "dev.cuh"
#include "sets.h"

#define CK(x)                                                                                         \
  do {                                                                                                \
    cudaError_t e_ = (x);                                                                             \
    if (e_ != cudaSuccess) {                                                                          \
      printf("!ERR %s:%d %s: %s\n", __FILE__, __LINE__, #x, cudaGetErrorString(e_));                  \
      fflush(stdout);                                                                                 \
      exit(3);                                                                                        \
    }                                                                                                 \
  } while (0)

static int kReplays = 17, kWarm = 3;
static double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static double g_start = 0, g_budget = 14;
static const bool g_nopdl = getenv("NOPDL") != nullptr;  // the -pdl lines then run as ordinary launches
static bool out_of_time() { return seconds_now() - g_start > g_budget; }

struct TConfig {
  int bs, un, h, dec, sum = 0;
};

using TKernel = void (*)(TArgs, State*, double2*, int*);

template <typename T, int BS, int UN, int H, int DEC, int OP, int SUM>
bool matches(const TConfig& c, TKernel& k) {
  if (c.bs == BS && c.un == UN && c.h == H && c.dec == DEC && c.sum == SUM) {
    k = ticket_k<T, BS, UN, H, DEC, OP, SUM>;
    return true;
  }
  return false;
}
template <typename T, int OP>
TKernel ticket_kernel(const TConfig& c) {
  TKernel k = nullptr;
  constexpr bool wide = std::is_same_v<T, float> && OP == kFused;
  matches<T, 256, 4, 0, 1, OP, 0>(c, k) || matches<T, 256, 4, 1, 1, OP, 0>(c, k) ||
      matches<T, 256, 4, 2, 1, OP, 0>(c, k) || matches<T, 256, 4, 3, 1, OP, 0>(c, k) ||
      matches<T, 512, 2, 1, 1, OP, 0>(c, k) || matches<T, 256, 4, 1, 0, OP, 0>(c, k);
  if constexpr (OP == kFused) {
    k || matches<T, 256, 4, 1, 1, OP, 1>(c, k) || matches<T, 512, 4, 1, 1, OP, 0>(c, k);
  }
  if constexpr (wide) {
    k || matches<T, 1024, 2, 1, 1, OP, 0>(c, k) || matches<T, 512, 2, 3, 1, OP, 0>(c, k);
  }
  if (!k) {
    printf("!ERR no such kernel: bs %d un %d h %d dec %d sum %d\n", c.bs, c.un, c.h, c.dec, c.sum);
    exit(4);
  }
  return k;
}

template <typename T>
struct Bench {
  std::string set;
  std::vector<int64_t> numel;
  std::vector<int64_t> offset;  // bytes in an arena
  int64_t arena = 0;
  char *p, *g, *m, *mp, *mg, *mm, *rp, *rg, *rm;  // work, master, reference
  int64_t flush_bytes = 192 << 20;
  uint4* flush;
  unsigned* sink;
  Diff* diff;
  State* state;
  int* error;
  double2* partials;  // own kernels
  double *pp, *pg;    // the project's
  float* ratios;
  size_t partials_bytes = 0;
  cudaStream_t s;
  int sms = 0;
  double floor_us = 0, floor_cold = 0;
  std::vector<cudaEvent_t> ev;
  int ref_kind = -1;

  static constexpr double wd = 1e-4, trust = 1., eps = 1e-8, lr = 0.01, mom = 0.9;

  Hyper hyper(double decay = wd) const {
    Hyper h;
    h.wd = decay; h.trust = trust; h.eps = eps;
    h.fwd = static_cast<float>(decay); h.flr = static_cast<float>(lr); h.fmom = static_cast<float>(mom); h.fund = 1.0f;
    return h;
  }

  Bench(const char* name, std::vector<int64_t> n) : set(name), numel(std::move(n)) {
    CK(cudaStreamCreateWithFlags(&s, cudaStreamNonBlocking));
    cudaDeviceProp prop;
    CK(cudaGetDeviceProperties(&prop, 0));
    sms = prop.multiProcessorCount;
    int64_t items = 0;
    for (int64_t x : numel) {
      if (x % 8 || x >= (1ll << 31)) { printf("!ERR size\n"); exit(4); }
      offset.push_back(arena);
      arena += (x * (int64_t)sizeof(T) + 511) / 512 * 512;
      items += x / 4096 + 2;
    }
    char** all[] = {&p, &g, &m, &mp, &mg, &mm, &rp, &rg, &rm};
    for (char** a : all) { CK(cudaMalloc(a, arena)); CK(cudaMemsetAsync(*a, 0, arena, s)); }
    CK(cudaMalloc(&flush, flush_bytes));
    CK(cudaMemsetAsync(flush, 1, flush_bytes, s));
    CK(cudaMalloc(&sink, 4)); CK(cudaMalloc(&diff, sizeof(Diff))); CK(cudaMalloc(&state, sizeof(State)));
    CK(cudaMalloc(&error, 4)); CK(cudaMemsetAsync(error, 0, 4, s)); CK(cudaMemsetAsync(state, 0, sizeof(State), s));
    partials_bytes = items * sizeof(double2);
    CK(cudaMalloc(&partials, partials_bytes));
    CK(cudaMalloc(&pp, partials_bytes)); CK(cudaMalloc(&pg, partials_bytes));
    CK(cudaMalloc(&ratios, numel.size() * 4));
    fill_normal<T><<<1024, 256, 0, s>>>((T*)mp, arena / sizeof(T), 11u, 0.05f);
    fill_normal<T><<<1024, 256, 0, s>>>((T*)mg, arena / sizeof(T), 22u, 0.02f);
    fill_normal<T><<<1024, 256, 0, s>>>((T*)mm, arena / sizeof(T), 33u, 0.01f);
    CK(cudaGetLastError());
    for (int i = 0; i < 64; ++i) { cudaEvent_t e; CK(cudaEventCreate(&e)); ev.push_back(e); }
    CK(cudaStreamSynchronize(s));
  }

  void restore_all() {
    CK(cudaMemcpyAsync(p, mp, arena, cudaMemcpyDeviceToDevice, s));
    CK(cudaMemcpyAsync(g, mg, arena, cudaMemcpyDeviceToDevice, s));
    CK(cudaMemcpyAsync(m, mm, arena, cudaMemcpyDeviceToDevice, s));
  }

  // ---- timing

  using Body = std::function<void(cudaStream_t)>;

  cudaGraphExec_t capture(const Body& body) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    body(s);
    CK(cudaStreamEndCapture(s, &graph));
    CK(cudaGraphInstantiate(&exec, graph, 0));
    CK(cudaGraphDestroy(graph));
    CK(cudaGraphUpload(exec, s));
    return exec;
  }
  double replay(cudaGraphExec_t exec, bool cold, int replays) {
    std::vector<float> times;
    for (int i = 0; i < kWarm + replays; ++i) {
      CK(cudaMemcpyAsync(g, mg, arena, cudaMemcpyDeviceToDevice, s));
      if (cold) flush_k<<<1024, 256, 0, s>>>(flush, flush_bytes / 16, sink);
      spin_us<<<1, 1, 0, s>>>(40);
      CK(cudaEventRecord(ev[2 * i], s));
      CK(cudaGraphLaunch(exec, s));
      CK(cudaEventRecord(ev[2 * i + 1], s));
    }
    CK(cudaGetLastError());
    CK(cudaStreamSynchronize(s));
    for (int i = kWarm; i < kWarm + replays; ++i) {
      float ms;
      CK(cudaEventElapsedTime(&ms, ev[2 * i], ev[2 * i + 1]));
      times.push_back(ms * 1e3f);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }
  int take_error() {
    int e = 0;
    CK(cudaMemcpyAsync(&e, error, 4, cudaMemcpyDeviceToHost, s));
    CK(cudaMemsetAsync(error, 0, 4, s));
    CK(cudaStreamSynchronize(s));
    return e;
  }
  // One run from the masters, against the reference of this kind (0 fused, 1 wrapper + SGD, 2 plain SGD).
  std::string verify(cudaGraphExec_t exec, int kind) {
    restore_all();
    CK(cudaMemsetAsync(partials, 0xff, partials_bytes, s));  // NaN: what is read and was not written shows
    CK(cudaMemsetAsync(pp, 0xff, partials_bytes, s));
    CK(cudaMemsetAsync(pg, 0xff, partials_bytes, s));
    CK(cudaMemsetAsync(diff, 0, sizeof(Diff), s));
    CK(cudaGraphLaunch(exec, s));
    if (kind == 2) { CK(cudaStreamSynchronize(s)); return ""; }
    if (ref_kind != kind) { printf("!ERR no reference\n"); exit(4); }
    const float tolerance = std::is_same_v<T, float> ? 2e-6f : 1e-2f;  // what a ratio off by one bit can do; a wrong one does 1e-1
    compare_k<T><<<1024, 256, 0, s>>>((T*)p, (T*)rp, arena / sizeof(T), tolerance, 5e-2f, diff);
    compare_k<T><<<1024, 256, 0, s>>>((T*)m, (T*)rm, arena / sizeof(T), tolerance, 5e-2f, diff);
    compare_k<T><<<1024, 256, 0, s>>>((T*)g, (T*)rg, arena / sizeof(T), tolerance, 1e-3f, diff);
    CK(cudaGetLastError());
    Diff d;
    CK(cudaMemcpyAsync(&d, diff, sizeof d, cudaMemcpyDeviceToHost, s));
    CK(cudaStreamSynchronize(s));
    std::string r;
    char text[80];
    float worst;
    memcpy(&worst, &d.worst, 4);
    if (d.bad) {
      snprintf(text, sizeof text, "!WRONG[%llu bad of %llu, worst %.1e]", d.bad, d.differing, worst);
      r += text;
    } else if (d.differing) {
      snprintf(text, sizeof text, "~[%llu bits,%.0e]", d.differing, worst);
      r += text;
    }
    return r;
  }
  void make_reference(int kind, const Body& body) {
    restore_all();
    CK(cudaMemsetAsync(pp, 0xff, partials_bytes, s));
    CK(cudaMemsetAsync(pg, 0xff, partials_bytes, s));
    body(s);
    CK(cudaMemcpyAsync(rp, p, arena, cudaMemcpyDeviceToDevice, s));
    CK(cudaMemcpyAsync(rg, g, arena, cudaMemcpyDeviceToDevice, s));
    CK(cudaMemcpyAsync(rm, m, arena, cudaMemcpyDeviceToDevice, s));
    CK(cudaStreamSynchronize(s));
    ref_kind = kind;
    // By hand: the first element of the largest layer.
    const size_t l = std::max_element(numel.begin(), numel.end()) - numel.begin();
    auto fetch = [&](const char* from, int64_t count) {
      std::vector<T> x(count);
      CK(cudaMemcpy(x.data(), from + offset[l], count * sizeof(T), cudaMemcpyDeviceToHost));
      return x;
    };
    const int64_t n = std::min<int64_t>(numel[l], 4000000);  // of 7b's largest only part: then no check of the ratio
    const auto hp = fetch(mp, n), hg = fetch(mg, n);
    const auto hm = fetch(mm, 1), op = fetch(rp, 1), om = fetch(rm, 1);
    double sp = 0, sg = 0;
    for (int64_t i = 0; i < n; ++i) { sp += (double)(float)hp[i] * (float)hp[i]; sg += (double)(float)hg[i] * (float)hg[i]; }
    const double scale = (double)numel[l] / n;
    sp *= scale; sg *= scale;
    const double ratio = trust * std::sqrt(sp) / (std::sqrt(sg) + wd * std::sqrt(sp) + eps);
    const double wm = mom * (float)hm[0] + ratio * ((float)hg[0] + wd * (float)hp[0]);
    const double wp = (float)hp[0] - lr * wm;
    const double tol = std::is_same_v<T, float> ? 1e-5 : 1e-2;
    const bool ok = std::fabs((float)om[0] - wm) <= tol * std::max(std::fabs(wm), 2e-2) &&
                    std::fabs((float)op[0] - wp) <= tol * std::max(std::fabs(wp), 2e-2);
    if (!ok) printf("!WRONG reference: m %.8g want %.8g, p %.8g want %.8g\n", (float)om[0], wm, (float)op[0], wp);
  }

  // ---- arguments

  LayerRef ref(size_t i, int chunk, int64_t cap) const {
    return {p + offset[i], g + offset[i], m + offset[i], (int)numel[i], item_size(numel[i], chunk, cap)};
  }
  template <int CAP>
  Args<CAP> args_of(int begin, int end, int chunk, int64_t cap, double decay = wd) const {
    Args<CAP> a{};
    if (end - begin > CAP) { printf("!ERR capacity\n"); exit(4); }
    a.count = end - begin;
    a.hyper = hyper(decay);
    int items = 0;
    for (int i = begin; i < end; ++i) {
      a.first[i - begin] = items;
      a.layer[i - begin] = ref(i, chunk, cap);
      items += items_of(numel[i], a.layer[i - begin].size);
    }
    a.first[a.count] = items;
    return a;
  }
  int items_between(int begin, int end, int chunk, int64_t cap) const {
    int items = 0;
    for (int i = begin; i < end; ++i) items += items_of(numel[i], item_size(numel[i], chunk, cap));
    return items;
  }

  template <typename... P, typename... A>
  static void launch(cudaStream_t s, bool pdl, void (*k)(P...), int blocks, int threads, A... a) {
    cudaLaunchConfig_t c{};
    c.gridDim = dim3(blocks);
    c.blockDim = dim3(threads);
    c.stream = s;
    cudaLaunchAttribute attr{};
    attr.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr.val.programmaticStreamSerializationAllowed = 1;
    c.attrs = &attr;
    c.numAttrs = pdl && !g_nopdl ? 1 : 0;
    CK(cudaLaunchKernelEx(&c, k, P(a)...));
  }

  // ---- bodies

  struct ProjectLaunch {
    cudaStream_t s;
    template <typename... P, typename... A>
    void operator()(void (*k)(P...), int blocks, A... a) const {
      k<<<blocks, tl::cuda::kThreads, 0, s>>>(a...);
      CK(cudaGetLastError());
    }
  };
  std::vector<tl::cuda::MeasuredLayer> measured() const {
    std::vector<tl::cuda::MeasuredLayer> v;
    for (size_t i = 0; i < numel.size(); ++i) v.push_back({numel[i], p + offset[i], g + offset[i], 0.});
    return v;
  }
  std::vector<tl::cuda::SgdLayer> sgd_layers(double decay) const {
    std::vector<tl::cuda::SgdLayer> v;
    for (size_t i = 0; i < numel.size(); ++i)
      v.push_back({numel[i], p + offset[i], g + offset[i], m + offset[i], decay, trust, eps, lr, mom, 0.});
    return v;
  }
  void project_fused(cudaStream_t st) {
    const ProjectLaunch l{st};
    tl::cuda::launch_measure<T>(l, measured(), pp, pg, nullptr);
    tl::cuda::SgdOptions o{};
    tl::cuda::launch_decide_and_update<T, T>(l, sgd_layers(wd), pp, pg, ratios, o);
  }
  void project_wrapper(cudaStream_t st) {
    const ProjectLaunch l{st};
    tl::cuda::launch_measure<T>(l, measured(), pp, pg, nullptr);
    std::vector<tl::cuda::Layer> v;
    for (size_t i = 0; i < numel.size(); ++i) v.push_back({numel[i], p + offset[i], g + offset[i], wd, trust, eps, lr});
    tl::cuda::LarsOptions o{};
    tl::cuda::launch_decide_and_apply<T>(l, v, pp, pg, ratios, o);
  }
  void project_sgd(cudaStream_t st) {  // without decay, as behind a wrapper
    const ProjectLaunch l{st};
    tl::cuda::SgdOptions o{};
    tl::cuda::launch_update<T, T>(l, sgd_layers(0.), nullptr, o);
  }
  void own_sgd(cudaStream_t st) {
    const auto a = args_of<kCapLayers>(0, (int)numel.size(), std::is_same_v<T, float> ? 4096 : 8192, 1ll << 40, 0.);
    launch(st, false, sgd_k<T, 256, 4, 0>, a.first[a.count], 256, a, 0);
  }
  // torch's cut: at most 48 tensors and 320 blocks of 65,536 elements a launch, 512 threads.
  void torch_like_sgd(cudaStream_t st) {
    const auto a = args_of<kCapLayers>(0, (int)numel.size(), 65536, 1ll << 40, 0.);
    int begin = 0, tensors = 0, block = 0;
    for (int i = 0; i < a.count; ++i) {
      ++tensors;
      const int end = a.first[i + 1];
      while (block < end) {
        const int stop = std::min(end, begin + 320);
        block = stop;
        if (block - begin == 320 || (tensors == 48 && block == end) || block == a.first[a.count]) {
          launch(st, false, sgd_k<T, 512, 1, 0>, block - begin, 512, a, begin);
          begin = block;
          tensors = block == end ? 0 : 1;
        }
      }
    }
  }

  // Own measure and update in runs; limit huge: variant A. CAP from what the run holds, or CAP0 if given.
  template <int H, int OP, int SUM, int CAP>
  void run_launches(cudaStream_t st, bool pdl, RunRange r, int chunk, int64_t cap, double2* part, bool first) {
    const auto a = args_of<CAP>(r.begin, r.end, chunk, cap);
    launch(st, pdl && !first, measure_k<T, 256, 4, H, SUM, CAP>, a.first[a.count], 256, a, part, kKeepAll);
    launch(st, pdl, update_k<T, 256, 4, H, OP, CAP>, a.first[a.count], 256, a, (const double2*)part);
  }
  template <int H, int OP, int SUM = 0>
  void runs(cudaStream_t st, bool pdl, double limit, int chunk, int cap0 = 0) {
    int64_t items = 0;
    bool first = true;
    for (const RunRange& r : make_runs(numel, sizeof(T), (int64_t)(limit * 1e6))) {
      if constexpr (H == 0 && OP == kFused && SUM == 0) {
        if (cap0 == 800) {
          run_launches<H, OP, SUM, 800>(st, pdl, r, chunk, 1024, partials + items, first);
          first = false;
          items += items_between(r.begin, r.end, chunk, 1024);
          continue;
        }
      }
      if (r.end - r.begin <= 48) run_launches<H, OP, SUM, 48>(st, pdl, r, chunk, 1024, partials + items, first);
      else run_launches<H, OP, SUM, kCapLayers>(st, pdl, r, chunk, 1024, partials + items, first);
      first = false;
      items += items_between(r.begin, r.end, chunk, 1024);
    }
  }
  template <int H, int OP>
  void pipe(cudaStream_t st, bool pdl, double limit, int chunk) {
    const auto rs = make_runs(numel, sizeof(T), (int64_t)(limit * 1e6));
    int64_t items = 0, before = 0;
    for (size_t k = 0; k <= rs.size(); ++k) {
      const RunRange rm_ = k < rs.size() ? rs[k] : RunRange{0, 0}, ru = k ? rs[k - 1] : RunRange{0, 0};
      const int nm = items_between(rm_.begin, rm_.end, chunk, 1024), nu = items_between(ru.begin, ru.end, chunk, 1024);
      auto go = [&](auto cap) {
        constexpr int CAP = decltype(cap)::value;
        launch(st, pdl && k > 0, pipe_k<T, 256, 4, H, OP, CAP>, nm + nu, 256,
               args_of<CAP>(rm_.begin, rm_.end, chunk, 1024), args_of<CAP>(ru.begin, ru.end, chunk, 1024),
               partials + items, (const double2*)(partials + before));
      };
      if (std::max(rm_.end - rm_.begin, ru.end - ru.begin) <= 48) go(std::integral_constant<int, 48>());
      else go(std::integral_constant<int, kCapLayers>());
      before = items;
      items += nm;
    }
  }

  struct TParams {
    TConfig c;
    int bps;  // blocks a multiprocessor; 0: not persistent
    int chunk;
    bool memset = false;
    bool reversed = false;
    double keep_mb = 0;  // of p+g; 0: all
  };
  // Fills in why and returns false where it cannot run.
  template <int OP>
  bool ticket_body(const TParams& q, double limit, double lag, Body& body, std::string& why) {
    auto a = std::make_shared<TArgs>();
    memset_zero(*a);
    std::vector<int64_t> n = numel;
    a->count = (int)numel.size();
    const int64_t cap = q.c.dec == 0 ? 1024 : 1ll << 40;
    if (q.reversed) n = std::vector<int64_t>(n.rbegin(), n.rend());
    for (int i = 0; i < a->count; ++i) a->layer[i] = ref(q.reversed ? a->count - 1 - i : i, q.chunk, cap);
    a->hyper = hyper();
    a->persistent = q.bps > 0;
    a->self_reset = !q.memset;
    a->keep = q.keep_mb > 0 ? (int)(q.keep_mb * 1e6 / (2 * sizeof(T))) : kKeepAll;
    if (!make_schedule(*a, n, sizeof(T), (int64_t)(limit * 1e6), (int64_t)(lag * 1e6), (int64_t)24e6, why)) return false;
    if ((size_t)a->first[a->count] * sizeof(double2) > partials_bytes) { why = "partials"; return false; }
    const TKernel k = ticket_kernel<T, OP>(q.c);
    int blocks = a->tickets;
    if (q.bps > 0) {
      int most = 0;
      CK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, k, q.c.bs, 0));
      if (most < q.bps) { why = "only " + std::to_string(most) + " blocks fit"; return false; }
      blocks = sms * q.bps;
    }
    const bool zero = q.memset;
    const int bs = q.c.bs;
    body = [=, this](cudaStream_t st) {
      if (zero) CK(cudaMemsetAsync(state, 0, sizeof(State), st));
      launch(st, false, k, blocks, bs, *a, state, partials, error);
    };
    return true;
  }
  static void memset_zero(TArgs& a) { std::memset(static_cast<void*>(&a), 0, sizeof a); }

  // ---- table

  struct Best {
    double us = 1e30;
    std::string column;
    cudaGraphExec_t exec = nullptr;
  };
  void begin_line(const std::string& name) {
    printf("%s %-28s", set.c_str(), name.c_str());
    fflush(stdout);
  }
  void cell(const std::string& column, const Body& body, int kind, Best& best) {
    if (out_of_time()) { printf(" %s:skip", column.c_str()); fflush(stdout); return; }
    CK(cudaMemsetAsync(state, 0, sizeof(State), s));
    cudaGraphExec_t exec = capture(body);
    const std::string mark = verify(exec, kind);
    int e = take_error();
    double us = 0;
    if (!e) us = replay(exec, false, kReplays);
    e |= take_error();
    printf(" %s:%.1f(%.3f)%s%s", column.c_str(), us, floor_us > 0 ? us / floor_us : 0., mark.c_str(), e ? "!TIMEOUT" : "");
    fflush(stdout);
    if (e) CK(cudaMemsetAsync(state, 0, sizeof(State), s));
    if (!e && us < best.us && mark.find("WRONG") == std::string::npos) {
      if (best.exec) CK(cudaGraphExecDestroy(best.exec));
      best = {us, column, exec};
    } else {
      CK(cudaGraphExecDestroy(exec));
    }
  }
  void end_line(Best& best) {
    if (best.exec) {
      const double cold = replay(best.exec, true, kReplays);
      printf(" | %s cold %.1f(%.3f)\n", best.column.c_str(), cold, floor_cold > 0 ? cold / floor_cold : 0.);
      CK(cudaGraphExecDestroy(best.exec));
      best.exec = nullptr;
    } else {
      printf("\n");
    }
    fflush(stdout);
    CK(cudaCtxResetPersistingL2Cache());
  }
  void one(const std::string& name, int kind, const std::vector<std::pair<std::string, Body>>& cells) {
    if (out_of_time()) return;
    begin_line(name);
    Best best;
    for (const auto& c : cells) cell(c.first, c.second, kind, best);
    end_line(best);
  }
  template <int OP>
  void tickets(const std::string& name, const TParams& q, const std::vector<std::pair<double, double>>& columns) {
    if (out_of_time()) return;
    begin_line(name);
    Best best;
    for (const auto& c : columns) {
      char label[64];
      snprintf(label, sizeof label, "%g/%g", c.first, c.second);
      Body body;
      std::string why;
      if (!ticket_body<OP>(q, c.first, c.second, body, why)) { printf(" %s:-(%s)", label, why.c_str()); continue; }
      Body whole = body;
      if (OP == kWrapper) whole = [this, body](cudaStream_t st) { body(st); own_sgd(st); };
      cell(label, whole, OP == kWrapper ? 1 : 0, best);
    }
    end_line(best);
  }

  void floors(const char* family) {
    double copy_rate = 0;
    {
      char *a, *b;
      const size_t gb = 1000000000;
      CK(cudaMalloc(&a, gb)); CK(cudaMalloc(&b, gb)); CK(cudaMemsetAsync(a, 1, gb, s));
      std::vector<float> t;
      for (int i = 0; i < 6; ++i) {
        float ms;
        CK(cudaEventRecord(ev[0], s)); CK(cudaMemcpyAsync(b, a, gb, cudaMemcpyDeviceToDevice, s)); CK(cudaEventRecord(ev[1], s));
        CK(cudaStreamSynchronize(s)); CK(cudaEventElapsedTime(&ms, ev[0], ev[1])); t.push_back(ms);
      }
      copy_rate = 2 * gb / (*std::min_element(t.begin(), t.end()) * 1e9);  // TB/s, from bytes and ms
      CK(cudaFree(a)); CK(cudaFree(b));
    }
    double bytes = 0;
    for (int64_t n : numel) bytes += 5. * n * sizeof(T);
    std::vector<std::pair<const char*, Body>> sgds = {
        {"own", [this](cudaStream_t st) { own_sgd(st); }},
        {"project", [this](cudaStream_t st) { project_sgd(st); }},
        {"torch-like", [this](cudaStream_t st) { torch_like_sgd(st); }}};
    double warm[3], cold[3];
    for (int i = 0; i < 3; ++i) {
      cudaGraphExec_t e = capture(sgds[i].second);
      restore_all();
      warm[i] = replay(e, false, kReplays);
      cold[i] = replay(e, true, kReplays);
      CK(cudaGraphExecDestroy(e));
    }
    floor_us = std::min(warm[0], warm[1]);
    floor_cold = std::min(cold[0], cold[1]);
    printf("## %s %s: copy %.2f TB/s, 5 accesses at it %.1f us; SGD us own %.1f project %.1f torch-like %.1f, cold %.1f %.1f %.1f; floor %.1f (%.2f TB/s)\n",
           set.c_str(), family, copy_rate, bytes / copy_rate / 1e6, warm[0], warm[1], warm[2], cold[0], cold[1], cold[2],
           floor_us, bytes / floor_us / 1e6);
    fflush(stdout);
  }
  void closing() {
    cudaGraphExec_t e = capture([this](cudaStream_t st) { own_sgd(st); });
    printf("## own SGD again %.1f us; %.1f s\n", replay(e, false, kReplays), seconds_now() - g_start);
    fflush(stdout);
    CK(cudaGraphExecDestroy(e));
  }
  void fused_reference() { make_reference(0, [this](cudaStream_t st) { project_fused(st); }); }
  void wrapper_reference() { make_reference(1, [this](cudaStream_t st) { project_wrapper(st); project_sgd(st); }); }

  // ---- families

  static constexpr bool kBf16 = !std::is_same_v<T, float>;
  static constexpr int kSmall = kBf16 ? 8192 : 4096;  // a chunk of 4 packs for each of 256 threads

  template <int SUM>
  void own_measure(cudaStream_t st, int chunk) {
    const auto a = args_of<kCapLayers>(0, (int)numel.size(), chunk, 1024);
    launch(st, false, measure_k<T, 256, 4, 1, SUM, kCapLayers>, a.first[a.count], 256, a, partials, kKeepAll);
  }
  void family_A() {
    floors("A");
    fused_reference();
    one("measure alone", 2, {{"project", [this](cudaStream_t st) { tl::cuda::launch_measure<T>(ProjectLaunch{st}, measured(), pp, pg, nullptr); }},
                             {"own16384", [this](cudaStream_t st) { own_measure<0>(st, 16384); }},
                             {"own-small", [this](cudaStream_t st) { own_measure<0>(st, kSmall); }},
                             {"small,float-sums", [this](cudaStream_t st) { own_measure<1>(st, kSmall); }}});
    one("A project", 0, {{"32K", [this](cudaStream_t st) { project_fused(st); }}});
    one("A own c16384", 0, {{"7K", [this](cudaStream_t st) { runs<0, kFused>(st, false, 1e6, 16384); }},
                            {"32K", [this](cudaStream_t st) { runs<0, kFused>(st, false, 1e6, 16384, 800); }},
                            {"7K,pdl", [this](cudaStream_t st) { runs<0, kFused>(st, true, 1e6, 16384); }}});
    one("A own small chunk", 0, {{"H0", [this](cudaStream_t st) { runs<0, kFused>(st, false, 1e6, kSmall); }},
                                 {"H1", [this](cudaStream_t st) { runs<1, kFused>(st, false, 1e6, kSmall); }},
                                 {"H1,pdl", [this](cudaStream_t st) { runs<1, kFused>(st, true, 1e6, kSmall); }},
                                 {"H3", [this](cudaStream_t st) { runs<3, kFused>(st, false, 1e6, kSmall); }}});
    one("A own small, float sums", 0, {{"H1", [this](cudaStream_t st) { runs<1, kFused, 1>(st, false, 1e6, kSmall); }}});
    closing();
  }

  template <int H>
  void run_line(bool pdl, int chunk, const std::vector<double>& limits) {
    std::vector<std::pair<std::string, Body>> cells;
    for (double limit : limits) {
      char label[32];
      snprintf(label, sizeof label, "%g", limit);
      cells.push_back({label, [=, this](cudaStream_t st) { runs<H, kFused>(st, pdl, limit, chunk); }});
    }
    one("B" + std::string(pdl ? "-pdl" : "") + " c" + std::to_string(chunk) + " H" + std::to_string(H), 0, cells);
  }
  template <int H>
  void pipe_line(bool pdl, int chunk, const std::vector<double>& limits) {
    std::vector<std::pair<std::string, Body>> cells;
    for (double limit : limits) {
      char label[32];
      snprintf(label, sizeof label, "%g", limit);
      cells.push_back({label, [=, this](cudaStream_t st) { pipe<H, kFused>(st, pdl, limit, chunk); }});
    }
    one("B-pipe" + std::string(pdl ? "-pdl" : "") + " c" + std::to_string(chunk) + " H" + std::to_string(H), 0, cells);
  }
  void family_B() {
    floors("B");
    fused_reference();
    const std::vector<double> limits = kBf16 ? std::vector<double>{24, 80, 1e5} : std::vector<double>{4, 8, 12, 16, 24, 32};
    run_line<1>(true, kSmall, limits);
    pipe_line<1>(true, kSmall, limits);
    run_line<1>(false, kSmall, limits);
    run_line<0>(true, kSmall, limits);
    run_line<3>(true, kSmall, limits);
    if (set == "vit") return closing();
    run_line<1>(true, 2 * kSmall, limits);
    run_line<1>(true, 16384 * (kBf16 ? 2 : 1), limits);
    pipe_line<1>(false, kSmall, limits);
    pipe_line<0>(true, kSmall, limits);
    run_line<0>(false, 16384, limits);
    closing();
  }

  void family_T() {
    floors("T");
    fused_reference();
    using C = std::vector<std::pair<double, double>>;
    const C all = kBf16 ? C{{24, .5}, {24, 2}, {24, 8}, {24, 24}, {1e5, 0}} : C{{2, 4}, {2, 10}, {4, 2}, {8, 4}, {8, 12}, {16, 8}, {24, 24}, {1e5, 0}};
    const C some = kBf16 ? C{{24, 2}, {24, 8}} : C{{2, 6}, {4, 4}, {8, 8}, {16, 4}};
    const int c = kSmall;
    tickets<kFused>("T 256x4 b3 D1 H1", {{256, 4, 1, 1}, 3, c}, all);
    tickets<kFused>("T 256x4 b2 D1 H1", {{256, 4, 1, 1}, 2, c}, all);
    tickets<kFused>("T 512x2 b2 D1 H1", {{512, 2, 1, 1}, 2, c}, some);
    tickets<kFused>("T 256x4 b3 D1 H0", {{256, 4, 0, 1}, 3, c}, some);
    tickets<kFused>("T 256x4 b3 D1 H2", {{256, 4, 2, 1}, 3, c}, some);
    if (kBf16) {
      tickets<kFused>("T 256x4 b3 D1 H3 keep16", {{256, 4, 3, 1}, 3, c, false, false, 16}, some);
      tickets<kFused>("T 256x4 b3 D1 H3 keep24", {{256, 4, 3, 1}, 3, c, false, false, 24}, some);
      tickets<kFused>("T 256x4 b3 D1 H3 keep32", {{256, 4, 3, 1}, 3, c, false, false, 32}, some);
    }
    tickets<kFused>("T 256x4 b3 D1 H3", {{256, 4, 3, 1}, 3, c}, some);
    tickets<kFused>("T 256x4 b3 D1 H1 float sums", {{256, 4, 1, 1, 1}, 3, c}, some);
    tickets<kFused>("T 256x4 b3 D1 H1 memset", {{256, 4, 1, 1}, 3, c, true}, some);
    tickets<kFused>("T 256x4 np D1 H1", {{256, 4, 1, 1}, 0, c}, some);
    if (set == "vit") return closing();
    tickets<kFused>("T 256x4 b3 D0 H1", {{256, 4, 1, 0}, 3, c}, some);
    tickets<kFused>("T 512x2 b1 D1 H1", {{512, 2, 1, 1}, 1, c}, some);
    tickets<kFused>("T 512x4 b1 D1 H1 c2", {{512, 4, 1, 1}, 1, 2 * c}, some);
    tickets<kFused>("T 256x4 b1 D1 H1", {{256, 4, 1, 1}, 1, c}, some);
    tickets<kFused>("T 256x4 b3 D1 H1 c2", {{256, 4, 1, 1}, 3, 2 * c}, some);
    tickets<kFused>("T 256x4 b3 D1 H1 rev", {{256, 4, 1, 1}, 3, c, false, true}, some);
    if constexpr (!kBf16) {
      tickets<kFused>("T 1024x2 b1 D1 H1 c8192", {{1024, 2, 1, 1}, 1, 8192}, some);
      tickets<kFused>("T 512x2 b2 D1 H3", {{512, 2, 3, 1}, 2, c}, some);
      tickets<kFused>("T 256x4 b3 D0 H1 c16384", {{256, 4, 1, 0}, 3, 16384}, some);
      tickets<kFused>("T 256x4 np D0 H1 c16384", {{256, 4, 1, 0}, 0, 16384}, some);
    }
    closing();
  }

  void family_W() {
    floors("W");
    wrapper_reference();
    using C = std::vector<std::pair<double, double>>;
    const C some = kBf16 ? C{{24, 2}, {24, 8}} : C{{2, 6}, {4, 4}, {8, 4}, {8, 12}, {16, 8}};
    const int c = kSmall;
    one("W A project", 1, {{"32K", [this](cudaStream_t st) { project_wrapper(st); project_sgd(st); }},
                           {"own sgd", [this](cudaStream_t st) { project_wrapper(st); own_sgd(st); }}});
    tickets<kWrapper>("W T 256x4 b3 D1 H1", {{256, 4, 1, 1}, 3, c}, some);
    tickets<kWrapper>("W T 256x4 b3 D1 H0", {{256, 4, 0, 1}, 3, c}, some);
    tickets<kWrapper>("W T 256x4 b3 D1 H0 rev", {{256, 4, 0, 1}, 3, c, false, true}, some);
    if (set == "vit") return closing();
    tickets<kWrapper>("W T 256x4 b2 D1 H1", {{256, 4, 1, 1}, 2, c}, some);
    tickets<kWrapper>("W T 512x2 b2 D1 H1", {{512, 2, 1, 1}, 2, c}, some);
    tickets<kWrapper>("W T 256x4 np D1 H1", {{256, 4, 1, 1}, 0, c}, some);
    tickets<kWrapper>("W T 256x4 b3 D0 H1", {{256, 4, 1, 0}, 3, c}, some);
    tickets<kWrapper>("W T 256x4 b3 D1 H2", {{256, 4, 2, 1}, 3, c}, some);
    tickets<kWrapper>("W T 256x4 b3 D1 H3", {{256, 4, 3, 1}, 3, c}, some);
    auto line = [&](const char* name, bool pdl, bool piped, auto h) {
      constexpr int H = decltype(h)::value;
      std::vector<std::pair<std::string, Body>> cells;
      for (double limit : kBf16 ? std::vector<double>{24} : std::vector<double>{8, 16, 24, 32})
        cells.push_back({std::to_string((int)limit), [=, this](cudaStream_t st) {
                           if (piped) pipe<H, kWrapper>(st, pdl, limit, kSmall);
                           else runs<H, kWrapper>(st, pdl, limit, kSmall);
                           own_sgd(st);
                         }});
      one(name, 1, cells);
    };
    line("W B-pdl H1", true, false, std::integral_constant<int, 1>());
    line("W B H1", false, false, std::integral_constant<int, 1>());
    line("W B-pipe-pdl H1", true, true, std::integral_constant<int, 1>());
    closing();
  }

  void all(const std::string& family) {
    const bool every = family == "all";
    if (every || family == "T") family_T();
    if (every || family == "B") family_B();
    if (every || family == "A") family_A();
    if (every || family == "W") family_W();
  }
};

int main(int argc, char** argv) {
  const std::string set = argc > 1 ? argv[1] : "all", family = argc > 2 ? argv[2] : "all";
  if (argc > 3) g_budget = atof(argv[3]);
  if (const char* r = getenv("REPLAYS")) kReplays = std::min(25, std::max(3, atoi(r)));
  g_start = seconds_now();
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);  // nothing is loaded inside a capture or a timed region
  setvbuf(stdout, nullptr, _IOLBF, 1 << 16);
  int devices = 0;
  const cudaError_t e = cudaGetDeviceCount(&devices);
  if (e != cudaSuccess || devices == 0) { printf("no GPU: %s\n", cudaGetErrorString(e)); return 2; }
  CK(cudaSetDevice(0));
  CK(cudaFree(nullptr));
  cudaDeviceProp prop;
  CK(cudaGetDeviceProperties(&prop, 0));
  int driver = 0;
  CK(cudaDriverGetVersion(&driver));
  if (g_nopdl) printf("# NOPDL: the -pdl lines are ordinary launches\n");
  printf("# %s, %d SMs, L2 %.0f MB, driver %d; context after %.1f s\n", prop.name, prop.multiProcessorCount, prop.l2CacheSize / 1048576., driver, seconds_now() - g_start);
  if (set == "resnet50" || set == "all") Bench<float>("rn50", resnet50()).all(family);
  if (set == "vit" || set == "all") Bench<float>("vit", vit()).all(family);
  if (set == "7b" || set == "all") Bench<c10::BFloat16>("7b", llama3()).all(family);
  printf("# done after %.1f s\n", seconds_now() - g_start);
  return 0;
}
