"""The tensors that all steps on a device share, as large as any step may need."""

from __future__ import annotations

from dataclasses import replace

import torch

from octavo.engine.adjust import MAX_LISTED
from octavo.engine.rows import StateLayout
from octavo.models.decoder import Attended, Decoder
from octavo.models.spec import DecoderSpec
from octavo.plan import GRAPH_TOKENS
from octavo_kernels import ops, sampling
from octavo_kernels.batch_state import BatchState, StepBuffers
from octavo_kernels.record import RECORD_WORDS
from octavo_kernels.reference_sampling import Sampling


class Workspace:
    """All that steps on a device need but the model and the cache, as large as any may need.

    `logits` [rows, vocab] are of the model's type; so is `attended`, which a graph leaves of the
    tokens of a step with chunks. Made before the cache, which takes the rest.
    """

    def __init__(
        self, model: Decoder, layout: StateLayout, block_size: int, device: torch.device
    ) -> None:
        spec = model.spec
        self.layout = layout
        self.words = torch.zeros(layout.num_words, dtype=torch.int32, device=device)
        self.state = _views(self.words, layout)
        self.state.batch.fill_(-1)
        # For a step to no effect: every sequence is padding.
        self.nobody = replace(self.state, batch=torch.full_like(self.state.batch, -1))
        self.buffers = _buffers(layout, device)
        self.adjustments = sampling.new_adjustments(
            layout.max_rows, spec.vocab_size, MAX_LISTED, device
        )
        out = self.buffers
        self.sampling = Sampling(
            temperature=out.temperature,
            top_k=out.top_k,
            top_p=out.top_p,
            min_p=out.min_p,
            stream=out.stream,
            count=out.count,
            adjusted=out.adjusted,
            adjustments=self.adjustments,
        )
        self.one_each = torch.arange(layout.max_rows + 1, dtype=torch.int32, device=device)
        dtype = model.parameters["embedding"].dtype
        self.logits = torch.zeros(layout.max_rows, spec.vocab_size, dtype=dtype, device=device)
        tokens = min(layout.max_tokens, GRAPH_TOKENS)
        self.attended = _attended(spec, tokens, dtype, device)
        self.drawn = torch.zeros(2, layout.max_rows, dtype=torch.int32, device=device)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        self.attention = ops.attention_work(
            max_seqs=layout.max_rows,
            max_seq_len=layout.table_width // layout.groups * block_size,
            heads=spec.num_heads,
            kv_heads=spec.num_kv_heads,
            dim=spec.head_dim,
            device=device,
            windows=[layer.window or 0 for layer in spec.layers],
            max_tokens=tokens,
        )


def _views(words: torch.Tensor, layout: StateLayout) -> BatchState:
    rows = layout.max_rows
    return BatchState(
        records=words[: layout.tables].view(rows, RECORD_WORDS),
        tables=words[layout.tables : layout.batch].view(rows, layout.table_width),
        batch=words[layout.batch : layout.token_at],
        token_at=words[layout.token_at : layout.query_start],
        query_start=words[layout.query_start : layout.chunk],
        chunk=words[layout.chunk :],
    )


def _attended(spec: DecoderSpec, tokens: int, dtype: torch.dtype, device: torch.device) -> Attended:
    def zeros(width: int) -> torch.Tensor:
        return torch.zeros(tokens, width, dtype=dtype, device=device)

    normed = zeros(spec.hidden_size) if spec.placement == "parallel" else None
    return Attended(zeros(spec.query_size), zeros(spec.hidden_size), normed)


def _buffers(layout: StateLayout, device: torch.device) -> StepBuffers:
    rows, tokens = layout.max_rows, layout.max_tokens

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return StepBuffers(
        token_ids=zeros(tokens, dtype=torch.int64),
        positions=zeros(tokens, dtype=torch.int64),
        slots=zeros(layout.groups, tokens, dtype=torch.int64),
        seq_lens=zeros(rows, dtype=torch.int32),
        block_tables=zeros(
            layout.groups, rows, layout.table_width // layout.groups, dtype=torch.int32
        ),
        temperature=zeros(rows, dtype=torch.float32),
        top_k=zeros(rows, dtype=torch.int32),
        top_p=zeros(rows, dtype=torch.float32),
        min_p=zeros(rows, dtype=torch.float32),
        stream=zeros(rows, dtype=torch.int64),
        count=zeros(rows, dtype=torch.int64),
        adjusted=zeros(rows, dtype=torch.int32),
    )
