// A tile is 256 rows of w by `width` rows of x. Two blocks, a cluster, make it: each reads its own
// 128 rows of w, and half of x's rows for both. w is the product's first operand, because its
// rows are many; the result is turned on its way out.
//
// The last warpgroup's first thread has the tensor memory accelerator fill a ring of stages; the
// other two warpgroups multiply, 64 rows of w each. w does not depend on the kernels ahead: the
// ring's part of it is on its way before they have ended.
//
// Where x has several tiles of rows, as many clusters walk along the same share of w at the same
// time: it is read from memory once. For narrow tiles, which memory bounds, a block takes half of
// a multiprocessor, so that the next kernel's first stages fill meanwhile.
#include "cuda/stream_gemm.h"

#include "cuda/cluster_product.cuh"
#include "cuda/launch.h"
#include "cuda/stream_share.cuh"
#include "cuda/stream_store.cuh"
#include "cuda/tensor_map.h"

#include <algorithm>
#include <string>

namespace octavo::cuda {
namespace stream {

constexpr int kWeightBytes = kRows * kRowBytes;
constexpr int kThreads = kComputing + 128;
[[maybe_unused]] constexpr int kReaders = kCluster * kComputing / 32;
constexpr int kLargest = 256;  // width

template <int kWidth>
struct Config {
  static constexpr int kTiles = kWidth / 8;      // of 8 rows of x, of a thread's results
  static constexpr int kUnits = kTiles / 2;      // what is added up and stored together
  static constexpr int kHalfBytes = kWidth / 2 * kRowBytes;
  static constexpr int kStageBytes = kWeightBytes + 2 * kHalfBytes;
  static constexpr int kBlocks = kWidth <= 64 ? 2 : 1;  // beside each other
  static constexpr int kRoom = (kBlocks == 2 ? 112 : 226) * 1024;
  static constexpr int kStages = kRoom / (kStageBytes + 16);
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16);
  static constexpr int kCopyRegisters = 40, kComputeRegisters = 232;  // of one alone
};

// Groups of 8 rows of w, where it has two halves a group of each in turn: so that gate and up of
// a column of the result end in one thread.
__device__ __forceinline__ void copy_weights(uint32_t to, const CUtensorMap* map, int column,
                                             int group, uint32_t barrier, uint64_t policy) {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(to),
      "l"(map), "r"(column), "r"(0), "r"(0), "r"(group), "r"(barrier), "l"(policy)
      : "memory");
#endif
}

template <int kWidth>
__device__ __forceinline__ void copy_share(const CUtensorMap& x, const CUtensorMap& w,
                                           const Task& task, const Place& place,
                                           const Ring& ring) {
  using C = Config<kWidth>;
  const uint64_t policy = evict_first_policy();
  const int begin = task.line.begin(place.share), end = task.line.begin(place.share + 1);
  const int row = place.row_tile * kWidth + place.rank * (kWidth / 2);
  const auto bring_weights = [&](RingPosition at, int tile, int step) {
    expect_bytes(ring.full(at), C::kStageBytes);
    copy_weights(ring.stage(at), &w, step * kDepth, (tile * kCluster + place.rank) * task.group,
                 ring.full(at), policy);
  };
  const auto bring_x = [&](RingPosition at, int step) {
    copy_box_to_both(ring.stage(at) + kWeightBytes + place.rank * C::kHalfBytes, &x, step * kDepth,
                     row, ring.full(at));
  };
  const int ahead = min(end, begin + C::kStages), steps = task.line.steps;
  RingPosition at;
  for (int i = begin; i < ahead; ++i) {
    bring_weights(at, i / steps, i % steps);
    at.advance(C::kStages);
  }
  wait_for_previous();
  at = RingPosition();
  for (int i = begin; i < ahead; ++i) {
    bring_x(at, i % steps);
    at.advance(C::kStages);
  }
  int tile = ahead / steps, step = ahead % steps;
  for (int i = ahead; i < end; ++i) {
    ring.wait_free(at);
    bring_weights(at, tile, step);
    bring_x(at, step);
    at.advance(C::kStages);
    if (++step == steps) {
      step = 0;
      ++tile;
    }
  }
}

