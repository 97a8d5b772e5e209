// The operations as plain functions over raw pointers. No Python types, no framework types.
// Pointers are to host memory; sizes are in elements unless a name says bytes.
#pragma once

#include "types.h"

#include <cstdint>
#include <string>
#include <vector>

namespace octavo {

struct PagedAttention {
  DType dtype;                  // of query, caches and out
  const void* query;            // [tokens, heads, dim], rows query_stride apart
  int64_t query_stride;
  const void* key_cache;        // [blocks, block_size, kv_heads, dim]
  const void* value_cache;
  const int32_t* block_tables;  // [seqs, max_blocks]; entries beyond a sequence are never read
  const int32_t* query_start;   // [seqs + 1]: sequence s owns rows query_start[s]..[s + 1]
  const int32_t* seq_lens;      // [seqs]: tokens in all; the last query stands at seq_lens - 1
  void* out;                    // [tokens, heads, dim], contiguous
  int64_t tokens, seqs, max_blocks, blocks, block_size;
  int64_t heads, kv_heads, dim;
  float scale;
  int64_t window;       // a query sees this many tokens, itself included; 0: all before it
  float softcap;        // scores become softcap * tanh(score / softcap); 0: as they are
  const float* sinks;   // [heads] or null: a score that takes weight and gives no value
  int threads;
};

// A piece of attention work: queries first..first + count of one sequence, under one key head.
struct AttentionItem {
  int32_t seq, kv_head, first, count;
};

struct RmsNorm {
  DType dtype;
  const void* x;       // [tokens, width]
  const void* weight;  // [width]
  void* residual;      // [tokens, width] or null; becomes residual + x, and that is normed
  void* out;           // [tokens, width]
  int64_t tokens, width;
  float eps;
  float offset;  // added to the weight; where it is not 0, the product is rounded only once
  int threads;
};

struct LayerNorm {
  DType dtype;
  const void* x;       // [tokens, width]
  const void* weight;  // [width]
  const void* bias;    // [width] or null
  void* residual;      // as in RmsNorm
  void* out;           // [tokens, width]
  int64_t tokens, width;
  float eps;
  int threads;
};

struct Rope {
  DType dtype;
  void* x;                   // [tokens, heads, dim], rows stride apart, rotated in place
  int64_t stride;
  const int64_t* positions;  // [tokens]
  const float* cos_sin;      // [max_positions, rotary]: rotary/2 cosines, then rotary/2 sines
  int64_t max_positions, tokens, heads, dim;
  int64_t rotary;            // the first elements of a head, which turn; the others stay
  bool interleaved;          // element 2i pairs with 2i + 1, else i with i + rotary/2
  int threads;
};

struct Activation {
  DType dtype;
  Function function;
  bool gated;     // x is [tokens, 2 * width]: function(left half) * right half of each row
  const void* x;  // [tokens, width]
  void* out;      // [tokens, width]
  int64_t tokens, width;
  int threads;
};

struct WriteKv {
  const void* key;       // [tokens, row_bytes], rows key_stride bytes apart
  int64_t key_stride;
  const void* value;
  int64_t value_stride;
  void* key_cache;       // [num_slots, row_bytes]
  void* value_cache;
  const int64_t* slots;  // [tokens]; -1 stores nothing
  int64_t tokens, num_slots, row_bytes;
};

struct CopyBlocks {
  void* cache;           // [planes, blocks, block_bytes]
  int64_t planes, blocks, block_bytes;
  const int64_t* pairs;  // [num_pairs, 2]: source, destination; copied in order
  int64_t num_pairs;
};

// Each checks its indices first and throws std::invalid_argument naming the argument.
void paged_attention(const PagedAttention& args);
void rms_norm(const RmsNorm& args);
void layer_norm(const LayerNorm& args);
void rope(const Rope& args);
void activation(const Activation& args);
void write_kv(const WriteKv& args);
void copy_blocks(const CopyBlocks& args);

// Instruction sets that this machine can run, best first; the one in use; a switch for tests.
std::vector<std::string> isas();
std::string isa();
void use_isa(const std::string& name);

}  // namespace octavo
