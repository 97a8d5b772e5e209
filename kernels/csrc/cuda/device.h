// What the device and its driver are; whether they suit is decided in cuda_device.py.
#pragma once

#include <string>

namespace octavo::cuda {

struct DeviceReport {
  std::string name;           // empty where there is no such device
  int devices;                // that can be seen
  int capability;             // compute capability, 10 * major + minor
  int multiprocessors;
  int l2_bytes;
  int shared_bytes;           // the most shared memory that one block may ask for
  int driver_version;         // of CUDA, that it supports, 1000 * major + 10 * minor; 0: no driver
  int runtime_version;        // of CUDA, that this module was built with
  int binary_version;         // of the machine code in use, 10 * major + minor
  std::string architectures;  // that were compiled, in CMake's words
  std::string error;          // of the call that failed, with its name; the rest is not known
};

// Never throws for what it finds: an error is part of the report.
DeviceReport device_report(int device);

}  // namespace octavo::cuda
