// Two kernels draw a token for each row. The first spreads each row over many blocks and finds the
// best token of each part; for a row that top-k, top-p or min-p narrow it finds the range of the
// logits. The second has a block a row: it takes the best of the parts, or narrows and draws.
#include "cuda/sampling.h"

#include "cuda/launch.h"
#include "cuda/row_select.cuh"

#include <climits>

namespace octavo::cuda {
namespace {

constexpr int kScanThreads = 256;
constexpr int kMaxParts = 128;
// Enough to fill every GPU several times over, so that the last blocks to run are few of all.
constexpr int kScanBlocks = 2048;
// As octavo.engine.sampler: below it a division would only amplify rounding.
constexpr float kGreedyBelow = 1e-5f;

enum class Mode { kPadding, kGreedy, kPlain, kNarrowed };

// What one block found in its part of a row.
struct Part {
  double score;
  int id;
  float largest, smallest;
  bool unusable;  // NaN or infinity
  bool finite;    // something is more than -infinity, before adjustments
};

struct Problem {
  Logits logits;
  Sampling sampling;
  Ends ends;
  int32_t* tokens;
  int32_t* kept;
  Part* parts;
  int num_parts, groups_per_part;
};

__device__ int slot_of(const Sampling& sampling, int r) {
  return sampling.slots == nullptr ? r : sampling.slots[r];
}

__device__ Mode mode_of(const Sampling& sampling, int slot, int vocab) {
  if (slot < 0) return Mode::kPadding;
  if (sampling.temperature[slot] < kGreedyBelow) return Mode::kGreedy;
  const int k = sampling.top_k[slot];
  const bool narrows = sampling.min_p[slot] > 0.0f || (k > 0 && k < vocab) ||
                       sampling.top_p[slot] < 1.0f;
  return narrows ? Mode::kNarrowed : Mode::kPlain;
}

__device__ Draw draw_of(const Sampling& sampling, int slot) {
  const uint64_t count = uint64_t(sampling.count[slot]) + 1;
  return {mix(uint64_t(sampling.stream[slot]) ^ count), double(sampling.temperature[slot])};
}

// For all threads of a block.
template <typename T>
__device__ Row<T> sampled_row(const Problem& p, int r, int slot, Adjustment& adjustment) {
  Row<T> row = row_of<T>(p.logits, r);
  const Sampling& s = p.sampling;
  const int pool_row = s.adjusted == nullptr ? -1 : s.adjusted[slot];
  if (pool_row >= 0) {
    if (threadIdx.x == 0) {
      adjustment = adjustment_of(s.adjustments, pool_row, s.count[slot]);
    }
    __syncthreads();
    row.adjust(&adjustment);
  }
  return row;
}

// A thread's share of a part. The next groups are loaded while those at hand are worked on, and all
// threads take the same number of turns: warps act together.
template <typename T>
struct PartScan {
  const Row<T>& row;
  int begin, end;
  float raw = -INFINITY;  // the largest before adjustments, or NaN

  __device__ __forceinline__ Bounds bounds(int group, const Group<T>& loaded) {
    if (group >= end) return {-INFINITY, -INFINITY, INFINITY};
    const Bounds found = row.bounds(group, loaded);
    raw = max_or_nan(raw, found.raw);
    return found;
  }

  __device__ Part part(double score, int id, float largest, float smallest) const {
    return {score, id, largest, smallest, !(raw < INFINITY), raw > -INFINITY};
  }

  __device__ Part largest() {
    float largest = -INFINITY, smallest = INFINITY;
    int id = -1;
    int group = begin + threadIdx.x;
    Group<T> now = row.load(group), next = row.load(group + kScanThreads);
    for (; group < end; group += kScanThreads) {
      const Group<T> later = row.load(group + 2 * kScanThreads);
      const Bounds found = bounds(group, now);
      smallest = fminf(smallest, found.smallest);
      if (found.largest > largest) {
        largest = found.largest;
        int first = INT_MAX;
        row.visit(group, now, [&](float x, int i) {
          if (x == largest) first = min(first, i);
        });
        id = first;
      }
      now = next;
      next = later;
    }
    return part(largest, id, largest, smallest);
  }

