#include "cuda/upload.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <tuple>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Words = std::tuple<int, std::int64_t, std::int64_t, std::int64_t>;

// What torch takes a tensor from; it keeps the object, and with it the memory.
py::dict array_interface(const Upload& upload) {
  using py::operator""_a;
  return py::dict("shape"_a = py::make_tuple(upload.size()), "typestr"_a = "|u1",
                  "data"_a = py::make_tuple(upload.address(), false), "version"_a = 2);
}

}  // namespace

void bind_upload(py::module_& m) {
  using py::operator""_a;
  using Released = py::call_guard<py::gil_scoped_release>;
  py::class_<Upload>(m, "Upload")
      .def(py::init([](std::vector<std::string> paths, const std::vector<Words>& pieces,
                       std::int64_t total, int readers) {
             std::vector<Piece> found;
             for (const auto& [file, offset, to, bytes] : pieces) {
               found.push_back({file, offset, to, bytes});
             }
             return std::make_unique<Upload>(std::move(paths), std::move(found), total, readers);
           }),
           "paths"_a, "pieces"_a, "total"_a, "readers"_a)
      .def_property_readonly("done", &Upload::done)
      .def("wait", &Upload::wait, "seconds"_a, Released())
      .def_property_readonly("__cuda_array_interface__", &array_interface);
}

}  // namespace octavo::cuda
