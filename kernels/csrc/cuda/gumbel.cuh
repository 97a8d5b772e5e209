// Draws by the Gumbel-max rule, the largest of log-probability + Gumbel noise is a sample of the
// softmax, from the top down (Maddison, Tarlow, Minka: "A* Sampling", 2014): first a segment of
// consecutive tokens by the probability of all of them, then one of its tokens. So a token costs an
// exponential, and noise, which costs far more, is made for few. It is a hash of the key and of the
// segment or the token: the very bits that octavo.engine.sampler makes.
#pragma once

#include "cuda/logit_row.cuh"

namespace octavo::cuda {

constexpr int kSegment = 32 * kGroup;  // tokens; a warp reads it at once
static_assert(kSegment == 256, "as in the reference");

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;
constexpr uint64_t kMix1 = 0xBF58476D1CE4E5B9ull;
constexpr uint64_t kMix2 = 0x94D049BB133111EBull;

// splitmix64's finaliser after one increment (Steele, Lea, Flood, 2014).
__device__ __forceinline__ uint64_t mix(uint64_t value) {
  value += kGolden;
  value = (value ^ (value >> 30)) * kMix1;
  value = (value ^ (value >> 27)) * kMix2;
  return value ^ (value >> 31);
}

// Gumbel noise, -log(-log(u)), of the uniform number u that the reference makes of a hashed word.
// In float32, because a logarithm in double takes as long as a read of memory; near 1 it is made of
// what u lacks, so that it is right to some 2^-23 everywhere.
__device__ __forceinline__ float gumbel(uint64_t word) {
  const uint64_t bits = word >> 11, lacking = (uint64_t(1) << 53) - 1 - bits;
  const bool upper = lacking < bits;
  const float nearer = (float(upper ? lacking : bits) + 0.5f) * 0x1p-53f;
  return -logf(upper ? -log1pf(-nearer) : -logf(nearer));
}

struct Best {
  double score;
  int id;  // -1: none yet

  static __device__ __forceinline__ Best none() { return {-INFINITY, -1}; }

  __device__ __forceinline__ void take(double other_score, int other_id) {
    const bool first = uint32_t(other_id) < uint32_t(id);  // none is the last
    const bool wins = other_score > score || (other_score == score && first);
    score = wins ? other_score : score;
    id = wins ? other_id : id;
  }
};

// The best of the warp's threads, known to all of them.
__device__ __forceinline__ Best warp_best(Best own) {
#pragma unroll
  for (int by = 16; by > 0; by /= 2) {
    const double score = __shfl_xor_sync(~0u, own.score, by);
    const int id = __shfl_xor_sync(~0u, own.id, by);
    own.take(score, id);
  }
  return own;
}

// The best of all threads of the block, known to its first warp.
__device__ inline Best block_best(Best own, Best* scratch) {
  own = warp_best(own);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x >= 32) return own;
  return warp_best(threadIdx.x < blockDim.x / 32 ? scratch[threadIdx.x] : Best::none());
}

// Tokens in the order in which they are kept: larger logits first, of equals the lower id.
struct Order {
  int id_bits;

  __device__ explicit Order(int vocab) { id_bits = 32 - __clz(vocab); }
  __device__ uint64_t place(uint32_t key, int id) const {
    return uint64_t(key) << id_bits | (((1u << id_bits) - 1) - id);
  }
  __device__ uint64_t place(float x, int id) const { return place(ordered(x), id); }
  __device__ uint64_t first(uint32_t key) const { return uint64_t(key) << id_bits; }
  __device__ uint64_t last(uint32_t key) const { return first(key) | ((1u << id_bits) - 1); }
  __device__ uint32_t key(uint64_t place) const { return uint32_t(place >> id_bits); }
  __device__ int id(uint64_t place) const {
    const uint32_t mask = (1u << id_bits) - 1;
    return int(mask - (uint32_t(place) & mask));
  }
};

// Draws of one row: what its noise and its temperature are.
struct Draw {
  uint64_t key;
  double temperature, inverse;  // 1 / temperature

  __device__ double score(float x, int id) const {
    return double(x) * inverse + gumbel(mix(key + uint64_t(id)));
  }

  // Of a segment that has exp(log_mass) before the softmax is normed.
  __device__ double segment_score(double log_mass, int segment) const {
    return log_mass + gumbel(mix(~key + uint64_t(segment)));
  }
};

}  // namespace octavo::cuda
