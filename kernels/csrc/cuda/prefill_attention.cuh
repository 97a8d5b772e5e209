// The prefill kernel: FlashAttention-2 (Dao, arXiv 2307.08691) on paged keys and values.
//
// A block of four warps holds a tile of query rows and walks over the keys of its item, kKeys at
// a time, with a running maximum. A warp owns 16 or 32 rows and sees all keys, so rows need no
// exchange between warps. Keys and values are copied in the background, each into two buffers:
// while one step is computed, the next one's are on their way.
//
// Rows of shared memory are padded by 16 bytes: then 8 rows at one column lie in different banks,
// for every head dim here (their 16-byte columns become odd in number).
//
// A row's bits depend only on its own keys and where a span begins: keys are taken in steps
// counted from position 0, and a step that a row does not see changes nothing.
#pragma once

#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/prefill_attention.h"

#include <math_constants.h>

namespace octavo::cuda::prefill {

constexpr int kThreads = 128;

template <typename T, int kHeadDim, int kTileRows>
struct TileShape {
  using Type = T;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = kTileRows;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // a step's
  static constexpr int kPitch = kDim + 8;             // elements from row to row
  static constexpr int kChunks = kDim / 8;            // of 16 bytes a row
  static constexpr int kBands = kRows / 64;           // of 16 rows a warp
  static constexpr int kWarpRows = 16 * kBands;
  static constexpr int kMaxIds = kKeys / 8;  // blocks that a step can touch: they hold 8 or more
  static constexpr int kQueryBytes = kRows * kPitch * 2;
  static constexpr int kStepBytes = kKeys * kPitch * 2;
  static constexpr int kShared = kQueryBytes + 4 * kStepBytes + 2 * kMaxIds * 4;
  static_assert(kDim % 16 == 0 && kChunks % 2 == 0 && kRows % 64 == 0);
};

// Copies 16 bytes, or 4, to shared memory in the background; zeros, and no read, unless `wanted`.
// Unlike decode's, these keys are read again by other blocks: they stay in the L2 cache.
__device__ __forceinline__ void copy_async_16(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(wanted ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(uint32_t to, const void* from, bool wanted) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
               "r"(wanted ? 4 : 0)
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

// The keys that a tile takes in, first..end, of which those before `seen` are behind all windows.
struct Keys {
  int first, end, seen;
};

// Copies a step's block ids; those of blocks that are not wanted stay unread.
template <typename Shape>
__device__ void copy_ids(uint32_t to, const int32_t* table, int step, int shift, const Keys& keys) {
  const int first = step * Shape::kKeys >> shift;
  const int count = max(1, Shape::kKeys >> shift);
  const int i = threadIdx.x;
  if (i >= count) return;
  const bool wanted = (first + i) << shift < keys.end && (first + i + 1) << shift > keys.seen;
  copy_async_4(to + i * 4, table + (wanted ? first + i : 0), wanted);
}

// Copies a step's keys (or values), zeros for those out of keys.seen..keys.end.
template <typename Shape>
__device__ void copy_step(uint32_t to, const typename Shape::Type* cache, const int32_t* ids,
                          int step, int shift, int row_stride, const Keys& keys) {
  constexpr int kChunks = Shape::kChunks;
  static_assert(Shape::kKeys * kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < Shape::kKeys * kChunks / kThreads; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    const int row = chunk / kChunks, column = chunk % kChunks * 8;
    const int position = step * Shape::kKeys + row;
    const bool wanted = position >= keys.seen && position < keys.end;
    const int64_t slot =
        (int64_t(ids[row >> shift]) << shift) + (position & ((1 << shift) - 1));
    copy_async_16(to + (row * Shape::kPitch + column) * 2,
                  cache + (wanted ? slot * row_stride : 0) + column, wanted);
  }
}

template <typename Shape>
__device__ void copy_queries(uint32_t to, const PrefillAttention& args, const Tile& tile,
                             int kv_head) {
  using T = typename Shape::Type;
  constexpr int kChunks = Shape::kChunks;
#pragma unroll 4
  for (int i = 0; i < Shape::kRows * kChunks / kThreads; ++i) {
    const int chunk = threadIdx.x + i * kThreads;
    const int row = chunk / kChunks, column = chunk % kChunks * 8;
    const bool wanted = row < tile.rows;
    const int head = kv_head * tile.group + tile.head(row);
    const T* from = static_cast<const T*>(args.query) +
                    (tile.begin + tile.token(row)) * args.query_stride + head * Shape::kDim;
    copy_async_16(to + (row * Shape::kPitch + column) * 2, from + column, wanted);
  }
}

// A lane's part of its warp's rows: rows lane / 4 and lane / 4 + 8 of each band.
template <typename Shape>
struct Accumulator {
  float out[Shape::kBands][Shape::kDim / 8][4];
  float maximum[Shape::kBands][2];  // of the row's scores
  float sum[Shape::kBands][2];      // of weights, this lane's share
};

template <typename Shape>
using Scores = float[Shape::kBands][Shape::kKeys / 8][4];

// Rounded weights as the left factor of a product: a result's layout is a factor's, two by two.
template <typename Shape>
using Weights = uint32_t[Shape::kBands][Shape::kKeys / 16][4];

// How scores become exponents: exp2(factor * score), after the cap.
struct Exponent {
  float factor, softcap, inner;  // inner: scale / softcap

  __device__ explicit Exponent(const PrefillAttention& args)
      : factor(args.softcap > 0 ? kLog2E : args.scale * kLog2E),
        softcap(args.softcap),
        inner(args.softcap > 0 ? args.scale / args.softcap : 0) {}
};

template <typename Shape>
__device__ __forceinline__ void multiply_keys(Scores<Shape>& scores, uint32_t queries,
                                              uint32_t keys) {
  const int lane = threadIdx.x % 32;
  const uint32_t query = queries + (lane % 16 * Shape::kPitch + lane / 16 * 8) * 2;
  const uint32_t key = keys + ((lane % 8 + lane / 16 * 8) * Shape::kPitch + lane / 8 % 2 * 8) * 2;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[band][n][i] = 0;
    }
  }
#pragma unroll
  for (int k = 0; k < Shape::kDim / 16; ++k) {
    uint32_t a[Shape::kBands][4];
#pragma unroll
    for (int band = 0; band < Shape::kBands; ++band) {
      load_matrices(a[band], query + (band * 16 * Shape::kPitch + k * 16) * 2);
    }
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 16; ++n) {
      uint32_t b[4];
      load_matrices(b, key + (n * 16 * Shape::kPitch + k * 16) * 2);
#pragma unroll
      for (int band = 0; band < Shape::kBands; ++band) {
        multiply_add<typename Shape::Type>(scores[band][2 * n], a[band], b[0], b[1]);
        multiply_add<typename Shape::Type>(scores[band][2 * n + 1], a[band], b[2], b[3]);
      }
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void cap(Scores<Shape>& scores, const Exponent& exponent) {
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int n = 0; n < Shape::kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[band][n][i] = exponent.softcap * tanh_of(scores[band][n][i] * exponent.inner);
      }
    }
  }
}

