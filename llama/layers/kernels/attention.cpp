// Attention over a KV cache, where each query reads the keys up to its own position. One query per
// row is limited only by reading the cache; for many queries no score matrix is stored. Knows
// nothing about models. Compiled and loaded by __init__.py; the arithmetic is in attention.h.
//
// Letters: B rows, T queries a row, S positions, H / K query / key-value heads, D numbers a head.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

namespace {
using at::Tensor;
using std::memset;

constexpr int64_t BLOCK = 64;       // keys and values converted to fp32 at a time: they fit L1
constexpr int64_t ROWS = 64;        // most queries x heads of a task
constexpr int64_t FEW = 8;          // up to so many of them, values are not converted beforehand
constexpr int64_t PROMPT = 16;      // from so many queries a row on, prompt_attention.h is used
constexpr int64_t PART = 64;        // a task with fewer keys is not divided
constexpr int64_t SHARE = 1 << 19;  // least number of multiplications per thread

struct Job {
  int64_t B, T, H, K, D, S;
  int64_t width;  // D rounded up to a multiple of 64
  const void *queries, *keys, *values;
  at::IntArrayRef key_strides, value_strides;
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

// Offset of a task's row in queries and out. Rows are ordered by key-value head, query and head.
int64_t query(const Job& job, const Task& task, int64_t row) {
  const int64_t G = job.H / job.K, queries = task.end - task.begin;
  const int64_t t = task.begin + row / G % queries;
  const int64_t h = (task.head + row / G / queries) * G + row % G;
  return ((task.row * job.T + t) * job.H + h) * job.D;
}

struct alignas(64) Line {
  float numbers[16];
};
}  // namespace

#define ARITHMETIC "attention.h"
#include "variants.h"

#if defined(__x86_64__)
#undef TARGET
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
namespace {
namespace with_bf16 {
#include "bf16.h"
#include "prompt_attention.h"
}  // namespace with_bf16
}  // namespace
#endif

namespace {
struct Kernels {
  void (*attend)(const Job&, const Task&, const Scratch&);
  void (*finish)(const Job&, const Task&, const Scratch&, int64_t parts, int64_t stride);
};
#define FP32(ns) Kernels{ns::attend<float>, ns::finish<float>}
#define BF16(ns) Kernels{ns::attend<BFloat16>, ns::finish<BFloat16>}
const Kernels fp32[] = {EACH_VARIANT(FP32)}, bf16[] = {EACH_VARIANT(BF16)};

void check(const Tensor& xq, const Tensor& keys, const Tensor& values, const Tensor& positions) {
  for (const auto* t : {&xq, &keys, &values, &positions})
    TORCH_CHECK(t->device().is_cpu(), "all must be on the CPU, not on ", t->device());
  const auto dtype = xq.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "xq must be fp32 or bf16, not ",
              dtype);
  TORCH_CHECK(keys.scalar_type() == dtype && values.scalar_type() == dtype,
              "keys and values must be ", dtype, " as xq; got ", keys.scalar_type(), " and ",
              values.scalar_type());
  TORCH_CHECK(xq.dim() == 4 && keys.dim() == 4 && keys.sizes() == values.sizes() &&
                  keys.size(0) == xq.size(0) && keys.size(3) == xq.size(3),
              "xq must be (B, T, H, D), keys and values (B, S, K, D); got ", xq.sizes(), ", ",
              keys.sizes(), " and ", values.sizes());
  TORCH_CHECK(keys.size(2) > 0 && xq.size(2) % keys.size(2) == 0, keys.size(2),
              " key-value heads do not divide ", xq.size(2), " heads");
  TORCH_CHECK(keys.size(3) == 0 || (keys.stride(3) == 1 && values.stride(3) == 1),
              "the numbers of a head must be contiguous");
  TORCH_CHECK(positions.scalar_type() == at::kLong && positions.dim() == 2 &&
                  (positions.size(0) == 1 || positions.size(0) == xq.size(0)) &&
                  positions.size(1) == xq.size(1),
              "positions must be int64 (B or 1, T); got ", positions.sizes());
}

// Tasks of `heads` x `queries` over `step` keys each; those with the most keys come first.
std::vector<Task> tasks_of(const Job& job, int64_t heads, int64_t queries, int64_t step,
                           int64_t longest) {
  std::vector<Task> tasks;
  for (int64_t begin = (job.T - 1) / queries * queries; begin >= 0; begin -= queries)
    for (int64_t row = 0; row < job.B; row++)
      for (int64_t head = 0; head < job.K; head += heads)
        for (int64_t first = 0; first < longest; first += step)
          tasks.push_back({row, head, head + heads, begin, std::min(begin + queries, job.T), first,
                           first + step});
  return tasks;
}

// What computes the tasks of so many queries a row.
Kernels kernels_for(const Job& job, bool is_bf16) {
  Kernels kernels = (is_bf16 ? bf16 : fp32)[llama3::variant()];
#if defined(__x86_64__)
  if (is_bf16 && job.T >= PROMPT && llama3::variant() == llama3::AVX512_BF16)
    kernels.attend = with_bf16::attend_prompt;
#endif
  return kernels;
}

void run(const Job& job, const Kernels& kernels, int64_t longest) {
  const int64_t G = job.H / job.K, queries = std::clamp<int64_t>(ROWS / G, 1, job.T);
  // Few queries are limited by memory, which is fastest when read sequentially: all heads at once.
  const int64_t heads = queries * G <= FEW ? job.K : 1, rows = heads * queries * G;
  const int64_t units = job.B * job.K / heads * ((job.T + queries - 1) / queries);
  const int64_t work = job.B * job.T * job.H * job.D * longest;
  const int64_t threads = std::clamp<int64_t>(work / SHARE, 1, at::get_num_threads());
  int64_t parts = 1;
  if (units < 4 * threads)
    parts = std::clamp<int64_t>(longest / PART, 1, threads / std::gcd(units, threads));
  const int64_t step = (longest + parts - 1) / parts;
  parts = (longest + step - 1) / step;  // rounding `step` up may have left some parts empty
  const std::vector<Task> tasks = tasks_of(job, heads, queries, step, longest);
  // Per task, in cache lines: queries, sums, most, total. Stored only if there are parts to merge.
  const int64_t line = 16, of_rows = (rows + line - 1) / line * line;
  const int64_t stride = 2 * rows * job.width + 2 * of_rows;
  std::vector<Line> kept(parts > 1 ? tasks.size() * stride / line : 0);
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::vector<Line> own((2 * BLOCK * job.width + (parts > 1 ? 0 : stride)) / line);
    Scratch to;
    to.keys = own[0].numbers, to.values = to.keys + BLOCK * job.width;
    for (size_t i = next++; i < tasks.size(); i = next++) {
      to.queries = parts > 1 ? kept[i * stride / line].numbers : to.values + BLOCK * job.width;
      to.sums = to.queries + rows * job.width, to.most = to.sums + rows * job.width;
      to.total = to.most + of_rows;
      kernels.attend(job, tasks[i], to);
      if (parts == 1) kernels.finish(job, tasks[i], to, 1, 0);
    }
  });
  if (parts > 1)
    for (size_t i = 0; i < tasks.size(); i += parts) {
      Scratch from;
      from.sums = kept[i * stride / line].numbers + rows * job.width;
      from.most = from.sums + rows * job.width, from.total = from.most + of_rows;
      kernels.finish(job, tasks[i], from, parts, stride);
    }
}

