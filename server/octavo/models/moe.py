"""A mixture of experts: route each token, run each expert on its tokens, add what comes out."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from octavo.models.spec import Activation, MoeSpec
from octavo_kernels import ops


def route(logits: torch.Tensor, moe: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token's experts and their weights, [tokens, top_k] both."""
    weights, experts = logits.float().softmax(dim=-1).topk(moe.top_k, dim=-1)
    if moe.normalized:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, experts


def mixture(
    x: torch.Tensor,
    parameters: dict[str, torch.Tensor],
    at: str,
    moe: MoeSpec,
    activation: Activation,
) -> torch.Tensor:
    """The weighted sum of each token's experts, added in the order of the experts."""
    gate_up, gate_up_bias = _of_experts(parameters, at + "experts.gate_up", moe)
    down, down_bias = _of_experts(parameters, at + "experts.down", moe)
    logits = linear(x, parameters[at + "router"], parameters.get(at + "router.bias"))
    weights, experts = route(logits, moe)
    out = torch.zeros_like(x)
    for expert in sorted(set(experts.flatten().tolist())):
        token, place = (experts == expert).nonzero(as_tuple=True)
        inner = linear(x[token], gate_up[expert], gate_up_bias[expert])
        inner = (
            _clamped_swiglu(inner, moe) if moe.swiglu_limit else ops.act_and_mul(inner, activation)
        )
        result = linear(inner, down[expert], down_bias[expert])
        out.index_add_(0, token, result * weights[token, place, None].to(x.dtype))
    return out


def _of_experts(
    parameters: dict[str, torch.Tensor], name: str, moe: MoeSpec
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The matrices of all experts [experts, rows, columns] and their biases."""
    bias = parameters.get(name + ".bias")
    biases: list[torch.Tensor | None] = [None] * moe.num_experts
    if bias is not None:
        biases = list(bias.view(moe.num_experts, -1))
    matrix = parameters[name]
    return matrix.view(moe.num_experts, -1, matrix.shape[1]), biases


def _clamped_swiglu(x: torch.Tensor, moe: MoeSpec) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    gate = gate.clamp(max=moe.swiglu_limit)
    up = up.clamp(-moe.swiglu_limit, moe.swiglu_limit)
    return (up + 1) * gate * torch.sigmoid(moe.swiglu_alpha * gate)
