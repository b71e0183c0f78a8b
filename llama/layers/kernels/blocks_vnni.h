// y = x W^T for weights in blocks (layers/blocks.py has the layout) and x in 8 bits (activations.h),
// by AVX512_VNNI: an instruction adds the products of 4 codes and 4 activations to each of 16
// outputs. blocks.cpp includes this inside a namespace, with TARGET defined.
//
// The sums of a group are exact, and groups are added in one order: a row of y does not depend on
// the rows beside it.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both; a lane is an output.

TARGET inline __m512 widen(const BFloat16* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

TARGET inline __m512 times(__m128i steps, __m512 unit) {
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(steps)), unit);
}

// The scales and zeros of group g.
TARGET inline void load_scales(const BlockView& block, int64_t g, __m512 unit, __m512 zero_unit,
                               __m512& scale, __m512& zero) {
  const __m128i four = _mm_set1_epi8(15), two = _mm_set1_epi8(0x30);
  const __m128i low = _mm_loadu_si128((const __m128i*)(block.low + 16 * g));
  const __m128i high = _mm_srli_epi16(_mm_loadu_si128((const __m128i*)(block.high + g / 2 * 16)),
                                      4 * (g % 2));
  const __m128i steps = _mm_and_si128(low, four);
  const __m128i zeros = _mm_and_si128(_mm_srli_epi16(low, 4), four);
  scale = times(_mm_or_si128(steps, _mm_and_si128(_mm_slli_epi16(high, 4), two)), unit);
  zero = times(_mm_or_si128(zeros, _mm_and_si128(_mm_slli_epi16(high, 2), two)), zero_unit);
}

// The codes of group g: 4 columns of 16 outputs in each vector.
template <bool TOP>
TARGET inline void load_codes(const BlockView& block, int64_t g, __m512i (&codes)[8]) {
  const __m512i four = _mm512_set1_epi8(15), two = _mm512_set1_epi8(0x30);
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) {
    const __m512i pairs = _mm512_loadu_si512(block.nibbles_at(g, v, 0));
    codes[2 * v] = _mm512_and_si512(pairs, four);
    codes[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16(pairs, 4), four);
  }
  if (!TOP) return;
#pragma GCC unroll 2
  for (int u = 0; u < 2; u++) {
    const __m512i top = _mm512_loadu_si512(block.top_at(g, u, 0));
    const __m512i shifted[4] = {_mm512_slli_epi16(top, 4), _mm512_slli_epi16(top, 2), top,
                                _mm512_srli_epi16(top, 2)};
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      codes[4 * u + i] = _mm512_or_si512(codes[4 * u + i], _mm512_and_si512(shifted[i], two));
  }
}

TARGET inline __m512i broadcast(const int8_t* from) {
  int32_t four;
  memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

TARGET inline void put_tile(const Outputs& y, int64_t m, int64_t n, int64_t N, __m512 values) {
  const __mmask16 outputs = N - n < 16 ? (1 << (N - n)) - 1 : 0xffff;
  if (!y.is_bf16) {
    _mm512_mask_storeu_ps(static_cast<float*>(y.y) + m * y.stride + n, outputs, values);
    return;
  }
  const __m512i bits = _mm512_castps_si512(values), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7fc00000));
  const __m256i halves = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
  _mm256_mask_storeu_epi16(static_cast<BFloat16*>(y.y) + m * y.stride + n, outputs, halves);
}

// The 16 outputs of a tile for M rows of x.
template <bool TOP, int M>
TARGET inline void tile(const Weights& w, const Inputs& in, const Outputs& y, int64_t m,
                        int64_t tile) {
  const Activations& x = in.codes;
  const int8_t* codes = x.codes + m * x.stride;
  const float* scales = x.scales + m * x.blocks;
  const int32_t* sums = x.sums + m * x.blocks;
  __m512 total[M];
#pragma GCC unroll 16
  for (int j = 0; j < M; j++) total[j] = _mm512_setzero_ps();
  for (int64_t b = 0; b < w.K / w.columns; b++) {
    const BlockView block(w, tile, b);
    const __m512 unit = widen(block.units), zero_unit = widen(block.zero_units);
    for (int64_t g = 0; g < w.columns / 32; g++, codes += 32, scales++, sums++) {
      __m512 scale, zero;
      __m512i q[8];
      load_scales(block, g, unit, zero_unit, scale, zero);
      load_codes<TOP>(block, g, q);
      for (int line = 0; line < (TOP ? 6 : 4); line++)
        _mm_prefetch((const char*)block.nibbles_at(g, 0, 0) + AHEAD + 64 * line, _MM_HINT_T0);
#pragma GCC unroll 16
      for (int j = 0; j < M; j++) {
        __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
          sum = _mm512_dpbusd_epi32(sum, q[i], broadcast(codes + j * x.stride + 4 * i));
        const __m512 sum_x = _mm512_cvtepi32_ps(_mm512_set1_epi32(sums[j * x.blocks]));
        const __m512 zeros = _mm512_mul_ps(zero, sum_x);
        const __m512 product = _mm512_fmsub_ps(scale, _mm512_cvtepi32_ps(sum), zeros);
        total[j] = _mm512_fmadd_ps(product, _mm512_set1_ps(scales[j * x.blocks]), total[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < M; j++) put_tile(y, m + j, tile * 16, w.N, total[j]);
}

// Tiles [begin, end) of y = x W^T.
template <bool TOP>
TARGET void tiles(const Weights& w, const Inputs& in, const Outputs& y, int64_t begin,
                  int64_t end) {
  constexpr int64_t HEIGHT = 128;  // rows of x at a time, which stay in L2
  for (int64_t start = 0; start < in.M; start += HEIGHT) {
    const int64_t stop = std::min(start + HEIGHT, in.M);
    for (int64_t t = begin; t < end; t++) {
      int64_t m = start;
      for (; m + 8 <= stop; m += 8) tile<TOP, 8>(w, in, y, m, t);
      for (; m + 4 <= stop; m += 4) tile<TOP, 4>(w, in, y, m, t);
      for (; m + 2 <= stop; m += 2) tile<TOP, 2>(w, in, y, m, t);
      for (; m < stop; m++) tile<TOP, 1>(w, in, y, m, t);
    }
  }
}
