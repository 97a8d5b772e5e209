// Prefill for Hopper: the algorithm of FlashAttention-3 (Shah et al., arXiv 2407.08608) on paged
// keys and values. The results are prefill_attention.cuh's, but for rounding: steps are longer.
//
// A block stays on its multiprocessor and takes item after item. Its last four warps only copy:
// queries, then keys and values, each into one of two buffers, as soon as those are free, so that
// the next item's are on their way while this one's end. Two groups of four warps compute, 64 rows
// each: a step's keys are multiplied in the background while the values of the step before are,
// and the softmax runs under that. Buffers change hands by mbarriers.
//
// Keys are copied by cp.async, not by the tensor memory accelerator: it fills the slots that are
// not to be read with zeros by itself, for any size of a block.
#pragma once

#include "cuda/launch.h"
#include "cuda/prefill_attention.h"
#include "cuda/prefill_softmax.cuh"
#include "cuda/prefill_tile.cuh"
#include "cuda/warpgroup.cuh"

namespace octavo::cuda::prefill {

constexpr int kComputing = 256;  // threads that compute; then come those that copy
constexpr int kCopyRegisters = 40, kComputeRegisters = 232;

template <typename T, int kHeadDim, int kVariant>
struct WarpgroupShape {
  using Type = T;
  static constexpr bool kUnder = kVariant & 1;   // the softmax stays under the products
  static constexpr bool kApart = kVariant & 2;   // keys and values by warps of their own
  static constexpr bool kTurns = kVariant & 4;   // groups take turns
  static constexpr int kFillers = kApart ? kThreads / 2 : kThreads;  // of a buffer
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
template <typename Shape>
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
      barrier_init(full(buffer), Shape::kFillers);
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
  static constexpr int kBytes = kBarriers + Barriers<Shape>::kCount * 8;

  __device__ uint32_t queries() const { return shared_address(base); }
  // Buffers 0 and 1 are of keys, 2 and 3 of values.
  __device__ uint32_t buffer(int i) const { return queries() + (1 + i) * Shape::kBufferBytes; }
  __device__ Job<Shape>& job(int round) const {
    return reinterpret_cast<Job<Shape>*>(base + kJobs)[round % 2];
  }
  __device__ Barriers<Shape> barriers() const { return {queries() + kBarriers}; }
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
  const uint32_t member = copier() % 64 / 8, unit = copier() % 8;  // eight threads a row of a panel
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
  const Barriers<Shape> barriers = shared.barriers();
  const Turns turns(plan, batch.kv_heads);
  const uint32_t row = batch.kv_heads * Shape::kUnits, lane = threadIdx.x % 32;
  const int shift = __ffs(int(args.block_size)) - 1;
  const int own = copier() / 64;  // 0: keys, 1: values, where they are copied apart
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
    const T* const key_cache = static_cast<const T*>(args.key_cache) + kv_head * Shape::kDim;
    const T* const value_cache = static_cast<const T*>(args.value_cache) + kv_head * Shape::kDim;
    const T* const own_cache = own == 0 ? key_cache : value_cache;
    int slot = 0, block = 0;
    if constexpr (Shape::kApart) {
      block = first_block<Shape>(pages, first_step, lane, keys);
    } else {
      slot = pages.first_slot<Shape>(first_step, lane, keys);
    }

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
      int next_slot = 0;
      if constexpr (Shape::kApart) {
        slot = slot_in<Shape>(pages, block, step, lane);
        block = first_block<Shape>(pages, step + 1, lane, keys);
      } else {
        next_slot = pages.first_slot<Shape>(step + 1, lane, keys);
      }
      const auto slot_of = [&](uint32_t group) { return __shfl_sync(~0u, slot, group); };
      if constexpr (Shape::kApart) {
        const int buffer = 2 * own + ring.stage;
        copies.wait_free(barriers.free(buffer), ring.parity ^ 1);
        copy_step_by_half<Shape>(shared.buffer(buffer), own_cache, slot_of, step, row, keys);
        copies.tell(barriers.full(buffer));
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {  // keys, values
          const int buffer = 2 * half + ring.stage;
          copies.wait_free(barriers.free(buffer), ring.parity ^ 1);
          copy_step<Shape>(shared.buffer(buffer), half == 0 ? key_cache : value_cache, slot_of,
                           step, row, keys);
          copies.tell(barriers.full(buffer));
        }
      }
      ring.advance(2);
      if constexpr (!Shape::kApart) slot = next_slot;
    }
  }
  copies.tell_all();
}

