// y = x W^T for several rows of bf16 x, by AVX512_BF16: pairs of bf16 are multiplied exactly and
// summed in fp32 (denormals count as zero). multiply.cpp includes this inside a namespace, with
// TARGET defined, as variants.h includes rows.h.
//
// W is read from memory once for any M. bf16 and int8 weights: vectors run along K, 16 accumulators
// belong to 4 rows of x times 4 rows of W, and lanes are summed at the end only. int4 weights: a
// lane is an output, so lanes are never summed, and codes are converted in registers.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.

constexpr int64_t DEPTH = 2048;  // columns at a time: 4 rows of x and of W fit L1
constexpr int64_t WIDTH = 96;    // rows of W at a time: with DEPTH columns they fit L2
constexpr int64_t HEIGHT = 512;  // rows of x at a time, whose partial sums are stored
constexpr int64_t FEW = 16;      // up to so many rows of x, reading W dominates

typedef const BFloat16* Rows[4];

// The loops below are unrolled explicitly: gcc 12 would store the accumulators in memory otherwise.
TARGET inline void multiply(__m512 (&acc)[16], const Rows& x, const Rows& w, int64_t k,
                            __mmask32 columns) {
  __m512bh xs[4];
#pragma GCC unroll 4
  for (int m = 0; m < 4; m++) xs[m] = load(x[m] + k, columns);
#pragma GCC unroll 4
  for (int n = 0; n < 4; n++) {
    const __m512bh ws = load(w[n] + k, columns);
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) acc[4 * m + n] = _mm512_dpbf16_ps(acc[4 * m + n], xs[m], ws);
  }
}

// The sum of each of 16 vectors, by adding pairs of vectors until one is left.
TARGET inline __m512 sums(const __m512 (&v)[16]) {
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    a[i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]) + _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    b[i] = (__m512)_mm512_unpacklo_pd((__m512d)a[2 * i], (__m512d)a[2 * i + 1]) +
           (__m512)_mm512_unpackhi_pd((__m512d)a[2 * i], (__m512d)a[2 * i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < 2; i++)
    c[i] = _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88) +
           _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd);
  return _mm512_shuffle_f32x4(c[0], c[1], 0x88) + _mm512_shuffle_f32x4(c[0], c[1], 0xdd);
}

// 4 rows of x times 4 of W over `depth` columns: 4 outputs of the first row of x, then the next.
// FETCH: also prefetch the weights `ahead` of these into L2.
template <bool FETCH>
TARGET __attribute__((noinline)) __m512 tile(const Rows& x_rows, const Rows& w_rows, int64_t depth,
                                             int64_t ahead) {
  const Rows x = {x_rows[0], x_rows[1], x_rows[2], x_rows[3]};
  const Rows w = {w_rows[0], w_rows[1], w_rows[2], w_rows[3]};
  __m512 acc[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) acc[i] = _mm512_setzero_ps();
  int64_t k = 0;
  for (; k + 32 <= depth; k += 32) {
    if (FETCH)
      for (int n = 0; n < 4; n++) _mm_prefetch((const char*)(w[n] + k + ahead), _MM_HINT_T1);
    multiply(acc, x, w, k, ~0u);
  }
  if (k < depth) multiply(acc, x, w, k, first(depth - k));
  return sums(acc);
}

// 4 rows of y from m on, as far as there are M, times 4 outputs from n on, as far as there are N.
TARGET inline void put_tile(const Weights& w, const Outputs& out, int64_t M, int64_t m, int64_t n,
                            __m512 values) {
  const int outputs = (int)std::min<int64_t>(4, w.N - n);
  if (w.scales) {
    const __m128 scales = _mm_maskz_loadu_ps((1 << outputs) - 1, w.scales + n);
    values *= _mm512_broadcast_f32x4(scales);
  }
  uint64_t rows[4];
  const __m256bh half = _mm512_cvtneps_pbh(values);
  memcpy(rows, &half, sizeof rows);
  auto* y = static_cast<BFloat16*>(out.y) + m * out.stride + n;
  for (int i = 0; i < std::min<int64_t>(4, M - m); i++, y += out.stride)
    if (outputs == 4)
      memcpy((void*)y, rows + i, 8);
    else
      memcpy((void*)y, rows + i, 2 * outputs);
}

