// A block multiplies 128 rows of x by 128 rows of w's gate half and the same 128 of its up half,
// so that a thread ends with both of what it has to combine. Blocks stay on their multiprocessor
// and take tile after tile. The last warpgroup's first thread has the tensor memory accelerator
// fill a ring of stages; the other two warpgroups multiply, 64 rows of x each.
//
// Two blocks are a cluster: neighbouring rows of x by the same rows of w, of which each fetches one
// half for both (PTX ISA, "cp.async.bulk.tensor", multicast). A stage is free when the readers of
// both blocks have left it, as either's copies write to both.
#include "cuda/gated_gemm.h"

#include "cuda/activation.cuh"
#include "cuda/cluster_product.cuh"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/vector.cuh"

#include <algorithm>

namespace octavo::cuda {
namespace gated {

constexpr int kRows = 128, kHalf = 128;  // of x, of each half of w
constexpr int kXBytes = kRows * kRowBytes, kHalfBytes = kHalf * kRowBytes;
constexpr int kStageBytes = kXBytes + 2 * kHalfBytes, kStages = 4;
constexpr int kComputing = 256, kThreads = kComputing + 128;
[[maybe_unused]] constexpr int kCopyRegisters = 40, kComputeRegisters = 232;
[[maybe_unused]] constexpr int kReaders = kCluster * kComputing / 32;
constexpr int kSharedBytes = kStages * (kStageBytes + 16);
static_assert(kTiles == 2 * kHalf / 8);

struct Task {
  void* out;
  int rows, inner, steps;
  int pairs;  // of tiles of rows
  int total;  // what clusters have to do: pairs times tiles of columns
};

// Clusters take tiles in turn: first all rows of x by the same rows of w, which are read once then,
// while x stays in the L2 cache.
struct Turns {
  int at, step, total, pairs;

  __device__ explicit Turns(const Task& task)
      : at(int(blockIdx.x) / kCluster), step(int(gridDim.x) / kCluster), total(task.total),
        pairs(task.pairs) {}
  __device__ bool in() const { return at < total; }
  __device__ void next() { at += step; }
  __device__ int row(uint32_t rank) const { return (at % pairs * kCluster + int(rank)) * kRows; }
  __device__ int column() const { return at / pairs * kHalf; }
};

__device__ __forceinline__ void copy_tiles(const CUtensorMap& x, const CUtensorMap& w,
                                           const Task& task, const Ring& ring) {
  const uint32_t rank = rank_in_cluster();
  RingPosition at;
  for (Turns turns(task); turns.in(); turns.next()) {
    const int row = turns.row(rank);
    const int of_w = turns.column() + (rank == 0 ? 0 : task.inner);
    for (int step = 0; step < task.steps; ++step) {
      ring.wait_free(at);
      const uint32_t stage = ring.stage(at), full = ring.full(at);
      expect_bytes(full, kStageBytes);
      copy_box(stage, &x, step * kDepth, row, full);
      copy_box_to_both(stage + kXBytes + rank * kHalfBytes, &w, step * kDepth, of_w, full);
      at.advance(ring.stages);
    }
  }
  // Nobody of the other block is to find this one gone: wait until it has left all stages.
  for (int i = 0; i < ring.stages; ++i) {
    ring.wait_free(at);
    at.advance(ring.stages);
  }
}

// A thread's results are of its row and the eighth after it, two columns of every eight: of the
// gate in the first half of the tiles, of the same columns of up in the second.
template <typename T>
__device__ __forceinline__ void store_tile(const float (&d)[kTiles][4], const Task& task, int row,
                                           int column) {
  const int lane = threadIdx.x % 32;
  row += threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int below = 0; below < 2; ++below) {
    T* const to = static_cast<T*>(task.out) + int64_t(row + below * 8) * task.inner + column;
#pragma unroll
    for (int first = 0; first < kTiles / 2; first += 4) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&gate)[4] = d[first + i];
        const float(&up)[4] = d[first + i + kTiles / 2];
        v[i] = pack<T>(fast_silu(gate[below * 2]) * up[below * 2],
                       fast_silu(gate[below * 2 + 1]) * up[below * 2 + 1]);
      }
      transpose_among_four(v);
      if (row + below * 8 < task.rows) {
        store_bits(to + (first + lane % 4) * 8, make_uint4(v[0], v[1], v[2], v[3]));
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ void compute_tiles(const Task& task, const Ring& ring) {
  const uint32_t rank = rank_in_cluster();
  RingPosition at;
  for (Turns turns(task); turns.in(); turns.next()) {
    float d[kTiles][4];
    multiply_stages<T>(d, ring, at, task.steps, kXBytes);
    store_tile<T>(d, task, turns.row(rank), turns.column());
  }
}

template <typename T>
__global__ void OCTAVO_CLUSTER __launch_bounds__(kThreads, 1)
    gated_gemm_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap w,
                      const Task task) {
  extern __shared__ __align__(1024) unsigned char stages[];
#if OCTAVO_HAS_WARPGROUPS
  const Ring ring(stages, kStages, kStageBytes);
  if (threadIdx.x == 0) ring.init(kReaders);
  __syncwarp();
  sync_cluster();
  wait_for_previous();
  if (threadIdx.x >= kComputing) {
    give_registers_up<kCopyRegisters>();
    if (threadIdx.x == kComputing) copy_tiles(x, w, task, ring);
  } else {
    take_registers<kComputeRegisters>();
    compute_tiles<T>(task, ring);
  }
  allow_next();
  __syncwarp();
  sync_cluster();
#endif
}

}  // namespace gated

bool gated_gemm_serves(int64_t n, int64_t k, Function function, int device) {
  using namespace gated;
  return function == Function::kSilu && n % (2 * kHalf) == 0 && k % kDepth == 0 && k > 0 &&
         device_attribute(cudaDevAttrComputeCapabilityMajor, device) == 9;
}

void gated_gemm(const GatedGemm& args, cudaStream_t stream) {
  using namespace gated;
  if (args.rows == 0) return;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  static const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  Task task{};
  task.out = args.out;
  task.rows = int(args.rows);
  task.inner = int(args.n / 2);
  task.steps = int(args.k / kDepth);
  task.pairs = (task.rows + kCluster * kRows - 1) / (kCluster * kRows);
  task.total = task.pairs * (task.inner / kHalf);
  const int clusters = std::min(multiprocessors / kCluster, task.total);
  const CUtensorMap x =
      tensor_map(args.dtype, args.x, args.rows, args.k, args.x_stride, kRows, kDepth);
  const CUtensorMap w = tensor_map(args.dtype, args.w, args.n, args.k, args.k, kHalf, kDepth);
  with_half(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static const bool allowed = allow_shared(gated_gemm_kernel<T>, kSharedBytes);
    (void)allowed;
    launch(gated_gemm_kernel<T>, dim3(unsigned(clusters * kCluster)), dim3(kThreads), kSharedBytes,
           stream, x, w, task);
  });
}

}  // namespace octavo::cuda
