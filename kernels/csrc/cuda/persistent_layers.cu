// All layers of a decode step of few rows in one launch, or all of the step: one block a
// multiprocessor, for the whole of it. Between kernels, and between the barriers of one, memory has
// nothing to do: here a warp of each block streams all weights through one ring in shared memory,
// up to 200 KB ahead, whatever the others wait for. The others hand each other activations as
// tagged words (persistent_words.cuh), so that a block begins a product when what it needs is
// there.
//
// Each layer: norm and qkv; attention; output added to the residual; norm, gate and up; down added
// to the residual. Rounded where the kernels for one operation each round. Where logits are wanted,
// the last norm and the head follow, whose weights come while the last layer ends.
//
// A word is overwritten a layer later, by a block that has meanwhile taken later results of every
// other, for which that one had read the word: every block has rows of qkv and of gate and up.
#include "cuda/persistent_layers.h"

#include "cuda/activation.cuh"
#include "cuda/check.h"
#include "cuda/persistent_attention.cuh"
#include "cuda/persistent_producer.cuh"
#include "cuda/persistent_product.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace persistent {
namespace {

// What a block's consumers do; one copy of each part for all products, because code that does not
// fit the instruction cache has to be fetched anew in every layer.
template <typename T, int kDim, int kLanes>
struct Consumers {
  const Task& task;
  const Shared& shared;
  RingPosition at;

  __device__ __forceinline__ void begin() {
    bring_norm(shared.table()[0].input_norm, task.hidden, shared.input_norm());
    wait_for_previous();
    const Portion output = portion_of(task, shared, kDim, kOutput);
    const int rows = task.num_rows;
#pragma unroll 1
    for (int i = threadIdx.x; i < output.units * rows * kGroup; i += kThreads) {
      const int line = i / kGroup, column = (output.first + line / rows) * kGroup + i % kGroup;
      const auto* row = reinterpret_cast<const T*>(first_row(task, line % rows));
      shared.residual()[i] = row ? widen(__ldcg(row + column)) : 0.0f;
    }
    if (threadIdx.x / 32 == kWarps - 1) make_schedule(task, shared.schedules());
    sync_first(kThreads);
  }

  __device__ __forceinline__ Source source(const Pass& pass, int product, int width) const {
    const Exchange& from = task.exchange;
    Source x{from.residual.mine(), pass.tag, task.num_rows, width};
    if (product == kQkv && pass.number == 0) x.words = nullptr;
    if (product == kQkv || product == kHead) --x.tag;
    if (product == kOutput) x.words = from.mixed.mine();
    if (product == kGateUp) x.words = from.middle.mine();
    if (product == kDown) x.words = from.inner.mine();
    return x;
  }

  // Adds a product's outputs to this block's columns of the residual; the sums, packed.
  __device__ __forceinline__ uint32_t add(const Outputs& out) const {
    float* sum = shared.residual() + (out.unit * task.num_rows + out.row) * kGroup + out.pair;
    sum[0] = rounded<T>(sum[0] + rounded<T>(out.first.x));
    sum[1] = rounded<T>(sum[1] + rounded<T>(out.first.y));
    return pack<T>(sum[0], sum[1]);
  }

  __device__ __forceinline__ void finish(const Pass& pass, int product, int width,
                                         const Outputs& out) const {
    const Exchange& to = task.exchange;
    const int64_t place = (int64_t(out.row) * width + out.column) / 2;
    if (product == kQkv) {
      put_word(to.qkv + place, pack<T>(out.first.x, out.first.y), pass.tag);
    } else if (product == kHead) {
      static_cast<uint32_t*>(task.rows.logits)[place] = pack<T>(out.first.x, out.first.y);
    } else if (product == kGateUp) {
      float gate[2] = {out.first.x, out.first.y};
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        gate[0] = activate(task.stack.function, rounded<T>(gate[0]));
        const float swapped = gate[0];
        gate[0] = gate[1], gate[1] = swapped;
      }
      const uint32_t both =
          pack<T>(gate[0] * rounded<T>(out.second.x), gate[1] * rounded<T>(out.second.y));
      to.inner.put(place, both, pass.tag);
    } else {
      const uint32_t sums = add(out);
      const bool last = pass.number + 1 == task.num_layers && task.rows.residual != nullptr;
      if (product == kDown && last) {
        static_cast<uint32_t*>(task.rows.residual)[place] = sums;
      } else {
        (product == kDown ? to.residual : to.middle).put(place, sums, pass.tag);
      }
    }
  }

  // The norm of the pass behind this one; null: there is none.
  __device__ __forceinline__ const void* next_norm(const Pass& pass) const {
    const int next = pass.number + 1;
    if (next < task.num_layers) return shared.table()[next].input_norm;
    return task.rows.residual ? nullptr : task.stack.final_norm;
  }

