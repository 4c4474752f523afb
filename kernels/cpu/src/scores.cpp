// block_scores and pool_queries: see kernels/scores.py.
#include "scores.h"

namespace agentctx {
namespace {

constexpr int64_t SHARE = 512;  // blocks of one head that stay together; the split depends on sizes only

}  // namespace

at::Tensor block_scores(const at::Tensor& q, const at::Tensor& data, const std::optional<at::Tensor>& thresholds,
                        int64_t kind, int64_t page, const at::Tensor& lens_, const std::optional<at::Tensor>& q_pos_,
                        int64_t group, bool per_head, double scale, int64_t threads) {
  const Scorer shape(q, data, thresholds, kind, page, group, scale);
  const int64_t batch = q.size(0), kv_heads = data.size(1), rows = q.size(2), capacity = shape.capacity();
  const int64_t heads = per_head ? q.size(1) : kv_heads, shares = (capacity + SHARE - 1) / SHARE;
  const at::Tensor lens = lens_.contiguous();
  const at::Tensor q_pos = q_pos_ ? q_pos_->contiguous() : at::Tensor();
  const int32_t* len = lens.const_data_ptr<int32_t>();
  const int32_t* pos = q_pos_ ? q_pos.const_data_ptr<int32_t>() : nullptr;
  for (int64_t b = 0; b < batch; ++b) shape.blocks_of(len[b]);
  at::Tensor out = at::empty({batch, heads, rows, capacity}, q.options().dtype(at::kFloat));
  float* to = out.mutable_data_ptr<float>();
  const int64_t head = rows * capacity;
  parallel(batch * kv_heads * shares, threads, [&](int64_t first, int64_t last) {
    Scorer scorer(q, data, thresholds, kind, page, group, scale);
    std::vector<int64_t> limits(rows);
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / shares / kv_heads, h = i / shares % kv_heads, begin = i % shares * SHARE;
      for (int64_t t = 0; t < rows; ++t)
        limits[t] = pos ? std::min<int64_t>(len[b], int64_t(pos[b * rows + t]) + 1) : len[b];
      const int64_t at = per_head ? b * heads + h * scorer.group_size() : b * heads + h;
      scorer.run(b, h, begin, std::min(capacity, begin + SHARE), limits, to + at * head, per_head ? head : 0);
    }
  });
  return out;
}

template <class T>
void pool(const at::Tensor& q, int64_t block_q, int64_t threads, at::Tensor& out) {
  const int64_t heads = q.size(1), rows = q.size(2), size = q.size(3), runs = out.size(2);
  const T* from = (const T*)q.const_data_ptr();
  float* to = out.mutable_data_ptr<float>();
  parallel(q.size(0) * heads * runs, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % runs * block_q, end = std::min(rows, begin + block_q);
      const T* x = from + i / runs / heads * q.stride(0) + i / runs % heads * q.stride(1) + begin * q.stride(2);
      float* sum = to + i * size;
      std::memset(sum, 0, sizeof(float) * size);
      for (int64_t t = begin; t < end; ++t, x += q.stride(2))
        for (int64_t d = 0; d < size; ++d) sum[d] += to_float(x[d]);
      for (int64_t d = 0; d < size; ++d) sum[d] /= float(end - begin);
    }
  });
}

at::Tensor pool_queries(const at::Tensor& q, int64_t block_q, int64_t threads) {
  const int64_t runs = (q.size(2) + block_q - 1) / block_q;
  at::Tensor out = at::empty({q.size(0), q.size(1), runs, q.size(3)}, q.options().dtype(at::kFloat));
  if (q.scalar_type() == at::kBFloat16)
    pool<bf16>(q, block_q, threads, out);
  else
    pool<float>(q, block_q, threads, out);
  return out;
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def(
      "block_scores(Tensor q, Tensor data, Tensor? thresholds, int kind, int page, Tensor lens, Tensor? q_pos, "
      "int group, bool per_head, float scale, int threads) -> Tensor",
      &agentctx::block_scores);
  m.def("pool_queries(Tensor q, int block_q, int threads) -> Tensor", &agentctx::pool_queries);
}
