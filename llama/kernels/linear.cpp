// y = x W^T, for few rows of x (decoding) at the speed of reading W: torch operators for weights of
// fp32 or bf16, int8 with a scale per output, and int4 with a scale and a zero per group. Knows
// nothing about models. Built and loaded by __init__.py; the arithmetic is in rows.h and blocked.h.
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
constexpr int64_t SHARE = 32768;  // bytes of W below which one more thread does not pay

// What a kernel reads and writes. rows.h reads x in fp32, its rows padded with zeros to a multiple
// of 64; blocked.h reads x in bf16, as it came.
struct Job {
  int64_t M = 0, N = 0, K = 0, x_stride = 0, group = 0;
  Tensor given;                      // x (..., K)
  std::vector<float> x, x_sums;      // (M, x_stride); int4: (M, K / group), the sum of each group
  const BFloat16* x_bf16 = nullptr;  // (M, K)
  std::unique_ptr<uint32_t[]> panels;   // int4: x_bf16 in the order of blocked.h
  std::unique_ptr<float[]> group_sums;  // and its sums
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
}  // namespace

#define ARITHMETIC "rows.h"
#include "variants.h"

namespace {
using Kernel = void (*)(const Job&, int64_t begin, int64_t end);
struct Blocked {
  Kernel bf16, int8, int4, fill_panels;
};
#if defined(__x86_64__)
#undef TARGET
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
namespace with_bf16 {
#include "blocked.h"
}
const Blocked blocked = {with_bf16::blocks<BFloat16>, with_bf16::blocks<int8_t>, with_bf16::tiles,
                         with_bf16::fill_panels};
#else
const Blocked blocked = {};
#endif

struct Kernels {
  Kernel fp32, bf16, int8, int4, unpack_fp32, unpack_bf16, widen;
};
#define KERNELS(ns)                                                        \
  Kernels{ns::rows<float>, ns::rows<BFloat16>,   ns::rows<int8_t>, \
          ns::tiles,       ns::unpack<float>, ns::unpack<BFloat16>, ns::widen}
const Kernels kernels[] = {EACH_VARIANT(KERNELS)};

const Kernels& variant() { return kernels[llama3::variant()]; }

#define NAME(ns) #ns
const char* const names[] = {EACH_VARIANT(NAME)};

std::vector<std::string> variant_names() {
  std::vector<std::string> found;
  for (const int index : llama3::variants()) found.emplace_back(names[index]);
  return found;
}

// For tests: "" goes back to the fastest.
void use_variant(std::string name) {
  int found = -1;
  for (const int index : llama3::variants())
    if (name == names[index]) found = index;
  TORCH_CHECK(found >= 0 || name.empty(), "this processor has no variant ", std::string(name));
  llama3::chosen.store(found);
}

void check_cpu(const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

// Checks x (..., K), and makes y (..., N) of the same dtype.
void prepare(Job& job, const Tensor& x, Tensor& y) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == job.K, "x must be (..., ", job.K,
              "), as wide as w; got ", x.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "x must be fp32 or bf16, not ", dtype);
  job.given = x.contiguous();
  check_cpu("x", job.given);
  auto sizes = x.sizes().vec();
  sizes.back() = job.N;
  y = at::empty(sizes, x.options());
  job.M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) job.M *= x.size(i);
  job.y = y.mutable_data_ptr();
  job.y_bf16 = dtype == at::kBFloat16;
  if (job.y_bf16) job.x_bf16 = job.given.const_data_ptr<BFloat16>();
}

template <class T>
void widen(Job& job) {
  const T* from = job.given.const_data_ptr<T>();
  for (int64_t m = 0; m < job.M; m++)
    std::copy_n(from + m * job.K, job.K, job.x.data() + m * job.x_stride);
}

// x for rows.h.
void widen_x(Job& job) {
  job.x_stride = (job.K + 63) / 64 * 64;
  job.x.resize(job.M * job.x_stride);
  job.y_bf16 ? widen<BFloat16>(job) : widen<float>(job);
}

