// Compiles the arithmetic of a .cpp file for every instruction set; one is chosen at run time. The
// .cpp file defines ARITHMETIC, the name of a header, and what that header needs, and includes this
// file, which includes the header in the namespaces avx512, avx2 and plain, after vectors.h. The
// variant avx512bf16 is avx512 plus the .cpp file's own kernels for processors with AVX512_BF16.

#include <atomic>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llama3 {
// The variants that this processor can run, the fastest first: indices into EACH_VARIANT.
inline const std::vector<int>& variants() {
  static const std::vector<int> found = [] {
    std::vector<int> list;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      if (__builtin_cpu_supports("avx512bf16")) list.push_back(0);
      list.push_back(1);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(2);
    list.push_back(3);
#else
    list.push_back(0);
#endif
    return list;
  }();
  return found;
}

#if defined(__x86_64__)
constexpr int AVX512_BF16 = 0;
#else
constexpr int AVX512_BF16 = -1;
#endif

inline std::atomic<int> chosen{-1};  // set by tests; -1: the fastest

inline int variant() {
  const int index = chosen.load();
  return index < 0 ? variants().front() : index;
}
}  // namespace llama3

// LANES: floats in a vector. TARGET: the attribute that enables the instructions. WIDEN_8 and
// WIDEN_16 load LANES int8 or uint16 into int32; gcc 12's own conversion does that lane by lane.
namespace {
using c10::BFloat16;
using std::memcpy;

#if defined(__x86_64__)
#define EACH_VARIANT(make) make(avx512bf16), make(avx512), make(avx2), make(plain)
#define LANES 16
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define WIDEN_8(p) _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p)))
#define WIDEN_16(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(p)))
namespace avx512 {
#include "vectors.h"
#include ARITHMETIC
}
namespace avx512bf16 = avx512;
#undef LANES
#undef TARGET
#undef WIDEN_8
#undef WIDEN_16
#define LANES 8
#define TARGET __attribute__((target("avx2,fma")))
#define WIDEN_8(p) _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p)))
#define WIDEN_16(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p)))
namespace avx2 {
#include "vectors.h"
#include ARITHMETIC
}
#undef LANES
#undef TARGET
#undef WIDEN_8
#undef WIDEN_16
#else
#define EACH_VARIANT(make) make(plain)
#endif
#define LANES 4
#define TARGET
#define WIDEN_8(p) (Ints{(p)[0], (p)[1], (p)[2], (p)[3]})
#define WIDEN_16(p) (Words{(p)[0].x, (p)[1].x, (p)[2].x, (p)[3].x})
namespace plain {  // SSE2 on x86-64, NEON on ARM, plain loops elsewhere
#include "vectors.h"
#include ARITHMETIC
}
}  // namespace
