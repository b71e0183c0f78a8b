// The arithmetic of multiply.cpp, compiled once per instruction set: variants.h includes this file
// inside a namespace for each, after vectors.h. No #include, no #pragma once: they break that.
//
// Activations are fp32; each weight is converted to fp32 and multiplied; only sums are rounded.
// At least for one row, this is faster than reading memory.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both.

// U vectors of R neighbouring rows of W times those of M rows of x, added to acc.
template <class W, int R, int M, int U>
TARGET inline void multiply(Vec (&acc)[R][M][U], const W* w, int64_t w_stride, const float* x,
                            int64_t x_stride) {
  for (int u = 0; u < U; u++) {
    Vec ws, xs[M];
    for (int j = 0; j < M; j++) load(xs[j], x + j * x_stride + u * LANES);
    for (int r = 0; r < R; r++) {
      load(ws, w + r * w_stride + u * LANES);
      for (int j = 0; j < M; j++) acc[r][j][u] += ws * xs[j];
    }
  }
}

// y[m, n] for M rows of x and R rows of W: 4 M independent sums, enough to hide the latency.
template <class W, int R, int M>
TARGET inline void dots(const Weights& weights, const Inputs& in, const Outputs& out, int64_t m,
                        int64_t n) {
  constexpr int U = 4 / R, STEP = U * LANES;
  const int64_t K = in.K, stride = in.stride;
  const float* x = in.fp32 + m * stride;
  const W* w = static_cast<const W*>(weights.w) + n * K;
  Vec acc[R][M][U] = {};
  int64_t k = 0;
  for (; k + STEP <= K; k += STEP)  // the processor prefetches rows best by itself
    multiply(acc, w + k, K, x + k, stride);
  if (k < K) {  // x is padded with zeros, W is not
    W tail[R][STEP] = {};
    for (int r = 0; r < R; r++) memcpy(tail[r], w + r * K + k, (K - k) * sizeof(W));
    multiply(acc, tail[0], STEP, x + k, stride);
  }
  for (int r = 0; r < R; r++) {
    const float scale = weights.scales ? weights.scales[n + r] : 1.0f;
    for (int j = 0; j < M; j++) {
      for (int u = 1; u < U; u++) acc[r][j][0] += acc[r][j][u];
      out.put(m + j, n + r, scale * sum(acc[r][j][0]));
    }
  }
}

template <class W, int R>
TARGET void block(const Weights& w, const Inputs& in, const Outputs& out, int64_t n) {
  int64_t m = 0;  // beyond four rows of x, this block of W is read from the cache
  for (; m + 4 <= in.M; m += 4) dots<W, R, 4>(w, in, out, m, n);
  for (; m + 2 <= in.M; m += 2) dots<W, R, 2>(w, in, out, m, n);
  for (; m < in.M; m++) dots<W, R, 1>(w, in, out, m, n);
}

// Outputs 4 begin to 4 end of y = x W^T * scales, for W of fp32, bf16 or int8. Sums are added in an
// order that does not depend on how the outputs are divided.
template <class W>
TARGET void rows(const Weights& w, const Inputs& in, const Outputs& out, int64_t begin,
                 int64_t end) {
  constexpr int R = LANES / 4;  // as many as fit in registers with 4 rows of x
  const int64_t stop = std::min(4 * end, w.N);
  int64_t n = 4 * begin;
  if (in.M > 1)  // one row is limited by memory, which reads one row of W faster than several
    for (; n + R <= stop; n += R) block<W, R>(w, in, out, n);
  for (; n < stop; n++) block<W, 1>(w, in, out, n);
}

