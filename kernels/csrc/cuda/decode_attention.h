// Attention of one query a sequence over its paged keys and values: the host's side.
//
// A step is planned once, for all layers and on the device, then every layer runs over the same
// plan; both have grids that no length changes, so that one captured graph serves every batch of
// as many sequences. A sequence is cut into chunks whose size depends on its own length and the
// plan's `Chunking` alone, so that with one chunking for all steps neither its batch mates nor
// their number change one bit of its result.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

constexpr int kChunkStep = 64;  // tokens: a tile of 16 for each of a block's warps

// How a sequence is cut: into chunks of `chunk` tokens, or where that were more than `max_chunks`
// into so many of equal size, rounded up to kChunkStep. `chunk` is a multiple of kChunkStep.
struct Chunking {
  int32_t chunk, max_chunks;
};

// One chunk of one sequence, under every key head. Begin and end are positions of keys.
struct alignas(16) DecodeChunk {
  int32_t sequence, begin, end;
  int16_t index, count;  // which of the sequence's chunks, of how many
};

// Device buffers of a plan. Several sliding windows are planned at once: one list for each.
struct DecodePlan {
  const int32_t* windows;  // [num_windows]; 0 is none
  int32_t num_windows;
  DecodeChunk* chunks;     // [num_windows, list_size], the longest first
  int32_t* counts;         // [num_windows]
  int32_t list_size;       // at least num_decodes * max_chunks
  Chunking chunking;
};

// What the layers hand each other; each leaves `arrivals` and `ticket` zero, as it found them.
struct DecodeWorkspace {
  int32_t* ticket;    // [1]
  int32_t* arrivals;  // [num_decodes * kv_heads * row tiles]
  float* values;      // [num_decodes * max_chunks, heads, dim]: weighted values, not yet divided
  float* sums;        // [num_decodes * max_chunks, heads, 2]: largest score (log2), sum of weights
};

struct DecodeAttention {
  DType dtype;                  // bf16 or fp16: of query, caches and out
  const void* query;            // [num_decodes, heads, dim], rows query_stride elements apart
  int64_t query_stride;
  const void* key_cache;        // [blocks, block_size, kv_heads, dim]
  const void* value_cache;
  const int32_t* block_tables;  // [num_decodes, max_blocks]
  int64_t max_blocks, block_size;
  void* out;                    // [num_decodes, heads, dim], contiguous
  int64_t heads, kv_heads, dim;
  float scale;
  float softcap;                // 0: none
  const float* sinks;           // [heads] or null
  int32_t window;               // which of the plan's windows
  int32_t stages;               // tiles of a warp in shared memory; 0: what suits the dim
  int32_t blocks_per_sm;        // at most so many; 0: as many as fit
};

// Whether there is a kernel: dims 64, 80, 96, 128, 256, block sizes 8, 16 .. that are powers of 2.
bool decode_serves(int64_t dim, int64_t block_size);

// Fills the plan's lists from the lengths of the first `num_decodes` sequences; a length of 0 is a
// padding row. Nothing here depends on a layer but the window.
void plan_decode(const DecodePlan& plan, const int32_t* seq_lens, int32_t num_decodes,
                 cudaStream_t stream);

// Writes all of `out`; zeros for padding rows.
void decode_attention(const DecodeAttention& args, const DecodePlan& plan,
                      const DecodeWorkspace& workspace, cudaStream_t stream);

}  // namespace octavo::cuda
