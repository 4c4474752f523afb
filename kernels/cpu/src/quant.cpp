// Whole pages in 8 or 4 bits: one bfloat16 scale for each page, head and channel. The arithmetic is that of the torch
// implementation to the last bit: a true division, rounding to even, no scale below the smallest normal number.
#include "ops.h"

namespace agentctx {
namespace {

constexpr float ROUND = 12582912.f;  // 1.5 * 2**23: adding and subtracting it rounds to even

// Up to 16 values; what is missing is 0.
template <class T>
inline vf load_some(const T* p, int64_t n) {
  if (n >= LANES) return load(p);
  T part[LANES] = {};
  std::memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <class T>
inline void store_some(T* p, vf x, int64_t n) {
  if (n >= LANES) return store(p, x);
  T part[LANES];
  store(part, x);
  std::memcpy(p, part, n * sizeof(T));
}

// The scale of 16 channels, rounded to bfloat16 by its bits: the conversion instruction differs for tiny numbers.
inline vf rounded_scale(vf largest, float limit) {
  vu bits = (vu)(largest / limit);
  bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return (vf)(bits & (vu)(bits >= 0x800000u));
}

// One page of one head, `page` rows of `size` channels, `row` apart: codes [page][size], scales [size].
template <class T>
void quantise(const T* x, int64_t row, int64_t page, int64_t size, float limit, int8_t* codes, bf16* scales) {
  typedef int8_t vc __attribute__((vector_size(16)));
  for (int64_t d = 0; d < size; d += LANES) {
    const int64_t n = size - d;
    vf largest{};
    for (int64_t t = 0; t < page; ++t) {
      const vf y = load_some(x + t * row + d, n);
      largest = vmax(largest, vmax(y, -y));
    }
    const vf scale = rounded_scale(largest, limit);
    const vi live = scale > 0.f;
    const vf step = select(live, scale, splat(1.f));
    for (int64_t t = 0; t < page; ++t) {
      vf y = load_some(x + t * row + d, n) / step;
      y = select(live, vmin(vmax(y, splat(-limit)), splat(limit)), vf{});
      const vf whole = y + ROUND;
      const vc code = __builtin_convertvector((vi)whole - (vi)splat(ROUND), vc);
      if (n >= LANES)
        std::memcpy(codes + t * size + d, &code, LANES);
      else
        std::memcpy(codes + t * size + d, &code, n);
    }
    const vh top = __builtin_convertvector((vu)scale >> 16, vh);
    std::memcpy(scales + d, &top, std::min<int64_t>(n, LANES) * sizeof(bf16));
  }
}

// Codes [page][size] of one byte to the stored page; `width` is size, or size / 2 with channels i and i + size / 2
// in one byte. V is stored transposed.
void put(int8_t* codes, int64_t page, int64_t size, bool pair, bool transpose, uint8_t* out) {
  const int64_t width = pair ? size / 2 : size;
  uint8_t* rows = (uint8_t*)codes;
  if (pair)
    for (int64_t t = 0; t < page; ++t)
      for (int64_t d = 0; d < width; ++d)
        rows[t * width + d] = (rows[t * size + d] & 15) | uint8_t(rows[t * size + width + d] << 4);
  if (!transpose) {
    std::memcpy(out, rows, page * width);
    return;
  }
  for (int64_t d = 0; d < width; ++d)
    for (int64_t t = 0; t < page; ++t) out[d * page + t] = rows[t * width + d];
}

// The inverse of `put` and `quantise`; `scratch` holds 2 page size bytes.
template <class T>
void dequantise(const uint8_t* stored, const bf16* scales, int64_t page, int64_t size, bool pair, bool transpose,
                int8_t* scratch, T* out) {
  typedef int8_t vc __attribute__((vector_size(16)));
  const int64_t width = pair ? size / 2 : size;
  if (transpose) {
    uint8_t* rows = (uint8_t*)scratch + page * size;
    for (int64_t d = 0; d < width; ++d)
      for (int64_t t = 0; t < page; ++t) rows[t * width + d] = stored[d * page + t];
    stored = rows;
  }
  if (pair)
    for (int64_t t = 0; t < page; ++t)
      for (int64_t d = 0; d < width; ++d) {
        const uint8_t x = stored[t * width + d];
        scratch[t * size + d] = int8_t(x << 4) >> 4;
        scratch[t * size + width + d] = int8_t(x) >> 4;
      }
  const int8_t* codes = pair ? scratch : (const int8_t*)stored;
  for (int64_t d = 0; d < size; d += LANES) {
    const int64_t n = size - d;
    const vf scale = load_some(scales + d, n);
    for (int64_t t = 0; t < page; ++t) {
      vc code{};
      if (n >= LANES)
        code = load_as<vc>(codes + t * size + d);
      else
        std::memcpy(&code, codes + t * size + d, n);
      store_some(out + t * size + d, __builtin_convertvector(code, vf) * scale, n);
    }
  }
}

template <class T>
void quantise_pool(const at::Tensor& x, bool four, bool transpose, const at::Tensor& codes, const at::Tensor& scales,
                   int64_t threads) {
  const int64_t heads = x.size(1), page = x.size(2), size = x.size(3), bytes = codes.size(2) * codes.size(3);
  const T* from = (const T*)x.const_data_ptr();
  uint8_t* to = (uint8_t*)codes.mutable_data_ptr();
  bf16* scale = (bf16*)scales.mutable_data_ptr();
  const int64_t sp = x.stride(0), sh = x.stride(1), row = x.stride(2);
  parallel(x.size(0) * heads, threads, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> scratch(page * size);
    for (int64_t i = begin; i < end; ++i) {
      const T* tile = from + (i / heads) * sp + (i % heads) * sh;
      quantise(tile, row, page, size, four ? 7.f : 127.f, scratch.data(), scale + i * size);
      put(scratch.data(), page, size, four, transpose, to + i * bytes);
    }
  });
}

template <class T>
void dequantise_pool(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& pages, bool four,
                     bool transpose, const at::Tensor& out, int64_t threads) {
  const int64_t heads = out.size(1), page = out.size(2), size = out.size(3);
  const uint8_t* from = (const uint8_t*)codes.const_data_ptr();
  const bf16* scale = (const bf16*)scales.const_data_ptr();
  const int32_t* ids = pages.const_data_ptr<int32_t>();
  T* to = (T*)out.mutable_data_ptr();
  parallel(out.size(0) * heads, threads, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> scratch(2 * page * size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = ids[i / heads], h = i % heads;
      dequantise(from + p * codes.stride(0) + h * codes.stride(1), scale + p * scales.stride(0) + h * scales.stride(1),
                 page, size, four, transpose, scratch.data(), to + i * page * size);
    }
  });
}

}  // namespace

