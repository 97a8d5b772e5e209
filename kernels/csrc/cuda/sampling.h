// Drawing tokens from rows of logits, and what surrounds it: penalties, log-probabilities, ends.
// Meaning: octavo_kernels/reference_sampling.py. Pointers are device addresses, and grids depend
// on sizes alone, so that one captured graph serves whatever the rows ask for.
#pragma once

#include "types.h"

#include <cuda_runtime_api.h>

#include <cstdint>

namespace octavo::cuda {

// A matrix of logits. Row r is logits + r * stride (elements). Every value v stands for
// softcap * tanh(scale * v / softcap), or scale * v where softcap is 0; scale > 0.
struct Logits {
  const void* data;
  DType dtype;
  int rows, vocab;
  int64_t stride;
  float scale, softcap;
};

// What tells of a token in a row of marks.
constexpr uint16_t kInPrompt = 1 << 15;
constexpr uint16_t kListed = 1 << 14;   // the row's list has entries for it
constexpr uint16_t kAllowed = 1 << 13;  // matters in rows that allow nothing else
constexpr uint16_t kCountMask = kAllowed - 1;  // how often it was drawn; stays at the mask

// What changes logits before a draw. A pool of rows, of which a slot may have one. Marks are
// [pool, marks_stride]; the lists are [pool, list_stride], sorted by token id, and an entry adds
// its bias (-infinity forbids) while fewer than `until` tokens were drawn.
struct Adjustments {
  uint16_t* marks;
  int64_t marks_stride;
  const float *repetition, *presence, *frequency;  // [pool]
  const int32_t* allowed_only;                     // [pool], 0 or 1
  const int32_t* list_length;                      // [pool]
  const int32_t* list_ids;
  const float* list_bias;
  const int64_t* list_until;
  int list_stride;
};

// How slot s is sampled, as octavo.params says it. The draw's key is made of stream[s] and
// count[s], the number of tokens drawn before.
struct Sampling {
  const int32_t* slots;  // [rows], -1 is padding: token 0; null: row r has slot r
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const int64_t *stream, *count;
  const int32_t* adjusted;  // the row of the pool, -1 none; null: nobody has one
  Adjustments adjustments;
};

// When slot s ends: `stop_ids` is [slots, kStopIds], -1 where unused.
constexpr int kStopIds = 8;
struct Ends {
  const int32_t* stop_ids;    // null: ends are not looked for
  const int64_t* max_tokens;  // counting what is drawn
  uint8_t* flags;             // [rows], of kStopped...
};
constexpr uint8_t kStopped = 1, kFull = 2, kFailed = 4;

constexpr int32_t kNoToken = -1, kNothingAllowed = -2, kPaddingToken = 0;
constexpr int kMaxVocab = 1 << 19;

// Bytes of workspace that sample() needs. What is in it need not survive, nor be set before.
int64_t sample_workspace(int rows, int vocab);

// One token for each row: tokens [rows]. The token is also counted in the slot's marks.
// `kept`, if not null, says from how many tokens each narrowed row was drawn (tests).
void sample(const Logits& logits, const Sampling& sampling, const Ends& ends, int32_t* tokens,
            int32_t* kept, void* workspace, cudaStream_t stream);

// A row of marks begins anew: `prompt` and `drawn` are what came before, and the ids `allowed` and
// `listed` are marked as such. Ids are in 0..marks_stride-1.
struct Marks {
  uint16_t* row;  // as many as marks_stride, a multiple of 8
  int64_t length;
  const int64_t *prompt, *drawn, *allowed;
  const int32_t* listed;
  int num_prompt, num_drawn, num_allowed, num_listed;
};
void restart_marks(const Marks& marks, cudaStream_t stream);

// Of each row's token and of its `wanted[r]` most probable tokens, of top_stride at most, from
// logits as they are. Rows with wanted -1 or a token below 0 are left as they were. Outputs:
// logprob, rank [rows]; top_ids, top_logprobs [rows, top_stride], largest first, of equals the
// lower id.
constexpr int kMaxTop = 1024;  // of top_stride
struct LogprobsOut {
  float* logprob;
  int32_t* rank;
  int32_t* top_ids;
  float* top_logprobs;
  int top_stride;
};
void token_logprobs(const Logits& logits, const int32_t* tokens, const int32_t* wanted,
                    const LogprobsOut& out, cudaStream_t stream);

}  // namespace octavo::cuda
