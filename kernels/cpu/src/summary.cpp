// Summaries of blocks: extremes, means and sub-block means of keys, norms of values, 2-bit codes of rotated keys.
// Chunks of sixteen blocks of one head are the unit of work; a chunk writes whole cache lines of "minmax".
#include "blocks.h"

namespace agentctx {
namespace {

constexpr int64_t GROUP = 16;  // tokens of a vector, and of half a sub-block mean
constexpr int64_t GROUPS = TILE / GROUP;
constexpr int64_t CHUNK = 16;
constexpr int64_t MOST = 256;  // channels

typedef int8_t v16i8 __attribute__((vector_size(16)));
typedef int16_t v16i16 __attribute__((vector_size(32)));

// Sixteen bytes as integers, sign extended; in two steps because GCC 12 takes one of four times the width by lanes.
inline vi widen_bytes(const void* at) {
  return __builtin_convertvector(__builtin_convertvector(load_as<v16i8>(at), v16i16), vi);
}
// The low or the high nibbles of sixteen bytes, sign extended.
inline vi widen_nibbles(const void* at, bool low) {
  const vi x = widen_bytes(at);
  return low ? (x << 28) >> 28 : x >> 4;
}
inline vf to_float(vi x) { return __builtin_convertvector(x, vf); }

template <int... I>
inline vf shuffle(vf a, vf b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vi{I...});
#endif
}

// Lane i of the result: the lanes of x[i] reduced by `op`, in an order that is the same for every level.
template <class Op>
inline vf across(vf* x, Op op) {
  for (int i = 0; i < 8; ++i)
    x[i] = op(shuffle<0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23>(x[i], x[i + 8]),
              shuffle<8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31>(x[i], x[i + 8]));
  for (int i = 0; i < 4; ++i)
    x[i] = op(shuffle<0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27>(x[i], x[i + 4]),
              shuffle<4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31>(x[i], x[i + 4]));
  for (int i = 0; i < 2; ++i)
    x[i] = op(shuffle<0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29>(x[i], x[i + 2]),
              shuffle<2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31>(x[i], x[i + 2]));
  return op(shuffle<0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30>(x[0], x[1]),
            shuffle<1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31>(x[0], x[1]));
}

constexpr auto add = [](vf a, vf b) { return a + b; };
constexpr auto higher = [](vf a, vf b) { return vmax(a, b); };
constexpr auto lower = [](vf a, vf b) { return vmin(a, b); };

inline vf even_halves(const void* words) { return (vf)(load_as<vu>(words) << 16); }
inline vf odd_halves(const void* words) { return (vf)(load_as<vu>(words) & 0xffff0000u); }

// How a format gives up its values. `rows`: at(t, c), sixteen channels from c on of token t. Columns: at(g, c), the
// sixteen tokens of group g in channel c.
template <class T>
struct PlainRows {
  static constexpr bool rows = true;
  const T* data;
  int64_t size;
  vf at(int64_t t, int64_t c) const { return load(data + t * size + c); }
};
struct Int8Rows {
  static constexpr bool rows = true;
  const int8_t* data;
  const bf16* scale;
  int64_t size;
  vf at(int64_t t, int64_t c) const {
    return to_float(widen_bytes(data + t * size + c)) * load(scale + c);
  }
};
struct Int4Rows {
  static constexpr bool rows = true;
  const uint8_t* data;
  const bf16* scale;
  int64_t size;
  vf at(int64_t t, int64_t c) const {
    const int64_t half = size / 2;
    const bool low = c < half;
    return to_float(widen_nibbles(data + t * half + (low ? c : c - half), low)) * load(scale + c);
  }
};
struct PairRows {  // bfloat16 V: pairs of tokens
  static constexpr bool rows = true;
  const bf16* data;
  int64_t size;
  vf at(int64_t t, int64_t c) const {
    const bf16* words = data + (t / 2) * 2 * size + 2 * c;
    return t % 2 ? odd_halves(words) : even_halves(words);
  }
};
struct PlainColumns {
  static constexpr bool rows = false;
  const float* data;
  vf at(int64_t g, int64_t c) const { return load(data + c * TILE + g * GROUP); }
};
struct PairColumns {  // bfloat16 K: pairs of channels
  static constexpr bool rows = false;
  const bf16* data;
  vf at(int64_t g, int64_t c) const {
    const bf16* words = data + (c / 2) * 2 * TILE + 2 * g * GROUP;
    return c % 2 ? odd_halves(words) : even_halves(words);
  }
};
struct Int8Columns {
  static constexpr bool rows = false;
  const int8_t* data;
  const bf16* scale;
  vf at(int64_t g, int64_t c) const {
    return to_float(widen_bytes(data + c * TILE + g * GROUP)) * widen(scale[c]);
  }
};
struct Int4Columns {
  static constexpr bool rows = false;
  const uint8_t* data;
  const bf16* scale;
  int64_t size;
  vf at(int64_t g, int64_t c) const {
    const int64_t half = size / 2;
    const bool low = c < half;
    return to_float(widen_nibbles(data + (low ? c : c - half) * TILE + g * GROUP, low)) * widen(scale[c]);
  }
};

// f(the values of K of a page), by format.
template <class F>
void with_keys(const Pool& pool, int64_t page, int64_t head, const F& f) {
  const char* at = pool.k_at(page, head);
  const bool wide = pool.k_bytes == 4;
  switch (pool.format) {
    case Format::paged:
      return wide ? f(PlainRows<float>{(const float*)at, pool.size}) : f(PlainRows<bf16>{(const bf16*)at, pool.size});
    case Format::packed:
      return wide ? f(PlainColumns{(const float*)at}) : f(PairColumns{(const bf16*)at});
    case Format::int8:
      return f(Int8Rows{(const int8_t*)at, pool.k_scale_at(page, head), pool.size});
    case Format::int4:
      return f(Int4Rows{(const uint8_t*)at, pool.k_scale_at(page, head), pool.size});
  }
}
template <class F>
void with_values(const Pool& pool, int64_t page, int64_t head, const F& f) {
  const char* at = pool.v_at(page, head);
  const bool wide = pool.k_bytes == 4;
  switch (pool.format) {
    case Format::paged:
      return wide ? f(PlainRows<float>{(const float*)at, pool.size}) : f(PlainRows<bf16>{(const bf16*)at, pool.size});
    case Format::packed:
      return wide ? f(PlainRows<float>{(const float*)at, pool.size}) : f(PairRows{(const bf16*)at, pool.size});
    case Format::int8:
      return f(Int8Columns{(const int8_t*)at, pool.v_scale_at(page, head)});
    case Format::int4:
      return f(Int4Columns{(const uint8_t*)at, pool.v_scale_at(page, head), pool.size});
  }
}

// The extremes of each channel over the first n >= 1 tokens.
template <class S>
void extremes(const S& x, int64_t size, int64_t n, float* high, float* low) {
  for (int64_t c = 0; c < size; c += LANES) {
    if constexpr (S::rows) {
      vf h = x.at(0, c), l = h;
      for (int64_t t = 1; t < n; ++t) {
        const vf y = x.at(t, c);
        h = vmax(h, y), l = vmin(l, y);
      }
      store(high + c, h), store(low + c, l);
    } else {
      vf h[LANES], l[LANES];
      for (int i = 0; i < LANES; ++i) {
        if (n == TILE) {
          const vf a = x.at(0, c + i), b = x.at(1, c + i), d = x.at(2, c + i), e = x.at(3, c + i);
          h[i] = vmax(vmax(a, b), vmax(d, e));
          l[i] = vmin(vmin(a, b), vmin(d, e));
        } else {
          h[i] = splat(NEG_INF), l[i] = splat(-NEG_INF);
          for (int64_t g = 0; g * GROUP < n; ++g) {
            const vf y = x.at(g, c + i);
            h[i] = vmax(h[i], first_lanes(y, n - g * GROUP, NEG_INF));
            l[i] = vmin(l[i], first_lanes(y, n - g * GROUP, -NEG_INF));
          }
        }
      }
      store(high + c, across(h, higher)), store(low + c, across(l, lower));
    }
  }
}

// The sum of each channel over the first n tokens of group g; n may be negative or above sixteen.
template <class S>
void group_sum(const S& x, int64_t size, int64_t g, int64_t n, float* sum) {
  n = std::clamp<int64_t>(n, 0, GROUP);
  for (int64_t c = 0; c < size; c += LANES) {
    if constexpr (S::rows) {
      vf s = {};
      for (int64_t t = 0; t < n; ++t) s += x.at(g * GROUP + t, c);
      store(sum + c, s);
    } else {
      vf s[LANES];
      for (int i = 0; i < LANES; ++i) s[i] = n == GROUP ? x.at(g, c + i) : first_lanes(x.at(g, c + i), n, 0.f);
      store(sum + c, across(s, add));
    }
  }
}

template <class S>
float largest_norm(const S& x, int64_t size, int64_t n) {
  vf best = {};
  for (int64_t g = 0; g * GROUP < n; ++g) {
    vf norms = {};
    if constexpr (S::rows) {
      vf s[LANES] = {};
      for (int i = 0; i < LANES; ++i)
        for (int64_t c = 0; c < size; c += LANES) {
          const vf y = x.at(g * GROUP + i, c);
          s[i] += y * y;
        }
      norms = across(s, add);
    } else {
      for (int64_t c = 0; c < size; ++c) {
        const vf y = x.at(g, c);
        norms += y * y;
      }
    }
    best = vmax(best, first_lanes(norms, n - g * GROUP, 0.f));
  }
  return std::sqrt(hmax(best));
}

// Column g of K as floats, [size] vectors of sixteen tokens.
template <class S>
void columns(const S& x, int64_t size, int64_t g, vf* out) {
  for (int64_t c = 0; c < size; c += LANES) {
    if constexpr (S::rows) {
      float block[LANES][LANES];  // [token][channel]
      for (int i = 0; i < LANES; ++i) store(block[i], x.at(g * GROUP + i, c));
      for (int j = 0; j < LANES; ++j)
        for (int i = 0; i < LANES; ++i) out[c + j][i] = block[i][j];
    } else {
      for (int i = 0; i < LANES; ++i) out[c + i] = x.at(g, c + i);
    }
  }
}

// The butterflies of the Walsh-Hadamard transform over `size` vectors, unnormalised; two levels in a pass.
inline void butterflies(vf* x, int64_t size) {
  int64_t step = 1;
  for (; step * 2 < size; step *= 4)
    for (int64_t i = 0; i < size; i += 4 * step)
      for (int64_t j = i; j < i + step; ++j) {
        const vf a = x[j] + x[j + step], b = x[j] - x[j + step];
        const vf c = x[j + 2 * step] + x[j + 3 * step], d = x[j + 2 * step] - x[j + 3 * step];
        x[j] = a + c, x[j + step] = b + d, x[j + 2 * step] = a - c, x[j + 3 * step] = b - d;
      }
  if (step < size)
    for (int64_t j = 0; j < step; ++j) {
      const vf a = x[j] + x[j + step], b = x[j] - x[j + step];
      x[j] = a, x[j + step] = b;
    }
}

// 2-bit codes of the first n tokens, [TILE][size / 4] bytes; the others are 0. `t` is the threshold times sqrt(size).
template <class S>
void codes(const S& x, int64_t size, int64_t n, float t, uint8_t* out) {
  const int64_t bytes = size / 4, words = size / 16;
  vf y[MOST];
  std::memset(out, 0, TILE * bytes);
  for (int64_t g = 0; g * GROUP < n; ++g) {
    columns(x, size, g, y);
    butterflies(y, size);
    for (int64_t w = 0; w < words; ++w) {
      vi word = {};
      for (int j = 0; j < 4; ++j)
        for (int m = 0; m < 4; ++m) {
          const vf z = y[4 * w + j + m * bytes];
          word -= ((vi)(z > -t) + (vi)(z > 0.f) + (vi)(z > t)) << (8 * j + 2 * m);
        }
      for (int64_t i = 0; i < std::min(GROUP, n - g * GROUP); ++i) {
        const int32_t four = word[i];
        std::memcpy(out + (g * GROUP + i) * bytes + 4 * w, &four, 4);
      }
    }
  }
}

// Asks for the page that is read next: pages lie anywhere, and the processor's own prefetch ends with a page.
inline void prefetch(const Blocks& blocks, int64_t block, int64_t last, int64_t head, bool values = false) {
  if (block >= last) return;
  const Pool& pool = blocks.pool;
  const int64_t page = blocks.page(block), per_byte = pool.format == Format::int4 ? 2 : 1;
  const char* at = values ? pool.v_at(page, head) : pool.k_at(page, head);
  for (int64_t i = 0; i < TILE * pool.size * pool.k_bytes / per_byte; i += 64) __builtin_prefetch(at + i, 0, 2);
}

void minmax(const Blocks& blocks, int64_t head, int64_t first, int64_t last, float* data, int64_t capacity) {
  const int64_t size = blocks.pool.size;
  alignas(64) float found[CHUNK][2 * MOST];
  bool known[CHUNK];
  for (int64_t i = first; i < last; ++i) {
    const int64_t page = blocks.page(i), n = blocks.held(i, page);
    float* high = found[i - first];
    prefetch(blocks, i + 1, last, head);
    known[i - first] = n > 0;
    if (n > 0) with_keys(blocks.pool, page, head, [&](const auto& x) { extremes(x, size, n, high, high + size); });
  }
  for (int64_t d = 0; d < 2 * size; ++d)
    for (int64_t i = first; i < last; ++i)
      if (known[i - first]) data[d * capacity + i] = found[i - first][d];
}

template <class T>
void means(const Blocks& blocks, int64_t head, int64_t first, int64_t last, T* data) {
  const int64_t size = blocks.pool.size;
  alignas(64) float sum[GROUPS][MOST];
  for (int64_t i = first; i < last; ++i) {
    const int64_t page = blocks.page(i), n = blocks.held(i, page);
    if (n <= 0) continue;
    prefetch(blocks, i + 1, last, head);
    with_keys(blocks.pool, page, head, [&](const auto& x) {
      for (int64_t g = 0; g < GROUPS; ++g) group_sum(x, size, g, n - g * GROUP, sum[g]);
    });
    for (int64_t c = 0; c < size; c += LANES)
      store(data + i * size + c, ((load(sum[0] + c) + load(sum[1] + c)) + (load(sum[2] + c) + load(sum[3] + c))) / float(n));
  }
}

template <class T>
void submeans(const Blocks& blocks, int64_t head, int64_t first, int64_t last, T* data) {
  const int64_t size = blocks.pool.size;
  alignas(64) float sum[GROUPS + 1][MOST];
  int64_t count[GROUPS + 1];
  const auto group = [&](int64_t i, int64_t from, int64_t to, int64_t at) {
    const int64_t page = blocks.page(i), n = blocks.held(i, page);
    with_keys(blocks.pool, page, head, [&](const auto& x) {
      for (int64_t g = from; g < to; ++g) group_sum(x, size, g, n - g * GROUP, sum[at + g]);
    });
    for (int64_t g = from; g < to; ++g) count[at + g] = std::clamp<int64_t>(n - g * GROUP, 0, GROUP);
  };
  group(first, 0, 1, 0);
  for (int64_t i = first; i < last; ++i) {
    prefetch(blocks, i + 1, last, head);
    group(i, 1, GROUPS, 0);
    if (i + 1 < blocks.count) {
      group(i + 1, 0, 1, GROUPS);
    } else {
      count[GROUPS] = 0;
      std::memset(sum[GROUPS], 0, sizeof(float) * size);
    }
    for (int64_t w = 0; w < GROUPS; ++w)
      if (const int64_t n = count[w] + count[w + 1]; n > 0)
        for (int64_t c = 0; c < size; c += LANES)
          store(data + (i * GROUPS + w) * size + c, (load(sum[w] + c) + load(sum[w + 1] + c)) / float(n));
    count[0] = count[GROUPS];
    std::memcpy(sum[0], sum[GROUPS], sizeof(float) * size);
  }
}

// f(b, head, first, last, its sequence) for chunks of the blocks from `from` on, cut at multiples of CHUNK.
template <class F>
void each_chunk(const Pool& pool, const at::Tensor& table, const at::Tensor& lens, int64_t from, int64_t threads,
                const F& f) {
  const int64_t head_chunks = (table.size(1) + CHUNK - 1) / CHUNK - from / CHUNK;
  parallel(table.size(0) * pool.n_heads * head_chunks, threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item % head_chunks, head = item / head_chunks % pool.n_heads;
      const int64_t b = item / head_chunks / pool.n_heads;
      const Blocks blocks(pool, table, lens, b);
      const int64_t start = (from / CHUNK + chunk) * CHUNK;
      const int64_t first = std::max(from, start), last = std::min(blocks.count, start + CHUNK);
      if (first < last) f(b, head, first, last, blocks, item);
    }
  });
}

}  // namespace

