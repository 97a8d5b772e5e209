// Activations and the embedding. Pointers are to the device and aligned to 16 bytes; widths are
// multiples of 8.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

struct ActivationRows {
  DType dtype;
  Function function;
  bool gated;     // x is [tokens, 2 * width]: function(left half) * right half of each row
  const void* x;  // [tokens, width]
  void* out;      // [tokens, width]
  int64_t tokens;
  int width;
};

struct Embedding {
  DType dtype;
  const int64_t* token_ids;  // [tokens]; below 0 is no token, whose row of the table is zeros
  const void* table;         // [vocabulary, width]
  float scale;               // of the table's rows, before positions are added; 1: as they are
  const int64_t* positions;  // [tokens], read where there is a table of positions
  const void* position_table;  // [max_positions, width] or null
  void* out;                 // [tokens, width]
  int64_t tokens, vocabulary, max_positions;
  int width;
};

void activation(const ActivationRows& args, cudaStream_t stream);

// An id or position beyond its table is a bug of the caller: it ends the process's context.
void embed(const Embedding& args, cudaStream_t stream);

}  // namespace octavo::cuda
