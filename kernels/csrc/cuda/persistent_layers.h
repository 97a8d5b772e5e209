// All layers of a decode step of few rows in one kernel; or all of the step, from tokens to logits.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

// A layer's products, in their order, by the shape of their matrix.
enum Product : int {
  kQkv = 0,     // [(heads + 2 kv_heads) dim, hidden]
  kOutput = 1,  // [hidden, heads dim]
  kGateUp = 2,  // [2 inner, hidden]
  kDown = 3,    // [hidden, inner]
};
constexpr int kProducts = 4;
constexpr int kHead = kProducts;  // [vocab, hidden], behind the last layer

// One layer, as the table on the device has it.
struct DecoderLayer {
  const void* matrices[kProducts];
  const void* input_norm;   // RMS norms before attention and before the MLP
  const void* mlp_norm;
  const void* query_norm;   // [dim] of each head, or null for none
  const void* key_norm;
  void* keys;               // [blocks, block_size, kv_heads, dim]
  void* values;
};

// What does not change from step to step.
struct LayerStack {
  DType dtype;                // bf16 or fp16: of all tensors
  const DecoderLayer* layers; // on the device, ready before the first launch
  int64_t num_layers;
  int64_t hidden, inner, heads, kv_heads, dim;
  Function function;          // of the gate
  float norm_eps, norm_offset, scale;
  const float* cos_sin;       // [max_positions, dim]: dim / 2 cosines, then as many sines
  int64_t max_positions;
  int64_t num_blocks, block_size;
  int64_t vocab;              // a multiple of 8, or 0: nothing of the rest is there
  const void* embedding;      // [vocab, hidden]
  const void* final_norm;     // [hidden]
  const void* head;           // [vocab, hidden]
  // How memory is asked, see persistent_producer.cuh; benchmarks try others.
  int ahead;                  // stages of layers under way at once; 0: as many as suit the sizes
  int engine_tokens;          // longest chunk of cached tokens that the copy engine brings; -1: as
                              // suits the sizes
};

// One token of each of `rows` sequences. A sequence of length 0 is a row of padding.
struct DecodeRows {
  void* residual;             // [rows, hidden], becomes the last layer's output; or null, and then
  const int64_t* tokens;      // [rows]: of the embedding; below 0 stands for zeros
  void* logits;               // [rows, vocab]
  int64_t rows;
  const int64_t* positions;   // [rows]
  const int64_t* slots;       // [rows]; -1 stores nothing
  const int32_t* seq_lens;    // [rows], the token's own included
  const int32_t* block_tables;  // [rows, max_blocks]
  int64_t max_blocks;
};

constexpr int kPersistentRows = 8;  // at most, where shared memory suffices

// How many rows the current device's kernel takes; 0: there is none for these sizes or this device,
// or other processes share it by MPS.
int64_t persistent_rows(const LayerStack& stack);

// Bytes of the workspace, which is zero before the first launch and then the kernel's own. One
// workspace serves launches of one stack that follow each other, in graphs or not.
int64_t persistent_workspace(const LayerStack& stack);

// One launch of a block for each multiprocessor, all of which have to run at the same time:
// two of them on different streams would wait for each other, and end in an error after seconds.
void persistent_layers(const LayerStack& stack, const DecodeRows& rows, void* workspace,
                       cudaStream_t stream);

}  // namespace octavo::cuda
