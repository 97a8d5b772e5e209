// One row of logits as draws see it: scaled, capped, adjusted, eight tokens at a time.
#pragma once

#include "cuda/logit_math.cuh"

#include <cuda_runtime.h>

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

struct Bounds {
  float raw;       // the largest before adjustments, or NaN if one is NaN
  float largest, smallest;  // after them
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

// Groups begin where sixteen bytes do, so the first may begin `lead` tokens before the row.
//
// Most rows need nothing but a scale. There whole groups are plain: they are worked on as they were
// loaded. Where more is to be done, and at a row's edges, it goes token by token.
template <typename T>
struct Row {
  const T* data;
  const uint4* vectors;  // those of the first group
  int vocab, lead;
  int first_plain, num_plain;  // groups
  float scale, softcap;
  const Adjustment* adjustment;  // null where nothing changes the row

  static constexpr int kVectors = kGroup * sizeof(T) / 16;

  __device__ int groups() const { return (vocab + lead + kGroup - 1) / kGroup; }
  __device__ __forceinline__ int first(int group) const { return group * kGroup - lead; }
  __device__ __forceinline__ bool plain(int group) const {
    return uint32_t(group - first_plain) < uint32_t(num_plain);
  }

  // All of its tokens are the row's.
  __device__ bool whole(int group) const {
    return first(group) >= 0 && first(group) + kGroup <= vocab;
  }

  // Groups from `end` on are not loaded.
  __device__ void load_before(int end) { num_plain = max(0, min(num_plain, end - first_plain)); }

  __device__ void adjust(const Adjustment* by) {
    adjustment = by;
    num_plain = 0;
  }

  // Only a group that is worked on as it is loaded is loaded.
  __device__ __forceinline__ Group<T> load(int group) const {
    Group<T> loaded{};
    if (!plain(group)) return loaded;
    const uint4* from = vectors + int64_t(group) * kVectors;
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

  // As the model gave it.
  __device__ __forceinline__ float raw(int id) const {
    float x;
    if constexpr (sizeof(T) == 4) x = data[id];
    else x = Pair<T>::low(reinterpret_cast<const uint16_t*>(data)[id]);
    x = scaled(x);
    return softcap == 0.0f ? x : __fmul_rn(softcap, tanhf(__fdiv_rn(x, softcap)));
  }

  // As it is drawn from.
  __device__ __forceinline__ float value(int id) const {
    const float x = raw(id);
    return adjustment == nullptr ? x : (*adjustment)(x, id);
  }

  // Calls f(x, id) for the group's tokens. In a loop, because f may be long; the group is moved
  // along, because registers have no index.
  template <typename F>
  __device__ __forceinline__ void visit(int group, Group<T> loaded, F f) const {
    const int first = this->first(group);
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
      for (int id = max(first, 0); id < min(first + kGroup, vocab); ++id) f(value(id), id);
    }
  }

  __device__ __forceinline__ Bounds bounds(int group, const Group<T>& loaded) const {
    if (!plain(group)) return bounds_one_by_one(first(group));
    if constexpr (sizeof(T) == 2) {
      using P = Pair<T>;
      const uint32_t(&p)[kGroup / 2] = loaded.pairs;
      const uint32_t large = P::larger(P::larger(p[0], p[1]), P::larger(p[2], p[3]));
      const uint32_t small = P::smaller(P::smaller(p[0], p[1]), P::smaller(p[2], p[3]));
      const float raw = scaled(max_or_nan(P::low(large), P::high(large)));
      return {raw, raw, scaled(fminf(P::low(small), P::high(small)))};
    } else {
      float large = loaded.values[0], small = loaded.values[0];
#pragma unroll
      for (int i = 1; i < kGroup; ++i) {
        large = max_or_nan(large, loaded.values[i]);
        small = fminf(small, loaded.values[i]);
      }
      return {scaled(large), scaled(large), scaled(small)};
    }
  }

 private:
  __device__ __forceinline__ float scaled(float x) const {
    return scale == 1.0f ? x : __fmul_rn(x, scale);
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

  __device__ __forceinline__ Bounds bounds_one_by_one(int first) const {
    Bounds found{-INFINITY, -INFINITY, INFINITY};
#pragma unroll 1
    for (int id = max(first, 0); id < min(first + kGroup, vocab); ++id) {
      float x = raw(id);
      found.raw = max_or_nan(found.raw, x);
      if (adjustment != nullptr) x = (*adjustment)(x, id);
      found.largest = fmaxf(found.largest, x);
      found.smallest = fminf(found.smallest, x);
    }
    return found;
  }
};

template <typename T>
__device__ Row<T> row_of(const Logits& logits, int r) {
  const int64_t begin = kept(reinterpret_cast<int64_t>(static_cast<const T*>(logits.data) +
                                                       r * logits.stride));
  const T* data = reinterpret_cast<const T*>(begin);
  const int lead = int(kept(begin % 16 / int(sizeof(T))));
  const uint4* vectors = reinterpret_cast<const uint4*>(data - lead);
  const int first_plain = lead > 0;
  const int end_plain = logits.softcap == 0.0f ? (logits.vocab + lead) / kGroup : 0;
  return {data, vectors, logits.vocab, lead, first_plain, max(0, end_plain - first_plain),
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
