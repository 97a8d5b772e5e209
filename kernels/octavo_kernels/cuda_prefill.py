"""Attention of chunks of queries on a GPU: planned once a step, then run by every layer."""

from __future__ import annotations

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.attention_settings import PrefillSetting, prefill_setting
from octavo_kernels.native import Unserved, address, profile, stream_of, type_code
from octavo_kernels.reference import Variant

_ALIGNMENT = 16  # bytes


class PrefillPlan:
    """Which block of the GPU attends to what, for the sequences after the first `num_decodes`.

    The same for all layers of a step, whatever their windows. `query_start` and `seq_lens` may
    change on the device until the plan is made, by the stream; it is fixed then. Without a
    `setting` one is chosen by the lengths, of which `max_seq_len` is the longest sequence's; under
    the deterministic profile a query's bits depend on its own keys alone.
    """

    def __init__(  # noqa: PLR0913 (a step's numbers, all by name)
        self,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        tokens: int,
        heads: int,
        kv_heads: int,
        dim: int,
        num_decodes: int = 0,
        max_query_len: int | None = None,
        max_seq_len: int | None = None,
        setting: PrefillSetting | None = None,
    ) -> None:
        longest = tokens - num_decodes if max_query_len is None else max_query_len
        setting = setting or prefill_setting(longest, max_seq_len, profile.deterministic)
        self._step = _cuda.PrefillStep(
            tokens=tokens,
            seqs=len(seq_lens),
            num_decodes=num_decodes,
            max_query_len=longest,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            min_span=setting.min_span,
            warpgroups=setting.warpgroups,
        )
        device = seq_lens.device
        # Held as long as the plan is: the kernels have their addresses.
        self._buffers = (
            query_start,
            seq_lens,
            torch.empty(self._step.list_words, dtype=torch.int32, device=device),
            torch.empty(self._step.partial_floats, dtype=torch.float32, device=device),
        )
        starts, lengths, lists, partials = self._buffers
        self._step.plan(
            query_start=starts.data_ptr(),
            seq_lens=lengths.data_ptr(),
            lists=lists.data_ptr(),
            partials=partials.data_ptr(),
            stream=stream_of(seq_lens),
        )

    @property
    def splits(self) -> bool:
        """Whether tiles may be split into spans of keys."""
        return self._step.splits

    @property
    def warpgroups(self) -> bool:
        """Whether Hopper's own kernel runs."""
        return self._step.warpgroups

    def attend(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        block_tables: torch.Tensor,
        scale: float,
        variant: Variant,
        out: torch.Tensor,
    ) -> None:
        """Write the rows of `out` that are not decodes'; see `reference.paged_attention`."""
        if not (scale > 0 and _cuda.prefill_serves(key_cache.shape[3], key_cache.shape[1])):
            raise Unserved(
                f"prefill has kernels for head dims 64, 80, 96, 128 and 256, blocks of a power of "
                f"two of 8 or more tokens and a positive scale, not for head dim "
                f"{key_cache.shape[3]}, blocks of {key_cache.shape[1]} and scale {scale}"
            )
        if not _aligned(query):
            query = query.contiguous()
        self._step.attend(
            dtype=type_code("paged_attention", query),
            query=query.data_ptr(),
            query_stride=query.stride(0),
            key_cache=key_cache.data_ptr(),
            value_cache=value_cache.data_ptr(),
            block_tables=block_tables.data_ptr(),
            max_blocks=block_tables.shape[1],
            block_size=key_cache.shape[1],
            out=out.data_ptr(),
            scale=scale,
            window=variant.window,
            softcap=variant.softcap,
            sinks=address(variant.sinks),
            stream=stream_of(query),
        )


def _aligned(query: torch.Tensor) -> bool:
    return (
        query.data_ptr() % _ALIGNMENT == 0
        and query.stride(0) * query.element_size() % _ALIGNMENT == 0
    )