  // A pass through a layer, or behind all of them through the head.
  __device__ __forceinline__ void run(const Pass& pass) {
    const bool head = pass.number == task.num_layers;
#pragma unroll 1
    for (int product = head ? kHead : kQkv; product < kProducts + head; ++product) {
      if (product == kOutput) {
        // Nobody reads either any more, and the first is needed after this layer's attention.
        bring_norm(pass.layer.mlp_norm, task.hidden, shared.mlp_norm());
        const void* next = next_norm(pass);
        if (next) bring_norm(next, task.hidden, shared.input_norm());
        attend<T, kDim, kLanes>(task, pass, shared, at);
      }
      const Portion portion = portion_of(task, shared, kDim, product);
      if (portion.units == 0) continue;
      const uint8_t* norm = product == kQkv || product == kHead ? shared.input_norm()
                            : product == kGateUp                ? shared.mlp_norm()
                                                                : nullptr;
      stage<T>(task, source(pass, product, portion.k), norm, shared);
      multiply<T, kLanes>(task, shared, portion, at, [&](const Outputs& out) {
        finish(pass, product, portion.half_rows, out);
      });
    }
  }
};

// kLanes of a warp give a stage back.
template <typename T, int kDim, int kLanes>
__global__ void __launch_bounds__(kThreads + 32, 1)
    persistent_kernel(const __grid_constant__ Task task) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  allow_next();
  const Shared shared{task, memory};
  if (threadIdx.x == kThreads) shared.ring().init(kWarps * kLanes, kFillers);
  const auto* table = reinterpret_cast<const uint64_t*>(task.stack.layers);
  for (int i = threadIdx.x; i < task.num_layers * int(sizeof(DecoderLayer) / 8); i += blockDim.x) {
    reinterpret_cast<uint64_t*>(shared.table())[i] = __ldg(table + i);
  }
  if (threadIdx.x <= kHead) {
    shared.portions()[threadIdx.x] = divided(outputs_of(task, kDim, threadIdx.x));
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    produce<kDim>(task, shared);
    return;
  }
  Consumers<T, kDim, kLanes> consumers{task, shared, {}};
  consumers.begin();
#pragma unroll 1
  for (int l = 0; l < task.passes(); ++l) {
    const DecoderLayer& layer = shared.table()[min(l, task.num_layers - 1)];
    consumers.run({layer, l, shared.schedules()->passes + l + 1});
  }
  // Whoever has put together a part of the last layer's output has results of every block, all of
  // which have read the number before. The last block always has a part, others may have none.
  if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 0) {
    *task.exchange.passes = shared.schedules()->passes + task.num_layers;
  }
#else
  __trap();  // persistent_rows() is 0 for such code
#endif
}

struct Device {
  int multiprocessors, shared, capability, mps;
};

const Device& device() {
  static const Device device{device_attribute(cudaDevAttrMultiProcessorCount),
                             device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                             device_attribute(cudaDevAttrComputeCapabilityMajor),
                             device_attribute(cudaDevAttrMpsEnabled)};
  return device;
}

constexpr int kLeastStages = 5;  // fewer do not keep memory busy
static_assert(kLeastStages > kStreaming);

int64_t qkv_columns(const LayerStack& stack) {
  return (stack.heads + 2 * stack.kv_heads) * stack.dim;
}

// Every block has rows of qkv and of gate and up, see the top.
int blocks_of(const LayerStack& stack) {
  const int64_t least = std::min(qkv_columns(stack), stack.inner) / kGroup;
  return int(std::min<int64_t>(device().multiprocessors, least));
}

// A model whose blocks wait for each other longer than for memory wants its words to be quick, one
// with much to read wants memory busy. H100, us a step of one sequence: 0.6B has 0.24 MB a block
// and layer, 8B 3.3 MB. 2 stages under way, 3, 5 and any number: 0.6B after 600 tokens 558, 562,
// 563, 565, after 5,000 739, 764, 783, 785; 8B after 600 5012, 4797, 4884, 4952. Short chunks of
// cached tokens by the copy engine and not: 0.6B after 600 557 and 572; 8B 4802 and 4774, of two
// sequences 5139 and 5036.
bool waits_for_words(const LayerStack& stack) {
  const int64_t rows = qkv_columns(stack) + 3 * stack.inner + stack.heads * stack.dim;
  return rows * stack.hidden * 2 / blocks_of(stack) < 2 * device().shared;
}

