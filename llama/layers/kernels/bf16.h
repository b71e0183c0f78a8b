// What the kernels for AVX512_BF16 share: pairs of bf16 as words of 32 bits. Included inside a
// namespace, with TARGET defined: no #include, no #pragma once.

TARGET inline __m512bh load(const BFloat16* from, __mmask32 columns) {
  return (__m512bh)_mm512_maskz_loadu_epi16(columns, from);
}

// Mask of the first `columns` of 32; masked columns are not read.
inline __mmask32 first(int64_t columns) { return columns < 32 ? (1u << columns) - 1 : ~0u; }

inline int64_t words(int64_t columns) { return (columns + 1) / 2; }

// Transposes 16 rows of 16 words. Unrolled explicitly, as every loop over registers here: gcc 12
// would store them in memory otherwise.
TARGET inline void transpose(__m512i (&a)[16]) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  // Now a[4 i + j] has the columns j, 4 + j, 8 + j, 12 + j of the rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    b[j] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
    b[8 + j] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
    b[4 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
    b[12 + j] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = b[i];
}
