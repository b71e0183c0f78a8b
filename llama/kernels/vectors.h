// Vectors of LANES floats, as variants.h says. They are those of gcc and clang (`vector_size`), so
// the same lines become AVX-512, AVX2, SSE2 or NEON. Included inside a namespace for each: no
// #include, no #pragma once here.

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));

TARGET inline void load(Vec& to, const float* from) { memcpy(&to, from, sizeof(Vec)); }

TARGET inline void load(Vec& to, const BFloat16* from) {
  to = (Vec)((Words)WIDEN_16(from) << 16);  // bf16 is the upper half of an fp32
}

TARGET inline void load(Vec& to, const int8_t* from) {
  to = __builtin_convertvector((Ints)WIDEN_8(from), Vec);
}

TARGET inline float sum(const Vec& v) {
  float t[LANES];
  memcpy(t, &v, sizeof t);
  for (int half = LANES / 2; half; half /= 2)
    for (int i = 0; i < half; i++) t[i] += t[i + half];
  return t[0];
}
