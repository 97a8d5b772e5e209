// Mixtures of experts: each token goes through the few experts that its router likes best. All of
// it runs on grids that follow from the number of tokens alone, so that a graph can hold it.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 32;

// How gate and up become one. With a limit l: gate * sigmoid(alpha * gate) * (up + 1), gate cut
// off above l, up on both sides; without: function(gate) * up.
struct ExpertGate {
  Function function;
  float alpha, limit;
};

// Rows of one expert, among the pairs (token, choice) sorted by expert.
struct ExpertTile {
  int32_t expert;  // -1: no tile
  int32_t first, rows;
};

struct Mixture {
  DType dtype;          // bf16 or fp16: of all tensors but those said to be otherwise
  const void* x;        // [tokens, hidden]
  const void* logits;   // [tokens, experts], of the router
  const void* gate_up;  // [experts * 2 * inner, hidden]: of each expert all gates, then all ups
  const void* gate_up_bias;  // [experts * 2 * inner] or null
  const void* down;          // [experts * hidden, inner]
  const void* down_bias;     // [experts * hidden] or null
  void* out;                 // [tokens, hidden]
  int64_t tokens, hidden, inner, experts, top_k;
  bool normalized;  // the chosen experts' weights sum to one
  ExpertGate gate;
  // Room for what lies between; pairs = tokens * top_k.
  float* weights;     // [pairs] of the chosen experts
  int32_t* chosen;    // [pairs] experts
  int32_t* order;     // [pairs] pairs, sorted by expert, of equal ones the first token first
  int32_t* place;     // [pairs] where in `order` each is
  ExpertTile* tiles;  // [mixture_tiles()]
  void* activated;    // [pairs, inner], in that order
  void* results;      // [pairs, hidden]
};

// Whether there are kernels: at most 512 experts of which 32 are chosen, hidden and inner sizes
// multiples of 8.
bool mixture_serves(int64_t hidden, int64_t inner, int64_t experts, int64_t top_k);

// The most tiles that these numbers of tokens and experts can need.
int64_t mixture_tiles(int64_t tokens, int64_t experts, int64_t top_k);

// Five launches. A token's bits do not depend on the other tokens.
void mixture(const Mixture& args, cudaStream_t stream);

}  // namespace octavo::cuda
