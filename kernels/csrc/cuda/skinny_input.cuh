// The few rows of a skinny product: brought to every block, normed on the way where there is a norm.
#pragma once

#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/skinny_gemm.h"

#include <cstdint>

namespace octavo::cuda::skinny {

constexpr int kWarps = 8;                  // that multiply; one more fills the ring
constexpr int kThreads = kWarps * 32;
constexpr int kColumns = 1024;             // of a stage
constexpr int kGroup = 8;                  // rows of w in a stage
constexpr int kPass = 8;                   // groups whose sums are in registers at a time
constexpr int kSteps = kColumns / kWarps / 32;  // of 32 columns, that a warp takes of a stage
constexpr int kPitch = kColumns * 2 + 64;  // bytes a row: neighbours fall on different banks
constexpr int kStageBytes = kGroup * kPitch;
constexpr int kNormedBytes = 32768;        // of x, that a block norms at most
constexpr int kKeptBytes = 16384;          // of x, that it keeps beside the ring without a norm
constexpr int kVectors = kNormedBytes / 16 / kThreads;  // of x, that a thread brings
constexpr int kEarlyVectors = kVectors / 2;  // of the norm's weight, that it reads while it waits

struct Task {
  SkinnyGemm gemm;
  int units;    // of 8 outputs: a group of rows of w, or two groups (gate and up)
  int stages;
  int x_pitch;  // bytes a row of x in shared memory; 0: x is read from global memory
};

template <typename T>
__device__ __forceinline__ float2 widen(uint32_t pair);
template <>
__device__ __forceinline__ float2 widen<__nv_bfloat16>(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 widen<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Both products of two pairs, each rounded once.
template <typename T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  const __nv_bfloat162 both = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a),
                                      reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(both);
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
  const __half2 both =
      __hmul2(reinterpret_cast<const __half2&>(a), reinterpret_cast<const __half2&>(b));
  return reinterpret_cast<const uint32_t&>(both);
}

template <typename T>
__device__ __forceinline__ float square(uint32_t pair) {
  const float2 value = widen<T>(pair);
  return value.x * value.x + value.y * value.y;
}

// A pair of a normed row, rounded as reference.rms_norm rounds.
template <typename T>
__device__ __forceinline__ uint32_t norm_pair(uint32_t x, uint32_t weight, float scale,
                                              float offset) {
  const float2 value = widen<T>(x);
  const float low = value.x * scale, high = value.y * scale;
  if (offset == 0) return multiply_pairs<T>(pack<T>(low, high), weight);
  const float2 w = widen<T>(weight);
  return pack<T>(low * (offset + w.x), high * (offset + w.y));
}

// The sum of `value` over the `width` threads (a power of two) that share a row, in all of them.
__device__ __forceinline__ float sum_of_row(float value, int width, float* sums) {
  for (int distance = min(width, 32) / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  if (width <= 32) return value;
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  sync_first(kThreads);
  const int first = threadIdx.x / width * (width / 32);
  value = 0;
  for (int i = 0; i < width / 32; ++i) value += sums[first + i];
  return value;
}

// One thread's part of a row of x: vectors `first`, `first + width` and so on.
struct RowPart {
  int row, first, width, vectors;

  // The rows are divided evenly among the threads, so that all of x is in flight at once.
  __device__ explicit RowPart(const SkinnyGemm& gemm) : width(kThreads) {
    for (int rows = 1; rows < gemm.rows; rows *= 2) width /= 2;
    row = threadIdx.x / width;
    first = threadIdx.x % width;
    vectors = row < gemm.rows ? int(gemm.k) / 8 : 0;
  }
  __device__ int at(int i) const { return first + i * width; }
  __device__ bool has(int i) const { return at(i) < vectors; }
};

template <typename T>
__device__ void norm_part(const SkinnyGemm& gemm, const RowPart& part,
                          const uint4 (&early)[kEarlyVectors], float* sums, uint4 (&x)[kVectors]) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    sum += (square<T>(x[i].x) + square<T>(x[i].y)) + (square<T>(x[i].z) + square<T>(x[i].w));
  }
  const float mean = sum_of_row(sum, part.width, sums) / float(gemm.k);
  const float scale = rsqrtf(mean + gemm.norm_eps), offset = gemm.norm_offset;
  const auto* weights = static_cast<const uint4*>(gemm.norm_weight);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    uint4 weight{};
    if (i < kEarlyVectors) {
      weight = early[i];
    } else if (part.has(i)) {
      weight = __ldg(weights + part.at(i));
    }
    x[i] = {norm_pair<T>(x[i].x, weight.x, scale, offset),
            norm_pair<T>(x[i].y, weight.y, scale, offset),
            norm_pair<T>(x[i].z, weight.z, scale, offset),
            norm_pair<T>(x[i].w, weight.w, scale, offset)};
  }
}

