// y = x W^T for many rows of bf16 x (a prompt), by AVX512_BF16 at nearly the speed of its
// multiplier. multiply.cpp includes this after blocked.h, inside the same namespace.
//
// A lane is a row of x: `fill_columns` puts pairs of columns of 16 rows side by side, once for all
// outputs. A pair of columns of a row of W is broadcast, so W needs no transposition and lanes are
// never summed. Rows of W are copied before use: in place, where K is a power of two, more of them
// than L1 has ways would share a set. A row's result depends neither on M nor on the other rows.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.

constexpr int64_t TILE = 12;              // rows of W at a time: with 32 rows of x, 24 sums
constexpr int64_t SPAN = 512;             // columns at a time
constexpr int64_t CROWD = 256;            // rows of x at a time: with SPAN columns, 1/4 of L2
constexpr int64_t GROUP = 8;              // tiles for which these rows and columns stay in L2
constexpr int64_t STRIDE = SPAN / 2 + 16; // words of a copied row; not a multiple of 4 KB

// Where panel p (rows 16 p to 16 p + 15) begins, at columns k, a multiple of SPAN: (K / SPAN, M / 16,
// SPAN / 2, 16) words.
inline uint32_t* panel(const Inputs& in, int64_t p, int64_t k) {
  const int64_t panels = (in.M + 15) / 16, depth = std::min(SPAN, in.K - k);
  return in.panels + 16 * (panels * k / 2 + p * words(depth));
}

// Fills the panels whose first row is in [begin, end). Rows beyond M and columns beyond K are 0.
TARGET void fill_columns(const Inputs& in, int64_t begin, int64_t end) {
  for (int64_t m = (begin + 15) / 16 * 16; m < end; m += 16)
    for (int64_t k = 0; k < in.K; k += 32) {
      uint32_t* to = panel(in, m / 16, k / SPAN * SPAN) + k % SPAN / 2 * 16;
      const BFloat16* x = in.bf16() + m * in.K + k;
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        rows[i] = m + i < in.M ? (__m512i)load(x + i * in.K, first(in.K - k)) : __m512i{};
      transpose(rows);
      const int64_t count = std::min<int64_t>(16, words(in.K - k));
      for (int i = 0; i < count; i++) _mm512_storeu_si512(to + 16 * i, rows[i]);
    }
}

// Rows of W to prefetch into L1 while others are multiplied.
struct Ahead {
  const char* at;
  int64_t rows, stride;
};

// Adds to the sums (TILE, V, 16) the products of TILE copied rows of W and of V panels, `stride`
// words apart, over n words; if `fresh`, the sums begin at 0.
template <int V>
TARGET __attribute__((noinline)) void add_products(const uint32_t* w, const uint32_t* x,
                                                   int64_t stride, int64_t n, bool fresh,
                                                   float* sums, const Ahead& ahead) {
  __m512 acc[TILE * V];
#pragma GCC unroll 24
  for (int i = 0; i < TILE * V; i++)
    acc[i] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + 16 * i);
  for (int64_t i = 0; i < n;) {
    for (int64_t row = 0; row < ahead.rows; row++)
      _mm_prefetch(ahead.at + row * ahead.stride + 4 * i, _MM_HINT_T0);
    for (const int64_t end = std::min(i + 16, n); i < end; i++) {
      __m512bh xs[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) xs[v] = (__m512bh)_mm512_loadu_si512(x + v * stride + 16 * i);
#pragma GCC unroll 12
      for (int r = 0; r < TILE; r++) {
        const auto pair = (__m512bh)_mm512_set1_epi32(w[r * STRIDE + i]);
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) acc[r * V + v] = _mm512_dpbf16_ps(acc[r * V + v], xs[v], pair);
      }
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < TILE * V; i++) _mm512_storeu_ps(sums + 16 * i, acc[i]);
}

// Copies the columns k to k + depth of TILE rows of W from n on; the last row is repeated.
TARGET inline void copy_rows(const Weights& w, int64_t n, int64_t k, int64_t depth, uint32_t* to) {
  for (int64_t r = 0; r < TILE; r++, to += STRIDE) {
    const auto* from = static_cast<const BFloat16*>(w.w) + std::min(n + r, w.N - 1) * w.K + k;
    int64_t i = 0;
    for (; i + 32 <= depth; i += 32) _mm512_storeu_si512(to + i / 2, _mm512_loadu_si512(from + i));
    if (i < depth) _mm512_storeu_si512(to + i / 2, (__m512i)load(from + i, first(depth - i)));
  }
}

