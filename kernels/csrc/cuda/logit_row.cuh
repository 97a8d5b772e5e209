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
// Most rows need nothing but a scale. There groups are worked on as they were loaded; where more is
// to be done, and at a row's edges, token by token.
template <typename T>
struct Row {
  const T* data;
  int vocab, lead;
  float scale, softcap;
  const Adjustment* adjustment;  // null where nothing changes the row

  __device__ int groups() const { return (vocab + lead + kGroup - 1) / kGroup; }
  __device__ int first(int group) const { return group * kGroup - lead; }
  __device__ bool whole(int first) const { return first >= 0 && first + kGroup <= vocab; }
  __device__ bool plain(int first) const {
    return whole(first) && softcap == 0.0f && adjustment == nullptr;
  }

  // Tokens that the row does not have are -infinity.
  __device__ __forceinline__ Group<T> load(int first) const {
    Group<T> group;
    if (whole(first)) {
      load_whole(group, first);
    } else {
      load_edge(group, first);
    }
    return group;
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

  // Calls f(x, id) for the group's tokens.
  template <typename F>
  __device__ __forceinline__ void visit(const Group<T>& group, int first, F f) const {
    if (plain(first)) {
      if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) f(scaled(group.values[i]), first + i);
      } else {
#pragma unroll
        for (int i = 0; i < kGroup / 2; ++i) {
          f(scaled(Pair<T>::low(group.pairs[i])), first + 2 * i);
          f(scaled(Pair<T>::high(group.pairs[i])), first + 2 * i + 1);
        }
      }
    } else {
#pragma unroll 1
      for (int id = max(first, 0); id < min(first + kGroup, vocab); ++id) f(value(id), id);
    }
  }

  __device__ __forceinline__ Bounds bounds(const Group<T>& group, int first) const {
    if (!plain(first)) return bounds_one_by_one(first);
    if constexpr (sizeof(T) == 2) {
      using P = Pair<T>;
      const uint32_t(&p)[kGroup / 2] = group.pairs;
      const uint32_t large = P::larger(P::larger(p[0], p[1]), P::larger(p[2], p[3]));
      const uint32_t small = P::smaller(P::smaller(p[0], p[1]), P::smaller(p[2], p[3]));
      const float raw = scaled(max_or_nan(P::low(large), P::high(large)));
      return {raw, raw, scaled(fminf(P::low(small), P::high(small)))};
    } else {
      float large = group.values[0], small = group.values[0];
#pragma unroll
      for (int i = 1; i < kGroup; ++i) {
        large = max_or_nan(large, group.values[i]);
        small = fminf(small, group.values[i]);
      }
      return {scaled(large), scaled(large), scaled(small)};
    }
  }

 private:
  __device__ __forceinline__ float scaled(float x) const {
    return scale == 1.0f ? x : __fmul_rn(x, scale);
  }
  __device__ bool holds(int id) const { return id >= 0 && id < vocab; }

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

  __device__ __forceinline__ void load_whole(Group<T>& group, int first) const {
    const uint4 a = load_vector(data + first);
    if constexpr (sizeof(T) == 4) {
      const uint4 b = load_vector(data + first + kGroup / 2);
      const uint32_t bits[kGroup] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < kGroup; ++i) group.values[i] = __uint_as_float(bits[i]);
    } else {
      group.pairs[0] = a.x;
      group.pairs[1] = a.y;
      group.pairs[2] = a.z;
      group.pairs[3] = a.w;
    }
  }

  __device__ __forceinline__ void load_edge(Group<T>& group, int first) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        group.values[i] = holds(first + i) ? data[first + i] : -INFINITY;
      }
    } else {
      const uint16_t* bits = reinterpret_cast<const uint16_t*>(data);
#pragma unroll
      for (int i = 0; i < kGroup / 2; ++i) {
        const int id = first + 2 * i;
        const uint32_t low = holds(id) ? bits[id] : Pair<T>::kLowest;
        const uint32_t high = holds(id + 1) ? bits[id + 1] : Pair<T>::kLowest;
        group.pairs[i] = low | high << 16;
      }
    }
  }
};

template <typename T>
__device__ Row<T> row_of(const Logits& logits, int r) {
  const T* data = static_cast<const T*>(logits.data) + r * logits.stride;
  const int lead = int(reinterpret_cast<uintptr_t>(data) % 16 / sizeof(T));
  return {data, logits.vocab, lead, logits.scale, logits.softcap, nullptr};
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
