"""Tables of cosines and sines for every kind of rotary position embedding."""

from __future__ import annotations

import math

import torch

from octavo.models.spec import RopeSpec


def rope_table(rope: RopeSpec, rotary_dim: int, max_positions: int) -> torch.Tensor:
    """Row p: cosines of position p for each frequency, then its sines.

    Longrope has one table for sequences within the original length and one for those beyond;
    which one holds follows from the longest sequence that is served, not from each sequence, so
    that cached keys stay valid while a sequence grows.
    """
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequency = rope.theta**-exponent
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        frequency = _llama3(frequency, rope)
    elif rope.kind == "yarn":
        frequency = _yarn(frequency, rope, rotary_dim)
    elif rope.kind == "longrope":
        beyond = max_positions > rope.original_max_positions
        frequency = frequency / torch.tensor(rope.long_factor if beyond else rope.short_factor)
    angle = torch.outer(torch.arange(max_positions).float(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=-1) * rope.magnitude


def _llama3(frequency: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequency / rope.factor + kept * frequency


def _yarn(frequency: torch.Tensor, rope: RopeSpec, rotary_dim: int) -> torch.Tensor:
    """As llama3, but blended linearly in the wave's number instead of its frequency."""

    def number(turns: float) -> float:
        """Which wave makes this many turns over the original length."""
        length = rope.original_max_positions / (turns * 2 * math.pi)
        return rotary_dim * math.log(length) / (2 * math.log(rope.theta))

    first, last = number(rope.beta_fast), number(rope.beta_slow)
    if rope.truncate:
        first, last = float(math.floor(first)), float(math.ceil(last))
    first, last = max(first, 0.0), min(last, rotary_dim - 1.0)
    width = last - first or 0.001
    stretched = ((torch.arange(len(frequency)) - first) / width).clamp(0, 1)
    return stretched * frequency / rope.factor + (1 - stretched) * frequency