__device__ __forceinline__ void arrive_once_a_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// A computing warp's hold on the buffers that it reads, in the order in which they are filled.
template <typename Shape>
struct Reader {
  Barriers<Shape> barriers;
  int first_buffer;  // 0: of keys, 2: of values
  RingPosition at;

  __device__ int buffer() const { return first_buffer + at.stage; }
  __device__ void wait() const { barrier_wait(barriers.full(buffer()), at.parity); }
  __device__ void release() {
    arrive_once_a_warp(barriers.free(buffer()));
    at.advance(2);
  }
};

// Issues scores = queries * keys.
template <typename Shape>
__device__ __forceinline__ void issue_scores(Scores<Shape>& scores, uint32_t queries,
                                             uint32_t keys) {
  products_begin();
#pragma unroll
  for (int k = 0; k < Shape::kDim / 16; ++k) {
    const uint32_t at = k / 4 * Shape::kPanelBytes + k % 4 * 32;
    multiply_panels<typename Shape::Type>(scores[0], panel_descriptor(queries + at, 16),
                                          panel_descriptor(keys + at, 16), k > 0);
  }
  products_end();
}

// Issues out += weights * values.
template <typename Shape>
__device__ __forceinline__ void issue_values(Accumulator<Shape>& rows,
                                             const Weights<Shape>& weights, uint32_t values) {
  products_begin();
#pragma unroll
  for (int k = 0; k < Shape::kKeys / 16; ++k) {
    multiply_across<typename Shape::Type>(
        rows.out[0], weights[0][k],
        panel_descriptor(values + k * 16 * Shape::kRowBytes, Shape::kPanelBytes));
  }
  products_end();
}

// Stores a lane's part of its rows; a row's 16 bytes by four lanes at once.
template <typename Shape>
__device__ __forceinline__ void store_out(const Accumulator<Shape>& rows, const Job<Shape>& job,
                                          void* out) {
  using T = typename Shape::Type;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x / 32 * Shape::kWarpRows + half * 8 + lane / 4;
    if (row >= job.rows) continue;
    const float sum = rows.sum[0][half];
    const float share = sum == 0 ? 0 : 1 / sum;  // nothing seen: zeros
    T* to = static_cast<T*>(out) + int64_t(job.table.out[row]) * 8 + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(to + n * 8) =
          pack<T>(rows.out[0][n][2 * half] * share, rows.out[0][n][2 * half + 1] * share);
    }
  }
}

// What a group of four warps keeps from item to item.
template <typename Shape>
struct Group {
  const Shared<Shape>& shared;
  Reader<Shape> keys, values;
  int number;  // of the group: it has rows number * 64 ..

  __device__ explicit Group(const Shared<Shape>& shared)
      : shared(shared),
        keys{shared.barriers(), 0, {}},
        values{shared.barriers(), 2, {}},
        number(threadIdx.x / 128) {
    if (Shape::kTurns && number == 1) give_turn();
  }

  // The groups issue products in turn, a step's at a time: while one's are computed, the other has
  // its softmax (FlashAttention-3 calls it ping-pong).
  __device__ void take_turn() const {
    if constexpr (Shape::kTurns) {
      asm volatile("bar.sync %0, %1;" ::"r"(2 + number), "n"(kComputing) : "memory");
    }
  }
  __device__ void give_turn() const {
    if constexpr (Shape::kTurns) {
      asm volatile("bar.arrive %0, %1;" ::"r"(3 - number), "n"(kComputing) : "memory");
    }
  }

  // Lets steps go by, keys and values in turn: there is room for two of each alone.
  __device__ void pass(int steps) {
    for (int i = 0; i < steps; ++i) {
      take_turn();
      give_turn();
      keys.wait();
      keys.release();
      values.wait();
      values.release();
    }
  }
};

// Scores, which a product has left, become weights.
template <typename Shape>
__device__ __forceinline__ bool weigh_step(Scores<Shape>& scores, Accumulator<Shape>& rows,
                                           float (&shrink)[1][2], const Job<Shape>& job,
                                           const Span& span, const Exponent& exponent, int step) {
  if (exponent.softcap > 0) cap<Shape>(scores, exponent);
  if (span.sees_not_all<Shape>(step * Shape::kKeys)) {
    mask<Shape>(scores, job.table.position, step * Shape::kKeys, span.window);
  }
  return weigh<Shape>(scores, rows, exponent, shrink);
}

