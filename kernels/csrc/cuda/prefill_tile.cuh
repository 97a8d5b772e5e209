// What the prefill kernels share on their way in: whose rows a block has, which keys they take in
// and where those lie, and copies of both into shared memory.
//
// A kernel's Shape says: Type (of elements), kDim, kRows of a tile, kKeys of a step; kUnits of 16
// bytes a row; kTeam threads that copy a row together and kTeams rows that are copied at once;
// place(row, unit), where that lies in a buffer in bytes, and kRowBytes from row to row for rows
// that are kTeams apart; kBands of 16 rows that a warp owns, kWarpRows in all.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/prefill_attention.h"

#include <cstdint>

namespace octavo::cuda::prefill {

constexpr int kThreads = 128;  // that copy

// A thread's number among those that copy; blocks in which others compute have these last.
__device__ __forceinline__ uint32_t copier() { return threadIdx.x % kThreads; }

// Copies 16 bytes to shared memory in the background; zeros, and no read, unless `wanted`. Unlike
// decode's, these keys are read again by other blocks: they stay in the L2 cache.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}

// Where the rows of a tile stand.
struct Tile {
  int begin;     // of the sequence's queries in the batch
  int queries;   // of the sequence
  int position;  // of the sequence's first query
  int first_row, rows;
  int group;

  __device__ int token(int row) const { return min((first_row + row) / group, queries - 1); }
  __device__ int head(int row) const { return (first_row + row) % group; }
  __device__ int at(int row) const { return position + token(row); }
};

__device__ inline Tile make_tile(const PrefillBatch& batch, const PrefillItem& item,
                                 int tile_rows) {
  Tile tile;
  tile.group = batch.heads / batch.kv_heads;
  tile.begin = batch.query_start[item.sequence];
  tile.queries = batch.query_start[item.sequence + 1] - tile.begin;
  tile.position = batch.seq_lens[item.sequence] - tile.queries;
  tile.first_row = item.tile * tile_rows;
  tile.rows = min(tile_rows, tile.queries * tile.group - tile.first_row);
  return tile;
}

// What a block looks up of its rows once, in shared memory; offsets in units of 16 bytes.
template <typename Shape>
struct RowTable {
  int32_t position[Shape::kRows];
  uint32_t query[Shape::kRows], out[Shape::kRows];
  float sink[Shape::kRows];
};

// By one thread a row; rows past the last stand where it does.
template <typename Shape>
__device__ __forceinline__ void fill(RowTable<Shape>& table, const Tile& tile,
                                     const PrefillAttention& args, int heads, int kv_head) {
  const int row = copier();
  if (row >= Shape::kRows) return;
  const int token = tile.token(row), head = kv_head * tile.group + tile.head(row);
  const int64_t at = tile.begin + token;
  table.position[row] = tile.position + token;
  table.query[row] = uint32_t(at * (args.query_stride / 8) + head * Shape::kUnits);
  table.out[row] = uint32_t((at * heads + head) * Shape::kUnits);
  if (args.sinks != nullptr) table.sink[row] = args.sinks[head];
}

// Rows that go through the steps together, by where the first and the last of them stand.
struct Span {
  int first, last, window;
  bool any;

  // `count` rows of a tile from `row` on; `rows` is how many the tile has.
  __device__ Span(const int32_t* positions, int row, int count, int rows, int window)
      : first(positions[row]), last(positions[row + count - 1]), window(window), any(row < rows) {}

  // Whether any row sees any of the step's keys, from position `key` on.
  template <typename Shape>
  __device__ bool sees(int key) const {
    return any && key <= last && (window == 0 || key + Shape::kKeys > first - window + 1);
  }
  // Whether some row does not see some of them.
  template <typename Shape>
  __device__ bool sees_not_all(int key) const {
    return key + Shape::kKeys - 1 > first || (window > 0 && key <= last - window);
  }
};

// The keys that a tile takes in, first..end, of which those before `seen` are behind all windows.
struct Keys {
  int first, end, seen;
};

// Looks up a step's pages: blocks hold 8 slots or more, so 8 keys that
// begin at a multiple of 8 are always adjacent. first_slot() finds the slot of a group of them; in
// two steps the block's number can be under way meanwhile.
struct Pages {
  const int32_t* table;
  int shift;  // of a position to its block

  template <typename Shape>
  __device__ int first_slot(int step, uint32_t group, const Keys& keys) const {
    return slot<Shape>(first_block<Shape>(step, group, keys), step, group);
  }
  template <typename Shape>
  __device__ int first_block(int step, uint32_t group, const Keys& keys) const {
    const int position = step * Shape::kKeys + group * 8;
    const bool wanted =
        group < Shape::kGroups && position < keys.end && position + 8 > keys.seen;
    return wanted ? table[position >> shift] : 0;
  }
  template <typename Shape>
  __device__ int slot(int block, int step, uint32_t group) const {
    const int position = step * Shape::kKeys + group * 8;
    return (block << shift) + (position & ((1 << shift) - 1));
  }
};

// Copies a step's keys (or values), zeros for those out of keys.seen..keys.end. slot_of(group) is
// what first_slot() found; `row` is how many units of 16 bytes lie from slot to slot.
template <typename Shape, typename SlotOf>
__device__ __forceinline__ void copy_step(uint32_t to, const typename Shape::Type* cache,
                                          const SlotOf& slot_of, int step, uint32_t row,
                                          const Keys& keys) {
  constexpr uint32_t kTeams = Shape::kTeams;
  const uint32_t team = copier() / Shape::kTeam, unit = copier() % Shape::kTeam;
  if (unit >= Shape::kUnits) return;
  const int first = step * Shape::kKeys;
  const auto copy = [&](uint32_t i, bool whole) {
    const uint32_t key = team + i * kTeams;
    const uint32_t group = kTeams < 8 ? i * kTeams / 8 : team / 8 + i * (kTeams / 8);
    const uint32_t member = kTeams < 8 ? team + i * kTeams % 8 : team % 8;
    const bool wanted =
        whole || (first + int(key) >= keys.seen && first + int(key) < keys.end);
    // 32 bits hold it for caches of up to 64 GiB a layer.
    const uint32_t slot = slot_of(group);
    const uint32_t from = wanted ? slot * row + (member * row + unit) : 0;
    copy_async_16(to + Shape::place(team, unit) + i * (kTeams * Shape::kRowBytes),
                  reinterpret_cast<const uint4*>(cache) + from, wanted);
  };
  if (first >= keys.seen && first + Shape::kKeys <= keys.end) {
#pragma unroll
    for (int i = 0; i < Shape::kKeys / Shape::kTeams; ++i) copy(i, true);
  } else {  // an end: rare, so without the registers that unrolling takes
#pragma unroll 1
    for (int i = 0; i < Shape::kKeys / Shape::kTeams; ++i) copy(i, false);
  }
}

template <typename Shape>
__device__ __forceinline__ void copy_queries(uint32_t to, const RowTable<Shape>& table,
                                             const void* query, int rows) {
  const uint32_t team = copier() / Shape::kTeam, unit = copier() % Shape::kTeam;
  if (unit >= Shape::kUnits) return;
#pragma unroll 4
  for (int i = 0; i < Shape::kRows / Shape::kTeams; ++i) {
    const int row = team + i * Shape::kTeams;
    copy_async_16(to + Shape::place(row, unit),
                  static_cast<const uint4*>(query) + table.query[row] + unit, row < rows);
  }
}

}  // namespace octavo::cuda::prefill
