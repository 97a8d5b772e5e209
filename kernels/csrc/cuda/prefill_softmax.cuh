// What the prefill kernels share of the softmax: a running one over steps of keys, whose scores
// and weights lie in registers as the tensor cores leave and take them (mma.cuh).
#pragma once

#include "cuda/mma.cuh"
#include "cuda/prefill_tile.cuh"

#include <math_constants.h>

#include <type_traits>

namespace octavo::cuda::prefill {

// A lane's part of its warp's rows: rows lane / 4 and lane / 4 + 8 of each band.
template <typename Shape>
struct Accumulator {
  float out[Shape::kBands][Shape::kDim / 8][4];
  float maximum[Shape::kBands][2];  // of the row's scores, or a little less: see weigh()
  float sum[Shape::kBands][2];      // of weights, this lane's share
};

template <typename Shape>
using Scores = float[Shape::kBands][Shape::kKeys / 8][4];

// Rounded weights as the left factor of a product: a result's layout is a factor's, two by two.
template <typename Shape>
using Weights = uint32_t[Shape::kBands][Shape::kKeys / 16][4];

// How scores become exponents: exp2(factor * score), after the cap.
struct Exponent {
  float factor, softcap, inner;  // inner: scale / softcap

  __device__ explicit Exponent(const PrefillAttention& args)
      : factor(args.softcap > 0 ? kLog2E : args.scale * kLog2E),
        softcap(args.softcap),
        inner(args.softcap > 0 ? args.scale / args.softcap : 0) {}
};

template <typename Shape>
__device__ __forceinline__ void cap(Scores<Shape>& scores, const Exponent& exponent) {
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[band][n][i] = exponent.softcap * tanh_of(scores[band][n][i] * exponent.inner);
      }
    }
  }
}

// Hides keys after a row's own position, and those behind its window.
template <typename Shape>
__device__ __forceinline__ void mask(Scores<Shape>& scores, const int32_t (&positions)[Shape::kRows],
                                     int first_key, int window) {
  const int lane = threadIdx.x % 32;
  const int32_t* own = &positions[threadIdx.x / 32 * Shape::kWarpRows + lane / 4];
  const int column = first_key + lane % 4 * 2;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int last = own[band * 16 + i / 2 * 8];
      const int behind = window > 0 ? last - window : -1;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        const int position = column + n * 8 + i % 2;
        if (position > last || position <= behind) scores[band][n][i] = -CUDART_INF_F;
      }
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void scale_rows(Accumulator<Shape>& rows,
                                           const float (&by)[Shape::kBands][2]) {
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.out[band][n][i] *= by[band][i / 2];
    }
  }
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  }
}

// Scores become weights. A row's maximum is raised, and what was summed under the old one brought
// to the new one, only when a score is so much larger (log2) that weights would grow too large:
// after a few steps that is rare, and what it costs is saved (FlashAttention-4 does the same).
// Returns whether a row of the warp's was raised: then `out` is to be scaled by `shrink`.
//
// Weights are rounded, and summed as they were rounded: then their shares add up to one, and a key
// that alone matters gives its value exactly.
constexpr float kSlack = 8;

template <typename Shape>
__device__ __forceinline__ bool weigh(Scores<Shape>& scores, Accumulator<Shape>& rows,
                                      const Exponent& exponent,
                                      float (&shrink)[Shape::kBands][2]) {
  const float factor = exponent.factor;
  bool any_raised = false;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = rows.maximum[band][half];
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        most = fmaxf(most, fmaxf(scores[band][n][2 * half], scores[band][n][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      // A row that has seen no key yet has no maximum; 0 keeps inf - inf out.
      const float least = rows.maximum[band][half] + kSlack / factor;
      const bool raise = most > least || rows.maximum[band][half] == -CUDART_INF_F;
      if (!raise) most = rows.maximum[band][half];
      const float base = most == -CUDART_INF_F ? 0 : most * factor;
      shrink[band][half] = raise ? power_of_two(rows.maximum[band][half] * factor - base) : 1;
      any_raised |= raise;
      rows.maximum[band][half] = most;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        const float even = power_of_two(scores[band][n][2 * half] * factor - base);
        const float odd = power_of_two(scores[band][n][2 * half + 1] * factor - base);
        const float2 rounded =
            unpack<typename Shape::Type>(pack<typename Shape::Type>(even, odd));
        sum += rounded.x + rounded.y;
        scores[band][n][2 * half] = rounded.x;
        scores[band][n][2 * half + 1] = rounded.y;
      }
      rows.sum[band][half] = rows.sum[band][half] * shrink[band][half] + sum;
    }
  }
  return __any_sync(~0u, any_raised);
}

// Weights as the left factor of a product. They are rounded already; a product of Hopper's may
// read its factor until it is done, so packing is a step of its own.
template <typename Shape>
__device__ __forceinline__ void pack_weights(Weights<Shape>& packed,
                                             const Scores<Shape>& weights) {
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        packed[band][n / 2][n % 2 * 2 + half] = pack<typename Shape::Type>(
            weights[band][n][2 * half], weights[band][n][2 * half + 1]);
      }
    }
  }
}

// Sinks take part as a first score that has no value.
template <typename Shape>
__device__ __forceinline__ void begin(Accumulator<Shape>& rows, const RowTable<Shape>& table,
                                      const Exponent& exponent, bool with_sinks) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.maximum[band][half] = -CUDART_INF_F;
      rows.sum[band][half] = 0;
      if (with_sinks) {
        const int row = threadIdx.x / 32 * Shape::kWarpRows + band * 16 + half * 8 + lane / 4;
        rows.maximum[band][half] = table.sink[row] * (kLog2E / exponent.factor);
        rows.sum[band][half] = lane % 4 == 0 ? 1 : 0;
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.out[band][n][i] = 0;
    }
  }
}

// The whole sum of each row, in all four lanes that share it.
template <typename Shape>
__device__ __forceinline__ void reduce_sums(Accumulator<Shape>& rows) {
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = rows.sum[band][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
    }
  }
}

// Stores what a span gave, for merge_spans to put together.
template <typename Shape>
__device__ __forceinline__ void store_partial(const Accumulator<Shape>& rows,
                                              const PrefillPlan& plan, const Exponent& exponent,
                                              int64_t index, int valid_rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x / 32 * Shape::kWarpRows + band * 16 + half * 8 + lane / 4;
      if (row >= valid_rows) continue;
      const int64_t at = index * Shape::kRows + row;
      if (lane % 4 == 0) {
        reinterpret_cast<float2*>(plan.partial_sums)[at] = make_float2(
            rows.maximum[band][half] * exponent.factor, rows.sum[band][half]);
      }
      float* to = plan.partial_out + at * Shape::kDim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kDim / 8; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(rows.out[band][n][2 * half], rows.out[band][n][2 * half + 1]);
      }
    }
  }
}

}  // namespace octavo::cuda::prefill
