// Decode attention, one warp: tiles of 16 tokens from the paged cache through a ring in shared
// memory into a running softmax. How warps and blocks work together is in decode_attention.cuh.
#pragma once

#include "cuda/decode_attention.h"
#include "cuda/mma.cuh"

#include <cmath>
#include <cstdint>

namespace octavo::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * 32;
constexpr int kTileTokens = 16;
constexpr int kTileRows = 16;
constexpr int kStride = kDecodeWarps * kTileTokens;  // from a warp's tile to its next

// What a kernel gets; `chunks` is the list of the window in question.
struct DecodeTask {
  const void* query;
  const char* keys;
  const char* values;
  const int32_t* block_tables;
  void* out;
  const float* sinks;
  const DecodeChunk* chunks;
  const int32_t* count;
  DecodeWorkspace workspace;
  int64_t query_stride;   // elements
  uint32_t token_bytes;   // from a cache slot to the next
  int max_blocks, block_shift;
  int heads, group, row_tiles, columns;  // columns: key heads * row tiles, items of a chunk
  int max_chunks, list_size, stages;
  float scale;            // of products: to powers of 2, or to the argument of tanh
  float cap;              // of scores as powers of 2; 0: none
};

// Shared memory of a block. A row of a tile is padded to an odd number of 16 bytes, or swizzled
// where it spans all banks, so that eight rows' 16 bytes of one column lie on different banks.
template <int kDim>
struct DecodeLayout {
  static constexpr int kUnits = kDim / 8;  // of 16 bytes, in a row
  static constexpr bool kSwizzled = kUnits % 8 == 0;
  static constexpr int kPitch = (kSwizzled ? kUnits : kUnits + 1) * 16;
  static constexpr int kTileBytes = kTileTokens * kPitch;
  static constexpr int kStageBytes = 2 * kTileBytes;  // keys, values
  static constexpr int kColumns = kDim / 8;           // of 8, in the products' result
  static constexpr int kSteps = kDim / 16;            // of the products with keys
  static constexpr bool kQueryShared = kDim > 128;    // its registers are needed for the result
  static constexpr int kQueryBytes = kQueryShared ? kDecodeThreads * kSteps * 16 : 0;

  int stages, lanes;  // lanes: of a warp, that hold a row of the first or last eight

  __host__ __device__ DecodeLayout(int stages, int rows)
      : stages(stages), lanes((rows < 8 ? rows : 8) * 4) {}
  __host__ __device__ int sums() const { return kDecodeWarps * stages * kStageBytes; }
  __host__ __device__ int values() const { return sums() + kDecodeWarps * kTileRows * 8; }
  __host__ __device__ int query() const { return values() + kDecodeWarps * kColumns * lanes * 8; }
  __host__ __device__ int bytes() const { return query() + kQueryBytes; }

  static __device__ __forceinline__ int offset(int row, int unit) {
    return row * kPitch + (kSwizzled ? unit ^ (row & 7) : unit) * 16;
  }
};

// A chunk under one key head, or under 16 of the rows of its group where that has more.
struct DecodeItem {
  int sequence, begin, end, index, count;
  int column, first_head, rows;
  int64_t head_bytes;  // of the key head, within a cache slot

  // The list's entry of that number; of one beyond the list any, which nobody uses.
  static __device__ __forceinline__ int4 entry(const DecodeTask& task, int number) {
    const int at = min(number / task.columns, task.list_size - 1);
    return __ldcg(reinterpret_cast<const int4*>(task.chunks) + at);
  }

  DecodeItem() = default;
  __device__ __forceinline__ DecodeItem(const DecodeTask& task, int number, int4 raw,
                                        int head_size) {
    column = number % task.columns;
    sequence = raw.x, begin = raw.y, end = raw.z;
    index = raw.w & 0xffff, count = raw.w >> 16;
    const int head = column / task.row_tiles, tile = column - head * task.row_tiles;
    first_head = head * task.group + tile * kTileRows;
    rows = min(kTileRows, task.group - tile * kTileRows);
    head_bytes = int64_t(head) * head_size;
  }
  __device__ int first_tile() const { return begin / kTileTokens * kTileTokens; }
};

