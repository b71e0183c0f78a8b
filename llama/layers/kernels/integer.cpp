// Products with x in 8 bits, by the integer instructions of AVX512_VNNI or AVX_VNNI. The arithmetic
// is in integer_rows.h.

#include "activations.h"
#include "linear.h"
#include "processor.h"

namespace llama3 {
#if defined(__x86_64__)
namespace {
using std::memcpy;

#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
namespace avx512_vnni {
#include "integer_rows.h"
}
#undef LANES
#undef TARGET
#define LANES 8
#define TARGET __attribute__((target("avxvnni,avx2,fma")))
#define DOT_256 _mm256_dpbusd_avx_epi32
namespace avx_vnni {
#include "integer_rows.h"
}
#undef LANES
#undef TARGET
}  // namespace

const Method* integer_method(Kind kind) {
  static const Method int8_512{Form::codes, 16, avx512_vnni::integer_rows};
  static const Method int8_256{Form::codes, 8, avx_vnni::integer_rows};
  const int lanes = integer_lanes();
  if (kind != Kind::int8 || !lanes) return nullptr;
  return lanes == 16 ? &int8_512 : &int8_256;
}

void quantize(const Inputs& in, int64_t begin, int64_t end) {
  if (in.is_bf16)
    quantize(static_cast<const BFloat16*>(in.x), in.codes, begin, end);
  else
    quantize(static_cast<const float*>(in.x), in.codes, begin, end);
}
#else
const Method* integer_method(Kind) { return nullptr; }
void quantize(const Inputs&, int64_t, int64_t) {}
#endif
}  // namespace llama3
