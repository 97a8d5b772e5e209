#include "cuda/prefill_attention.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace prefill {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kLengths = 1024;  // classes of item lengths, for the sort
constexpr int kStep = 128;      // keys: spans begin at multiples of it
// How many rounds of blocks spans should give: more rounds even out better, but every span's
// result is written and read again.
constexpr int kRounds = 2;
constexpr int kMergeRows = 8;  // a block's
constexpr int kCounts = 2;     // words before the items

struct Device {
  int multiprocessors, capability;
};

const Device& device() {
  static const Device found{device_attribute(cudaDevAttrMultiProcessorCount),
                            device_attribute(cudaDevAttrComputeCapabilityMajor)};
  return found;
}

// Blocks that run at once: a block with warpgroups has a multiprocessor for itself.
int slots(bool warpgroups) { return device().multiprocessors * (warpgroups ? 1 : 2); }

__host__ __device__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Three quarters full is as good as full: fewer blocks on a multiprocessor run faster.
int enough_tiles(bool warpgroups, int kv_heads) {
  return divide_up(slots(warpgroups) * 3, 4 * kv_heads);
}

// How a step's tiles are cut: into spans of so many steps of keys (0: not at all).
struct Cut {
  int span;
  __device__ int parts(int steps) const {
    return span > 0 && steps > span ? divide_up(steps, span) : 1;
  }
};

// Calls visit(sequence, tile, end) for every tile, where `end` keys can be seen by its last row.
// A warp takes a sequence, a lane a tile.
template <typename Visit>
__device__ void visit_tiles(const PrefillBatch& batch, int tile_rows, const Visit& visit) {
  const int group = batch.heads / batch.kv_heads;
  const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int s = batch.num_decodes + threadIdx.x / 32; s < batch.seqs; s += warps) {
    const int queries = batch.query_start[s + 1] - batch.query_start[s];
    const int position = batch.seq_lens[s] - queries;
    const int tiles = divide_up(queries * group, tile_rows);
    for (int tile = lane; tile < tiles; tile += 32) {
      const int tokens = min(queries, divide_up((tile + 1) * tile_rows, group));
      visit(s, tile, max(0, position + tokens));
    }
  }
}

// How many keys part `part` of `parts` begins at: whole steps, as even as they go.
__device__ int part_begin(int steps, int part, int parts) {
  return int(int64_t(steps) * part / parts) * kStep;
}

// Lists the items, longest first (by counting in classes of length): blocks are started in their
// order, and what is started last should be short. With `enough_tiles` none is split. One block.
__global__ void plan_kernel(const PrefillBatch batch, const PrefillPlan plan, int min_span,
                            int wanted_items, int enough_tiles) {
  __shared__ int places[kLengths];
  __shared__ int tiles, longest, splits, partials;
  __shared__ unsigned long long work;
  wait_for_previous();
  const int t = threadIdx.x;
  for (int i = t; i < kLengths; i += blockDim.x) places[i] = 0;
  if (t == 0) tiles = longest = splits = partials = work = 0;
  __syncthreads();

  const int rows = plan.sizes.tile_rows;
  visit_tiles(batch, rows, [&](int, int, int end) {
    atomicAdd(&tiles, 1);
    atomicMax(&longest, divide_up(end, kStep));
    atomicAdd(&work, static_cast<unsigned long long>(divide_up(end, kStep)));
  });
  __syncthreads();
  const bool cut_up = plan.sizes.max_splits > 0 && tiles < enough_tiles;
  const Cut cut{cut_up ? max(divide_up(min_span, kStep),
                             int((work + wanted_items - 1) / wanted_items))
                       : 0};
  const int longest_part = divide_up(longest, cut.parts(longest)) + 1;
  const auto length_class = [&](int steps) {  // 0: the longest
    return kLengths - 1 - min(kLengths - 1, steps * (kLengths - 1) / longest_part);
  };
  visit_tiles(batch, rows, [&](int, int, int end) {
    const int steps = divide_up(end, kStep), parts = cut.parts(steps);
    atomicAdd(&places[length_class(steps / parts)], parts);
  });
  __syncthreads();
  // Counts become first places.
  for (int distance = 1; distance < kLengths; distance *= 2) {
    const int before = t >= distance ? places[t - distance] : 0;
    __syncthreads();
    places[t] += before;
    __syncthreads();
  }
  const int first_place = t > 0 ? places[t - 1] : 0;
  if (t == kLengths - 1) plan.counts[0] = places[t];
  __syncthreads();
  places[t] = first_place;
  __syncthreads();

  visit_tiles(batch, rows, [&](int sequence, int tile, int end) {
    const int steps = divide_up(end, kStep), parts = cut.parts(steps);
    int partial = -1;
    if (parts > 1) {
      partial = atomicAdd(&partials, parts);
      plan.splits[atomicAdd(&splits, 1)] = {sequence, tile, partial, parts};
    }
    const int place = atomicAdd(&places[length_class(steps / parts)], parts);
    for (int part = 0; part < parts; ++part) {
      plan.items[place + part] = {sequence, tile, part_begin(steps, part, parts),
                                  min(end, part_begin(steps, part + 1, parts)),
                                  parts > 1 ? partial + part : -1, part};
    }
  });
  __syncthreads();
  if (t == 0) plan.counts[1] = splits;
  allow_next();
}

