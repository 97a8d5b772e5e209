"""What running a decoder on a GPU takes, made before the cache: it gets the memory that is left."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch

from octavo import plan as memory_plan
from octavo.core.sequence import blocks_for
from octavo.engine.device import MESSAGE_WORDS, MOST_FETCHED, DeviceSteps
from octavo.engine.graphs import (
    CudaGraphs,
    Direct,
    GraphMemory,
    Part,
    PartRunner,
    chunk_sizes,
    graph_sizes,
)
from octavo.engine.lane import CudaLane
from octavo.engine.rows import StateLayout
from octavo.engine.workspace import Workspace
from octavo.models.decoder import Batch, Decoder
from octavo_kernels import ops

# Their references look at what is on the device, which the capture of a graph does not allow.
_NOT_TO_CAPTURE = {"build_inputs", "mixture", "paged_attention", "record_tokens", "sample"}

# The next ones take what these took.
_LAYERS_TO_REHEARSE = 3

logger = logging.getLogger(__name__)


class Gpu:
    """A GPU with a decoder's weights on it, and the tensors that all of its steps share.

    `max_num_tokens` bounds the tokens of a step, `eager` says to capture no graphs. With
    `deterministic`, which the kernels were told before, steps too do not depend on their mix.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        device: torch.device,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        max_num_tokens: int,
        eager: bool,
        deterministic: bool = False,
    ) -> None:
        # A group has one entry more than the longest sequence needs, and rows begin at 16 bytes.
        width = -(-(blocks_for(max_model_len, block_size) + 1) // 4) * 4
        groups = len(model.layout.windows)
        tokens = max(max_num_tokens, max_num_seqs)
        # One row more than sequences: what pads a step with chunks counts as one.
        layout = StateLayout(max_num_seqs + 1, groups * width, tokens, groups)
        self._model = model
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_num_seqs = max_num_seqs
        self.max_num_tokens = max_num_tokens
        self._dtype = model.parameters["embedding"].dtype
        self._eager = eager
        self._deterministic = deterministic
        torch.cuda.synchronize(device)  # the weights were not loaded on this lane
        self._lane = CudaLane(device, MESSAGE_WORDS, max_num_seqs * MOST_FETCHED)
        with self._lane.scope(), torch.inference_mode():
            self._space = Workspace(model, layout, block_size, device)
            self._pool_bytes = memory_plan.graph_pool_bytes(self._rehearse_chunks())
        torch.cuda.synchronize(device)

    @property
    def reserved_bytes(self) -> int:
        """What is not taken yet and must not go to the cache."""
        return 0 if self._eager else memory_plan.GRAPH_BYTES + self._pool_bytes

    def steps(self, kv_cache: torch.Tensor, eos_token_ids: Sequence[int], seed: int) -> DeviceSteps:
        """Steps over that cache."""
        torch.cuda.synchronize(kv_cache.device)  # it was cleared on another lane
        return DeviceSteps(
            self._model,
            kv_cache,
            self._space,
            self._lane,
            self._graphs,
            eos_token_ids=eos_token_ids,
            seed=seed,
            deterministic=self._deterministic,
        )

    def _graphs(self, decodes: Part, chunks: Part) -> tuple[PartRunner, PartRunner]:
        rows, tokens = self._max_num_seqs, self._space.layout.max_tokens
        memory = GraphMemory(self._pool_bytes, self._space.words.device)
        kinds = (
            ("sequences", decodes, graph_sizes(rows), Direct(decodes, rows)),
            ("tokens", chunks, chunk_sizes(tokens), Direct(chunks, 0)),
        )
        by_sequences, by_tokens = (
            CudaGraphs(part, sizes, memory, name)
            if not self._eager and self._can_be_captured(part, sizes[0], name)
            else direct
            for name, part, sizes, direct in kinds
        )
        return by_sequences, by_tokens

    def _can_be_captured(self, part: Part, size: int, name: str) -> bool:
        before = Counter(ops.calls)
        with self._lane.scope(), torch.inference_mode():
            part.rehearse(size)
        on_torch = {op for op, ran in ops.calls - before if ran != "cuda"} & _NOT_TO_CAPTURE
        if on_torch:
            logger.warning(
                "steps by their %s are not captured as CUDA graphs, because torch runs %s",
                name,
                ", ".join(sorted(on_torch)),
            )
        return not on_torch

    def _rehearse_chunks(self) -> int:
        """Run the largest step to no effect: what it takes in between stays taken, for others. Of
        one larger than any graph's only as many layers as show that. Returns how many bytes the
        largest graph takes for the same.
        """
        work, most = self._space.attention, self._space.layout.max_tokens
        if most > work.max_tokens:
            sparse = [layer.sparse for layer in self._model.spec.layers]
            first = sparse.index(True) if True in sparse else 0
            self._rehearse(most, min(first + _LAYERS_TO_REHEARSE, len(sparse)))
        taken = self._rehearse(work.max_tokens, None)
        # A plan of nothing makes what plans for graphs share.
        none = torch.zeros(1, dtype=torch.int32, device=self._space.words.device)
        ops.plan_attention(
            work, none[:0], 0, query_start=none, tokens=work.max_tokens, for_graph=True
        )
        return taken

    def _rehearse(self, tokens: int, layers: int | None) -> int:
        """Run a step of that size, or its first `layers`; returns the bytes that it took meanwhile.

        As many whole prompts as there is room for, all in a block 0 that nothing is stored in.
        """
        layout, spec, device = self._model.layout, self._model.spec, self._space.words.device
        whole = tokens
        longest = min(tokens, self._max_model_len)
        count = min(-(-tokens // longest), self._max_num_seqs)
        tokens = min(tokens, count * longest)
        starts = torch.arange(count + 1, device=device).mul_(longest).clamp_(max=tokens)
        out = self._space.buffers
        ids = torch.arange(tokens, device=device)
        cache = torch.zeros(
            (layout.layers_per_group, 2, 1, self._block_size, spec.num_kv_heads, spec.head_dim),
            dtype=self._dtype,
            device=device,
        )
        batch = Batch(
            token_ids=out.token_ids[:tokens].zero_(),
            positions=out.positions[:tokens].copy_(ids % longest),
            slots=tuple(slots[:tokens] for slots in out.slots.fill_(-1)),
            query_start=starts.int(),
            seq_lens=starts.diff().int(),
            block_tables=tuple(tables[:count] for tables in out.block_tables.zero_()),
            logit_rows=starts[1:] - 1,
            max_query_len=longest,
            attention_work=self._space.attention,
        )
        work, taken = self._space.attention, torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        ops.plan_attention(
            work,
            batch.seq_lens,
            0,
            query_start=batch.query_start,
            tokens=tokens,
            max_query_len=longest,
        )
        if layers is None:
            hidden = self._model.hidden(batch, cache)
            self._model.raw_logits(hidden, self._space.logits[:count])
        else:
            self._model.body(batch, cache, layers=layers)
        return (torch.cuda.max_memory_allocated(device) - taken) * whole // tokens
