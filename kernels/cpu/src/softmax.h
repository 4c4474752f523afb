// The parts of an online softmax over a row of scores, in the target's widest vectors.
#pragma once

#include "gemm.h"

namespace agentctx {

typedef int32_t ni __attribute__((vector_size(4 * WIDTH)));

// 16 N floats as native vectors: independent chains, which hide the latency of a maximum or a sum.
template <int N>
struct Lanes {
  static constexpr int PARTS = N * LANES / WIDTH;
  nf part[PARTS];
  vf at(int i) const {
    vf x;
    std::memcpy(&x, part + i * LANES / WIDTH, sizeof(x));
    return x;
  }
};

// The largest of n scores, n a multiple of 64.
inline float row_max(const float* scores, int64_t n) {
  using Four = Lanes<4>;
  Four top = load_as<Four>(scores);
  for (int64_t i = 4 * LANES; i < n; i += 4 * LANES)
#pragma GCC unroll 16
    for (int j = 0; j < Four::PARTS; ++j) {
      const nf x = load_as<nf>(scores + i + j * WIDTH);
      top.part[j] = top.part[j] > x ? top.part[j] : x;
    }
  return hmax(vmax(vmax(top.at(0), top.at(1)), vmax(top.at(2), top.at(3))));
}

// The scores become weights exp2(factor s - top), in place: as floats, or as bfloat16 in the first half of the row.
// Returns their sum.
template <class W>
inline float weigh(float* scores, int64_t n, float factor, float top) {
  using Two = Lanes<2>;
  Two sum{};
  for (int64_t i = 0; i < n; i += 2 * LANES) {
    Two p;
#pragma GCC unroll 8
    for (int j = 0; j < Two::PARTS; ++j) {
      p.part[j] = exp2_of<nf, ni>(load_as<nf>(scores + i + j * WIDTH) * factor - top);
      sum.part[j] += p.part[j];
    }
    if constexpr (std::is_same_v<W, Pair>) {
      store((bf16*)scores + i, p.at(0));
      store((bf16*)scores + i + LANES, p.at(1));
    } else {
      std::memcpy(scores + i, p.part, sizeof(p.part));
    }
  }
  return hsum(sum.at(0) + sum.at(1));
}

// c tanh(scale s / c), in base 2, in place. Small scores keep an absolute error of 1e-7 c.
inline void soft_cap(float* scores, int64_t n, float scale, float c) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    const nf x = load_as<nf>(scores + i) * (scale / c);
    const nf e = exp2_of<nf, ni>((x < 0.f ? x : -x) * (2 * LOG2E));
    const nf y = (1.f - e) / (1.f + e) * (c * LOG2E);
    const nf capped = x < 0.f ? -y : y;
    std::memcpy(scores + i, &capped, sizeof(capped));
  }
}

}  // namespace agentctx
