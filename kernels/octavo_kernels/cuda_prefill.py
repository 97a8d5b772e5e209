"""Attention of chunks of queries on a GPU: planned once a step, then run by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.attention_settings import MIN_SPAN, PrefillSetting, prefill_setting
from octavo_kernels.native import Unserved, address, profile, stream_of, type_code
from octavo_kernels.reference import Variant

_ALIGNMENT = 16  # bytes


class PrefillBuffers(NamedTuple):
    """A plan's items (int32), and what spans of keys leave for each other (float32)."""

    lists: torch.Tensor
    partials: torch.Tensor


class PrefillPlan:
    """Which block of the GPU attends to what; the same for all layers of a step, whatever their
    windows. `plan_prefill` makes one for a step, `any_batch_plan` one for many steps' graph.
    """

    def __init__(self, step: _cuda.PrefillStep, buffers: PrefillBuffers) -> None:
        self._step = step
        self._buffers = buffers

    def plan(self, query_start: torch.Tensor, seq_lens: torch.Tensor, num_decodes: int) -> None:
        """For the sequences after the first `num_decodes`, no more and no longer ones than the
        sizes allow. Both tensors may change until the stream makes the plan; then it is fixed.
        """
        # Held as long as the plan is: the kernels have their addresses.
        self._lengths = query_start, seq_lens
        self._step.plan(
            query_start=query_start.data_ptr(),
            seq_lens=seq_lens.data_ptr(),
            seqs=len(seq_lens),
            num_decodes=num_decodes,
            lists=self._buffers.lists.data_ptr(),
            partials=self._buffers.partials.data_ptr(),
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


def plan_prefill(  # noqa: PLR0913 (a step's numbers, all by name)
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
) -> PrefillPlan:
    """Plan one step. Without a `setting` one is chosen by the lengths, of which `max_seq_len` is
    the longest sequence's; under the deterministic profile a query's bits depend on its own keys
    alone.
    """
    longest = tokens - num_decodes if max_query_len is None else max_query_len
    setting = setting or prefill_setting(longest, max_seq_len, profile.deterministic)
    step = _cuda.PrefillStep(
        tokens=tokens,
        seqs=len(seq_lens),
        num_decodes=num_decodes,
        max_query_len=longest,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        min_span=setting.min_span,
        warpgroups=setting.warpgroups,
        any_batch=False,
    )
    plan = PrefillPlan(step, _buffers([step], seq_lens.device))
    plan.plan(query_start, seq_lens, num_decodes)
    return plan


def any_batch_plan(
    *, tokens: int, seqs: int, heads: int, kv_heads: int, dim: int, buffers: PrefillBuffers
) -> PrefillPlan:
    """Of any batch of that many tokens and up to `seqs` sequences, yet to be planned: what runs,
    and on what addresses, follows from the number of tokens alone, so that a graph serves every
    batch that is planned before a replay. `buffers` are `any_batch_buffers`, one for all sizes.
    """
    setting = prefill_setting(tokens, None, profile.deterministic)
    step = _any_batch(tokens, seqs, heads, kv_heads, dim, tokens, setting)
    return PrefillPlan(step, buffers)


def any_batch_buffers(
    *, tokens: int, seqs: int, heads: int, kv_heads: int, dim: int, device: torch.device
) -> PrefillBuffers:
    """For plans of any batch of up to so many tokens and sequences, whichever kernel they take."""
    steps = [
        _any_batch(tokens, seqs, heads, kv_heads, dim, longest, PrefillSetting(MIN_SPAN, hopper))
        for longest, hopper in ((1, False), (tokens, False), (tokens, True))
    ]
    return _buffers(steps, device)


def _any_batch(
    tokens: int,
    seqs: int,
    heads: int,
    kv_heads: int,
    dim: int,
    max_query_len: int,
    setting: PrefillSetting,
) -> _cuda.PrefillStep:
    return _cuda.PrefillStep(
        tokens=tokens,
        seqs=seqs,
        num_decodes=0,
        max_query_len=max_query_len,
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        min_span=setting.min_span,
        warpgroups=setting.warpgroups,
        any_batch=True,
    )


def _buffers(steps: Sequence[_cuda.PrefillStep], device: torch.device) -> PrefillBuffers:
    """As large as the largest of these needs."""
    return PrefillBuffers(
        torch.empty(max(s.list_words for s in steps), dtype=torch.int32, device=device),
        torch.empty(max(s.partial_floats for s in steps), dtype=torch.float32, device=device),
    )


def _aligned(query: torch.Tensor) -> bool:
    return (
        query.data_ptr() % _ALIGNMENT == 0
        and query.stride(0) * query.element_size() % _ALIGNMENT == 0
    )
