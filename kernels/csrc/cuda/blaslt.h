// Matrix products by cuBLASLt with an algorithm of the caller's choice. The library is the one that
// the process has loaded (torch's), found by name when first used: nothing is linked.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <vector>

namespace octavo::cuda {

// As cuBLASLt keeps it; good for the library's version and kind of device that it was made on.
using LtAlgorithm = std::array<uint64_t, 8>;

constexpr int kLtAlignment = 16;  // bytes, of all pointers and rows

// out[rows, n] = x[rows, k] · w[n, k]^T + bias[n], or out += that; rows of x lie x_stride elements
// apart. What is added to is rounded once, with the sum.
struct LtProduct {
  DType dtype;       // bf16 or fp16: of all tensors; sums are in float32
  const void* x;
  int64_t x_stride;
  const void* w;
  const void* bias;  // or null
  void* out;
  int64_t rows, n, k;
  bool add;
};

struct LtWorkspace {
  void* data;
  int64_t bytes;
};

// The library's version, 10000 * major + 100 * minor + patch. Throws where there is no library.
int64_t lt_version();

// What the library's heuristic offers for these sizes, best first. `split` allows algorithms that
// add sums of parts of k, of which there may be more or fewer with other sizes.
std::vector<LtAlgorithm> lt_candidates(const LtProduct& product, int64_t workspace, int count,
                                       bool split);

// False, and nothing launched, where the algorithm does not serve these sizes.
bool lt_product(const LtProduct& product, const LtAlgorithm& algorithm, LtWorkspace workspace,
                cudaStream_t stream);

// Device seconds of one product by each algorithm, over each of `weights` in turn: the better of two
// turns of all algorithms. Infinity for one that does not serve. Rough, as small differences follow
// the clocks. Waits for the device: not for use while a graph is captured.
std::vector<double> lt_rank(LtProduct product, const std::vector<uint64_t>& weights,
                            const std::vector<LtAlgorithm>& algorithms, LtWorkspace workspace,
                            cudaStream_t stream);

}  // namespace octavo::cuda