// Hides keys after a row's own position, and those behind its window.
template <typename Shape>
__device__ __forceinline__ void mask(Scores<Shape>& scores, const int (&at)[Shape::kBands][2],
                                     int first_key, int window) {
  const int column = first_key + threadIdx.x % 4 * 2;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int last = at[band][i / 2];
      const int behind = window > 0 ? last - window : -1;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        const int position = column + n * 8 + i % 2;
        if (position > last || position <= behind) scores[band][n][i] = -CUDART_INF_F;
      }
    }
  }
}

// Scores become weights; what was summed under the old maximum is brought to the new one.
template <typename Shape>
__device__ __forceinline__ void weigh(Weights<Shape>& weights, const Scores<Shape>& scores,
                                      Accumulator<Shape>& rows, const Exponent& exponent) {
  const float factor = exponent.factor;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = rows.maximum[band][half];
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        most = fmaxf(most, fmaxf(scores[band][n][2 * half], scores[band][n][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      // A row that has seen no key yet has no maximum; 0 keeps inf - inf out.
      const float base = most == -CUDART_INF_F ? 0 : most * factor;
      const float shrink = power_of_two(rows.maximum[band][half] * factor - base);
      rows.maximum[band][half] = most;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < Shape::kKeys / 8; ++n) {
        const float even = power_of_two(scores[band][n][2 * half] * factor - base);
        const float odd = power_of_two(scores[band][n][2 * half + 1] * factor - base);
        sum += even + odd;
        weights[band][n / 2][n % 2 * 2 + half] = pack<typename Shape::Type>(even, odd);
      }
      rows.sum[band][half] = rows.sum[band][half] * shrink + sum;
#pragma unroll
      for (int n = 0; n < Shape::kDim / 8; ++n) {
        rows.out[band][n][2 * half] *= shrink;
        rows.out[band][n][2 * half + 1] *= shrink;
      }
    }
  }
}

