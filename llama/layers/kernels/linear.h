// y = x W^T in parts, for weights of any kind: what linear.cpp (operators of one linear) and other
// operators share. Knows nothing about tensors or threads. Defined in multiply.cpp.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.
#pragma once

#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "activations.h"

namespace llama3 {
using c10::BFloat16;

struct alignas(64) Line {  // a cache line of scratch memory
  char bytes[64];
};

constexpr int64_t AHEAD = 2048;  // bytes to prefetch ahead of the multiplication

// Of weights. int4 is the form with groups; blocks have 4 or 6 bits, see block_layout.h.
enum class Kind { fp32, bf16, int8, int4, blocks4, blocks6 };
constexpr int KINDS = 4;  // without blocks, whose methods are in blocks.cpp

// What a method reads of x:
//   fp32    rows padded with zeros to a multiple of 64 columns
//   places  fp32, each divided by the place value of its int4 code, and the sums of the groups
//   bf16    the caller's rows
//   panels  bf16 in the order of blocked.h for int4, and the sums of the groups
//   codes   8 bits, see activations.h
//   columns bf16 in the order of prefill.h
enum class Form { fp32, places, bf16, panels, codes, columns };

// The weight of one linear: a view.
struct Weights {
  Kind kind;
  int64_t N = 0, K = 0;
  const void* w = nullptr;                            // (N, K); int4: (N / 16, K / 8, 16) words
  const float* scales = nullptr;                      // int8: (N,)
  int64_t group = 0;                                  // int4: inputs with one scale and zero
  int64_t columns = 0;                                // blocks: of a block
  const BFloat16 *group_scales = nullptr, *group_zeros = nullptr;  // (N / 16, K / group, 16)
};

// M rows of x and, in scratch memory, what a form makes of them: a view.
struct Inputs {
  Form form;
  int64_t M = 0, K = 0, group = 0;
  const void* x = nullptr;  // (M, K), contiguous
  bool is_bf16 = false;     // x; else it is fp32
  int64_t stride = 0;       // of `fp32`
  float* fp32 = nullptr;    // fp32, places: (M, stride)
  float* sums = nullptr;    // places: (M, K / group); panels: see blocked.h
  uint32_t* panels = nullptr;  // panels, columns
  Activations codes;  // codes

  const BFloat16* bf16() const { return static_cast<const BFloat16*>(x); }
};

// Where the results go: (M, N), rows `stride` apart.
struct Outputs {
  void* y;
  bool is_bf16;  // else fp32
  int64_t stride;

  void put(int64_t m, int64_t n, float value) const {
    if (is_bf16)
      static_cast<BFloat16*>(y)[m * stride + n] = value;
    else
      static_cast<float*>(y)[m * stride + n] = value;
  }
};

// How weights of a kind are multiplied. `multiply` computes the blocks [begin, end) of outputs for
// all rows of x; any thread may compute any block.
struct Method {
  Form form;
  int64_t outputs;  // of a block: an even number, so that a block has whole pairs of a rotation
  void (*multiply)(const Weights&, const Inputs&, const Outputs&, int64_t begin, int64_t end);

  int64_t blocks(const Weights& w) const { return (w.N + outputs - 1) / outputs; }
};

// The fastest method on this processor for M rows of x.
Method method_for(const Weights& w, int64_t M, bool x_is_bf16);

// The method with x in 8 bits, in integer.cpp; null where this processor or kind has none.
const Method* integer_method(Kind kind);

// Fills the rows [begin, end) of in.codes. For processors that have an `integer_method`.
void quantize(const Inputs& in, int64_t begin, int64_t end);

// Bytes of one output's weights, about.
int64_t row_bytes(const Weights& w);

// Scratch memory of a form, aligned to cache lines.
int64_t scratch_bytes(Form form, int64_t M, int64_t K, int64_t group);

// A view of x and of scratch memory, where `prepare` has filled nothing yet.
Inputs inputs_of(Form form, const void* x, bool is_bf16, int64_t M, int64_t K, int64_t group,
                 void* scratch);

// Fills the rows [begin, end) of the scratch memory. Any thread may fill any row.
void prepare(const Inputs& in, int64_t begin, int64_t end);

// The dequantized tiles [begin, end) of an int4 weight, into y (N, K), bf16 or fp32.
void unpack_int4(const Weights& w, void* y, bool is_bf16, int64_t begin, int64_t end);

// The fastest method on this processor for weights in blocks.
Method block_method(Kind kind);

// The dequantized tiles [begin, end) of a weight in blocks, into y (N, K), bf16 or fp32.
void unpack_blocks(const Weights& w, void* y, bool is_bf16, int64_t begin, int64_t end);

// Elements [begin, end) of an int8 weight, exactly in bf16.
void widen_int8(const int8_t* w, BFloat16* y, int64_t begin, int64_t end);

// Names of the variants that this processor can run, and the choice of one, for tests; "" chooses
// the fastest again. False if there is none of that name.
std::vector<std::string> variant_names();
bool use_variant(std::string name);
}  // namespace llama3
