// Products of one tile with a few rows: scores q K^T and sums P V, at the processor's own vector width, sums kept in
// registers. A tile of bytes (codes) is laid out as one of floats: K [D][64], V [64][D].
// Codes are transposed to that first. Reading them as they are stored, with the lanes of sixteen products added up at
// once, was measured 1.0 to 1.3 times slower for 3 rows and 1.4 to 1.5 times for 8: codes stay slower than packed bf16.
#pragma once

#include <type_traits>

#include "tile.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace agentctx {

#if defined(__AVX512F__)
constexpr int NATIVE = 16, VECTORS = 4;  // lanes of a register; registers of lanes at a time
#elif defined(__AVX2__)
constexpr int NATIVE = 8, VECTORS = 2;
#else
constexpr int NATIVE = 4, VECTORS = 2;
#endif
constexpr int ROWS = 4;  // rows at a time

typedef float nf __attribute__((vector_size(4 * NATIVE)));
typedef int32_t ni __attribute__((vector_size(4 * NATIVE)));
typedef uint32_t nu __attribute__((vector_size(4 * NATIVE)));
typedef uint16_t nh __attribute__((vector_size(2 * NATIVE)));
typedef int8_t nb __attribute__((vector_size(NATIVE)));

// What rows are multiplied with: bfloat16 only where pairs have an instruction.
#ifdef __AVX512BF16__
template <class T>
using Operand = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
#else
template <class T>
using Operand = float;
#endif

template <class T>
constexpr int STEP = std::is_same_v<T, bf16> ? 2 : 1;  // channels of K, tokens of V, that lie together

// Bytes to floats. Compilers take the portable form apart, element by element.
inline nf widen(const int8_t* p) {
#if defined(__AVX512F__)
  return (nf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (nf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(__builtin_convertvector(load_as<nb>(p), ni), nf);
#endif
}

// sum[r][n] += the STEP products of lane n of `tile` with those of row r, at `rows + r * ld`.
template <class T, int R, int N>
inline __attribute__((always_inline)) void multiply(nf (&sum)[R][N], const T* tile, const Operand<T>* rows,
                                                    int64_t ld) {
  for (int n = 0; n < N; ++n) {
    if constexpr (std::is_same_v<T, bf16>) {
      const bf16* at = tile + n * 2 * NATIVE;
#ifdef __AVX512BF16__
      for (int r = 0; r < R; ++r) sum[r][n] = dot_pairs(sum[r][n], at, load_as<uint32_t>(rows + r * ld));
#else
      const nu x = load_as<nu>(at);
      const nf even = (nf)(x << 16), odd = (nf)(x & 0xffff0000u);
      for (int r = 0; r < R; ++r) sum[r][n] += even * rows[r * ld];
      for (int r = 0; r < R; ++r) sum[r][n] += odd * rows[r * ld + 1];
#endif
    } else {
      nf x;
      if constexpr (std::is_same_v<T, float>) x = load_as<nf>(tile + n * NATIVE);
      else x = widen(tile + n * NATIVE);
      for (int r = 0; r < R; ++r) sum[r][n] += x * rows[r * ld];
    }
  }
}

// s[r][t] = q[r] . k[t] over the 64 tokens of a tile. As many bytes at `ahead` are asked for; they are read soon.
template <class T, int R>
void tile_scores(const T* k, const Operand<T>* q, int64_t size, float* s, int64_t ld, const char* ahead) {
  constexpr int step = STEP<T>, strip = VECTORS * NATIVE, line = TILE * step * sizeof(T);
  for (int at = 0; at < TILE; at += strip) {
    nf sum[R][VECTORS] = {};
    for (int64_t d = 0; d < size; d += step) {
      if constexpr (!std::is_same_v<T, int8_t>) {
        if (at == 0) prefetch(ahead + d / step * line, line);
      }
      multiply(sum, k + d * TILE + at * step, q + d, size);
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < VECTORS; ++n) std::memcpy(s + r * ld + at + n * NATIVE, &sum[r][n], sizeof(nf));
  }
}

// acc[r][c..] += sum over the 64 tokens of p[r][t] v[t][c..], N registers of channels; codes are scaled at the end.
template <class T, int R, int N>
void add_channels(const T* v, const Operand<T>* p, int64_t ldp, int64_t size, int64_t c, float* acc,
                  const bf16* scale, const char* ahead) {
  constexpr int step = STEP<T>, bytes = N * NATIVE * step * sizeof(T);
  constexpr bool codes = std::is_same_v<T, int8_t>;
  nf sum[R][N] = {};
  if constexpr (!codes)
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) sum[r][n] = load_as<nf>(acc + r * size + c + n * NATIVE);
  for (int64_t t = 0; t < TILE; t += step) {
    const int64_t at = t * size + c * step;
    if constexpr (!codes) prefetch(ahead + at * sizeof(T), bytes);
    multiply(sum, v + at, p + t, ldp);
  }
  for (int n = 0; n < N; ++n) {
    if constexpr (codes) {
      const nf by = (nf)(__builtin_convertvector(load_as<nh>(scale + c + n * NATIVE), nu) << 16);
      for (int r = 0; r < R; ++r)
        sum[r][n] = load_as<nf>(acc + r * size + c + n * NATIVE) + sum[r][n] * by;
    }
    for (int r = 0; r < R; ++r) std::memcpy(acc + r * size + c + n * NATIVE, &sum[r][n], sizeof(nf));
  }
}

template <class T, int R>
void add_values(const T* v, const Operand<T>* p, int64_t ldp, int64_t size, float* acc, const bf16* scale,
                const char* ahead) {
  int64_t c = 0;
  for (; c + VECTORS * NATIVE <= size; c += VECTORS * NATIVE)
    add_channels<T, R, VECTORS>(v, p, ldp, size, c, acc, scale, ahead);
  for (; c + 2 * NATIVE <= size; c += 2 * NATIVE) add_channels<T, R, 2>(v, p, ldp, size, c, acc, scale, ahead);
  for (; c < size; c += NATIVE) add_channels<T, R, 1>(v, p, ldp, size, c, acc, scale, ahead);
}

// f(first row, constant R) over `rows` rows, at most ROWS at a time.
template <class F>
inline void by_rows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + ROWS <= rows; r += ROWS) f(r, std::integral_constant<int, ROWS>());
  if (rows - r == 3) f(r, std::integral_constant<int, 3>());
  if (rows - r == 2) f(r, std::integral_constant<int, 2>());
  if (rows - r == 1) f(r, std::integral_constant<int, 1>());
}

}  // namespace agentctx
