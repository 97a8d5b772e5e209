// Products of 17 to 512 rows: too many for one pass over the matrix by plain loads, too few for
// tiles of the result that fill every multiprocessor.
#pragma once

#include "cuda/skinny_gemm.h"
#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

// y = x · w^T + bias, summed in float32, and what `epilogue` says; kGated by silu alone, rounded
// once. kAdd rounds y before it is added, as skinny_gemm does.
struct StreamGemm {
  DType dtype;           // bf16 or fp16: of all tensors
  const void* x;         // [rows, k], rows x_stride elements apart
  int64_t x_stride;
  const void* w;         // [n, k]; no kernel in flight may write it: it is read ahead
  const void* bias;      // [n] or null
  void* out;             // [rows, n], or [rows, n / 2] of kGated
  int64_t rows, n, k;
  Epilogue epilogue;
  int width;             // rows of x to a tile: 32, 64, 128, 192 or 256
  int shares;            // into which the products of a tile of rows are cut, each of two blocks
  void* partials;        // stream_gemm_partial_bytes(); what is in it does not matter
  int32_t* arrivals;     // stream_gemm_arrivals() of them, zeros before and after each launch
};

// Pairs of blocks that this device runs at once, which wait for one another; 0: it is no Hopper, or
// other processes share it by MPS.
int stream_gemm_pairs(int device);

// Workspaces for any size, of one stream at a time.
int64_t stream_gemm_partial_bytes(int pairs);
int64_t stream_gemm_arrivals(int pairs);

// n and k must be multiples of 8 (n of 16 for kGated); pointers and row strides of 16 bytes.
// Tiles of rows times shares are at most stream_gemm_pairs(), and shares at most the steps of 64
// columns in all tiles of 256 rows of w. A row's bits depend on n, k, width and shares alone.
void stream_gemm(const StreamGemm& args, cudaStream_t stream);

}  // namespace octavo::cuda
