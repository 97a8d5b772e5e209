// 16 bytes of a half-precision type at a time: the widest access that a thread has.
#pragma once

#include "types.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <stdexcept>

namespace octavo::cuda {

constexpr int kPack = 8;  // elements in 16 bytes

template <typename T>
struct alignas(16) Pack {
  T at[kPack];
};

__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T narrow(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 narrow(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half narrow(float x) {
  return __float2half_rn(x);
}

// x as it is once it has been stored as a T.
template <typename T>
__device__ __forceinline__ float rounded(float x) {
  return widen(narrow<T>(x));
}

// In so many words, because the compiler cuts some stores of a uint4 into four.
__device__ __forceinline__ void store_bits(void* to, uint4 bits) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
               : "memory");
}

template <typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  return *reinterpret_cast<const Pack<T>*>(&bits);
}

// For what no kernel writes: weights and tables.
template <typename T>
__device__ __forceinline__ Pack<T> load_constant_pack(const T* from) {
  const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
  return *reinterpret_cast<const Pack<T>*>(&bits);
}

template <typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack) {
  store_bits(to, *reinterpret_cast<const uint4*>(&pack));
}

__device__ __forceinline__ uint32_t narrow_pair(__nv_bfloat16*, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t narrow_pair(__half*, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Rounds eight floats and stores them.
template <typename T>
__device__ __forceinline__ void store_narrowed(T* to, const float (&x)[kPack]) {
  T* const type = nullptr;
  store_bits(to, make_uint4(narrow_pair(type, x[0], x[1]), narrow_pair(type, x[2], x[3]),
                            narrow_pair(type, x[4], x[5]), narrow_pair(type, x[6], x[7])));
}

// The sum over groups of `lanes` neighbouring lanes (a power of two), the same bits in each.
template <int lanes = 32>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int apart = lanes / 2; apart > 0; apart /= 2) {
    x += __shfl_xor_sync(0xffffffffu, x, apart);
  }
  return x;
}

// Host: calls f with a null pointer of the element type.
template <typename F>
void with_half(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kBFloat16: return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kFloat16: return f(static_cast<__half*>(nullptr));
    default: throw std::invalid_argument("_cuda has kernels for bfloat16 and float16 only");
  }
}

}  // namespace octavo::cuda
