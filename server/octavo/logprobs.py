"""Log-probabilities as they travel from the sampler to the client: only when asked for."""

from __future__ import annotations

import msgspec


# Without the collector's care: beams make one for each token, and it can be part of no cycle.
class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Of one token: its log-probability before any parameter acted, and the most probable tokens.

    `rank` counts from 1, the most probable. `top_ids` and `top_logprobs` are parallel, largest
    first, as many as were asked for; the token itself is among them only if it belongs there.
    """

    token_id: int
    logprob: float
    rank: int
    top_ids: list[int] = []
    top_logprobs: list[float] = []
