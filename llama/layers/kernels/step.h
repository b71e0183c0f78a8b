// The blocks of a model for few rows of x, one stage of the work after the other, each shared by
// the threads of a team. Knows nothing about tensors. Defined in step.cpp, used by layers.cpp.
//
// Letters: B rows, T positions a row, M = B T rows of x, H / K query / key-value heads, D numbers a
// head.
#pragma once

#include "attention_job.h"
#include "linear.h"

#include <cstdint>
#include <vector>

namespace llama3 {
struct Linear {
  Weights w;
  Method method;

  int64_t units() const { return method.blocks(w); }  // that threads share
};

struct Block {
  Linear wq, wk, wv, wo, w1, w2, w3;
  const void *attention_norm, *ffn_norm;
  char *keys, *values;  // of the first row's cache
};

struct Sizes {
  int64_t B, T, M, dim, hidden, H, K, D;
  float eps;
  int threads;
};

// x (M, dim), bf16 or fp32, goes through the blocks and is replaced by the result. `cache` has the
// strides and positions of keys and values. turns: D / 2 complex numbers for each of the M rows, or
// for each of T positions.
void run_step(const Sizes& sizes, const std::vector<Block>& blocks, const attention::Job& cache,
              void* x, bool is_bf16, const float* turns, int64_t turn_rows);
}  // namespace llama3