// x's rows, normed where there is a norm, into shared memory.
template <typename T>
__device__ void stage_x(const Task& task, uint8_t* staged, float* sums) {
  const SkinnyGemm& gemm = task.gemm;
  const RowPart part(gemm);
  const auto* weights = static_cast<const uint4*>(gemm.norm_weight);
  uint4 early[kEarlyVectors], x[kVectors];
#pragma unroll
  for (int i = 0; i < kEarlyVectors; ++i) {
    early[i] = weights && part.has(i) ? __ldg(weights + part.at(i)) : uint4{};
  }
  wait_for_previous();
  const auto* source = reinterpret_cast<const uint4*>(static_cast<const T*>(gemm.x) +
                                                      part.row * gemm.x_stride);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    x[i] = part.has(i) ? __ldcg(source + part.at(i)) : uint4{};
  }
  if (weights) norm_part<T>(gemm, part, early, sums, x);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (part.has(i)) {
      *reinterpret_cast<uint4*>(staged + part.row * task.x_pitch + part.at(i) * 16) = x[i];
    }
  }
  sync_first(kThreads);
}

// What a lane gives of x to the products of its warp's columns of a stage: 8 consecutive columns a
// step, of rows g and g + 8, for two products. An mma's columns may be any, as long as both operands
// take the same: lane t of four takes its eight as columns 2t.. of one product and of the next.
struct XSlice {
  uint32_t of[kSteps][2][4];

  // A step's columns of the lane's row and of the one 8 below.
  __device__ __forceinline__ void set(int step, const uint4& low, const uint4& high) {
    const uint32_t first[4] = {low.x, high.x, low.y, high.y};
    const uint32_t second[4] = {low.z, high.z, low.w, high.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      of[step][0][i] = first[i];
      of[step][1][i] = second[i];
    }
  }
};

// Zeros of which the compiler does not know: it would put the products that share one in a row, each
// waiting for the one before.
__device__ __forceinline__ uint4 unknown_zeros() {
  uint4 zeros;
  asm volatile("mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
               : "=r"(zeros.x), "=r"(zeros.y), "=r"(zeros.z), "=r"(zeros.w));
  return zeros;
}

// From either memory. Of global memory not through the L1 cache: other kernels write x while this
// one is already there.
__device__ __forceinline__ uint4 load_past_l1(const uint8_t* from) {
  uint4 x;
  asm volatile("ld.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from)
               : "memory");
  return x;
}

// The slice from `column` on of rows `pitch` bytes apart.
template <bool kWide>
__device__ __forceinline__ XSlice load_x(const uint8_t* from, int64_t pitch, int rows, int k,
                                         int column) {
  const int lane = threadIdx.x % 32, row = lane / 4;
  column += lane % 4 * 8;
  from += row * pitch + column * 2;
  XSlice x;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const bool inside = column + step * 32 < k;
    uint4 low{}, high{};
    if (inside && row < rows) low = load_past_l1(from + step * 64);
    if constexpr (kWide) {
      if (inside && row + 8 < rows) high = load_past_l1(from + 8 * pitch + step * 64);
    } else {
      high = unknown_zeros();
    }
    x.set(step, low, high);
  }
  return x;
}

}  // namespace octavo::cuda::skinny
