// One row of logits as draws see it: scaled, capped, adjusted, eight tokens at a time.
#pragma once

#include "cuda/logit_math.cuh"

#include <cuda_runtime.h>

#include <type_traits>

namespace octavo::cuda {

constexpr int kGroup = 8;  // tokens that a thread takes at once

// A group as it was loaded.
template <typename T>
struct Group {
  uint32_t pairs[kGroup / 2];
};
template <>
struct Group<float> {
  float values[kGroup];
};

// What changes one row's logits; lies in shared memory, for it is much to hold in registers.
struct Adjustment {
  const uint16_t* marks;
  float repetition, presence, frequency;
  bool allowed_only;
  int list_length;
  const int32_t* list_ids;
  const float* list_bias;
  const int64_t* list_until;
  int64_t drawn;

  __device__ float listed(float x, int id) const {
    int low = 0, high = list_length;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (list_ids[middle] < id) low = middle + 1;
      else high = middle;
    }
    for (; low < list_length && list_ids[low] == id; ++low) {
      if (drawn < list_until[low]) x = __fadd_rn(x, list_bias[low]);
    }
    return x;
  }

  // Rounded after each operation, as torch does it: no fused multiply-add.
  __device__ float operator()(float x, int id) const {
    const uint32_t mark = marks[id];
    if (allowed_only && !(mark & kAllowed)) return -INFINITY;
    const uint32_t count = mark & kCountMask;
    if ((count != 0 || (mark & kInPrompt)) && repetition != 1.0f) {
      x = x > 0.0f ? __fdiv_rn(x, repetition) : __fmul_rn(x, repetition);
    }
    if (count != 0) x = __fsub_rn(x, __fadd_rn(__fmul_rn(frequency, float(count)), presence));
    return mark & kListed ? listed(x, id) : x;
  }
};

// Most rows need nothing but a scale and begin where sixteen bytes do. Their whole groups are
// plain: loaded at once and worked on as they are. Elsewhere it goes token by token.
template <typename T>
struct Row {
  const T* data;
  int vocab;
  int num_plain;  // groups
  float scale, softcap;
  const Adjustment* adjustment;  // null where nothing changes the row

  static constexpr int kVectors = kGroup * sizeof(T) / 16;
  using Bits = std::conditional_t<sizeof(T) == 4, float, uint16_t>;  // a logit as it is in memory

  __device__ int groups() const { return (vocab + kGroup - 1) / kGroup; }
  __device__ __forceinline__ bool plain(int group) const { return group < num_plain; }
  __device__ bool simple() const { return softcap == 0.0f && adjustment == nullptr; }

  __device__ void adjust(const Adjustment* by) {
    adjustment = by;
    num_plain = 0;
  }

  __device__ __forceinline__ Group<T> load(int group) const {
    return plain(group) ? load_plain(group) : Group<T>{};
  }

