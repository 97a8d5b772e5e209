"""Steps on a device that keeps the batch's state itself and draws the tokens itself.

A step is: what changed goes to the device; the device makes the inputs, runs the model, draws and
records the tokens; the tokens come back while the next step runs. Where all sequences have one
token, all but the first and the last of that is one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from octavo.core.step import ScheduledSequence, StepPlan, StepResult
from octavo.engine.eager import Done, draw_of
from octavo.engine.graphs import DecodeRunner
from octavo.engine.lane import Fetch, Lane
from octavo.engine.logprobs import drawn_logprobs, prompt_logprobs
from octavo.engine.rows import RowTable, StateLayout, StepInputs, Stretch, messages
from octavo.engine.sampler import sample
from octavo.engine.swap import HostBlocks
from octavo.logprobs import TokenLogprobs
from octavo.models.decoder import Batch, Decoder
from octavo.params import SamplingParams
from octavo_kernels import batch_state, ops, sampling
from octavo_kernels.batch_state import BatchState, StepBuffers
from octavo_kernels.record import RECORD_WORDS
from octavo_kernels.reference_sampling import Sampling

# Words of a message; what is longer goes in several.
MESSAGE_WORDS = 1 << 18
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "stream", "count")

# Makes what runs decode steps, of the step itself and of the same to no effect.
MakeGraphs = Callable[[Callable[[int], None], Callable[[int], None]], DecodeRunner]


def drawn_by_host(share: ScheduledSequence) -> bool:
    """True when a sequence's draw is beyond what the device does."""
    p = share.params
    return share.samples and (_host_always(p) or share.num_generated < p.min_tokens)


def _host_always(p: SamplingParams) -> bool:
    return bool(
        p.logprobs is not None
        or p.typical_p < 1
        or p.logit_bias
        or p.allowed_token_ids is not None
        or p.needs_history
    )


@dataclass(slots=True, frozen=True)
class InFlight:
    """A step on the device. `places` are those in the batch of the tokens that the plan wants."""

    tokens: Fetch
    places: Sequence[int]
    by_host: Mapping[int, int] = field(default_factory=dict)
    of_tokens: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    of_prompts: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)

    def result(self) -> StepResult:
        """Wait for the tokens."""
        found = self.tokens.wait()
        for place, token in self.by_host.items():
            found[place] = token
        if isinstance(self.places, range):  # the batch is as the plan is
            tokens = found
        else:
            tokens = [found[place] for place in self.places]
        return StepResult(tokens, self.of_tokens, self.of_prompts)