// What becomes of a part: the tile's units that are this block's to finish are whole after it.
template <int kTiles>
__device__ __forceinline__ void put_together(float (&d)[kTiles][4], const Task& task,
                                             const Place& place, const Part& part, int& low,
                                             int& high) {
  constexpr int kUnits = kTiles / 2;
  const Party party(task.line, part.tile, kUnits);
  const int mine = place.share - party.first;
  const bool adds = mine < party.adders;
  low = adds ? mine * kUnits / party.adders : 0;
  high = adds ? (mine + 1) * kUnits / party.adders : 0;
  const Partials<kTiles> partials{static_cast<float4*>(task.gemm.partials), int(gridDim.x)};
  int32_t* const arrivals = task.gemm.arrivals + place.block(task, party.first);
  partials.put(d, int(blockIdx.x), part.from == 0, low, high);
  arrive(arrivals);
  if (!adds) return;
  wait_for_arrivals(arrivals, party);
#pragma unroll 1
  for (int i = 0; i < party.count; ++i) {
    if (i == mine) continue;
    partials.add(d, place.block(task, party.first + i), i == 0, low, high);
  }
}

template <typename T, int kWidth>
__device__ __forceinline__ void compute_share(const Task& task, const Place& place,
                                              const Ring& ring) {
  using C = Config<kWidth>;
  wait_for_previous();
  const int end = task.line.begin(place.share + 1);
  RingPosition at;
#pragma unroll 1
  for (int i = task.line.begin(place.share); i < end;) {
    const Part part(task.line, i, end);
    float d[C::kTiles][4];
    multiply_stages<T>(d, ring, at, part.from, part.to, kWeightBytes);
    i += part.to - part.from;
    int low = 0, high = C::kUnits;
    if (!part.whole(task.line)) put_together(d, task, place, part, low, high);
    if (task.gemm.epilogue == Epilogue::kGated) {
      store_units<T, true>(d, task, place, part.tile, low, high);
    } else {
      store_units<T, false>(d, task, place, part.tile, low, high);
    }
  }
}

template <typename T, int kWidth>
__global__ void OCTAVO_CLUSTER __launch_bounds__(kThreads, Config<kWidth>::kBlocks)
    stream_gemm_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                       const __grid_constant__ Task task) {
  extern __shared__ __align__(1024) unsigned char stages[];
#if OCTAVO_HAS_WARPGROUPS
  using C = Config<kWidth>;
  allow_next();
  const Ring ring(stages, C::kStages, C::kStageBytes);
  if (threadIdx.x == 0) ring.init(kReaders);
  __syncwarp();
  sync_cluster();
  const Place place(task);
  if (threadIdx.x >= kComputing) {
    if constexpr (C::kBlocks == 1) give_registers_up<C::kCopyRegisters>();
    if (threadIdx.x == kComputing) copy_share<kWidth>(x, w, task, place, ring);
  } else {
    if constexpr (C::kBlocks == 1) take_registers<C::kComputeRegisters>();
    compute_share<T, kWidth>(task, place, ring);
  }
  // Nobody of the other block is to find this one gone.
  __syncwarp();
  sync_cluster();
#endif
}

