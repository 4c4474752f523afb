// Attention with a list of blocks for each row. Neighbouring rows list mostly the same blocks, so a strip of rows
// is worked on together: each page that some of its rows list is packed or widened once and serves them all.
#include <algorithm>
#include <vector>

#include "tile.h"

namespace agentctx {
namespace {

constexpr int64_t STRIP = 32;  // rows of a strip
#ifdef __AVX512F__
constexpr int LINES = 4;  // lines (a row of one head) in registers: LINES x 4 vectors
#else
constexpr int LINES = 1;
#endif

// One entry of a row's list.
struct Use {
  int32_t block, page, row;
  bool operator<(const Use& o) const {
    return std::tie(block, page, row) < std::tie(o.block, o.page, o.row);
  }
};

// A line that a page serves: its queries, its accumulator and running maximum and sum, the tokens it sees.
template <class T>
struct Line {
  const T* q;
  float *acc, *top, *sum;
  int64_t seen;
};

struct Scoring {
  float scale, softcap;
};

inline vf tanh(vf x) {
  const vf t = exp2(vmax(x, -x) * (-2.f * LOG2E));
  const vf y = (1.f - t) / (1.f + t);
  return x < 0.f ? -y : y;
}

inline uint32_t pair_at(const bf16* p) { return load_as<uint32_t>(p); }

// Scores [L][TILE] of L lines against a K tile, before scaling.
template <int L>
void products(const Line<float>* lines, const float* k, int64_t size, vf (*s)[4]) {
  for (int64_t d = 0; d < size; ++d)
    for (int j = 0; j < 4; ++j) {
      const vf x = load(k + d * TILE + j * LANES);
      for (int i = 0; i < L; ++i) s[i][j] += x * lines[i].q[d];
    }
}
template <int L>
void products(const Line<bf16>* lines, const bf16* k, int64_t size, vf (*s)[4]) {
  for (int64_t d = 0; d < size; d += 2)
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < L; ++i)
        s[i][j] = dot_pairs(s[i][j], k + d * TILE + 2 * j * LANES, pair_at(lines[i].q + d));
}

// acc[i][from, from + 16 W) += p[i] V over the first n tokens.
template <int L, int W>
void add_values(const Line<float>* lines, const float (*p)[TILE], const float* v, int64_t size, int64_t n,
                int64_t from) {
  vf sum[L][W];
  for (int i = 0; i < L; ++i)
    for (int w = 0; w < W; ++w) sum[i][w] = load(lines[i].acc + from + w * LANES);
  for (int64_t t = 0; t < n; ++t)
    for (int w = 0; w < W; ++w) {
      const vf x = load(v + t * size + from + w * LANES);
      for (int i = 0; i < L; ++i) sum[i][w] += x * p[i][t];
    }
  for (int i = 0; i < L; ++i)
    for (int w = 0; w < W; ++w) store(lines[i].acc + from + w * LANES, sum[i][w]);
}
template <int L, int W>
void add_values(const Line<bf16>* lines, const bf16 (*p)[TILE], const bf16* v, int64_t size, int64_t n,
                int64_t from) {
  vf sum[L][W];
  for (int i = 0; i < L; ++i)
    for (int w = 0; w < W; ++w) sum[i][w] = load(lines[i].acc + from + w * LANES);
  for (int64_t t = 0; t < n; t += 2)
    for (int w = 0; w < W; ++w)
      for (int i = 0; i < L; ++i)
        sum[i][w] = dot_pairs(sum[i][w], v + t * size + 2 * (from + w * LANES), pair_at(p[i] + t));
  for (int i = 0; i < L; ++i)
    for (int w = 0; w < W; ++w) store(lines[i].acc + from + w * LANES, sum[i][w]);
}

// One page for L lines: scores, a step of the running softmax, values.
template <int L, class T>
void page_step(const Line<T>* lines, const T* k, const T* v, int64_t size, Scoring how) {
  vf s[L][4] = {};
  products<L>(lines, k, size, s);
  alignas(64) T p[L][TILE];
  int64_t most = 0;
  for (int i = 0; i < L; ++i) {
    const Line<T>& line = lines[i];
    vf best = splat(NEG_INF);
    for (int j = 0; j < 4; ++j) {
      vf x = s[i][j] * how.scale;
      if (how.softcap > 0) x = how.softcap * tanh(x / how.softcap);
      x *= LOG2E;
      if (line.seen < TILE) {
        const vi token = vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + j * LANES;
        x = token < int32_t(line.seen) ? x : splat(NEG_INF);
      }
      s[i][j] = x;
      best = vmax(x, best);
    }
    const float top = std::max(*line.top, hmax(best));
    if (top > *line.top) {
      const float shrink = exp2(*line.top - top);
      *line.sum *= shrink;
      for (int64_t d = 0; d < size; d += LANES) store(line.acc + d, load(line.acc + d) * shrink);
      *line.top = top;
    }
    vf sum{};
    for (int j = 0; j < 4; ++j) {
      const vf x = exp2(s[i][j] - top);
      sum += x;
      store(p[i] + j * LANES, x);
    }
    *line.sum += hsum(sum);
    most = std::max(most, line.seen);
  }
  int64_t d = 0;
  for (; d + 4 * LANES <= size; d += 4 * LANES) add_values<L, 4>(lines, p, v, size, most, d);
  for (; d < size; d += LANES) add_values<L, 1>(lines, p, v, size, most, d);
}

template <class T>
struct Call {
  Pool pool;
  const at::Tensor &q, pages, blocks, counts, lens, offsets;
  Scoring how;
  at::Tensor &out, &lse;