class Workspace:
    """All that steps on a device need but the model and the cache, as large as any may need.

    `logits` [rows, vocab] are of the model's type. Made before the cache, which takes the rest.
    """

    def __init__(
        self, model: Decoder, layout: StateLayout, block_size: int, device: torch.device
    ) -> None:
        spec = model.spec
        self.layout = layout
        self.words = torch.zeros(layout.num_words, dtype=torch.int32, device=device)
        self.state = _views(self.words, layout)
        self.state.batch.fill_(-1)
        # For a step to no effect: every sequence is padding.
        self.nobody = replace(self.state, batch=torch.full_like(self.state.batch, -1))
        self.buffers = _buffers(layout, device)
        self.sampling = Sampling(*(getattr(self.buffers, name) for name in _SAMPLING))
        self.one_each = torch.arange(layout.max_rows + 1, dtype=torch.int32, device=device)
        dtype = model.parameters["embedding"].dtype
        self.logits = torch.zeros(layout.max_rows, spec.vocab_size, dtype=dtype, device=device)
        self.drawn = torch.zeros(2, layout.max_rows, dtype=torch.int32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.attention = ops.attention_work(
            max_seqs=layout.max_rows,
            max_seq_len=layout.table_width // layout.groups * block_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            dim=spec.head_dim,
            device=device,
            windows=[layer.window or 0 for layer in spec.layers],
        )


class DeviceSteps:
    """Runs plans on `kv_cache`'s device, [layers of a group, 2, blocks, block_size, kv_heads,
    head_dim].

    At most two may be in flight. `seed` is the engine's.
    """

    def __init__(
        self,
        model: Decoder,
        kv_cache: torch.Tensor,
        workspace: Workspace,
        lane: Lane,
        make_graphs: MakeGraphs,
        *,
        eos_token_ids: Sequence[int],
        seed: int,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.shape[3]
        self._space = workspace
        self._lane = lane
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self.host_blocks: HostBlocks | None = None
        self._rows = RowTable(workspace.layout, self._block_size, seed)
        self._by_host: set[int] = set()  # rows, by sequence id
        self._steps = 0
        self._graphs = make_graphs(self._decode, self._rehearse)

    def submit(self, plan: StepPlan) -> InFlight | Done:
        """Queue the step. Waits for it where the host has to draw for a sequence."""
        with self._lane.scope(), torch.inference_mode():
            if self.host_blocks is not None:
                self.host_blocks.run(plan)
            if plan.copies:
                pairs = self._lane.send(np.array(plan.copies, dtype=np.int32))
                ops.copy_blocks(self._kv_cache.flatten(0, 1), pairs.long())
            inputs = self._rows.advance(plan)
            self._send(inputs.sent)
            if not inputs.num_sequences:
                return Done(StepResult([]))
            of_prompts: Mapping[int, list[TokenLogprobs]] = {}
            if inputs.has_chunks:
                of_prompts = self._run_chunks(plan, inputs)
            elif inputs.num_sequences <= self._graphs.largest:
                self._graphs.run(inputs.num_sequences)
            else:
                self._decode(inputs.num_sequences)
            numbers = self._space.drawn[self._steps % 2, : inputs.num_sequences]
            self._steps += 1
            by_host, of_tokens = self._draw_by_host(plan, inputs)
            tokens = self._lane.fetch(numbers)
            return InFlight(tokens, inputs.drawn, by_host, of_tokens, of_prompts)

    def prepare_one(self) -> bool:
        """Use an idle moment for a step to come; False when nothing is left to prepare."""
        with self._lane.scope(), torch.inference_mode():
            return self._graphs.prepare_one()

    def _send(self, sent: Sequence[Stretch]) -> None:
        for message in messages(sent, MESSAGE_WORDS):
            batch_state.apply_updates(self._space.words, self._lane.send(message), int(message[0]))

    # The step, as it is captured.

    def _decode(self, size: int) -> None:
        """One token of each of the batch's first `size` entries."""
        self._run_decode(self._space.state, size)
        self._record(size)

    def _rehearse(self, size: int) -> None:
        """The same for nobody: nothing is stored, nothing moves on."""
        self._run_decode(self._space.nobody, size)
        self._sample(size)

    def _run_decode(self, state: BatchState, size: int) -> None:
        batch_state.build_inputs(state, self._space.buffers, size, self._block_size, one_token=True)
        ops.plan_attention(self._space.attention, self._space.buffers.seq_lens[:size], size)
        batch = self._batch(StepInputs(size, size, size, 1), self._space.one_each)
        hidden = self._model.hidden(batch, self._kv_cache)
        self._model.raw_logits(hidden, self._space.logits[:size])

    def _record(self, size: int) -> None:
        tokens = self._sample(size)
        batch_state.record_tokens(self._space.state, tokens, self._space.drawn, self._space.counter)

    def _sample(self, size: int) -> torch.Tensor:
        spec = self._model.spec
        return sampling.sample(
            self._space.logits[:size],
            self._space.sampling,
            scale=spec.logit_scale,
            softcap=spec.logit_softcap or 0.0,
        )

    def _batch(
        self,
        inputs: StepInputs,
        query_start: torch.Tensor,
        logit_rows: torch.Tensor | None = None,
    ) -> Batch:
        """The buffers, as far as the step needs them."""
        out, sequences, tokens = self._space.buffers, inputs.num_sequences, inputs.num_tokens
        return Batch(
            token_ids=out.token_ids[:tokens],
            positions=out.positions[:tokens],
            slots=tuple(slots[:tokens] for slots in out.slots),
            query_start=query_start[: sequences + 1],
            seq_lens=out.seq_lens[:sequences],
            block_tables=tuple(tables[:sequences] for tables in out.block_tables),
            logit_rows=logit_rows,
            num_decodes=inputs.num_decodes,
            max_query_len=inputs.max_query_len,
            attention_work=self._space.attention,
        )

    # Steps with chunks of prompts.

    def _run_chunks(self, plan: StepPlan, inputs: StepInputs) -> Mapping[int, list[TokenLogprobs]]:
        """Each sequence's last token gives a row of logits, whether it is wanted or not."""
        size = inputs.num_sequences
        batch_state.build_inputs(
            self._space.state, self._space.buffers, size, self._block_size, one_token=False
        )
        starts = self._space.state.query_start
        logit_rows = starts[1 : size + 1].long() - 1
        if inputs.prompt_rows:
            of_prompts = torch.tensor(inputs.prompt_rows, device=starts.device)
            logit_rows = torch.cat((logit_rows, of_prompts))
        ops.plan_attention(
            self._space.attention,
            self._space.buffers.seq_lens[:size],
            inputs.num_decodes,
            query_start=starts[: size + 1],
            tokens=inputs.num_tokens,
            max_query_len=inputs.max_query_len,
        )
        batch = self._batch(inputs, starts, logit_rows)
        hidden = self._model.hidden(batch, self._kv_cache)
        self._model.raw_logits(hidden[:size], self._space.logits[:size])
        self._record(size)
        return prompt_logprobs(plan.chunks, hidden[size:], self._model.logits)

    # What only the host draws.

    def _draw_by_host(
        self, plan: StepPlan, inputs: StepInputs
    ) -> tuple[Mapping[int, int], Mapping[int, TokenLogprobs]]:
        """Draw again for those whose parameters the device does not serve, and tell it."""
        shares = self._shares_by_host(plan, inputs)
        if not shares:
            return {}, {}
        places = list(shares)
        draws = [draw_of(share, self._seed) for share in shares.values()]
        logits = self._model.finish_logits(self._space.logits[places])
        tokens = sample(logits, draws, self._eos_token_ids)
        seq_ids = [share.seq_id for share in shares.values()]
        self._send([(self._rows.token_word(s), (t,)) for s, t in zip(seq_ids, tokens, strict=True)])
        of_tokens = drawn_logprobs(logits, tokens, draws, seq_ids)
        return dict(zip(places, tokens, strict=True)), of_tokens

    def _shares_by_host(self, plan: StepPlan, inputs: StepInputs) -> dict[int, ScheduledSequence]:
        """Those that only the host draws for, by their place in the batch."""
        self._by_host.difference_update(plan.rows.left)
        self._by_host.update(s.seq_id for s in plan.rows.joined if drawn_by_host(s))
        found = {}
        if self._by_host:
            for place, share in enumerate(plan.sequences[: plan.rows.count]):
                if share.seq_id not in self._by_host:
                    continue
                if drawn_by_host(share):
                    found[place] = share
                else:  # it has drawn its `min_tokens`
                    self._by_host.discard(share.seq_id)
        drawing = [share for share in plan.chunks if share.samples]
        for place, share in zip(inputs.drawn[plan.rows.count :], drawing, strict=True):
            if drawn_by_host(share):
                found[place] = share
        return found


def _views(words: torch.Tensor, layout: StateLayout) -> BatchState:
    rows = layout.max_rows
    return BatchState(
        records=words[: layout.tables].view(rows, RECORD_WORDS),
        tables=words[layout.tables : layout.batch].view(rows, layout.table_width),
        batch=words[layout.batch : layout.token_at],
        token_at=words[layout.token_at : layout.query_start],
        query_start=words[layout.query_start : layout.chunk],
        chunk=words[layout.chunk :],
    )


def _buffers(layout: StateLayout, device: torch.device) -> StepBuffers:
    rows, tokens = layout.max_rows, layout.max_tokens

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return StepBuffers(
        token_ids=zeros(tokens, dtype=torch.int64),
        positions=zeros(tokens, dtype=torch.int64),
        slots=zeros(layout.groups, tokens, dtype=torch.int64),
        seq_lens=zeros(rows, dtype=torch.int32),
        block_tables=zeros(
            layout.groups, rows, layout.table_width // layout.groups, dtype=torch.int32
        ),
        temperature=zeros(rows, dtype=torch.float32),
        top_k=zeros(rows, dtype=torch.int32),
        top_p=zeros(rows, dtype=torch.float32),
        min_p=zeros(rows, dtype=torch.float32),
        stream=zeros(rows, dtype=torch.int64),
        count=zeros(rows, dtype=torch.int64),
    )
