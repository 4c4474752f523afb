// One page of one head as a packed tile: K as [D][64] or [D/2][64][2], V as [64][D] or [32][D][2]. Packed pages are
// used where they lie; other formats are packed or widened into the caller's scratch.
#pragma once

#include "ops.h"

namespace agentctx {

constexpr int TILE = 64;  // tokens of a page

enum class Format { paged, packed, int8, int4 };

inline Format format_of(std::string_view name) {
  if (name == "paged") return Format::paged;
  if (name == "packed") return Format::packed;
  if (name == "int8") return Format::int8;
  TORCH_CHECK(name == "int4", "unknown format");
  return Format::int4;
}

// A pool as the operators see it; strides in elements, of pages and of heads.
struct Pool {
  const char *k, *v;
  int64_t k_page, k_head, v_page, v_head;
  const bf16 *k_scale = nullptr, *v_scale = nullptr;
  int64_t ks_page = 0, ks_head = 0, vs_page = 0, vs_head = 0;
  const int32_t* valid = nullptr;
  int64_t n_pages, n_heads, size;
  int64_t k_bytes;  // of an element
  Format format;

  Pool(const at::Tensor& k_, const at::Tensor& v_, const std::optional<at::Tensor>& ks,
       const std::optional<at::Tensor>& vs, const std::optional<at::Tensor>& page_valid, std::string_view name,
       int64_t head_dim)
      : k((const char*)k_.const_data_ptr()),
        v((const char*)v_.const_data_ptr()),
        k_page(k_.stride(0)), k_head(k_.stride(1)), v_page(v_.stride(0)), v_head(v_.stride(1)),
        n_pages(k_.size(0)), n_heads(k_.size(1)), size(head_dim), k_bytes(k_.element_size()),
        format(format_of(name)) {
    if (ks) {
      k_scale = (const bf16*)ks->const_data_ptr();
      v_scale = (const bf16*)vs->const_data_ptr();
      ks_page = ks->stride(0), ks_head = ks->stride(1);
      vs_page = vs->stride(0), vs_head = vs->stride(1);
      TORCH_CHECK_VALUE(ks->stride(2) == 1 && vs->stride(2) == 1, "kv scales: the last dimension must be contiguous");
    }
    if (page_valid) {
      TORCH_CHECK_VALUE(page_valid->is_contiguous(), "kv.page_valid must be contiguous");
      valid = page_valid->const_data_ptr<int32_t>();
    }
  }

  const char* k_at(int64_t page, int64_t head) const { return k + (page * k_page + head * k_head) * k_bytes; }
  const char* v_at(int64_t page, int64_t head) const { return v + (page * v_page + head * v_head) * k_bytes; }
  const bf16* k_scale_at(int64_t page, int64_t head) const { return k_scale + page * ks_page + head * ks_head; }
  const bf16* v_scale_at(int64_t page, int64_t head) const { return v_scale + page * vs_page + head * vs_head; }
};

// One round of a transposition of N vectors: halves of the list are interleaved, as cards are shuffled.
template <class V, int N, int... I>
inline __attribute__((always_inline)) void interleave(V (&x)[N], std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  V y[N];
  for (int i = 0; i < N / 2; ++i) {
    y[2 * i] = __builtin_shufflevector(x[i], x[i + N / 2], (I / 2 + I % 2 * lanes)...);
    y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + N / 2], (lanes / 2 + I / 2 + I % 2 * lanes)...);
  }
  for (int i = 0; i < N; ++i) x[i] = y[i];
}
template <class V, int N>
inline __attribute__((always_inline)) void interleave(V (&x)[N]) {
  interleave(x, std::make_integer_sequence<int, sizeof(V) / sizeof(x[0][0])>());
}

// 64 x cols 32-bit words, row stride `ld`, to [cols][TILE]; cols a multiple of 4.
inline void transpose_words(const uint32_t* src, int64_t ld, uint32_t* dst, int64_t cols) {
  typedef uint32_t v4 __attribute__((vector_size(16)));
  for (int64_t c = 0; c < cols; c += 4)
    for (int64_t r = 0; r < TILE; r += 4) {
      v4 x[4];
      for (int i = 0; i < 4; ++i) x[i] = load_as<v4>(src + (r + i) * ld + c);
      interleave(x);
      interleave(x);
      for (int i = 0; i < 4; ++i) std::memcpy(dst + (c + i) * TILE + r, &x[i], sizeof(v4));
    }
}

// Asks for `bytes` at `at`, into the second level: 1.5 times faster than into the first, whose queue is short.
inline __attribute__((always_inline)) void prefetch(const char* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
}

// rows x cols bytes to [cols][ld], both multiples of 16. With `high` a byte holds two codes of 4 bits: the low one
// goes to its place, the high one `high` bytes further. The bytes at `ahead` are what is read next.
inline void transpose_codes(const uint8_t* src, int64_t rows, int64_t cols, int8_t* dst, int64_t ld, int64_t high,
                            const char* ahead) {
  typedef uint8_t v16 __attribute__((vector_size(16)));
  const auto put = [&](int64_t c, int64_t r, v16 x) {
    if (high) {
      const v16 first = ((x & 15) ^ 8) - 8, second = ((x >> 4) ^ 8) - 8;
      std::memcpy(dst + c * ld + r, &first, sizeof(v16));
      std::memcpy(dst + c * ld + r + high, &second, sizeof(v16));
    } else {
      std::memcpy(dst + c * ld + r, &x, sizeof(v16));
    }
  };
  for (int64_t r = 0; r < rows; r += 16) {
    prefetch(ahead + r * cols, 16 * cols);
    for (int64_t c = 0; c < cols; c += 16) {
      v16 x[16];
      for (int i = 0; i < 16; ++i) x[i] = load_as<v16>(src + (r + i) * cols + c);
      for (int round = 0; round < 4; ++round) interleave(x);
      for (int i = 0; i < 16; ++i) put(c + i, r, x[i]);
    }
  }
}

