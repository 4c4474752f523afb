// The union of attentions over disjoint keys, row by row.
#include "ops.h"

namespace agentctx {
namespace {

void add(float* acc, float weight, const float* x, int64_t size) {
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) store(acc + d, load(acc + d) + weight * load(x + d));
  for (; d < size; ++d) acc[d] += weight * x[d];
}

void add(float* acc, float weight, const bf16* x, int64_t size) {
  int64_t d = 0;
  for (; d + LANES <= size; d += LANES) store(acc + d, load(acc + d) + weight * load(x + d));
  for (; d < size; ++d) acc[d] += weight * widen(x[d]);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> merge_lse(at::TensorList outs, at::TensorList lses, bool narrowed, int64_t threads) {
  const int64_t parts = outs.size(), size = outs[0].size(3), rows = lses[0].numel();
  std::vector<at::Tensor> kept;  // contiguous copies, where a part is not
  std::vector<const void*> from;
  std::vector<const float*> lse_from;
  for (int64_t i = 0; i < parts; ++i) {
    kept.push_back(outs[i].contiguous());
    from.push_back(kept.back().const_data_ptr());
    kept.push_back(lses[i].contiguous());
    lse_from.push_back(kept.back().const_data_ptr<float>());
  }
  auto out = at::empty(outs[0].sizes(), outs[0].options().dtype(narrowed ? at::kBFloat16 : at::kFloat));
  auto lse = at::empty(lses[0].sizes(), lses[0].options());
  char* to = (char*)out.mutable_data_ptr();
  float* lse_to = lse.mutable_data_ptr<float>();

  parallel(rows, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> acc(size), weights(parts);
    for (int64_t r = begin; r < end; ++r) {
      float top = NEG_INF, total = 0.f;
      // NaN must reach the result, and no comparison lets it through.
      for (int64_t i = 0; i < parts; ++i) {
        const float x = lse_from[i][r];
        if (x > top || x != x) top = x;
        if (top != top) break;
      }
      for (int64_t i = 0; i < parts; ++i) {
        const float x = lse_from[i][r];
        weights[i] = x == NEG_INF ? 0.f : exp2((x - top) * LOG2E);
        total += weights[i];
      }
      std::fill(acc.begin(), acc.end(), 0.f);
      for (int64_t i = 0; i < parts; ++i) {
        if (lse_from[i][r] == NEG_INF) continue;
        const float share = weights[i] / total;
        if (outs[i].scalar_type() == at::kFloat) {
          add(acc.data(), share, (const float*)from[i] + r * size, size);
        } else {
          add(acc.data(), share, (const bf16*)from[i] + r * size, size);
        }
      }
      lse_to[r] = top == NEG_INF ? NEG_INF : top + std::log(total);
      if (narrowed) {
        for (int64_t d = 0; d < size; ++d) ((bf16*)to)[r * size + d] = narrow(acc[d]);
      } else {
        std::copy(acc.begin(), acc.end(), (float*)to + r * size);
      }
    }
  });
  return {out, lse};
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def("merge_lse(Tensor[] outs, Tensor[] lses, bool narrowed, int threads) -> (Tensor, Tensor)",
        &agentctx::merge_lse);
}
