// Attention of a few rows over listed pages. A list is cut into parts by its length alone; each part keeps a running
// maximum, a sum and a float accumulator for each row (online softmax, GROUP pages at a time); the parts are united.
#include <algorithm>
#include <vector>

#include "dot.h"

namespace agentctx {
namespace {

constexpr int GROUP = 4;           // pages of one softmax step
constexpr int WIDTH = GROUP * TILE;
constexpr int AHEAD = 4;           // tiles between the one that is read and the one that is asked for
constexpr int64_t PART = 16;       // pages of a part, as long as there are no more parts than MOST_PARTS
constexpr int64_t MOST_PARTS = 16;
constexpr float LARGEST = 3e38f;   // a score that overflows stays finite: inf - inf is NaN

struct Lists {  // of pages, with strides; blocks and counts are absent where the whole table is read
  const int32_t *pages, *blocks = nullptr, *counts = nullptr;
  int64_t pb, ph, ps, bb = 0, bh = 0, bs = 0, cb = 0, ch = 0, slots;
};

struct Call {
  const Pool& pool;
  Lists lists;
  const char* q;
  int64_t qb, qh, qt;
  int64_t batch, heads, group, rows, size;  // heads: of lists; group: query heads of a list; rows: T
  const int32_t *lens, *first = nullptr;
  int64_t lens_stride, first_stride = 0, sinks;
  const char *tail_k = nullptr, *tail_v = nullptr;
  int64_t tkb = 0, tkh = 0, tvb = 0, tvh = 0;
  float scale, softcap;
};

// A page that some row sees.
struct Page {
  const char *k, *v;
  const bf16 *k_scale, *v_scale;
  int64_t base;   // position of its first token
  int64_t valid;  // tokens that every row sees whatever their position; -1: by position
  bool tail, masked;
};

// Grows once for each thread and is used again: nothing is allocated for a tile.
struct Scratch {
  std::vector<char> bytes;
  std::vector<Page> pages;
  std::vector<const char*> order;  // of the tiles, as they are read: K of a group, V of a group
  char* next = nullptr;

