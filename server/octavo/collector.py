"""One request of `LLM`, from what the engine sends to the result that the caller gets."""

from __future__ import annotations

import itertools
import logging
import time

import msgspec

from octavo.logprobs import TokenLogprobs
from octavo.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from octavo.params import SamplingParams
from octavo.text.assembly import TextAssembly
from octavo.text.tokenizer import Tokenizer
from octavo.wire import TokenOutput

logger = logging.getLogger(__name__)


class Collector:
    """Builds a `RequestOutput`, continuation by continuation.

    `asked` is what the engine is to do: where the best of several samples are wanted, it gives the
    log-probabilities that tell which they are.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
        priority: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self.priority = priority
        self._params = params
        self._tokenizer = tokenizer
        self._ranks = not params.use_beam_search and params.branches > params.n
        hidden = self._ranks and params.logprobs is None
        self.asked = msgspec.structs.replace(params, logprobs=0) if hidden else params
        count = params.num_outputs
        self._assemblies = [
            TextAssembly(tokenizer, token_ids, params) if tokenizer else None for _ in range(count)
        ]
        self.metrics = RequestMetrics(time.time(), time.monotonic())
        outputs = [CompletionOutput(index) for index in range(count)]
        self.result = RequestOutput(request_id, prompt, token_ids, outputs, metrics=self.metrics)

    def take(self, output: TokenOutput, now: float) -> int | None:
        """Add an output; return the index of a continuation that a stop string ended just now."""
        result, metrics = self.result, self.metrics
        choice = result.outputs[output.index]
        if choice.finished():
            return None
        result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
        if output.token_ids or output.stop_token_id is not None:
            metrics.first_token_ts = metrics.first_token_ts or now
            metrics.last_token_ts = now
        if output.prompt_logprobs is not None:
            # The first token of a prompt has nothing before it.
            result.prompt_logprobs = [None, *map(self._logprobs, output.prompt_logprobs)]
        before = len(choice.token_ids)
        aborts = self._continue(choice, output)
        metrics.num_generation_tokens += len(choice.token_ids) - before
        if output.error is not None:
            self._fail(output)
        if all(choice.finished() for choice in result.outputs):
            self._conclude()
        return output.index if aborts else None

    def _continue(self, choice: CompletionOutput, output: TokenOutput) -> bool:
        """Add the tokens; true when a stop string ended what the engine would go on with."""
        assembly = self._assemblies[choice.index]
        for place, token_id in enumerate(output.token_ids):
            choice.token_ids.append(token_id)
            if output.logprobs is not None:
                self._add_logprobs(choice, output.logprobs[place])
            if assembly is None:
                continue
            choice.text += assembly.push(token_id)
            if assembly.matched is not None:
                choice.finish_reason, choice.stop_reason = "stop", assembly.matched
                return output.finish_reason is None
        if output.finish_reason is not None:
            self._finish(choice, assembly, output)
        return False

    def _finish(
        self, choice: CompletionOutput, assembly: TextAssembly | None, output: TokenOutput
    ) -> None:
        """Take in the last output: what ended it, and the text held back."""
        choice.finish_reason = output.finish_reason
        if output.score is not None:
            choice.cumulative_logprob = output.score
        if output.stop_token_id is not None:
            choice.token_ids.append(output.stop_token_id)
            if output.logprobs is not None and len(output.logprobs) > len(output.token_ids):
                self._add_logprobs(choice, output.logprobs[-1])
            if output.stop_token_id in self._params.stop_token_ids:
                choice.stop_reason = output.stop_token_id
        if assembly is not None:
            choice.text += assembly.flush(output.stop_token_id)
            if assembly.matched is not None:
                choice.finish_reason, choice.stop_reason = "stop", assembly.matched

    def _fail(self, output: TokenOutput) -> None:
        """An error ends the request: all of its continuations that were not over."""
        logger.warning("request %s failed: %s", output.request_id, output.error)
        for choice in self.result.outputs:
            if not choice.finished() or choice.finish_reason == "error":
                choice.finish_reason, choice.stop_reason = "error", output.error

    def _conclude(self) -> None:
        """All are over: keep the best, where not all are wanted."""
        result = self.result
        result.finished = True
        if not self._ranks:
            return
        ranked = sorted(result.outputs, key=lambda c: -(c.cumulative_logprob or 0.0))
        result.outputs = ranked[: self._params.n]
        for index, choice in enumerate(result.outputs):
            choice.index = index
            if self._params.logprobs is None:
                choice.logprobs = None

    def _add_logprobs(self, choice: CompletionOutput, found: TokenLogprobs) -> None:
        if choice.logprobs is None:
            choice.logprobs, choice.cumulative_logprob = [], 0.0
        choice.logprobs.append(self._logprobs(found))
        choice.cumulative_logprob = (choice.cumulative_logprob or 0.0) + found.logprob

    def _logprobs(self, found: TokenLogprobs) -> dict[int, Logprob]:
        """The drawn token first, then the most likely ones."""
        pairs = [(found.token_id, found.logprob, found.rank)]
        pairs += zip(found.top_ids, found.top_logprobs, itertools.count(1), strict=False)
        return {i: Logprob(value, rank, self._spelling(i)) for i, value, rank in pairs}

    def _spelling(self, token_id: int) -> str | None:
        return self._tokenizer.token_text(token_id) if self._tokenizer else None
