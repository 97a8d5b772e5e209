"""What the scheduler asks the runner to do in one step, and nothing about how."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.params import SamplingParams

# What a runner returns in place of a token when the logits were not numbers.
NO_TOKEN = -1


@dataclass(slots=True, frozen=True)
class ScheduledSequence:
    """One sequence's share of a step.

    `token_ids[i]` stands at position `start + i`; its keys and values go to slot
    `block_table[p // block_size] * block_size + p % block_size` for p = start + i, and it attends
    to positions 0..p. `samples` says that the last of these tokens is the last one known, so that
    the step ends by drawing the next. `num_generated` is the count drawn before this step; with
    `params.seed` and `seq_id` it keys the draw, so that a draw does not depend on batch mates.
    """

    seq_id: int
    token_ids: list[int]
    start: int
    block_table: list[int]
    samples: bool
    params: SamplingParams
    num_generated: int


@dataclass(slots=True, frozen=True)
class StepPlan:
    """One step: block copies first (copy-on-write), then one forward over all sequences.

    `copies` holds (source block, destination block) pairs. `preempted` names sequences whose
    blocks were taken; they will be planned again from position 0.
    """

    sequences: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()
    preempted: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that this step runs through the model."""
        return sum(len(s.token_ids) for s in self.sequences)
