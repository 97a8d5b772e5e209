"""The one decoder: a `DecoderSpec`, its parameters, and a forward over a flat batch of tokens.

On a CPU our own operations give a sequence the same bits whatever its batch mates, chunks, block
size or thread count. The matrix products are torch's, whose summation order may follow the number
of rows, so logits may differ in the last bits between batches; tokens then differ only where two
candidates are that close.
"""

from __future__ import annotations

import contextlib
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from octavo.models.moe import mixture
from octavo.models.parameters import parameter_shapes
from octavo.models.rope import rope_table
from octavo.models.spec import DecoderSpec, LayerSpec
from octavo.models.stack import is_uniform, new_stack
from octavo_kernels import ops

Parameters = dict[str, torch.Tensor]
# The KV cache's keys and values of one layer of a group after another.
Planes = tuple[torch.Tensor, ...]

# For no more rows a GPU spends its time on starting kernels: norms, gates and sums then ride on the
# products before or after them.
FEW_ROWS = 16
# From so many rows on the sums are worth a place in the products, which then read and write the
# residual once less for each norm; in between, norms add in passing.
MANY_ROWS = 1024


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


class Attended(NamedTuple):
    """Tokens behind a layer's attention: what their queries found [tokens, heads * head_dim], and
    the sum of all before the layer [tokens, hidden]. `normed` is that sum as the attention got it,
    where the MLP stands beside attention.
    """

    mixed: torch.Tensor
    residual: torch.Tensor
    normed: torch.Tensor | None


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
        plain = on_gpu and _is_plain(spec)
        # Not even none are few for other layers: a step may want nobody's logits.
        self._few_rows, self._many_rows = (FEW_ROWS, MANY_ROWS) if plain else (-1, sys.maxsize)
        self._head_norms = [self._head_norm(f"layers.{i}.") for i in range(spec.num_layers)]
        self._matched = False
        self._uniform = plain and is_uniform(spec)
        # By where the cache lies; kept, because graphs have the addresses of what they hold.
        self._stacks: dict[tuple[object, ...], ops.LayerStack | None] = {}

    def forward(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """Logits (float32) of `batch.logit_rows`, all at once; see `hidden`."""
        return self.logits(self.hidden(batch, kv_cache))

    def hidden(self, batch: Batch, kv_cache: torch.Tensor) -> torch.Tensor:
        """The last layer's normed output of `batch.logit_rows`; what `body` and `tail` do, or for
        few decodes one kernel.
        """
        size, rows = len(batch.positions), batch.logit_rows
        decodes = size == batch.num_decodes == len(batch.seq_lens)
        stack = self._stack(size, kv_cache) if decodes else None
        if stack is None:
            return self.tail(self.body(batch, kv_cache), rows)
        residual = self._embed(batch)
        ops.decode_layers(stack, residual, *_where(batch))
        return self._norm("norm", residual if rows is None else residual[rows])

    def decode(self, batch: Batch, kv_cache: torch.Tensor, out: torch.Tensor) -> None:
        """What `hidden` and `raw_logits` do for a step of decodes that wants all logits; for few of
        them one kernel.
        """
        stack = self._stack(len(batch.positions), kv_cache)
        if stack is None or stack.vocab == 0:
            self.raw_logits(self.hidden(batch, kv_cache), out)
            return
        ops.decode_logits(stack, batch.token_ids, *_where(batch), out)

    def plans_attention(self, decodes: int, kv_cache: torch.Tensor) -> bool:
        """Whether a step of so many decodes reads its batch's `attention_work`."""
        return self._stack(decodes, kv_cache) is None

    def _stack(self, rows: int, kv_cache: torch.Tensor) -> ops.LayerStack | None:
        """All layers for the kernel that runs them at once, if there is one for so many rows."""
        if not self._uniform or rows > self._few_rows:
            return None
        if ops.implementation(kv_cache.device, kv_cache.dtype) != "cuda":
            return None
        key = (kv_cache.data_ptr(), kv_cache.shape, kv_cache.dtype)
        if key not in self._stacks:
            planes = kv_cache.view(-1, *kv_cache.shape[2:]).unbind()
            (table,) = self._rope_tables.values()
            self._stacks[key] = new_stack(self.spec, self.parameters, planes, table)
        stack = self._stacks[key]
        return stack if stack is not None and rows <= stack.rows else None

    def body(self, batch: Batch, kv_cache: torch.Tensor, *, layers: int | None = None) -> Attended:
        """All that has to be done for every token of the batch: up to the last layer's attention.
        Keys and values go to `kv_cache`, which is [layers of a group, 2, blocks, block_size,
        kv_heads, head_dim]. The first `layers` alone show what a batch takes.
        """
        planes = kv_cache.view(-1, *kv_cache.shape[2:]).unbind()
        at = self._attend(0, None, self._embed(batch), batch, planes)
        # The first layer's checks hold for this batch, those of one whole pass for the weights.
        with self._checked_once():
            for i in range(1, layers or self.spec.num_layers):
                at = self._attend(i, self._conclude(i - 1, at), at.residual, batch, planes)
        return at

    def tail(self, at: Attended, rows: torch.Tensor | None) -> torch.Tensor:
        """The rest, for some of `body`'s rows or all: of a prompt nobody reads any but the last."""
        if rows is not None:
            normed = None if at.normed is None else at.normed[rows]
            at = Attended(at.mixed[rows], at.residual[rows], normed)
        with self._checked_once():
            x = self._conclude(self.spec.num_layers - 1, at)
        self._matched = True
        return self._add_norm("norm", x, at.residual)

    def _checked_once(self) -> AbstractContextManager[None]:
        return ops.unchecked() if self._matched else contextlib.nullcontext()

    def _attend(
        self,
        index: int,
        x: torch.Tensor | None,
        residual: torch.Tensor,
        batch: Batch,
        planes: Planes,
    ) -> Attended:
        """A layer as far as attention. `residual` is the sum of what all layers before gave; `x`
        is what was given last and is added to it by the norm that comes next, in one pass; None
        when it was added already.
        """
        at = f"layers.{index}."
        if x is None and len(residual) <= self._few_rows:
            p = self.parameters
            qkv = ops.linear(
                residual,
                p[at + "qkv"],
                p.get(at + "qkv.bias"),
                self._rms_norm(at + "input_norm"),
                ahead=p[at + "output"],
            )
            return Attended(self._mix(index, qkv, batch, planes), residual, None)
        normed = self._add_norm(at + "input_norm", x, residual)
        mixed = self._mix(index, self._linear(at + "qkv", normed), batch, planes)
        return Attended(mixed, residual, normed if self.spec.placement == "parallel" else None)

    def _conclude(self, index: int, attended: Attended) -> torch.Tensor | None:
        """The rest of a layer: what it gave, to be added to the residual; None when it was."""
        spec, at = self.spec, f"layers.{index}."
        mixed, residual, normed = attended
        if not self._few_rows < len(residual) < self._many_rows:
            self._conclude_plain(index, mixed, residual)
            return None
        layer, x = spec.layers[index], self._linear(at + "output", mixed)
        if normed is not None:  # both halves of the layer read the same residual
            aside = normed if spec.shared_norm else self._norm(at + "mlp_norm", residual)
            return x + self._mlp(at, layer, aside)
        x = self._norm(at + "attention_out_norm", x)
        x = self._mlp(at, layer, self._add_norm(at + "mlp_norm", x, residual))
        return self._norm(at + "mlp_out_norm", x)

    def _conclude_plain(self, index: int, mixed: torch.Tensor, residual: torch.Tensor) -> None:
        """`residual` becomes a plain layer's output, by products that add to it. Of few rows, norm
        and gate ride on them too, and each has the next one's weight brought nearer: a layer is six
        kernels then.
        """
        at, p = f"layers.{index}.", self.parameters
        gate_up, down = p[at + "gate_up"], p[at + "down"]
        next_qkv = p.get(f"layers.{index + 1}.qkv")
        output_bias, bias = p.get(at + "output.bias"), p.get(at + "gate_up.bias")
        ops.linear_add(mixed, p[at + "output"], residual, output_bias, ahead=gate_up)
        norm = self._rms_norm(at + "mlp_norm")
        inner = ops.gated_linear(residual, gate_up, self.spec.activation, bias, norm, ahead=down)
        ops.linear_add(inner, down, residual, p.get(at + "down.bias"), ahead=next_qkv)

    def _rms_norm(self, name: str) -> ops.Norm:
        return ops.Norm(self.parameters[name], self.spec.norm_eps, self.spec.norm_offset)

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

    def _mix(self, index: int, qkv: torch.Tensor, batch: Batch, planes: Planes) -> torch.Tensor:
        """Store the keys and values of a fused projection; what its queries find."""
        spec, layer = self.spec, self.spec.layers[index]
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
        function, p = self.spec.activation, self.parameters
        if self.spec.gated:
            inner = ops.gated_linear(x, p[at + "gate_up"], function, p.get(at + "gate_up.bias"))
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

    def tune(self, rows: int, *, logits: bool = True) -> None:
        """Find how a GPU multiplies that many rows fastest; milliseconds, elsewhere nothing. With
        `logits` also for the last product, which only some rows of a step with chunks take.
        """
        last = "embedding" if self.spec.tied_embeddings else "lm_head"
        ops.tune_products(
            [
                (weight, self.parameters.get(name + ".bias"))
                for name, weight in self.parameters.items()
                if weight.dim() == 2
                and name != "positions"
                and ".experts." not in name  # many matrices, one under the other
                and (name not in ("embedding", "lm_head") or (logits and name == last))
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


def _where(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, slots, lengths and block tables of a step of a model with one group of layers."""
    return batch.positions, batch.slots[0], batch.seq_lens, batch.block_tables[0]


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
