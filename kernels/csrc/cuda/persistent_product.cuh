// A product of the step's rows with a matrix that comes through the ring: its rows of x taken from
// the words that other blocks wrote, normed where there is a norm, and its results put together.
#pragma once

#include "cuda/persistent_task.cuh"
#include "cuda/vector.cuh"

namespace octavo::cuda::persistent {

// Rows [rows, width] of x: words of that tag, or the first layer's input.
struct Source {
  const Word* words;  // null: the input
  uint32_t tag;
  int rows, width;
};

// The rows are divided evenly among the threads, so that all of x is in flight at once: a thread
// has pairs of words (four elements) first, first + width and so on of one row.
struct RowThreads {
  int row, first, width;

  __device__ __forceinline__ explicit RowThreads(int rows) : width(kThreads) {
    for (int of = 1; of < rows; of *= 2) width /= 2;
    row = threadIdx.x / width;
    first = threadIdx.x % width;
  }
};

// Gives `take` each of the thread's fours of x: which four of its row, and two packed pairs.
template <typename Take>
__device__ __forceinline__ void take_x(const Task& task, const Source& x, const RowThreads& part,
                                       Take&& take) {
  const int fours = part.row < x.rows ? x.width / 4 : 0;
  if (x.words != nullptr) {
    const Word* words = x.words + int64_t(part.row) * (x.width / 2);
    return take_pairs<4>(words, x.tag, part.first, part.width, fours, take);
  }
  if (fours == 0) return;
  const auto* from = reinterpret_cast<const uint2*>(first_row(task, part.row));
#pragma unroll 1
  for (int at = part.first; at < fours; at += part.width) {
    take(at, from ? __ldcg(from + at) : uint2{});
  }
}

__device__ __forceinline__ uint2& four_at(uint8_t* rows, int width, int row, int four) {
  return *reinterpret_cast<uint2*>(rows + row * x_pitch(width) + four * 8);
}

// x into shared memory, each row normed by the weight in `norm` where there is one, which is on its
// way (cp.async). All consumers; ends in a barrier among them.
template <typename T>
__device__ __forceinline__ void stage(const Task& task, const Source& x, const uint8_t* norm,
                                      const Shared& shared) {
  const RowThreads part(x.rows);
  const float share = 1.0f / float(x.width);
  float sum = 0;
  take_x(task, x, part, [&](int four, uint2 value) {
    four_at(shared.scratch(), x.width, part.row, four) = value;
    sum += skinny::square<T>(value.x) + skinny::square<T>(value.y);
  });
  if (norm == nullptr) return sync_first(kThreads);
  sum = sum_lanes(sum);
  if (threadIdx.x % 32 == 0) shared.sums()[threadIdx.x / 32] = sum;
  wait_copies<0>();
  sync_first(kThreads);
  const int warps = part.width / 32;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) squares += i < warps ? shared.sums()[part.row * warps + i] : 0;
  const float scale = rsqrtf(squares * share + task.stack.norm_eps);
  const float offset = task.stack.norm_offset;
  const int fours = part.row < x.rows ? x.width / 4 : 0;
#pragma unroll 2
  for (int at = part.first; at < fours; at += part.width) {
    uint2& value = four_at(shared.scratch(), x.width, part.row, at);
    const uint2 weight = reinterpret_cast<const uint2*>(norm)[at];
    value = {skinny::norm_pair<T>(value.x, weight.x, scale, offset),
             skinny::norm_pair<T>(value.y, weight.y, scale, offset)};
  }
  sync_first(kThreads);
}

// Starts to bring a norm's weight to its place; a later stage() waits for it.
__device__ __forceinline__ void bring_norm(const void* weight, int width, uint8_t* to) {
  const uint64_t policy = keep_policy();
#pragma unroll 1
  for (int at = threadIdx.x * 16; at < width * 2; at += kThreads * 16) {
    copy_async(shared_address(to + at), static_cast<const char*>(weight) + at, true, policy);
  }
  commit_copies();
}

// Two neighbouring outputs of one row: in the portion's unit and in all of the output. Of a gated
// product `first` are gates and `second` what they are for.
struct Outputs {
  int unit, row, pair, column;
  float2 first, second;
};

