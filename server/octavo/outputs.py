"""What `LLM.generate` returns; attribute names are vLLM's, so that scripts read them unchanged."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CompletionOutput:
    """One continuation. `token_ids` end with the EOS or stop token id that ended it, if one did.

    `stop_reason` is the stop string or the asked-for stop token id, None after EOS or at the length
    limit. Where `finish_reason` is "error", `text` and `token_ids` are what there was before, and
    `stop_reason` says what happened.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class Logprob:
    """A candidate token: its log probability, its rank (1 is the most likely), its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class RequestMetrics:
    """When things happened: `arrival_time` in Unix seconds, the `_ts` in monotonic ones.

    A time is 0 when its event did not happen.
    """

    arrival_time: float
    queued_ts: float
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    num_generation_tokens: int = 0

    @property
    def first_token_latency(self) -> float:
        """Seconds from arrival to the first token."""
        return max(0.0, self.first_token_ts - self.queued_ts)


@dataclass(slots=True)
class RequestOutput:
    """A prompt with all its continuations."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    metrics: RequestMetrics | None = None
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0


@dataclass(slots=True)
class BeamSearchSequence:
    """A hypothesis. `tokens` begin with the prompt; `cum_logprob` is what it was ranked by."""

    tokens: list[int]
    text: str
    cum_logprob: float
    finish_reason: str | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """What a beam search found for one prompt, best first."""

    sequences: list[BeamSearchSequence]