// Puts the spans of a tile's rows together; a warp takes a row at a time.
template <typename T>
__global__ void merge_spans(const __grid_constant__ PrefillAttention args,
                            const __grid_constant__ PrefillBatch batch,
                            const __grid_constant__ PrefillPlan plan) {
  wait_for_previous();
  const int at = blockIdx.z, kv_head = blockIdx.x, lane = threadIdx.x % 32;
  if (at >= plan.counts[1]) return;
  const PrefillSplit split = plan.splits[at];
  const int tile_rows = plan.sizes.tile_rows, warps = blockDim.x / 32;
  const Tile tile = make_tile(batch, {split.sequence, split.tile}, tile_rows);
  const int first = blockIdx.y * kMergeRows, end = min(first + kMergeRows, tile.rows);
  const auto* sums = reinterpret_cast<const float2*>(plan.partial_sums);
  for (int row = first + threadIdx.x / 32; row < end; row += warps) {
    const auto index = [&](int part) {
      return (int64_t(split.partial + part) * batch.kv_heads + kv_head) * tile_rows + row;
    };
    float maximum = -CUDART_INF_F;
    for (int part = 0; part < split.parts; ++part) {
      maximum = fmaxf(maximum, sums[index(part)].x);
    }
    const float base = maximum == -CUDART_INF_F ? 0 : maximum;
    float sum = 0;
    for (int part = 0; part < split.parts; ++part) {
      sum += sums[index(part)].y * power_of_two(sums[index(part)].x - base);
    }
    const float share = sum == 0 ? 0 : 1 / sum;
    T* out = static_cast<T*>(args.out) +
             (int64_t(tile.begin + tile.token(row)) * batch.heads + kv_head * tile.group +
              tile.head(row)) * batch.dim;
    for (int column = lane * 4; column < batch.dim; column += 128) {
      float4 mixed = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int part = 0; part < split.parts; ++part) {
        const float weight = power_of_two(sums[index(part)].x - base);
        const float4 value = *reinterpret_cast<const float4*>(
            plan.partial_out + index(part) * batch.dim + column);
        mixed.x += weight * value.x;
        mixed.y += weight * value.y;
        mixed.z += weight * value.z;
        mixed.w += weight * value.w;
      }
      *reinterpret_cast<uint2*>(out + column) =
          make_uint2(pack<T>(mixed.x * share, mixed.y * share),
                     pack<T>(mixed.z * share, mixed.w * share));
    }
  }
  allow_next();
}

template <typename T, int kDim>
void launch_dim(const PrefillAttention& args, const PrefillBatch& batch, const PrefillPlan& plan,
                cudaStream_t stream) {
  if constexpr (kDim <= 128) {
    if (plan.sizes.tile_rows == 128) {
      return launch_shape<TileShape<T, kDim, 128>>(args, batch, plan, stream);
    }
  }
  launch_shape<TileShape<T, kDim, 64>>(args, batch, plan, stream);
}

template <typename T>
void launch_tiles(const PrefillAttention& args, const PrefillBatch& batch, const PrefillPlan& plan,
                  cudaStream_t stream) {
  switch (batch.dim) {
    case 64: return launch_dim<T, 64>(args, batch, plan, stream);
    case 80: return launch_dim<T, 80>(args, batch, plan, stream);
    case 96: return launch_dim<T, 96>(args, batch, plan, stream);
    case 128: return launch_dim<T, 128>(args, batch, plan, stream);
    case 256: return launch_dim<T, 256>(args, batch, plan, stream);
  }
  throw std::runtime_error("prefill_attention: no kernel for head dim " +
                           std::to_string(batch.dim));
}