// Row-major K [64][D] of a dtype to the packed tile of the same dtype.
inline void pack_k(const float* src, int64_t size, float* dst) {
  transpose_words((const uint32_t*)src, size, (uint32_t*)dst, size);
}
inline void pack_k(const bf16* src, int64_t size, bf16* dst) {
  transpose_words((const uint32_t*)src, size / 2, (uint32_t*)dst, size / 2);
}
inline void pack_v(const float* src, int64_t size, float* dst) {
  std::memcpy(dst, src, sizeof(float) * TILE * size);
}
inline void pack_v(const bf16* src, int64_t size, bf16* dst) {  // size a multiple of 8
  typedef uint16_t v8 __attribute__((vector_size(16)));
  for (int64_t t = 0; t < TILE; t += 2)
    for (int64_t d = 0; d < size; d += 8) {
      v8 x[2] = {load_as<v8>(src + t * size + d), load_as<v8>(src + (t + 1) * size + d)};
      interleave(x);
      for (int i = 0; i < 2; ++i) std::memcpy(dst + t * size + 2 * d + 8 * i, &x[i], sizeof(v8));
    }
}

// Where element (token t, channel d) of a tile lies.
template <class T>
inline int64_t k_index(int64_t t, int64_t d) {
  if constexpr (sizeof(T) == 4) return d * TILE + t;
  return (d / 2) * 2 * TILE + 2 * t + (d & 1);
}
template <class T>
inline int64_t v_index(int64_t t, int64_t d, int64_t size) {
  if constexpr (sizeof(T) == 4) return t * size + d;
  return (t / 2) * 2 * size + 2 * d + (t & 1);
}

// Sixteen codes; in two steps because GCC 12 takes one of four times the width by lanes.
inline vf load(const int8_t* p) {
  typedef int8_t v8 __attribute__((vector_size(16)));
  typedef int16_t v16 __attribute__((vector_size(32)));
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(load_as<v8>(p), v16), vi), vf);
}

// Codes [rows][cols] by scale(row, col) to a tile of floats, or of pairs of rows; cols a multiple of 16.
template <class T, class F>
inline void scale_codes(const int8_t* codes, int64_t rows, int64_t cols, T* tile, const F& scale) {
  const auto at = [&](int64_t r, int64_t c) { return load(codes + r * cols + c) * scale(r, c); };
  for (int64_t r = 0; r < rows; r += 4 / sizeof(T))
    for (int64_t c = 0; c < cols; c += LANES) {
      if constexpr (sizeof(T) == 4) {
        store(tile + r * cols + c, at(r, c));
      } else {
        const vu low = __builtin_convertvector(narrow(at(r, c)), vu);
        const vu high = __builtin_convertvector(narrow(at(r + 1, c)), vu);
        const vu pairs = low | high << 16;
        std::memcpy(tile + r * cols + 2 * c, &pairs, sizeof(pairs));
      }
    }
}

constexpr int64_t MOST_CODES = TILE * 256;  // of a tile

// The K tile of (page, head) in T, in place or in `scratch` (64 D elements).
template <class T>
inline const T* k_tile(const Pool& pool, int64_t page, int64_t head, T* scratch) {
  const char* at = pool.k_at(page, head);
  const int64_t size = pool.size;
  if (pool.format == Format::packed) return (const T*)at;
  if (pool.format == Format::paged) {
    pack_k((const T*)at, size, scratch);
    return scratch;
  }
  alignas(64) int8_t codes[MOST_CODES];
  const bf16* scale = pool.k_scale_at(page, head);
  const int64_t high = pool.format == Format::int4 ? size / 2 : 0;  // codes of channel i and i + D/2 share a byte
  transpose_codes((const uint8_t*)at, TILE, high ? high : size, codes, TILE, high * TILE, at);
  scale_codes(codes, size, TILE, scratch, [=](int64_t d, int64_t) { return splat(widen(scale[d])); });
  return scratch;
}

// The V tile of (page, head) in T, in place or in `scratch`.
template <class T>
inline const T* v_tile(const Pool& pool, int64_t page, int64_t head, T* scratch) {
  const char* at = pool.v_at(page, head);
  const int64_t size = pool.size;
  if (pool.format == Format::packed) return (const T*)at;
  if (pool.format == Format::paged) {
    if constexpr (sizeof(T) == 4) return (const T*)at;
    pack_v((const T*)at, size, scratch);
    return scratch;
  }
  alignas(64) int8_t codes[MOST_CODES];
  const bf16* scale = pool.v_scale_at(page, head);
  const int64_t high = pool.format == Format::int4 ? size / 2 : 0;
  transpose_codes((const uint8_t*)at, high ? high : size, TILE, codes, size, high, at);
  scale_codes(codes, TILE, size, scratch, [=](int64_t, int64_t d) { return load(scale + d); });
  return scratch;
}

// A page id of a list or table, refused when the pool has no such page: a wrong one must not crash.
inline int64_t checked_page(const Pool& pool, int64_t page, const char* name) {
  TORCH_CHECK_INDEX(page >= 0 && page < pool.n_pages, name, " names page ", page, ": the pool has ", pool.n_pages,
                    " pages");
  return page;
}

// A pool in an operator's schema: k, v, scales, validity, format, head size.
#define AGENTCTX_POOL "Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor? page_valid, str format, int size"

}  // namespace agentctx
