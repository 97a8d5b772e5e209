// One warp's way through its share of a row: of each segment the mass, or of all the largest logit.
// Four segments are read at once, sixteen bytes a lane each, and the next four are on their way
// while these are worked on.
//
// Four segments share one reference for their exponentials. A segment so far below it that its mass
// vanishes could not be drawn anyway: noise spans 42, and 87 would be needed. The reference depends
// on the tokens alone, not on how rows are divided, so a mass has the same bits in every batch.
#pragma once

#include "cuda/gumbel.cuh"

namespace octavo::cuda {

constexpr int kUnitSegments = 4;  // a unit is what is read at once
constexpr int kUnitGroups = kUnitSegments * kSegment / kGroup;
constexpr int kMostUnits = 32 / kUnitSegments;  // of one warp: a lane for each segment

// What was found in some segments of a row.
struct Part {
  Best best;       // a segment, by its score: in a draw from all tokens mass and noise, else the
                   // largest logit
  float smallest;  // of logits; not where all tokens may be drawn
  bool unusable;   // NaN or infinity
  bool finite;     // something is more than -infinity, before adjustments

  static __device__ __forceinline__ Part none() { return {Best::none(), INFINITY, false, false}; }

  __device__ __forceinline__ void join(const Part& other) {
    best.take(other.best.score, other.best.id);
    smallest = fminf(smallest, other.smallest);
    unusable |= other.unusable;
    finite |= other.finite;
  }
};

// Of all lanes, known to all of them.
__device__ __forceinline__ Part warp_part(const Part& own) {
  return {warp_best(own.best), from_ordered(__reduce_min_sync(~0u, ordered(own.smallest))),
          bool(__any_sync(~0u, own.unusable)), bool(__any_sync(~0u, own.finite))};
}

// Four sums over a warp at once: lane l gets that of number l % 4.
__device__ __forceinline__ float sum_of_four(const float (&x)[4]) {
  const int lane = threadIdx.x % 32;
  const bool odd = lane & 1, upper = lane & 2;
  const float low = (odd ? x[1] : x[0]) + __shfl_xor_sync(~0u, odd ? x[0] : x[1], 1);
  const float high = (odd ? x[3] : x[2]) + __shfl_xor_sync(~0u, odd ? x[2] : x[3], 1);
  float sum = (upper ? high : low) + __shfl_xor_sync(~0u, upper ? low : high, 2);
#pragma unroll
  for (int by = 4; by < 32; by *= 2) sum += __shfl_xor_sync(~0u, sum, by);
  return sum;
}

template <typename T>
struct Unit {
  Group<T> groups[kUnitSegments];
};

template <typename T>
struct SegmentScan {
  const Row<T>& row;
  int begin, end;  // units
  float raw = -INFINITY;  // the largest before adjustments, or NaN

  __device__ SegmentScan(const Row<T>& row, int begin, int end)
      : row(row), begin(begin), end(end) {}

  static __device__ __forceinline__ int group_of(int unit, int k) {
    return unit * kUnitGroups + k * 32 + threadIdx.x % 32;
  }

  // What a row that is not simple needs is not known yet: nothing of it is loaded.
  __device__ __forceinline__ Unit<T> load(int unit) const {
    Unit<T> loaded{};
    if (unit >= end || !row.simple()) return loaded;
    if (row.plain((unit + 1) * kUnitGroups - 1)) {
#pragma unroll
      for (int k = 0; k < kUnitSegments; ++k) loaded.groups[k] = row.load_plain(group_of(unit, k));
    } else {
#pragma unroll
      for (int k = 0; k < kUnitSegments; ++k) loaded.groups[k] = row.gather(group_of(unit, k));
    }
    return loaded;
  }

  // The segments' own largest logits go to `keys`, if it is not null.
  __device__ __forceinline__ Part largest(Unit<T> now, uint32_t* keys) {
    Best best = Best::none();
    float largest = -INFINITY, smallest = INFINITY;
    const auto take = [&](float x, int segment) {
      if (x > largest) {
        largest = x;
        best.id = segment;
      }
      if (keys == nullptr) return;
      const uint32_t key = __reduce_max_sync(~0u, ordered(x));
      if (threadIdx.x % 32 == 0 && segment * kSegment < row.vocab) keys[segment] = key;
    };
    each_unit(now, [&](int unit, const Unit<T>& loaded) {
      const int segment = unit * kUnitSegments;
      if (!row.simple()) {
#pragma unroll 1
        for (int k = 0; k < kUnitSegments; ++k) {
          float most = -INFINITY;
          each_token(group_of(unit, k), [&](float x) {
            most = fmaxf(most, x);
            smallest = fminf(smallest, x);
          });
          take(most, segment + k);
        }
        return;
      }
#pragma unroll
      for (int k = 0; k < kUnitSegments; ++k) {
        const float x = row.scaled(Row<T>::largest(loaded.groups[k]));
        raw = max_or_nan(raw, x);
        take(x, segment + k);
        const int group = group_of(unit, k);
        if ((group + 1) * kGroup <= row.vocab) {
          smallest = fminf(smallest, row.scaled(Row<T>::smallest(loaded.groups[k])));
        } else {
          each_token(group, [&](float one) { smallest = fminf(smallest, one); });
        }
      }
    });
    best.score = largest;
    return part(best, smallest);
  }

