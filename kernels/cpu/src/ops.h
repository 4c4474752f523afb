// What every file of operators needs: registration under the level's name, checks, and one parallel loop.
#pragma once

// Only the operators in use: all of ATen would double the time to compile a file.
#define AT_PER_OPERATOR_HEADERS
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "vec.h"

namespace agentctx {

// f(begin, end) over [0, n). `threads` 1 stays on the calling thread: a region over a busy core waits for a
// scheduler quantum, so the caller decides by the size of the work. Results must not depend on `threads`.
template <class F>
inline void parallel(int64_t n, int64_t threads, const F& f) {
  if (threads <= 1 || n <= 1) {
    f(int64_t(0), n);
  } else {
    at::parallel_for(0, n, std::max<int64_t>(1, (n + threads - 1) / threads), f);
  }
}

}  // namespace agentctx