  __device__ __forceinline__ Group<T> load_plain(int group) const {
    Group<T> loaded;
    const uint4* from = reinterpret_cast<const uint4*>(data) + int64_t(group) * kVectors;
    const uint4 a = load_vector(from);
    if constexpr (kVectors == 2) {
      const uint4 b = load_vector(from + 1);
      const uint32_t bits[kGroup] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) loaded.values[i] = __uint_as_float(bits[i]);
    } else {
      loaded.pairs[0] = a.x;
      loaded.pairs[1] = a.y;
      loaded.pairs[2] = a.z;
      loaded.pairs[3] = a.w;
    }
    return loaded;
  }

  // Any group, with -infinity after the row's end.
  __device__ __forceinline__ Group<T> gather(int group) const {
    if (plain(group)) return load_plain(group);
    Group<T> loaded;
    const int first = group * kGroup;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) loaded.values[i] = bits_or_least(first + i);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; i += 2) {
        const uint32_t low = bits_or_least(first + i), high = bits_or_least(first + i + 1);
        loaded.pairs[i / 2] = low | high << 16;
      }
    }
    return loaded;
  }

  __device__ __forceinline__ Bits bits_of(int id) const {
    return reinterpret_cast<const Bits*>(data)[id];
  }

  // As the model gave it.
  __device__ __forceinline__ float raw(int id) const {
    float x;
    if constexpr (sizeof(T) == 4) x = bits_of(id);
    else x = Pair<T>::low(bits_of(id));
    x = scaled(x);
    return softcap == 0.0f ? x : __fmul_rn(softcap, tanhf(__fdiv_rn(x, softcap)));
  }

  // As it is drawn from.
  __device__ __forceinline__ float value(int id) const { return adjusted(raw(id), id); }

  __device__ __forceinline__ float adjusted(float x, int id) const {
    return adjustment == nullptr ? x : (*adjustment)(x, id);
  }

  // Calls f(x, id) for the group's tokens. In a loop, because f may be long; the group is moved
  // along, because registers have no index.
  template <typename F>
  __device__ __forceinline__ void visit(int group, Group<T> loaded, F f) const {
    const int first = group * kGroup;
    if (plain(group)) {
#pragma unroll 1
      for (int i = 0; i < kGroup; i += 2) {
        float x, y;
        take_two(loaded, x, y);
        f(scaled(x), first + i);
        f(scaled(y), first + i + 1);
      }
    } else {
#pragma unroll 1
      for (int id = first; id < min(first + kGroup, vocab); ++id) f(value(id), id);
    }
  }

  // Calls f(x) for tokens as they were loaded, before the scale.
  template <typename F>
  static __device__ __forceinline__ void each_loaded(const Group<T>& group, F f) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if constexpr (sizeof(T) == 4) f(group.values[i]);
      else f(i % 2 == 0 ? Pair<T>::low(group.pairs[i / 2]) : Pair<T>::high(group.pairs[i / 2]));
    }
  }

  // Token by token the larger of the two, NaN if one is.
  static __device__ __forceinline__ Group<T> larger(const Group<T>& a, const Group<T>& b) {
    Group<T> most;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) most.values[i] = max_or_nan(a.values[i], b.values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup / 2; ++i) most.pairs[i] = Pair<T>::larger(a.pairs[i], b.pairs[i]);
    }
    return most;
  }

  // Before the scale; NaN if one is.
  static __device__ __forceinline__ float largest(const Group<T>& group) {
    if constexpr (sizeof(T) == 2) {
      using P = Pair<T>;
      const uint32_t(&p)[kGroup / 2] = group.pairs;
      const uint32_t most = P::larger(P::larger(p[0], p[1]), P::larger(p[2], p[3]));
      return max_or_nan(P::low(most), P::high(most));
    } else {
      float most = group.values[0];
#pragma unroll
      for (int i = 1; i < kGroup; ++i) most = max_or_nan(most, group.values[i]);
      return most;
    }
  }

  static __device__ __forceinline__ float smallest(const Group<T>& group) {
    if constexpr (sizeof(T) == 2) {
      using P = Pair<T>;
      const uint32_t(&p)[kGroup / 2] = group.pairs;
      const uint32_t least = P::smaller(P::smaller(p[0], p[1]), P::smaller(p[2], p[3]));
      return fminf(P::low(least), P::high(least));
    } else {
      float least = group.values[0];
#pragma unroll
      for (int i = 1; i < kGroup; ++i) least = fminf(least, group.values[i]);
      return least;
    }
  }

  __device__ __forceinline__ float scaled(float x) const {
    return scale == 1.0f ? x : __fmul_rn(x, scale);
  }

 private:
  __device__ __forceinline__ Bits bits_or_least(int id) const {
    if (id < vocab) return bits_of(id);
    if constexpr (sizeof(T) == 4) return -INFINITY;
    else return Pair<T>::kLeast;
  }

  // The group's first two; the others come nearer.
  static __device__ __forceinline__ void take_two(Group<T>& group, float& x, float& y) {
    if constexpr (sizeof(T) == 4) {
      x = group.values[0];
      y = group.values[1];
#pragma unroll
      for (int i = 2; i < kGroup; ++i) group.values[i - 2] = group.values[i];
    } else {
      x = Pair<T>::low(group.pairs[0]);
      y = Pair<T>::high(group.pairs[0]);
#pragma unroll
      for (int i = 1; i < kGroup / 2; ++i) group.pairs[i - 1] = group.pairs[i];
    }
  }
};

template <typename T>
__device__ Row<T> row_of(const Logits& logits, int r) {
  const int64_t begin = kept(reinterpret_cast<int64_t>(static_cast<const T*>(logits.data) +
                                                       r * logits.stride));
  const bool vectors = logits.softcap == 0.0f && begin % 16 == 0;
  return {reinterpret_cast<const T*>(begin), logits.vocab, vectors ? logits.vocab / kGroup : 0,
          logits.scale, logits.softcap, nullptr};
}

__device__ inline Adjustment adjustment_of(const Adjustments& all, int pool_row, int64_t drawn) {
  Adjustment own;
  own.marks = all.marks + pool_row * all.marks_stride;
  own.repetition = all.repetition[pool_row];
  own.presence = all.presence[pool_row];
  own.frequency = all.frequency[pool_row];
  own.allowed_only = all.allowed_only[pool_row] != 0;
  own.list_length = all.list_length[pool_row];
  const int64_t at = int64_t(pool_row) * all.list_stride;
  own.list_ids = all.list_ids + at;
  own.list_bias = all.list_bias + at;
  own.list_until = all.list_until + at;
  own.drawn = drawn;
  return own;
}

}  // namespace octavo::cuda
