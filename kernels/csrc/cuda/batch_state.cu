// A few words a sequence: what counts here is the number of launches, not their speed.
#include "cuda/batch_state.h"

#include "cuda/launch.h"

namespace octavo::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kRecordThreads = 512;

__global__ void __launch_bounds__(kThreads)
    apply_updates_kernel(int32_t* words, const int32_t* message) {
  wait_for_previous();
  const int32_t* stretch = message + 1 + 3 * blockIdx.x;
  const int to = stretch[0], length = stretch[1], begin = stretch[2];
  for (int i = threadIdx.x; i < length; i += kThreads) words[to + i] = message[begin + i];
  allow_next();
}

// The parameters of a draw; what does not draw costs the sampler least as the largest logit.
__device__ void write_draw(const StepBuffers& out, int at, const int32_t* record, bool samples) {
  out.temperature[at] = samples ? __int_as_float(record[kTemperature]) : 0.0f;
  out.top_k[at] = samples ? record[kTopK] : -1;
  out.top_p[at] = samples ? __int_as_float(record[kTopP]) : 1.0f;
  out.min_p[at] = samples ? __int_as_float(record[kMinP]) : 0.0f;
  const uint64_t low = uint32_t(record[kStream]), high = uint32_t(record[kStream + 1]);
  out.stream[at] = samples ? int64_t(high << 32 | low) : 0;
  out.count[at] = samples ? record[kGenerated] : 0;
  out.adjusted[at] = samples ? record[kAdjusted] : -1;
}

__device__ void pad(const BatchState& state, const StepBuffers& out, int at, int begin, int end) {
  for (int t = begin + threadIdx.x; t < end; t += kThreads) {
    out.token_ids[t] = 0;
    out.positions[t] = 0;
    for (int g = 0; g < state.groups; ++g) out.slots[int64_t(g) * out.max_tokens + t] = -1;
  }
  if (threadIdx.x == 0) {
    out.seq_lens[at] = 0;
    write_draw(out, at, nullptr, false);
  }
}

// One block a sequence.
__global__ void __launch_bounds__(kThreads)
    build_inputs_kernel(const BatchState state, const StepBuffers out) {
  wait_for_previous();
  allow_next();
  const int at = blockIdx.x;
  const bool one_token = state.token_at == nullptr;
  const int begin = one_token ? at : state.query_start[at];
  const int end = one_token ? at + 1 : state.query_start[at + 1];
  const int row = state.batch[at];
  if (row < 0) return pad(state, out, at, begin, end);

  int32_t* record = state.records + int64_t(row) * kRecordWords;
  const int32_t* table = state.tables + int64_t(row) * state.table_width;
  const int token = record[kToken], start = record[kPosition], flags = record[kFlags];
  const int first = one_token ? -1 : state.token_at[at];
  const int length = start + end - begin;
  for (int t = begin + threadIdx.x; t < end; t += kThreads) {
    int value = first < 0 ? token : state.chunk[first + t - begin];
    if (value < 0) value = token;  // on its way when the host sent the others
    out.token_ids[t] = value < 0 ? 0 : value;  // nothing was drawn: the sequence is over
    const int position = start + t - begin;
    out.positions[t] = position;
    for (int g = 0; g < state.groups; ++g) {
      const int block = table[position / state.block_size * state.groups + g];
      const bool stored = (flags & kWrites) && block >= 0;
      out.slots[int64_t(g) * out.max_tokens + t] =
          stored ? int64_t(block) * state.block_size + position % state.block_size : -1;
    }
  }
  const int width = state.table_width / state.groups;
  const int entries = (length + state.block_size - 1) / state.block_size * state.groups;
  for (int i = threadIdx.x; i < entries; i += kThreads) {
    const int64_t group = i % state.groups;
    out.block_tables[(group * out.rows + at) * width + i / state.groups] = table[i];
  }
  __syncthreads();  // all have read the record
  if (threadIdx.x == 0) {
    out.seq_lens[at] = length;
    write_draw(out, at, record, flags & kSamples);
    record[kPosition] = length;
    record[kGenerated] += flags & kSamples;
    record[kFlags] = flags | kWrites;
  }
}

// One block: the counter is read by all before it is written.
__global__ void __launch_bounds__(kRecordThreads)
    record_tokens_kernel(int32_t* records, const int32_t* batch, const int32_t* tokens,
                         int sequences, int32_t* drawn, int rows, int32_t* counter) {
  wait_for_previous();
  int32_t* out = drawn + int64_t(*counter & 1) * rows;
  for (int i = threadIdx.x; i < sequences; i += kRecordThreads) {
    const int token = tokens[i], row = batch[i];
    out[i] = token;
    if (row < 0) continue;
    int32_t* record = records + int64_t(row) * kRecordWords;
    if (record[kFlags] & kSamples) record[kToken] = token;
  }
  __syncthreads();
  if (threadIdx.x == 0) *counter += 1;
  allow_next();
}

}  // namespace

void apply_updates(int32_t* words, const int32_t* message, int stretches, cudaStream_t stream) {
  launch(apply_updates_kernel, dim3(stretches), dim3(kThreads), 0, stream, words, message);
}

void build_inputs(const BatchState& state, const StepBuffers& out, int sequences,
                  cudaStream_t stream) {
  launch(build_inputs_kernel, dim3(sequences), dim3(kThreads), 0, stream, state, out);
}

void record_tokens(int32_t* records, const int32_t* batch, const int32_t* tokens, int sequences,
                   int32_t* drawn, int rows, int32_t* counter, cudaStream_t stream) {
  launch(record_tokens_kernel, dim3(1), dim3(kRecordThreads), 0, stream, records, batch, tokens,
         sequences, drawn, rows, counter);
}

}  // namespace octavo::cuda
