// A block multiplies 128 rows of x by 128 rows of w's gate half and the same 128 of its up half,
// so that a thread ends with both of what it has to combine. Blocks stay on their multiprocessor
// and take tile after tile. The last warpgroup's first thread has the tensor memory accelerator
// fill a ring of stages; the other two warpgroups multiply, 64 rows of x each.
//
// Two blocks are a cluster: neighbouring rows of x by the same rows of w, of which each fetches one
// half for both (PTX ISA, "cp.async.bulk.tensor", multicast). A stage is free when the readers of
// both blocks have left it, as either's copies write to both.
#include "cuda/gated_gemm.h"

#include "cuda/cluster.cuh"
#include "cuda/launch.h"
#include "cuda/tensor_map.h"
#include "cuda/vector.cuh"
#include "cuda/warpgroup.cuh"

#include <algorithm>

namespace octavo::cuda {
namespace gated {

constexpr int kRows = 128, kHalf = 128, kDepth = 64;  // of x, of each half of w, columns a stage
constexpr int kRowBytes = kDepth * 2;                 // the swizzle's width
constexpr int kXBytes = kRows * kRowBytes, kHalfBytes = kHalf * kRowBytes;
constexpr int kStageBytes = kXBytes + 2 * kHalfBytes, kStages = 4;
constexpr int kComputing = 256, kThreads = kComputing + 128;
[[maybe_unused]] constexpr int kCopyRegisters = 40, kComputeRegisters = 232;
[[maybe_unused]] constexpr int kReaders = kCluster * kComputing / 32;
constexpr int kSharedBytes = kStages * (kStageBytes + 16);
constexpr int kTiles = 2 * kHalf / 8;  // of 8 columns, of a thread's results

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

// A warp has left the stage, in both blocks.
__device__ __forceinline__ void release(const Ring& ring, RingPosition at) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  if (lane < kCluster) arrive_at(ring.empty(at), lane);
}

#define OCTAVO_4(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define OCTAVO_16(d, n) \
  OCTAVO_4(d, n), OCTAVO_4(d, n + 1), OCTAVO_4(d, n + 2), OCTAVO_4(d, n + 3)
#define OCTAVO_64(d, n) \
  OCTAVO_16(d, n), OCTAVO_16(d, n + 4), OCTAVO_16(d, n + 8), OCTAVO_16(d, n + 12)
#define OCTAVO_PRODUCT(TYPE)                                                                   \
  asm volatile(                                                                                \
      "{ .reg .pred add; setp.ne.b32 add, %130, 0; "                                           \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " "                         \
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "       \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "       \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "       \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "       \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "       \
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
      "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "   \
      "%125, %126, %127}, %128, %129, add, 1, 1, 0, 0; }"                                      \
      : OCTAVO_64(d, 0), OCTAVO_64(d, 16)                                                      \
      : "l"(a), "l"(b), "r"(int(add)))

// d = a * b, or d += a * b where `add`: a is 64 x 16, b the same of 256 columns.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[kTiles][4], uint64_t a, uint64_t b, bool add) {
#if OCTAVO_HAS_WARPGROUPS
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    OCTAVO_PRODUCT("bf16");
  } else {
    OCTAVO_PRODUCT("f16");
  }
#endif
}

#undef OCTAVO_PRODUCT
#undef OCTAVO_64
#undef OCTAVO_16
#undef OCTAVO_4

// As activation.cuh's, by the fast division: while a tile is stored, nothing is multiplied.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

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
        v[i] = pack<T>(silu(gate[below * 2]) * up[below * 2],
                       silu(gate[below * 2 + 1]) * up[below * 2 + 1]);
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
  const uint32_t of_group = threadIdx.x / 128 * (kXBytes / 2);
  RingPosition at, before;
  for (Turns turns(task); turns.in(); turns.next()) {
    float d[kTiles][4];
    for (int step = 0; step < task.steps; ++step) {
      ring.wait_filled(at);
      const uint32_t x = ring.stage(at) + of_group, w = ring.stage(at) + kXBytes;
      products_begin();
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        multiply<T>(d, panel_descriptor(x + k * 32, 16), panel_descriptor(w + k * 32, 16),
                    step > 0 || k > 0);
      }
      products_end();
      if (step > 0) {
        products_wait<1>();
        release(ring, before);
      }
      before = at;
      at.advance(ring.stages);
    }
    products_wait<0>();
    settle(d);
    release(ring, before);
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

namespace {

// Boxes of `box_rows` rows of a stage's columns; beyond the matrix they are zeros.
CUtensorMap map_of(DType dtype, const void* matrix, int64_t rows, int64_t columns, int64_t stride,
                   int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {kDepth, cuuint32_t(box_rows)}, each[2] = {1, 1};
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = tensor_map_encoder()(
      &map, type, 2, const_cast<void*>(matrix), sizes, strides, box, each,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("gated_gemm: cuTensorMapEncodeTiled: error " +
                             std::to_string(int(result)));
  }
  return map;
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace
}  // namespace gated

bool gated_gemm_serves(int64_t n, int64_t k, Function function, int device) {
  using namespace gated;
  return function == Function::kSilu && n % (2 * kHalf) == 0 && k % kDepth == 0 && k > 0 &&
         attribute(cudaDevAttrComputeCapabilityMajor, device) == 9;
}

void gated_gemm(const GatedGemm& args, cudaStream_t stream) {
  using namespace gated;
  if (args.rows == 0) return;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  static const int multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  Task task{};
  task.out = args.out;
  task.rows = int(args.rows);
  task.inner = int(args.n / 2);
  task.steps = int(args.k / kDepth);
  task.pairs = (task.rows + kCluster * kRows - 1) / (kCluster * kRows);
  task.total = task.pairs * (task.inner / kHalf);
  const int clusters = std::min(multiprocessors / kCluster, task.total);
  const CUtensorMap x = map_of(args.dtype, args.x, args.rows, args.k, args.x_stride, kRows);
  const CUtensorMap w = map_of(args.dtype, args.w, args.n, args.k, args.k, kHalf);
  with_half(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    static const bool allowed = allow_shared(gated_gemm_kernel<T>, kSharedBytes);
    (void)allowed;
    launch(gated_gemm_kernel<T>, dim3(unsigned(clusters * kCluster)), dim3(kThreads), kSharedBytes,
           stream, x, w, task);
  });
}

}  // namespace octavo::cuda
