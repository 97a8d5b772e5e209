// octavo_kernels._cuda. Tensors arrive as addresses, streams as integers; cuda*.py has matched
// shapes. The interpreter's lock is kept: a launch takes microseconds, getting it back may not.
// Nothing here needs a driver to be loaded: the module imports on any machine.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace octavo::cuda {

void bind_batch(py::module_& m);
void bind_decode(py::module_& m);
void bind_blaslt(py::module_& m);
void bind_device(py::module_& m);
void bind_elementwise(py::module_& m);
void bind_gemm(py::module_& m);
void bind_moe(py::module_& m);
void bind_persistent(py::module_& m);
void bind_prefill(py::module_& m);
void bind_sampling(py::module_& m);
void bind_upload(py::module_& m);

}  // namespace octavo::cuda

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Operations on a GPU; called by octavo_kernels' cuda modules only.";
  octavo::cuda::bind_batch(m);
  octavo::cuda::bind_decode(m);
  octavo::cuda::bind_blaslt(m);
  octavo::cuda::bind_device(m);
  octavo::cuda::bind_elementwise(m);
  octavo::cuda::bind_gemm(m);
  octavo::cuda::bind_moe(m);
  octavo::cuda::bind_persistent(m);
  octavo::cuda::bind_prefill(m);
  octavo::cuda::bind_sampling(m);
  octavo::cuda::bind_upload(m);
}
