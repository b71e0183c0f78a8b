// Chooses how weights are multiplied: the table of methods for each kind of weight and instruction
// set. The arithmetic is in rows.h, blocked.h and prefill.h.

#include "linear.h"

namespace {
using namespace llama3;
}

#define ARITHMETIC "rows.h"
#include "variants.h"

namespace {
#define METHODS(ns)                         \
  {{Form::fp32, 4, ns::rows<float>},        \
   {Form::fp32, 4, ns::rows<BFloat16>},     \
   {Form::fp32, 4, ns::rows<int8_t>},       \
   {Form::places, 16, ns::tiles}}
const Method methods[][KINDS] = {EACH_VARIANT(METHODS)};  // by variant and kind

// The methods for x in bf16 with at least so many rows, on processors with AVX512_BF16.
struct Many {
  int64_t rows;
  Method method;
};
constexpr int64_t NEVER = INT64_MAX;
constexpr int64_t PROMPT = 64;  // from so many rows on, prefill.h is faster than blocked.h

#if defined(__x86_64__)
#undef TARGET
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
namespace with_bf16 {
#include "bf16.h"
#include "blocked.h"
#include "prefill.h"
}
const Many many[KINDS] = {{NEVER, {}},
                          {2, {Form::bf16, 4, with_bf16::blocks<BFloat16>}},
                          {5, {Form::bf16, 4, with_bf16::blocks<int8_t>}},
                          {1, {Form::panels, 16, with_bf16::tiles}}};
const Many prompt = {PROMPT, {Form::columns, with_bf16::TILE, with_bf16::many_rows}};  // bf16 weights
void fill(const Inputs& in, int64_t begin, int64_t end) {
  if (in.form == Form::panels) with_bf16::fill_panels(in, begin, end);
  if (in.form == Form::columns) with_bf16::fill_columns(in, begin, end);
}
#else
const Many prompt = {NEVER, {}};
const Many many[KINDS] = {{NEVER, {}}, {NEVER, {}}, {NEVER, {}}, {NEVER, {}}};
void fill(const Inputs&, int64_t, int64_t) {}
#endif

#define UNPACK(ns) {ns::unpack<float>, ns::unpack<BFloat16>}
void (*const unpack[][2])(const Weights&, void*, int64_t, int64_t) = {EACH_VARIANT(UNPACK)};

#define WIDEN(ns) ns::widen
void (*const widen[])(const int8_t*, BFloat16*, int64_t, int64_t) = {EACH_VARIANT(WIDEN)};

#define NAME(ns) #ns
const char* const names[] = {EACH_VARIANT(NAME)};
const char VNNI[] = "-vnni";  // after the name of a variant: with integer_method

template <class T>
void widen_row(const Inputs& in, int64_t m) {
  float* to = in.fp32 + m * in.stride;
  std::copy_n(static_cast<const T*>(in.x) + m * in.K, in.K, to);
  std::fill(to + in.K, to + in.stride, 0.0f);
}

// Divides row m of in.fp32 by the place value of each code in its word, and sums each group.
void divide_by_places(const Inputs& in, int64_t m) {
  const int64_t groups = in.K / in.group;
  for (int64_t g = 0; g < groups; g++) {
    float* x = in.fp32 + m * in.stride + g * in.group;
    float sum = 0;
    for (int64_t k = 0; k < in.group; k += 8) {
      float place = 1;
      for (int i = 0; i < 8; i++, place /= 16) {
        sum += x[k + i];
        if (i < 7) x[k + i] *= place;  // the last one is shifted down
      }
    }
    in.sums[m * groups + g] = sum;
  }
}

int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t padded(int64_t K) { return (K + 63) / 64 * 64; }

// Bytes of the scratch memory before the sums: in.fp32 or in.panels.
int64_t rows_bytes(Form form, int64_t M, int64_t K) {
  switch (form) {
    case Form::fp32:
    case Form::places: return 4 * M * padded(K);
    case Form::panels: return lines(2 * M * K);
    case Form::codes: return lines(Activations::bytes(M, K));
    case Form::columns: return (M + 15) / 16 * 64 * ((K + 1) / 2);
    case Form::bf16: return 0;
  }
  return 0;
}
}  // namespace

namespace llama3 {
Method method_for(const Weights& w, int64_t M, bool x_is_bf16) {
  if (w.columns) return block_method(w.kind);
  if (const Method* found = integer_method(w.kind)) return *found;
  const int kind = static_cast<int>(w.kind);
  if (x_is_bf16 && variant() == AVX512_BF16 && w.kind == Kind::bf16 && M >= prompt.rows && w.K > 0)
    return prompt.method;
  if (x_is_bf16 && variant() == AVX512_BF16 && M >= many[kind].rows && w.K > 0 && w.group % 32 == 0)
    return many[kind].method;
  return methods[variant()][kind];
}

int64_t row_bytes(const Weights& w) {
  switch (w.kind) {
    case Kind::fp32: return 4 * w.K;
    case Kind::bf16: return 2 * w.K;
    case Kind::int8: return w.K;
    case Kind::int4: return w.K / 2 + w.K / w.group * 4;
    case Kind::blocks4: return w.K / 2 + w.K / 16;
    case Kind::blocks6: return w.K / 4 * 3 + w.K / 16;
  }
  return 0;
}

int64_t scratch_bytes(Form form, int64_t M, int64_t K, int64_t group) {
  return rows_bytes(form, M, K) + (group ? lines(4 * M * (K / group)) : 0);
}

Inputs inputs_of(Form form, const void* x, bool is_bf16, int64_t M, int64_t K, int64_t group,
                 void* scratch) {
  Inputs in{form, M, K, group, x, is_bf16};
  char* bytes = static_cast<char*>(scratch);
  in.stride = padded(K);
  in.fp32 = reinterpret_cast<float*>(bytes);
  in.panels = reinterpret_cast<uint32_t*>(bytes);
  in.sums = reinterpret_cast<float*>(bytes + rows_bytes(form, M, K));
  if (form == Form::codes) in.codes = Activations(M, K, scratch);
  return in;
}

void prepare(const Inputs& in, int64_t begin, int64_t end) {
  if (in.form == Form::panels || in.form == Form::columns) return fill(in, begin, end);
  if (in.form == Form::codes) return quantize(in, begin, end);
  if (in.form == Form::bf16) return;
  for (int64_t m = begin; m < end; m++) {
    in.is_bf16 ? widen_row<BFloat16>(in, m) : widen_row<float>(in, m);
    if (in.form == Form::places) divide_by_places(in, m);
  }
}

void unpack_int4(const Weights& w, void* y, bool is_bf16, int64_t begin, int64_t end) {
  unpack[variant()][is_bf16](w, y, begin, end);
}

void widen_int8(const int8_t* w, BFloat16* y, int64_t begin, int64_t end) {
  widen[variant()](w, y, begin, end);
}

std::vector<std::string> variant_names() {
  std::vector<std::string> found;
  for (const int index : variants())
    if (has_vnni(index)) found.push_back(std::string(names[index]) + VNNI);
  for (const int index : variants()) found.push_back(names[index]);
  return found;
}

bool use_variant(std::string name) {
  const bool vnni = name.ends_with(VNNI);
  if (vnni) name.resize(name.size() - std::strlen(VNNI));
  int found = -1;
  for (const int index : variants())
    if (name == names[index] && (!vnni || has_vnni(index))) found = index;
  if (found < 0 && (vnni || !name.empty())) return false;
  chosen.store(found);
  integers.store(vnni || name.empty());
  return true;
}
}  // namespace llama3
