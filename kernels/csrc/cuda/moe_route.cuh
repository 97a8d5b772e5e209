// What precedes and follows the experts' products: choosing them, sorting by them, adding up.
#pragma once

#include "cuda/launch.h"
#include "cuda/moe.h"
#include "cuda/vector.cuh"

#include <cstdint>

namespace octavo::cuda {

constexpr int kRouteWarps = 4;
constexpr int kSortThreads = 256;
constexpr int kCombineThreads = 256;

// Orders as the float does, NaN above all, and of equal floats the lower index is the greater. No
// key is 0.
__device__ __forceinline__ uint64_t routing_key(float value, int index) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t sortable = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return uint64_t(sortable) << 32 | (0xffffffffu - uint32_t(index));
}

__device__ __forceinline__ float value_of_key(uint64_t key) {
  const uint32_t sortable = uint32_t(key >> 32);
  return __uint_as_float(sortable & 0x80000000u ? sortable & 0x7fffffffu : ~sortable);
}

__device__ __forceinline__ int index_of_key(uint64_t key) {
  return int(0xffffffffu - uint32_t(key));
}

__device__ __forceinline__ uint64_t greatest(uint64_t key) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) {
    const uint64_t other = __shfl_xor_sync(~0u, key, apart);
    key = other > key ? other : key;
  }
  return key;
}

// A warp a token: softmax over all experts, then the top_k of them.
template <typename T>
__global__ void __launch_bounds__(kRouteWarps * 32)
    route_kernel(const T* logits, int tokens, int experts, int top_k, bool normalized,
                 float* weights, int32_t* chosen) {
  constexpr int kOwn = kMaxExperts / 32;
  allow_next();
  wait_for_previous();
  const int lane = threadIdx.x % 32, token = blockIdx.x * kRouteWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  uint64_t keys[kOwn], best = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int expert = lane + i * 32;
    keys[i] = 0;
    if (expert < experts) {
      keys[i] = routing_key(widen(logits[int64_t(token) * experts + expert]), expert);
    }
    best = keys[i] > best ? keys[i] : best;
  }
  best = greatest(best);
  const float most = value_of_key(best);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (keys[i]) sum += __expf(value_of_key(keys[i]) - most);
  }
  sum = sum_lanes(sum);
  float weight = 0;
  int expert = 0;
  for (int choice = 0; choice < top_k; ++choice) {
    if (choice > 0) {
      uint64_t own = 0;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (keys[i] == best) keys[i] = 0;  // the one before
        own = keys[i] > own ? keys[i] : own;
      }
      best = greatest(own);
    }
    if (lane == choice) {
      weight = __expf(value_of_key(best) - most) / sum;
      expert = index_of_key(best);
    }
  }
  if (normalized) weight /= sum_lanes(weight);
  if (lane < top_k) {
    weights[int64_t(token) * top_k + lane] = weight;
    chosen[int64_t(token) * top_k + lane] = expert;
  }
}

struct Sort {
  const int32_t* chosen;
  int pairs, experts, tile_rows, max_tiles;
  int32_t *order, *place;
  ExpertTile* tiles;
};

// Sums over experts of what `counts` says of them: pairs and tiles before this one, tiles in all.
struct Before {
  int pairs = 0, tiles = 0, all_tiles = 0;

  __device__ Before(const int* counts, int experts, int expert, int tile_rows) {
    for (int e = threadIdx.x % 32; e < experts; e += 32) {
      const int needed = (counts[e] + tile_rows - 1) / tile_rows;
      all_tiles += needed;
      if (e < expert) {
        pairs += counts[e];
        tiles += needed;
      }
    }
    pairs = __reduce_add_sync(~0u, pairs);
    tiles = __reduce_add_sync(~0u, tiles);
    all_tiles = __reduce_add_sync(~0u, all_tiles);
  }
};

// A block an expert: counts all pairs by expert, then writes its own in their order.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const Sort sort) {
  __shared__ int counts[kMaxExperts];
  __shared__ int of_warp[kSortThreads / 32];
  allow_next();
  wait_for_previous();
  const int expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int e = threadIdx.x; e < sort.experts; e += kSortThreads) counts[e] = 0;
  __syncthreads();
  for (int pair = threadIdx.x; pair < sort.pairs; pair += kSortThreads) {
    atomicAdd(&counts[sort.chosen[pair]], 1);
  }
  __syncthreads();
  const Before before(counts, sort.experts, expert, sort.tile_rows);
  const int mine = counts[expert];
  for (int row = threadIdx.x * sort.tile_rows; row < mine; row += kSortThreads * sort.tile_rows) {
    sort.tiles[before.tiles + row / sort.tile_rows] = {expert, before.pairs + row,
                                                       min(sort.tile_rows, mine - row)};
  }
  if (expert == 0) {
    for (int t = before.all_tiles + threadIdx.x; t < sort.max_tiles; t += kSortThreads) {
      sort.tiles[t] = {-1, 0, 0};
    }
  }
  if (mine == 0) return;
  int next = before.pairs;
  for (int begin = 0; begin < sort.pairs; begin += kSortThreads) {
    const int pair = begin + threadIdx.x;
    const bool ours = pair < sort.pairs && sort.chosen[pair] == expert;
    const uint32_t ballot = __ballot_sync(~0u, ours);
    if (lane == 0) of_warp[warp] = __popc(ballot);
    __syncthreads();
    int at = next + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kSortThreads / 32; ++w) {
      at += w < warp ? of_warp[w] : 0;
      next += of_warp[w];
    }
    if (ours) {
      sort.order[at] = pair;
      sort.place[pair] = at;
    }
    __syncthreads();
  }
}

// Each token's results by their weights, the experts in the order of its choice.
template <typename T>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const T* results, const float* weights, const int32_t* place, T* out,
                   int hidden, int top_k) {
  allow_next();
  wait_for_previous();
  const int column = (blockIdx.y * kCombineThreads + threadIdx.x) * kPack;
  if (column >= hidden) return;
  const int64_t token = blockIdx.x;
  float sums[kPack] = {};
  for (int choice = 0; choice < top_k; ++choice) {
    const int64_t pair = token * top_k + choice;
    const float weight = weights[pair];
    const Pack<T> result = load_pack(results + int64_t(place[pair]) * hidden + column);
#pragma unroll
    for (int i = 0; i < kPack; ++i) sums[i] += weight * widen(result.at[i]);
  }
  store_narrowed(out + token * hidden + column, sums);
}

}  // namespace octavo::cuda
