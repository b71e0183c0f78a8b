// Attention over a KV cache, where each query reads the keys up to its own position. One query per
// row is limited only by reading the cache; for many queries no score matrix is stored. Knows
// nothing about models. Compiled and loaded by __init__.py; the arithmetic is in attention.h.
//
// Letters: B rows, T queries a row, S positions, H / K query / key-value heads, D numbers a head.

#include "attention_job.h"

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
using namespace llama3::attention;

constexpr int64_t PROMPT = 17;      // from so many queries a row on, prompt_attention.h is used
constexpr int64_t PART = 64;        // a task with fewer keys is not divided
constexpr int64_t SHARE = 1 << 19;  // least number of multiplications per thread

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
#define FP32(ns) Kernels{ns::attend<float>, ns::finish<float>}
#define BF16(ns) Kernels{ns::attend<BFloat16>, ns::finish<BFloat16>}
const Kernels fp32[] = {EACH_VARIANT(FP32)}, bf16[] = {EACH_VARIANT(BF16)};
}  // namespace

const Kernels& llama3::attention::kernels(bool is_bf16) {
  return (is_bf16 ? bf16 : fp32)[variant()];
}

namespace {
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

// What computes the tasks of so many queries a row.
Kernels kernels_for(const Job& job, bool is_bf16) {
  Kernels found = kernels(is_bf16);
#if defined(__x86_64__)
  if (is_bf16 && job.T >= PROMPT && llama3::variant() == llama3::AVX512_BF16)
    found.attend = with_bf16::attend_prompt;
#endif
  return found;
}

void run(const Job& job, const Kernels& kernels, int64_t longest) {
  const Shape shape(job);
  const int64_t units =
      job.B * job.K / shape.heads * ((job.T + shape.queries - 1) / shape.queries);
  const int64_t work = job.B * job.T * job.H * job.D * longest;
  const int64_t threads = std::clamp<int64_t>(work / SHARE, 1, at::get_num_threads());
  int64_t parts = 1;
  if (units < 4 * threads)
    parts = std::clamp<int64_t>(longest / PART, 1, threads / std::gcd(units, threads));
  const int64_t step = (longest + parts - 1) / parts;
  parts = (longest + step - 1) / step;  // rounding `step` up may have left some parts empty
  const std::vector<Task> tasks = tasks_of(job, shape, step, longest);
  // What a task computes is stored only if there are parts to merge.
  const int64_t line = 16, stride = shape.stride;
  std::vector<Line> kept(parts > 1 ? tasks.size() * stride / line : 0);
  std::atomic<size_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    std::vector<Line> own((2 * BLOCK * job.width + (parts > 1 ? 0 : stride)) / line);
    Scratch to;
    to.keys = own[0].numbers, to.values = to.keys + BLOCK * job.width;
    for (size_t i = next++; i < tasks.size(); i = next++) {
      shape.place(to, parts > 1 ? kept[i * stride / line].numbers : to.values + BLOCK * job.width,
                  job.width);
      kernels.attend(job, tasks[i], to);
      if (parts == 1) kernels.finish(job, tasks[i], to, 1, 0);
    }
  });
  if (parts > 1)
    for (size_t i = 0; i < tasks.size(); i += parts) {
      Scratch from;
      shape.place(from, kept[i * stride / line].numbers, job.width);
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
  std::copy_n(keys.strides().data(), 3, job.key_strides);
  std::copy_n(values.strides().data(), 3, job.value_strides);
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
