// y = x W^T for int8 weights and x in 8 bits (activations.h), by VNNI. Included once per width of
// vectors, inside a namespace, with LANES (16 or 8) and TARGET defined; no #include here.
//
// A lane is an output. The dot product of four columns takes an unsigned and a signed operand: the
// weights are made unsigned by adding 128, and 128 times the sum of x's codes is subtracted. So the
// sum of a block of 32 columns is exact. Blocks are added in fp32, in order, whatever M is: a row's
// outputs do not depend on the rows beside it.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both. A tile is LANES rows of W.

#if LANES == 16
typedef __m512i Bytes;
typedef __m512 Floats;

TARGET inline Bytes splat(int32_t v) { return _mm512_set1_epi32(v); }
TARGET inline Floats splat(float v) { return _mm512_set1_ps(v); }
TARGET inline Bytes flip(Bytes v) { return _mm512_xor_si512(v, splat((int32_t)0x80808080)); }
TARGET inline Bytes minus_128(Bytes v) { return _mm512_slli_epi32(_mm512_sub_epi32(splat(0), v), 7); }
TARGET inline Bytes dot(Bytes sum, Bytes w, Bytes x) { return _mm512_dpbusd_epi32(sum, w, x); }
TARGET inline Floats add(Floats sum, Bytes block, Floats scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(block), scale, sum);
}
TARGET inline Bytes low32(Bytes a, Bytes b) { return _mm512_unpacklo_epi32(a, b); }
TARGET inline Bytes high32(Bytes a, Bytes b) { return _mm512_unpackhi_epi32(a, b); }
TARGET inline Bytes low64(Bytes a, Bytes b) { return _mm512_unpacklo_epi64(a, b); }
TARGET inline Bytes high64(Bytes a, Bytes b) { return _mm512_unpackhi_epi64(a, b); }
// 16 columns of every fourth row.
TARGET inline Bytes pieces(const int8_t* w, int64_t stride) {
  Bytes v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)w));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(w + 4 * stride)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(w + 8 * stride)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(w + 12 * stride)), 3);
}
#else
typedef __m256i Bytes;
typedef __m256 Floats;

TARGET inline Bytes splat(int32_t v) { return _mm256_set1_epi32(v); }
TARGET inline Floats splat(float v) { return _mm256_set1_ps(v); }
TARGET inline Bytes flip(Bytes v) { return _mm256_xor_si256(v, splat((int32_t)0x80808080)); }
TARGET inline Bytes minus_128(Bytes v) { return _mm256_slli_epi32(_mm256_sub_epi32(splat(0), v), 7); }
TARGET inline Bytes dot(Bytes sum, Bytes w, Bytes x) { return DOT_256(sum, w, x); }
TARGET inline Floats add(Floats sum, Bytes block, Floats scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(block), scale, sum);
}
TARGET inline Bytes low32(Bytes a, Bytes b) { return _mm256_unpacklo_epi32(a, b); }
TARGET inline Bytes high32(Bytes a, Bytes b) { return _mm256_unpackhi_epi32(a, b); }
TARGET inline Bytes low64(Bytes a, Bytes b) { return _mm256_unpacklo_epi64(a, b); }
TARGET inline Bytes high64(Bytes a, Bytes b) { return _mm256_unpackhi_epi64(a, b); }
TARGET inline Bytes pieces(const int8_t* w, int64_t stride) {
  const Bytes v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)w));
  return _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)(w + 4 * stride)), 1);
}
#endif


typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
constexpr int64_t BLOCK = BLOCK_COLUMNS;
constexpr int64_t PANEL = BLOCK * LANES;    // bytes of a block of a tile
constexpr int STEP = LANES / 8;             // blocks that are read at a time
constexpr int FEW = 16;                     // up to so many rows of x, W is not copied
constexpr int MOST = LANES == 16 ? 12 : 6;  // rows of x at a time: their sums fit in registers
constexpr int64_t DEPTH = 32;               // blocks at a time: a panel and MOST rows of x fit L1
constexpr int64_t WIDTH = 4;                // tiles at a time: their panels fit L2


// Columns 4 i to 4 i + 3 of each row of a tile in vector i, plus 128.
template <int BLOCKS>
TARGET inline void load_blocks(Bytes (&ws)[8 * BLOCKS], const int8_t* w, int64_t stride) {
  Bytes rows[2 * BLOCKS][4];  // a whole line of a row at once: many strides share a set of L1
#pragma GCC unroll 4
  for (int row = 0; row < 4; row++)
#pragma GCC unroll 4
    for (int p = 0; p < 2 * BLOCKS; p++) rows[p][row] = pieces(w + row * stride + 16 * p, stride);
#pragma GCC unroll 4
  for (int p = 0; p < 2 * BLOCKS; p++) {
    const Bytes a = rows[p][0], b = rows[p][1], c = rows[p][2], d = rows[p][3];
    const Bytes ab = low32(a, b), cd = low32(c, d), AB = high32(a, b), CD = high32(c, d);
    ws[4 * p] = flip(low64(ab, cd)), ws[4 * p + 1] = flip(high64(ab, cd));
    ws[4 * p + 2] = flip(low64(AB, CD)), ws[4 * p + 3] = flip(high64(AB, CD));
  }
}

