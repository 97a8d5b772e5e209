// Gated products of many rows, as a prompt's chunk has them: bound by the tensor cores. What gate
// and up give never leaves the multiprocessor.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

// out[rows, n / 2] = function(left half of y) * right half of y, y = x[rows, k] · w[n, k]^T; sums,
// function and product in float32, rounded once. x's rows lie x_stride elements apart.
struct GatedGemm {
  DType dtype;  // bf16 or fp16: of all tensors
  const void* x;
  int64_t x_stride;
  const void* w;
  void* out;
  int64_t rows, n, k;
  Function function;
};

// Whether there is a kernel for these sizes on this device: Hopper, n a multiple of 256, k of 64,
// silu. Pointers and row strides must be multiples of 16 bytes.
bool gated_gemm_serves(int64_t n, int64_t k, Function function, int device);

void gated_gemm(const GatedGemm& args, cudaStream_t stream);

}  // namespace octavo::cuda
