"""Drawing tokens from rows of logits, and the log-probabilities of tokens.

Parameters are tensors on the logits' device, one entry a slot, so that a CUDA graph serves whatever
requests ask for. What they mean is in `octavo.params`; the order in which they apply, in
`reference_sampling.py`. Logits are given as the model's last product makes them: `scale` and
`softcap` are applied on the way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from octavo_kernels.dispatch import run
from octavo_kernels.match import Arg, match
from octavo_kernels.reference_sampling import (
    ALLOWED,
    COUNT_MASK,
    FAILED,
    FULL,
    IN_PROMPT,
    LISTED,
    NO_TOKEN,
    NOTHING_ALLOWED,
    STOP_IDS,
    STOPPED,
    Adjustments,
    Ends,
    Sampling,
    TokenLogprobs,
)

__all__ = [
    "ALLOWED", "COUNT_MASK", "FAILED", "FULL", "IN_PROMPT", "LISTED", "NOTHING_ALLOWED", "NO_TOKEN",
    "STOPPED", "STOP_IDS", "Adjustments", "Ends", "Sampling", "TokenLogprobs", "new_adjustments",
    "restart_adjustment", "sample", "token_logprobs",
]  # fmt: skip


def new_adjustments(
    pool: int, vocab_size: int, max_listed: int, device: torch.device
) -> Adjustments:
    """A pool of rows that change nothing; two bytes a token of the vocabulary each."""

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, device=device)

    return Adjustments(
        marks=zeros(pool, -(-vocab_size // 8) * 8, dtype=torch.int16),
        repetition=torch.ones(pool, dtype=torch.float32, device=device),
        presence=zeros(pool, dtype=torch.float32),
        frequency=zeros(pool, dtype=torch.float32),
        allowed_only=zeros(pool, dtype=torch.int32),
        list_length=zeros(pool, dtype=torch.int32),
        list_ids=zeros(pool, max_listed, dtype=torch.int32),
        list_bias=zeros(pool, max_listed, dtype=torch.float32),
        list_until=zeros(pool, max_listed, dtype=torch.int64),
    )


def restart_adjustment(  # noqa: PLR0913 (what a request may ask for)
    adjustments: Adjustments,
    row: int,
    *,
    prompt: Sequence[int] = (),
    drawn: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
    listed: Sequence[tuple[int, float, int]] = (),
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
) -> None:
    """Give a row of the pool to a sequence that has the `prompt` and has `drawn` so much.

    Only `allowed` tokens are drawn, if it is not None. `listed` are (token id, bias, until): the
    bias is added while fewer than `until` tokens are drawn; -infinity forbids the token. Raises
    `ValueError` where the list is longer than the pool's.
    """
    entries = adjustments.list_ids.shape[1]
    if len(listed) > entries:
        raise ValueError(
            f"restart_adjustment: {len(listed)} listed tokens, but the pool has room for {entries}"
        )
    device = adjustments.marks.device
    columns = list(zip(*sorted(listed), strict=True)) or [(), (), ()]
    ids, bias, until = (
        _sent(column, tensor.dtype, device)
        for column, tensor in zip(
            columns,
            (adjustments.list_ids, adjustments.list_bias, adjustments.list_until),
            strict=True,
        )
    )
    adjustments.list_ids[row, : len(ids)] = ids
    adjustments.list_bias[row, : len(ids)] = bias
    adjustments.list_until[row, : len(ids)] = until
    adjustments.list_length[row] = len(ids)
    adjustments.repetition[row] = repetition
    adjustments.presence[row] = presence
    adjustments.frequency[row] = frequency
    adjustments.allowed_only[row] = allowed is not None

    seen = (_sent(values, torch.int64, device) for values in (prompt, drawn, allowed or ()))
    run("restart_marks", adjustments.list_ids, adjustments.marks[row], *seen, ids)


def _sent(values: Sequence[int | float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The numbers on the device, or on their way: nothing waits for what runs there."""
    on_gpu = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=on_gpu).to(device, non_blocking=on_gpu)


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    *,
    slots: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float = 0.0,
    ends: Ends | None = None,
) -> torch.Tensor:
    """A token for each row of `logits` [rows, vocab], int32; rows of any stride.

    Row r is sampled as slot slots[r] (int32) says, or as slot r; slot -1 is padding and gives 0.
    NO_TOKEN where the logits are not numbers, NOTHING_ALLOWED where the adjustments forbid all. A
    drawn token is counted in its slot's marks, and what it means for the sequence is written to
    `ends.flags`. `count` stays as it is.
    """
    args = [
        Arg("logits", logits, "rows vocab", rows=True),
        Arg("temperature", sampling.temperature, "slots", torch.float32),
        Arg("top_k", sampling.top_k, "slots", torch.int32),
        Arg("top_p", sampling.top_p, "slots", torch.float32),
        Arg("min_p", sampling.min_p, "slots", torch.float32),
        Arg("stream", sampling.stream, "slots", torch.int64),
        Arg("count", sampling.count, "slots", torch.int64),
    ]
    if slots is not None:
        args.append(Arg("slots", slots, "rows", torch.int32))
    if sampling.adjusted is not None:
        args.append(Arg("adjusted", sampling.adjusted, "slots", torch.int32))
        args += _adjustment_args(sampling.adjustments)
    if ends is not None:
        args.append(Arg("stop_ids", ends.stop_ids, "slots stop_ids", torch.int32))
        args.append(Arg("max_tokens", ends.max_tokens, "slots", torch.int64))
        args.append(Arg("flags", ends.flags, "flags", torch.uint8))
    size = match("sample", *args)
    if slots is None and size["rows"] > size["slots"]:
        raise ValueError(f"sample: {size['rows']} rows of logits, but {size['slots']} slots")
    if ends is not None and (size["stop_ids"] != STOP_IDS or size["flags"] < size["rows"]):
        raise ValueError(
            f"sample: ends must have {STOP_IDS} stop_ids a slot and {size['rows']} flags, got "
            f"{size['stop_ids']} and {size['flags']}"
        )
    if sampling.adjusted is not None and size["width"] < size["vocab"]:
        raise ValueError(
            f"sample: marks of {size['width']} tokens for a vocabulary of {size['vocab']}"
        )
    _check_scale("sample", scale, softcap)
    # Its kernels take float32 too, which others do not: integers choose the back end.
    drawn: torch.Tensor = run(
        "sample", sampling.top_k, logits, sampling, slots, scale, softcap, ends
    )
    return drawn


