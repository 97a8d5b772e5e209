"""Messages between the API process and the engine process: msgpack over a ZeroMQ unix socket.

The API process binds two sockets in a private folder, PUSH `requests.sock` and PULL `events.sock`;
the engine connects to both. Nothing here is ever pickled.
"""

from __future__ import annotations

import msgspec

from octavo.logprobs import TokenLogprobs
from octavo.params import SamplingParams


class AddRequest(msgspec.Struct, tag="add", frozen=True):
    """API → engine: a validated request. `request_id` is unique for the life of the API process.

    Equal prompts share cached blocks only where their `cache_salt` is equal.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""


class AbortRequest(msgspec.Struct, tag="abort", frozen=True):
    """API → engine: stop a request, or one sample of it, and free its blocks.

    What is unknown is ignored.
    """

    request_id: str
    index: int | None = None


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """API → engine: end the process once the current step is done."""


# Without the collector's care: one is made for each token, and it can be part of no cycle.
class TokenOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one sample of a request: of the one numbered `index`, from 0.

    A beam search gives each hypothesis whole, best first, with its `score`.

    `finish_reason` (stop | length | abort | error) comes once for each sample, last.
    `stop_token_id` is the id that ended it when that was an EOS or a stop token id (it is not part
    of `token_ids`). `error` is set when `finish_reason` is error. `logprobs` is parallel to
    `token_ids`, and None unless asked for; `prompt_logprobs` comes once, with the first token, and
    holds the prompt's tokens from the second on. With a `stop_token_id`, `logprobs` has its entry
    too, last. `refused` says that an error is the request's own fault.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    index: int = 0
    score: float | None = None
    refused: bool = False


class Outputs(msgspec.Struct, tag="out", frozen=True):
    """Engine → API: what one step produced."""

    outputs: list[TokenOutput]


class Progress(msgspec.Struct, tag="progress", frozen=True):
    """Engine → API while starting. `phase`: import | fetch | check | weights | device |
    cache | warmup; device is a GPU's alone.
    """

    phase: str
    ratio: float
    eta_s: float | None = None


class Located(msgspec.Struct, tag="located", frozen=True):
    """Engine → API: the folder where a hub's model now lies, for the tokenizer."""

    folder: str


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """Engine → API: a real token came out. What the API needs to validate requests."""

    max_model_len: int
    vocab_size: int
    block_size: int
    num_kv_blocks: int
    max_num_seqs: int
    device: str
    dtype: str
    kv_bytes_per_block: int


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """Engine → API: the engine cannot start or cannot go on. See `octavo.errors`."""

    reason: str
    message: str
    retryable: bool


class Blocks(msgspec.Struct, frozen=True):
    """KV blocks by state. `active` includes `shared`; total = active + cached + free."""

    total: int
    active: int
    shared: int
    cached: int
    free: int


class Load(msgspec.Struct, tag="load", frozen=True):
    """Engine → API: the scheduler's state, after a step at most every 50 ms, when idle each second.

    The counters are totals since the engine started. `demand_blocks` maps a horizon ("now", "10s",
    "30s", "60s") to the blocks that running and waiting work will then need. The prefix cache's
    queries and hits are tokens, counted when a sequence first runs. `swapped_out` and `swapped_in`
    count blocks copied to host memory and back; `host_blocks_used` are there now, of `host_blocks`.
    """

    blocks: Blocks
    block_size: int
    kv_utilization: float
    demand_blocks: dict[str, int]
    seconds_to_exhaustion: float | None
    running: int
    waiting: int
    waiting_blocks: int
    prefill_backlog_s: float
    step_budget_used: float
    preemptions: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    last_activity: float
    swapped_out: int = 0
    swapped_in: int = 0
    host_blocks_used: int = 0
    host_blocks: int = 0


ToEngine = AddRequest | AbortRequest | Stop
ToApi = Outputs | Progress | Located | Ready | Failed | Load

encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
to_api_decoder: msgspec.msgpack.Decoder[ToApi] = msgspec.msgpack.Decoder(ToApi)
