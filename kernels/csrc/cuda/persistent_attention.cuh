// Attention of a layer: each block takes a chunk of a sequence's cached tokens under one key head
// from the ring, with the queries of that head's group as the rows of the products. The block with
// a sequence's last chunk also stores the new key and value, and takes them along. Chunks are put
// together by warps of which every block has some (split KV, FlashDecoding).
#pragma once

#include "cuda/persistent_task.cuh"
#include "cuda/vector.cuh"

#include <cmath>

namespace octavo::cuda::persistent {

// What does not change in a pass through a layer.
struct Pass {
  const DecoderLayer& layer;
  int number;  // of the layer
  uint32_t tag;
};

// A head of the fused projection as words, a lane's two: elements 2 * lane and the next, and those
// half a head away, with which they turn.
struct HeadPart {
  uint32_t low = 0, high = 0;
};

template <typename T>
__device__ __forceinline__ HeadPart turned(HeadPart part, float2 cos, float2 sin) {
  const float2 a = skinny::widen<T>(part.low), b = skinny::widen<T>(part.high);
  // Products are rounded before they are added, as in heads.cu.
  const auto less = [](float x, float c, float y, float s) {
    return __fsub_rn(__fmul_rn(x, c), __fmul_rn(y, s));
  };
  const auto more = [](float y, float c, float x, float s) {
    return __fadd_rn(__fmul_rn(y, c), __fmul_rn(x, s));
  };
  return {pack<T>(less(a.x, cos.x, b.x, sin.x), less(a.y, cos.y, b.y, sin.y)),
          pack<T>(more(b.x, cos.x, a.x, sin.x), more(b.y, cos.y, a.y, sin.y))};
}

// One head by one warp: from the words of qkv, normed and turned where it is a query or a key.
template <typename T, int kDim>
__device__ __forceinline__ HeadPart take_head(const Task& task, const Pass& pass, int row,
                                              int64_t position, int head, const void* norm,
                                              bool turns) {
  constexpr int kLanes = kDim / 4;
  const int lane = threadIdx.x % 32, columns = (task.heads + 2 * task.kv_heads) * kDim;
  const bool live = lane < kLanes;
  const auto* weight = static_cast<const uint32_t*>(norm);
  HeadPart weights;
  float2 cos{}, sin{};
  if (live && norm) weights = {__ldg(weight + lane), __ldg(weight + kLanes + lane)};
  if (live && turns) {
    const auto* angles = reinterpret_cast<const float2*>(task.stack.cos_sin + position * kDim);
    cos = __ldg(angles + lane), sin = __ldg(angles + kLanes + lane);
  }
  HeadPart part;
  if (live) {
    const Word* words = task.exchange.qkv + (int64_t(row) * columns + head * kDim) / 2 + lane;
    Patience patience;
    for (;;) {
      const Word low = peek(words), high = peek(words + kLanes);
      part = {uint32_t(low), uint32_t(high)};
      if (uint32_t(low >> 32) == pass.tag && uint32_t(high >> 32) == pass.tag) break;
      patience.spend();
    }
  }
  __syncwarp();
  if (norm) {
    const float squares = sum_lanes(skinny::square<T>(part.low) + skinny::square<T>(part.high));
    const float scale = rsqrtf(squares / float(kDim) + task.stack.norm_eps);
    const float offset = task.stack.norm_offset;
    part = {skinny::norm_pair<T>(part.low, weights.low, scale, offset),
            skinny::norm_pair<T>(part.high, weights.high, scale, offset)};
  }
  return turns ? turned<T>(part, cos, sin) : part;
}

template <int kDim>
__device__ __forceinline__ void put_head(HeadPart part, void* to) {
  const int lane = threadIdx.x % 32;
  if (lane >= kDim / 4) return;
  auto* words = static_cast<uint32_t*>(to);
  words[lane] = part.low;
  words[kDim / 4 + lane] = part.high;
}

// The item's queries, and with the last chunk the new key and value, to shared memory, the latter
// two to the cache as well; a warp a head.
template <typename T, int kDim>
__device__ __forceinline__ void take_heads(const Task& task, const Pass& pass, const Item& item,
                                           const Schedule& schedule, uint8_t* heads) {
  const int group = task.group, count = group + (item.last ? 2 : 0);
#pragma unroll 1
  for (int i = threadIdx.x / 32; i < count; i += kWarps) {
    const bool query = i < group, key = i == group;
    const int head = query ? item.head * group + i
                           : task.heads + item.head + (key ? 0 : task.kv_heads);
    const void* norm = query ? pass.layer.query_norm : key ? pass.layer.key_norm : nullptr;
    const auto part = take_head<T, kDim>(task, pass, item.row, schedule.positions[item.row], head,
                                         norm, query || key);
    put_head<kDim>(part, heads + (query ? i : kMostGroup + (key ? 0 : 1)) * head_pitch(kDim));
    if (query) continue;
    const int64_t slot = schedule.slots[item.row];
    if (slot < 0) continue;
    auto* plane = static_cast<char*>(key ? pass.layer.keys : pass.layer.values);
    put_head<kDim>(part, plane + (slot * task.kv_heads + item.head) * kDim * 2);
  }
}

// A running softmax of a warp (Milakov and Gimelshein, arXiv 1805.02867) over the heads
// 2 * (lane % 4) and the next. `sum` is over the lane's tokens alone; `values` are of dims
// 16 j + lane / 4, two heads, and of the dims 8 behind.
template <int kDim>
struct Running {
  float largest[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};
  float values[kDim / 16][4] = {};
};

// What a lane holds of the queries: heads are the columns of the products with keys.
template <int kDim>
struct Queries {
  uint32_t part[kDim / 16][2];

