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

// Boxes [box_rows, box_columns] of a matrix [rows, columns] of 16-bit elements, whose rows lie
// `stride` elements apart; rows of a box are swizzled by 128 bytes, zeros are what lies beyond.
inline CUtensorMap tensor_map(DType dtype, const void* matrix, int64_t rows, int64_t columns,
                              int64_t stride, int box_rows, int box_columns) {
  CUtensorMap map;
  const cuuint64_t sizes[2] = {cuuint64_t(columns), cuuint64_t(rows)};
  const cuuint64_t strides[1] = {cuuint64_t(stride) * 2};
  const cuuint32_t box[2] = {cuuint32_t(box_columns), cuuint32_t(box_rows)}, each[2] = {1, 1};
  const auto type = dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUresult result = tensor_map_encoder()(
      &map, type, 2, const_cast<void*>(matrix), sizes, strides, box, each,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
  }
  return map;
}

}  // namespace octavo::cuda
