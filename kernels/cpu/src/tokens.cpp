// Attention to keys that are fetched one by one: single tokens of a pool, or summary keys with an additive logit.
// 64 slots at a time are widened to float and serve all query rows of their KV head; the softmax runs along
// (Milakov, Gimelshein, 2018). Parts of a fixed number of slots are united at the end, so that few heads can keep
// several threads busy.
#include "tile.h"

namespace agentctx {
namespace {

constexpr int64_t STEP = 64, PART = 1024;

inline void widen_row(const float* src, int64_t size, float* dst) { std::memcpy(dst, src, size * sizeof(float)); }
inline void widen_row(const bf16* src, int64_t size, float* dst) {
  for (int64_t d = 0; d < size; d += LANES) store(dst + d, load(src + d));
}

// Near 0 the quotient loses digits, the series does not.
inline vf tanh(vf x) {
  vf magnitude = x < 0.f ? -x : x;
  vf e = exp2(magnitude * (-2.f * LOG2E));
  vf far = (1.f - e) / (1.f + e);
  vf y = x * x;
  vf near = magnitude * (1.f + y * (-1.f / 3 + y * (2.f / 15 + y * (-17.f / 315 + y * (62.f / 2835)))));
  vf result = select(magnitude < 0.25f, near, far);
  return x < 0.f ? -result : result;
}

// Single tokens of a pool.
template <class T>
struct Tokens {
  const Pool& pool;
  at::Tensor ids, counts;
  int64_t page_tokens;

  int64_t count(int64_t b, int64_t h) const {
    const int64_t n = counts.const_data_ptr<int32_t>()[b * counts.stride(0) + h * counts.stride(1)];
    TORCH_CHECK_INDEX(n >= 0 && n <= ids.size(2), "counts[", b, ", ", h, "] is ", n, ": 0 to ", ids.size(2),
                      " is needed");
    return n;
  }

  void fetch(int64_t b, int64_t h, int64_t begin, int64_t n, float* k, float* v, float* bias) const {
    const int32_t* id = ids.const_data_ptr<int32_t>() + b * ids.stride(0) + h * ids.stride(1);
    const int64_t size = pool.size, limit = pool.n_pages * page_tokens;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t token = id[(begin + j) * ids.stride(2)];
      TORCH_CHECK_INDEX(token >= 0 && token < limit, "tokens[", b, ", ", h, ", ", begin + j, "] is ", token,
                        ": the pool has ", limit, " tokens");
      const int64_t page = token / page_tokens, slot = token % page_tokens;
      const T* from_k = (const T*)pool.k_at(page, h);
      const T* from_v = (const T*)pool.v_at(page, h);
      float *to_k = k + j * size, *to_v = v + j * size;
      if (pool.format == Format::paged) {
        widen_row(from_k + slot * size, size, to_k);
        widen_row(from_v + slot * size, size, to_v);
      } else {
        for (int64_t d = 0; d < size; ++d) to_k[d] = to_float(from_k[k_index<T>(slot, d)]);
        for (int64_t d = 0; d < size; ++d) to_v[d] = to_float(from_v[v_index<T>(slot, d, size)]);
      }
      bias[j] = 0.f;
    }
  }
};

// Keys that lie together, with a logit each.
template <class T>
struct Pseudo {
  at::Tensor k, v, log_weight;

  int64_t count(int64_t, int64_t) const { return k.size(2); }