  __device__ __forceinline__ explicit Queries(const uint8_t* heads) {
    const int lane = threadIdx.x % 32;
    const auto* from = heads + lane / 4 * head_pitch(kDim) + lane % 4 * 4;
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      part[k][0] = *reinterpret_cast<const uint32_t*>(from + k * 32);
      part[k][1] = *reinterpret_cast<const uint32_t*>(from + k * 32 + 16);
    }
  }
};

// Of an 8 x 8 matrix of which lane l holds row l / 4, columns 2 * (l % 4) and the next.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Takes up to 16 tokens into the softmax. Tokens are the rows of the products with keys and heads
// the columns, so that few heads waste little. Beyond `count` the last token stands in with a
// weight of 0: what lies there may be anything, NaN too.
template <typename T, int kDim>
__device__ __forceinline__ void take_tokens(Running<kDim>& running, const Queries<kDim>& queries,
                                            uint32_t keys, uint32_t values, int count,
                                            float scale) {
  const int lane = threadIdx.x % 32;
  const int key_row = min(lane % 16, count - 1);
  const int value_row = min(lane / 16 * 8 + lane % 8, count - 1);
  const uint32_t key = keys + key_row * head_pitch(kDim) + lane / 16 * 16;
  const uint32_t value = values + value_row * head_pitch(kDim) + lane / 8 % 2 * 16;
  float scores[4] = {}, more[4] = {};  // two chains of products, each waiting for the one before
#pragma unroll
  for (int k = 0; k < kDim / 16; ++k) {
    uint32_t of[4];
    load_matrices(of, key + k * 32);
    multiply_add<T>(k % 2 ? more : scores, of, queries.part[k][0], queries.part[k][1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] += more[i];
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool low = lane / 4 < count, high = lane / 4 + 8 < count;
    scores[h] = low ? scores[h] * scale : -INFINITY;
    scores[h + 2] = high ? scores[h + 2] * scale : -INFINITY;
    float largest = fmaxf(scores[h], scores[h + 2]);
#pragma unroll
    for (int apart = 4; apart < 32; apart *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, apart));
    }
    largest = fmaxf(largest, running.largest[h]);
    factor[h] = power_of_two(running.largest[h] - largest);
    running.largest[h] = largest;
    scores[h] = power_of_two(scores[h] - largest);
    scores[h + 2] = power_of_two(scores[h + 2] - largest);
    running.sum[h] = running.sum[h] * factor[h] + (scores[h] + scores[h + 2]);
  }
  const uint32_t low = transposed(pack<T>(scores[0], scores[1]));
  const uint32_t high = transposed(pack<T>(scores[2], scores[3]));
#pragma unroll
  for (int j = 0; j < kDim / 16; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) running.values[j][i] *= factor[i % 2];
    uint32_t of[4];
    load_matrices_transposed(of, value + j * 32);
    multiply_add<T>(running.values[j], of, low, high);
  }
}

