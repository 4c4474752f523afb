// Attention of many query tokens over pages: every block, a window, or lists with the diagonal.
//
// A task is a block of query positions of one KV head, with the G query heads that share its keys. It walks its key
// tiles four at a time; for each four, chunks of rows that stay in the first-level cache compute scores, their
// weights, and the product with V, with a running maximum and sum (online softmax).
#include <atomic>
#include <numeric>

#include "brgemm.h"
#include "softmax.h"
#include "tile.h"

namespace agentctx {
namespace {

constexpr int64_t STEP = 4;                      // key tiles between two updates of the softmax
constexpr int64_t LD = STEP * TILE + LANES;      // of the scores; not a power of two: rows share no cache sets
constexpr int64_t CHUNK = 96;                    // rows
constexpr float STALE_MAX = 8.f;                 // the maximum may lag so far (base 2) before sums are rescaled
constexpr int64_t BLOCK_Q = 128;                // positions of a task where no list says otherwise
constexpr int64_t NO_WINDOW = int64_t(1) << 60;

// A packed bfloat16 tile as float: pairs of channels (K) or tokens (V) come apart.
inline void split_pairs(const bf16* src, int64_t pairs, int64_t length, float* dst) {
  for (int64_t p = 0; p < pairs; ++p)
    for (int64_t i = 0; i < length; ++i) {
      dst[2 * p * length + i] = widen(src[2 * (p * length + i)]);
      dst[(2 * p + 1) * length + i] = widen(src[2 * (p * length + i) + 1]);
    }
}

// The tiles of a pool of T in words W: pairs of bfloat16, or float, to which everything else is widened.
template <class T, class W>
const W* key_tile(const Pool& pool, int64_t page, int64_t head, W* scratch) {
  if constexpr (std::is_same_v<W, Pair>) {
    return (const W*)k_tile<bf16>(pool, page, head, (bf16*)scratch);
  } else if (sizeof(T) == 4 || pool.k_scale) {
    return k_tile<float>(pool, page, head, scratch);
  } else {
    const bf16* src = (const bf16*)pool.k_at(page, head);
    if (pool.format == Format::packed) {
      split_pairs(src, pool.size / 2, TILE, scratch);
    } else {
      for (int64_t d = 0; d < pool.size; ++d)
        for (int64_t t = 0; t < TILE; ++t) scratch[d * TILE + t] = widen(src[t * pool.size + d]);
    }
    return scratch;
  }
}

template <class T, class W>
const W* value_tile(const Pool& pool, int64_t page, int64_t head, W* scratch) {
  if constexpr (std::is_same_v<W, Pair>) {
    return (const W*)v_tile<bf16>(pool, page, head, (bf16*)scratch);
  } else if (sizeof(T) == 4 || pool.k_scale) {
    return v_tile<float>(pool, page, head, scratch);
  } else {
    const bf16* src = (const bf16*)pool.v_at(page, head);
    if (pool.format == Format::packed) {
      split_pairs(src, TILE / 2, pool.size, scratch);
    } else {
      for (int64_t i = 0; i < TILE * pool.size; ++i) scratch[i] = widen(src[i]);
    }
    return scratch;
  }
}

// One call, as every task sees it.
struct Call {
  const Pool& pool;
  at::Tensor q, out, lse;
  const int32_t *table, *lens, *offsets;
  int64_t table_blocks;
  const int32_t *pages = nullptr, *blocks = nullptr, *counts = nullptr;  // lists, or null
  int64_t slots = 0, list_heads;
  int64_t block_q, window = NO_WINDOW, sinks = 0;
  float scale, softcap;
};

struct Key {
  int64_t page, first;  // first: the position of its first token
  bool listed;
};

struct alignas(64) Line {
  float words[LANES];
};

// A thread's memory, taken once.
struct Scratch {
  std::vector<Line> lines;
  std::vector<Key> keys;
  float *q, *out, *top, *sum, *scores, *k, *v;

  Scratch(int64_t rows, int64_t group, int64_t size) {
    const int64_t padded = (rows + LANES - 1) / LANES * LANES, tile = TILE * size;
    const int64_t parts[] = {rows * size, rows * size, padded, padded, std::min(rows, std::max(CHUNK, group)) * LD, STEP * tile,
                             STEP * tile};
    lines.resize(std::accumulate(std::begin(parts), std::end(parts), int64_t(0)) / LANES);
    float* at = lines[0].words;
    float** const names[] = {&q, &out, &top, &sum, &scores, &k, &v};
    for (int i = 0; i < 7; at += parts[i++]) *names[i] = at;
  }
};

// The keys of one tile that the rows of a chunk see.
enum class Sight { none, some, all };

struct Mask {
  const Call& call;
  int64_t length;  // tokens of the sequence
  int64_t first, last;  // positions of the chunk