// The tiles of one warp, on their way from the cache to its ring.
template <int kDim>
struct TileStream {
  using Layout = DecodeLayout<kDim>;
  static constexpr int kRun = 8;  // tokens: no block is smaller, so they follow each other
  static constexpr int kLookedUp = 32 * kRun / kTileTokens;  // tiles at once, a run a lane

  const int32_t* table;
  const char* keys;  // of the key head
  const char* values;
  int begin, end, tile;
  int place;      // of the tile among those that were looked up
  uint32_t slot;  // where this lane's run begins

  __device__ __forceinline__ void open(const DecodeTask& task, const DecodeItem& item) {
    table = task.block_tables + int64_t(item.sequence) * task.max_blocks;
    keys = task.keys + item.head_bytes;
    values = task.values + item.head_bytes;
    begin = item.begin, end = item.end;
    tile = item.first_tile() + threadIdx.x / 32 * kTileTokens;
    look_up(task);
  }
  __device__ __forceinline__ bool has_tile() const { return tile < end; }

  // Entries of tokens that are not this item's are not read: they may be absurd.
  __device__ __forceinline__ void look_up(const DecodeTask& task) {
    constexpr int kRuns = kTileTokens / kRun;
    const int lane = threadIdx.x % 32;
    const int token = tile + lane / kRuns * kStride + lane % kRuns * kRun;
    place = 0;
    slot = 0;
    if (token < end && token + kRun > begin) {
      const int block = __ldcg(table + (token >> task.block_shift));
      slot = (block << task.block_shift) + (token & ((1 << task.block_shift) - 1));
    }
  }

  // Starts to load the tile and goes on to the next one.
  // Rows without a token become zeros: a weight of 0 times what else may lie there could be NaN.
  __device__ __forceinline__ void load(const DecodeTask& task, uint32_t stage, uint64_t policy) {
    const int lane = threadIdx.x % 32;
    const uint32_t low = __shfl_sync(~0u, slot, 2 * place);
    const uint32_t high = __shfl_sync(~0u, slot, 2 * place + 1);
#pragma unroll
    for (int i = 0; i < kTileTokens * Layout::kUnits / 32; ++i) {
      const int row = (i * 32 + lane) / Layout::kUnits, unit = (i * 32 + lane) % Layout::kUnits;
      const uint32_t at = (row < kRun ? low : high) + row % kRun;
      const bool there = uint32_t(tile + row - begin) < uint32_t(end - begin);
      const uint32_t to = stage + Layout::offset(row, unit);
      copy_async(to, keys + unit * 16 + uint64_t(at) * task.token_bytes, there, policy);
      copy_async(to + Layout::kTileBytes, values + unit * 16 + uint64_t(at) * task.token_bytes,
                 there, policy);
    }
    commit_copies();
    tile += kStride;
    if (++place == kLookedUp) look_up(task);
  }
};

// A running softmax of a warp: of the lane's two rows the largest score and, over the lane's
// columns alone, the sum of weights; and the weighted values.
template <int kDim>
struct Running {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  float values[kDim / 8][4] = {};
};

// What a lane holds of the query's rows, in registers or in a place of its own in shared memory.
template <typename T, int kDim>
struct QueryRows {
  using Layout = DecodeLayout<kDim>;
  uint4 kept[Layout::kQueryShared ? 1 : Layout::kSteps];
  uint4* place;

  __device__ __forceinline__ explicit QueryRows(void* shared)
      : place(static_cast<uint4*>(shared) + threadIdx.x) {}