// All of the item's tokens, tiles of 16 in turn to the warps; how many of the warps had one. The
// new token is a tile of its own.
template <typename T, int kDim, int kLanes>
__device__ __forceinline__ int take_item(const Task& task, const Item& item, const Shared& shared,
                                         RingPosition& at, Running<kDim>& running) {
  constexpr int kTile = 16, kPitch = head_pitch(kDim), kOfStage = kTokens / kTile;
  const Ring ring = shared.ring();
  const Queries<kDim> queries(shared.heads());
  const int warp = threadIdx.x / 32, cached = item.end - item.begin;
  const int stages = (cached + kTokens - 1) / kTokens, tiles = (cached + kTile - 1) / kTile;
#pragma unroll 1
  for (int s = 0; s < stages + item.last; ++s) {
    const bool fresh = s == stages;
    const int tile = fresh ? tiles : s * kOfStage + warp % kOfStage;
    const bool mine = tile % kWarps == warp && tile < tiles + fresh;
    if (!fresh) ring.wait_filled(at);
    if (mine) {
      const uint32_t keys = fresh ? shared_address(shared.heads()) + kMostGroup * kPitch
                                  : ring.stage(at) + warp % kOfStage * kTile * kPitch;
      const uint32_t values = keys + (fresh ? 1 : kTokens) * kPitch;
      const int count = fresh ? 1 : min(cached - tile * kTile, kTile);
      take_tokens<T, kDim>(running, queries, keys, values, count, task.scale);
    }
    if (fresh) break;
    ring.release<kLanes>(at);
    at.advance(ring.stages);
  }
  return min(tiles + item.last, kWarps);
}

// Sums of weighted values relative to `largest`, put together one after the other.
struct Total {
  float largest = -INFINITY, sum = 0;
  float2 value = {0, 0};

  __device__ __forceinline__ void add(float2 softmax, float2 values) {
    const float top = fmaxf(largest, softmax.x);
    const float before = rescale(largest, top), now = rescale(softmax.x, top);
    largest = top;
    sum = sum * before + softmax.y * now;
    value.x = value.x * before + values.x * now;
    value.y = value.y * before + values.y * now;
  }
  // Nothing known yet is a factor 0.
  static __device__ __forceinline__ float rescale(float mine, float top) {
    return mine == -INFINITY ? 0.0f : power_of_two(mine - top);
  }
  // Takes in what the lane so far away has.
  __device__ __forceinline__ void add_lane(int apart) {
    const float2 softmax = {__shfl_xor_sync(~0u, largest, apart),
                            __shfl_xor_sync(~0u, sum, apart)};
    add(softmax, {__shfl_xor_sync(~0u, value.x, apart), __shfl_xor_sync(~0u, value.y, apart)});
  }
  template <typename T>
  __device__ __forceinline__ uint32_t result() const {
    const float factor = __fdividef(1.0f, sum);
    return pack<T>(value.x * factor, value.y * factor);
  }
};

// Where the words of an item's head are; behind its `dim` sums the largest score and the weights.
template <int kDim>
__device__ __forceinline__ Word* part_of(const Task& task, int item, int head) {
  return task.exchange.parts + (int64_t(item) * task.group + head) * (kDim + 2);
}

template <int kDim>
__device__ __forceinline__ void put_mixed(const Task& task, const Pass& pass, int row, int head,
                                          int column, uint32_t data) {
  const int64_t place = ((int64_t(row) * task.heads + head) * kDim + column) / 2;
  task.exchange.mixed.put(place, data, pass.tag);
}

// Puts the first `warps` warps' sums together, in their order: to the output where the item is all
// of its sequence, or else to the words of its part.
template <typename T, int kDim>
__device__ __forceinline__ void put_together(const Task& task, const Pass& pass, const Item& item,
                                             Running<kDim>& running, int warps,
                                             const Shared& shared) {
  constexpr int kWide = kDim + kPad;
  const int group = task.group, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* values = reinterpret_cast<float*>(shared.scratch());
  auto* softmaxes = reinterpret_cast<float2*>(values + kWarps * group * kWide);
  if (warp < warps) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = running.sum[h];
#pragma unroll
      for (int apart = 4; apart < 32; apart *= 2) sum += __shfl_xor_sync(~0u, sum, apart);
      const int head = lane % 4 * 2 + h, place = warp * group + head;
      if (head < group) {
        if (lane < 4) softmaxes[place] = {running.largest[h], sum};
        float* to = values + place * kWide + lane / 4;
#pragma unroll
        for (int j = 0; j < kDim / 16; ++j) {
          to[j * 16] = running.values[j][h];
          to[j * 16 + 8] = running.values[j][h + 2];
        }
      }
    }
  }
  sync_first(kThreads);
