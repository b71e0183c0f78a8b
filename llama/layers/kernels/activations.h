// Rows of x in 8 bits, which the integer products multiply. Knows nothing about weights.
//
// A row of K columns is cut into blocks of 32; the last ones are padded with zeros to a multiple of
// 64 columns. Of each block:
//   scale = max |x| / 127                   fp32
//   codes = x * (127 / max |x|)             int8, -127 to 127, to the nearest, ties to even
//   sum   = the sum of the codes            int32
// so that x is about codes * scale, within half a scale. A block of which all |x| are below SMALLEST
// (where the scale would be denormal) has the scale 0 and codes of 0. A block with a NaN or an
// infinity has the scale NaN and codes of 0: every product with it is NaN.

#pragma once

#include <c10/util/BFloat16.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace llama3 {
constexpr int64_t BLOCK_COLUMNS = 32;   // that share a scale
constexpr float SMALLEST = 0x1p-119f;  // 127 times the least normal number, and a little

// M rows in 8 bits: a view of memory that the caller owns.
struct Activations {
  int64_t M = 0, K = 0;
  int64_t stride = 0, blocks = 0;  // bytes from a row of codes to the next; of a row
  int8_t* codes = nullptr;         // (M, stride), the first 32 * blocks of each row
  float* scales = nullptr;         // (M, blocks)
  int32_t* sums = nullptr;         // (M, blocks)

  Activations() = default;
  Activations(int64_t M, int64_t K, void* memory)  // bytes(M, K) of it, aligned to 64
      : M(M), K(K), stride(stride_of(K)), blocks((K + 63) / 64 * 2) {
    codes = static_cast<int8_t*>(memory);
    scales = reinterpret_cast<float*>(codes + M * stride);
    sums = reinterpret_cast<int32_t*>(scales + M * blocks);
  }
  static size_t bytes(int64_t M, int64_t K) { return M * (stride_of(K) + (K + 63) / 64 * 16); }

  // An odd number of cache lines: neighbouring rows are in different sets of the cache.
  static int64_t stride_of(int64_t K) { return ((K + 63) / 64 | 1) * 64; }
};

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))

AVX2 inline __m256 load_8(const float* from) { return _mm256_loadu_ps(from); }

AVX2 inline __m256 load_8(const c10::BFloat16* from) {  // bf16 is the upper half of an fp32
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
}

AVX2 inline __m128i halves(__m256i v, int upper) {
  return upper ? _mm256_extracti128_si256(v, 1) : _mm256_castsi256_si128(v);
}

// The largest of 8 numbers.
AVX2 inline int32_t largest_of_8(__m256i v) {
  __m128i most = _mm_max_epi32(halves(v, 0), halves(v, 1));
  most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1)));
}

AVX2 inline int32_t sum_of_8(__m256i v) {
  __m128i total = _mm_add_epi32(halves(v, 0), halves(v, 1));
  total = _mm_add_epi32(total, _mm_shuffle_epi32(total, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(total, _mm_shuffle_epi32(total, 0xb1)));
}

template <class T>
AVX2 inline void quantize_block(const T* x, int8_t* codes, float& scale, int32_t& total) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  const __m256 xs[4] = {load_8(x), load_8(x + 8), load_8(x + 16), load_8(x + 24)};
  __m256i most = _mm256_setzero_si256();  // bits of fp32 without the sign: ordered as numbers
  for (const __m256& v : xs)
    most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(v), magnitude));
  const int32_t bits = largest_of_8(most);
  float max;
  std::memcpy(&max, &bits, sizeof max);
  const bool finite = bits < 0x7f800000, zero = max < SMALLEST;
  scale = !finite ? std::numeric_limits<float>::quiet_NaN() : zero ? 0.0f : max / 127;
  if (!finite || zero) {
    total = 0;
    std::memset(codes, 0, BLOCK_COLUMNS);
    return;
  }
  const __m256 inverse = _mm256_set1_ps(127 / max);
  __m256i q[4];
  for (int i = 0; i < 4; i++) q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(xs[i], inverse));
  total = sum_of_8(_mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3])));
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]),
                                           _mm256_packs_epi32(q[2], q[3]));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // undoes that of the packing
  _mm256_storeu_si256((__m256i*)codes, _mm256_permutevar8x32_epi32(bytes, order));
}

// Rows [begin, end) of x (M, K) in 8 bits.
template <class T>
AVX2 void quantize(const T* x, const Activations& to, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; m++) {
    int8_t* codes = to.codes + m * to.stride;
    float* scales = to.scales + m * to.blocks;
    int32_t* sums = to.sums + m * to.blocks;
    const T* row = x + m * to.K;
    for (int64_t b = 0, k = 0; b < to.blocks; b++, k += BLOCK_COLUMNS) {
      if (k + BLOCK_COLUMNS <= to.K) {
        quantize_block(row + k, codes + k, scales[b], sums[b]);
        continue;
      }
      T tail[BLOCK_COLUMNS] = {};
      if (k < to.K) std::memcpy((void*)tail, row + k, (to.K - k) * sizeof(T));
      quantize_block(tail, codes + k, scales[b], sums[b]);
    }
  }
}
#undef AVX2
#endif
}  // namespace llama3
