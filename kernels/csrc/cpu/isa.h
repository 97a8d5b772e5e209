// One instruction set's vectors and conversions. Included only by sources that are compiled once
// for each set: everything here is static, so that no copy leaks into another set's code.
#pragma once

#include "kernels.h"

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define OCTAVO_INLINE static inline __attribute__((always_inline))

namespace octavo {
namespace OCTAVO_ISA {

// Vectors of the compiler, not intrinsics: the same source for 4, 8 and 16 lanes.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));

OCTAVO_INLINE Vec load(const float* from) {
  Vec v;
  memcpy(&v, from, sizeof v);
  return v;
}

OCTAVO_INLINE void store(float* to, Vec v) { memcpy(to, &v, sizeof v); }

OCTAVO_INLINE Vec splat(float x) { return x - Vec{}; }

OCTAVO_INLINE VecInt lane_numbers() {
  VecInt v{};
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

OCTAVO_INLINE float sum_lanes(Vec v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

OCTAVO_INLINE float max_lanes(Vec v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

// e^x within 2 ulp: 2^n times a polynomial on [-ln2/2, ln2/2]. 0 below -87.3, infinite above 88.3.
OCTAVO_INLINE Vec exp(Vec x) {
  const Vec low = splat(-87.33654f), high = splat(88.37626f), magic = splat(12582912.0f);
  const Vec inside = x < low ? low : x > high ? high : x;  // a NaN compares false and stays
  const Vec n = (inside * 1.44269504f + magic) - magic;    // round to nearest
  const Vec r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  const Vec result = p * (Vec)exponent;
  return x < low ? Vec{} : x > high ? splat(INFINITY) : result;
}

// tanh(x) within 2e-7: an odd polynomial near 0, elsewhere from e^2|x|.
OCTAVO_INLINE Vec tanh(Vec x) {
  const Vec size = x < Vec{} ? -x : x;
  const Vec far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * x + x;
  return size < splat(0.625f) ? near : x < Vec{} ? -far : far;
}

OCTAVO_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

OCTAVO_INLINE float of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

// Element types: 16-bit floats are handled as their bits.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

OCTAVO_INLINE float widen(float x) { return x; }

OCTAVO_INLINE float widen(BFloat16 x) { return of_bits((uint32_t)x.bits << 16); }

OCTAVO_INLINE float widen(Float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16;
  const uint32_t rest = (uint32_t)(x.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent's bias, and makes normal numbers of subnormal ones.
  const uint32_t finite = bits_of(of_bits(rest) * of_bits(0x77800000u));
  const uint32_t special = rest | 0x7f800000u;
  return of_bits(sign | (rest >= (0x7c00u << 13) ? special : finite));
}

// Rounding is to nearest, ties to even.
OCTAVO_INLINE void narrow(float x, float* to) { *to = x; }

OCTAVO_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = (uint16_t)(x != x ? 0x7fc0u : rounded);
}

OCTAVO_INLINE void narrow(float x, Float16* to) {
  const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, rest = bits ^ sign;
  // Below the smallest normal number, an addition aligns and rounds the mantissa for us.
  const uint32_t small = bits_of(of_bits(rest) + of_bits(126u << 23)) - (126u << 23);
  const uint32_t normal = (rest + ((15u - 127u) << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t large = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = rest < (113u << 23) ? small : normal;
  to->bits = (uint16_t)((rest >= (143u << 23) ? large : finite) | (sign >> 16));
}

template <typename T>
OCTAVO_INLINE void widen_row(const T* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
}

// Calls fn with a null pointer of the element type.
template <typename Fn>
OCTAVO_INLINE void with_type(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::kFloat32: return fn((float*)nullptr);
    case DType::kBFloat16: return fn((BFloat16*)nullptr);
    case DType::kFloat16: return fn((Float16*)nullptr);
  }
}

OCTAVO_INLINE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
