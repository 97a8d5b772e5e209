#include "cuda/device.h"
#include "cuda/launch.h"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

py::dict report(int device) {
  const DeviceReport found = device_report(device);
  py::dict dict;
  dict["name"] = found.name;
  dict["devices"] = found.devices;
  dict["capability"] = found.capability;
  dict["multiprocessors"] = found.multiprocessors;
  dict["l2_bytes"] = found.l2_bytes;
  dict["shared_bytes"] = found.shared_bytes;
  dict["driver_version"] = found.driver_version;
  dict["runtime_version"] = found.runtime_version;
  dict["binary_version"] = found.binary_version;
  dict["architectures"] = found.architectures;
  dict["error"] = found.error;
  return dict;
}

}  // namespace

void bind_device(py::module_& m) {
  using py::operator""_a;
  m.def("device_report", &report, "device"_a);
  m.def("set_overlap", [](bool on) { overlap() = on; }, "on"_a,
        "Whether a kernel may begin before the one ahead of it has ended.");
  m.def("set_releasing_lanes",
        [](int lanes) {
          if (lanes != 1 && lanes != 32) {
            throw std::invalid_argument("set_releasing_lanes: 1 or 32, not " +
                                        std::to_string(lanes));
          }
          releasing_lanes() = lanes;
        },
        "lanes"_a, "How many lanes of a warp give a stage of a ring back; see launch.h.");
}

}  // namespace octavo::cuda
