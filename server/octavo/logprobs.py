"""Log-probabilities as they travel from the sampler to the client: only when asked for."""

from __future__ import annotations

import msgspec


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of one token: its log-probability before any parameter acted, and the most probable tokens.

    `rank` counts from 1, the most probable. `top_ids` and `top_logprobs` are parallel, largest
    first, as many as were asked for; the token itself is among them only if it belongs there.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int] = []
    top_logprobs: list[float] = []
