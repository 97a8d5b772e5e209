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
// the next kernel's blocks must find room beside this one's.
#include "cuda/skinny_gemm.h"

#include "cuda/activation.cuh"
#include "cuda/check.h"
#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/pipeline.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace {

constexpr int kWarps = 8;                  // that multiply; one more fills the ring
constexpr int kThreads = kWarps * 32;
constexpr int kColumns = 1024;             // of a stage
constexpr int kGroup = 8;                  // rows of w in a stage
constexpr int kSteps = kColumns / kWarps / 32;  // of 32 columns, that a warp takes of a stage
constexpr int kPitch = kColumns * 2 + 64;  // bytes a row: neighbours fall on different banks
constexpr int kStageBytes = kGroup * kPitch;
constexpr int kStagedBytes = 16384;        // of x, that a block keeps in shared memory at most
constexpr int kVectors = kStagedBytes / 16 / kThreads;  // of x, that a thread brings there

struct Task {
  SkinnyGemm gemm;
  int units;    // of 8 outputs: a group of rows of w, or two groups (gate and up)
  int stages;
  int x_pitch;  // bytes a row of x in shared memory; 0: x is read from global memory
};

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

// Stages in the order in which `multiply` wants them: `pass` groups side by side.
__device__ void fill_ring(const Task& task, const Share& share, const Ring& ring, int pass) {
  const auto* w = static_cast<const char*>(task.gemm.w);
  const int k = int(task.gemm.k);
  const uint64_t policy = evict_first_policy();
  RingPosition at;
  for (int begin = 0; begin < share.groups; begin += pass) {
    const int end = min(begin + pass, share.groups);
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
}

template <typename T>
__device__ __forceinline__ float2 widen(uint32_t pair);
template <>
__device__ __forceinline__ float2 widen<__nv_bfloat16>(uint32_t pair) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
template <>
__device__ __forceinline__ float2 widen<__half>(uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <typename T>
__device__ __forceinline__ float square(uint32_t pair) {
  const float2 value = widen<T>(pair);
  return value.x * value.x + value.y * value.y;
}

// A pair of a normed row, rounded as reference.rms_norm rounds.
template <typename T>
__device__ __forceinline__ uint32_t norm_pair(uint32_t x, uint32_t weight, float scale,
                                              float offset) {
  const float2 value = widen<T>(x), w = widen<T>(weight);
  const float low = value.x * scale, high = value.y * scale;
  if (offset != 0) return pack<T>(low * (offset + w.x), high * (offset + w.y));
  return pack<T>(float(T(low)) * w.x, float(T(high)) * w.y);
}

// The sum of `value` over the `width` threads (a power of two) that share a row, in all of them.
__device__ float sum_of_row(float value, int width, float* sums) {
  for (int distance = min(width, 32) / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(~0u, value, distance);
  }
  if (width <= 32) return value;
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  sync_first(kThreads);
  const int first = threadIdx.x / width * (width / 32);
  value = 0;
  for (int i = 0; i < width / 32; ++i) value += sums[first + i];
  return value;
}

// x's rows, normed where there is a norm, into shared memory. The rows are divided evenly among
// the threads, so that all of x is in flight at once.
template <typename T>
__device__ void stage_x(const Task& task, uint8_t* staged, float* sums) {
  const SkinnyGemm& gemm = task.gemm;
  int width = kThreads;
  for (int rows = 1; rows < gemm.rows; rows *= 2) width /= 2;
  const int row = threadIdx.x / width, first = threadIdx.x % width;
  const int vectors = int(gemm.k) / 8;
  uint4 weight[kVectors], x[kVectors];
  const auto* norm_weight = static_cast<const uint4*>(gemm.norm_weight);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = first + i * width;
    weight[i] = norm_weight && at < vectors ? __ldg(norm_weight + at) : uint4{};
  }
  wait_for_previous();
  const auto* source = reinterpret_cast<const uint4*>(static_cast<const T*>(gemm.x) +
                                                      row * gemm.x_stride);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = first + i * width;
    x[i] = row < gemm.rows && at < vectors ? __ldcg(source + at) : uint4{};
  }
  if (norm_weight) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      sum += (square<T>(x[i].x) + square<T>(x[i].y)) + (square<T>(x[i].z) + square<T>(x[i].w));
    }
    const float scale = rsqrtf(sum_of_row(sum, width, sums) / float(gemm.k) + gemm.norm_eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      x[i] = {norm_pair<T>(x[i].x, weight[i].x, scale, gemm.norm_offset),
              norm_pair<T>(x[i].y, weight[i].y, scale, gemm.norm_offset),
              norm_pair<T>(x[i].z, weight[i].z, scale, gemm.norm_offset),
              norm_pair<T>(x[i].w, weight[i].w, scale, gemm.norm_offset)};
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const int at = first + i * width;
    if (row < gemm.rows && at < vectors) {
      *reinterpret_cast<uint4*>(staged + row * task.x_pitch + at * 16) = x[i];
    }
  }
  sync_first(kThreads);
}

