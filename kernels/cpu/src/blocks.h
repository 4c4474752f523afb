// The logical blocks of one sequence: how many are in use, which page holds each, how many tokens it holds.
#pragma once

#include "tile.h"

namespace agentctx {

struct Blocks {
  const Pool& pool;
  const int32_t* table;
  int64_t stride;  // of the table, from block to block
  int64_t length;
  int64_t count;  // blocks in use

  Blocks(const Pool& pool_, const at::Tensor& block_table, const at::Tensor& lens, int64_t b)
      : pool(pool_),
        table(block_table.const_data_ptr<int32_t>() + b * block_table.stride(0)),
        stride(block_table.stride(1)),
        length(lens.const_data_ptr<int32_t>()[b * lens.stride(0)]),
        count((length + TILE - 1) / TILE) {
    TORCH_CHECK_INDEX(length >= 0 && count <= block_table.size(1), "context_lens[", b, "] is ", length, ": 0 to ",
                      block_table.size(1) * TILE, " fits the table");
  }
  int64_t page(int64_t block) const { return checked_page(pool, table[block * stride], "block_table"); }
  // A page that is marked is not in position order: a row sees all its tokens.
  bool marked(int64_t page) const { return pool.valid && pool.valid[page] >= 0; }
  int64_t held(int64_t block, int64_t page) const {
    return std::min<int64_t>(TILE, marked(page) ? pool.valid[page] : length - block * TILE);
  }
};

// `x` in the first n lanes, `fill` in the others.
inline vf first_lanes(vf x, int64_t n, float fill) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select(lane < int32_t(n), x, splat(fill));
}

}  // namespace agentctx