template <typename Shape>
__device__ __forceinline__ void multiply_values(Accumulator<Shape>& rows,
                                                const Weights<Shape>& weights, uint32_t values) {
  using T = typename Shape::Type;
  const int lane = threadIdx.x % 32;
  const uint32_t value = values + (lane % 16 * Shape::kPitch + lane / 16 * 8) * 2;
#pragma unroll
  for (int k = 0; k < Shape::kKeys / 16; ++k) {
#pragma unroll
    for (int n = 0; n < Shape::kDim / 16; ++n) {
      uint32_t b[4];
      load_matrices_transposed(b, value + (k * 16 * Shape::kPitch + n * 16) * 2);
#pragma unroll
      for (int band = 0; band < Shape::kBands; ++band) {
        multiply_add<T>(rows.out[band][2 * n], weights[band][k], b[0], b[1]);
        multiply_add<T>(rows.out[band][2 * n + 1], weights[band][k], b[2], b[3]);
      }
    }
  }
}

// Sinks take part as a first score that has no value.
template <typename Shape>
__device__ __forceinline__ void begin(Accumulator<Shape>& rows, const PrefillAttention& args,
                                      const Exponent& exponent, const Tile& tile, int kv_head,
                                      bool with_sinks) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.maximum[band][half] = -CUDART_INF_F;
      rows.sum[band][half] = 0;
      if (with_sinks) {
        const int row = threadIdx.x / 32 * Shape::kWarpRows + band * 16 + half * 8 + lane / 4;
        const float sink = args.sinks[kv_head * tile.group + tile.head(row)];
        rows.maximum[band][half] = sink * (kLog2E / exponent.factor);
        rows.sum[band][half] = lane % 4 == 0 ? 1 : 0;
      }
    }
#pragma unroll
    for (int n = 0; n < Shape::kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) rows.out[band][n][i] = 0;
    }
  }
}

// The whole sum of each row, in all four lanes that share it.
template <typename Shape>
__device__ __forceinline__ void reduce_sums(Accumulator<Shape>& rows) {
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& sum = rows.sum[band][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
    }
  }
}

