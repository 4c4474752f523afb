// Tokens into pages, pages between layouts, and the summaries of the blocks that were touched.
#include "tile.h"

namespace agentctx {
namespace {

// Where the tiles of a pool lie; strides in elements.
struct Tiles {
  char* data;
  int64_t page, head, bytes;
  explicit Tiles(const at::Tensor& x)
      : data((char*)x.data_ptr()), page(x.stride(0)), head(x.stride(1)), bytes(x.element_size()) {}
  template <class T>
  T* at(int64_t p, int64_t h) const { return (T*)(data + (p * page + h * head) * bytes); }
};

// Slots [slot, slot + n) of a packed K tile from rows `row` elements apart. A word is one float, or a pair of
// bfloat16 channels, so both layouts are a transpose of words.
template <class T>
void put_k(const T* rows, int64_t row, int64_t slot, int64_t n, int64_t size, T* tile) {
  uint32_t* words = (uint32_t*)tile + slot;
  const int64_t columns = size * sizeof(T) / 4;
  int64_t c = 0;
  for (; c + LANES <= columns; c += LANES)
    for (int64_t t = 0; t < n; ++t) {
      const vu x = load_as<vu>((const char*)(rows + t * row) + 4 * c);
      for (int i = 0; i < LANES; ++i) words[(c + i) * TILE + t] = x[i];
    }
  for (; c < columns; ++c)
    for (int64_t t = 0; t < n; ++t) std::memcpy(words + c * TILE + t, (const char*)(rows + t * row) + 4 * c, 4);
}

// The same of a packed V tile.
void put_v(const float* rows, int64_t row, int64_t slot, int64_t n, int64_t size, float* tile) {
  for (int64_t t = 0; t < n; ++t) std::memcpy(tile + (slot + t) * size, rows + t * row, size * sizeof(float));
}
void put_v(const bf16* rows, int64_t row, int64_t slot, int64_t n, int64_t size, bf16* tile) {
  for (int64_t t = 0; t < n; ++t) {
    const bf16* x = rows + t * row;
    bf16* to = tile + (slot + t) / 2 * 2 * size + ((slot + t) & 1);
    if (((slot + t) & 1) == 0 && t + 1 < n) {  // both of a pair: one pass of words
      const bf16* y = x + row;
      uint32_t* words = (uint32_t*)to;
      for (int64_t d = 0; d < size; ++d) words[d] = x[d].bits | uint32_t(y[d].bits) << 16;
      ++t;
    } else {
      for (int64_t d = 0; d < size; ++d) to[2 * d] = x[d];
    }
  }
}

// Back to rows of `size`.
template <class T>
void take_k(const T* tile, int64_t size, T* rows) {
  const uint32_t* words = (const uint32_t*)tile;
  const int64_t columns = size * sizeof(T) / 4;
  for (int64_t t = 0; t < TILE; ++t)
    for (int64_t c = 0; c < columns; ++c) std::memcpy((char*)(rows + t * size) + 4 * c, words + c * TILE + t, 4);
}
template <class T>
void take_v(const T* tile, int64_t size, T* rows) {
  if constexpr (sizeof(T) == 4) std::memcpy(rows, tile, sizeof(T) * TILE * size);
  else
    for (int64_t t = 0; t < TILE; ++t)
      for (int64_t d = 0; d < size; ++d) rows[t * size + d] = tile[t / 2 * 2 * size + 2 * d + (t & 1)];
}

struct Add {
  static constexpr float none = 0.f;
  template <class V>
  V operator()(V a, V b) const { return a + b; }
};
struct Larger {
  static constexpr float none = NEG_INF;
  template <class V>
  V operator()(V a, V b) const { return a > b ? a : b; }
};
struct Smaller {
  static constexpr float none = -NEG_INF;
  template <class V>
  V operator()(V a, V b) const { return a < b ? a : b; }
};

template <class Op>
inline float reduce(vf x, Op op) {
  typedef float v8 __attribute__((vector_size(32)));
  typedef float v4 __attribute__((vector_size(16)));
  v8 low, high;
  std::memcpy(&low, &x, 32);
  std::memcpy(&high, (char*)&x + 32, 32);
  low = op(low, high);
  v4 a, b;
  std::memcpy(&a, &low, 16);
  std::memcpy(&b, (char*)&low + 16, 16);
  a = op(a, b);
  return op(op(a[0], a[2]), op(a[1], a[3]));
}

// out[d] = op over the tokens [from, to) of a K tile, joined to what out[d] holds.
template <class T, class Op>
void fold(const T* tile, bool packed, int64_t size, int64_t from, int64_t to, Op op, float* out) {
  if (packed) {
    vi lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    const int64_t words = size * sizeof(T) / 4;
    for (int64_t c = 0; c < words; ++c) {
      const uint32_t* row = (const uint32_t*)tile + c * TILE;
      vf even = splat(Op::none), odd = even;
      for (int64_t t = from / LANES * LANES; t < to; t += LANES) {
        const vi at = lane + int32_t(t), live = (at >= int32_t(from)) & (at < int32_t(to));
        const vu x = load_as<vu>(row + t);
        if constexpr (sizeof(T) == 4) {
          even = op(even, select(live, (vf)x, splat(Op::none)));
        } else {
          even = op(even, select(live, (vf)(x << 16), splat(Op::none)));
          odd = op(odd, select(live, (vf)(x & 0xffff0000u), splat(Op::none)));
        }
      }
      if constexpr (sizeof(T) == 4) {
        out[c] = op(out[c], reduce(even, op));
      } else {
        out[2 * c] = op(out[2 * c], reduce(even, op));
        out[2 * c + 1] = op(out[2 * c + 1], reduce(odd, op));
      }
    }
    return;
  }
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) {
    vf sum = load(out + d);
    for (int64_t t = from; t < to; ++t) sum = op(sum, load(tile + t * size + d));
    store(out + d, sum);
  }
  for (; d < size; ++d)
    for (int64_t t = from; t < to; ++t) out[d] = op(out[d], to_float(tile[t * size + d]));
}

// The largest norm of the first n rows of a V tile.
template <class T>
float largest_norm(const T* tile, bool packed, int64_t size, int64_t n) {
  const bool pairs = packed && sizeof(T) == 2;
  float best = 0;
  for (int64_t t = 0; t < n; ++t) {
    const T* row = pairs ? tile + t / 2 * 2 * size : tile + t * size;
    vf sum{};
    float rest = 0;
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES) {
      vf x;
      if (pairs) {
        const vu words = load_as<vu>(row + 2 * d);
        x = (vf)(t & 1 ? words & 0xffff0000u : words << 16);
      } else {
        x = load(row + d);
      }
      sum += x * x;
    }
    for (; d < size; ++d) {
      const float x = to_float(pairs ? row[2 * d + (t & 1)] : row[d]);
      rest += x * x;
    }
    best = std::max(best, hsum(sum) + rest);
  }
  return std::sqrt(best);
}

