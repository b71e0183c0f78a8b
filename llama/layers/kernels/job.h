// Inputs and outputs of the kernels of linear.cpp, and the preparation of x. Included there only.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace {
using at::Tensor;
using c10::BFloat16;

constexpr int64_t AHEAD = 2048;   // bytes to prefetch ahead of the multiplication
constexpr int64_t SHARE = 32768;  // least number of bytes of W per thread

// A kernel's inputs and outputs. rows.h reads x in fp32, with rows padded with zeros to a multiple
// of 64; blocked.h reads the caller's x in bf16.
struct Job {
  int64_t M = 0, N = 0, K = 0, x_stride = 0, group = 0;
  Tensor x_tensor;                      // (..., K), contiguous
  std::vector<float> x, x_sums;         // (M, x_stride); int4: (M, K / group), sums of the groups
  const BFloat16* x_bf16 = nullptr;     // (M, K)
  std::unique_ptr<uint32_t[]> panels;   // int4: x_bf16 in the order of blocked.h
  std::unique_ptr<float[]> group_sums;  // int4: the sums of its groups
  const void* w = nullptr;
  const float* scales = nullptr;                                 // int8: (N,)
  const BFloat16 *int4_scales = nullptr, *int4_zeros = nullptr;  // (N / 16, K / group, 16)
  void* y = nullptr;
  bool y_bf16 = false;

  void put(int64_t m, int64_t n, float value) const {
    if (y_bf16)
      static_cast<BFloat16*>(y)[m * N + n] = value;
    else
      static_cast<float*>(y)[m * N + n] = value;
  }
};

void check_cpu(const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// Checks x (..., K) and allocates y (..., N) of the same dtype.
void prepare(Job& job, const Tensor& x, Tensor& y) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == job.K, "x must be (..., ", job.K,
              "), as wide as w; got ", x.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "x must be fp32 or bf16, not ", dtype);
  job.x_tensor = x.contiguous();
  check_cpu("x", job.x_tensor);
  auto sizes = x.sizes().vec();
  sizes.back() = job.N;
  y = at::empty(sizes, x.options());
  job.M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) job.M *= x.size(i);
  job.y = y.mutable_data_ptr();
  job.y_bf16 = dtype == at::kBFloat16;
  if (job.y_bf16) job.x_bf16 = job.x_tensor.const_data_ptr<BFloat16>();
}

template <class T>
void widen(Job& job) {
  const T* from = job.x_tensor.const_data_ptr<T>();
  for (int64_t m = 0; m < job.M; m++)
    std::copy_n(from + m * job.K, job.K, job.x.data() + m * job.x_stride);
}

// Converts x to what rows.h reads.
void widen_x(Job& job) {
  job.x_stride = (job.K + 63) / 64 * 64;
  job.x.resize(job.M * job.x_stride);
  job.y_bf16 ? widen<BFloat16>(job) : widen<float>(job);
}

void check_matrix(const char* name, const Tensor& w) {
  check_cpu(name, w);
  TORCH_CHECK(w.dim() == 2, name, " must be a matrix (N, K), not ", w.sizes());
}
}  // namespace
