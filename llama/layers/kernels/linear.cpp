// Torch operators for y = x W^T, with weights of fp32 or bf16, int8 with a scale per output, int4
// with a scale and a zero per group. For few rows of x (decoding) they are limited only by reading
// W. Knows nothing about models. Compiled and loaded by __init__.py; the arithmetic is chosen in
// multiply.cpp.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.

#include "weights.h"

#include "block_layout.h"
#include "team.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <memory>
#include <string>

namespace {
using at::Tensor;
using llama3::Inputs;
using llama3::Line;
using llama3::Method;
using llama3::Outputs;
using llama3::Weights;

constexpr int64_t SHARE = 32768;  // least number of bytes per thread

// Calls f(begin, end) for parts of [0, count), large first and small last: the others go on while a
// thread has lost its processor.
template <class F>
void in_parallel(int64_t count, int64_t bytes_each, const F& f) {
  if (count == 0) return;
  const int64_t least = std::max<int64_t>(1, SHARE / std::max<int64_t>(1, bytes_each));
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), (count + least - 1) / least);
  llama3::Team(threads, 1).run([&](llama3::Team::Member& me) { me.share(count, least, f); });
}

// (M, K) of x (..., K), after a check of its type and that K is the width of w.
int64_t rows_of(const Tensor& x, int64_t K) {
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == K, "x must be (..., ", K, "), as wide as w; got ",
              x.sizes());
  const auto dtype = x.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16, "x must be fp32 or bf16, not ", dtype);
  int64_t M = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) M *= x.size(i);
  return M;
}

// x (..., K) -> (..., N) in x's dtype for each of several weights of one kind and group, in one
// parallel loop.
std::vector<Tensor> multiply(const Tensor& x_any, const std::vector<Weights>& ws) {
  int64_t M = 0;
  for (const Weights& w : ws) M = rows_of(x_any, w.K);
  const Tensor x = x_any.contiguous();
  llama3::check_cpu("x", x);
  const bool is_bf16 = x.scalar_type() == at::kBFloat16;
  const Method method = llama3::method_for(ws[0], M, is_bf16);
  const int64_t K = ws[0].K, group = ws[0].group;
  std::vector<Tensor> ys;
  std::vector<Outputs> outs;
  std::vector<int64_t> ends;  // the end of each weight's blocks, numbered over all weights
  auto sizes = x.sizes().vec();
  for (const Weights& w : ws) {
    sizes.back() = w.N;
    ys.push_back(at::empty(sizes, x.options()));
    outs.push_back({ys.back().mutable_data_ptr(), is_bf16, w.N});
    ends.push_back((ends.empty() ? 0 : ends.back()) + method.blocks(w));
  }
  if (M == 0) return ys;
  if (K == 0) {
    for (Tensor& y : ys) y.zero_();
    return ys;
  }
  const int64_t lines = llama3::scratch_bytes(method.form, M, K, group) / sizeof(Line);
  const std::unique_ptr<Line[]> scratch(new Line[lines]);
  const Inputs in =
      llama3::inputs_of(method.form, x.const_data_ptr(), is_bf16, M, K, group, scratch.get());
  in_parallel(M, 4 * K, [&](int64_t begin, int64_t end) { llama3::prepare(in, begin, end); });
  const int64_t bytes = method.outputs * llama3::row_bytes(ws[0]);
  in_parallel(ends.back(), bytes, [&](int64_t begin, int64_t end) {
    for (size_t i = 0; i < ws.size(); i++) {
      const int64_t first = i ? ends[i - 1] : 0;
      const int64_t from = std::max(begin, first) - first, to = std::min(end, ends[i]) - first;
      if (from < to) method.multiply(ws[i], in, outs[i], from, to);
    }
  });
  return ys;
}

// x (..., K) and several w (N, K), all fp32 or all bf16 -> (..., N) in x's dtype for each w.
std::vector<Tensor> linears(const Tensor& x, at::TensorList ws) {
  TORCH_CHECK(!ws.empty(), "ws is empty; give at least one w");
  std::vector<Weights> views;
  for (const Tensor& w : ws) {
    TORCH_CHECK(w.scalar_type() == ws[0].scalar_type(), "all w must be fp32, or all bf16, not ",
                w.scalar_type());
    views.push_back(llama3::plain_weights(w));
  }
  return multiply(x, views);
}

