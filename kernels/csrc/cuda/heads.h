// Queries, keys and values between their projection and attention: each head is optionally
// normed, optionally rotated, and stored in a row of its own or at its slot of the KV cache.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

// Some heads of every token. A row is a token's, `heads` dense heads of `dim` elements.
struct HeadGroup {
  const void* from;     // rows from_stride elements apart
  int64_t from_stride;
  void* to;             // rows to_stride elements apart; `from` itself is allowed
  int64_t to_stride;
  const void* weight;   // [dim] of the root-mean-square norm of each head, or null for none
  int heads;
  bool rotated;
  bool at_slot;         // the row of `to` is the token's slot, else the token itself
};

constexpr int kMaxHeadGroups = 3;
constexpr int kMaxHeadDim = 256;

struct Heads {
  DType dtype;
  HeadGroup groups[kMaxHeadGroups];  // those with no heads are not read
  int64_t tokens;
  int dim;                   // a multiple of 8, at most kMaxHeadDim
  float eps, offset;         // of the norm; offset is added to the weight
  const int64_t* positions;  // [tokens], read where a group is rotated
  const float* cos_sin;      // [max_positions, rotary]: rotary/2 cosines, then rotary/2 sines
  int64_t max_positions;
  int rotary;                // a multiple of 16; of 8 where interleaved
  bool interleaved;          // element 2i pairs with 2i + 1, else i with i + rotary/2
  const int64_t* slots;      // [tokens], read where a group is at_slot; -1 stores nothing
  int64_t num_slots;
};

// Pointers are to the device, aligned to 16 bytes, strides multiples of 8. A position or slot
// outside its table is a bug of the caller: it ends the process's context rather than overwrite
// the keys of another sequence.
void heads(const Heads& args, cudaStream_t stream);

}  // namespace octavo::cuda
