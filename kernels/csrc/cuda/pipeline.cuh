// A ring of stages in shared memory between one warp that fills them and the warps that read them:
// bulk copies of the tensor memory accelerator that complete on an mbarrier (PTX ISA, "cp.async.
// bulk", "mbarrier"), or, before compute capability 9.0, cp.async by the lanes of that warp.
#pragma once

#include <cstdint>

namespace octavo::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialized barriers known to the copy engine; block barrier needed besides.
__device__ __forceinline__ void barrier_fence() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}

// Returns when the phase of that parity has ended. A fresh barrier counts as past parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#else
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
#endif
  } while (!done);
}

// Whether it would return at once.
__device__ __forceinline__ bool barrier_passed(uint32_t barrier, uint32_t parity) {
  uint32_t passed;
  asm volatile(
      "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(passed) : "r"(barrier), "r"(parity) : "memory");
  return passed != 0;
}

// How many arrivals end a phase of a barrier that copy_rows completes.
#if __CUDA_ARCH__ >= 900
constexpr int kFillArrivals = 1;
#else
constexpr int kFillArrivals = 32;
#endif

// For what is read once: it leaves the L2 cache before what is read again.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 800
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// The L2 cache's usual one.
__device__ __forceinline__ uint64_t keep_policy() {
  uint64_t policy = 0;
#if __CUDA_ARCH__ >= 800
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// An arrival, and bytes that have to come too before the barrier's phase ends.
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" ::
                   "r"(barrier),
               "r"(bytes)
               : "memory");
#endif
}

// By the copy engine, from global to shared memory; the barrier hears of the bytes.
__device__ __forceinline__ void copy_bulk(uint32_t to, const char* from, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
#endif
}

// One warp copies up to 32 rows of `bytes` (a multiple of 16, as are all addresses and strides)
// from global to shared memory; the barrier's phase ends when all of it is there.
__device__ __forceinline__ void copy_rows(uint32_t to, uint32_t to_stride, const void* from,
                                          int64_t from_stride, int rows, uint32_t bytes,
                                          uint32_t barrier, uint64_t policy) {
  const int lane = threadIdx.x % 32;
#if __CUDA_ARCH__ >= 900
  if (lane == 0) expect_bytes(barrier, rows * bytes);
  __syncwarp();
  if (lane < rows) {
    copy_bulk(to + lane * to_stride, static_cast<const char*>(from) + lane * from_stride, bytes,
              barrier, policy);
  }
#else
  (void)policy;
  for (int row = 0; row < rows; ++row) {
    for (uint32_t at = lane * 16; at < bytes; at += 512) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + row * to_stride + at),
                   "l"(static_cast<const char*>(from) + row * from_stride + at)
                   : "memory");
    }
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
#endif
}

// One warp asks for `bytes` (a multiple of 16, from such an address) to be brought to the L2 cache.
__device__ __forceinline__ void prefetch(const char* from, int64_t bytes) {
#if __CUDA_ARCH__ >= 900
  constexpr int kEach = 8192;
#else
  constexpr int kEach = 128;
#endif
  for (int64_t at = threadIdx.x % 32 * kEach; at < bytes; at += 32 * kEach) {
#if __CUDA_ARCH__ >= 900
    const uint32_t size = bytes - at < kEach ? uint32_t(bytes - at) : kEach;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from + at), "r"(size)
                 : "memory");
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at) : "memory");
#endif
  }
}

// A barrier among the first `threads` threads of a block that has others.
__device__ __forceinline__ void sync_first(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// Where one side of the ring stands. Each side goes through all stages in order.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Shared memory: `stages` stages, then two barriers a stage, "full" and "empty".
struct Ring {
  uint32_t data, barriers;
  int stages, stage_bytes;

  __device__ Ring(const void* shared, int stages, int stage_bytes)
      : data(shared_address(shared)), barriers(data + stages * stage_bytes), stages(stages),
        stage_bytes(stage_bytes) {}

  __host__ __device__ static constexpr int bytes(int stages, int stage_bytes) {
    return stages * (stage_bytes + 16);
  }
  __device__ uint32_t stage(RingPosition at) const { return data + at.stage * stage_bytes; }
  __device__ uint32_t full(RingPosition at) const { return barriers + at.stage * 16; }
  __device__ uint32_t empty(RingPosition at) const { return barriers + at.stage * 16 + 8; }

  // By one thread, before a block barrier. `readers`: arrivals that free a stage.
  __device__ void init(int readers, int fillers = kFillArrivals) const {
    for (RingPosition at; at.stage < stages; ++at.stage) {
      barrier_init(full(at), fillers);
      barrier_init(empty(at), readers);
    }
    barrier_fence();
  }
  // By a whole warp that has read a stage. The fence holds the arrival back until the warp's loads
  // are done: loads and the copy engine's writes are of different proxies (PTX ISA, "Async proxy"),
  // and without it the arrival overtakes loads in flight and a row is overwritten while it is read.
  // kLanes arrive, see releasing_lanes().
  template <int kLanes>
  __device__ void release(RingPosition at) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncwarp();
    if (kLanes == 32 || threadIdx.x % 32 == 0) barrier_arrive(empty(at));
  }
  __device__ void wait_filled(RingPosition at) const { barrier_wait(full(at), at.parity); }
  __device__ void wait_free(RingPosition at) const { barrier_wait(empty(at), at.parity ^ 1); }
};

}  // namespace octavo::cuda
