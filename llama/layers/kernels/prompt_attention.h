// Attention of many queries (a prompt) in bf16, by AVX512_BF16: scores and sums are multiplied in
// bf16 and added in fp32, and the weights of the softmax are rounded to bf16, as in flash attention
// on a GPU (arXiv:2205.14135). Their sum is that of the rounded weights, so they add up to 1.
// attention.cpp includes this inside a namespace, after bf16.h.

constexpr int ROWS_AT_ONCE = 6;  // with 4 vectors of keys or values, 24 sums fit in registers

// c[m, j] = (keep ? keep[m] c[m, j] : 0) + the pairs a[m, i] times b[i, j], i < n, for 64 columns.
template <int M>
TARGET inline void add_products(const uint32_t* a, int64_t a_stride, const uint32_t* b,
                                int64_t b_stride, int64_t n, const float* keep, float* c,
                                int64_t c_stride) {
  __m512 acc[4 * M], bs[4];
#pragma GCC unroll 24
  for (int i = 0; i < 4 * M; i++) {
    acc[i] = _mm512_setzero_ps();
    if (keep) acc[i] = _mm512_loadu_ps(c + i / 4 * c_stride + i % 4 * 16) * keep[i / 4];
  }
  for (int64_t i = 0; i < n; i++) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; u++) bs[u] = (__m512)_mm512_loadu_si512(b + i * b_stride + 16 * u);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const auto pair = (__m512bh)_mm512_set1_epi32(a[m * a_stride + i]);
#pragma GCC unroll 4
      for (int u = 0; u < 4; u++)
        acc[4 * m + u] = _mm512_dpbf16_ps(acc[4 * m + u], pair, (__m512bh)bs[u]);
    }
  }
#pragma GCC unroll 24
  for (int i = 0; i < 4 * M; i++) _mm512_storeu_ps(c + i / 4 * c_stride + i % 4 * 16, acc[i]);
}

// 2^x for x <= 0, within 2^-14 of it; NaN for NaN.
TARGET inline __m512 power(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // the second one if that is NaN
  const __m512 whole = _mm512_roundscale_ps(x, 0), r = x - whole;
  __m512 y = _mm512_set1_ps(0.00961813f);  // Taylor series of e^(r ln 2)
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.05550411f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.24022651f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.69314718f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// The first `seen` of 64 scores -> weights 2^(score * scale - most so far) in bf16, the others 0.
// Returns the factor for earlier sums.
TARGET inline float soften(const float* scores, float scale, int64_t seen, uint32_t* weights,
                           float& most, float& total) {
  const __m512 none = _mm512_set1_ps(-INFINITY);
  __m512 v[4], tops = none;
#pragma GCC unroll 4
  for (int u = 0; u < 4; u++) {
    const auto visible = (__mmask16)first(std::clamp<int64_t>(seen - 16 * u, 0, 16));
    v[u] = _mm512_mask_mul_ps(none, visible, _mm512_loadu_ps(scores + 16 * u), _mm512_set1_ps(scale));
    tops = _mm512_max_ps(tops, v[u]);
  }
  const float before = most;
  most = std::max(before, _mm512_reduce_max_ps(tops));
  const float top = most == -INFINITY ? 0 : most;  // no key is visible yet
#pragma GCC unroll 4
  for (int u = 0; u < 4; u++) v[u] = power(v[u] - top);
  const __m512bh low = _mm512_cvtne2ps_pbh(v[1], v[0]), high = _mm512_cvtne2ps_pbh(v[3], v[2]);
  _mm512_storeu_si512(weights, (__m512i)low);
  _mm512_storeu_si512(weights + 16, (__m512i)high);
  const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  const __m512 sums = _mm512_dpbf16_ps(_mm512_dpbf16_ps(_mm512_setzero_ps(), low, ones), high, ones);
  const float keep = _mm512_cvtss_f32(power(_mm512_set1_ps(before - top)));
  total = total * keep + _mm512_reduce_add_ps(sums);
  return keep;
}

// M queries from `row` on over a block of keys and values, of which query m sees seen[m].
template <int M>
TARGET void attend_rows(const Job& job, const Scratch& to, int64_t row, const int64_t* seen) {
  alignas(64) float scores[M * BLOCK];
  alignas(64) uint32_t weights[M * BLOCK / 2];
  float keep[M];
  const int64_t W = job.width, most_seen = *std::max_element(seen, seen + M);
  if (most_seen <= 0) return;
  const auto* queries = (const uint32_t*)to.queries + row * W / 2;
  add_products<M>(queries, W / 2, (const uint32_t*)to.keys, BLOCK, words(job.D), nullptr, scores,
                  BLOCK);
  const float scale = job.scale * 1.44269504f;  // powers of 2 instead of e
  for (int m = 0; m < M; m++)
    keep[m] = soften(scores + m * BLOCK, scale, seen[m], weights + m * BLOCK / 2,
                     to.most[row + m], to.total[row + m]);
  for (int64_t d = 0; d < W; d += 64)
    add_products<M>(weights, BLOCK / 2, (const uint32_t*)to.values + d, W, words(most_seen), keep,
                    to.sums + row * W + d, W);
}

// `count` keys, `stride` apart -> pairs of neighbouring numbers, (D / 2, BLOCK).
TARGET void turn_keys(const BFloat16* keys, int64_t stride, int64_t count, int64_t D, uint32_t* to) {
  for (int64_t s = 0; s < count; s += 16)
    for (int64_t d = 0; d < D; d += 32) {
      __m512i rows[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        rows[i] = s + i < count ? (__m512i)load(keys + (s + i) * stride + d, first(D - d)) : __m512i{};
      transpose(rows);
      for (int i = 0; i < std::min<int64_t>(16, words(D - d)); i++)
        _mm512_storeu_si512(to + (d / 2 + i) * BLOCK + s, rows[i]);
    }
}

// `count` values, `stride` apart -> pairs of numbers of neighbouring values, (BLOCK / 2, width).
TARGET void pair_values(const BFloat16* values, int64_t stride, int64_t count, int64_t D,
                        int64_t width, uint32_t* to) {
  const __m512i places = _mm512_set_epi32(  // words i and i + 32 of both, side by side
      0x2f000f, 0x2e000e, 0x2d000d, 0x2c000c, 0x2b000b, 0x2a000a, 0x290009, 0x280008, 0x270007,
      0x260006, 0x250005, 0x240004, 0x230003, 0x220002, 0x210001, 0x200000);
  const __m512i upper = _mm512_add_epi16(places, _mm512_set1_epi16(16));
  for (int64_t s = 0; s < count; s += 2, values += 2 * stride, to += width)
    for (int64_t d = 0; d < D; d += 32) {
      const auto a = (__m512i)load(values + d, first(D - d));
      const auto b = s + 1 < count ? (__m512i)load(values + stride + d, first(D - d)) : __m512i{};
      _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, places, b));
      _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(a, upper, b));
    }
}

