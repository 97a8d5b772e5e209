"""What `LLM` is given: keywords checked by name, prompts of every accepted form made alike."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import msgspec

from octavo.config import EngineConfig, default_threads
from octavo.errors import ConfigError
from octavo.params import MAX_LOGPROBS, ParameterError, SamplingParams

T = TypeVar("T")

# vLLM's: without parameters a prompt gets a short answer.
DEFAULT_PARAMS = SamplingParams(max_tokens=16)


class LLMOptions(TypedDict, total=False):
    """The keywords of `LLM`; names and meaning are vLLM's, the last six are ours."""

    tokenizer: str | None
    tokenizer_mode: str
    skip_tokenizer_init: bool
    chat_template: str | None
    trust_remote_code: bool
    tensor_parallel_size: int
    dtype: str
    revision: str | None
    load_format: str
    seed: int
    gpu_memory_utilization: float
    swap_space: float
    enforce_eager: bool
    max_logprobs: int
    hf_overrides: dict[str, Any] | None
    block_size: int
    max_model_len: int | None
    max_num_seqs: int
    max_num_batched_tokens: int | None
    enable_prefix_caching: bool | None
    scheduling_policy: str
    device: str
    num_kv_blocks: int | None
    num_threads: int | None
    source: str
    pipeline_depth: int | None
    deterministic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """What `LLM.beam_search` is asked; `early_stopping` is ours, as transformers has it."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    include_stop_str_in_output: bool = False

    def as_sampling(self) -> SamplingParams:
        """The same, as the engine takes it: a group of `beam_width` whose best are all wanted."""
        if self.temperature:
            raise ValueError(f"a beam search draws nothing; temperature is {self.temperature}")
        return SamplingParams(
            n=self.beam_width,
            best_of=self.beam_width,
            use_beam_search=True,
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            length_penalty=self.length_penalty,
            early_stopping=self.early_stopping,
            include_stop_str_in_output=self.include_stop_str_in_output,
        )


# Keywords that `LLM` itself uses.
_OWN = {"tokenizer", "skip_tokenizer_init", "chat_template", "max_logprobs"}
# Of these the engine has no setting (yet): a value that asks for nothing is fine, others are
# refused by name.
_ACCEPTED: dict[str, tuple[object, ...]] = {
    "tokenizer_mode": ("auto",),
    "tensor_parallel_size": (1,),
    "enable_prefix_caching": (None,),
}


def engine_config(model: str, options: Mapping[str, Any]) -> EngineConfig:
    """The engine's configuration; an unknown keyword is a `TypeError` that names the nearest."""
    known = LLMOptions.__annotations__
    fields = {field.name for field in dataclasses.fields(EngineConfig)}
    values: dict[str, Any] = {"model": str(model), "num_threads": default_threads()}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"LLM() has no keyword {name!r}{hint}")
        if name in fields:
            # None asks for the default everywhere.
            values |= {} if value is None else {name: value}
        elif name not in _OWN and value not in _ACCEPTED[name]:
            accepted = ", ".join(repr(v) for v in _ACCEPTED[name][:3])
            raise ConfigError(f"{name}={value!r} is not supported; supported: {accepted}")
    try:
        encoded = msgspec.json.encode(values).decode()
    except TypeError as error:
        raise ConfigError(f"a keyword of LLM() has a value of the wrong type: {error}") from error
    return EngineConfig.from_json(encoded)


def max_logprobs(options: Mapping[str, Any]) -> int:
    """How many log-probabilities of a token a call may ask for; `MAX_LOGPROBS` at most."""
    value = options.get("max_logprobs", MAX_LOGPROBS)
    if type(value) is not int or not 0 <= value <= MAX_LOGPROBS:
        raise ConfigError(f"max_logprobs must be in 0..{MAX_LOGPROBS}, got {value!r:.40}")
    return value


class PromptError(ValueError):
    """One prompt of a call cannot be served; nothing has run. `index` is its place."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(f"prompts[{index}]: {message}")
        self.index = index


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a text, or token ids."""

    text: str | None
    token_ids: list[int] | None


def as_prompts(prompts: object) -> list[Prompt]:
    """One prompt or many, each a text, a list of ids, or a dict as vLLM takes it."""
    if isinstance(prompts, str | Mapping) or _is_ids(prompts):
        return [_prompt(0, prompts)]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            "prompts must be a text, a list of token ids, a dict with prompt or prompt_token_ids, "
            f"or a list of these, not {type(prompts).__name__}"
        )
    return [_prompt(index, prompt) for index, prompt in enumerate(prompts)]


def _prompt(index: int, prompt: object) -> Prompt:
    if isinstance(prompt, str):
        return Prompt(prompt, None)
    if isinstance(prompt, Mapping):
        return _from_mapping(index, prompt)
    if isinstance(prompt, Sequence) and (not prompt or _is_ids(prompt)):
        return Prompt(None, list(prompt))
    raise PromptError(index, f"not a text, token ids or a dict: {type(prompt).__name__}")


def _from_mapping(index: int, prompt: Mapping[object, object]) -> Prompt:
    surplus = [key for key in prompt if key not in ("prompt", "prompt_token_ids")]
    if surplus:
        raise PromptError(index, f"{surplus[0]!r} is not supported; text and token ids are")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if ids is not None:
        if not (isinstance(ids, Sequence) and (not ids or _is_ids(ids))):
            raise PromptError(index, "prompt_token_ids must be a list of integers")
        return Prompt(text if isinstance(text, str) else None, list(ids))
    if not isinstance(text, str):
        raise PromptError(index, "needs prompt (a text) or prompt_token_ids")
    return Prompt(text, None)


def _is_ids(value: object) -> bool:
    """A list of integers with at least one."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes)
        and len(value) > 0
        and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    )


def one_for_each(name: str, value: T | Sequence[T] | None, count: int, default: T) -> list[T]:
    """A value for each of `count` prompts, from none, one, or exactly as many."""
    if value is None:
        return [default] * count
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{len(value)} {name} for {count} prompts; give one, or one for each")
    return list(value)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the loaded model allows."""

    max_model_len: int
    vocab_size: int
    max_logprobs: int = MAX_LOGPROBS


def check(index: int, ids: Sequence[int], params: SamplingParams, limits: Limits) -> None:
    """Raise `PromptError` for what the engine would refuse."""
    if not ids:
        raise PromptError(index, "the prompt has no tokens")
    if len(ids) >= limits.max_model_len:
        raise PromptError(
            index,
            f"the prompt has {len(ids)} tokens; at most {limits.max_model_len - 1} leave room for "
            "one of output",
        )
    wrong = next((i for i in ids if not 0 <= i < limits.vocab_size), None)
    if wrong is not None:
        raise PromptError(index, f"token id {wrong}; valid ids are 0..{limits.vocab_size - 1}")
    for name, asked in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if asked is not None and asked > limits.max_logprobs:
            raise PromptError(
                index,
                f"{name} is {asked}; this LLM was made with max_logprobs={limits.max_logprobs}",
            )
    try:
        params.validate(limits.vocab_size)
    except ParameterError as error:
        raise PromptError(index, str(error)) from error