  int64_t lists() const { return counts.size(1); }
  int64_t rows() const { return q.size(2); }
  int64_t strips() const { return (rows() + STRIP - 1) / STRIP; }

  // What the rows [from, to) of a list head list, by block.
  void collect(int64_t b, int64_t h, int64_t from, int64_t to, std::vector<Use>& uses) const {
    const int64_t slots = pages.size(3);
    uses.clear();
    for (int64_t row = from; row < to; ++row) {
      const int64_t at = (b * lists() + h) * rows() + row;
      const int32_t count = counts.const_data_ptr<int32_t>()[at];
      TORCH_CHECK_INDEX(count >= 0 && count <= slots, "selection.counts holds ", count, ": 0 to ", slots,
                        " is needed");
      for (int64_t s = at * slots; s < at * slots + count; ++s) {
        const int32_t page = pages.const_data_ptr<int32_t>()[s];
        checked_page(pool, page, "selection.pages");
        uses.push_back({blocks.const_data_ptr<int32_t>()[s], page, int32_t(row - from)});
      }
    }
    std::sort(uses.begin(), uses.end());
  }

  int64_t seen(const Use& use, int64_t b, int64_t from) const {
    if (pool.valid && pool.valid[use.page] >= 0) return std::min<int64_t>(TILE, pool.valid[use.page]);
    const int64_t position = offsets.const_data_ptr<int32_t>()[b] + from + use.row;
    const int64_t limit = std::min<int64_t>(position + 1, lens.const_data_ptr<int32_t>()[b]);
    return std::clamp<int64_t>(limit - int64_t(use.block) * TILE, 0, TILE);
  }

