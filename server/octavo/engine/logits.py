"""What a request's parameters do to one row of logits before and when a token is drawn from it.

`adjust` changes logits (forbids, biases, penalises); `candidates` narrows the distribution down to
the tokens that may be drawn. Both look at one row alone, so that batch mates cannot matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from octavo.params import SamplingParams

_FORBIDDEN = float("-inf")
_SHORTLIST = 1024


@dataclass(slots=True, frozen=True)
class Draw:
    """One row's sampling: its parameters, its key, and the tokens that came before.

    `history` is the prompt and what was drawn after it, and may already hold more: only the first
    `num_prompt_tokens + num_generated` count. It is read only if `params.needs_history`.
    """

    params: SamplingParams
    key: int
    num_generated: int
    history: Sequence[int] = ()
    num_prompt_tokens: int = 0

    @property
    def output(self) -> Sequence[int]:
        """The tokens drawn before this one."""
        start = self.num_prompt_tokens
        return self.history[start : start + self.num_generated]


def changes(draw: Draw) -> bool:
    """True when `adjust` would do something."""
    p = draw.params
    return bool(
        draw.num_generated < p.min_tokens
        or p.logit_bias
        or p.allowed_token_ids is not None
        or p.needs_history
    )


def adjust(row: torch.Tensor, draw: Draw, eos_token_ids: Sequence[int]) -> torch.Tensor:
    """The row with everything applied that comes before temperature; `row` stays as it is."""
    row = row.clone()
    _penalize(row, draw)
    _bias(row, draw.params)
    _forbid(row, draw, eos_token_ids)
    return row


def narrows(params: SamplingParams, vocab_size: int) -> bool:
    """True when `candidates` may leave tokens out."""
    return (
        params.min_p > 0
        or 0 < params.top_k < vocab_size
        or params.top_p < 1
        or params.typical_p < 1
    )


def scale(row: torch.Tensor, temperature: float) -> torch.Tensor:
    """The row in float64, its largest 0, divided by the temperature."""
    return (row.double() - row.max().double()) / temperature


def candidates(row: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled logits (float64, largest 0) and ids of the tokens that may be drawn.

    In the order temperature, min_p, top_k, top_p, typical_p; each sees what the one before left.
    At least one token stays. Of equals the lower ids stay.
    """
    scaled = scale(row, params.temperature)
    ids = torch.arange(scaled.shape[0], device=scaled.device)
    if params.min_p > 0:
        # Probability at least min_p times the largest, which has the scaled logit 0.
        scaled, ids = _keep(scaled, ids, scaled >= torch.tensor(params.min_p).double().log())
    if 0 < params.top_k < scaled.shape[0]:
        scaled, ids = largest(scaled, ids, params.top_k)
    if params.top_p < 1.0:
        scaled, ids = _top_p(scaled, ids, params.top_p)
    if params.typical_p < 1.0:
        scaled, ids = _typical(scaled, ids, params.typical_p)
    return scaled, ids


def _penalize(row: torch.Tensor, draw: Draw) -> None:
    p = draw.params
    if p.repetition_penalty != 1:
        seen = draw.history[: draw.num_prompt_tokens + draw.num_generated]
        ids, _ = _counted(seen, row.device)
        known = row[ids]
        row[ids] = torch.where(
            known > 0, known / p.repetition_penalty, known * p.repetition_penalty
        )
    if (p.presence_penalty or p.frequency_penalty) and draw.num_generated:
        ids, counts = _counted(draw.output, row.device)
        row[ids] -= p.frequency_penalty * counts + p.presence_penalty


def _counted(tokens: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token once, and how often it occurs."""
    ids, counts = np.unique(np.fromiter(tokens, np.int64, len(tokens)), return_counts=True)
    return (
        torch.from_numpy(ids).to(device),
        torch.from_numpy(counts.astype(np.float32)).to(device),
    )


def _bias(row: torch.Tensor, params: SamplingParams) -> None:
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias), device=row.device)
        row[ids] += torch.tensor(list(params.logit_bias.values()), device=row.device)


def _forbid(row: torch.Tensor, draw: Draw, eos_token_ids: Sequence[int]) -> None:
    p = draw.params
    if p.allowed_token_ids is not None:
        allowed = torch.tensor(p.allowed_token_ids, device=row.device)
        kept = row[allowed]
        row.fill_(_FORBIDDEN)
        row[allowed] = kept
    forbidden = [ids[-1] for ids in p.bad_words_ids if _ends_with(draw.output, ids[:-1])]
    if draw.num_generated < p.min_tokens:
        forbidden += p.stop_token_ids
        if not p.ignore_eos:
            forbidden += eos_token_ids
    if forbidden:
        row[forbidden] = _FORBIDDEN


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(end) <= len(tokens) and tuple(tokens[len(tokens) - len(end) :]) == tuple(end)


def _keep(
    values: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return values[kept], ids[kept]


def largest(values: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest values with their ids, largest first, of equals the lower id first."""
    # The k-th value by topk, which is quick; the sort, for the order of equals, sees few.
    if k < len(ids):
        smallest = torch.topk(values, k).values[-1]
        values, ids = _keep(values, ids, values >= smallest)
    order = torch.sort(values, descending=True, stable=True).indices[:k]
    return values[order], ids[order]


def _top_p(scaled: torch.Tensor, ids: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.logsumexp(scaled, dim=-1)
    # Sorting a whole vocabulary is slow, and mostly the most probable few reach p.
    for count in (min(_SHORTLIST, len(ids)), len(ids)):
        top, top_ids = largest(scaled, ids, count)
        probability = (top - total).exp()
        # A token stays when those before it do not reach p; so the first always stays.
        kept = max(1, int((probability.cumsum(-1) - probability < p).sum()))
        if kept < count or count == len(ids):
            break
    return top[:kept], top_ids[:kept]


def _typical(
    scaled: torch.Tensor, ids: torch.Tensor, mass: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those whose surprise is nearest to the expected one, until they reach the mass."""
    logprobs = torch.log_softmax(scaled, dim=-1)
    probability = logprobs.exp()
    entropy = -(logprobs * probability).nansum()  # 0 · -inf is 0 here
    order = torch.sort((-logprobs - entropy).abs(), stable=True).indices
    before = probability[order].cumsum(-1) - probability[order]
    kept = order[: max(1, int((before < mass).sum()))]
    return scaled[kept], ids[kept]
