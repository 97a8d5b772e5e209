"""The engine's loop: plan, run, commit; one or two steps in flight, whoever drives it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from octavo import wire
from octavo.core import forecast
from octavo.core.outcome import SequenceUpdate
from octavo.core.request import RequestError
from octavo.core.scheduler import MAX_IN_FLIGHT, Scheduler
from octavo.core.step import StepPlan, StepResult
from octavo.core.step_time import StepTimeModel
from octavo.logprobs import TokenLogprobs
from octavo.params import MAX_N, ParameterError, SamplingParams

# Prompt tokens that a step always has room for, whatever the inter-token target.
MIN_CHUNK = 16


class StepRunner(Protocol):
    """Runs plans on a device, in the order in which they are submitted."""

    def submit(self, plan: StepPlan) -> Any:
        """Start the plan, which draws a token for each sequence with `samples`; return the step."""
        ...

    def collect(self, step: Any) -> StepResult:
        """Wait for the end of the step that was submitted first of those in flight."""
        ...

    def prepare_one(self) -> bool:
        """Prepare for one kind of step to come, in an idle moment; False when none is left."""
        ...


class RunnerError(RuntimeError):
    """The runner broke its contract; the engine cannot go on."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from: `monotonic` for durations, `wall` for what others read."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that was submitted."""

    plan: StepPlan
    step: Any
    begin: float


class EngineLoop:
    """Joins a scheduler and a runner.

    With a `depth` of two a step is planned and submitted before the tokens of the one before it are
    read, so that the device never waits for the host; requests get the same tokens with both.

    A request that cannot be served ends alone, with an error as its only output. An exception of
    the runner passes through: the cache's content is then unknown, and so the engine is over. Who
    was interrupted and wants to go on ends every request first.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        clock: Clock | None = None,
        *,
        target_itl_s: float | None = None,
        depth: int = 1,
    ) -> None:
        if not 1 <= depth <= MAX_IN_FLIGHT:
            raise ValueError(f"the loop's depth must be in 1..{MAX_IN_FLIGHT}, got {depth}")
        self.scheduler = scheduler
        self.depth = depth
        self._runner = runner
        self._in_flight: deque[_InFlight] = deque()
        self._last_end = 0.0
        self._clock = clock or Clock()
        self._rates = forecast.StepRates()
        self._step_time = StepTimeModel()
        if scheduler.swap is not None:
            scheduler.swap.recompute_seconds = self._step_time.added
        self._target_itl_s = target_itl_s
        self._outbox: list[wire.TokenOutput] = []
        # Of prompts that are still being computed, by seq_id; they leave with the first token.
        self._prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        self._last_activity = self._clock.wall()

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return self.scheduler.has_work or bool(self._in_flight) or bool(self._outbox)

    def prepare_one(self) -> bool:
        """Use an idle moment to prepare for a step to come; False when nothing is left to do."""
        return self._runner.prepare_one()

    def add(self, request: wire.AddRequest) -> None:
        """Queue a request, or give it its error."""
        self._last_activity = self._clock.wall()
        try:
            self.scheduler.add(
                request.request_id,
                request.prompt_token_ids,
                request.params,
                priority=request.priority,
                scope=request.cache_salt,
                now=self._clock.monotonic(),
            )
        except (RequestError, ParameterError) as error:
            self._outbox += [
                wire.TokenOutput(
                    request.request_id, [], "error", error=str(error), index=index, refused=True
                )
                for index in range(_samples(request.params))
            ]

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sample of it; what is unknown or already over is ignored."""
        for update in self.scheduler.abort(request_id, index):
            self._prompt_logprobs.pop(update.seq_id, None)
            self._outbox.append(_output(update))

    def abort_all(self) -> None:
        """End every request."""
        for request_id in self.scheduler.request_ids:
            self.abort(request_id)

    def step(self) -> list[wire.TokenOutput]:
        """Submit what may be, and wait for one step; return what requests got since the last."""
        outputs, self._outbox = self._outbox, []
        try:
            while len(self._in_flight) < self.depth and self._submit():
                pass
            if self._in_flight:
                outputs += self._collect()
                self._last_activity = self._clock.wall()
        except BaseException:
            self._abandon()
            raise
        return outputs

    def _abandon(self) -> None:
        """Let what is in flight end, and forget it."""
        for flying in self._in_flight:
            with contextlib.suppress(Exception):
                self._runner.collect(flying.step)
        self._in_flight.clear()
        self.scheduler.abandon()

    def _submit(self) -> bool:
        """Start a step; False when there is nothing to do before what is in flight comes back."""
        scheduler = self.scheduler
        if not scheduler.has_work or not scheduler.may_plan:
            return False
        plan = scheduler.plan(self._budget())
        if not plan.num_sequences:
            return False
        begin = self._clock.monotonic()
        self._in_flight.append(_InFlight(plan, self._runner.submit(plan), begin))
        return True

    def _collect(self) -> list[wire.TokenOutput]:
        done = self._in_flight[0]
        plan, result = done.plan, self._runner.collect(done.step)
        self._in_flight.popleft()
        now = self._clock.monotonic()
        # The device began with it when it was submitted, or when the one before had ended.
        seconds = now - max(done.begin, self._last_end)
        self._last_end = now
        if len(result.tokens) != plan.num_samples:
            raise RunnerError(
                f"the step drew {len(result.tokens)} tokens for {plan.num_samples} sequences"
            )
        self._step_time.observe(plan.num_tokens, plan.context, seconds)
        self._rates.observe(plan, self.scheduler.limits.max_num_batched_tokens, seconds)
        if result.prompt_logprobs:
            self._keep_prompt_logprobs(plan, result)
        updates = self.scheduler.commit(plan, result.tokens, result.logprobs)
        if not result.logprobs and not self._prompt_logprobs:
            return [_output(update) for update in updates]
        return [self._with_logprobs(update, result) for update in updates]

    def _budget(self) -> int | None:
        """Tokens that keep the step within the inter-token target, while anybody would notice.

        Always enough for a small chunk, so that prompts move on where the target cannot be met.
        """
        scheduler = self.scheduler
        if self._target_itl_s is None or not scheduler.decoding:
            return None
        tokens = self._step_time.tokens_within(self._target_itl_s, scheduler.context)
        return None if tokens is None else max(tokens, scheduler.num_running + MIN_CHUNK)

    def _keep_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        for share in plan.chunks:
            found = result.prompt_logprobs.get(share.seq_id)
            if found is not None and self.scheduler.knows(share.seq_id):
                # Entry i is of position i + 1. A prompt that was preempted comes again.
                self._prompt_logprobs.setdefault(share.seq_id, [])[share.start :] = found

    def _with_logprobs(self, update: SequenceUpdate, result: StepResult) -> wire.TokenOutput:
        of_token = None if update.score is not None else result.logprobs.get(update.seq_id)
        of_prompt = self._prompt_logprobs.pop(update.seq_id, None)
        return _output(update, None if of_token is None else [of_token], of_prompt)

    def load(self) -> wire.Load:
        """The scheduler's state, for whoever routes to this engine or scales it."""
        scheduler, rates = self.scheduler, self._rates
        counts, counters = scheduler.pool.counts, scheduler.counters
        waiting = scheduler.waiting_totals
        swap = scheduler.swap
        demand = forecast.demand_blocks(
            scheduler.running,
            waiting,
            active_blocks=counts.active,
            kv=scheduler.kv,
            mean_output=scheduler.output_lengths.mean,
            tokens_per_s=rates.decode_tokens_per_s,
        )
        return wire.Load(
            blocks=wire.Blocks(
                total=counts.total,
                active=counts.active,
                shared=counts.shared,
                cached=counts.cached,
                free=counts.free,
            ),
            block_size=scheduler.limits.block_size,
            kv_utilization=counts.active / counts.total,
            demand_blocks=demand,
            seconds_to_exhaustion=forecast.seconds_to_exhaustion(demand, counts.total),
            running=scheduler.num_running,
            waiting=waiting.count,
            waiting_blocks=waiting.blocks,
            prefill_backlog_s=forecast.prefill_backlog_s(
                scheduler.running, waiting, rates.prefill_tokens_per_s
            ),
            step_budget_used=rates.budget_used if scheduler.has_work else 0.0,
            preemptions=counters.preemptions,
            steps=counters.steps,
            prompt_tokens=counters.prompt_tokens,
            generation_tokens=counters.generation_tokens,
            prefix_cache_queries=scheduler.prefix_cache.counters.queries,
            prefix_cache_hits=scheduler.prefix_cache.counters.hits,
            last_activity=self._last_activity,
            swapped_out=0 if swap is None else swap.blocks_out,
            swapped_in=0 if swap is None else swap.blocks_in,
            host_blocks_used=0 if swap is None else swap.pool.counts.active,
            host_blocks=0 if swap is None else swap.pool.num_blocks,
        )


def _output(
    update: SequenceUpdate,
    logprobs: list[TokenLogprobs] | None = None,
    prompt_logprobs: list[TokenLogprobs] | None = None,
) -> wire.TokenOutput:
    # By position: one is made for each token, and names would cost a third more.
    return wire.TokenOutput(
        update.request_id,
        update.token_ids,
        update.finish_reason,
        update.stop_token_id,
        update.cached_tokens,
        update.error,
        logprobs,
        prompt_logprobs,
        update.index,
        update.score,
    )


def _samples(params: SamplingParams) -> int:
    """Ends that whoever sent this waits for; one where the number itself is the error."""
    count = params.num_outputs
    return count if type(count) is int and 1 <= count <= MAX_N else 1
