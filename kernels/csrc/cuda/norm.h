// Root-mean-square and layer norm; what they mean is in reference.py. Pointers are to the device
// and aligned to 16 bytes.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

constexpr int kMaxNormWidth = 16384;

struct Norm {
  DType dtype;
  const void* x;       // [tokens, width]
  const void* weight;  // [width]
  const void* bias;    // [width] or null; layer norm only
  void* residual;      // [tokens, width] or null; becomes residual + x, and that is normed
  void* out;           // [tokens, width]
  int64_t tokens;
  int width;           // a multiple of 8, at most kMaxNormWidth
  float eps;
  float offset;        // added to the weight; root-mean-square norm only
};

void rms_norm(const Norm& args, cudaStream_t stream);
void layer_norm(const Norm& args, cudaStream_t stream);

}  // namespace octavo::cuda
