// Copies of whole KV blocks, within the device and to and from host memory. Which ones is read on
// the device, so that a CUDA graph can hold the copy. A stray block number is a bug of the
// caller: it ends the process's context rather than overwrite another sequence's block.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

struct BlockCopies {
  void* cache;           // [planes, blocks, block_bytes]; block_bytes is a multiple of 16
  int64_t planes, blocks, block_bytes;
  const int64_t* pairs;  // [num_pairs, 2]: source, destination
  int64_t num_pairs;
};

// In every plane, in the order of the pairs.
void copy_blocks(const BlockCopies& args, cudaStream_t stream);

struct BlockSwaps {
  BlockCopies device;
  void* host;            // [host_blocks, planes, block_bytes], pinned
  int64_t host_blocks;
  bool out;              // from the cache to the host, else back; no block twice in one call
};

void swap_blocks(const BlockSwaps& args, cudaStream_t stream);

}  // namespace octavo::cuda
