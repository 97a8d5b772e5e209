// A few neighbouring lanes of a warp hold a head, twice 16 bytes each. An element turns with a
// partner half the rotary part away: the lane that has the one has the other, by the same angles.
#include "cuda/heads.h"

#include "cuda/launch.h"
#include "cuda/vector.cuh"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 128;

// Eight elements of a head as floats, normed where the group has a weight.
struct Values {
  float at[kPack];
};

template <typename T>
__device__ __forceinline__ Values widened(const Pack<T>& pack) {
  Values values;
#pragma unroll
  for (int i = 0; i < kPack; ++i) values.at[i] = widen(pack.at[i]);
  return values;
}

// As reference.rms_norm rounds: the scaled value before the weight, unless that has an offset.
template <typename T>
__device__ __forceinline__ void apply_norm(Values& values, const T* weight, float inverse,
                                           float offset) {
  const Pack<T> w = load_constant_pack(weight);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const float scaled = values.at[i] * inverse;
    values.at[i] = rounded<T>(offset != 0 ? scaled * (offset + widen(w.at[i]))
                                          : rounded<T>(scaled) * widen(w.at[i]));
  }
}

// The cosines and sines of a lane's elements.
struct Angles {
  float cos[kPack], sin[kPack];
};

template <int count>
__device__ __forceinline__ void read_floats(const float* from, float* to) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    const float4 four = __ldg(reinterpret_cast<const float4*>(from + i));
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// `row` is the table's row of the position, `at` a lane's first elements; interleaved pairs need
// half as many.
template <bool interleaved>
__device__ __forceinline__ Angles read_angles(const float* row, int at, int half) {
  Angles angles;
  const int first = interleaved ? at / 2 : at;
  read_floats<interleaved ? kPack / 2 : kPack>(row + first, angles.cos);
  read_floats<interleaved ? kPack / 2 : kPack>(row + half + first, angles.sin);
  return angles;
}

// Products are rounded before they are added, as torch does it: the same bits as the reference.
__device__ __forceinline__ float difference(float a, float cos, float b, float sin) {
  return __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
}
__device__ __forceinline__ float sum(float b, float cos, float a, float sin) {
  return __fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin));
}

__device__ __forceinline__ void turn(Values& low, Values& high, const Angles& angles) {
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const float a = low.at[i], b = high.at[i];
    low.at[i] = difference(a, angles.cos[i], b, angles.sin[i]);
    high.at[i] = sum(b, angles.cos[i], a, angles.sin[i]);
  }
}

__device__ __forceinline__ void turn_interleaved(Values& values, const Angles& angles) {
#pragma unroll
  for (int i = 0; i < kPack / 2; ++i) {
    const float a = values.at[2 * i], b = values.at[2 * i + 1];
    values.at[2 * i] = difference(a, angles.cos[i], b, angles.sin[i]);
    values.at[2 * i + 1] = sum(b, angles.cos[i], a, angles.sin[i]);
  }
}

// The group that head number `head` of a token is in; `head` becomes its number there.
__device__ __forceinline__ int find_group(const Heads& args, int& head) {
#pragma unroll
  for (int g = 0; g < kMaxHeadGroups - 1; ++g) {
    if (head < args.groups[g].heads) return g;
    head -= args.groups[g].heads;
  }
  return kMaxHeadGroups - 1;
}

// The row of the destination that the token's heads go to; -1 stores nothing.
__device__ __forceinline__ int64_t row_of(const Heads& args, const HeadGroup& group,
                                          int64_t token) {
  if (!group.at_slot) return token;
  const int64_t slot = args.slots[token];
  if (slot < -1 || slot >= args.num_slots) __trap();
  return slot;
}

__device__ __forceinline__ const float* table_row(const Heads& args, int64_t token) {
  const int64_t position = args.positions[token];
  if (position < 0 || position >= args.max_positions) __trap();
  return args.cos_sin + position * args.rotary;
}

// Where a lane's two packs of a head begin. Partners come first, then what does not turn.
struct Places {
  int first, second;

  __device__ Places(int lane, const Heads& args, bool interleaved) {
    const int pairs = interleaved ? 0 : args.rotary / (2 * kPack);
    if (lane < pairs) {
      first = lane * kPack;
      second = first + args.rotary / 2;
    } else {
      first = 2 * lane * kPack;  // behind `pairs` lanes are twice as many packs
      second = first + kPack;
    }
  }
};

