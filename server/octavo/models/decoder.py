"""The one decoder: a `DecoderSpec`, its parameters, and a forward over a flat batch of tokens.

On a CPU our own operations give a sequence the same bits whatever its batch mates, chunks, block
size or thread count. The matrix products are torch's, whose summation order may follow the number
of rows, so logits may differ in the last bits between batches; tokens then differ only where two
candidates are that close.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from octavo.models.moe import mixture
from octavo.models.parameters import parameter_shapes
from octavo.models.rope import rope_table
from octavo.models.spec import DecoderSpec, LayerSpec
from octavo_kernels import ops

Parameters = dict[str, torch.Tensor]
# The KV cache's keys and values of one layer of a group after another.
Planes = tuple[torch.Tensor, ...]

# For no more rows a GPU spends its time on starting kernels: norms, gates and sums then ride on the
# products before or after them.
FEW_ROWS = 16


@dataclass(slots=True, frozen=True)
class Batch:
    """The tokens of one step, of all its sequences one after another.

    `block_tables` and `slots` have a tensor for each group of layers (`kv_layout.KvLayout`); a slot
    says where a token's key and value are stored in the group's layers. `query_start` (one entry
    more than sequences) delimits the sequences; `seq_lens` counts their tokens, cached ones
    included. `logit_rows` names the tokens whose logits are wanted, None all of them. The first
    `num_decodes` sequences have one token each, none has more than `max_query_len`; 0 and None say
    that nothing is known. `attention_work` was planned for these sequences.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: tuple[torch.Tensor, ...]
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: tuple[torch.Tensor, ...]
    logit_rows: torch.Tensor | None
    num_decodes: int = 0
    max_query_len: int | None = None
    attention_work: ops.AttentionWork | None = None


