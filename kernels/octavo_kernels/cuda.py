"""Operations on a GPU, by the compiled module `_cuda`; shapes were matched.

What each means is in `reference.py`, under the same name and with the same arguments. Everything
here can be captured in a CUDA graph: no synchronization, no read of what is on the device.
"""

from __future__ import annotations

import octavo_kernels._cuda as _cuda
from octavo_kernels.cuda_attention import paged_attention, plan_attention
from octavo_kernels.cuda_batch import apply_updates, build_inputs, record_tokens
from octavo_kernels.cuda_device import DeviceReport, refusal
from octavo_kernels.cuda_elementwise import (
    act,
    act_and_mul,
    copy_blocks,
    embed,
    layer_norm,
    qk_norm_rope_write,
    rms_norm,
    rope,
    swap_blocks,
    write_kv,
)
from octavo_kernels.cuda_gemm import gated_linear, linear, linear_add
from octavo_kernels.cuda_moe import mixture
from octavo_kernels.cuda_persistent import decode_layers, decode_logits, layer_stack
from octavo_kernels.cuda_sampling import restart_marks, sample, token_logprobs
from octavo_kernels.cuda_tune import tune_products

__all__ = [
    "act", "act_and_mul", "apply_updates", "build_inputs", "copy_blocks", "decode_layers",
    "decode_logits", "device_report", "embed", "gated_linear", "layer_norm", "layer_stack",
    "linear", "linear_add", "mixture", "paged_attention", "plan_attention", "qk_norm_rope_write",
    "record_tokens", "restart_marks", "rms_norm", "rope", "sample", "swap_blocks", "token_logprobs",
    "tune_products", "write_kv",
]  # fmt: skip


def device_report(device: int = 0) -> DeviceReport:
    """What `_cuda` sees of the device and its driver; see `csrc/cuda/device.h`.

    Raises RuntimeError in a sentence for the user where our kernels do not run on them.
    """
    report = _cuda.device_report(device)
    if (why := refusal(report, device)) is not None:
        raise RuntimeError(why)
    return report
