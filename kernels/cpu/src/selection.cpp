// topk_blocks, topp_blocks, resolve_pages, select_blocks: see kernels/selection.py.
#include <algorithm>

#include "scores.h"

namespace agentctx {
namespace {

constexpr int32_t FORCED = std::numeric_limits<int32_t>::max();  // above the key of +inf
constexpr int32_t NONE = std::numeric_limits<int32_t>::min();    // below that of -inf

// Ranks the blocks of one list. A key is the float's bits as an integer of the same order; -0.0 becomes 0.0 and NaN
// -inf. The block in the low half of 64 bits leaves no ties: the higher one wins.
class Ranker {
 public:
  Ranker(int64_t sink, int64_t local) : sink_(sink), local_(local) {}

  // Ids of the k best of n, ascending. Returns how many there are.
  int64_t best(const float* scores, int64_t n, int64_t k, int32_t* to) {
    if (n <= k) {
      for (int64_t i = 0; i < n; ++i) to[i] = int32_t(i);
      return n;
    }
    read(scores, n);
    candidates(n, k);
    std::nth_element(ranked_.begin(), ranked_.begin() + (k - 1), ranked_.end(), std::greater<>());
    write(k, to);
    return k;
  }

  // The shortest prefix in falling order that holds the share p of the softmax, clamped.
  int64_t nucleus(const float* scores, int64_t n, double p, int64_t k_min, int64_t k_max, int32_t* to) {
    if (n == 0) return 0;
    read(scores, n);
    ranked_.clear();
    for (int64_t i = 0; i < n; ++i) ranked_.push_back(rank(i));
    const int64_t most = std::min(n, k_max);
    std::partial_sort(ranked_.begin(), ranked_.begin() + most, ranked_.end(), std::greater<>());
    double best = -std::numeric_limits<double>::infinity(), total = 0, held = 0;
    for (int64_t i = 0; i < n; ++i) best = scores[i] > best ? scores[i] : best;
    const bool all = p >= 1 || best == -std::numeric_limits<double>::infinity();
    for (int64_t i = 0; i < n && !all; ++i) total += weight(scores[i], best);
    int64_t count = 0, forced = 0;
    while (count < most && (all || count == 0 || held < p * total)) {
      held += weight(scores[ranked_[count] & 0xffffffff], best);
      ++count;
    }
    while (forced < most && ranked_[forced] >> 32 == FORCED) ++forced;
    count = std::min(std::max({count, forced, k_min}), most);
    write(count, to);
    return count;
  }

 private:
  static double weight(float x, double best) { return x == best ? 1. : x != x ? 0. : std::exp(double(x) - best); }
  int64_t rank(int64_t i) const { return int64_t(keys_[i]) * (int64_t(1) << 32) + i; }

  void read(const float* scores, int64_t n) {
    const int64_t whole = n / LANES * LANES, padded = (n + LANES - 1) / LANES * LANES;
    keys_.resize(padded);
    for (int64_t i = 0; i < whole; i += LANES) store_keys(load(scores + i), i);
    if (whole < n) {
      float rest[LANES] = {};
      std::memcpy(rest, scores + whole, sizeof(float) * (n - whole));
      store_keys(load(rest), whole);
      for (int64_t i = n; i < padded; ++i) keys_[i] = NONE;
    }
    for (int64_t i = 0; i < std::min(sink_, n); ++i) keys_[i] = FORCED;
    for (int64_t i = std::max<int64_t>(0, n - local_); i < n; ++i) keys_[i] = FORCED;
  }
  void store_keys(vf x, int64_t i) {
    x = select(x != x, splat(NEG_INF), x) + 0.f;
    const vi bits = (vi)x, key = bits ^ ((bits >> 31) & FORCED);
    std::memcpy(&keys_[i], &key, sizeof(key));
  }

