// The products of prefill by torch's brgemm, which uses AMX where the processor has it. Its interface carries no
// promise of stability: it is used only at the level that asks for it, if the header has it and a trial product comes
// out right.
#pragma once

#include "gemm.h"

#ifdef AGENTCTX_BRGEMM
#include <ATen/native/CPUBlas.h>
#endif

namespace agentctx {

#if defined(AGENTCTX_BRGEMM) && defined(CPUBLAS_BRGEMM_BF16BF16F32)

inline void brgemm(const Pair* a, int64_t lda, int64_t m, const Pair* const* tiles, int64_t n, int64_t k,
                   int64_t columns, float* c, int64_t ldc, bool add) {
  for (int64_t i = 0; i < n; ++i)
    at::native::cpublas::brgemm(m, columns, 2 * k, 2 * lda, columns, ldc, add || i > 0,
                                (const at::BFloat16*)(a + i * k), (const at::BFloat16*)tiles[i], c, true);
}

// cpublas::could_pack does not answer this: it speaks of a repacking that packed tiles do not need.
inline bool brgemm_works() {
  static const bool works = [] {
    constexpr int64_t M = 16, N = 64, K = 16;
    std::vector<Pair> a(M * K), b(K * N);
    std::vector<float> got(M * N), want(M * N);
    for (size_t i = 0; i < a.size(); ++i) a[i] = {uint32_t(i % 2 ? 0x3f804000 : 0x40003f80)};
    for (size_t i = 0; i < b.size(); ++i) b[i] = {uint32_t(i % 3 ? 0x3f804080 : 0x40003f80)};
    const Pair* tile = b.data();
    try {
      brgemm(a.data(), K, M, &tile, 1, K, N, got.data(), N, false);
      at::native::cpublas::brgemm_release();
    } catch (const c10::Error&) {
      return false;
    }
    product(a.data(), K, M, &tile, 1, K, N, want.data(), N, false);
    return got == want;
  }();
  return works;
}

// A thread gives back what brgemm took (AMX tiles) when its share is done.
struct Thread {
  ~Thread() {
    if (brgemm_works()) at::native::cpublas::brgemm_release();
  }
};

inline void multiply(const Pair* a, int64_t lda, int64_t m, const Pair* const* tiles, int64_t n, int64_t k,
                     int64_t columns, float* c, int64_t ldc, bool add) {
  (brgemm_works() ? brgemm : product<Pair>)(a, lda, m, tiles, n, k, columns, c, ldc, add);
}

#else

struct Thread {
  Thread() {}
};

#ifdef __AVX512BF16__
inline void multiply(const Pair* a, int64_t lda, int64_t m, const Pair* const* tiles, int64_t n, int64_t k,
                     int64_t columns, float* c, int64_t ldc, bool add) {
  product(a, lda, m, tiles, n, k, columns, c, ldc, add);
}
#endif

#endif

inline void multiply(const float* a, int64_t lda, int64_t m, const float* const* tiles, int64_t n, int64_t k,
                     int64_t columns, float* c, int64_t ldc, bool add) {
  product(a, lda, m, tiles, n, k, columns, c, ldc, add);
}

}  // namespace agentctx
