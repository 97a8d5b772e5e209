#include "cuda/device.h"

#include "cuda/check.h"

#include <cuda_runtime.h>

namespace octavo::cuda {
namespace {

constexpr int kLeastCapability = 80;  // bfloat16 on tensor cores, cp.async
constexpr const char* kOtherwise = "; otherwise use --device cpu";

// Stands for all kernels: the same architectures were compiled for each.
__global__ void probe() {}

[[noreturn]] void refuse(const std::string& what) {
  throw std::runtime_error(what + kOtherwise);
}

std::string dotted(int tenths) {
  return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10);
}

// CUDA's own versions: 13020 is 13.2.
std::string version(int number) { return dotted(number / 1000 * 10 + number % 1000 / 10); }

int driver_version() {
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver == 0) {
    refuse("no NVIDIA driver is loaded; CUDA " + version(CUDART_VERSION / 1000 * 1000) +
           " needs one of the 580 series or newer");
  }
  // Within one major version an older driver runs what a newer runtime asks for.
  if (driver / 1000 < CUDART_VERSION / 1000) {
    refuse("the NVIDIA driver supports CUDA " + version(driver) + ", but this build needs " +
           version(CUDART_VERSION / 1000 * 1000) + ": install driver 580 or newer");
  }
  return driver;
}

cudaDeviceProp properties(int device) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaErrorNoDevice) check(error, "cudaGetDeviceCount");
  if (device < 0 || device >= count) {
    refuse("there is no CUDA device " + std::to_string(device) + ", " + std::to_string(count) +
           " can be seen: ask for one in the pod's resources (nvidia.com/gpu)");
  }
  cudaDeviceProp found{};
  check(cudaGetDeviceProperties(&found, device), "cudaGetDeviceProperties");
  return found;
}

// Loads the probe: the one sure way to know that there is code for the device.
int binary_version(const std::string& of_device) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion ||
      error == cudaErrorInvalidPtx) {
    cudaGetLastError();
    refuse(of_device + ", for which this build (architectures " OCTAVO_CUDA_ARCHITECTURES
           ") has no code that the driver takes, " + cudaGetErrorName(error) +
           ": build again with CMAKE_CUDA_ARCHITECTURES set to it, or install a newer driver");
  }
  check(error, "cudaFuncGetAttributes");
  return attributes.binaryVersion;
}

}  // namespace

DeviceReport device_report(int device) {
  const int driver = driver_version();
  const cudaDeviceProp found = properties(device);
  const int capability = 10 * found.major + found.minor;
  const std::string named =
      std::string(found.name) + " has compute capability " + dotted(capability);
  if (capability < kLeastCapability) {
    refuse(named + "; at least " + dotted(kLeastCapability) + " is needed (A100, A10, L4, H100)");
  }
  return {found.name,
          capability,
          found.multiProcessorCount,
          found.l2CacheSize,
          int(found.sharedMemPerBlockOptin),
          driver,
          CUDART_VERSION,
          binary_version(named),
          OCTAVO_CUDA_ARCHITECTURES};
}

}  // namespace octavo::cuda
