// The experts' products: tiles of rows of one expert times its matrix, on tensor cores. Few tokens
// (a decode step) read each chosen expert's matrix about once, in tiles of 16 rows; many take
// tiles of 64. Both sum over k in the same order, so that a token's bits do not depend on which.
#include "cuda/moe.h"

#include "cuda/activation.cuh"
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/moe_route.cuh"
#include "cuda/vector.cuh"

#include <algorithm>
#include <stdexcept>
#include <type_traits>

namespace octavo::cuda {
namespace {

constexpr int kDepth = 64;  // columns of a stage: rows of 128 bytes, in 8 chunks of 16
constexpr int kRowBytes = kDepth * 2;

// A block's tile: kRowWarps x kColumnWarps warps, each with kRowTiles x kColumnTiles products of
// 16 x 8.
template <int row_warps, int column_warps, int row_tiles, int column_tiles, int stages>
struct Tiling {
  static constexpr int kColumnWarps = column_warps, kRowTiles = row_tiles;
  static constexpr int kColumnTiles = column_tiles, kStages = stages;
  static constexpr int kThreads = row_warps * column_warps * 32;
  static constexpr int kRows = row_warps * row_tiles * 16;           // of x
  static constexpr int kColumns = column_warps * column_tiles * 8;   // rows of w
  static constexpr int kStageBytes = (kRows + kColumns) * kRowBytes;
  static constexpr int kRowChunks = kRows * 8 / kThreads;
  static constexpr int kColumnChunks = kColumns * 8 / kThreads;
};
using FewRows = Tiling<1, 4, 1, 2, 6>;
using ManyRows = Tiling<2, 4, 2, 4, 4>;

struct Product {
  const void* x;         // [.., k]
  const int32_t* order;  // or null: x has its rows in the tiles' order
  int top_k;             // row order[i] / top_k of x is a tile's row i
  const void* w;         // of each expert [rows_of_w, k]
  const void* bias;
  void* out;             // [pairs, columns]
  const ExpertTile* tiles;
  int columns, k;
  ExpertGate gate;
};

// Where a stage's row begins its 16-byte chunk: swizzled, so that eight rows' equal chunks, which
// ldmatrix takes together, lie on different banks.
__device__ __forceinline__ uint32_t chunk_at(uint32_t stage, int row, int chunk) {
  return stage + row * kRowBytes + ((chunk ^ (row & 7)) * 16);
}

// The row of an expert's w that is row `row` of a block's tile; gates and ups lie side by side in
// eights, so that a thread has both of an output. -1 beyond the columns.
template <bool kGated>
__device__ __forceinline__ int row_of_w(int row, int first, int columns) {
  if constexpr (kGated) {
    const int column = first + row / 16 * 8 + row % 8;
    return column < columns ? row / 8 % 2 * columns + column : -1;
  }
  return first + row < columns ? first + row : -1;
}

// What one thread brings of each stage: always the same rows and chunk, further along k.
template <typename T, typename Tiles, bool kGated>
struct Loader {
  const T* rows[Tiles::kRowChunks];
  const T* columns[Tiles::kColumnChunks];
  uint32_t absent = 0;  // bits: rows, then columns, that do not exist
  int k;
  // Of many rows, other blocks take the same columns soon.
  const uint64_t kept = keep_policy();
  const uint64_t once = Tiles::kRows == FewRows::kRows ? evict_first_policy() : kept;

  __device__ Loader(const Product& product, const ExpertTile& tile, int first) : k(product.k) {
    const int chunk = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < Tiles::kRowChunks; ++i) {
      const int row = threadIdx.x / 8 + i * (Tiles::kThreads / 8);
      int64_t from = 0;
      if (row >= tile.rows) {
        absent |= 1u << i;
      } else {
        from = product.order ? product.order[tile.first + row] / product.top_k : tile.first + row;
      }
      rows[i] = static_cast<const T*>(product.x) + from * k + chunk * 8;
    }
    const int64_t height = int64_t(product.columns) * (kGated ? 2 : 1);
#pragma unroll
    for (int i = 0; i < Tiles::kColumnChunks; ++i) {
      const int row = row_of_w<kGated>(threadIdx.x / 8 + i * (Tiles::kThreads / 8), first,
                                       product.columns);
      if (row < 0) absent |= 1u << (Tiles::kRowChunks + i);
      columns[i] = static_cast<const T*>(product.w) + (tile.expert * height + max(row, 0)) * k +
                   chunk * 8;
    }
  }