// One item's keys.
template <typename Shape>
__device__ __forceinline__ void attend(Accumulator<Shape>& rows, Group<Shape>& group,
                                       const Job<Shape>& job, const Exponent& exponent,
                                       int window) {
  const Span span(job.table.position, group.number * 64, 64, job.rows, window);
  const uint32_t queries = group.shared.queries() + group.number * 64 * Shape::kRowBytes;
  const uint32_t queries_free = group.shared.barriers().queries_free();
  // The steps that any of these rows sees; the other buffers are passed over.
  int begin = job.first_step, end = job.end_step;
  while (begin < end && !span.sees<Shape>(begin * Shape::kKeys)) ++begin;
  while (end > begin && !span.sees<Shape>((end - 1) * Shape::kKeys)) --end;
  group.pass(begin - job.first_step);
  if (begin < end) {
    Scores<Shape> scores;
    Weights<Shape> weights;
    float shrink[1][2];
    group.keys.wait();
    group.take_turn();
    issue_scores<Shape>(scores, queries, group.shared.buffer(group.keys.buffer()));
    group.give_turn();
    products_wait<0>();
    settle(scores[0]);
    group.keys.release();
    weigh_step<Shape>(scores, rows, shrink, job, span, exponent, begin);
    pack_weights<Shape>(weights, scores);
    for (int step = begin + 1; step < end; ++step) {
      group.keys.wait();
      group.values.wait();  // of the step before
      group.take_turn();
      issue_scores<Shape>(scores, queries, group.shared.buffer(group.keys.buffer()));
      issue_values<Shape>(rows, weights, group.shared.buffer(group.values.buffer()));
      group.give_turn();
      products_wait<1>();
      settle(scores[0]);
      group.keys.release();
      const bool raised = weigh_step<Shape>(scores, rows, shrink, job, span, exponent, step);
      if constexpr (Shape::kUnder) {
        products_wait_after<0>(rows.sum[0][0] + rows.sum[0][1]);
      } else {
        products_wait<0>();
      }
      settle(weights[0]);
      settle(rows.out[0]);
      group.values.release();
      if (raised) scale_rows<Shape>(rows, shrink);
      pack_weights<Shape>(weights, scores);
    }
    arrive_once_a_warp(queries_free);
    group.values.wait();
    issue_values<Shape>(rows, weights, group.shared.buffer(group.values.buffer()));
    products_wait<0>();
    settle(rows.out[0]);
    group.values.release();
  } else {
    arrive_once_a_warp(queries_free);
  }
  group.pass(job.end_step - end);
}

// The life of a computing thread.
template <typename Shape>
__device__ __forceinline__ void compute_items(const PrefillAttention& args,
                                              const PrefillBatch& batch, const PrefillPlan& plan,
                                              const Shared<Shape>& shared) {
  const Exponent exponent(args);
  const Turns turns(plan, batch.kv_heads);
  Group<Shape> group(shared);
  for (int round = 0; turns.in(round); ++round) {
    barrier_wait(shared.barriers().ready(), round % 2);
    const Job<Shape>& job = shared.job(round);
    Accumulator<Shape> rows;
    begin<Shape>(rows, job.table, exponent, args.sinks != nullptr && job.part == 0);
    attend<Shape>(rows, group, job, exponent, args.window);
    reduce_sums<Shape>(rows);
    if (job.partial >= 0) {
      store_partial<Shape>(rows, plan, exponent,
                           int64_t(job.partial) * batch.kv_heads + job.kv_head, job.rows);
    } else {
      store_out<Shape>(rows, job, args.out);
    }
  }
}

template <typename Shape>
__global__ void __launch_bounds__(kComputing + kThreads, 1)
    prefill_warpgroup_kernel(const __grid_constant__ PrefillAttention args,
                             const __grid_constant__ PrefillBatch batch,
                             const __grid_constant__ PrefillPlan plan) {
  extern __shared__ __align__(1024) unsigned char panels[];
#if OCTAVO_HAS_WARPGROUPS
  const Shared<Shape> shared{panels};
  if (threadIdx.x == 0) shared.barriers().init();
  barrier_fence();
  __syncthreads();
  wait_for_previous();
  if (threadIdx.x >= kComputing) {
    give_registers_up<kCopyRegisters>();
    copy_items<Shape>(args, batch, plan, shared);
  } else {
    take_registers<kComputeRegisters>();
    compute_items<Shape>(args, batch, plan, shared);
  }
  allow_next();
#endif
}

}  // namespace octavo::cuda::prefill
