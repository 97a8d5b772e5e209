// Single instructions that C++ has no name for (PTX ISA: "max.NaN", "ex2", "lg2", "ld.global").
#pragma once

#include "cuda/sampling.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace octavo::cuda {

__device__ __forceinline__ float exp2_quick(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// The larger, and NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The same, but not seen through: the compiler would rather work it out anew, time after time, than
// keep it in a register.
__device__ __forceinline__ int64_t kept(int64_t x) {
  asm volatile("" : "+l"(x));
  return x;
}

// Logits are read in sixteen bytes, past the first-level cache: nobody reads them again soon.
__device__ __forceinline__ uint4 load_vector(const void* address) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// Loads where it stands. The compiler would rather wait until it knows that a value is wanted, and
// one such wait after the other is what small kernels' time is made of.
template <typename T>
__device__ __forceinline__ T load_now(const T* address) {
  T value;
  if constexpr (sizeof(T) == 8) {
    asm volatile("ld.global.b64 %0, [%1];" : "=l"(value) : "l"(address));
  } else if constexpr (std::is_same_v<T, float>) {
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(value) : "l"(address));
  } else {
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(value) : "l"(address));
  }
  return value;
}

// Two numbers of a half-width type in one register, the lower half first.
template <typename T>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  static constexpr uint16_t kLeast = 0xff80;  // -infinity
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(uint32_t pair) {
    return __uint_as_float(pair & 0xffff0000u);
  }
};

template <>
struct Pair<__half> {
  static constexpr uint16_t kLeast = 0xfc00;  // -infinity
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
    uint32_t result;
    asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
  }
  static __device__ __forceinline__ float low(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
  }
  static __device__ __forceinline__ float high(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  }
};

// Bits that are ordered as the numbers are; the two zeros are one.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

}  // namespace octavo::cuda
