// Where a row is cut: its k largest logits, or the fewest that reach a share of the probability.
// No sort of the row: a histogram over all of it finds the bin in which the cut falls, and only
// what could matter is put into a list and sorted. A bin that is too much for it is divided again.
//
// Weights (probabilities before they are normed) are added as integers, so a sum does not depend on
// the order of atomic operations, and equal rows get equal tokens.
#pragma once

#include "cuda/gumbel.cuh"

namespace octavo::cuda {

constexpr int kBins = 2048;
constexpr int kBinBits = 11;
constexpr int kList = kBins;  // a bin each
constexpr int kSelectThreads = kBins / 2;

struct SelectShared {
  uint32_t count[kBins], weight_low[kBins], weight_high[kBins];
  uint64_t list[kList];
  uint64_t warp_weight[32];
  uint32_t warp_count[32];
  Best warp_best[32];
  uint32_t listed, key, total_count;
  int segment;
  uint64_t total_weight;
  struct Found {
    int bin;
    uint32_t before_count, count;
    uint64_t before_weight;
  } found;
};

// What to look for: the place of the target-th token, or of the one whose weight reaches it.
struct Target {
  bool by_weight;
  uint64_t amount;
};

// Places between two, in bins of the value or of 2^shift places each.
struct Range {
  uint64_t low, high;
  int shift;

  __device__ bool by_value() const { return shift < 0; }
  __device__ bool everything() const { return low == 0 && by_value(); }
  __device__ bool holds(uint64_t place) const { return low <= place && place <= high; }
  __device__ int bin(uint64_t place) const { return int((high - place) >> shift); }
  __device__ Range part(int bin) const {
    const uint64_t size = uint64_t(1) << shift, top = high - (uint64_t(bin) << shift);
    return {top - low < size ? low : top - size + 1, top, 0};
  }
  __device__ void divide() { shift = max(0, 64 - __clzll(high - low) - kBinBits); }
};

// What is kept: tokens that come at `from` or before; of these, if `last_bin` is one, those up to
// that bin are a few more than are kept and fit into the list.
struct Cut {
  uint64_t from;
  int last_bin;

  __device__ bool listable() const { return last_bin < kBins; }
};

template <typename T>
struct RowSelect {
  const Row<T>& row;
  SelectShared& shared;
  Order order;
  float largest, smallest;
  float bins_per_unit;
  float per_unit_high, per_unit_low;  // log2(e) / temperature, in two parts
  bool weighted;

  static constexpr float kWeightOne = 0x1p44f;  // kMaxVocab of them fit into 63 bits

  __device__ RowSelect(const Row<T>& row, SelectShared& shared, float largest, float smallest,
                       double temperature, bool weighted)
      : row(row), shared(shared), order(row.vocab), largest(largest), smallest(smallest),
        per_unit_high(float(kLog2e / temperature)),
        per_unit_low(float(kLog2e / temperature - per_unit_high)), weighted(weighted) {
    // Bins of equal width: most rows are cut within a few units, and few have all so near.
    const float width = fminf(largest - smallest, 16.0f * fmaxf(1.0f, float(temperature)));
    bins_per_unit = fminf(float(kBins - 1) / width, 1e30f);
  }

  // Rises where x falls. Rounded by adding 2^23, for conversions are slow.
  __device__ __forceinline__ int bin(float x) const {
    const float place = fminf((largest - x) * bins_per_unit, float(kBins - 1));
    return int(__float_as_uint(place + 0x1p23f) & (kBins - 1));
  }

  // exp((x - largest) / temperature)
  __device__ __forceinline__ float ratio(float x) const {
    const float below = x - largest;
    const float exponent = below * per_unit_high;
    if (!(exponent > -46.0f)) return 0.0f;
    const float rest = fmaf(below, per_unit_high, -exponent) + below * per_unit_low;
    const float power = exp2_quick(exponent);
    return fmaf(power, rest * 0.693147181f, power);
  }

  __device__ __forceinline__ uint64_t weight(float x) const {
    return __float2ull_rn(ratio(x) * kWeightOne);
  }

  // Calls f(x, id) for the tokens of the row, each in one thread.
  template <typename F>
  __device__ __forceinline__ void each(F f) const {
    const int groups = row.groups();
    int group = threadIdx.x;
    Group<T> now = row.load(group);
    for (; group < groups; group += kSelectThreads) {
      const Group<T> next = row.load(group + kSelectThreads);
      row.visit(group, now, f);
      now = next;
    }
  }

