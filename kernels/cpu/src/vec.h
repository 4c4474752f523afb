// Sixteen floats at a time, in the compiler's own vector type: one source for AVX-512, AVX2 and plain targets.
// Only the bfloat16 dot product has no portable form.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace agentctx {

constexpr int LANES = 16;
constexpr float NEG_INF = -std::numeric_limits<float>::infinity();
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));  // 16 halves, as bits

// bfloat16 as bits; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};

template <class V, class T>
inline V load_as(const T* p) {
  V x;
  std::memcpy(&x, p, sizeof(V));
  return x;
}

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return load_as<vf>(p); }
inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }

inline vf widen(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }
inline vf load(const bf16* p) { return widen(load_as<vh>(p)); }
inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// To nearest, ties to even; NaN stays NaN.
inline vh narrow(vf x) {
#ifdef __AVX512BF16__
  // The instruction flushes denormals to zero, which no tolerance notices.
  __m256bh y = _mm512_cvtneps_pbh((__m512)x);
  vh bits;
  std::memcpy(&bits, &y, sizeof(bits));
  return bits;
#else
  vu bits = (vu)x;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vi nan = x != x;
  return __builtin_convertvector(((vu)nan & 0x7fc0u) | (~(vu)nan & rounded), vh);
#endif
}
inline bf16 narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7fc0};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline void store(bf16* p, vf x) {
  vh y = narrow(x);
  std::memcpy(p, &y, sizeof(y));
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return widen(x); }
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) { return x; }
template <>
inline bf16 from_float<bf16>(float x) { return narrow(x); }

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vf vmax(vf a, vf b) { return a > b ? a : b; }
inline vf vmin(vf a, vf b) { return a < b ? a : b; }

inline float hsum(vf x) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 lo, hi;
  std::memcpy(&lo, &x, 32);
  std::memcpy(&hi, (char*)&x + 32, 32);
  lo += hi;
  v4 a, b;
  std::memcpy(&a, &lo, 16);
  std::memcpy(&b, (char*)&lo + 16, 16);
  a += b;
  return (a[0] + a[2]) + (a[1] + a[3]);
}
inline float hmax(vf x) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 lo, hi;
  std::memcpy(&lo, &x, 32);
  std::memcpy(&hi, (char*)&x + 32, 32);
  lo = lo > hi ? lo : hi;
  v4 a, b;
  std::memcpy(&a, &lo, 16);
  std::memcpy(&b, (char*)&lo + 16, 16);
  a = a > b ? a : b;
  const float even = a[0] > a[2] ? a[0] : a[2], odd = a[1] > a[3] ? a[1] : a[3];
  return even > odd ? even : odd;
}

// 2 ** x, x <= 127. Exactly 0 below -125: gradual underflow costs several times the rest (no change of the
// process's floating-point mode is needed then). Relative error below 2e-7. -inf gives 0, NaN stays NaN.
template <class V, class I>
inline V exp2_of(V x) {
  I tiny = x < -125.f;
  V whole = x + 12582912.f;  // 1.5 * 2**23: the integer nearest to x in the low bits
  V n = whole - 12582912.f;
  V f = x - n;  // [-0.5, 0.5]
  V p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  I bits = (I)p + (((I)whole) << 23);
  return tiny ? V{} : (V)bits;
}
inline vf exp2(vf x) { return exp2_of<vf, vi>(x); }
inline float exp2(float x) { return x < -125.f ? 0.f : std::exp2(x); }

// acc + the products of 16 pairs of bfloat16.
#ifdef __AVX512BF16__
inline vf dot_pairs(vf acc, const bf16* a, uint32_t pair) {
  __m512i x = _mm512_loadu_si512(a);
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)_mm512_set1_epi32(int(pair)));
}
#else
inline vf dot_pairs(vf acc, const bf16* a, uint32_t pair) {
  vu x = load_as<vu>(a);
  uint32_t low = pair << 16, high = pair & 0xffff0000u;
  float even, odd;
  std::memcpy(&even, &low, 4);
  std::memcpy(&odd, &high, 4);
  acc = acc + (vf)(x << 16) * even;
  return acc + (vf)(x & 0xffff0000u) * odd;
}
#endif

}  // namespace agentctx
