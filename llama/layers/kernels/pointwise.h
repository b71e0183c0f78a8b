// The arithmetic of pointwise.cpp, included by variants.h for each instruction set. No #include,
// no #pragma once.

// v after a cast to T and back.
TARGET inline Vec rounded(const Vec& v, const float*) { return v; }

TARGET inline Vec rounded(Vec v, const BFloat16*) {
  BFloat16 narrow[LANES];
  save(narrow, v);
  load(v, narrow);
  return v;
}

// LANES numbers, or the last `count` of a row followed by zeros.
template <class T>
TARGET inline Vec read(const T* from, int64_t count) {
  Vec v;
  if (count >= LANES) {
    load(v, from);
    return v;
  }
  T tail[LANES] = {};
  memcpy((void*)tail, from, count * sizeof(T));
  load(v, tail);
  return v;
}

template <class T>
TARGET inline void write(T* to, const Vec& v, int64_t count) {
  if (count >= LANES) return save(to, v);
  T tail[LANES];
  save(tail, v);
  memcpy((void*)to, tail, count * sizeof(T));
}

// Rows [begin, end) of x / rms(x), cast to T, times the weight.
template <class T>
TARGET void norm(const Job& job, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(job.b);
  for (int64_t row = begin; row < end; row++) {
    const T* x = static_cast<const T*>(job.a) + row * job.width;
    T* y = static_cast<T*>(job.y) + row * job.width;
    Vec sums[4] = {};
    for (int64_t i = 0; i < job.width; i += LANES) {
      const Vec v = read(x + i, job.width - i);
      sums[i / LANES % 4] += v * v;
    }
    const float mean = sum((sums[0] + sums[1]) + (sums[2] + sums[3])) / job.width;
    const float scale = 1 / std::sqrt(mean + job.eps);
    for (int64_t i = 0; i < job.width; i += LANES) {
      const int64_t left = job.width - i;
      const Vec normed = rounded(read(x + i, left) * scale, (const T*)nullptr);
      write(y + i, normed * read(weight + i, left), left);
    }
  }
}

// Elements [begin, end) of silu(a), cast to T, times b.
template <class T>
TARGET void gate(const Job& job, int64_t begin, int64_t end) {
  const T *a = static_cast<const T*>(job.a), *b = static_cast<const T*>(job.b);
  T* y = static_cast<T*>(job.y);
  for (int64_t i = begin; i < end; i += LANES) {
    const Vec v = read(a + i, end - i), infinity = Vec{} + INFINITY;
    const Vec e = v < -88.0f ? infinity : exp(-v);  // exp is limited to e^88; -inf must give NaN
    const Vec silu = v / (1.0f + e);
    write(y + i, rounded(silu, (const T*)nullptr) * read(b + i, end - i), end - i);
  }
}

template <size_t... I>
TARGET inline Vec turned(const Vec& x, const Vec& turn, std::index_sequence<I...>) {
  const Vec real = __builtin_shufflevector(turn, turn, (I & ~size_t{1})...);
  const Vec imaginary = __builtin_shufflevector(turn, turn, (I | 1)...);
  const Vec swapped = __builtin_shufflevector(x, x, (I ^ 1)...);
  const Vec signs = {(I & 1 ? 1.0f : -1.0f)...};
  return x * real + swapped * (imaginary * signs);
}

// Heads [begin, end) of `width` numbers each, whose pairs are multiplied by complex numbers. The
// job.heads heads of a position use the same row of them; after job.turns rows they repeat.
template <class T>
TARGET void rotate(const Job& job, int64_t begin, int64_t end) {
  for (int64_t head = begin; head < end; head++) {
    const T* x = static_cast<const T*>(job.a) + head * job.width;
    T* y = static_cast<T*>(job.y) + head * job.width;
    const float* turn =
        static_cast<const float*>(job.b) + head / job.heads % job.turns * job.width;
    for (int64_t i = 0; i < job.width; i += LANES) {
      const int64_t left = job.width - i;
      const Vec v = read(x + i, left), by = read(turn + i, left);
      write(y + i, turned(v, by, std::make_index_sequence<LANES>()), left);
    }
  }
}