void quantize_pages(const at::Tensor& k, const at::Tensor& v, int64_t bits, const at::Tensor& k_codes,
                    const at::Tensor& v_codes, const at::Tensor& k_scale, const at::Tensor& v_scale, int64_t threads) {
  const bool four = bits == 4;
  auto run = [&]<class T>(T) {
    quantise_pool<T>(k, four, false, k_codes, k_scale, threads);
    quantise_pool<T>(v, four, true, v_codes, v_scale, threads);
  };
  k.scalar_type() == at::kFloat ? run(float{}) : run(bf16{});
}

void dequantize_pages(const at::Tensor& k_codes, const at::Tensor& v_codes, const at::Tensor& k_scale,
                      const at::Tensor& v_scale, const at::Tensor& pages, bool four, const at::Tensor& k,
                      const at::Tensor& v, int64_t threads) {
  const int32_t* ids = pages.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < pages.size(0); ++i)
    TORCH_CHECK_INDEX(ids[i] >= 0 && ids[i] < k_codes.size(0), "pages[", i, "] is ", ids[i], ": the pool has ",
                      k_codes.size(0), " pages");
  auto run = [&]<class T>(T) {
    dequantise_pool<T>(k_codes, k_scale, pages, four, false, k, threads);
    dequantise_pool<T>(v_codes, v_scale, pages, four, true, v, threads);
  };
  k.scalar_type() == at::kFloat ? run(float{}) : run(bf16{});
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def(
      "quantize_pages(Tensor k, Tensor v, int bits, Tensor(a!) k_codes, Tensor(b!) v_codes, Tensor(c!) k_scale, "
      "Tensor(d!) v_scale, int threads) -> ()",
      &agentctx::quantize_pages);
  m.def(
      "dequantize_pages(Tensor k_codes, Tensor v_codes, Tensor k_scale, Tensor v_scale, Tensor pages, bool four, "
      "Tensor(a!) k, Tensor(b!) v, int threads) -> ()",
      &agentctx::dequantize_pages);
}
