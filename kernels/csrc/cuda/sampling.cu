// Two kernels draw a token for each row. The first spreads each row over many warps, and each finds
// the best segment of its part: by probability and noise, or the one with the largest logit; for a
// row that top-k, top-p or min-p narrow it finds the range of the logits. The second takes the best
// of the parts and finds the token in that segment, or narrows the row and draws.
#include "cuda/sampling.h"

#include "cuda/launch.h"
#include "cuda/row_select.cuh"
#include "cuda/segment_scan.cuh"

namespace octavo::cuda {
namespace {

constexpr int kScanThreads = 128;
constexpr int kScanWarps = kScanThreads / 32;
// As many warps scan at once on a large GPU; with more units than that, a warp takes several, and
// the next is loaded while one is worked on.
constexpr int kWarpsAtOnce = 4096;
constexpr int kUnitsOfPart = 4;  // at most
static_assert(kUnitsOfPart <= kMostUnits);
// The second kernel's blocks, one a multiprocessor; each takes up to kTeams rows at once.
constexpr int kFinishBlocks = 128;
constexpr int kTeams = kSelectThreads / kSegment, kTeamWarps = kSegment / 32;
// Up to so many first tokens are found by the segments' largest.
constexpr int kQuickFirst = 256;
// As octavo.engine.sampler: below it a division would only amplify rounding.
constexpr float kGreedyBelow = 1e-5f;

enum class Mode { kPadding, kGreedy, kPlain, kNarrowed };

__host__ __device__ constexpr int segments_of(int vocab) {
  return (vocab + kSegment - 1) / kSegment;
}

struct Problem {
  Logits logits;
  Sampling sampling;
  Ends ends;
  int32_t* tokens;
  int32_t* kept;
  Part* parts;
  int num_parts, units_of_part;
  uint32_t* keys;  // of the largest logits of a narrowed row's segments
};

// What is asked of a row.
struct Request {
  int slot, pool_row;  // -1: none
  Mode mode;
  int top_k;
  float top_p, min_p;
  Draw draw;
};

__device__ int slot_of(const Sampling& sampling, int r) {
  return sampling.slots == nullptr ? r : load_now(sampling.slots + r);
}

__device__ Mode mode_of(float temperature, int top_k, float top_p, float min_p, int vocab) {
  if (temperature < kGreedyBelow) return Mode::kGreedy;
  const bool narrows = min_p > 0.0f || (top_k > 0 && top_k < vocab) || top_p < 1.0f;
  return narrows ? Mode::kNarrowed : Mode::kPlain;
}

// All of it is on its way before any of it is looked at.
__device__ Request request_of(const Sampling& s, int slot, int vocab) {
  Request request{slot, -1, Mode::kPadding, 0, 0.0f, 0.0f, {}};
  if (slot < 0) return request;
  if (s.adjusted != nullptr) request.pool_row = load_now(s.adjusted + slot);
  const float temperature = load_now(s.temperature + slot);
  const int64_t stream = load_now(s.stream + slot), count = load_now(s.count + slot);
  request.top_k = load_now(s.top_k + slot);
  request.top_p = load_now(s.top_p + slot);
  request.min_p = load_now(s.min_p + slot);
  request.mode = mode_of(temperature, request.top_k, request.top_p, request.min_p, vocab);
  request.draw = {mix(uint64_t(stream) ^ (uint64_t(count) + 1)), double(temperature),
                  1.0 / double(temperature)};
  return request;
}

__device__ uint32_t* keys_of(const Problem& p, int r) {
  return p.keys + int64_t(r) * segments_of(p.logits.vocab);
}

template <typename T>
__global__ void __launch_bounds__(kScanThreads, sizeof(T) == 4 ? 4 : 7)
    scan_parts(const Problem p) {
  __shared__ Adjustment adjustment;
  allow_next();
  wait_for_previous();
  const int r = blockIdx.y, part = blockIdx.x * kScanWarps + threadIdx.x / 32;
  Row<T> row = row_of<T>(p.logits, r);
  const int units = (row.groups() + kUnitGroups - 1) / kUnitGroups;
  const int begin = part * p.units_of_part;
  SegmentScan<T> scan(row, begin, min(begin + p.units_of_part, units));
  // On its way while it is looked up what is to be done with the row.
  const Unit<T> first = scan.load(begin);
  const Sampling& s = p.sampling;
  const Request request = request_of(s, slot_of(s, r), p.logits.vocab);
  if (request.mode == Mode::kPadding) {
    // The second kernel reads parts before it knows what their row is.
    if (part < p.num_parts && threadIdx.x % 32 == 0) p.parts[r * p.num_parts + part] = Part::none();
    return;
  }
  if (request.pool_row >= 0) {
    if (threadIdx.x == 0) {
      adjustment = adjustment_of(s.adjustments, request.pool_row, s.count[request.slot]);
    }
    __syncthreads();
    row.adjust(&adjustment);
  }
  if (part >= p.num_parts) return;
  uint32_t* keys = request.mode == Mode::kNarrowed ? keys_of(p, r) : nullptr;
  const Part own =
      request.mode == Mode::kPlain ? scan.drawn(request.draw, first) : scan.largest(first, keys);
  const Part found = warp_part(own);
  if (threadIdx.x % 32 == 0) p.parts[r * p.num_parts + part] = found;
}

// What a block knows of one of its rows.
struct Held {
  int r;
  Request request;
  Adjustment adjustment;
  bool narrowed;  // what is left of it is to be found
  float largest, smallest;
};

// A warp of a team joins some of the row's parts.
__device__ Part some_parts(const Problem& p, int r) {
  Part all = Part::none();
  for (int i = threadIdx.x % kSegment; i < p.num_parts; i += kSegment) {
    all.join(p.parts[r * p.num_parts + i]);
  }
  return warp_part(all);
}

// When a slot ends, as a warp knows it.
struct Ending {
  int stop_id;  // the lane's, -1: none
  bool full;
};

__device__ Ending ending_of(const Problem& p, int slot) {
  if (p.ends.stop_ids == nullptr || slot < 0) return {-1, false};
  const int lane = threadIdx.x % 32;
  const int64_t count = load_now(p.sampling.count + slot);
  const int64_t most = load_now(p.ends.max_tokens + slot);
  return {lane < kStopIds ? load_now(p.ends.stop_ids + slot * kStopIds + lane) : -1,
          count + 1 >= most};
}

// Writes the token and what follows from it. By a warp.
__device__ void emit(const Problem& p, const Held& held, const Ending& ending, int32_t token) {
  const int pool_row = held.request.pool_row;
  const bool real = held.request.slot >= 0 && token >= 0;
  const bool stopped = __any_sync(~0u, real && ending.stop_id == token);
  if (threadIdx.x % 32 != 0) return;
  p.tokens[held.r] = token;
  if (p.ends.stop_ids != nullptr) {
    p.ends.flags[held.r] = (stopped ? kStopped : 0) | (real && ending.full ? kFull : 0) |
                           (token < 0 ? kFailed : 0);
  }
  if (real && pool_row >= 0) {
    const Adjustments& a = p.sampling.adjustments;
    uint16_t& mark = a.marks[pool_row * a.marks_stride + token];
    if ((mark & kCountMask) != kCountMask) ++mark;
  }
}

__device__ void hold(const Problem& p, int r, int slot, Held& held) {
  held.r = r;
  held.request = request_of(p.sampling, slot, p.logits.vocab);
  const int pool_row = held.request.pool_row;
  if (pool_row >= 0) {
    held.adjustment = adjustment_of(p.sampling.adjustments, pool_row, p.sampling.count[slot]);
  }
}

// The first so many tokens of the row in Order, as min-p, top-k and top-p leave them, and the draw
// from them. By a whole block.
template <typename T>
struct Narrowing {
  RowSelect<T> select;
  const Held& held;  // in shared memory, and read where it is used: registers are few