// Whether blocked.h serves, where it does for so many rows of x and more.
bool in_blocks(const Job& job, int64_t rows) {
  return job.x_bf16 && job.M >= rows && job.K > 0 && llama3::variant() == llama3::AVX512_BF16;
}

void run(const Job& job, Kernel kernel, int64_t blocks, int64_t bytes_per_block) {
  if (job.M == 0 || blocks == 0) return;
  const int64_t grain = std::max<int64_t>(1, SHARE / std::max<int64_t>(1, bytes_per_block));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

void check_matrix(const char* name, const Tensor& w) {
  check_cpu(name, w);
  TORCH_CHECK(w.dim() == 2, name, " must be a matrix (N, K), not ", w.sizes());
}

// x (..., K), w (N, K) fp32 or bf16 -> (..., N) of x's dtype.
Tensor linear(const Tensor& x, const Tensor& w) {
  check_matrix("w", w);
  const bool bf16 = w.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || w.scalar_type() == at::kFloat, "w must be fp32 or bf16, not ", w.scalar_type());
  Tensor y;
  Job job;
  job.N = w.size(0), job.K = w.size(1);
  prepare(job, x, y);
  job.w = w.const_data_ptr();
  const int64_t row = job.K * w.element_size();
  if (bf16 && in_blocks(job, 2)) {
    run(job, blocked.bf16, (job.N + 3) / 4, 4 * row);
    return y;
  }
  widen_x(job);
  run(job, bf16 ? variant().bf16 : variant().fp32, job.N, row);
  return y;
}

// x (..., K), q (N, K) int8, scale (N,) fp32 -> x (q * scale)^T, of x's dtype.
Tensor linear_int8(const Tensor& x, const Tensor& q, const Tensor& scale) {
  check_matrix("q", q);
  check_cpu("scale", scale);
  TORCH_CHECK(q.scalar_type() == at::kChar, "q must be int8, not ", q.scalar_type());
  TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.dim() == 1 && scale.size(0) == q.size(0),
              "scale must be fp32 (", q.size(0), "), one an output; got ", scale.sizes());
  Tensor y;
  Job job;
  job.N = q.size(0), job.K = q.size(1);
  prepare(job, x, y);
  job.w = q.const_data_ptr();
  job.scales = scale.const_data_ptr<float>();
  if (in_blocks(job, 5)) {
    run(job, blocked.int8, (job.N + 3) / 4, 4 * job.K);
    return y;
  }
  widen_x(job);
  run(job, variant().int8, job.N, job.K);
  return y;
}

// q, any int8, in bf16.
Tensor widen_int8(const Tensor& q) {
  check_cpu("q", q);
  TORCH_CHECK(q.scalar_type() == at::kChar, "q must be int8, not ", q.scalar_type());
  Tensor w = at::empty(q.sizes(), q.options().dtype(at::kBFloat16));
  Job job;
  job.M = 1;
  job.w = q.const_data_ptr();
  job.y = w.mutable_data_ptr();
  run(job, variant().widen, q.numel(), 1);
  return w;
}

// x as tile_part wants it, divided by the place of its code in the word, and its sum in each group.
void prepare_int4(Job& job) {
  const int64_t groups = job.K / job.group;
  job.x_sums.resize(job.M * groups);
  for (int64_t m = 0; m < job.M; m++)
    for (int64_t g = 0; g < groups; g++) {
      float* x = job.x.data() + m * job.x_stride + g * job.group;
      float sum = 0;
      for (int64_t k = 0; k < job.group; k += 8) {
        float place = 1;
        for (int i = 0; i < 8; i++, place /= 16) {
          sum += x[k + i];
          if (i < 7) x[k + i] *= place;  // the last one is shifted down
        }
      }
      job.x_sums[m * groups + g] = sum;
    }
}

