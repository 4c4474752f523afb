// The Walsh-Hadamard rotation of rows, in place in registers and a row of scratch.
#include "ops.h"

namespace agentctx {
namespace {

constexpr int64_t MOST = 1024;

// The four levels within a vector: lanes that differ in bit `step` meet, the higher one with its sign turned.
template <int STEP>
inline vf level(vf x) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#ifdef __clang__
  const vf other = __builtin_shufflevector(x, x, 0 ^ STEP, 1 ^ STEP, 2 ^ STEP, 3 ^ STEP, 4 ^ STEP, 5 ^ STEP, 6 ^ STEP,
                                           7 ^ STEP, 8 ^ STEP, 9 ^ STEP, 10 ^ STEP, 11 ^ STEP, 12 ^ STEP, 13 ^ STEP,
                                           14 ^ STEP, 15 ^ STEP);
#else
  const vf other = __builtin_shuffle(x, lane ^ STEP);
#endif
  return other + select((lane & STEP) != 0, -x, x);
}

template <class T>
void rotate(const T* from, T* to, int64_t rows, int64_t size) {
  const int64_t n = size / LANES;
  const float norm = 1.f / std::sqrt(float(size));
  vf x[MOST / LANES];
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < n; ++i)
      x[i] = level<8>(level<4>(level<2>(level<1>(load(from + row * size + i * LANES)))));
    for (int64_t step = 1; step < n; step *= 2)
      for (int64_t i = 0; i < n; i += 2 * step)
        for (int64_t j = i; j < i + step; ++j) {
          const vf a = x[j] + x[j + step], b = x[j] - x[j + step];
          x[j] = a, x[j + step] = b;
        }
    for (int64_t i = 0; i < n; ++i) store(to + row * size + i * LANES, x[i] * norm);
  }
}

}  // namespace

at::Tensor hadamard(const at::Tensor& x, int64_t threads) {
  const int64_t size = x.size(-1), rows = x.numel() / size;
  at::Tensor out = at::empty_like(x);
  const char* from = (const char*)x.const_data_ptr();
  char* to = (char*)out.mutable_data_ptr();
  parallel(rows, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    if (x.element_size() == 4) {
      rotate((const float*)from + at, (float*)to + at, end - begin, size);
    } else {
      rotate((const bf16*)from + at, (bf16*)to + at, end - begin, size);
    }
  });
  return out;
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) { m.def("hadamard(Tensor x, int threads) -> Tensor", &agentctx::hadamard); }