// A row of W in bf16: itself, or (int8) converted exactly into `to`.
inline const BFloat16* widened(const BFloat16* from, int64_t, BFloat16*) { return from; }

TARGET inline const BFloat16* widened(const int8_t* from, int64_t columns, BFloat16* to) {
  for (int64_t k = 0; k < columns; k += 32) {
    const __m256i codes = _mm256_maskz_loadu_epi8(first(columns - k), from + k);
    _mm_prefetch((const char*)(from + k) + AHEAD, _MM_HINT_T0);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
    const __m512 high =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
    _mm512_storeu_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
  return to;
}

// x (rows m0 to m1) times W (rows n0 to n1) over the columns from k0. Sums of earlier columns are
// read from `partial`; the new sums are stored there unless these columns are the last. Beyond the
// last row of x or W the last one is repeated, and put_tile drops it.
template <class W>
TARGET void block(const Weights& weights, const Inputs& in, const Outputs& out, int64_t m0,
                  int64_t m1, int64_t n0, int64_t n1, int64_t k0, BFloat16* plain,
                  __m512* partial) {
  const int64_t K = in.K, depth = std::min(DEPTH, K - k0), x_tiles = (m1 - m0 + 3) / 4;
  const auto* from = static_cast<const W*>(weights.w) + k0;
  const BFloat16* lines[WIDTH + 3];
  for (int64_t n = n0; n < n1; n++)
    lines[n - n0] = widened(from + n * K, depth, plain + (n - n0) * DEPTH);
  for (int64_t n = n1; n < n1 + 3; n++) lines[n - n0] = lines[n1 - 1 - n0];
  for (int64_t m = m0; m < m1; m += 4) {
    Rows x, w;
    for (int i = 0; i < 4; i++) x[i] = in.bf16() + std::min(m + i, m1 - 1) * K + k0;
    for (int64_t n = n0; n < n1; n += 4, partial++) {
      for (int i = 0; i < 4; i++) w[i] = lines[n - n0 + i];
      // Prefetch each line of the next block once, spread over the work on this one.
      const bool fetch = sizeof(W) == 2 && (m - m0) / 4 == (n - n0) / 4 % x_tiles;
      __m512 values = fetch ? tile<true>(x, w, depth, (n1 - n0) * K) : tile<false>(x, w, depth, 0);
      if (k0) values += *partial;
      if (k0 + depth < K)
        *partial = values;
      else
        put_tile(weights, out, in.M, m, n, values);
    }
  }
}

// Rows 4 begin to 4 end of y = x W^T * scales, for W of bf16 or int8.
template <class W>
TARGET void blocks(const Weights& w, const Inputs& in, const Outputs& out, int64_t begin,
                   int64_t end) {
  static thread_local std::vector<Line> plain(WIDTH * DEPTH / 32), partial(HEIGHT * WIDTH / 16);
  const int64_t stop = std::min(4 * end, w.N), width = in.M <= FEW ? 4 : WIDTH;
  for (int64_t n = 4 * begin; n < stop; n += width)
    for (int64_t m = 0; m < in.M; m += HEIGHT)
      for (int64_t k = 0; k < in.K; k += DEPTH)
        block<W>(w, in, out, m, std::min(m + HEIGHT, in.M), n, std::min(n + width, stop), k,
                 (BFloat16*)plain.data(), (__m512*)partial.data());
}

// int4: as many rows of x at a time as fit in registers, then the rest of M.
#define EACH_PANEL(M, make)             \
  int64_t m = 0;                        \
  for (; m + 12 <= M; m += 12) make(12) \
  for (; m + 8 <= M; m += 8) make(8)    \
  for (; m + 6 <= M; m += 6) make(6)    \
  for (; m + 4 <= M; m += 4) make(4)    \
  for (; m + 3 <= M; m += 3) make(3)    \
  for (; m + 2 <= M; m += 2) make(2)    \
  for (; m < M; m++) make(1)

// A panel is C rows of x in the order in which tile_int4 reads them, (K / 8, C, 4) with columns k
// and k + 4 of eight in one word; and the sum of each group, (K / group, C). This fills the rows
// [begin, end) of the panel that begins at row m.
TARGET inline void fill_panel(const Inputs& in, int64_t m, int64_t C, int64_t begin, int64_t end) {
  const int64_t K = in.K, first = std::max(begin, m) - m, last = std::min(end, m + C) - m;
  const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  for (int64_t g = 0; g < K / in.group; g++)
    for (int64_t c = first; c < last; c++) {
      const BFloat16* x = in.bf16() + (m + c) * K;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = g * in.group; k < (g + 1) * in.group; k += 8) {
        const __m128i eight = _mm_loadu_si128((const __m128i*)(x + k));
        uint32_t* to = in.panels + m * K / 2 + (k / 8 * C + c) * 4;
        _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi16(eight, _mm_srli_si128(eight, 8)));
        if (k % 32 == 0) sum = _mm512_dpbf16_ps(sum, load(x + k, ~0u), ones);
      }
      in.sums[m * (K / in.group) + g * C + c] = _mm512_reduce_add_ps(sum);
    }
}

