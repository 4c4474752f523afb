// An empty parallel region, to measure what one costs.
#include "ops.h"

namespace agentctx {

void region(int64_t threads) {
  parallel(threads, threads, [](int64_t, int64_t) {});
}

}  // namespace agentctx

TORCH_LIBRARY_FRAGMENT(AGENTCTX_NS, m) { m.def("region(int threads) -> ()", &agentctx::region); }
