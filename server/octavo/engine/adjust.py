"""What a request's parameters have the device do to its logits before it draws from them."""

from __future__ import annotations

from collections.abc import Sequence

from octavo.core.step import ScheduledSequence
from octavo.params import MAX_ALLOWED_TOKEN_IDS, MAX_BAD_WORDS, MAX_LOGIT_BIAS, SamplingParams
from octavo_kernels.sampling import Adjustments, restart_adjustment

# Entries of a sequence's list: biases, bad words of one token, and what `min_tokens` puts off.
MAX_LISTED = MAX_LOGIT_BIAS + MAX_BAD_WORDS + MAX_ALLOWED_TOKEN_IDS
_FORBIDDEN = float("-inf")
_ALWAYS = 1 << 62


def adjusts(params: SamplingParams) -> bool:
    """True when there is something to do."""
    return bool(
        params.needs_history
        or params.logit_bias
        or params.min_tokens
        or params.allowed_token_ids is not None
    )


def listed(params: SamplingParams, eos_token_ids: Sequence[int]) -> list[tuple[int, float, int]]:
    """(token id, bias, until): the bias is added while fewer than `until` tokens are drawn."""
    found = [(ids[0], _FORBIDDEN, _ALWAYS) for ids in params.bad_words_ids if len(ids) == 1]
    if params.min_tokens:
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
        found += [(token_id, _FORBIDDEN, params.min_tokens) for token_id in ends]
    found += [(token_id, bias, _ALWAYS) for token_id, bias in (params.logit_bias or {}).items()]
    return found


def begin(
    adjustments: Adjustments, row: int, share: ScheduledSequence, eos_token_ids: Sequence[int]
) -> None:
    """Give a row of the adjustments to a sequence; the device counts what it draws from here on."""
    params, prompt = share.params, share.num_prompt_tokens
    restart_adjustment(
        adjustments,
        row,
        prompt=share.tokens[:prompt],
        drawn=share.tokens[prompt : prompt + share.num_generated],
        allowed=params.allowed_token_ids,
        listed=listed(params, eos_token_ids),
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
    )
