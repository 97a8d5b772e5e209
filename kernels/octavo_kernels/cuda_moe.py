"""Mixtures of experts on a GPU."""

from __future__ import annotations

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import FUNCTIONS, Unserved, address, type_code
from octavo_kernels.reference import Experts

_TILE_WORDS = 3  # of moe.h's ExpertTile


def mixture(x: torch.Tensor, logits: torch.Tensor, experts: Experts) -> torch.Tensor:
    (tokens, hidden), count, top_k = x.shape, logits.shape[1], experts.top_k
    inner, pairs = experts.down.shape[1], tokens * top_k
    if not _cuda.mixture_serves(hidden, inner, count, top_k):
        raise Unserved(
            f"there are kernels for up to 512 experts of which 32 are chosen, with sizes that are "
            f"multiples of 8; these are {count} of {hidden} x {inner}, of which {top_k} are chosen"
        )
    out = torch.empty_like(x)
    tiles = _cuda.mixture_tiles(tokens, count, top_k)
    weights = x.new_empty(pairs, dtype=torch.float32)
    numbers = x.new_empty(3 * pairs + _TILE_WORDS * tiles, dtype=torch.int32)
    chosen, order, place, tile_list = numbers.split([pairs, pairs, pairs, _TILE_WORDS * tiles])
    activated, results = x.new_empty((pairs, inner)), x.new_empty((pairs, hidden))
    _cuda.mixture(
        dtype=type_code("mixture", x),
        x=x.data_ptr(),
        logits=logits.data_ptr(),
        gate_up=experts.gate_up.data_ptr(),
        gate_up_bias=address(experts.gate_up_bias),
        down=experts.down.data_ptr(),
        down_bias=address(experts.down_bias),
        out=out.data_ptr(),
        tokens=tokens,
        hidden=hidden,
        inner=inner,
        experts=count,
        top_k=top_k,
        normalized=experts.normalized,
        function=FUNCTIONS.index(experts.function),
        swiglu_alpha=experts.swiglu_alpha,
        swiglu_limit=experts.swiglu_limit,
        weights=weights.data_ptr(),
        chosen=chosen.data_ptr(),
        order=order.data_ptr(),
        place=place.data_ptr(),
        tiles=tile_list.data_ptr(),
        activated=activated.data_ptr(),
        results=results.data_ptr(),
        stream=torch.cuda.current_stream(x.device).cuda_stream,
    )
    return out
