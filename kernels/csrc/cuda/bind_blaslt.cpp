#include "cuda/blaslt.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

const void* pointer(Address address) { return reinterpret_cast<const void*>(address); }

LtProduct product_of(int dtype, Address x, int64_t x_stride, Address w, Address bias, Address out,
                     int64_t rows, int64_t n, int64_t k, bool add) {
  return {DType(dtype), pointer(x), x_stride, pointer(w), pointer(bias),
          reinterpret_cast<void*>(out), rows, n, k, add};
}

LtAlgorithm algorithm_of(const std::string& bytes) {
  LtAlgorithm algorithm{};
  if (bytes.size() != sizeof algorithm) throw std::invalid_argument("not an LtAlgorithm's bytes");
  std::memcpy(algorithm.data(), bytes.data(), sizeof algorithm);
  return algorithm;
}

py::list candidates(int dtype, Address x, int64_t x_stride, Address w, Address bias, Address out,
                    int64_t rows, int64_t n, int64_t k, bool add, int64_t workspace_bytes,
                    int count, bool split) {
  py::list list;
  for (const auto& algorithm :
       lt_candidates(product_of(dtype, x, x_stride, w, bias, out, rows, n, k, add),
                     workspace_bytes, count, split)) {
    list.append(py::bytes(reinterpret_cast<const char*>(algorithm.data()), sizeof algorithm));
  }
  return list;
}

bool product(int dtype, Address x, int64_t x_stride, Address w, Address bias, Address out,
             int64_t rows, int64_t n, int64_t k, bool add, const py::bytes& algorithm,
             Address workspace, int64_t workspace_bytes, Address stream) {
  return lt_product(product_of(dtype, x, x_stride, w, bias, out, rows, n, k, add),
                    algorithm_of(algorithm),
                    {reinterpret_cast<void*>(workspace), workspace_bytes},
                    reinterpret_cast<cudaStream_t>(stream));
}

std::vector<double> rank(int dtype, Address x, int64_t x_stride,
                         const std::vector<uint64_t>& weights, Address bias, Address out,
                         int64_t rows, int64_t n, int64_t k, bool add,
                         const std::vector<py::bytes>& algorithms, Address workspace,
                         int64_t workspace_bytes, Address stream) {
  std::vector<LtAlgorithm> each;
  for (const auto& algorithm : algorithms) each.push_back(algorithm_of(algorithm));
  return lt_rank(product_of(dtype, x, x_stride, 0, bias, out, rows, n, k, add), weights, each,
                 {reinterpret_cast<void*>(workspace), workspace_bytes},
                 reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_blaslt(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  m.def("lt_version", &lt_version, "The version of the cuBLASLt that torch has loaded.");
  m.def("lt_candidates", &candidates, named, "dtype"_a, "x"_a, "x_stride"_a, "w"_a, "bias"_a,
        "out"_a, "rows"_a, "n"_a, "k"_a, "add"_a, "workspace_bytes"_a, "count"_a, "split"_a);
  m.def("lt_product", &product, named, "dtype"_a, "x"_a, "x_stride"_a, "w"_a, "bias"_a, "out"_a,
        "rows"_a, "n"_a, "k"_a, "add"_a, "algorithm"_a, "workspace"_a, "workspace_bytes"_a,
        "stream"_a);
  m.def("lt_rank", &rank, named, "dtype"_a, "x"_a, "x_stride"_a, "weights"_a, "bias"_a, "out"_a,
        "rows"_a, "n"_a, "k"_a, "add"_a, "algorithms"_a, "workspace"_a, "workspace_bytes"_a,
        "stream"_a);
}

}  // namespace octavo::cuda