// Divides, rounds and stores a warp's rows, through its own rows of `staging`, so that the
// stores are of 16 bytes.
template <typename Shape>
__device__ __forceinline__ void store_rows(const Accumulator<Shape>& rows,
                                           typename Shape::Type* staging,
                                           const PrefillAttention& args, const Tile& tile,
                                           int heads, int kv_head) {
  using T = typename Shape::Type;
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * Shape::kWarpRows;
  __syncwarp();
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = rows.sum[band][half];
      const float share = sum == 0 ? 0 : 1 / sum;  // nothing seen: zeros
      T* row = staging + (first + band * 16 + half * 8 + lane / 4) * Shape::kPitch + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kDim / 8; ++n) {
        *reinterpret_cast<uint32_t*>(row + n * 8) =
            pack<T>(rows.out[band][n][2 * half] * share, rows.out[band][n][2 * half + 1] * share);
      }
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = 0; i < Shape::kWarpRows * Shape::kChunks / 32; ++i) {
    const int chunk = lane + i * 32;
    const int row = first + chunk / Shape::kChunks, column = chunk % Shape::kChunks * 8;
    if (row >= tile.rows) break;
    const int head = kv_head * tile.group + tile.head(row);
    T* to = static_cast<T*>(args.out) +
            (int64_t(tile.begin + tile.token(row)) * heads + head) * Shape::kDim + column;
    *reinterpret_cast<uint4*>(to) =
        *reinterpret_cast<const uint4*>(staging + row * Shape::kPitch + column);
  }
}

// Stores what a span gave, for merge_spans to put together.
template <typename Shape>
__device__ __forceinline__ void store_partial(const Accumulator<Shape>& rows,
                                              const PrefillPlan& plan, const Exponent& exponent,
                                              int64_t index, int valid_rows) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x / 32 * Shape::kWarpRows + band * 16 + half * 8 + lane / 4;
      if (row >= valid_rows) continue;
      const int64_t at = index * Shape::kRows + row;
      if (lane % 4 == 0) {
        reinterpret_cast<float2*>(plan.partial_sums)[at] = make_float2(
            rows.maximum[band][half] * exponent.factor, rows.sum[band][half]);
      }
      float* to = plan.partial_out + at * Shape::kDim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < Shape::kDim / 8; ++n) {
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(rows.out[band][n][2 * half], rows.out[band][n][2 * half + 1]);
      }
    }
  }
}

// Where a warp's rows stand, and which steps it can pass over or need not mask.
template <typename Shape>
struct WarpRows {
  int at[Shape::kBands][2];
  int first, last, window;
  bool any;

  __device__ WarpRows(const Tile& tile, int window) : window(window) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * Shape::kWarpRows;
    any = row < tile.rows;
    first = tile.at(row);
    last = tile.at(row + Shape::kWarpRows - 1);
#pragma unroll
    for (int band = 0; band < Shape::kBands; ++band) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        at[band][half] = tile.at(row + band * 16 + half * 8 + lane / 4);
      }
    }
  }
  // Whether any row sees any of the step's keys.
  __device__ bool see(int key) const {
    return any && key <= last && (window == 0 || key + Shape::kKeys > first - window + 1);
  }
  // Whether some row does not see some of them.
  __device__ bool some_hidden(int key) const {
    return key + Shape::kKeys - 1 > first || (window > 0 && key <= last - window);
  }
};

