"""What the present work will need: blocks at a horizon, time to exhaustion, prefill backlog.

Pure functions over sequences and measured rates. Horizons ask "if all that is here now stays and
nothing comes": each running sequence grows at the measured pace up to its expected output, waiting
ones as if they were admitted now. Completions are not subtracted, since under steady load new work
takes their place; the forecast of arrivals belongs to the one who scales.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from octavo.core.block_pool import NO_BLOCK
from octavo.core.sequence import Sequence
from octavo.core.step import StepPlan
from octavo.core.waiting import WaitingTotals
from octavo.kv_layout import KvGroups

HORIZONS: Mapping[str, float] = {"now": 0.0, "10s": 10.0, "30s": 30.0, "60s": 60.0}
PRIOR_OUTPUT_TOKENS = 128.0
_MEMORY = 1 / 32


class OutputLengths:
    """A running mean of finished output lengths; the recent past weighs most."""

    def __init__(self) -> None:
        self.mean = PRIOR_OUTPUT_TOKENS
        self._seen = 0

    def observe(self, num_tokens: int) -> None:
        """Count one finished request. The first ones are averaged plainly, replacing the prior."""
        self._seen += 1
        self.mean += (num_tokens - self.mean) * max(_MEMORY, 1 / self._seen)


def expected_growth(sequence: Sequence, mean_output: float) -> int:
    """Tokens the sequence is expected to draw yet.

    Up to the mean; one that has outlived the mean is expected to go on for half its age again.
    Never more than it may.
    """
    generated = sequence.num_generated
    expected = max(math.ceil(mean_output), generated + generated // 2)
    return min(sequence.remaining, expected - generated)


@dataclass(slots=True)
class StepRates:
    """Exponential means of measured steps. Zero means: not measured yet."""

    step_seconds: float = 0.0
    budget_used: float = 0.0
    prefill_tokens: float = 0.0
    prefill_seconds: float = 0.0

    def observe(self, plan: StepPlan, token_budget: int, seconds: float) -> None:
        """Count one step that took `seconds`. One of more than `token_budget` tokens was full.

        A step of prompts alone, which may be a large one, tells nothing of the pace of decoding.
        """
        tokens, prefill = plan.num_tokens, prefill_tokens(plan)
        if tokens > prefill:
            self.step_seconds = _mix(self.step_seconds, seconds)
        self.budget_used = _mix(self.budget_used, min(1.0, tokens / token_budget))
        if prefill:
            self.prefill_tokens = _mix(self.prefill_tokens, prefill)
            self.prefill_seconds = _mix(self.prefill_seconds, seconds)

    @property
    def decode_tokens_per_s(self) -> float:
        """The pace of one decoding sequence: a token each step."""
        return 1 / self.step_seconds if self.step_seconds > 0 else 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second, in steps that had any."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0


def _mix(mean: float, value: float) -> float:
    return value if mean == 0 else mean + (value - mean) * _MEMORY


def prefill_tokens(plan: StepPlan) -> int:
    """Tokens of the step that are not a decoding sequence's newest: prompts and replays."""
    return sum(len(s.token_ids) for s in plan.chunks if len(s.token_ids) > 1 or not s.num_generated)


def demand_blocks(
    running: Iterable[Sequence],
    waiting: WaitingTotals,
    *,
    active_blocks: int,
    kv: KvGroups,
    mean_output: float,
    tokens_per_s: float,
) -> dict[str, int]:
    """Blocks that running and waiting work needs at each of `HORIZONS`.

    To the blocks held now, those that each sequence lacks are added: what sequences share is
    counted once.
    """
    demand = {}
    sizes = [(s.length, expected_growth(s, mean_output), _blocks_held(s, kv)) for s in running]
    for name, seconds in HORIZONS.items():
        pace = int(tokens_per_s * seconds)
        need = active_blocks + sum(
            max(0, kv.settled(tokens + min(pace, growth)) - held) for tokens, growth, held in sizes
        )
        demand[name] = need + _waiting_demand(waiting, pace, mean_output, kv)
    return demand


def _blocks_held(sequence: Sequence, kv: KvGroups) -> int:
    """Blocks in its table; a branch that still waits for the prompt's will be given those."""
    if sequence.branch and not sequence.block_table:
        return kv.settled(sequence.num_prompt_tokens // kv.block_size * kv.block_size)
    holes = sequence.block_table.count(NO_BLOCK) if kv.sliding else 0
    return len(sequence.block_table) - holes


def _waiting_demand(waiting: WaitingTotals, pace: int, mean_output: float, kv: KvGroups) -> int:
    """From sums alone, so that a long queue costs nothing; a bound from above, tight for equals.

    Windows that are full do not grow; how many are is not in the sums.
    """
    growth = min(waiting.count * pace, waiting.count * math.ceil(mean_output), waiting.growth)
    return waiting.blocks + kv.count * kv.rows(growth)


def seconds_to_exhaustion(demand: Mapping[str, int], total: int) -> float | None:
    """When demand passes the pool, by straight lines between horizons; None: not within them."""
    points = [(HORIZONS[name], need) for name, need in demand.items()]
    if points[0][1] > total:
        return 0.0
    for (t0, need0), (t1, need1) in itertools.pairwise(points):
        if need1 > total:
            return t0 + (t1 - t0) * (total - need0) / (need1 - need0)
    return None


def prefill_backlog_s(
    running: Iterable[Sequence], waiting: WaitingTotals, prefill_tokens_per_s: float
) -> float:
    """Seconds of prefill ahead at the measured pace; 0 while no pace is known."""
    if prefill_tokens_per_s <= 0:
        return 0.0
    ahead = sum(s.pending for s in running if not s.decoding)
    return (ahead + waiting.tokens) / prefill_tokens_per_s