// Computes a task of one key-value head, as `attend` in attention.h does.
TARGET void attend_prompt(const Job& job, const Task& task, const Scratch& to) {
  constexpr void (*ATTEND[])(const Job&, const Scratch&, int64_t, const int64_t*) = {
      attend_rows<1>, attend_rows<2>, attend_rows<3>, attend_rows<4>, attend_rows<5>, attend_rows<6>};
  const int64_t G = job.H / job.K, W = job.width, rows = (task.end - task.begin) * G;
  const int64_t* limits = job.positions + task.row * job.position_stride;
  const int64_t last = std::min(task.last, 1 + *std::max_element(limits + task.begin,
                                                                 limits + task.end));
  memset((void*)to.queries, 0, 2 * rows * W);
  for (int64_t row = 0; row < rows; row++)
    memcpy((void*)((BFloat16*)to.queries + row * W),
           static_cast<const BFloat16*>(job.queries) + query(job, task, row), 2 * job.D);
  std::fill_n(to.sums, rows * W, 0.0f);
  std::fill_n(to.most, rows, -INFINITY);
  std::fill_n(to.total, rows, 0.0f);
  const auto* keys = static_cast<const BFloat16*>(job.keys) + task.row * job.key_strides[0] +
                     task.head * job.key_strides[2];
  const auto* values = static_cast<const BFloat16*>(job.values) + task.row * job.value_strides[0] +
                       task.head * job.value_strides[2];
  for (int64_t s = task.first; s < last; s += BLOCK) {
    const int64_t count = std::min(BLOCK, last - s), k = job.key_strides[1], v = job.value_strides[1];
    turn_keys(keys + s * k, k, count, job.D, (uint32_t*)to.keys);
    pair_values(values + s * v, v, count, job.D, W, (uint32_t*)to.values);
    for (int64_t row = 0, m; row < rows; row += m) {
      int64_t seen[ROWS_AT_ONCE];
      m = std::min<int64_t>(ROWS_AT_ONCE, rows - row);
      for (int64_t i = 0; i < m; i++)
        seen[i] = std::min(count, limits[task.begin + (row + i) / G] + 1 - s);
      ATTEND[m - 1](job, to, row, seen);
    }
  }
  for (int64_t row = 0; row < rows; row++) to.most[row] *= 0.69314718f;  // powers of e again
}
