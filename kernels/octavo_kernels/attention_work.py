"""What attention on a GPU keeps between its calls: made once, planned once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from octavo_kernels.attention_settings import DecodeSetting, decode_setting
from octavo_kernels.native import profile

if TYPE_CHECKING:
    from octavo_kernels.cuda_prefill import PrefillBuffers, PrefillPlan

_ROWS_PER_TILE = 16
_CHUNK_STEP = 64


@dataclass(slots=True)
class AttentionWork:
    """Buffers of decode attention, all on one device; see `attention_work`.

    `settings[n]` is how a step of n decodes is cut and run. For each of `windows` there is a list
    of chunks, for as many as any step has in all (`slots`). `decode` is the setting that the step
    was planned with, `prefill` its plan for the sequences that are not decodes. `for_graph` says
    that both kernels run whatever the step has; `plans` are those of graphs, by their tokens, of
    which none has more than `max_tokens`, over the same `prefill_buffers`.
    """

    max_seqs: int
    heads: int
    kv_heads: int
    dim: int
    settings: tuple[DecodeSetting, ...]
    windows: tuple[int, ...]
    window_sizes: torch.Tensor  # int32 [windows]
    chunks: torch.Tensor  # int32 [windows, slots, 4]: decode_attention.h
    counts: torch.Tensor  # int32 [windows]
    ticket: torch.Tensor  # int32 [1]
    arrivals: torch.Tensor  # int32 [max_seqs * kv_heads * tiles of rows]
    values: torch.Tensor  # float32 [slots, heads, dim]
    sums: torch.Tensor  # float32 [slots, heads, 2]
    max_tokens: int = 0
    decode: DecodeSetting | None = None
    prefill: PrefillPlan | None = None
    for_graph: bool = False
    plans: dict[int, PrefillPlan] = field(default_factory=dict)
    prefill_buffers: PrefillBuffers | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, but for those of prefill."""
        buffers = (self.window_sizes, self.chunks, self.counts, self.ticket, self.arrivals)
        return sum(buffer.nbytes for buffer in (*buffers, self.values, self.sums))


def attention_work(  # noqa: PLR0913 (sizes, all by name)
    *,
    max_seqs: int,
    max_seq_len: int,
    heads: int,
    kv_heads: int,
    dim: int,
    device: torch.device | str,
    windows: Sequence[int] = (0,),
    setting: DecodeSetting | None = None,
    max_tokens: int = 0,
) -> AttentionWork:
    """Buffers for steps of up to `max_seqs` decodes of layers with any of these `windows`.

    Longer sequences than `max_seq_len` are served too, with less parallelism. How a step is cut
    follows from its number of decodes, or is `setting` for all, for measurements. Under the
    deterministic profile, which has to be set before, the results' bits do not depend on that
    number, only on `max_seq_len`, `heads` and `kv_heads`. The largest buffer is `values`. On a CPU
    the buffers are empty. Graphs of steps that also hold chunks have up to `max_tokens` tokens;
    what they need beyond is made with the first plan for one.
    """
    if setting is not None and (setting.chunk < _CHUNK_STEP or setting.chunk % _CHUNK_STEP):
        raise ValueError(
            f"attention_work: chunk must be a multiple of {_CHUNK_STEP}, got {setting.chunk}"
        )
    if not windows or min(windows) < 0:
        raise ValueError(f"attention_work: windows must be 0 or more each, got {tuple(windows)}")
    different = tuple(dict.fromkeys(windows))
    on_gpu = torch.device(device).type == "cuda"
    seqs = max_seqs if on_gpu else 0
    columns = kv_heads * -(-heads // kv_heads // _ROWS_PER_TILE)
    count = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    settings = tuple(
        setting or decode_setting(n, columns, dim, max_seq_len, count, profile.deterministic)
        for n in range(seqs + 1)
    )
    slots = max(n * each.max_chunks for n, each in enumerate(settings))

    def words(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    return AttentionWork(
        max_seqs=max_seqs,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        settings=settings,
        windows=different,
        window_sizes=torch.tensor(different, dtype=torch.int32, device=device),
        # A block reads the entry of its number while it looks up how many there are.
        chunks=words(len(different), slots, 4).zero_(),
        counts=words(len(different)),
        ticket=words(1).zero_(),
        arrivals=words(seqs * columns).zero_(),
        values=floats(slots, heads, dim),
        sums=floats(slots, heads, 2),
        max_tokens=max_tokens,
    )
