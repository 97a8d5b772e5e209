"""What running a decoder on a GPU takes, made before the cache: it gets the memory that is left."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from octavo.core.sequence import blocks_for
from octavo.engine.device import MESSAGE_WORDS, MOST_FETCHED, DeviceSteps
from octavo.engine.graphs import CudaGraphs, DecodeRunner, Direct, graph_sizes
from octavo.engine.lane import CudaLane
from octavo.engine.rows import StateLayout
from octavo.engine.workspace import Workspace
from octavo.models.decoder import Batch, Decoder
from octavo_kernels import ops

# What the graphs of all sizes take: the driver's own memory, and one pool for what a step needs in
# between.
GRAPH_BYTES = 512 << 20
# Their references look at what is on the device, which the capture of a graph does not allow.
_NOT_TO_CAPTURE = {"build_inputs", "mixture", "paged_attention", "record_tokens", "sample"}

logger = logging.getLogger(__name__)


class Gpu:
    """A GPU with a decoder's weights on it, and the tensors that all of its steps share.

    `max_num_tokens` bounds the tokens of a step, `eager` says to capture no graphs.
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
    ) -> None:
        # A group has one entry more than the longest sequence needs, and rows begin at 16 bytes.
        width = -(-(blocks_for(max_model_len, block_size) + 1) // 4) * 4
        groups = len(model.layout.windows)
        tokens = max(max_num_tokens, max_num_seqs)
        layout = StateLayout(max_num_seqs, groups * width, tokens, groups)
        self._model = model
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._dtype = model.parameters["embedding"].dtype
        self._eager = eager
        torch.cuda.synchronize(device)  # the weights were not loaded on this lane
        self._lane = CudaLane(device, MESSAGE_WORDS, max_num_seqs * MOST_FETCHED)
        with self._lane.scope(), torch.inference_mode():
            self._space = Workspace(model, layout, block_size, device)
            self._rehearse_chunks()
        torch.cuda.synchronize(device)

    @property
    def reserved_bytes(self) -> int:
        """What is not taken yet and must not go to the cache."""
        return 0 if self._eager else GRAPH_BYTES

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
        )

    def _graphs(self, step: Callable[[int], None], rehearse: Callable[[int], None]) -> DecodeRunner:
        rows = self._space.layout.max_rows
        if self._eager:
            return Direct(step, rows)
        before = Counter(ops.calls)
        with self._lane.scope(), torch.inference_mode():
            rehearse(1)
        on_torch = {op for op, ran in ops.calls - before if ran == "reference"} & _NOT_TO_CAPTURE
        if on_torch:
            logger.warning(
                "decode steps are not captured as CUDA graphs, because torch runs %s",
                ", ".join(sorted(on_torch)),
            )
            return Direct(step, rows)
        return CudaGraphs(step, rehearse, graph_sizes(rows))

    def _rehearse_chunks(self) -> None:
        """Run the largest step to no effect: what it takes in between stays taken, for others.

        As many whole prompts as there is room for, all in a block 0 that nothing is stored in.
        """
        layout, spec, device = self._space.layout, self._model.spec, self._space.words.device
        layers, tokens = self._model.layout.layers_per_group, layout.max_tokens
        longest = min(tokens, self._max_model_len)
        count = min(-(-tokens // longest), layout.max_rows)
        tokens = min(tokens, count * longest)
        starts = torch.arange(count + 1, device=device).mul_(longest).clamp_(max=tokens)
        out = self._space.buffers
        ids = torch.arange(tokens, device=device)
        cache = torch.zeros(
            (layers, 2, 1, self._block_size, spec.num_kv_heads, spec.head_dim),
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
        ops.plan_attention(
            self._space.attention,
            batch.seq_lens,
            0,
            query_start=batch.query_start,
            tokens=tokens,
            max_query_len=longest,
        )
        hidden = self._model.hidden(batch, cache)
        self._model.raw_logits(hidden, self._space.logits[:count])