  __device__ Part gumbel(const Draw& draw, uint32_t* bound) {
    GumbelScan<T> scan(row, draw, bound, 0);
    int group = begin + threadIdx.x;
    Group<T> now = row.load(group), other = row.load(group + kScanThreads);
    for (int base = begin; base < end; base += 2 * kScanThreads, group += 2 * kScanThreads) {
      const Group<T> next = row.load(group + 2 * kScanThreads);
      const Group<T> next_other = row.load(group + 3 * kScanThreads);
      const Bounds here = bounds(group, now), there = bounds(group + kScanThreads, other);
      if (base == begin) scan.begin(group, here, group < end);
      scan.take(group, group + kScanThreads, fmaxf(here.largest, there.largest));
      now = next;
      other = next_other;
    }
    return part(scan.best.score, scan.best.id, -INFINITY, INFINITY);
  }
};

__device__ Part block_part(Part own, Best* scratch, uint32_t (*ranges)[2]) {
  const bool unusable = __syncthreads_or(own.unusable), finite = __syncthreads_or(own.finite);
  const uint32_t largest = __reduce_max_sync(~0u, ordered(own.largest));
  const uint32_t smallest = __reduce_min_sync(~0u, ordered(own.smallest));
  if (threadIdx.x % 32 == 0) {
    ranges[threadIdx.x / 32][0] = largest;
    ranges[threadIdx.x / 32][1] = smallest;
  }
  const Best best = block_best({own.score, own.id}, scratch);
  Part all{best.score, best.id, -INFINITY, INFINITY, unusable, finite};
  for (int warp = 0; warp < kScanThreads / 32; ++warp) {
    all.largest = fmaxf(all.largest, from_ordered(ranges[warp][0]));
    all.smallest = fminf(all.smallest, from_ordered(ranges[warp][1]));
  }
  return all;
}

template <typename T>
__global__ void __launch_bounds__(kScanThreads, 4) scan_parts(const Problem p) {
  __shared__ Adjustment adjustment;
  __shared__ uint32_t bound;
  __shared__ Best scratch[32];
  __shared__ uint32_t ranges[kScanThreads / 32][2];
  if (threadIdx.x == 0) bound = ordered(-INFINITY);
  __syncthreads();
  allow_next();
  wait_for_previous();
  const int r = blockIdx.y, slot = slot_of(p.sampling, r);
  const Mode mode = mode_of(p.sampling, slot, p.logits.vocab);
  if (mode == Mode::kPadding) return;
  Row<T> row = sampled_row<T>(p, r, slot, adjustment);
  const int begin = blockIdx.x * p.groups_per_part;
  const int end = min(begin + p.groups_per_part, row.groups());
  row.load_before(end);
  PartScan<T> scan{row, begin, end};
  const Part found =
      mode == Mode::kPlain ? scan.gumbel(draw_of(p.sampling, slot), &bound) : scan.largest();
  const Part part = block_part(found, scratch, ranges);
  if (threadIdx.x == 0) p.parts[r * p.num_parts + blockIdx.x] = part;
}

// By the first warp.
__device__ Part whole_of(const Problem& p, int r) {
  Part all{-INFINITY, -1, -INFINITY, INFINITY, false, false};
  Best best = Best::none();
  for (int i = threadIdx.x; i < p.num_parts; i += 32) {
    const Part part = p.parts[r * p.num_parts + i];
    best.take(part.score, part.id);
    all.largest = fmaxf(all.largest, part.largest);
    all.smallest = fminf(all.smallest, part.smallest);
    all.unusable |= part.unusable;
    all.finite |= part.finite;
  }
  for (int by = 16; by > 0; by /= 2) {
    const double score = __shfl_xor_sync(~0u, best.score, by);
    const int id = __shfl_xor_sync(~0u, best.id, by);
    best.take(score, id);
  }
  all.score = best.score;
  all.id = best.id;
  all.largest = from_ordered(__reduce_max_sync(~0u, ordered(all.largest)));
  all.smallest = from_ordered(__reduce_min_sync(~0u, ordered(all.smallest)));
  all.unusable = __any_sync(~0u, all.unusable);
  all.finite = __any_sync(~0u, all.finite);
  return all;
}

// Writes the token and what follows from it. By one thread.
__device__ void emit(const Problem& p, int r, int slot, int32_t token) {
  p.tokens[r] = token;
  const Sampling& s = p.sampling;
  const int pool_row = s.adjusted == nullptr || slot < 0 ? -1 : s.adjusted[slot];
  if (token >= 0 && pool_row >= 0) {
    uint16_t& mark = s.adjustments.marks[pool_row * s.adjustments.marks_stride + token];
    if ((mark & kCountMask) != kCountMask) ++mark;
  }
  if (p.ends.stop_ids == nullptr) return;
  uint8_t flags = token < 0 ? kFailed : 0;
  if (slot >= 0 && token >= 0) {
    for (int i = 0; i < kStopIds; ++i) {
      if (p.ends.stop_ids[slot * kStopIds + i] == token) flags |= kStopped;
    }
    if (s.count[slot] + 1 >= p.ends.max_tokens[slot]) flags |= kFull;
  }
  p.ends.flags[r] = flags;
}

// The first so many tokens of the row in Order, as min-p, top-k and top-p leave them, and the draw
// from them. By a whole block.
template <typename T>
struct Narrowing {
  RowSelect<T> select;
  const Draw& draw;
  int top_k;
  float top_p;

