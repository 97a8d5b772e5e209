"""Steps on a device that keeps the batch's state itself and draws the tokens itself.

A step is: what changed goes to the device; the device makes the inputs, runs the model, draws and
records the tokens; the tokens come back while the next step runs. Where all sequences have one
token, all but the first and the last of that is one graph; of a step with chunks it is the model up
to the last layer's attention, which is all that runs for every token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from octavo.core.step import ScheduledSequence, StepPlan, StepResult, drawn_by_host
from octavo.engine.adjust import begin
from octavo.engine.eager import Done, draw_of
from octavo.engine.graphs import Part, PartRunner
from octavo.engine.lane import Fetch, Lane
from octavo.engine.logprobs import drawn_logprobs, prompt_logprobs
from octavo.engine.rows import RowTable, StepInputs, Stretch, messages, padding
from octavo.engine.sampler import sample
from octavo.engine.swap import HostBlocks
from octavo.engine.workspace import Workspace
from octavo.logprobs import TokenLogprobs
from octavo.models.decoder import Batch, Decoder
from octavo.params import MAX_N, SamplingParams
from octavo_kernels import batch_state, ops, sampling
from octavo_kernels.batch_state import BatchState

# Words of a message; what is longer goes in several.
MESSAGE_WORDS = 1 << 18
# Of so many tokens of a sequence the device gives log-probabilities, which is enough for most
# searches; then these words of a sequence come back: its token, its own two, and two for each.
MOST_LOGPROBS = 2 * MAX_N
MOST_FETCHED = 3 + 2 * MOST_LOGPROBS

# Makes what runs decode steps, by their sequences, and steps with chunks, by their tokens.
MakeGraphs = Callable[[Part, Part], tuple[PartRunner, PartRunner]]


@dataclass(slots=True, frozen=True)
class _Wanted:
    """Whose drawn tokens' log-probabilities are on their way: in which place of the batch, of which
    sequence, with how many of the most probable tokens; three lists, of one length.
    """

    places: list[int] = field(default_factory=list)
    seq_ids: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    @property
    def most(self) -> int:
        """The largest of the counts, but at least 1."""
        return max([1, *self.counts])

    def read(self, tokens: Sequence[int], words: np.ndarray) -> dict[int, TokenLogprobs]:
        """By sequence id, of those that got a token, out of the words of `_logprob_words`."""
        count, most = len(self.places), self.most
        reals = words.view(np.float32)
        drawn = [tokens[place] for place in self.places]
        own, ranks = reals[:count].tolist(), words[count : 2 * count].tolist()
        first, end = 2 * count, (2 + most) * count
        ids = words[first:end].reshape(count, most).tolist()
        values = reals[end:].reshape(count, most).tolist()
        if min(self.counts) < most:
            for wanted, top_ids, top in zip(self.counts, ids, values, strict=True):
                del top_ids[wanted:], top[wanted:]
        found = dict(
            zip(self.seq_ids, map(TokenLogprobs, drawn, own, ranks, ids, values), strict=True)
        )
        if min(drawn) < 0:
            return {seq_id: one for seq_id, one in found.items() if one.token_id >= 0}
        return found


@dataclass(slots=True, frozen=True)
class InFlight:
    """A step on the device. `places` are those in the batch of the tokens that the plan wants.

    What is fetched is the token of each of `size` sequences, then the words of log-probabilities.
    """

    fetched: Fetch
    size: int
    places: Sequence[int]
    wanted: _Wanted = field(default_factory=_Wanted)
    by_host: Mapping[int, int] = field(default_factory=dict)
    of_tokens: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    of_prompts: Mapping[int, list[TokenLogprobs]] = field(default_factory=dict)

    def result(self) -> StepResult:
        """Wait for the tokens."""
        words = self.fetched.wait()
        found, more = words[: self.size].tolist(), words[self.size :]
        of_tokens = self.of_tokens
        if self.wanted.places:
            of_tokens = {**of_tokens, **self.wanted.read(found, more)}
        for place, token in self.by_host.items():
            found[place] = token
        if isinstance(self.places, range):  # the batch is as the plan is
            tokens = found
        else:
            tokens = [found[place] for place in self.places]
        return StepResult(tokens, of_tokens, self.of_prompts)


class DeviceSteps:
    """Runs plans on `kv_cache`'s device, [layers of a group, 2, blocks, block_size, kv_heads,
    head_dim].

    At most two may be in flight. `seed` is the engine's, `deterministic` as `RowTable` has it.
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
        deterministic: bool = False,
    ) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._block_size = kv_cache.shape[3]
        self._space = workspace
        self._lane = lane
        self._eos_token_ids = eos_token_ids
        self._seed = seed
        self.host_blocks: HostBlocks | None = None
        self._rows = RowTable(workspace.layout, self._block_size, seed, deterministic=deterministic)
        # Rows, by sequence id: who is drawn for by the host, who wants log-probabilities.
        self._by_host: set[int] = set()
        self._logprobs: dict[int, int] = {}
        self._steps = 0
        self._graphs, self._chunk_graphs = make_graphs(
            Part(self._decode, self._rehearse, model.tune),
            Part(self._chunks, self._rehearse_chunks, partial(model.tune, logits=False)),
        )

    def submit(self, plan: StepPlan) -> InFlight | Done:
        """Queue the step. Waits for it where the host has to draw for a sequence.

        After an exception the next plan must not build on those before.
        """
        with self._lane.scope(), torch.inference_mode():
            try:
                return self._submit(plan)
            except BaseException:
                self._forget()
                raise

    def _submit(self, plan: StepPlan) -> InFlight | Done:
        if self.host_blocks is not None:
            self.host_blocks.run(plan)
        if plan.copies:
            pairs = self._lane.send(np.array(plan.copies, dtype=np.int32))
            ops.copy_blocks(self._kv_cache.flatten(0, 1), pairs.long())
        inputs = self._rows.advance(plan)
        self._note_rows(plan)
        tokens = self._graph_tokens(inputs)
        if tokens is not None:
            inputs.sent.append(padding(self._space.layout, inputs.num_sequences, tokens))
        self._send(inputs.sent)
        for row, share in inputs.fresh:
            begin(self._space.adjustments, row, share, self._eos_token_ids)
        if not inputs.num_sequences:
            return Done(StepResult([]))
        of_prompts: Mapping[int, list[TokenLogprobs]] = {}
        if inputs.has_chunks:
            of_prompts = self._run_chunks(plan, inputs, tokens)
        elif inputs.num_sequences <= self._graphs.largest:
            self._graphs.run(self._graphs.ready(inputs.num_sequences))
        else:
            self._decode(inputs.num_sequences)
        shares, wanted = self._asked(plan, inputs)
        by_host, of_tokens = self._draw_by_host(shares)
        fetched = self._fetch(inputs.num_sequences, wanted)
        size, places = inputs.num_sequences, inputs.drawn
        return InFlight(fetched, size, places, wanted, by_host, of_tokens, of_prompts)

    def _forget(self) -> None:
        """Whoever was interrupted may go on with other requests: begin with what the device has."""
        self._rows.reset()
        self._by_host.clear()
        self._logprobs.clear()
        with contextlib.suppress(RuntimeError):  # the device itself is lost
            self._steps = int(self._space.counter)

    def prepare_one(self) -> bool:
        """Use an idle moment for a step to come; False when nothing is left to prepare."""
        with self._lane.scope(), torch.inference_mode():
            return self._graphs.prepare_one() or self._chunk_graphs.prepare_one()

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
        if self._model.plans_attention(size, self._kv_cache):
            ops.plan_attention(self._space.attention, self._space.buffers.seq_lens[:size], size)
        batch = self._batch(StepInputs(size, size, size, 1), self._space.one_each)
        self._model.decode(batch, self._kv_cache, self._space.logits[:size])

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

    def _batch(self, inputs: StepInputs, query_start: torch.Tensor) -> Batch:
        """The buffers, as far as the step needs them."""
        out, sequences, tokens = self._space.buffers, inputs.num_sequences, inputs.num_tokens
        return Batch(
            token_ids=out.token_ids[:tokens],
            positions=out.positions[:tokens],
            slots=tuple(slots[:tokens] for slots in out.slots),
            query_start=query_start[: sequences + 1],
            seq_lens=out.seq_lens[:sequences],
            block_tables=tuple(tables[:sequences] for tables in out.block_tables),
            logit_rows=None,
            num_decodes=inputs.num_decodes,
            max_query_len=inputs.max_query_len,
            attention_work=self._space.attention,
        )

    # Steps with chunks of prompts.

    def _graph_tokens(self, inputs: StepInputs) -> int | None:
        """The tokens of the graph that takes a step with chunks, with one more sequence as padding;
        None where there is none. Nothing of the step may be on the device yet.
        """
        room = inputs.num_sequences < self._space.layout.max_rows
        if not (inputs.has_chunks and room and inputs.num_tokens <= self._chunk_graphs.largest):
            return None
        return self._chunk_graphs.ready(inputs.num_tokens)

    def _run_chunks(
        self, plan: StepPlan, inputs: StepInputs, tokens: int | None
    ) -> Mapping[int, list[TokenLogprobs]]:
        """Each sequence's last token gives a row of logits, whether it is wanted or not.

        By the graph of so many `tokens`, or where there is none one operation after the other.
        """
        space, size = self._space, inputs.num_sequences
        starts = space.state.query_start
        logit_rows = starts[1 : size + 1].long() - 1
        if inputs.prompt_rows:
            of_prompts = torch.tensor(inputs.prompt_rows, device=starts.device)
            logit_rows = torch.cat((logit_rows, of_prompts))
        self._plan_chunks(space.state, inputs, tokens)
        if tokens is None:
            attended = self._model.body(self._batch(inputs, starts), self._kv_cache)
        else:
            self._chunk_graphs.run(tokens)
            attended = space.attended
        hidden = self._model.tail(attended, logit_rows)
        self._model.raw_logits(hidden[:size], space.logits[:size])
        self._record(size)
        return prompt_logprobs(plan.chunks, hidden[size:], self._model.logits)

    def _plan_chunks(self, state: BatchState, inputs: StepInputs, tokens: int | None) -> None:
        """The inputs and the plan of attention, with those of the padding where there are any."""
        out, size = self._space.buffers, inputs.num_sequences + (tokens is not None)
        batch_state.build_inputs(state, out, size, self._block_size, one_token=False)
        ops.plan_attention(
            self._space.attention,
            out.seq_lens[:size],
            inputs.num_decodes,
            query_start=state.query_start[: size + 1],
            tokens=inputs.num_tokens if tokens is None else tokens,
            max_query_len=inputs.max_query_len,
            max_seq_len=inputs.max_chunk_end,
            for_graph=tokens is not None,
        )

    def _chunks(self, tokens: int) -> None:
        """What every token of the step that was planned last needs, whichever sequence's it is."""
        rows = self._space.layout.max_rows
        batch = self._batch(StepInputs(rows, tokens, 0, tokens), self._space.state.query_start)
        found = self._model.body(batch, self._kv_cache)
        for kept, one in zip(self._space.attended, found, strict=True):
            if kept is not None and one is not None:
                kept[:tokens].copy_(one)

    def _rehearse_chunks(self, tokens: int) -> None:
        """The same for nobody: all tokens are padding."""
        nobody = self._space.nobody
        nobody.query_start.fill_(tokens)[:1].zero_()
        self._plan_chunks(nobody, StepInputs(0, tokens, 0, tokens), tokens)
        self._chunks(tokens)

    # What else is wanted of some.

    def _note_rows(self, plan: StepPlan) -> None:
        """Keep in mind which rows want more than a token drawn by the device."""
        if len(plan.rows.joined) == plan.rows.count:  # the others may be another scheduler's
            self._by_host.clear()
            self._logprobs.clear()
        for seq_id in plan.rows.left:
            self._by_host.discard(seq_id)
            self._logprobs.pop(seq_id, None)
        for share in plan.rows.joined:
            if _needs_host(share.params):
                self._by_host.add(share.seq_id)
            elif share.params.logprobs is not None:
                self._logprobs[share.seq_id] = share.params.logprobs

    def _asked(
        self, plan: StepPlan, inputs: StepInputs
    ) -> tuple[dict[int, ScheduledSequence], _Wanted]:
        """By place in the batch the shares that the host draws for, and whose log-probabilities of
        the device are wanted.
        """
        by_host: dict[int, ScheduledSequence] = {}
        places, seq_ids, counts = list[int](), list[int](), list[int]()
        if self._logprobs:
            for place, seq_id in self._rows.places(self._logprobs):
                places.append(place)
                seq_ids.append(seq_id)
                counts.append(self._logprobs[seq_id])
        drawing = (share for share in plan.chunks if share.samples)
        params, host = None, False
        for place, share in zip(inputs.drawn[plan.rows.count :], drawing, strict=True):
            if share.params is not params:  # a request's branches have theirs in common
                params = share.params
                host = _needs_host(params)
            if host:
                by_host[place] = share
            elif params.logprobs is not None:
                places.append(place)
                seq_ids.append(share.seq_id)
                counts.append(params.logprobs)
        if self._by_host:
            rows = plan.sequences
            by_host |= {at: rows[at] for at, _ in self._rows.places(self._by_host)}
        return by_host, _Wanted(places, seq_ids, counts)

    def _fetch(self, size: int, wanted: _Wanted) -> Fetch:
        """Fetch the tokens of the batch's sequences, and the log-probabilities that are wanted."""
        tokens = self._space.drawn[self._steps % 2, :size]
        self._steps += 1
        if not wanted.places:
            return self._lane.fetch(tokens)
        return self._lane.fetch(torch.cat((tokens, self._logprob_words(wanted, tokens))))

    def _logprob_words(self, wanted: _Wanted, tokens: torch.Tensor) -> torch.Tensor:
        spec = self._model.spec
        columns = np.array((wanted.places, wanted.counts), dtype=np.int32)
        places, counts = self._lane.send(columns)
        at = places.long()
        found = sampling.token_logprobs(
            self._space.logits[at],
            tokens[at],
            counts.contiguous(),
            wanted.most,
            scale=spec.logit_scale,
            softcap=spec.logit_softcap,
        )
        top = found.top_ids.flatten(), found.top_logprobs.view(torch.int32).flatten()
        return torch.cat((found.logprob.view(torch.int32), found.rank, *top))

    def _draw_by_host(
        self, shares: Mapping[int, ScheduledSequence]
    ) -> tuple[Mapping[int, int], Mapping[int, TokenLogprobs]]:
        """Draw again for those whose parameters the device does not serve, and tell it.

        `shares` are by place in the batch; so are the tokens, and the log-probabilities by id.
        """
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


def _needs_host(params: SamplingParams) -> bool:
    """True when the device does not do all that is wanted of a draw."""
    return drawn_by_host(params) or (params.logprobs or 0) > MOST_LOGPROBS
