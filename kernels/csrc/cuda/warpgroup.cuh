// Hopper's warpgroup matrix products, with operands in swizzled shared memory (PTX ISA,
// "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions"): four warps multiply
// together and in the background. Compute capability 9.0 alone has them; elsewhere the functions
// are empty and no kernel that calls them is launched.
//
// A result of 64 x n lies in registers as 16 rows a warp, each 16 x 8 part as in mma.cuh. Between
// the issue of a product and the wait for it nothing may touch its registers: settle() keeps the
// compiler from moving what follows the wait ahead of it.
#pragma once

#include "cuda/mma.cuh"

#include <type_traits>

namespace octavo::cuda {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define OCTAVO_HAS_WARPGROUPS 1
#else
#define OCTAVO_HAS_WARPGROUPS 0
#endif

// A matrix in shared memory as panels: rows of 128 bytes, whose 16-byte units are swizzled by the
// row's number modulo 8, one row after another; panels begin at multiples of 1024 bytes.
// `panel_bytes` lies between panels, where the product goes along the rows' elements.
__device__ __forceinline__ uint64_t panel_descriptor(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  constexpr uint64_t kEightRows = uint64_t(1024 >> 4) << 32;
  return kSwizzle128 | kEightRows | uint64_t(panel_bytes >> 4) << 16 | (address & 0x3ffff) >> 4;
}

// Before the first product after other instructions wrote its registers.
__device__ __forceinline__ void products_begin() {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Ends a group of products.
__device__ __forceinline__ void products_end() {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits for all groups of products but the newest `kPending`.
template <int kPending>
__device__ __forceinline__ void products_wait() {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// The same, but not before `result` (not negative) is there. The assembler knows only which
// registers products use, and moves a wait ahead of arithmetic on others: what was to run under the
// products runs after them then. Across a trap it moves nothing, also if that is never sprung.
template <int kPending>
__device__ __forceinline__ void products_wait_after(float result) {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("{ .reg .pred never; setp.lt.f32 never, %0, 0f00000000; @never trap; }" ::"f"(result)
               : "memory");
  products_wait<kPending>();
#endif
}

template <int kTiles>
__device__ __forceinline__ void settle(float (&d)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
  }
}

template <int kTiles>
__device__ __forceinline__ void settle(uint32_t (&a)[kTiles][4]) {
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    asm volatile("" : "+r"(a[n][0]), "+r"(a[n][1]), "+r"(a[n][2]), "+r"(a[n][3])::"memory");
  }
}

// Lets products see what this thread wrote to shared memory, once those who multiply know of it.
__device__ __forceinline__ void publish_to_products() {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Registers a thread, for all four warps of a warpgroup: fewer for copies, more for products.
template <int kRegisters>
__device__ __forceinline__ void give_registers_up() {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#if OCTAVO_HAS_WARPGROUPS
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// A tile's four registers, and of some tiles from n on.
#define OCTAVO_TILE(d, n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
#define OCTAVO_TILES_4(d, n) \
  OCTAVO_TILE(d, n), OCTAVO_TILE(d, n + 1), OCTAVO_TILE(d, n + 2), OCTAVO_TILE(d, n + 3)
#define OCTAVO_TILES_8(d, n) OCTAVO_TILES_4(d, n), OCTAVO_TILES_4(d, n + 4)
#define OCTAVO_TILES_16(d, n) OCTAVO_TILES_8(d, n), OCTAVO_TILES_8(d, n + 8)
#define OCTAVO_REGISTERS_32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define OCTAVO_REGISTERS_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// d = a * b, or d += a * b where `add`: a is 64 x 16 with its 16 along the panels' rows, b the
// same of 128 columns.
template <typename T>
__device__ __forceinline__ void multiply_panels(float (&d)[16][4], uint64_t a, uint64_t b,
                                                bool add) {
#if OCTAVO_HAS_WARPGROUPS
#define OCTAVO_PRODUCT(TYPE)                                                                  \
  asm volatile(                                                                               \
      "{ .reg .pred add; setp.ne.b32 add, %66, 0; "                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE " " OCTAVO_REGISTERS_64    \
      ", %64, %65, add, 1, 1, 0, 0; }"                                                        \
      : OCTAVO_TILES_16(d, 0)                                                                 \
      : "l"(a), "l"(b), "r"(int(add)))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    OCTAVO_PRODUCT("bf16");
  } else {
    OCTAVO_PRODUCT("f16");
  }
#undef OCTAVO_PRODUCT
#endif
}

// d += a * b: a is 64 x 16 in registers, b 16 x 8 kTiles with its columns along the panels' rows.
template <typename T, int kTiles>
__device__ __forceinline__ void multiply_across(float (&d)[kTiles][4], const uint32_t (&a)[4],
                                                uint64_t b) {
#if OCTAVO_HAS_WARPGROUPS
#define OCTAVO_PRODUCT(N, TYPE, REGISTERS, TILES, A0, A1, A2, A3, B)                          \
  asm volatile("{ .reg .pred add; setp.ne.b32 add, 1, 0; "                                    \
               "wgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE " " REGISTERS   \
               ", {" A0 ", " A1 ", " A2 ", " A3 "}, " B ", add, 1, 1, 1; }"                   \
               : TILES(d, 0)                                                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define OCTAVO_PRODUCT_128(TYPE)                                                              \
  OCTAVO_PRODUCT("128", TYPE, OCTAVO_REGISTERS_64, OCTAVO_TILES_16, "%64", "%65", "%66",      \
                 "%67", "%68")
#define OCTAVO_PRODUCT_64(TYPE)                                                               \
  OCTAVO_PRODUCT("64", TYPE, OCTAVO_REGISTERS_32, OCTAVO_TILES_8, "%32", "%33", "%34", "%35", \
                 "%36")
  static_assert(kTiles == 8 || kTiles == 16);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kTiles == 16 && kBf16) {
    OCTAVO_PRODUCT_128("bf16");
  } else if constexpr (kTiles == 16) {
    OCTAVO_PRODUCT_128("f16");
  } else if constexpr (kBf16) {
    OCTAVO_PRODUCT_64("bf16");
  } else {
    OCTAVO_PRODUCT_64("f16");
  }
#undef OCTAVO_PRODUCT_64
#undef OCTAVO_PRODUCT_128
#undef OCTAVO_PRODUCT
#endif
}

#undef OCTAVO_REGISTERS_64
#undef OCTAVO_REGISTERS_32
#undef OCTAVO_TILES_16
#undef OCTAVO_TILES_8
#undef OCTAVO_TILES_4
#undef OCTAVO_TILE

}  // namespace octavo::cuda
