"""The host's picture of the device's rows: the inputs that changes alone lead to are those that a
step's plan says, for thousands of random plans."""

import msgspec
import numpy as np
import pytest
import torch

from octavo.core.step import NO_TOKEN, PENDING, Rows, ScheduledSequence, StepPlan
from octavo.engine.rows import RowTable, StateLayout, messages
from octavo.engine.sampler import draw_stream
from octavo.params import SamplingParams
from octavo_kernels import batch_state
from octavo_kernels.batch_state import BatchState, StepBuffers
from octavo_kernels.record import RECORD_WORDS

BLOCK, MAX_ROWS, WIDTH, MAX_TOKENS, SEED = 4, 7, 24, 64, 5
ABSURD = -(10**6)
LONGEST = WIDTH * BLOCK - 20
PLAIN, HOT = SamplingParams(temperature=0, seed=1), SamplingParams(temperature=2, seed=1)


class Device:
    """The words and what is built from them, by the reference operations."""

    def __init__(self, layout: StateLayout) -> None:
        self.words = torch.full((layout.num_words,), ABSURD, dtype=torch.int32)
        parts = (0, layout.tables, layout.batch, layout.token_at, layout.query_start, layout.chunk)
        ends = (*parts[1:], layout.num_words)
        records, tables, *rest = (self.words[a:b] for a, b in zip(parts, ends, strict=True))
        self.state = BatchState(
            records.view(MAX_ROWS, RECORD_WORDS), tables.view(MAX_ROWS, WIDTH), *rest
        )
        self.state.batch.fill_(-1)

        def full(*shape, dtype=torch.int32):
            return torch.full(shape, ABSURD, dtype=dtype)

        long, real = torch.int64, torch.float32
        self.out = StepBuffers(
            full(MAX_TOKENS, dtype=long), full(MAX_TOKENS, dtype=long),
            full(1, MAX_TOKENS, dtype=long), full(MAX_ROWS), full(1, MAX_ROWS, WIDTH),
            full(MAX_ROWS, dtype=real), full(MAX_ROWS), full(MAX_ROWS, dtype=real),
            full(MAX_ROWS, dtype=real), full(MAX_ROWS, dtype=long), full(MAX_ROWS, dtype=long),
            full(MAX_ROWS),
        )  # fmt: skip
        self.drawn = torch.zeros(2, MAX_ROWS, dtype=torch.int32)
        self.counter = torch.zeros(1, dtype=torch.int32)

    def receive(self, sent, capacity: int) -> None:
        touched: set[int] = set()
        for message in messages(sent, capacity):
            assert len(message) <= capacity
            for i in range(message[0]):
                to, length, _ = message[1 + 3 * i : 4 + 3 * i]
                words = set(range(to, to + length))
                assert not words & touched, "two stretches write one word, in no order"
                touched |= words
            batch_state.apply_updates(self.words, torch.from_numpy(message), int(message[0]))


