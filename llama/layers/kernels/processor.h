// The instruction sets of this processor, which of them the kernels use, and how a thread spins.

#pragma once

#include <atomic>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace llama3 {
// Tells the processor that this thread spins.
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The variants that this processor can run, the fastest first: indices into EACH_VARIANT.
inline const std::vector<int>& variants() {
  static const std::vector<int> found = [] {
    std::vector<int> list;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      if (__builtin_cpu_supports("avx512bf16")) list.push_back(0);
      list.push_back(1);
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(2);
    list.push_back(3);
#else
    list.push_back(0);
#endif
    return list;
  }();
  return found;
}

#if defined(__x86_64__)
constexpr int AVX512_BF16 = 0;
#else
constexpr int AVX512_BF16 = -1;
#endif

inline std::atomic<int> chosen{-1};  // set by tests; -1: the fastest
inline std::atomic<bool> integers{true};  // set by tests; false: x is not converted to 8 bits

inline int variant() {
  const int index = chosen.load();
  return index < 0 ? variants().front() : index;
}

// Whether the processor has integer dot products in the width of a variant.
inline bool has_vnni(int index) {
#if defined(__x86_64__)
  static const bool avx512 = __builtin_cpu_supports("avx512vnni"), avx = [] {
    unsigned a = 0, b, c, d;
    return __builtin_cpu_supports("avx2") && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
  }();
  return index < 2 ? avx512 : index == 2 && avx;
#else
  return false;
#endif
}

// Outputs in a vector of integer dot products; 0: use the other methods.
inline int integer_lanes() {
  return !integers.load() || !has_vnni(variant()) ? 0 : variant() < 2 ? 16 : 8;
}
}  // namespace llama3