  void reserve(int64_t n) {
    if (int64_t(bytes.size()) < n + 64) bytes.resize(n + 64);
    next = (char*)((uintptr_t(bytes.data()) + 63) & ~uintptr_t(63));
  }
  template <class V>
  V* take(int64_t n) {
    char* at = next;
    next += (n * sizeof(V) + 63) & ~int64_t(63);
    return (V*)at;
  }
};

// tanh: an odd polynomial near 0, where 1 - 2 / (e ** 2x + 1) cancels.
inline vf tanh(vf x) {
  const vf y = vmin(vmax(x, splat(-12.f)), splat(12.f)), z = y * y;
  const vf near = y + y * z * (-1.f / 3 + z * (2.f / 15 + z * (-17.f / 315 + z * (62.f / 2835))));
  const vf far = 1.f - 2.f / (exp2(y * (2 * LOG2E)) + 1.f);
  return select(x != x, x, select(z < 0.0625f, near, far));
}

// Pages of slots [begin, end) of the list of (b, h) that some row sees.
void visible_pages(const Call& call, int64_t b, int64_t h, int64_t begin, int64_t end, std::vector<Page>& found) {
  const Pool& pool = call.pool;
  const Lists& lists = call.lists;
  const int64_t kv_head = h * pool.n_heads / call.heads;
  const int64_t len = call.lens[b * call.lens_stride], newest = len - 1, oldest = len - call.rows;
  const int64_t first = call.first ? call.first[b * call.first_stride] : 0;
  const int32_t* pages = lists.pages + b * lists.pb + h * lists.ph;
  found.clear();
  for (int64_t s = begin; s < end; ++s) {
    const int64_t block = lists.blocks ? lists.blocks[b * lists.bb + h * lists.bh + s * lists.bs] : s;
    TORCH_CHECK_INDEX(block >= 0, "selection.blocks holds ", block, ": 0 or more is needed");
    Page x{};
    x.base = block * TILE;
    x.valid = -1;
    x.tail = call.tail_k && block == len / TILE;
    int64_t page = 0;
    if (!x.tail && pool.valid) {
      page = checked_page(pool, pages[s * lists.ps], "a list");
      x.valid = std::min<int64_t>(pool.valid[page], TILE);
    }
    if (x.valid == 0) continue;
    if (x.valid < 0) {
      const int64_t last = x.base + TILE - 1;
      if (x.base > newest || (x.base >= call.sinks && last < first)) continue;
      x.masked = last > oldest || (x.base < first && last >= call.sinks);
    } else {
      x.masked = x.valid < TILE;
    }
    if (x.tail) {
      x.k = call.tail_k + b * call.tkb + kv_head * call.tkh;
      x.v = call.tail_v + b * call.tvb + kv_head * call.tvh;
    } else {
      if (!pool.valid) page = checked_page(pool, pages[s * lists.ps], "a list");
      x.k = pool.k_at(page, kv_head);
      x.v = pool.v_at(page, kv_head);
      if (pool.k_scale) {
        x.k_scale = pool.k_scale_at(page, kv_head);
        x.v_scale = pool.v_scale_at(page, kv_head);
      }
    }
    found.push_back(x);
  }
}

// -inf for the tokens of a page that the row at `pos` does not see.
void hide(float* s, const Page& page, int64_t pos, int64_t sinks, int64_t first) {
  for (int64_t t = 0; t < TILE; ++t) {
    const int64_t at = page.base + t;
    const bool seen = page.valid >= 0 ? t < page.valid : at <= pos && (at < sinks || at >= first);
    s[t] = seen ? s[t] : NEG_INF;
  }
}

// One part. T: of the tiles that are no codes. Writes, for each row, the sums, the maximum (base 2) and the weight.
template <class T>
void attend(const Call& call, int64_t b, int64_t h, int64_t begin, int64_t end, float* acc, float* top, float* weight,
            Scratch& scratch) {
  using W = Operand<T>;
  const Pool& pool = call.pool;
  const int64_t size = call.size, n = call.group * call.rows;
  const bool codes = pool.format == Format::int8 || pool.format == Format::int4;
  std::fill(acc, acc + n * size, 0.f);
  std::fill(top, top + n, NEG_INF);
  std::fill(weight, weight + n, 0.f);
  visible_pages(call, b, h, begin, end, scratch.pages);
  const std::vector<Page>& pages = scratch.pages;
  if (pages.empty()) return;

  scratch.reserve(n * size * (sizeof(W) + 4 + 4) + n * WIDTH * 4 + TILE * size * sizeof(T) + TILE * size + 6 * 64);
  W* q = scratch.take<W>(n * size);                // rows in the order (query head, t)
  float* wide = scratch.take<float>(n * size);     // the same in float, for codes
  float* scaled = scratch.take<float>(n * size);   // with the K scale of a page
  float* s = scratch.take<float>(n * WIDTH);       // scores, then weights; a page's 64 weights may be bfloat16
  T* tile = scratch.take<T>(TILE * size);
  int8_t* bytes = scratch.take<int8_t>(TILE * size);
  for (int64_t r = 0; r < n; ++r) {
    const int64_t head = h * call.group + r / call.rows, t = r % call.rows;
    const T* from = (const T*)call.q + b * call.qb + head * call.qh + t * call.qt;
    for (int64_t d = 0; d < size; ++d) {
      if constexpr (std::is_same_v<W, T>) q[r * size + d] = from[d];
      else q[r * size + d] = to_float(from[d]);
      wide[r * size + d] = to_float(from[d]);
    }
  }
  const int64_t oldest = call.lens[b * call.lens_stride] - call.rows;
  const int64_t first = call.first ? call.first[b * call.first_stride] : 0;
  const float c = call.softcap, scale = call.scale * (c > 0 ? 1 / c : LOG2E);
  const int64_t packed = pool.format == Format::int4 ? 2 : 1;  // codes of a byte
  const int64_t width = size / packed;

  std::vector<const char*>& order = scratch.order;
  order.clear();
  for (size_t g = 0; g < pages.size(); g += GROUP) {
    const size_t stop = std::min(g + GROUP, pages.size());
    for (size_t i = g; i < stop; ++i) order.push_back(pages[i].k);
    for (size_t i = g; i < stop; ++i) order.push_back(pages[i].v);
  }
  order.resize(order.size() + AHEAD, order.back());
  for (int i = 0; i < AHEAD; ++i) prefetch(order[i], TILE * width * pool.k_bytes);
  const char* const* ahead = order.data() + AHEAD;

  for (size_t g = 0; g < pages.size(); g += GROUP) {
    const size_t stop = std::min(g + GROUP, pages.size());
    for (size_t i = g; i < stop; ++i, ++ahead) {
      const Page& page = pages[i];
      float* at = s + (i - g) * TILE;
      if (codes && !page.tail) {
        transpose_codes((const uint8_t*)page.k, TILE, width, bytes, TILE, packed == 2 ? width * TILE : 0, *ahead);
        for (int64_t r = 0; r < n; ++r)
          for (int64_t d = 0; d < size; d += LANES)
            store(scaled + r * size + d, load(wide + r * size + d) * load(page.k_scale + d));
        by_rows(n, [&](int64_t r, auto R) {
          tile_scores<int8_t, R>(bytes, scaled + r * size, size, at + r * WIDTH, WIDTH, nullptr);
        });
      } else {
        const T* k = (const T*)page.k;
        if (page.tail || pool.format == Format::paged) pack_k(k, size, tile), k = tile;
        by_rows(n, [&](int64_t r, auto R) {
          tile_scores<T, R>(k, q + r * size, size, at + r * WIDTH, WIDTH, r ? (const char*)k : *ahead);
        });
      }
      if (page.masked)
        for (int64_t r = 0; r < n; ++r) hide(at + r * WIDTH, page, oldest + r % call.rows, call.sinks, first);
    }

    const int64_t tokens = (stop - g) * TILE;
    for (int64_t r = 0; r < n; ++r) {
      float* row = s + r * WIDTH;
      vf most = splat(NEG_INF);
      for (int64_t t = 0; t < tokens; t += LANES) {
        const vf dot = load(row + t);
        vf x = dot * scale;
        if (c > 0) x = tanh(x) * (c * LOG2E);
        x = select(x > LARGEST, splat(LARGEST), x);
        x = select(dot == NEG_INF, dot, x);
        store(row + t, x);
        most = vmax(most, x);
      }
      const float now = std::max(top[r], hmax(most)), base = now == NEG_INF ? 0.f : now;
      const float keep = exp2(top[r] - base);
      top[r] = now;
      vf sum = {};
      for (size_t i = g; i < stop; ++i) {
        float* at = row + (i - g) * TILE;
        const bool narrowed = !std::is_same_v<W, float> && (!codes || pages[i].tail);
        for (int64_t t = 0; t < TILE; t += LANES) {
          const vf p = exp2(load(at + t) - base);
          sum += p;
          if (narrowed) store((bf16*)at + t, p);
          else store(at + t, p);
        }
      }
      weight[r] = weight[r] * keep + hsum(sum);
      if (keep != 1.f)
        for (int64_t d = 0; d < size; d += LANES) store(acc + r * size + d, load(acc + r * size + d) * keep);
    }

    for (size_t i = g; i < stop; ++i, ++ahead) {
      const Page& page = pages[i];
      const float* at = s + (i - g) * TILE;
      if (codes && !page.tail) {
        transpose_codes((const uint8_t*)page.v, width, TILE, bytes, size, packed == 2 ? width : 0, *ahead);
        by_rows(n, [&](int64_t r, auto R) {
          add_values<int8_t, R>(bytes, at + r * WIDTH, WIDTH, size, acc + r * size, page.v_scale, nullptr);
        });
      } else {
        const T* v = (const T*)page.v;
        const bool rows = page.tail || pool.format == Format::paged;
        if (rows && sizeof(T) == 2) pack_v(v, size, tile), v = tile;
        constexpr int64_t ld = WIDTH * 4 / sizeof(W);
        by_rows(n, [&](int64_t r, auto R) {
          const char* next = r ? (const char*)v : *ahead;
          add_values<T, R>(v, (const W*)(at + r * WIDTH), ld, size, acc + r * size, nullptr, next);
        });
      }
    }
  }
}

// Unites the parts of one row, `stride` floats apart: out = sum w acc / sum w weight, w = 2 ** (top - largest top).
template <class O>
void unite(const float* acc, const float* top, const float* weight, int64_t parts, int64_t stride, int64_t size,
           O* out, float* lse) {
  float most = NEG_INF;
  for (int64_t i = 0; i < parts; ++i) most = std::max(most, top[i * stride]);
  const float base = most == NEG_INF ? 0.f : most;
  float total = 0;
  for (int64_t i = 0; i < parts; ++i) total += exp2(top[i * stride] - base) * weight[i * stride];
  const float by = total == 0 ? 0.f : 1 / total;
  for (int64_t d = 0; d < size; d += LANES) {
    vf sum = {};
    for (int64_t i = 0; i < parts; ++i) sum += load(acc + i * stride + d) * exp2(top[i * stride] - base);
    store(out + d, sum * by);
  }
  *lse = total == 0 ? NEG_INF : (base + std::log2(total)) * LN2;
}

template <class T>
void decode_as(const Call& call, int64_t splits, at::Tensor& out, at::Tensor& lse, int64_t threads) {
  const int64_t lists = call.batch * call.heads, n = call.group * call.rows, size = call.size;
  std::vector<int64_t> counts(lists);
  for (int64_t i = 0; i < lists; ++i) {
    const int64_t b = i / call.heads, h = i % call.heads, len = call.lens[b * call.lens_stride];
    TORCH_CHECK_INDEX(len >= 0, "context_lens[", b, "] is ", len, ": 0 or more is needed");
    const bool listed = call.lists.counts != nullptr;
    counts[i] = listed ? call.lists.counts[b * call.lists.cb + h * call.lists.ch] : (len + TILE - 1) / TILE;
    TORCH_CHECK_INDEX(counts[i] >= 0 && counts[i] <= call.lists.slots, listed ? "selection.counts" : "context_lens",
                      " of sequence ", b, " needs ", counts[i], " blocks: there are ", call.lists.slots);
  }
  const int64_t longest = counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
  const int64_t parts =
      std::clamp<int64_t>(splits > 0 ? splits : std::min(MOST_PARTS, (longest + PART - 1) / PART), 1, longest + 1);
  const int64_t stride = n * (size + 2);  // of a part: sums, maxima, weights
  const std::unique_ptr<float[]> made(new float[lists * parts * stride]);
  parallel(lists * parts, threads, [&](int64_t begin, int64_t end) {
    static thread_local Scratch scratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t list = i / parts, part = i % parts, count = counts[list];
      float* acc = made.get() + i * stride;
      attend<T>(call, list / call.heads, list % call.heads, count * part / parts, count * (part + 1) / parts, acc,
                acc + n * size, acc + n * size + n, scratch);
    }
  });
  for (int64_t row = 0; row < lists * n; ++row) {
    const float* acc = made.get() + row / n * parts * stride;
    const int64_t r = row % n;
    const float *sums = acc + r * size, *top = acc + n * size + r;
    float* to = lse.mutable_data_ptr<float>() + row;
    if (out.scalar_type() == at::kFloat)
      unite(sums, top, top + n, parts, stride, size, out.mutable_data_ptr<float>() + row * size, to);
    else
      unite(sums, top, top + n, parts, stride, size, (bf16*)out.mutable_data_ptr() + row * size, to);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> decode(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const std::optional<at::Tensor>& k_scale,
    const std::optional<at::Tensor>& v_scale, const std::optional<at::Tensor>& page_valid, c10::string_view format,
    int64_t size, const at::Tensor& pages, const std::optional<at::Tensor>& blocks,
    const std::optional<at::Tensor>& counts, const at::Tensor& lens, const std::optional<at::Tensor>& first_pos,
    int64_t sinks, const std::optional<at::Tensor>& tail_k, const std::optional<at::Tensor>& tail_v, int64_t splits,
    double scale, double softcap, at::ScalarType out_dtype, int64_t threads) {
  const Pool pool(k, v, k_scale, v_scale, page_valid, format, size);
  const int64_t heads = blocks ? pages.size(1) : pool.n_heads, bytes = q.element_size();
  Lists lists{.pages = pages.const_data_ptr<int32_t>(), .pb = pages.stride(0), .ph = blocks ? pages.stride(1) : 0,
              .ps = pages.stride(-1), .slots = pages.size(-1)};
  if (blocks) {
    lists.blocks = blocks->const_data_ptr<int32_t>();
    lists.bb = blocks->stride(0), lists.bh = blocks->stride(1), lists.bs = blocks->stride(2);
    lists.counts = counts->const_data_ptr<int32_t>();
    lists.cb = counts->stride(0), lists.ch = counts->stride(1);
  }
  Call call{.pool = pool, .lists = lists, .q = (const char*)q.const_data_ptr(), .qb = q.stride(0), .qh = q.stride(1),
            .qt = q.stride(2), .batch = q.size(0), .heads = heads, .group = q.size(1) / heads, .rows = q.size(2),
            .size = size, .lens = lens.const_data_ptr<int32_t>(), .lens_stride = lens.stride(0), .sinks = sinks,
            .scale = float(scale), .softcap = float(softcap)};
  if (first_pos) call.first = first_pos->const_data_ptr<int32_t>(), call.first_stride = first_pos->stride(0);
  if (tail_k) {
    call.tail_k = (const char*)tail_k->const_data_ptr(), call.tail_v = (const char*)tail_v->const_data_ptr();
    call.tkb = tail_k->stride(0) * bytes, call.tkh = tail_k->stride(1) * bytes;
    call.tvb = tail_v->stride(0) * bytes, call.tvh = tail_v->stride(1) * bytes;
  }
  at::Tensor out = at::empty(q.sizes(), q.options().dtype(out_dtype));
  at::Tensor lse = at::empty(q.sizes().slice(0, 3), q.options().dtype(at::kFloat));
  if (q.scalar_type() == at::kFloat) decode_as<float>(call, splits, out, lse, threads);
  else decode_as<bf16>(call, splits, out, lse, threads);
  return {out, lse};
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("decode(Tensor q, " AGENTCTX_POOL
        ", Tensor pages, Tensor? blocks, Tensor? counts, Tensor lens, Tensor? first_pos, int sink_tokens, "
        "Tensor? tail_k, Tensor? tail_v, int splits, float scale, float softcap, ScalarType out_dtype, int threads)"
        " -> (Tensor, Tensor)",
        &agentctx::decode);
}
