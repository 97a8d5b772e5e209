// Norm, rotary positions and activation for one instruction set. Each row is done by one thread
// in one order, so its bits do not depend on the rows beside it or on the number of threads.
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

#include <type_traits>

namespace octavo {
namespace OCTAVO_ISA {
namespace {

// Below this many elements a thread, waking it costs more than it does.
constexpr int64_t kElementsPerThread = 16384;

OCTAVO_INLINE int threads_for(int64_t elements, int threads) {
  const int64_t useful = elements / kElementsPerThread;
  return useful < 2 ? 1 : useful < threads ? int(useful) : threads;
}

// Root-mean-square norm of `row` (padded with zeros to whole groups of vectors).
constexpr int kSums = 4;

OCTAVO_INLINE float inverse_rms(const float* row, int64_t padded, int64_t width, float eps) {
  Vec sums[kSums] = {};
  for (int64_t at = 0; at < padded; at += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) {
      const Vec x = load(row + at + i * kLanes);
      sums[i] += x * x;
    }
  }
  const float total = sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return 1.0f / sqrtf(total / float(width) + eps);
}

template <typename T>
OCTAVO_INLINE void norm_row(const RmsNorm& args, int64_t token, float* row, int64_t padded) {
  const int64_t width = args.width;
  const T* x = static_cast<const T*>(args.x) + token * width;
  const T* weight = static_cast<const T*>(args.weight);
  T* out = static_cast<T*>(args.out) + token * width;
  if (args.residual != nullptr) {
    T* residual = static_cast<T*>(args.residual) + token * width;
    for (int64_t i = 0; i < width; ++i) narrow(widen(residual[i]) + widen(x[i]), residual + i);
    x = residual;
  }
  widen_row(x, width, row);
  memset(row + width, 0, sizeof(float) * (padded - width));
  const float inverse = inverse_rms(row, padded, width, args.eps);
  for (int64_t i = 0; i < width; ++i) {
    T normed;  // rounded before the weight is applied, as the models were trained
    narrow(row[i] * inverse, &normed);
    narrow(widen(normed) * widen(weight[i]), out + i);
  }
}

template <typename T>
OCTAVO_INLINE void rotate_row(const Rope& args, int64_t token) {
  const int64_t half = args.dim / 2;
  const float* cosines = args.cos_sin + args.positions[token] * args.dim;
  const float* sines = cosines + half;
  T* row = static_cast<T*>(args.x) + token * args.stride;
  for (int64_t h = 0; h < args.heads; ++h) {
    T* low = row + h * args.dim;
    T* high = low + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = widen(low[i]), b = widen(high[i]);
      narrow(a * cosines[i] - b * sines[i], low + i);
      narrow(b * cosines[i] + a * sines[i], high + i);
    }
  }
}

template <typename T>
OCTAVO_INLINE void activate_row(const SiluAndMul& args, int64_t token) {
  const T* gate = static_cast<const T*>(args.x) + token * 2 * args.width;
  const T* up = gate + args.width;
  T* out = static_cast<T*>(args.out) + token * args.width;
  for (int64_t at = 0; at < args.width; at += kLanes) {
    const int count = args.width - at < kLanes ? int(args.width - at) : kLanes;
    float gates[kLanes] = {}, ups[kLanes] = {};
    widen_row(gate + at, count, gates);
    widen_row(up + at, count, ups);
    const Vec x = load(gates);
    const Vec y = x / (1.0f + exp(-x)) * load(ups);
    for (int i = 0; i < count; ++i) narrow(y[i], out + at + i);
  }
}

}  // namespace

void rms_norm(const RmsNorm& args) {
  const int threads = threads_for(args.tokens * args.width, args.threads);
  const int64_t padded = round_up(args.width, kSums * kLanes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* const row = scratch(padded);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < args.tokens; ++token) {
      with_type(args.dtype, [&](auto* type) {
        norm_row<std::remove_pointer_t<decltype(type)>>(args, token, row, padded);
      });
    }
  }
}

void rope(const Rope& args) {
  const int threads = threads_for(args.tokens * args.heads * args.dim, args.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t token = 0; token < args.tokens; ++token) {
    with_type(args.dtype, [&](auto* type) {
      rotate_row<std::remove_pointer_t<decltype(type)>>(args, token);
    });
  }
}

void silu_and_mul(const SiluAndMul& args) {
  const int threads = threads_for(args.tokens * args.width, args.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t token = 0; token < args.tokens; ++token) {
    with_type(args.dtype, [&](auto* type) {
      activate_row<std::remove_pointer_t<decltype(type)>>(args, token);
    });
  }
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
