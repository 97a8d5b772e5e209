// What a search for a row's cut (row_select.cuh) is told, keeps in shared memory and finds.
#pragma once

#include "cuda/gumbel.cuh"

namespace octavo::cuda {

constexpr int kBins = 2048;
constexpr int kBinBits = 11;
constexpr int kList = kBins;  // a bin each
constexpr int kSelectThreads = kBins / 2, kSelectWarps = kSelectThreads / 32;

struct SelectShared {
  const uint32_t* keys;  // of the segments' largest logits, in global memory; null: not known
  float smallest;        // of the row
  uint32_t count[kBins], weight_low[kBins], weight_high[kBins];
  uint64_t list[kList];
  uint64_t warp_weight[32];
  uint32_t warp_count[32];
  Best warp_best[32];
  uint32_t listed, key, total_count;
  int segment;
  uint64_t total_weight;
  struct Found {
    int bin;
    uint32_t before_count, count;
    uint64_t before_weight;
  } found;
};

// The first `length` of the list, largest first, by a bitonic network (Batcher, 1968) over the next
// power of two.
__device__ inline void sort_list(SelectShared& shared, int length) {
  int size = 32;
  while (size < length) size *= 2;
  for (int i = length + threadIdx.x; i < size; i += kSelectThreads) shared.list[i] = 0;
  __syncthreads();
  const int i = threadIdx.x;
  for (int run = 2; run <= size; run *= 2) {
    for (int by = run / 2; by > 0; by /= 2) {
      if (i < size / 2) {
        const int a = 2 * i - (i & (by - 1)), b = a + by;
        const uint64_t x = shared.list[a], y = shared.list[b];
        if ((x < y) == ((a & run) == 0)) {
          shared.list[a] = y;
          shared.list[b] = x;
        }
      }
      __syncthreads();
    }
  }
}

// What to look for: the place of the target-th token, or of the one whose weight reaches it.
struct Target {
  bool by_weight;
  uint64_t amount;
};

// Places between two, in bins of the value or of 2^shift places each.
struct Range {
  uint64_t low, high;
  int shift;

  __device__ bool by_value() const { return shift < 0; }
  __device__ bool everything() const { return low == 0 && by_value(); }
  __device__ bool holds(uint64_t place) const { return low <= place && place <= high; }
  __device__ int bin(uint64_t place) const { return int((high - place) >> shift); }
  __device__ Range part(int bin) const {
    const uint64_t size = uint64_t(1) << shift, top = high - (uint64_t(bin) << shift);
    return {top - low < size ? low : top - size + 1, top, 0};
  }
  __device__ void divide() { shift = max(0, 64 - __clzll(high - low) - kBinBits); }
};

// What is kept: tokens that come at `from` or before; of these, if `last_bin` is one, those up to
// that bin are a few more than are kept and fit into the list.
struct Cut {
  uint64_t from;
  int last_bin;

  __device__ bool listable() const { return last_bin < kBins; }
};

}  // namespace octavo::cuda
