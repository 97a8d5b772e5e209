// The activation functions, in float32.
#pragma once

#include "types.h"

namespace octavo::cuda {

// By the fast division: for kernels that multiply nothing while they store.
__device__ __forceinline__ float fast_silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }

__device__ __forceinline__ float activate(Function function, float x) {
  switch (function) {
    case Function::kSilu:
      return x / (1.0f + __expf(-x));
    case Function::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    case Function::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    case Function::kRelu:
      return x < 0.0f ? 0.0f : x;  // keeps NaN
  }
  return x;
}

}  // namespace octavo::cuda
