// The host's side of decode attention: which kernel, how many blocks, how much shared memory.
#include "cuda/decode_attention.cuh"

#include "cuda/check.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace {

// Bytes of dynamic shared memory that a block can have besides what the kernel has of its own.
template <typename Kernel>
int most_shared(Kernel* kernel) {
  cudaFuncAttributes own{};
  check(cudaFuncGetAttributes(&own, kernel), "decode_attention");
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - int(own.sharedSizeBytes);
}

// Deeper rings leave room for fewer blocks, which is slower; small tiles want more of them.
int stages_for(int64_t dim) { return dim >= 128 ? 2 : 4; }

int log2_of(int64_t power) {
  int log2 = 0;
  while (int64_t(1) << log2 < power) ++log2;
  return log2;
}

DecodeTask task_of(const DecodeAttention& args, const DecodePlan& plan,
                   const DecodeWorkspace& workspace) {
  DecodeTask task{};
  task.query = args.query;
  task.query_stride = args.query_stride;
  task.keys = static_cast<const char*>(args.key_cache);
  task.values = static_cast<const char*>(args.value_cache);
  task.block_tables = args.block_tables;
  task.max_blocks = int(args.max_blocks);
  task.block_shift = log2_of(args.block_size);
  task.token_bytes = uint32_t(args.kv_heads * args.dim * 2);
  task.out = args.out;
  task.sinks = args.sinks;
  task.chunks = plan.chunks + int64_t(args.window) * plan.list_size;
  task.count = plan.counts + args.window;
  task.max_chunks = plan.chunking.max_chunks;
  task.list_size = plan.list_size;
  task.workspace = workspace;
  task.heads = int(args.heads);
  task.group = int(args.heads / args.kv_heads);
  task.row_tiles = (task.group + kTileRows - 1) / kTileRows;  // of a key head's group
  task.columns = int(args.kv_heads) * task.row_tiles;
  task.stages = args.stages > 0 ? std::min(int(args.stages), kMaxStages) : stages_for(args.dim);
  task.scale = args.softcap > 0 ? args.scale / args.softcap : args.scale * kLog2E;
  task.cap = args.softcap * kLog2E;
  return task;
}

template <typename T, int kDim>
void run(const DecodeTask& task, int blocks_per_sm, cudaStream_t stream) {
  constexpr auto kernel = decode_kernel<T, kDim>;
  static const int multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount);
  static const int most = most_shared(kernel);
  static const bool allowed = allow_shared(kernel, most);
  (void)allowed;
  DecodeTask fitted = task;
  const auto bytes = [&] { return DecodeLayout<kDim>(fitted.stages, task.group).bytes(); };
  while (fitted.stages > 1 && bytes() > most) --fitted.stages;
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kDecodeThreads, bytes()),
        "decode_attention");
  if (blocks_per_sm > 0) blocks = std::min(blocks, blocks_per_sm);
  launch(kernel, dim3(multiprocessors * std::max(1, blocks)), dim3(kDecodeThreads), bytes(),
         stream, fitted);
}

template <typename T>
void run_dim(int64_t dim, const DecodeTask& task, int blocks_per_sm, cudaStream_t stream) {
  switch (dim) {
    case 64: return run<T, 64>(task, blocks_per_sm, stream);
    case 80: return run<T, 80>(task, blocks_per_sm, stream);
    case 96: return run<T, 96>(task, blocks_per_sm, stream);
    case 128: return run<T, 128>(task, blocks_per_sm, stream);
    case 256: return run<T, 256>(task, blocks_per_sm, stream);
    default: throw std::invalid_argument("decode_attention: no kernel for dim " +
                                         std::to_string(dim));
  }
}

}  // namespace

bool decode_serves(int64_t dim, int64_t block_size) {
  const bool dim_is_served = dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256;
  return dim_is_served && block_size >= 8 && (block_size & (block_size - 1)) == 0;
}

void decode_attention(const DecodeAttention& args, const DecodePlan& plan,
                      const DecodeWorkspace& workspace, cudaStream_t stream) {
  const DecodeTask task = task_of(args, plan, workspace);
  if (args.dtype == DType::kBFloat16) {
    run_dim<__nv_bfloat16>(args.dim, task, args.blocks_per_sm, stream);
  } else {
    run_dim<__half>(args.dim, task, args.blocks_per_sm, stream);
  }
}

}  // namespace octavo::cuda