  // Those that min-p leaves come at this place or before.
  __device__ uint64_t after_min_p() {
    if (!(held.request.min_p > 0.0f)) return 0;
    const double least = log(double(held.request.min_p)), top = select.largest;
    return select.order.first(select.lowest_key(
        ordered(held.smallest), ordered(select.largest), [&](uint32_t key) {
          return (double(from_ordered(key)) - top) / held.request.draw.temperature >= least;
        }));
  }

  // Tokens are kept while what comes before them is less than top-p of the whole.
  __device__ Target share(uint64_t whole) const {
    const double amount = ceil(double(held.request.top_p) * double(whole));
    return {true, max(uint64_t(1), min(whole, uint64_t(amount)))};
  }

  __device__ Best run(int32_t* all_kept) {
    uint64_t from = after_min_p();
    bool counts = held.request.top_k > 0;
    if (counts && held.request.top_k <= min(kQuickFirst, select.segments())) {
      const int listed = select.list_first(held.request.top_k, from);
      if (listed <= kList) return from_list(min(listed, held.request.top_k), true, 0, all_kept);
    }
    while (counts || held.request.top_p < 1.0f) {
      const Cut cut = select.search(from, [&]() -> Target {
        counts = counts && uint32_t(held.request.top_k) < select.shared.total_count;
        if (counts) return {false, uint64_t(held.request.top_k)};
        return held.request.top_p < 1.0f ? share(select.shared.total_weight) : Target{};
      });
      if (cut.listable()) {
        const uint64_t whole = select.shared.total_weight;
        const int listed = select.gather(cut);
        return from_list(counts ? held.request.top_k : listed, counts, whole, all_kept);
      }
      from = cut.from;
      if (!counts) break;
      counts = false;
    }
    note(all_kept, -1);
    return from_row(from);
  }

