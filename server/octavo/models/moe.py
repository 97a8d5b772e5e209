"""A mixture of experts in the place of an MLP: its router, and its parameters as the kernels take
them.
"""

from __future__ import annotations

import torch

from octavo.models.spec import Activation, MoeSpec
from octavo_kernels import ops


def mixture(
    x: torch.Tensor,
    parameters: dict[str, torch.Tensor],
    at: str,
    moe: MoeSpec,
    activation: Activation,
) -> torch.Tensor:
    """The weighted sum of each token's experts."""
    logits = ops.linear(x, parameters[at + "router"], parameters.get(at + "router.bias"))
    experts = ops.Experts(
        gate_up=parameters[at + "experts.gate_up"],
        down=parameters[at + "experts.down"],
        gate_up_bias=parameters.get(at + "experts.gate_up.bias"),
        down_bias=parameters.get(at + "experts.down.bias"),
        top_k=moe.top_k,
        normalized=moe.normalized,
        function=activation,
        swiglu_alpha=moe.swiglu_alpha,
        swiglu_limit=moe.swiglu_limit,
    )
    return ops.mixture(x.contiguous(), logits, experts)