// packed (T, K / 8, 16) int32, scale and zero (T, K / group, 16) bf16, for T tiles of 16 outputs.
// In a tile, code k of output n is bits 4 (k % 8) to 4 (k % 8) + 3 of packed[n / 16, k / 8, n % 16].
void set_int4(Job& job, const Tensor& packed, const Tensor& scale, const Tensor& zero, int64_t N) {
  TORCH_CHECK(packed.scalar_type() == at::kInt && packed.dim() == 3 && packed.size(2) == 16 &&
                  packed.size(0) == (N + 15) / 16,
              "packed must be int32 (", (N + 15) / 16, ", K / 8, 16) for ", N, " outputs; got ",
              packed.sizes());
  TORCH_CHECK(N > 0 && packed.size(1) > 0, "packed must not be empty");
  const int64_t K = packed.size(1) * 8, groups = scale.dim() == 3 ? scale.size(1) : 0;
  for (const auto* t : {&scale, &zero})
    TORCH_CHECK(t->scalar_type() == at::kBFloat16 && t->dim() == 3 && groups > 0 &&
                    K % (groups * 8) == 0 && t->sizes().equals({packed.size(0), groups, 16}),
                "scale and zero must be bf16 (", packed.size(0), ", K / group, 16); got ",
                t->sizes());
  check_cpu("packed", packed), check_cpu("scale", scale), check_cpu("zero", zero);
  job.N = N, job.K = K, job.group = K / groups;
  job.w = packed.const_data_ptr();
  job.int4_scales = scale.const_data_ptr<BFloat16>();
  job.int4_zeros = zero.const_data_ptr<BFloat16>();
}

// x (..., K) -> the first N columns of x (q * scale + zero)^T, of x's dtype.
Tensor linear_int4(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& zero,
                   int64_t N) {
  Tensor y;
  Job job;
  set_int4(job, packed, scale, zero, N);
  prepare(job, x, y);
  const int64_t groups = job.K / job.group, bytes = job.K * 8 + groups * 64;
  if (job.group % 32 == 0 && in_blocks(job, 1)) {
    job.panels.reset(new uint32_t[job.M * job.K / 2]);
    job.group_sums.reset(new float[job.M * groups]);
    run(job, blocked.fill_panels, groups, job.M * job.group * 2);
    run(job, blocked.int4, packed.size(0), bytes);
    return y;
  }
  widen_x(job);
  prepare_int4(job);
  run(job, variant().int4, packed.size(0), bytes);
  return y;
}

// The weight itself, (N, K), of x's dtype.
Tensor unpack_int4(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& zero,
                   int64_t N) {
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || x.scalar_type() == at::kFloat, "x must be fp32 or bf16");
  Job job;
  set_int4(job, packed, scale, zero, N);
  Tensor w = at::empty({N, job.K}, x.options());
  job.M = 1;
  job.y = w.mutable_data_ptr();
  run(job, bf16 ? variant().unpack_bf16 : variant().unpack_fp32, packed.size(0), job.K * 8);
  return w;
}
}  // namespace

TORCH_LIBRARY(llama3, m) {
  m.def("linear(Tensor x, Tensor w) -> Tensor");
  m.def("linear_int8(Tensor x, Tensor q, Tensor scale) -> Tensor");
  m.def("linear_int4(Tensor x, Tensor packed, Tensor scale, Tensor zero, int n) -> Tensor");
  m.def("widen_int8(Tensor q) -> Tensor");
  m.def("unpack_int4(Tensor x, Tensor packed, Tensor scale, Tensor zero, int n) -> Tensor");
  m.def("variants() -> str[]", &variant_names);
  m.def("use_variant(str name) -> ()", &use_variant);
}

TORCH_LIBRARY_IMPL(llama3, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linear_int8", &linear_int8);
  m.impl("linear_int4", &linear_int4);
  m.impl("widen_int8", &widen_int8);
  m.impl("unpack_int4", &unpack_int4);
}