template <typename T>
void launch_type(const PrefillAttention& args, const PrefillBatch& batch, const PrefillPlan& plan,
                 cudaStream_t stream) {
  if (plan.sizes.warpgroups) {
    prefill_warpgroup(args, batch, plan, device().multiprocessors, stream);
  } else {
    launch_tiles<T>(args, batch, plan, stream);
  }
  if (plan.sizes.max_splits > 0) {
    launch(merge_spans<T>,
           dim3(batch.kv_heads, plan.sizes.tile_rows / kMergeRows, plan.sizes.max_splits),
           kThreads, 0, stream, args, batch, plan);
  }
}

}  // namespace
}  // namespace prefill

using namespace prefill;

bool prefill_serves(int64_t dim, int64_t block_size) {
  const bool paged = block_size >= 8 && (block_size & (block_size - 1)) == 0;
  return paged && (dim == 64 || dim == 80 || dim == 96 || dim == 128 || dim == 256);
}

PrefillSizes prefill_sizes(const PrefillBatch& batch, int max_query_len, PrefillOptions options) {
  const int group = batch.heads / batch.kv_heads;
  const int seqs = batch.seqs - batch.num_decodes, tokens = batch.tokens - batch.num_decodes;
  // A smaller tile wastes less where it is filled by few rows, and is all that fits for wide heads.
  const bool small = batch.dim > 128 || int64_t(max_query_len) * group <= 64;
  const int tile_rows = small ? 64 : 128;
  if (seqs <= 0 || tokens <= 0) return {false, tile_rows, 0, 0, 0};
  const bool warpgroups = options.warpgroups && !small && device().capability == 9 &&
                          (batch.dim == 64 || batch.dim == 128);
  const int tiles = int(int64_t(tokens) * group / tile_rows) + std::min(seqs, tokens);
  const int enough = enough_tiles(warpgroups, batch.kv_heads);
  const int split_tiles = std::min(tiles, enough - 1);
  const bool split = options.min_span > 0 && split_tiles > 0 &&
                     (options.any_batch || tiles < enough);
  if (!split) return {warpgroups, tile_rows, tiles, 0, 0};
  // Rounding up the parts of every tile adds at most one item a tile.
  const int parts = divide_up(slots(warpgroups) * kRounds, batch.kv_heads) + split_tiles;
  return {warpgroups, tile_rows, std::max(tiles, parts), split_tiles, parts};
}

int64_t prefill_list_words(const PrefillSizes& sizes) {
  return kCounts + int64_t(sizes.max_items) * (sizeof(PrefillItem) / 4) +
         int64_t(sizes.max_splits) * (sizeof(PrefillSplit) / 4);
}

int64_t prefill_partial_floats(const PrefillSizes& sizes, const PrefillBatch& batch) {
  return int64_t(sizes.max_partials) * batch.kv_heads * sizes.tile_rows * (batch.dim + 2);
}

PrefillPlan prefill_plan(const PrefillSizes& sizes, const PrefillBatch& batch, int32_t* lists,
                         float* partials) {
  PrefillPlan plan{sizes, lists, nullptr, nullptr, partials, nullptr};
  plan.items = reinterpret_cast<PrefillItem*>(lists + kCounts);
  plan.splits = reinterpret_cast<PrefillSplit*>(plan.items + sizes.max_items);
  plan.partial_sums =
      partials + int64_t(sizes.max_partials) * batch.kv_heads * sizes.tile_rows * batch.dim;
  return plan;
}

void plan_prefill(const PrefillBatch& batch, const PrefillPlan& plan, PrefillOptions options,
                  cudaStream_t stream) {
  if (plan.sizes.max_items == 0) return;
  const int wanted = divide_up(slots(plan.sizes.warpgroups) * kRounds, batch.kv_heads);
  launch(plan_kernel, dim3(1), dim3(kPlanThreads), 0, stream, batch, plan, options.min_span,
         wanted, enough_tiles(plan.sizes.warpgroups, batch.kv_heads));
}

void prefill_attention(const PrefillAttention& args, const PrefillBatch& batch,
                       const PrefillPlan& plan, cudaStream_t stream) {
  if (args.dtype == DType::kBFloat16) {
    launch_type<__nv_bfloat16>(args, batch, plan, stream);
  } else {
    launch_type<__half>(args, batch, plan, stream);
  }
}

}  // namespace octavo::cuda
