// Products of 1 to 16 rows with a large matrix: the time is that of reading the matrix once.
//
// One block a multiprocessor takes a contiguous share of the matrix's rows. A warp of its own
// streams them through a ring of stages (8 rows of 1024 columns), 80 to 100 KB of copies in
// flight; the others multiply, each a slice of a stage's columns. The matrix is the mma's 8-wide
// operand, so that even a matrix of 1024 rows gives every multiprocessor something to read.
//
// The matrix does not depend on the kernels ahead, so the ring is filled before waiting for them:
// a launch's latency, and that of the kernel before, pass while memory is busy. For small models
// the whole share of a block fits the ring. Hence half of the shared memory for a block at most:
// the next kernel's blocks must find room beside this one's. While they have not, or where other
// kernels come between, the next matrix is already on its way to the L2 cache.
#include "cuda/skinny_gemm.h"

#include "cuda/activation.cuh"
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/skinny_input.cuh"
#include "cuda/skinny_product.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace skinny {
namespace {

// The groups of rows of w that are this block's.
struct Share {
  int first, groups, halves, half_rows;

  __device__ explicit Share(const Task& task)
      : halves(task.gemm.epilogue == Epilogue::kGated ? 2 : 1),
        half_rows(int(task.gemm.n) / halves) {
    const int64_t units = task.units;
    first = int(blockIdx.x * units / gridDim.x);
    groups = (int((blockIdx.x + 1) * units / gridDim.x) - first) * halves;
  }
  // The column of the output where a group begins; gate and up of a unit share it.
  __device__ int column(int group) const { return (first + group / halves) * kGroup; }
  __device__ int row(int group) const { return group % halves * half_rows + column(group); }
  __device__ int rows(int group) const { return min(kGroup, half_rows - column(group)); }
};

// Stages in the order in which `multiply` wants them: a pass's groups side by side.
__device__ void fill_ring(const Task& task, const Share& share, const Ring& ring) {
  const auto* w = static_cast<const char*>(task.gemm.w);
  const int k = int(task.gemm.k);
  const uint64_t policy = evict_first_policy();
  RingPosition at;
  for (int begin = 0; begin < share.groups; begin += kPass) {
    const int end = min(begin + kPass, share.groups);
    for (int column = 0; column < k; column += kColumns) {
      const uint32_t bytes = min(kColumns, k - column) * 2;
      for (int group = begin; group < end; ++group) {
        ring.wait_free(at);
        copy_rows(ring.stage(at), kPitch, w + (int64_t(share.row(group)) * k + column) * 2,
                  int64_t(k) * 2, share.rows(group), bytes, ring.full(at), policy);
        at.advance(ring.stages);
      }
    }
  }
  const int64_t vectors = task.gemm.ahead_bytes / 16;
  const int64_t first = blockIdx.x * vectors / gridDim.x * 16;
  const int64_t end = (blockIdx.x + 1) * vectors / gridDim.x * 16;
  prefetch(static_cast<const char*>(task.gemm.ahead) + first, end - first);
}

// One of the outputs of a pass: a column of a unit, of one row of x.
template <typename T>
struct Output {
  int group = 0, row = 0, column = 0;  // the first of the unit's groups in the pass; within it
  int to = 0;                          // the column in all of the output
  T* at = nullptr;                     // null: there is none