def token_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    wanted: torch.Tensor,
    top: int,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> TokenLogprobs:
    """Of each row's token and of its `wanted` most probable ones, from logits before any parameter.

    `tokens` and `wanted` are int32 [rows]; at most `top` of the most probable ones are given, of
    equals the lower id first. What belongs to a row with a wanted or a token below 0 is undefined.
    """
    match(
        "token_logprobs",
        Arg("logits", logits, "rows vocab", rows=True),
        Arg("tokens", tokens, "rows", torch.int32),
        Arg("wanted", wanted, "rows", torch.int32),
    )
    _check_scale("token_logprobs", scale, softcap)
    found: TokenLogprobs = run(
        "token_logprobs", tokens, logits, tokens, wanted, top, scale, softcap
    )
    return found


def _adjustment_args(adjustments: Adjustments | None) -> list[Arg]:
    if adjustments is None:
        raise ValueError("sample: `adjusted` names rows of adjustments, but there are none")
    a = adjustments
    return [
        Arg("marks", a.marks, "pool width", torch.int16),
        Arg("repetition", a.repetition, "pool", torch.float32),
        Arg("presence", a.presence, "pool", torch.float32),
        Arg("frequency", a.frequency, "pool", torch.float32),
        Arg("allowed_only", a.allowed_only, "pool", torch.int32),
        Arg("list_length", a.list_length, "pool", torch.int32),
        Arg("list_ids", a.list_ids, "pool listed", torch.int32),
        Arg("list_bias", a.list_bias, "pool listed", torch.float32),
        Arg("list_until", a.list_until, "pool listed", torch.int64),
    ]


def _check_scale(op: str, scale: float, softcap: float) -> None:
    if not (scale > 0 and softcap >= 0):
        raise ValueError(
            f"{op}: scale must be above 0 and softcap 0 or more, got {scale} and {softcap}"
        )
