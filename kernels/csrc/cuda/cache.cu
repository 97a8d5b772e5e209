#include "cuda/cache.h"

#include "cuda/launch.h"

#include <algorithm>

namespace octavo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBytes = 16;  // a thread's access
// PCIe is filled by few blocks; the others are left to whatever computes beside it.
constexpr int kSwapBlocks = 32;
constexpr int kSwapLoads = 4;  // in flight in a thread: the way to host memory is long

void check_block(int64_t block_bytes) {
  if (block_bytes % kBytes != 0) {
    throw std::invalid_argument("a KV block of " + std::to_string(block_bytes) +
                                " bytes is not a multiple of 16");
  }
}

// A thread has one column of a plane, the same 16 bytes of every block, and takes the pairs one
// after the other: so they are in order, and no thread waits for another.
__global__ void __launch_bounds__(kThreads) copy_columns(const BlockCopies args) {
  wait_for_previous();
  allow_next();
  const int64_t columns = args.block_bytes / kBytes;
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  uint4* const plane = static_cast<uint4*>(args.cache) + blockIdx.y * args.blocks * columns + column;
  for (int64_t i = 0; i < args.num_pairs; ++i) {
    const int64_t source = args.pairs[2 * i], destination = args.pairs[2 * i + 1];
    if (source < 0 || source >= args.blocks || destination < 0 || destination >= args.blocks) {
      __trap();
    }
    plane[destination * columns] = plane[source * columns];
  }
}

// Where number `at` of a block's 16-byte pieces, over all planes, lies in the cache.
__device__ __forceinline__ uint4* in_cache(const BlockCopies& args, int64_t block, int64_t at,
                                           int64_t columns) {
  const int64_t plane = at / columns;
  return static_cast<uint4*>(args.cache) + (plane * args.blocks + block) * columns + at % columns;
}

template <bool out>
__global__ void __launch_bounds__(kThreads) swap_pieces(const BlockSwaps args) {
  wait_for_previous();
  const BlockCopies& device = args.device;
  const int64_t columns = device.block_bytes / kBytes, pieces = columns * device.planes;
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t pair = 0; pair < device.num_pairs; ++pair) {
    const int64_t source = device.pairs[2 * pair], destination = device.pairs[2 * pair + 1];
    const int64_t block = out ? source : destination, slot = out ? destination : source;
    if (block < 0 || block >= device.blocks || slot < 0 || slot >= args.host_blocks) __trap();
    uint4* const host = static_cast<uint4*>(args.host) + slot * pieces;
    const int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x;
    for (int64_t at = first; at < pieces; at += kSwapLoads * stride) {
      uint4 held[kSwapLoads];
#pragma unroll
      for (int i = 0; i < kSwapLoads; ++i) {
        const int64_t here = at + i * stride;
        if (here < pieces) held[i] = out ? *in_cache(device, block, here, columns) : host[here];
      }
#pragma unroll
      for (int i = 0; i < kSwapLoads; ++i) {
        const int64_t here = at + i * stride;
        if (here < pieces) (out ? host[here] : *in_cache(device, block, here, columns)) = held[i];
      }
    }
  }
}

}  // namespace

void copy_blocks(const BlockCopies& args, cudaStream_t stream) {
  check_block(args.block_bytes);
  if (args.num_pairs == 0) return;
  const int64_t columns = args.block_bytes / kBytes;
  const dim3 grid(unsigned((columns + kThreads - 1) / kThreads), unsigned(args.planes));
  launch(copy_columns, grid, dim3(kThreads), 0, stream, args);
}

void swap_blocks(const BlockSwaps& args, cudaStream_t stream) {
  check_block(args.device.block_bytes);
  if (args.device.num_pairs == 0 || args.device.planes == 0) return;
  launch(args.out ? swap_pieces<true> : swap_pieces<false>, dim3(kSwapBlocks), dim3(kThreads), 0,
         stream, args);
}

}  // namespace octavo::cuda