// A tile as it is stored: LANES rows of `stride` bytes, a multiple of 64.
struct Tile {
  const int8_t *w, *next;  // its first row; the next tile
  int64_t stride;

  // Blocks b to b + BLOCKS - 1. Prefetches the columns after these into L1.
  template <int BLOCKS>
  TARGET inline void load(Bytes (&ws)[8 * BLOCKS], int64_t b) const {
    const int8_t* from = w + b * BLOCK;
    if (BLOCKS == 2 || b % 2 == 0)
      for (int row = 0; row < LANES; row++)
        _mm_prefetch((const char*)from + row * stride + 128, _MM_HINT_T0);
    load_blocks<BLOCKS>(ws, from, stride);
  }
};

// Blocks of a tile, from `first`, in the order of load_blocks.
struct Panel {
  const int8_t *panel, *next;
  int64_t first;

  template <int BLOCKS>
  TARGET inline void load(Bytes (&ws)[8 * BLOCKS], int64_t b) const {
#pragma GCC unroll 16
    for (int i = 0; i < 8 * BLOCKS; i++)
      memcpy(&ws[i], panel + (b - first) * PANEL + i * 4 * LANES, 4 * LANES);
  }
};

// `count` numbers, at most LANES.
template <class T>
TARGET inline void copy(T* to, const T* from, int64_t count) {
  if (count == LANES)
    memcpy((void*)to, from, LANES * sizeof(T));
  else
    memcpy((void*)to, from, count * sizeof(T));
}

// The outputs of one row of x, from n.
TARGET inline void put(const Weights& w, const Outputs& out, int64_t m, int64_t n, Floats sums) {
  const int64_t count = std::min<int64_t>(LANES, w.N - n);
  Floats scales = {};
  copy((float*)&scales, w.scales + n, count);
  sums *= scales;
  if (!out.is_bf16) {
    auto* y = static_cast<float*>(out.y) + m * out.stride + n;
    return copy(y, (const float*)&sums, count);
  }
  const Words bits = (Words)sums, nan = Words{} + 0x7fc00000;  // to the nearest, ties to even
  const Words rounded = sums == sums ? bits + 0x7fff + (bits >> 16 & 1) : nan;
  const Halves y = __builtin_convertvector(rounded >> 16, Halves);
  copy(static_cast<BFloat16*>(out.y) + m * out.stride + n, (const BFloat16*)&y, count);
}

// A part of the work on a tile: blocks [first, last) of the columns.
struct Part {
  const Activations& x;
  const Weights& weights;
  const Outputs& out;
  int64_t n;            // the first output
  int64_t first, last;  // blocks
  Floats* partial;      // (M,): the sums of the blocks before `first`; those after `last` follow
};

