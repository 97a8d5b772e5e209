// Tensor maps, by the driver's function (CUDA driver API, "Tensor Map Object Management").
#pragma once

#include "cuda/check.h"
#include "types.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

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

// Boxes of a matrix of 16-bit elements in up to 4 dimensions, rows swizzled by 128 bytes; zeros stand
// for what lies beyond it. Arguments as the driver's.
inline CUtensorMap tensor_map(DType dtype, const void* matrix, int dims, const cuuint64_t* sizes,
                              const cuuint64_t* strides, const cuuint32_t* box) {
  CUtensorMap map;
  const cuuint32_t each[4] = {1, 1, 1, 1};
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = tensor_map_encoder()(
      &map, type, cuuint32_t(dims), const_cast<void*>(matrix), sizes, strides, box, each,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
  }
  return map;
}

}  // namespace octavo::cuda
