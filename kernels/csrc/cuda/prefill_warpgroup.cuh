// Prefill for Hopper: the algorithm of FlashAttention-3 (Shah et al., arXiv 2407.08608) on paged
// keys and values. The results are prefill_attention.cuh's, but for rounding: steps are longer.
//
// A block stays on its multiprocessor and takes item after item. Its last four warps only copy
// (prefill_copies.cuh): queries, then keys and values, each into one of two buffers, as soon as
// those are free, so that the next item's are on their way while this one's end. Two groups of four
// warps compute, 64 rows each: a step's keys are multiplied in the background while the values of
// the step before are, and the softmax runs under that. Buffers change hands by mbarriers.
#pragma once

#include "cuda/launch.h"
#include "cuda/prefill_copies.cuh"
#include "cuda/prefill_softmax.cuh"

namespace octavo::cuda::prefill {

__device__ __forceinline__ void arrive_once_a_warp(uint32_t barrier) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// A computing warp's hold on the buffers that it reads, in the order in which they are filled.
struct Reader {
  Barriers barriers;
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
  Reader keys, values;
  int number;  // of the group: it has rows number * 64 ..

  __device__ explicit Group(const Shared<Shape>& shared)
      : shared(shared),
        keys{shared.barriers(), 0, {}},
        values{shared.barriers(), 2, {}},
        number(threadIdx.x / 128) {
    if (number == 1) give_turn();
  }

  // The groups issue products in turn, a step's at a time: while one's are computed, the other has
  // its softmax (FlashAttention-3 calls it ping-pong). Both pass the same number of turns, those of
  // steps that a group does not see among them; the last one given is nobody's.
  __device__ void take_turn() const {
    asm volatile("bar.sync %0, %1;" ::"r"(2 + number), "n"(kComputing) : "memory");
  }
  __device__ void give_turn() const {
    asm volatile("bar.arrive %0, %1;" ::"r"(3 - number), "n"(kComputing) : "memory");
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
      products_wait_after<0>(rows.sum[0][0] + rows.sum[0][1]);
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
