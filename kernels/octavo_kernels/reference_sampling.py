"""What drawing a token means, row by row and by brute force: whole rows are sorted, in float64.

Order: scale and softcap of the model; repetition, then presence and frequency penalty; listed
biases; what is not allowed; temperature; min-p, top-k, top-p, each on what the one before left.
The token is drawn from what is left in two steps, both by the Gumbel-max rule. First a segment of
SEGMENT consecutive ids, by its log-sum-exp of logit / temperature; then one of its tokens. That is
the softmax over all (Maddison, Tarlow, Minka: "A* Sampling", 2014, top-down), and takes the noise
of few. Noise is a hash of (~key, segment) and of (key, token), the key one of (stream, count): it
depends on nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

NO_TOKEN = -1  # the logits are not numbers
NOTHING_ALLOWED = -2

# A mark of a token in a row of adjustments (int16, seen as bits): whether the token is in the
# prompt, in the list, allowed, and how often it was drawn, as far as that can be counted.
IN_PROMPT, LISTED, ALLOWED, COUNT_MASK = 1 << 15, 1 << 14, 1 << 13, (1 << 13) - 1

STOP_IDS = 8  # a slot's tokens that end it, -1 where there are fewer
STOPPED, FULL, FAILED = 1, 2, 4  # flags

SEGMENT = 256

_MASK64 = (1 << 64) - 1
_GREEDY_BELOW = 1e-5


@dataclass(slots=True, frozen=True)
class Adjustments:
    """A pool of rows that change logits: `marks` int16 [pool, vocab or more, a multiple of 8];
    `repetition`, `presence`, `frequency` float32 and `allowed_only` int32 [pool]; of listed
    tokens `list_length` int32 [pool], `list_ids` int32 ascending, `list_bias` float32 and
    `list_until` int64 [pool, entries]. An entry's bias is added while count < until.
    """

    marks: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    allowed_only: torch.Tensor
    list_length: torch.Tensor
    list_ids: torch.Tensor
    list_bias: torch.Tensor
    list_until: torch.Tensor


@dataclass(slots=True, frozen=True)
class Sampling:
    """How each slot is sampled, [slots]: `temperature`, `top_p`, `min_p` float32, `top_k` int32,
    `stream` and `count` (tokens drawn before) int64. `adjusted` int32 is the slot's row of
    `adjustments`, -1 for none.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    stream: torch.Tensor
    count: torch.Tensor
    adjusted: torch.Tensor | None = None
    adjustments: Adjustments | None = None


@dataclass(slots=True, frozen=True)
class Ends:
    """When slots end: `stop_ids` int32 [slots, STOP_IDS], `max_tokens` int64 [slots]. Each row's
    answer goes to `flags` uint8 [rows or more]: STOPPED, FULL, FAILED.
    """

    stop_ids: torch.Tensor
    max_tokens: torch.Tensor
    flags: torch.Tensor


@dataclass(slots=True, frozen=True)
class TokenLogprobs:
    """Of each row's token `logprob` float32 and `rank` int32 [rows], 1 is the most probable; and
    `top_ids` int32, `top_logprobs` float32 [rows, top].
    """

    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    slots: torch.Tensor | None,
    scale: float,
    softcap: float,
    ends: Ends | None,
) -> torch.Tensor:
    """See `sampling.sample`."""
    tokens = []
    of_rows = range(len(logits)) if slots is None else slots.tolist()
    for r, slot in enumerate(of_rows):
        token = _draw(_transformed(logits[r], scale, softcap), sampling, slot) if slot >= 0 else 0
        tokens.append(token)
        if slot >= 0 and token >= 0 and sampling.adjusted is not None:
            _count(sampling, slot, token)
        if ends is not None:
            ends.flags[r] = _flags(ends, sampling, slot, token)
    return torch.tensor(tokens, dtype=torch.int32, device=logits.device)


