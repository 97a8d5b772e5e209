// What the parts of the persistent kernel share: its arguments, its shared memory, and how
// attention is divided among the blocks.
#pragma once

#include "cuda/launch.h"
#include "cuda/persistent_layers.h"
#include "cuda/persistent_words.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/skinny_product.cuh"

#include <algorithm>
#include <cstdint>

namespace octavo::cuda::persistent {

using skinny::kGroup;
using skinny::kPass;
using skinny::kThreads;
using skinny::kWarps;

constexpr int kTokens = 32;        // of keys and values in a stage of the ring
constexpr int kMostDim = 128;
constexpr int kMostGroup = 8;      // heads a key head, the rows of a product with keys
constexpr int kPad = 4;            // floats, behind a head's sums in shared memory
// A stage holds rows of a matrix, or keys and values; of either the pitch spreads rows over banks.
constexpr int kStageBytes = 2 * kTokens * (kMostDim * 2 + 16);
static_assert(kStageBytes >= skinny::kStageBytes && kStageBytes % 128 == 0);

__host__ __device__ constexpr int head_pitch(int dim) { return dim * 2 + 16; }

// Bytes from a row of x to the next in shared memory.
__host__ __device__ constexpr int x_pitch(int width) { return (width * 2 + 127) / 128 * 128 + 64; }

// Words that blocks hand each other, by their places in the workspace.
struct Exchange {
  uint32_t* passes;  // tags given so far: passes of all launches through a layer
  Word* qkv;    // [rows, columns / 2]: two elements a word, as all but `parts`
  Word* parts;  // [items, group, dim + 2]: float32 sums of an item, largest score, weights
  SharedWords mixed;     // [rows, heads dim / 2]
  SharedWords middle;    // [rows, hidden / 2]: the residual after attention
  SharedWords inner;     // [rows, inner / 2]
  SharedWords residual;  // [rows, hidden / 2]: after the MLP
};

// Attention's items: a chunk of a sequence's cached tokens under one key head. The last chunk of a
// sequence also has the new token, which is not in the cache yet.
struct Schedule {
  int64_t positions[kPersistentRows], slots[kPersistentRows];  // of the new tokens
  int chunk;  // tokens, a multiple of kTokens
  int items;
  int cached[kPersistentRows];
  int first[kPersistentRows + 1];  // item of each row
  uint32_t passes;  // Exchange's, before this launch
};

struct Item {
  int number, row, head, begin, end, chunks;
  bool last;

  __device__ __forceinline__ Item(const Schedule& schedule, int kv_heads, int number)
      : number(number), row(0) {
    while (number >= schedule.first[row + 1]) ++row;
    const int place = number - schedule.first[row], index = place / kv_heads;
    head = place % kv_heads;
    chunks = (schedule.first[row + 1] - schedule.first[row]) / kv_heads;
    last = index == chunks - 1;
    begin = index * schedule.chunk;
    end = last ? schedule.cached[row] : begin + schedule.chunk;
  }
};

// Where things lie in shared memory, in bytes, behind the ring.
struct Layout {
  int partials, scratch, norms, heads, table, residual, schedules, portions, sums, bytes;

  // `most_units` of 8 columns of the residual are a block's.
  Layout() = default;
  Layout(const LayerStack& stack, int rows, int stages, int most_units)
      : partials(Ring::bytes(stages, kStageBytes)) {
    const int dim = int(stack.dim), group = int(stack.heads / stack.kv_heads);
    const int widest = int(std::max({stack.hidden, stack.inner, stack.heads * stack.dim}));
    scratch = partials + rows * kPass * kWarps * kGroup * 4;
    norms = scratch + std::max(rows * x_pitch(widest), kWarps * group * ((dim + kPad) * 4 + 8));
    heads = norms + 2 * int(stack.hidden) * 2;
    table = heads + (kMostGroup + 2) * head_pitch(dim);
    residual = table + int(stack.num_layers) * int(sizeof(DecoderLayer));
    schedules = residual + most_units * rows * kGroup * 4;
    portions = schedules + 2 * int(sizeof(Schedule));
    sums = portions + (kProducts + 1) * int(sizeof(int2));
    bytes = (sums + kWarps * 4 + 15) / 16 * 16;
  }
};

struct Task {
  LayerStack stack;
  DecodeRows rows;
  Exchange exchange;
  int num_rows, num_layers, hidden, inner, heads, kv_heads, group, stages, block_shift;
  int ahead, engine_tokens;  // LayerStack's, decided
  int row_shift;     // of the power of two that the rows fit in
  Layout at;
  int64_t num_slots;
  float scale;       // of products of queries and keys: to powers of 2

