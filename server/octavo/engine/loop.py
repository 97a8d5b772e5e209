"""The engine's loop: plan, run, commit; one step at a time, whoever drives it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from octavo import wire
from octavo.core import forecast
from octavo.core.request import RequestError
from octavo.core.scheduler import Scheduler, SequenceUpdate
from octavo.core.step import StepPlan, StepResult
from octavo.core.step_time import StepTimeModel
from octavo.logprobs import TokenLogprobs
from octavo.params import MAX_N, ParameterError, SamplingParams

# Prompt tokens that a step always has room for, whatever the inter-token target.
MIN_CHUNK = 16


class StepRunner(Protocol):
    """Runs plans on a device."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the plan; draw a token for each sequence with `samples`."""
        ...


class RunnerError(RuntimeError):
    """The runner broke its contract; the engine cannot go on."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Where time comes from: `monotonic` for durations, `wall` for what others read."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time


class EngineLoop:
    """Joins a scheduler and a runner.

    A request that cannot be served ends alone, with an error as its only output. An exception of
    the runner passes through: the cache's content is then unknown, and so the engine is over.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: StepRunner,
        clock: Clock | None = None,
        *,
        target_itl_s: float | None = None,
    ) -> None:
        self.scheduler = scheduler
        self._runner = runner
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
        return self.scheduler.has_work or bool(self._outbox)

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
        """Run one step if there is work; return everything that requests got since the last."""
        outputs, self._outbox = self._outbox, []
        if self.scheduler.has_work:
            outputs += self._run()
            self._last_activity = self._clock.wall()
        return outputs

    def _run(self) -> list[wire.TokenOutput]:
        plan = self.scheduler.plan(self._budget())
        begin = self._clock.monotonic()
        result = self._runner.execute(plan)
        seconds = self._clock.monotonic() - begin
        expected = sum(share.samples for share in plan.sequences)
        if len(result.tokens) != expected:
            raise RunnerError(f"the step drew {len(result.tokens)} tokens for {expected} sequences")
        context = sum(share.start for share in plan.sequences)
        self._step_time.observe(plan.num_tokens, context, seconds)
        self._rates.observe(plan, self.scheduler.limits.max_num_batched_tokens, seconds)
        if result.prompt_logprobs:
            self._keep_prompt_logprobs(plan, result)
        updates = self.scheduler.commit(plan, result.tokens, result.logprobs)
        return [self._with_logprobs(update, result) for update in updates]

    def _budget(self) -> int | None:
        """Tokens that keep the step within the inter-token target, while anybody would notice.

        Always enough for a small chunk, so that prompts move on where the target cannot be met.
        """
        running = self.scheduler.running
        if self._target_itl_s is None or not any(sequence.decoding for sequence in running):
            return None
        context = sum(sequence.computed for sequence in running)
        tokens = self._step_time.tokens_within(self._target_itl_s, context)
        return None if tokens is None else max(tokens, self.scheduler.num_running + MIN_CHUNK)

    def _keep_prompt_logprobs(self, plan: StepPlan, result: StepResult) -> None:
        for share in plan.sequences:
            if (found := result.prompt_logprobs.get(share.seq_id)) is not None:
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
        )


def _output(
    update: SequenceUpdate,
    logprobs: list[TokenLogprobs] | None = None,
    prompt_logprobs: list[TokenLogprobs] | None = None,
) -> wire.TokenOutput:
    return wire.TokenOutput(
        request_id=update.request_id,
        token_ids=update.token_ids,
        finish_reason=update.finish_reason,
        stop_token_id=update.stop_token_id,
        num_cached_tokens=update.cached_tokens,
        error=update.error,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        index=update.index,
        score=update.score,
    )


def _samples(params: SamplingParams) -> int:
    """Ends that whoever sent this waits for; one where the number itself is the error."""
    count = params.num_outputs
    return count if type(count) is int and 1 <= count <= MAX_N else 1
