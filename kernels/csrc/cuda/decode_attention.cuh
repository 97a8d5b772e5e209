// Attention of one query a sequence over paged keys and values, on tensor cores: the kernel.
//
// A block takes a chunk of a sequence under one key head after the other, from a list that was
// made on the device (decode_plan.cu): first the one of its own number, later whatever is next. Its
// four warps take the chunk's tiles of 16 tokens in turn. Each runs on its own: a ring of tiles in
// shared memory that only it fills (cp.async) and reads, a softmax of its own, kept running
// (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691). The ring goes on
// into the next item while this one's sums are put together, so that memory is never idle. The
// queries of a key head's group are the 16 rows of the products; fewer rows cost nothing, memory
// is what bounds this kernel.
//
// The warps' sums are put together in shared memory, those of several chunks by the block that
// finishes last of them ("split KV", FlashDecoding), each time in the order of the tokens.
//
// Blocks that run at the same time take the heads of one chunk, which lie beside each other.
#pragma once

#include "cuda/decode_tile.cuh"
#include "cuda/launch.h"

namespace octavo::cuda {

// One row's softmax, as far as it is known: `largest` score, `sum` of weights relative to it.
struct Share {
  float largest = -INFINITY, sum = 0;

  // The factor of values that were weighted relative to `mine`; nothing known yet is a factor 0.
  static __device__ __forceinline__ float rescale(float mine, float largest) {
    return mine == -INFINITY ? 0.0f : power_of_two(mine - largest);
  }
  // What weighted values are multiplied by in the end, with a sink's share where there is one.
  __device__ __forceinline__ float normalizer(const DecodeTask& task, int head) const {
    if (sum == 0) return 0.0f;
    const float sink = task.sinks ? task.sinks[head] * kLog2E : -INFINITY;
    const float top = fmaxf(largest, sink), mine = rescale(largest, top);
    return __fdividef(mine, sum * mine + rescale(sink, top));
  }
};

// Where the results of one of an item's heads go: out, or, of a chunk of several, the workspace.
template <typename T, int kDim>
struct Destination {
  T* out = nullptr;
  float* values = nullptr;
  float normalizer = 0;

  __device__ __forceinline__ Destination(const DecodeTask& task, const DecodeItem& item, int head,
                                         const Share& share) {
    if (item.count == 1) {
      out = static_cast<T*>(task.out) + (int64_t(item.sequence) * task.heads + head) * kDim;
      normalizer = share.normalizer(task, head);
    } else {
      const int64_t place =
          (int64_t(item.sequence) * task.max_chunks + item.index) * task.heads + head;
      values = task.workspace.values + place * kDim;
      reinterpret_cast<float2*>(task.workspace.sums)[place] = {share.largest, share.sum};
    }
  }
  __device__ __forceinline__ void put(int at, float2 value) const {
    if (out) {
      *reinterpret_cast<uint32_t*>(out + at) =
          pack<T>(value.x * normalizer, value.y * normalizer);
    } else {
      *reinterpret_cast<float2*>(values + at) = value;
    }
  }
};

// Puts the warps' sums together, in their order, eight rows at a time; each warp sums up every
// fourth of the columns. All warps of the block, and a block barrier at the end.
template <typename T, int kDim>
__device__ __forceinline__ void put_together(const DecodeTask& task, const DecodeItem& item,
                                             Running<kDim>& running, char* shared) {
  using Layout = DecodeLayout<kDim>;
  const Layout layout(task.stages, task.group);
  auto* sums = reinterpret_cast<float2*>(shared + layout.sums());
  auto* values = reinterpret_cast<float2*>(shared + layout.values());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
    if (8 * h >= item.rows) break;
    float sum = running.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (row < item.rows) {
      if (lane % 4 == 0) sums[warp * kTileRows + row] = {running.largest[h], sum};
#pragma unroll
      for (int j = 0; j < Layout::kColumns; ++j) {
        values[(warp * Layout::kColumns + j) * layout.lanes + lane] = {
            running.values[j][2 * h], running.values[j][2 * h + 1]};
      }
    }
    __syncthreads();
    if (row < item.rows) {
      Share share;
      float factor[kDecodeWarps];
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        share.largest = fmaxf(share.largest, sums[w * kTileRows + row].x);
      }
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float2 one = sums[w * kTileRows + row];
        factor[w] = Share::rescale(one.x, share.largest);
        share.sum += one.y * factor[w];
      }
      const Destination<T, kDim> to(task, item, item.first_head + row, share);
      for (int j = warp; j < Layout::kColumns; j += kDecodeWarps) {
        float2 total = {0, 0};
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) {
          const float2 one = values[(w * Layout::kColumns + j) * layout.lanes + lane];
          total.x += one.x * factor[w];
          total.y += one.y * factor[w];
        }
        to.put(j * 8 + lane % 4 * 2, total);
      }
    }
    __syncthreads();
  }
}

