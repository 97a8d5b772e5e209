"""Paged attention: the checks of its arguments, and the plan that a step's layers share."""

from __future__ import annotations

from typing import Any

import torch

from octavo_kernels.attention_work import AttentionWork, attention_work
from octavo_kernels.dispatch import run
from octavo_kernels.match import Arg, checks, match
from octavo_kernels.reference import PLAIN, Variant

__all__ = ["AttentionWork", "attention_work", "paged_attention", "plan_attention"]


def paged_attention(  # noqa: PLR0913 (tensors, and what is known of them)
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    query_start: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    variant: Variant = PLAIN,
    *,
    num_decodes: int = 0,
    max_query_len: int | None = None,
    work: AttentionWork | None = None,
) -> torch.Tensor:
    """Causal attention over paged keys and values; see `reference.paged_attention`.

    The first `num_decodes` sequences have exactly one query each, none has more than
    `max_query_len`; 0 and None say that nothing is known. `work` was planned for these lengths by
    `plan_attention`; without it a GPU plans each call anew. The three are of use on a GPU alone.
    """
    if checks.on:
        args = [
            Arg("query", query, "tokens heads dim", rows=True),
            Arg("key_cache", key_cache, "blocks block_size kv_heads dim"),
            Arg("value_cache", value_cache, "blocks block_size kv_heads dim"),
            Arg("block_tables", block_tables, "seqs max_blocks", torch.int32),
            Arg("query_start", query_start, "seqs+1", torch.int32),
            Arg("seq_lens", seq_lens, "seqs", torch.int32),
        ]
        if variant.sinks is not None:
            args.append(Arg("sinks", variant.sinks, "heads", torch.float32))
        _check(match("paged_attention", *args), variant, num_decodes)
    out: torch.Tensor = run(
        "paged_attention",
        query,
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        seq_lens,
        scale,
        variant,
        num_decodes,
        max_query_len,
        work,
    )
    return out


def plan_attention(
    work: AttentionWork,
    seq_lens: torch.Tensor,
    num_decodes: int,
    *,
    query_start: torch.Tensor | None = None,
    tokens: int = 0,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    for_graph: bool = False,
) -> None:
    """Plan a step, for all of its layers: the first `num_decodes` sequences have one query each.

    Where there are other sequences, `query_start` and the number of `tokens` of the step make them
    part of the plan; the longest of these has `max_seq_len` tokens, which only decides what is
    fastest. A sequence of length 0 is padding. Can be captured in a CUDA graph: a replay plans for
    the lengths that it finds. Elsewhere than on a GPU there is nothing to plan.

    `for_graph` plans ahead of a graph that holds the layers alone: `tokens` decides how they run,
    and a graph captured after such a plan runs every later one of as many tokens, whatever the mix
    of decodes and chunks. The tensors must begin where they did.
    """
    if num_decodes < 0 or num_decodes > len(seq_lens):
        raise ValueError(
            f"plan_attention: num_decodes is {num_decodes}, but there are {len(seq_lens)} sequences"
        )
    if for_graph and (query_start is None or tokens > work.max_tokens):
        raise ValueError(
            f"plan_attention: a graph of {tokens} tokens needs query_start and work for as many; "
            f"this is for {work.max_tokens}"
        )
    run(
        "plan_attention",
        seq_lens,
        work,
        seq_lens,
        num_decodes,
        query_start,
        tokens,
        max_query_len,
        max_seq_len,
        for_graph,
        composed=_nothing,
    )


def _nothing(*_: Any) -> None:
    """Other back ends plan nothing."""


def _check(size: dict[str, int], variant: Variant, num_decodes: int) -> None:
    if size["seqs+1"] != size["seqs"] + 1:
        raise ValueError(
            f"paged_attention: query_start has {size['seqs+1']} entries for {size['seqs']} "
            "sequences; it needs one more than seq_lens"
        )
    if size["kv_heads"] == 0 or size["heads"] % size["kv_heads"] != 0:
        raise ValueError(
            f"paged_attention: query has {size['heads']} heads, not a multiple of the "
            f"{size['kv_heads']} heads of key_cache"
        )
    if variant.window < 0 or not variant.softcap >= 0:
        raise ValueError(
            f"paged_attention: window and softcap must be 0 or more, got {variant.window} and "
            f"{variant.softcap}"
        )
    if not 0 <= num_decodes <= min(size["seqs"], size["tokens"]):
        raise ValueError(
            f"paged_attention: num_decodes is {num_decodes}, but there are {size['seqs']} "
            f"sequences and {size['tokens']} tokens"
        )
