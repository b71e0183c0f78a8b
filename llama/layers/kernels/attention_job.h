// A part of attention over a KV cache, as attention.h computes it: what attention.cpp and other
// operators share. Knows nothing about tensors or threads. Defined in attention.cpp.
//
// Letters: B rows, T queries a row, S positions, H / K query / key-value heads, D numbers a head.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace llama3::attention {
constexpr int64_t BLOCK = 64;  // keys and values converted to fp32 at a time: they fit L1
constexpr int64_t ROWS = 64;   // most queries x heads of a task
constexpr int64_t FEW = 8;     // up to so many of them, values are not converted beforehand

struct Job {
  int64_t B, T, H, K, D, S;
  int64_t width;  // D rounded up to a multiple of 64
  const void *queries, *keys, *values;
  int64_t key_strides[3], value_strides[3];  // of rows, positions and heads
  const int64_t* positions;
  int64_t position_stride;
  float scale;
  void* out;
};

// Queries [begin, end) of a row, in the heads of the key-value heads [head, last_head), over the
// keys [first, last).
struct Task {
  int64_t row, head, last_head, begin, end, first, last;
};

struct Scratch {
  float *keys, *values;   // (width, BLOCK), (BLOCK, width)
  float *queries, *sums;  // (rows, width)
  float *most, *total;    // (rows,): the largest score, the sum of the weights
};

// `attend` computes a task; `finish` merges `parts` of the same queries, whose results are `stride`
// floats apart, and writes to job.out.
struct Kernels {
  void (*attend)(const Job&, const Task&, const Scratch&);
  void (*finish)(const Job&, const Task&, const Scratch&, int64_t parts, int64_t stride);
};

const Kernels& kernels(bool is_bf16);  // of the fastest variant

// Offset of a task's row in queries and out. Rows are ordered by key-value head, query and head.
inline int64_t query(const Job& job, const Task& task, int64_t row) {
  const int64_t G = job.H / job.K, queries = task.end - task.begin;
  const int64_t t = task.begin + row / G % queries;
  const int64_t h = (task.head + row / G / queries) * G + row % G;
  return ((task.row * job.T + t) * job.H + h) * job.D;
}

// How the work on `longest` keys is divided.
struct Shape {
  int64_t queries, heads;  // of a task
  int64_t rows;            // of its scratch memory: queries x query heads
  int64_t stride;          // floats of its queries, sums, most and total, in whole cache lines

  explicit Shape(const Job& job) {
    const int64_t G = job.H / job.K;
    queries = std::clamp<int64_t>(ROWS / G, 1, job.T);
    // Few queries are limited by memory, which is fastest read sequentially: all heads at once.
    heads = queries * G <= FEW ? job.K : 1;
    rows = heads * queries * G;
    stride = 2 * rows * job.width + 2 * ((rows + 15) / 16 * 16);
  }

  void place(Scratch& to, float* memory, int64_t width) const {
    to.queries = memory, to.sums = to.queries + rows * width;
    to.most = to.sums + rows * width, to.total = to.most + (stride - 2 * rows * width) / 2;
  }
};

// Tasks over `step` keys each. Tasks for the same queries are neighbours; those with the most keys
// come first.
inline std::vector<Task> tasks_of(const Job& job, const Shape& shape, int64_t step,
                                  int64_t longest) {
  std::vector<Task> tasks;
  for (int64_t begin = (job.T - 1) / shape.queries * shape.queries; begin >= 0;
       begin -= shape.queries)
    for (int64_t row = 0; row < job.B; row++)
      for (int64_t head = 0; head < job.K; head += shape.heads)
        for (int64_t first = 0; first < longest; first += step)
          tasks.push_back({row, head, head + shape.heads, begin,
                           std::min(begin + shape.queries, job.T), first, first + step});
  return tasks;
}
}  // namespace llama3::attention
