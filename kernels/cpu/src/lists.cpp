// Complete lists: a few integers for each query block, sorted and made unique.
#include <algorithm>
#include <vector>

#include "ops.h"

namespace agentctx {
namespace {

std::tuple<at::Tensor, at::Tensor> complete_lists(const at::Tensor& blocks_, const at::Tensor& counts_,
                                                  const at::Tensor& q_offset_, int64_t block_q, int64_t page_tokens,
                                                  int64_t sinks, int64_t local) {
  const at::Tensor blocks = blocks_.contiguous(), counts = counts_.contiguous(), q_offset = q_offset_.contiguous();
  const int64_t heads = blocks.size(1), query_blocks = blocks.size(2), slots = blocks.size(3);
  const int64_t width = slots + sinks + local, lists = counts.numel();
  at::Tensor full = at::zeros({blocks.size(0), heads, query_blocks, width}, blocks.options());
  at::Tensor held = at::empty_like(counts);
  const int32_t *in = blocks.const_data_ptr<int32_t>(), *n_in = counts.const_data_ptr<int32_t>();
  const int32_t* offsets = q_offset.const_data_ptr<int32_t>();
  int32_t *out = full.mutable_data_ptr<int32_t>(), *n_out = held.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < lists; ++i, in += slots, out += width) {
    const int64_t start = offsets[i / (heads * query_blocks)] + i % query_blocks * block_q;
    const int64_t d = start < 0 ? 0 : start / page_tokens;
    TORCH_CHECK_INDEX(n_in[i] >= 0 && n_in[i] <= slots, "counts holds ", n_in[i], ": 0 to ", slots, " is needed");
    int32_t* end = std::copy_if(in, in + n_in[i], out, [d](int64_t x) { return x >= 0 && x < d; });
    for (int64_t x = 0; x < std::min(sinks, d); ++x) *end++ = int32_t(x);
    for (int64_t x = std::max<int64_t>(0, d - local); x < d; ++x) *end++ = int32_t(x);
    std::sort(out, end);
    int32_t* last = std::unique(out, end);
    std::fill(last, end, 0);
    n_out[i] = int32_t(last - out);
  }
  return {full, held};
}

}  // namespace
}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) {
  m.def(
      "complete_lists(Tensor blocks, Tensor counts, Tensor q_offset, int block_q, int page_tokens, int sinks, "
      "int local) -> (Tensor, Tensor)",
      &agentctx::complete_lists);
}
