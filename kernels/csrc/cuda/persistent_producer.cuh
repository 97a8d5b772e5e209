// The warp that brings everything large through the ring, in the order in which it is used: of each
// layer the rows of qkv, cached keys and values, the rows of output, of gate and up, and of down.
// None of that depends on other blocks, so it never waits for them: memory stays busy.
#pragma once

#include "cuda/persistent_task.cuh"

namespace octavo::cuda::persistent {

// Arrivals that end a stage's filling: of the warp's lanes, whichever way they copy.
constexpr int kFillers = 32;

__device__ __forceinline__ void bring_rows(const Ring& ring, RingPosition& at, const void* w,
                                           const Portion& portion, uint64_t policy) {
  const auto* from = static_cast<const char*>(w);
  const int groups = portion.groups();
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    const char* row = from + int64_t(portion.row(group)) * portion.k * 2;
#pragma unroll 1
    for (int column = 0; column < portion.k; column += skinny::kColumns) {
      const uint32_t bytes = min(skinny::kColumns, portion.k - column) * 2;
      ring.wait_free(at);
      copy_rows(ring.stage(at), skinny::kPitch, row + column * 2, int64_t(portion.k) * 2, kGroup,
                bytes, ring.full(at), policy);
      if (threadIdx.x % 32 != 0) barrier_arrive(ring.full(at));
      at.advance(ring.stages);
    }
  }
}

// Where one token's keys are, in slots; looked up a stage ahead, because that takes as long as a
// stage's way. Entries of tokens that are not the item's are not read: they may be absurd.
__device__ __forceinline__ int slot_of(const Task& task, const Item& item, int token) {
  if (token >= item.end) return 0;
  const int block = __ldcg(task.rows.block_tables + item.row * task.rows.max_blocks +
                           (token >> task.block_shift));
  return (block << task.block_shift) + (token & ((1 << task.block_shift) - 1));
}

// By copies of 16 bytes: a head of a token is short, and the copy engine takes as long for it as
// for a matrix's row.
template <int kDim>
__device__ __forceinline__ void bring_tokens(const Task& task, const Ring& ring, RingPosition& at,
                                             const DecoderLayer& layer, const Item& item,
                                             uint64_t policy) {
  constexpr int kUnits = kDim / 8, kRows = 32 / kUnits;  // of 16 bytes; tokens at once
  const int lane = threadIdx.x % 32, unit = lane % kUnits;
  const int64_t offset = item.head * kDim * 2 + unit * 16;
  const int64_t pitch = int64_t(task.kv_heads) * kDim * 2;
  const char* keys = static_cast<const char*>(layer.keys) + offset;
  const char* values = static_cast<const char*>(layer.values) + offset;
  int slot = slot_of(task, item, item.begin + lane);
#pragma unroll 1
  for (int token = item.begin; token < item.end; token += kTokens) {
    const int next = slot_of(task, item, token + kTokens + lane);
    ring.wait_free(at);
    const uint32_t to = ring.stage(at) + unit * 16;
#pragma unroll 2
    for (int i = 0; i < kTokens; i += kRows) {
      const int row = i + lane / kUnits;
      const int64_t from = __shfl_sync(~0u, slot, row) * pitch;
      const bool there = token + row < item.end;
      copy_async(to + row * head_pitch(kDim), keys + from, there, policy);
      copy_async(to + (kTokens + row) * head_pitch(kDim), values + from, there, policy);
    }
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(ring.full(at))
                 : "memory");
    at.advance(ring.stages);
    slot = next;
  }
}

template <int kDim>
__device__ __forceinline__ void produce(const Task& task, const Shared& shared) {
  const Ring ring = shared.ring();
  const uint64_t once = evict_first_policy(), usual = keep_policy();
  Schedule& schedule = shared.schedules()[1];
  RingPosition at;
  for (int l = 0; l < task.num_layers; ++l) {
    const DecoderLayer& layer = shared.table()[l];
#pragma unroll 1
    for (int product = 0; product < kProducts; ++product) {
      bring_rows(ring, at, layer.matrices[product], portion_of(task, shared, kDim, product), once);
      if (product != kQkv) continue;
      if (l == 0) {
        wait_for_previous();  // lengths, tables and what is cached
        make_schedule(task, &schedule);
        __syncwarp();
      }
      for (int i = blockIdx.x; i < schedule.items; i += gridDim.x) {
        bring_tokens<kDim>(task, ring, at, layer, Item(schedule, task.kv_heads, i), usual);
      }
    }
  }
}

}  // namespace octavo::cuda::persistent
