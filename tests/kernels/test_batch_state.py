"""The batch's state: the reference against arrays built in plain Python, a GPU against both."""

import struct

import numpy as np
import pytest
import torch
from gpu import needs_gpu

from octavo_kernels import batch_state, ops
from octavo_kernels.batch_state import BatchState, StepBuffers
from octavo_kernels.record import FLAG_SAMPLES, FLAG_WRITES, RECORD_WORDS

ROWS, WIDTH, TOKENS, ABSURD = 6, 8, 64, -77777
DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]


def make(device, groups, block_size, random):
    """A state whose unused entries are absurd, its rows as dicts, and buffers full of rubbish."""

    def full(*shape, dtype=torch.int32, value=ABSURD):
        return torch.full(shape, value, dtype=dtype, device=device)

    entries = WIDTH * groups
    state = BatchState(
        full(ROWS, RECORD_WORDS), full(ROWS, entries), full(ROWS), full(ROWS), full(ROWS + 1),
        full(TOKENS),
    )  # fmt: skip
    rows = []
    for row in range(ROWS):
        position = int(random.integers(0, WIDTH * block_size - TOKENS // ROWS))
        rows.append({
            "token": int(random.choice([-1, 5, 900])),
            "position": position,
            "generated": int(random.integers(0, 9)),
            "flags": int(random.integers(0, 4)),
            "stream": int(random.integers(0, 2**63)) * 2 + 1,
            "temperature": float(np.float32(random.random())),
            "top_k": int(random.choice([-1, 40])),
            "top_p": 0.5,
            "min_p": 0.25,
            "adjusted": int(random.choice([-1, row])),
            "table": random.integers(1, 99, entries).tolist(),
        })  # fmt: skip
        own = rows[-1]
        packed = struct.pack(
            "<4iQfiffi", own["token"], position, own["generated"], own["flags"], own["stream"],
            own["temperature"], own["top_k"], own["top_p"], own["min_p"],
            own["adjusted"],
        )  # fmt: skip
        words = torch.tensor(struct.unpack("<11i", packed), dtype=torch.int32)
        state.records[row, :11] = words.to(device)
        if position >= block_size:
            own["table"][0] = -1  # given up behind a window
        state.tables[row] = torch.tensor(own["table"], dtype=torch.int32, device=device)
    ints = {"dtype": torch.int64}
    out = StepBuffers(
        full(TOKENS, **ints), full(TOKENS, **ints), full(groups, TOKENS, **ints), full(ROWS),
        full(groups, ROWS, WIDTH), *(full(ROWS, dtype=torch.float32) for _ in range(1)),
        full(ROWS), full(ROWS, dtype=torch.float32), full(ROWS, dtype=torch.float32),
        full(ROWS, **ints), full(ROWS, **ints), full(ROWS),
    )  # fmt: skip
    return state, rows, out


def check(state, rows, out, batch, chunks, block_size, groups):
    """Each sequence's part of the buffers, and where its row went on to."""
    begin = 0
    for i, (row, chunk) in enumerate(zip(batch, chunks, strict=True)):
        if row < 0:
            assert out.seq_lens[i] == 0
            assert out.slots[:, begin].eq(-1).all()
            assert out.token_ids[begin] == 0
            assert (out.temperature[i], out.adjusted[i]) == (0, -1)
            begin += 1
            continue
        own = rows[row]
        tokens = [own["token"] if t < 0 else t for t in (chunk or [own["token"]])]
        end, stop = begin + len(tokens), own["position"] + len(tokens)
        positions = list(range(own["position"], stop))
        assert out.token_ids[begin:end].tolist() == [max(0, t) for t in tokens]
        assert out.positions[begin:end].tolist() == positions
        assert out.seq_lens[i] == stop
        covering = -(-stop // block_size)
        for g in range(groups):
            table = own["table"][g::groups]
            assert out.block_tables[g, i, :covering].tolist() == table[:covering]
            assert out.block_tables[g, i, covering:].eq(ABSURD).all()
            expected = [
                table[p // block_size] * block_size + p % block_size
                if own["flags"] & FLAG_WRITES and table[p // block_size] >= 0
                else -1
                for p in positions
            ]
            assert out.slots[g, begin:end].tolist() == expected
        if own["flags"] & FLAG_SAMPLES:
            assert out.temperature[i] == own["temperature"]
            assert out.stream[i].item() % 2**64 == own["stream"]
            assert out.count[i] == own["generated"]
            assert out.adjusted[i] == own["adjusted"]
            assert (out.top_k[i], out.top_p[i], out.min_p[i]) == (own["top_k"], 0.5, 0.25)
        else:
            assert (out.temperature[i], out.top_k[i], out.top_p[i]) == (0, -1, 1)
            assert out.adjusted[i] == -1
        samples = own["flags"] & FLAG_SAMPLES
        record = [own["token"], stop, own["generated"] + samples, own["flags"] | FLAG_WRITES]
        assert state.records[row, :4].tolist() == record
        begin = end
    assert out.token_ids[begin:].eq(ABSURD).all()
    assert out.slots[:, begin:].eq(ABSURD).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("one_token", [True, False])
def test_inputs_are_those_of_plain_python(device, groups, one_token) -> None:
    random = np.random.default_rng(groups)
    for block_size in (8, 16):
        state, rows, out = make(device, groups, block_size, random)
        batch = [3, 0, -1, 5] if one_token else [3, 5, 0, 2]
        chunks = [None] * 4 if one_token else [None, None, [7, 8, 9, -3], list(range(10))]
        state.batch[:4] = torch.tensor(batch, dtype=torch.int32)
        if not one_token:
            starts = np.cumsum([0, *(len(c or [0]) for c in chunks)])
            state.query_start[:5] = torch.tensor(starts)
            state.token_at[:4] = torch.tensor([-1, -1, 0, 4])
            state.chunk[:14] = torch.tensor([*chunks[2], *chunks[3]])
        batch_state.build_inputs(state, out, 4, block_size, one_token=one_token)
        check(state, rows, out, batch, chunks, block_size, groups)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_go_to_the_records_of_those_that_sample(device) -> None:
    state, rows, _ = make(device, 1, 8, np.random.default_rng(0))
    for row, flags in ((4, FLAG_SAMPLES), (1, 0)):
        state.records[row, 3] = flags
    state.batch[:3] = torch.tensor([4, -1, 1], dtype=torch.int32)
    drawn = torch.full((2, ROWS), ABSURD, dtype=torch.int32, device=device)
    counter = torch.zeros(1, dtype=torch.int32, device=device)
    for step in range(3):
        tokens = torch.tensor([10 + step, 20, -1], dtype=torch.int32, device=device)
        batch_state.record_tokens(state, tokens, drawn, counter)
        assert drawn[step % 2].tolist() == [10 + step, 20, -1, *[ABSURD] * 3]
        assert state.records[:, 0].tolist() == [
            10 + step if row == 4 else own["token"] for row, own in enumerate(rows)
        ]
    assert counter.item() == 3
    assert drawn[1].tolist()[0] == 11


@pytest.mark.parametrize("device", DEVICES)
def test_updates_write_their_words_and_nothing_else(device) -> None:
    random = np.random.default_rng(1)
    words = torch.full((5000,), ABSURD, dtype=torch.int32, device=device)
    expected = words.clone()
    head, body = [], []
    lengths = [1, 700, 0, 129, 3]
    for to, length in zip((4999, 100, 50, 2000, 0), lengths, strict=True):
        piece = random.integers(-(2**31), 2**31, length).tolist()
        head += [to, length, 1 + 3 * len(lengths) + len(body)]
        body += piece
        expected[to : to + length] = torch.tensor(piece, dtype=torch.int32)
    message = torch.tensor([len(lengths), *head, *body], dtype=torch.int32, device=device)
    batch_state.apply_updates(words, message, len(lengths))
    assert torch.equal(words, expected)
    if device == "cuda":
        assert ops.calls["apply_updates", "cuda"]


def test_wrong_tables_are_named() -> None:
    state, _, out = make("cpu", 2, 8, np.random.default_rng(0))
    narrow = StepBuffers(*(getattr(out, name) for name in StepBuffers.__slots__))
    object.__setattr__(narrow, "block_tables", out.block_tables[:, :, :3].contiguous())
    with pytest.raises(ValueError, match="2 groups of 3 blocks do not make up a table of 16"):
        batch_state.build_inputs(state, narrow, 1, 8, one_token=True)
    with pytest.raises(ValueError, match="7 sequences; a record has 16 and there are 6 rows"):
        batch_state.build_inputs(state, out, 7, 8, one_token=True)
