// The attention that each context token gets. Two passes over K by tiles: the first finds maximum and sum of each row,
// the second adds weight * exp2(score - maximum) / sum down the columns. Scores are recomputed, bit for bit, so masses
// sum to the weights. Rows are all of the query heads that share a KV head, six at a time in registers.
#include "blocks.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace agentctx {
namespace {

constexpr int64_t ROWS = 6;
constexpr int64_t CHUNK = 16;  // blocks in a unit of work
constexpr float LAZY = 64.f;   // a sum is rescaled when its maximum has grown by as many binary orders
constexpr float UNSEEN = -1e30f;

// The processor's own vector: accumulators of sixteen floats would spill where it is narrower.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, VECTORS = 4;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, VECTORS = 2;
#else
constexpr int WIDTH = 4, VECTORS = 2;
#endif
typedef float hv __attribute__((vector_size(4 * WIDTH)));

inline bool any_above(vf a, vf b) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#else
  typedef int64_t v8l __attribute__((vector_size(64)));
  const v8l m = (v8l)(vi)(a > b);
  return ((m[0] | m[1]) | (m[2] | m[3])) | ((m[4] | m[5]) | (m[6] | m[7]));
#endif
}

// R rows of a panel [size][R] against a tile [size][TILE]: dots [R][TILE].
template <int R>
void dots(const float* panel, const float* tile, int64_t size, float* out) {
  for (int64_t t = 0; t < TILE; t += WIDTH * VECTORS) {
    hv acc[R][VECTORS] = {};
    for (int64_t d = 0; d < size; ++d)
      for (int v = 0; v < VECTORS; ++v) {
        const hv k = load_as<hv>(tile + d * TILE + t + v * WIDTH);
        for (int r = 0; r < R; ++r) acc[r][v] += k * panel[d * R + r];
      }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < VECTORS; ++v) std::memcpy(out + r * TILE + t + v * WIDTH, &acc[r][v], sizeof(hv));
  }
}

#ifdef __AVX512BF16__
// The same for pairs of channels: panel [size / 2][R][2], tile [size / 2][TILE][2].
template <int R>
void dots(const bf16* panel, const bf16* tile, int64_t size, float* out) {
  vf acc[R][TILE / LANES] = {};
  for (int64_t d = 0; d < size / 2; ++d)
    for (int r = 0; r < R; ++r) {
      const uint32_t pair = load_as<uint32_t>(panel + (d * R + r) * 2);
      for (int v = 0; v < TILE / LANES; ++v)
        acc[r][v] = dot_pairs(acc[r][v], tile + (d * TILE + v * LANES) * 2, pair);
    }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < TILE / LANES; ++v) store(out + r * TILE + v * LANES, acc[r][v]);
}
#endif

template <class W>
void dots(int64_t rows, const W* panel, const W* tile, int64_t size, float* out) {
  switch (rows) {
    case 1: return dots<1>(panel, tile, size, out);
    case 2: return dots<2>(panel, tile, size, out);
    case 3: return dots<3>(panel, tile, size, out);
    case 4: return dots<4>(panel, tile, size, out);
    case 5: return dots<5>(panel, tile, size, out);
    default: return dots<6>(panel, tile, size, out);
  }
}

// Scores in binary orders: scale and soft cap.
struct Logits {
  float scale, cap;  // cap 0: none

  vf operator()(vf dot) const {
    if (cap == 0.f) return dot * (scale * LOG2E);
    const vf y = dot * (scale / cap), z = y * y;
    // tanh by its series near 0, where 1 - 2 / (e^2y + 1) would lose its digits
    const vf near = y * (((z * (62.f / 2835.f) - 17.f / 315.f) * z + 2.f / 15.f) * z * z - z * (1.f / 3.f) + 1.f);
    const vf x = vmax(vmin(y, splat(20.f)), splat(-20.f));
    const vf far = 1.f - 2.f / (exp2(x * (2.f * LOG2E)) + 1.f);
    return select(z < 0.09f, near, far) * (cap * LOG2E);
  }
};

// The rows of the query heads of one KV head, those of weight 0 left out.
template <class W>
struct Rows {
  int64_t count = 0;
  std::vector<W> panels;  // groups of ROWS rows (the last has the rest): [size][rows], bf16 [size / 2][rows][2]
  std::vector<int64_t> head, position, index;  // index: in [Hq][T]
  std::vector<float> weight, maximum, sum;

