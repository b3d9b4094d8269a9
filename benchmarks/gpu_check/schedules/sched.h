// Scheduling arithmetic shared by host and device: chunks of layers ("items"), and the order in which tickets take them.
#pragma once
#include <cstdint>
#ifdef __CUDACC__
#define HD __host__ __device__ inline
#else
#define HD inline
#endif

constexpr int kCapLayers = 192;
constexpr int kCapSegs = 512;

struct LayerRef {
  void* p;
  void* g;
  void* m;
  int n;     // elements (int: a benchmark; the library needs int64)
  int size;  // elements an item, a multiple of a pack
};

struct Hyper {
  double wd, trust, eps;
  float fwd, flr, fmom, fund;
};

template <int CAP>
struct Args {
  int count;
  int first[CAP + 1];  // item of each layer's beginning; last: their number
  Hyper hyper;
  LayerRef layer[CAP];
};

enum { kM = 0, kU = 1, kUBack = 2 };
struct Seg {
  int start;  // ticket
  int item;   // of that ticket
  int kind;
};

struct TArgs {
  int count;
  int segs;
  int tickets;
  int persistent;
  int self_reset;
  int keep;  // elements at a layer's end that its measure asks L2 to keep (H3)
  Hyper hyper;
  int first[kCapLayers + 1];
  LayerRef layer[kCapLayers];
  Seg seg[kCapSegs];
};

struct Item {
  int kind, item, layer;
};

// The last i in [0, count) with get(i) <= value.
template <typename Get>
HD int find_last(const Get& get, int count, int value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (get(middle) <= value) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Cursor {
  int seg = -1, m = 0, u = 0;
};

// Ticket to item. The first call searches, later ones step on from where the last left off: tickets of a block grow.
HD Item decode(const TArgs& a, int t, Cursor& c) {
  const bool fresh = c.seg < 0;
  if (fresh) {
    c.seg = find_last([&](int i) { return a.seg[i].start; }, a.segs, t);
  } else {
    while (c.seg + 1 < a.segs && a.seg[c.seg + 1].start <= t) ++c.seg;
  }
  const int kind = a.seg[c.seg].kind;
  const int ahead = t - a.seg[c.seg].start;
  const int item = a.seg[c.seg].item + (kind == kUBack ? -ahead : ahead);
  int layer = kind == kM ? c.m : c.u;
  if (fresh) {
    layer = find_last([&](int i) { return a.first[i]; }, a.count, item);
    c.m = c.u = layer;
  } else {
    while (item >= a.first[layer + 1]) ++layer;
    while (item < a.first[layer]) --layer;
    if (kind == kM) {
      c.m = layer;
    } else {
      c.u = layer;
    }
  }
  return {kind, item, layer};
}

#include <string>
#include <utility>
#include <vector>

// Elements an item of a layer: `chunk`, more only where there would be more than `cap` of them.
inline int item_size(int64_t n, int chunk, int64_t cap) {
  const int64_t per = ((n + cap - 1) / cap + 1023) / 1024 * 1024;
  return static_cast<int>(per < chunk ? chunk : per);
}
inline int items_of(int64_t n, int size) { return static_cast<int>((n + size - 1) / size); }

struct RunRange {
  int begin, end;  // layers
};
// Whole consecutive layers whose p+g stays within `limit` bytes; a larger layer alone.
inline std::vector<RunRange> make_runs(const std::vector<int64_t>& numel, int elem, int64_t limit) {
  std::vector<RunRange> runs;
  int64_t total = 0;
  for (int i = 0; i < static_cast<int>(numel.size()); ++i) {
    const int64_t bytes = 2 * numel[i] * elem;
    if (runs.empty() || total + bytes > limit) {
      runs.push_back({i, i});
      total = 0;
    }
    runs.back().end = i + 1;
    total += bytes;
  }
  return runs;
}

// Measure leads: run r's updates come once everything up to `lag` bytes of p+g behind its end was handed out to measure.
// A run above back_above bytes is updated backwards. Fills first, layer[].n/size must be set by the caller before.
inline bool make_schedule(TArgs& a, const std::vector<int64_t>& numel, int elem, int64_t limit, int64_t lag,
                          int64_t back_above, std::string& why) {
  int items = 0;
  for (int i = 0; i < a.count; ++i) {
    a.first[i] = items;
    items += items_of(numel[i], a.layer[i].size);
  }
  a.first[a.count] = items;
  std::vector<int64_t> bytes_before(items + 1, 0);
  for (int l = 0; l < a.count; ++l) {
    for (int k = a.first[l]; k < a.first[l + 1]; ++k) {
      const int64_t begin = static_cast<int64_t>(k - a.first[l]) * a.layer[l].size;
      const int64_t count = numel[l] - begin < a.layer[l].size ? numel[l] - begin : a.layer[l].size;
      bytes_before[k + 1] = bytes_before[k] + 2 * count * elem;
    }
  }
  a.segs = 0;
  int t = 0, handed = 0;
  auto add = [&](int kind, int item, int length) {
    if (length == 0) return true;
    if (a.segs == kCapSegs) return false;
    a.seg[a.segs++] = {t, item, kind};
    t += length;
    return true;
  };
  for (const RunRange& run : make_runs(numel, elem, limit)) {
    const int b = a.first[run.begin], e = a.first[run.end];
    int to = e;
    while (to < items && bytes_before[to] - bytes_before[e] < lag) ++to;
    if (to < handed) to = handed;
    const bool back = bytes_before[e] - bytes_before[b] > back_above;
    if (!add(kM, handed, to - handed) || !add(back ? kUBack : kU, back ? e - 1 : b, e - b)) {
      why = "too many segments";
      return false;
    }
    handed = to;
  }
  a.tickets = t;
  return true;
}