  __device__ __forceinline__ void load(const DecodeTask& task, const DecodeItem& item) {
    const int lane = threadIdx.x % 32, row = lane / 4;
    const T* from = static_cast<const T*>(task.query) + item.sequence * task.query_stride +
                    int64_t(item.first_head + row) * kDim + lane % 4 * 2;
    const auto pair = [&](bool there, int at) {
      return there ? __ldcg(reinterpret_cast<const uint32_t*>(from + at)) : 0u;
    };
    const bool low = row < item.rows, high = row + 8 < item.rows;
#pragma unroll
    for (int k = 0; k < Layout::kSteps; ++k) {
      const int at = k * 16;
      const uint4 part = {pair(low, at), pair(high, at + 8 * kDim), pair(low, at + 8),
                          pair(high, at + 8 + 8 * kDim)};
      if constexpr (Layout::kQueryShared) {
        place[k * kDecodeThreads] = part;
      } else {
        kept[k] = part;
      }
    }
  }
  __device__ __forceinline__ uint4 step(int k) const {
    if constexpr (Layout::kQueryShared) return place[k * kDecodeThreads];
    return kept[k];
  }
};

// Scores of 16 rows and the tile's 16 tokens, as powers of 2; -inf where the item has no token.
template <typename T, int kDim>
__device__ __forceinline__ void scores_of(const DecodeTask& task, const DecodeItem& item, int tile,
                                          uint32_t keys, const QueryRows<T, kDim>& query,
                                          float (&scores)[2][4]) {
  using Layout = DecodeLayout<kDim>;
  const int lane = threadIdx.x % 32;
  const int row = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t key[4];
    load_matrices(key, keys + Layout::offset(row, k * 2 + half));
    const uint4 part = query.step(k);
    multiply_add<T>(scores[0], {part.x, part.y, part.z, part.w}, key[0], key[1]);
    multiply_add<T>(scores[1], {part.x, part.y, part.z, part.w}, key[2], key[3]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] *= task.scale;
  if (task.cap > 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = task.cap * tanh_of(scores[i / 4][i % 4]);
  }
  const bool whole = tile >= item.begin && tile + kTileTokens <= item.end;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = tile + n * 8 + lane % 4 * 2 + i % 2;
      if (!whole && (token < item.begin || token >= item.end)) scores[n][i] = -INFINITY;
    }
  }
}

// Takes a tile into the running softmax. Every tile has a token, so the largest score is finite.
template <typename T, int kDim>
__device__ __forceinline__ void take_in(Running<kDim>& running, float (&scores)[2][4],
                                        uint32_t values) {
  using Layout = DecodeLayout<kDim>;
  bool grew = false;
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float largest = fmaxf(fmaxf(scores[0][2 * h], scores[0][2 * h + 1]),
                          fmaxf(scores[1][2 * h], scores[1][2 * h + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    largest = fmaxf(largest, running.largest[h]);
    factor[h] = power_of_two(running.largest[h] - largest);
    grew |= largest > running.largest[h];
    running.largest[h] = largest;
    running.sum[h] *= factor[h];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 2 * h; i < 2 * h + 2; ++i) {
        scores[n][i] = power_of_two(scores[n][i] - largest);
        running.sum[h] += scores[n][i];
      }
    }
  }
  if (__any_sync(~0u, grew)) {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) running.values[j][i] *= factor[i / 2];
    }
  }
  uint32_t weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = pack<T>(scores[i / 2][i % 2 * 2], scores[i / 2][i % 2 * 2 + 1]);
  }
  const int lane = threadIdx.x % 32;
  const int row = lane % 16, half = lane / 16;
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
    uint32_t value[4];
    load_matrices_transposed(value, values + Layout::offset(row, j * 2 + half));
    multiply_add<T>(running.values[2 * j], weights, value[0], value[1]);
    multiply_add<T>(running.values[2 * j + 1], weights, value[2], value[3]);
  }
}

}  // namespace octavo::cuda