#pragma unroll 1
  for (int i = threadIdx.x; i < group * kDim / 2; i += kThreads) {
    const int head = i / (kDim / 2), column = i % (kDim / 2) * 2;
    Total total;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) {
      const int place = w * group + head;
      total.add(softmaxes[place],
                *reinterpret_cast<const float2*>(values + place * kWide + column));
    }
    if (item.chunks == 1) {
      put_mixed<kDim>(task, pass, item.row, item.head * group + head, column,
                      total.result<T>());
      continue;
    }
    Word* to = part_of<kDim>(task, item.number, head);
    put_floats(to + column, total.value, pass.tag);
    if (column == 0) put_floats(to + kDim, {total.largest, total.sum}, pass.tag);
  }
  sync_first(kThreads);  // what was shared may be overwritten
}

constexpr int kCombined = 16;  // columns that a warp combines, two a lane of every eight

// Puts the chunks of a row's head together: every fourth by the same eight lanes, in their order,
// then those of four such lanes.
template <typename T, int kDim>
__device__ __forceinline__ void combine(const Task& task, const Pass& pass,
                                        const Schedule& schedule, int row, int head, int column) {
  constexpr int kBatch = 4, kShares = 4;
  const int chunks = (schedule.first[row + 1] - schedule.first[row]) / task.kv_heads;
  if (chunks == 1) return;
  const int share = threadIdx.x % 32 / 8, step = kShares * task.kv_heads;
  column += threadIdx.x % 8 * 2;
  int item = schedule.first[row] + head / task.group + share * task.kv_heads;
  Total total;
#pragma unroll 1
  for (int c = share; c < chunks; c += kBatch * kShares, item += kBatch * step) {
    WordPair softmaxes[kBatch], values[kBatch];
    Patience patience;
    for (bool ready = false; !ready;) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (c + i * kShares >= chunks) break;
        const Word* part = part_of<kDim>(task, item + i * step, head % task.group);
        softmaxes[i] = peek_pair(part + kDim);
        values[i] = peek_pair(part + column);
      }
      ready = true;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (c + i * kShares >= chunks) break;
        ready &= softmaxes[i].are_of(pass.tag) && values[i].are_of(pass.tag);
      }
      if (!ready) patience.spend();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (c + i * kShares < chunks) total.add(softmaxes[i].floats(), values[i].floats());
    }
  }
  __syncwarp();
  total.add_lane(8);
  total.add_lane(16);
  if (share != 0) return;
  // A row of padding has no chunks, and zeros.
  put_mixed<kDim>(task, pass, row, head, column, chunks ? total.result<T>() : 0);
}

// A layer's attention; all consumers. Blocks without an item begin with the chunks of others.
template <typename T, int kDim, int kLanes>
__device__ __forceinline__ void attend(const Task& task, const Pass& pass, const Shared& shared,
                                       RingPosition& at) {
  const Schedule& schedule = shared.schedules()[0];
#pragma unroll 1
  for (int i = blockIdx.x; i < schedule.items; i += gridDim.x) {
    const Item item(schedule, task.kv_heads, i);
    take_heads<T, kDim>(task, pass, item, schedule, shared.heads());
    sync_first(kThreads);
    Running<kDim> running;
    const int warps = take_item<T, kDim, kLanes>(task, item, shared, at, running);
    put_together<T, kDim>(task, pass, item, running, warps, shared);
  }
  constexpr int kParts = kDim / kCombined;
  const int count = task.num_rows * task.heads * kParts;
  const int begin = threadIdx.x / 32 * gridDim.x + (gridDim.x - 1 - blockIdx.x);
#pragma unroll 1
  for (int i = begin; i < count; i += kWarps * gridDim.x) {
    const int head = i / kParts, column = i % kParts * kCombined;
    combine<T, kDim>(task, pass, schedule, head / task.heads, head % task.heads, column);
  }
}

}  // namespace octavo::cuda::persistent