  __device__ Output(const SkinnyGemm& gemm, const Share& share, int begin, int count, int index) {
    const int rows = int(gemm.rows), line = index / kGroup;
    group = line / rows * share.halves;
    row = line % rows;
    column = index % kGroup;
    if (group >= count || column >= share.rows(begin + group)) return;
    to = share.column(begin + group) + column;
    at = static_cast<T*>(gemm.out) + int64_t(row) * share.half_rows + to;
  }
  // What the output holds and is added to.
  __device__ float before(const SkinnyGemm& gemm) const {
    return at && gemm.epilogue == Epilogue::kAdd ? float(__ldcg(at)) : 0.0f;
  }
  __device__ void store(const SkinnyGemm& gemm, const Share& share, const Partials& partials,
                        float before) const {
    if (!at) return;
    const auto* bias = static_cast<const T*>(gemm.bias);
    const auto value = [&](int half) {
      const float sum = partials.total(group + half, row, column);
      return float(T(bias ? sum + float(bias[half * share.half_rows + to]) : sum));
    };
    if (gemm.epilogue == Epilogue::kGated) {
      *at = T(activate(gemm.function, value(0)) * value(1));
    } else if (gemm.epilogue == Epilogue::kAdd) {
      *at = T(before + value(0));
    } else {
      *at = T(value(0));
    }
  }
};

template <typename T, bool kWide, int kLanes>
__device__ void multiply(const Task& task, const Share& share, const Ring& ring,
                         const Partials& partials, const uint8_t* staged) {
  const SkinnyGemm& gemm = task.gemm;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = int(gemm.k);
  const auto* x_rows = task.x_pitch ? staged : static_cast<const uint8_t*>(gemm.x);
  const int64_t pitch = task.x_pitch ? task.x_pitch : gemm.x_stride * 2;
  RingPosition at;
  // Stages that will be filled again, and so have to be given back.
  int refills = share.groups * ((k + kColumns - 1) / kColumns) - ring.stages;
  for (int begin = 0; begin < share.groups; begin += kPass) {
    const int count = min(kPass, share.groups - begin);
    // On its way during the products.
    const float before = Output<T>(gemm, share, begin, count, threadIdx.x).before(gemm);
    float sums[kPass][kWide ? 4 : 2] = {};
    for (int column = 0; column < k; column += kColumns) {
      const auto x =
          load_x<kWide>(x_rows, pitch, int(gemm.rows), k, column + warp * kSteps * 32);
#pragma unroll
      for (int group = 0; group < kPass; ++group) {
        if (group >= count) break;
        ring.wait_filled(at);
        multiply_stage<T, kWide>(ring.stage(at), k - column, x, sums[group]);
        if (refills-- > 0) ring.release<kLanes>(at);
        at.advance(ring.stages);
      }
    }
    if (begin > 0) sync_first(kThreads);  // the sums of the pass before were read
#pragma unroll
    for (int group = 0; group < kPass; ++group) {
      if (group >= count) break;
      const int row = lane / 4, pair = lane % 4 * 2;
      const auto put = [&](int row, float low, float high) {
        if (row >= gemm.rows) return;
        *reinterpret_cast<float2*>(partials.of(group, warp, row) + pair) = {low, high};
      };
      put(row, sums[group][0], sums[group][1]);
      if constexpr (kWide) put(row + 8, sums[group][2], sums[group][3]);
    }
    sync_first(kThreads);
    const Output<T> first(gemm, share, begin, count, threadIdx.x);
    first.store(gemm, share, partials, before);
    const int outputs = count / share.halves * int(gemm.rows) * kGroup;
    for (int i = threadIdx.x + kThreads; i < outputs; i += kThreads) {
      const Output<T> next(gemm, share, begin, count, i);
      next.store(gemm, share, partials, next.before(gemm));
    }
  }
}

// kWide: more than 8 rows, which take the registers that two blocks would share. kLanes of a warp
// give a stage back.
template <typename T, bool kWide, int kLanes>
__global__ void __launch_bounds__(kThreads + 32, kWide ? 1 : 2)
    skinny_gemm_kernel(const __grid_constant__ Task task) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float norm_sums[kWarps];
  allow_next();
  const Ring ring(shared, task.stages, kStageBytes);
  const Share share(task);
  if (threadIdx.x == kThreads) ring.init(kWarps * kLanes);
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    fill_ring(task, share, ring);
    return;
  }
  const int rows = int(task.gemm.rows);
  const Partials partials{
      reinterpret_cast<float*>(shared + Ring::bytes(task.stages, kStageBytes)), rows};
  auto* staged = reinterpret_cast<uint8_t*>(partials.of(kPass, 0, 0));
  if (task.x_pitch) {
    stage_x<T>(task, staged, norm_sums);
  } else {
    wait_for_previous();
  }
  multiply<T, kWide, kLanes>(task, share, ring, partials, staged);
}

