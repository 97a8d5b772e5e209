// Log-probabilities of drawn tokens and of the most probable ones, a block a row. Sums are of
// integers, so that they are the same in any order and whatever the other rows are.
#include "cuda/launch.h"
#include "cuda/row_select.cuh"

namespace octavo::cuda {
namespace {

struct Problem {
  Logits logits;
  const int32_t* tokens;
  const int32_t* wanted;
  LogprobsOut out;
};

struct Spread {
  float largest, smallest;
  uint32_t rank;  // 1 and as many as are larger than the token's
};

template <typename T>
__device__ Spread spread_of(const Row<T>& row, float own, SelectShared& shared) {
  float largest = -INFINITY, smallest = INFINITY;
  uint32_t above = 0;
  for (int group = threadIdx.x; group < row.groups(); group += kSelectThreads) {
    row.visit(group, row.load(group), [&](float x, int) {
      largest = fmaxf(largest, x);
      smallest = fminf(smallest, x);
      above += x > own;
    });
  }
  uint32_t(&sums)[kBins] = shared.count;  // as scratch
  if (threadIdx.x < 3) sums[threadIdx.x] = threadIdx.x == 1 ? ~0u : 0;
  __syncthreads();
  const uint32_t high = __reduce_max_sync(~0u, ordered(largest));
  const uint32_t low = __reduce_min_sync(~0u, ordered(smallest));
  const uint32_t count = __reduce_add_sync(~0u, above);
  if (threadIdx.x % 32 == 0) {
    atomicMax(&sums[0], high);
    atomicMin(&sums[1], low);
    atomicAdd(&sums[2], count);
  }
  __syncthreads();
  const Spread found{from_ordered(sums[0]), from_ordered(sums[1]), sums[2] + 1};
  __syncthreads();
  return found;
}

template <typename T>
__global__ void __launch_bounds__(kSelectThreads, 1) logprob_rows(const Problem p) {
  __shared__ SelectShared shared;
  allow_next();
  wait_for_previous();
  const int r = blockIdx.x, wanted = p.wanted[r];
  const int32_t token = p.tokens[r];
  if (wanted < 0 || token < 0) return;
  const Row<T> row = row_of<T>(p.logits, r);
  const float own = row.raw(token);
  const Spread spread = spread_of(row, own, shared);
  RowSelect<T> select(row, shared, nullptr, spread.largest, spread.smallest, 1.0, true);
  const int count = min(min(wanted, p.out.top_stride), row.vocab);
  double total;
  const Cut cut = select.search(0, [&]() -> Target {
    const double weight = double(shared.total_weight) / RowSelect<T>::kWeightOne;
    total = spread.largest + log(weight);
    return {false, uint64_t(count)};
  });
  if (threadIdx.x == 0) {
    p.out.logprob[r] = float(own - total);
    p.out.rank[r] = int(spread.rank);
  }
  if (count <= 0) return;
  select.gather(cut);
  for (int i = threadIdx.x; i < count; i += kSelectThreads) {
    const uint64_t place = shared.list[i];
    p.out.top_ids[int64_t(r) * p.out.top_stride + i] = select.order.id(place);
    p.out.top_logprobs[int64_t(r) * p.out.top_stride + i] =
        float(from_ordered(select.order.key(place)) - total);
  }
}

}  // namespace

void token_logprobs(const Logits& logits, const int32_t* tokens, const int32_t* wanted,
                    const LogprobsOut& out, cudaStream_t stream) {
  const Problem p{logits, tokens, wanted, out};
  if (logits.dtype == DType::kFloat32) {
    launch(logprob_rows<float>, logits.rows, kSelectThreads, 0, stream, p);
  } else if (logits.dtype == DType::kBFloat16) {
    launch(logprob_rows<__nv_bfloat16>, logits.rows, kSelectThreads, 0, stream, p);
  } else {
    launch(logprob_rows<__half>, logits.rows, kSelectThreads, 0, stream, p);
  }
}

}  // namespace octavo::cuda