enum Kind { MINMAX, MEAN, SUBMEANS, VMAX };
constexpr int64_t STEP = 16, SPAN = 32;  // submeans: means of 32 keys every 16

// One sequence: what its tokens are, where they go.
struct Sequence {
  const int32_t* pages;
  int64_t first, last, end;  // blocks touched, and tokens held afterwards
};

template <class T>
struct Writer {
  Tiles k, v;
  bool packed;
  int64_t page, size;
  std::vector<float> sums;

  // The summary entries of a head that depend on the touched blocks.
  void summarise(const Sequence& s, int64_t head, Kind kind, const at::Tensor& data, int64_t b) {
    const auto of = data.strides();
    char* base = (char*)data.data_ptr() + (b * of[0] + head * of[1]) * data.element_size();
    if (kind == SUBMEANS) {
      for (int64_t i = std::max<int64_t>(0, s.first * (page / STEP) - 1); i < (s.last + 1) * (page / STEP); ++i)
        mean(s, head, i * STEP, i * STEP + SPAN, (T*)base + i * of[2], of[3]);
      return;
    }
    for (int64_t block = s.first; block <= s.last; ++block) {
      const int64_t n = std::min(page, s.end - block * page);
      if (kind == MEAN) {
        mean(s, head, block * page, block * page + n, (T*)base + block * of[2], of[3]);
      } else if (kind == VMAX) {
        ((float*)base)[block * of[2]] = largest_norm(v.at<T>(s.pages[block], head), packed, size, n);
      } else {
        const T* tile = k.at<T>(s.pages[block], head);
        float* to = (float*)base + block * of[3];
        extremes(tile, n, Larger{}, to, of[2]);
        extremes(tile, n, Smaller{}, to + size * of[2], of[2]);
      }
    }
  }

