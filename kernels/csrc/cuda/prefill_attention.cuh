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
#include "cuda/prefill_softmax.cuh"
#include "cuda/prefill_tile.cuh"

namespace octavo::cuda::prefill {

template <typename T, int kHeadDim, int kTileRows>
struct TileShape {
  using Type = T;
  static constexpr int kDim = kHeadDim;
  static constexpr int kRows = kTileRows;
  static constexpr int kKeys = kDim > 128 ? 32 : 64;  // a step's
  static constexpr int kPitch = kDim + 8;             // elements from row to row
  static constexpr int kRowBytes = kPitch * 2;
  static constexpr int kUnits = kDim / 8;             // of 16 bytes a row
  // Threads that copy a row together, and rows that all of them copy at once.
  static constexpr int kTeam = kUnits <= 8 ? 8 : kUnits <= 16 ? 16 : 32;
  static constexpr int kTeams = kThreads / kTeam;
  static constexpr int kBands = kRows / 64;           // of 16 rows a warp
  static constexpr int kWarpRows = 16 * kBands;
  static constexpr int kQueryBytes = kRows * kPitch * 2;
  static constexpr int kStepBytes = kKeys * kPitch * 2;
  static constexpr int kGroups = kKeys / 8;           // of adjacent keys
  static constexpr int kShared = kQueryBytes + 4 * kStepBytes + (4 * kRows + 2 * kGroups) * 4;

  static __device__ uint32_t place(uint32_t row, uint32_t unit) {
    return row * kRowBytes + unit * 16;
  }
  static_assert(kDim % 16 == 0 && kRows % 64 == 0 && kRows <= kThreads);
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

// Divides, rounds and stores a warp's rows, through its own rows of `staging`, so that the
// stores are of 16 bytes.
template <typename Shape>
__device__ __forceinline__ void store_rows(const Accumulator<Shape>& rows,
                                           typename Shape::Type* staging,
                                           const RowTable<Shape>& table, void* out,
                                           int valid_rows) {
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
  const int unit = lane % Shape::kTeam;
  if (unit >= Shape::kUnits) return;
#pragma unroll 4
  for (int i = lane / Shape::kTeam; i < Shape::kWarpRows; i += 32 / Shape::kTeam) {
    const int row = first + i;
    if (row >= valid_rows) break;
    static_cast<uint4*>(out)[table.out[row] + unit] =
        *reinterpret_cast<const uint4*>(staging + row * Shape::kPitch + unit * 8);
  }
}

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
  auto& table = *reinterpret_cast<RowTable<Shape>*>(shared + Shape::kQueryBytes +
                                                    4 * Shape::kStepBytes);
  auto* slots = reinterpret_cast<int32_t*>(&table + 1);  // [2][kGroups]

  wait_for_previous();
  if (int(blockIdx.y) >= plan.counts[0]) return;
  const PrefillItem item = plan.items[blockIdx.y];
  const int kv_head = blockIdx.x;
  const Tile tile = make_tile(batch, item, Shape::kRows);
  const int seen = args.window > 0 ? max(0, tile.at(0) - args.window + 1) : 0;
  const Keys keys{max(item.first, seen), item.end, seen};
  const int first_step = keys.first / Shape::kKeys;
  const int end_step = (keys.end + Shape::kKeys - 1) / Shape::kKeys;
  const Pages pages{args.block_tables + item.sequence * args.max_blocks,
                    __ffs(int(args.block_size)) - 1};
  const uint32_t row = batch.kv_heads * Shape::kUnits;
  const T* key_cache = static_cast<const T*>(args.key_cache) + kv_head * Shape::kDim;
  const T* value_cache = static_cast<const T*>(args.value_cache) + kv_head * Shape::kDim;

  const auto keep_slot = [&](int step, int slot) {
    if (threadIdx.x < Shape::kGroups) slots[step % 2 * Shape::kGroups + threadIdx.x] = slot;
  };
  const auto copy = [&](uint32_t to, const T* cache, int step) {
    const auto slot_of = [&](uint32_t group) {
      return slots[step % 2 * Shape::kGroups + group];
    };
    copy_step<Shape>(to + step % 2 * Shape::kStepBytes, cache, slot_of, step, row, keys);
    commit_copies();
  };

  fill<Shape>(table, tile, args, batch.heads, kv_head);
  keep_slot(first_step, pages.first_slot<Shape>(first_step, threadIdx.x, keys));
  keep_slot(first_step + 1, pages.first_slot<Shape>(first_step + 1, threadIdx.x, keys));
  __syncthreads();
  // Groups of copies: queries and keys; values; then keys and values, step by step.
  if (first_step < end_step) {
    copy_queries<Shape>(queries, table, args.query, tile.rows);
    copy(keys_at, key_cache, first_step);
    copy(values_at, value_cache, first_step);
  }

  const Exponent exponent(args);
  const Span warp(table.position, threadIdx.x / 32 * Shape::kWarpRows, Shape::kWarpRows,
                  tile.rows, args.window);
  const uint32_t own = queries + threadIdx.x / 32 * Shape::kWarpRows * Shape::kPitch * 2;
  Accumulator<Shape> rows;
  begin<Shape>(rows, table, exponent, args.sinks != nullptr && item.part == 0);
  for (int step = first_step; step < end_step; ++step) {
    const int key = step * Shape::kKeys;
    const uint32_t buffer = step % 2 * Shape::kStepBytes;
    const bool more = step + 1 < end_step;
    wait_copies<1>();
    __syncthreads();  // this step's keys are here; no warp is in the last step any more
    const int slot = pages.first_slot<Shape>(step + 2, threadIdx.x, keys);  // kept after the scores
    if (more) {
      copy(keys_at, key_cache, step + 1);
    } else {
      commit_copies();  // of nothing: the count of groups stays the same
    }
    const bool see = warp.sees<Shape>(key);
    Weights<Shape> weights;
    if (see) {
      Scores<Shape> scores;
      multiply_keys<Shape>(scores, own, keys_at + buffer);
      if (exponent.softcap > 0) cap<Shape>(scores, exponent);
      if (warp.sees_not_all<Shape>(key)) mask<Shape>(scores, table.position, key, args.window);
      float shrink[Shape::kBands][2];
      if (weigh<Shape>(scores, rows, exponent, shrink)) scale_rows<Shape>(rows, shrink);
      pack_weights<Shape>(weights, scores);
    }
    keep_slot(step, slot);  // of step + 2: in the place of this step's, which no copy needs now
    wait_copies<1>();
    __syncthreads();  // its values
    if (more) copy(values_at, value_cache, step + 1);
    if (see) multiply_values<Shape>(rows, weights, values_at + buffer);
  }
  allow_next();
  wait_copies<0>();
  reduce_sums<Shape>(rows);
  // Read again rather than kept: registers are what the loop is short of.
  const PrefillItem done = plan.items[blockIdx.y];
  const int valid_rows = make_tile(batch, done, Shape::kRows).rows;
  if (done.partial >= 0) {
    const int64_t index = int64_t(done.partial) * batch.kv_heads + kv_head;
    store_partial<Shape>(rows, plan, exponent, index, valid_rows);
  } else {
    store_rows<Shape>(rows, staging, table, args.out, valid_rows);
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
