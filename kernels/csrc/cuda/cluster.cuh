// Pairs of blocks that read each other's copies: a cluster (PTX ISA, "Cluster of cooperative thread
// arrays"), and tensor copies for one or both of them. Compute capability 9.0a; elsewhere the
// functions are empty and no kernel that calls them is launched.
#pragma once

#include "cuda/warpgroup.cuh"

#include <cuda.h>

#include <cstdint>

namespace octavo::cuda {

constexpr int kCluster = 2;  // blocks

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define OCTAVO_CLUSTER __cluster_dims__(kCluster, 1, 1)
#else
#define OCTAVO_CLUSTER
#endif

__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank = 0;
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

// Among all threads of the cluster; what was written before is seen after.
__device__ __forceinline__ void sync_cluster() {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;"
               ::: "memory");
#endif
}

// At the same barrier of block `rank`. What it hands over was read by products, for which a wait
// is enough: no fence for the whole device, as a release to the cluster would be.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(rank)
      : "memory");
#endif
}

// A box of the matrix from (column, row) on, to this block's shared memory.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int column, int row,
                                         uint32_t barrier) {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
#endif
}

// The same to both blocks, each of whose barriers at that place hears of it.
__device__ __forceinline__ void copy_box_to_both(uint32_t to, const CUtensorMap* map, int column,
                                                 int row, uint32_t barrier) {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(uint16_t((1 << kCluster) - 1))
      : "memory");
#endif
}

}  // namespace octavo::cuda
