// The operators between a layer's matmuls for parts of their inputs, as pointwise.h computes them:
// what pointwise.cpp and other operators share. Defined in pointwise.cpp.
#pragma once

#include <cstdint>

namespace llama3::pointwise {
// norm: rows of `width` numbers a, weight b. gate: elements of a and b. rotate: heads of `width`
// numbers a, whose pairs are multiplied by the complex numbers b: the same row of b for each
// `heads` of a, repeated after `turns` rows of b.
struct Job {
  int64_t width;
  float eps;
  const void *a, *b;
  void* y;  // may be a
  int64_t heads = 1, turns = 1;
};

using Kernel = void (*)(const Job&, int64_t begin, int64_t end);
struct Kernels {
  Kernel norm, gate, rotate;
};

const Kernels& kernels(bool is_bf16);  // of the fastest variant
}  // namespace llama3::pointwise