  // Through the layers, and where logits are wanted through the head.
  __device__ __forceinline__ int passes() const {
    return num_layers + (rows.residual == nullptr);
  }
};

// By one whole warp: chunks as small as give every block one item at most, where that can be. A
// position or slot outside its table is a bug of the caller: it ends the process's context rather
// than overwrite the keys of another sequence.
__device__ __forceinline__ void make_schedule(const Task& task, Schedule* to) {
  const int lane = threadIdx.x % 32;
  const bool there = lane < task.num_rows;
  const int length = there ? __ldcg(task.rows.seq_lens + lane) : 0;
  if (there) {
    const int64_t position = __ldcg(task.rows.positions + lane);
    const int64_t slot = __ldcg(task.rows.slots + lane);
    const bool inside = position >= 0 && position < task.stack.max_positions;
    if ((!inside && length > 0) || slot < -1 || slot >= task.num_slots) __trap();
    to->positions[lane] = position;
    to->slots[lane] = slot;
  }
  const int cached = max(length - 1, 0);
  int longest = cached, all = cached;
#pragma unroll
  for (int apart = kPersistentRows / 2; apart > 0; apart /= 2) {
    longest = max(longest, __shfl_xor_sync(~0u, longest, apart));
    all += __shfl_xor_sync(~0u, all, apart);
  }
  longest = __shfl_sync(~0u, longest, 0);
  all = __shfl_sync(~0u, all, 0);
  const int most = gridDim.x / task.kv_heads;  // chunks of all rows
  int chunk = most < task.num_rows ? longest : all / most, mine, before;
  chunk = max(1, (chunk + kTokens - 1) / kTokens) * kTokens;
  for (;; chunk += max(1, chunk / 8 / kTokens) * kTokens) {
    mine = length > 0 ? max(1, (cached + chunk - 1) / chunk) : 0;
    before = mine;
#pragma unroll
    for (int apart = 1; apart < kPersistentRows; apart *= 2) {
      const int other = __shfl_up_sync(~0u, before, apart);
      if (lane >= apart) before += other;
    }
    const int total = __shfl_sync(~0u, before, kPersistentRows - 1);
    if (total <= most || chunk >= longest) break;
  }
  if (lane < kPersistentRows) {
    to->cached[lane] = cached;
    to->first[lane + 1] = before * task.kv_heads;
  }
  if (lane == 0) {
    to->first[0] = 0;
    to->chunk = chunk;
    to->passes = __ldcg(task.exchange.passes);
  }
  if (lane == kPersistentRows - 1) to->items = before * task.kv_heads;
}

// Shared memory as the consumers see it; nothing of it is kept in registers.
struct Shared {
  const Task& task;
  uint8_t* base;

  __device__ __forceinline__ Ring ring() const { return Ring(base, task.stages, kStageBytes); }
  __device__ __forceinline__ skinny::Partials partials() const {
    return {reinterpret_cast<float*>(base + task.at.partials), task.num_rows};
  }
  // x's rows, or what warps put together of attention.
  __device__ __forceinline__ uint8_t* scratch() const { return base + task.at.scratch; }
  __device__ __forceinline__ uint8_t* input_norm() const { return base + task.at.norms; }
  __device__ __forceinline__ uint8_t* mlp_norm() const { return input_norm() + task.hidden * 2; }
  // kMostGroup queries, the new key, the new value.
  __device__ __forceinline__ uint8_t* heads() const { return base + task.at.heads; }
  __device__ __forceinline__ DecoderLayer* table() const {
    return reinterpret_cast<DecoderLayer*>(base + task.at.table);
  }
  // [units, rows, kGroup]: of this block's columns.
  __device__ __forceinline__ float* residual() const {
    return reinterpret_cast<float*>(base + task.at.residual);
  }
  // The consumers', the producer's.
  __device__ __forceinline__ Schedule* schedules() const {
    return reinterpret_cast<Schedule*>(base + task.at.schedules);
  }
  // This block's part of each product: the first unit, units.
  __device__ __forceinline__ int2* portions() const {
    return reinterpret_cast<int2*>(base + task.at.portions);
  }
  __device__ __forceinline__ float* sums() const {
    return reinterpret_cast<float*>(base + task.at.sums);
  }
};

// A row of the first layer's input; null: of zeros.
__device__ __forceinline__ const uint8_t* first_row(const Task& task, int row) {
  const auto* from = static_cast<const uint8_t*>(task.rows.residual);
  int64_t line = row;
  if (from == nullptr) {
    from = static_cast<const uint8_t*>(task.stack.embedding);
    line = __ldcg(task.rows.tokens + row);
    if (line >= task.stack.vocab) __trap();
    if (line < 0) return nullptr;
  }
  return from + line * task.hidden * 2;
}

// The units of 8 outputs of a product that are this block's; gated, a unit is two groups of rows.
struct Portion {
  int first, units, halves, half_rows, k;

  __device__ __forceinline__ int groups() const { return units * halves; }
  __device__ __forceinline__ int row(int group) const {
    const int gated = halves - 1;
    return (group & gated) * half_rows + (first + (group >> gated)) * kGroup;
  }
};

// First unit and units of a product with so many outputs.
__device__ __forceinline__ int2 divided(int outputs) {
  const unsigned all = outputs / kGroup, first = blockIdx.x * all / gridDim.x;
  return {int(first), int((blockIdx.x + 1) * all / gridDim.x - first)};
}

__device__ __forceinline__ int outputs_of(const Task& task, int dim, int product) {
  if (product == kQkv) return (task.heads + 2 * task.kv_heads) * dim;
  if (product == kHead) return int(task.stack.vocab);
  return product == kGateUp ? task.inner : task.hidden;
}

__device__ __forceinline__ Portion portion_of(const Task& task, const Shared& shared, int dim,
                                              int product) {
  const int2 mine = shared.portions()[product];
  const int k = product == kOutput ? task.heads * dim : product == kDown ? task.inner : task.hidden;
  return {mine.x, mine.y, product == kGateUp ? 2 : 1, outputs_of(task, dim, product), k};
}

}  // namespace octavo::cuda::persistent
