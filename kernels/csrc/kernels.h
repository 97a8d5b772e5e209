// The operations as plain functions over raw pointers. No Python types, no framework types.
// Pointers are to host memory; sizes are in elements unless a name says bytes.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace octavo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

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
  int threads;
};

struct Rope {
  DType dtype;
  void* x;                   // [tokens, heads, dim], rows stride apart, rotated in place
  int64_t stride;
  const int64_t* positions;  // [tokens]
  const float* cos_sin;      // [max_positions, dim]: dim/2 cosines, then dim/2 sines
  int64_t max_positions, tokens, heads, dim;
  int threads;
};

struct SiluAndMul {
  DType dtype;
  const void* x;  // [tokens, 2 * width]
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
void rope(const Rope& args);
void silu_and_mul(const SiluAndMul& args);
void write_kv(const WriteKv& args);
void copy_blocks(const CopyBlocks& args);

// Instruction sets that this machine can run, best first; the one in use; a switch for tests.
std::vector<std::string> isas();
std::string isa();
void use_isa(const std::string& name);

}  // namespace octavo
