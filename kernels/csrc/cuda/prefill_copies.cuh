// The copying half of prefill for Hopper (prefill_warpgroup.cuh): what lies in shared memory, who
// fills it, and how buffers change hands.
//
// Two warps copy keys and two copy values, so that neither waits for room for the other's: a
// buffer of keys is free as soon as a step's scores are there, one of values a softmax later.
//
// They copy by cp.async, not by the tensor memory accelerator: it fills the slots that are not to
// be read with zeros by itself, for any size of a block.
#pragma once

#include "cuda/launch.h"
#include "cuda/prefill_attention.h"
#include "cuda/prefill_tile.cuh"
#include "cuda/warpgroup.cuh"

namespace octavo::cuda::prefill {

constexpr int kComputing = 256;         // threads that compute; then come those that copy
constexpr int kFillers = kThreads / 2;  // that copy keys, or values
constexpr int kCopyRegisters = 40, kComputeRegisters = 232;

template <typename T, int kHeadDim>
struct WarpgroupShape {
  using Type = T;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = 128, kKeys = 128;
  static constexpr int kUnits = kDim / 8, kTeam = kUnits, kTeams = kThreads / kTeam;
  static constexpr int kBands = 1, kWarpRows = 16;
  static constexpr int kGroups = kKeys / 8;
  static constexpr int kRowBytes = 128;                   // of a panel: 64 elements of each row
  static constexpr int kPanelBytes = kKeys * kRowBytes;
  static constexpr int kBufferBytes = kDim / 64 * kPanelBytes;  // queries; a step's keys; values
  static_assert(kDim == 64 || kDim == 128);
  // As panel_descriptor() has it.
  static __device__ uint32_t place(uint32_t row, uint32_t unit) {
    return unit / 8 * kPanelBytes + row * kRowBytes + (unit % 8 ^ row % 8) * 16;
  }
};

// What those who copy tell those who compute of an item.
template <typename Shape>
struct Job {
  RowTable<Shape> table;
  int32_t first_step, end_step;
  int32_t rows, partial, kv_head, part;
};

// Barriers, 8 bytes each: of the job and its queries, then of the buffers of keys and values.
struct Barriers {
  uint32_t first;
  static constexpr int kCount = 10;

  __device__ uint32_t ready() const { return first; }
  __device__ uint32_t queries_free() const { return first + 8; }
  __device__ uint32_t full(int buffer) const { return first + 16 + buffer * 16; }
  __device__ uint32_t free(int buffer) const { return first + 24 + buffer * 16; }

  __device__ void init() const {
    barrier_init(ready(), kThreads);
    barrier_init(queries_free(), kComputing / 32);
    for (int buffer = 0; buffer < 4; ++buffer) {
      barrier_init(full(buffer), kFillers);
      barrier_init(free(buffer), kComputing / 32);
    }
  }
};

// Shared memory: queries, two buffers of keys, two of values, two jobs, barriers.
template <typename Shape>
struct Shared {
  unsigned char* base;
  static constexpr int kJobs = 5 * Shape::kBufferBytes;
  static constexpr int kBarriers = kJobs + 2 * int(sizeof(Job<Shape>));
  static constexpr int kBytes = kBarriers + Barriers::kCount * 8;

  __device__ uint32_t queries() const { return shared_address(base); }
  // Buffers 0 and 1 are of keys, 2 and 3 of values.
  __device__ uint32_t buffer(int i) const { return queries() + (1 + i) * Shape::kBufferBytes; }
  __device__ Job<Shape>& job(int round) const {
    return reinterpret_cast<Job<Shape>*>(base + kJobs)[round % 2];
  }
  __device__ Barriers barriers() const { return {queries() + kBarriers}; }
};

// Which items a block takes: items are sorted by length, so turns go there and back.
struct Turns {
  int total, kv_heads;

  __device__ Turns(const PrefillPlan& plan, int kv_heads)
      : total(plan.counts[0] * kv_heads), kv_heads(kv_heads) {}
  __device__ int at(int round) const {
    const int blocks = gridDim.x, block = blockIdx.x;
    return round * blocks + (round % 2 ? blocks - 1 - block : block);
  }
  __device__ bool in(int round) const { return at(round) < total; }
  __device__ int item(int round) const { return at(round) / kv_heads; }
  __device__ int kv_head(int round) const { return at(round) % kv_heads; }
};

// A barrier among the threads that copy.
__device__ __forceinline__ void sync_copiers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");
}

