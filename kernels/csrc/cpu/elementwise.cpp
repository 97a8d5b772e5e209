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

// The token's row as floats, padded with zeros; where there is a residual, residual + x.
template <typename T, typename Args>
OCTAVO_INLINE void start_row(const Args& args, int64_t token, float* row, int64_t padded) {
  const int64_t width = args.width;
  const T* x = static_cast<const T*>(args.x) + token * width;
  if (args.residual != nullptr) {
    T* residual = static_cast<T*>(args.residual) + token * width;
    for (int64_t i = 0; i < width; ++i) narrow(widen(residual[i]) + widen(x[i]), residual + i);
    x = residual;
  }
  widen_row(x, width, row);
  memset(row + width, 0, sizeof(float) * (padded - width));
}

template <typename T>
OCTAVO_INLINE void rms_norm_row(const RmsNorm& args, int64_t token, float* row, int64_t padded) {
  const int64_t width = args.width;
  const T* weight = static_cast<const T*>(args.weight);
  T* out = static_cast<T*>(args.out) + token * width;
  start_row<T>(args, token, row, padded);
  const float inverse = inverse_rms(row, padded, width, args.eps);
  if (args.offset != 0) {
    for (int64_t i = 0; i < width; ++i) {
      narrow(row[i] * inverse * (args.offset + widen(weight[i])), out + i);
    }
    return;
  }
  for (int64_t i = 0; i < width; ++i) {
    T normed;  // rounded before the weight is applied, as the models were trained
    narrow(row[i] * inverse, &normed);
    narrow(widen(normed) * widen(weight[i]), out + i);
  }
}

OCTAVO_INLINE float mean(const float* row, int64_t padded, int64_t width) {
  Vec sums[kSums] = {};
  for (int64_t at = 0; at < padded; at += kSums * kLanes) {
    for (int i = 0; i < kSums; ++i) sums[i] += load(row + at + i * kLanes);
  }
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / float(width);
}

template <typename T>
OCTAVO_INLINE void layer_norm_row(const LayerNorm& args, int64_t token, float* row,
                                  int64_t padded) {
  const int64_t width = args.width;
  const T* weight = static_cast<const T*>(args.weight);
  const T* bias = static_cast<const T*>(args.bias);
  T* out = static_cast<T*>(args.out) + token * width;
  start_row<T>(args, token, row, padded);
  const float centre = mean(row, padded, width);
  for (int64_t i = 0; i < width; ++i) row[i] -= centre;
  const float inverse = inverse_rms(row, padded, width, args.eps);
  for (int64_t i = 0; i < width; ++i) {
    const float scaled = row[i] * inverse * widen(weight[i]);
    narrow(bias == nullptr ? scaled : scaled + widen(bias[i]), out + i);
  }
}

template <typename T>
OCTAVO_INLINE void rotate_row(const Rope& args, int64_t token) {
  const int64_t half = args.rotary / 2;
  const float* cosines = args.cos_sin + args.positions[token] * args.rotary;
  const float* sines = cosines + half;
  T* row = static_cast<T*>(args.x) + token * args.stride;
  for (int64_t h = 0; h < args.heads; ++h) {
    T* low = row + h * args.dim;
    if (args.interleaved) {
      for (int64_t i = 0; i < half; ++i) {
        const float a = widen(low[2 * i]), b = widen(low[2 * i + 1]);
        narrow(a * cosines[i] - b * sines[i], low + 2 * i);
        narrow(b * cosines[i] + a * sines[i], low + 2 * i + 1);
      }
      continue;
    }
    T* high = low + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = widen(low[i]), b = widen(high[i]);
      narrow(a * cosines[i] - b * sines[i], low + i);
      narrow(b * cosines[i] + a * sines[i], high + i);
    }
  }
}

template <Function function>
OCTAVO_INLINE Vec apply(Vec x) {
  if constexpr (function == Function::kSilu) return x / (1.0f + exp(-x));
  if constexpr (function == Function::kRelu) return x < Vec{} ? Vec{} : x;  // a NaN stays
  if constexpr (function == Function::kGelu) {
    for (int i = 0; i < kLanes; ++i) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
    return x;
  }
  const Vec inner = 0.79788456f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + tanh(inner));
}

template <typename T, Function function>
OCTAVO_INLINE void activate_row(const Activation& args, int64_t token) {
  const int64_t stride = args.gated ? 2 * args.width : args.width;
  const T* x = static_cast<const T*>(args.x) + token * stride;
  T* out = static_cast<T*>(args.out) + token * args.width;
  for (int64_t at = 0; at < args.width; at += kLanes) {
    const int count = args.width - at < kLanes ? int(args.width - at) : kLanes;
    float wide[kLanes] = {}, factors[kLanes] = {};
    widen_row(x + at, count, wide);
    Vec y = apply<function>(load(wide));
    if (args.gated) {
      widen_row(x + args.width + at, count, factors);
      y *= load(factors);
    }
    for (int i = 0; i < count; ++i) narrow(y[i], out + at + i);
  }
}

template <Function function>
OCTAVO_INLINE void activate(const Activation& args) {
  const int threads = threads_for(args.tokens * args.width, args.threads);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t token = 0; token < args.tokens; ++token) {
    with_type(args.dtype, [&](auto* type) {
      activate_row<std::remove_pointer_t<decltype(type)>, function>(args, token);
    });
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
        rms_norm_row<std::remove_pointer_t<decltype(type)>>(args, token, row, padded);
      });
    }
  }
}

void layer_norm(const LayerNorm& args) {
  const int threads = threads_for(args.tokens * args.width, args.threads);
  const int64_t padded = round_up(args.width, kSums * kLanes);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* const row = scratch(padded);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < args.tokens; ++token) {
      with_type(args.dtype, [&](auto* type) {
        layer_norm_row<std::remove_pointer_t<decltype(type)>>(args, token, row, padded);
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

void activation(const Activation& args) {
  switch (args.function) {
    case Function::kSilu: return activate<Function::kSilu>(args);
    case Function::kGelu: return activate<Function::kGelu>(args);
    case Function::kGeluTanh: return activate<Function::kGeluTanh>(args);
    case Function::kRelu: return activate<Function::kRelu>(args);
  }
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