  int64_t limit(int64_t position) const { return std::min(position + 1, length); }
  bool reached(int64_t position, int64_t key) const {  // does it see some position of the tile?
    const int64_t end = std::min(limit(position), key + TILE);
    return end > key && (end - 1 > position - call.window || key < call.sinks);
  }
  int valid(const Key& key) const { return call.pool.valid ? call.pool.valid[key.page] : -1; }

  Sight of(const Key& key) const {
    if (const int n = valid(key); n >= 0)
      return n == 0 ? Sight::none : n >= TILE && key.listed ? Sight::all : Sight::some;
    const int64_t end = key.first + TILE;
    if (key.first >= limit(last)) return Sight::none;
    if (end - 1 <= first - call.window && key.first >= call.sinks) return Sight::none;
    const bool in_window = key.first > last - call.window || end <= call.sinks;
    return end <= limit(first) && in_window ? Sight::all : Sight::some;
  }

  // Hide what the row at `position` does not see.
  void apply(const Key& key, int64_t position, float* scores) const {
    int32_t upper = int32_t(std::clamp<int64_t>(limit(position) - key.first, 0, TILE));
    int32_t lower = int32_t(std::clamp<int64_t>(position - call.window + 1 - key.first, 0, TILE));
    int32_t sink = int32_t(std::clamp<int64_t>(call.sinks - key.first, 0, TILE));
    if (const int n = valid(key); n >= 0) {
      upper = key.listed || reached(position, key.first) ? std::min(n, TILE) : 0;
      lower = 0;
    }
    for (int32_t t = 0; t < TILE; ++t)
      if (t >= upper || (t < lower && t >= sink)) scores[t] = NEG_INF;
  }
};

template <class T, class W>
struct Task {
  static constexpr int64_t E = std::is_same_v<W, Pair> ? 2 : 1;  // elements of a word

  const Call& call;
  Scratch& scratch;
  int64_t batch, head, group, kv_head;  // head: the first of `group` query heads
  int64_t row, rows;                    // of the query block
  int64_t position;                     // of its first row
  int64_t length, span;                 // span: positions of a chunk
  float scale;

  Task(const Call& c, Scratch& s, int64_t b, int64_t list_head, int64_t block)
      : call(c), scratch(s), batch(b) {
    const int64_t heads = c.q.size(1), own = heads / c.list_heads, shared = heads / c.pool.n_heads;
    head = list_head * own, group = own, kv_head = head / shared;
    row = block * c.block_q;
    rows = std::min(c.block_q, c.q.size(2) - row);
    position = c.offsets[b] + row;
    length = c.lens[b];
    span = std::min(rows, std::max<int64_t>(1, CHUNK / group));
    find_keys(list_head, block);
    run();
  }

  void add(int64_t first, int64_t end) {
    TORCH_CHECK_INDEX(end <= call.table_blocks, "context_lens[", batch, "] is ", length, ": block_table has ",
                      call.table_blocks, " blocks");
    const int32_t* table = call.table + batch * call.table_blocks;
    for (int64_t i = first; i < end; ++i)
      scratch.keys.push_back({checked_page(call.pool, table[i], "block_table"), i * TILE, false});
  }

  // The tiles that some row of the block may see.
  void find_keys(int64_t list_head, int64_t block) {
    scratch.keys.clear();
    const int64_t seen = std::min(position + rows, length), end = seen <= 0 ? 0 : (seen + TILE - 1) / TILE;
    if (call.pages) {
      const int64_t blocks = (call.q.size(2) + call.block_q - 1) / call.block_q;
      const int64_t list = (batch * call.list_heads + list_head) * blocks + block, n = call.counts[list];
      TORCH_CHECK_INDEX(n >= 0 && n <= call.slots, "selection.counts holds ", n, ": 0 to ", call.slots,
                        " is needed");
      for (int64_t i = list * call.slots; i < list * call.slots + n; ++i)
        scratch.keys.push_back({checked_page(call.pool, call.pages[i], "selection.pages"),
                                int64_t(call.blocks[i]) * TILE, true});
      add(std::max<int64_t>(0, position) / TILE, end);
    } else {
      const int64_t first = std::max<int64_t>(0, position - call.window + 1) / TILE;
      add(0, std::min({first, (call.sinks + TILE - 1) / TILE, end}));
      add(first, end);
    }
  }

  float* scores(int64_t r) const { return scratch.scores + r * LD; }

