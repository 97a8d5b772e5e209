"""Logits → tokens. A draw is a function of its row of logits, its parameters, its history and key.

Sampling is by the Gumbel-max rule, the largest of log-probability + Gumbel noise is a sample, in
two steps: a segment of consecutive token ids is drawn by the probability of all its tokens, then
one of these. The distribution is the same, and a draw takes the noise of hundreds of numbers
instead of a whole vocabulary's (Maddison, Tarlow, Minka: "A* Sampling", 2014, top-down).

Randomness is counter-based: noise is a hash of the key and the segment or token it is for, so
neither batch mates nor the order of steps nor a preemption changes what a request gets.

What is done to all rows at once is exact whatever their number (a maximum). Sums, exponentials and
logarithms are taken row by row, because their last bits may depend on the shape of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo.core.step import NO_TOKEN, NOTHING_ALLOWED
from octavo.engine.logits import Draw, adjust, candidates, changes, narrows, scale
from octavo.params import SamplingParams
from octavo_kernels.reference_sampling import SEGMENT  # all devices draw alike

_MASK64 = (1 << 64) - 1
# Below this temperature the division would only amplify rounding; the draw is the maximum.
GREEDY_BELOW = 1e-5


def draw_stream(params: SamplingParams, engine_seed: int, seq_id: int, branch: int = 0) -> int:
    """64 bits that all draws of a sequence have in common.

    A request's own seed makes it repeatable wherever it runs. `branch` tells the samples of one
    request apart, which share its seed.
    """
    if params.seed is None:
        return _mix(_mix(engine_seed & _MASK64) ^ (seq_id + 1))
    stream = _mix(params.seed & _MASK64)
    return _mix(stream ^ _mix(branch)) if branch else stream


def draw_key(
    params: SamplingParams, engine_seed: int, seq_id: int, num_generated: int, branch: int = 0
) -> int:
    """64 bits that name a draw: the stream's, of `num_generated` tokens drawn before."""
    return _mix(draw_stream(params, engine_seed, seq_id, branch) ^ (num_generated + 1))


def sample(logits: torch.Tensor, draws: Sequence[Draw], eos_token_ids: Sequence[int]) -> list[int]:
    """One token id for each row of float32 `logits` [rows, vocab], which stay as they are.

    NO_TOKEN where the logits are not numbers, NOTHING_ALLOWED where the parameters forbid all.
    """
    best = torch.argmax(logits, dim=-1)  # NaN counts as the largest
    usable = torch.isfinite(logits.gather(1, best[:, None])[:, 0]).tolist()
    tokens: list[int] = best.tolist()
    for i, draw in enumerate(draws):
        if not usable[i]:
            tokens[i] = NO_TOKEN
        elif changes(draw) or draw.params.temperature >= GREEDY_BELOW:
            tokens[i] = _draw(logits[i], draw, eos_token_ids)
    return tokens


def _draw(row: torch.Tensor, draw: Draw, eos_token_ids: Sequence[int]) -> int:
    if changes(draw):
        row = adjust(row, draw, eos_token_ids)
        if float(row.max()) == float("-inf"):
            return NOTHING_ALLOWED
    if draw.params.temperature < GREEDY_BELOW:
        return int(torch.argmax(row))
    return _pick(_segments(row, draw.params), draw.key)


def _segments(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Scaled logits [segments, SEGMENT], float64; -infinity where no token may be drawn."""
    vocab = len(row)
    size = -(-vocab // SEGMENT) * SEGMENT
    whole = torch.full((size,), float("-inf"), dtype=torch.float64, device=row.device)
    if narrows(params, vocab):
        scaled, ids = candidates(row, params)
        whole[ids] = scaled
    else:
        whole[:vocab] = scale(row, params.temperature)
    return whole.view(-1, SEGMENT)


def _pick(scaled: torch.Tensor, key: int) -> int:
    """A token id, drawn from scaled logits [segments, SEGMENT]."""
    segments = torch.arange(len(scaled), device=scaled.device)
    segment = int(torch.argmax(torch.logsumexp(scaled, 1) + _gumbel(~key, segments)))
    ids = segment * SEGMENT + torch.arange(SEGMENT, device=scaled.device)
    return int(ids[torch.argmax(scaled[segment] + _gumbel(key, ids))])


def _gumbel(key: int, words: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float64, of the uniform numbers that key + word hashes to."""
    hashed = _mix_tensor(words + _signed(key & _MASK64))
    uniform = _shift_right(hashed, 11).double().add_(0.5).mul_(2.0**-53)
    return uniform.log_().neg_().log_().neg_()


def _mix(value: int) -> int:
    """splitmix64's finaliser after one increment: every input bit reaches every output bit."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix_tensor(values: torch.Tensor) -> torch.Tensor:
    """The same as `_mix`, on a tensor of 64-bit words kept as int64 (products wrap)."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shift_right(values, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    values = (values ^ _shift_right(values, 27)).mul_(_signed(0x94D049BB133111EB))
    return values ^ _shift_right(values, 31)


def _shift_right(values: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift of int64 words: the sign bit does not spread."""
    return (values >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same bits."""
    return value - (1 << 64) if value >= 1 << 63 else value