template <typename Shape>
__global__ void __launch_bounds__(kThreads, 2)
    prefill_kernel(const __grid_constant__ PrefillAttention args,
                   const __grid_constant__ PrefillBatch batch,
                   const __grid_constant__ PrefillPlan plan) {
  using T = typename Shape::Type;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const staging = reinterpret_cast<T*>(shared);
  const uint32_t queries = shared_address(shared);
  const uint32_t keys_at = queries + Shape::kQueryBytes;
  const uint32_t values_at = keys_at + 2 * Shape::kStepBytes;
  const uint32_t ids_at = values_at + 2 * Shape::kStepBytes;
  const auto* ids = reinterpret_cast<const int32_t*>(shared + (ids_at - queries));

  wait_for_previous();
  if (int(blockIdx.y) >= plan.counts[0]) return;
  const PrefillItem item = plan.items[blockIdx.y];
  const int kv_head = blockIdx.x;
  const Tile tile = make_tile(batch, item, Shape::kRows);
  const int seen = args.window > 0 ? max(0, tile.at(0) - args.window + 1) : 0;
  const Keys keys{max(item.first, seen), item.end, seen};
  const int first_step = keys.first / Shape::kKeys;
  const int end_step = (keys.end + Shape::kKeys - 1) / Shape::kKeys;
  const int shift = __ffs(int(args.block_size)) - 1;
  const int row_stride = batch.kv_heads * Shape::kDim;
  const int32_t* table = args.block_tables + item.sequence * args.max_blocks;
  const T* key_cache = static_cast<const T*>(args.key_cache) + kv_head * Shape::kDim;
  const T* value_cache = static_cast<const T*>(args.value_cache) + kv_head * Shape::kDim;

  const auto copy_next_ids = [&](int step) {
    copy_ids<Shape>(ids_at + step % 2 * Shape::kMaxIds * 4, table, step, shift, keys);
  };
  const auto copy = [&](uint32_t to, const T* cache, int step) {
    copy_step<Shape>(to + step % 2 * Shape::kStepBytes, cache, ids + step % 2 * Shape::kMaxIds,
                     step, shift, row_stride, keys);
  };

  // Groups of copies: ids; queries and keys; values; then keys and values, step by step.
  if (first_step < end_step) {
    copy_next_ids(first_step);
    copy_next_ids(first_step + 1);
    commit_copies();
    copy_queries<Shape>(queries, args, tile, kv_head);
    wait_copies<0>();
    __syncthreads();
    copy(keys_at, key_cache, first_step);
    commit_copies();
    copy(values_at, value_cache, first_step);
    commit_copies();
  }

  const Exponent exponent(args);
  const WarpRows<Shape> warp(tile, args.window);
  const uint32_t own = queries + threadIdx.x / 32 * Shape::kWarpRows * Shape::kPitch * 2;
  Accumulator<Shape> rows;
  begin<Shape>(rows, args, exponent, tile, kv_head, args.sinks != nullptr && item.part <= 0);
  for (int step = first_step; step < end_step; ++step) {
    const int key = step * Shape::kKeys;
    const uint32_t buffer = step % 2 * Shape::kStepBytes;
    const bool more = step + 1 < end_step;
    wait_copies<1>();
    __syncthreads();  // this step's keys are here; no warp is in the last step any more
    if (more) {
      copy(keys_at, key_cache, step + 1);
      copy_next_ids(step + 2);
    }
    commit_copies();
    const bool see = warp.see(key);
    Weights<Shape> weights;
    if (see) {
      Scores<Shape> scores;
      multiply_keys<Shape>(scores, own, keys_at + buffer);
      if (exponent.softcap > 0) cap<Shape>(scores, exponent);
      if (warp.some_hidden(key)) mask<Shape>(scores, warp.at, key, args.window);
      weigh<Shape>(weights, scores, rows, exponent);
    }
    wait_copies<1>();
    __syncthreads();  // its values
    if (more) copy(values_at, value_cache, step + 1);
    commit_copies();
    if (see) multiply_values<Shape>(rows, weights, values_at + buffer);
  }
  allow_next();
  wait_copies<0>();
  reduce_sums<Shape>(rows);
  if (item.partial >= 0) {
    store_partial<Shape>(rows, plan, exponent,
                         int64_t(item.partial) * batch.kv_heads + kv_head, tile.rows);
  } else {
    store_rows<Shape>(rows, staging, args, tile, batch.heads, kv_head);
  }
}

// Launches the kernel for one shape.
template <typename Shape>
void launch_shape(const PrefillAttention& args, const PrefillBatch& batch,
                    const PrefillPlan& plan, cudaStream_t stream) {
  static const bool allowed = allow_shared(prefill_kernel<Shape>, Shape::kShared);
  (void)allowed;
  launch(prefill_kernel<Shape>, dim3(batch.kv_heads, plan.sizes.max_items), kThreads,
         Shape::kShared, stream, args, batch, plan);
}

}  // namespace octavo::cuda::prefill