def restart_marks(
    marks: torch.Tensor,
    prompt: torch.Tensor,
    drawn: torch.Tensor,
    allowed: torch.Tensor,
    listed: torch.Tensor,
) -> None:
    """Let a row of marks begin anew with these token ids."""
    fresh = torch.zeros(len(marks), dtype=torch.int32, device=marks.device)
    fresh += torch.bincount(drawn, minlength=len(marks)).clamp(max=COUNT_MASK).int()
    for ids, bit in ((prompt, IN_PROMPT), (allowed, ALLOWED), (listed.long(), LISTED)):
        fresh[ids] |= bit
    marks.copy_(fresh.to(torch.int16))


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    wanted: torch.Tensor,
    top: int,
    scale: float,
    softcap: float,
) -> TokenLogprobs:
    """See `sampling.token_logprobs`."""
    rows, device = len(logits), logits.device
    out = TokenLogprobs(
        torch.zeros(rows, dtype=torch.float32, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
        torch.zeros(rows, top, dtype=torch.int32, device=device),
        torch.zeros(rows, top, dtype=torch.float32, device=device),
    )
    for r, (token, count) in enumerate(zip(tokens.tolist(), wanted.tolist(), strict=True)):
        if token < 0 or count < 0:
            continue
        row = _transformed(logits[r], scale, softcap).double()
        logprobs = row - row.logsumexp(0)
        out.logprob[r] = logprobs[token].float()
        out.rank[r] = (row > row[token]).sum() + 1
        order = row.sort(descending=True, stable=True).indices[: min(count, top)]
        out.top_ids[r, : len(order)] = order.int()
        out.top_logprobs[r, : len(order)] = logprobs[order].float()
    return out


def kept(
    row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float
) -> torch.Tensor:
    """Ids of the tokens that may be drawn, the most probable first, of equals the lower id."""
    scaled = (row.double() - row.max().double()) / temperature
    scaled, ids = scaled.sort(descending=True, stable=True)
    if min_p > 0:
        scaled = scaled[scaled >= math.log(min_p)]
    if top_k > 0:
        scaled = scaled[:top_k]
    if top_p < 1:
        probability = scaled.softmax(0)
        before = probability.cumsum(0) - probability
        scaled = scaled[: max(1, int((before < top_p).sum()))]
    return ids[: len(scaled)]


def drawn(row: torch.Tensor, ids: torch.Tensor, temperature: float, key: int) -> int:
    """The one of `ids`, of which some logit is more than -infinity, that the key draws."""
    segments = -(-len(row) // SEGMENT)
    scaled = torch.full((segments * SEGMENT,), -math.inf, dtype=torch.float64, device=row.device)
    scaled[ids] = row[ids].double() / temperature
    scaled = scaled.view(segments, SEGMENT)
    of_segments = noise(~key, torch.arange(segments, device=row.device))
    segment = int((scaled.logsumexp(1) + of_segments).argmax())
    tokens = segment * SEGMENT + torch.arange(SEGMENT, device=row.device)
    return int(tokens[(scaled[segment] + noise(key, tokens)).argmax()])


def noise(key: int, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float64: of the uniform number that splitmix64 makes of key + id."""
    first = np.uint64((key + _GOLDEN) & _MASK64)
    with np.errstate(over="ignore"):
        words = ids.cpu().numpy().astype(np.uint64) + first
        for shift, factor in _ROUNDS:
            words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
        words ^= words >> np.uint64(31)
        uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -(-torch.from_numpy(uniform).to(ids.device).log()).log()


_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mix(value: int) -> int:
    value = (value + _GOLDEN) & _MASK64
    for shift, factor in _ROUNDS:
        value = ((value ^ (value >> shift)) * factor) & _MASK64
    return value ^ (value >> 31)


def _transformed(row: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    row = row.float()
    if scale != 1.0:
        row = row * scale
    return softcap * torch.tanh(row / softcap) if softcap else row


def _draw(row: torch.Tensor, sampling: Sampling, slot: int) -> int:
    if not math.isfinite(float(row.max())):  # NaN counts as the largest
        return NO_TOKEN
    row = _adjusted(row, sampling, slot)
    if float(row.max()) == -math.inf:
        return NOTHING_ALLOWED
    temperature = float(sampling.temperature[slot])
    if sampling.temperature[slot] < _GREEDY_BELOW:
        return int(row.argmax())
    count = int(sampling.count[slot]) + 1
    key = _mix((int(sampling.stream[slot]) & _MASK64) ^ count)
    top_p, min_p = float(sampling.top_p[slot]), float(sampling.min_p[slot])
    ids = kept(row, temperature, int(sampling.top_k[slot]), top_p, min_p)
    return drawn(row, ids, temperature, key)


def _adjusted(row: torch.Tensor, sampling: Sampling, slot: int) -> torch.Tensor:
    at = -1 if sampling.adjusted is None else int(sampling.adjusted[slot])
    if at < 0 or sampling.adjustments is None:
        return row
    a = sampling.adjustments
    marks = a.marks[at, : len(row)].int() & 0xFFFF
    counts = (marks & COUNT_MASK).float()
    seen = (counts > 0) | (marks & IN_PROMPT > 0)
    repetition = a.repetition[at]
    row = torch.where(seen, torch.where(row > 0, row / repetition, row * repetition), row)
    row = torch.where(counts > 0, row - (a.frequency[at] * counts + a.presence[at]), row)
    for entry in range(int(a.list_length[at])):
        if sampling.count[slot] < a.list_until[at, entry]:
            row[a.list_ids[at, entry]] += a.list_bias[at, entry]
    if a.allowed_only[at]:
        row = row.masked_fill(marks & ALLOWED == 0, -math.inf)
    return row


def _count(sampling: Sampling, slot: int, token: int) -> None:
    assert sampling.adjusted is not None  # noqa: S101 (the caller's condition)
    at = int(sampling.adjusted[slot])
    if at < 0 or sampling.adjustments is None:
        return
    marks = sampling.adjustments.marks
    if int(marks[at, token]) & COUNT_MASK != COUNT_MASK:
        marks[at, token] += 1


def _flags(ends: Ends, sampling: Sampling, slot: int, token: int) -> int:
    if token < 0:
        return FAILED
    if slot < 0:
        return 0
    stopped = STOPPED if token in ends.stop_ids[slot].tolist() else 0
    return stopped | (FULL if sampling.count[slot] + 1 >= ends.max_tokens[slot] else 0)
