// Vectors of LANES floats; see variants.h. They are gcc's and clang's `vector_size` types, so the
// same source compiles to AVX-512, AVX2, SSE2 or NEON. Included inside a namespace for each: no
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

TARGET inline void save(float* to, const Vec& v) { memcpy(to, &v, sizeof v); }

TARGET inline void save(BFloat16* to, const Vec& v) {  // to the nearest, ties to even
  typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
  const Words bits = (Words)v, nan = Words{} + 0x7fc00000;
  const Words rounded = v == v ? bits + 0x7fff + (bits >> 16 & 1) : nan;
  const Halves upper = __builtin_convertvector(rounded >> 16, Halves);
  memcpy((void*)to, &upper, sizeof upper);
}

// e^x within 2 units in the last place; 0 below -87, where it would be denormal.
TARGET inline Vec exp(Vec x) {
  const Vec most = Vec{} + 88.0f, shift = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds
  const Vec zero = Vec{}, unclamped = x;
  x = x > most ? most : x;
  const Vec shifted = x * 1.44269504f + shift, n = shifted - shift;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec y = Vec{} + 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const Ints power = ((Ints)shifted - (Ints)shift + 127) << 23;
  return unclamped < -87.0f ? zero : y * (Vec)power;
}