  // A superset of the k best, small where it can be. The k-th largest of the maxima of many groups is a bound that at
  // least k blocks reach, so the others are out; a group is one lane of a run of vectors.
  void candidates(int64_t n, int64_t k) {
    ranked_.clear();
    const int64_t vectors = int64_t(keys_.size()) / LANES;
    const int64_t run = vectors / ((4 * k + LANES - 1) / LANES);
    if (run < 2) {
      for (int64_t i = 0; i < n; ++i) ranked_.push_back(rank(i));
      return;
    }
    const int64_t runs = (vectors + run - 1) / run;
    most_.resize(runs * LANES);
    for (int64_t j = 0; j < runs; ++j) {
      vi most = load_as<vi>(&keys_[j * run * LANES]);
      for (int64_t v = j * run + 1; v < std::min(vectors, (j + 1) * run); ++v) {
        const vi x = load_as<vi>(&keys_[v * LANES]);
        most = x > most ? x : most;
      }
      std::memcpy(&most_[j * LANES], &most, sizeof(most));
    }
    order_ = most_;
    std::nth_element(order_.begin(), order_.begin() + (k - 1), order_.end(), std::greater<>());
    const int32_t bound = order_[k - 1];
    for (int64_t i = 0; i < int64_t(most_.size()); ++i)
      if (most_[i] >= bound)
        for (int64_t v = i / LANES * run; v < std::min(vectors, (i / LANES + 1) * run); ++v)
          if (const int64_t at = v * LANES + i % LANES; keys_[at] >= bound && at < n) ranked_.push_back(rank(at));
  }

  void write(int64_t count, int32_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = int32_t(ranked_[i] & 0xffffffff);
    std::sort(to, to + count);
  }

  int64_t sink_, local_;
  std::vector<int32_t> keys_, most_, order_;
  std::vector<int64_t> ranked_;
};

// Scores [B, H, (M,) NB] and the number of blocks of each list.
struct Lists {
  at::Tensor scores, n;
  int64_t width, per_head, per_batch, all;
  bool per_block;

  Lists(const at::Tensor& scores_, const std::optional<at::Tensor>& n_, int64_t all_)
      : scores(scores_.contiguous()), width(scores_.size(-1)),
        per_head(scores_.dim() == 4 ? scores_.size(2) : 1), per_batch(scores_.size(1) * per_head), all(all_),
        per_block(n_ && n_->dim() == 2) {
    if (n_) n = n_->contiguous();
  }
  int64_t count() const { return scores.size(0) * per_batch; }
  const float* row(int64_t i) const { return scores.const_data_ptr<float>() + i * width; }
  int64_t blocks(int64_t i) const {
    if (!n.defined()) return all;
    const int64_t b = i / per_batch;
    const int64_t found = n.const_data_ptr<int32_t>()[per_block ? b * per_head + i % per_head : b];
    TORCH_CHECK_INDEX(found >= 0 && found <= width, "n_blocks has ", found, ": there are scores for ", width);
    return found;
  }

