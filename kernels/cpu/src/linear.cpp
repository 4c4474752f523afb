// A few rows times a weight of 8 bits: what it costs is the reading of the codes. Sixty-four codes are loaded as sixteen
// numbers of four bytes, and byte j of each is turned into floats by two shifts; so the rows of x are laid out to match:
// in each run of 64, x[4 l + j] stands at 16 j + l.
#include "ops.h"

namespace agentctx {
namespace {

constexpr int RUN = 4 * LANES;
constexpr int TOGETHER = 4;  // rows of x that share one reading of the codes

template <int J>
inline void add(const float* x, int64_t width, vi codes, vf* acc, int rows) {
  const vf w = __builtin_convertvector((codes << (24 - 8 * J)) >> 24, vf);
  for (int r = 0; r < rows; ++r) acc[r * 4 + J] += load(x + r * width + J * LANES) * w;
}

// sums[r] = x[r] . codes, for ROWS rows; what is left of the last run is in plain order.
template <int ROWS>
inline void products(const float* x, int64_t width, const int8_t* codes, float* sums) {
  vf acc[ROWS * 4] = {};
  int64_t i = 0;
  for (; i + RUN <= width; i += RUN) {
    const vi four = load_as<vi>(codes + i);
    add<0>(x + i, width, four, acc, ROWS);
    add<1>(x + i, width, four, acc, ROWS);
    add<2>(x + i, width, four, acc, ROWS);
    add<3>(x + i, width, four, acc, ROWS);
  }
  for (int r = 0; r < ROWS; ++r) {
    sums[r] = hsum((acc[4 * r] + acc[4 * r + 1]) + (acc[4 * r + 2] + acc[4 * r + 3]));
    for (int64_t j = i; j < width; ++j) sums[r] += x[r * width + j] * float(codes[j]);
  }
}

template <class T>
std::vector<float> laid_out(const T* x, int64_t rows, int64_t width) {
  std::vector<float> found(rows * width);
  const int64_t whole = width / RUN * RUN;
  for (int64_t r = 0; r < rows; ++r, x += width)
    for (int64_t i = 0; i < width; ++i)
      found[r * width + (i < whole ? i / RUN * RUN + i % 4 * LANES + i % RUN / 4 : i)] = to_float(x[i]);
  return found;
}

}  // namespace

// x contiguous [R, K], codes contiguous int8 [N, K], scales bfloat16 [N]: [R, N] of the type of x.
at::Tensor int8_linear(const at::Tensor& x, const at::Tensor& codes, const at::Tensor& scales, int64_t threads) {
  const int64_t rows = x.size(0), width = x.size(1), outs = codes.size(0);
  auto out = at::empty({rows, outs}, x.options());
  const int8_t* from = (const int8_t*)codes.const_data_ptr();
  const bf16* scale = (const bf16*)scales.const_data_ptr();
  auto run = [&]<class T>(T) {
    const std::vector<float> wide = laid_out((const T*)x.const_data_ptr(), rows, width);
    T* to = (T*)out.mutable_data_ptr();
    parallel(outs, threads, [&](int64_t begin, int64_t end) {
      float sums[TOGETHER];
      for (int64_t n = begin; n < end; ++n)
        for (int64_t r = 0, count; r < rows; r += count) {
          const float* at = wide.data() + r * width;
          count = rows - r >= TOGETHER ? TOGETHER : 1;
          count == TOGETHER ? products<TOGETHER>(at, width, from + n * width, sums)
                            : products<1>(at, width, from + n * width, sums);
          for (int64_t j = 0; j < count; ++j) to[(r + j) * outs + n] = from_float<T>(sums[j] * widen(scale[n]));
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