  void fetch(int64_t b, int64_t h, int64_t begin, int64_t n, float* to_k, float* to_v, float* bias) const {
    const int64_t size = k.size(3);
    const T* from_k = (const T*)k.const_data_ptr() + b * k.stride(0) + h * k.stride(1);
    const T* from_v = (const T*)v.const_data_ptr() + b * v.stride(0) + h * v.stride(1);
    const float* weight = log_weight.const_data_ptr<float>() + b * log_weight.stride(0) + h * log_weight.stride(1);
    for (int64_t j = 0; j < n; ++j) {
      widen_row(from_k + (begin + j) * k.stride(2), size, to_k + j * size);
      widen_row(from_v + (begin + j) * v.stride(2), size, to_v + j * size);
      bias[j] = weight[(begin + j) * log_weight.stride(2)] * LOG2E;
    }
  }
};

// acc[d] = acc[d] * fade + sum_j p[j] v[j][d], `W` vectors of d at a time.
template <int W>
inline void add_values(float* acc, float fade, const float* p, const float* v, int64_t n, int64_t size) {
  vf sum[W];
  for (int w = 0; w < W; ++w) sum[w] = load(acc + w * LANES) * fade;
  for (int64_t j = 0; j < n; ++j)
    for (int w = 0; w < W; ++w) sum[w] += p[j] * load(v + j * size + w * LANES);
  for (int w = 0; w < W; ++w) store(acc + w * LANES, sum[w]);
}

// rows of q `[rows][D]` against slots [begin, end): out `[rows][D]`, lse `[rows]` in base 2.
template <class Source>
void attend(const Source& source, int64_t b, int64_t h, int64_t begin, int64_t end, const float* q, int64_t rows,
            int64_t size, float scale, float softcap, float* out, float* lse, float* scratch) {
  float *k = scratch, *v = k + STEP * size;
  float score[STEP], bias[STEP];
  std::vector<float> total(rows, 0.f);
  std::fill(out, out + rows * size, 0.f);
  std::fill(lse, lse + rows, NEG_INF);  // the largest score until the end
  for (; begin < end; begin += STEP) {
    const int64_t n = std::min(STEP, end - begin);
    std::fill(bias + n, bias + STEP, NEG_INF);
    source.fetch(b, h, begin, n, k, v, bias);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < n; ++j) {
        vf sum{};
        for (int64_t d = 0; d < size; d += LANES) sum += load(q + r * size + d) * load(k + j * size + d);
        score[j] = hsum(sum);
      }
      std::fill(score + n, score + STEP, 0.f);
      vf best = splat(NEG_INF);
      for (int64_t j = 0; j < STEP; j += LANES) {
        vf s = load(score + j);
        s = softcap > 0 ? tanh(s * (scale / softcap)) * (softcap * LOG2E) : s * (scale * LOG2E);
        s += load(bias + j);
        store(score + j, s);
        best = vmax(s, best);
      }
      const float top = std::max(lse[r], hmax(best));
      if (top == NEG_INF) continue;
      const float fade = exp2(lse[r] - top);
      vf sum{};
      for (int64_t j = 0; j < STEP; j += LANES) {
        vf p = exp2(load(score + j) - top);
        store(score + j, p);
        sum += p;
      }
      total[r] = total[r] * fade + hsum(sum);
      lse[r] = top;
      float* acc = out + r * size;
      int64_t d = 0;
      for (; d + 4 * LANES <= size; d += 4 * LANES) add_values<4>(acc + d, fade, score, v + d, n, size);
      for (; d < size; d += LANES) add_values<1>(acc + d, fade, score, v + d, n, size);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    if (lse[r] == NEG_INF) continue;
    for (int64_t d = 0; d < size; ++d) out[r * size + d] /= total[r];
    lse[r] += std::log2(total[r]);
  }
}

