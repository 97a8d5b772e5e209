// The tensor core instructions that attention kernels share, for bf16 and fp16 with float32 sums
// (PTX ISA: "mma.m16n8k16", "ldmatrix", "cp.async"). All of them exist since compute capability
// 8.0. In a fragment lane l holds row l / 4 (and row l / 4 + 8) and columns 2 * (l % 4) and the
// one after it of every eight.
#pragma once

#include "cuda/pipeline.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace octavo::cuda {

// c[16 x 8] += a[16 x 16] * b[16 x 8].
template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8 (16 bytes).
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}

// Two floats rounded to T, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// Lane t of four has part t of four vectors of 16 bytes; now all of vector t.
__device__ __forceinline__ void transpose_among_four(uint32_t (&v)[4]) {
#pragma unroll
  for (int apart = 1; apart <= 2; apart *= 2) {
    const bool upper = threadIdx.x & apart;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = apart == 1 ? 2 * i : i, high = low + apart;
      const uint32_t given = upper ? v[low] : v[high];
      const uint32_t got = __shfl_xor_sync(~0u, given, apart);
      v[low] = upper ? got : v[low];
      v[high] = upper ? v[high] : got;
    }
  }
}

// 2^x to two units in the last place; 0 for -inf.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

constexpr float kLog2E = 1.4426950408889634f;

// tanh(x) from one power of two: exact to float32's rounding around 1, where tanh.approx has 2^-11.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - __fdividef(2.0f, power_of_two(2.0f * kLog2E * x) + 1.0f);
}

// Copies 16 bytes past the registers and the L1 cache; zeros, and no read, where `there` is false.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there,
                                           uint64_t policy) {
  asm volatile(
      "{ .reg .pred absent; setp.eq.s32 absent, %2, 0;"
      " cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, absent, %3; }" ::"r"(to),
      "l"(from), "r"(int(there)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `Pending` of this thread's groups of copies are under way.
template <int Pending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

}  // namespace octavo::cuda
