// The only file that knows Python. Tensors arrive as addresses; ops.py has matched their shapes.
#include "kernels.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void paged_attention(int dtype, Address query, int64_t query_stride, Address key_cache,
                     Address value_cache, Address block_tables, Address query_start,
                     Address seq_lens, Address out, int64_t tokens, int64_t seqs,
                     int64_t max_blocks, int64_t blocks, int64_t block_size, int64_t heads,
                     int64_t kv_heads, int64_t dim, float scale, int64_t window, float softcap,
                     Address sinks, int threads) {
  octavo::paged_attention({octavo::DType(dtype), pointer(query), query_stride, pointer(key_cache),
                           pointer(value_cache), pointer<int32_t>(block_tables),
                           pointer<int32_t>(query_start), pointer<int32_t>(seq_lens), pointer(out),
                           tokens, seqs, max_blocks, blocks, block_size, heads, kv_heads, dim,
                           scale, window, softcap, pointer<float>(sinks), threads});
}

void write_kv(Address key, int64_t key_stride, Address value, int64_t value_stride,
              Address key_cache, Address value_cache, Address slots, int64_t tokens,
              int64_t num_slots, int64_t row_bytes) {
  octavo::write_kv({pointer(key), key_stride, pointer(value), value_stride, pointer(key_cache),
                    pointer(value_cache), pointer<int64_t>(slots), tokens, num_slots, row_bytes});
}

void rms_norm(int dtype, Address x, Address weight, Address residual, Address out, int64_t tokens,
              int64_t width, float eps, float offset, int threads) {
  octavo::rms_norm({octavo::DType(dtype), pointer(x), pointer(weight), pointer(residual),
                    pointer(out), tokens, width, eps, offset, threads});
}

void layer_norm(int dtype, Address x, Address weight, Address bias, Address residual, Address out,
                int64_t tokens, int64_t width, float eps, int threads) {
  octavo::layer_norm({octavo::DType(dtype), pointer(x), pointer(weight), pointer(bias),
                      pointer(residual), pointer(out), tokens, width, eps, threads});
}

void rope(int dtype, Address x, int64_t stride, Address positions, Address cos_sin,
          int64_t max_positions, int64_t tokens, int64_t heads, int64_t dim, int64_t rotary,
          bool interleaved, int threads) {
  octavo::rope({octavo::DType(dtype), pointer(x), stride, pointer<int64_t>(positions),
                pointer<float>(cos_sin), max_positions, tokens, heads, dim, rotary, interleaved,
                threads});
}

void activation(int dtype, int function, bool gated, Address x, Address out, int64_t tokens,
                int64_t width, int threads) {
  octavo::activation({octavo::DType(dtype), octavo::Function(function), gated, pointer(x),
                      pointer(out), tokens, width, threads});
}

void copy_blocks(Address cache, int64_t planes, int64_t blocks, int64_t block_bytes, Address pairs,
                 int64_t num_pairs) {
  octavo::copy_blocks({pointer(cache), planes, blocks, block_bytes, pointer<int64_t>(pairs),
                       num_pairs});
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Operations on the CPU; called by octavo_kernels.ops only.";
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  const py::kw_only named;
  using py::operator""_a;
  m.def("paged_attention", &paged_attention, unlocked, named, "dtype"_a, "query"_a,
        "query_stride"_a, "key_cache"_a, "value_cache"_a, "block_tables"_a, "query_start"_a,
        "seq_lens"_a, "out"_a, "tokens"_a, "seqs"_a, "max_blocks"_a, "blocks"_a, "block_size"_a,
        "heads"_a, "kv_heads"_a, "dim"_a, "scale"_a, "window"_a, "softcap"_a,
        "sinks"_a, "threads"_a);
  m.def("write_kv", &write_kv, unlocked, named, "key"_a, "key_stride"_a, "value"_a,
        "value_stride"_a, "key_cache"_a, "value_cache"_a, "slots"_a, "tokens"_a, "num_slots"_a,
        "row_bytes"_a);
  m.def("rms_norm", &rms_norm, unlocked, named, "dtype"_a, "x"_a, "weight"_a, "residual"_a, "out"_a,
        "tokens"_a, "width"_a, "eps"_a, "offset"_a, "threads"_a);
  m.def("layer_norm", &layer_norm, unlocked, named, "dtype"_a, "x"_a, "weight"_a, "bias"_a,
        "residual"_a, "out"_a, "tokens"_a, "width"_a, "eps"_a, "threads"_a);
  m.def("rope", &rope, unlocked, named, "dtype"_a, "x"_a, "stride"_a, "positions"_a, "cos_sin"_a,
        "max_positions"_a, "tokens"_a, "heads"_a, "dim"_a, "rotary"_a, "interleaved"_a,
        "threads"_a);
  m.def("activation", &activation, unlocked, named, "dtype"_a, "function"_a, "gated"_a, "x"_a,
        "out"_a, "tokens"_a, "width"_a, "threads"_a);
  m.def("copy_blocks", &copy_blocks, unlocked, named, "cache"_a, "planes"_a, "blocks"_a,
        "block_bytes"_a, "pairs"_a, "num_pairs"_a);
  m.def("isas", &octavo::isas, "Instruction sets of this host, best first.");
  m.def("isa", &octavo::isa, "The instruction set in use.");
  m.def("use_isa", &octavo::use_isa, "Switch the instruction set (tests, measurements).", "name"_a);
}
