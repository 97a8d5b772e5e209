"""What comes in as a request: checked against the limits, and made into a group of sequences."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from octavo.core.beam import BeamSearch
from octavo.core.group import Group
from octavo.core.sequence import Sequence
from octavo.kv_layout import KvGroups
from octavo.params import SamplingParams


class RequestError(ValueError):
    """One request cannot be served as it is; the text is for the one who sent it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the model and the configuration allow. `max_model_len` is prompt and output together.

    `kv_windows` are the windows of the cache's groups of layers (`kv_layout.KvLayout.windows`).
    A step that nobody's next token waits for may have up to `large_step` tokens, None: no more than
    others. `offline` says that only the end of all requests matters, not when each one begins.
    """

    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    enable_prefix_caching: bool = True
    kv_windows: tuple[int | None, ...] = (None,)
    large_step: int | None = None
    offline: bool = False

    @property
    def kv(self) -> KvGroups:
        """The groups of layers and what they keep."""
        return KvGroups(self.block_size, self.kv_windows)

    def longest(self, num_blocks: int, branches: int = 1, prompt: int = 0) -> int:
        """Tokens that each branch of a request can have which has so many blocks to itself.

        Where every group slides there may be no bound; then it is the context at least.
        """
        most = max(self.max_model_len, num_blocks * self.block_size)
        chunk = self.max_num_batched_tokens
        return self.kv.longest(num_blocks, most, branches=branches, prompt=prompt, chunk=chunk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it was sent.

    Requests of one `scope` share the cached blocks of equal prompts, and of no other.
    """

    request_id: str
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    scope: str = ""
    now: float = 0.0


def make_group(request: Request, limits: Limits, num_blocks: int, first_id: int) -> Group:
    """The sequences for a request; `RequestError` or `ParameterError` if it cannot be served.

    Their ids are `first_id` and those after it.
    """
    params, prompt = request.params, request.prompt
    params.validate(limits.vocab_size)
    _check_prompt(prompt, limits, num_blocks)
    _check_width(params.branches, limits)
    eos = frozenset[int]() if params.ignore_eos else limits.eos_token_ids
    max_new_tokens = _max_new_tokens(params, len(prompt), limits, num_blocks)
    stop_ids = eos.union(params.stop_token_ids)
    beam = None
    if params.use_beam_search:
        beam = BeamSearch(
            width=params.branches,
            length_penalty=params.length_penalty,
            early_stopping=params.early_stopping,
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
        )
        candidates = min(beam.num_candidates, limits.vocab_size)
        params = msgspec.structs.replace(params, logprobs=candidates)
    return Group(
        first_id,
        [
            Sequence(
                seq_id=first_id + branch,
                request_id=request.request_id,
                tokens=list(prompt),
                num_prompt_tokens=len(prompt),
                max_new_tokens=max_new_tokens,
                params=params,
                arrival=first_id,
                arrival_time=request.now,
                priority=request.priority,
                scope=request.scope,
                stop_ids=stop_ids,
                branch=branch,
            )
            for branch in range(params.branches)
        ],
        beam,
    )


def _check_prompt(prompt: list[int], limits: Limits, num_blocks: int) -> None:
    if not prompt:
        raise RequestError("the prompt has no tokens")
    capacity = limits.longest(num_blocks)
    most = min(limits.max_model_len, capacity)
    if len(prompt) >= most:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens; at most {most - 1} leave room for "
            f"one of output (context {limits.max_model_len} tokens, KV cache "
            f"{capacity})"
        )
    vocab_size = limits.vocab_size
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        bad = next(token for token in prompt if not 0 <= token < vocab_size)
        raise RequestError(f"token id {bad} in the prompt; valid ids are 0..{vocab_size - 1}")


def _check_width(branches: int, limits: Limits) -> None:
    """All branches run together, each with a token in every step."""
    most = min(limits.max_num_seqs, limits.max_num_batched_tokens)
    if branches > most:
        raise RequestError(
            f"the request asks for {branches} samples at once; at most {most} can run together "
            f"(--max-num-seqs {limits.max_num_seqs}, --max-num-batched-tokens "
            f"{limits.max_num_batched_tokens})"
        )


def _max_new_tokens(params: SamplingParams, prompt: int, limits: Limits, num_blocks: int) -> int:
    """Where each branch ends at the latest; the whole group then fits into the pool alone."""
    room = limits.max_model_len - prompt
    most = limits.longest(num_blocks, params.branches, prompt) - prompt
    asked = room if params.max_tokens is None else min(params.max_tokens, room)
    too_many = params.branches > 1 and params.max_tokens is not None and asked > most
    if most < 1 or too_many:
        raise RequestError(
            f"{params.branches} samples of {asked} tokens after a prompt of {prompt} do not fit "
            f"into the KV cache of {num_blocks} blocks; at most "
            f"{max(0, most)} tokens each would"
        )
    return min(asked, most)
