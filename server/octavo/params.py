"""What a client may ask of one request; validated once, at the door."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import msgspec

MAX_N = 128
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100
MAX_ALLOWED_TOKEN_IDS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 256


class ParameterError(ValueError):
    """A request parameter out of range: `param` names the field, the text the allowed range."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request is sampled and where it ends.

    `n` samples of the same prompt are asked for; of `best_of` that are drawn, the most probable.
    With `use_beam_search`, `best_of` is the width of the beam: a hypothesis is scored by its
    log-probability divided by its length to the power of `length_penalty`; `early_stopping` True
    ends the search when as many are finished, False when no better one is likely, "never" when
    none is possible.
    `temperature` 0 means greedy. `top_k` -1 means the whole vocabulary, as do `top_p` 1, `min_p` 0
    and `typical_p` 1. `max_tokens` None means up to the model's context. `presence_penalty` and
    `frequency_penalty` look at the output, `repetition_penalty` at prompt and output. `logprobs`
    and `prompt_logprobs` ask for the log-probabilities of each token and of that many of the most
    probable ones. `stop` and `bad_words` are texts, which only the tokenizer's side understands:
    stop strings are matched there, and `bad_words_ids` is what it makes of the bad words.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        # Scripts give lists, and a lone text as `stop`.
        for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids"):
            value = getattr(self, name)
            if isinstance(value, str):
                msgspec.structs.force_setattr(self, name, (value,))
            elif isinstance(value, list):
                msgspec.structs.force_setattr(self, name, tuple(value))
            elif value is None and name != "allowed_token_ids":
                msgspec.structs.force_setattr(self, name, ())

    def validate(self, vocab_size: int) -> None:
        """Raise `ParameterError` naming the first field that is out of range."""
        for check in _CHECKS:
            check(self)
        _check_ids(self, vocab_size)

    @property
    def branches(self) -> int:
        """Samples that are drawn."""
        return self.n if self.best_of is None else self.best_of

    @property
    def num_outputs(self) -> int:
        """Samples that the engine gives out, each with an end of its own."""
        return self.n if self.use_beam_search else self.branches

    @property
    def needs_history(self) -> bool:
        """True when the tokens so far change what is drawn, beyond being the context."""
        return bool(
            self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.bad_words_ids
        )


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    inside = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low < value if open_low else low <= value)
        and value <= high
    )
    if not inside:
        left = "(" if open_low else "["
        raise ParameterError(
            name, f"{name} must be a number in {left}{low}, {high}], got {_shown(value)}"
        )


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    if type(value) is int and low <= value and (high is None or value <= high):
        return
    allowed = f"at least {low}" if high is None else f"in {low}..{high}"
    raise ParameterError(name, f"{name} must be a whole number {allowed}, got {_shown(value)}")


