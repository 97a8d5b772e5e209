"""A runner without a model: the next token is a pure function of the tokens before it.

It keeps its own KV cache (the token written to each slot) and reads the context back through the
block tables, so that a wrong table, start or slot changes the tokens that come out.
"""

from __future__ import annotations

import hashlib
import time

from octavo.core.step import StepResult

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
    device = "cpu"
    dtype_name = "float32"

    def __init__(self, model_path, *, device, dtype, max_model_len, block_size, progress, **_):
        self.max_model_len = max_model_len or type(self).max_model_len
        self.block_size = block_size
        self.slots = []
        self.steps = 0
        progress("weights", 0.5)
        progress("weights", 1.0)

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

    def execute(self, plan):
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


class SlowRunner(FakeRunner):
    """A step takes 20 ms."""

    def execute(self, plan):
        time.sleep(0.02)
        return super().execute(plan)


class BrokenRunner(FakeRunner):
    """Dies at its tenth step."""

    def execute(self, plan):
        if self.steps == 9:
            raise RuntimeError("device fell off the bus")
        return super().execute(plan)


def refusing(message_class="ModelError"):
    def make(model_path, **_):
        from octavo import errors

        raise getattr(errors, message_class)(f"{model_path}/config.json: not a model")

    return make


invalid_model = refusing("ModelError")
retryable_failure = refusing("OctavoError")


class LeakyRunner(FakeRunner):
    """Reaches into the plan and gives a block away, as a bug in the core would."""

    def execute(self, plan):
        drawn = super().execute(plan)
        if self.steps == 5:
            plan.sequences[0].block_table.append(30)
        return drawn
