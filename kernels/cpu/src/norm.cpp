// The root mean square of each token, and the token divided by it.
#include "ops.h"

namespace agentctx {
namespace {

constexpr int64_t STEP = 4 * LANES;  // independent chains hide the latency of an addition

template <class T>
void norm(const T* x, const T* weight, T* to, int64_t size, float eps) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + STEP <= size; i += STEP)
    for (int j = 0; j < 4; ++j) {
      const vf a = load(x + i + j * LANES);
      sums[j] += a * a;
    }
  for (; i + LANES <= size; i += LANES) {
    const vf a = load(x + i);
    sums[0] += a * a;
  }
  float total = hsum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < size; ++i) total += to_float(x[i]) * to_float(x[i]);
  const float scale = 1.f / std::sqrt(total / float(size) + eps);
  for (i = 0; i + LANES <= size; i += LANES) store(to + i, load(x + i) * scale * load(weight + i));
  for (; i < size; ++i) to[i] = from_float<T>(to_float(x[i]) * scale * to_float(weight[i]));
}

}  // namespace

// x contiguous [..., H], weight [H] of the same type.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps, int64_t threads) {
  auto out = at::empty_like(x);
  const int64_t size = x.size(-1), rows = x.numel() / size;
  auto run = [&]<class T>(T) {
    const T *from = (const T*)x.const_data_ptr(), *by = (const T*)weight.const_data_ptr();
    T* to = (T*)out.mutable_data_ptr();
    parallel(rows, threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) norm(from + r * size, by, to + r * size, size, float(eps));
    });
  };
  x.scalar_type() == at::kFloat ? run(float{}) : run(bf16{});
  return out;
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int threads) -> Tensor", &agentctx::rms_norm);
}
