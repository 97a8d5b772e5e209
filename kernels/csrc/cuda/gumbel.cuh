// Draws by the Gumbel-max rule: the largest of logit / temperature + Gumbel noise is a sample of
// the softmax (Maddison, Tarlow, Minka: "A* Sampling", 2014). Token v's noise in a draw is a hash
// of (key, v), the very bits that octavo.engine.sampler makes.
//
// Noise costs much more than a logit does to read, so most is never made in full. With d the lead
// of the best score so far over a token's logit, its noise wins only if its uniform number 1 - v
// has v < exp(-d): the hash's upper half tells that, without a logarithm. The few tokens that
// pass are scored in double precision as the reference does, so the bound decides what is looked at
// and never what is drawn.
#pragma once

#include "cuda/logit_row.cuh"

namespace octavo::cuda {

constexpr double kLog2e = 1.4426950408889634;
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

// The upper halves of mix() for eight consecutive words, but for their lowest bit: the smallest and
// the largest. The words must be the same from bit 30 on: see `straddles`.
struct UpperHalves {
  uint32_t smallest = ~0u, largest = 0;

  __device__ __forceinline__ explicit UpperHalves(uint64_t first) {
    const uint64_t start = first + kGolden;
    const uint32_t low = uint32_t(start), high = uint32_t(start >> 32);
    const uint32_t shifted = __funnelshift_r(low, high, 30);
    const uint32_t high_part = (high ^ (high >> 30)) * uint32_t(kMix1);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const uint32_t a = (low + i) ^ shifted;
      const uint64_t product =
          uint64_t(a) * uint32_t(kMix1) + (uint64_t(a * uint32_t(kMix1 >> 32) + high_part) << 32);
      const uint32_t p_low = uint32_t(product), p_high = uint32_t(product >> 32);
      const uint32_t b = p_low ^ __funnelshift_r(p_low, p_high, 27);
      const uint32_t c = p_high ^ (p_high >> 27);
      const uint32_t upper =
          __umulhi(b, uint32_t(kMix2)) + b * uint32_t(kMix2 >> 32) + c * uint32_t(kMix2);
      smallest = min(smallest, upper);
      largest = max(largest, upper);
    }
  }
};

__device__ __forceinline__ bool straddles(uint64_t first) {
  return (uint32_t(first + kGolden) & 0x3fffffffu) > 0x3fffffffu - (kGroup - 1);
}

// Gumbel noise from a hashed word, operation by operation as the reference has it.
__device__ __forceinline__ double gumbel(uint64_t word) {
  const double uniform = __dmul_rn(__dadd_rn(double(word >> 11), 0.5), 0x1p-53);
  return -log(-log(uniform));
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

// The best of all threads of the block, known to its first warp.
__device__ inline Best block_best(Best own, Best* scratch) {
  for (int by = 16; by > 0; by /= 2) {
    const double score = __shfl_xor_sync(~0u, own.score, by);
    const int id = __shfl_xor_sync(~0u, own.id, by);
    own.take(score, id);
  }
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x < 32) {
    own = threadIdx.x < blockDim.x / 32 ? scratch[threadIdx.x] : Best::none();
    for (int by = 16; by > 0; by /= 2) {
      const double score = __shfl_xor_sync(~0u, own.score, by);
      const int id = __shfl_xor_sync(~0u, own.id, by);
      own.take(score, id);
    }
  }
  return own;
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
  double temperature;

  __device__ double score(float x, int id) const {
    return double(x) / temperature + gumbel(mix(key + uint64_t(int64_t(id))));
  }
};

// A block's search for the best score over some groups of a row. `bound`, in shared memory, is a
// score that some token reaches, in units of log 2, as ordered bits; it must begin as that of
// -infinity.
template <typename T>
struct GumbelScan {
  const Row<T>& row;
  const Draw& draw;
  volatile uint32_t* bound;
  Order order;
  uint64_t cut;      // only tokens at this place or before it are drawn
  float cut_value;   // what they have at least
  float per_unit;    // log2(e) / temperature
  Best best = Best::none();