Tensor linear(const Tensor& x, const Tensor& w) { return linears(x, w)[0]; }

// x (..., K), q (N, K) int8, scale (N,) fp32 -> x (q * scale)^T, of x's dtype.
Tensor linear_int8(const Tensor& x, const Tensor& q, const Tensor& scale) {
  return multiply(x, {llama3::int8_weights(q, scale)})[0];
}

// q, any int8, in bf16.
Tensor widen_int8(const Tensor& q) {
  llama3::check_cpu("q", q);
  TORCH_CHECK(q.scalar_type() == at::kChar, "q must be int8, not ", q.scalar_type());
  Tensor w = at::empty(q.sizes(), q.options().dtype(at::kBFloat16));
  const auto* from = q.const_data_ptr<int8_t>();
  auto* to = w.mutable_data_ptr<c10::BFloat16>();
  in_parallel(q.numel(), 1,
              [&](int64_t begin, int64_t end) { llama3::widen_int8(from, to, begin, end); });
  return w;
}

// x (..., K) -> the first N columns of x (q * scale + zero)^T, of x's dtype.
Tensor linear_int4(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& zero,
                   int64_t N) {
  return multiply(x, {llama3::int4_weights(packed, scale, zero, N)})[0];
}

// The dequantized weight, (N, K), in x's dtype.
Tensor unpack_int4(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& zero,
                   int64_t N) {
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || x.scalar_type() == at::kFloat, "x must be fp32 or bf16");
  const Weights w = llama3::int4_weights(packed, scale, zero, N);
  Tensor y = at::empty({N, w.K}, x.options());
  void* to = y.mutable_data_ptr();
  in_parallel(packed.size(0), w.K * 8, [&](int64_t begin, int64_t end) {
    llama3::unpack_int4(w, to, bf16, begin, end);
  });
  return y;
}

// x (..., K) times the transpose of the weight in blocks, (..., N), of x's dtype.
Tensor linear_blocks(const Tensor& x, const Tensor& blocks, int64_t N) {
  return multiply(x, {llama3::block_weights(blocks, N)})[0];
}

// The dequantized weight, (N, K), in x's dtype.
Tensor unpack_blocks(const Tensor& x, const Tensor& blocks, int64_t N) {
  const bool bf16 = x.scalar_type() == at::kBFloat16;
  TORCH_CHECK(bf16 || x.scalar_type() == at::kFloat, "x must be fp32 or bf16");
  const Weights w = llama3::block_weights(blocks, N);
  Tensor y = at::empty({N, w.K}, x.options());
  void* to = y.mutable_data_ptr();
  in_parallel(blocks.size(0), w.K * 8, [&](int64_t begin, int64_t end) {
    llama3::unpack_blocks(w, to, bf16, begin, end);
  });
  return y;
}

void use_variant(std::string name) {
  TORCH_CHECK(llama3::use_variant(name), "this processor has no variant ", name);
}
}  // namespace

TORCH_LIBRARY(llama3, m) {
  m.def("linear(Tensor x, Tensor w) -> Tensor");
  m.def("linears(Tensor x, Tensor[] ws) -> Tensor[]");
  m.def("linear_int8(Tensor x, Tensor q, Tensor scale) -> Tensor");
  m.def("linear_int4(Tensor x, Tensor packed, Tensor scale, Tensor zero, int n) -> Tensor");
  m.def("linear_blocks(Tensor x, Tensor blocks, int n) -> Tensor");
  m.def("unpack_blocks(Tensor x, Tensor blocks, int n) -> Tensor");
  m.def("widen_int8(Tensor q) -> Tensor");
  m.def("unpack_int4(Tensor x, Tensor packed, Tensor scale, Tensor zero, int n) -> Tensor");
  m.def("variants() -> str[]", &llama3::variant_names);
  m.def("use_variant(str name) -> ()", &use_variant);
}

TORCH_LIBRARY_IMPL(llama3, CPU, m) {
  m.impl("linear", &linear);
  m.impl("linears", &linears);
  m.impl("linear_int8", &linear_int8);
  m.impl("linear_int4", &linear_int4);
  m.impl("linear_blocks", &linear_blocks);
  m.impl("unpack_blocks", &unpack_blocks);
  m.impl("widen_int8", &widen_int8);
  m.impl("unpack_int4", &unpack_int4);
}