  __device__ __forceinline__ Part drawn(const Draw& draw, Unit<T> now) {
    const float per_unit = float(row.scale * kLog2e * draw.inverse);
    Mass mass{0.0, 0.0f, -1};
    each_unit(now, [&](int unit, const Unit<T>& loaded) {
      if (!row.simple() || !quick_masses(unit, loaded, per_unit, mass)) {
        masses_one_by_one(unit, draw.inverse, mass);
      }
    });
    if (!(mass.share > 0.0f)) return part(Best::none(), INFINITY);
    const double log_mass = mass.reference + logf(mass.share);
    return part({draw.segment_score(log_mass, mass.segment), mass.segment}, INFINITY);
  }

 private:
  // What a lane keeps of a segment: the sum of exp(logit / temperature) is exp(reference) * share.
  struct Mass {
    double reference;
    float share;
    int segment;
  };

  template <typename F>
  __device__ __forceinline__ void each_unit(Unit<T> now, F f) {
#pragma unroll 1
    for (int unit = begin; unit < end; ++unit) {
      const Unit<T> next = load(unit + 1);
      f(unit, now);
      now = next;
    }
  }

  // Calls f(x) for the lane's tokens, one by one.
  template <typename F>
  __device__ __forceinline__ void each_token(int group, F f) {
    const int first = group * kGroup;
#pragma unroll 1
    for (int id = first; id < min(first + kGroup, row.vocab); ++id) {
      const float x = row.raw(id);
      raw = max_or_nan(raw, x);
      f(row.adjusted(x, id));
    }
  }

  __device__ __forceinline__ Part part(const Best& best, float smallest) const {
    return {best, smallest, !(raw < INFINITY), raw > -INFINITY};
  }

  // False where numbers are too large or nothing is finite. A logit's exponent is one multiply-add,
  // in units of log 2, and whatever its reference was rounded to is what is kept of it.
  __device__ __forceinline__ bool quick_masses(int unit, const Unit<T>& loaded, float per_unit,
                                               Mass& mass) {
    Group<T> larger = loaded.groups[0];
#pragma unroll
    for (int k = 1; k < kUnitSegments; ++k) larger = Row<T>::larger(larger, loaded.groups[k]);
    const float most = Row<T>::largest(larger);
    raw = max_or_nan(raw, row.scaled(most));
    const float reference = from_ordered(__reduce_max_sync(~0u, ordered(most))) * per_unit;
    if (!(fabsf(reference) < 0x1p100f)) return false;
    float sums[kUnitSegments] = {};
#pragma unroll
    for (int k = 0; k < kUnitSegments; ++k) {
      Row<T>::each_loaded(loaded.groups[k], [&](float x) {
        sums[k] += exp2_quick(fmaf(x, per_unit, -reference));
      });
    }
    const float sum = sum_of_four(sums);
    const int lane = threadIdx.x % 32;
    if (lane / kUnitSegments == unit - begin) {
      mass = {double(reference) * kLn2, sum, unit * kUnitSegments + lane % kUnitSegments};
    }
    return true;
  }

  // Each segment with its own largest logit as the reference.
  __device__ __forceinline__ void masses_one_by_one(int unit, double inverse, Mass& mass) {
    const float per_unit = float(kLog2e * inverse);
#pragma unroll 1
    for (int k = 0; k < kUnitSegments; ++k) {
      float most = -INFINITY, sum = 0.0f;
      each_token(group_of(unit, k), [&](float x) {
        if (x > most) {
          sum = fmaf(sum, exp2_quick((most - x) * per_unit), 1.0f);
          most = x;
        } else if (x > -INFINITY) {
          sum += exp2_quick((x - most) * per_unit);
        }
      });
      const float all = from_ordered(__reduce_max_sync(~0u, ordered(most)));
      sum = most > -INFINITY ? sum * exp2_quick((most - all) * per_unit) : 0.0f;
      for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      if (threadIdx.x % 32 == (unit - begin) * kUnitSegments + k) {
        mass = {double(all) * inverse, sum, unit * kUnitSegments + k};
      }
    }
  }
};

}  // namespace octavo::cuda
