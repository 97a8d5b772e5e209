"""A runner without a model: the next token is a pure function of the tokens before it.

It keeps its own KV cache (the token written to each slot) and reads the context back through the
block tables, so that a wrong table, start or slot changes the tokens that come out. As a device
does, it takes what it needs when a step is submitted, and runs the steps later, in order.
"""

import atexit
import hashlib
import itertools
import time
from collections import deque

import msgspec

from octavo.core.step import PENDING, StepPlan, StepResult
from octavo.errors import DeviceError

EMPTY = -1


def next_token(tokens, vocab_size, branch=0):
    """The token that follows `tokens` in one of several samples."""
    digest = hashlib.blake2b(repr((branch, *tokens)).encode(), digest_size=4).digest()
    return int.from_bytes(digest) % vocab_size


class FakeRunner:
    max_model_len = 512
    vocab_size = 97
    eos_token_ids = (3,)
    kv_bytes_per_block = 1024
    kv_windows = (None,)
    large_step = None
    device = "cpu"
    dtype_name = "float32"

    def __init__(self, model_path, *, device, dtype, max_model_len, block_size, progress, **_):
        self.max_model_len = max_model_len or type(self).max_model_len
        self.block_size = block_size
        self.slots = []
        self.steps = 0
        self.queue = deque()
        self.drawn = {}
        self.rows = RowMirror()
        progress("weights", 0.5)
        progress("weights", 1.0)

    def prepare_one(self):
        return False

    def free_memory_for_kv(self, gpu_memory_utilization):
        return int(2**20 * gpu_memory_utilization)

    def allocate_kv(self, num_blocks):
        self.slots = [EMPTY] * (num_blocks * self.block_size)

    def allocate_swap(self, num_blocks):
        self.host = [EMPTY] * (num_blocks * self.block_size)
        return 1e-9

    def swap(self, plan):
        size = self.block_size
        for source, target in plan.swap_out:
            self.host[target * size : (target + 1) * size] = self.slots[source * size :][:size]
        for source, target in plan.swap_in:
            self.slots[target * size : (target + 1) * size] = self.host[source * size :][:size]

    def submit(self, plan):
        assert plan.sequences, "an empty step"
        self.rows.follow(plan)
        copied = [
            msgspec.structs.replace(s, token_ids=list(s.token_ids), block_table=list(s.block_table))
            for s in plan.sequences
        ]
        self.queue.append(
            StepPlan(tuple(copied), plan.copies, swap_out=plan.swap_out, swap_in=plan.swap_in)
        )
        assert len(self.queue) <= 2, "more than two steps in flight"
        return self.queue[-1]

    def collect(self, step):
        assert self.queue.popleft() is step, "steps are collected in order"
        for share in step.sequences:
            if share.token_ids[-1] == PENDING:
                share.token_ids[-1] = self.drawn[share.seq_id]
        result = self.run(step)
        sampling = [share.seq_id for share in step.sequences if share.samples]
        if len(sampling) == len(result.tokens):
            self.drawn = dict(zip(sampling, result.tokens, strict=True))
        return result

    def execute(self, plan):
        return self.collect(self.submit(plan))

    def run(self, plan):
        self.steps += 1
        self.swap(plan)
        drawn = []
        for source, destination in plan.copies:
            size = self.block_size
            self.slots[destination * size : (destination + 1) * size] = self.slots[
                source * size : (source + 1) * size
            ]
        tables = [self._slots(s.block_table, s.start + len(s.token_ids)) for s in plan.sequences]
        # As on a device: all that the step writes is written before anything is read.
        for share, slots in zip(plan.sequences, tables, strict=True):
            for slot, token in zip(slots[share.start :], share.token_ids, strict=True):
                if share.writes:
                    self.slots[slot] = token
        for share, slots in zip(plan.sequences, tables, strict=True):
            if share.samples:
                context = [self.slots[slot] for slot in slots]
                drawn.append(next_token(context, self.vocab_size, share.branch))
        return StepResult(drawn)

    def _slots(self, block_table, stop):
        return [self._slot(block_table, position) for position in range(stop)]

    def _slot(self, block_table, position):
        block = block_table[position // self.block_size]
        assert block != 0, "the null block is not for tokens"
        return block * self.block_size + position % self.block_size


class RowMirror:
    """Rows as a device keeps them: told only what changes, and compared with what is true."""

    def __init__(self):
        self.shares = {}

    def follow(self, plan):
        rows = plan.rows
        if rows.count == len(rows.joined):
            self.shares.clear()
        else:
            for seq_id in rows.left:
                del self.shares[seq_id]
        for seq_id, share in self.shares.items():
            self.shares[seq_id] = msgspec.structs.replace(
                share, start=share.start + 1, num_generated=share.num_generated + 1
            )
        for seq_id, block in rows.grown:
            self.shares[seq_id].block_table.append(block)
        for share in rows.joined:
            assert share.seq_id not in self.shares
            table = list(share.block_table)
            self.shares[share.seq_id] = msgspec.structs.replace(share, block_table=table)
        assert len(self.shares) == rows.count
        assert rows.context == sum(share.start for share in self.shares.values())
        for share in plan.sequences[: rows.count]:
            table = self.shares[share.seq_id].block_table
            # What lies behind a window is given up without a word.
            table[:] = [
                -1 if true == -1 else told
                for told, true in itertools.zip_longest(table, share.block_table)
            ]
        true = [self.known(share) for share in plan.sequences[: rows.count]]
        assert [self.known(share) for share in self.shares.values()] == true
        chunks = {share.seq_id for share in plan.chunks}
        assert not chunks & set(self.shares), "a row has a chunk too"

    @staticmethod
    def known(share):
        assert len(share.token_ids) == 1
        assert share.samples
        assert share.writes
        return share.seq_id, share.start, share.block_table, share.num_generated, share.params


class SlowRunner(FakeRunner):
    """A step takes 20 ms."""

    def run(self, plan):
        time.sleep(0.02)
        return super().run(plan)


class BrokenRunner(FakeRunner):
    """Dies at its tenth step."""

    def run(self, plan):
        if self.steps == 9:
            raise RuntimeError("device fell off the bus")
        return super().run(plan)


class LostDeviceRunner(FakeRunner):
    """Loses its device at the tenth step; after that nothing about it ends in order."""

    def run(self, plan):
        if self.steps == 9:
            atexit.register(time.sleep, 60)
            raise DeviceError("it fell off the bus")
        return super().run(plan)


class PreparingRunner(FakeRunner):
    """Has three things to prepare, and tells of each."""

    prepared = 0

    def __init__(self, *args, progress, **more):
        super().__init__(*args, progress=progress, **more)
        self.progress = progress

    def prepare_one(self):
        self.prepared += 1
        self.progress(str(self.prepared), 0.0)
        return self.prepared < 3


def refusing(message_class="ModelError"):
    def make(model_path, **_):
        from octavo import errors

        raise getattr(errors, message_class)(f"{model_path}/config.json: not a model")

    return make


invalid_model = refusing("ModelError")
retryable_failure = refusing("OctavoError")


class LeakyRunner(FakeRunner):
    """Reaches into the plan and gives a block away, as a bug in the core would."""

    def submit(self, plan):
        step = super().submit(plan)
        if self.steps == 4:
            plan.sequences[0].block_table.append(30)
            self.rows.follow = lambda plan: None  # which would see it at once
        return step