// A part for rows m to m + M - 1 of x. W: a Tile or a Panel.
template <int M, int BLOCKS, class W>
TARGET __attribute__((noinline)) void multiply_tile(const Part& part, const W& w, int64_t m) {
  const Activations& x = part.x;
  const int8_t* codes = x.codes + m * x.stride;
  const float* scales = x.scales + m * x.blocks;
  const int32_t* sums = x.sums + m * x.blocks;
  const int64_t end = part.last;
  Floats total[M];
#pragma GCC unroll 12
  for (int j = 0; j < M; j++) total[j] = part.first ? part.partial[m + j] : splat(0.0f);
  for (int64_t first = part.first; first < end; first += BLOCKS) {
    for (int i = 0; i < BLOCKS * PANEL / 64; i++)  // into L2, in the order of memory
      _mm_prefetch((const char*)w.next + first * PANEL + 64 * i, _MM_HINT_T1);
    Bytes ws[8 * BLOCKS];
    w.template load<BLOCKS>(ws, first);
    if (BLOCKS == 1 && first % 2 == 0)  // and of many rows of x, columns that L1 has not yet
#pragma GCC unroll 12
      for (int j = 0; j < M; j++)
        _mm_prefetch((const char*)codes + j * x.stride + first * BLOCK + 192, _MM_HINT_T0);
#pragma GCC unroll 2
    for (int64_t b = first; b < first + BLOCKS; b++) {
      Bytes sum[M];
#pragma GCC unroll 12
      for (int j = 0; j < M; j++) sum[j] = minus_128(splat(sums[j * x.blocks + b]));
#pragma GCC unroll 8
      for (int i = 0; i < 8; i++)
#pragma GCC unroll 12
        for (int j = 0; j < M; j++) {
          int32_t four;
          memcpy(&four, codes + j * x.stride + b * BLOCK + 4 * i, 4);
          sum[j] = dot(sum[j], ws[(b - first) * 8 + i], splat(four));
        }
#pragma GCC unroll 12
      for (int j = 0; j < M; j++) total[j] = add(total[j], sum[j], splat(scales[j * x.blocks + b]));
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < M; j++)
    if (part.last == x.blocks)
      put(part.weights, part.out, m + j, part.n, total[j]);
    else
      part.partial[m + j] = total[j];
}

// Rows m to end - 1 of x, no more than MOST_ROWS.
template <int MOST_ROWS, int BLOCKS, class W>
TARGET inline void multiply_rows(const Part& part, const W& w, int64_t m, int64_t end) {
  if (end - m == MOST_ROWS) return multiply_tile<MOST_ROWS, BLOCKS>(part, w, m);
  if constexpr (MOST_ROWS > 1) multiply_rows<MOST_ROWS - 1, BLOCKS>(part, w, m, end);
}

// Tile t of W. One with fewer rows, or with columns that 64 does not divide, is copied to `padded`.
// The tile to prefetch is `ahead` tiles later; 0 for none.
TARGET inline Tile tile_of(const Weights& w, int64_t t, int64_t ahead, std::vector<int8_t>& padded) {
  const int8_t* from = static_cast<const int8_t*>(w.w) + t * LANES * w.K;
  const int64_t rows = std::min<int64_t>(LANES, w.N - t * LANES), stride = (w.K + 63) / 64 * 64;
  if (rows == LANES && stride == w.K) return {from, from + ahead * LANES * stride, stride};
  padded.assign(LANES * stride, 0);
  for (int64_t r = 0; r < rows; r++) memcpy(padded.data() + r * stride, from + r * w.K, w.K);
  return {padded.data(), padded.data(), stride};
}

// Stores blocks of a tile as a panel.
TARGET inline void fill(int8_t* panel, const Tile& tile, int64_t first, int64_t last) {
  for (int64_t b = first; b < last; b += STEP, panel += STEP * PANEL) {
    Bytes ws[8 * STEP];
    tile.load<STEP>(ws, b);
#pragma GCC unroll 16
    for (int i = 0; i < 8 * STEP; i++) memcpy(panel + i * 4 * LANES, &ws[i], 4 * LANES);
  }
}

// Prefetches tiles that no other tile has prefetched, into L2.
TARGET inline void prefetch(const Tile& tile, int64_t tiles) {
  for (int64_t i = 0; i < tiles * LANES * tile.stride; i += 64)
    _mm_prefetch((const char*)tile.w + i, _MM_HINT_T1);
}

// Tiles [begin, end) for several rows of x: DEPTH blocks of WIDTH tiles at a time.
TARGET inline void multiply_many(const Weights& w, const Activations& x, const Outputs& out,
                                 int64_t begin, int64_t end) {
  static thread_local std::vector<Line> panels(WIDTH * DEPTH * PANEL / 64), partial;
  static thread_local std::vector<int8_t> padded[WIDTH];
  partial.resize(WIDTH * x.M);
  auto* sums = (Floats*)partial.data();
  auto* panel = (int8_t*)panels.data();
  const int64_t passes = (x.M + MOST - 1) / MOST, rows = (x.M + passes - 1) / passes;
  for (int64_t t = begin; t < end; t += WIDTH) {
    const int64_t tiles = std::min(WIDTH, end - t), ahead = t + 2 * WIDTH <= end ? WIDTH : 0;
    Tile tile[WIDTH];
    for (int64_t i = 0; i < tiles; i++) tile[i] = tile_of(w, t + i, ahead, padded[i]);
    if (t == begin) prefetch(tile[0], tiles);
    for (int64_t first = 0; first < x.blocks; first += DEPTH) {
      const int64_t last = std::min(first + DEPTH, x.blocks);
      for (int64_t i = 0; i < tiles; i++) fill(panel + i * DEPTH * PANEL, tile[i], first, last);
      for (int64_t m = 0; m < x.M; m += rows)
        for (int64_t i = 0; i < tiles; i++) {
          const Part part{x, w, out, (t + i) * LANES, first, last, sums + i * x.M};
          const Panel blocks{panel + i * DEPTH * PANEL, tile[i].next, first};
          multiply_rows<MOST, 1>(part, blocks, m, std::min(m + rows, x.M));
        }
    }
  }
}

// Tiles [begin, end) of y = x W^T * scales.
TARGET void integer_rows(const Weights& w, const Inputs& in, const Outputs& out, int64_t begin,
                         int64_t end) {
  constexpr int HALF = FEW / 2;  // rows at a time
  const Activations& x = in.codes;
  if (x.M > FEW) return multiply_many(w, x, out, begin, end);
  static thread_local std::vector<int8_t> padded;
  const int64_t rows = x.M > HALF ? (x.M + 1) / 2 : x.M;
  for (int64_t t = begin; t < end; t++) {
    const Tile tile = tile_of(w, t, t + 1 < end, padded);
    if (t == begin) prefetch(tile, 1);
    const Part part{x, w, out, t * LANES, 0, x.blocks, nullptr};
    for (int64_t m = 0; m < x.M; m += rows)
      multiply_rows<HALF, STEP>(part, tile, m, std::min(m + rows, x.M));
  }
}