  __device__ void load(uint32_t stage, int column) const {
    const int chunk = threadIdx.x % 8, row = threadIdx.x / 8;
    const bool inside = column + chunk * 8 < k;
#pragma unroll
    for (int i = 0; i < Tiles::kRowChunks; ++i) {
      copy_async(chunk_at(stage, row + i * (Tiles::kThreads / 8), chunk), rows[i] + column,
                 inside && !(absent >> i & 1), kept);
    }
    const uint32_t below = stage + Tiles::kRows * kRowBytes;
#pragma unroll
    for (int i = 0; i < Tiles::kColumnChunks; ++i) {
      copy_async(chunk_at(below, row + i * (Tiles::kThreads / 8), chunk), columns[i] + column,
                 inside && !(absent >> (Tiles::kRowChunks + i) & 1), once);
    }
  }
};

template <typename Tiles>
using Sums = float[Tiles::kRowTiles][Tiles::kColumnTiles][4];

template <typename T, typename Tiles>
__device__ __forceinline__ void multiply_stage(uint32_t stage, Sums<Tiles>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int row = warp / Tiles::kColumnWarps * Tiles::kRowTiles * 16 + lane % 16;
  const int column = warp % Tiles::kColumnWarps * Tiles::kColumnTiles * 8 + lane / 16 * 8 + lane % 8;
  const uint32_t below = stage + Tiles::kRows * kRowBytes;
#pragma unroll
  for (int chunk = 0; chunk < 8; chunk += 2) {
    uint32_t x[Tiles::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tiles::kRowTiles; ++i) {
      load_matrices(x[i], chunk_at(stage, row + i * 16, chunk + lane / 16));
    }
#pragma unroll
    for (int j = 0; j < Tiles::kColumnTiles; j += 2) {
      uint32_t w[4];
      load_matrices(w, chunk_at(below, column + j * 8, chunk + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < Tiles::kRowTiles; ++i) {
        multiply_add<T>(sums[i][j], x[i], w[0], w[1]);
        multiply_add<T>(sums[i][j + 1], x[i], w[2], w[3]);
      }
    }
  }
}

__device__ __forceinline__ float join(const ExpertGate& gate, float x, float up) {
  if (gate.limit == 0) return activate(gate.function, x) * up;
  x = fminf(x, gate.limit);
  up = fminf(fmaxf(up, -gate.limit), gate.limit);
  return (up + 1) * x / (1 + __expf(-gate.alpha * x));
}

// Bias, gate and rounding of one thread's sums. Columns come in eights, all there or none.
template <typename T, typename Tiles, bool kGated>
__device__ void store_sums(const Product& product, const ExpertTile& tile, int first,
                           const Sums<Tiles>& sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int top = warp / Tiles::kColumnWarps * Tiles::kRowTiles * 16 + lane / 4;
  const int left = warp % Tiles::kColumnWarps * Tiles::kColumnTiles * 8 + lane % 4 * 2;
  const int64_t height = int64_t(product.columns) * (kGated ? 2 : 1);
  const T* bias = static_cast<const T*>(product.bias);
  if (bias) bias += tile.expert * height;
#pragma unroll
  for (int j = 0; j < Tiles::kColumnTiles; j += kGated ? 2 : 1) {
    const int column = row_of_w<kGated>(left + j * 8, first, product.columns);
    if (column < 0) continue;
#pragma unroll
    for (int i = 0; i < Tiles::kRowTiles * 2; ++i) {
      const int row = top + i * 8;
      if (row >= tile.rows) continue;
      float pair[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float(&of)[Tiles::kColumnTiles][4] = sums[i / 2];
        const int at = i % 2 * 2 + c;
        pair[c] = rounded<T>(of[j][at] + (bias ? widen(bias[column + c]) : 0.0f));
        if constexpr (kGated) {
          const float shift = bias ? widen(bias[product.columns + column + c]) : 0.0f;
          pair[c] = join(product.gate, pair[c], rounded<T>(of[j + 1][at] + shift));
        }
      }
      T* out = static_cast<T*>(product.out) + int64_t(tile.first + row) * product.columns + column;
      *reinterpret_cast<uint32_t*>(out) = pack<T>(pair[0], pair[1]);
    }
  }
}

template <typename T, typename Tiles, bool kGated>
__global__ void __launch_bounds__(Tiles::kThreads)
    expert_kernel(const __grid_constant__ Product product) {
  extern __shared__ __align__(128) uint8_t shared[];
  allow_next();
  wait_for_previous();
  const ExpertTile tile = product.tiles[blockIdx.y];
  if (tile.expert < 0) return;
  const int first = blockIdx.x * Tiles::kColumns / (kGated ? 2 : 1);
  const Loader<T, Tiles, kGated> loader(product, tile, first);
  const uint32_t ring = shared_address(shared);
  const int steps = (product.k + kDepth - 1) / kDepth;
  constexpr int kAhead = Tiles::kStages - 1;
  for (int step = 0; step < kAhead; ++step) {
    if (step < steps) loader.load(ring + step * Tiles::kStageBytes, step * kDepth);
    commit_copies();
  }
  Sums<Tiles> sums = {};
  for (int step = 0; step < steps; ++step) {
    wait_copies<kAhead - 1>();
    __syncthreads();  // this stage is there, and the one before it was read
    const int next = step + kAhead;
    if (next < steps) {
      loader.load(ring + next % Tiles::kStages * Tiles::kStageBytes, next * kDepth);
    }
    commit_copies();
    multiply_stage<T, Tiles>(ring + step % Tiles::kStages * Tiles::kStageBytes, sums);
  }
  store_sums<T, Tiles, kGated>(product, tile, first, sums);
}

template <typename T, typename Tiles, bool kGated>
void run(const Product& product, int64_t tiles, cudaStream_t stream) {
  const auto kernel = expert_kernel<T, Tiles, kGated>;
  constexpr int kShared = Tiles::kStages * Tiles::kStageBytes;
  static const bool allowed = allow_shared(kernel, kShared);
  (void)allowed;
  const int columns = Tiles::kColumns / (kGated ? 2 : 1);
  const dim3 grid((product.columns + columns - 1) / columns, tiles);
  launch(kernel, grid, dim3(Tiles::kThreads), kShared, stream, product);
}

// Rows of a tile: 64 once an expert has more than 16 tokens, were they spread evenly.
int tile_rows(int64_t tokens, int64_t experts, int64_t top_k) {
  return tokens * top_k > 16 * experts ? ManyRows::kRows : FewRows::kRows;
}

template <typename T>
void mixture_of(const Mixture& args, cudaStream_t stream) {
  const int pairs = int(args.tokens * args.top_k);
  const int rows = tile_rows(args.tokens, args.experts, args.top_k);
  const int64_t tiles = mixture_tiles(args.tokens, args.experts, args.top_k);
  launch(route_kernel<T>, dim3((args.tokens + kRouteWarps - 1) / kRouteWarps),
         dim3(kRouteWarps * 32), 0, stream, static_cast<const T*>(args.logits), int(args.tokens),
         int(args.experts), int(args.top_k), args.normalized, args.weights, args.chosen);
  launch(sort_kernel, dim3(args.experts), dim3(kSortThreads), 0, stream,
         Sort{args.chosen, pairs, int(args.experts), rows, int(tiles), args.order, args.place,
              args.tiles});
  const Product up{args.x, args.order, int(args.top_k), args.gate_up, args.gate_up_bias,
                   args.activated, args.tiles, int(args.inner), int(args.hidden), args.gate};
  const Product down{args.activated, nullptr, 1, args.down, args.down_bias, args.results,
                     args.tiles, int(args.hidden), int(args.inner), args.gate};
  if (rows == FewRows::kRows) {
    run<T, FewRows, true>(up, tiles, stream);
    run<T, FewRows, false>(down, tiles, stream);
  } else {
    run<T, ManyRows, true>(up, tiles, stream);
    run<T, ManyRows, false>(down, tiles, stream);
  }
  const int64_t width = kCombineThreads * kPack;
  launch(combine_kernel<T>, dim3(args.tokens, (args.hidden + width - 1) / width),
         dim3(kCombineThreads), 0, stream, static_cast<const T*>(args.results), args.weights,
         args.place, static_cast<T*>(args.out), int(args.hidden), int(args.top_k));
}

}  // namespace

bool mixture_serves(int64_t hidden, int64_t inner, int64_t experts, int64_t top_k) {
  return hidden % 8 == 0 && inner % 8 == 0 && experts >= 1 && experts <= kMaxExperts &&
         top_k >= 1 && top_k <= std::min<int64_t>(kMaxTopK, experts);
}

int64_t mixture_tiles(int64_t tokens, int64_t experts, int64_t top_k) {
  const int64_t pairs = tokens * top_k;
  return pairs / tile_rows(tokens, experts, top_k) + std::min(pairs, experts);
}

void mixture(const Mixture& args, cudaStream_t stream) {
  if (!mixture_serves(args.hidden, args.inner, args.experts, args.top_k)) {
    throw std::invalid_argument("mixture: no kernel for these sizes");
  }
  if (args.tokens == 0) return;
  with_half(args.dtype, [&](auto* type) {
    mixture_of<std::remove_pointer_t<decltype(type)>>(args, stream);
  });
}

}  // namespace octavo::cuda