template <typename T, int kLanes, bool interleaved>
__global__ void __launch_bounds__(kThreads) store_heads(const Heads args, int heads_of_token) {
  wait_for_previous();
  allow_next();
  const unsigned number = (blockIdx.x * kThreads + threadIdx.x) / kLanes;
  const int64_t token = number / heads_of_token;
  int head = int(number % heads_of_token);
  const Places at(threadIdx.x % kLanes, args, interleaved);
  // Lanes without elements go on with the others, whose shuffles name the whole warp.
  const bool live = token < args.tokens && at.first < args.dim;
  const bool both = live && at.second < args.dim;
  const HeadGroup& group = args.groups[live ? find_group(args, head) : 0];
  const T* const from = static_cast<const T*>(group.from) + token * group.from_stride +
                        int64_t(head) * args.dim;
  const int half = args.rotary / 2;
  const bool turns = live && group.rotated && at.first < args.rotary;
  const bool second_turns = interleaved && turns && at.second < args.rotary;

  // Everything is asked for before anything is used: the ways to memory overlap.
  Values first{}, second{};
  Angles angles{}, second_angles{};
  if (live) first = widened(load_pack(from + at.first));
  if (both) second = widened(load_pack(from + at.second));
  const int64_t row = live ? row_of(args, group, token) : -1;
  if (turns) {
    const float* const of_position = table_row(args, token);
    angles = read_angles<interleaved>(of_position, at.first, half);
    if (second_turns) second_angles = read_angles<interleaved>(of_position, at.second, half);
  }

  const T* const weight = static_cast<const T*>(group.weight);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    squares += first.at[i] * first.at[i] + second.at[i] * second.at[i];
  }
  const float inverse = rsqrtf(sum_lanes<kLanes>(squares) / float(args.dim) + args.eps);
  if (live && weight != nullptr) apply_norm(first, weight + at.first, inverse, args.offset);
  if (both && weight != nullptr) apply_norm(second, weight + at.second, inverse, args.offset);
  if constexpr (interleaved) {
    if (turns) turn_interleaved(first, angles);
    if (second_turns) turn_interleaved(second, second_angles);
  } else {
    if (turns) turn(first, second, angles);
  }

  if (row < 0) return;
  T* const to = static_cast<T*>(group.to) + row * group.to_stride + head * args.dim;
  store_narrowed(to + at.first, first.at);
  if (both) store_narrowed(to + at.second, second.at);
}

template <typename T, int kLanes>
void launch_heads(const Heads& args, cudaStream_t stream) {
  int heads_of_token = 0;
  for (const HeadGroup& group : args.groups) heads_of_token += group.heads;
  if (heads_of_token == 0) return;
  const int64_t blocks = (args.tokens * heads_of_token * kLanes + kThreads - 1) / kThreads;
  if (blocks > INT32_MAX / kThreads) {
    throw std::invalid_argument("heads: " + std::to_string(args.tokens) + " tokens are too many");
  }
  launch(args.interleaved ? store_heads<T, kLanes, true> : store_heads<T, kLanes, false>,
         dim3(unsigned(blocks)), dim3(kThreads), 0, stream, args, heads_of_token);
}

void check_shape(const Heads& args) {
  if (args.dim <= 0 || args.dim % kPack != 0 || args.dim > kMaxHeadDim) {
    throw std::invalid_argument("heads: dim " + std::to_string(args.dim) +
                                " is not a multiple of 8 up to " + std::to_string(kMaxHeadDim));
  }
  const int step = args.interleaved ? kPack : 2 * kPack;
  if (args.rotary < 0 || args.rotary % step != 0 || args.rotary > args.dim) {
    throw std::invalid_argument("heads: rotary " + std::to_string(args.rotary) +
                                " is not a multiple of " + std::to_string(step) + " up to dim");
  }
}

}  // namespace

void heads(const Heads& args, cudaStream_t stream) {
  check_shape(args);
  with_half(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (args.dim <= 8 * kPack) return launch_heads<T, 4>(args, stream);
    if (args.dim <= 16 * kPack) return launch_heads<T, 8>(args, stream);
    launch_heads<T, 16>(args, stream);
  });
}

}  // namespace octavo::cuda
