// Attention of chunks of queries over paged keys and values: the host's side.
//
// A step is planned once, for all layers; then every layer runs over the same plan. The queries
// of all heads that share a key head are packed as rows (token by token, the heads of a token
// side by side), rows are cut into tiles, and where the tiles are too few to fill the device,
// their keys are split into spans. The plan lists the (tile, span) items, longest first.
//
// What runs and its grids follow from PrefillSizes. Made for any batch, they follow from the number
// of tokens alone, so that a captured graph serves whatever is planned ahead of its replay.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

// One piece of work, under every key head: a tile of rows over a span of keys.
struct PrefillItem {
  int32_t sequence;
  int32_t tile;        // its rows are tile * tile_rows .. of the sequence's tokens * group
  int32_t first, end;  // positions of the keys; first is a multiple of 128, so is an inner end
  int32_t partial;     // where its result goes if the tile has several spans, else -1
  int32_t part;        // which of the tile's spans; sinks belong to the first
};

// A tile that was split: its results are partial .. partial + parts.
struct PrefillSplit {
  int32_t sequence, tile, partial, parts;
};

struct PrefillBatch {
  const int32_t* query_start;  // [seqs + 1]
  const int32_t* seq_lens;     // [seqs]
  int32_t num_decodes;         // so many sequences at the front, of one token each, are not ours
  int32_t seqs, tokens;        // of the whole batch, decodes included
  int32_t heads, kv_heads, dim;
};

// What the plan's buffers have to hold: bounds from what the host knows, for any lengths.
struct PrefillSizes {
  bool warpgroups;       // which of the two kernels runs
  int32_t tile_rows;
  int32_t max_items;
  int32_t max_splits;    // split tiles; 0: nothing is split
  int32_t max_partials;  // results of their spans
};

struct PrefillPlan {
  PrefillSizes sizes;
  int32_t* counts;       // [2]: items, splits
  PrefillItem* items;    // [max_items]
  PrefillSplit* splits;  // [max_splits]
  float* partial_out;    // [max_partials, kv_heads, tile_rows, dim], before the division
  float* partial_sums;   // [max_partials, kv_heads, tile_rows, 2]: maximum (log2), sum of weights
};

struct PrefillAttention {
  DType dtype;                  // bf16 or fp16: of query, caches and out
  const void* query;            // [tokens, heads, dim], rows query_stride elements apart
  int64_t query_stride;
  const void* key_cache;        // [blocks, block_size, kv_heads, dim]
  const void* value_cache;
  const int32_t* block_tables;  // [seqs, max_blocks]
  int64_t max_blocks, block_size;
  void* out;                    // [tokens, heads, dim]
  float scale;                  // positive
  int32_t window;               // 0: none
  float softcap;                // 0: none
  const float* sinks;           // [heads] or null
};

// Whether there is a kernel: dims 64, 80, 96, 128, 256; block sizes 8, 16 .. that are powers of 2.
bool prefill_serves(int64_t dim, int64_t block_size);

struct PrefillOptions {
  // Tiles are split into spans of at least so many keys, 0: never. Unsplit and without warpgroups
  // a row's bits depend on its own keys alone, whatever the chunks and the batch.
  int32_t min_span;
  bool warpgroups;  // Hopper's products, where there are tiles of 128 rows and a kernel for the dim
  bool any_batch;   // the sizes hold for any batch of as many tokens and no more sequences
};

PrefillSizes prefill_sizes(const PrefillBatch& batch, int max_query_len, PrefillOptions options);

// How large a plan's device buffers are, and the plan that lies in them.
int64_t prefill_list_words(const PrefillSizes& sizes);  // of 4 bytes
int64_t prefill_partial_floats(const PrefillSizes& sizes, const PrefillBatch& batch);
PrefillPlan prefill_plan(const PrefillSizes& sizes, const PrefillBatch& batch, int32_t* lists,
                         float* partials);

// Fills the plan's counts, items and splits.
void plan_prefill(const PrefillBatch& batch, const PrefillPlan& plan, PrefillOptions options,
                  cudaStream_t stream);

// Writes the rows of `out` of all sequences but the decodes.
void prefill_attention(const PrefillAttention& args, const PrefillBatch& batch,
                       const PrefillPlan& plan, cudaStream_t stream);

// The part of prefill_attention() for a plan with warpgroups.
void prefill_warpgroup(const PrefillAttention& args, const PrefillBatch& batch,
                       const PrefillPlan& plan, int multiprocessors, cudaStream_t stream);

}  // namespace octavo::cuda