  // Of all noise, in units of log 2: the smallest v is 2^-54.
  static constexpr float kNoBetter = 32.0f - 54.5f;

  __device__ GumbelScan(const Row<T>& row, const Draw& draw, uint32_t* bound, uint64_t cut)
      : row(row), draw(draw), bound(bound), order(row.vocab), cut(cut),
        cut_value(cut == 0 ? -INFINITY : from_ordered(order.key(cut))),
        per_unit(float(kLog2e / draw.temperature)) {}

  __device__ __forceinline__ void raise(float score) {
    const uint32_t most = __reduce_max_sync(~0u, ordered(score));
    if (threadIdx.x % 32 == 0) atomicMax(const_cast<uint32_t*>(bound), most);
    __syncwarp();
  }

  // A score that one of the warp's tokens reaches: the smallest logit with the group's most noise,
  // or the largest with its least. For all threads of a warp.
  __device__ void begin(int group, const Bounds& bounds, bool active) {
    const uint64_t word = word_of(row.first(group));
    float reached = -INFINITY;
    if (active && row.whole(group) && !straddles(word)) {
      const UpperHalves upper(word);
      if (bounds.smallest > cut_value) {
        reached = fmaf(bounds.smallest, per_unit, least_noise(upper.largest));
      }
      if (bounds.largest > cut_value) {
        reached = fmaxf(reached, fmaf(bounds.largest, per_unit, least_noise(upper.smallest)));
      }
    }
    raise(reached);
  }

  __device__ __forceinline__ uint64_t word_of(int id) const {
    return draw.key + uint64_t(int64_t(id));
  }

  // In units of log 2: noise is at least log(1 - v) - log(v), which is no logarithm of a logarithm.
  __device__ __forceinline__ static float least_noise(uint32_t upper) {
    const float v = fmaf(float(~upper), 0x1p-32f, 0x1p-31f);
    return log2_quick(1.0f - v) - log2_quick(v);
  }

  // Two groups, of which `largest` is the largest logit. For all threads of a warp.
  __device__ __forceinline__ void take(int group, int other, float largest) {
    const float reached = from_ordered(*bound);
    // Rounding here is some 2^-22 of the scores; NaN (infinities) looks at everything.
    const float margin = fmaf(fabsf(reached), 0x1p-20f, 0x1p-14f);
    const float lead = fminf(fmaf(largest, per_unit, 32.0f + margin - reached), 40.0f);
    const uint32_t limit = __float2uint_ru(exp2_quick(lead) + 1.0f);  // saturates
    bool here = lead > kNoBetter && largest >= cut_value && largest > -INFINITY, there = here;
    if (here) {
      const uint64_t word = word_of(row.first(group)), word2 = word_of(row.first(other));
      here = ~UpperHalves(word).largest <= limit || straddles(word);
      there = ~UpperHalves(word2).largest <= limit || straddles(word2);
    }
    if (__any_sync(~0u, here || there)) {
      float score = here ? look(row.first(group), limit) : -INFINITY;
      if (there) score = fmaxf(score, look(row.first(other), limit));
      raise(score);
    }
  }

  // Scores those of eight tokens that may win; says what they reach. Rare, so it is written short.
  __device__ float look(int first, uint32_t limit) {
    float reached = -INFINITY;
#pragma unroll 1
    for (int id = max(first, 0); id < min(first + kGroup, row.vocab); ++id) {
      const uint64_t hashed = mix(word_of(id));
      // The upper half's lowest bit was left out above: one more.
      if (~uint32_t(hashed >> 32) > limit + (limit != ~0u)) continue;
      const float x = row.value(id);
      if (!(x > -INFINITY) || order.place(x, id) < cut) continue;
      const double score = double(x) / draw.temperature + gumbel(hashed);
      best.take(score, id);
      reached = fmaxf(reached, float(score * kLog2e));
    }
    return reached;
  }
};

}  // namespace octavo::cuda
