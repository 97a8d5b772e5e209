"""A mixture of experts: route each token, run each expert on its tokens, add what comes out."""

from __future__ import annotations

import torch
from torch.nn import functional

from octavo_kernels.dispatch import run
from octavo_kernels.match import Arg, match
from octavo_kernels.reference import Experts

__all__ = ["Experts", "mixture"]


def mixture(x: torch.Tensor, logits: torch.Tensor, experts: Experts) -> torch.Tensor:
    """The weighted sum of each token's experts [tokens, hidden].

    `logits` [tokens, experts] are the router's. Each token goes to the `top_k` of the greatest,
    weighted by the softmax over all logits, or, `normalized`, over the chosen ones. On a GPU a
    token's result does not depend on the other tokens.
    """
    args = [
        Arg("x", x, "tokens hidden"),
        Arg("logits", logits, "tokens experts"),
        Arg("gate_up", experts.gate_up, "experts*2*inner hidden"),
        Arg("down", experts.down, "experts*hidden inner"),
    ]
    if experts.gate_up_bias is not None:
        args.append(Arg("gate_up_bias", experts.gate_up_bias, "experts*2*inner"))
    if experts.down_bias is not None:
        args.append(Arg("down_bias", experts.down_bias, "experts*hidden"))
    size = match("mixture", *args)
    count = size["experts"]
    for name, of_one in (
        ("experts*2*inner", 2 * size["inner"]),
        ("experts*hidden", size["hidden"]),
    ):
        if size[name] != count * of_one:
            raise ValueError(
                f"mixture: {name} is {size[name]}, but {count} x {of_one} was expected"
            )
    if not 1 <= experts.top_k <= count:
        raise ValueError(f"mixture: top_k is {experts.top_k}; there are {count} experts")
    out: torch.Tensor = run("mixture", x, x, logits, experts, composed=_mixture)
    return out


def _route(logits: torch.Tensor, experts: Experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's weights and experts, [tokens, top_k] both."""
    weights, chosen = logits.float().softmax(dim=-1).topk(experts.top_k, dim=-1)
    if experts.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, chosen


def _mixture(x: torch.Tensor, logits: torch.Tensor, experts: Experts) -> torch.Tensor:
    """One expert after the other, their results added in their order."""
    count, hidden = logits.shape[1], x.shape[1]
    gate_up, down = experts.gate_up.view(count, -1, hidden), experts.down.view(count, hidden, -1)
    gate_up_bias = _biases(experts.gate_up_bias, count)
    down_bias = _biases(experts.down_bias, count)
    weights, chosen = _route(logits, experts)
    out = torch.zeros_like(x)
    for expert in sorted(set(chosen.flatten().tolist())):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        inner = functional.linear(x[token], gate_up[expert], gate_up_bias[expert])
        inner = (
            _clamped_swiglu(inner, experts)
            if experts.swiglu_limit
            else run("act_and_mul", inner, inner, experts.function)
        )
        result = functional.linear(inner, down[expert], down_bias[expert])
        out.index_add_(0, token, result * weights[token, place, None].to(x.dtype))
    return out


def _biases(bias: torch.Tensor | None, count: int) -> list[torch.Tensor | None]:
    return [None] * count if bias is None else list(bias.view(count, -1))


def _clamped_swiglu(x: torch.Tensor, experts: Experts) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    gate = gate.clamp(max=experts.swiglu_limit)
    up = up.clamp(-experts.swiglu_limit, experts.swiglu_limit)
    return (up + 1) * gate * torch.sigmoid(experts.swiglu_alpha * gate)
