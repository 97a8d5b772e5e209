"""The one decoder: a `DecoderSpec`, its parameters, and a forward over a flat batch of tokens.

On a CPU our own operations give a sequence the same bits whatever its batch mates, chunks, block
size or thread count. The matrix products are torch's, whose summation order may follow the number
of rows, so logits may differ in the last bits between batches; tokens then differ only where two
candidates are that close.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import embedding, linear

from octavo.models.spec import DecoderSpec, RopeSpec
from octavo_kernels import ops

Parameters = dict[str, torch.Tensor]


@dataclass(slots=True, frozen=True)
class Batch:
    """The tokens of one step, of all its sequences one after another.

    `slots` says where each token's key and value are stored. `query_start` (one entry more than
    sequences) delimits the sequences; `seq_lens` counts their tokens, cached ones included.
    `logit_rows` names the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    logit_rows: torch.Tensor


class Decoder:
    """A decoder-only model. Query, key and value share one matrix, so do gate and up."""

    def __init__(
        self, spec: DecoderSpec, parameters: Parameters, *, max_positions: int, device: torch.device
    ) -> None:
        self.spec = spec
        self.parameters = parameters
        self._rope_table = rope_table(spec.rope, spec.head_dim, max_positions).to(device)

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits (float32) of `batch.logit_rows`, all at once; see `hidden`."""
        return self.logits(self.hidden(batch, kv_cache))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (float32) of some rows of `hidden`'s result."""
        head = "embedding" if self.spec.tied_embeddings else "lm_head"
        return linear(hidden, self.parameters[head]).float()

    def hidden(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """The last layer's normed output of `batch.logit_rows`. Keys and values of the batch go to
        `kv_cache`, which is [layers, 2, blocks, block_size, kv_heads, head_dim].
        """
        spec, p = self.spec, self.parameters
        residual = embedding(batch.token_ids, p["embedding"])
        x = ops.rms_norm(residual, p["layers.0.input_norm"], spec.norm_eps)
        for layer in range(spec.num_layers):
            at = f"layers.{layer}."
            x = self._attention(at, x, batch, kv_cache[layer])
            x = ops.rms_norm(x, p[at + "post_norm"], spec.norm_eps, residual)
            x = self._linear(at + "gate_up", x)
            x = self._linear(at + "down", ops.act_and_mul(x, "silu"))
            if layer + 1 < spec.num_layers:
                norm = p[f"layers.{layer + 1}.input_norm"]
                x = ops.rms_norm(x, norm, spec.norm_eps, residual)
        last, carried = x[batch.logit_rows], residual[batch.logit_rows]
        return ops.rms_norm(last, p["norm"], spec.norm_eps, carried)

    def _attention(
        self, at: str, x: torch.Tensor, batch: Batch, kv_cache: torch.Tensor
    ) -> torch.Tensor:
        spec = self.spec
        qkv = self._linear(at + "qkv", x)
        q, k, v = torch.split(qkv, [spec.query_size, spec.kv_size, spec.kv_size], dim=-1)
        query = q.view(-1, spec.num_heads, spec.head_dim)
        key = k.view(-1, spec.num_kv_heads, spec.head_dim)
        value = v.view(-1, spec.num_kv_heads, spec.head_dim)
        ops.rope(query, key, batch.positions, self._rope_table)
        ops.write_kv(key, value, kv_cache[0], kv_cache[1], batch.slots)
        mixed = ops.paged_attention(
            query,
            kv_cache[0],
            kv_cache[1],
            batch.block_tables,
            batch.query_start,
            batch.seq_lens,
            spec.attention_scale,
        )
        return self._linear(at + "output", mixed.flatten(1))

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.parameters[name], self.parameters.get(name + ".bias"))


def parameter_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Every parameter of the decoder with its shape; biases are named after their matrix."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    qkv = spec.query_size + 2 * spec.kv_size
    shapes: dict[str, tuple[int, ...]] = {"embedding": (spec.vocab_size, hidden), "norm": (hidden,)}
    if not spec.tied_embeddings:
        shapes["lm_head"] = (spec.vocab_size, hidden)
    for layer in range(spec.num_layers):
        at = f"layers.{layer}."
        shapes[at + "input_norm"] = shapes[at + "post_norm"] = (hidden,)
        for name, rows, columns, bias in (
            ("qkv", qkv, hidden, spec.qkv_bias),
            ("output", hidden, spec.query_size, spec.output_bias),
            ("gate_up", 2 * inner, hidden, spec.mlp_bias),
            ("down", hidden, inner, spec.mlp_bias),
        ):
            shapes[at + name] = (rows, columns)
            if bias:
                shapes[at + name + ".bias"] = (rows,)
    return shapes


def empty_parameters(spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Parameters to be filled by the loader."""
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, shape in parameter_shapes(spec).items()
    }


def rope_table(rope: RopeSpec, head_dim: int, max_positions: int) -> torch.Tensor:
    """Row p: cosines of position p for each frequency, then its sines."""
    frequency = rope.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.kind == "linear":
        frequency = frequency / rope.factor
    elif rope.kind == "llama3":
        frequency = _llama3_frequency(frequency, rope)
    angle = torch.outer(torch.arange(max_positions).float(), frequency)
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def _llama3_frequency(frequency: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    turns = rope.original_max_positions * frequency / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return (1 - kept) * frequency / rope.factor + kept * frequency
