"""Steps run one operation after another, tokens drawn by the host: for a CPU, and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from octavo.core.step import ScheduledSequence, StepPlan, StepResult
from octavo.engine.batch import build_batch, resolve
from octavo.engine.logits import Draw
from octavo.engine.logprobs import drawn_logprobs, prompt_logprobs
from octavo.engine.model import Model
from octavo.engine.sampler import GREEDY_BELOW, draw_key, sample
from octavo.engine.swap import HostBlocks
from octavo_kernels import ops


@dataclass(slots=True, frozen=True)
class Done:
    """A step that has run already."""

    found: StepResult

    def result(self) -> StepResult:
        """What the step brought."""
        return self.found


class EagerSteps:
    """Runs a plan when it is submitted, so that its result is there at once.

    `kv_cache` is [layers of a group, 2, blocks, block_size, kv_heads, head_dim].
    """

    def __init__(
        self,
        model: Model,
        kv_cache: torch.Tensor,
        num_groups: int,
        eos_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._num_groups = num_groups
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self.host_blocks: HostBlocks | None = None
        self._drawn: dict[int, int] = {}

    def submit(self, plan: StepPlan) -> Done:
        """Run the plan."""
        if self.host_blocks is not None:
            self.host_blocks.run(plan)
        result = self._run(resolve(plan, self._drawn))
        sampling = (s.seq_id for s in plan.sequences if s.samples)
        self._drawn = dict(zip(sampling, result.tokens, strict=True))
        return Done(result)

    def prepare_one(self) -> bool:
        """Nothing to prepare."""
        return False

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        device = self._kv_cache.device
        if plan.copies:
            pairs = torch.tensor(plan.copies, dtype=torch.int64, device=device)
            ops.copy_blocks(self._kv_cache.flatten(0, 1), pairs)
        if not plan.sequences:
            return StepResult([])
        batch = build_batch(plan, self._kv_cache.shape[3], device, self._num_groups)
        hidden = self._model.hidden(batch, self._kv_cache)
        sampling = [s for s in plan.sequences if s.samples]
        draws = [draw_of(s, self._seed) for s in sampling]
        of_prompts = prompt_logprobs(plan.sequences, hidden[len(draws) :], self._model.logits)
        if not draws:
            return StepResult([], prompt_logprobs=of_prompts)
        logits = self._model.logits(hidden[: len(draws)])
        tokens = sample(logits, draws, self._eos_token_ids)
        of_tokens = drawn_logprobs(logits, tokens, draws, (s.seq_id for s in sampling))
        return StepResult(tokens, of_tokens, of_prompts)


def draw_of(sequence: ScheduledSequence, seed: int) -> Draw:
    """What the sampler needs to know of a sequence; `seed` is the engine's."""
    params, count = sequence.params, sequence.num_generated
    # The largest is drawn without noise, and a step of many greedy rows saves as many hashes.
    key = 0
    if params.temperature >= GREEDY_BELOW:
        key = draw_key(params, seed, sequence.seq_id, count, sequence.branch)
    history, prompt = sequence.tokens, sequence.num_prompt_tokens
    if params.needs_history and len(history) < prompt + count:
        history = [*history, sequence.token_ids[-1]]  # drawn by the step before, and read just now
    return Draw(params, key, count, history, prompt)