// The slice from `column` on of the staged rows. By an address that is known to be shared memory's:
// what may be either kind of memory is found out at each use.
__device__ __forceinline__ skinny::XSlice load_x(uint32_t from, int pitch, int rows, int k,
                                                 int column) {
  const int row = threadIdx.x % 32 / 4;
  column += threadIdx.x % 4 * 8;
  from += row * pitch + column * 2;
  skinny::XSlice x;
#pragma unroll
  for (int step = 0; step < skinny::kSteps; ++step) {
    uint4 part{};
    if (column + step * 32 < k && row < rows) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(part.x), "=r"(part.y), "=r"(part.z), "=r"(part.w)
                   : "r"(from + step * 64)
                   : "memory");
    }
    x.set(step, part, skinny::unknown_zeros());
  }
  return x;
}

// Multiplies the staged rows by the next `count` groups in the ring; each warp leaves its sums in
// `partials`. A stage's operands are on their way while the one before is multiplied.
template <typename T, int kLanes>
__device__ __forceinline__ void multiply_pass(const Task& task, const Shared& shared, int k,
                                              int count, RingPosition& at) {
  const Ring ring = shared.ring();
  const skinny::Partials partials = shared.partials();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rows = task.num_rows;
  const int pitch = x_pitch(k);
  const uint32_t staged = shared_address(shared.scratch());
  uint4 next[skinny::kSteps];
  ring.wait_filled(at);
  skinny::load_w(ring.stage(at), k, 0, next);
  float sums[2] = {};
#pragma unroll 1
  for (int group = 0, column = 0; group < count;) {
    uint4 w[skinny::kSteps];
#pragma unroll
    for (int i = 0; i < skinny::kSteps; ++i) w[i] = next[i];
    const auto x = load_x(staged, pitch, rows, k, column + warp * skinny::kSteps * 32);
    const RingPosition now = at;
    at.advance(ring.stages);
    column += skinny::kColumns;
    const bool ends = column >= k;
    if (ends) column = 0;
    if (group + ends < count) {
      ring.wait_filled(at);
      skinny::load_w(ring.stage(at), k - column, 0, next);
    }
    float pairs[2][2];
    skinny::multiply_w<T>(w, x, 0, pairs);
    ring.release<kLanes>(now);
    sums[0] += pairs[0][0] + pairs[1][0];
    sums[1] += pairs[0][1] + pairs[1][1];
    if (!ends) continue;
    if (lane / 4 < rows) {
      auto* to = partials.of(group, warp, lane / 4) + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = {sums[0], sums[1]};
    }
    sums[0] = sums[1] = 0;
    ++group;
  }
}

// Multiplies the staged rows by this block's rows of the matrix and gives each pair of outputs to
// `finish`. All consumers; x and the sums may be overwritten after the consumers' next barrier.
template <typename T, int kLanes, typename Finish>
__device__ __forceinline__ void multiply(const Task& task, const Shared& shared,
                                         const Portion& portion, RingPosition& at,
                                         Finish&& finish) {
  const skinny::Partials partials = shared.partials();
  const int lines = kGroup / 2 << task.row_shift, gated = portion.halves == 2;
#pragma unroll 1
  for (int begin = 0; begin < portion.groups(); begin += kPass) {
    const int count = min(kPass, portion.groups() - begin);
    if (begin > 0) sync_first(kThreads);  // the sums of the pass before were read
    multiply_pass<T, kLanes>(task, shared, portion.k, count, at);
    sync_first(kThreads);
#pragma unroll 1
    for (int i = threadIdx.x; i < (count >> gated) * lines; i += kThreads) {
      const int pair = i % (kGroup / 2) * 2, line = i / (kGroup / 2);
      const int unit = line >> task.row_shift, row = line & ((1 << task.row_shift) - 1);
      if (row >= task.num_rows) continue;
      const auto total = [&](int group) {
        float2 sum = {0, 0};
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
          const float2 one = *reinterpret_cast<const float2*>(partials.of(group, w, row) + pair);
          sum.x += one.x;
          sum.y += one.y;
        }
        return sum;
      };
      Outputs out{(begin >> gated) + unit, row, pair, 0, total(unit << gated), {}};
      out.column = (portion.first + out.unit) * kGroup + pair;
      if (gated) out.second = total((unit << 1) + 1);
      finish(out);
    }
  }
}

}  // namespace octavo::cuda::persistent
