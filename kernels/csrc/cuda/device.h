// What the device and its driver are, and whether this build runs on them.
#pragma once

#include <string>

namespace octavo::cuda {

struct DeviceReport {
  std::string name;
  int capability;           // compute capability, 10 * major + minor
  int multiprocessors;
  int l2_bytes;
  int shared_bytes;         // the most shared memory that one block may ask for
  int driver_version;       // of CUDA, as the driver supports it: 1000 * major + 10 * minor
  int runtime_version;      // of CUDA, that this module was built with
  int binary_version;       // of the machine code in use, 10 * major + minor
  std::string architectures;  // that were compiled, in CMake's words
};

// Throws std::runtime_error in a sentence for the user: no driver, one that is too old, no such
// device, a device that is too old, or a build without code for it.
DeviceReport device_report(int device);

}  // namespace octavo::cuda
