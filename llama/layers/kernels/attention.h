// The arithmetic of attention.cpp, included by variants.h for each instruction set. No #include,
// no #pragma once.
//
// A task is one key-value head and some queries of the heads that share it. Keys and values are
// read in blocks. Each block is converted to fp32 once, the keys transposed to (D, BLOCK), so that
// scores and sums are two small matmuls. The softmax is computed online as in flash attention
// (arXiv:2205.14135): previous sums are scaled down whenever a larger score appears.

// c[m, j] = (keep ? keep[m] c[m, j] : 0) + sum over i < n of a[m, i] b[i, j], for j < columns, a
// multiple of 64. If `ahead` is given, the block there and the block after b are prefetched row by
// row: a burst of prefetches would delay the arithmetic.
template <int M, class B>
TARGET inline void multiply(const float* a, int64_t a_stride, const B* b, int64_t b_stride,
                            int64_t n, const float* keep, float* c, int64_t columns,
                            const B* ahead = nullptr, int64_t ahead_stride = 0) {
  constexpr int U = LANES / 4;  // 4 U sums fit in registers
  for (int64_t j = 0; j < columns; j += U * LANES) {
    Vec sums[M][U] = {}, bs[U];
    if (keep)
      for (int m = 0; m < M; m++)
        for (int u = 0; u < U; u++) {
          load(sums[m][u], c + m * columns + j + u * LANES);
          sums[m][u] *= keep[m];
        }
    for (int64_t i = 0; i < n; i++) {
      if (ahead)
        for (int k = 0; k < U * LANES; k += 64 / sizeof(B)) {
          __builtin_prefetch(ahead + i * ahead_stride + j + k);
          __builtin_prefetch(b + (BLOCK + i) * b_stride + j + k);
        }
      for (int u = 0; u < U; u++) load(bs[u], b + i * b_stride + j + u * LANES);
      for (int m = 0; m < M; m++)
        for (int u = 0; u < U; u++) sums[m][u] += a[m * a_stride + i] * bs[u];
    }
    for (int m = 0; m < M; m++)
      for (int u = 0; u < U; u++) save(c + m * columns + j + u * LANES, sums[m][u]);
  }
}

// The first `count` of BLOCK scores -> e^(score - largest so far); the others become 0. Returns the
// factor for earlier sums.
TARGET inline float soften(float* scores, int64_t count, float& most, float& total) {
  Vec tops = Vec{} - INFINITY, sums = {}, v;
  Ints lane;
  for (int i = 0; i < LANES; i++) lane[i] = i;
  for (int s = 0; s < BLOCK; s += LANES) {
    load(v, scores + s);
    v = lane + s < (int)count ? v : Vec{} - INFINITY;
    tops = v > tops ? v : tops;
    save(scores + s, v);
  }
  float top = most;
  for (int i = 0; i < LANES; i++) top = std::max(top, tops[i]);
  for (int s = 0; s < BLOCK; s += LANES) {
    load(v, scores + s);
    v = exp(v - top);
    sums += v;
    save(scores + s, v);
  }
  const float keep = exp(Vec{} + (most - top))[0];
  most = top;
  total = total * keep + sum(sums);
  return keep;
}

// A block of values, and the next block of keys if it is to be prefetched.
template <class V>
struct Values {
  const V* at;
  int64_t stride;
  const V* ahead = nullptr;
  int64_t ahead_stride = 0;
};

// M queries from `row` on, over the first `count` of the keys in `to` and of these values.
template <int M, class V>
TARGET inline void attend_rows(const Job& job, const Scratch& to, int64_t row, const Values<V>& v,
                               int64_t count) {
  alignas(64) float scores[M * BLOCK];
  float keep[M];
  const int64_t W = job.width;
  multiply<M>(to.queries + row * W, W, to.keys, BLOCK, job.D, nullptr, scores, BLOCK);
  for (int m = 0; m < M; m++)
    keep[m] = soften(scores + m * BLOCK, count, to.most[row + m], to.total[row + m]);
  multiply<M>(scores, BLOCK, v.at, v.stride, count, keep, to.sums + row * W, W, v.ahead,
              v.ahead_stride);
}

// The queries of one key-value head, from `row` on, over the visible ones of `count` keys from
// `first` on.
template <class V>
TARGET void attend_block(const Job& job, const Task& task, const Scratch& to, int64_t row,
                         int64_t first, int64_t count, const Values<V>& v) {
  const int64_t G = job.H / job.K, *limits = job.positions + task.row * job.position_stride;
  for (int64_t t = task.begin; t < task.end; t++) {
    const int64_t seen = std::min(count, limits[t] + 1 - first), end = row + G;
    if (seen > 0) {
      for (; row + 4 <= end; row += 4) attend_rows<4>(job, to, row, v, seen);
      if (end - row == 3) attend_rows<3>(job, to, row, v, seen);
      if (end - row == 2) attend_rows<2>(job, to, row, v, seen);
      if (end - row == 1) attend_rows<1>(job, to, row, v, seen);
    }
    row = end;
  }
}

template <int H, size_t... I>
TARGET inline void exchange(Words& a, Words& b, std::index_sequence<I...>) {
  const Words low = __builtin_shufflevector(a, b, (I & H ? LANES + I - H : I)...);
  b = __builtin_shufflevector(a, b, (I & H ? LANES + I : I + H)...);
  a = low;
}

