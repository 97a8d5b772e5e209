// How a tile's sums leave: turned, because the matrix is the product's first operand, and with what
// else is done to them (PTX ISA, "movmatrix").
#pragma once

#include "cuda/activation.cuh"
#include "cuda/cluster.cuh"
#include "cuda/stream_gemm.h"
#include "cuda/stream_share.cuh"
#include "cuda/vector.cuh"

namespace octavo::cuda::stream {

constexpr int kRows = 128;  // of w, of a block in a tile

struct Task {
  StreamGemm gemm;
  Line line;
  int columns;     // of the output
  int row_tiles;   // of x
  int group;       // of 8 rows of w: of these are in a block's tile
};

// Of a block: which rows of x, which share, which half of each tile's rows of w.
struct Place {
  int rank, row_tile, share;

  __device__ explicit Place(const Task& task)
      : rank(int(rank_in_cluster())), row_tile(int(blockIdx.x) / kCluster % task.row_tiles),
        share(int(blockIdx.x) / kCluster / task.row_tiles) {}
  // The block at this place in another share.
  __device__ int block(const Task& task, int of_share) const {
    return (of_share * task.row_tiles + row_tile) * kCluster + rank;
  }
};

// An 8 x 8 matrix of 16-bit elements, two of a row to a lane, is turned.
__device__ __forceinline__ uint32_t turned(uint32_t pair) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// Eight columns of two rows, summed and stored.
template <typename T>
__device__ __forceinline__ void store_sum(T* to, const uint4& x, const uint4& y) {
  const auto& a = reinterpret_cast<const Pack<T>&>(x);
  const auto& b = reinterpret_cast<const Pack<T>&>(y);
  float sums[kPack];
#pragma unroll
  for (int i = 0; i < kPack; ++i) sums[i] = widen(a.at[i]) + widen(b.at[i]);
  store_narrowed(to, sums);
}

// A thread has of its two rows of w, 8 apart, two rows of x of every eight. With halves the first
// is of the gate, the second of up, and both are of one column of the output.
template <typename T, bool kGated>
struct Store {
  const Task& task;
  int column, row;  // of the output, where the warp's part of the tile begins
  float bias[2] = {};

  __device__ Store(const Task& task, const Place& place, int tile, int width) : task(task) {
    constexpr int kColumns = kGated ? 8 : 16;  // of a warp
    const int warp = threadIdx.x / 32, of_thread = threadIdx.x % 32 / 4;
    column = ((tile * kCluster + place.rank) * (kComputing / 32) + warp) * kColumns;
    row = place.row_tile * width;
    const auto* const from = static_cast<const T*>(task.gemm.bias);
    if (!from) return;
    if (column < task.columns) bias[0] = widen(from[column + of_thread]);
    const int second = kGated ? column : column + 8;
    const int of_second = second + (kGated ? task.columns : 0) + of_thread;
    if (second < task.columns) bias[1] = widen(from[of_second]);
  }
  // Where this lane stores eight columns of unit `u`, 16 rows of x; null: nowhere.
  __device__ T* of_lane(int u) const {
    const int lane = threadIdx.x % 32, part = lane % 4;
    const int below = kGated ? part : part / 2, beside = kGated ? 0 : part % 2 * 8;
    const int to_row = row + u * 16 + below * 8 + lane / 4, to_column = column + beside;
    if (below > 1 || to_row >= task.gemm.rows || to_column >= task.columns) return nullptr;
    return static_cast<T*>(task.gemm.out) + int64_t(to_row) * task.columns + to_column;
  }
  // What is there and is added to.
  __device__ uint4 before(int u) const {
    const T* const from = task.gemm.epilogue == Epilogue::kAdd ? of_lane(u) : nullptr;
    return from ? __ldcg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
  }
  // Its two tiles of 8 rows of x.
  __device__ void unit(int u, const float (&a)[4], const float (&b)[4], uint4 before) const {
    uint32_t v[4] = {};
    __syncwarp();
    if constexpr (kGated) {
      v[0] = turned(gated(a));
      v[1] = turned(gated(b));
    } else {
      v[0] = turned(pack<T>(a[0] + bias[0], a[1] + bias[0]));
      v[1] = turned(pack<T>(a[2] + bias[1], a[3] + bias[1]));
      v[2] = turned(pack<T>(b[0] + bias[0], b[1] + bias[0]));
      v[3] = turned(pack<T>(b[2] + bias[1], b[3] + bias[1]));
    }
    transpose_among_four(v);
    T* const to = of_lane(u);
    if (!to) return;
    const uint4 bits = make_uint4(v[0], v[1], v[2], v[3]);
    if (task.gemm.epilogue == Epilogue::kAdd) {
      store_sum(to, bits, before);
    } else {
      store_bits(to, bits);
    }
  }

 private:
  __device__ uint32_t gated(const float (&d)[4]) const {
    return pack<T>(fast_silu(d[0] + bias[0]) * (d[2] + bias[1]),
                   fast_silu(d[1] + bias[0]) * (d[3] + bias[1]));
  }
};

template <typename T, bool kGated, int kTiles>
__device__ __forceinline__ void store_units(const float (&d)[kTiles][4], const Task& task,
                                            const Place& place, int tile, int low, int high) {
  const Store<T, kGated> store(task, place, tile, kTiles * 8);
  constexpr int kBatch = kTiles == 8 || kTiles == 16 ? 4 : 2;  // on their way at once
#pragma unroll
  for (int first = 0; first < kTiles / 2; first += kBatch) {
    uint4 before[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int u = first + i;
      before[i] = !kGated && u >= low && u < high ? store.before(u) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int u = first + i;
      if (u >= low && u < high) store.unit(u, d[2 * u], d[2 * u + 1], before[i]);
    }
  }
}

}  // namespace octavo::cuda::stream