// All heads. The work is cut by sizes alone, so any number of threads gives the same bits.
template <class T, class Source>
std::tuple<at::Tensor, at::Tensor> run(const at::Tensor& q, const Source& source, int64_t kv_heads, int64_t slots,
                                       double scale, double softcap, bool narrowed, int64_t threads) {
  const int64_t batch = q.size(0), heads = q.size(1), tokens = q.size(2), size = q.size(3);
  const int64_t group = heads / kv_heads, rows = group * tokens;
  const int64_t parts = std::max<int64_t>(1, (slots + PART - 1) / PART);
  auto out = at::empty(q.sizes(), q.options().dtype(narrowed ? at::kBFloat16 : at::kFloat));
  auto lse = at::empty({batch, heads, tokens}, q.options().dtype(at::kFloat));
  float* lse_to = lse.mutable_data_ptr<float>();
  const T* from = (const T*)q.const_data_ptr();
  std::vector<float> part_out(batch * kv_heads * parts * rows * size), part_lse(batch * kv_heads * parts * rows);

  parallel(batch * kv_heads * parts, threads, [&](int64_t first, int64_t last) {
    std::vector<float> query(rows * size), scratch(2 * STEP * size);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / parts / kv_heads, h = i / parts % kv_heads, begin = i % parts * PART;
      for (int64_t r = 0; r < rows; ++r)
        widen_row(from + b * q.stride(0) + (h * group + r / tokens) * q.stride(1) + r % tokens * q.stride(2), size,
                  query.data() + r * size);
      attend(source, b, h, begin, std::min(source.count(b, h), begin + PART), query.data(), rows, size, float(scale),
             float(softcap), part_out.data() + i * rows * size, part_lse.data() + i * rows, scratch.data());
    }
  });

  std::vector<float> sum(size);
  for (int64_t r = 0; r < batch * heads * tokens; ++r) {
    const int64_t at = r / rows * parts * rows + r % rows;  // of its first part
    float top = NEG_INF, total = 0.f;
    for (int64_t p = 0; p < parts; ++p) {
      const float x = part_lse[at + p * rows];
      if (x > top || x != x) top = x;
      if (top != top) break;
    }
    std::fill(sum.begin(), sum.end(), 0.f);
    for (int64_t p = 0; p < parts && top != NEG_INF; ++p) {
      const float weight = exp2(part_lse[at + p * rows] - top);
      total += weight;
      for (int64_t d = 0; d < size; ++d) sum[d] += weight * part_out[(at + p * rows) * size + d];
    }
    const float share = top == NEG_INF ? 0.f : 1.f / total;
    lse_to[r] = top == NEG_INF ? NEG_INF : (top + std::log2(total)) * LN2;
    if (narrowed) {
      bf16* to = (bf16*)out.mutable_data_ptr() + r * size;
      for (int64_t d = 0; d < size; ++d) to[d] = narrow(sum[d] * share);
    } else {
      float* to = (float*)out.mutable_data_ptr() + r * size;
      for (int64_t d = 0; d < size; ++d) to[d] = sum[d] * share;
    }
  }
  return {out, lse};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> token_decode(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                std::string_view format, int64_t page_tokens, const at::Tensor& tokens,
                                                const at::Tensor& counts, double scale, double softcap, bool narrowed,
                                                int64_t threads) {
  const Pool pool(k, v, std::nullopt, std::nullopt, std::nullopt, format, q.size(3));
  const int64_t heads = pool.n_heads, slots = tokens.size(2);
  if (q.scalar_type() == at::kFloat) {
    const Tokens<float> source{pool, tokens, counts, page_tokens};
    return run<float>(q, source, heads, slots, scale, softcap, narrowed, threads);
  }
  const Tokens<bf16> source{pool, tokens, counts, page_tokens};
  return run<bf16>(q, source, heads, slots, scale, softcap, narrowed, threads);
}

std::tuple<at::Tensor, at::Tensor> pseudo_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                    const at::Tensor& log_weight, double scale, double softcap,
                                                    bool narrowed, int64_t threads) {
  const int64_t heads = k.size(1), slots = k.size(2);
  if (q.scalar_type() == at::kFloat) {
    return run<float>(q, Pseudo<float>{k, v, log_weight}, heads, slots, scale, softcap, narrowed, threads);
  }
  return run<bf16>(q, Pseudo<bf16>{k, v, log_weight}, heads, slots, scale, softcap, narrowed, threads);
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def(
      "token_decode(Tensor q, Tensor k, Tensor v, str format, int page_tokens, Tensor tokens, Tensor counts, "
      "float scale, float softcap, bool narrowed, int threads) -> (Tensor, Tensor)",
      &agentctx::token_decode);
  m.def(
      "pseudo_attention(Tensor q, Tensor k, Tensor v, Tensor log_weight, float scale, float softcap, bool narrowed, "
      "int threads) -> (Tensor, Tensor)",
      &agentctx::pseudo_attention);
}
