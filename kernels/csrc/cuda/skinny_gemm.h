// Matrix products of few rows, as one decode step has them: bound by reading the matrix once.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

constexpr int kSkinnyRows = 16;  // at most

// What is done with the product y = x · w^T + bias.
enum class Epilogue : int {
  kStore = 0,  // out[rows, n] = y
  kAdd = 1,    // out[rows, n] += y: out is the residual
  kGated = 2,  // out[rows, n / 2] = function(left half of y) * right half of y
};

struct SkinnyGemm {
  DType dtype;              // bf16 or fp16: of all tensors
  const void* x;            // [rows, k], rows x_stride elements apart
  int64_t x_stride;
  const void* norm_weight;  // [k] or null: x's rows are RMS-normed first
  float norm_eps;
  float norm_offset;        // added to norm_weight; where it is not 0, rounded only once
  const void* w;            // [n, k]; no kernel in flight may write it: it is read ahead
  const void* bias;         // [n] or null
  void* out;
  int64_t rows, n, k;
  Epilogue epilogue;
  Function function;        // of kGated
  const void* ahead;        // what the next product reads, or null: brought to the L2 cache once
  int64_t ahead_bytes;      // all of w is on its way; a multiple of 16
  int64_t shared_limit;     // bytes of shared memory a block may take; 0: half of what there is
};

// Whether there is a kernel for these sizes: 1..16 rows, k a multiple of 8, and x small enough to
// be normed by every block where there is a norm. Pointers and row strides must be multiples of
// 16 bytes.
bool skinny_gemm_serves(int64_t rows, int64_t k, bool norm);

// Each product is summed in an order that depends on k alone: a row's bits do not depend on the
// other rows. One launch, at most one block a multiprocessor.
void skinny_gemm(const SkinnyGemm& args, cudaStream_t stream);

}  // namespace octavo::cuda