  template <class Out>
  void strip(int64_t item, std::vector<Use>& uses, std::vector<T>& tiles, std::vector<float>& state) const {
    const int64_t size = pool.size, group = q.size(1) / lists();
    const int64_t s = item % strips(), h = item / strips() % lists(), b = item / strips() / lists();
    const int64_t from = s * STRIP, to = std::min(rows(), from + STRIP), n = (to - from) * group;
    const int64_t kv_head = h * pool.n_heads / lists();
    collect(b, h, from, to, uses);
    state.assign(n * (size + 2), 0.f);
    float *acc = state.data(), *top = acc + n * size, *sum = top + n;
    std::fill(top, top + n, NEG_INF);
    std::vector<Line<T>> lines;
    for (size_t i = 0; i < uses.size();) {
      const Use first = uses[i];
      lines.clear();
      for (; i < uses.size() && uses[i].block == first.block && uses[i].page == first.page; ++i) {
        const int64_t tokens = seen(uses[i], b, from);
        if (tokens == 0) continue;
        for (int64_t g = 0; g < group; ++g) {
          const int64_t line = uses[i].row * group + g;
          const T* row = (const T*)q.const_data_ptr() + b * q.stride(0) + (h * group + g) * q.stride(1) +
                         (from + uses[i].row) * q.stride(2);
          lines.push_back({row, acc + line * size, top + line, sum + line, tokens});
        }
      }
      if (lines.empty()) continue;
      const T* k = k_tile(pool, first.page, kv_head, tiles.data());
      const T* v = v_tile(pool, first.page, kv_head, tiles.data() + TILE * size);
      size_t j = 0;
      for (; j + LINES <= lines.size(); j += LINES) page_step<LINES>(&lines[j], k, v, size, how);
      for (; j < lines.size(); ++j) page_step<1>(&lines[j], k, v, size, how);
    }
    for (int64_t row = from; row < to; ++row)
      for (int64_t g = 0; g < group; ++g) {
        const int64_t line = (row - from) * group + g, at = (b * q.size(1) + h * group + g) * rows() + row;
        const float share = sum[line] == 0.f ? 0.f : 1.f / sum[line];
        Out* to_row = (Out*)out.mutable_data_ptr() + at * size;
        for (int64_t d = 0; d < size; d += LANES) store(to_row + d, load(acc + line * size + d) * share);
        lse.mutable_data_ptr<float>()[at] = sum[line] == 0.f ? NEG_INF : (top[line] + std::log2(sum[line])) * LN2;
      }
  }

  void run(int64_t threads) const {
    parallel(q.size(0) * lists() * strips(), threads, [&](int64_t begin, int64_t end) {
      std::vector<Use> uses;
      std::vector<T> tiles(2 * TILE * pool.size);
      std::vector<float> state;
      for (int64_t item = begin; item < end; ++item) {
        if (out.scalar_type() == at::kFloat) strip<float>(item, uses, tiles, state);
        else strip<bf16>(item, uses, tiles, state);
      }
    });
  }
};

std::tuple<at::Tensor, at::Tensor> token_sparse_prefill(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& k_scale,
    const std::optional<at::Tensor>& v_scale, const std::optional<at::Tensor>& page_valid, std::string_view format,
    int64_t size, const at::Tensor& pages, const at::Tensor& blocks, const at::Tensor& counts, const at::Tensor& lens,
    const at::Tensor& offsets, double scale, double softcap, at::ScalarType out_dtype, int64_t threads) {
  at::Tensor out = at::empty(q.sizes(), q.options().dtype(out_dtype));
  at::Tensor lse = at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat));
  const Pool pool(k, v, k_scale, v_scale, page_valid, format, size);
  const Scoring how{float(scale), float(softcap)};
  const auto serve = [&](auto zero) {
    Call<decltype(zero)>{pool, q, pages.contiguous(), blocks.contiguous(), counts.contiguous(), lens.contiguous(),
                         offsets.contiguous(), how, out, lse}
        .run(threads);
  };
  if (q.scalar_type() == at::kFloat) serve(float{});
  else serve(bf16{});
  return {out, lse};
}

}  // namespace
}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("token_sparse_prefill(Tensor q, " AGENTCTX_POOL
        ", Tensor pages, Tensor blocks, Tensor counts, Tensor lens, Tensor offsets, float scale, float softcap, "
        "ScalarType out_dtype, int threads) -> (Tensor, Tensor)",
        &agentctx::token_sparse_prefill);
}
