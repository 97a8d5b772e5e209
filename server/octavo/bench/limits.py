"""The least time that a workload can take: bytes and operations over what the machine can do.

A decode step reads every weight once, or computes all its products, whichever is longer, and reads
the keys and values of every running sequence; a prompt costs its products. Nothing else counts, so
no engine reaches it. All requests are admitted at once: more than memory may allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.bench.workloads import Request

_BYTES = 2  # of a number in bfloat16


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What a machine was measured to do: bytes a second (copy), operations a second (bf16)."""

    bandwidth: float
    flops: float


def matmul_parameters(config: Mapping[str, Any]) -> int:
    """Weights that one token is multiplied with."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
    layer = hidden * dim * heads + 3 * hidden * config["intermediate_size"]
    return int(layer * config["num_hidden_layers"] + hidden * config["vocab_size"])


def kv_bytes_per_token(config: Mapping[str, Any]) -> int:
    """Keys and values of one token in all layers."""
    heads = config["num_key_value_heads"] * config["head_dim"]
    return int(2 * _BYTES * config["num_hidden_layers"] * heads)


def least_seconds(
    config: Mapping[str, Any], requests: Sequence[Request], ceilings: Ceilings
) -> float:
    """The least time for all requests."""
    parameters = matmul_parameters(config)
    per_token = 2 * parameters / ceilings.flops
    weights = _BYTES * parameters / ceilings.bandwidth
    kv = kv_bytes_per_token(config) / ceilings.bandwidth
    seconds = sum(len(request.prompt) for request in requests) * per_token
    for step in range(max(request.output for request in requests)):
        running = [len(r.prompt) + step for r in requests if r.output > step]
        seconds += max(weights, len(running) * per_token) + sum(running) * kv
    return seconds