struct Limits {
  int multiprocessors, shared_block, shared_half;
};

const Limits& limits() {
  static const Limits limits{
      device_attribute(cudaDevAttrMultiProcessorCount),
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
          device_attribute(cudaDevAttrReservedSharedMemoryPerBlock)};
  return limits;
}

// The kernel's static shared memory, and what aligns its dynamic one.
constexpr int kStatic = 256;
constexpr int kMinStages = 2;

template <typename T, bool kWide, int kLanes>
void run(Task task, cudaStream_t stream) {
  const auto kernel = skinny_gemm_kernel<T, kWide, kLanes>;
  static const bool allowed = allow_shared(kernel, limits().shared_block - kStatic);
  (void)allowed;
  const SkinnyGemm& gemm = task.gemm;
  // Where each block reads x more than once, it keeps it beside the ring.
  const int halves = gemm.epilogue == Epilogue::kGated ? 2 : 1;
  const bool again = task.units * halves > kPass * limits().multiprocessors;
  const bool small = gemm.rows * gemm.k * 2 <= kKeptBytes;
  if (gemm.norm_weight || (again && small)) task.x_pitch = int((gemm.k * 2 + 127) / 128 * 128 + 64);
  const int64_t fixed = gemm.rows * (kPass * kWarps * kGroup * 4 + task.x_pitch);
  int64_t room = gemm.shared_limit ? gemm.shared_limit : limits().shared_half;
  room = std::min<int64_t>(room, limits().shared_block) - kStatic - fixed;
  task.stages = int(std::max<int64_t>(kMinStages, room / Ring::bytes(1, kStageBytes)));
  const int64_t shared = Ring::bytes(task.stages, kStageBytes) + fixed;
  const int grid = std::min(task.units, limits().multiprocessors);
  launch(kernel, dim3(grid), dim3(kThreads + 32), shared, stream, task);
}

template <typename T, int kLanes>
void run(const Task& task, cudaStream_t stream) {
  task.gemm.rows > 8 ? run<T, true, kLanes>(task, stream) : run<T, false, kLanes>(task, stream);
}

template <typename T>
void run(const Task& task, cudaStream_t stream) {
  releasing_lanes() == 1 ? run<T, 1>(task, stream) : run<T, 32>(task, stream);
}

}  // namespace
}  // namespace skinny

bool skinny_gemm_serves(int64_t rows, int64_t k, bool norm) {
  int64_t lines = 1;
  while (lines < rows) lines *= 2;
  return rows >= 1 && rows <= kSkinnyRows && k >= 8 && k % 8 == 0 &&
         (!norm || lines * k * 2 <= skinny::kNormedBytes);
}

void skinny_gemm(const SkinnyGemm& args, cudaStream_t stream) {
  if (!skinny_gemm_serves(args.rows, args.k, args.norm_weight != nullptr)) {
    throw std::invalid_argument("skinny_gemm: no kernel for " + std::to_string(args.rows) +
                                " rows of " + std::to_string(args.k));
  }
  const int64_t outputs = args.epilogue == Epilogue::kGated ? args.n / 2 : args.n;
  const skinny::Task task{args, int((outputs + skinny::kGroup - 1) / skinny::kGroup), 0, 0};
  switch (args.dtype) {
    case DType::kBFloat16:
      return skinny::run<__nv_bfloat16>(task, stream);
    case DType::kFloat16:
      return skinny::run<__half>(task, stream);
    case DType::kFloat32:
      throw std::invalid_argument("skinny_gemm: no kernel for float32");
  }
}

}  // namespace octavo::cuda