// A part of the product: tiles of W from row n0 to n1, rows [m0, m1) of x.
struct Part {
  const Weights& w;
  const Inputs& in;
  int64_t n0, n1, m0, m1;
  uint32_t* copy;  // (TILE, STRIDE)
  float* sums;     // (tiles, rows of x / 16, TILE, 16); two panels share the third dimension

  float* sums_of(int64_t n, int64_t m) const {
    return sums + (n - n0) * CROWD + (m - m0) * TILE;
  }
};

// Adds the products of one tile over SPAN columns to the sums. The next tile to be copied begins at
// row next_n and column next_k.
TARGET void multiply_tile(const Part& part, int64_t n, int64_t k, int64_t next_n, int64_t next_k) {
  const Weights& w = part.w;
  const int64_t depth = std::min(SPAN, w.K - k), pairs = (part.m1 - part.m0 + 31) / 32;
  copy_rows(w, n, k, depth, part.copy);
  Ahead ahead{nullptr, (TILE + pairs - 1) / pairs, 2 * w.K};
  for (int64_t i = 0, m = part.m0; m < part.m1; i++, m += 32) {
    const int64_t row = std::min(i * ahead.rows, TILE - ahead.rows);
    const int64_t next = std::max<int64_t>(0, std::min(next_n, w.N - TILE)) + row;
    ahead.at = static_cast<const char*>(w.w) + 2 * (next * w.K + next_k);
    const uint32_t* x = panel(part.in, m / 16, k);
    const auto add = m + 16 < part.m1 ? add_products<2> : add_products<1>;
    add(part.copy, x, 16 * words(depth), words(depth), k == 0, part.sums_of(n, m), ahead);
  }
}

// Writes the sums to y, whole cache lines at a time.
TARGET void put_sums(const Part& part, const Outputs& out) {
  alignas(64) BFloat16 lines[16][GROUP * TILE + 4];
  const int64_t count = std::min(part.n1, part.w.N) - part.n0;
  for (int64_t m = part.m0; m < part.m1; m += 16) {
    const int64_t pair = (m - part.m0) / 32 * 32 + part.m0, V = pair + 16 < part.m1 ? 2 : 1;
    for (int64_t n = part.n0; n < part.n1; n += TILE) {
      const float* sums = part.sums_of(n, pair) + (m - pair);
      __m512i a[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++)
        a[r] = r < TILE ? _mm512_loadu_si512(sums + r * V * 16) : __m512i{};
      transpose(a);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) {
        const __m256bh half = _mm512_cvtneps_pbh((__m512)a[i]);
        _mm256_storeu_si256((__m256i*)&lines[i][n - part.n0], (__m256i)half);
      }
    }
    auto* y = static_cast<BFloat16*>(out.y) + m * out.stride + part.n0;
    for (int i = 0; i < std::min<int64_t>(16, part.m1 - m); i++)
      memcpy((void*)(y + i * out.stride), lines[i], 2 * count);
  }
}

// Tiles [begin, end) of y = x W^T for W of bf16.
TARGET void many_rows(const Weights& w, const Inputs& in, const Outputs& out, int64_t begin,
                      int64_t end) {
  static thread_local std::vector<Line> copy(TILE * STRIDE / 16), sums(GROUP * TILE * CROWD / 16);
  for (int64_t t = begin; t < end; t += GROUP)
    for (int64_t m = 0; m < in.M; m += CROWD) {
      const Part part{w, in, t * TILE, std::min(t + GROUP, end) * TILE, m,
                      std::min(m + CROWD, in.M), (uint32_t*)copy.data(), (float*)sums.data()};
      for (int64_t k = 0; k < w.K; k += SPAN) {
        const bool last_k = k + SPAN >= w.K, last = last_k && m + CROWD >= in.M;
        for (int64_t n = part.n0; n < part.n1; n += TILE)
          if (n + TILE < part.n1)
            multiply_tile(part, n, k, n + TILE, k);
          else
            multiply_tile(part, n, k, last ? part.n1 : part.n0, last_k ? 0 : k + SPAN);
      }
      put_sums(part, out);
    }
}
