// The operators between a layer's matmuls, each in one pass over memory: RMSNorm, the rotary
// embedding and SwiGLU's gate. Results are rounded at the same points as by torch's operators. And
// the rows of activations.h as tensors, for tests.
// Knows nothing about models. Compiled and loaded by __init__.py; the arithmetic is in pointwise.h.

#include "pointwise_job.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <utility>

#include "activations.h"

namespace {
using at::Tensor;
using namespace llama3::pointwise;

constexpr int64_t SHARE = 1 << 15;  // least number of elements per thread

}  // namespace

#define ARITHMETIC "pointwise.h"
#include "variants.h"

namespace {
#define FP32(ns) Kernels{ns::norm<float>, ns::gate<float>, ns::rotate<float>}
#define BF16(ns) Kernels{ns::norm<BFloat16>, ns::gate<BFloat16>, ns::rotate<BFloat16>}
const Kernels fp32[] = {EACH_VARIANT(FP32)}, bf16[] = {EACH_VARIANT(BF16)};
}  // namespace

const Kernels& llama3::pointwise::kernels(bool is_bf16) {
  return (is_bf16 ? bf16 : fp32)[variant()];
}

namespace {
const Kernels& variant(const Tensor& x, const Tensor& other, bool same_dtype = true) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(x.device().is_cpu() && other.device().is_cpu(), "both must be on the CPU");
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "x must be fp32 or bf16, not ", dtype);
  TORCH_CHECK(!same_dtype || other.scalar_type() == dtype, "both must be ", dtype,
              "; the other is ", other.scalar_type());
  return kernels(dtype == at::kBFloat16);
}

// x (..., D) divided by its root mean square, cast to x's dtype, times weight (D,).
Tensor rms_norm(const Tensor& x_any, const Tensor& weight_any, double eps) {
  const Kernels& kernels = variant(x_any, weight_any);
  TORCH_CHECK(x_any.dim() > 0 && weight_any.dim() == 1 && x_any.size(-1) == weight_any.size(0),
              "x must be (..., D) and weight (D,); got ", x_any.sizes(), " and ",
              weight_any.sizes());
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  const Job job{x.size(-1), static_cast<float>(eps), x.const_data_ptr(), weight.const_data_ptr(),
                y.mutable_data_ptr()};
  at::parallel_for(0, x.numel() / job.width, 1 + SHARE / job.width,
                   [&](int64_t begin, int64_t end) { kernels.norm(job, begin, end); });
  return y;
}

// silu(a), cast to a's dtype, times b.
Tensor swiglu(const Tensor& a_any, const Tensor& b_any) {
  const Kernels& kernels = variant(a_any, b_any);
  TORCH_CHECK(a_any.sizes() == b_any.sizes(), "a and b must have the same shape; got ",
              a_any.sizes(), " and ", b_any.sizes());
  const Tensor a = a_any.contiguous(), b = b_any.contiguous();
  Tensor y = at::empty(a.sizes(), a.options());
  const Job job{0, 0, a.const_data_ptr(), b.const_data_ptr(), y.mutable_data_ptr()};
  at::parallel_for(0, a.numel(), SHARE,
                   [&](int64_t begin, int64_t end) { kernels.gate(job, begin, end); });
  return y;
}

// Pairs of x (B, T, heads, D) multiplied by the complex turns (T, D / 2) or (B, T, D / 2).
Tensor rotary(const Tensor& x_any, const Tensor& turns_any) {
  const Kernels& kernels = variant(x_any, turns_any, false);
  TORCH_CHECK(turns_any.scalar_type() == at::kComplexFloat, "turns must be complex64");
  TORCH_CHECK(x_any.dim() == 4 && turns_any.dim() >= 2 && turns_any.dim() <= 3 &&
                  turns_any.size(-1) * 2 == x_any.size(3) && turns_any.size(-2) == x_any.size(1) &&
                  (turns_any.dim() == 2 || turns_any.size(0) == x_any.size(0)),
              "x must be (B, T, heads, D) and turns (T, D / 2) or (B, T, D / 2); got ",
              x_any.sizes(), " and ", turns_any.sizes());
  const Tensor x = x_any.contiguous(), turns = turns_any.contiguous();
  Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  Job job{x.size(3), 0, x.const_data_ptr(), turns.const_data_ptr(), y.mutable_data_ptr()};
  job.heads = x.size(2), job.turns = turns.numel() / turns.size(-1);
  at::parallel_for(0, x.numel() / job.width, 1 + SHARE / job.width,
                   [&](int64_t begin, int64_t end) { kernels.rotate(job, begin, end); });
  return y;
}

// x (M, K) in 8 bits: codes (M, K'), scales and sums (M, K' / 32), K' a multiple of 64.
std::tuple<Tensor, Tensor, Tensor> quantize_rows(const Tensor& x_any) {
  variant(x_any, x_any);
  TORCH_CHECK(x_any.dim() == 2, "x must be (M, K), not ", x_any.sizes());
  const Tensor x = x_any.contiguous();
  llama3::Activations to(x.size(0), x.size(1), nullptr);
  const auto on = x.options();
  to.stride = to.blocks * llama3::BLOCK_COLUMNS;
  Tensor codes = at::empty({to.M, to.stride}, on.dtype(at::kChar));
  Tensor scales = at::empty({to.M, to.blocks}, on.dtype(at::kFloat));
  Tensor sums = at::empty({to.M, to.blocks}, on.dtype(at::kInt));
  to.codes = codes.mutable_data_ptr<int8_t>();
  to.scales = scales.mutable_data_ptr<float>();
  to.sums = sums.mutable_data_ptr<int32_t>();
#if defined(__x86_64__)
  TORCH_CHECK(__builtin_cpu_supports("avx2"), "this processor has no AVX2");
  x.scalar_type() == at::kFloat ? llama3::quantize(x.const_data_ptr<float>(), to, 0, to.M)
                                : llama3::quantize(x.const_data_ptr<BFloat16>(), to, 0, to.M);
#else
  TORCH_CHECK(false, "this processor has no AVX2");
#endif
  return {codes, scales, sums};
}
}  // namespace

TORCH_LIBRARY_FRAGMENT(llama3, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rotary(Tensor x, Tensor turns) -> Tensor");
  m.def("swiglu(Tensor a, Tensor b) -> Tensor");
  m.def("quantize_rows(Tensor x) -> (Tensor codes, Tensor scales, Tensor sums)");
}

TORCH_LIBRARY_IMPL(llama3, CPU, m) {
  m.impl("rms_norm", &rms_norm);
  m.impl("rotary", &rotary);
  m.impl("swiglu", &swiglu);
  m.impl("quantize_rows", &quantize_rows);
}