  // Those that min-p leaves come at this place or before.
  __device__ uint64_t after_min_p(float min_p) {
    if (!(min_p > 0.0f)) return 0;
    const double least = log(double(min_p)), top = select.largest;
    return select.order.first(select.lowest_key(
        ordered(select.smallest), ordered(select.largest), [&](uint32_t key) {
          return (double(from_ordered(key)) - top) / draw.temperature >= least;
        }));
  }

  // Tokens are kept while what comes before them is less than top-p of the whole.
  __device__ Target share(uint64_t whole) const {
    const double amount = ceil(double(top_p) * double(whole));
    return {true, max(uint64_t(1), min(whole, uint64_t(amount)))};
  }

  __device__ Best run(float min_p, int& kept) {
    uint64_t from = after_min_p(min_p);
    bool counts = top_k > 0;
    while (counts || top_p < 1.0f) {
      const Cut cut = select.search(from, [&]() -> Target {
        counts = counts && uint32_t(top_k) < select.shared.total_count;
        if (counts) return {false, uint64_t(top_k)};
        return top_p < 1.0f ? share(select.shared.total_weight) : Target{};
      });
      if (cut.listable()) return from_list(cut, counts, kept);
      from = cut.from;
      if (!counts) break;
      counts = false;
    }
    kept = -1;
    return from_row(from);
  }

  // All that may be kept fits into the list.
  __device__ Best from_list(const Cut& cut, bool counts, int& kept) {
    uint64_t whole = select.shared.total_weight;
    kept = select.gather(cut);
    if (counts) kept = top_k;
    if (top_p < 1.0f) {
      select.list_as_bins(kept);
      if (counts) {
        select.total();
        whole = select.shared.total_weight;
      }
      kept = select.find(share(whole)).bin + 1;
    }
    Best best = Best::none();
    for (int i = threadIdx.x; i < kept; i += kSelectThreads) {
      const uint64_t place = select.shared.list[i];
      const int id = select.order.id(place);
      best.take(draw.score(from_ordered(select.order.key(place)), id), id);
    }
    return best;
  }