// Puts the chunks of a sequence together, in their order; by the block that finished last of them.
template <typename T, int kDim>
__device__ __forceinline__ void combine(const DecodeTask& task, const DecodeItem& item) {
  const int64_t first = int64_t(item.sequence) * task.max_chunks * task.heads;
  for (int e = threadIdx.x * 4; e < item.rows * kDim; e += kDecodeThreads * 4) {
    const int head = item.first_head + e / kDim, at = e % kDim;
    Share share;
    float total[4] = {};
#pragma unroll 8
    for (int c = 0; c < item.count; ++c) {
      const int64_t place = first + int64_t(c) * task.heads + head;
      const float2 one = __ldcg(reinterpret_cast<const float2*>(task.workspace.sums) + place);
      const float4 value =
          __ldcg(reinterpret_cast<const float4*>(task.workspace.values + place * kDim + at));
      const float top = fmaxf(share.largest, one.x);
      const float before = Share::rescale(share.largest, top), now = Share::rescale(one.x, top);
      share.largest = top;
      share.sum = share.sum * before + one.y * now;
      total[0] = total[0] * before + value.x * now;
      total[1] = total[1] * before + value.y * now;
      total[2] = total[2] * before + value.z * now;
      total[3] = total[3] * before + value.w * now;
    }
    const float factor = share.normalizer(task, head);
    T* out = static_cast<T*>(task.out) + (int64_t(item.sequence) * task.heads + head) * kDim + at;
    *reinterpret_cast<uint2*>(out) = {pack<T>(total[0] * factor, total[1] * factor),
                                      pack<T>(total[2] * factor, total[3] * factor)};
  }
}

// Adds one, or goes back to 0 from `last`; returns what was there. What the block wrote before its
// last barrier is seen by who counts later, and what others wrote before they counted by this block
// after its next barrier.
__device__ __forceinline__ int count_up(int* counter, int last) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(last)
               : "memory");
  return before;
}

// Whether this block is the last of those that had a chunk of this sequence and head. What the
// others wrote can then be read. For all threads; after a block barrier.
__device__ __forceinline__ bool all_arrived(const DecodeTask& task, const DecodeItem& item) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    int* arrivals = task.workspace.arrivals + int64_t(item.sequence) * task.columns + item.column;
    last = count_up(arrivals, item.count - 1) == item.count - 1;
  }
  __syncthreads();
  return last;
}

// Items beyond two for each block are handed out as blocks get free. Every block that has a second
// one draws until it gets none, which makes as many draws as there are items beyond one for each
// block: the last of them puts the ticket back to 0. Drawn by one thread, well before it is used.
// Ticket t is for item t beyond two for each block.
__device__ __forceinline__ int draw(const DecodeTask& task, int items) {
  int ticket;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
               : "=r"(ticket)
               : "l"(task.workspace.ticket), "r"(items - int(gridDim.x) - 1)
               : "memory");
  return ticket;
}

// Waits until at most so many tiles are on their way.
__device__ __forceinline__ void wait_tiles(int pending) {
  if (pending >= 3) {
    wait_copies<3>();
  } else if (pending == 2) {
    wait_copies<2>();
  } else if (pending == 1) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
}

constexpr int kMaxStages = 4;  // all that wait_tiles knows

template <typename T, int kDim>
__global__ void __launch_bounds__(kDecodeThreads, kDim <= 64 ? 3 : kDim <= 128 ? 2 : 1)
    decode_kernel(const __grid_constant__ DecodeTask task) {
  using Layout = DecodeLayout<kDim>;
  extern __shared__ __align__(128) char shared[];
  __shared__ int upcoming[2];  // in turn: one is read while the other may be written
  wait_for_previous();
  allow_next();
  const auto item_of = [&](int number, int4 entry) {
    return DecodeItem(task, number, entry, kDim * int(sizeof(T)));
  };
  DecodeItem item = item_of(blockIdx.x, DecodeItem::entry(task, blockIdx.x)), next;
  const int items = __ldcg(task.count) * task.columns;
  // One branch on both, so that neither load waits for the other; an end is never negative.
  if ((int(blockIdx.x) >= items) | (item.end < 0)) return;
  const uint64_t policy = evict_first_policy();
  const uint32_t ring =
      shared_address(shared) + threadIdx.x / 32 * task.stages * Layout::kStageBytes;
  int filling = 0, reading = 0, filled = 0;  // stages: next to fill, next to read, between them
  TileStream<kDim> stream;
  QueryRows<T, kDim> query(shared + Layout(task.stages, task.group).query());
  stream.open(task, item);
  // The longest of the first items is followed by the shortest of the second.
  int number = 2 * gridDim.x - 1 - blockIdx.x;
  for (int turn = 0;; turn ^= 1) {
    const bool goes_on = number < items;
    int ticket = 0;
    if (goes_on && threadIdx.x == 0) ticket = draw(task, items);
    const int4 next_entry = DecodeItem::entry(task, number);
    query.load(task, item);
    Running<kDim> running;
    bool ahead = false;
    const auto go_ahead = [&] {  // where this item's tiles are all on their way
      if (stream.has_tile() || ahead || !goes_on) return;
      ahead = true;
      next = item_of(number, next_entry);
      stream.open(task, next);
    };
    go_ahead();
    for (int tile = item.first_tile() + threadIdx.x / 32 * kTileTokens;; tile += kStride) {
      while (filled < task.stages && stream.has_tile()) {
        stream.load(task, ring + filling * Layout::kStageBytes, policy);
        if (++filling == task.stages) filling = 0;
        ++filled;
        go_ahead();
      }
      if (tile >= item.end) break;
      wait_tiles(filled - 1);
      __syncwarp();
      const uint32_t stage = ring + reading * Layout::kStageBytes;
      float scores[2][4] = {};
      scores_of<T, kDim>(task, item, tile, stage, query, scores);
      take_in<T, kDim>(running, scores, stage + Layout::kTileBytes);
      __syncwarp();
      if (++reading == task.stages) reading = 0;
      --filled;
    }
    if (threadIdx.x == 0) upcoming[turn] = ticket;
    put_together<T, kDim>(task, item, running, shared);
    if (item.count > 1 && all_arrived(task, item)) combine<T, kDim>(task, item);
    if (!goes_on) return;
    item = next;
    number = 2 * gridDim.x + upcoming[turn];
  }
}

}  // namespace octavo::cuda
