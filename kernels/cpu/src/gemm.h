// Small matrix products whose right side is a packed tile: C[m][n] (+)= A[m][k] B[k][n], register-blocked.
//
// Both sides are arrays of 32-bit words: a float, or the pair of bfloat16 that one instruction multiplies. K and V
// tiles are row-major in words (see tile.h), so the same loop serves scores (B = K) and values (B = V), and both types.
#pragma once

#include "vec.h"

namespace agentctx {

// The widest vector of the target: accumulators must be registers, which the compiler's split vectors are not.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, PANEL = 4;
#elif defined(__AVX__)
constexpr int WIDTH = 8, PANEL = 2;
#else
constexpr int WIDTH = 4, PANEL = 2;
#endif
constexpr int ROWS = 6;  // ROWS x PANEL accumulators leave registers for a row of B and an element of A
typedef float nf __attribute__((vector_size(4 * WIDTH)));

// Two bfloat16 of neighbouring channels or tokens.
struct Pair {
  uint32_t bits;
};

inline nf multiply_add(nf acc, const float* b, float a) { return acc + load_as<nf>(b) * a; }
#ifdef __AVX512BF16__
inline nf multiply_add(nf acc, const Pair* b, Pair a) { return dot_pairs(acc, (const bf16*)b, a.bits); }
#endif

// M rows, N vectors; the k rows of each of `n` tiles follow each other along A. `add`: C is added to.
template <class W, int M, int N>
inline void micro_product(const W* a, int64_t lda, const W* const* tiles, int64_t n, int64_t column, int64_t ldb,
                          int64_t k, float* c, int64_t ldc, bool add) {
  nf acc[M][N] = {};
  if (add)
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) acc[i][j] = load_as<nf>(c + i * ldc + j * WIDTH);
  for (int64_t tile = 0; tile < n; ++tile, a += k) {
    const W* b = tiles[tile] + column;
    for (int64_t x = 0; x < k; ++x, b += ldb) {
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) acc[i][j] = multiply_add(acc[i][j], b + j * WIDTH, a[i * lda + x]);
    }
  }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) std::memcpy(c + i * ldc + j * WIDTH, &acc[i][j], sizeof(nf));
}

template <class W, int M>
inline void row_product(const W* a, int64_t lda, const W* const* tiles, int64_t n, int64_t column, int64_t vectors,
                        int64_t ldb, int64_t k, float* c, int64_t ldc, bool add) {
  if (vectors >= PANEL)
    micro_product<W, M, PANEL>(a, lda, tiles, n, column, ldb, k, c + column, ldc, add);
  else
    for (int64_t j = 0; j < vectors; ++j)
      micro_product<W, M, 1>(a, lda, tiles, n, column + j * WIDTH, ldb, k, c + column + j * WIDTH, ldc, add);
}

// C [m][columns], columns a multiple of WIDTH; each tile is [k][columns] words.
template <class W>
inline void product(const W* a, int64_t lda, int64_t m, const W* const* tiles, int64_t n, int64_t k, int64_t columns,
                    float* c, int64_t ldc, bool add) {
  for (int64_t column = 0; column < columns; column += PANEL * WIDTH) {
    const int64_t vectors = (columns - column) / WIDTH;
    int64_t i = 0;
    for (; i + ROWS <= m; i += ROWS)
      row_product<W, ROWS>(a + i * lda, lda, tiles, n, column, vectors, columns, k, c + i * ldc, ldc, add);
    for (; i + 2 <= m; i += 2)
      row_product<W, 2>(a + i * lda, lda, tiles, n, column, vectors, columns, k, c + i * ldc, ldc, add);
    if (i < m) row_product<W, 1>(a + i * lda, lda, tiles, n, column, vectors, columns, k, c + i * ldc, ldc, add);
  }
}

}  // namespace agentctx
