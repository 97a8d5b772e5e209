// Products of stages that a cluster's ring brings: two warpgroups take 64 rows each of a stage's
// first matrix, by all rows of its second (PTX ISA, "wgmma").
#pragma once

#include "cuda/cluster.cuh"
#include "cuda/pipeline.cuh"
#include "cuda/warpgroup.cuh"

namespace octavo::cuda {

constexpr int kDepth = 64;             // columns a stage
constexpr int kRowBytes = kDepth * 2;  // the swizzle's width

constexpr int kTiles = 32;  // of 8 columns, of a thread's results

// clang-format off
#define OCTAVO_TILE(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define OCTAVO_TILES_4(d, n) \
  OCTAVO_TILE(d, n), OCTAVO_TILE(d, n + 1), OCTAVO_TILE(d, n + 2), OCTAVO_TILE(d, n + 3)
#define OCTAVO_TILES_16(d, n) \
  OCTAVO_TILES_4(d, n), OCTAVO_TILES_4(d, n + 4), OCTAVO_TILES_4(d, n + 8), OCTAVO_TILES_4(d, n + 12)
#define OCTAVO_REGISTERS \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define OCTAVO_PRODUCT(TYPE)                                                                     \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, %130, 0; "                                    \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" OCTAVO_REGISTERS \
               "}, %128, %129, add, 1, 1, 0, 0; }"                                               \
               : OCTAVO_TILES_16(d, 0), OCTAVO_TILES_16(d, 16)                                   \
               : "l"(a), "l"(b), "r"(int(add)))
// clang-format on

// d = a * b^T, or d += a * b^T where `add`: a is 64 x 16, b 8 kTiles x 16, both with the 16 along
// their panels' rows.
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
#undef OCTAVO_REGISTERS
#undef OCTAVO_TILES_16
#undef OCTAVO_TILES_4
#undef OCTAVO_TILE

// A warp has left the stage, in both blocks.
__device__ __forceinline__ void release_to_both(const Ring& ring, RingPosition at) {
  __syncwarp();
  const int lane = threadIdx.x % 32;
  if (lane < kCluster) arrive_at(ring.empty(at), lane);
}

// d is the product of so many stages, the first of which is at `at`. A stage's first matrix takes
// `first_bytes`, its second lies behind it.
template <typename T>
__device__ __forceinline__ void multiply_stages(float (&d)[kTiles][4], const Ring& ring,
                                                RingPosition& at, int steps, int first_bytes) {
  const uint32_t of_group = threadIdx.x / 128 * (first_bytes / 2);
  RingPosition before;
  for (int step = 0; step < steps; ++step) {
    ring.wait_filled(at);
    const uint32_t a = ring.stage(at) + of_group, b = ring.stage(at) + first_bytes;
    products_begin();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      multiply<T>(d, panel_descriptor(a + k * 32, 16), panel_descriptor(b + k * 32, 16),
                  step > 0 || k > 0);
    }
    products_end();
    if (step > 0) {
      products_wait<1>();
      release_to_both(ring, before);
    }
    before = at;
    at.advance(ring.stages);
  }
  products_wait<0>();
  settle(d);
  release_to_both(ring, before);
}

}  // namespace octavo::cuda
