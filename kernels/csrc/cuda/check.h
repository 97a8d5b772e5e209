// Every call into the CUDA runtime goes through check(): no error is passed over in silence.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace octavo::cuda {

// Throws with the error's name, which device.h's classes and the Python side recognize. The
// runtime's "last error" is cleared, so that the next call does not report this one again.
inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + ")");
}

inline int device_attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

// Of the current device; the same for all devices of a process, as everywhere in this module.
inline int device_attribute(cudaDeviceAttr which) {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device_attribute(which, device);
}

}  // namespace octavo::cuda
