"""Logits → tokens. A draw is a function of its row of logits and its key, and of nothing else.

Randomness is counter-based: the noise of token id v in a draw is a hash of (key, v), so neither
batch mates nor the order of steps nor a preemption changes what a request gets. Sampling is by
the Gumbel-max rule: the largest of log-probability + Gumbel noise is a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.params import SamplingParams

NO_TOKEN = -1  # the row's logits held NaN; the caller ends the request with an error

_MASK64 = (1 << 64) - 1
# Below this temperature the division would only amplify rounding; the draw is the maximum.
_GREEDY_BELOW = 1e-5


@dataclass(slots=True, frozen=True)
class Draw:
    """One row's sampling: its parameters, its key, and how many tokens came before it."""

    params: SamplingParams
    key: int
    num_generated: int


def draw_key(params: SamplingParams, engine_seed: int, seq_id: int, num_generated: int) -> int:
    """64 bits that name a draw. A request's own seed makes it repeatable wherever it runs."""
    if params.seed is not None:
        stream = _mix(params.seed & _MASK64)
    else:
        stream = _mix(_mix(engine_seed & _MASK64) ^ (seq_id + 1))
    return _mix(stream ^ (num_generated + 1))


def sample(logits: torch.Tensor, draws: list[Draw], eos_token_ids: tuple[int, ...]) -> list[int]:
    """One token id for each row of float32 `logits` [rows, vocab], which is overwritten."""
    _suppress_stops(logits, draws, eos_token_ids)
    tokens = torch.argmax(logits, dim=-1)
    random = [i for i, draw in enumerate(draws) if draw.params.temperature >= _GREEDY_BELOW]
    for i in random:
        tokens[i] = _draw(logits[i], draws[i])
    tokens[torch.isnan(logits).any(dim=-1)] = NO_TOKEN
    result: list[int] = tokens.tolist()
    return result


def _draw(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """One random draw from one row: temperature, then top-k, then top-p, then Gumbel-max."""
    params = draw.params
    scaled = (logits.double() - logits.max().double()) / params.temperature
    ids = torch.arange(scaled.shape[0], device=scaled.device)
    if 0 < params.top_k < scaled.shape[0] or params.top_p < 1.0:
        scaled, ids = torch.sort(scaled, descending=True, stable=True)
    if 0 < params.top_k < scaled.shape[0]:
        scaled, ids = scaled[: params.top_k], ids[: params.top_k]
    if params.top_p < 1.0:
        probability = torch.softmax(scaled, dim=-1)
        # A token stays when those before it do not reach top_p; so the first always stays.
        kept = int((probability.cumsum(-1) - probability < params.top_p).sum())
        scaled, ids = scaled[: max(1, kept)], ids[: max(1, kept)]
    return ids[torch.argmax(scaled + _gumbel(draw.key, ids))]


def _suppress_stops(
    logits: torch.Tensor, draws: list[Draw], eos_token_ids: tuple[int, ...]
) -> None:
    """Below min_tokens no token may end the sequence."""
    for row, draw in enumerate(draws):
        if draw.num_generated < draw.params.min_tokens:
            stops = list({*eos_token_ids, *draw.params.stop_token_ids})
            logits[row, stops] = float("-inf")


def _gumbel(key: int, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise of each token id under a key."""
    bits = _mix_tensor(ids + _signed(key))
    uniform = (_shift_right(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix(value: int) -> int:
    """splitmix64's finaliser after one increment: every input bit reaches every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(values: torch.Tensor) -> torch.Tensor:
    """The same as `_mix`, on a tensor of 64-bit words kept as int64 (products wrap)."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shift_right(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shift_right(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shift_right(values, 31)


def _shift_right(values: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift of int64 words: the sign bit does not spread."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
