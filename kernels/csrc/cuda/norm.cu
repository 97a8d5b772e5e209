// A row stays in its threads' registers from the one read to the one write. Its sums are taken in
// an order that follows from the width alone, so a row's bits do not depend on its batch mates.
#include "cuda/norm.h"

#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace octavo::cuda {
namespace {

constexpr int kMaxThreads = 1024;
constexpr int kMaxPacks = kMaxNormWidth / kPack / kMaxThreads;  // of a row, in one thread
constexpr int kThreadsPerBlock = 128;  // where rows are short, several share a block

// The sum over a row's threads. `parts` is shared memory of this sum alone: no barrier keeps a
// second sum from overwriting it.
__device__ __forceinline__ float sum_row(float x, float* parts) {
  x = sum_lanes(x);
  const int warps = blockDim.x / 32;
  if (warps == 1) return x;
  float* const of_row = parts + threadIdx.y * warps;
  const int lane = threadIdx.x % 32;
  if (lane == 0) of_row[threadIdx.x / 32] = x;
  __syncthreads();
  return sum_lanes(lane < warps ? of_row[lane] : 0.0f);
}

// This thread's elements of the row as floats; with a residual, those of residual + x, which is
// rounded as it is stored. Elements beyond the row are zeros.
template <typename T, int kPacks>
__device__ __forceinline__ void read_row(const Norm& args, int64_t row, bool live,
                                         float (&values)[kPacks][kPack]) {
  const T* const x = static_cast<const T*>(args.x) + row * args.width;
  T* const residual = static_cast<T*>(args.residual) + row * args.width;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int at = (p * blockDim.x + threadIdx.x) * kPack;
    Pack<T> pack{};
    if (live && at < args.width) {
      pack = load_pack(x + at);
      if (args.residual != nullptr) {
        const Pack<T> before = load_pack(residual + at);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          pack.at[i] = narrow<T>(widen(before.at[i]) + widen(pack.at[i]));
        }
        store_pack(residual + at, pack);
      }
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) values[p][i] = widen(pack.at[i]);
  }
}

template <typename T, int kPacks>
__global__ void __launch_bounds__(kMaxThreads) rms_norm_rows(const Norm args) {
  __shared__ float parts[kMaxThreads / 32];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < args.tokens;
  Pack<T> weight[kPacks];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {  // weights are never written: they are read ahead
    const int at = (p * blockDim.x + threadIdx.x) * kPack;
    if (at < args.width) weight[p] = load_constant_pack(static_cast<const T*>(args.weight) + at);
  }
  wait_for_previous();
  allow_next();
  float values[kPacks][kPack];
  read_row<T, kPacks>(args, row, live, values);
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) squares += values[p][i] * values[p][i];
  }
  const float inverse = rsqrtf(sum_row(squares, parts) / float(args.width) + args.eps);
  T* const out = static_cast<T*>(args.out) + row * args.width;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int at = (p * blockDim.x + threadIdx.x) * kPack;
    if (!live || at >= args.width) continue;
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float scaled = values[p][i] * inverse, w = widen(weight[p].at[i]);
      pack.at[i] = narrow<T>(args.offset != 0 ? scaled * (args.offset + w)
                                              : rounded<T>(scaled) * w);
    }
    store_pack(out + at, pack);
  }
}

template <typename T, int kPacks>
__global__ void __launch_bounds__(kMaxThreads) layer_norm_rows(const Norm args) {
  __shared__ float parts_of_mean[kMaxThreads / 32], parts_of_squares[kMaxThreads / 32];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool live = row < args.tokens;
  wait_for_previous();
  allow_next();
  float values[kPacks][kPack];
  read_row<T, kPacks>(args, row, live, values);
  float sum = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += values[p][i];
  }
  const float mean = sum_row(sum, parts_of_mean) / float(args.width);
  float squares = 0;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    if ((p * blockDim.x + threadIdx.x) * kPack >= args.width) continue;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      values[p][i] -= mean;
      squares += values[p][i] * values[p][i];
    }
  }
  const float inverse = rsqrtf(sum_row(squares, parts_of_squares) / float(args.width) + args.eps);
  T* const out = static_cast<T*>(args.out) + row * args.width;
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int at = (p * blockDim.x + threadIdx.x) * kPack;
    if (!live || at >= args.width) continue;
    const Pack<T> weight = load_constant_pack(static_cast<const T*>(args.weight) + at);
    Pack<T> bias{};
    if (args.bias != nullptr) bias = load_constant_pack(static_cast<const T*>(args.bias) + at);
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      pack.at[i] = narrow<T>(values[p][i] * inverse * widen(weight.at[i]) + widen(bias.at[i]));
    }
    store_pack(out + at, pack);
  }
}

using Kernel = void (*)(Norm);

void launch_rows(const Norm& args, Kernel one_pack, Kernel most_packs, cudaStream_t stream) {
  if (args.width <= 0 || args.width % kPack != 0 || args.width > kMaxNormWidth) {
    throw std::invalid_argument("norm: width " + std::to_string(args.width) +
                                " is not a multiple of 8 up to " + std::to_string(kMaxNormWidth));
  }
  const int packs = args.width / kPack;
  const bool one = packs <= kMaxThreads;
  const int threads = ((one ? packs : (packs + kMaxPacks - 1) / kMaxPacks) + 31) / 32 * 32;
  const int rows = threads < kThreadsPerBlock ? kThreadsPerBlock / threads : 1;
  const int64_t blocks = (args.tokens + rows - 1) / rows;
  launch(one ? one_pack : most_packs, dim3(unsigned(blocks)), dim3(threads, rows), 0, stream, args);
}

}  // namespace

void rms_norm(const Norm& args, cudaStream_t stream) {
  with_half(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_rows(args, rms_norm_rows<T, 1>, rms_norm_rows<T, kMaxPacks>, stream);
  });
}

void layer_norm(const Norm& args, cudaStream_t stream) {
  with_half(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch_rows(args, layer_norm_rows<T, 1>, layer_norm_rows<T, kMaxPacks>, stream);
  });
}

}  // namespace octavo::cuda
