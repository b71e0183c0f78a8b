// Where the parts of a block of a weight are; layers/blocks.py has the layout.
#pragma once

#include "linear.h"

namespace llama3 {
constexpr int64_t BLOCK_ROWS = 16;

// Bytes of a block with so many groups of 32 columns.
inline int64_t block_bytes(Kind kind, int64_t groups) {
  const int64_t codes = kind == Kind::blocks6 ? 24 : 16;
  return BLOCK_ROWS * (4 + groups + (groups + 1) / 2 + codes * groups);
}

// The b-th block of a tile of 16 outputs: a view.
struct BlockView {
  const BFloat16 *units, *zero_units;
  const uint8_t *low, *high, *nibbles, *top;

  BlockView(const Weights& w, int64_t tile, int64_t b) {
    const int64_t groups = w.columns / 32, per_tile = w.K / w.columns;
    const auto* bytes = static_cast<const uint8_t*>(w.w);
    bytes += (tile * per_tile + b) * block_bytes(w.kind, groups);
    units = reinterpret_cast<const BFloat16*>(bytes);
    zero_units = units + BLOCK_ROWS;
    low = bytes + 4 * BLOCK_ROWS;
    high = low + groups * BLOCK_ROWS;
    nibbles = high + (groups + 1) / 2 * BLOCK_ROWS;
    top = w.kind == Kind::blocks6 ? nibbles + groups * 16 * BLOCK_ROWS : nullptr;
  }

  // The integers of 6 bits of group g and row r.
  int steps(int64_t g, int r) const {
    return (low[16 * g + r] & 15) | (high[g / 2 * 16 + r] >> 4 * (g % 2) & 3) << 4;
  }
  int zero_steps(int64_t g, int r) const {
    return low[16 * g + r] >> 4 | (high[g / 2 * 16 + r] >> (4 * (g % 2) + 2) & 3) << 4;
  }

  // The lower halves of columns 8v to 8v + 7 of group g, from row r on: 4 bytes a row.
  const uint8_t* nibbles_at(int64_t g, int v, int r) const { return nibbles + 256 * g + 64 * v + 4 * r; }

  // The upper two bits, of codes of 6 bits, of columns 16u to 16u + 15.
  const uint8_t* top_at(int64_t g, int u, int r) const { return top + 128 * g + 64 * u + 4 * r; }
};
}  // namespace llama3