// Transposes LANES rows of LANES words: off-diagonal blocks of H x H are swapped, H = 1, 2, 4 ...
template <int H = 1>
TARGET inline void transpose(Words (&rows)[LANES]) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & H)) exchange<H>(rows[i], rows[i + H], std::make_index_sequence<LANES>());
  if constexpr (2 * H < LANES) transpose<2 * H>(rows);
}

TARGET inline void spread(const Words& words, float* to, const float*) { save(to, (Vec)words); }

TARGET inline void spread(const Words& words, float* to, const BFloat16*) {
  save(to, (Vec)(words << 16));
  save(to + BLOCK, (Vec)(words & 0xffff0000));
}

// Transposes `count` keys of D numbers, `stride` apart, to (width, BLOCK) fp32.
template <class T>
TARGET inline void turn(const T* keys, int64_t stride, int64_t count, int64_t D, float* to) {
  constexpr int64_t PER_WORD = 4 / sizeof(T), STEP = LANES * PER_WORD;
  for (int64_t s = 0; s < count; s += LANES)
    for (int64_t d = 0; d < D; d += STEP) {
      T edge[LANES * STEP];
      const T* from = keys + s * stride + d;
      int64_t apart = stride;
      if (s + LANES > count || d + STEP > D) {
        memset((void*)edge, 0, sizeof edge);
        for (int64_t i = 0; i < std::min<int64_t>(LANES, count - s); i++)
          memcpy((void*)(edge + i * STEP), from + i * stride, std::min(STEP, D - d) * sizeof(T));
        from = edge, apart = STEP;
      }
      Words rows[LANES];
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++) memcpy(&rows[i], from + i * apart, sizeof(Words));
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < LANES; i++)
        spread(rows[i], to + (d + i * PER_WORD) * BLOCK + s, (const T*)nullptr);
    }
}

// One row of D numbers -> fp32, padded with zeros to a multiple of LANES.
template <class T>
TARGET inline void widen(const T* from, int64_t D, float* to) {
  Vec v;
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    load(v, from + d);
    save(to + d, v);
  }
  if (d == D) return;
  T tail[LANES] = {};
  memcpy((void*)tail, from + d, (D - d) * sizeof(T));
  load(v, tail);
  save(to + d, v);
}

template <class T>
TARGET inline void narrow(const float* from, int64_t D, float scale, T* to) {
  Vec v;
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) {
    load(v, from + d);
    save(to + d, v * scale);
  }
  for (; d < D; d++) to[d] = from[d] * scale;
}

// Computes a task: per query the weighted sum of values, the largest score, the sum of the weights.
template <class T>
TARGET void attend(const Job& job, const Task& task, const Scratch& to) {
  const int64_t G = job.H / job.K, W = job.width, D = job.D, per_head = (task.end - task.begin) * G;
  const int64_t rows = (task.last_head - task.head) * per_head;
  const int64_t* limits = job.positions + task.row * job.position_stride;
  int64_t last = 0;
  for (int64_t t = task.begin; t < task.end; t++) last = std::max(last, limits[t] + 1);
  last = std::min(last, task.last);
  for (int64_t row = 0; row < rows; row++) {
    float* q = to.queries + row * W;
    widen(static_cast<const T*>(job.queries) + query(job, task, row), D, q);
    for (int64_t d = 0; d < D; d++) q[d] *= job.scale;
  }
  std::fill_n(to.sums, rows * W, 0.0f);
  std::fill_n(to.most, rows, -INFINITY);
  std::fill_n(to.total, rows, 0.0f);
  const int64_t k_stride = job.key_strides[1], v_stride = job.value_strides[1];
  for (int64_t s = task.first; s < last; s += BLOCK)
    for (int64_t head = task.head; head < task.last_head; head++) {
      const int64_t count = std::min(BLOCK, last - s), row = (head - task.head) * per_head;
      const T* keys = static_cast<const T*>(job.keys) + task.row * job.key_strides[0] +
                      s * k_stride + head * job.key_strides[2];
      const T* values = static_cast<const T*>(job.values) + task.row * job.value_strides[0] +
                        s * v_stride + head * job.value_strides[2];
      turn(keys, k_stride, count, D, to.keys);
      if (per_head <= FEW && D == W) {
        const T* ahead = keys + BLOCK * k_stride;
        attend_block(job, task, to, row, s, count, Values<T>{values, v_stride, ahead, k_stride});
      } else {
        for (int64_t i = 0; i < count; i++) widen(values + i * v_stride, D, to.values + i * W);
        attend_block(job, task, to, row, s, count, Values<float>{to.values, W});
      }
    }
}

// Merges `parts` of the same queries, `stride` floats apart, and writes the result.
template <class T>
TARGET void finish(const Job& job, const Task& task, const Scratch& from, int64_t parts,
                   int64_t stride) {
  const int64_t rows =
      (task.last_head - task.head) * (task.end - task.begin) * (job.H / job.K);
  for (int64_t row = 0; row < rows; row++) {
    float* sums = from.sums + row * job.width;
    float &most = from.most[row], &total = from.total[row];
    for (int64_t part = 1; part < parts; part++) {
      const int64_t at = part * stride;
      const float top = std::max(most, (&most)[at]);
      const float keep = exp(Vec{} + (most - top))[0], add = exp(Vec{} + ((&most)[at] - top))[0];
      for (int64_t d = 0; d < job.D; d++) sums[d] = keep * sums[d] + add * sums[at + d];
      total = keep * total + add * (&total)[at];
      most = top;
    }
    narrow(sums, job.D, 1 / total, static_cast<T*>(job.out) + query(job, task, row));
  }
}