// What a lane gives of x to the products of its warp's columns of a stage: 8 consecutive columns a
// step, of rows g and, where there are more than 8, g + 8. An mma's columns may be any, as long as
// both operands take the same: lane t of four takes its eight as columns 2t.. of two products.
template <bool kWide>
struct XSlice {
  uint4 low[kSteps], high[kWide ? kSteps : 1];
};

template <typename T, bool kWide>
__device__ XSlice<kWide> load_x(const Task& task, const uint8_t* staged, int column) {
  const int lane = threadIdx.x % 32, group = lane / 4;
  const int rows = int(task.gemm.rows), k = int(task.gemm.k);
  const auto load = [&](int row, int at) {
    if (row >= rows || at >= k) return uint4{};
    if (task.x_pitch) return *reinterpret_cast<const uint4*>(staged + row * task.x_pitch + at * 2);
    // Not through the L1 cache: other kernels write x while this one is already there.
    return __ldcg(reinterpret_cast<const uint4*>(static_cast<const T*>(task.gemm.x) +
                                                 row * task.gemm.x_stride + at));
  };
  XSlice<kWide> x;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int at = column + step * 32 + lane % 4 * 8;
    x.low[step] = load(group, at);
    if constexpr (kWide) x.high[step] = load(group + 8, at);
  }
  return x;
}

// Adds a stage's products to `sums`: x row g with w rows 2t and 2t + 1, then the same of g + 8.
template <typename T, bool kWide>
__device__ __forceinline__ void multiply_stage(uint32_t stage, int columns, const XSlice<kWide>& x,
                                               float (&sums)[kWide ? 4 : 2]) {
  const int lane = threadIdx.x % 32, at = threadIdx.x / 32 * kSteps * 32 + lane % 4 * 8;
  const uint32_t source = stage + lane / 4 * kPitch + at * 2;
  float part[kSteps][4] = {};
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    uint4 w{};
    if (at + step * 32 < columns) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                   : "r"(source + step * 64));
    }
    const uint4 low = x.low[step], high = kWide ? x.high[kWide ? step : 0] : uint4{};
    multiply_add<T>(part[step], {low.x, high.x, low.y, high.y}, w.x, w.y);
    multiply_add<T>(part[step], {low.z, high.z, low.w, high.w}, w.z, w.w);
  }
#pragma unroll
  for (int i = 0; i < (kWide ? 4 : 2); ++i) {
    sums[i] += (part[0][i] + part[1][i]) + (part[2][i] + part[3][i]);
  }
}

// The sums of all warps over their columns: [groups of a pass][kWarps][rows of x][kGroup].
struct Partials {
  float* at;
  int rows;

  __device__ float* of(int group, int warp, int row) const {
    return at + ((group * kWarps + warp) * rows + row) * kGroup;
  }
  __device__ float total(int group, int row, int column) const {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += of(group, warp, row)[column];
    return sum;
  }
};

// One of the outputs of a pass, from the sums of its group, or of its two groups.
template <typename T>
__device__ void store(const SkinnyGemm& gemm, const Share& share, const Partials& partials,
                      int begin, int unit, int row, int column) {
  const int group = unit * share.halves, to = share.column(begin + group) + column;
  if (column >= share.rows(begin + group)) return;
  const auto* bias = static_cast<const T*>(gemm.bias);
  const auto value = [&](int half) {
    const float sum = partials.total(group + half, row, column);
    return float(T(bias ? sum + float(bias[half * share.half_rows + to]) : sum));
  };
  T* out = static_cast<T*>(gemm.out) + int64_t(row) * share.half_rows + to;
  if (gemm.epilogue == Epilogue::kGated) {
    *out = T(activate(gemm.function, value(0)) * value(1));
  } else if (gemm.epilogue == Epilogue::kAdd) {
    *out = T(float(__ldcg(out)) + value(0));
  } else {
    *out = T(value(0));
  }
}

