#pragma once
#include <cstdint>
#include <vector>
inline std::vector<int64_t> resnet50() {
  std::vector<int64_t> s;
  auto conv = [&](int64_t i, int64_t o, int64_t k) {
    s.push_back(o * i * k * k);
    s.push_back(o);
    s.push_back(o);
  };
  conv(3, 64, 7);
  int64_t in = 64;
  const int64_t widths[4] = {64, 128, 256, 512}, blocks[4] = {3, 4, 6, 3};
  for (int st = 0; st < 4; ++st)
    for (int b = 0; b < blocks[st]; ++b) {
      const int64_t w = widths[st];
      conv(in, w, 1);
      conv(w, w, 3);
      conv(w, 4 * w, 1);
      if (b == 0) conv(in, 4 * w, 1);
      in = 4 * w;
    }
  s.push_back(1000 * in);
  s.push_back(1000);
  return s;
}
inline std::vector<int64_t> vit() {
  std::vector<int64_t> s;
  const int64_t w = 768, h = 3072;
  auto add = [&](std::initializer_list<int64_t> l) { s.insert(s.end(), l); };
  add({w, w * 768, w, 197 * w});
  for (int i = 0; i < 12; ++i) add({w, w, 3 * w * w, 3 * w, w * w, w, w, w, h * w, h, w * h, w});
  add({w, w, 1000 * w, 1000});
  return s;
}
inline std::vector<int64_t> llama3() {  // embedding and three transformer layers of Llama-2-7B
  std::vector<int64_t> s;
  const int64_t w = 4096, h = 11008;
  s.push_back(32000 * w);
  for (int i = 0; i < 3; ++i) {
    for (int k = 0; k < 4; ++k) s.push_back(w * w);
    for (int k = 0; k < 3; ++k) s.push_back(h * w);
    s.push_back(w);
    s.push_back(w);
  }
  return s;
}
