// Views of the tensors of a linear's weight, after checks of their types and shapes.
#pragma once

#include "block_layout.h"
#include "linear.h"

#include <ATen/core/Tensor.h>

namespace llama3 {
using at::Tensor;

inline void check_cpu(const char* name, const Tensor& t) {
  TORCH_CHECK(t.device().is_cpu(), name, " must be on the CPU, not on ", t.device());
  TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_matrix(const char* name, const Tensor& w) {
  check_cpu(name, w);
  TORCH_CHECK(w.dim() == 2, name, " must be a matrix (N, K), not ", w.sizes());
}

// w (N, K), fp32 or bf16.
inline Weights plain_weights(const Tensor& w) {
  check_matrix("w", w);
  const bool is_bf16 = w.scalar_type() == at::kBFloat16;
  TORCH_CHECK(is_bf16 || w.scalar_type() == at::kFloat,
              "all w must be fp32, or all bf16, not ", w.scalar_type());
  return {is_bf16 ? Kind::bf16 : Kind::fp32, w.size(0), w.size(1), w.const_data_ptr()};
}

// q (N, K) int8, scale (N,) fp32.
inline Weights int8_weights(const Tensor& q, const Tensor& scale) {
  check_matrix("q", q);
  check_cpu("scale", scale);
  TORCH_CHECK(q.scalar_type() == at::kChar, "q must be int8, not ", q.scalar_type());
  TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.dim() == 1 && scale.size(0) == q.size(0),
              "scale must be fp32 (", q.size(0), "), one an output; got ", scale.sizes());
  return {Kind::int8, q.size(0), q.size(1), q.const_data_ptr(), scale.const_data_ptr<float>()};
}

// packed (T, K / 8, 16) int32, scale and zero (T, K / group, 16) bf16, for T tiles of 16 outputs.
// In a tile, code k of output n is bits 4 (k % 8) to 4 (k % 8) + 3 of packed[n / 16, k / 8, n % 16].
inline Weights int4_weights(const Tensor& packed, const Tensor& scale, const Tensor& zero,
                            int64_t N) {
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
  Weights w{Kind::int4, N, K, packed.const_data_ptr()};
  w.group = K / groups;
  w.group_scales = scale.const_data_ptr<BFloat16>();
  w.group_zeros = zero.const_data_ptr<BFloat16>();
  return w;
}

// blocks (T, B, bytes of a block) uint8, for T tiles of 16 outputs; see block_layout.h.
inline Weights block_weights(const Tensor& blocks, int64_t N) {
  check_cpu("blocks", blocks);
  TORCH_CHECK(blocks.scalar_type() == at::kByte && blocks.dim() == 3 && N > 0 &&
                  blocks.size(0) == (N + 15) / 16 && blocks.size(1) > 0,
              "blocks must be uint8 (", (N + 15) / 16, ", blocks, bytes) for ", N, " outputs; got ",
              blocks.sizes());
  for (const Kind kind : {Kind::blocks4, Kind::blocks6})
    for (int64_t groups = 1; groups <= 8; groups++)
      if (block_bytes(kind, groups) == blocks.size(2)) {
        Weights w{kind, N, 32 * groups * blocks.size(1), blocks.const_data_ptr()};
        w.columns = 32 * groups;
        return w;
      }
  TORCH_CHECK(false, "no block has ", blocks.size(2), " bytes");
}
}  // namespace llama3