  void panel_of(const float* row, int64_t r, int64_t size, int64_t of) {
    const int64_t rows = std::min(ROWS, of - r / ROWS * ROWS);
    W* to = panels.data() + r / ROWS * ROWS * size;
    for (int64_t d = 0; d < size; ++d) {
      if constexpr (sizeof(W) == 4) {
        to[d * rows + r % ROWS] = row[d];
      } else {
        to[(d / 2 * rows + r % ROWS) * 2 + d % 2] = narrow(row[d]);
      }
    }
  }
  int64_t group(int64_t first) const { return std::min(ROWS, count - first); }
};

template <class W>
struct Scratch {
  std::vector<W> tile;
  std::vector<bf16> half;
  float scores[ROWS * TILE];
  explicit Scratch(int64_t size) : tile(TILE * size), half(sizeof(W) == 4 ? TILE * size : 0) {}

  const W* load_tile(const Pool& pool, int64_t page, int64_t kv_head) {
    if (sizeof(W) != 4 || pool.k_bytes != 2) return k_tile<W>(pool, page, kv_head, tile.data());
    const bf16* pairs = k_tile<bf16>(pool, page, kv_head, half.data());
    float* to = (float*)tile.data();
    for (int64_t d = 0; d < pool.size; d += 2)
      for (int64_t t = 0; t < TILE; t += LANES) {
        const vu words = load_as<vu>(pairs + d * TILE + 2 * t);
        store(to + d * TILE + t, (vf)(words << 16));
        store(to + (d + 1) * TILE + t, (vf)(words & 0xffff0000u));
      }
    return tile.data();
  }
};

// How many tokens of a block a row sees.
inline int64_t seen(const Blocks& blocks, int64_t block, int64_t page, int64_t position) {
  const int64_t held = blocks.held(block, page);
  return blocks.marked(page) ? held : std::min(held, position + 1 - block * TILE);
}

// Maximum and sum of each row over the blocks [first, last), in binary orders.
template <class W>
void row_sums(const Blocks& blocks, int64_t kv_head, int64_t first, int64_t last, const Rows<W>& rows,
              const Logits& logits, float* maximum, float* sum) {
  const int64_t size = blocks.pool.size;
  Scratch<W> scratch(size);
  std::vector<float> tops(rows.count * LANES, UNSEEN), sums(rows.count * LANES, 0.f);  // of each lane
  for (int64_t i = first; i < last; ++i) {
    const int64_t page = blocks.page(i);
    const W* tile = scratch.load_tile(blocks.pool, page, kv_head);
    for (int64_t g = 0; g < rows.count; g += ROWS) {
      const int64_t n = rows.group(g);
      dots(n, rows.panels.data() + g * size, tile, size, scratch.scores);
      for (int64_t r = 0; r < n; ++r) {
        const int64_t visible = seen(blocks, i, page, rows.position[g + r]);
        if (visible <= 0) continue;
        vf x[TILE / LANES];
        for (int v = 0; v < TILE / LANES; ++v) x[v] = logits(load(scratch.scores + r * TILE + v * LANES));
        if (visible < TILE)
          for (int v = 0; v < TILE / LANES; ++v) x[v] = first_lanes(x[v], visible - v * LANES, NEG_INF);
        float* top_at = tops.data() + (g + r) * LANES;
        float* sum_at = sums.data() + (g + r) * LANES;
        vf top = load(top_at), total = load(sum_at);
        const vf now = vmax(vmax(x[0], x[1]), vmax(x[2], x[3]));
        if (any_above(now, top + LAZY)) {
          const vf grown = vmax(top, now);
          total = total * exp2(top - grown);
          top = grown;
          store(top_at, top);
        }
        total += (exp2(x[0] - top) + exp2(x[1] - top)) + (exp2(x[2] - top) + exp2(x[3] - top));
        store(sum_at, total);
      }
    }
  }
  for (int64_t r = 0; r < rows.count; ++r) {
    const vf top = load(tops.data() + r * LANES);
    maximum[r] = hmax(top);
    sum[r] = hsum(load(sums.data() + r * LANES) * exp2(top - splat(maximum[r])));
  }
}

