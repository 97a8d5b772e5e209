// Where a row is cut: its k largest logits, or the fewest that reach a share of the probability.
// No sort of the row: a histogram over all of it finds the bin in which the cut falls, and only
// what could matter is put into a list and sorted. A bin that is too much for it is divided again.
//
// Where the largest logit of each segment is known, segments that hold nothing of what is sought
// are not read, and a few largest logits need no histogram: the k-th largest of all is no less than
// the k-th largest of the segments' largest.
//
// Weights (probabilities before they are normed) are added as integers, so a sum does not depend on
// the order of atomic operations, and equal rows get equal tokens.
#pragma once

#include "cuda/select_records.cuh"

namespace octavo::cuda {

template <typename T>
struct RowSelect {
  const Row<T>& row;
  SelectShared& shared;
  Order order;
  float largest, bins_per_unit;
  float per_unit_high, per_unit_low;  // log2(e) / temperature, in two parts
  bool weighted;

  static constexpr float kWeightOne = 0x1p44f;  // kMaxVocab of them fit into 63 bits

  __device__ RowSelect(const Row<T>& row, SelectShared& shared, const uint32_t* keys, float largest,
                       float smallest, double temperature, bool weighted)
      : row(row), shared(shared), order(row.vocab), largest(largest),
        per_unit_high(float(kLog2e / temperature)),
        per_unit_low(float(kLog2e / temperature - per_unit_high)), weighted(weighted) {
    shared.keys = keys;
    shared.smallest = smallest;
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

  __device__ int segments() const { return (row.vocab + kSegment - 1) / kSegment; }

  // Calls f(group, loaded) for the groups of each segment of whose key holds(key). For all threads
  // of the block; the groups of a segment are one warp's, which stays in step.
  template <typename H, typename F>
  __device__ __forceinline__ void each_segment(H holds, F f) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const uint32_t* keys = shared.keys;
    for (int base = warp; base < segments(); base += kSelectThreads) {
      const int own = base + lane * kSelectWarps;
      uint32_t left =
          __ballot_sync(~0u, own < segments() && (keys == nullptr || holds(keys[own])));
      const auto next_group = [&] {
        const int at = __ffs(left) - 1;
        left &= left - 1;
        return at < 0 ? -1 : (base + at * kSelectWarps) * 32 + lane;
      };
      // Registers are too few to load four bytes a logit ahead.
      constexpr bool kAhead = sizeof(T) < 4;
      int group = next_group();
      Group<T> now = row.load(max(group, 0));
      while (group >= 0) {
        const int later = next_group();
        Group<T> next;
        if constexpr (kAhead) next = row.load(max(later, 0));
        f(group, now);
        group = later;
        if constexpr (kAhead) now = next;
        else now = row.load(max(later, 0));
      }
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
    sort_list(shared, length);
    return length;
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
    const auto holds = [&](uint32_t key) { return key >= order.key(from); };
    each_segment(holds, [&](int group, const Group<T>& loaded) {
      float sum = 0.0f;
      row.visit(group, loaded, [&](float x, int id) {
        sum += order.place(x, id) >= from ? ratio(x) : 0.0f;
      });
      for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
      if (threadIdx.x % 32 == 0) {
        const uint64_t w = __float2ull_rn(sum * kWeightOne);
        shared.weight_low[group / 32] = uint32_t(w);
        shared.weight_high[group / 32] = uint32_t(w >> 32);
      }
    });
    __syncthreads();
  }

  // The first k tokens, of those at `from` or before, and some more into the list, in the order of
  // Order; how many there are, or more than kList: then the list is of no use.
  __device__ __forceinline__ int list_first(int k, uint64_t from) {
    clear();
    for (int i = threadIdx.x; i < segments(); i += kSelectThreads) {
      shared.list[i] = order.place(shared.keys[i], i);
    }
    __syncthreads();
    sort_list(shared, segments());
    const uint64_t least = max(order.first(order.key(shared.list[k - 1])), from);
    const auto holds = [&](uint32_t key) { return key >= order.key(least); };
    clear();
    each_segment(holds, [&](int group, const Group<T>& loaded) {
      row.visit(group, loaded, [&](float x, int id) {
        const uint64_t place = order.place(x, id);
        if (place < least) return;
        const uint32_t at = atomicAdd(&shared.listed, 1);
        if (at < kList) shared.list[at] = place;
      });
    });
    __syncthreads();
    const int length = shared.listed;
    if (length <= kList) sort_list(shared, length);
    return length;
  }

  // One of the segments that are in the bins, known to all threads.
  __device__ __forceinline__ int draw_segment(const Draw& draw) {
    Best best = Best::none();
    for (int segment = threadIdx.x; segment < segments(); segment += kSelectThreads) {
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
    clear();
    const auto holds = [&](uint32_t key) { return bin(from_ordered(key)) <= cut.last_bin; };
    each_segment(holds, [&](int group, const Group<T>& loaded) {
      row.visit(group, loaded, [&](float x, int id) {
        const uint64_t place = order.place(x, id);
        if (bin(x) > cut.last_bin || place < cut.from) return;
        shared.list[atomicAdd(&shared.listed, 1)] = place;
      });
    });
    __syncthreads();
    const int length = shared.listed;
    sort_list(shared, length);
    return length;
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
    const uint32_t top = ordered(largest), bottom = ordered(shared.smallest);
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