Task task_of(const LayerStack& stack, int64_t rows) {
  Task task{};
  task.stack = stack;
  task.num_rows = int(rows);
  task.num_layers = int(stack.num_layers);
  task.hidden = int(stack.hidden);
  task.inner = int(stack.inner);
  task.heads = int(stack.heads);
  task.kv_heads = int(stack.kv_heads);
  task.group = int(stack.heads / stack.kv_heads);
  while ((int64_t(1) << task.block_shift) < stack.block_size) ++task.block_shift;
  while ((1 << task.row_shift) < task.num_rows) ++task.row_shift;
  task.num_slots = stack.num_blocks * stack.block_size;
  task.scale = stack.scale * kLog2E;
  const int64_t blocks = blocks_of(stack);
  const int most_units = int((stack.hidden / kGroup + blocks - 1) / blocks);
  const int besides = Layout(stack, task.num_rows, 0, most_units).bytes;
  task.stages = (device().shared - besides) / Ring::bytes(1, kStageBytes);
  task.at = Layout(stack, task.num_rows, task.stages, most_units);
  const bool quick = waits_for_words(stack);
  task.ahead = quick ? kStreaming - 1 : kStreaming;
  if (stack.ahead > 0) task.ahead = std::min(stack.ahead, task.stages - 1);
  task.engine_tokens = quick ? kEngineTokens : 0;
  if (stack.engine_tokens >= 0) task.engine_tokens = stack.engine_tokens;
  return task;
}

// Under MPS another process's blocks run beside ours: two such kernels, each on some of the
// multiprocessors, would wait for each other until both end in an error.
bool serves(const LayerStack& stack) {
  return device().capability == 9 && device().mps == 0 && stack.dtype != DType::kFloat32 &&
         (stack.dim == 64 || stack.dim == 128) && stack.heads > 0 && stack.kv_heads > 0 &&
         stack.heads % stack.kv_heads == 0 && stack.heads / stack.kv_heads <= kMostGroup &&
         stack.num_layers > 0 && stack.hidden > 0 && stack.hidden % kGroup == 0 &&
         stack.inner > 0 && stack.inner % kGroup == 0 && stack.block_size > 0 &&
         (stack.block_size & (stack.block_size - 1)) == 0 && stack.vocab % kGroup == 0;
}

// The workspace, in words; returns how many.
int64_t place_words(const LayerStack& stack, Word* base, Exchange& to) {
  int64_t used = 16;
  const auto place = [&](Word*& words, int64_t count) {
    words = base + used;
    used += (count + 15) / 16 * 16;
  };
  const auto place_copies = [&](SharedWords& shared, int64_t width) {
    shared.size = int((kPersistentRows * width / 2 + 15) / 16 * 16);
    place(shared.words, SharedWords::kCopies * shared.size);
  };
  to.passes = reinterpret_cast<uint32_t*>(base);
  const int64_t rows = kPersistentRows, group = stack.heads / stack.kv_heads;
  const int64_t items = std::max<int64_t>(blocks_of(stack), rows * stack.kv_heads);
  place(to.qkv, rows * qkv_columns(stack) / 2);
  place(to.parts, items * group * (stack.dim + 2));
  place_copies(to.mixed, stack.heads * stack.dim);
  place_copies(to.middle, stack.hidden);
  place_copies(to.inner, stack.inner);
  place_copies(to.residual, stack.hidden);
  return used;
}

template <typename T, int kDim, int kLanes>
void run(const Task& task, cudaStream_t stream) {
  constexpr auto kernel = persistent_kernel<T, kDim, kLanes>;
  static const bool allowed = allow_shared(kernel, device().shared);
  (void)allowed;
  launch(kernel, dim3(blocks_of(task.stack)), dim3(kThreads + 32), task.at.bytes, stream,
         task);
}

template <typename T, int kLanes>
void run(const Task& task, cudaStream_t stream) {
  task.stack.dim == 64 ? run<T, 64, kLanes>(task, stream) : run<T, 128, kLanes>(task, stream);
}

template <typename T>
void run(const Task& task, cudaStream_t stream) {
  releasing_lanes() == 1 ? run<T, 1>(task, stream) : run<T, 32>(task, stream);
}

}  // namespace
}  // namespace persistent

int64_t persistent_rows(const LayerStack& stack) {
  using namespace persistent;
  if (!serves(stack)) return 0;
  int64_t rows = kPersistentRows;
  while (rows > 0 && task_of(stack, rows).stages < kLeastStages) --rows;
  return rows;
}

int64_t persistent_workspace(const LayerStack& stack) {
  persistent::Exchange exchange;
  return persistent::place_words(stack, nullptr, exchange) * int64_t(sizeof(persistent::Word));
}

void persistent_layers(const LayerStack& stack, const DecodeRows& rows, void* workspace,
                       cudaStream_t stream) {
  using namespace persistent;
  if (rows.rows < 1 || rows.rows > persistent_rows(stack)) {
    throw std::invalid_argument("persistent_layers: no kernel for " + std::to_string(rows.rows) +
                                " rows of " + std::to_string(stack.hidden));
  }
  if (rows.residual == nullptr && stack.vocab == 0) {
    throw std::invalid_argument("persistent_layers: tokens without an embedding and a head");
  }
  Task task = task_of(stack, rows.rows);
  task.rows = rows;
  place_words(stack, static_cast<Word*>(workspace), task.exchange);
  stack.dtype == DType::kBFloat16 ? run<__nv_bfloat16>(task, stream) : run<__half>(task, stream);
}

}  // namespace octavo::cuda