def _shown(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "…"


def _check_numbers(p: SamplingParams) -> None:
    _number("temperature", p.temperature, 0, 2)
    _number("top_p", p.top_p, 0, 1, open_low=True)
    _number("min_p", p.min_p, 0, 1)
    _number("typical_p", p.typical_p, 0, 1, open_low=True)
    _number("presence_penalty", p.presence_penalty, -2, 2)
    _number("frequency_penalty", p.frequency_penalty, -2, 2)
    _number("repetition_penalty", p.repetition_penalty, 0, 2, open_low=True)


def _check_branches(p: SamplingParams) -> None:
    _whole("n", p.n, 1, MAX_N)
    if p.best_of is not None:
        _whole("best_of", p.best_of, p.n, MAX_N)


# What changes probabilities or draws from them has no place in a search for the most probable.
_NOT_WITH_BEAMS = (
    "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "bad_words_ids",
    "min_tokens", "seed", "logprobs", "prompt_logprobs",
)  # fmt: skip


def _check_beams(p: SamplingParams) -> None:
    _number("length_penalty", p.length_penalty, -10, 10)
    if p.early_stopping not in (True, False, "never"):
        raise ParameterError(
            "early_stopping",
            f'early_stopping must be true, false or "never", got {_shown(p.early_stopping)}',
        )
    if not p.use_beam_search:
        return
    if p.temperature != 0:
        raise ParameterError("temperature", "temperature must be 0 with use_beam_search")
    plain = SamplingParams()
    for name in _NOT_WITH_BEAMS:
        if getattr(p, name) != getattr(plain, name):
            raise ParameterError(name, f"{name} cannot be combined with use_beam_search")


def _check_top_k(p: SamplingParams) -> None:
    if type(p.top_k) is not int or (p.top_k != -1 and p.top_k < 1):
        raise ParameterError(
            "top_k", f"top_k must be -1 (off) or at least 1, got {_shown(p.top_k)}"
        )


def _check_lengths(p: SamplingParams) -> None:
    if p.max_tokens is not None:
        _whole("max_tokens", p.max_tokens, 1)
    _whole("min_tokens", p.min_tokens, 0)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise ParameterError(
            "min_tokens", f"min_tokens ({p.min_tokens}) is above max_tokens ({p.max_tokens})"
        )


def _check_logprobs(p: SamplingParams) -> None:
    for name, value in (("logprobs", p.logprobs), ("prompt_logprobs", p.prompt_logprobs)):
        if value is not None:
            _whole(name, value, 0, MAX_LOGPROBS)


def _check_seed(p: SamplingParams) -> None:
    if p.seed is not None and (type(p.seed) is not int or not -(2**63) <= p.seed < 2**63):
        raise ParameterError("seed", "seed must be a whole number that fits in 64 bits")


def _check_texts(p: SamplingParams) -> None:
    for name, texts, most, longest in (
        ("stop", p.stop, MAX_STOP_STRINGS, MAX_STOP_CHARS),
        ("bad_words", p.bad_words, MAX_BAD_WORDS, MAX_BAD_WORD_CHARS),
    ):
        if len(texts) > most:
            raise ParameterError(name, f"{name} must hold at most {most} texts, got {len(texts)}")
        for text in texts:
            if not isinstance(text, str) or not 1 <= len(text) <= longest:
                raise ParameterError(name, f"{name}: a text must have 1..{longest} characters")


def _check_bias(p: SamplingParams) -> None:
    bias = p.logit_bias or {}
    if len(bias) > MAX_LOGIT_BIAS:
        raise ParameterError(
            "logit_bias", f"logit_bias must hold at most {MAX_LOGIT_BIAS} entries, got {len(bias)}"
        )
    for value in bias.values():
        _number("logit_bias", value, -MAX_BIAS, MAX_BIAS)


def _check_ids(p: SamplingParams, vocab_size: int) -> None:
    _check_count("stop_token_ids", p.stop_token_ids, MAX_STOP_TOKEN_IDS)
    _in_vocabulary("stop_token_ids", p.stop_token_ids, vocab_size)
    _in_vocabulary("logit_bias", p.logit_bias or (), vocab_size)
    _in_vocabulary("bad_words", (i for ids in p.bad_words_ids for i in ids), vocab_size)
    if p.allowed_token_ids is None:
        return
    if not p.allowed_token_ids:
        raise ParameterError("allowed_token_ids", "allowed_token_ids is empty: no token is allowed")
    _check_count("allowed_token_ids", p.allowed_token_ids, MAX_ALLOWED_TOKEN_IDS)
    _in_vocabulary("allowed_token_ids", p.allowed_token_ids, vocab_size)


def _check_count(name: str, ids: Sequence[int], most: int) -> None:
    if len(ids) > most:
        raise ParameterError(name, f"{name} must hold at most {most} token ids, got {len(ids)}")


def _in_vocabulary(name: str, ids: Iterable[int], vocab_size: int) -> None:
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ParameterError(
                name, f"{name} holds {_shown(token_id)}; valid ids are 0..{vocab_size - 1}"
            )


_CHECKS = (
    _check_numbers,
    _check_branches,
    _check_beams,
    _check_top_k,
    _check_lengths,
    _check_logprobs,
    _check_seed,
    _check_texts,
    _check_bias,
)
