"""Draws and log-probabilities on a GPU."""

from __future__ import annotations

import torch

import octavo_kernels._cuda as _cuda
from octavo_kernels.native import Unserved, address, stream_of, type_code
from octavo_kernels.reference_sampling import Adjustments, Ends, Sampling, TokenLogprobs


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    slots: torch.Tensor | None,
    scale: float,
    softcap: float,
    ends: Ends | None,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    rows, vocab = logits.shape
    _require_vocabulary(vocab)
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int32, device=device)
    size = _cuda.sample_workspace(rows, vocab)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    adjustments = None if sampling.adjusted is None else sampling.adjustments
    _cuda.sample(
        dtype=type_code("sample", logits),
        logits=logits.data_ptr(),
        rows=rows,
        vocab=vocab,
        stride=logits.stride(0),
        scale=scale,
        softcap=softcap,
        slots=address(slots),
        temperature=sampling.temperature.data_ptr(),
        top_k=sampling.top_k.data_ptr(),
        top_p=sampling.top_p.data_ptr(),
        min_p=sampling.min_p.data_ptr(),
        draw_stream=sampling.stream.data_ptr(),
        count=sampling.count.data_ptr(),
        adjusted=address(sampling.adjusted),
        adjustments=_addresses(adjustments),
        marks_stride=0 if adjustments is None else adjustments.marks.shape[1],
        list_stride=0 if adjustments is None else adjustments.list_ids.shape[1],
        stop_ids=address(ends.stop_ids if ends else None),
        max_tokens=address(ends.max_tokens if ends else None),
        flags=address(ends.flags if ends else None),
        tokens=tokens.data_ptr(),
        kept=address(kept),
        workspace=workspace.data_ptr(),
        stream=stream_of(logits),
    )
    return tokens


def restart_marks(
    marks: torch.Tensor,
    prompt: torch.Tensor,
    drawn: torch.Tensor,
    allowed: torch.Tensor,
    listed: torch.Tensor,
) -> None:
    _cuda.restart_marks(
        row=marks.data_ptr(),
        length=len(marks),
        prompt=prompt.data_ptr(),
        num_prompt=len(prompt),
        drawn=drawn.data_ptr(),
        num_drawn=len(drawn),
        allowed=allowed.data_ptr(),
        num_allowed=len(allowed),
        listed=listed.data_ptr(),
        num_listed=len(listed),
        stream=stream_of(marks),
    )


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    wanted: torch.Tensor,
    top: int,
    scale: float,
    softcap: float,
) -> TokenLogprobs:
    rows, vocab = logits.shape
    _require_vocabulary(vocab)
    if top > _cuda.MAX_TOP:
        raise Unserved(f"token_logprobs of the {_cuda.MAX_TOP} most probable tokens, not of {top}")
    device = logits.device
    out = TokenLogprobs(
        torch.empty(rows, dtype=torch.float32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
        torch.empty(rows, top, dtype=torch.int32, device=device),
        torch.empty(rows, top, dtype=torch.float32, device=device),
    )
    _cuda.token_logprobs(
        dtype=type_code("token_logprobs", logits),
        logits=logits.data_ptr(),
        rows=rows,
        vocab=vocab,
        stride=logits.stride(0),
        scale=scale,
        softcap=softcap,
        tokens=tokens.data_ptr(),
        wanted=wanted.data_ptr(),
        logprob=out.logprob.data_ptr(),
        rank=out.rank.data_ptr(),
        top_ids=out.top_ids.data_ptr(),
        top_logprobs=out.top_logprobs.data_ptr(),
        top=top,
        stream=stream_of(logits),
    )
    return out


def _addresses(a: Adjustments | None) -> list[int]:
    """In the order of `Adjustments` in sampling.h."""
    if a is None:
        return [0] * 9
    tensors = (
        a.marks, a.repetition, a.presence, a.frequency, a.allowed_only, a.list_length, a.list_ids,
        a.list_bias, a.list_until,
    )  # fmt: skip
    return [tensor.data_ptr() for tensor in tensors]


def _require_vocabulary(vocab: int) -> None:
    if not 0 < vocab <= _cuda.MAX_VOCAB:
        raise Unserved(f"draws from 1 to {_cuda.MAX_VOCAB} tokens, not from {vocab}")