TARGET void fill_panels(const Inputs& in, int64_t begin, int64_t end) {
#define FILL(C) fill_panel(in, m, C, begin, end);
  EACH_PANEL(in.M, FILL)
#undef FILL
}

TARGET inline __m512 from_bf16(const BFloat16* from) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return (__m512)_mm512_slli_epi32(bits, 16);
}

// The 16 outputs of a tile of int4 weights for C rows of x. A table converts codes to bf16 exactly;
// the fifth bit of an index belongs to the next code, so the table contains every value twice. A
// group's scale and zero are applied to its fp32 sums.
template <int C>
TARGET inline void tile_int4(const Weights& weights, const Inputs& in, const Outputs& out,
                             int64_t m, int64_t tile) {
  alignas(64) static constexpr uint16_t TABLE[32] = {
      0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120,
      0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0,
      0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
  const __m512i table = _mm512_load_si512(TABLE);
  const int64_t groups = in.K / in.group;
  const auto* w = static_cast<const uint32_t*>(weights.w) + tile * in.K / 8 * 16;
  const BFloat16* scales = weights.group_scales + tile * groups * 16;
  const BFloat16* zeros = weights.group_zeros + tile * groups * 16;
  const uint32_t* x = in.panels + m * in.K / 2;
  const float* x_sums = in.sums + m * groups;
  __m512 total[C] = {};
  for (int64_t g = 0; g < groups; g++, scales += 16, zeros += 16, x_sums += C) {
    __m512 sums[C] = {};
    for (int64_t k = 0; k < in.group; k += 8, w += 16, x += 4 * C) {
      const __m512i codes = _mm512_loadu_si512(w);
      _mm_prefetch((const char*)w + AHEAD, _MM_HINT_T0);
      for (int i = 0; i < 4; i++) {
        const __m512i index = _mm512_srli_epi32(codes, 4 * i);
        const auto pairs = (__m512bh)_mm512_permutexvar_epi16(index, table);
        for (int c = 0; c < C; c++)
          sums[c] = _mm512_dpbf16_ps(sums[c], pairs, (__m512bh)_mm512_set1_epi32(x[4 * c + i]));
      }
    }
    const __m512 scale = from_bf16(scales), zero = from_bf16(zeros);
    for (int c = 0; c < C; c++) total[c] += scale * sums[c] + zero * x_sums[c];
  }
  const int64_t n = tile * 16;
  const __mmask16 outputs = weights.N - n < 16 ? (1 << (weights.N - n)) - 1 : 0xffff;
  for (int c = 0; c < C; c++) {
    auto* y = static_cast<BFloat16*>(out.y) + (m + c) * out.stride + n;
    _mm256_mask_storeu_epi16(y, outputs, (__m256i)_mm512_cvtneps_pbh(total[c]));
  }
}

TARGET void tiles(const Weights& w, const Inputs& in, const Outputs& out, int64_t begin,
                  int64_t end) {
  for (int64_t t = begin; t < end; t++) {
#define TILE(C) tile_int4<C>(w, in, out, m, t);
    EACH_PANEL(in.M, TILE)
#undef TILE
  }
}