  // All that may be kept comes first in the list; its weight is `whole`, or to be found.
  __device__ Best from_list(int kept, bool weigh, uint64_t whole, int32_t* all_kept) {
    if (held.request.top_p < 1.0f) {
      select.list_as_bins(kept);
      if (weigh) {
        select.total();
        whole = select.shared.total_weight;
      }
      kept = select.find(share(whole)).bin + 1;
    }
    note(all_kept, kept);
    select.list_by_segment(kept);
    const int segment = select.draw_segment(held.request.draw);
    Best best = Best::none();
    for (int i = threadIdx.x; i < kept; i += kSelectThreads) {
      const uint64_t place = select.shared.list[i];
      const int id = select.order.id(place);
      if (id / kSegment != segment) continue;
      best.take(held.request.draw.score(from_ordered(select.order.key(place)), id), id);
    }
    return best;
  }

  __device__ void note(int32_t* all_kept, int kept) {
    if (threadIdx.x == 0 && all_kept != nullptr) all_kept[held.r] = kept;
  }

  __device__ Best from_row(uint64_t from) {
    select.row_by_segment(from);
    const int id = select.draw_segment(held.request.draw) * kSegment + threadIdx.x;
    if (threadIdx.x >= kSegment || id >= select.row.vocab) return Best::none();
    const float x = select.row.value(id);
    if (!(x > -INFINITY) || select.order.place(x, id) < from) return Best::none();
    return {held.request.draw.score(x, id), id};
  }
};

template <typename T>
__device__ Row<T> held_row(const Problem& p, const Held& held) {
  Row<T> row = row_of<T>(p.logits, held.r);
  if (held.request.pool_row >= 0) row.adjust(&held.adjustment);
  return row;
}

// By a whole block.
template <typename T>
__device__ void narrow(const Problem& p, const Held& held, SelectShared& shared) {
  const Row<T> row = held_row<T>(p, held);
  Narrowing<T> narrowing{{row, shared, keys_of(p, held.r), held.largest, held.smallest,
                          held.request.draw.temperature, held.request.top_p < 1.0f},
                         held};
  const Best best = block_best(narrowing.run(p.kept), shared.warp_best);
  if (threadIdx.x < 32) emit(p, held, ending_of(p, held.request.slot), best.id);
}

// Copies one of the rows that are still to be narrowed, and strikes it off; false if there is none.
// By a whole block. What is left to do is kept in shared memory, for registers are few.
__device__ bool next_narrowed(Held (&rows)[kTeams], Held& next) {
  __syncthreads();
  int t = 0;
  while (t < kTeams && !rows[t].narrowed) ++t;
  __syncthreads();
  if (t == kTeams) return false;
  if (threadIdx.x == 0) {
    next = rows[t];
    rows[t].narrowed = false;
  }
  __syncthreads();
  return true;
}

// Each of a team's threads has one token of the segment.
template <typename T>
__device__ Best best_of_segment(const Problem& p, const Held& held, int segment) {
  const int id = segment * kSegment + threadIdx.x % kSegment;
  if (id >= p.logits.vocab) return Best::none();
  const float x = held_row<T>(p, held).value(id);
  if (!(x > -INFINITY)) return Best::none();
  const bool greedy = held.request.mode == Mode::kGreedy;
  return {greedy ? double(x) : held.request.draw.score(x, id), id};
}

template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 1) finish_rows(const Problem p) {
  __shared__ SelectShared shared;
  __shared__ Held held[kTeams], current;
  __shared__ Part parts[kTeams][kTeamWarps];
  allow_next();
  wait_for_previous();
  const int team = threadIdx.x / kSegment, member = threadIdx.x % kSegment;
  const int warp = threadIdx.x / 32, r = blockIdx.x + team * gridDim.x;
  const bool here = r < p.logits.rows;
  Held& own = held[team];
  const int slot = here ? slot_of(p.sampling, r) : -1;
  const Part some = here ? some_parts(p, r) : Part::none();
  if (threadIdx.x % 32 == 0) parts[team][warp % kTeamWarps] = some;
  const Ending ending = ending_of(p, slot);
  if (member == 0) hold(p, r, slot, own);
  __syncthreads();
  const Part whole = warp_part(parts[team][member % kTeamWarps]);
  const Mode mode = own.request.mode;
  const bool usable = !whole.unusable && whole.finite;
  const bool draws = mode != Mode::kPadding && usable && whole.best.id >= 0;
  const bool narrowed = draws && mode == Mode::kNarrowed;
  Best best = Best::none();
  if (draws && !narrowed) best = best_of_segment<T>(p, own, whole.best.id);
  best = warp_best(best);
  if (threadIdx.x % 32 == 0) shared.warp_best[warp] = best;
  if (member == 0) {
    own.narrowed = narrowed;
    own.largest = float(whole.best.score);
    own.smallest = whole.smallest;
  }
  __syncthreads();
  if (here && !narrowed && member < 32) {
    best = warp_best(member < kTeamWarps ? shared.warp_best[warp + member] : Best::none());
    const int32_t token = draws ? best.id : usable ? kNothingAllowed : kNoToken;
    emit(p, own, ending, mode == Mode::kPadding ? kPaddingToken : token);
  }
  while (next_narrowed(held, current)) narrow<T>(p, current, shared);
}

struct Parts {
  int count, units;  // of a row; of a part
};

// How a row is divided; nothing that is drawn depends on it.
Parts parts_of(int rows, int vocab) {
  const int whole = (vocab + kUnitSegments * kSegment - 1) / (kUnitSegments * kSegment);
  int units = 1;
  while (units < kUnitsOfPart && int64_t(rows) * whole > int64_t(kWarpsAtOnce) * units) units *= 2;
  return {(whole + units - 1) / units, units};
}

template <typename T>
void launch_both(const Problem& p, cudaStream_t stream) {
  const int rows = p.logits.rows, least = (rows + kTeams - 1) / kTeams;
  const int blocks = rows < kFinishBlocks ? rows : least > kFinishBlocks ? least : kFinishBlocks;
  const dim3 scanned((p.num_parts + kScanWarps - 1) / kScanWarps, rows);
  launch(scan_parts<T>, scanned, kScanThreads, 0, stream, p);
  launch(finish_rows<T>, blocks, kSelectThreads, 0, stream, p);
}

}  // namespace

int64_t sample_workspace(int rows, int vocab) {
  if (rows == 0) return 0;
  return int64_t(rows) * (parts_of(rows, vocab).count * sizeof(Part) +
                          segments_of(vocab) * sizeof(uint32_t));
}

void sample(const Logits& logits, const Sampling& sampling, const Ends& ends, int32_t* tokens,
            int32_t* kept, void* workspace, cudaStream_t stream) {
  if (logits.rows == 0) return;
  const Parts parts = parts_of(logits.rows, logits.vocab);
  Part* all = static_cast<Part*>(workspace);
  uint32_t* keys = reinterpret_cast<uint32_t*>(all + int64_t(logits.rows) * parts.count);
  const Problem p{logits, sampling, ends, tokens, kept, all, parts.count, parts.units, keys};
  if (logits.dtype == DType::kFloat32) launch_both<float>(p, stream);
  else if (logits.dtype == DType::kBFloat16) launch_both<__nv_bfloat16>(p, stream);
  else launch_both<__half>(p, stream);
}

}  // namespace octavo::cuda
