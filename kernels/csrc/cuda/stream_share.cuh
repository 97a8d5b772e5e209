// Who multiplies what, and how those who multiplied parts of one tile put them together.
//
// All steps of 64 columns of all tiles are one line, cut into shares of equal length ("stream-K":
// Osama et al., arXiv 2301.03598). A share begins with the last steps of a tile that others began,
// and ends with the first ones of a tile that others end. Whoever has nothing left to multiply
// adds up: each of them one part of the tile, in the order of the shares, so that the bits are
// the same every time.
#pragma once

#include "cuda/persistent_words.cuh"
#include "cuda/pipeline.cuh"

#include <cuda_runtime.h>

#include <cstdint>

namespace octavo::cuda::stream {

constexpr int kComputing = 256;  // threads that multiply

// The line and its cuts.
struct Line {
  int steps, total, shares;  // of a tile, of all, and pieces

  __host__ __device__ int begin(int share) const { return int(int64_t(share) * total / shares); }
  // The share that has this step: the last that does not begin after it.
  __host__ __device__ int holder(int step) const {
    return int((int64_t(step + 1) * shares - 1) / total);
  }
};

// What a share has of a tile.
struct Part {
  int tile, from, to;  // steps within the tile

  __device__ Part(const Line& line, int at, int end)
      : tile(at / line.steps), from(at - tile * line.steps),
        to(min(line.steps, end - tile * line.steps)) {}
  __device__ bool whole(const Line& line) const { return from == 0 && to == line.steps; }
};

// Those who have parts of a tile: shares first .. first + count - 1. The first `adders` of them
// add up; the last does not where it goes on to another tile.
struct Party {
  int first, count, adders;

  __device__ Party(const Line& line, int tile, int most_adders) {
    const int end = (tile + 1) * line.steps;
    first = line.holder(tile * line.steps);
    const int last = line.holder(end - 1);
    count = last - first + 1;
    adders = min(count - (line.begin(last + 1) == end ? 0 : 1), most_adders);
  }
};

// Room for parts: of each block two, of what it has of a tile that others began, and of one that
// it began. A thread writes where the same thread of another block reads.
template <int kTiles>
struct Partials {
  float4* room;
  int blocks;

  __device__ float4* of(int block, bool began) const {
    return room + (int64_t(began) * blocks + block) * (kTiles * kComputing) + threadIdx.x;
  }
  // All but the units from `low` to before `high`, which this block adds up itself.
  __device__ void put(const float (&d)[kTiles][4], int block, bool began, int low, int high) const {
    float4* const to = of(block, began);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n / 2 >= low && n / 2 < high) continue;
      __stcg(to + n * kComputing, make_float4(d[n][0], d[n][1], d[n][2], d[n][3]));
    }
  }
  // Adds those units of another's. Some loads are on their way at once.
  __device__ void add(float (&d)[kTiles][4], int block, bool began, int low, int high) const {
    const float4* const from = of(block, began);
    constexpr int kBatch = 4;
    static_assert(kTiles % kBatch == 0);
#pragma unroll
    for (int first = 0; first < kTiles; first += kBatch) {
      float4 v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int unit = (first + i) / 2;
        v[i] = unit >= low && unit < high ? __ldcg(from + (first + i) * kComputing)
                                          : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        d[first + i][0] += v[i].x;
        d[first + i][1] += v[i].y;
        d[first + i][2] += v[i].z;
        d[first + i][3] += v[i].w;
      }
    }
  }
};

// By all computing threads: what they wrote can be seen by those who wait for `count` arrivals.
__device__ __forceinline__ void arrive(int32_t* arrivals) {
  sync_first(kComputing);
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrivals, 1);
  }
}

// By all computing threads of each that adds up. The last to leave sets the count back to zero:
// nobody leaves before all have arrived.
__device__ __forceinline__ void wait_for_arrivals(int32_t* arrivals, const Party& party) {
  if (threadIdx.x == 0) {
    persistent::Patience patience;
    for (int32_t seen = 0;;) {
      asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(arrivals) : "memory");
      if (seen >= party.count) break;
      patience.spend();
    }
    __threadfence();
    if (atomicAdd(arrivals, 1) == party.count + party.adders - 1) atomicExch(arrivals, 0);
  }
  __syncwarp();
  sync_first(kComputing);
}

}  // namespace octavo::cuda::stream