void build_summary(const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& k_scale,
                   const std::optional<at::Tensor>& v_scale, const std::optional<at::Tensor>& page_valid,
                   std::string_view format, int64_t size, const at::Tensor& table, const at::Tensor& lens,
                   std::string_view kind, int64_t from, const at::Tensor& data,
                   const std::optional<at::Tensor>& thresholds, int64_t threads) {
  const Pool pool(k, v, k_scale, v_scale, page_valid, format, size);
  const int64_t a_head = data.stride(1), capacity = data.size(-1);
  char* to = (char*)data.mutable_data_ptr();
  const int64_t bytes = data.element_size();
  const at::Tensor at_most = thresholds ? thresholds->contiguous() : at::Tensor();
  each_chunk(pool, table, lens, from, threads,
             [&](int64_t b, int64_t head, int64_t first, int64_t last, const Blocks& blocks, int64_t) {
    char* out = to + (b * data.stride(0) + head * a_head) * bytes;
    if (kind == "minmax") {
      minmax(blocks, head, first, last, (float*)out, capacity);
    } else if (kind == "mean") {
      bytes == 4 ? means(blocks, head, first, last, (float*)out) : means(blocks, head, first, last, (bf16*)out);
    } else if (kind == "submeans") {
      bytes == 4 ? submeans(blocks, head, first, last, (float*)out) : submeans(blocks, head, first, last, (bf16*)out);
    } else {
      for (int64_t i = first; i < last; ++i) {
        const int64_t page = blocks.page(i), n = blocks.held(i, page);
        if (n <= 0) continue;
        if (kind == "vmax") {
          prefetch(blocks, i + 1, last, head, true);
          with_values(pool, page, head, [&](const auto& x) { ((float*)out)[i] = largest_norm(x, size, n); });
        } else {
          const float t = at_most.const_data_ptr<float>()[head] * std::sqrt(float(size));
          prefetch(blocks, i + 1, last, head);
          uint8_t* bits = (uint8_t*)out + i * TILE * (size / 4);
          with_keys(pool, page, head, [&](const auto& x) { codes(x, size, n, t, bits); });
        }
      }
    }
  });
}

