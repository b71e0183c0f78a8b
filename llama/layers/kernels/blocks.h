// Weights in blocks of 4 or 6 bits (layers/blocks.py has the layout) times x in fp32, and unpacking
// them. blocks.cpp has variants.h include this file, as rows.h says. blocks_vnni.h is faster.
//
// Letters: M rows of x, N rows of W (outputs), K columns of both; a lane is an output.

// The weights of LANES outputs and one column of a group, and the scale and zero of the group.
struct Lanes {
  Vec scale, zero;
  Words nibbles[4], top[2];
};

// `first` is the first of the LANES outputs.
TARGET inline void load_group(Lanes& to, const BlockView& block, int64_t g, int first) {
  Vec unit, zero_unit;
  float steps[LANES], zeros[LANES];
  load(unit, block.units + first);
  load(zero_unit, block.zero_units + first);
  for (int i = 0; i < LANES; i++) {
    steps[i] = block.steps(g, first + i);
    zeros[i] = block.zero_steps(g, first + i);
  }
  load(to.scale, steps);
  load(to.zero, zeros);
  to.scale *= unit;
  to.zero *= zero_unit;
  for (int v = 0; v < 4; v++) memcpy(&to.nibbles[v], block.nibbles_at(g, v, first), sizeof(Words));
  if (block.top)
    for (int u = 0; u < 2; u++) memcpy(&to.top[u], block.top_at(g, u, first), sizeof(Words));
}

template <bool TOP>
TARGET inline Vec weights(const Lanes& group, int column) {
  const int v = column / 8, half = column / 4 % 2, j = column % 4;
  Words code = group.nibbles[v] >> (8 * j + 4 * half) & 15;
  if (TOP) code |= (group.top[v / 2] >> (8 * j + 2 * (column / 4 % 4)) & 3) << 4;
  return __builtin_convertvector((Ints)code, Vec) * group.scale - group.zero;
}

// LANES outputs of a tile for M rows of x.
template <bool TOP, int M>
TARGET inline void tile_part(const Weights& w, const Inputs& in, const Outputs& y, int64_t m,
                             int64_t tile, int first) {
  Vec acc[M][4] = {};
  const int64_t stride = in.stride;
  const float* x = in.fp32 + m * stride;
  for (int64_t b = 0; b < w.K / w.columns; b++) {
    const BlockView block(w, tile, b);
    for (int64_t g = 0; g < w.columns / 32; g++, x += 32) {
      Lanes group;
      load_group(group, block, g, first);
#pragma GCC unroll 32
      for (int k = 0; k < 32; k++) {
        const Vec values = weights<TOP>(group, k);
        for (int j = 0; j < M; j++) acc[j][k % 4] += values * x[j * stride + k];
      }
    }
  }
  for (int j = 0; j < M; j++) {
    const Vec total = (acc[j][0] + acc[j][1]) + (acc[j][2] + acc[j][3]);
    for (int i = 0; i < LANES; i++)
      if (tile * 16 + first + i < w.N) y.put(m + j, tile * 16 + first + i, total[i]);
  }
}

// Tiles [begin, end) of y = x W^T.
template <bool TOP>
TARGET void tiles(const Weights& w, const Inputs& in, const Outputs& y, int64_t begin,
                  int64_t end) {
  for (int64_t tile = begin; tile < end; tile++)
    for (int first = 0; first < 16; first += LANES) {
      int64_t m = 0;
      for (; m + 4 <= in.M; m += 4) tile_part<TOP, 4>(w, in, y, m, tile, first);
      for (; m < in.M; m++) tile_part<TOP, 1>(w, in, y, m, tile, first);
    }
}

typedef float Vec8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef uint16_t Halves8 __attribute__((vector_size(16)));

TARGET inline void store(float* to, const Vec8& v) { memcpy(to, &v, sizeof v); }

TARGET inline void store(BFloat16* to, const Vec8& v) {  // to the nearest, ties to even
  const Words8 bits = (Words8)v, nan = Words8{} + 0x7fc00000;
  const Words8 rounded = v == v ? bits + 0x7fff + (bits >> 16 & 1) : nan;
  const Halves8 upper = __builtin_convertvector(rounded >> 16, Halves8);
  memcpy((void*)to, &upper, sizeof upper);
}

// Row r of a block, into `to`.
template <class T>
TARGET void unpack_row(const BlockView& block, int64_t groups, int r, T* to) {
  const Words8 places = {0, 8, 16, 24, 4, 12, 20, 28}, top_places = {0, 8, 16, 24, 2, 10, 18, 26};
  const float unit = block.units[r], zero_unit = block.zero_units[r];
  for (int64_t g = 0; g < groups; g++) {
    const float scale = unit * block.steps(g, r), zero = zero_unit * block.zero_steps(g, r);
    for (int v = 0; v < 4; v++, to += 8) {
      uint32_t word;
      memcpy(&word, block.nibbles_at(g, v, r), sizeof word);
      Words8 codes = (Words8{} + word) >> places & 15;
      if (block.top) {
        memcpy(&word, block.top_at(g, v / 2, r), sizeof word);
        codes |= ((Words8{} + word) >> (top_places + 4 * (v % 2)) & 3) << 4;
      }
      store(to, __builtin_convertvector((Ints8)codes, Vec8) * scale - zero);
    }
  }
}

// Tiles [begin, end) of the dequantized weight, (N, K).
template <class T>
TARGET void unpack(const Weights& w, void* y, int64_t begin, int64_t end) {
  T* to = static_cast<T*>(y) + begin * 16 * w.K;
  for (int64_t n = begin * 16; n < std::min(end * 16, w.N); n++)
    for (int64_t b = 0; b < w.K / w.columns; b++, to += w.columns)
      unpack_row(BlockView(w, n / 16, b), w.columns / 32, n % 16, to);
}
