"""What the scheduler asks the runner to do in one step, and nothing about how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from octavo.logprobs import TokenLogprobs
from octavo.params import SamplingParams

# What a runner returns in place of a token when the logits were not numbers.
NO_TOKEN = -1
# ... and when the request's own parameters forbade every token.
NOTHING_ALLOWED = -2
# The last of a sequence's token ids, where it is what the plan submitted before this one draws for
# the same sequence, and has not been read yet.
PENDING = -3


def needs_host(params: SamplingParams) -> bool:
    """True when a step can be submitted only once the host knows all tokens before it.

    Penalties and bad words look at them, and a search chooses among its branches' candidates.
    """
    return params.use_beam_search or params.needs_history


class ScheduledSequence(msgspec.Struct, frozen=True, gc=False):
    """One sequence's share of a step.

    `token_ids[i]` stands at position `start + i`; its keys and values go to slot
    `block_table[p // block_size] * block_size + p % block_size` for p = start + i, and it attends
    to positions 0..p. With several groups of layers a row of the table has an entry for each of
    them, as `kv_layout.KvGroups` says; an entry of -1 lies behind the group's window. `samples`
    says that the last of these tokens is the last one known, so that the step ends by drawing the
    next. `num_generated` is the count drawn before this step; with `params.seed`, `seq_id` and
    `branch` (which of several samples of one request) it keys the draw, so that a draw does not
    depend on batch mates. `tokens` is the sequence's own list, not a copy: prompt, then what was
    drawn; who reads it when more may have been appended bounds it by `num_prompt_tokens +
    num_generated`. Without `writes` the keys and values of these tokens are in their slots already,
    in blocks that others may read, and are not written again.
    """

    seq_id: int
    token_ids: list[int]
    start: int
    block_table: list[int]
    samples: bool
    params: SamplingParams
    num_generated: int
    tokens: Sequence[int] = ()
    num_prompt_tokens: int = 0
    branch: int = 0
    writes: bool = True

    @property
    def prompt_logprob_rows(self) -> range:
        """Which of `token_ids` are followed by a prompt token whose log-probability is wanted."""
        if self.params.prompt_logprobs is None or self.num_generated:
            return range(0)
        return range(min(len(self.token_ids), self.num_prompt_tokens - 1 - self.start))


@dataclass(slots=True, frozen=True)
class StepPlan:
    """One step: block copies first, then one forward over all sequences.

    Copies are made in this order: `swap_out` (device block, host block), `swap_in` (host block,
    device block), `copies` (source block, destination block; copy-on-write). `preempted` names
    sequences whose blocks were taken; they will be planned again, from position 0 or, if they were
    swapped out, from where they were.
    """

    sequences: tuple[ScheduledSequence, ...]
    copies: tuple[tuple[int, int], ...] = ()
    preempted: tuple[int, ...] = ()
    swap_out: tuple[tuple[int, int], ...] = ()
    swap_in: tuple[tuple[int, int], ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that this step runs through the model."""
        return sum(len(s.token_ids) for s in self.sequences)


@dataclass(slots=True, frozen=True)
class StepResult:
    """What a step brought: a token for each sequence that samples, in the plan's order.

    The log-probabilities are by `seq_id` and only of those that asked: `logprobs` of the drawn
    token, `prompt_logprobs` of the prompt's tokens from position `start + 1` of the share.
    """

    tokens: list[int]
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)