  template <class F>
  std::tuple<at::Tensor, at::Tensor> fill(int64_t slots, int64_t threads, const F& list) const {
    std::vector<int64_t> lead(scores.sizes().begin(), scores.sizes().end() - 1);
    at::Tensor counts = at::empty(lead, scores.options().dtype(at::kInt));
    lead.push_back(slots);
    at::Tensor ids = at::empty(lead, counts.options());
    int32_t *to = ids.mutable_data_ptr<int32_t>(), *found = counts.mutable_data_ptr<int32_t>();
    parallel(count(), threads, [&](int64_t first, int64_t last) { list(first, last, to, found); });
    return {ids, counts};
  }
};

void unused(int32_t* slot, int64_t from, int64_t slots) {
  for (int64_t i = from; i < slots; ++i) slot[i] = 0;
}

int32_t page_of(const int32_t* table, int64_t n, int64_t block) {
  TORCH_CHECK_INDEX(block >= 0 && block < n, "blocks has ", block, ": the table has ", n, " blocks");
  return table[block];
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> topk_blocks(const at::Tensor& scores, const std::optional<at::Tensor>& n,
                                               int64_t all, int64_t k, int64_t sink, int64_t local, int64_t threads) {
  const Lists lists(scores, n, all);
  return lists.fill(k, threads, [&](int64_t first, int64_t last, int32_t* to, int32_t* counts) {
    Ranker ranker(sink, local);
    for (int64_t i = first; i < last; ++i) {
      counts[i] = int32_t(ranker.best(lists.row(i), lists.blocks(i), k, to + i * k));
      unused(to + i * k, counts[i], k);
    }
  });
}

std::tuple<at::Tensor, at::Tensor> topp_blocks(const at::Tensor& scores, const std::optional<at::Tensor>& n,
                                               int64_t all, double p, int64_t k_min, int64_t k_max, int64_t sink,
                                               int64_t local, int64_t threads) {
  const Lists lists(scores, n, all);
  return lists.fill(k_max, threads, [&](int64_t first, int64_t last, int32_t* to, int32_t* counts) {
    Ranker ranker(sink, local);
    for (int64_t i = first; i < last; ++i) {
      counts[i] = int32_t(ranker.nucleus(lists.row(i), lists.blocks(i), p, k_min, k_max, to + i * k_max));
      unused(to + i * k_max, counts[i], k_max);
    }
  });
}

at::Tensor resolve_pages(const at::Tensor& blocks_, const at::Tensor& counts_, const at::Tensor& table_) {
  const at::Tensor blocks = blocks_.contiguous(), counts = counts_.contiguous(), table = table_.contiguous();
  const int64_t slots = blocks.size(-1), n = table.size(1), lists = counts.numel();
  at::Tensor pages = at::zeros_like(blocks);
  const int32_t* at = blocks.const_data_ptr<int32_t>();
  int32_t* to = pages.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < lists; ++i) {
    const int64_t count = counts.const_data_ptr<int32_t>()[i];
    TORCH_CHECK_INDEX(count >= 0 && count <= slots, "counts has ", count, ": 0 to ", slots, " is needed");
    const int32_t* row = table.const_data_ptr<int32_t>() + i / (lists / table.size(0)) * n;
    for (int64_t s = 0; s < count; ++s) to[i * slots + s] = page_of(row, n, at[i * slots + s]);
  }
  return pages;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> select_blocks(
    const at::Tensor& q, const at::Tensor& data, const std::optional<at::Tensor>& thresholds, int64_t kind,
    int64_t page, const at::Tensor& table_, const at::Tensor& lens_, int64_t k, int64_t group, int64_t sink,
    int64_t local, double scale, int64_t threads) {
  const Scorer shape(q, data, thresholds, kind, page, group, scale);
  const int64_t batch = q.size(0), heads = data.size(1), rows = q.size(2), capacity = shape.capacity();
  const at::Tensor lens = lens_.contiguous(), table = table_.contiguous();
  const int32_t* len = lens.const_data_ptr<int32_t>();
  for (int64_t b = 0; b < batch; ++b) shape.blocks_of(len[b]);
  at::Tensor blocks = at::empty({batch, heads, k}, lens.options()), pages = at::empty_like(blocks);
  at::Tensor counts = at::empty({batch, heads}, lens.options());
  int32_t *ids = blocks.mutable_data_ptr<int32_t>(), *to = pages.mutable_data_ptr<int32_t>();
  int32_t* found = counts.mutable_data_ptr<int32_t>();
  parallel(batch * heads, threads, [&](int64_t first, int64_t last) {
    Scorer scorer(q, data, thresholds, kind, page, group, scale);
    Ranker ranker(sink, local);
    std::vector<float> scores(rows * capacity);
    std::vector<int64_t> limits(rows);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / heads, n = scorer.blocks_of(len[b]);
      limits.assign(rows, len[b]);
      scorer.run(b, i % heads, 0, n, limits, scores.data(), 0);
      for (int64_t t = 1; t < rows; ++t)
        for (int64_t j = 0; j < n; ++j) scores[j] = nan_max(scores[t * capacity + j], scores[j]);
      const int64_t count = ranker.best(scores.data(), n, k, ids + i * k);
      const int32_t* row = table.const_data_ptr<int32_t>() + b * table.size(1);
      for (int64_t s = 0; s < count; ++s) to[i * k + s] = page_of(row, table.size(1), ids[i * k + s]);
      unused(ids + i * k, count, k);
      unused(to + i * k, count, k);
      found[i] = int32_t(count);
    }
  });
  return {pages, blocks, counts};
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def(
      "topk_blocks(Tensor scores, Tensor? n, int all, int k, int sink, int local, int threads) -> (Tensor, Tensor)",
      &agentctx::topk_blocks);
  m.def(
      "topp_blocks(Tensor scores, Tensor? n, int all, float p, int k_min, int k_max, int sink, int local, "
      "int threads) -> (Tensor, Tensor)",
      &agentctx::topp_blocks);
  m.def("resolve_pages(Tensor blocks, Tensor counts, Tensor table) -> Tensor", &agentctx::resolve_pages);
  m.def(
      "select_blocks(Tensor q, Tensor data, Tensor? thresholds, int kind, int page, Tensor table, Tensor lens, int k, "
      "int group, int sink, int local, float scale, int threads) -> (Tensor, Tensor, Tensor)",
      &agentctx::select_blocks);
}
