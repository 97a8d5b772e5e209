// The list of chunks of a step: one block a window, counting sort by length, the longest first, so
// that what is handed out last is short. The order of equals is any: no result depends on it.
#include "cuda/decode_attention.h"

#include "cuda/check.h"
#include "cuda/launch.h"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kClasses = 32;

// Lengths of equal class share a bucket: up to 256 tokens every 16, beyond that every doubling.
__device__ int class_of(int tokens) {
  const int tiles = (tokens + 15) / 16;
  return tiles <= 16 ? tiles : min(kClasses - 1, 16 + 32 - __clz((tiles - 1) / 16));
}

// A sequence's cut: `count` chunks of `size` tokens from `first`, the last up to its `end`.
struct Cut {
  int first, end, size, count;

  __device__ Cut(int length, int window, Chunking chunking) : end(max(length, 0)) {
    first = window > 0 ? max(end - window, 0) : 0;
    // Chunks begin where tiles do; the first key that is seen may lie within a tile.
    const int tokens = end - first / 16 * 16;
    const int least = (tokens + chunking.max_chunks - 1) / chunking.max_chunks;
    size = max(chunking.chunk, (least + kChunkStep - 1) / kChunkStep * kChunkStep);
    count = max(1, (tokens + size - 1) / size);
  }
  __device__ int begin(int index) const { return max(first, first / 16 * 16 + index * size); }
  __device__ int last_tokens() const { return end - begin(count - 1); }
};

__global__ void __launch_bounds__(kThreads)
    plan_kernel(const DecodePlan plan, const int32_t* seq_lens, int num_decodes) {
  __shared__ int places[kClasses];
  wait_for_previous();
  const int window = plan.windows[blockIdx.x];
  const int lane = threadIdx.x % 32;
  if (threadIdx.x < kClasses) places[threadIdx.x] = 0;
  __syncthreads();
  for (int s = threadIdx.x; s < num_decodes; s += kThreads) {
    const Cut cut(seq_lens[s], window, plan.chunking);
    if (cut.count > 1) atomicAdd(&places[class_of(cut.size)], cut.count - 1);
    atomicAdd(&places[class_of(cut.last_tokens())], 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int c = kClasses - 1; c >= 0; --c) {
      const int members = places[c];
      places[c] = sum;
      sum += members;
    }
    plan.counts[blockIdx.x] = sum;
  }
  __syncthreads();
  DecodeChunk* chunks = plan.chunks + int64_t(blockIdx.x) * plan.list_size;
  for (int s = threadIdx.x / 32; s < num_decodes; s += kThreads / 32) {
    const Cut cut(seq_lens[s], window, plan.chunking);
    int whole = 0, last = 0;
    if (lane == 0) {
      if (cut.count > 1) whole = atomicAdd(&places[class_of(cut.size)], cut.count - 1);
      last = atomicAdd(&places[class_of(cut.last_tokens())], 1);
    }
    whole = __shfl_sync(~0u, whole, 0);
    last = __shfl_sync(~0u, last, 0);
    for (int i = lane; i < cut.count; i += 32) {
      const bool is_last = i == cut.count - 1;
      const int end = is_last ? cut.end : cut.begin(i + 1);
      chunks[is_last ? last : whole + i] = {s, cut.begin(i), end, int16_t(i), int16_t(cut.count)};
    }
  }
}

}  // namespace

void plan_decode(const DecodePlan& plan, const int32_t* seq_lens, int32_t num_decodes,
                 cudaStream_t stream) {
  launch(plan_kernel, dim3(plan.num_windows), dim3(kThreads), 0, stream, plan, seq_lens,
         num_decodes);
}

}  // namespace octavo::cuda