  template <class Op>
  void extremes(const T* tile, int64_t n, Op op, float* out, int64_t stride) {
    sums.assign(size, Op::none);
    fold(tile, packed, size, 0, n, op, sums.data());
    for (int64_t d = 0; d < size; ++d) out[d * stride] = sums[d];
  }

  // The mean of the keys at positions [from, to) that the sequence holds; 0 where it holds none.
  void mean(const Sequence& s, int64_t head, int64_t from, int64_t to, T* out, int64_t stride) {
    to = std::min(to, s.end);
    sums.assign(size, 0.f);
    for (int64_t t = from; t < to;) {
      const int64_t block = t / page, stop = std::min(to, (block + 1) * page);
      fold(k.at<T>(s.pages[block], head), packed, size, t - block * page, stop - block * page, Add{}, sums.data());
      t = stop;
    }
    const float n = float(std::max<int64_t>(1, to - from));
    for (int64_t d = 0; d < size; ++d) out[d * stride] = from_float<T>(sums[d] / n);
  }
};

// The touched blocks of every sequence. Everything is checked before anything is written.
std::vector<Sequence> sequences(int64_t tokens, const at::Tensor& table, const at::Tensor& start, int64_t page,
                                int64_t n_pages, at::TensorList data, at::IntArrayRef kinds) {
  std::vector<Sequence> found(table.size(0));
  const int64_t blocks = table.size(1);
  for (int64_t b = 0; b < table.size(0); ++b) {
    const int64_t at = start.const_data_ptr<int32_t>()[b * start.stride(0)];
    Sequence& s = found[b];
    s = {table.const_data_ptr<int32_t>() + b * table.stride(0), at / page, (at + tokens - 1) / page, at + tokens};
    TORCH_CHECK_INDEX(at >= 0 && s.last < blocks, "start_pos[", b, "] is ", at, ": ", tokens,
                      " tokens from there do not fit the ", blocks, " blocks of ", page, " of block_table");
    int64_t from = s.first;
    for (size_t i = 0; i < kinds.size(); ++i) {
      const int64_t room = kinds[i] == MINMAX ? data[i].size(3) : data[i].size(2) / (kinds[i] == SUBMEANS ? page / STEP : 1);
      TORCH_CHECK_INDEX(s.last < room, "start_pos[", b, "] is ", at, ": block ", s.last, " does not fit a summary of ",
                        room, " blocks");
      if (kinds[i] == SUBMEANS) from = std::max<int64_t>(0, s.first - 1);
    }
    for (int64_t i = from; i <= s.last; ++i)
      TORCH_CHECK_INDEX(s.pages[i] >= 0 && s.pages[i] < n_pages, "block_table[", b, ", ", i, "] is ", s.pages[i],
                        ": the pool has ", n_pages, " pages");
  }
  return found;
}