  void run() {
    const int64_t size = call.pool.size, words = size / E, tile = TILE * size / E;
    // A negative scale turns the sign of q, so that the largest product is the largest score.
    const float sign = call.scale < 0 ? -1.f : call.scale > 0 ? 1.f : 0.f;
    scale = sign == 0 ? 1.f : std::abs(call.scale) * LOG2E;
    for (int64_t r = 0; r < rows; r += span) load_rows(r, sign);
    std::fill_n(scratch.out, rows * group * size, 0.f);
    std::fill_n(scratch.top, rows * group, NEG_INF);
    std::fill_n(scratch.sum, rows * group, 0.f);

    const W *k[STEP], *v[STEP];
    const auto& keys = scratch.keys;
    for (size_t at = 0; at < keys.size(); at += STEP) {
      const int64_t n = std::min<int64_t>(STEP, keys.size() - at);
      for (int64_t i = 0; i < n; ++i) {
        k[i] = key_tile<T, W>(call.pool, keys[at + i].page, kv_head, (W*)scratch.k + i * tile);
        v[i] = value_tile<T, W>(call.pool, keys[at + i].page, kv_head, (W*)scratch.v + i * tile);
      }
      for (int64_t r = 0; r < rows; r += span) step(r, &keys[at], k, v, n, words);
    }
    for (int64_t r = 0; r < rows; r += span) finish(r);
  }

  // Rows of a chunk that starts at position r: head by head, `here` positions each.
  int64_t here(int64_t r) const { return std::min(span, rows - r); }

  template <class From, class To>
  void scaled(const From* from, float factor, To* to) const {
    for (int64_t d = 0; d < call.pool.size; d += LANES) store(to + d, load(from + d) * factor);
  }

  void load_rows(int64_t r, float sign) {
    const int64_t size = call.pool.size, n = here(r);
    const T* q = (const T*)call.q.const_data_ptr();
    using S = std::conditional_t<E == 2, bf16, float>;
    S* to = (S*)scratch.q + r * group * size;
    for (int64_t g = 0; g < group; ++g)
      for (int64_t t = 0; t < n; ++t, to += size) {
        const int64_t at = batch * call.q.stride(0) + (head + g) * call.q.stride(1) + (row + r + t) * call.q.stride(2);
        scaled(q + at, sign, to);
      }
  }

  void step(int64_t r, const Key* keys, const W* const* k, const W* const* v, int64_t n, int64_t words) {
    const int64_t size = call.pool.size, width = here(r), m = width * group, at = r * group;
    const Mask mask{call, length, position + r, position + r + width - 1};
    const W* values[STEP];
    int64_t seen = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Sight sight = mask.of(keys[i]);
      if (sight == Sight::none) continue;
      float* to = scratch.scores + seen * TILE;
      multiply((const W*)scratch.q + at * words, words, m, k + i, 1, words, TILE, to, LD, false);
      if (call.softcap > 0)
        for (int64_t j = 0; j < m; ++j) soft_cap(to + j * LD, TILE, scale / LOG2E, call.softcap);
      if (sight == Sight::some)
        for (int64_t j = 0; j < m; ++j) mask.apply(keys[i], mask.first + j % width, to + j * LD);
      values[seen++] = v[i];
    }
    if (seen == 0) return;
    const float factor = call.softcap > 0 ? 1.f : scale;
    for (int64_t j = 0; j < m; ++j) soften(at + j, scores(j), seen * TILE, factor);
    multiply((const W*)scratch.scores, LD, m, values, seen, TILE / E, size, scratch.out + at * size, size, true);
  }

  // Scores of a row to weights; its sum, maximum and output follow.
  void soften(int64_t j, float* row_scores, int64_t n, float factor) {
    float& top = scratch.top[j];
    const float found = row_max(row_scores, n) * factor;
    if (found > top + STALE_MAX || top == NEG_INF) {
      if (found == NEG_INF) {
        std::fill_n(row_scores, n / E, 0.f);
        return;
      }
      const float shrink = exp2(top - found);
      scaled(scratch.out + j * call.pool.size, shrink, scratch.out + j * call.pool.size);
      scratch.sum[j] *= shrink;
      top = found;
    }
    scratch.sum[j] += weigh<W>(row_scores, n, factor, top);
  }

