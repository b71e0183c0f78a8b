// y = x W^T; for few rows of x (decoding) it is limited only by reading W. Torch operators for
// weights of fp32 or bf16, int8 with a scale per output, int4 with a scale and a zero per group.
// Knows nothing about models. Compiled and loaded by __init__.py; the arithmetic is in rows.h and
// blocked.h.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.

#include "job.h"

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

// For tests. "" selects the fastest variant again.
void use_variant(std::string name) {
  int found = -1;
  for (const int index : llama3::variants())
    if (name == names[index]) found = index;
  TORCH_CHECK(found >= 0 || name.empty(), "this processor has no variant ", std::string(name));
  llama3::chosen.store(found);
}

// Whether to use blocked.h, which is the fastest for `rows` rows of x or more.
bool in_blocks(const Job& job, int64_t rows) {
  return job.x_bf16 && job.M >= rows && job.K > 0 && llama3::variant() == llama3::AVX512_BF16;
}

void run(const Job& job, Kernel kernel, int64_t blocks, int64_t bytes_per_block) {
  if (job.M == 0 || blocks == 0) return;
  const int64_t grain = std::max<int64_t>(1, SHARE / std::max<int64_t>(1, bytes_per_block));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) { kernel(job, begin, end); });
}

// x (..., K) and several w (N, K), all fp32 or all bf16 -> (..., N) in x's dtype for each w, in one
// parallel loop.
std::vector<Tensor> linears(const Tensor& x, at::TensorList ws) {
  std::vector<Tensor> ys(ws.size());
  std::vector<Job> jobs(ws.size());
  std::vector<int64_t> ends;  // the end of each job's blocks, numbered over all jobs
  TORCH_CHECK(!ws.empty(), "ws is empty; give at least one w");
  const bool bf16 = ws[0].scalar_type() == at::kBFloat16;
  bool by_blocks = bf16;
  for (size_t i = 0; i < ws.size(); i++) {
    const Tensor& w = ws[i];
    check_matrix("w", w);
    TORCH_CHECK(w.scalar_type() == (bf16 ? at::kBFloat16 : at::kFloat),
                "all w must be fp32, or all bf16, not ", w.scalar_type());
    jobs[i].N = w.size(0), jobs[i].K = w.size(1);
    prepare(jobs[i], x, ys[i]);
    jobs[i].w = w.const_data_ptr();
    by_blocks = by_blocks && in_blocks(jobs[i], 2);
  }
  for (Job& job : jobs) {
    if (!by_blocks) widen_x(job);
    ends.push_back((ends.empty() ? 0 : ends.back()) + (by_blocks ? (job.N + 3) / 4 : job.N));
  }
  const Kernel kernel = by_blocks ? blocked.bf16 : bf16 ? variant().bf16 : variant().fp32;
  const int64_t bytes = jobs[0].K * ws[0].element_size() * (by_blocks ? 4 : 1);
  const int64_t grain = std::max<int64_t>(1, SHARE / std::max<int64_t>(1, bytes));
  if (jobs[0].M == 0) return ys;
  at::parallel_for(0, ends.back(), grain, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < jobs.size(); i++) {
      const int64_t first = i ? ends[i - 1] : 0;
      const int64_t from = std::max(begin, first) - first, to = std::min(end, ends[i]) - first;
      if (from < to) kernel(jobs[i], from, to);
    }
  });
  return ys;
}

Tensor linear(const Tensor& x, const Tensor& w) { return linears(x, w)[0]; }

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

// Prepares x for tile_part: divides it by the place value of its code in the word, and sums each
// group.
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

// The dequantized weight, (N, K), in x's dtype.
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
  m.def("linears(Tensor x, Tensor[] ws) -> Tensor[]");
  m.def("linear_int8(Tensor x, Tensor q, Tensor scale) -> Tensor");
  m.def("linear_int4(Tensor x, Tensor packed, Tensor scale, Tensor zero, int n) -> Tensor");
  m.def("widen_int8(Tensor q) -> Tensor");
  m.def("unpack_int4(Tensor x, Tensor packed, Tensor scale, Tensor zero, int n) -> Tensor");
  m.def("variants() -> str[]", &variant_names);
  m.def("use_variant(str name) -> ()", &use_variant);
}

TORCH_LIBRARY_IMPL(llama3, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linears", &linears);
  m.impl("linear_int8", &linear_int8);
  m.impl("linear_int4", &linear_int4);
  m.impl("widen_int8", &widen_int8);
  m.impl("unpack_int4", &unpack_int4);
}
