// The driver's function that encodes tensor maps (CUDA driver API, "Tensor Map Object Management").
#pragma once

#include "cuda/check.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>

namespace octavo::cuda {

using TensorMapEncoder = decltype(&cuTensorMapEncodeTiled);

// The driver's library is not linked, see cuda.cmake.
inline TensorMapEncoder tensor_map_encoder() {
  static const TensorMapEncoder found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                           cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    if (result != cudaDriverEntryPointSuccess) {
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<TensorMapEncoder>(function);
  }();
  return found;
}

}  // namespace octavo::cuda