// LANES of the 16 outputs of a tile of int4 weights, for M rows of x. A word holds 8 neighbouring
// weights of one output, so a lane is an output: no sum across lanes, and a group's scales are one
// vector. Code i of a word is not shifted: it counts as q * 16^i, x is divided by 16^i, exactly.
template <int M>
TARGET inline void tile_part(const Weights& weights, const Inputs& in, const Outputs& out,
                             int64_t m, int64_t tile, int part) {
  const int64_t groups = in.K / in.group;
  const auto* w = static_cast<const uint32_t*>(weights.w) + tile * in.K / 8 * 16 + part;
  const auto* scales = weights.group_scales + tile * groups * 16 + part;
  const auto* zeros = weights.group_zeros + tile * groups * 16 + part;
  Vec acc[M] = {};
  for (int64_t g = 0; g < groups; g++) {
    Vec sums[M][4] = {};
    const float* x = in.fp32 + m * in.stride + g * in.group;
    for (int k = 0; k < in.group; k += 8, w += 16) {
      Words codes;
      memcpy(&codes, w, sizeof codes);
      __builtin_prefetch(w + AHEAD / 4);
      for (int i = 0; i < 8; i++) {
        const Words code = i < 7 ? codes & (15u << (4 * i)) : codes >> 28;
        const Vec q = __builtin_convertvector((Ints)code, Vec);
        for (int j = 0; j < M; j++) sums[j][i % 4] += q * x[j * in.stride + k + i];
      }
    }
    Vec scale, zero;
    load(scale, scales + g * 16);
    load(zero, zeros + g * 16);
    for (int j = 0; j < M; j++) {
      acc[j] += scale * ((sums[j][0] + sums[j][1]) + (sums[j][2] + sums[j][3]));
      acc[j] += zero * in.sums[(m + j) * groups + g];
    }
  }
  for (int j = 0; j < M; j++)
    for (int i = 0; i < LANES; i++)
      if (tile * 16 + part + i < weights.N) out.put(m + j, tile * 16 + part + i, acc[j][i]);
}

// Tiles [begin, end) of y = x W^T for int4 weights.
TARGET void tiles(const Weights& w, const Inputs& in, const Outputs& out, int64_t begin,
                  int64_t end) {
  for (int64_t tile = begin; tile < end; tile++)
    for (int part = 0; part < 16; part += LANES) {
      int64_t m = 0;
      for (; m + 4 <= in.M; m += 4) tile_part<4>(w, in, out, m, tile, part);
      for (; m + 2 <= in.M; m += 2) tile_part<2>(w, in, out, m, tile, part);
      for (; m < in.M; m++) tile_part<1>(w, in, out, m, tile, part);
    }
}

typedef float Vec8 __attribute__((vector_size(32)));  // the codes of one word
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));

TARGET inline void store(float* to, const Vec8& v) { memcpy(to, &v, sizeof v); }

TARGET inline void store(BFloat16* to, const Vec8& v) {  // to the nearest, ties to even
  const Words8 bits = (Words8)v;
  const Words8 rounded = bits + 0x7fff + (bits >> 16 & 1);
  const Halves8 upper = __builtin_convertvector(rounded >> 16, Halves8);
  memcpy((void*)to, &upper, sizeof upper);
}

// Tiles [begin, end) of the dequantized weight, (N, K).
template <class T>
TARGET void unpack(const Weights& weights, void* to, int64_t begin, int64_t end) {
  const int64_t K = weights.K, groups = K / weights.group, words = K / 8;
  const Words8 places = {0, 4, 8, 12, 16, 20, 24, 28};
  for (int64_t n = begin * 16; n < std::min(end * 16, weights.N); n++) {
    const auto* w = static_cast<const uint32_t*>(weights.w) + n / 16 * words * 16 + n % 16;
    T* y = static_cast<T*>(to) + n * K;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t at = (n / 16 * groups + g) * 16 + n % 16;
      const float scale = weights.group_scales[at], zero = weights.group_zeros[at];
      for (int64_t k = 0; k < weights.group; k += 8, w += 16, y += 8) {
        const Ints8 codes = (Ints8)((Words8{} + *w) >> places & 15);
        store(y, __builtin_convertvector(codes, Vec8) * scale + zero);
      }
    }
  }
}

// Elements [begin, end) of an int8 weight, exactly in bf16.
TARGET void widen(const int8_t* w, BFloat16* y, int64_t begin, int64_t end) {
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  for (; begin + LANES <= end; begin += LANES) {
    Vec v;
    load(v, w + begin);
    const Halves upper = __builtin_convertvector((Words)v >> 16, Halves);
    memcpy((void*)(y + begin), &upper, sizeof upper);
  }
  for (; begin < end; begin++) y[begin] = w[begin];
}
