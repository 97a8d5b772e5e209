#include "cuda/gated_gemm.h"
#include "cuda/skinny_gemm.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

const void* pointer(Address address) { return reinterpret_cast<const void*>(address); }

cudaStream_t on(Address stream) { return reinterpret_cast<cudaStream_t>(stream); }

void skinny(int dtype, Address x, int64_t x_stride, Address norm_weight, float norm_eps,
            float norm_offset, Address w, Address bias, Address out, int64_t rows, int64_t n,
            int64_t k, int epilogue, int function, Address ahead, int64_t ahead_bytes,
            int64_t shared_limit, Address stream) {
  SkinnyGemm gemm{};
  gemm.dtype = DType(dtype);
  gemm.x = pointer(x);
  gemm.x_stride = x_stride;
  gemm.norm_weight = pointer(norm_weight);
  gemm.norm_eps = norm_eps;
  gemm.norm_offset = norm_offset;
  gemm.w = pointer(w);
  gemm.bias = pointer(bias);
  gemm.out = reinterpret_cast<void*>(out);
  gemm.rows = rows;
  gemm.n = n;
  gemm.k = k;
  gemm.epilogue = Epilogue(epilogue);
  gemm.function = Function(function);
  gemm.ahead = pointer(ahead);
  gemm.ahead_bytes = ahead_bytes;
  gemm.shared_limit = shared_limit;
  skinny_gemm(gemm, on(stream));
}

void gated(int dtype, Address x, int64_t x_stride, Address w, Address out, int64_t rows, int64_t n,
           int64_t k, int function, Address stream) {
  gated_gemm({DType(dtype), pointer(x), x_stride, pointer(w), reinterpret_cast<void*>(out), rows, n,
              k, Function(function)},
             on(stream));
}

bool gated_serves(int64_t n, int64_t k, int function, int device) {
  return gated_gemm_serves(n, k, Function(function), device);
}

}  // namespace

void bind_gemm(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  m.def("skinny_gemm", &skinny, named, "dtype"_a, "x"_a, "x_stride"_a, "norm_weight"_a,
        "norm_eps"_a, "norm_offset"_a, "w"_a, "bias"_a, "out"_a, "rows"_a, "n"_a, "k"_a,
        "epilogue"_a, "function"_a, "ahead"_a, "ahead_bytes"_a, "shared_limit"_a, "stream"_a);
  m.def("skinny_gemm_serves", &skinny_gemm_serves, "rows"_a, "k"_a, "norm"_a,
        "Whether there is a kernel for these sizes.");
  m.def("gated_gemm", &gated, named, "dtype"_a, "x"_a, "x_stride"_a, "w"_a, "out"_a, "rows"_a,
        "n"_a, "k"_a, "function"_a, "stream"_a);
  m.def("gated_gemm_serves", &gated_serves, "n"_a, "k"_a, "function"_a, "device"_a,
        "Whether there is a kernel for these sizes on the device.");
}

}  // namespace octavo::cuda