// A copying thread's copies under way, and whom to tell when they are there. Others' products read
// what this thread's cp.async wrote, so it waits for it and publishes it itself.
class Copies {
 public:
  // Ends a group: `barrier` hears of it two groups later, or when the next free() has to wait.
  __device__ void tell(uint32_t barrier) {
    commit_copies();
    wait_copies<2>();
    publish_to_products();
    if (older_ != 0) barrier_arrive(older_);
    older_ = newer_;
    newer_ = barrier;
  }
  // Returns when the buffer may be written. What was copied is needed for that, sooner or later.
  __device__ void wait_free(uint32_t barrier, uint32_t parity) {
    if (barrier_passed(barrier, parity)) return;
    tell_all();
    barrier_wait(barrier, parity);
  }
  __device__ void tell_all() {
    wait_copies<0>();
    publish_to_products();
    if (older_ != 0) barrier_arrive(older_);
    if (newer_ != 0) barrier_arrive(newer_);
    older_ = newer_ = 0;
  }

 private:
  uint32_t older_ = 0, newer_ = 0;
};

// copy_step() by half of the threads that copy.
template <typename Shape, typename SlotOf>
__device__ __forceinline__ void copy_step_by_half(uint32_t to, const typename Shape::Type* cache,
                                                  const SlotOf& slot_of, int step, uint32_t row,
                                                  const Keys& keys) {
  const uint32_t member = copier() % kFillers / 8, unit = copier() % 8;  // eight threads a key
  const int first = step * Shape::kKeys;
  to += Shape::place(member, unit);
  const auto copy = [&](int group, bool whole) {
    const int key = first + group * 8 + int(member);
    const bool wanted = whole || (key >= keys.seen && key < keys.end);
    const uint32_t slot = slot_of(group);
    const uint32_t from = wanted ? slot * row + (member * row + unit) : 0;
#pragma unroll
    for (int panel = 0; panel < Shape::kDim / 64; ++panel) {
      copy_async_16(to + panel * Shape::kPanelBytes + group * 8 * Shape::kRowBytes,
                    reinterpret_cast<const uint4*>(cache) + from + panel * 8, wanted);
    }
  };
  if (first >= keys.seen && first + Shape::kKeys <= keys.end) {
#pragma unroll
    for (int group = 0; group < Shape::kGroups; ++group) copy(group, true);
  } else {
#pragma unroll 1
    for (int group = 0; group < Shape::kGroups; ++group) copy(group, false);
  }
}

// The life of a copying thread.
template <typename Shape>
__device__ __forceinline__ void copy_items(const PrefillAttention& args, const PrefillBatch& batch,
                                           const PrefillPlan& plan, const Shared<Shape>& shared) {
  using T = typename Shape::Type;
  const Barriers barriers = shared.barriers();
  const Turns turns(plan, batch.kv_heads);
  const uint32_t row = batch.kv_heads * Shape::kUnits, lane = threadIdx.x % 32;
  const int shift = __ffs(int(args.block_size)) - 1;
  const bool of_keys = copier() < kFillers;
  Copies copies;
  RingPosition ring;
  for (int round = 0; turns.in(round); ++round) {
    const PrefillItem item = plan.items[turns.item(round)];
    const int kv_head = turns.kv_head(round);
    const Tile tile = make_tile(batch, item, Shape::kRows);
    const int seen = args.window > 0 ? max(0, tile.at(0) - args.window + 1) : 0;
    const Keys keys{max(item.first, seen), item.end, seen};
    const int first_step = keys.first / Shape::kKeys;
    const int end_step = max(first_step, (keys.end + Shape::kKeys - 1) / Shape::kKeys);
    const Pages pages{args.block_tables + item.sequence * args.max_blocks, shift};
    const T* const cache =
        static_cast<const T*>(of_keys ? args.key_cache : args.value_cache) + kv_head * Shape::kDim;
    int block = pages.first_block<Shape>(first_step, lane, keys);

    // The queries' buffer, and the job of two rounds ago.
    copies.wait_free(barriers.queries_free(), round % 2 ^ 1);
    Job<Shape>& job = shared.job(round);
    fill<Shape>(job.table, tile, args, batch.heads, kv_head);
    if (copier() == 0) {
      job.first_step = first_step;
      job.end_step = end_step;
      job.rows = tile.rows;
      job.partial = item.partial;
      job.kv_head = kv_head;
      job.part = item.part;
    }
    sync_copiers();  // of the table, which tells where the queries are
    copy_queries<Shape>(shared.queries(), job.table, args.query, tile.rows);
    copies.tell(barriers.ready());
    for (int step = first_step; step < end_step; ++step) {
      const int slot = pages.slot<Shape>(block, step, lane);
      block = pages.first_block<Shape>(step + 1, lane, keys);  // under way while this is copied
      const auto slot_of = [&](uint32_t group) { return __shfl_sync(~0u, slot, group); };
      const int buffer = (of_keys ? 0 : 2) + ring.stage;
      copies.wait_free(barriers.free(buffer), ring.parity ^ 1);
      copy_step_by_half<Shape>(shared.buffer(buffer), cache, slot_of, step, row, keys);
      copies.tell(barriers.full(buffer));
      ring.advance(2);
    }
  }
  copies.tell_all();
}

}  // namespace octavo::cuda::prefill
