// The warp that brings everything large through the ring, in the order in which it is used: of each
// layer the rows of qkv, cached keys and values, the rows of output, of gate and up, and of down,
// then the head's where logits are wanted. None of that depends on other blocks, so it never waits
// for them: memory stays busy.
#pragma once

#include "cuda/persistent_task.cuh"

namespace octavo::cuda::persistent {

// Arrivals that end a stage's filling: of the warp's lanes, whichever way they copy.
constexpr int kFillers = 32;

// Stages under way that keep memory busy: behind more of them, the words that blocks wait for would
// queue for as long as all of those take. Of layers it may be fewer, see waits_for_words().
constexpr int kStreaming = 3;
// A chunk of more cached tokens is brought by copies of 16 bytes, where words are waited for.
constexpr int kEngineTokens = 96;

// Where the producer stands: no more stages than `most` are under way at once.
struct Front {
  int most;
  RingPosition at, landing;
  int under_way = 0;

  __device__ __forceinline__ void begin_stage(const Ring& ring) {
    ring.wait_free(at);
    if (under_way >= most) {
      ring.wait_filled(landing);
      landing.advance(ring.stages);
    } else {
      ++under_way;
    }
  }
};

__device__ __forceinline__ void bring_rows(const Ring& ring, Front& front, const void* w,
                                           const Portion& portion, uint64_t policy) {
  RingPosition& at = front.at;
  const auto* from = static_cast<const char*>(w);
  const int groups = portion.groups();
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    const char* row = from + int64_t(portion.row(group)) * portion.k * 2;
#pragma unroll 1
    for (int column = 0; column < portion.k; column += skinny::kColumns) {
      const uint32_t bytes = min(skinny::kColumns, portion.k - column) * 2;
      front.begin_stage(ring);
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

// A head of up to 32 tokens, a token a lane, by the copy engine.
template <int kDim>
__device__ __forceinline__ void copy_heads(uint32_t to, const char* keys, const char* values,
                                           bool there, uint32_t full, uint64_t policy) {
  constexpr uint32_t kBytes = kDim * 2;
  const int lane = threadIdx.x % 32;
  const uint32_t bytes = __popc(__ballot_sync(~0u, there)) * 2 * kBytes;
  if (lane == 0) expect_bytes(full, bytes);
  __syncwarp();
  to += lane * head_pitch(kDim);
  if (there) {
    copy_bulk(to, keys, kBytes, full, policy);
    copy_bulk(to + kTokens * head_pitch(kDim), values, kBytes, full, policy);
  }
  if (lane != 0) barrier_arrive(full);
}

// The same by copies of 16 bytes, each token by as many lanes as it has of those.
template <int kDim>
__device__ __forceinline__ void copy_units(uint32_t to, const char* keys, const char* values,
                                           int64_t offset, bool there, uint32_t full,
                                           uint64_t policy) {
  constexpr int kUnits = kDim / 8, kRows = 32 / kUnits;  // units a token, tokens at once
  const int lane = threadIdx.x % 32, unit = lane % kUnits * 16;
#pragma unroll 2
  for (int i = 0; i < kTokens; i += kRows) {
    const int row = i + lane / kUnits;
    const int64_t from = __shfl_sync(~0u, offset, row) + unit;
    const bool has = __shfl_sync(~0u, int(there), row);
    copy_async(to + row * head_pitch(kDim) + unit, keys + from, has, policy);
    copy_async(to + (kTokens + row) * head_pitch(kDim) + unit, values + from, has, policy);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full) : "memory");
}

// The copy engine takes about 27 ns for a head of a token, as long as for a row of a matrix: it
// suits short chunks. Copies of 16 bytes are quicker in great numbers, but while they are on their
// way all that follows is later: they take the road of the words that consumers ask for. H100, us
// with the engine and without by tokens of a chunk, 28 layers of 0.6B: 1 540 and 540, 64 551 and
// 624, 96 633 and 666, 160 742 and 755, 320 1037 and 810; 32 of 8B: 64 4954 and 4984, 96 5165 and
// 5099.
template <int kDim>
__device__ __forceinline__ void bring_tokens(const Task& task, const Ring& ring, Front& front,
                                             const DecoderLayer& layer, const Item& item,
                                             bool by_engine, uint64_t policy) {
  const int lane = threadIdx.x % 32;
  const int64_t pitch = int64_t(task.kv_heads) * kDim * 2;
  const char* keys = static_cast<const char*>(layer.keys) + item.head * kDim * 2;
  const char* values = static_cast<const char*>(layer.values) + item.head * kDim * 2;
  int slot = slot_of(task, item, item.begin + lane);
#pragma unroll 1
  for (int token = item.begin; token < item.end; token += kTokens) {
    const int next = slot_of(task, item, token + kTokens + lane);
    const int64_t offset = slot * pitch;
    const bool there = token + lane < item.end;
    front.begin_stage(ring);
    const uint32_t to = ring.stage(front.at), full = ring.full(front.at);
    if (by_engine) {
      copy_heads<kDim>(to, keys + offset, values + offset, there, full, policy);
    } else {
      copy_units<kDim>(to, keys, values, offset, there, full, policy);
    }
    front.at.advance(ring.stages);
    slot = next;
  }
}

template <int kDim>
__device__ __forceinline__ void produce(const Task& task, const Shared& shared) {
  const Ring ring = shared.ring();
  const uint64_t once = evict_first_policy(), usual = keep_policy();
  Schedule& schedule = shared.schedules()[1];
  Front front{task.ahead};
#pragma unroll 1
  for (int l = 0; l < task.passes(); ++l) {
    const bool head = l == task.num_layers;
    const DecoderLayer& layer = shared.table()[min(l, task.num_layers - 1)];
    if (head) front.most = kStreaming;
#pragma unroll 1
    for (int product = head ? kHead : kQkv; product < kProducts + head; ++product) {
      const void* w = head ? task.stack.head : layer.matrices[product];
      bring_rows(ring, front, w, portion_of(task, shared, kDim, product), once);
      if (product != kQkv) continue;
      if (l == 0) {
        wait_for_previous();  // lengths, tables and what is cached
        // What was stored in the cache can be seen by the copy engine, too.
        asm volatile("fence.proxy.async;" ::: "memory");
        make_schedule(task, &schedule);
        __syncwarp();
      }
      const bool by_engine = schedule.chunk <= task.engine_tokens;
      for (int i = blockIdx.x; i < schedule.items; i += gridDim.x) {
        const Item item(schedule, task.kv_heads, i);
        bring_tokens<kDim>(task, ring, front, layer, item, by_engine, usual);
      }
    }
  }
}

}  // namespace octavo::cuda::persistent
