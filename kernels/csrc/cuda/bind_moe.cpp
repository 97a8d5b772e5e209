#include "cuda/moe.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void run_mixture(int dtype, Address x, Address logits, Address gate_up, Address gate_up_bias,
                 Address down, Address down_bias, Address out, int64_t tokens, int64_t hidden,
                 int64_t inner, int64_t experts, int64_t top_k, bool normalized, int function,
                 float swiglu_alpha, float swiglu_limit, Address weights, Address chosen,
                 Address order, Address place, Address tiles, Address activated, Address results,
                 Address stream) {
  mixture({DType(dtype), pointer(x), pointer(logits), pointer(gate_up), pointer(gate_up_bias),
           pointer(down), pointer(down_bias), pointer(out), tokens, hidden, inner, experts, top_k,
           normalized, {Function(function), swiglu_alpha, swiglu_limit}, pointer<float>(weights),
           pointer<int32_t>(chosen), pointer<int32_t>(order), pointer<int32_t>(place),
           pointer<ExpertTile>(tiles), pointer(activated), pointer(results)},
          reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_moe(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  m.def("mixture", &run_mixture, named, "dtype"_a, "x"_a, "logits"_a, "gate_up"_a,
        "gate_up_bias"_a, "down"_a, "down_bias"_a, "out"_a, "tokens"_a, "hidden"_a, "inner"_a,
        "experts"_a, "top_k"_a, "normalized"_a, "function"_a, "swiglu_alpha"_a, "swiglu_limit"_a,
        "weights"_a, "chosen"_a, "order"_a, "place"_a, "tiles"_a, "activated"_a, "results"_a,
        "stream"_a);
  m.def("mixture_serves", &mixture_serves, "hidden"_a, "inner"_a, "experts"_a, "top_k"_a,
        "Whether there are kernels for these sizes.");
  m.def("mixture_tiles", &mixture_tiles, "tokens"_a, "experts"_a, "top_k"_a,
        "The most tiles that these numbers can need.");
}

}  // namespace octavo::cuda
