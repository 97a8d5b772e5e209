"""Paged attention on a GPU: decodes by one kernel, the other sequences by another."""

from __future__ import annotations

from dataclasses import replace

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.attention_settings import DecodeSetting
from octavo_kernels.attention_work import AttentionWork, attention_work
from octavo_kernels.cuda_prefill import any_batch_buffers, any_batch_plan, plan_prefill
from octavo_kernels.native import Unserved, address, stream_of, type_code
from octavo_kernels.reference import Variant

_WORD = 4  # bytes: the decode kernel reads queries in words


def plan_attention(
    work: AttentionWork,
    seq_lens: torch.Tensor,
    num_decodes: int,
    query_start: torch.Tensor | None,
    tokens: int,
    max_query_len: int | None,
    max_seq_len: int | None,
    for_graph: bool,
) -> None:
    work.prefill = None
    work.for_graph = for_graph
    if for_graph and query_start is not None:
        _plan_for_graph(work, seq_lens, num_decodes, query_start, tokens)
        return
    if num_decodes:
        work.decode = _setting(work, num_decodes)
        _plan_decodes(work, work.decode, seq_lens, num_decodes)
    if num_decodes < len(seq_lens) and query_start is not None:
        work.prefill = plan_prefill(
            query_start,
            seq_lens,
            tokens=tokens,
            heads=work.heads,
            kv_heads=work.kv_heads,
            dim=work.dim,
            num_decodes=num_decodes,
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
        )


def _plan_for_graph(
    work: AttentionWork,
    seq_lens: torch.Tensor,
    num_decodes: int,
    query_start: torch.Tensor,
    tokens: int,
) -> None:
    """Decodes run as if every token were one, but are cut as so few are, where there is room."""
    work.decode = _setting(work, min(tokens, work.max_seqs))
    cut = replace(work.decode, chunk=_setting(work, num_decodes).chunk)
    _plan_decodes(work, cut, seq_lens, num_decodes)
    work.prefill = work.plans.get(tokens)
    if work.prefill is None:
        shape = {"heads": work.heads, "kv_heads": work.kv_heads, "dim": work.dim}
        if work.prefill_buffers is None:
            work.prefill_buffers = any_batch_buffers(
                tokens=work.max_tokens, seqs=work.max_seqs, device=seq_lens.device, **shape
            )
        work.prefill = work.plans[tokens] = any_batch_plan(
            tokens=tokens, seqs=work.max_seqs, buffers=work.prefill_buffers, **shape
        )
    work.prefill.plan(query_start, seq_lens, num_decodes)


def paged_attention(  # noqa: PLR0913 (as the operation is)
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    variant: Variant,
    num_decodes: int,
    max_query_len: int | None,
    work: AttentionWork | None,
) -> torch.Tensor:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    seqs = len(seq_lens)
    both = work is not None and work.for_graph
    if num_decodes or both:
        decode(
            query, key_cache, value_cache, block_tables, seq_lens, scale, variant, num_decodes,
            work, out,
        )  # fmt: skip
    if num_decodes < seqs or both:
        plan = None if work is None else work.prefill
        if plan is None:
            tokens, heads, dim = query.shape
            plan = plan_prefill(
                query_start,
                seq_lens,
                tokens=tokens,
                heads=heads,
                kv_heads=key_cache.shape[2],
                dim=dim,
                num_decodes=num_decodes,
                max_query_len=max_query_len,
            )
        plan.attend(query, key_cache, value_cache, block_tables, scale, variant, out)
    return out


def decode(  # noqa: PLR0913 (as the operation is)
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    variant: Variant,
    num_decodes: int,
    work: AttentionWork | None,
    out: torch.Tensor,
) -> None:
    """Write the first `num_decodes` rows of `out`. `work` was planned for these lengths; without
    one a temporary one is made and planned.
    """
    _, block_size, kv_heads, dim = key_cache.shape
    heads = query.shape[1]
    if not _cuda.decode_serves(dim, block_size):
        raise Unserved(
            "decode has kernels for head dims 64, 80, 96, 128 and 256 and blocks of a power of "
            f"two of 8 or more tokens, not for head dim {dim} and blocks of {block_size}"
        )
    if query.data_ptr() % _WORD or query.stride(0) * query.element_size() % _WORD:
        query = query.contiguous()
    if work is None:
        work = attention_work(
            max_seqs=num_decodes,
            max_seq_len=block_tables.shape[1] * block_size,
            heads=heads,
            kv_heads=kv_heads,
            dim=dim,
            device=query.device,
            windows=(variant.window,),
        )
        work.decode = _setting(work, num_decodes)
        _plan_decodes(work, work.decode, seq_lens, num_decodes)
    _check_fits(work, heads, kv_heads, dim, variant.window, num_decodes)
    setting = _planned(work)
    _decode_work(work, setting).attend(
        dtype=type_code("paged_attention", query),
        query=query.data_ptr(),
        query_stride=query.stride(0),
        key_cache=key_cache.data_ptr(),
        value_cache=value_cache.data_ptr(),
        block_tables=block_tables.data_ptr(),
        max_blocks=block_tables.shape[1],
        block_size=block_size,
        out=out.data_ptr(),
        heads=heads,
        kv_heads=kv_heads,
        dim=dim,
        scale=scale,
        softcap=variant.softcap,
        sinks=address(variant.sinks),
        window=work.windows.index(variant.window),
        stages=setting.stages,
        blocks_per_sm=setting.blocks_per_sm,
        stream=stream_of(query),
    )


def _setting(work: AttentionWork, num_decodes: int) -> DecodeSetting:
    if num_decodes > work.max_seqs:
        raise ValueError(
            f"plan_attention: {num_decodes} decodes, but the work is for {work.max_seqs} sequences"
        )
    return work.settings[num_decodes]


def _plan_decodes(
    work: AttentionWork, setting: DecodeSetting, seq_lens: torch.Tensor, num_decodes: int
) -> None:
    _decode_work(work, setting).plan(
        seq_lens=seq_lens.data_ptr(),
        num_decodes=num_decodes,
        stream=stream_of(seq_lens),
    )


def _check_fits(
    work: AttentionWork, heads: int, kv_heads: int, dim: int, window: int, num_decodes: int
) -> None:
    made_for = (work.heads, work.kv_heads, work.dim)
    if made_for != (heads, kv_heads, dim) or num_decodes > work.max_seqs:
        raise ValueError(
            f"paged_attention: the work is for {work.max_seqs} sequences and heads, KV heads, dim "
            f"{made_for}; the call has {num_decodes} decodes and {(heads, kv_heads, dim)}"
        )
    if window not in work.windows:
        raise ValueError(
            f"paged_attention: window {window} is not among the work's windows {work.windows}"
        )


def _planned(work: AttentionWork) -> DecodeSetting:
    if work.decode is None:
        raise ValueError(
            "paged_attention: the work has no plan for decodes; call plan_attention first"
        )
    return work.decode


def _decode_work(work: AttentionWork, setting: DecodeSetting) -> _cuda.DecodeWork:
    return _cuda.DecodeWork(
        list_size=work.chunks.shape[1],
        chunk=setting.chunk,
        max_chunks=setting.max_chunks,
        num_windows=len(work.windows),
        windows=work.window_sizes.data_ptr(),
        chunks=work.chunks.data_ptr(),
        counts=work.counts.data_ptr(),
        ticket=work.ticket.data_ptr(),
        arrivals=work.arrivals.data_ptr(),
        values=work.values.data_ptr(),
        sums=work.sums.data_ptr(),
    )