// Add the masses of a block to `to`, [TILE], or with `per_head` to that of each query head, [Hq][TILE].
template <class W>
void column_sums(const Blocks& blocks, int64_t block, int64_t page, int64_t kv_head, const Rows<W>& rows,
                 const Logits& logits, Scratch<W>& scratch, bool per_head, float* to) {
  const int64_t size = blocks.pool.size;
  const W* tile = scratch.load_tile(blocks.pool, page, kv_head);
  for (int64_t g = 0; g < rows.count; g += ROWS) {
    const int64_t n = rows.group(g);
    dots(n, rows.panels.data() + g * size, tile, size, scratch.scores);
    for (int64_t r = 0; r < n; ++r) {
      const int64_t visible = seen(blocks, block, page, rows.position[g + r]);
      if (visible <= 0) continue;
      float* sink = to + (per_head ? rows.head[g + r] * TILE : 0);
      const float maximum = rows.maximum[g + r];
      const vf weight = splat(rows.weight[g + r] / rows.sum[g + r]);
      for (int v = 0; v < TILE / LANES; ++v) {
        // the bound holds unless a given lse does not fit the scores
        vf x = vmin(logits(load(scratch.scores + r * TILE + v * LANES)) - maximum, splat(126.f));
        if (visible < TILE) x = first_lanes(x, visible - v * LANES, NEG_INF);
        store(sink + v * LANES, load(sink + v * LANES) + exp2(x) * weight);
      }
    }
  }
}

struct Request {
  at::Tensor q, table, lens;
  const std::optional<at::Tensor>&q_pos, &heads, &lse;
  bool per_block, per_head;
  Logits logits;
  int64_t threads;
};

template <class W>
Rows<W> rows_of(const Request& ask, const Pool& pool, int64_t b, int64_t kv_head) {
  const int64_t all = ask.q.size(1), group = all / pool.n_heads, tokens = ask.q.size(2), size = pool.size;
  const int64_t length = ask.lens.const_data_ptr<int32_t>()[b * ask.lens.stride(0)];
  Rows<W> rows;
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const float weight = ask.heads ? ask.heads->const_data_ptr<float>()[h * ask.heads->stride(0)] : 1.f;
    if (weight == 0.f) continue;
    for (int64_t t = 0; t < tokens; ++t) {
      rows.head.push_back(h);
      rows.index.push_back(h * tokens + t);
      rows.position.push_back(
          ask.q_pos ? ask.q_pos->const_data_ptr<int32_t>()[b * ask.q_pos->stride(0) + t * ask.q_pos->stride(1)]
                    : length - tokens + t);
      rows.weight.push_back(weight);
    }
  }
  rows.count = rows.head.size();
  rows.maximum.assign(rows.count, 0.f);
  rows.sum.assign(rows.count, 1.f);
  rows.panels.resize(rows.count * size);
  std::vector<float> row(size);
  for (int64_t r = 0; r < rows.count; ++r) {
    const int64_t at = b * ask.q.stride(0) + rows.head[r] * ask.q.stride(1) +
                       (rows.index[r] - rows.head[r] * tokens) * ask.q.stride(2);
    for (int64_t d = 0; d < size; ++d)
      row[d] = ask.q.element_size() == 4 ? ((const float*)ask.q.const_data_ptr())[at + d]
                                         : widen(((const bf16*)ask.q.const_data_ptr())[at + d]);
    rows.panel_of(row.data(), r, size, rows.count);
  }
  return rows;
}

// Every row's maximum and sum over the whole context.
template <class W>
void first_pass(const Request& ask, const Pool& pool, std::vector<Rows<W>>& rows) {
  const int64_t chunks = (ask.table.size(1) + CHUNK - 1) / CHUNK, most = ask.q.size(1) / pool.n_heads * ask.q.size(2);
  std::vector<float> tops(rows.size() * chunks * most, UNSEEN), sums(tops.size(), 0.f);
  parallel(rows.size() * chunks, ask.threads, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const Blocks blocks(pool, ask.table, ask.lens, item / chunks / pool.n_heads);
      const int64_t first = item % chunks * CHUNK, last = std::min(blocks.count, first + CHUNK);
      if (first < last)
        row_sums(blocks, item / chunks % pool.n_heads, first, last, rows[item / chunks], ask.logits,
                 tops.data() + item * most, sums.data() + item * most);
    }
  });
  for (size_t i = 0; i < rows.size(); ++i)
    for (int64_t r = 0; r < rows[i].count; ++r) {
      float top = UNSEEN, sum = 0.f;
      for (int64_t c = 0; c < chunks; ++c) top = std::max(top, tops[(i * chunks + c) * most + r]);
      for (int64_t c = 0; c < chunks; ++c) {
        const int64_t at = (i * chunks + c) * most + r;
        sum += sums[at] * exp2(tops[at] - top);
      }
      rows[i].maximum[r] = top;
      rows[i].sum[r] = sum > 0.f ? sum : 1.f;  // a row that sees no key adds nothing
    }
}

