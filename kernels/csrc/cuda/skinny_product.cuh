// One stage of a skinny product, and the sums that its warps put together.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/skinny_input.cuh"

#include <cstdint>

namespace octavo::cuda::skinny {

// What a lane holds of a stage: of its warp's columns, steps first, first + 1 and so on.
template <int kCount>
__device__ __forceinline__ void load_w(uint32_t stage, int columns, int first,
                                       uint4 (&w)[kCount]) {
  const int lane = threadIdx.x % 32, at = threadIdx.x / 32 * kSteps * 32 + lane % 4 * 8;
  const uint32_t source = stage + lane / 4 * kPitch + at * 2;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    w[i] = {};
    if (at + (first + i) * 32 < columns) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w[i].x), "=r"(w[i].y), "=r"(w[i].z), "=r"(w[i].w)
                   : "r"(source + (first + i) * 64));
    }
  }
}

// Their products, of two steps each: sums of their own, and in turns, because a product takes tens
// of cycles, and what needs its result holds up all that comes behind.
template <typename T, int kCount, int kSums>
__device__ __forceinline__ void multiply_w(const uint4 (&w)[kCount], const XSlice& x, int first,
                                           float (&pairs)[kCount / 2][kSums]) {
  float part[kCount][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint4& of = w[i];
      multiply_add<T>(part[i], x.of[first + i][half], half ? of.z : of.x, half ? of.w : of.y);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount / 2 * kSums; ++i) {
    const int pair = i / kSums, at = i % kSums;
    pairs[pair][at] = part[pair * 2][at] + part[pair * 2 + 1][at];
  }
}

// Adds a stage's products to `sums`: x row g with w rows 2t and 2t + 1, then the same of g + 8.
// However many at once, they are added up in the same order.
template <typename T, bool kWide>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int columns, const XSlice& x,
                                               float (&sums)[kWide ? 4 : 2]) {
  constexpr int kAtOnce = kWide ? 2 : 4, kSums = kWide ? 4 : 2;
  float pairs[kSteps / kAtOnce][kAtOnce / 2][kSums];
#pragma unroll
  for (int first = 0; first < kSteps; first += kAtOnce) {
    uint4 w[kAtOnce];
    load_w(stage, columns, first, w);
    multiply_w<T>(w, x, first, pairs[first / kAtOnce]);
  }
  static_assert(kSteps == 4);
  const auto& low = pairs[0][0];
  const auto& high = pairs[kWide ? 1 : 0][kWide ? 0 : 1];
#pragma unroll
  for (int i = 0; i < kSums; ++i) sums[i] += low[i] + high[i];
}

// The sums of all warps over their columns: [groups of a pass][kWarps][rows of x][kGroup].
struct Partials {
  float* at;
  int rows;

  __device__ float* of(int group, int warp, int row) const {
    return at + ((group * kWarps + warp) * rows + row) * kGroup;
  }
  __device__ float total(int group, int row, int column) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += of(group, warp, row)[column];
    return sum;
  }
};

}  // namespace octavo::cuda::skinny
