// Launching kernels so that each may begin before the one ahead of it in the stream has ended
// (programmatic dependent launch, CUDA C++ Programming Guide, section of that name).
//
// The rule: every kernel launched with launch() calls wait_for_previous() in every thread that
// touches global memory, before it touches any that another kernel writes or reads. Only what no
// kernel ever writes (weights) may be read earlier. The wait covers all kernels ahead, not only
// the last one, because that one did not end before its own wait returned: so at least one thread
// of every kernel waits, also where there is nothing to do.
#pragma once

#include "cuda/check.h"

#include <cuda_runtime.h>

#include <utility>

namespace octavo::cuda {

// Waits until the kernels ahead in the stream have ended and their writes can be seen.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's blocks start as soon as every block of this one has called it or ended,
// as far as there is room beside it. It may be called at any time: what the next one reads, it
// waits for.
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether kernels overlap. Off for measurements of one kernel and to find a missing wait.
inline bool& overlap() {
  static bool on = true;
  return on;
}

// How many lanes of a warp arrive when it leaves a stage of a Ring: one, behind a __syncwarp that
// orders the others' loads before it. 32 is for racecheck, which does not follow an order through
// __syncwarp to an mbarrier (2026.3) and calls the loads of all lanes but the arriving one a race.
// Kernels have it as a constant: from their arguments, it cost steps of qwen3-0.6b at contexts of
// 5,000 tokens 1 to 2.5 %.
inline int& releasing_lanes() {
  static int lanes = 1;
  return lanes;
}

// Launch on the stream; `shared` is dynamic shared memory in bytes. Above 48 KiB the kernel must
// have been allowed it, see allow_shared(). A grid with no blocks is no work. Devices before
// compute capability 9.0 ignore the second attribute. By the first all kernels divide a
// multiprocessor's memory alike, for the most shared memory: one that must divide it anew waits
// until nothing runs there, and kernels would not overlap.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
            cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributePreferredSharedMemoryCarveout;
  attributes[0].val.sharedMemCarveout = cudaSharedmemCarveoutMaxShared;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = overlap() ? 2 : 1;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

// Lets a kernel take `shared` bytes of dynamic shared memory; for a function-local static, so
// that it is done once a kernel.
template <typename... Parameters>
bool allow_shared(void (*kernel)(Parameters...), size_t shared) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)),
        "allow_shared");
  return true;
}

}  // namespace octavo::cuda
