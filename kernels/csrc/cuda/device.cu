#include "cuda/device.h"

#include <cuda_runtime.h>

namespace octavo::cuda {
namespace {

// Stands for all kernels: the same architectures were compiled for each.
__global__ void probe() {}

bool failed(DeviceReport& report, cudaError_t error, const char* call) {
  if (error == cudaSuccess) return false;
  cudaGetLastError();
  report.error = std::string(call) + ": " + cudaGetErrorName(error);
  return true;
}

// With an older driver every later call fails, which would say less than the versions do.
bool driver_serves(const DeviceReport& report) {
  return report.driver_version / 1000 >= report.runtime_version / 1000;
}

}  // namespace

DeviceReport device_report(int device) {
  DeviceReport report{};
  report.runtime_version = CUDART_VERSION;
  report.architectures = OCTAVO_CUDA_ARCHITECTURES;
  if (failed(report, cudaDriverGetVersion(&report.driver_version), "cudaDriverGetVersion") ||
      !driver_serves(report)) {
    return report;
  }
  const cudaError_t counted = cudaGetDeviceCount(&report.devices);
  if (counted == cudaErrorNoDevice) cudaGetLastError();
  if (counted != cudaErrorNoDevice && failed(report, counted, "cudaGetDeviceCount")) return report;
  if (device < 0 || device >= report.devices) return report;

  cudaDeviceProp found{};
  if (failed(report, cudaGetDeviceProperties(&found, device), "cudaGetDeviceProperties")) {
    return report;
  }
  report.name = found.name;
  report.capability = 10 * found.major + found.minor;
  report.multiprocessors = found.multiProcessorCount;
  report.l2_bytes = found.l2CacheSize;
  report.shared_bytes = int(found.sharedMemPerBlockOptin);
  // Loads the probe: the one sure way to know that there is code for the device.
  cudaFuncAttributes attributes{};
  if (!failed(report, cudaFuncGetAttributes(&attributes, probe), "cudaFuncGetAttributes")) {
    report.binary_version = attributes.binaryVersion;
  }
  return report;
}

}  // namespace octavo::cuda