  __device__ Best from_row(uint64_t from) {
    if (threadIdx.x == 0) select.shared.bound = ordered(-INFINITY);
    __syncthreads();
    const Row<T>& row = select.row;
    GumbelScan<T> scan(row, draw, &select.shared.bound, from);
    const int groups = row.groups();
    for (int group = threadIdx.x; group - int(threadIdx.x) < groups; group += 2 * kSelectThreads) {
      const int other = group + kSelectThreads;
      const Group<T> loaded = row.load(group), loaded_other = row.load(other);
      Bounds here{-INFINITY, -INFINITY, INFINITY}, there = here;
      if (group < groups) here = row.bounds(group, loaded);
      if (other < groups) there = row.bounds(other, loaded_other);
      if (group == int(threadIdx.x)) scan.begin(group, here, group < groups);
      scan.take(group, other, fmaxf(here.largest, there.largest));
    }
    return scan.best;
  }
};

template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 1) finish_rows(const Problem p) {
  __shared__ SelectShared shared;
  __shared__ Part whole;
  __shared__ Adjustment adjustment;
  __shared__ Draw draw;
  allow_next();
  wait_for_previous();
  const int r = blockIdx.x, slot = slot_of(p.sampling, r);
  const Mode mode = mode_of(p.sampling, slot, p.logits.vocab);
  if (mode == Mode::kPadding) {
    if (threadIdx.x == 0) emit(p, r, slot, kPaddingToken);
    return;
  }
  if (threadIdx.x < 32) {
    const Part found = whole_of(p, r);
    if (threadIdx.x == 0) {
      whole = found;
      draw = draw_of(p.sampling, slot);
    }
  }
  __syncthreads();
  if (whole.unusable || !whole.finite || mode != Mode::kNarrowed || whole.largest == -INFINITY) {
    if (threadIdx.x == 0) {
      const int32_t token = whole.id < 0 ? kNothingAllowed : whole.id;
      emit(p, r, slot, whole.unusable || !whole.finite ? kNoToken : token);
    }
    return;
  }
  const Row<T> row = sampled_row<T>(p, r, slot, adjustment);
  const float top_p = p.sampling.top_p[slot];
  Narrowing<T> narrowing{{row, shared, whole.largest, whole.smallest, draw.temperature,
                          top_p < 1.0f},
                         draw, p.sampling.top_k[slot], top_p};
  int kept;
  Best best = narrowing.run(p.sampling.min_p[slot], kept);
  best = block_best(best, shared.warp_best);
  if (threadIdx.x == 0) {
    if (p.kept != nullptr) p.kept[r] = kept;
    emit(p, r, slot, best.id);
  }
}

struct Parts {
  int count, groups;
};

// How a row is divided; nothing that is drawn depends on it.
Parts parts_of(int rows, int vocab) {
  const int groups = (vocab + 2 * kGroup - 1) / kGroup;  // one more where rows begin unaligned
  const int turns = (groups + kScanThreads - 1) / kScanThreads;
  const int wanted = (kScanBlocks + rows - 1) / rows;
  const int most = wanted < kMaxParts ? wanted : kMaxParts;
  int turns_each = (turns + most - 1) / most;
  if (turns_each > 1) turns_each += turns_each % 2;  // two are taken at once
  return {(turns + turns_each - 1) / turns_each, turns_each * kScanThreads};
}

template <typename T>
void launch_both(const Problem& p, cudaStream_t stream) {
  launch(scan_parts<T>, dim3(p.num_parts, p.logits.rows), kScanThreads, 0, stream, p);
  launch(finish_rows<T>, p.logits.rows, kSelectThreads, 0, stream, p);
}

}  // namespace

int64_t sample_workspace(int rows, int vocab) {
  return rows == 0 ? 0 : int64_t(rows) * parts_of(rows, vocab).count * sizeof(Part);
}

void sample(const Logits& logits, const Sampling& sampling, const Ends& ends, int32_t* tokens,
            int32_t* kept, void* workspace, cudaStream_t stream) {
  if (logits.rows == 0) return;
  const Parts parts = parts_of(logits.rows, logits.vocab);
  const Problem p{logits, sampling, ends, tokens, kept, static_cast<Part*>(workspace),
                  parts.count, parts.groups};
  if (logits.dtype == DType::kFloat32) launch_both<float>(p, stream);
  else if (logits.dtype == DType::kBFloat16) launch_both<__nv_bfloat16>(p, stream);
  else launch_both<__half>(p, stream);
}

}  // namespace octavo::cuda
