#include "cuda/persistent_layers.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

template <typename T>
const T* at(Address address) {
  return reinterpret_cast<const T*>(address);
}

LayerStack stack_of(int dtype, Address layers, int64_t num_layers, int64_t hidden, int64_t inner,
                    int64_t heads, int64_t kv_heads, int64_t dim, int function, float norm_eps,
                    float norm_offset, float scale, Address cos_sin, int64_t max_positions,
                    int64_t num_blocks, int64_t block_size, int64_t vocab, Address embedding,
                    Address final_norm, Address head) {
  LayerStack stack{};
  stack.dtype = DType(dtype);
  stack.layers = at<DecoderLayer>(layers);
  stack.num_layers = num_layers;
  stack.hidden = hidden;
  stack.inner = inner;
  stack.heads = heads;
  stack.kv_heads = kv_heads;
  stack.dim = dim;
  stack.function = Function(function);
  stack.norm_eps = norm_eps;
  stack.norm_offset = norm_offset;
  stack.scale = scale;
  stack.cos_sin = at<float>(cos_sin);
  stack.max_positions = max_positions;
  stack.num_blocks = num_blocks;
  stack.block_size = block_size;
  stack.vocab = vocab;
  stack.embedding = at<void>(embedding);
  stack.final_norm = at<void>(final_norm);
  stack.head = at<void>(head);
  stack.engine_tokens = -1;
  return stack;
}

void decode(const LayerStack& stack, Address residual, Address tokens, Address logits,
            int64_t rows, Address positions, Address slots, Address seq_lens,
            Address block_tables, int64_t max_blocks, Address workspace, Address stream) {
  DecodeRows step{};
  step.residual = reinterpret_cast<void*>(residual);
  step.tokens = at<int64_t>(tokens);
  step.logits = reinterpret_cast<void*>(logits);
  step.rows = rows;
  step.positions = at<int64_t>(positions);
  step.slots = at<int64_t>(slots);
  step.seq_lens = at<int32_t>(seq_lens);
  step.block_tables = at<int32_t>(block_tables);
  step.max_blocks = max_blocks;
  persistent_layers(stack, step, reinterpret_cast<void*>(workspace),
                    reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_persistent(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  py::class_<LayerStack>(m, "LayerStack")
      .def(py::init(&stack_of), named, "dtype"_a, "layers"_a, "num_layers"_a, "hidden"_a,
           "inner"_a, "heads"_a, "kv_heads"_a, "dim"_a, "function"_a, "norm_eps"_a,
           "norm_offset"_a, "scale"_a, "cos_sin"_a, "max_positions"_a, "num_blocks"_a,
           "block_size"_a, "vocab"_a, "embedding"_a, "final_norm"_a, "head"_a)
      .def_readwrite("ahead", &LayerStack::ahead)
      .def_readwrite("engine_tokens", &LayerStack::engine_tokens)
      .def("rows", &persistent_rows)
      .def("workspace_bytes", &persistent_workspace)
      .def("decode", &decode, named, "residual"_a, "tokens"_a, "logits"_a, "rows"_a,
           "positions"_a, "slots"_a, "seq_lens"_a, "block_tables"_a, "max_blocks"_a,
           "workspace"_a, "stream"_a);
}

}  // namespace octavo::cuda
