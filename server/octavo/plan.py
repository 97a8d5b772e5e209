"""The memory plan: pure arithmetic over a model's shape, for the engine and for the operator.

Standard library only; the operator may import this module and nothing else of the server.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from octavo.checkpoint import read_checkpoint

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MIB = 1 << 20
GIB = 1 << 30

# On a CPU the pool shares memory with all else; more than this has to be asked for.
DEFAULT_HOST_POOL_BYTES = GIB
# What a host keeps back for activations, the allocator and the process itself.
HOST_RESERVE_BYTES = 256 * MIB


@dataclass(slots=True, frozen=True)
class KvShape:
    """What decides the size of a token's keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """A key and a value in every layer."""
        elements = 2 * self.num_layers * self.num_kv_heads * self.head_dim
        return elements * DTYPE_BYTES[self.dtype]


def kv_bytes_per_block(shape: KvShape, block_size: int) -> int:
    """Bytes of one block across all layers, keys and values."""
    return shape.bytes_per_token * block_size


# Tensors that a checkpoint may carry and that are not loaded; the output matrix only when it is
# the embedding once more.
IDLE_TENSORS = (
    "rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
    ".attention.masked_bias",
)  # fmt: skip
OUTPUT_MATRIX = "lm_head.weight"


def weights_bytes(folder: Path, dtype: str | None = None, *, tied: bool = False) -> int:
    """Bytes of the checkpoint's tensors, as stored or once loaded as `dtype`.

    `tied` says that the model uses its embedding as output matrix.
    """
    idle = (*IDLE_TENSORS, OUTPUT_MATRIX) if tied else IDLE_TENSORS
    total = 0
    for name, entry in read_checkpoint(folder).items():
        if name.endswith(idle):
            continue
        if dtype is None:
            total += entry.num_bytes
        else:
            total += math.prod(entry.shape) * DTYPE_BYTES[dtype]
    return total


# How far what an engine takes may lie from what the plan says.
PLAN_TOLERANCE = 0.03


def deviation(planned_bytes: int, taken_bytes: int) -> str | None:
    """A sentence where an engine took more or less than planned by more than the tolerance."""
    if abs(taken_bytes - planned_bytes) <= PLAN_TOLERANCE * planned_bytes:
        return None
    return (
        f"weights and KV pool take {taken_bytes / MIB:.1f} MiB, but the memory plan says "
        f"{planned_bytes / MIB:.1f} MiB: `octavo plan` is wrong about this model by more than "
        f"{PLAN_TOLERANCE:.0%}; please report it with its config.json"
    )


# What captured steps take of a GPU for themselves, and the most tokens of one.
GRAPH_BYTES = 512 * MIB
GRAPH_TOKENS = 2048


# A step that nobody's next token waits for may have so many times the tokens of others, and up to
# so many: the products of llama-8b on an H100 give a prompt's tokens 3.5 % faster in steps of 8,192
# than of 2,048, and nothing is known to be gained beyond.
LARGE_STEPS = 4
LARGE_STEP_TOKENS = 8192
# What it takes beyond others is taken from the KV cache, which is worth more: of the device's
# memory at most this share.
LARGE_STEP_SHARE = 0.01


def token_bytes(
    *, hidden_size: int, query_size: int, kv_size: int, intermediate_size: int, dtype: str
) -> int:
    """What a token of a step holds at once: residual, one layer's widest part. From above."""
    widest = max(2 * query_size + 2 * kv_size, 3 * intermediate_size)
    return (2 * hidden_size + widest) * DTYPE_BYTES[dtype]


def large_step(
    tokens: int, bytes_each: int, total_bytes: int, windows: Collection[int | None]
) -> int:
    """Tokens of the largest step where others have up to `tokens`, on a device of so many bytes.

    `windows` are those of the cache's groups: blocks of one are promised for usual chunks, so with
    windows there are no larger ones.
    """
    if any(window is not None for window in windows):
        return tokens
    spare = int(LARGE_STEP_SHARE * total_bytes) // (tokens * bytes_each)
    most = max(1, LARGE_STEP_TOKENS // tokens)
    return tokens * min(LARGE_STEPS, most, 1 + spare)


def graph_pool_bytes(step_bytes: int) -> int:
    """What captured steps share for what the largest of them needs in between, `step_bytes`: it
    does not lie as closely as it is counted.
    """
    return step_bytes * 5 // 4


def host_pool_bytes(available_bytes: int, utilization: float) -> int:
    """Bytes of host memory for the KV pool, of what is available after the weights are loaded.

    A utilization of 1 asks for all there is; below that the pool stays modest.
    """
    most = max(0, available_bytes - HOST_RESERVE_BYTES)
    return most if utilization >= 1.0 else min(DEFAULT_HOST_POOL_BYTES, int(most * utilization))


def device_pool_bytes(total_bytes: int, free_bytes: int, utilization: float) -> int:
    """Bytes of device memory for the KV pool: `utilization` of the total, less what is used."""
    return max(0, int(free_bytes - (1.0 - utilization) * total_bytes))
