#include "cuda/stream_gemm.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

const void* pointer(Address address) { return reinterpret_cast<const void*>(address); }

void product(int dtype, Address x, int64_t x_stride, Address w, Address bias, Address out,
             int64_t rows, int64_t n, int64_t k, int epilogue, int width, int shares,
             Address partials, Address arrivals, Address stream) {
  StreamGemm gemm{};
  gemm.dtype = DType(dtype);
  gemm.x = pointer(x);
  gemm.x_stride = x_stride;
  gemm.w = pointer(w);
  gemm.bias = pointer(bias);
  gemm.out = reinterpret_cast<void*>(out);
  gemm.rows = rows;
  gemm.n = n;
  gemm.k = k;
  gemm.epilogue = Epilogue(epilogue);
  gemm.width = width;
  gemm.shares = shares;
  gemm.partials = reinterpret_cast<void*>(partials);
  gemm.arrivals = reinterpret_cast<int32_t*>(arrivals);
  stream_gemm(gemm, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_stream(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  m.def("stream_gemm", &product, named, "dtype"_a, "x"_a, "x_stride"_a, "w"_a, "bias"_a, "out"_a,
        "rows"_a, "n"_a, "k"_a, "epilogue"_a, "width"_a, "shares"_a, "partials"_a, "arrivals"_a,
        "stream"_a);
  m.def("stream_gemm_pairs", &stream_gemm_pairs, "device"_a,
        "Pairs of blocks that the device runs at once; 0: it has no kernel.");
  m.def("stream_gemm_partial_bytes", &stream_gemm_partial_bytes, "pairs"_a);
  m.def("stream_gemm_arrivals", &stream_gemm_arrivals, "pairs"_a);
}

}  // namespace octavo::cuda