// xq (B, T, H, D), keys and values (B, S, K, D), positions (B or 1, T) -> (B, T, H, D): query t of
// row b reads the keys 0 to positions[b, t] of its key-value head.
Tensor attend(const Tensor& xq, const Tensor& keys, const Tensor& values, const Tensor& positions) {
  check(xq, keys, values, positions);
  const Tensor q = xq.contiguous(), limits = positions.contiguous();
  Tensor out = at::empty(q.sizes(), q.options());
  Job job;
  job.B = q.size(0), job.T = q.size(1), job.H = q.size(2), job.D = q.size(3);
  job.S = keys.size(1), job.K = keys.size(2);
  job.width = (job.D + 63) / 64 * 64;
  job.queries = q.const_data_ptr(), job.keys = keys.const_data_ptr();
  job.values = values.const_data_ptr(), job.out = out.mutable_data_ptr();
  job.key_strides = keys.strides(), job.value_strides = values.strides();
  job.positions = limits.const_data_ptr<int64_t>();
  job.position_stride = limits.size(0) == 1 ? 0 : job.T;
  job.scale = 1 / std::sqrt(static_cast<float>(job.D));
  if (out.numel() == 0) return out;
  int64_t longest = 0;
  for (int64_t i = 0; i < limits.numel(); i++) {
    TORCH_CHECK(job.positions[i] >= 0 && job.positions[i] < job.S, "position ", job.positions[i],
                " is outside the ", job.S, " that keys and values have");
    longest = std::max(longest, job.positions[i] + 1);
  }
  run(job, kernels_for(job, q.scalar_type() == at::kBFloat16), longest);
  return out;
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(llama3, m) {
  m.def("attend(Tensor xq, Tensor keys, Tensor values, Tensor positions) -> Tensor");
}

TORCH_LIBRARY_IMPL(llama3, CPU, m) { m.impl("attend", &attend); }