namespace {

CUtensorMap map_of_x(const StreamGemm& gemm) {
  const cuuint64_t sizes[2] = {cuuint64_t(gemm.k), cuuint64_t(gemm.rows)};
  const cuuint64_t strides[1] = {cuuint64_t(gemm.x_stride) * 2};
  const cuuint32_t box[2] = {kDepth, cuuint32_t(gemm.width / kCluster)};
  return tensor_map(gemm.dtype, gemm.x, 2, sizes, strides, box);
}

// Column, row of eight, half, eight of the half. Of one half alone the stride is never taken; it is
// such that each is a multiple of the one before, as the driver's manual has them.
CUtensorMap map_of_w(const StreamGemm& gemm, int halves) {
  const cuuint64_t half_rows = cuuint64_t(gemm.n / halves), row_bytes = cuuint64_t(gemm.k) * 2;
  const cuuint64_t sizes[4] = {cuuint64_t(gemm.k), 8, cuuint64_t(halves), half_rows / 8};
  const cuuint64_t half_bytes = (halves == 1 ? 8 : half_rows) * row_bytes;
  const cuuint64_t strides[3] = {row_bytes, half_bytes, 8 * row_bytes};
  const cuuint32_t box[4] = {kDepth, 8, cuuint32_t(halves), cuuint32_t(kRows / 8 / halves)};
  return tensor_map(gemm.dtype, gemm.w, 4, sizes, strides, box);
}

template <typename F>
void with_width(int width, F&& f) {
  switch (width) {
    case 32: return f(std::integral_constant<int, 32>());
    case 64: return f(std::integral_constant<int, 64>());
    case 128: return f(std::integral_constant<int, 128>());
    case 192: return f(std::integral_constant<int, 192>());
    case 256: return f(std::integral_constant<int, 256>());
    default: throw std::invalid_argument("stream_gemm: no kernel for " + std::to_string(width) +
                                         " rows to a tile");
  }
}

template <typename T, int kWidth>
auto kernel_of() {
  const auto kernel = stream_gemm_kernel<T, kWidth>;
  static const bool allowed = allow_shared(kernel, Config<kWidth>::kSharedBytes);
  (void)allowed;
  return kernel;
}

template <int kWidth>
int pairs_of() {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = Config<kWidth>::kSharedBytes;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int count = 0;
  check(cudaOccupancyMaxActiveClusters(&count, kernel_of<__nv_bfloat16, kWidth>(), &config),
        "cudaOccupancyMaxActiveClusters");
  return count;
}

Task task_of(const StreamGemm& gemm) {
  const int halves = gemm.epilogue == Epilogue::kGated ? 2 : 1;
  const auto tiles = int((gemm.n + kCluster * kRows - 1) / (kCluster * kRows));
  const auto steps = int((gemm.k + kDepth - 1) / kDepth);
  Task task{};
  task.gemm = gemm;
  task.line = {steps, tiles * steps, gemm.shares};
  task.columns = int(gemm.n / halves);
  task.row_tiles = int((gemm.rows + gemm.width - 1) / gemm.width);
  task.group = kRows / 8 / halves;
  if (gemm.shares < 1 || gemm.shares > task.line.total) {
    throw std::invalid_argument("stream_gemm: " + std::to_string(gemm.shares) + " shares of " +
                                std::to_string(task.line.total) + " steps");
  }
  return task;
}

}  // namespace
}  // namespace stream

int stream_gemm_pairs(int device) {
  using namespace stream;
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device) != 9) return 0;
  // Another process's blocks may hold the multiprocessors that some of ours are waited for on.
  if (device_attribute(cudaDevAttrMpsEnabled, device) != 0) return 0;
  int pairs = device_attribute(cudaDevAttrMultiProcessorCount, device) / kCluster;
  for (int width : {32, 64, 128, 192, 256}) {
    with_width(width, [&](auto w) { pairs = std::min(pairs, pairs_of<decltype(w)::value>()); });
  }
  return pairs;
}

int64_t stream_gemm_partial_bytes(int pairs) {
  return int64_t(pairs) * kCluster * 2 * stream::kLargest * stream::kRows * int(sizeof(float));
}

int64_t stream_gemm_arrivals(int pairs) { return int64_t(pairs) * kCluster; }

void stream_gemm(const StreamGemm& args, cudaStream_t stream) {
  using namespace stream;
  if (args.rows == 0) return;
  with_width(args.width, [&](auto w) {
    constexpr int kWidth = decltype(w)::value;
    const Task task = task_of(args);
    const CUtensorMap of_x = map_of_x(args);
    const CUtensorMap of_w = map_of_w(args, args.epilogue == Epilogue::kGated ? 2 : 1);
    const dim3 grid(unsigned(task.row_tiles * args.shares * kCluster));
    with_half(args.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      launch(kernel_of<T, kWidth>(), grid, dim3(kThreads), Config<kWidth>::kSharedBytes, stream,
             of_x, of_w, task);
    });
  });
}

}  // namespace octavo::cuda
