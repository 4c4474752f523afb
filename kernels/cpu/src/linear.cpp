// A few rows times a weight of 8 bits: what it costs is the reading of the codes.
#include "ops.h"

namespace agentctx {
namespace {

typedef int8_t vb __attribute__((vector_size(LANES)));

constexpr int TOGETHER = 4;  // rows of x that share one reading of the codes

inline vf codes_at(const int8_t* p) { return __builtin_convertvector(__builtin_convertvector(load_as<vb>(p), vi), vf); }

// sums[r] = x[r] . codes, for `rows` rows of floats. One row has four chains of its own.
template <int ROWS>
inline void products(const float* x, int64_t width, const int8_t* codes, float* sums) {
  constexpr int CHAINS = ROWS == 1 ? 4 : 1;
  vf acc[ROWS * CHAINS] = {};
  int64_t i = 0;
  for (; i + CHAINS * LANES <= width; i += CHAINS * LANES)
    for (int c = 0; c < CHAINS; ++c) {
      const vf w = codes_at(codes + i + c * LANES);
      for (int r = 0; r < ROWS; ++r) acc[r * CHAINS + c] += load(x + r * width + i + c * LANES) * w;
    }
  for (; i + LANES <= width; i += LANES) {
    const vf w = codes_at(codes + i);
    for (int r = 0; r < ROWS; ++r) acc[r * CHAINS] += load(x + r * width + i) * w;
  }
  for (int r = 0; r < ROWS; ++r) {
    vf whole = acc[r * CHAINS];
    for (int c = 1; c < CHAINS; ++c) whole += acc[r * CHAINS + c];
    sums[r] = hsum(whole);
    for (int64_t j = i; j < width; ++j) sums[r] += x[r * width + j] * float(codes[j]);
  }
}

}  // namespace

// x contiguous [R, K], codes contiguous int8 [N, K], scales bfloat16 [N]: [R, N] of the type of x.
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales, int64_t threads) {
  const int64_t rows = x.size(0), width = x.size(1), outs = codes.size(0);
  auto out = at::empty({rows, outs}, x.options());
  const int8_t* from = (const int8_t*)codes.const_data_ptr();
  const bf16* scale = (const bf16*)scales.const_data_ptr();
  auto run = [&]<class T>(T) {
    const T* given = (const T*)x.const_data_ptr();
    T* to = (T*)out.mutable_data_ptr();
    std::vector<float> wide(rows * width);
    for (int64_t i = 0; i < rows * width; ++i) wide[i] = to_float(given[i]);
    parallel(outs, threads, [&](int64_t begin, int64_t end) {
      float sums[TOGETHER];
      for (int64_t n = begin; n < end; ++n)
        for (int64_t r = 0; r < rows;) {
          const float* at = wide.data() + r * width;
          const int64_t left = rows - r, count = left >= TOGETHER ? TOGETHER : 1;
          count == TOGETHER ? products<TOGETHER>(at, width, from + n * width, sums)
                            : products<1>(at, width, from + n * width, sums);
          for (int64_t j = 0; j < count; ++j) to[(r + j) * outs + n] = from_float<T>(sums[j] * widen(scale[n]));
          r += count;
        }
    });
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(bf16{});
  return out;
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("int8_linear(Tensor x, Tensor codes, Tensor scales, int threads) -> Tensor", &agentctx::int8_linear);
}