template <typename T, bool kWide, int kPass>
__device__ void multiply(const Task& task, const Share& share, const Ring& ring,
                         const Partials& partials, const uint8_t* staged) {
  const SkinnyGemm& gemm = task.gemm;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k = int(gemm.k);
  RingPosition at;
  for (int begin = 0; begin < share.groups; begin += kPass) {
    const int count = min(kPass, share.groups - begin);
    float sums[kPass][kWide ? 4 : 2] = {};
    for (int column = 0; column < k; column += kColumns) {
      const auto x = load_x<T, kWide>(task, staged, column + warp * kSteps * 32);
#pragma unroll
      for (int group = 0; group < kPass; ++group) {
        if (group >= count) break;
        ring.wait_filled(at);
        multiply_stage<T, kWide>(ring.stage(at), k - column, x, sums[group]);
        ring.release(at);
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
    const int rows = int(gemm.rows), outputs = count / share.halves * rows * kGroup;
    for (int i = threadIdx.x; i < outputs; i += kThreads) {
      const int column = i % kGroup, line = i / kGroup;
      store<T>(gemm, share, partials, begin, line / rows, line % rows, column);
    }
  }
}

// kWide: more than 8 rows. kPass: groups whose sums are in registers at a time; x is read once a
// pass. With many rows and many groups a block takes the registers that two would share.
template <typename T, bool kWide, int kPass>
__global__ void __launch_bounds__(kThreads + 32, kWide && kPass > 4 ? 1 : 2)
    skinny_gemm_kernel(const __grid_constant__ Task task) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float norm_sums[kWarps];
  allow_next();
  const Ring ring(shared, task.stages, kStageBytes);
  const Share share(task);
  if (threadIdx.x == kThreads) ring.init(kWarps);
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    fill_ring(task, share, ring, kPass);
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
  multiply<T, kWide, kPass>(task, share, ring, partials, staged);
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "skinny_gemm");
  check(cudaDeviceGetAttribute(&value, which, device), "skinny_gemm");
  return value;
}

struct Limits {
  int multiprocessors, shared_block, shared_half;
};

const Limits& limits() {
  static const Limits limits{
      attribute(cudaDevAttrMultiProcessorCount), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
      attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 -
          attribute(cudaDevAttrReservedSharedMemoryPerBlock)};
  return limits;
}

// The kernel's static shared memory, and what aligns its dynamic one.
constexpr int kStatic = 256;
constexpr int kMinStages = 2;

template <typename T, bool kWide, int kPass>
void run(Task task, cudaStream_t stream) {
  const auto kernel = skinny_gemm_kernel<T, kWide, kPass>;
  static const bool allowed = allow_shared(kernel, limits().shared_block - kStatic);
  (void)allowed;
  const SkinnyGemm& gemm = task.gemm;
  // Where each block reads x more than once, it keeps it beside the ring.
  const int halves = gemm.epilogue == Epilogue::kGated ? 2 : 1;
  const bool again = task.units * halves > kPass * limits().multiprocessors;
  const bool small = skinny_gemm_serves(gemm.rows, gemm.k, true);
  if (gemm.norm_weight || (again && small)) task.x_pitch = int((gemm.k * 2 + 127) / 128 * 128 + 64);
  const int64_t fixed = gemm.rows * (kPass * kWarps * kGroup * 4 + task.x_pitch);
  int64_t room = gemm.shared_limit ? gemm.shared_limit : limits().shared_half;
  room = std::min<int64_t>(room, limits().shared_block) - kStatic - fixed;
  task.stages = int(std::max<int64_t>(kMinStages, room / Ring::bytes(1, kStageBytes)));
  const int64_t shared = Ring::bytes(task.stages, kStageBytes) + fixed;
  const int grid = std::min(task.units, limits().multiprocessors);
  launch(kernel, dim3(grid), dim3(kThreads + 32), shared, stream, task);
}

template <typename T>
void run(const Task& task, cudaStream_t stream) {
  if (task.gemm.rows <= 8) return run<T, false, 8>(task, stream);
  // Shares that do not fit the ring anyway gain more from reading x half as often.
  const int64_t share = task.gemm.n * task.gemm.k * 2 / limits().multiprocessors;
  if (share > limits().shared_block) return run<T, true, 8>(task, stream);
  run<T, true, 4>(task, stream);
}

}  // namespace

bool skinny_gemm_serves(int64_t rows, int64_t k, bool norm) {
  int64_t lines = 1;
  while (lines < rows) lines *= 2;
  return rows >= 1 && rows <= kSkinnyRows && k >= 8 && k % 8 == 0 &&
         (!norm || lines * k * 2 <= kStagedBytes);
}

void skinny_gemm(const SkinnyGemm& args, cudaStream_t stream) {
  if (!skinny_gemm_serves(args.rows, args.k, args.norm_weight != nullptr)) {
    throw std::invalid_argument("skinny_gemm: no kernel for " + std::to_string(args.rows) +
                                " rows of " + std::to_string(args.k));
  }
  const int64_t outputs = args.epilogue == Epilogue::kGated ? args.n / 2 : args.n;
  const Task task{args, int((outputs + kGroup - 1) / kGroup), 0, 0};
  switch (args.dtype) {
    case DType::kBFloat16:
      return run<__nv_bfloat16>(task, stream);
    case DType::kFloat16:
      return run<__half>(task, stream);
    case DType::kFloat32:
      throw std::invalid_argument("skinny_gemm: no kernel for float32");
  }
}

}  // namespace octavo::cuda