  void finish(int64_t r) {
    const int64_t size = call.pool.size, n = here(r);
    int64_t j = r * group;
    for (int64_t g = 0; g < group; ++g)
      for (int64_t t = 0; t < n; ++t, ++j) {
        const int64_t to = (batch * call.q.size(1) + head + g) * call.q.size(2) + row + r + t;
        const float sum = scratch.sum[j], share = sum == 0 ? 0.f : 1.f / sum;
        const float* from = scratch.out + j * size;
        if (call.out.scalar_type() == at::kFloat)
          scaled(from, share, (float*)call.out.data_ptr() + to * size);
        else
          scaled(from, share, (bf16*)call.out.data_ptr() + to * size);
        call.lse.data_ptr<float>()[to] = sum == 0 ? NEG_INF : (scratch.top[j] + std::log2(sum)) * LN2;
      }
  }
};

// The longest tasks first, each to the thread that is free; a task's result does not depend on where it runs.
template <class T, class W>
void run_all(const Call& call, int64_t threads) {
  const int64_t lists = call.q.size(0) * call.list_heads, blocks = (call.q.size(2) + call.block_q - 1) / call.block_q;
  const int64_t group = call.q.size(1) / call.list_heads, rows = std::min(call.block_q, call.q.size(2)) * group;
  std::atomic<int64_t> next{0};
  threads = std::min(threads, lists * blocks);
  parallel(threads, threads, [&](int64_t, int64_t) {
    const Thread thread;
    Scratch scratch(rows, group, call.pool.size);
    for (int64_t i; (i = next++) < lists * blocks;)
      Task<T, W>(call, scratch, i % lists / call.list_heads, i % call.list_heads, blocks - 1 - i / lists);
  });
}

using Result = std::tuple<at::Tensor, at::Tensor>;

Result run_call(Call& call, const at::Tensor& q, const at::Tensor& table, const at::Tensor& lens,
                const at::Tensor& offsets, double scale, double softcap, at::ScalarType out_dtype, int64_t threads) {
  const at::Tensor table_ = table.contiguous(), lens_ = lens.contiguous(), offsets_ = offsets.contiguous();
  at::Tensor out = at::empty(q.sizes(), q.options().dtype(out_dtype));
  at::Tensor lse = at::empty(q.sizes().slice(0, 3), q.options().dtype(at::kFloat));
  call.q = q, call.out = out, call.lse = lse;
  call.table = table_.const_data_ptr<int32_t>(), call.table_blocks = table_.size(1);
  call.lens = lens_.const_data_ptr<int32_t>(), call.offsets = offsets_.const_data_ptr<int32_t>();
  call.scale = float(scale), call.softcap = float(softcap);
  if (lse.numel() == 0) return {out, lse};
  if (q.scalar_type() == at::kFloat) {
    run_all<float, float>(call, threads);
  } else {
#ifdef __AVX512BF16__
    // Quantised keys stay exact: rounded to bfloat16 they would cost the lse three digits.
    if (!call.pool.k_scale) {
      run_all<bf16, Pair>(call, threads);
      return {out, lse};
    }
#endif
    run_all<bf16, float>(call, threads);
  }
  return {out, lse};
}

using Optional = const std::optional<at::Tensor>&;

Result window_prefill(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Optional k_scale,
                      Optional v_scale, Optional page_valid, std::string_view format, int64_t size,
                      const at::Tensor& table, const at::Tensor& lens, const at::Tensor& offsets,
                      std::optional<int64_t> window, int64_t sinks, double scale, double softcap,
                      at::ScalarType out_dtype, int64_t threads) {
  const Pool pool(k, v, k_scale, v_scale, page_valid, format, size);
  Call call{pool};
  call.list_heads = pool.n_heads;
  call.block_q = BLOCK_Q;
  call.window = std::min(window.value_or(NO_WINDOW), NO_WINDOW), call.sinks = sinks;
  return run_call(call, q, table, lens, offsets, scale, softcap, out_dtype, threads);
}

Result block_sparse_prefill(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, Optional k_scale,
                            Optional v_scale, Optional page_valid, std::string_view format, int64_t size,
                            const at::Tensor& pages, const at::Tensor& blocks, const at::Tensor& counts,
                            const at::Tensor& table, const at::Tensor& lens, const at::Tensor& offsets,
                            int64_t block_q, double scale, double softcap, at::ScalarType out_dtype,
                            int64_t threads) {
  const Pool pool(k, v, k_scale, v_scale, page_valid, format, size);
  const at::Tensor pages_ = pages.contiguous(), blocks_ = blocks.contiguous(), counts_ = counts.contiguous();
  Call call{pool};
  call.list_heads = pages.size(1);
  call.block_q = block_q;
  call.slots = pages.size(3);
  call.pages = pages_.const_data_ptr<int32_t>(), call.blocks = blocks_.const_data_ptr<int32_t>();
  call.counts = counts_.const_data_ptr<int32_t>();
  return run_call(call, q, table, lens, offsets, scale, softcap, out_dtype, threads);
}

}  // namespace
}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("window_prefill(Tensor q, " AGENTCTX_POOL
        ", Tensor table, Tensor lens, Tensor offsets, int? window, int sinks, float scale, float softcap, "
        "ScalarType out_dtype, int threads) -> (Tensor, Tensor)",
        &agentctx::window_prefill);
  m.def("block_sparse_prefill(Tensor q, " AGENTCTX_POOL
        ", Tensor pages, Tensor blocks, Tensor counts, Tensor table, Tensor lens, Tensor offsets, int block_q, "
        "float scale, float softcap, ScalarType out_dtype, int threads) -> (Tensor, Tensor)",
        &agentctx::block_sparse_prefill);
}