// The standard deviation of the rotated keys of each head, float32 [Hkv]. A rotation keeps the sum of squares, and the
// rotated channels of a key x sum to sqrt(size) x[0].
at::Tensor key_spread(const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& k_scale,
                      const std::optional<at::Tensor>& v_scale, const std::optional<at::Tensor>& page_valid,
                      std::string_view format, int64_t size, const at::Tensor& table, const at::Tensor& lens,
                      int64_t from, int64_t threads) {
  const Pool pool(k, v, k_scale, v_scale, page_valid, format, size);
  struct Part {
    double squares = 0, firsts = 0, tokens = 0;
  };
  const int64_t chunks = (table.size(1) + CHUNK - 1) / CHUNK - from / CHUNK;
  std::vector<Part> parts(table.size(0) * pool.n_heads * chunks);
  each_chunk(pool, table, lens, from, threads,
             [&](int64_t, int64_t head, int64_t first, int64_t last, const Blocks& blocks, int64_t item) {
    Part& part = parts[item];
    vf y[MOST];
    for (int64_t i = first; i < last; ++i) {
      const int64_t page = blocks.page(i), n = blocks.held(i, page);
      for (int64_t g = 0; g * GROUP < n; ++g) {
        with_keys(pool, page, head, [&](const auto& x) { columns(x, size, g, y); });
        vf squares = {};
        for (int64_t c = 0; c < size; ++c) squares += y[c] * y[c];
        part.squares += hsum(first_lanes(squares, n - g * GROUP, 0.f));
        part.firsts += hsum(first_lanes(y[0], n - g * GROUP, 0.f));
      }
      part.tokens += std::max<int64_t>(n, 0);
    }
  });
  at::Tensor spread = at::zeros({pool.n_heads}, at::kFloat);
  for (int64_t head = 0; head < pool.n_heads; ++head) {
    Part whole;
    for (int64_t item = 0; item < int64_t(parts.size()); ++item)
      if (item / chunks % pool.n_heads == head) {
        whole.squares += parts[item].squares;
        whole.firsts += parts[item].firsts;
        whole.tokens += parts[item].tokens;
      }
    if (whole.tokens == 0) continue;
    const double elements = whole.tokens * size, mean = whole.firsts * std::sqrt(double(size)) / elements;
    spread.mutable_data_ptr<float>()[head] = std::sqrt(std::max(0.0, whole.squares / elements - mean * mean));
  }
  return spread;
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("build_summary(" AGENTCTX_POOL ", Tensor table, Tensor lens, str kind, int first_block, Tensor(a!) data, "
        "Tensor? thresholds, int threads) -> ()",
        &agentctx::build_summary);
  m.def("key_spread(" AGENTCTX_POOL ", Tensor table, Tensor lens, int first_block, int threads) -> Tensor",
        &agentctx::key_spread);
}