template <class W>
at::Tensor masses(const Request& ask, const Pool& pool) {
  const int64_t batch = ask.q.size(0), all = ask.q.size(1), tokens = ask.q.size(2), columns = ask.table.size(1);
  std::vector<Rows<W>> rows;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < pool.n_heads; ++h) rows.push_back(rows_of<W>(ask, pool, b, h));
  if (ask.lse) {
    const at::Tensor lse = ask.lse->contiguous();
    for (size_t i = 0; i < rows.size(); ++i)
      for (int64_t r = 0; r < rows[i].count; ++r) {
        const float x = lse.const_data_ptr<float>()[i / pool.n_heads * all * tokens + rows[i].index[r]];
        if (std::isinf(x)) rows[i].weight[r] = 0.f;
        rows[i].maximum[r] = std::isinf(x) ? 0.f : x * LOG2E;
      }
  } else {
    first_pass(ask, pool, rows);
  }
  const int64_t sinks = ask.per_head ? all : 1, each = ask.per_block ? 1 : TILE;
  at::Tensor out = at::zeros({batch, sinks, columns * each}, at::kFloat);
  const int64_t chunks = (columns + CHUNK - 1) / CHUNK;
  parallel(batch * chunks, ask.threads, [&](int64_t begin, int64_t end) {
    Scratch<W> scratch(pool.size);
    std::vector<float> sums(sinks * TILE);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / chunks, first = item % chunks * CHUNK;
      const Blocks blocks(pool, ask.table, ask.lens, b);
      for (int64_t i = first; i < std::min(blocks.count, first + CHUNK); ++i) {
        const int64_t page = blocks.page(i);
        std::fill(sums.begin(), sums.end(), 0.f);
        for (int64_t h = 0; h < pool.n_heads; ++h)
          column_sums(blocks, i, page, h, rows[b * pool.n_heads + h], ask.logits, scratch, ask.per_head, sums.data());
        for (int64_t s = 0; s < sinks; ++s) {
          const float* from = sums.data() + s * TILE;
          float* to = out.mutable_data_ptr<float>() + ((b * sinks + s) * columns + i) * each;
          if (ask.per_block) {
            *to = hsum((load(from) + load(from + 16)) + (load(from + 32) + load(from + 48)));
          } else {
            std::memcpy(to, from, sizeof(float) * TILE);
          }
        }
      }
    }
  });
  return ask.per_head ? out : out.squeeze(1);
}

}  // namespace

at::Tensor attention_mass(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& k_scale, const std::optional<at::Tensor>& v_scale,
                          const std::optional<at::Tensor>& page_valid, std::string_view format, int64_t size,
                          const at::Tensor& table, const at::Tensor& lens, const std::optional<at::Tensor>& q_pos,
                          const std::optional<at::Tensor>& heads, const std::optional<at::Tensor>& lse,
                          bool per_block, bool per_head, double scale, double softcap, int64_t threads) {
  const Pool pool(k, v, k_scale, v_scale, page_valid, format, size);
  const Request ask{q, table, lens, q_pos, heads, lse, per_block, per_head, {float(scale), float(softcap)}, threads};
#ifdef __AVX512BF16__
  if (q.element_size() == 2) return masses<bf16>(ask, pool);
#endif
  return masses<float>(ask, pool);
}

at::Tensor span_sums(const at::Tensor& mass, const at::Tensor& spans) {
  const at::Tensor values = mass.contiguous(), ranges = spans.contiguous();
  const int64_t tokens = mass.size(1), n = spans.size(0);
  const int32_t* range = ranges.const_data_ptr<int32_t>();
  at::Tensor out = at::empty({mass.size(0), n}, at::kFloat);
  for (int64_t b = 0; b < mass.size(0); ++b)
    for (int64_t i = 0; i < n; ++i) {
      const int64_t start = range[2 * i], end = range[2 * i + 1];
      TORCH_CHECK_INDEX(0 <= start && start <= end && end <= tokens, "spans[", i, "] is [", start, ", ", end,
                        "]: ascending within 0 to ", tokens, " is needed");
      const float* row = values.const_data_ptr<float>() + b * tokens;
      vf sum = {};
      int64_t at = start;
      for (; at + LANES <= end; at += LANES) sum += load(row + at);
      float rest = 0.f;
      for (; at < end; ++at) rest += row[at];
      out.mutable_data_ptr<float>()[b * n + i] = hsum(sum) + rest;
    }
  return out;
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("attention_mass(Tensor q, " AGENTCTX_POOL ", Tensor table, Tensor lens, Tensor? q_pos, Tensor? heads, "
        "Tensor? lse, bool per_block, bool per_head, float scale, float softcap, int threads) -> Tensor",
        &agentctx::attention_mass);
  m.def("span_sums(Tensor mass, Tensor spans) -> Tensor", &agentctx::span_sums);
}
