"""Log-probabilities of single tokens, from the model's logits as they are before any parameter.

Row by row: the sum of exponentials, the token's own logit, the largest few. So no second copy of
the logits ever exists, and a value does not depend on the other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from octavo.core.step import ScheduledSequence
from octavo.engine.logits import Draw, largest
from octavo.logprobs import TokenLogprobs

# Rows of logits that exist at once while a prompt's log-probabilities are taken.
PROMPT_ROWS = 64


def token_logprobs(row: torch.Tensor, token_id: int, count: int) -> TokenLogprobs:
    """Of `token_id` and of the `count` most probable tokens; `row` is float32 [vocab]."""
    total = torch.logsumexp(row, dim=0)
    own = row[token_id]
    rank = int((row > own).sum()) + 1
    if not count:
        return TokenLogprobs(token_id, float(own - total), rank)
    ids = torch.arange(row.shape[0], device=row.device)
    top, top_ids = largest(row, ids, min(count, row.shape[0]))
    return TokenLogprobs(
        token_id, float(own - total), rank, top_ids.tolist(), (top - total).tolist()
    )


def drawn_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], draws: Sequence[Draw], seq_ids: Iterable[int]
) -> dict[int, TokenLogprobs]:
    """By sequence id, of the drawn tokens of those that asked and got one."""
    return {
        seq_id: token_logprobs(logits[row], token, draw.params.logprobs)
        for row, (token, draw, seq_id) in enumerate(zip(tokens, draws, seq_ids, strict=True))
        if draw.params.logprobs is not None and token >= 0
    }


def prompt_logprobs(
    shares: Iterable[ScheduledSequence],
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
) -> dict[int, list[TokenLogprobs]]:
    """By sequence id, of each share's `prompt_logprob_rows`, whose outputs `hidden` holds.

    `head` makes logits of them, a few rows at a time.
    """
    found = {}
    taken = 0
    for share in shares:
        rows, count = share.prompt_logprob_rows, share.params.prompt_logprobs
        if not rows or count is None:
            continue
        own = found[share.seq_id] = list[TokenLogprobs]()
        for begin in range(0, len(rows), PROMPT_ROWS):
            logits = head(hidden[taken + begin : taken + min(begin + PROMPT_ROWS, len(rows))])
            at = share.start + begin + 1
            own += [
                token_logprobs(row, share.tokens[at + i], count) for i, row in enumerate(logits)
            ]
        taken += len(rows)
    return found