  // Counts and weights by bin of the tokens in the range.
  __device__ __forceinline__ void histogram(const Range& range) {
    clear();
    uint32_t last_count = 0;
    uint64_t last_weight = 0;
    each([&](float x, int id) {
      if (!range.everything() && !range.holds(order.place(x, id))) return;
      const int b = range.by_value() ? bin(x) : range.bin(order.place(x, id));
      const uint64_t w = weighted ? weight(x) : 0;
      if (b == kBins - 1) {  // where most of the row is: not a matter for atomics
        ++last_count;
        last_weight += w;
        return;
      }
      atomicAdd(&shared.count[b], 1);
      add_weight(b, w);
    });
    for (int by = 16; by > 0; by /= 2) {
      last_count += __shfl_xor_sync(~0u, last_count, by);
      last_weight += __shfl_xor_sync(~0u, last_weight, by);
    }
    if (threadIdx.x % 32 == 0 && last_count != 0) {
      atomicAdd(&shared.count[kBins - 1], last_count);
      add_weight(kBins - 1, last_weight);
    }
    __syncthreads();
  }

  // 64 bits in two halves: there is an instruction for 32 in shared memory, and the upper half is
  // seldom touched.
  __device__ __forceinline__ void add_weight(int b, uint64_t w) {
    const uint32_t low = uint32_t(w);
    if (w == 0) return;
    const uint32_t before = atomicAdd(&shared.weight_low[b], low);
    const uint32_t high = uint32_t(w >> 32) + (before + low < before);
    if (high != 0) atomicAdd(&shared.weight_high[b], high);
  }

  __device__ void clear() {
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += kSelectThreads) {
      shared.count[b] = shared.weight_low[b] = shared.weight_high[b] = 0;
    }
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
  }

  __device__ __forceinline__ uint64_t weight_of_bin(int b) const {
    return uint64_t(shared.weight_high[b]) << 32 | shared.weight_low[b];
  }

  // Sums over all bins, for find().
  __device__ void add_up(uint32_t& before_count, uint64_t& before_weight) {
    const int b = 2 * threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t own_count = shared.count[b] + shared.count[b + 1];
    const uint64_t own_weight = weight_of_bin(b) + weight_of_bin(b + 1);
    uint32_t count = own_count;
    uint64_t weight = own_weight;
    for (int by = 1; by < 32; by *= 2) {
      const uint32_t c = __shfl_up_sync(~0u, count, by);
      const uint64_t w = __shfl_up_sync(~0u, weight, by);
      count += lane >= by ? c : 0;
      weight += lane >= by ? w : 0;
    }
    if (lane == 31) {
      shared.warp_count[warp] = count;
      shared.warp_weight[warp] = weight;
    }
    __syncthreads();
    before_count = count - own_count;
    before_weight = weight - own_weight;
    for (int w = 0; w < warp; ++w) {
      before_count += shared.warp_count[w];
      before_weight += shared.warp_weight[w];
    }
    if (threadIdx.x == kSelectThreads - 1) {
      shared.total_count = before_count + own_count;
      shared.total_weight = before_weight + own_weight;
    }
  }

  // Makes the totals known.
  __device__ void total() {
    uint32_t count;
    uint64_t weight;
    add_up(count, weight);
    __syncthreads();
  }

  // The bin in which the target is reached; it must be, by what the bins hold together.
  __device__ SelectShared::Found find(Target target) {
    uint32_t before_count;
    uint64_t before_weight;
    add_up(before_count, before_weight);
    for (int b = 2 * threadIdx.x; b < 2 * int(threadIdx.x) + 2; ++b) {
      const uint32_t count = shared.count[b];
      const uint64_t weight = weight_of_bin(b);
      const uint64_t before = target.by_weight ? before_weight : before_count;
      const uint64_t own = target.by_weight ? weight : count;
      if (before < target.amount && target.amount <= before + own) {
        shared.found = {b, before_count, count, before_weight};
      }
      before_count += count;
      before_weight += weight;
    }
    __syncthreads();
    const SelectShared::Found found = shared.found;
    __syncthreads();
    return found;
  }

  // Puts what `wanted(x, id)` says into the list, in the order of Order. There must be room.
  template <typename F>
  __device__ __forceinline__ int gather(F wanted) {
    clear();
    each([&](float x, int id) {
      if (wanted(x, id)) shared.list[atomicAdd(&shared.listed, 1)] = order.place(x, id);
    });
    __syncthreads();
    const int length = shared.listed;
    sort(length);
    return length;
  }

  // Largest first, by a bitonic network (Batcher, 1968) over the next power of two.
  __device__ void sort(int length) {
    int size = 32;
    while (size < length) size *= 2;
    for (int i = length + threadIdx.x; i < size; i += kSelectThreads) shared.list[i] = 0;
    __syncthreads();
    const int i = threadIdx.x;
    for (int run = 2; run <= size; run *= 2) {
      for (int by = run / 2; by > 0; by /= 2) {
        if (i < size / 2) {
          const int a = 2 * i - (i & (by - 1)), b = a + by;
          const uint64_t x = shared.list[a], y = shared.list[b];
          if ((x < y) == ((a & run) == 0)) {
            shared.list[a] = y;
            shared.list[b] = x;
          }
        }
        __syncthreads();
      }
    }
  }

