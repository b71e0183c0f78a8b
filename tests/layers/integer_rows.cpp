// Compares integer_rows.h in both widths of vectors with plain loops, bit for bit. A program, not a
// library, so that the sanitizer of addresses sees every buffer; AVX_VNNI's width is run by the
// same instruction of AVX512_VNNI. Compiled and run by test_kernels_sanitized.py.

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "linear.h"

using std::memcpy;

namespace llama3 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#define LANES 16
namespace wide {
#include "integer_rows.h"
}
#undef LANES
#define LANES 8
#define DOT_256 _mm256_dpbusd_epi32
namespace narrow {
#include "integer_rows.h"
}

struct Line {
  alignas(64) char bytes[64];
};

float output(const Weights& w, const Activations& x, int64_t m, int64_t n) {
  float total = 0;
  for (int64_t b = 0; b * BLOCK_COLUMNS < w.K; b++) {
    int sum = 0;
    for (int64_t k = b * BLOCK_COLUMNS; k < std::min((b + 1) * BLOCK_COLUMNS, w.K); k++)
      sum += x.codes[m * x.stride + k] * static_cast<const int8_t*>(w.w)[n * w.K + k];
    total = std::fma((float)sum, x.scales[m * x.blocks + b], total);
  }
  return total * w.scales[n];
}

bool check(int64_t M, int64_t N, int64_t K) {
  std::vector<float> x(M * K), scales(N);
  std::vector<int8_t> codes(N * K);
  for (float& v : x) v = rand() / (float)RAND_MAX - 0.5f;
  for (float& v : scales) v = rand() / (float)RAND_MAX;
  for (int8_t& v : codes) v = rand() % 256 - 128;
  std::vector<Line> memory((Activations::bytes(M, K) + 63) / 64);
  Inputs in{Form::codes, M, K, 0, x.data()};
  in.codes = Activations(M, K, memory.data());
  quantize(x.data(), in.codes, 0, M);
  const Weights w{Kind::int8, N, K, codes.data(), scales.data()};
  for (int lanes : {16, 8}) {
    std::vector<float> y(M * N, NAN);
    const Outputs out{y.data(), false, N};
    const int64_t tiles = (N + lanes - 1) / lanes, half = tiles / 2;
    for (auto [begin, end] : {std::pair{half, tiles}, std::pair{int64_t{0}, half}})
      (lanes == 16 ? wide::integer_rows : narrow::integer_rows)(w, in, out, begin, end);
    for (int64_t i = 0; i < M * N; i++)
      if (y[i] != output(w, in.codes, i / N, i % N)) {
        std::printf("M %ld N %ld K %ld, %d lanes: output %ld differs\n", M, N, K, lanes, i);
        return false;
      }
  }
  return true;
}
}  // namespace llama3

int main() {
  for (int64_t M : {1, 2, 3, 4, 5, 7, 12, 13, 26})
    for (int64_t N : {1, 7, 16, 17, 90})
      for (int64_t K : {1, 31, 32, 33, 64, 65, 128, 576, 1056, 2100})
        if (!llama3::check(M, N, K)) return 1;
  std::puts("all equal");
}
