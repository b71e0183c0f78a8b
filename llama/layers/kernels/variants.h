// Compiles the arithmetic of a .cpp file for every instruction set; one is chosen at run time. The
// .cpp file defines ARITHMETIC, the name of a header, and what that header needs, and includes this
// file, which includes the header in the namespaces avx512, avx2 and plain, after vectors.h. The
// variant avx512bf16 is avx512 plus the .cpp file's own kernels for processors with AVX512_BF16.

#include <cstring>

#include "processor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
