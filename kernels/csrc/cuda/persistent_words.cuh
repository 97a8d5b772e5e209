// How blocks of one grid hand each other results without barriers: each 8-byte word holds 4 bytes
// of data and the tag of the pass that wrote it. Words of 8 bytes are written and read whole, so a
// reader that sees the tag has the data: no fence, no counter, one way to the L2 cache and one back
// (as NCCL's protocol "LL" has it; Hu et al., "Demystifying NCCL", arXiv 2507.04786).
#pragma once

#include <cstdint>

namespace octavo::cuda::persistent {

using Word = uint64_t;

__device__ __forceinline__ void put_word(Word* to, uint32_t data, uint32_t tag) {
  const Word word = uint64_t(tag) << 32 | data;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

// Two words side by side, from 16 bytes on; each is whole, the pair need not be.
struct WordPair {
  Word low, high;

  __device__ __forceinline__ bool are_of(uint32_t tag) const {
    return uint32_t(low >> 32) == tag && uint32_t(high >> 32) == tag;
  }
  __device__ __forceinline__ uint2 data() const { return {uint32_t(low), uint32_t(high)}; }
  __device__ __forceinline__ float2 floats() const {
    return {__uint_as_float(uint32_t(low)), __uint_as_float(uint32_t(high))};
  }
};

__device__ __forceinline__ WordPair peek_pair(const Word* from) {
  WordPair pair;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(pair.low), "=l"(pair.high)
               : "l"(from)
               : "memory");
  return pair;
}

__device__ __forceinline__ void put_floats(Word* to, float2 values, uint32_t tag) {
  put_word(to, __float_as_uint(values.x), tag);
  put_word(to + 1, __float_as_uint(values.y), tag);
}

__device__ __forceinline__ Word peek(const Word* from) {
  Word word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  return word;
}

// Words that all blocks read: in several copies, because one that many wait for answers slowly (28
// layers of 0.6B on an H100, 600 tokens cached: 624 us with one copy, 602 with four).
struct SharedWords {
  static constexpr int kCopies = 4;
  Word* words;
  int size;  // of a copy

  __device__ __forceinline__ void put(int64_t place, uint32_t data, uint32_t tag) const {
    Word* to = words + place;
#pragma unroll
    for (int i = 0; i < kCopies; ++i, to += size) put_word(to, data, tag);
  }
  __device__ __forceinline__ const Word* mine() const {
    return words + blockIdx.x % kCopies * size;
  }
};

// A wait that never becomes a hang: after seconds, which only a bug takes, the kernel ends in an
// error of its process's context.
class Patience {
 public:
  __device__ __forceinline__ void spend() {
    if (++polls_ % 1024 != 0) return;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (begin_ == 0) begin_ = now;
    if (now - begin_ > kNanoseconds) __trap();
  }

 private:
  static constexpr uint64_t kNanoseconds = 10'000'000'000;
  uint32_t polls_ = 0;
  uint64_t begin_ = 0;
};

// Waits for the pairs first, first + step, .. below `end` of `words`, and gives each to `take`.
// kBatch of them are on their way at a time.
template <int kBatch, typename Take>
__device__ __forceinline__ void take_pairs(const Word* words, uint32_t tag, int first, int step,
                                           int end, Take&& take) {
#pragma unroll 1
  for (int at = first; at < end; at += kBatch * step) {
    WordPair pairs[kBatch];
    bool missing[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) missing[i] = at + i * step < end;
    Patience patience;
    for (bool ready = false; !ready;) {
      // Only what is not there yet: all blocks ask at once, and each answer takes its time.
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (missing[i]) pairs[i] = peek_pair(words + 2 * (at + i * step));
      }
      ready = true;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        missing[i] = missing[i] && !pairs[i].are_of(tag);
        ready &= !missing[i];
      }
      if (!ready) patience.spend();
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (at + i * step < end) take(at + i * step, pairs[i].data());
    }
  }
}

}  // namespace octavo::cuda::persistent
