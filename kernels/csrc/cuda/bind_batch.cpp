#include "cuda/batch_state.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_batch(py::module_& m) {
  using py::operator""_a;

  m.def(
      "apply_updates",
      [](uintptr_t words, uintptr_t message, int stretches, uintptr_t stream) {
        apply_updates(at<int32_t>(words), at<int32_t>(message), stretches,
                      at<CUstream_st>(stream));
      },
      "words"_a, "message"_a, "stretches"_a, "stream"_a);

  m.def(
      "build_inputs",
      [](uintptr_t records, uintptr_t tables, uintptr_t batch, uintptr_t token_at,
         uintptr_t query_start, uintptr_t chunk, int table_width, int groups, int block_size,
         uintptr_t token_ids, uintptr_t positions, uintptr_t slots, uintptr_t seq_lens,
         uintptr_t block_tables, uintptr_t temperature, uintptr_t top_k, uintptr_t top_p,
         uintptr_t min_p, uintptr_t draw_stream, uintptr_t count, uintptr_t adjusted,
         int max_tokens, int rows, int sequences, uintptr_t stream) {
        const BatchState state{at<int32_t>(records), at<int32_t>(tables), at<int32_t>(batch),
                               at<int32_t>(token_at), at<int32_t>(query_start),
                               at<int32_t>(chunk), table_width, groups, block_size};
        const StepBuffers out{at<int64_t>(token_ids), at<int64_t>(positions), at<int64_t>(slots),
                              at<int32_t>(seq_lens), at<int32_t>(block_tables),
                              at<float>(temperature), at<int32_t>(top_k), at<float>(top_p),
                              at<float>(min_p), at<int64_t>(draw_stream), at<int64_t>(count),
                              at<int32_t>(adjusted), max_tokens, rows};
        build_inputs(state, out, sequences, at<CUstream_st>(stream));
      },
      py::kw_only(), "records"_a, "tables"_a, "batch"_a, "token_at"_a, "query_start"_a,
      "chunk"_a, "table_width"_a, "groups"_a, "block_size"_a, "token_ids"_a, "positions"_a,
      "slots"_a, "seq_lens"_a, "block_tables"_a, "temperature"_a, "top_k"_a, "top_p"_a,
      "min_p"_a, "draw_stream"_a, "count"_a, "adjusted"_a, "max_tokens"_a, "rows"_a, "sequences"_a,
      "stream"_a);

  m.def(
      "record_tokens",
      [](uintptr_t records, uintptr_t batch, uintptr_t tokens, int sequences, uintptr_t drawn,
         int rows, uintptr_t counter, uintptr_t stream) {
        record_tokens(at<int32_t>(records), at<int32_t>(batch), at<int32_t>(tokens), sequences,
                      at<int32_t>(drawn), rows, at<int32_t>(counter), at<CUstream_st>(stream));
      },
      py::kw_only(), "records"_a, "batch"_a, "tokens"_a, "sequences"_a, "drawn"_a, "rows"_a,
      "counter"_a, "stream"_a);
}

}  // namespace octavo::cuda
