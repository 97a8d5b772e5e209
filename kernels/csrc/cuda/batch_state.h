// The state of the batch on the device; octavo_kernels/batch_state.py says what each array is.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

// A record's words; octavo_kernels/record.py has the same numbers.
enum RecordWord : int {
  kToken = 0,
  kPosition = 1,
  kGenerated = 2,
  kFlags = 3,
  kStream = 4,
  kTemperature = 6,
  kTopK = 7,
  kTopP = 8,
  kMinP = 9,
  kAdjusted = 10,
  kRecordWords = 16,
};
constexpr int kSamples = 1;
constexpr int kWrites = 2;

struct BatchState {
  int32_t* records;            // [rows, kRecordWords]
  const int32_t* tables;       // [rows, table_width], a row of `groups` entries for each block
  const int32_t* batch;        // [rows]
  const int32_t* token_at;     // [rows], or null: one token each, that of the record
  const int32_t* query_start;  // [rows + 1]; not read where token_at is null
  const int32_t* chunk;        // tokens that the host sent
  int table_width;
  int groups;
  int block_size;
};

struct StepBuffers {
  int64_t* token_ids;     // [max_tokens]
  int64_t* positions;     // [max_tokens]
  int64_t* slots;         // [groups, max_tokens]
  int32_t* seq_lens;      // [rows]
  int32_t* block_tables;  // [groups, rows, table_width / groups]
  float* temperature;     // [rows], as are the rest
  int32_t* top_k;
  float* top_p;
  float* min_p;
  int64_t* stream;
  int64_t* count;
  int32_t* adjusted;
  int max_tokens;
  int rows;
};

// Copies each stretch of the message to its place. `stretches` is the message's first word, which
// the host knows.
void apply_updates(int32_t* words, const int32_t* message, int stretches, cudaStream_t stream);

// Makes the step's inputs of the batch's first `sequences` entries and moves their rows on.
void build_inputs(const BatchState& state, const StepBuffers& out, int sequences,
                  cudaStream_t stream);

// Puts `tokens` into the records of those that sample and into row (counter % 2) of `drawn`
// [2, rows]; then the counter is one more.
void record_tokens(int32_t* records, const int32_t* batch, const int32_t* tokens, int sequences,
                   int32_t* drawn, int rows, int32_t* counter, cudaStream_t stream);

}  // namespace octavo::cuda
