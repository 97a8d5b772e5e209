// What a row's history marks; draws go on counting by themselves (emit in sampling.cu).
#include "cuda/launch.h"
#include "cuda/sampling.h"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 1024;

// `change` gives the new mark; a token may occur in several threads' hands at once.
template <typename Id, typename F>
__device__ void mark_all(const Marks& marks, const Id* ids, int count, F change) {
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int64_t id = ids[i];
    if (id < 0 || id >= marks.length) continue;
    unsigned short* mark = reinterpret_cast<unsigned short*>(marks.row + id);
    unsigned short seen = *mark, before;
    do {
      before = seen;
      seen = atomicCAS(mark, before, change(before));
    } while (seen != before);
  }
}

__global__ void restart(const Marks marks) {
  allow_next();
  wait_for_previous();
  uint4* row = reinterpret_cast<uint4*>(marks.row);
  for (int64_t i = threadIdx.x; i < marks.length / 8; i += kThreads) row[i] = uint4{0, 0, 0, 0};
  __syncthreads();
  const auto with = [](uint16_t bit) {
    return [bit](unsigned short mark) { return static_cast<unsigned short>(mark | bit); };
  };
  mark_all(marks, marks.prompt, marks.num_prompt, with(kInPrompt));
  mark_all(marks, marks.allowed, marks.num_allowed, with(kAllowed));
  mark_all(marks, marks.listed, marks.num_listed, with(kListed));
  mark_all(marks, marks.drawn, marks.num_drawn, [](unsigned short mark) {
    return static_cast<unsigned short>((mark & kCountMask) == kCountMask ? mark : mark + 1);
  });
}

}  // namespace

void restart_marks(const Marks& marks, cudaStream_t stream) {
  launch(restart, 1, kThreads, 0, stream, marks);
}

}  // namespace octavo::cuda
