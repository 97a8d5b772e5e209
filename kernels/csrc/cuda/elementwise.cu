#include "cuda/elementwise.h"

#include "cuda/activation.cuh"
#include "cuda/launch.h"
#include "cuda/vector.cuh"

#include <algorithm>

namespace octavo::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMaxGridRows = 65535;  // the grid's limit; blocks loop over the rest

// A block a stretch of columns and row; more rows than a grid has are looped over.
dim3 grid_of(int64_t tokens, int width) {
  const int packs = width / kPack;
  return dim3((packs + kThreads - 1) / kThreads, unsigned(std::min(tokens, kMaxGridRows)));
}

void check_width(const char* op, int width) {
  if (width <= 0 || width % kPack != 0) {
    throw std::invalid_argument(std::string(op) + ": width " + std::to_string(width) +
                                " is not a multiple of 8");
  }
}

template <typename T, Function function, bool gated>
__global__ void __launch_bounds__(kThreads) activate_rows(const ActivationRows args) {
  wait_for_previous();
  allow_next();
  const int at = (blockIdx.x * kThreads + threadIdx.x) * kPack;
  if (at >= args.width) return;
  for (int64_t row = blockIdx.y; row < args.tokens; row += gridDim.y) {
    const T* const x = static_cast<const T*>(args.x) + row * (gated ? 2 : 1) * args.width + at;
    Pack<T> pack = load_pack(x), factor{};
    if constexpr (gated) factor = load_pack(x + args.width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float y = activate(function, widen(pack.at[i]));
      pack.at[i] = narrow<T>(gated ? y * widen(factor.at[i]) : y);
    }
    store_pack(static_cast<T*>(args.out) + row * args.width + at, pack);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) embed_rows(const Embedding args) {
  wait_for_previous();
  allow_next();
  const int at = (blockIdx.x * kThreads + threadIdx.x) * kPack;
  if (at >= args.width) return;
  const float scale = rounded<T>(args.scale);
  for (int64_t row = blockIdx.y; row < args.tokens; row += gridDim.y) {
    const int64_t id = args.token_ids[row];
    if (id >= args.vocabulary) __trap();
    Pack<T> pack{};
    if (id >= 0) {
      pack = load_constant_pack(static_cast<const T*>(args.table) + id * args.width + at);
    }
    if (args.scale != 1.0f) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) pack.at[i] = narrow<T>(widen(pack.at[i]) * scale);
    }
    if (args.position_table != nullptr) {
      const int64_t position = args.positions[row];
      if (position < 0 || position >= args.max_positions) __trap();
      const T* const table = static_cast<const T*>(args.position_table);
      const Pack<T> added = load_constant_pack(table + position * args.width + at);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        pack.at[i] = narrow<T>(widen(pack.at[i]) + widen(added.at[i]));
      }
    }
    store_pack(static_cast<T*>(args.out) + row * args.width + at, pack);
  }
}

template <typename T, Function function>
void launch_activation(const ActivationRows& args, cudaStream_t stream) {
  const dim3 grid = grid_of(args.tokens, args.width);
  if (args.gated) {
    launch(activate_rows<T, function, true>, grid, dim3(kThreads), 0, stream, args);
  } else {
    launch(activate_rows<T, function, false>, grid, dim3(kThreads), 0, stream, args);
  }
}

}  // namespace

void activation(const ActivationRows& args, cudaStream_t stream) {
  check_width("activation", args.width);
  with_half(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    switch (args.function) {
      case Function::kSilu: return launch_activation<T, Function::kSilu>(args, stream);
      case Function::kGelu: return launch_activation<T, Function::kGelu>(args, stream);
      case Function::kGeluTanh: return launch_activation<T, Function::kGeluTanh>(args, stream);
      case Function::kRelu: return launch_activation<T, Function::kRelu>(args, stream);
    }
  });
}

void embed(const Embedding& args, cudaStream_t stream) {
  check_width("embed", args.width);
  const dim3 grid = grid_of(args.tokens, args.width);
  with_half(args.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(embed_rows<T>, grid, dim3(kThreads), 0, stream, args);
  });
}

}  // namespace octavo::cuda