class Decoder:
    """A decoder-only model. Query, key and value share one matrix, so do gate and up.

    `max_positions` bounds the length of all sequences, and so decides the layout of the KV cache.
    """

    def __init__(
        self, spec: DecoderSpec, parameters: Parameters, *, max_positions: int, device: torch.device
    ) -> None:
        self.spec = spec
        self.parameters = parameters
        self.layout = spec.kv_layout(max_positions)
        self._rope_tables = {
            rope: rope_table(rope, spec.rotary_dim, max_positions).to(device)
            for rope in {layer.rope for layer in spec.layers}
            if rope is not None
        }
        self._variants = [
            ops.Variant(
                window=layer.window or 0,
                softcap=spec.attention_softcap,
                sinks=parameters[f"layers.{i}.sinks"].float() if spec.sinks else None,
            )
            for i, layer in enumerate(spec.layers)
        ]
        on_gpu = device.type == "cuda"
        self._product = ops.linear if on_gpu else linear
        self._few_rows = FEW_ROWS if on_gpu and _is_plain(spec) else 0
        self._head_norms = [self._head_norm(f"layers.{i}.") for i in range(spec.num_layers)]
        self._matched = False

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits (float32) of `batch.logit_rows`, all at once; see `hidden`."""
        return self.logits(self.hidden(batch, kv_cache))

    def hidden(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """The last layer's normed output of `batch.logit_rows`. Keys and values of the batch go to
        `kv_cache`, which is [layers of a group, 2, blocks, block_size, kv_heads, head_dim].

        `residual` is the sum of what all layers before gave; `x` is what was given last and is
        added to it by the norm that comes next, in one pass.
        """
        residual = self._embed(batch)
        planes = kv_cache.view(-1, *kv_cache.shape[2:]).unbind()
        x = self._layers(range(1), None, residual, batch, planes)
        # The first layer's checks hold for this batch, those of one whole pass for the weights.
        with ops.unchecked() if self._matched else contextlib.nullcontext():
            x = self._layers(range(1, self.spec.num_layers), x, residual, batch, planes)
        self._matched = True
        rows = batch.logit_rows
        if rows is not None:
            x, residual = None if x is None else x[rows], residual[rows]
        return self._add_norm("norm", x, residual)

    def _layers(
        self,
        indices: range,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        batch: Batch,
        planes: Planes,
    ) -> torch.Tensor | None:
        """What the last of these layers gave, to be added to `residual`; None when it was."""
        spec = self.spec
        few = len(residual) <= self._few_rows
        for i in indices:
            layer, at = spec.layers[i], f"layers.{i}."
            if few:
                self._few_rows_layer(i, layer, residual, batch, planes)
                continue
            normed = self._add_norm(at + "input_norm", x, residual)
            x = self._attention(i, layer, normed, batch, planes)
            if spec.placement == "parallel":
                aside = normed if spec.shared_norm else self._norm(at + "mlp_norm", residual)
                x = x + self._mlp(at, layer, aside)
                continue
            x = self._norm(at + "attention_out_norm", x)
            x = self._mlp(at, layer, self._add_norm(at + "mlp_norm", x, residual))
            x = self._norm(at + "mlp_out_norm", x)
        return x

    def _embed(self, batch: Batch) -> torch.Tensor:
        spec, p = self.spec, self.parameters
        return ops.embed(
            batch.token_ids,
            p["embedding"],
            scale=spec.embedding_scale,
            positions=batch.positions if spec.learned_positions else None,
            position_table=p["positions"][spec.position_offset :]
            if spec.learned_positions
            else None,
        )

    def _few_rows_layer(
        self,
        index: int,
        layer: LayerSpec,
        residual: torch.Tensor,
        batch: Batch,
        planes: Planes,
    ) -> None:
        """A plain layer in six kernels; `residual` becomes the layer's output. Each product has the
        next one's weight brought nearer.
        """
        at, p = f"layers.{index}.", self.parameters

        def norm(name: str) -> ops.Norm:
            return ops.Norm(p[at + name], self.spec.norm_eps, self.spec.norm_offset)

        def bias(name: str) -> torch.Tensor | None:
            return p.get(f"{at}{name}.bias")

        output, gate_up, down = p[at + "output"], p[at + "gate_up"], p[at + "down"]
        next_qkv = p.get(f"layers.{index + 1}.qkv")
        qkv = ops.linear(residual, p[at + "qkv"], bias("qkv"), norm("input_norm"), ahead=output)
        mixed = self._mix(index, layer, qkv, batch, planes)
        ops.linear_add(mixed, output, residual, bias("output"), ahead=gate_up)
        inner = ops.gated_linear(
            residual, gate_up, self.spec.activation, bias("gate_up"), norm("mlp_norm"), ahead=down
        )
        ops.linear_add(inner, down, residual, bias("down"), ahead=next_qkv)

    def _attention(
        self, index: int, layer: LayerSpec, x: torch.Tensor, batch: Batch, planes: Planes
    ) -> torch.Tensor:
        at = f"layers.{index}."
        mixed = self._mix(index, layer, self._linear(at + "qkv", x), batch, planes)
        return self._linear(at + "output", mixed)

    def _mix(
        self, index: int, layer: LayerSpec, qkv: torch.Tensor, batch: Batch, planes: Planes
    ) -> torch.Tensor:
        """Store the keys and values of a fused projection; what its queries find."""
        spec = self.spec
        group, plane = self.layout.places[index]
        keys, values = planes[2 * plane], planes[2 * plane + 1]
        rotation = None
        if layer.rope is not None:
            table = self._rope_tables[layer.rope]
            rotation = ops.Rotation(batch.positions, table, spec.rope_interleaved)
        norm = self._head_norms[index]
        if norm is None and spec.qk_norm != "none":
            self._norm_queries_and_keys(f"layers.{index}.", qkv)
        slots = batch.slots[group]
        query = ops.qk_norm_rope_write(qkv, keys, values, slots, norm, rotation)
        mixed = ops.paged_attention(
            query,
            keys,
            values,
            batch.block_tables[group],
            batch.query_start,
            batch.seq_lens,
            spec.attention_scale,
            self._variants[index],
            num_decodes=batch.num_decodes,
            max_query_len=batch.max_query_len,
            work=batch.attention_work,
        )
        return mixed.flatten(1)

    def _head_norm(self, at: str) -> ops.HeadNorm | None:
        """The norms of a layer's queries and keys, if a kernel takes them along."""
        spec, p = self.spec, self.parameters
        if spec.qk_norm != "head" or spec.norm != "rms":
            return None
        return ops.HeadNorm(p[at + "q_norm"], p[at + "k_norm"], spec.norm_eps, spec.norm_offset)

    def _norm_queries_and_keys(self, at: str, qkv: torch.Tensor) -> None:
        """In place, before they are cut into heads, or each head by a layer norm."""
        spec = self.spec
        q, k, _ = torch.split(qkv, [spec.query_size, spec.kv_size, spec.kv_size], dim=-1)
        for name, x in ((at + "q_norm", q), (at + "k_norm", k)):
            rows = x.contiguous() if spec.qk_norm == "whole" else x.reshape(-1, spec.head_dim)
            x.copy_(self._norm(name, rows).view(x.shape))

    def _mlp(self, at: str, layer: LayerSpec, x: torch.Tensor) -> torch.Tensor:
        moe = self.spec.moe
        if not layer.sparse or moe is None:
            return self._dense_mlp(at, x)
        out = mixture(x, self.parameters, at, moe, self.spec.activation)
        if moe.shared_intermediate_size:
            share = torch.sigmoid(self._linear(at + "shared_gate", x))
            out += share * self._dense_mlp(at + "shared.", x)
        return out

    def _dense_mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        function = self.spec.activation
        if self.spec.gated:
            inner = ops.act_and_mul(self._linear(at + "gate_up", x), function)
        else:
            inner = ops.act(self._linear(at + "up", x), function)
        return self._linear(at + "down", inner)

    def _add_norm(self, name: str, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """Add x to the residual, in place, and norm the sum; the first layer has nothing to add."""
        if x is None:
            return self._norm(name, residual)
        if self.spec.residual_scale != 1.0:
            x = x * self.spec.residual_scale
        return self._norm(name, x, residual)

    def _norm(
        self, name: str, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The norm of that name, or x itself where the spec has no norm in that place."""
        spec, weight = self.spec, self.parameters.get(name)
        if weight is None:
            return x if residual is None else residual.add_(x)
        if spec.norm == "layer":
            bias = self.parameters.get(name + ".bias")
            return ops.layer_norm(x, weight, bias, spec.norm_eps, residual)
        return ops.rms_norm(x, weight, spec.norm_eps, residual, offset=spec.norm_offset)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self.parameters[name], self.parameters.get(name + ".bias"))

    def tune(self, rows: int) -> None:
        """Find how a GPU multiplies that many rows fastest; milliseconds, elsewhere nothing."""
        tied = self.spec.tied_embeddings
        ops.tune_products(
            [
                (weight, self.parameters.get(name + ".bias"))
                for name, weight in self.parameters.items()
                if weight.dim() == 2
                and name != "positions"
                and ".experts." not in name  # many matrices, one under the other
                and (tied or name != "embedding")
            ],
            [rows],
        )

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (float32) of some rows of `hidden`'s result."""
        return self.finish_logits(self.raw_logits(x))

    def raw_logits(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The last product [rows, vocab], in the model's type, into `out` where it is given."""
        output = self.parameters["embedding" if self.spec.tied_embeddings else "lm_head"]
        return self._product(x, output) if out is None else ops.linear(x, output, out=out)

    def finish_logits(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits (float32) from rows of `raw_logits`: scaled and bounded as the model asks."""
        spec, logits = self.spec, raw.float()
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap:
            logits = spec.logit_softcap * torch.tanh(logits / spec.logit_softcap)
        return logits


def _is_plain(spec: DecoderSpec) -> bool:
    """True for layers of the common kind: RMS norms before each half, gated and dense."""
    return (
        spec.placement == "pre"
        and spec.norm == "rms"
        and spec.residual_scale == 1.0
        and spec.gated
        and spec.moe is None
    )


def empty_parameters(spec: DecoderSpec, *, dtype: torch.dtype, device: torch.device) -> Parameters:
    """Parameters to be filled by the loader."""
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, shape in parameter_shapes(spec).items()
    }
