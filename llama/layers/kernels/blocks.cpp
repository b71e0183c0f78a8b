// Chooses how weights in blocks are multiplied and unpacked: by blocks_vnni.h on processors with
// AVX512_VNNI, else by blocks.h.

#include "block_layout.h"
#include "linear.h"

namespace {
using namespace llama3;
}

#define ARITHMETIC "blocks.h"
#include "variants.h"

namespace {
#define METHODS(ns) {{Form::fp32, 16, ns::tiles<false>}, {Form::fp32, 16, ns::tiles<true>}}
const Method methods[][2] = {EACH_VARIANT(METHODS)};

#if defined(__x86_64__)
#undef TARGET
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")))
namespace with_vnni {
#include "blocks_vnni.h"
}
const Method vnni[] = {{Form::codes, 16, with_vnni::tiles<false>},
                       {Form::codes, 16, with_vnni::tiles<true>}};
#else
const Method vnni[2] = {};
#endif

#define UNPACK(ns) {ns::unpack<float>, ns::unpack<BFloat16>}
void (*const unpack[][2])(const Weights&, void*, int64_t, int64_t) = {EACH_VARIANT(UNPACK)};
}  // namespace

namespace llama3 {
Method block_method(Kind kind) {
  const int top = kind == Kind::blocks6;
  return integer_lanes() == 16 ? vnni[top] : methods[variant()][top];
}

void unpack_blocks(const Weights& w, void* y, bool is_bf16, int64_t begin, int64_t end) {
  unpack[variant()][is_bf16](w, y, begin, end);
}
}  // namespace llama3
