#include "cuda/prefill_warpgroup.cuh"

#include <algorithm>

namespace octavo::cuda {

namespace prefill {
namespace {

template <typename T, int kDim>
void launch_dim(const PrefillAttention& args, const PrefillBatch& batch, const PrefillPlan& plan,
                int blocks, cudaStream_t stream) {
  using Shape = WarpgroupShape<T, kDim>;
  constexpr int kBytes = Shared<Shape>::kBytes;
  static const bool allowed = allow_shared(prefill_warpgroup_kernel<Shape>, kBytes);
  (void)allowed;
  launch(prefill_warpgroup_kernel<Shape>, dim3(blocks), dim3(kComputing + kThreads), kBytes,
         stream, args, batch, plan);
}

template <typename T>
void launch_type(const PrefillAttention& args, const PrefillBatch& batch, const PrefillPlan& plan,
                 int blocks, cudaStream_t stream) {
  if (batch.dim == 64) {
    launch_dim<T, 64>(args, batch, plan, blocks, stream);
  } else {
    launch_dim<T, 128>(args, batch, plan, blocks, stream);
  }
}

}  // namespace
}  // namespace prefill

void prefill_warpgroup(const PrefillAttention& args, const PrefillBatch& batch,
                       const PrefillPlan& plan, int multiprocessors, cudaStream_t stream) {
  const int blocks = std::min(multiprocessors, plan.sizes.max_items * batch.kv_heads);
  if (args.dtype == DType::kBFloat16) {
    prefill::launch_type<__nv_bfloat16>(args, batch, plan, blocks, stream);
  } else {
    prefill::launch_type<__half>(args, batch, plan, blocks, stream);
  }
}

}  // namespace octavo::cuda