class Sequence:
    def __init__(self, seq_id: int, random) -> None:
        self.seq_id = seq_id
        self.tokens = random.integers(0, 90, random.integers(1, 14)).tolist()
        self.prompt = len(self.tokens)
        self.computed = 0
        self.table: list[int] = []
        self.drew = False  # in the plan before
        self.params = SamplingParams(
            temperature=float(random.choice([0.0, 0.5, 1.25])),
            top_k=int(random.choice([-1, 3])),
            top_p=float(random.choice([0.5, 1.0])),
            seed=int(random.integers(9)) if random.integers(2) else None,
        )
        self.branch = int(random.integers(3))

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt

    def grow(self, count: int, random) -> list[int]:
        need = -(-(self.computed + count) // BLOCK) - len(self.table)
        new = random.integers(1, 1000, max(0, need)).tolist()
        self.table = self.table + new
        return new

    def share(self, count: int, random, *, writes=True) -> ScheduledSequence:
        ids = self.tokens[self.computed : self.computed + count]
        samples = self.computed + count == len(self.tokens)
        if self.drew and samples and random.integers(2):
            ids[-1] = PENDING
        return ScheduledSequence(
            self.seq_id, ids, self.computed, self.table, samples, self.params, self.generated,
            self.tokens, self.prompt, self.branch, writes,
        )  # fmt: skip


class World:
    """Makes random plans that follow from each other, as a scheduler's do."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.rows: list[Sequence] = []
        self.chunking: list[Sequence] = []  # in the last plan, or put aside
        self.ids = 0

    def plan(self) -> tuple[StepPlan, list[tuple[Sequence, ScheduledSequence]]]:
        """A plan, and each share of it, the rows' too, as it would be in full."""
        random = self.random
        left, joined, grown, full_rows = [], [], [], []
        chunks: list[tuple[Sequence, ScheduledSequence]] = []
        for sequence in list(self.rows):
            fate = random.integers(12)
            if fate == 0 or len(sequence.tokens) > LONGEST:  # it ended, or lost its blocks
                self.rows.remove(sequence)
                left.append(sequence.seq_id)
            elif fate == 1:  # it became a chunk: its blocks were copied or taken over
                self.rows.remove(sequence)
                left.append(sequence.seq_id)
                sequence.table = [int(b) for b in random.integers(1, 1000, len(sequence.table))]
                self.chunking.append(sequence)
        stay = list(self.rows)
        for sequence in stay:
            grown += [(sequence.seq_id, block) for block in sequence.grow(1, random)]
            full_rows.append((sequence, sequence.share(1, random)))
        places = MAX_ROWS - len(stay)
        for sequence in list(self.chunking):
            if places == 0 or random.integers(6) == 0:
                sequence.drew = False  # it sits this step out
                if random.integers(3) == 0:
                    sequence.computed, sequence.table = 0, []  # and is taken its blocks
                continue
            places -= 1
            pending = len(sequence.tokens) - sequence.computed
            if pending == 1 and sequence.generated and random.integers(3):
                sequence.grow(1, random)
                share = sequence.share(1, random)
                joined.append(share)
                full_rows.append((sequence, share))
                self.rows.append(sequence)
                self.chunking.remove(sequence)
                continue
            count = int(random.integers(1, min(pending, 9) + 1))
            sequence.grow(count, random)
            writes = bool(random.integers(4))
            chunks.append((sequence, sequence.share(count, random, writes=writes)))
        while places and random.integers(2):
            places -= 1
            sequence = Sequence(self.ids, random)
            self.ids += 1
            self.chunking.append(sequence)
            count = int(random.integers(1, sequence.prompt + 1))
            sequence.grow(count, random)
            chunks.append((sequence, sequence.share(count, random)))
        rows = Rows(len(full_rows), tuple(left), tuple(joined), tuple(grown))
        return StepPlan(tuple(s for _, s in chunks), rows=rows), full_rows + chunks

    def draw(self, shares, tokens: dict[int, int]) -> None:
        """Take in what the step drew."""
        for sequence in self.rows + self.chunking:
            sequence.drew = False
        for sequence, share in shares:
            sequence.computed += len(share.token_ids)
            if share.samples:
                # What came to nothing runs as 0.
                sequence.tokens.append(max(0, tokens[sequence.seq_id]))
                sequence.drew = True
        self.chunking = [s for s in self.chunking if len(s.tokens) < LONGEST]


def check(device: Device, inputs, full, deterministic: bool) -> None:
    """The buffers hold what the shares say, in the order of the batch."""
    out, begin = device.out, 0
    decodes = [
        len(s.token_ids) == 1 and not (deterministic and s.start < s.num_prompt_tokens)
        for _, s in full
    ]
    order = sorted(range(len(full)), key=lambda i: not decodes[i])
    assert inputs.num_sequences == len(full)
    assert inputs.num_decodes == sum(decodes)
    assert inputs.max_query_len == max(len(s.token_ids) for _, s in full)
    chunks = [s for (_, s), alone in zip(full, decodes, strict=True) if not alone]
    if chunks:
        assert inputs.max_chunk_end >= max(s.start + len(s.token_ids) for s in chunks)
    where = {index: place for place, index in enumerate(order)}
    assert list(inputs.drawn) == [where[i] for i, (_, s) in enumerate(full) if s.samples]
    for place, index in enumerate(order):
        sequence, share = full[index]
        count = len(share.token_ids)
        end = begin + count
        ids = sequence.tokens[share.start : share.start + count]
        assert out.token_ids[begin:end].tolist() == ids
        positions = range(share.start, share.start + count)
        assert out.positions[begin:end].tolist() == list(positions)
        assert out.seq_lens[place] == share.start + count
        table = share.block_table
        slots = [table[p // BLOCK] * BLOCK + p % BLOCK if share.writes else -1 for p in positions]
        assert out.slots[0, begin:end].tolist() == slots
        covering = -(-(share.start + count) // BLOCK)
        assert out.block_tables[0, place, :covering].tolist() == table[:covering]
        if share.samples:
            p = share.params
            assert out.count[place] == share.num_generated
            stream = draw_stream(p, SEED, share.seq_id, share.branch)
            assert out.stream[place].item() % 2**64 == stream
            assert (out.temperature[place], out.top_k[place]) == (p.temperature, p.top_k)
            assert (out.top_p[place], out.min_p[place]) == (p.top_p, 0)
        begin = end
    assert inputs.num_tokens == begin


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_changes_alone_lead_to_what_the_plan_says(seed, deterministic) -> None:
    layout = StateLayout(MAX_ROWS, WIDTH, MAX_TOKENS)
    table = RowTable(layout, BLOCK, SEED, deterministic=deterministic)
    device, world = Device(layout), World(seed)
    random = np.random.default_rng(seed)
    pending = mixed = alone = 0
    for _ in range(150):
        plan, full = world.plan()
        if not full:
            continue
        inputs = table.advance(plan)
        device.receive(inputs.sent, int(random.choice([9, 40, 4000])))
        one = not inputs.has_chunks
        alone += inputs.has_chunks and inputs.max_query_len == 1
        batch_state.build_inputs(
            device.state, device.out, inputs.num_sequences, BLOCK, one_token=one
        )
        check(device, inputs, full, deterministic)
        # Behind the batch there is padding, whatever size a graph has.
        assert device.state.batch[inputs.num_sequences :].eq(-1).all()
        tokens = random.integers(0, 90, inputs.num_sequences).astype(np.int32)
        tokens[random.random(len(tokens)) < 0.02] = NO_TOKEN
        batch_state.record_tokens(
            device.state, torch.from_numpy(tokens), device.drawn, device.counter
        )
        drawn = [int(tokens[place]) for place in inputs.drawn]
        sampled = [s.seq_id for s, share in full if share.samples]
        world.draw(full, dict(zip(sampled, drawn, strict=True)))
        pending += sum(share.token_ids[-1] == PENDING for _, share in full)
        mixed += not one
    assert min(pending, mixed) > 20
    assert (alone > 0) == deterministic


def share(seq_id, tokens, start=0, table=(1,), *, samples=True):
    return ScheduledSequence(seq_id, tokens, start, list(table), samples, SamplingParams(), 0)


def new_table() -> RowTable:
    return RowTable(StateLayout(2, 4, 16), BLOCK, SEED)


def test_a_quiet_step_sends_nothing() -> None:
    table = new_table()
    table.advance(StepPlan((share(3, [1, 2]),)))
    joined = Rows(1, joined=(share(3, [PENDING], 2),))
    assert table.advance(StepPlan(rows=joined)).sent
    assert table.advance(StepPlan(rows=Rows(1))).sent == []
    [(_, words)] = table.advance(StepPlan(rows=Rows(1, grown=((3, 77),)))).sent
    assert words == (77,)


def test_how_a_row_draws_follows_its_parameters() -> None:
    """Also where another scheduler had a sequence of that name, drawn otherwise. What stays as it
    is, is sent once.
    """
    table = new_table()
    words = []
    for params, branch in ((PLAIN, 0), (HOT, 0), (HOT, 1), (HOT, 1)):
        asked = msgspec.structs.replace(share(3, [5]), params=params, branch=branch)
        fresh = new_table().advance(StepPlan((asked,))).sent[0][1]
        words.append(table.advance(StepPlan((asked,))).sent[0][1])
        assert list(words[-1]) == list(fresh[: len(words[-1])])
    assert words[0] != words[1] != words[2]
    assert [len(each) for each in words] == [RECORD_WORDS] * 3 + [4]


def test_rows_of_another_scheduler_are_none_of_this_one_s() -> None:
    table = new_table()
    table.advance(StepPlan((share(0, [1, 2]), share(1, [1]))))
    table.advance(StepPlan(rows=Rows(2, joined=(share(0, [4], 2), share(1, [4], 1)))))
    # A new scheduler begins with sequence 0 again, and needs both rows.
    table.advance(StepPlan((share(0, [1, 2]), share(1, [7]))))
    inputs = table.advance(StepPlan(rows=Rows(1, joined=(share(0, [PENDING], 2),))))
    assert inputs.num_sequences == 1


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan((share(1, [PENDING], 3),)), "sequence 1 waits for a token that the plan before"),
        (StepPlan((share(0, [PENDING], 3),)), "sequence 0 waits for a token"),
        (StepPlan(rows=Rows(2, joined=(share(0, [5], 3),))), "the plan has 2 rows, but 1 follow"),
        (StepPlan(rows=Rows(1, left=(9,))), "sequence 9 left the rows, but was not among them"),
        (StepPlan(tuple(share(i, [5]) for i in range(3))), "more than 2 sequences in one step"),
        (StepPlan((share(0, [5] * 17, 0, [1] * 5),)), "table of 5 entries; 17 tokens need 5 and 4"),
        (StepPlan((share(0, [5], 4),)), "5 tokens need 2"),
        (
            StepPlan((share(0, [5] * 9, 0, [1] * 3), share(1, [5] * 9, 0, [1] * 3))),
            "a step of 18 tokens; 16 is the most",
        ),
    ],
)
def test_a_plan_that_does_not_follow_is_refused(plan, message) -> None:
    table = new_table()
    table.advance(StepPlan((share(0, [1, 2, 3], samples=False),)))
    with pytest.raises((RuntimeError, ValueError), match=message):
        table.advance(plan)
