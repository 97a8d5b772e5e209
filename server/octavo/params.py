"""What a client may ask of one request; validated once, at the door."""

from __future__ import annotations

import math

import msgspec

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128


class ParameterError(ValueError):
    """A request parameter out of range: `param` names the field, the text the allowed range."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request is sampled and where it ends.

    `temperature` 0 means greedy. `top_k` -1 means the whole vocabulary. `max_tokens` None means
    up to the model's context. `stop` strings are matched in the API process, on text; the engine
    sees only token ids.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def validate(self, vocab_size: int) -> None:
        """Raise `ParameterError` naming the first field that is out of range."""
        for check in _CHECKS:
            check(self)
        for token_id in self.stop_token_ids:
            if not 0 <= token_id < vocab_size:
                raise ParameterError(
                    "stop_token_ids",
                    f"stop_token_ids holds {token_id}; valid ids are 0..{vocab_size - 1}",
                )


def _number(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    inside = math.isfinite(value) and (low < value if open_low else low <= value) and value <= high
    if not inside:
        left = "(" if open_low else "["
        raise ParameterError(name, f"{name} must be in {left}{low}, {high}], got {value}")


def _check_numbers(p: SamplingParams) -> None:
    _number("temperature", p.temperature, 0, 2)
    _number("top_p", p.top_p, 0, 1, open_low=True)


def _check_top_k(p: SamplingParams) -> None:
    if p.top_k != -1 and p.top_k < 1:
        raise ParameterError("top_k", f"top_k must be -1 (off) or at least 1, got {p.top_k}")


def _check_lengths(p: SamplingParams) -> None:
    if p.max_tokens is not None and p.max_tokens < 1:
        raise ParameterError("max_tokens", f"max_tokens must be at least 1, got {p.max_tokens}")
    if p.min_tokens < 0:
        raise ParameterError("min_tokens", f"min_tokens must be at least 0, got {p.min_tokens}")
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise ParameterError(
            "min_tokens", f"min_tokens ({p.min_tokens}) is above max_tokens ({p.max_tokens})"
        )


def _check_seed(p: SamplingParams) -> None:
    if p.seed is not None and not -(2**63) <= p.seed < 2**63:
        raise ParameterError("seed", "seed must fit in 64 bits")


def _check_stop(p: SamplingParams) -> None:
    if len(p.stop) > MAX_STOP_STRINGS:
        raise ParameterError("stop", f"at most {MAX_STOP_STRINGS} stop strings, got {len(p.stop)}")
    for text in p.stop:
        if not text or len(text) > MAX_STOP_CHARS:
            raise ParameterError("stop", f"a stop string has 1..{MAX_STOP_CHARS} characters")
    if len(p.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise ParameterError("stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} stop token ids")


_CHECKS = (_check_numbers, _check_top_k, _check_lengths, _check_seed, _check_stop)