  // The first `length` of the list as bins of one token each.
  __device__ void list_as_bins(int length) {
    clear();
    for (int i = threadIdx.x; i < length; i += kSelectThreads) {
      const uint64_t w = weighted ? weight(from_ordered(order.key(shared.list[i]))) : 0;
      shared.count[i] = 1;
      shared.weight_low[i] = uint32_t(w);
      shared.weight_high[i] = uint32_t(w >> 32);
    }
    __syncthreads();
  }

  // The first `length` of the list by segment, a bin each.
  __device__ void list_by_segment(int length) {
    static_assert(kBins * kSegment >= kMaxVocab);
    clear();
    for (int i = threadIdx.x; i < length; i += kSelectThreads) {
      const uint64_t place = shared.list[i];
      add_weight(order.id(place) / kSegment, weight(from_ordered(order.key(place))));
    }
    __syncthreads();
  }

  // The tokens at this place or before, by segment.
  __device__ __forceinline__ void row_by_segment(uint64_t from) {
    clear();
    const int segments = (row.vocab + kSegment - 1) / kSegment;
    int group = threadIdx.x;  // a warp takes a segment
    Group<T> now = row.load(group);
    for (int segment = threadIdx.x / 32; segment < segments; segment += kSelectThreads / 32) {
      const Group<T> next = row.load(group + kSelectThreads);
      float sum = 0.0f;
      row.visit(group, now, [&](float x, int id) {
        sum += order.place(x, id) >= from ? ratio(x) : 0.0f;
      });
      for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      if (threadIdx.x % 32 == 0) {
        const uint64_t w = __float2ull_rn(sum * kWeightOne);
        shared.weight_low[segment] = uint32_t(w);
        shared.weight_high[segment] = uint32_t(w >> 32);
      }
      group += kSelectThreads;
      now = next;
    }
    __syncthreads();
  }

  // One of the segments that are in the bins, known to all threads.
  __device__ __forceinline__ int draw_segment(const Draw& draw) {
    Best best = Best::none();
    const int segments = (row.vocab + kSegment - 1) / kSegment;
    for (int segment = threadIdx.x; segment < segments; segment += kSelectThreads) {
      const uint64_t w = weight_of_bin(segment);
      if (w != 0) best.take(draw.segment_score(log(double(w)), segment), segment);
    }
    best = block_best(best, shared.warp_best);
    if (threadIdx.x == 0) shared.segment = best.id;
    __syncthreads();
    return shared.segment;
  }

  // The smallest key in [low, high] for which holds(key), which is so for `high` and all above it.
  template <typename F>
  __device__ uint32_t lowest_key(uint32_t low, uint32_t high, F holds) {
    if (threadIdx.x < 32) {
      while (low < high) {
        const uint64_t span = high - low;
        const uint32_t middle = low + uint32_t(span * threadIdx.x / 32);
        const uint32_t found = __ballot_sync(~0u, holds(middle));
        const int lane = found == 0 ? 32 : __ffs(found) - 1;
        const uint32_t old_low = low;
        if (lane > 0) low = old_low + uint32_t(span * (lane - 1) / 32) + 1;
        if (lane < 32) high = old_low + uint32_t(span * lane / 32);
      }
      if (threadIdx.x == 0) shared.key = high;
    }
    __syncthreads();
    const uint32_t key = shared.key;
    __syncthreads();
    return key;
  }

  // All of what is kept, and what else there is room for, into the list.
  __device__ __forceinline__ int gather(const Cut& cut) {
    return gather([&](float x, int id) {
      return bin(x) <= cut.last_bin && (cut.from == 0 || order.place(x, id) >= cut.from);
    });
  }

  // Where the target falls among the tokens that come at `from` or before. choose() says what it is
  // once the totals are known; an amount of 0 cuts nothing.
  template <typename F>
  __device__ __forceinline__ Cut search(uint64_t from, F choose) {
    Range range{from, ~uint64_t(0), -1};
    Target target{};
    for (;;) {
      histogram(range);
      if (range.by_value()) {
        total();
        target = choose();
        if (target.amount == 0) return {from, kBins};
      }
      const SelectShared::Found found = find(target);
      if (range.by_value() && found.before_count + found.count <= kList) return {from, found.bin};
      target.amount -= target.by_weight ? found.before_weight : found.before_count;
      range = range.by_value() ? range_of(found.bin, from) : range.part(found.bin);
      if (found.count <= kList) break;
      range.divide();
    }
    list_as_bins(gather([&](float x, int id) { return range.holds(order.place(x, id)); }));
    return {shared.list[find(target).bin], kBins};
  }

  // What falls into a bin of the first histogram, at `from` or before.
  __device__ Range range_of(int b, uint64_t from) {
    const uint32_t top = ordered(largest), bottom = ordered(smallest);
    const uint32_t low =
        lowest_key(bottom, top, [&](uint32_t key) { return bin(from_ordered(key)) <= b; });
    Range range{max(order.first(low), from), order.last(top), 0};
    if (b > 0) {
      range.high = order.first(lowest_key(bottom, top, [&](uint32_t key) {
                     return bin(from_ordered(key)) < b;
                   })) - 1;
    }
    return range;
  }
};

}  // namespace octavo::cuda