template <class T>
void write(const at::Tensor& k_pool, const at::Tensor& v_pool, bool packed, int64_t page, const at::Tensor& k,
           const at::Tensor& v, const std::vector<Sequence>& all, at::TensorList data, at::IntArrayRef kinds,
           int64_t threads) {
  const int64_t heads = k.size(1), tokens = k.size(2), size = k.size(3);
  const Tiles k_tiles(k_pool), v_tiles(v_pool);
  parallel(k.size(0) * heads, threads, [&](int64_t begin, int64_t end) {
    Writer<T> writer{k_tiles, v_tiles, packed, page, size, {}};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / heads, h = i % heads;
      const Sequence& s = all[b];
      const T* k_rows = (const T*)k.const_data_ptr() + b * k.stride(0) + h * k.stride(1);
      const T* v_rows = (const T*)v.const_data_ptr() + b * v.stride(0) + h * v.stride(1);
      const int64_t kr = k.stride(2), vr = v.stride(2), began = s.end - tokens;
      for (int64_t block = s.first; block <= s.last; ++block) {
        const int64_t from = std::max(began, block * page), to = std::min(s.end, (block + 1) * page);
        const int64_t slot = from - block * page, n = to - from;
        T *k_tile = k_tiles.at<T>(s.pages[block], h), *v_tile = v_tiles.at<T>(s.pages[block], h);
        const T *ks = k_rows + (from - began) * kr, *vs = v_rows + (from - began) * vr;
        if (packed) {
          put_k(ks, kr, slot, n, size, k_tile);
          put_v(vs, vr, slot, n, size, v_tile);
        } else {
          for (int64_t t = 0; t < n; ++t) {
            std::memcpy(k_tile + (slot + t) * size, ks + t * kr, size * sizeof(T));
            std::memcpy(v_tile + (slot + t) * size, vs + t * vr, size * sizeof(T));
          }
        }
      }
      for (size_t j = 0; j < kinds.size(); ++j) writer.summarise(s, h, Kind(kinds[j]), data[j], b);
    }
  });
}

template <class T>
void repack(const at::Tensor& k, const at::Tensor& v, const at::Tensor& to_k, const at::Tensor& to_v, bool pack,
            int64_t size, int64_t threads) {
  const int64_t heads = k.size(1);
  const Tiles fk(k), fv(v), tk(to_k), tv(to_v);
  parallel(k.size(0) * heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = i / heads, h = i % heads;
      if (pack) {
        put_k(fk.at<T>(p, h), size, 0, TILE, size, tk.at<T>(p, h));
        put_v(fv.at<T>(p, h), size, 0, TILE, size, tv.at<T>(p, h));
      } else {
        take_k(fk.at<T>(p, h), size, tk.at<T>(p, h));
        take_v(fv.at<T>(p, h), size, tv.at<T>(p, h));
      }
    }
  });
}

}  // namespace

void write_kv(const at::Tensor& k_pool, const at::Tensor& v_pool, bool packed, int64_t page, const at::Tensor& k,
              const at::Tensor& v, const at::Tensor& table, const at::Tensor& start, at::TensorList data,
              at::IntArrayRef kinds, int64_t threads) {
  const auto all = sequences(k.size(2), table, start, page, k_pool.size(0), data, kinds);
  if (k.scalar_type() == at::kFloat)
    write<float>(k_pool, v_pool, packed, page, k, v, all, data, kinds, threads);
  else
    write<bf16>(k_pool, v_pool, packed, page, k, v, all, data, kinds, threads);
}

void repack_pages(const at::Tensor& k, const at::Tensor& v, const at::Tensor& to_k, const at::Tensor& to_v, bool pack,
                  int64_t size, int64_t threads) {
  if (k.scalar_type() == at::kFloat)
    repack<float>(k, v, to_k, to_v, pack, size, threads);
  else
    repack<bf16>(k, v, to_k, to_v, pack, size, threads);
}

// ids [n, 2]: source page, destination page. One pair of pools, `bytes` of a page and head.
void copy_pages(const at::Tensor& src, const at::Tensor& dst, const at::Tensor& ids, int64_t bytes, int64_t threads) {
  const Tiles from(src), to(dst);
  const int64_t heads = src.size(1);
  const int32_t* pair = ids.const_data_ptr<int32_t>();
  parallel(ids.size(0), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t h = 0; h < heads; ++h)
        std::memcpy(to.at<char>(pair[2 * i + 1], h), from.at<char>(pair[2 * i], h), bytes);
  });
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def(
      "write_kv(Tensor(a!) k_pool, Tensor(b!) v_pool, bool packed, int page, Tensor k, Tensor v, Tensor table, "
      "Tensor start, Tensor(c!)[] data, int[] kinds, int threads) -> ()",
      &agentctx::write_kv);
  m.def(
      "repack_pages(Tensor k, Tensor v, Tensor(a!) to_k, Tensor(b!) to_v, bool pack, int size, int threads) -> ()",
      &agentctx::repack_pages);
  m.def("copy_pages(Tensor src, Tensor(a!) dst, Tensor ids, int bytes, int threads) -> ()", &agentctx::copy_pages);
}
